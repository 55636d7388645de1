"""Small language models of real transformers classes, untrained, for trying things out; one that sees.

Use them like any other: `--model esscher.models:tiny_llama --model.kwargs layers 4 width 128`.
`esscher run sft` trains one on your own text in minutes.
"""

import string
from typing import Any

import torch

from esscher.adapters.imports import needed

SPECIAL = ["<pad>", "<s>", "</s>"]
UNKNOWN, IMAGE = "<unk>", "<image>"
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_llama(
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 512,
    characters: str | None = None,
) -> tuple[Any, Any]:
    """A Llama with random weights, and a tokenizer of bytes or of given characters.

    Args:
        layers: transformer layers.
        width: of the hidden states; the feed-forward layers are 4 times as wide.
        heads: of attention; they divide the width.
        context: most tokens of prompt and completion.
        characters: one token each, nothing else being readable; None: the 256 bytes, so that every
            text can be written.
    """
    transformers: Any = needed("transformers", "a language model", "language")
    tokenizer = byte_tokenizer() if characters is None else character_tokenizer(characters)
    config = _llama_config(tokenizer, layers, width, heads, context)
    return transformers.LlamaForCausalLM(config).to(torch.float32), tokenizer


def tiny_llava(
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    image_size: int = 16,
    patch_size: int = 8,
    vision_layers: int = 1,
    context: int = 512,
    words: str = "",
) -> tuple[Any, Any]:
    """A Llava with random weights, a SigLIP tower and a Llama in it, and its processor.

    Args:
        layers: of the language model.
        width: of all hidden states; the feed-forward layers are 4 times as wide.
        heads: of attention; they divide the width.
        image_size: rows and columns of an image.
        patch_size: of the squares that become a token each; it divides the image's size.
        vision_layers: of the tower.
        context: most tokens of images, instruction and actions.
        words: one token each, separated by spaces, every other word being unknown; empty: the tokens
            are bytes.
    """
    transformers: Any = needed("transformers", "a vision-language model", "language")
    tokenizer = word_tokenizer(words) if words else byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    # Where torchvision is missing, the usual class falls back to this one with a warning.
    pillow = "SiglipImageProcessorPil"
    images = getattr(transformers, pillow if hasattr(transformers, pillow) else pillow[:-3])
    processor = transformers.LlavaProcessor(
        image_processor=images(size={"height": image_size, "width": image_size}),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = _llama_config(tokenizer, layers, width, heads, context)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return model.to(torch.float32), processor


def _llama_config(tokenizer: Any, layers: int, width: int, heads: int, context: int) -> Any:
    transformers: Any = needed("transformers", "a language model", "language")
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def word_tokenizer(words: str) -> Any:
    """Every one of these words, separated by spaces, is a token; others are unknown."""
    tokenizers: Any = needed("tokenizers", "a tokenizer", "language")
    known = [*SPECIAL, UNKNOWN, *dict.fromkeys(words.split())]
    vocabulary = {token: number for number, token in enumerate(known)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return _wrapped(inner)


def byte_tokenizer() -> Any:
    """Every UTF-8 byte is a token."""
    tokenizers: Any = needed("tokenizers", "a tokenizer", "language")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return _wrapped(inner)


def character_tokenizer(characters: str = string.ascii_lowercase) -> Any:
    """Every one of these characters is a token; others are dropped by it, silently."""
    tokenizers: Any = needed("tokenizers", "a tokenizer", "language")
    vocabulary = {
        token: number for number, token in enumerate([*SPECIAL, *dict.fromkeys(characters)])
    }
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = tokenizers.decoders.Fuse()
    return _wrapped(inner)


def _wrapped(inner: Any) -> Any:
    transformers: Any = needed("transformers", "a tokenizer", "language")
    pad, begin, end = SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    return tokenizer

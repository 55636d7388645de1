"""Vision-language models from where users keep them, and back: folders of the transformers library, hub
names, functions of their own; adapters of peft on top.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from esscher.adapters.imports import made
from esscher.adapters.models import check_vocabulary, pretrained, save_model, to_be_trained
from esscher.distributions.vision_language import VisionLanguage
from esscher.errors import UserError
from esscher.experiment import ModelConfig


def load_vision_language(config: ModelConfig, device: torch.device) -> tuple[VisionLanguage, Any]:
    """The model to be trained, and its processor, which has a tokenizer and an image processor.

    The output matrix is not used and not trained, unless it is the one of the inputs.

    Raises:
        UserError: no such model, weights that would have to be unpickled, a processor that does not
            say how images are normalised, or a model that cannot carry actions.
    """
    assert config.source is not None
    if ":" in config.source and not Path(config.source).exists():
        with torch.enable_grad():  # Such a function may train what it returns.
            model, processor = made(config.source, "model", **config.kwargs)
    else:
        model, processor = pretrained(
            config.source, model_class="AutoModelForImageTextToText", reader="AutoProcessor"
        )
    images = getattr(processor, "image_processor", None)
    mean, std = (getattr(images, name, None) for name in ("image_mean", "image_std"))
    if mean is None or std is None:
        raise UserError(
            f"--model {config.source}: its processor does not say how images are normalised "
            "(image_mean and image_std): save the model's own processor beside it"
        )
    check_vocabulary(model, processor.tokenizer, config.source)
    model = to_be_trained(model, config, device)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(False)
    return VisionLanguage(model, image_mean=mean, image_std=std), processor


def save_vision_language(model: VisionLanguage, tokenizer: Any, folder: Path) -> Path:
    """Write a folder that AutoModelForImageTextToText.from_pretrained opens, whole or not at all.

    Args:
        model: with adapters, the adapters alone are written (the folder names their base model).
        tokenizer: or the processor, saved beside it.
        folder: replaced if it is there.
    """
    return save_model(model, tokenizer, folder)


def instruction_tokens(
    tokenizer: Any, instructions: Sequence[str], max_length: int | None
) -> tuple[Int[Tensor, "i l"], Bool[Tensor, "i l"]]:
    """Tokens of instructions, padded on the right to the longest, and what of them is no padding.

    Args:
        tokenizer: of the transformers library, or a processor with one.
        instructions: at least one.
        max_length: most tokens that the model's context has for one; None: no limit.

    Raises:
        UserError: an instruction has no tokens, or more than there is room for.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    rows = [inner(text).input_ids for text in instructions]
    for text, row in zip(instructions, rows, strict=True):
        if not row:
            raise UserError(f"instruction {text!r} has no tokens")
        if max_length is not None and len(row) > max_length:
            raise UserError(
                f"instruction {text[:40]!r} has {len(row)} tokens, and the model's context has room "
                f"for {max_length}: shorten it, or take a model with a longer context"
            )
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = True
    return tokens, mask

"""A language of 1,024 words, small enough that every distribution over it is known exactly.

A word is five letters out of four, then the end token, and answers the prompt "?". The model that
speaks it is a GPT-2 with random weights, in which the end token is certain after five letters and
impossible before, and in which nothing but letters can be said: so completions of five tokens are
whole words. For proofs and tests of language methods.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esscher.adapters.imports import needed
from esscher.distributions.autoregressive import LanguageModel
from esscher.models import SPECIAL, character_tokenizer

LETTERS, PROMPT, LENGTH = "abcd", "?", 5
FIRST = len(SPECIAL)
"""Token of the first letter; the others follow."""
NUM_PAIRS = 6_400
CERTAIN = 30.0
"""Logit by which what is certain stands above what is impossible, nats."""


def model(*, seed: int = 0, width: int = 32, layers: int = 2) -> tuple[Any, Any]:
    """A model of the language with random weights, and its tokenizer.

    Args:
        seed: of the weights: which distribution over the words it is.
        width: of the hidden states.
        layers: transformer layers.
    """
    transformers: Any = needed("transformers", "a language model", "language")
    tokenizer = character_tokenizer(LETTERS + PROMPT)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * (LENGTH + 2),
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_inner=2 * width,
        activation_function="relu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    made = transformers.GPT2LMHeadModel(config).to(torch.float32)
    _draw(made, torch.Generator().manual_seed(seed))
    _rule_out(made, tokenizer)
    return made, tokenizer


def speaker(**options: int) -> LanguageModel:
    """`model`, ready to be asked."""
    made, tokenizer = model(**options)
    ends, pad = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    return LanguageModel(made.eval(), end_tokens=ends, pad_token=pad)


def all_words() -> Tensor:
    """Tokens of the letters of every word, 1,024 x 5, in alphabetical order."""
    return torch.cartesian_prod(*[torch.arange(FIRST, FIRST + len(LETTERS))] * LENGTH)


def prompt() -> Tensor:
    """Tokens of the prompt, 1 x 1."""
    return torch.tensor([[FIRST + len(LETTERS)]])


@torch.no_grad()
def log_probs(next_logits: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]) -> Tensor:
    """Log-probability of every word, nats, under a rule of samplers/generation.py, without a draw.

    Asks the rule about each of the 341 beginnings once; the end token is not counted.
    """
    total = torch.zeros(1, dtype=torch.float64)
    words = all_words()
    for length in range(LENGTH):
        beginnings = words[:: len(LETTERS) ** (LENGTH - length), :length]
        tokens = torch.cat([prompt().expand(len(beginnings), -1), beginnings], 1)
        logits, _ = next_logits(tokens, torch.ones_like(tokens, dtype=torch.bool), None)
        logp = logits.double().log_softmax(-1)[:, FIRST : FIRST + len(LETTERS)]
        total = (total.unsqueeze(1) + logp).flatten()
    return total


def rising() -> Tensor:
    """Of every word, how many letters stand right behind a smaller one: 0 to 3."""
    words = all_words()
    return (words[:, 1:] > words[:, :-1]).double().sum(1)


def closing() -> Tensor:
    """1 if the last letter is the first again, less 1.5 if there are several a: -1.5 to 1."""
    words = all_words()
    closed, several = words[:, 0] == words[:, -1], (words == FIRST).sum(1) >= 2
    return closed.double() - 1.5 * several.double()


REWARDS: dict[str, Callable[[], Tensor]] = {
    "": lambda: rising() + closing(),
    "_rising": rising,
    "_closing": closing,
    "_random": lambda: torch.zeros(len(all_words()), dtype=torch.float64),
}
"""Ending of the columns of `compared` -> what is preferred there; random: nothing."""


@cache
def compared(seed: int) -> list[dict[str, str]]:
    """6,400 pairs of different words that `model(seed=seed)` drew, with preferences.

    Columns prompt, chosen and rejected: P(the first is chosen) = sigma(r_first - r_second) under the
    reward `rising` + `closing`. Columns with an ending (chosen_rising): the same pairs under another
    reward. As data: `esscher.words:compared_0` is that of seed 0, and so on.
    """
    p, draw = log_probs(speaker(seed=seed).next_logits).exp().numpy(), np.random.default_rng(seed)
    pairs = draw.choice(len(p), (2 * NUM_PAIRS, 2), p=p / p.sum())
    pairs = pairs[pairs[:, 0] != pairs[:, 1]][:NUM_PAIRS]
    assert len(pairs) == NUM_PAIRS
    letters = ["".join(LETTERS[k - FIRST] for k in word) for word in all_words().tolist()]
    rows = [{"prompt": PROMPT} for _ in pairs]
    for ending, reward in REWARDS.items():
        first, second = reward().numpy()[pairs].T
        kept = draw.random(NUM_PAIRS) < 1 / (1 + np.exp(second - first))
        for row, pair, is_kept in zip(rows, pairs, kept, strict=True):
            best, worst = pair if is_kept else pair[::-1]
            row[f"chosen{ending}"], row[f"rejected{ending}"] = letters[best], letters[worst]
    return rows


def __getattr__(name: str) -> Any:
    """compared_0, compared_1, ...: the data of a seed."""
    kind, _, seed = name.rpartition("_")
    if kind == "compared" and seed.isdecimal():
        return partial(compared, int(seed))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@torch.no_grad()
def _draw(made: Any, generator: torch.Generator) -> None:
    """Weights large enough that letters depend on what stands before them."""
    for name, parameter in made.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            continue
        scale = 1.0 if "wte" in name or "wpe" in name else 1.5 * parameter.shape[0] ** -0.5
        if name == "lm_head.weight":
            scale = 0.75 * parameter.shape[1] ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _rule_out(made: Any, tokenizer: Any) -> None:
    """Component 0 of the hidden states tells whether the word is over, component 1 is constant."""
    body, head = made.transformer, made.lm_head.weight
    for block in body.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight[:, 0] = 0.0
            layer.bias[0] = 0.0
    size = 2.0 * body.wte.weight.shape[1] ** 0.5
    body.wte.weight[:, 0] = 0.0
    body.wpe.weight[:, 0] = -size
    body.wpe.weight[LENGTH:, 0] = size
    body.ln_f.weight[1], body.ln_f.bias[1] = 0.0, 1.0
    head[:, :2] = 0.0
    others = [k for k in range(len(head)) if not FIRST <= k < FIRST + len(LETTERS)]
    head[others] = 0.0
    head[others, 1] = -CERTAIN
    head[tokenizer.eos_token_id, :2] = torch.tensor([CERTAIN / 2, 0.0])

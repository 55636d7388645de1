"""Small games of several turns whose best return is known, for proofs, tests and first tries.

Use them like your own: `--text.game esscher.text_envs:Doors`, with the model
`esscher.text_envs:novice`, which knows their language and nothing else.
"""

import itertools
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from esscher.adapters.imports import needed
from esscher.models import character_tokenizer


class Doors:
    """A row of doors, each with a password out of six. The right one is worth 1, all else 0.

    One observes the number of the door that one stands at, and walks on whatever one says. Each
    reward comes with noise, so that it takes many visits to learn what a password is worth. The best
    return is the number of doors; guesses at random get a sixth of it.
    """

    passwords = tuple(a + b for a, b in itertools.product("abc", "xy"))

    def __init__(self, doors: int = 6, noise: float = 1.0):
        """Up to 10 doors; deviation of the noise on each reward."""
        self.doors, self.noise = doors, noise
        self._door, self._draw = 0, np.random.default_rng(0)

    def password(self, door: int) -> str:
        """The right one."""
        return self.passwords[(5 * door + 2) % len(self.passwords)]

    def optimal_return(self) -> float:
        return float(self.doors)

    def reset(self, seed: int) -> str:
        self._door, self._draw = 0, np.random.default_rng(seed)
        return "0"

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        right = action == self.password(self._door)
        reward = float(right) + self.noise * self._draw.standard_normal()
        self._door += 1
        return str(self._door), reward, self._door == self.doors, False


class Secret:
    """Find a number of a few bits: ask for one bit ("a0") or say the number ("s5"), -1 a turn.

    The turn that says it right costs nothing, and ends the game; so does the last turn. An answer is
    a bit, n for a wrong number, or ? for what is neither a question nor a number. What one knows is
    only in the dialogue so far (--text.history transcript).
    """

    def __init__(self, bits: int = 3, turns: int = 8):
        """Up to 3 bits; most turns."""
        self.bits, self.turns = bits, turns
        self.number, self._turn = 0, 0

    def optimal_return(self) -> float:
        """Expected, by dynamic programming over the sets of numbers that are still possible."""

        @cache
        def value(possible: frozenset[int], turns: int) -> float:
            if turns == 0:
                return 0.0
            size, worth = len(possible), []
            for bit in range(self.bits):
                parts = [frozenset(n for n in possible if n >> bit & 1 == b) for b in (0, 1)]
                worth.append(sum(len(p) / size * value(p, turns - 1) for p in parts if p) - 1)
            for number in possible:
                rest = possible - {number}
                worth.append((size - 1) / size * (value(rest, turns - 1) - 1) if rest else 0.0)
            return max(worth)

        return value(frozenset(range(2**self.bits)), self.turns)

    def reset(self, seed: int) -> str:
        self.number, self._turn = int(np.random.default_rng(seed).integers(2**self.bits)), 0
        return "?"

    def step(self, action: str) -> tuple[str, float, bool, bool]:
        self._turn += 1
        kind, rest = action[:1], action[1:]
        number = int(rest) if rest in map(str, range(2**self.bits)) else None
        answer = "?"
        if kind == "s" and number is not None:
            answer = "y" if number == self.number else "n"
        elif kind == "a" and number is not None and number < self.bits:
            answer = str(self.number >> number & 1)
        return (
            answer,
            0.0 if answer == "y" else -1.0,
            answer == "y" or self._turn == self.turns,
            False,
        )


LANGUAGES: dict[str, dict[str, str]] = {
    "doors": {"0123456789": "abc", "abc": "xy", "xy": "</s>"},
    "secret": {"\n": "as", "a": "012", "s": "01234567", "01234567": "</s>", "?yn": "\n"},
}
"""Of each game: what may follow the characters."""

LEAK = -7.0
"""Nats by which what may not follow is less likely than what may."""


def novice(
    *,
    game: Literal["doors", "secret"] = "doors",
    layers: int = 1,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
) -> tuple[Any, Any]:
    """A small Llama that says whatever a game allows, all of it about equally likely.

    Its residual stream holds the last token, in a direction of its own, and its output matrix the
    logarithms of what may follow; all else is random, and small.

    Args:
        game: whose language.
        layers: transformer layers.
        width: of the hidden states; at least the number of tokens, about 20.
        heads: of attention; they divide the width.
        context: most tokens of prompt and utterance.
    """
    transformers: Any = needed("transformers", "a language model", "language")
    language = LANGUAGES[game]
    said = "".join(text.replace("</s>", "") for pair in language.items() for text in pair)
    tokenizer = character_tokenizer(said)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    follows = torch.full((len(tokenizer), len(tokenizer)), LEAK)
    for before, after in language.items():
        ends = [after] if after == "</s>" else list(after)
        to, of = (tokenizer.convert_tokens_to_ids(list(part)) for part in (ends, before))
        follows[torch.tensor(to).unsqueeze(1), torch.tensor(of)] = 0.0
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(len(tokenizer), width))
        # The last norm makes a unit vector as long as the square root of the width.
        head = model.get_output_embeddings().weight
        head.zero_()
        head[:, : len(tokenizer)] = follows / width**0.5
    return model, tokenizer

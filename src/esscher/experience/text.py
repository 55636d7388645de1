"""Rows of text as batches of tokens, in an order that depends on (seed, epoch) alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from esscher.errors import UserError
from esscher.experience.order import Epochs
from esscher.types import Demonstrations, Pairs, Prompts, Record, Tokens

Item = TypeVar("Item")
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Text(Generic[Item]):
    """Rows cut into tokens: Tokens, pairs of them (chosen, rejected), or prompts as lists of ids."""

    name: str
    train: Sequence[Item]
    held_out: Sequence[Item]
    pad_token: int
    seed: int = 0
    """Decides the order of the rows."""
    rank: int = 0
    """Which share of each batch this process gets."""
    world: int = 1
    rows: Sequence[Mapping[str, Any]] = ()
    """What train was made of, for verifiers."""
    held_out_rows: Sequence[Mapping[str, Any]] = ()


class Batches(Generic[AnyRecord]):
    """Batches of rows, every row once an epoch; there is nothing to save but the step.

    Args:
        text: where the rows come from.
        collate: makes a record of (row numbers, rows, pad token).
        batch_size: rows a batch, over all processes.

    Raises:
        UserError: a batch would hold a row twice.
    """

    def __init__(
        self,
        text: Text[Any],
        collate: Callable[[Sequence[int], Sequence[Any], int], AnyRecord],
        batch_size: int,
    ):
        if batch_size > len(text.train):
            raise UserError(
                f"batch_size {batch_size} exceeds the {len(text.train)} rows of {text.name} that are "
                "learned from: lower --method.batch-size, or --text.held-out-share"
            )
        self.text, self.batch_size = text, batch_size
        self._collate = collate
        self._order = Epochs(len(text.train), text.seed)

    def batches(self, step: int) -> Iterator[AnyRecord]:
        """The batch of a step, counted from 1."""
        yield self.batch(step)

    def batch(self, step: int) -> AnyRecord:
        """The batch of a step, counted from 1."""
        start = (step - 1) * self.batch_size
        own = self.batch_size // self.text.world  # Consecutive, as the draws for them are.
        first = start + self.text.rank * own
        rows = [self._order.row(place) for place in range(first, first + own)]
        return self._collate(rows, [self.text.train[row] for row in rows], self.text.pad_token)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def collate_pairs(
    rows: Sequence[int], pairs: Sequence[tuple[Tokens, Tokens]], pad_token: int
) -> Pairs:
    """Padded to the longest."""
    flat = [tokens for pair in pairs for tokens in pair]
    parts = (part.view(len(pairs), 2, -1) for part in _padded(flat, pad_token))
    tokens, token_mask, completion_mask = parts
    return Pairs(
        tokens=tokens,
        token_mask=token_mask,
        completion_mask=completion_mask,
        row=torch.tensor(rows),
    )


def collate_demonstrations(
    rows: Sequence[int], items: Sequence[Tokens], pad_token: int
) -> Demonstrations:
    """Padded to the longest."""
    tokens, token_mask, completion_mask = _padded(items, pad_token)
    return Demonstrations(
        tokens=tokens,
        token_mask=token_mask,
        completion_mask=completion_mask,
        row=torch.tensor(rows),
    )


def collate_prompts(rows: Sequence[int], prompts: Sequence[list[int]], pad_token: int) -> Prompts:
    """Padded to the longest, on the left."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_token)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    length = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width) >= width - length.unsqueeze(1)
    return Prompts(tokens=tokens, mask=mask, row=torch.tensor(rows))


def _padded(items: Sequence[Tokens], pad_token: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, items))
    tokens = torch.full((len(items), width), pad_token)
    for row, item in zip(tokens, items, strict=True):
        row[: len(item)] = torch.tensor(item.prompt + item.completion)
    place = torch.arange(width)
    length = torch.tensor([len(item) for item in items]).unsqueeze(1)
    asked = torch.tensor([len(item.prompt) for item in items]).unsqueeze(1)
    token_mask = place < length
    return tokens, token_mask, token_mask & (place >= asked)

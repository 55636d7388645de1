"""Turns of dialogues with a game: what was seen, what was said, and what came of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from esscher.errors import UserError
from esscher.runtime.state import Stateful
from esscher.types import Completions, Record, record


class Turn(NamedTuple):
    """One turn, in tokens."""

    prompt: list[int]
    said: list[int]
    """With its end token, if it ended itself."""
    reward: float
    next_prompt: list[int]
    """Empty where the game has terminated."""
    terminated: bool
    truncated: bool
    episode_return: float = 0.0


@record
class Turns(Record):
    """Turns as tensors, those of an episode one after the other. Tokens are padded on the right."""

    tokens: Int[Tensor, "b t"]
    """What was seen, and behind it what was said."""
    prompt_length: Int[Tensor, "b"]
    """Tokens seen, at least 1."""
    length: Int[Tensor, "b"]
    """Tokens seen and said."""
    next_tokens: Int[Tensor, "b s"]
    """What was seen next; one token of no meaning where the game has terminated."""
    next_length: Int[Tensor, "b"]
    reward: Float[Tensor, "b"]
    terminated: Bool[Tensor, "b"]
    truncated: Bool[Tensor, "b"]
    episode_return: Float[Tensor, "b"]
    """Undiscounted rewards of the whole episode."""

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> "Turns":
        """At least one turn."""
        tokens, length = _padded([turn.prompt + turn.said for turn in turns])
        next_tokens, next_length = _padded([turn.next_prompt or [0] for turn in turns])
        return cls(
            tokens=tokens,
            prompt_length=torch.tensor([len(turn.prompt) for turn in turns]),
            length=length,
            next_tokens=next_tokens,
            next_length=next_length,
            reward=torch.tensor([float(turn.reward) for turn in turns]),
            terminated=torch.tensor([turn.terminated for turn in turns]),
            truncated=torch.tensor([turn.truncated for turn in turns]),
            episode_return=torch.tensor([float(turn.episode_return) for turn in turns]),
        )

    @property
    def token_mask(self) -> Bool[Tensor, "b t"]:
        """What is no padding."""
        return _below(self.length, self.tokens)

    @property
    def said_mask(self) -> Bool[Tensor, "b t"]:
        """What was said."""
        return self.token_mask & ~_below(self.prompt_length, self.tokens)

    def seen(self) -> tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]]:
        """What was seen, padded on the right, and what is no padding."""
        tokens = self.tokens[:, : int(self.prompt_length.max())]
        return tokens, _below(self.prompt_length, tokens)

    def seen_next(self) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
        """What was seen next, likewise."""
        return self.next_tokens, _below(self.next_length, self.next_tokens)

    def prompts(self) -> tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]]:
        """What was seen, padded on the left, to go on from."""
        width = int(self.prompt_length.max())
        place = torch.arange(width, device=self.tokens.device)
        start = (width - self.prompt_length).unsqueeze(1)
        return self.tokens.gather(1, (place - start).clamp(min=0)), place >= start

    def answered(self, completions: Completions) -> "Turns":
        """The same turns, with these completions of their prompts as what was said.

        What came of it is still that of before.
        """
        tokens, mask = packed(completions.tokens, completions.token_mask)
        return replace(self, tokens=tokens, length=mask.sum(-1))

    def said(self) -> tuple[Int[Tensor, "b u"], Bool[Tensor, "b u"]]:
        """What was said, padded on the right, and what is no padding."""
        count = self.length - self.prompt_length
        place = torch.arange(int(count.max()), device=self.tokens.device)
        source = (place + self.prompt_length.unsqueeze(1)).clamp(max=self.tokens.shape[1] - 1)
        return self.tokens.gather(1, source), place < count.unsqueeze(1)


@dataclass(frozen=True)
class Played:
    """Whole episodes."""

    turns: Turns
    """Of all of them, one episode after the other."""
    returns: list[float]
    lengths: list[int]
    """Turns."""
    dialogues: list[list[str]]
    """Observations and utterances, in turn."""
    shortened: float
    """Share of the prompts that lost their beginning, because they were too long."""


class TurnReplay(Stateful):
    """The last `capacity` turns. The rows are saved as they come (see Replay), not by `state_dict`.

    Args:
        capacity: turns kept.
        width: most tokens that are seen and said together.
    """

    def __init__(self, capacity: int, width: int):
        self._capacity, self._width = capacity, width
        self._columns = {
            "tokens": torch.zeros(capacity, width, dtype=torch.int32),
            "next_tokens": torch.zeros(capacity, width, dtype=torch.int32),
            **{
                name: torch.zeros(capacity, dtype=torch.int32)
                for name in ("prompt_length", "length", "next_length")
            },
            **{name: torch.zeros(capacity) for name in ("reward", "episode_return")},
            **{
                name: torch.zeros(capacity, dtype=torch.bool)
                for name in ("terminated", "truncated")
            },
        }
        self.num_added = 0
        self.num_latest = 0

    def __len__(self) -> int:
        return min(self.num_added, self._capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    def add(self, turns: Turns) -> None:
        """Append turns, over the oldest ones once full.

        Raises:
            UserError: there are more of them than fit.
        """
        if len(turns) > self._capacity:
            raise UserError(
                f"buffer_size {self._capacity} is less than the {len(turns)} turns that come at once: "
                "raise --method.buffer-size, or lower --method.episodes"
            )
        self.put_rows(self.num_added, turns.fields())
        self.num_added += len(turns)
        self.num_latest = len(turns)

    def sample(self, size: int) -> Turns:
        """Turns drawn uniformly with replacement by torch's default generator."""
        return self._at(torch.randint(len(self), (size,)))

    def latest(self) -> Turns:
        """The turns that were added last, in their order."""
        return self._at(
            (self.num_added - self.num_latest + torch.arange(self.num_latest)) % self._capacity
        )

    def sample_best(self, size: int, share: float) -> Turns:
        """Turns drawn likewise from the episodes of highest return, so large a share of all held.

        Episodes that equal the least of them count as well.
        """
        held, returns = len(self), self._columns["episode_return"]
        last = (self._columns["terminated"] | self._columns["truncated"])[:held]
        cutoff = returns[:held][last].quantile(1 - share)
        among = (returns[:held] >= cutoff).nonzero().squeeze(1)
        return self._at(among[torch.randint(len(among), (size,))])

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Rows number start to stop (counted from the first ever added), as views, in pieces."""
        while start < stop:
            begin = start % self._capacity
            length = min(stop - start, self._capacity - begin)
            yield {n: c[begin : begin + length] for n, c in self._columns.items()}
            start += length

    def put_rows(self, start: int, columns: Mapping[str, Any]) -> None:
        """Write rows number start, start + 1, ... into the ring."""
        place = (start + torch.arange(len(columns["reward"]))) % self._capacity
        for name, column in self._columns.items():
            values = columns[name].cpu().to(column.dtype)
            if values.dim() == 2:
                values = torch.nn.functional.pad(values, (0, self._width - values.shape[1]))
            column[place] = values

    def _at(self, index: Int[Tensor, "b"]) -> Turns:
        columns = {name: column[index] for name, column in self._columns.items()}
        for name, length in (("tokens", "length"), ("next_tokens", "next_length")):
            columns[name] = columns[name][:, : int(columns[length].max())]
        whole = {n: c.long() if c.dtype == torch.int32 else c for n, c in columns.items()}
        return Turns(**whole)


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    length = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.long)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return tokens, length


def packed(
    tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The tokens of the mask in their order, padded on the right, and what is no padding."""
    order = (~mask).long().argsort(dim=1, stable=True)
    width = int(mask.sum(-1).max())
    return tokens.gather(1, order)[:, :width], mask.gather(1, order)[:, :width]


def _below(length: Tensor, tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device) < length.unsqueeze(1)

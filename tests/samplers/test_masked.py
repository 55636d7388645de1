"""Masked decoding against laws that can be enumerated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esscher.errors import UserError
from esscher.samplers.masked import MaskedDecoding, decode_masked

MASK = 2


def all_alike(tokens: Tensor) -> Tensor:
    """The exact posterior of the law that is uniform over {0...0, 1...1}: until something is known both
    are equally likely everywhere. What cannot be is told nothing.
    """
    seen = torch.stack([(tokens == k).any(-1) for k in (0, 1)], -1).float()
    known = seen.sum(-1, keepdim=True) == 1
    p = torch.where(known, seen, 0.5)
    return p.log().unsqueeze(1).expand(-1, tokens.shape[1], -1)


def decoded(
    predict: Callable[[Tensor], Tensor], count: int, length: int, critic: Any = None, **options: Any
) -> Tensor:
    torch.manual_seed(0)
    start = torch.full((count, length), MASK)
    return decode_masked(predict, start, MASK, MaskedDecoding(**options), critic=critic)


@pytest.mark.parametrize(
    ("length", "rounds", "share"),
    [(4, 1, 1 / 8), (4, 2, 1 / 2), (4, 4, 1.0), (8, 1, 1 / 128), (8, 2, 1 / 4), (8, 4, 1.0)],
)
def test_rounds_capture_the_joint_law_that_one_round_misses(
    length: int, rounds: int, share: float
) -> None:
    """The shares of whole sequences that the sheet derives."""
    found = decoded(all_alike, 20_000, length, rounds=rounds)
    alike = (found == found[:, :1]).all(-1).float()
    assert alike.mean().item() == pytest.approx(share, abs=3.5 * (share * (1 - share) / 2e4) ** 0.5)
    assert found.max() < MASK
    assert found[:, 0].float().mean().item() == pytest.approx(0.5, abs=0.015)


def test_what_is_given_stays() -> None:
    start = torch.tensor([[MASK, 1, MASK, MASK], [0, MASK, MASK, MASK]])
    for remask in ("none", "scale", "threshold", "drop"):
        decoding = MaskedDecoding(rounds=3, remask=remask, eta=1.0)  # type: ignore[arg-type]
        assert decode_masked(all_alike, start, MASK, decoding).tolist() == [[1] * 4, [0] * 4]


def test_the_surest_places_come_first_and_the_budget_is_kept() -> None:
    """Certainty falls from left to right; 4 places in 4 rounds of the linear schedule are one each."""
    asked: list[Tensor] = []

    def predict(tokens: Tensor) -> Tensor:
        asked.append(tokens.clone())
        p = torch.tensor([0.9, 0.8, 0.7, 0.6])
        return torch.stack([p.log(), (1 - p).log()], -1).expand(len(tokens), -1, -1)

    options: dict[str, Any] = {"schedule": "linear", "temperature": 0.0, "choice_temperature": 0.0}
    for score in ("drawn", "likeliest", "gap"):
        asked.clear()
        decoded(predict, 1, 4, rounds=4, score=score, **options)
        assert [tokens[0].tolist().count(MASK) for tokens in asked] == [4, 3, 2, 1]
        assert asked[2][0].tolist() == [0, 0, MASK, MASK]
    asked.clear()
    decoded(
        predict,
        1,
        4,
        critic=lambda tokens: torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
        rounds=4,
        **options,
    )
    assert asked[2][0].tolist() == [MASK, MASK, 0, 0]


@pytest.mark.parametrize(("score", "kept"), [("likeliest", 0), ("gap", 1)])
def test_the_gap_is_to_the_second(score: Any, kept: int) -> None:
    """0.45 against 0.44 is likelier, and 0.4 against 0.3 is further ahead."""
    asked: list[Tensor] = []

    def predict(tokens: Tensor) -> Tensor:
        asked.append(tokens)
        return torch.tensor([[[0.45, 0.44, 0.11], [0.4, 0.3, 0.3]]]).log()

    options: dict[str, Any] = {"temperature": 0.0, "choice_temperature": 0.0, "schedule": "linear"}
    decoding = MaskedDecoding(rounds=2, score=score, **options)
    decode_masked(predict, torch.tensor([[3, 3]]), 3, decoding)
    assert (asked[1][0] != 3).tolist() == [kept == 0, kept == 1]


def test_temperatures_sharpen_what_is_drawn() -> None:
    """P = (0.8, 0.2): at 1 the model itself, at 1/2 (16, 1) / 17, annealed to the likeliest."""

    def predict(tokens: Tensor) -> Tensor:
        return torch.tensor([0.8, 0.2]).log().expand(*tokens.shape, -1)

    for temperature, share in ((1.0, 0.2), (0.5, 1 / 17), (0.0, 0.0)):
        found = decoded(predict, 20_000, 1, rounds=1, temperature=temperature)
        assert found.float().mean().item() == pytest.approx(share, abs=0.01)
    assert decoded(predict, 2_000, 1, rounds=1, annealed=True).sum() == 0


@pytest.mark.parametrize("remask", ["scale", "threshold", "drop"])
def test_a_token_that_turns_out_wrong_is_taken_back(remask: str) -> None:
    """At first both tokens look as likely, and the first place is the surest; once all places have
    been seen masked once, the model knows that 1 is right. Without re-masking a 0 stays.
    """

    def predict(tokens: Tensor) -> Tensor:
        nothing = (tokens == MASK).all(-1, keepdim=True).unsqueeze(-1)
        before = torch.tensor([[0.95, 0.05], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
        after = torch.tensor([[0.01, 0.99]] * 4)
        return torch.where(nothing, before, after).log()

    options: dict[str, Any] = {"rounds": 4, "schedule": "linear", "choice_temperature": 0.0}
    options |= {"temperature": 0.0, "eta": 0.5}
    assert decoded(predict, 1, 4, **options).tolist() == [[0, 1, 1, 1]]
    assert decoded(predict, 1, 4, remask=remask, **options).tolist() == [[1, 1, 1, 1]]


def test_kept_tokens_compete_with_what_is_left_of_the_rounds() -> None:
    """Two places in four rounds of the linear schedule: one is masked until the third. The first place
    is kept for its 0.9; when the second has 0.8, 0.9 x 1/2 is less, and the first goes back.
    """
    asked: list[list[int]] = []

    def predict(tokens: Tensor) -> Tensor:
        asked.append(tokens[0].tolist())
        p = torch.tensor([0.9, 0.6 if len(asked) == 1 else 0.8])
        return torch.stack([p.log(), (1 - p).log()], -1).unsqueeze(0)

    options: dict[str, Any] = {"temperature": 0.0, "choice_temperature": 0.0, "schedule": "linear"}
    decoded(predict, 1, 2, rounds=4, remask="scale", **options)
    assert asked == [[MASK, MASK], [0, MASK], [MASK, 0], [0, 0]]


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"temperature": -1.0}, {"choice_temperature": -0.1}, {"eta": 1.5}]
)
def test_settings_that_cannot_be(options: Any) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        MaskedDecoding(**options)

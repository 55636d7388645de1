"""What is said of a user's own denoiser before work starts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esscher.adapters.own_denoiser import karras_levels, model_of, try_out
from esscher.errors import UserError

ROWS = [{"label": 2}, {"label": 0}, {"label": 1}]


class Shrinks(torch.nn.Module):
    """The clean sample of a standard Gaussian, moved by the label; `spoil` damages the answer."""

    shape, columns, null = (3,), ("label",), torch.zeros(1, 1)

    def __init__(self, spoil: Callable[[Any], Any] = lambda answer: answer):
        super().__init__()
        self.spoil = spoil
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def encode(self, rows: Any) -> torch.Tensor:
        return torch.tensor([[float(row["label"])] for row in rows])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> Any:
        self.seen.append((x, sigma, condition))
        return self.spoil(condition + (x - condition) / (1 + sigma[:, None] ** 2))


def test_a_good_one_is_asked_with_and_without_and_moves_no_random_number() -> None:
    denoiser = Shrinks(lambda answer: answer + 0 * torch.rand_like(answer))
    model = model_of(denoiser, "mine:it")
    assert model.shape == (3,) and model.columns == ("label",)
    torch.testing.assert_close(model.levels(5), karras_levels(5))
    before = torch.get_rng_state()
    try_out(model, ROWS, "mine:it")
    assert torch.equal(torch.get_rng_state(), before)
    (x, sigma, condition), (_, _, without) = denoiser.seen
    assert x.shape == (2, 3) and sigma.tolist() == [80, 80] and 40 < float(x.std()) < 160
    assert condition.tolist() == [[2], [0]] and without.tolist() == [[0], [0]]


def test_one_row_of_data_still_makes_two_samples() -> None:
    denoiser = Shrinks()
    try_out(model_of(denoiser, "mine:it"), ROWS[:1], "mine:it")
    assert denoiser.seen[0][2].tolist() == [[2], [2]]


SPOILT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "narrow": (lambda answer: answer[:, :1], r"clean samples of x's shape, got shape \(2, 1\)"),
    "several": (lambda answer: (answer, answer), "clean samples of x's shape, got tuple"),
    "nan": (lambda answer: answer / 0 * 0, "by nan: what it returns must be finite"),
    "raises": (lambda answer: answer @ answer, r"failed on x of shape \(2, 3\), .*RuntimeError"),
}


@pytest.mark.parametrize(("spoil", "told"), SPOILT.values(), ids=SPOILT)
def test_bad_answers_are_refused(spoil: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(UserError, match=f"model mine:it .*{told}"):
        try_out(model_of(Shrinks(spoil), "mine:it"), ROWS, "mine:it")


BROUGHT: dict[str, tuple[str, Any, str]] = {
    "few": ("encode", lambda rows: torch.zeros(1, 1), "return 3 rows .* got shape .1, 1."),
    "unknown": ("encode", lambda rows: rows[0]["prompt"], "failed on rows .* KeyError"),
    "named": ("encode", lambda rows: {"text": torch.zeros(2, 1)}, "3 rows text for .* got"),
    "wide": ("encode", lambda rows: torch.zeros(len(rows), 5), "shape .5,. and the null condition"),
    "null": ("null", torch.zeros(2, 1), "null of model mine:it must have one row, got 2"),
    "levels": (
        "levels",
        lambda steps: [][steps],
        "levels of model mine:it failed on up to 1,000 st",
    ),
    "rising": (
        "levels",
        lambda steps: torch.arange(steps) / 1.0,
        "falling vector .* from 0 to 999",
    ),
    "few steps": ("levels", lambda steps: karras_levels(1 / (steps <= 9)), "attribute most_steps"),
}


@pytest.mark.parametrize(("name", "value", "told"), BROUGHT.values(), ids=BROUGHT)
def test_bad_attributes_are_refused(name: str, value: Any, told: str) -> None:
    denoiser = Shrinks()
    setattr(denoiser, name, value)
    with pytest.raises(UserError, match=told):
        try_out(model_of(denoiser, "mine:it"), ROWS, "mine:it")


def test_one_that_takes_few_steps() -> None:
    denoiser: Any = Shrinks()
    denoiser.levels, denoiser.most_steps = (
        lambda steps: karras_levels(int(1 / (steps <= 9)) * steps),
        9,
    )
    model = model_of(denoiser, "mine:it")
    try_out(model, ROWS, "mine:it")
    torch.testing.assert_close(model.levels_up_to(20), karras_levels(9))
    assert len(model.training_levels()) == 9
    with pytest.raises(UserError, match=r"draw_steps must be in \[1, 9\], the most .*, got 10"):
        model.levels(10)


def test_one_that_takes_one_number_of_steps_alone() -> None:
    denoiser: Any = Shrinks()
    denoiser.levels = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
    model = model_of(denoiser, "mine:it")
    try_out(model, ROWS, "mine:it")
    assert torch.equal(model.levels(5), denoiser.levels)
    assert model.levels_up_to(2).tolist() == [8.0, 2.0, 0.0]
    assert set(model.noise_levels(200).tolist()) == {8.0, 4.0, 2.0, 1.0, 0.5}
    with pytest.raises(
        UserError, match="draw_steps must be 5, the steps that this model takes, got"
    ):
        model.levels(4)


def test_one_that_needs_a_condition_is_told_where_it_comes_from() -> None:
    denoiser: Any = Shrinks()
    denoiser.encode, denoiser.null = None, None
    with pytest.raises(UserError, match="no condition .an attribute encode makes them.*TypeError"):
        try_out(model_of(denoiser, "mine:it"), ROWS, "mine:it")
    with pytest.raises(UserError, match="whose attribute shape is that of a sample, got function"):
        model_of(lambda x, sigma, condition: x, "mine:it")

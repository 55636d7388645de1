"""Shares, budgets and losses of masked diffusion, and bins, against numbers worked by hand."""

import math

import pytest
import torch

from esscher.functional.binning import bin_of, centre_of
from esscher.functional.masking import (
    mask_budgets,
    mask_counts,
    mask_share,
    masked_cross_entropy,
    places_of_least,
)


def test_shares_fall_from_all_to_none() -> None:
    time = torch.tensor([0.0, 0.5, 2 / 3, 1.0], dtype=torch.float64)
    expected = {
        "cosine": [1, math.sqrt(0.5), 0.5, 0],
        "linear": [1, 0.5, 1 / 3, 0],
        "square": [1, 0.75, 5 / 9, 0],
        "cubic": [1, 0.875, 19 / 27, 0],
    }
    for kind, values in expected.items():
        assert mask_share(kind, time).tolist() == pytest.approx(values, abs=1e-12)  # type: ignore[arg-type]


def test_budgets_are_those_of_the_paper() -> None:
    """7 dimensions, chunks of 8, 12 rounds."""
    found = mask_budgets("cosine", torch.tensor([56, 4]), 12)
    assert found[0].tolist() == [55, 54, 51, 48, 44, 39, 34, 28, 21, 14, 7, 0]
    assert found[1].tolist() == [3, 3, 3, 3, 3, 2, 2, 2, 1, 1, 0, 0]
    assert mask_budgets("linear", torch.tensor(10), 4).tolist() == [7, 5, 2, 0]
    assert mask_budgets("cosine", torch.tensor(4), 1).tolist() == [0]
    # A half of even lengths is whole: nothing may be lost to rounding.
    even = torch.tensor([2, 4, 6, 30])
    assert mask_budgets("cosine", even, 3)[:, 1].tolist() == [1, 2, 3, 15]
    with pytest.raises(ValueError, match="rounds"):
        mask_budgets("cosine", torch.tensor(4), 0)


def test_at_least_one_and_at_most_all_are_masked() -> None:
    time = torch.tensor([0.0, 0.5, 0.9999])
    assert mask_counts("cosine", time, 16).tolist() == [16, 11, 1]


def test_places_are_drawn_without_replacement_and_evenly() -> None:
    noise = torch.rand(30_000, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(30_000) % 5
    found = places_of_least(noise, counts)
    assert torch.equal(found.sum(-1), counts)
    assert found[counts == 2].float().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.02)
    assert places_of_least(torch.tensor([[3.0, 1, 2]]), torch.tensor([2])).tolist() == [
        [False, True, True]
    ]


def test_only_masked_places_count_and_each_as_much() -> None:
    logits = torch.tensor([[[0.0, 0.0], [5.0, 0.0]], [[0.0, math.log(3)], [0.0, 0.0]]])
    logits.requires_grad_(True)
    tokens = torch.tensor([[0, 1], [0, 1]])
    mask = torch.tensor([[True, False], [True, True]])
    loss = masked_cross_entropy(logits, tokens, mask)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4) + math.log(2)) / 3)
    loss.backward()
    assert logits.grad is not None and logits.grad[0, 1].abs().max() == 0
    parts = [
        masked_cross_entropy(logits[r : r + 1], tokens[r : r + 1], mask[r : r + 1], 3)
        for r in (0, 1)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item())


def test_bins_by_hand() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])
    values = torch.tensor([[-1.0, 2.4], [-0.51, 2.5], [0.0, 9.99], [1.0, 10.0], [-7.0, 11.0]])
    tokens = bin_of(values, low, high, 4)
    assert tokens.tolist() == [[0, 0], [0, 1], [2, 3], [3, 3], [0, 3]]
    assert centre_of(torch.tensor([[0, 3]]), low, high, 4).tolist() == [[-0.75, 8.75]]
    inside = torch.rand(1000, 2) * (high - low) + low
    error = (centre_of(bin_of(inside, low, high, 256), low, high, 256) - inside).abs()
    assert (error <= (high - low) / 512 + 1e-5).all()


def test_a_dimension_without_a_range_is_named() -> None:
    with pytest.raises(ValueError, match="dimension 1 has no range: low 2, high 2"):
        bin_of(torch.zeros(1, 2), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]), 8)
    with pytest.raises(ValueError, match="bins"):
        centre_of(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1), torch.ones(1), 1)

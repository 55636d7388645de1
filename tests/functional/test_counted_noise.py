"""Noise by counters: normal, uncorrelated, and a row's own whatever stands beside it."""

import numpy as np
import torch
from scipy import stats

from esscher.functional.counted_noise import counted_normal


def draws(seeds: int, times: int, shape: tuple[int, ...], draw: int = 0) -> torch.Tensor:
    seed = torch.arange(seeds).repeat_interleave(times)
    return counted_normal(seed, torch.arange(times).repeat(seeds), draw, shape)


def test_numbers_are_standard_normal() -> None:
    values = draws(200, 50, (7,)).double().numpy().ravel()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(values)) < 0.05
    for wide in (0.5, 2.0, 3.0):  # Rare ones too.
        expected = len(values) * 2 * stats.norm.sf(wide)
        assert abs((np.abs(values) > wide).sum() - expected) < 4 * np.sqrt(expected)


def test_neighbours_do_not_resemble_each_other() -> None:
    grid = draws(100, 100, (6,)).view(100, 100, 6).double()
    for a, b in (
        (grid[1:], grid[:-1]),
        (grid[:, 1:], grid[:, :-1]),
        (grid[..., 1:], grid[..., :-1]),
        (draws(100, 100, (6,), 1).double(), draws(100, 100, (6,), 2).double()),
    ):
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(a.numel())


def test_a_row_depends_on_its_own_counters_alone() -> None:
    seed, time = torch.tensor([5, 9, 5, 2**61]), torch.tensor([3, 3, 4, 0])
    together = counted_normal(seed, time, 2, (3, 2))
    for row in range(4):
        alone = counted_normal(seed[row : row + 1], time[row : row + 1], 2, (3, 2))
        assert torch.equal(together[row], alone[0])
    assert len(together.flatten().unique()) == together.numel()
    assert torch.isfinite(together).all()

"""Sets drawn from populations: whose rows, how many, in what order, with what weights."""

import numpy as np
import pytest
import torch

from esscher.errors import UserError
from esscher.experience.sets import Groups, Kernels, Mixtures, SetBatches, SetData

CPU = torch.device("cpu")


def data(populations, rows, size=4, seed=0):
    x = torch.arange(float(rows)).unsqueeze(-1)
    return SetData(
        name="made", x=x, training=populations, held_out=populations, size=size, seed=seed
    )


def groups(*sizes):
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return Groups([f"g{k}" for k in range(len(sizes))], rows)


def test_a_set_has_different_rows_of_its_own_population():
    source = groups(10, 20, 30)
    batches = SetBatches(data(source, 60), 3, times=1, device=CPU)
    seen = [set() for _ in range(3)]
    for step in range(1, 60):
        (batch,) = batches.batches(step)
        assert batch.mask is None and batch.x.shape == (3, 4, 1)
        assert sorted(batch.number.tolist()) == [0, 1, 2], "every population once an epoch"
        for x, number in zip(batch.x, batch.number.tolist(), strict=True):
            rows = x.flatten().long().tolist()
            assert len(set(rows)) == 4 and set(rows) <= set(source.rows[number].tolist())
            seen[number] |= set(rows)
    assert [len(rows) for rows in seen] == [10, 20, 30], "drawn anew each time"


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(step, seed=0, after=()):
        batches = SetBatches(data(groups(9, 9, 9, 9), 36, seed=seed), 3, times=1, device=CPU)
        for other in after:
            list(batches.batches(other))
        (found,) = batches.batches(step)
        return found

    one = batch(5)
    assert torch.equal(one.x, batch(5, after=(9, 1, 4)).x)
    assert not torch.equal(one.x, batch(6).x)
    assert not torch.equal(one.x, batch(5, seed=1).x)


def test_shorter_populations_are_taken_whole_and_masked():
    batches = SetBatches(data(groups(3, 9), 12, size=3), 2, times=2, device=CPU)
    (batch,) = batches.batches(1)
    assert batch.mask is not None and batch.x.shape == (2, 6, 1)
    short = batch.number.tolist().index(0)
    assert batch.mask[short].tolist() == [True] * 3 + [False] * 3
    assert batch.mask[1 - short].all()
    assert sorted(batch.x[short, :3].flatten().tolist()) == [0, 1, 2]
    assert (batch.x[short, 3:] == 0).all()


def test_batches_larger_than_the_data_repeat_populations():
    batches = SetBatches(data(groups(9, 9), 18), 5, times=1, device=CPU)
    (batch,) = batches.batches(1)
    assert len(batch) == 5 and sorted(set(batch.number.tolist())) == [0, 1]
    for size in (0, 10**6):
        with pytest.raises(UserError, match="batch_size must be in"):
            SetBatches(data(groups(9, 9), 18), size, times=1, device=CPU)


def test_weights_of_a_neighbourhood_by_hand():
    """exp(-1/2) and exp(-2) at one and two bandwidths."""
    source = Kernels(np.array([1.0]), np.array([1.0, 1.5, 2.0]), np.array([7, 8, 9]), 0.5)
    weight = np.exp([0, -0.5, -2.0])
    np.testing.assert_allclose(source.weights(0), weight / weight.sum())
    drawn = source.draw(0, 40_000, np.random.default_rng(0))
    share = [np.mean(drawn == row) for row in (7, 8, 9)]
    np.testing.assert_allclose(share, weight / weight.sum(), atol=0.01)
    far = Kernels(np.array([1e6]), np.array([0.0, 1.0]), np.array([0, 1]), 0.5)
    np.testing.assert_allclose(far.weights(0), [0, 1], atol=1e-9)
    assert source.name(0) == "1"


def test_mixtures_have_dirichlet_weights_and_keep_them():
    source = Mixtures(groups(50, 50, 50, 50), sources=3, concentration=1.0, seed=4)
    shares = []
    for number in range(2_000):
        chosen, share = source.recipe(number)
        assert len(set(chosen.tolist())) == 3 and share.sum() == pytest.approx(1)
        shares.append(share)
    again, same = source.recipe(7)
    assert (again == source.recipe(7)[0]).all() and (same == shares[7]).all()
    # Uniform on the simplex: mean 1/3, variance (1/3)(2/3)/4 = 1/18.
    assert np.mean(shares, 0) == pytest.approx(1 / 3, abs=0.02)
    assert np.var(shares, 0) == pytest.approx(1 / 18, abs=0.01)
    rows = source.draw(7, 20_000, np.random.default_rng(0))
    found = [np.mean(rows // 50 == group) for group in again]
    np.testing.assert_allclose(found, same, atol=0.02)
    first = [np.mean(rows[:10_000] // 50 == group) for group in again]
    np.testing.assert_allclose(first, same, atol=0.02)  # In random order.
    named = [part.split(" ") for part in source.name(7).split(" + ")]
    told = {f"g{group}": f"{share:.2f}" for group, share in zip(again, same, strict=True)}
    assert [(name, share) for share, name in named] == sorted(told.items())
    other = Mixtures(source.groups, 3, 1.0, seed=5).recipe(7)
    assert not np.array_equal(other[1], same)
    narrow = Mixtures(source.groups, 3, 50.0, seed=4)
    assert np.var([narrow.recipe(k)[1] for k in range(500)]) < 0.01


def test_no_mixture_comes_twice():
    source = Mixtures(groups(5, 5, 5), sources=2, concentration=1.0, seed=0)
    batches = SetBatches(data(source, 15), 3, times=1, device=CPU)
    numbers = [
        n for step in (1, 2, 3) for batch in batches.batches(step) for n in batch.number.tolist()
    ]
    assert numbers == list(range(9))

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esscher.functional.advantages import (
    group_advantages,
    mixed_groups,
    overlong_mask,
    overlong_penalty,
    running_moments,
)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


REWARD = double([1, 0, 0, 0, 1, 1, 1, 0])
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def reference(rewards, groups, mean, std, epsilon, correction, valid, running):
    """The definitions, row by row, in Python's own floats and statistics."""
    spread = statistics.stdev if correction else statistics.pstdev
    counted = [i for i, v in enumerate(valid) if v]
    everyone = [rewards[i] for i in counted]

    def advantage(row):
        mates = [rewards[i] for i in counted if groups[i] == groups[row]]
        others = [rewards[i] for i in counted if groups[i] == groups[row] and i != row]
        centre = {
            "none": 0.0,
            "group": statistics.fmean(mates),
            "batch": statistics.fmean(everyone),
            "running": running[0],
            "leave_one_out": statistics.fmean(others or mates),
        }[mean]
        if std == "none":
            return rewards[row] - centre
        sample = {"group": mates, "batch": everyone}.get(std, [])
        scale = running[1] if std == "running" else spread(sample) if len(sample) > 1 else 0.0
        return (rewards[row] - centre) / (scale + epsilon) if scale else 0.0

    return double([advantage(row) if row in counted else 0.0 for row in range(len(rewards))])


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        # Group of 1, 0, 0, 0: mean 1/4, std 1/2; of 1, 1, 1, 0: mean 3/4, std 1/2.
        ("group", "group", [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5]),
        # The eight rewards: mean 1/2, variance 2/7, std 0.53452.
        (
            "group",
            "batch",
            [1.4031, -0.4677, -0.4677, -0.4677, 0.4677, 0.4677, 0.4677, -1.4031],
        ),
        ("batch", "batch", [0.93541 * s for s in (1, -1, -1, -1, 1, 1, 1, -1)]),
        ("group", "none", [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]),
        # A 1 among 1, 0, 0, 0 stands against mean 0; a 0 against mean 1/3.
        ("leave_one_out", "none", [1, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1 / 3, -1]),
        ("none", "none", [1, 0, 0, 0, 1, 1, 1, 0]),
        ("running", "running", [3, -1, -1, -1, 3, 3, 3, -1]),
    ],
)
def test_the_sheets_mechanism_by_hand(mean, std, expected):
    found = group_advantages(
        REWARD, GROUP, mean=mean, std=std, epsilon=0.0, running=(0.25, double(0.25))
    )
    torch.testing.assert_close(found, double(expected), atol=5e-5, rtol=0)


def test_correction_and_epsilon_by_hand():
    # Population std of 1, 0, 0, 0 is sqrt(3)/4, so the first is worth sqrt(3), not 1.5.
    found = group_advantages(REWARD, GROUP, epsilon=0.0, correction=0)
    assert found[0].item() == pytest.approx(math.sqrt(3), rel=1e-12)
    unbiased = group_advantages(REWARD, GROUP, epsilon=0.0)
    torch.testing.assert_close(found, unbiased * math.sqrt(4 / 3))
    # 0.75 / (0.5 + 0.25)
    assert group_advantages(REWARD, GROUP, epsilon=0.25)[0].item() == pytest.approx(1.0)
    assert group_advantages(REWARD, GROUP, std="none", epsilon=0.25)[0].item() == 0.75


def test_one_failure_in_a_batch_of_1024_explodes_under_the_batch_std_only():
    reward, group = torch.ones(1024), torch.arange(1024) // 8
    reward[3] = 0.0
    mixed = group_advantages(reward, group, mean="group", std="batch", epsilon=0.0)
    assert mixed[:8].tolist() == pytest.approx([4, 4, 4, -28, 4, 4, 4, 4], rel=1e-5)
    assert (mixed[8:] == 0).all()  # all equal: nothing, even under a tiny std
    alone = group_advantages(reward, group, mean="group", std="group", epsilon=0.0)
    siblings = 1 / math.sqrt(8)
    assert alone[3].item() == pytest.approx(-2.4749, abs=1e-4)
    assert alone[0].item() == pytest.approx(siblings, abs=1e-6)
    assert (alone[8:] == 0).all()
    # Under the batch mean even the groups that teach nothing are pushed up: (1/1024) / (1/32).
    batch = group_advantages(reward, group, mean="batch", std="batch", epsilon=0.0)
    assert batch[100].item() == pytest.approx(1 / 32, rel=1e-3)
    assert batch[3].item() == pytest.approx(-1023 / 32, rel=1e-5)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(
    ("mean", "std"),
    list(
        itertools.product(
            ["none", "group", "batch", "running", "leave_one_out"],
            ["none", "group", "batch", "running"],
        )
    ),
)
def test_every_scope_against_a_loop_over_rows(mean, std, correction):
    torch.manual_seed(0)
    group = torch.randint(-3, 3, (24,)) * 10**12  # any ids, uneven groups, in any order
    group[0] = 7  # and a group of one
    reward, valid = torch.randn(24, dtype=torch.float64), torch.rand(24) < 0.8
    valid[0] = True
    poisoned = reward.masked_fill(~valid, float("nan"))
    found = group_advantages(
        poisoned,
        group,
        mean=mean,
        std=std,
        epsilon=1e-3,
        correction=correction,
        valid=valid,
        running=(0.3, 0.7),
    )
    rows = reward.tolist(), group.tolist()
    expected = reference(*rows, mean, std, 1e-3, correction, valid.tolist(), (0.3, 0.7))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9)), min_size=1, max_size=20), st.data())
def test_shuffled_rows_and_renamed_groups_change_nothing(rows, data):
    group, reward = torch.tensor([g for g, _ in rows]), double([r for _, r in rows])
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    names = torch.tensor(data.draw(st.permutations([-8, 0, 3, 50, 10**15])))
    for std in ("group", "batch"):
        plain = group_advantages(reward, group, std=std, epsilon=1e-2)
        other = group_advantages(reward[order], names[group][order], std=std, epsilon=1e-2)
        torch.testing.assert_close(other, plain[order], atol=1e-9, rtol=1e-9)
        assert torch.isfinite(plain).all()


@pytest.mark.parametrize("value", [0.1, 1e-3, 100.1, -7.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_groups_of_one_are_worth_exactly_nothing(value, dtype):
    # In float32 the mean of three times 0.1 is not 0.1: noise that 1 / epsilon would blow up.
    reward = torch.tensor([value, value, 5.0, value, 2.0, 3.0], dtype=dtype)
    group = torch.tensor([4, 4, 9, 4, 2, 2])
    for std in ("group", "batch", "none"):
        for mean in ("group", "leave_one_out"):
            for epsilon in (0.0, 1e-6):
                found = group_advantages(reward, group, mean=mean, std=std, epsilon=epsilon)
                assert (found[:4] == 0).all()
                assert found[4] < 0 < found[5]
    # A std of 0 silences other means too, instead of dividing them by epsilon.
    found = group_advantages(reward, group, mean="batch", std="group")
    assert (found[:4] == 0).all()
    same = torch.full((6,), value, dtype=dtype)
    for mean in ("none", "group", "batch", "leave_one_out"):
        assert (group_advantages(same, group, mean=mean, std="batch") == 0).all()
        nobody = torch.zeros(6, dtype=torch.bool)
        assert (group_advantages(reward, group, mean=mean, std="group", valid=nobody) == 0).all()
    # Without the std it is the mean that decides whether an all-equal group teaches anything.
    assert (group_advantages(reward, group, mean="batch", std="none")[:2] != 0).all()


def test_rows_that_are_not_valid_enter_no_statistic():
    valid = torch.tensor([True, True, False, True, True, True, True, True])
    reward = REWARD.clone()
    reward[2] = float("inf")
    found = group_advantages(reward, GROUP, std="none", valid=valid)
    expected = double([2 / 3, -1 / 3, 0, -1 / 3, 0.25, 0.25, 0.25, -0.75])
    torch.testing.assert_close(found, expected)


def test_nothing_waits_for_the_device_and_no_gradient_flows():
    # A tensor without values cannot be asked for one.
    reward = torch.zeros(6, device="meta")
    group = torch.zeros(6, dtype=torch.int32, device="meta")
    zero = torch.zeros((), device="meta")
    for mean, std in [("group", "batch"), ("leave_one_out", "group"), ("running", "running")]:
        found = group_advantages(reward, group, mean=mean, std=std, running=(zero, zero))
        assert found.shape == (6,)
        assert found.dtype == torch.float32
    assert mixed_groups(reward, group).shape == (6,)
    assert len(running_moments(reward, zero, zero, zero)) == 3
    assert not group_advantages(REWARD.clone().requires_grad_(), GROUP).requires_grad


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"mean": "prompt"}, "mean must be one of none, group"),
        ({"std": "leave_one_out"}, "std must be one of"),
        ({"mean": "running"}, "running"),
        ({"std": "running"}, "running"),
        ({"epsilon": -1e-6}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"correction": 2}, "correction"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        group_advantages(REWARD, GROUP, **wrong)


def test_running_moments_are_those_of_everything_seen():
    torch.manual_seed(0)
    count = mean = squares = torch.zeros((), dtype=torch.float64)
    seen = []
    for size in (1, 7, 3, 12):
        reward, valid = 5 + 2 * torch.randn(size, dtype=torch.float64), torch.rand(size) < 0.7
        valid[0] = True
        poisoned = reward.masked_fill(~valid, float("nan"))
        count, mean, squares = running_moments(poisoned, count, mean, squares, valid)
        seen += reward[valid].tolist()
        assert count.item() == len(seen)
        assert mean.item() == pytest.approx(statistics.fmean(seen), rel=1e-12)
        assert squares.item() == pytest.approx(statistics.pvariance(seen) * len(seen), abs=1e-10)
    nobody = torch.zeros(4, dtype=torch.bool)
    after = running_moments(torch.ones(4, dtype=torch.float64), count, mean, squares, nobody)
    assert [x.item() for x in after] == [count.item(), mean.item(), squares.item()]
    start = torch.zeros(())
    assert [x.item() for x in running_moments(torch.ones(2), start, start, start)] == [2, 1, 0]


def test_mixed_groups_are_those_with_something_to_learn():
    reward = double([1, 0.1, 1, 0.1, 0, 0.1, 5])
    group = torch.tensor([3, 8, 3, 8, 3, 8, 1])
    assert mixed_groups(reward, group).tolist() == [True, False, True, False, True, False, False]
    # Without the 0 the first group is all equal; a row that does not count is never mixed.
    valid = reward != 0
    assert not mixed_groups(reward, group, valid).any()
    valid = torch.arange(7) != 2
    expected = [True, False, False, False, True, False, False]
    assert mixed_groups(reward, group, valid).tolist() == expected
    assert mixed_groups(-reward, group).tolist() == mixed_groups(reward, group).tolist()


def test_overlong_responses_are_masked_by_their_missing_end_and_not_by_their_length():
    mask = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    finished = torch.tensor([False, True, True])  # the second ends exactly at the limit
    expected = [[False] * 3, [True] * 3, [True, False, False]]
    assert overlong_mask(mask, finished).tolist() == expected


def test_overlong_penalty_by_hand():
    length = torch.tensor([0, 80, 81, 90, 100, 101, 500])
    found = overlong_penalty(length, limit=100, buffer=20)
    torch.testing.assert_close(found, torch.tensor([0, 0, -0.05, -0.5, -1, -1, -1.0]))
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(length, limit=100, buffer=buffer)

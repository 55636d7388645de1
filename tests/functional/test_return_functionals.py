"""Utilities, stocks and tail means: numbers by hand, plain loops, and the identities they rest on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esscher.functional.return_functionals import (
    EXCESS,
    HOMEOSTASIS,
    MEAN,
    SHORTFALL,
    TARGET,
    Utility,
    check_discount,
    cvar,
    cvar_objective,
    edited_stock,
    expected_utility,
    exponential,
    homogeneity_gap,
    next_stock,
)

SCALARS = (MEAN, TARGET, SHORTFALL, EXCESS)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---- utilities


@pytest.mark.parametrize(
    ("utility", "expected"),
    [
        (MEAN, [-3.0, 0.0, 2.0]),
        (TARGET, [-3.0, 0.0, -2.0]),
        (SHORTFALL, [-3.0, 0.0, 0.0]),
        (EXCESS, [0.0, 0.0, 2.0]),
        # (1 - e^3)/1, 0, 1 - e^-2.
        (exponential(1.0), [1 - math.exp(3), 0.0, 1 - math.exp(-2)]),
        # (1 - e^-1.5)/-0.5, 0, (1 - e^1)/-0.5: convex, above x everywhere.
        (exponential(-0.5), [-2 * (1 - math.exp(-1.5)), 0.0, 2 * (math.e - 1)]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_utilities_by_hand(utility, expected):
    assert utility(double(-3, 0, 2)).tolist() == pytest.approx(expected, rel=1e-12)


def test_homeostasis_judges_whole_vectors():
    assert HOMEOSTASIS.vector
    assert HOMEOSTASIS(double([3, 4], [0, 0], [-5, 12])).tolist() == [-5, 0, -13]


def test_exponential_orders_risk():
    # +-1 with equal chance against nothing: averse below, fond above, by cosh 1 - 1 = 0.543.
    for aversion, sign in ((1.0, -1), (-1.0, 1)):
        gamble = exponential(aversion)(double(-1, 1)).mean().item()
        assert gamble == pytest.approx(sign * (math.cosh(1) - 1), rel=1e-12)
    small = exponential(1e-7)(double(-3, 2))
    torch.testing.assert_close(small, double(-3, 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="aversion"):
        exponential(0.0)


def test_degrees_are_right_and_wrong_ones_are_seen():
    x = torch.linspace(-5, 5, 24, dtype=torch.float64).view(12, 2)
    scale = double(0.01, 0.9, 1, 7)
    for utility in (*SCALARS, HOMEOSTASIS):
        assert homogeneity_gap(utility, x, scale).item() < 1e-12
    square = Utility(name="square", function=lambda x: -x.square(), degree=2.0)
    assert homogeneity_gap(square, x, scale).item() < 1e-10
    for wrong in (
        Utility(name="wrong", function=square.function, degree=1.0),
        Utility(name="wrong", function=exponential(1.0).function, degree=1.0),
        Utility(name="wrong", function=lambda x: (x - 1).clamp(max=0), degree=1.0),
    ):
        assert homogeneity_gap(wrong, x, scale).item() > 0.1
    with pytest.raises(ValueError, match="no degree"):
        homogeneity_gap(exponential(1.0), x, scale)


def test_discounts_that_do_not_suit_are_refused():
    for utility in (*SCALARS, HOMEOSTASIS):
        check_discount(utility, 0.9)
        check_discount(utility, 1.0)
    check_discount(exponential(1.0), 1.0)
    with pytest.raises(
        ValueError, match=r"exponential\(2\) is not positively homogeneous.*got 0.9"
    ):
        check_discount(exponential(2.0), 0.9)
    for discount in (0.0, -0.5, 1.1):
        with pytest.raises(ValueError, match="discount"):
            check_discount(MEAN, discount)


# ---- stocks


def test_next_stock_divides_after_adding():
    assert next_stock(double(-4.0), double(-4.0), 0.9).item() == pytest.approx(-80 / 9)
    assert next_stock(double(-4.0), double(4.0), 0.9).item() == 0


def test_stocks_keep_what_was_earned():
    """c_0 + G_0 = discount^t (c_t + G_t) at every step, the identity that all else rests on."""
    rewards, discount, stock = [2.0, -1.0, 0.5, 4.0, -3.0], 0.8, 1.5
    total = stock + sum(discount**k * r for k, r in enumerate(rewards))
    for t, reward in enumerate(rewards):
        rest = sum(discount**k * r for k, r in enumerate(rewards[t:]))
        assert discount**t * (stock + rest) == pytest.approx(total, rel=1e-12)
        stock = next_stock(double(stock), double(reward), discount).item()
    assert discount ** len(rewards) * stock == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("discount", [0.7, 1.0])
def test_edited_stocks_are_those_of_another_start(discount):
    rewards, old, new = [2.0, -1.0, 0.5, 4.0], -3.0, 1.25
    stocks = {old: [old], new: [new]}
    for path in stocks.values():
        for reward in rewards:
            path.append((path[-1] + reward) / discount)
    times = torch.arange(5, dtype=torch.float64)
    starts = torch.full((5,), old).double(), torch.full((5,), new).double()
    found = edited_stock(double(*stocks[old]), *starts, times, discount)
    assert found.tolist() == pytest.approx(stocks[new], rel=1e-12)


def test_expected_utility_by_hand():
    atoms, weights = double([3, -5], [0, 1]), double([0.75, 0.25], [0.5, 0.5])
    # c = -8: -5 and -13; c = 2: 2 and 3, both above zero.
    found = expected_utility(SHORTFALL, double(-8, 2), atoms, weights)
    assert found.tolist() == [-7.0, 0.0]
    assert expected_utility(TARGET, double(-8, 2), atoms, weights).tolist() == [-7.0, -2.5]
    with pytest.raises(ValueError, match="homeostasis"):
        expected_utility(HOMEOSTASIS, double(0, 0), atoms, weights)


# ---- tail means


def test_cvar_by_hand():
    # Worst 0.6 of -9 (1/8), -1 (3/8), 4 (1/2): -9/8 - 3/8 + 4 * 0.1 = -1.1, over 0.6.
    atoms, weights = double(4, -9, -1), double(0.5, 0.125, 0.375)
    assert cvar(atoms, weights, 0.6).item() == pytest.approx(-11 / 6, rel=1e-12)
    # Best 0.6: 4 * 0.5 - 0.1.
    assert cvar(atoms, weights, 0.6, "upper").item() == pytest.approx(1.9 / 0.6, rel=1e-12)
    # A share inside the worst atom is that atom, all of it is the mean.
    assert cvar(atoms, weights, 0.1).item() == pytest.approx(-9)
    assert cvar(atoms, weights, 0.125).item() == pytest.approx(-9)
    mean = 2 - 9 / 8 - 3 / 8
    for tail in ("lower", "upper"):
        assert cvar(atoms, weights, 1.0, tail).item() == pytest.approx(mean)


def test_cvar_of_many_laws_at_once():
    atoms = double([1, 2, 3, 4], [8, 6, 4, 2])
    assert cvar(atoms, torch.full((4,), 0.25).double(), 0.5).tolist() == [1.5, 3.0]


@pytest.mark.parametrize("level", [0.05, 0.3, 0.35, 0.5, 0.95, 1.0])
def test_cvar_against_a_sorted_list(level):
    """Weights of n/20: twenty equally likely outcomes, of which the worst 20 level are averaged."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        atoms = torch.randn(6, generator=draw, dtype=torch.float64)
        counts = torch.bincount(torch.randint(6, (20,), generator=draw), minlength=6)
        listed = sorted(
            a for a, n in zip(atoms.tolist(), counts.tolist(), strict=True) for _ in range(n)
        )
        number = round(20 * level)
        for tail, chosen in (("lower", listed[:number]), ("upper", listed[-number:])):
            found = cvar(atoms, counts.double() / 20, level, tail).item()
            assert found == pytest.approx(sum(chosen) / number, abs=1e-9)


@given(
    numbers=st.lists(st.integers(-20, 20), min_size=1, max_size=6),
    parts=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    level=st.floats(0.02, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_cvar_is_the_best_stock_objective(numbers, parts, level):
    """max_c -c + E min(c + G, 0) / level; concave and linear between minus atoms, so one is best."""
    weights = torch.tensor(parts[: len(numbers)], dtype=torch.float64)
    weights, atoms = weights / weights.sum(), double(*numbers)
    stocks = -atoms
    for tail, utility, best in (("lower", SHORTFALL, max), ("upper", EXCESS, min)):
        value = expected_utility(utility, stocks, atoms.expand(len(atoms), -1), weights)
        objective = cvar_objective(stocks, value, level)
        expected = cvar(atoms, weights, level, tail).item()
        assert best(objective.tolist()) == pytest.approx(expected, abs=1e-9)


def test_cvar_has_the_shares_as_gradient():
    atoms = torch.tensor([4.0, -9.0, -1.0], dtype=torch.float64, requires_grad=True)
    cvar(atoms, double(0.5, 0.125, 0.375), 0.6).backward()
    assert atoms.grad is not None
    assert atoms.grad.tolist() == pytest.approx([0.1 / 0.6, 0.125 / 0.6, 0.375 / 0.6])


@pytest.mark.parametrize("level", [0.0, -0.1, 1.0001])
def test_levels_outside_are_refused(level):
    with pytest.raises(ValueError, match="level"):
        cvar(double(1, 2), double(0.5, 0.5), level)
    with pytest.raises(ValueError, match="level"):
        cvar_objective(double(1), double(1), level)

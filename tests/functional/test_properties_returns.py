"""Returns, advantages, losses of critics and steps of policies, on any input: against plain loops."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esscher.functional.advantages import (
    group_advantages,
    mixed_groups,
    overlong_mask,
    overlong_penalty,
    running_moments,
)
from esscher.functional.distributional import (
    categorical_projection,
    gaussian_critic_huber_terms,
    gaussian_critic_terms,
    quantile_huber_loss,
    quantile_huber_terms,
)
from esscher.functional.markov_games import (
    average_over_others,
    joint_index,
    joint_policy,
    marginal_transition,
    soft_equilibrium,
)
from esscher.functional.natural_gradient import (
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    trust_region_step,
)
from esscher.functional.projection import cosine, inner, orthogonal_part
from esscher.functional.reductions import (
    aggregate,
    aggregation_denominator,
    masked_mean,
    masked_sum,
    masked_whiten,
)
from esscher.functional.return_functionals import (
    EXCESS,
    HOMEOSTASIS,
    SHORTFALL,
    TARGET,
    check_discount,
    cvar,
    cvar_objective,
    edited_stock,
    expected_utility,
    exponential,
    homogeneity_gap,
    next_stock,
)
from esscher.functional.returns import (
    gae,
    lambda_returns,
    monte_carlo_returns,
    n_step_returns,
    td_target,
    vtrace,
)
from esscher.functional.surrogates import clip_fraction, clipped_ratio_terms, sequence_log_ratio
from esscher.functional.tabular import FiniteMDP, Outcome, value_iteration

NAN, INF = float("nan"), float("inf")
moderate = st.floats(-5, 5, width=32)
anything = st.sampled_from([-INF, -1e30, -1.0, -1e-30, 0.0, 1e-30, 1.0, 1e30, INF, NAN]) | moderate
unit = st.floats(0, 1)
step = st.tuples(moderate, moderate, moderate, st.booleans(), st.booleans(), st.floats(-2, 2))
episodes = st.lists(step, min_size=1, max_size=7)


def column(values: Any) -> torch.Tensor:
    kind = torch.bool if isinstance(values[0], bool) else torch.float64
    return torch.tensor(values, dtype=kind).unsqueeze(1)


def columns(rows: Any) -> Any:
    return [column(values) for values in zip(*rows, strict=True)]


# ---- returns


@given(episodes, unit, unit)
def test_returns_are_their_recursions(rows: Any, discount: float, lambda_: float) -> None:
    reward, value, after, terminated, truncated, log_ratio = columns(rows)
    advantage, mixed, monte_carlo, weighed = [0.0] * 4
    v_after, found = 0.0, []
    for t in reversed(range(len(rows))):
        r, v, n, over, cut, log = rows[t]
        n = 0.0 if over else n
        ends, last = over or cut, t == len(rows) - 1
        delta = r + discount * n - v
        advantage = delta + (0.0 if ends else discount * lambda_ * advantage)
        ahead = n if ends or last else (1 - lambda_) * n + lambda_ * mixed
        mixed = r + discount * ahead
        monte_carlo = r + discount * (n if ends or last else monte_carlo)
        ratio = min(1.0, math.exp(log))
        # v_t - V_t, and the advantage from the corrected value that follows.
        following = n if ends or last else v_after
        gain = ratio * (r + discount * following - v)
        weighed = ratio * delta + (0.0 if ends else discount * lambda_ * ratio * weighed)
        v_after = v + weighed
        found.append((advantage, mixed, monte_carlo, v_after, gain))
    expected = np.array(found[::-1]).T
    ended = (terminated, truncated)
    ours = (
        gae(reward, value, after, *ended, discount, lambda_),
        lambda_returns(reward, after, *ended, discount, lambda_),
        monte_carlo_returns(reward, after, *ended, discount),
        *vtrace(log_ratio, reward, value, after, *ended, discount, lambda_),
    )
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one[:, 0].numpy(), other, rtol=1e-9, atol=1e-9)


@given(episodes, unit, st.integers(1, 9))
def test_returns_of_some_steps_are_sums(rows: Any, discount: float, num_steps: int) -> None:
    reward, _, after, terminated, truncated, _ = columns(rows)
    found = n_step_returns(reward, after, terminated, truncated, discount, num_steps)
    for t in range(len(rows)):
        expected, weight = 0.0, 1.0
        for k in range(t, min(t + num_steps, len(rows))):
            expected += weight * rows[k][0]
            weight *= discount
            if rows[k][3] or rows[k][4]:
                break
        expected += 0.0 if rows[k][3] else weight * rows[k][2]
        assert found[t, 0].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(anything, anything, st.booleans(), unit)
def test_one_step_of_anything(reward: float, after: float, over: bool, discount: float) -> None:
    found = td_target(torch.tensor([reward]), torch.tensor([after]), torch.tensor([over]), discount)
    held = np.float32(discount) * np.float32(after)
    expected = np.float32(reward) + (np.float32(0) if over else held)
    np.testing.assert_allclose(found.numpy()[0], expected, rtol=1e-6)


def test_returns_without_rows_or_out_of_range() -> None:
    empty, none = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool)
    for call in (
        lambda: gae(empty, empty, empty, none, none, 0.9, 0.9),
        lambda: lambda_returns(empty, empty, none, none, 0.9, 0.9),
        lambda: monte_carlo_returns(empty, empty, none, none, 0.9),
        lambda: vtrace(empty, empty, empty, empty, none, none, 0.9),
    ):
        with pytest.raises(ValueError, match="at least one row"):
            call()
    one, flag = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    for wrong in (-0.1, 1.1, NAN, INF):
        for call in (
            lambda wrong: td_target(one, one, flag, wrong),
            lambda wrong: gae(one, one, one, flag, flag, wrong, 0.9),
            lambda wrong: gae(one, one, one, flag, flag, 0.9, wrong),
            lambda wrong: vtrace(one, one, one, one, flag, flag, 0.9, wrong),
        ):
            with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
                call(wrong)
    with pytest.raises(ValueError, match="num_steps"):
        n_step_returns(one, one, flag, flag, 0.9, 0)


# ---- reductions


masked = st.lists(st.tuples(anything, st.booleans()), min_size=1, max_size=6)


@given(masked)
def test_masked_reductions_see_what_counts(rows: Any) -> None:
    values, mask = (torch.tensor(list(x)) for x in zip(*rows, strict=True))
    counted = np.array([x for x, there in rows if there], dtype=np.float64)
    total = float(counted.sum()) if len(counted) else 0.0
    with np.errstate(invalid="ignore"):
        expected = np.float32(total), np.float32(total / max(1, len(counted)))
    found = masked_sum(values, mask), masked_mean(values, mask)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, atol=1e-6 * np.abs(other))


@given(masked, st.sampled_from([1e-30, 1e-8, 1.0]), st.sampled_from([0, 1]))
def test_whitened_values_are_whitened(rows: Any, epsilon: float, correction: int) -> None:
    values, mask = (torch.tensor(list(x)) for x in zip(*rows, strict=True))
    found = masked_whiten(values, mask, epsilon=epsilon, correction=correction).numpy()
    assert (found[~mask.numpy()] == 0).all()
    counted = np.array([x for x, there in zip(values.tolist(), mask, strict=True) if there])
    if not np.isfinite(counted).all():
        assert np.isnan(found[mask.numpy()]).all()
        return
    if not len(counted):
        return
    centred = counted - counted.mean()
    std = math.sqrt((centred**2).sum() / max(1, len(counted) - correction))
    if (counted == counted[0]).all():
        assert (found == 0).all()
    elif std > 1e-6 * np.abs(counted).max() and std > 1e-12:  # Else float32 has rounded it away.
        np.testing.assert_allclose(
            found[mask.numpy()], centred / (std + epsilon), rtol=1e-3, atol=1e-3
        )


@given(
    st.lists(st.tuples(*[st.tuples(moderate, st.booleans())] * 3), min_size=2, max_size=5),
    st.sampled_from(
        ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]
    ),
)
def test_parts_of_a_batch_add_up_to_the_whole(rows: Any, how: Any) -> None:
    terms = torch.tensor([[x for x, _ in row] for row in rows]).double()
    mask = torch.tensor([[there for _, there in row] for row in rows])
    sums = [sum(x for x, there in row if there) for row in rows]
    counts = [sum(there for _, there in row) for row in rows]
    means = [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
    expected = {
        "token_mean": sum(sums) / max(1, sum(counts)),
        "sequence_mean_token_mean": sum(means) / len(rows),
        "sequence_mean_token_sum": sum(sums) / len(rows),
        "constant_length": sum(sums) / (3 * len(rows)),
    }[how]
    denominator = aggregation_denominator(mask, how, max_length=3)
    assert aggregate(terms, mask, how, denominator).item() == pytest.approx(expected, abs=1e-9)
    parts = [
        aggregate(terms[k : k + 1], mask[k : k + 1], how, denominator) for k in range(len(rows))
    ]
    assert sum(parts).item() == pytest.approx(expected, abs=1e-9)


def test_reductions_out_of_range() -> None:
    x, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for wrong in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="positive"):
            masked_mean(x, mask, denominator=wrong)
        with pytest.raises(ValueError, match="positive"):
            aggregate(x, mask, "token_mean", wrong)
        with pytest.raises(ValueError, match="epsilon"):
            masked_whiten(x, mask, epsilon=wrong)
    empty, none = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool)
    assert aggregate(empty, none, "token_mean", aggregation_denominator(none, "token_mean")) == 0


# ---- advantages of groups


rewarded = st.lists(st.tuples(anything, st.integers(0, 2), st.booleans()), min_size=1, max_size=7)


@given(
    rewarded,
    st.sampled_from(["none", "group", "batch", "leave_one_out"]),
    st.sampled_from(["none", "group", "batch"]),
    st.sampled_from([0, 1]),
)
def test_advantages_of_anything(rows: Any, mean: Any, std: Any, correction: int) -> None:
    """In float64, as sums over the rows of a scope; what is not finite never becomes a number."""
    reward, group, valid = (torch.tensor(list(x)) for x in zip(*rows, strict=True))
    reward = reward.float()
    found = group_advantages(
        reward, group, mean=mean, std=std, epsilon=1e-6, correction=correction, valid=valid
    ).tolist()
    rows = [(x, g, v) for x, (_, g, v) in zip(reward.double().tolist(), rows, strict=True)]
    for place, (x, own, counts) in enumerate(rows):
        if not counts:
            assert found[place] == 0
            continue

        def scope(kind: str, own: int = own) -> np.ndarray:
            return np.array([r for r, g, v in rows if v and (kind == "batch" or g == own)])

        centre, spread = scope("batch" if mean == "batch" else "group"), scope(std)
        used = [*(centre if mean != "none" else [x]), *(spread if std != "none" else [])]
        if not np.isfinite(used).all() and not (mean == "none" and std == "none"):
            assert not math.isfinite(found[place])
            continue
        expected = x
        if mean == "leave_one_out":
            others = (centre.sum() - x) / max(1, len(centre) - 1)
            expected = x - others if len(centre) > 1 else 0.0
        elif mean != "none":
            expected = x - centre.mean()
        if std != "none":
            scale = math.sqrt(
                ((spread - spread.mean()) ** 2).sum() / max(1, len(spread) - correction)
            )
            flat = (spread == spread[0]).all()
            expected = 0.0 if flat else expected / (scale + 1e-6)
            if not flat and scale < 1e-5 * np.abs(spread).max():
                continue  # Rounding decides.
        if not math.isfinite(expected):
            assert not math.isfinite(found[place])
            continue
        close = 1e-3 + (1e-5 * max(map(abs, used)) if std == "none" else 0.0)
        assert found[place] == pytest.approx(expected, rel=1e-2, abs=close)


@given(st.lists(st.tuples(moderate, st.integers(-3, 3), st.booleans()), min_size=1, max_size=8))
def test_mixed_groups_are_not_all_equal(rows: Any) -> None:
    reward, group, valid = (torch.tensor(list(x)) for x in zip(*rows, strict=True))
    found = mixed_groups(reward.float(), group, valid).tolist()
    for place, (_, own, counts) in enumerate(rows):
        there = {np.float32(r) for r, g, v in rows if g == own and v}
        assert found[place] == (counts and len(there) > 1)


@given(st.lists(st.lists(st.tuples(moderate, st.booleans()), max_size=4), max_size=4))
def test_running_moments_are_those_of_all(batches: Any) -> None:
    count, mean, squares = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    seen: list[float] = []
    for batch in batches:
        reward = torch.tensor([x for x, _ in batch], dtype=torch.float64)
        valid = torch.tensor([there for _, there in batch], dtype=torch.bool)
        count, mean, squares = running_moments(reward, count, mean, squares, valid)
        seen += [x for x, there in batch if there]
    assert count.item() == len(seen)
    if seen:
        assert mean.item() == pytest.approx(np.mean(seen), abs=1e-9)
        assert squares.item() == pytest.approx(np.var(seen) * len(seen), abs=1e-9)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 20))
def test_what_is_too_long(lengths: list[int], buffer: int, limit: int) -> None:
    if buffer > limit:
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(torch.tensor(lengths), limit, buffer)
        return
    found = overlong_penalty(torch.tensor(lengths), limit, buffer).tolist()
    expected = [min(0.0, max(-1.0, (limit - buffer - n) / buffer)) for n in lengths]
    assert found == pytest.approx(expected, abs=1e-6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert overlong_mask(mask, torch.tensor([True, False])).tolist() == [[True] * 3, [False] * 3]


# ---- surrogates


@given(anything, anything, st.floats(0, 1), st.floats(0, 2), st.none() | st.floats(1.1, 5))
def test_surrogates_of_anything(
    log_ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> None:
    found = clipped_ratio_terms(
        torch.tensor([log_ratio]), torch.tensor([advantage]), low, high, dual_clip=dual
    ).item()
    if math.isnan(log_ratio) or math.isnan(advantage):
        assert math.isnan(found)
        return
    if not (math.isfinite(advantage) and abs(advantage) <= 10):
        return
    ratio = math.exp(min(log_ratio, 44.0))
    term = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        term = max(term, dual * advantage)
    assert math.isfinite(found)
    if log_ratio < 44:
        assert found == pytest.approx(-term, rel=1e-4, abs=1e-5)
    ratio = math.exp(min(log_ratio, 80.0))
    stopped = (advantage > 0 and ratio > 1 + high) or (
        advantage < 0 and (ratio < 1 - low or ratio > (dual or INF))
    )
    near = any(abs(ratio - bound) < 1e-4 for bound in (1 - low, 1 + high, dual or INF))
    counted = torch.tensor([log_ratio]), torch.tensor([advantage]), torch.tensor([True])
    share = clip_fraction(*counted, low, high, dual_clip=dual)
    assert near or share.item() == stopped


@given(masked)
def test_ratios_of_whole_sequences(rows: Any) -> None:
    values, mask = (torch.tensor([list(x)]) for x in zip(*rows, strict=True))
    found = sequence_log_ratio(values, mask)
    expected = masked_mean(values, mask)
    torch.testing.assert_close(found, expected.expand_as(found), equal_nan=True)


def test_widths_out_of_range() -> None:
    x = torch.zeros(1)
    for options in ({"clip_low": NAN}, {"clip_low": 1.1}, {"clip_high": -0.1}, {"clip_high": NAN}):
        with pytest.raises(ValueError):
            clipped_ratio_terms(x, x, **options)
    for dual in (1.0, NAN, -1.0):
        with pytest.raises(ValueError, match="dual_clip"):
            clipped_ratio_terms(x, x, dual_clip=dual)


# ---- distributions of returns


@given(
    st.lists(anything, min_size=1, max_size=4),
    st.lists(anything, min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 1.0, 1e3]),
)
def test_quantile_losses(quantiles: Any, targets: Any, threshold: float) -> None:
    found = quantile_huber_terms(torch.tensor([quantiles]), torch.tensor([targets]), threshold)[0]
    for i, q in enumerate(quantiles):
        tau = (i + 0.5) / len(quantiles)
        for j, target in enumerate(targets):
            d = float(np.float32(target)) - float(np.float32(q))
            if not math.isfinite(d):
                assert not math.isfinite(found[i, j])
                continue
            size = abs(d)
            if threshold:
                small = size <= threshold
                size = (d * d / 2 if small else threshold * (size - threshold / 2)) / threshold
            expected = abs(tau - (d < 0)) * size
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    whole = quantile_huber_loss(torch.tensor([quantiles]), torch.tensor([targets]), threshold)
    torch.testing.assert_close(whole, found.mean(1).sum(), equal_nan=True)


@given(st.lists(st.tuples(anything, st.floats(0, 1)), min_size=1, max_size=4), st.integers(2, 6))
def test_projections_keep_mass_and_mean(rows: Any, size: int) -> None:
    atoms, weights = (torch.tensor([list(x)], dtype=torch.float64) for x in zip(*rows, strict=True))
    support = torch.linspace(-2, 3, size, dtype=torch.float64)
    found = categorical_projection(atoms, weights, support)[0]
    if atoms.isnan().any():
        assert found.isnan().any()
        return
    assert found.sum().item() == pytest.approx(weights.sum().item(), abs=1e-9)
    clipped = np.clip(atoms[0].numpy(), -2, 3)
    assert (found @ support).item() == pytest.approx(clipped @ weights[0].numpy(), abs=1e-9)
    assert (found >= 0).all()
    with pytest.raises(ValueError, match="2 atoms"):
        categorical_projection(atoms, weights, support[:1])


@given(moderate, st.floats(0.1, 3), moderate, moderate, st.floats(0.1, 5))
def test_gaussian_critics_move_as_written(
    mean: float, std: float, target: float, sampled: float, bound: float
) -> None:
    m, s = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (mean, std))
    told = [torch.tensor([x], dtype=torch.float64) for x in (target, sampled)]
    gaussian_critic_terms(m, s, *told, bound).sum().backward()
    error = min(max(sampled - mean, -bound), bound)
    assert m.grad is not None and s.grad is not None
    assert m.grad.item() == pytest.approx(-(target - mean) / (std**2 + 0.1), rel=1e-6, abs=1e-9)
    expected = -(error**2 - std**2) / (std**3 + 0.1)
    assert s.grad.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    huber = gaussian_critic_huber_terms(m.detach(), s.detach(), *told, bound, 1.0)
    assert huber.isfinite().all()


@given(st.lists(st.tuples(moderate, st.integers(1, 5)), min_size=1, max_size=6), st.floats(0.01, 1))
def test_tail_means_are_means_of_the_worst(rows: Any, level: float) -> None:
    """By a grid of equal shares, sorted."""
    total = sum(weight for _, weight in rows)
    atoms = torch.tensor([x for x, _ in rows], dtype=torch.float64)
    weights = torch.tensor([w / total for _, w in rows], dtype=torch.float64)
    left, lower = level, 0.0
    for x, weight in sorted(rows):
        taken = min(left, weight / total)
        lower, left = lower + taken * x, left - taken
    assert cvar(atoms, weights, level).item() == pytest.approx(lower / level, abs=1e-9)
    upper = cvar(atoms, weights, level, "upper").item()
    assert upper == pytest.approx(-cvar(-atoms, weights, level).item(), abs=1e-9)
    # Rockafellar and Uryasev: the best over stocks, which is reached at minus an atom.
    best = max(
        cvar_objective(c, expected_utility(SHORTFALL, c, atoms, weights), level).item()
        for c in -atoms
    )
    assert best == pytest.approx(lower / level, abs=1e-9)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, NAN, INF])
def test_levels_out_of_range(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        cvar(torch.ones(1), torch.ones(1), level)
    with pytest.raises(ValueError, match="level"):
        cvar_objective(torch.ones(1), torch.ones(1), level)
    if level != 0.0:
        with pytest.raises(ValueError, match="discount"):
            check_discount(TARGET, level)


@given(moderate, moderate, st.lists(moderate, min_size=1, max_size=5), st.floats(0.5, 1))
def test_stocks_are_what_was_earned(
    start: float, other: float, rewards: Any, discount: float
) -> None:
    one, two = (torch.tensor([x], dtype=torch.float64) for x in (start, other))
    first, second = one, two
    for reward in rewards:
        r = torch.tensor([reward], dtype=torch.float64)
        one, two = next_stock(one, r, discount), next_stock(two, r, discount)
    time = torch.tensor([float(len(rewards))], dtype=torch.float64)
    edited = edited_stock(one, first, second, time, discount)
    torch.testing.assert_close(edited, two, atol=1e-6, rtol=1e-6)
    earned = sum(discount**k * reward for k, reward in enumerate(rewards))
    assert discount ** len(rewards) * one.item() == pytest.approx(start + earned, abs=1e-6)


@given(st.lists(anything, min_size=2, max_size=2), st.floats(0.1, 10))
def test_utilities_have_their_degree(x: Any, scale: float) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    for utility in (TARGET, SHORTFALL, EXCESS, HOMEOSTASIS):
        gap = homogeneity_gap(utility, values, torch.tensor([scale], dtype=torch.float64)).item()
        assert math.isnan(gap) or gap <= 1e-9 * (1 + values.abs().max().item() * scale)
        assert not values.isnan().any() or utility(values).isnan().any()
    with pytest.raises(ValueError, match="homogene"):
        homogeneity_gap(exponential(0.5), values, torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="homogene"):
        check_discount(exponential(0.5), 0.9)


# ---- small decision processes and games


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 4))
def test_values_by_a_loop(seed: int, discount: float, num_steps: int) -> None:
    draw = np.random.default_rng(seed)
    states = []
    for _ in range(3):
        row = []
        for _ in range(2):
            shares = draw.dirichlet(np.ones(2))
            ahead = [None if draw.random() < 0.2 else int(draw.integers(3)) for _ in range(2)]
            cases = zip(shares, draw.normal(size=2), ahead, strict=True)
            row.append(tuple(Outcome(float(p), (float(r),), n) for p, r, n in cases))
        states.append(tuple(row))
    mdp = FiniteMDP(tuple(states))
    moves, reward = mdp.tensors()
    found = value_iteration(moves, reward[..., 0], discount, num_steps)
    best = [0.0] * 3
    for t in range(num_steps):
        q = [
            [
                sum(
                    o.probability
                    * (
                        o.reward[0]
                        + (0.0 if o.next_state is None else discount * best[o.next_state])
                    )
                    for o in case
                )
                for case in row
            ]
            for row in states
        ]
        np.testing.assert_allclose(found[t].numpy(), q, atol=1e-9)
        best = [max(row) for row in q]


@pytest.mark.parametrize("probability", [NAN, INF, -0.5, 0.9])
def test_probabilities_that_are_none(probability: float) -> None:
    outcome = Outcome(probability, (1.0,), None)
    rest = Outcome(1 - probability if probability < 0 else 0.0, (1.0,), None)
    with pytest.raises(ValueError, match="probabilities sum to"):
        FiniteMDP((((outcome, rest),),))
    for empty in ((), ((),), (((),),)):
        with pytest.raises(ValueError):
            FiniteMDP(empty)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3))
def test_games_by_enumeration(seed: int, agents: int, actions: int) -> None:
    draw = np.random.default_rng(seed)
    policies = draw.dirichlet(np.ones(actions), size=(agents, 2))
    logp = torch.from_numpy(np.log(policies))
    joint = torch.from_numpy(draw.normal(size=(2, actions**agents)))
    moves = torch.from_numpy(draw.dirichlet(np.ones(2), size=(2, actions**agents)))
    together = joint_policy(logp)
    choices = list(itertools.product(range(actions), repeat=agents))
    indices = joint_index(torch.tensor(choices), actions)
    assert indices.tolist() == list(range(len(choices)))
    for agent in range(agents):
        found = average_over_others(joint, logp, agent)
        marginal = marginal_transition(moves, logp, agent)
        for s in range(2):
            expected, where = np.zeros(actions), np.zeros((actions, 2))
            for k, choice in enumerate(choices):
                others = math.prod(policies[i, s, a] for i, a in enumerate(choice) if i != agent)
                expected[choice[agent]] += others * joint[s, k].item()
                where[choice[agent]] += others * moves[s, k].numpy()
                whole = math.prod(policies[i, s, a] for i, a in enumerate(choice))
                assert together[s, k].item() == pytest.approx(whole, abs=1e-12)
            np.testing.assert_allclose(found[s].numpy(), expected, atol=1e-9)
            np.testing.assert_allclose(marginal[s].numpy(), where, atol=1e-9)
    with pytest.raises(ValueError, match="columns"):
        average_over_others(torch.zeros(2, actions**agents + 1), logp, 0)


@pytest.mark.parametrize("reward", [NAN, INF])
def test_games_without_numbers_end_at_once(reward: float) -> None:
    table = torch.full((2, 1, 4), reward, dtype=torch.float64)
    with pytest.raises(ValueError, match="no equilibrium"):
        soft_equilibrium(lambda v: v[:, :, None].expand(-1, -1, 4), table, 2, 0.9, 1.0)


# ---- gradients


lists = st.lists(st.lists(anything, min_size=2, max_size=2), min_size=1, max_size=3)


@given(lists, lists)
def test_gradients_as_long_vectors(left: Any, right: Any) -> None:
    a, b = ([torch.tensor(part, dtype=torch.float64) for part in side] for side in (left, right))
    if len(a) != len(b):
        for call in (inner, cosine, orthogonal_part):
            with pytest.raises(ValueError, match="equal shapes"):
                call(a, b)
        return
    flat, other = (np.array(side, dtype=np.float64).ravel() for side in (left, right))
    if not (np.isfinite(flat).all() and np.isfinite(other).all()):
        assert not math.isfinite(inner(a, b)) or np.isfinite(flat @ other)
        return
    assert inner(a, b).item() == pytest.approx(flat @ other, rel=1e-9, abs=1e-9)
    lengths = [max(side @ side, 1e-10) for side in (flat, other)]
    expected = flat @ other / math.sqrt(lengths[0]) / math.sqrt(lengths[1])
    assert cosine(a, b).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    rest = orthogonal_part(a, b)
    expected_rest = flat - (flat @ other) / lengths[1] * other
    close = 1e-6 * abs(flat).max()
    np.testing.assert_allclose(torch.cat(rest).numpy(), expected_rest, rtol=1e-6, atol=close)


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e10, 1e15])
def test_the_angle_does_not_depend_on_lengths(size: float) -> None:
    """In float32, where the product of two squares of 1e10 is infinite."""
    a, b = [torch.tensor([3.0, 4.0]) * size], [torch.tensor([4.0, 3.0]) * size]
    assert cosine(a, b).item() == pytest.approx(24 / 25, rel=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_conjugate_gradients_solve(seed: int, size: int) -> None:
    draw = np.random.default_rng(seed)
    root = draw.normal(size=(2, size, size))
    matrix = root @ root.transpose(0, 2, 1) + np.eye(size)
    target = draw.normal(size=(2, size))
    held = torch.from_numpy(matrix)

    def product(x: torch.Tensor) -> torch.Tensor:
        return (held @ x.unsqueeze(-1)).squeeze(-1)

    expected = np.linalg.solve(matrix, target[..., None])[..., 0]
    found = conjugate_gradient(product, torch.from_numpy(target), 2 * size)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    step = trust_region_step(product, torch.from_numpy(target), 0.3, 2 * size)
    for one, solved, curvature in zip(step.numpy(), expected, matrix, strict=True):
        assert 0.5 * one @ curvature @ one == pytest.approx(0.3, rel=1e-6)
        assert one @ solved > 0
    origin = torch.zeros(2, size, dtype=torch.float64)
    vector = fisher_vector_product(
        lambda p: 0.5 * (p * product(p)).sum(-1), origin, torch.from_numpy(target), 0.1
    )
    direct = np.einsum("bij,bj->bi", matrix, target) + 0.1 * target
    np.testing.assert_allclose(vector.numpy(), direct, rtol=1e-6, atol=1e-9)


@given(st.lists(anything, min_size=1, max_size=3))
def test_steps_along_anything(gradient: Any) -> None:
    target = torch.tensor([gradient], dtype=torch.float64)
    step = trust_region_step(lambda x: 2 * x, target, 0.5, 2)
    if target.isfinite().all() and target.abs().max() > 1e-100:
        length = 0.5 * 2 * step.square().sum().item()
        assert length == pytest.approx(0.5, rel=1e-6)
    elif not target.isfinite().all():
        assert not step.isfinite().all()
    with pytest.raises(ValueError, match="num_iterations"):
        conjugate_gradient(lambda x: x, target, 0)
    for wrong in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="max_divergence"):
            trust_region_step(lambda x: x, target, wrong, 1)


@given(st.floats(-3, 3), st.floats(0.1, 8), st.sampled_from([0.1, 1.0, NAN]))
def test_a_line_search_takes_what_is_good_enough(start: float, length: float, limit: float) -> None:
    """Of -x^2, where x moves towards 0 or beyond it."""
    at = torch.tensor([[start]], dtype=torch.float64)
    gradient = -2 * at
    step = length * gradient

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -x.square().sum(-1), 0.1 * (x - at).square().sum(-1)

    moved, taken = backtracking_line_search(evaluate, at, step, gradient, limit)
    expected = 0.0
    for k in range(10):
        new = start + 0.5**k * step.item()
        rise, promised = start**2 - new**2, 0.5**k * gradient.item() * step.item()
        if rise > 0 and rise > 0.1 * promised and 0.1 * (new - start) ** 2 <= limit:
            expected = 0.5**k
            break
    assert taken.item() == expected
    assert moved.item() == pytest.approx(start + expected * step.item())

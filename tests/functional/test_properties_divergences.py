"""Divergences and what is made of them, on any input: against sums written out, SciPy, one another."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special

from esscher.functional.divergences import (
    GENERATORS,
    FDivergence,
    alpha,
    by_name,
    divergence,
    divergence_terms,
)
from esscher.functional.duals import multiplier_terms, temperature_terms
from esscher.functional.kl import (
    categorical_kl,
    gaussian_kl,
    kl_k1_terms,
    kl_k2_terms,
    kl_k3_terms,
)
from esscher.functional.matching import (
    divergence_estimates,
    fit_tilt,
    log_density_ratio,
    log_partition_update,
    matching_terms,
    pseudo_reward,
)
from esscher.functional.preferences import (
    bradley_terry_terms,
    implicit_score,
    penalty_terms,
    preference_terms,
    tilted,
)
from esscher.functional.soft_values import (
    boltzmann_log_probs,
    concave_terms,
    concave_weights,
    inverse_soft_bellman,
    soft_value,
    without_shaping,
)

NAN, INF = float("nan"), float("inf")
NAMES = [*GENERATORS, *(f"alpha({a})" for a in (-1.0, -0.5, 0.0, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0))]
EXTREME = [-INF, -1e30, -1e3, -88.0, -1e-30, 0.0, 1e-30, 88.0, 1e3, 1e30, INF, NAN]
names = st.sampled_from(NAMES)
moderate = st.floats(-8, 8, width=32)
anything = st.sampled_from(EXTREME) | moderate


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_ratio(name: str, u: float) -> float:
    """f(u) as the table of the module has it."""
    if name.startswith("alpha("):
        a = float(name[6:-1])
        if a == 0:
            return float(special.xlogy(u, u)) - (u - 1)
        if a == 1:
            return -math.log(u) + (u - 1)
        return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))
    return {
        "kl": lambda: float(special.xlogy(u, u)),
        "reverse_kl": lambda: -math.log(u),
        "js": lambda: float(special.xlogy(u, u)) - (u + 1) * math.log((u + 1) / 2),
        "pearson_chi2": lambda: (u - 1) ** 2,
        "neyman_chi2": lambda: (u - 1) ** 2 / u,
        "squared_hellinger": lambda: (math.sqrt(u) - 1) ** 2,
        "total_variation": lambda: abs(u - 1) / 2,
        "jeffreys": lambda: (u - 1) * math.log(u),
        "softened_kl": lambda: (u + 1) * math.log((u + 1) / 2),
        "softened_reverse_kl": lambda: (u + 1) * math.log((u + 1) / (2 * u)),
    }[name]()


# ---- generators


@given(names, moderate)
def test_generators_are_their_table(name: str, log_u: float) -> None:
    u = math.exp(log_u)
    found = by_name(name).f(tensor(log_u)).item()
    # (u^2 and the like cancel near u = 1, in the table rather than in the library.)
    assert found == pytest.approx(of_ratio(name, u), rel=1e-9, abs=1e-12 * (1 + u**3 + u**-2))


@given(names, st.floats(-3, 3))
def test_conjugates_are_a_supremum(name: str, log_u: float) -> None:
    """f*(y) = sup (u y - f(u)), found by a search over log u; attained at dconj(y)."""
    f = by_name(name)
    y = f.df(tensor(log_u)).item()
    if name == "total_variation":
        y = 0.49 * math.tanh(log_u)

    def negative(x: float) -> float:
        return of_ratio(name, math.exp(x)) - math.exp(x) * y

    near = optimize.minimize_scalar(negative, bounds=(-9, 9), method="bounded")
    best = max(-near.fun, -negative(-20.0) if name == "total_variation" else -INF)
    if name == "total_variation":
        best = y  # At u = 1, a corner.
    assert f.conj(tensor(y)).item() == pytest.approx(best, rel=1e-5, abs=1e-5)
    if name != "total_variation":
        assert f.dconj(tensor(y)).log().item() == pytest.approx(log_u, rel=1e-6, abs=1e-6)


@given(names, st.floats(1e-3, 1e6) | st.just(INF))
def test_no_finite_conjugate_above_the_domain(name: str, beyond: float) -> None:
    """There it is infinite, so a finite number would be a wrong one; total variation's derivative is a
    constant, and says so.
    """
    f = by_name(name)
    if not math.isfinite(f.domain[1]):
        return
    for dtype in (torch.float32, torch.float64):
        y = torch.tensor([f.domain[1] + beyond], dtype=dtype)
        kinds = [f.conj, f.conj_positive]
        kinds += [] if name == "total_variation" else [f.dconj, f.dconj_positive]
        for kind in kinds:
            assert not kind(y).isfinite().any()


@given(names, anything, st.sampled_from([torch.float32, torch.float64]))
def test_generators_on_anything(name: str, log_u: float, dtype: torch.dtype) -> None:
    """Limits where there are some, NaN for NaN; infinite only where the number cannot be held."""
    f, x = by_name(name), torch.tensor([log_u], dtype=dtype)
    for kind in (f.f, f.df):
        value = kind(x).item()
        if math.isnan(log_u):
            assert math.isnan(value)
        elif math.isnan(value):
            assert log_u == INF  # inf - inf, of what has no finite limit.
    if log_u == -INF or log_u == -1e30:
        zero = {"kl": 0.0, "js": math.log(2), "pearson_chi2": 1.0, "squared_hellinger": 1.0}
        zero |= {"total_variation": 0.5, "softened_kl": -math.log(2), "alpha(0.0)": 1.0}
        zero |= {"alpha(0.5)": 2.0, "alpha(-1.0)": 0.5}
        if name in zero:
            assert f.f(x).item() == pytest.approx(zero[name], rel=1e-6)
    top = f.domain[1]
    if log_u in (1e30, INF) and math.isfinite(top):
        assert f.df(x).item() == pytest.approx(top, rel=1e-6)


@given(names, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_divergences_are_sums_over_outcomes(name: str, counts: Any) -> None:
    """With outcomes that one of the two, or both, rule out; and those of the swapped generator."""
    p, q = (np.array(column, dtype=float) for column in zip(*counts, strict=True))
    if not (p.sum() and q.sum()):
        return
    p, q = p / p.sum(), q / q.sum()
    f = by_name(name)
    with np.errstate(divide="ignore"):
        log_p, log_q = torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q))
    expected = 0.0
    for one, other in zip(p, q, strict=True):
        if one > 0 and other > 0:
            expected += other * of_ratio(name, one / other)
        elif other > 0:  # q f(0), by the generator at a ratio that is all but 0.
            expected += other * f.f(tensor(-INF)).item()
        elif one > 0:  # p f'(inf), up to what is 0 in the limit.
            expected += one * f.domain[1] if name != "softened_kl" else INF
    found = divergence(log_p, log_q, f).item()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert divergence(log_q, log_p, f.swapped()).item() == pytest.approx(found, rel=1e-6, abs=1e-9)
    assert divergence_terms(log_p, log_q, f).sum().item() == pytest.approx(
        found, rel=1e-9, abs=1e-9
    )


@given(names, st.lists(anything, min_size=1, max_size=4))
def test_divergences_of_anything_are_not_negative(name: str, logits: list[float]) -> None:
    p = torch.tensor(logits)
    found = divergence(p, p.flip(0), by_name(name)).item()
    assert math.isnan(found) or found > -1e-5
    if any(map(math.isnan, logits)) or INF in logits:
        assert math.isnan(found)


def test_parameters_of_alpha() -> None:
    for a in (NAN, INF, -INF):
        with pytest.raises(ValueError, match="finite"):
            alpha(a)
    for name in ("alpha()", "alpha(x)", "alpha(nan)", "", "KL", "alpha(1"):
        with pytest.raises(ValueError):
            by_name(name)
    for a in (1e-9, 1 - 1e-9, 1 + 1e-9, -1e-9):  # The limits are continuous.
        near = float(round(a))
        x = tensor(-3.0, -1e-3, 0.5, 4.0)
        torch.testing.assert_close(alpha(a).f(x), alpha(near).f(x), rtol=1e-6, atol=1e-9)


# ---- Kullback-Leibler


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=4), st.floats(-3, 3))
def test_estimators_average_to_the_divergence(logits: list[float], slope: float) -> None:
    p = special.softmax(np.array(logits) / 100)
    q = special.softmax(np.array(logits) / 100 + slope * np.arange(len(p)))
    log_ratio = torch.from_numpy(np.log(p / q))
    expected = float(special.rel_entr(p, q).sum())
    weights = torch.from_numpy(p)
    for terms in (kl_k1_terms, kl_k3_terms):
        assert (weights @ terms(log_ratio)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (kl_k2_terms(log_ratio) == log_ratio**2 / 2).all()
    assert categorical_kl(tensor(*np.log(p)), tensor(*np.log(q))).item() == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


@given(anything)
def test_estimators_of_anything(log_ratio: float) -> None:
    x = torch.tensor([log_ratio])
    k2, k3 = kl_k2_terms(x).item(), kl_k3_terms(x).item()
    assert math.isnan(k2) == math.isnan(log_ratio)
    assert math.isnan(k3) == (math.isnan(log_ratio) or log_ratio == -INF)
    assert math.isnan(k3) or k3 >= -1e-7 * abs(log_ratio)


@given(
    st.lists(st.tuples(moderate, st.floats(1e-3, 1e3), moderate, st.floats(1e-3, 1e3)), max_size=3)
)
def test_gaussians_are_integrals(parts: Any) -> None:
    expected = 0.0
    for mean, std, other, width in parts:
        # E_p[log p - log q], both quadratic in x: moments of p by hand.
        expected += (
            -math.log(std)
            - 0.5
            + math.log(width)
            + 0.5 * ((std**2 + (mean - other) ** 2) / width**2)
        )
    columns = tensor(*(x for part in parts for x in part)).view(-1, 4).T
    p_mean, p_std, q_mean, q_std = columns
    found = gaussian_kl(p_mean, p_std, q_mean, q_std).item()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(anything, st.sampled_from([0.0, 1e-30, 1.0, 1e30, INF, NAN]))
def test_gaussians_of_anything(mean: float, std: float) -> None:
    one = torch.ones(1)
    found = gaussian_kl(mean * one, std * one, 0 * one, one).item()
    if not (math.isfinite(mean) and 0 < std < INF):
        assert not math.isfinite(found)
    else:
        assert found >= 0


# ---- duals


@given(moderate, anything, moderate, st.sampled_from(["log", "paper"]))
def test_multipliers_rise_with_what_is_too_much(
    log_multiplier: float, cost: float, threshold: float, form: Any
) -> None:
    variable = torch.tensor([log_multiplier], requires_grad=True)
    multiplier_terms(variable, torch.tensor([cost]), threshold, form).sum().backward()
    assert variable.grad is not None
    excess = torch.tensor(cost) - threshold
    assert variable.grad.isnan().item() == math.isnan(cost)
    if excess.abs() > 1e-5:
        assert variable.grad.sign().item() == -excess.sign().item()
    entropy = temperature_terms(
        torch.tensor([log_multiplier]), torch.tensor([cost]), threshold, form
    )
    same = multiplier_terms(torch.tensor([log_multiplier]), torch.tensor([cost]), -threshold, form)
    torch.testing.assert_close(entropy, same, equal_nan=True)


# ---- preferences


SCORED = [name for name in NAMES if by_name(name).domain[0] == -INF]


@given(st.sampled_from(NAMES), anything)
def test_scores_are_finite_or_refused(name: str, log_ratio: float) -> None:
    f, x = by_name(name), torch.tensor([log_ratio])
    if name not in SCORED:
        with pytest.raises(ValueError, match="f'\\(0\\) = -inf"):
            implicit_score(x, f)
        return
    found = implicit_score(x, f).item()
    assert math.isnan(found) == math.isnan(log_ratio)
    if abs(log_ratio) <= 8:
        step = 1e-5
        slope = (
            of_ratio(name, math.exp(log_ratio) * (1 + step))
            - of_ratio(name, math.exp(log_ratio) * (1 - step))
        ) / (2 * step * math.exp(log_ratio))
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)


@given(st.sampled_from(["kl", "js", "alpha(0.3)"]), moderate, moderate, st.floats(0, 1))
def test_a_preference_is_a_cross_entropy(name: str, won: float, lost: float, label: float) -> None:
    f, beta = by_name(name), 0.5
    slope = {
        "kl": lambda x: x + 1,
        "js": lambda x: math.log(2) - math.log1p(math.exp(-x)),
        "alpha(0.3)": lambda x: (1 - math.exp(-0.3 * x)) / 0.3,
    }[name]
    margin = beta * (slope(won) - slope(lost))
    expected = -label * math.log(special.expit(margin)) - (1 - label) * math.log(
        special.expit(-margin)
    )
    found = preference_terms(tensor(won), tensor(lost), f, beta, label)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert bradley_terry_terms(tensor(margin), tensor(label)).item() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN, INF])
def test_strengths_out_of_range(beta: float) -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="beta"):
        preference_terms(x, x, by_name("kl"), beta)
    with pytest.raises(ValueError, match="beta"):
        tilted(x, x, by_name("kl"), beta)
    for label in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="label"):
            bradley_terry_terms(x, label)


@given(
    st.sampled_from([name for name in NAMES if name != "total_variation"]),
    st.lists(st.tuples(st.floats(-4, 4), st.floats(-3, 3)), min_size=2, max_size=4),
    st.floats(0.2, 3),
)
def test_the_tilt_is_the_optimum(name: str, outcomes: Any, beta: float) -> None:
    """No move of probability from one outcome to another improves E[r] - beta D_f."""
    f = by_name(name)
    reference, reward = (np.array(column) for column in zip(*outcomes, strict=True))
    reference = special.softmax(reference)
    p = tilted(torch.from_numpy(np.log(reference)), torch.from_numpy(reward), f, beta).exp().numpy()
    assert p.sum() == pytest.approx(1)

    def worth(probability: Any) -> float:
        cost = 0.0
        for one, other in zip(probability, reference, strict=True):
            cost += other * (of_ratio(name, one / other) if one > 0 else f.f(tensor(-INF)).item())
        return float(probability @ reward) - beta * cost

    best = worth(p)
    for take in range(len(p)):
        for give in range(len(p)):
            moved = p.copy()
            step = min(1e-3, p[take] / 2)
            moved[take] -= step
            moved[give] += step
            assert worth(moved) <= best + 1e-9


@given(st.lists(st.tuples(anything, anything), min_size=1, max_size=4))
def test_the_tilt_of_anything(outcomes: Any) -> None:
    reference, reward = (torch.tensor(column) for column in zip(*outcomes, strict=True))
    try:
        p = tilted(reference, reward, by_name("kl"), 1.0).exp()
    except ValueError as error:
        assert "finite reward" in str(error)
        return
    assert p.isnan().all() or p.sum().item() == pytest.approx(1)
    assert not p.isnan().any() or reference.isnan().any() or reward.isnan().any()


@given(names, st.floats(-5, 5))
def test_penalties_are_swapped_generators(name: str, log_ratio: float) -> None:
    """K f(1/k) at k = exp(-log_ratio), less its tangent at 1."""
    if name == "total_variation":
        return
    k, step = math.exp(-log_ratio), 1e-5
    g = lambda x: x * of_ratio(name, 1 / x)  # noqa: E731
    slope = (g(1 + step) - g(1 - step)) / (2 * step)
    expected = g(k) - slope * (k - 1)
    found = penalty_terms(tensor(log_ratio), by_name(name)).item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6 * (1 + k))
    assert found > -1e-9


# ---- matching


@given(st.lists(st.lists(st.floats(-5, 5) | st.just(-INF), min_size=1, max_size=3), max_size=4))
def test_a_running_partition_is_the_mean_of_all(batches: list[list[float]]) -> None:
    log_mean, count = torch.tensor(NAN, dtype=torch.float64), torch.tensor(0)
    seen: list[float] = []
    for batch in batches:
        valid = torch.tensor([*(True for _ in batch), False])
        weights = tensor(*batch, NAN)
        log_mean, count = log_partition_update(log_mean, count, weights, valid)
        seen += batch
        assert count.item() == len(seen)
        mean = sum(map(math.exp, seen)) / len(seen)
        expected = math.log(mean) if mean else -INF
        assert log_mean.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(names, anything, anything)
def test_ratios_to_a_target(name: str, logp: float, log_target: float) -> None:
    found = log_density_ratio(torch.tensor([logp]), torch.tensor([log_target]), 0.5)
    if log_target == -INF:
        assert found.item() == INF
    elif math.isnan(logp) or math.isnan(log_target):
        assert math.isnan(found.item())
    reward = pseudo_reward(found, by_name(name))
    assert torch.equal(reward.isnan(), found.isnan())
    terms = matching_terms(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.0]))
    assert terms.item() == -2


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=2, max_size=5))
def test_estimates_by_enumeration(masses: Any) -> None:
    """Every outcome drawn once from a uniform proposal: the estimates are the divergences."""
    p, q = (np.array(column) / sum(column) for column in zip(*masses, strict=True))
    uniform = torch.full((len(p),), -math.log(len(p)), dtype=torch.float64)
    features = torch.eye(len(p), dtype=torch.float64)
    # The target is known up to a factor 7.
    found = divergence_estimates(
        torch.from_numpy(np.log(p)), torch.from_numpy(np.log(7 * q)), uniform, math.log(7), features
    )
    middle = (p + q) / 2
    half = (special.rel_entr(p, middle).sum() + special.rel_entr(q, middle).sum()) / 2
    assert found.kl_policy_target.item() == pytest.approx(special.rel_entr(p, q).sum(), abs=1e-9)
    assert found.kl_target_policy.item() == pytest.approx(special.rel_entr(q, p).sum(), abs=1e-9)
    assert found.total_variation.item() == pytest.approx(abs(p - q).sum() / 2, abs=1e-9)
    assert found.jensen_shannon.item() == pytest.approx(half, abs=1e-9)
    np.testing.assert_allclose(found.moments.numpy(), p, atol=1e-9)


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=8, unique=True), st.floats(0.05, 0.95))
def test_a_fitted_tilt_has_the_moments(values: list[float], share: float) -> None:
    features = tensor(*values)
    if features.max() - features.min() < 0.1:
        return
    wanted = features.min() + share * (features.max() - features.min())
    tilt = fit_tilt(torch.zeros(len(values), dtype=torch.float64), features[:, None], wanted[None])
    weights = special.softmax(tilt.item() * np.array(values))
    assert weights @ np.array(values) == pytest.approx(wanted.item(), abs=1e-6)


@given(st.lists(anything, min_size=1, max_size=4), anything)
def test_a_tilt_of_anything_is_fitted_or_refused(values: list[float], moment: float) -> None:
    features = torch.tensor(values, dtype=torch.float64)[:, None]
    try:
        found = fit_tilt(torch.zeros(len(values)), features, torch.tensor([moment]))
    except ValueError:
        return
    assert found.isfinite().all() and min(values) < moment < max(values)


# ---- soft values


@given(st.lists(moderate, min_size=1, max_size=5), st.floats(0.1, 10))
def test_soft_values_are_log_sums(q: list[float], inverse: float) -> None:
    expected = special.logsumexp(inverse * np.array(q)) / inverse
    assert soft_value(tensor(*q), inverse).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    logp = boltzmann_log_probs(tensor(*q), inverse)
    np.testing.assert_allclose(logp.numpy(), inverse * (np.array(q) - expected), atol=1e-7)


@given(st.lists(anything, min_size=1, max_size=4), st.sampled_from([1e-30, 1.0, 1e30]))
def test_soft_values_of_anything(q: list[float], inverse: float) -> None:
    found = soft_value(torch.tensor(q), inverse).item()
    if any(map(math.isnan, q)):
        assert math.isnan(found)
    elif all(math.isfinite(x) and abs(x) <= 1e3 for x in q) and math.isfinite(found):
        assert found >= max(q) - 1e-3 * abs(max(q)) - 1e-5


@given(moderate, st.sampled_from(["kl", "shifted_kl", "reverse_kl", "js", "squared_hellinger"]))
def test_concave_functions_are_minus_conjugates(x: float, phi: Any) -> None:
    """Inside of the floors, by their table; their slope everywhere, by differences."""
    formula, floor = {
        "kl": (lambda x: -math.exp(-x - 1), -5.0),
        "shifted_kl": (lambda x: 1 - math.exp(-x), -4.0),
        "reverse_kl": (lambda x: 1 + math.log(x), 0.1),
        "js": (lambda x: math.log(2 - math.exp(-x)), -0.5),
        "squared_hellinger": (lambda x: x / (1 + x), -0.5),
    }[phi]
    if x >= floor:
        assert concave_terms(tensor(x), phi).item() == pytest.approx(formula(x), rel=1e-6, abs=1e-9)
    step = 1e-5
    up, down = (concave_terms(tensor(x + d), phi).item() for d in (step, -step))
    if abs(x - floor) > 2 * step:
        slope = concave_weights(tensor(x), phi).item()
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4)


@given(anything, anything, st.booleans())
def test_rewards_from_values(q: float, after: float, ended: bool) -> None:
    found = inverse_soft_bellman(
        torch.tensor([q]), torch.tensor([after]), torch.tensor([ended]), 0.5
    ).item()
    expected = np.float32(q) if ended else np.float32(q) - np.float32(0.5) * np.float32(after)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@given(st.integers(0, 1000), st.floats(0, 0.99))
def test_shaping_alone_leaves_nothing(seed: int, discount: float) -> None:
    draw = np.random.default_rng(seed)
    transition = draw.dirichlet(np.ones(3), size=(3, 2))
    potential, rest = draw.normal(size=3), draw.normal(size=(3, 2))
    shaped = np.zeros((3, 2))
    for s in range(3):
        for a in range(2):
            shaped[s, a] = potential[s] - discount * sum(
                transition[s, a, t] * potential[t] for t in range(3)
            )
    found = without_shaping(torch.from_numpy(shaped), torch.from_numpy(transition), discount)
    assert found.abs().max() < 1e-9
    one, two = (
        without_shaping(torch.from_numpy(x), torch.from_numpy(transition), discount)
        for x in (rest, rest + shaped)
    )
    torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_records_are_equal_by_name() -> None:
    assert by_name("kl") == by_name("kl") != by_name("js")
    assert isinstance(alpha(0.5).swapped(), FDivergence) and alpha(0.3).swapped() == alpha(0.7)

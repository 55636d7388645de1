"""Sets of samples, noise levels and tokens, on any input: against loops, NumPy and SciPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize, special, stats

from esscher.functional import binning, distillation
from esscher.functional.contrast import (
    diffusion_dpo_terms,
    diffusion_kto_terms,
    greedy_split,
    halved_split,
    implicit_reward,
    kto_baseline,
    paired_split,
)
from esscher.functional.counted_noise import counted_normal
from esscher.functional.diffusion import (
    alpha_bar_of_sigma,
    alpha_bars,
    denoised_of,
    denoising_terms,
    edm_scalings,
    eps_of,
    exponential_sigmas,
    gaussian_log_prob,
    input_scale,
    karras_sigmas,
    linear_sigmas,
    multistep,
    reverse_kernel,
    reverse_kl_terms,
    sampling_timesteps,
    score_of,
    sigma_of_alpha_bar,
    truncated_log_logistic,
)
from esscher.functional.masking import (
    mask_budgets,
    mask_counts,
    mask_share,
    masked_cross_entropy,
    places_of_least,
)
from esscher.functional.sequences import (
    sequence_log_prob,
    shifted,
    token_log_probs,
    token_log_probs_and_entropy,
)
from esscher.functional.sets import energy_distance, frechet_distance, moments, vendi_score
from esscher.functional.transport import (
    gaussian_w2,
    half_squared_costs,
    median_distance,
    mmd_terms,
    random_directions,
    sinkhorn_divergence_terms,
    sliced_w2_terms,
)

NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 10_000)
levels = st.sampled_from([1e-30, 1e-4, 0.5, 1.0, 80.0, 1e10, 1e30])
anything = st.sampled_from([-INF, -1e30, -1e-30, 0.0, 1e-30, 1e30, INF, NAN]) | st.floats(
    -5, 5, width=32
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def single(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).float()


# ---- distances of sets


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.0, 30.0, 1e3, 1e5]))
def test_distances_do_not_depend_on_where_the_sets_stand(
    seed: int, m: int, n: int, offset: float
) -> None:
    """In float32; far from 0 the products of coordinates are larger than what is asked for by 1e10."""
    x, y = normal(seed, 1, m, 2).round(1), normal(seed + 1, 1, n, 2).round(1)
    x, y = single(x + offset), single(y + offset)
    a, b = x[0].double().numpy(), y[0].double().numpy()
    expected = np.array([[((p - q) ** 2).sum() / 2 for q in b] for p in a])
    found = half_squared_costs(x, y)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    both = np.concatenate([a, b])
    pairs = [np.linalg.norm(p - q) for k, p in enumerate(both) for q in both[:k]]
    middle = sorted(pairs)[(len(pairs) - 1) // 2]
    assert median_distance(x, y).item() == pytest.approx(middle if middle > 1e-3 else 1, abs=1e-2)
    width = 0.7

    def kernel(p: Any, q: Any) -> float:
        return np.mean([[math.exp(-((i - j) ** 2).sum() / (2 * width**2)) for j in q] for i in p])

    squared = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    mmd = mmd_terms(x, y, bandwidth=torch.tensor([width]))
    assert mmd.item() == pytest.approx(squared, abs=1e-4)


@given(seeds, st.sampled_from([2, 5, 30]), st.sampled_from([0.0, 1e3]))
@example(0, 30, 1e3)
def test_energy_distances_are_means_of_distances(seed: int, count: int, offset: float) -> None:
    """30 and more samples are where torch begins to take distances from products."""
    a, b = single(normal(seed, count, 2) + offset), single(normal(seed + 1, 3, 2) + offset)

    def mean(x: Any, y: Any, pairs: int) -> float:
        return sum(np.linalg.norm(p - q) for p in x for q in y) / pairs

    p, q = a.double().numpy(), b.double().numpy()
    expected = 2 * mean(p, q, 3 * count) - mean(p, p, count * (count - 1)) - mean(q, q, 6)
    assert energy_distance(a, b).item() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="at least 2"):
        energy_distance(a, b[:1])


@settings(max_examples=settings().max_examples // 3)
@given(seeds, st.integers(2, 4), st.integers(1, 4))
def test_transport_of_sets_of_one_size(seed: int, count: int, directions: int) -> None:
    x, y = normal(seed, count, 2), normal(seed + 1, count, 2)
    found = directions_of(seed, directions)
    expected = np.mean([((np.sort(x @ d) - np.sort(y @ d)) ** 2).mean() for d in found.numpy()])
    # Two more samples that are not there, one of them no number.
    mask = torch.tensor([[True] * count + [False] * 2])
    rest = np.array([[NAN, 1.0], [5.0, 5.0]])
    ours, theirs = (torch.from_numpy(np.concatenate([s, rest]))[None] for s in (x, y))
    assert sliced_w2_terms(ours, theirs, found, mask).item() == pytest.approx(expected)
    assert sliced_w2_terms(ours[:, :count], theirs[:, :count], found).item() == pytest.approx(
        expected
    )
    cost = np.array([[((p - q) ** 2).sum() / 2 for q in y] for p in x])
    rows, columns = optimize.linear_sum_assignment(cost)
    exact = cost[rows, columns].mean()
    sinkhorn = sinkhorn_divergence_terms(
        torch.from_numpy(x)[None], torch.from_numpy(y)[None], epsilon=0.02, iterations=100
    )
    assert sinkhorn.item() == pytest.approx(exact, abs=0.05)


def directions_of(seed: int, count: int) -> torch.Tensor:
    torch.manual_seed(seed)
    found = random_directions(count, torch.zeros(1, 2, dtype=torch.float64))
    np.testing.assert_allclose(found.norm(dim=-1).numpy(), 1, rtol=1e-12)
    return found


@given(seeds, st.integers(1, 3))
def test_gaussians_by_matrix_roots(seed: int, size: int) -> None:
    roots = normal(seed, 2, size, size)
    a, b = (root @ root.T for root in roots)
    mean, other = normal(seed + 1, 2, size)
    root = linalg.sqrtm(a).real
    middle = linalg.sqrtm(root @ b @ root).real
    expected = ((mean - other) ** 2).sum() + np.trace(a + b - 2 * middle)
    given_ = [torch.from_numpy(x) for x in (mean, a, other, b)]
    assert frechet_distance(*given_).item() == pytest.approx(expected, abs=1e-5)
    assert gaussian_w2(*given_).item() == pytest.approx(math.sqrt(max(0, expected)), abs=3e-3)
    assert gaussian_w2(*given_[:2], *given_[:2]).item() == pytest.approx(0, abs=1e-3)


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_effective_numbers_by_eigenvalues(seed: int, count: int, size: int) -> None:
    x = normal(seed, count, size)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / count).clip(0)
    expected = math.exp(special.entr(values).sum())
    found = vendi_score(torch.from_numpy(x)).item()
    assert found == pytest.approx(expected, rel=1e-6) and 1 - 1e-9 <= found <= count + 1e-9
    if count > 1:
        mean, covariance = moments(torch.from_numpy(x))
        np.testing.assert_allclose(mean.numpy(), x.mean(0), atol=1e-12)
        np.testing.assert_allclose(covariance.numpy(), np.cov(x.T).reshape(size, size), atol=1e-9)


@pytest.mark.parametrize("wrong", [NAN, INF, 0.0])
def test_sets_of_what_is_no_number_are_refused(wrong: float) -> None:
    bad = torch.full((3, 2), wrong)
    with pytest.raises(ValueError, match="no direction"):
        vendi_score(bad)
    with pytest.raises(ValueError, match="at least 1 sample"):
        vendi_score(torch.zeros(0, 2))
    if wrong != 0.0:
        mean, covariance = moments(bad)
        for pair in ((covariance, torch.eye(2)), (torch.eye(2), covariance)):
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(mean, pair[0], mean, pair[1])
        good = torch.zeros(1, 2, 2)
        x = bad[None]
        assert not half_squared_costs(x, good).isfinite().any()
        assert not mmd_terms(x, good, bandwidth=torch.ones(1)).isfinite().any()
        assert not sinkhorn_divergence_terms(x, good, epsilon=0.1, iterations=2).isfinite().any()
        assert not energy_distance(bad, good[0]).isfinite().any()
    for epsilon, iterations in ((0.0, 1), (NAN, 1), (0.1, 0)):
        with pytest.raises(ValueError, match="epsilon"):
            sinkhorn_divergence_terms(bad[None], bad[None], epsilon=epsilon, iterations=iterations)


# ---- positive and negative samples


pairs = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=5)


@given(pairs, st.floats(0.1, 10))
def test_contrasts_are_their_formulas(rewards: Any, beta: float) -> None:
    reward = torch.tensor(rewards, dtype=torch.float64)
    r = reward.numpy()
    dpo = -np.log(special.expit(beta / 2 * (r[:, 0] - r[:, 1])))
    np.testing.assert_allclose(diffusion_dpo_terms(reward, beta).numpy(), dpo, rtol=1e-9)
    baseline = max(0.0, r.mean())
    assert kto_baseline(reward).item() == pytest.approx(baseline)
    kto = 1 - special.expit(np.array([1, -1]) * beta * (r - baseline))
    found = diffusion_kto_terms(reward, beta, torch.tensor(baseline, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), kto, atol=1e-9)
    np.testing.assert_allclose(implicit_reward(reward, 2 * reward).numpy(), r, atol=1e-12)
    for wrong in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="beta"):
            diffusion_dpo_terms(reward, wrong)
        with pytest.raises(ValueError, match="beta"):
            diffusion_kto_terms(reward, wrong, torch.tensor(0.0))


@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 2), min_size=1, max_size=5), seeds)
def test_splits_hold_every_sample_once(rewards: Any, seed: int) -> None:
    reward = torch.tensor(rewards, dtype=torch.float32)
    flat = reward.flatten()
    split = paired_split(reward)
    assert (flat[split[:, 0]] >= flat[split[:, 1]]).all()
    assert (split // 2 == torch.arange(len(rewards))[:, None]).all()
    halves = halved_split(reward)
    assert flat[halves[:, 0]].min() >= flat[halves[:, 1]].max()
    order = torch.stack(
        [torch.from_numpy(np.random.default_rng(seed).permutation(len(rewards)))] * 3
    )
    greedy = greedy_split(reward.unsqueeze(-1), lambda x: float(x.sum()), order)
    assert torch.equal(flat[greedy[:, 0]], reward.max(1).values)
    for found in (split, halves, greedy):
        assert sorted(found.flatten().tolist()) == list(range(2 * len(rewards)))


# ---- bins


@given(anything, st.floats(-2, 1), st.floats(0.1, 3), st.integers(2, 300))
def test_every_number_lies_in_its_bin(value: float, low: float, width: float, bins: int) -> None:
    x, ends = torch.tensor([[value]]), (torch.tensor([low]), torch.tensor([low + width]))
    if math.isnan(value):
        with pytest.raises(ValueError, match="not a number"):
            binning.bin_of(x, *ends, bins)
        return
    place = (float(np.float32(value)) - low) / width * bins
    expected = int(min(max(math.floor(min(max(place, -1), bins)), 0), bins - 1))
    found = binning.bin_of(x, *ends, bins).item()
    other = distillation.bin_of(x[0], low, low + width, bins).item()
    near = abs(place - round(place)) < 1e-3 if abs(place) < 1e6 else False
    assert near or (found == expected and other == expected)
    centre = binning.centre_of(torch.tensor([[found]]), *ends, bins).item()
    assert abs(centre - min(max(value, low), low + width)) <= 0.51 * width / bins + 1e-5


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 0.0), (NAN, 1.0), (0.0, NAN)])
def test_bins_without_a_range(low: float, high: float) -> None:
    x = torch.zeros(1, 2)
    ends = torch.tensor([-1.0, low]), torch.tensor([1.0, high])
    with pytest.raises(ValueError, match="dimension 1 has no range"):
        binning.bin_of(x, *ends, 4)
    with pytest.raises(ValueError, match="low < high"):
        distillation.bin_of(x[0], low, high, 4)
    with pytest.raises(ValueError, match="bins"):
        binning.bin_of(x, torch.zeros(2), torch.ones(2), 1)


# ---- masks


@given(
    st.sampled_from(["cosine", "linear", "square", "cubic"]), st.floats(0, 1), st.integers(1, 50)
)
def test_shares_fall_from_one_to_zero(schedule: Any, time: float, length: int) -> None:
    share = {
        "cosine": math.cos(math.pi * time / 2),
        "linear": 1 - time,
        "square": 1 - time**2,
        "cubic": 1 - time**3,
    }[schedule]
    when = torch.tensor([time], dtype=torch.float64)
    assert mask_share(schedule, when).item() == pytest.approx(share, abs=1e-12)
    count = mask_counts(schedule, when, length).item()
    assert (
        1 <= count <= length and abs(count - share * length) <= max(0.5, 1 - share * length) + 1e-9
    )
    budgets = mask_budgets(schedule, torch.tensor([length]), 5)[0].tolist()
    assert budgets[-1] == 0 and budgets == sorted(budgets, reverse=True) and budgets[0] <= length


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6, unique=True), st.integers(0, 7))
def test_places_of_the_least(scores: list[float], count: int) -> None:
    found = places_of_least(torch.tensor([scores]).double(), torch.tensor([count]))[0].tolist()
    least = sorted(scores)[:count]
    assert [score in least for score in scores] == found


@given(seeds, st.lists(st.booleans(), min_size=3, max_size=3))
def test_cross_entropy_of_masked_places(seed: int, mask: list[bool]) -> None:
    logits, tokens = normal(seed, 1, 3, 4), np.array([[0, 3, 1]])
    logits[0][~np.array(mask)] = NAN
    found = masked_cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(tokens), torch.tensor([mask])
    ).item()
    terms = [-special.log_softmax(logits[0, k])[tokens[0, k]] for k in range(3) if mask[k]]
    assert found == pytest.approx(np.mean(terms)) if terms else math.isnan(found)


# ---- noise by counters


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 100))
def test_counted_noise_belongs_to_its_counters(seed: int, time: int, draw: int) -> None:
    seeds_, times = torch.tensor([seed, 5, seed]), torch.tensor([time, time, time])
    found = counted_normal(seeds_, times, draw, (3, 2))
    assert found.isfinite().all() and torch.equal(found[0], found[2])
    assert torch.equal(found[:1], counted_normal(seeds_[:1], times[:1], draw, (3, 2)))
    assert not torch.equal(found[0], counted_normal(seeds_[:1], times[:1], draw + 1, (3, 2))[0])
    assert not torch.equal(found[0], counted_normal(seeds_[:1], times[:1] + 1, draw, (3, 2))[0])


def test_counted_noise_is_normal() -> None:
    values = counted_normal(torch.arange(2_000), torch.zeros(2_000, dtype=torch.long), 0, (5,))
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3


# ---- noise levels


@given(levels, st.floats(-3, 3), st.floats(-3, 3))
def test_predictions_stand_for_one_estimate(sigma: float, x0: float, noise: float) -> None:
    """Written in float64 as the definitions are, where the library is given float32."""
    x = np.float32(x0 + sigma * noise)
    level = torch.tensor([sigma])
    root = math.hypot(1, sigma)
    outputs = {"epsilon": noise, "sample": x0, "v_prediction": (noise - sigma * x0) / root}
    outputs["flow_prediction"] = noise - x0
    expected = {
        "epsilon": float(x) - float(np.float32(sigma)) * noise,
        "sample": x0,
        "v_prediction": float(x) / root / root - sigma / root * outputs["v_prediction"],
        "flow_prediction": (float(x) - sigma * outputs["flow_prediction"]) / (1 + sigma),
    }
    for kind, output in outputs.items():
        found = denoised_of(kind, torch.tensor([[output]]), torch.tensor([[x]]), level).item()
        close = 1e-5 * (1 + abs(expected[kind]))
        close += 1e-5 * abs(sigma * noise) if kind == "epsilon" else 0.0
        assert found == pytest.approx(expected[kind], abs=close), kind
        scale = 1 / (1 + sigma) if kind == "flow_prediction" else 1 / root
        assert input_scale(kind, level).item() == pytest.approx(scale, rel=1e-5)


@given(levels, st.floats(0.1, 2))
def test_scalings_keep_unit_variance(sigma: float, spread: float) -> None:
    skip, out, in_, noise = (x.item() for x in edm_scalings(torch.tensor([sigma]), spread))
    root = math.hypot(sigma, spread)
    assert skip == pytest.approx((spread / root) ** 2, rel=1e-4, abs=1e-37)
    assert out == pytest.approx(sigma / root * spread, rel=1e-4)
    assert in_ == pytest.approx(1 / root, rel=1e-4)
    assert noise == pytest.approx(math.log(sigma) / 4, rel=1e-4, abs=1e-6)


@given(st.floats(1e-6, 1), st.floats(-3, 3), st.floats(-3, 3))
def test_levels_and_shares_are_inverse(alpha_bar: float, x: float, denoised: float) -> None:
    held = torch.tensor([alpha_bar], dtype=torch.float64)
    sigma = sigma_of_alpha_bar(held)
    assert alpha_bar_of_sigma(sigma).item() == pytest.approx(alpha_bar)
    if sigma.item() < 1e-3:
        return
    given_ = (*(torch.tensor([[v]], dtype=torch.float64) for v in (x, denoised)), sigma)
    eps, score = eps_of(*given_).item(), score_of(*given_).item()
    assert x - sigma.item() * eps == pytest.approx(denoised, abs=1e-9)
    assert score == pytest.approx(-eps / sigma.item())
    for kind, weight in (
        ("sample", 1.0),
        ("epsilon", 1 / sigma.item() ** 2),
        ("v_prediction", (1 + sigma.item() ** 2) / sigma.item() ** 2),
        ("flow_prediction", ((1 + sigma.item()) / sigma.item()) ** 2),
    ):
        found = denoising_terms(given_[1], given_[0], sigma, kind)  # pyright: ignore
        assert found.item() == pytest.approx((x - denoised) ** 2 * weight, rel=1e-9)


@given(st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1), st.floats(-3, 3), st.floats(-3, 3))
def test_steps_down_add_up_to_the_level(
    sigma: float, share: float, eta: float, x: float, denoised: float
) -> None:
    """Of an x that is denoised + sigma eps: what is kept of eps and new noise make the next level."""
    following = share * sigma
    one = lambda value: torch.tensor([[value]], dtype=torch.float64)  # noqa: E731
    at = [torch.tensor([v], dtype=torch.float64) for v in (sigma, following)]
    mean, std = reverse_kernel(one(x), one(denoised), *at, eta)
    eps = (x - denoised) / sigma
    spread = eta * following * math.sqrt(1 - share**2)
    assert std.item() == pytest.approx(spread, abs=1e-9)
    kept = math.sqrt(max(0, following**2 - spread**2))
    assert mean.item() == pytest.approx(denoised + kept * eps, abs=1e-6)
    if spread > 1e-3:
        found = gaussian_log_prob(one(x), mean, std, "sum").item()
        assert found == pytest.approx(stats.norm.logpdf(x, mean.item(), spread), rel=1e-6)
        cost = reverse_kl_terms(one(denoised), one(denoised + 1), *at, eta).item()
        moved = 1 - kept / sigma
        assert cost == pytest.approx(moved**2 / (2 * spread**2), rel=1e-6)
    for wrong in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="eta"):
            reverse_kernel(one(x), one(denoised), *at, wrong)


@given(st.floats(0.3, 0.9), st.floats(0.3, 0.9), st.floats(-2, 2), st.floats(-2, 2))
def test_two_steps_are_exact_on_straight_lines(
    first: float, second: float, x: float, a: float
) -> None:
    """A denoised estimate a + b log sigma, extrapolated half way along log sigma."""
    slope = 0.7
    sigma = [3.0, 3.0 * first, 3.0 * first * second]
    estimate = [a + slope * math.log(s) for s in sigma]
    found = multistep(
        *(torch.tensor([[v]], dtype=torch.float64) for v in (x, estimate[1], estimate[0])),
        *(torch.tensor(s, dtype=torch.float64) for s in sigma),
    )
    middle = a + slope * (math.log(sigma[1]) + math.log(sigma[2])) / 2
    assert found.item() == pytest.approx(second * x + (1 - second) * middle, abs=1e-9)


@given(st.integers(2, 20), levels, levels, st.floats(0.5, 9))
def test_ladders_of_levels(count: int, low: float, high: float, rho: float) -> None:
    ladders = (
        lambda: karras_sigmas(count, low, high, rho),
        lambda: exponential_sigmas(count, low, high),
        lambda: linear_sigmas(count, low, high),
    )
    for ladder in ladders:
        if not low < high:
            with pytest.raises(ValueError, match="low < high"):
                ladder()
            continue
        found = ladder()
        assert len(found) == count and (found.diff() <= 0).all()
        assert found[0].item() == pytest.approx(high, rel=1e-6)
        assert found[-1].item() == pytest.approx(low, rel=1e-2) or high / low > 1e12
    for wrong in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="rho > 0"):
            karras_sigmas(5, 0.1, 1.0, wrong)


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["leading", "trailing", "linspace"]))
def test_steps_of_training_that_are_drawn(train: int, count: int, spacing: Any) -> None:
    if not 1 <= count <= train:
        with pytest.raises(ValueError, match="count"):
            sampling_timesteps(train, count, spacing)
        return
    found = sampling_timesteps(train, count, spacing).tolist()
    assert len(found) == count and found == sorted(found, reverse=True)
    assert 0 <= found[-1] <= found[0] <= train - 1


@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.integers(1, 30),
    st.sampled_from([0.0, 1e-4, 0.02, 0.5, 1.0, NAN]),
)
def test_shares_of_signal(schedule: Any, steps: int, end: float) -> None:
    if not 0 < end < 1:
        with pytest.raises(ValueError, match="betas"):
            alpha_bars(schedule, steps, beta_end=end)
        return
    found = alpha_bars(schedule, steps, beta_end=end)
    assert len(found) == steps and (found > 0).all() and (found < 1).all()
    assert (found.diff() <= 0).all() or end < 1e-4
    if schedule == "linear":
        beta = np.linspace(1e-4, end, steps)
        np.testing.assert_allclose(found.numpy(), np.cumprod(1 - beta), rtol=1e-12)


@given(st.floats(0, 1), st.floats(-2, 2), st.floats(0.01, 2), st.sampled_from([1e-30, 0.01]))
def test_log_logistic_levels(uniform: float, loc: float, scale: float, low: float) -> None:
    high = 50.0
    drawn = torch.tensor([uniform], dtype=torch.float64)
    found = truncated_log_logistic(drawn, loc, scale, low, high).item()
    assert low <= found <= high
    ends = [special.expit((math.log(level) - loc) / scale) for level in (low, high)]
    if low * 1.01 < found < high / 1.01 and 1e-6 < uniform < 1 - 1e-6:
        share = (special.expit((math.log(found) - loc) / scale) - ends[0]) / (ends[1] - ends[0])
        assert share == pytest.approx(uniform, abs=1e-6)
    for wrong in ((0.0, 0.1, 1.0), (NAN, 0.1, 1.0), (1.0, 1.0, 0.1), (1.0, 0.0, 1.0)):
        with pytest.raises(ValueError, match="scale > 0"):
            truncated_log_logistic(drawn, loc, *wrong)


# ---- students


@given(st.lists(anything, min_size=1, max_size=3))
def test_ratios_of_a_discriminator(logits: list[float]) -> None:
    found = distillation.density_ratio(torch.tensor([logits]), 10.0, 0.1, 20.0).item()
    with np.errstate(invalid="ignore"):
        mean = np.float64(np.mean(np.array(logits, dtype=np.float64)))
    if math.isnan(mean):
        assert math.isnan(found)
    else:
        expected = min(max(math.exp(min(max(mean, -10), 10)), 0.1), 20)
        assert found == pytest.approx(expected, rel=1e-4)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2)), max_size=6), st.floats(0, 1))
def test_running_means_of_bins(rows: Any, average: float) -> None:
    before = [0.5, 1.0, 2.0]
    found = distillation.moved_bin_means(
        torch.tensor(before).double(),
        torch.tensor([x for x, _ in rows], dtype=torch.float64),
        torch.tensor([k for _, k in rows], dtype=torch.long),
        average,
    ).tolist()
    for place, mean in enumerate(before):
        own = [x for x, k in rows if k == place]
        expected = average * mean + (1 - average) * np.mean(own) if own else mean
        assert found[place] == pytest.approx(expected)


@given(seeds)
def test_losses_of_students_by_components(seed: int) -> None:
    x, teacher, fake = (torch.from_numpy(normal(seed + k, 2, 3)) for k in range(3))
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    direction = distillation.matching_direction(x, teacher, fake, weight)
    for b in range(2):
        size = np.mean([abs(x[b, k] - teacher[b, k]).item() for k in range(3)])
        expected = weight[b].item() / (size + 1e-6) * (fake[b] - teacher[b]).numpy()
        np.testing.assert_allclose(direction[b].numpy(), expected, rtol=1e-9)
    moving = x.clone().requires_grad_()
    distillation.pseudo_target_terms(moving, direction).mean().backward()
    assert moving.grad is not None
    np.testing.assert_allclose(moving.grad.numpy(), direction.numpy() / 6, atol=1e-12)
    real = single(x)
    soft = np.logaddexp(0, -real.numpy()) + np.logaddexp(0, fake.float().numpy())
    found = distillation.discriminator_terms(real, fake.float())
    np.testing.assert_allclose(found.numpy(), soft.mean(1), rtol=1e-4)
    np.testing.assert_allclose(
        distillation.generator_terms(real).numpy(),
        np.logaddexp(0, -real.numpy()).mean(1),
        rtol=1e-4,
    )
    penalty = distillation.approximate_r1_terms(real, fake.float())
    np.testing.assert_allclose(penalty.numpy(), ((real - fake.float()) ** 2).mean(1), rtol=1e-4)
    assert distillation.over_mean(weight).mean().item() == pytest.approx(1, abs=1e-5)


# ---- tokens


@given(
    seeds,
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.floats(0.1, 5),
    st.integers(1, 3),
    st.sampled_from([1.0, 1e3]),
)
def test_tokens_are_scored_row_by_row(
    seed: int, mask: list[bool], temperature: float, chunk: int, size: float
) -> None:
    """Whatever stands where the mask is False; logits so large that one token has it all included."""
    hidden, weight = size * normal(seed, 1, len(mask), 3), normal(seed + 1, 4, 3)
    bias, targets = normal(seed + 2, 4), np.random.default_rng(seed).integers(0, 4, (1, len(mask)))
    hidden[0][~np.array(mask)] = NAN
    given_ = [torch.from_numpy(x) for x in (hidden, weight, targets)]
    options: Any = {"bias": torch.from_numpy(bias), "temperature": temperature, "chunk": chunk}
    there = torch.tensor([mask])
    found = token_log_probs_and_entropy(*given_, there, **options)
    assert torch.equal(token_log_probs(*given_, there, **options), found.logp)
    for place, counts in enumerate(mask):
        if not counts:
            assert found.logp[0, place] == 0 and found.entropy[0, place] == 0
            continue
        logits = (hidden[0, place] @ weight.T + bias) / temperature
        logp = special.log_softmax(logits)
        assert found.logp[0, place].item() == pytest.approx(
            logp[targets[0, place]], rel=1e-9, abs=1e-9
        )
        entropy = special.entr(np.exp(logp)).sum()
        assert found.entropy[0, place].item() == pytest.approx(entropy, abs=1e-9)
    whole = sequence_log_prob(found.logp, there)
    assert whole.count.item() == sum(mask)
    assert whole.mean.item() == pytest.approx(whole.sum.item() / max(1, sum(mask)))
    tokens, shown = shifted(torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))
    assert tokens.tolist() == [[2, 3]] and shown.tolist() == [[True, True]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": NAN}, {"chunk": 0}])
def test_scores_out_of_range(options: Any) -> None:
    none = torch.zeros(1, 0, 2)
    targets, mask = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool)
    weight = torch.ones(3, 2)
    with pytest.raises(ValueError, match=next(iter(options))):
        token_log_probs(none, weight, targets, mask, **options)
    assert token_log_probs(none, weight, targets, mask).shape == (1, 0)

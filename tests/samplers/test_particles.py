"""Populations of particles: by hand, and against chains whose tilt has a closed form."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError
from esscher.samplers.denoisers import Counted
from esscher.samplers.particles import (
    Particles,
    SteeringSettings,
    best_of_n,
    effective_size,
    guidance_shift,
    judge,
    log_increment,
    steer,
    systematic,
)

SIGMAS = [3.0, 1.5, 0.8, 0.4, 0.2, 0.0]
CENTRE, SPREAD, LAMBDA = 0.5, 0.7, 1.5
DATA: Any = GaussianMixture(torch.tensor([[CENTRE]]), SPREAD)


def chain_moments() -> tuple[float, float]:
    """Mean and variance of the samples of the chain, which is linear: D(x) = pull x + (1 - pull) m."""
    mean, variance = 0.0, SIGMAS[0] ** 2
    for now, then in itertools.pairwise(SIGMAS):
        pull = SPREAD**2 / (SPREAD**2 + now**2)
        noise = then**2 * (1 - (then / now) ** 2)
        kept = math.sqrt(then**2 - noise) / now
        slope = kept + (1 - kept) * pull
        mean = slope * mean + (1 - kept) * (1 - pull) * CENTRE
        variance = slope**2 * variance + noise
    return mean, variance


MEAN, VARIANCE = chain_moments()


def linear(x: Tensor) -> Tensor:
    return x[:, 0]


def run(count: int = 4000, seed: int = 0, denoiser: Any = DATA, **settings: Any) -> Particles:
    chosen: dict[str, Any] = {"inverse_temperature": LAMBDA, **settings}
    return steer(denoiser, linear, SIGMAS, (1,), count, seed, SteeringSettings(**chosen))


def weighted(particles: Particles) -> tuple[float, float]:
    weight, x = particles.log_weight.exp(), particles.x[:, 0].double()
    mean = float((weight * x).sum())
    return mean, float((weight * (x - mean).square()).sum())


# ---- against the closed form


@pytest.mark.parametrize("proposal", ["model", "guided"])
@pytest.mark.parametrize("potential", ["diff", "max"])
@pytest.mark.parametrize("when", [(), (1, 3), None])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_weights_are_exact(
    proposal: Any, potential: Any, when: tuple[int, ...] | None, threshold: float
) -> None:
    """A linear reward tilts N(M, S^2) to N(M + lambda S^2, S^2), and Z = exp(lambda M + lambda^2 S^2 /
    2), whatever was resampled, or judged without being resampled, on the way.

    Six seeds of 4000 particles; "max" wastes most of them, so its tolerance is wider.
    """
    drawn = [
        run(
            proposal=proposal,
            potential=potential,
            resample_at=when,
            threshold=threshold,
            seed=seed,
        )
        for seed in range(6)
    ]
    means, variances = zip(*map(weighted, drawn), strict=True)
    log_normaliser = sum(d.log_normaliser for d in drawn) / 6
    wide = 3.0 if potential == "max" and when != () else 1.0
    assert sum(means) / 6 == pytest.approx(MEAN + LAMBDA * VARIANCE, abs=0.03 * wide)
    assert sum(variances) / 6 == pytest.approx(VARIANCE, abs=0.03 * wide)
    expected = LAMBDA * MEAN + LAMBDA**2 * VARIANCE / 2
    assert log_normaliser == pytest.approx(expected, abs=0.05 * wide)
    if when == () or threshold == 0:
        assert not any(bool(d.resampled.any()) for d in drawn)
    elif threshold == 1:
        assert all(bool(d.resampled[:-1].all()) for d in drawn)


def test_weights_wait_where_nothing_is_resampled() -> None:
    """Judged at every step and never resampled, the potentials telescope to lambda r(x0): the same
    weights as of particles that were judged once, at the end.
    """
    often, once = run(threshold=0.0, count=50), run(resample_at=(), count=50)
    assert len(often.effective) == 6 and len(once.effective) == 1
    expected = (LAMBDA * often.reward.double()).log_softmax(-1)
    torch.testing.assert_close(often.log_weight, expected)
    # Both drew the same noise: only the uniform numbers of resampling lie between.
    torch.testing.assert_close(once.log_weight, (LAMBDA * once.reward.double()).log_softmax(-1))
    highest = run(threshold=0.0, count=50, potential="max")
    torch.testing.assert_close(highest.log_weight, expected)


def test_a_weight_that_waited_is_there_when_resampling_comes() -> None:
    """Judged before steps 0 and 2; only at step 2 few enough particles count.

    The effective number there is that of exp(lambda v_2) alone, v_2 from the state at that step, so
    what step 0 had added is neither lost nor counted twice.
    """
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        seen.append(DATA(x, sigma))
        return seen[-1]

    drawn = run(count=200, denoiser=watched, resample_at=(0, 2), threshold=0.8)
    assert drawn.resampled.tolist() == [False, True, False]
    for place, step in ((0, 0), (1, 2)):
        weight = (LAMBDA * seen[step][:, 0].double()).exp()
        expected = float(weight.sum() ** 2 / weight.square().sum())
        assert float(drawn.effective[place]) == pytest.approx(expected, rel=1e-5)


def test_the_potential_max_adds_the_highest_value_so_far() -> None:
    """By hand from the values of all steps, the effective number before each of the five."""
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        seen.append(DATA(x, sigma))
        return seen[-1]

    drawn = run(count=60, denoiser=watched, potential="max", threshold=0.0)
    values = torch.stack([x[:, 0].double() for x in seen])
    for step in range(5):
        highest = [values[: k + 1].max(0).values for k in range(step + 1)]
        weight = (LAMBDA * torch.stack(highest).sum(0)).exp()
        expected = float(weight.sum() ** 2 / weight.square().sum())
        assert float(drawn.effective[step]) == pytest.approx(expected, rel=1e-5)


def test_resampling_keeps_the_unnormalised_weight() -> None:
    """After resampling at step 4, a weight is exp(lambda (r(x0) - v_4)); here both are of the same
    estimate, for the last step takes it as it is.
    """
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
        seen.append(DATA(x, sigma))
        return seen[-1]

    drawn = run(count=100, denoiser=watched, resample_at=(4,), threshold=1.0)
    assert set(drawn.x.flatten().tolist()) <= set(seen[4].flatten().tolist())
    torch.testing.assert_close(drawn.log_weight, torch.full_like(drawn.log_weight, -math.log(100)))
    assert drawn.effective[-1].item() == pytest.approx(100)
    average = (LAMBDA * seen[4][:, 0].double()).exp().mean().log()
    assert drawn.log_normaliser == pytest.approx(float(average), abs=1e-5)


def test_a_guided_population_without_weights_moves_towards_the_reward() -> None:
    plain, guided = run(resample_at=()), run(resample_at=(), proposal="guided")
    assert float(plain.x.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(guided.x.mean()) > MEAN + 0.1
    # And so its weights have less left to do.
    assert float(guided.effective[-1]) > 1.1 * float(plain.effective[-1])


def test_guidance_of_one_step_by_hand() -> None:
    """From noise 2 to 1 and no further: the mean moves by lambda std^2 times the slope of D."""
    sigmas, count = [2.0, 1.0], 40_000
    settings = SteeringSettings(inverse_temperature=0.8, proposal="guided", resample_at=())
    plain = best_of_n(DATA, linear, sigmas, (1,), count, 0)
    guided = steer(DATA, linear, sigmas, (1,), count, 0, settings)
    shift = 0.8 * (1 - 0.25) * 0.49 / (0.49 + 4)
    torch.testing.assert_close(guided.x - plain.x, torch.full((count, 1), shift), atol=1e-5, rtol=0)


def test_the_denoiser_is_asked_once_a_step_and_particle() -> None:
    cases: list[dict[str, Any]]
    cases = [{}, {"proposal": "guided"}, {"potential": "max"}, {"resample_at": ()}]
    for settings in cases:
        counted = Counted(DATA)
        drawn = run(count=30, denoiser=counted, threshold=1.0, **settings)
        assert drawn.evaluations == counted.evaluations == 30 * 5


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    first = run(count=40, threshold=1.0)
    torch.rand(5)
    assert torch.equal(first.x, run(count=40, threshold=1.0).x)
    assert not torch.equal(first.x, run(count=40, threshold=1.0, seed=1).x)
    for settings in (SteeringSettings(), SteeringSettings(proposal="guided")):
        whole, parts = (
            steer(DATA, linear, SIGMAS, (1,), 40, 0, settings, batch=batch) for batch in (None, 7)
        )
        torch.testing.assert_close(whole.x, parts.x)
        torch.testing.assert_close(whole.log_weight, parts.log_weight)


def test_best_of_n() -> None:
    drawn = best_of_n(DATA, linear, SIGMAS, (1,), 4000, 0)
    assert float(drawn.x.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(drawn.x.var()) == pytest.approx(VARIANCE, rel=0.1)
    assert drawn.reward[drawn.best()] == drawn.reward.max() and drawn.evaluations == 20_000


def test_conditions_are_of_all_particles() -> None:
    mixture: Any = GaussianMixture(torch.tensor([[3.0], [-3.0]]), 0.2, labels=torch.tensor([0, 1]))
    for label, sign in ((0, 1), (1, -1)):
        drawn = steer(
            mixture,
            linear,
            SIGMAS,
            (1,),
            20,
            0,
            SteeringSettings(),
            condition=torch.tensor([label]),
        )
        assert bool((sign * drawn.x > 1).all())


def test_drawing_from_a_population() -> None:
    drawn = run(resample_at=())
    equal = drawn.draw(20_000, seed=1)
    assert equal.log_weight.tolist() == pytest.approx([-math.log(20_000)] * 20_000)
    assert float(equal.x.mean()) == pytest.approx(weighted(drawn)[0], abs=1e-3)
    torch.testing.assert_close(equal.reward, equal.x[:, 0])


# ---- formulas


def test_systematic_resampling_by_hand() -> None:
    """Weights .1 .4 .5, cumulative .1 .5 1; four places (j + u) / 4."""
    log_weight = torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64).log() + 300
    for uniform, expected in (
        (0.1, [0, 1, 2, 2]),
        (0.3, [0, 1, 2, 2]),
        (0.5, [1, 1, 2, 2]),
    ):
        assert systematic(log_weight, uniform, 4).tolist() == expected


def test_systematic_resampling_copies_by_weight() -> None:
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    share = 200 * weight / weight.sum()
    counts = torch.stack(
        [
            torch.bincount(systematic(weight.log(), (k + 0.5) / 400, 200), minlength=50)
            for k in range(400)
        ]
    ).double()
    assert bool((counts >= share.floor()).all() and (counts <= share.ceil()).all())
    torch.testing.assert_close(counts.mean(0), share, atol=0.01, rtol=0)


def test_nobody_without_weight_is_copied() -> None:
    log_weight = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert set(systematic(log_weight, uniform, 7).tolist()) == {1, 3}


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_effective_size_by_hand(shift: float) -> None:
    """Weights 1, 2, 3: 36 / 14."""
    log_weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log() + shift
    assert float(effective_size(log_weight)) == pytest.approx(36 / 14)
    assert float(effective_size(torch.zeros(8) + shift)) == pytest.approx(8, rel=1e-3)


def test_the_weight_of_a_step_by_hand() -> None:
    logp, logq, value, before = (torch.tensor([v]) for v in (-1.0, -1.5, 2.0, 0.5))
    assert log_increment(logp, logq, value, before, 2.0).item() == pytest.approx(0.5 + 3.0)


def test_the_shift_is_clipped_by_its_length() -> None:
    """Gradient (3, 4), std 2, lambda 0.5: shift (6, 8) of length 10, held at 2.5 std = 5."""
    gradient, std = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), torch.full((3,), 2.0)
    found = guidance_shift(gradient, std, 0.5, 2.5)
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]]))


# ---- refusals


def test_rewards_of_any_size_stay_finite() -> None:
    settings = SteeringSettings(inverse_temperature=50.0)
    drawn = steer(DATA, lambda x: 100 * x[:, 0], SIGMAS, (1,), 50, 0, settings)
    assert math.isfinite(drawn.log_normaliser) and bool(drawn.log_weight.exp().sum() > 0.999)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:, 0] / 0, "finite, got 3 of 3"),
        (lambda x: torch.tensor([0.0, math.nan, 1.0]), "finite, got 1 of 3"),
        (lambda x: x, r"shape \(3,\), got \(3, 1\)"),
        (lambda x: x[:, 0].sum(), r"shape \(3,\), got \(\)"),
        (lambda x: [1.0] * 3, r"shape \(3,\), got list"),
        (lambda x: x[:, 0] > 0, "floating-point"),
    ],
)
def test_rewards_that_are_refused(bad: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge(bad, torch.ones(3, 1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inverse_temperature": 0.0}, "inverse_temperature"),
        ({"inverse_temperature": math.nan}, "inverse_temperature"),
        ({"potential": "sum"}, "potential"),
        ({"proposal": "dps"}, "proposal"),
        ({"threshold": 1.5}, "threshold"),
        ({"clip": 0.0}, "clip"),
        ({"resample_at": (3, 1)}, "resample_at"),
        ({"resample_at": (-1, 1)}, "resample_at"),
        ({"resample_at": (1, 5)}, "resample_at must be below 5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(count=3, **settings)


def test_what_a_population_cannot_do() -> None:

    def ask(reward: Any = linear, settings: Any = None, **changes: Any) -> Particles:
        return steer(DATA, reward, SIGMAS, (1,), 3, 0, settings or SteeringSettings(), **changes)

    guided = SteeringSettings(proposal="guided")
    with pytest.raises(UserError, match="need a reward and a denoiser with a gradient"):
        ask(lambda x: x[:, 0].detach(), guided)
    with pytest.raises(UserError, match=r"gradient of the reward is not finite"):
        ask(lambda x: (x[:, 0] * 0).sqrt(), guided)
    with pytest.raises(UserError, match=r"eta must be in \(0, 1\].*got 0"):
        ask(eta=0.0)
    with pytest.raises(UserError, match="rows of the condition must be 1"):
        ask(condition=torch.zeros(3))
    with pytest.raises(UserError, match="count must be >= 1"):
        best_of_n(DATA, linear, SIGMAS, (1,), 0, 0)
    with pytest.raises(UserError, match="count must be >= 1"):
        run(count=3).draw(0, seed=0)


def test_a_chain_may_begin_and_end_in_the_networks_coordinates() -> None:
    """Of a denoiser that says 0, x goes linearly from its start: by kept / sigma in the one step."""
    seen: list[Tensor] = []

    def reward(x: Tensor) -> Tensor:
        seen.append(x)
        return x[:, 0]

    def drawn(**options: Any) -> Tensor:
        nothing: Any = lambda x, sigma, condition=None: 0 * x  # noqa: E731
        return best_of_n(nothing, reward, [2.0, 1.0], (3,), 5, 7, **options).x

    z = torch.randn((5, 3), generator=torch.Generator().manual_seed(7))
    plain, ended = drawn(), drawn(end=0.25)
    torch.testing.assert_close(ended, plain / 4)
    assert torch.equal(seen[-1], ended), "what is judged is the sample"
    # std^2 = 1 - 1/4, so kept = 1/2 of the noise at level 2, which is a quarter of x.
    torch.testing.assert_close(drawn(start=3.0) - plain, z / 4)

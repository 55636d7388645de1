"""Adaptive Guidance: scripted noise predictions by hand, exact mixtures, planted regressions."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError
from esscher.functional.diffusion import (
    alpha_bars,
    over,
    sampling_timesteps,
    sigma_of_alpha_bar,
)
from esscher.samplers.denoisers import Counted, classifier_free, clipped
from esscher.samplers.guidance import (
    LinearGuidance,
    adaptive_solve,
    cosine,
    cut_off,
    evaluations_of,
    fit_linear,
    full,
    interleaved,
    least_guided,
    linear_guidance,
    search_policy,
)
from esscher.samplers.solvers import Stepper, seeded_noise, solve

NONE = torch.tensor([-1])


class Scripted:
    """Predicts the eps that a table says: by step, by kind (conditional, unconditional), by row.

    A condition is the number of the row, the null condition of row r is -1 - r. It remembers which
    conditions it was asked about, call by call.
    """

    def __init__(self, eps: torch.Tensor, sigmas: list[float]):
        self.eps, self.sigmas, self.calls = eps, torch.tensor(sigmas, dtype=eps.dtype), []
        self.rows = torch.arange(eps.shape[2])

    def __call__(self, x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        (step,) = (self.sigmas == sigma[0]).nonzero().flatten().tolist()
        self.calls.append(condition.tolist())
        null = condition < 0
        row = torch.where(null, -1 - condition, condition)
        shape = (-1, *[1] * (x.dim() - 1))
        return x - sigma.view(shape) * self.eps[step, null.long(), row]

    @property
    def nulls(self) -> torch.Tensor:
        return -1 - self.rows


def at_angles(cosines: list[list[float]]) -> torch.Tensor:
    """Pairs of plane vectors of various lengths with these cosines, step by step: "k 2 b d"."""
    wanted = torch.tensor(cosines, dtype=torch.float64)
    turn, k = torch.rand(wanted.shape, generator=generator(5), dtype=torch.float64) * 6, len(wanted)
    angle = torch.stack([turn, turn + wanted.acos()], 1)
    length = 1 + torch.rand(k, 2, wanted.shape[1], 1, generator=generator(6), dtype=torch.float64)
    return length * torch.stack([angle.cos(), angle.sin()], -1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def mixture(seed: int = 0, spread: float = 6.0, each: int = 3, dimensions: int = 16) -> Any:
    """Four classes of several Gaussians of standard deviation 1."""
    labels = torch.arange(4).repeat_interleave(each)
    return GaussianMixture(spread * noise(4 * each, dimensions, seed=seed), 1.0, labels=labels)


def levels(count: int) -> torch.Tensor:
    """Of Stable Diffusion's schedule, the last one 0."""
    bars = alpha_bars("scaled_linear", 1000, 0.00085, 0.012)
    steps = sampling_timesteps(1000, count, "trailing").long()
    return torch.cat([sigma_of_alpha_bar(bars[steps]), torch.zeros(1, dtype=torch.float64)])


# ---- the cosine


def test_cosine_by_hand() -> None:
    c = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[2.0, 2.0]], [[0.0, 0.0]]])
    u = torch.tensor([[[8.0, 6.0]], [[-3.0, 0.0]], [[5.0, 0.0]], [[1.0, 2.0]]])
    expected = torch.tensor([0.96, -1.0, math.sqrt(0.5), 0.0])
    torch.testing.assert_close(cosine(c, u), expected)
    # Half precision has no number between 0.9995 and 1, where thresholds are.
    assert cosine(c.half(), u.half()).dtype == torch.float32


def test_cosine_is_of_the_noise_and_not_of_the_denoised_estimate() -> None:
    eps = torch.tensor([[[[1.0, 0.0]], [[0.6, 0.8]]]], dtype=torch.float64)
    denoiser = Scripted(eps, [2.0, 0.0])
    x = torch.full((1, 2), 100.0, dtype=torch.float64)
    drawn = adaptive_solve(
        denoiser, x, [2.0, 0.0], denoiser.rows, denoiser.nulls, scale=3.0, threshold=0.9
    )
    assert drawn.cosine.tolist() == [[pytest.approx(0.6)]]
    # eps_u + 3 (eps_c - eps_u) = (1.8, -1.6)
    torch.testing.assert_close(drawn.x, torch.tensor([[96.4, 103.2]], dtype=torch.float64))


# ---- the latch, step by step

SIGMAS = [8.0, 5.0, 2.0, 1.0, 0.0]
COSINES = [
    [0.90, 0.50, 0.999],
    [0.995, 0.50, 0.90],
    [0.20, 0.50, 0.995],
    [0.20, 0.50, 0.20],
]


@pytest.mark.parametrize("at_crossing", [True, False])
@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_every_sample_leaves_once_and_for_good(solver: Any, at_crossing: bool) -> None:
    """Sample 0 crosses at step 1 and is below again later, 1 never does, 2 crosses at step 0, which
    comes too soon, and then at step 2.
    """
    denoiser = Scripted(at_angles(COSINES), SIGMAS)
    counted = Counted(denoiser)
    x = noise(3, 2)
    drawn = adaptive_solve(
        counted, x, SIGMAS, denoiser.rows, denoiser.nulls, scale=4.0, threshold=0.99,
        min_guided_steps=2 if at_crossing else 1, guided_at_crossing=at_crossing, solver=solver,
    )  # fmt: skip
    compared = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 0]], dtype=torch.bool)
    expected = torch.tensor(COSINES, dtype=torch.float64).masked_fill(~compared, torch.nan)
    torch.testing.assert_close(drawn.cosine, expected, equal_nan=True)
    guided = compared.clone()
    if not at_crossing:
        guided[1, 0] = guided[2, 2] = False
    assert torch.equal(drawn.guided, guided)

    assert drawn.evaluations.tolist() == [6, 8, 7]
    assert counted.evaluations == 21
    assert denoiser.calls == [
        [0, 1, 2, -1, -2, -3],
        [0, 1, 2, -1, -2, -3],
        [0, 1, 2, -2, -3],
        [0, 1, 2, -2],
    ]

    # Euler: each step adds (next sigma - sigma) eps.
    for step, change in enumerate(np.diff(SIGMAS)):
        for row in range(3):
            c, u = denoiser.eps[step, :, row]
            x[row] += change * (u + 4 * (c - u) if guided[step, row] else c)
    torch.testing.assert_close(drawn.x, x)


def test_a_cosine_at_the_threshold_is_enough() -> None:
    eps = torch.tensor([[[[3.0, 4.0]], [[3.0, 4.0]]]] * 3, dtype=torch.float64)
    denoiser = Scripted(eps, [3.0, 2.0, 1.0, 0.0])
    drawn = adaptive_solve(
        denoiser, noise(1, 2), [3.0, 2.0, 1.0, 0.0], denoiser.rows, denoiser.nulls,
        scale=4.0, threshold=1.0, min_guided_steps=0,
    )  # fmt: skip
    assert drawn.evaluations.tolist() == [4]


NOISE_ALONE = [1e6, 4096.0, 8.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("sigmas", "asked", "at_crossing", "least"),
    [
        (NOISE_ALONE, None, True, 3),
        (NOISE_ALONE, None, False, 2),
        (NOISE_ALONE, 3, True, 3),
        (NOISE_ALONE, 2, False, 2),
        (NOISE_ALONE[1:], None, True, 2),
        ([*NOISE_ALONE[1:2], 0.0], None, True, 1),
        (NOISE_ALONE[2:], 0, True, 0),
        (NOISE_ALONE[2:], None, True, 1),
    ],
)
def test_none_leaves_where_there_is_no_signal(
    sigmas: list[float], asked: int | None, at_crossing: bool, least: int
) -> None:
    assert least_guided(torch.tensor(sigmas), asked, 0.99, at_crossing) == least
    if sigmas[0] > 1000 and least > 1:
        for fewer in range(least):
            with pytest.raises(UserError, match=rf"must be >= {least}, or None, .* got {fewer}"):
                least_guided(torch.tensor(sigmas), fewer, 0.99, at_crossing)
            assert least_guided(torch.tensor(sigmas), fewer, None, at_crossing) == fewer


def test_without_signal_the_cosine_is_one_and_nobody_leaves_for_it() -> None:
    """Both answers say something else, and the cosine is 1 all the same; later it is not."""
    sigmas, far = [4096.0, 100.0, 4.0, 0.0], torch.tensor([0, 1])
    denoiser, x = mixture(), 4096 * noise(2, 16)
    level = torch.full((2,), 4096.0)
    says = denoiser(x, level, far) - denoiser(x, level, NONE.expand(2))
    assert float(says.abs().max()) > 1
    given: Any = {"scale": 3.0, "threshold": 0.99999}
    found = adaptive_solve(denoiser, x, sigmas, far, NONE, **given)
    assert float(found.cosine[0].min()) > 0.99999 > float(found.cosine[1].max())
    assert found.guided[:2].all()


class Turning:
    """A denoiser whose conditional eps is turned away from the unconditional one, (1, 0), by an angle
    at each step; levels are steps that are left.
    """

    def __init__(self, *angles: float):
        self.angles = angles

    def __call__(self, x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        place = [round(len(self.angles) - float(s)) for s in sigma]
        turned = torch.tensor([self.angles[k] for k in place], dtype=x.dtype) * condition
        return x - over(sigma, x) * torch.stack([turned.cos(), turned.sin()], -1)

    def draw(self, **options: Any) -> Any:
        ones = torch.ones(1).double()
        sigmas = torch.arange(len(self.angles), -1, -1).double()
        return adaptive_solve(
            self, torch.ones(1, 2).double(), sigmas, ones, 0 * ones, scale=2.0, **options
        )


@pytest.mark.parametrize(("steps", "guided"), [(4, 2), (5, 2), (20, 5)])
def test_a_quarter_of_the_steps_is_guided_unless_told_otherwise(steps: int, guided: int) -> None:
    """From the second step on both answers are the same."""
    drawn = Turning(1.0, *[0.0] * (steps - 1)).draw(threshold=0.9)
    assert drawn.guided.sum(0).tolist() == [guided]
    assert drawn.evaluations.tolist() == [steps + guided]


# ---- against the plain solver


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("threshold", [None, 1.0])
def test_out_of_reach_is_full_guidance(solver: Any, threshold: float | None) -> None:
    denoiser, sigmas = Counted(mixture(spread=1.0)), torch.linspace(3, 0.5, 8)
    x, condition = noise(6, 16) * 3, torch.arange(6) % 4
    drawn = adaptive_solve(
        denoiser, x, sigmas, condition, NONE, scale=7.5, threshold=threshold, solver=solver
    )
    assert drawn.evaluations.tolist() == [14] * 6
    assert denoiser.evaluations == 6 * 14
    assert bool(drawn.guided.all()) and bool((drawn.cosine < 1).all())
    wanted = solve(
        classifier_free(mixture(spread=1.0), NONE, 7.5), x, sigmas, condition, solver=solver
    )
    assert torch.equal(drawn.x, wanted)


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m"])
def test_leaving_at_once_is_the_conditional_model(solver: Any) -> None:
    denoiser, sigmas = Counted(mixture()), levels(8)
    x, condition = noise(6, 16) * float(sigmas[0]), torch.arange(6) % 4
    drawn = adaptive_solve(
        denoiser, x, sigmas, condition, NONE, scale=7.5, threshold=-0.999, solver=solver,
        min_guided_steps=0, guided_at_crossing=False,
    )  # fmt: skip
    torch.testing.assert_close(drawn.x, solve(mixture(), x, sigmas, condition, solver=solver))
    assert not drawn.guided.any()
    assert drawn.evaluations.tolist() == [9] * 6
    assert denoiser.evaluations == 6 * 9


def test_guided_estimates_are_clipped() -> None:
    """Those that steps are made by; the cosine is of what the model said."""
    model, bound = mixture(), 3.0
    sigmas, label = torch.cat([torch.linspace(3, 0.1, 8), torch.zeros(1)]), torch.arange(4) % 3
    x = 3 * noise(4, 16)
    options: dict[str, Any] = {"scale": 3.0, "threshold": None}
    ours = adaptive_solve(model, x, sigmas, label, NONE, **options, clip=bound)
    guided = clipped(classifier_free(model, NONE, 3.0), bound)
    torch.testing.assert_close(ours.x, solve(guided, x, sigmas, label))
    free = adaptive_solve(model, x, sigmas, label, NONE, **options)
    assert free.x.abs().max() > bound >= ours.x.abs().max()


def test_with_noise_of_its_own() -> None:
    sigmas, condition = levels(6), torch.tensor([0, 3])
    x, draw = seeded_noise([4, 5], (16,))
    remembered = [draw(step).double() for step in range(6)]
    settings: Any = {"eta": 0.7, "noise": lambda step: remembered[step]}
    x = x.double() * float(sigmas[0])
    drawn = adaptive_solve(
        mixture(), x, sigmas, condition, NONE, scale=2.0, threshold=None, **settings
    )
    wanted = solve(classifier_free(mixture(), NONE, 2.0), x, sigmas, condition, **settings)
    assert torch.equal(drawn.x, wanted)
    assert not torch.allclose(
        drawn.x, solve(classifier_free(mixture(), NONE, 2.0), x, sigmas, condition)
    )


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_sample_does_not_depend_on_its_batch(solver: Any) -> None:
    model, sigmas = mixture(1), levels(12)
    x, condition = noise(10, 16, seed=3) * float(sigmas[0]), torch.arange(10) % 4
    null = torch.where(torch.arange(10) < 5, -1, 2)

    def draw(rows: slice) -> Any:
        return adaptive_solve(
            model, x[rows], sigmas, condition[rows], null[rows], scale=7.5, threshold=0.9999,
            min_guided_steps=0, solver=solver,
        )  # fmt: skip

    together = draw(slice(None))
    assert len(together.evaluations.unique()) > 1, "samples should leave at different steps"
    for row in range(10):
        alone = draw(slice(row, row + 1))
        torch.testing.assert_close(alone.x[0], together.x[row])
        assert alone.evaluations[0] == together.evaluations[row]
        torch.testing.assert_close(alone.cosine[:, 0], together.cosine[:, row], equal_nan=True)


def test_conditions_by_name_and_samples_of_several_axes() -> None:
    model, sigmas = mixture(1), levels(12)
    x, label = noise(6, 16, seed=3) * float(sigmas[0]), torch.arange(6) % 4

    def pictures(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        assert condition["text"].shape == (len(x), 3)
        return model(x.flatten(1), sigma, condition["label"]).view_as(x)

    settings: Any = {"scale": 7.5, "threshold": 0.999, "min_guided_steps": 0}
    condition = {"label": label, "text": torch.zeros(6, 3)}
    null = {"label": NONE, "text": torch.zeros(1, 3)}
    drawn = adaptive_solve(pictures, x.view(6, 1, 4, 4), sigmas, condition, null, **settings)
    wanted = adaptive_solve(model, x, sigmas, label, NONE, **settings)
    torch.testing.assert_close(drawn.x.flatten(1), wanted.x)
    assert torch.equal(drawn.evaluations, wanted.evaluations)


def test_gradient_reaches_the_noise() -> None:
    """On a line of Gaussians the path is linear in x, and so the gradient is a product."""
    sigmas = [4.0, 2.0, 1.0]
    start = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    drawn = adaptive_solve(
        gaussians, start, sigmas, torch.tensor([1]), NONE, scale=3.0, threshold=0.99,
        min_guided_steps=1,
    )  # fmt: skip
    drawn.x.sum().backward()
    c, u = 1 / (1 + 16), 9 / (9 + 16)
    guided = u + 3 * (c - u)
    first = guided + 0.5 * (1 - guided)
    second = 1 / 5 + 0.5 * (1 - 1 / 5)
    assert drawn.guided.tolist() == [[True], [False]]
    assert float(start.grad) == pytest.approx(first * second)  # type: ignore[arg-type]


def gaussians(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
    """Exact for N(0, 1) under condition 1 and N(0, 9) under the null condition -1."""
    variance = torch.where(condition > 0, 1.0, 9.0).to(x)
    return (variance / (variance + sigma.square())).unsqueeze(-1) * x


# ---- policies


def test_policies_by_hand() -> None:
    g, n, c = "guided", "linear", "conditional"
    assert full(3) == (g, g, g)
    assert cut_off(4, 1) == (g, c, c, c)
    assert cut_off(2, 2) == (g, g) and cut_off(2, 0) == (c, c)
    assert interleaved(5) == (g, c, g, c, g)
    assert interleaved(6, until=3) == (g, c, g, c, c, c)
    assert linear_guidance(9) == (g, n, g, n, c, c, c, c, c)
    costs = [full(20), cut_off(20, 10), interleaved(20, 10), linear_guidance(20)]
    assert [evaluations_of(policy) for policy in costs] == [40, 30, 25, 25]
    assert evaluations_of(("unconditional", c, 2.5)) == 4
    for bad in (lambda: cut_off(4, 5), lambda: interleaved(4, -1)):
        with pytest.raises(UserError, match=r"must be in \[0, 4\]"):
            bad()


def test_a_policy_is_followed_until_a_sample_leaves_it() -> None:
    policy = ("conditional", 2.5, "unconditional", "guided")
    denoiser = Scripted(at_angles([[0.9, 0.9], [0.999, 0.9], [0.9, 0.9], [0.9, 0.9]]), SIGMAS)
    counted = Counted(denoiser)
    x = noise(2, 2)
    drawn = adaptive_solve(
        counted, x, SIGMAS, denoiser.rows, denoiser.nulls, scale=4.0, threshold=0.99,
        min_guided_steps=0, policy=policy,
    )  # fmt: skip
    assert denoiser.calls == [[0, 1], [0, 1, -1, -2], [0, -2], [0, 1, -2]]
    assert drawn.evaluations.tolist() == [5, 6] and counted.evaluations == 11
    assert drawn.guided.tolist() == [[False] * 2, [True] * 2, [False] * 2, [False, True]]
    assert drawn.cosine.isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2, [True, False]]
    scales = [[1, 2.5, 1, 1], [1, 2.5, 0, 4]]
    for step, change in enumerate(np.diff(SIGMAS)):
        for row in range(2):
            c, u = denoiser.eps[step, :, row]
            x[row] += change * (u + scales[row][step] * (c - u))
    torch.testing.assert_close(drawn.x, x)


# ---- LinearAG


BETA_C = np.array([[0.7, 0, 0], [-0.3, 1.1, 0], [0.2, -0.5, 0.9]])
BETA_U = np.array([[0, 0, 0], [0.4, 0, 0], [-0.6, 0.8, 0.0]])


def planted(errors: tuple[float, ...], intercept: float) -> Scripted:
    """Unconditional eps that are a known combination of what came before, and of an error."""
    k = len(errors)
    c = np.random.default_rng(0).normal(size=(k, 50, 4))
    u = np.zeros_like(c)
    for i, error in enumerate(errors):
        u[i] = np.einsum("j,jbd->bd", BETA_C[i, :k], c) + np.einsum("j,jbd->bd", BETA_U[i, :k], u)
        u[i] += intercept + error * np.random.default_rng(i + 1).normal(size=(50, 4))
    return Scripted(torch.from_numpy(np.stack([c, u], 1)), [8.0, 5.0, 2.0, 1.0][: k + 1])


class Labelled(Scripted):
    """Takes one null row: which sample it stands for is found in the last column of x."""

    def __call__(self, x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        count = int((condition >= 0).sum())
        null = torch.arange(len(x)) >= count
        fitting = torch.where(null, -1 - condition.roll(count), condition)
        return super().__call__(x, sigma, fitting)


def one_null(denoiser: Scripted) -> Labelled:
    """All rows are asked both ways here, so the null rows come in the order of the others."""
    return Labelled(denoiser.eps, denoiser.sigmas.tolist())


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("intercept", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [None, 17])
def test_planted_coefficients_are_found(
    steps: int, intercept: float, batch_size: int | None
) -> None:
    """Of the last step, which has no error; without one in the steps before, they would not differ."""
    last = steps - 1
    denoiser = planted((1.0,) * last + (0.0,), intercept)
    fit = fit_linear(
        one_null(denoiser), noise(50, 4), denoiser.sigmas, denoiser.rows, NONE, scale=7.5,
        intercept=intercept > 0, batch_size=batch_size,
    )  # fmt: skip
    np.testing.assert_allclose(fit.conditional[last], BETA_C[last, :steps], atol=1e-10)
    np.testing.assert_allclose(fit.unconditional[last], BETA_U[last, :steps], atol=1e-10)
    assert float(fit.intercept[last]) == pytest.approx(intercept, abs=1e-10)
    assert float(fit.unexplained[last]) < 1e-20
    assert not fit.conditional.triu(1).any() and not fit.unconditional.triu(0).any()


@pytest.mark.parametrize("intercept", [False, True])
def test_noisy_coefficients_are_those_of_least_squares(intercept: bool) -> None:
    denoiser = planted((0.5, 0.5, 0.5), 0.2)
    fit = fit_linear(
        one_null(denoiser), noise(50, 4), [8.0, 5.0, 2.0, 1.0], denoiser.rows, NONE, scale=3.0,
        intercept=intercept, batch_size=20,
    )  # fmt: skip
    c, u = denoiser.eps.flatten(2).numpy().transpose(1, 0, 2)
    for i in range(3):
        columns = np.stack([*c[: i + 1], *u[:i], *([np.ones(200)] if intercept else [])], 1)
        found, left, _, _ = np.linalg.lstsq(columns, u[i], rcond=None)
        np.testing.assert_allclose(fit.conditional[i, : i + 1], found[: i + 1], rtol=1e-8)
        np.testing.assert_allclose(fit.unconditional[i, :i], found[i + 1 : 2 * i + 1], rtol=1e-8)
        if intercept:
            assert float(fit.intercept[i]) == pytest.approx(found[-1])
        assert float(fit.unexplained[i]) == pytest.approx(left[0] / (u[i] ** 2).sum())
        assert fit.unexplained[i] > 0.01


def test_estimates_of_earlier_steps_stand_in_for_what_was_not_asked() -> None:
    """Guided, linear, conditional, linear; row 0 leaves guidance after the first step."""
    beta_c = torch.tensor(
        [[0.5, 0, 0, 0], [0.1, 0.6, 0, 0], [0.2, 0.3, 0.4, 0], [0.1, 0.2, 0.3, 0.7]]
    )
    beta_u = torch.tensor([[0.0, 0, 0, 0], [0.9, 0, 0, 0], [0.3, -0.2, 0, 0], [0.4, 0.5, -0.6, 0]])
    offset = torch.tensor([0.0, 0.1, 0.2, 0.3])
    denoiser = Scripted(at_angles([[0.999, 0.9]] * 4), SIGMAS)
    # The fit knows one null condition, so the two rows share it; their eps come from the table.
    null = torch.tensor([-1])
    denoiser.eps[:, 1] = denoiser.eps[:, 1, :1]
    denoiser.eps[:, 0, 0] = denoiser.eps[:, 1, 0] * 1.5
    fit = LinearGuidance(
        conditional=beta_c.double(), unconditional=beta_u.double(), intercept=offset.double(),
        unexplained=torch.zeros(4), sigmas=torch.tensor(SIGMAS, dtype=torch.float64), scale=4.0,
        solver="ddim", null=null,
    )  # fmt: skip
    x = noise(2, 2)
    policy = ("guided", "linear", "conditional", "linear")
    drawn = adaptive_solve(
        denoiser, x, SIGMAS, denoiser.rows, null, scale=4.0, threshold=0.9999, min_guided_steps=1,
        policy=policy, linear=fit,
    )  # fmt: skip
    assert denoiser.calls == [[0, 1, -1, -1], [0, 1], [0, 1], [0, 1]]
    assert drawn.evaluations.tolist() == [5, 5]
    assert drawn.guided[:, 1].tolist() == [True, True, False, True]
    assert drawn.guided[:, 0].tolist() == [True, False, False, False]
    c = denoiser.eps[:, 0, 1]
    u0 = denoiser.eps[0, 1, 1]
    u1 = 0.1 * c[0] + 0.6 * c[1] + 0.9 * u0 + 0.1
    u2 = 0.2 * c[0] + 0.3 * c[1] + 0.4 * c[2] + 0.3 * u0 - 0.2 * u1 + 0.2
    u3 = 0.1 * c[0] + 0.2 * c[1] + 0.3 * c[2] + 0.7 * c[3] + 0.4 * u0 + 0.5 * u1 - 0.6 * u2 + 0.3
    steps = [u0 + 4 * (c[0] - u0), u1 + 4 * (c[1] - u1), c[2], u3 + 4 * (c[3] - u3)]
    moved = sum(change * eps for change, eps in zip(np.diff(SIGMAS), steps, strict=True))
    torch.testing.assert_close(drawn.x[1], x[1] + moved, rtol=1e-6, atol=1e-6)
    first, *rest = denoiser.eps[:, 0, 0]
    moved = -3 * (denoiser.eps[0, 1, 0] + 4 * (first - denoiser.eps[0, 1, 0]))
    moved = moved - 3 * rest[0] - rest[1] - rest[2]
    torch.testing.assert_close(drawn.x[0], x[0] + moved)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_between_two_gaussians_the_regression_is_exact(solver: Any) -> None:
    """eps_c = sigma x / (1 + sigma^2) and eps_u = sigma x / (9 + sigma^2): of one direction."""
    sigmas = [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    fit = fit_linear(
        gaussians, noise(30, 5, seed=1) * 4, sigmas, torch.ones(30).long(), NONE, scale=3.0,
        solver=solver,
    )  # fmt: skip
    assert float(fit.conditional[0, 0]) == pytest.approx(17 / 25)
    x, condition = noise(4, 5) * 4, torch.ones(4).long()
    drawn = adaptive_solve(
        gaussians, x, sigmas, condition, NONE, scale=3.0, threshold=None, solver=solver,
        policy=("linear", "linear", "guided", "linear", "linear", "linear"), linear=fit,
    )  # fmt: skip
    assert drawn.evaluations.tolist() == [7] * 4
    wanted = solve(classifier_free(gaussians, NONE, 3.0), x, sigmas, condition, solver=solver)
    torch.testing.assert_close(drawn.x, wanted, rtol=1e-8, atol=1e-8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.scale = 2.0  # type: ignore[misc]


def test_a_fit_is_refused_elsewhere() -> None:
    sigmas = [4.0, 2.0, 1.0, 0.5, 0.0]
    condition = torch.ones(9).long()
    fit = fit_linear(gaussians, noise(9, 5), sigmas, condition, NONE, scale=3.0)

    def draw(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            "sigmas": sigmas, "null": NONE, "scale": 3.0, "threshold": None, "linear": fit,
        }  # fmt: skip
        return adaptive_solve(
            gaussians, noise(9, 5), condition=condition, **{**settings, **changes}
        )

    assert draw().evaluations.tolist() == [5] * 9
    draw(null=NONE.expand(9), sigmas=torch.tensor(sigmas))
    half = ("guided", "linear", 2.0, "linear")
    for match, changes in {
        "fitted on the noise levels": {"sigmas": [4.0, 2.0, 1.01, 0.5, 0.0]},
        r"noise levels 4 .. 0 \(5\), not on": {"sigmas": [4.0, 2.0, 0.0]},
        "fitted with scale 3.0, not 3.5": {"scale": 3.5},
        "fitted with solver ddim, not dpmpp_2m": {"solver": "dpmpp_2m"},
        "another null condition": {"null": torch.tensor([-2])},
        "path without noise, got eta 0.5": {"eta": 0.5, "noise": lambda step: noise(9, 5)},
        "give both": {"policy": full(4)},
        "step 2 of the policy is 2.0, before a linear step": {"policy": half},
    }.items():
        with pytest.raises(UserError, match=match):
            draw(**changes)
    with pytest.raises(UserError, match="give both"):
        draw(policy=half, linear=None)


def test_what_cannot_be_fitted_is_refused() -> None:
    def fit(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            "x": noise(3, 2), "sigmas": [2.0, 1.0, 0.0], "condition": torch.ones(3).long(),
            "null": NONE, "scale": 3.0,
        }  # fmt: skip
        return fit_linear(gaussians, **{**settings, **changes})

    fit()
    for match, changes in {
        "scale must not be 1": {"scale": 1.0},
        "once a step: ddim, euler or dpmpp_2m, got heun": {"solver": "heun"},
        "needs a null condition": {"null": None},
        "needs a condition": {"condition": None},
        "got 3 rows: give one row": {"null": NONE.expand(3)},
        "must be at least 5, got 4": {
            "x": noise(2, 2), "condition": torch.ones(2).long(), "intercept": True,
        },
        "batch_size must be >= 1": {"batch_size": 0},
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=match):
            fit(**changes)


# ---- refusals


def test_what_makes_no_sense_is_refused() -> None:
    def draw(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            "sigmas": [2.0, 1.0, 0.0], "condition": torch.tensor([0, 1]), "null": NONE,
            "scale": 3.0, "threshold": 0.99,
        }  # fmt: skip
        return adaptive_solve(mixture(), noise(2, 16), **{**settings, **changes})

    draw(threshold=1.0, min_guided_steps=2)
    for match, changes in {
        r"threshold must be in \(-1, 1\], or None, got -1.0": {"threshold": -1.0},
        "threshold must be .* got 1.001": {"threshold": 1.001},
        "threshold must be .* got nan": {"threshold": math.nan},
        "scale must not be 1": {"scale": 1.0},
        "scale must be finite": {"scale": math.inf},
        "needs a null condition": {"null": None},
        "needs a condition": {"condition": None},
        "null condition has 3 rows": {"null": torch.tensor([-1, -1, -1])},
        r"min_guided_steps must be in \[0, 2\], got 3": {"min_guided_steps": 3},
        r"min_guided_steps must be in \[0, 2\], got -1": {"min_guided_steps": -1},
        "once a step: ddim, euler or dpmpp_2m, got heun": {"solver": "heun"},
        "eta > 0 needs noise": {"eta": 0.5},
        "one entry a step, 2 in all, got 3": {"policy": full(3)},
        "the scale of step 1 must not be 1": {"policy": ("guided", 1.0)},
    }.items():
        with pytest.raises(UserError, match=match):
            draw(**changes)


def test_a_stepper_refuses_what_asks_twice() -> None:
    with pytest.raises(UserError, match="got heun"):
        Stepper("heun")
    with pytest.raises(UserError, match="eta must be in"):
        Stepper("ddim", eta=-0.1)


# ---- the search


def offset(c: Any, u: Any) -> Any:
    """A denoiser that says c under the condition 1 and u under -1, by noise level."""

    def denoiser(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        says = torch.where(condition > 0, c(sigma), u(sigma))
        return says.unsqueeze(-1).expand_as(x)

    return denoiser


@pytest.mark.parametrize(("cost", "guided"), [(0.0, 1.0), (4.0, 0.5), (6.0, 0.25), (20.0, 0.0)])
def test_one_step_has_a_known_optimum(cost: float, guided: float) -> None:
    """With D_c - D_u = 1 and s = 3 the loss is 4 (1 - w)^2 + cost (1 + w), at w = 1 - cost / 8, and
    what is not guided is conditional.
    """
    found = search_policy(
        offset(lambda s: s * 0 + 2, lambda s: s * 0 + 1), noise(2, 3), [1.0, 0.0],
        torch.tensor([1, 1]), NONE, scale=3.0, sparsity=cost, iterations=300, learning_rate=0.2,
    )  # fmt: skip
    assert found.options == ("unconditional", "conditional", 3.0)
    expected = torch.tensor([[0.0, 1 - guided, guided]], dtype=torch.float64)
    torch.testing.assert_close(found.probabilities, expected, atol=0.03, rtol=0)
    assert float(found.expected_evaluations[-1]) == pytest.approx(1 + guided, abs=0.03)
    assert float(found.distance[-1]) == pytest.approx(4 * (1 - guided) ** 2, abs=0.15)
    # At first all three weigh the same: a scale of 4/3.
    assert float(found.distance[0]) == pytest.approx((5 / 3) ** 2)
    assert float(found.expected_evaluations[0]) == pytest.approx(4 / 3)


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_guidance_is_kept_where_it_matters(solver: Any) -> None:
    """The condition says something at the two noisiest levels only."""
    model = offset(lambda s: (s > 3).double(), lambda s: s * 0)
    found = search_policy(
        model, noise(4, 3), [8.0, 4.0, 2.0, 1.0, 0.5], torch.ones(4).long(), NONE, scale=5.0,
        scales=(2.0, 5.0), sparsity=1e-3, iterations=120, solver=solver,
    )  # fmt: skip
    guided = found.probabilities[:, 2:].sum(-1)
    assert float(guided[:2].min()) > 0.8 and float(guided[2:].max()) < 0.2
    assert found.best()[:2] == (5.0, 5.0)
    assert set(found.best()[2:]) <= {"unconditional", "conditional"}
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(4, dtype=torch.float64))
    drawn = adaptive_solve(
        model, noise(4, 3), [8.0, 4.0, 2.0, 1.0, 0.5], torch.ones(4).long(), NONE, scale=5.0,
        threshold=None, policy=found.best(), solver=solver,
    )  # fmt: skip
    assert drawn.evaluations.tolist() == [6] * 4


@pytest.mark.parametrize(("least", "evaluations"), [(None, 10), (2, 8), (5, 11), (6, 12)])
def test_nobody_leaves_before_the_cosine_has_fallen(least: int | None, evaluations: int) -> None:
    """cos: 0.995, 0.955, 0.540, 0.955, 0.995, 0.999. At threshold 0.95 the second step ends guidance if
    two steps are enough; where it must have fallen first, the fourth does.
    """
    turning = Turning(0.1, 0.3, 1.0, 0.3, 0.1, 0.05)
    found = turning.draw(threshold=0.95, min_guided_steps=least)
    assert found.cosine[:2, 0].tolist() == pytest.approx([math.cos(0.1), math.cos(0.3)])
    assert found.evaluations.tolist() == [evaluations]


def test_conditions_of_another_number_of_rows_are_refused() -> None:
    options: Any = {"scale": 2.0, "threshold": 0.9}
    sigmas, x, null = torch.tensor([2.0, 1.0, 0.5]), torch.zeros(4, 16), NONE
    model = mixture(spread=1.0)
    for rows in (2, 6):
        with pytest.raises(
            UserError, match=f"rows of the condition must be 4, those of x, got {rows}"
        ):
            adaptive_solve(model, x, sigmas, torch.zeros(rows).long(), null, **options)
        with pytest.raises(
            UserError, match=f"rows of the condition must be 4, those of x, got {rows}"
        ):
            fit_linear(model, x, sigmas, torch.zeros(rows).long(), null, scale=2.0)
    with pytest.raises(UserError, match="x must be at least one row, got 0"):
        adaptive_solve(model, x[:0], sigmas, torch.zeros(0).long(), null, **options)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_search_begins_with_all_options_alike(solver: Any) -> None:
    """A third each of the scales 0, 1 and 2 is the scale 1: the conditional model."""
    model, sigmas, condition = mixture(spread=1.0), torch.linspace(3, 0.5, 5), torch.tensor([0, 2])
    x = noise(2, 16) * 3
    found = search_policy(
        model, x, sigmas, condition, NONE, scale=2.0, sparsity=0.0, iterations=1, solver=solver
    )
    apart = solve(model, x, sigmas, condition, solver=solver) - solve(
        classifier_free(model, NONE, 2.0), x, sigmas, condition, solver=solver
    )
    assert float(found.distance[0]) == pytest.approx(float(apart.square().mean()))


def test_a_search_leaves_the_network_alone_and_can_measure_otherwise() -> None:
    layer = torch.nn.Linear(3, 3).double()
    seen = []

    def network(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        return layer(x) * condition.unsqueeze(-1)

    def distance(x: Any, wanted: Any) -> torch.Tensor:
        seen.append(x.shape)
        return (x - wanted).abs().sum(-1)

    found = search_policy(
        network, noise(2, 3), [1.0, 0.5], torch.tensor([1.0, 1.0]).double(),
        torch.tensor([0.5]).double(), scale=2.0, sparsity=0.0, iterations=3, distance=distance,
    )  # fmt: skip
    assert seen == [(2, 3)] * 3 and float(found.distance[0]) > 0
    assert all(p.grad is None for p in layer.parameters())


def test_searches_that_make_no_sense_are_refused() -> None:
    for match, changes in {
        "scale must not be 1": {"scale": 1.0},
        "scales must not be 1": {"scales": (1.0, 2.0)},
        "at least one": {"scales": ()},
        "sparsity must be >= 0": {"sparsity": -1.0},
        "iterations must be >= 1": {"iterations": 0},
        "learning_rate must be > 0": {"learning_rate": 0.0},
        "got heun": {"solver": "heun"},
        "needs a null condition": {"null": None},
    }.items():
        settings: dict[str, Any] = {"null": NONE, "scale": 2.0, "sparsity": 0.1, **changes}
        with pytest.raises(UserError, match=match):
            search_policy(
                mixture(), noise(1, 16), [1.0, 0.0], condition=torch.tensor([0]), **settings
            )


# ---- exact mixtures: what it is all for


@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_evaluations_do_almost_the_same(seed: int) -> None:
    """A 10th of the error of full guidance with 15 steps, which takes 30 evaluations too; and the
    higher the threshold, the smaller the error.
    """
    model, eps = mixture(seed), noise(256, 16, seed=100 + seed)
    condition = torch.zeros(256).long()

    def fully(steps: int) -> torch.Tensor:
        sigmas = levels(steps)
        return solve(classifier_free(model, NONE, 7.5), eps * float(sigmas[0]), sigmas, condition)

    wanted = fully(20)
    errors = []
    for threshold in (0.97, 0.99, 0.999, 0.9999):
        denoiser = Counted(model)
        drawn = adaptive_solve(
            denoiser, eps * float(levels(20)[0]), levels(20), condition, NONE, scale=7.5,
            threshold=threshold, min_guided_steps=0,
        )  # fmt: skip
        assert denoiser.evaluations == int(drawn.evaluations.sum()) <= 30 * 256
        errors.append(float((drawn.x - wanted).square().mean()))
    naive = float((fully(15) - wanted).square().mean())
    assert min(errors[1:]) < naive / 10
    assert errors == sorted(errors, reverse=True)


def test_a_regression_does_better_than_leaving_steps_out() -> None:
    """Both take 25 evaluations. The error of a typical sample: the mean is that of the few samples
    which end in another component.
    """
    model, sigmas = mixture(0, spread=3.0, each=4), levels(20)
    eps = noise(456, 16, seed=7) * float(sigmas[0])
    condition = torch.zeros(256).long()
    fit = fit_linear(model, eps[256:], sigmas, condition[:200], NONE, scale=7.5)
    x = eps[:256]
    wanted = solve(classifier_free(model, NONE, 7.5), x, sigmas, condition)

    def error(**settings: Any) -> tuple[float, float]:
        denoiser = Counted(model)
        drawn = adaptive_solve(
            denoiser, x, sigmas, condition, NONE, scale=7.5, threshold=None, **settings
        )
        assert denoiser.evaluations == 25 * 256
        each = (drawn.x - wanted).square().mean(-1)
        return float(each.median()), float(each.mean())

    regression, without = error(linear=fit), error(policy=interleaved(20, 10))
    assert regression[0] < without[0] / 10
    assert regression[1] < without[1] / 2

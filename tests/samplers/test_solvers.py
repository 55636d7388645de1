"""Solvers against loops over diffusers' own schedulers, exact flows, and torch.distributions."""

import importlib
import math
from typing import Any

import pytest
import torch

from esscher.adapters.diffusers import levels_of, noise_table
from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError
from esscher.samplers.denoisers import Counted, Discrete
from esscher.samplers.solvers import ancestral, checked_sigmas, seeded_noise, solve

diffusers: Any = importlib.import_module("diffusers")
DDIMScheduler, UNet2DModel = diffusers.DDIMScheduler, diffusers.UNet2DModel
EulerDiscreteScheduler = diffusers.EulerDiscreteScheduler
HeunDiscreteScheduler = diffusers.HeunDiscreteScheduler
DPMSolverMultistepScheduler = diffusers.DPMSolverMultistepScheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def unet() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1, norm_num_groups=4,
        ).requires_grad_(False).eval()  # fmt: skip


def by_hand(unet: Any, scheduler: Any, z: torch.Tensor, steps: int, **options: Any) -> torch.Tensor:
    """Samples as diffusers draws them, in its coordinates."""
    scheduler.set_timesteps(steps)
    for number, t in enumerate(scheduler.timesteps):
        told = {name: value[number] for name, value in options.items() if value is not None}
        output = unet(scheduler.scale_model_input(z, t), t).sample
        z = scheduler.step(output, t, z, **told).prev_sample
    return z


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wrapped(unet: Any, scheduler: Any) -> Discrete:
    def network(z: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        return unet(z, t).sample

    return Discrete(network, noise_table(scheduler), scheduler.config.prediction_type)


# ---- against diffusers


SCHEDULERS: list[tuple[Any, Any, dict[str, Any]]] = [
    ("ddim", DDIMScheduler, {"clip_sample": False}),
    ("ddim", DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("ddim", DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("euler", EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    ("euler", EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("heun", HeunDiscreteScheduler, {"timestep_spacing": "trailing"}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
]
"""Names of ours and theirs; DDIM is asked for steps that divide the 1000 of training."""


@pytest.mark.parametrize(("solver", "kind", "options"), SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_images_are_those_of_diffusers(
    unet: Any, solver: Any, kind: Any, options: dict[str, Any], prediction: str
) -> None:
    scheduler = kind(prediction_type=prediction, beta_schedule="scaled_linear", **options)
    sigmas = levels_of(scheduler)(10)
    start = noise(3, 2, 8, 8)
    scheduler.set_timesteps(10)
    theirs = by_hand(unet, scheduler, start * scheduler.init_noise_sigma, 10)
    # Samples of unit variance: what diffusers begins with, in coordinates x = x0 + sigma eps.
    scale = scheduler.init_noise_sigma
    if kind in (DDIMScheduler, DPMSolverMultistepScheduler):
        scale = (1 + sigmas[0] ** 2) ** 0.5
    ours = solve(wrapped(unet, scheduler), start * float(scale), sigmas, solver=solver)
    if not options.get("set_alpha_to_one", True):
        ours = ours / (1 + float(sigmas[-1]) ** 2) ** 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noisy_images_are_those_of_ddim(unet: Any, eta: float) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    sigmas, start = levels_of(scheduler)(8), noise(2, 2, 8, 8)
    drawn = [noise(2, 2, 8, 8, seed=step + 1) for step in range(8)]
    told: dict[str, Any] = {"eta": [eta] * 8, "variance_noise": drawn}
    theirs = by_hand(unet, scheduler, start, 8, **told)
    x = start * float((1 + sigmas[0] ** 2) ** 0.5)
    model = wrapped(unet, scheduler)
    ours = solve(model, x, sigmas, eta=eta, noise=lambda step: drawn[step])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    chain = ancestral(model, x, sigmas, eta=eta, noise=lambda step: drawn[step])
    torch.testing.assert_close(chain.x[-1], ours)


# ---- where the flow is known


class Normal:
    """Of data N(mean, std^2): the flow keeps (x - mean) / sqrt(std^2 + sigma^2)."""

    mean, std = 1.5, 0.5

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None) -> torch.Tensor:
        share = (self.std**2 / (self.std**2 + sigma**2)).view(-1, 1)
        return share * x + (1 - share) * self.mean

    def end(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        return self.mean + (x - self.mean) * self.std / (self.std**2 + sigma**2) ** 0.5


@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)]
)
def test_order_of_the_error(solver: Any, order: int) -> None:
    """Twice the steps, at equal distances of log sigma, divide the error by 2^order."""
    model, x = Normal(), 5.0 * noise(6, 3).double()
    # The end at a small level, so that no step to 0 of its own order hides the solver's.
    ends = []
    for steps in (40, 80):
        sigmas = torch.logspace(math.log10(5.0), -1, steps + 1, dtype=torch.float64)
        found = solve(model, x, sigmas, solver=solver)
        at_end = (model.end(x, 5.0) - model.mean) * (1 + 0.1**2 / model.std**2) ** 0.5 + model.mean
        ends.append((found - at_end).abs().max())
    assert math.log2(float(ends[0] / ends[1])) == pytest.approx(order, abs=0.25)


def test_the_solvers_ask_as_often_as_they_say() -> None:
    for solver, asked in (("ddim", 5), ("euler", 5), ("dpmpp_2m", 5), ("heun", 9)):
        counted = Counted(Normal())
        solve(counted, noise(2, 3), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], solver=solver)  # type: ignore[arg-type]
        assert counted.evaluations == 2 * asked


def test_ancestral_samples_have_the_variance_of_the_data() -> None:
    """Of N(1.5, 0.5^2), 20000 draws: standard errors of 0.0035 and 0.0025."""
    start, draw = seeded_noise([7], (20_000, 1))
    sigmas = torch.cat([torch.logspace(1.5, -2, 120), torch.zeros(1)])
    x = start[0] * float(sigmas[0]) + Normal.mean
    found = solve(Normal(), x, sigmas, eta=1.0, noise=lambda step: draw(step)[0])
    assert found.mean().item() == pytest.approx(1.5, abs=0.015)
    assert found.std().item() == pytest.approx(0.5, abs=0.02)


# ---- chains


def mixture() -> Any:
    return GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probabilities_of_a_chain(reduction: Any) -> None:
    """Each draw of the path, under the Gaussian of DDIM's eq. 16 written out for x0 + sigma eps."""
    model, sigmas, eta = mixture(), [4.0, 2.0, 1.0, 0.4, 0.0], 0.7
    start, draw = seeded_noise([1, 2, 3], (2,))
    chain = ancestral(model, 4.0 * start, sigmas, eta=eta, noise=draw, reduction=reduction)
    assert chain.x.shape == (5, 3, 2) and chain.logp.shape == (4, 3)
    for step, (high, low) in enumerate(zip(sigmas[:3], sigmas[1:4], strict=True)):
        x = chain.x[step]
        denoised = model(x, torch.full((3,), high))
        std = eta * low * math.sqrt(1 - (low / high) ** 2)
        mean = denoised + math.sqrt(low**2 - std**2) * (x - denoised) / high
        terms = torch.distributions.Normal(mean, std).log_prob(chain.x[step + 1])
        expected = terms.sum(-1) if reduction == "sum" else terms.mean(-1)
        torch.testing.assert_close(chain.logp[step], expected, rtol=1e-4, atol=1e-4)
    assert chain.logp[-1].tolist() == [0, 0, 0]
    torch.testing.assert_close(chain.x[-1], model(chain.x[-2], torch.full((3,), 0.4)))


def test_a_chain_may_be_scored_from_later_on() -> None:
    sigmas = [4.0, 2.0, 1.0, 0.0]
    chains = []
    for logp_from in (0, 1):
        start, draw = seeded_noise([1, 2], (2,))
        chains.append(ancestral(mixture(), start, sigmas, eta=1.0, noise=draw, logp_from=logp_from))
    torch.testing.assert_close(chains[0].x, chains[1].x)
    torch.testing.assert_close(chains[0].logp[1:], chains[1].logp[1:])
    assert chains[1].logp[0].tolist() == [0, 0] and bool((chains[0].logp[0] != 0).all())


def test_a_sample_depends_on_its_own_seed_alone() -> None:
    def drawn(seeds: list[int]) -> torch.Tensor:
        start, draw = seeded_noise(seeds, (2,))
        return solve(mixture(), 4.0 * start, [4.0, 1.0, 0.3, 0.0], eta=1.0, noise=draw)

    together, alone = drawn([5, 9, 11]), drawn([9])
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.allclose(together[0], together[1])


# ---- refused


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0], [1.0, 2.0], [1.0, -0.1], []])
def test_levels_that_do_not_fall(sigmas: list[float]) -> None:
    with pytest.raises(UserError, match="fall"):
        checked_sigmas(sigmas)
    with pytest.raises(UserError, match="fall"):
        solve(mixture(), noise(2, 2), sigmas)


@pytest.mark.parametrize(
    "options",
    [{"eta": 0.5}, {"eta": 1.5}, {"eta": 0.5, "solver": "heun", "noise": lambda step: noise(2, 2)}],
)
def test_noise_that_a_solver_has_no_place_for(options: Any) -> None:
    with pytest.raises(UserError, match="eta"):
        solve(mixture(), noise(2, 2), [1.0, 0.0], **options)


@pytest.mark.parametrize("eta", [0.0, 1.2])
def test_a_chain_needs_noise(eta: float) -> None:
    with pytest.raises(UserError, match="eta"):
        ancestral(mixture(), noise(2, 2), [1.0, 0.0], eta=eta, noise=lambda step: noise(2, 2))

"""Noise levels and steps against diffusers' schedulers, definitions and torch.distributions."""

import importlib
import math
from typing import Any

import pytest
import torch
from scipy import stats

from esscher.adapters.diffusers import levels_of, noise_table
from esscher.functional.diffusion import (
    alpha_bar_of_sigma,
    alpha_bars,
    denoised_of,
    edm_scalings,
    eps_of,
    exponential_sigmas,
    gaussian_log_prob,
    input_scale,
    karras_sigmas,
    linear_sigmas,
    multistep,
    reverse_kernel,
    sampling_timesteps,
    score_of,
    sigma_of_alpha_bar,
    truncated_log_logistic,
)

diffusers: Any = importlib.import_module("diffusers")
DDIMScheduler, DDPMScheduler = diffusers.DDIMScheduler, diffusers.DDPMScheduler
EulerDiscreteScheduler = diffusers.EulerDiscreteScheduler
DPMSolverMultistepScheduler = diffusers.DPMSolverMultistepScheduler

# Of diffusers, whose tables numpy 2 reads with a complaint.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES: list[tuple[Any, float, float]] = [
    ("linear", 1e-4, 0.02),
    ("scaled_linear", 0.00085, 0.012),
    ("squaredcos_cap_v2", 1e-4, 0.02),
]
SPACINGS: list[Any] = ["leading", "trailing", "linspace"]


def settings(schedule: str, start: float, end: float) -> dict[str, Any]:
    return {"beta_schedule": schedule, "beta_start": start, "beta_end": end}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


# ---- tables


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_tables_are_those_of_diffusers(kind: Any, schedule: Any, start: float, end: float) -> None:
    theirs = kind(**settings(schedule, start, end)).alphas_cumprod.double()
    ours = alpha_bars(schedule, 1000, start, end)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise_table(kind(**settings(schedule, start, end))), ours)


def test_two_steps_by_hand() -> None:
    """Betas 0.1 and 0.3; of square roots, 0.1 and (0.1^0.5 + 0.3^0.5)^2 / 4 and 0.3."""
    expected = torch.tensor([0.9, 0.9 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(alpha_bars("linear", 2, 0.1, 0.3), expected)
    middle = (0.1**0.5 + 0.3**0.5) ** 2 / 4
    expected = torch.tensor([0.9, 0.9 * (1 - middle), 0.9 * (1 - middle) * 0.7]).double()
    torch.testing.assert_close(
        alpha_bars("scaled_linear", 3, 0.1, 0.3), expected, rtol=1e-6, atol=0
    )


def test_sigma_and_alpha_bar_are_inverse() -> None:
    bar = torch.tensor([0.99, 0.5, 0.1], dtype=torch.float64)
    expected = torch.tensor([(0.01 / 0.99) ** 0.5, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(sigma_of_alpha_bar(bar), expected)
    torch.testing.assert_close(alpha_bar_of_sigma(expected), bar)


# ---- steps and levels


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [1, 7, 16, 50])
@pytest.mark.parametrize("offset", [0, 1])
def test_steps_are_those_of_diffusers(spacing: Any, count: int, offset: int) -> None:
    ours = sampling_timesteps(1000, count, spacing, offset)
    options: dict[str, Any] = {"timestep_spacing": spacing, "steps_offset": offset}
    euler = EulerDiscreteScheduler(**options)
    euler.set_timesteps(count)
    if not (
        spacing == "linspace" and count == 1
    ):  # Both ends of one step: theirs is the clean one.
        torch.testing.assert_close(ours, euler.timesteps.double(), rtol=0, atol=1e-4)
        for kind in (DDIMScheduler, DDPMScheduler):
            theirs = kind(**options)
            theirs.set_timesteps(count)
            assert ours.round().tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_levels_are_those_of_diffusers(
    kind: Any, schedule: Any, start: float, end: float, spacing: str, final: str
) -> None:
    options = settings(schedule, start, end) | {"final_sigmas_type": final}
    theirs = kind(**options, timestep_spacing=spacing)
    ours = levels_of(theirs)(10)
    theirs.set_timesteps(10)
    expected = theirs.sigmas.double()
    # Their table is in float32, which loses most where a level is next to no noise at all.
    expected = expected[:-1] if final == "sigma_min" and expected[-1] >= expected[-2] else expected
    bars = alpha_bar_of_sigma(ours), alpha_bar_of_sigma(expected)
    torch.testing.assert_close(*bars, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_other_levels_of_a_scheduler_are_kept(name: str) -> None:
    theirs = EulerDiscreteScheduler.from_config(EulerDiscreteScheduler().config, **{name: True})
    ours = levels_of(theirs)(8)
    theirs.set_timesteps(8)
    torch.testing.assert_close(ours, theirs.sigmas.double())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_levels_of_ddim(spacing: Any, to_one: bool) -> None:
    """Each level is that of a step; the last is 0, or that of step 0."""
    theirs = DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=to_one, steps_offset=1)
    ours = levels_of(theirs)(10)
    theirs.set_timesteps(10)
    bars = [theirs.alphas_cumprod[step] for step in theirs.timesteps.tolist()]
    expected = torch.stack([*bars, theirs.final_alpha_cumprod]).double()
    torch.testing.assert_close(alpha_bar_of_sigma(ours), expected, rtol=0, atol=1e-6)


def test_levels_of_karras_by_the_formula() -> None:
    ours = karras_sigmas(5, 0.002, 80.0)
    place = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(ours, expected)
    theirs = EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.002, sigma_max=80.0)
    theirs.set_timesteps(5)
    torch.testing.assert_close(ours, theirs.sigmas[:-1].double(), rtol=1e-6, atol=0)


# ---- what a network predicts


def made(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0, eps = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    return x0, eps, x0 + sigma.view(-1, 1, 1) * eps


def test_predictions_give_back_what_x_was_made_of() -> None:
    sigma = torch.tensor([0.05, 0.7, 3.0, 40.0], dtype=torch.float64)
    x0, eps, x = made(sigma)
    signal = (1 / (1 + sigma**2)).sqrt().view(-1, 1, 1)
    noise = (1 - signal**2).sqrt()
    outputs: dict[Any, torch.Tensor] = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": signal * eps - noise * x0,
        "flow_prediction": eps - x0,
    }
    for prediction, output in outputs.items():
        torch.testing.assert_close(denoised_of(prediction, output, x, sigma), x0)
    torch.testing.assert_close(eps_of(x, x0, sigma), eps)
    torch.testing.assert_close(score_of(x, x0, sigma), -eps / sigma.view(-1, 1, 1))


def test_inputs_are_those_that_networks_were_trained_on() -> None:
    sigma = torch.tensor([0.05, 0.7, 3.0, 40.0], dtype=torch.float64)
    x0, eps, x = made(sigma)
    signal = (1 / (1 + sigma**2)).sqrt().view(-1, 1, 1)
    time = (sigma / (1 + sigma)).view(-1, 1, 1)
    variance_preserving = signal * x0 + (1 - signal**2).sqrt() * eps
    torch.testing.assert_close(
        x * input_scale("epsilon", sigma).view(-1, 1, 1), variance_preserving
    )
    straight = (1 - time) * x0 + time * eps
    torch.testing.assert_close(x * input_scale("flow_prediction", sigma).view(-1, 1, 1), straight)


def test_velocity_is_that_of_diffusers() -> None:
    scheduler = DDIMScheduler()
    x0, eps, step = (
        normal(3, 2, 2).float(),
        normal(3, 2, 2, seed=1).float(),
        torch.tensor([9, 99, 999]),
    )
    bar = scheduler.alphas_cumprod[step]
    x = scheduler.add_noise(x0, eps, step) / bar.sqrt().view(-1, 1, 1)
    velocity = scheduler.get_velocity(x0, eps, step)
    found = denoised_of("v_prediction", velocity, x, ((1 - bar) / bar).sqrt())
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


def test_edm_scalings_keep_variances_at_one() -> None:
    """Of the input, and of what the network has to say (Karras et al., eq. 114 and 115)."""
    sigma, data = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), 0.5
    skip, out, scale, noise = edm_scalings(sigma, data)
    torch.testing.assert_close(scale**2 * (sigma**2 + data**2), torch.ones(3).double())
    target = ((1 - skip) ** 2 * data**2 + skip**2 * sigma**2) / out**2
    torch.testing.assert_close(target, torch.ones(3).double())
    torch.testing.assert_close(noise, sigma.log() / 4)


# ---- steps


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("step", [900, 500, 100])
def test_the_reverse_kernel_is_ddims(prediction: Any, eta: float, step: int) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    bar, next_bar = scheduler.alphas_cumprod[step], scheduler.alphas_cumprod[step - 100]
    z, output, noise = (normal(2, 3, 4, seed=seed) for seed in range(3))
    theirs = scheduler.step(output, step, z, eta=eta, variance_noise=noise if eta else None)
    sigma, next_sigma = (((1 - b) / b).sqrt().expand(2) for b in (bar, next_bar))
    x = z / bar.sqrt()
    mean, std = reverse_kernel(x, denoised_of(prediction, output, x, sigma), sigma, next_sigma, eta)
    ours = (mean + std.view(-1, 1, 1) * noise) * next_bar.sqrt()
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-9, atol=1e-9)


def test_the_whole_kernel_is_ddpms() -> None:
    """Eta 1 from one training step to the next, with DDPM's small variance."""
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    z, output = normal(1, 3, 4), normal(1, 3, 4, seed=1)
    bar, next_bar = scheduler.alphas_cumprod[600], scheduler.alphas_cumprod[599]
    sigma, next_sigma = (((1 - b) / b).sqrt().expand(1) for b in (bar, next_bar))
    x = z / bar.sqrt()
    mean, std = reverse_kernel(x, denoised_of("epsilon", output, x, sigma), sigma, next_sigma, 1.0)
    theirs = scheduler.step(output, 600, z, generator=torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(z.shape, generator=draw, dtype=torch.float64)
    ours = (mean + std.view(-1, 1, 1) * noise) * next_bar.sqrt()
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-9, atol=1e-9)


def test_the_kernel_keeps_the_marginal() -> None:
    """From x0 + sigma eps, the next is x0 + next eps': variances add up, at every eta."""
    sigma, following = torch.tensor([3.0]), torch.tensor([1.2])
    for eta in (0.0, 0.5, 1.0):
        at_one, std = reverse_kernel(
            torch.tensor([[3.0]]), torch.zeros(1, 1), sigma, following, eta
        )
        assert (at_one**2 + std**2).item() == pytest.approx(1.2**2, rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probabilities_are_those_of_torch(reduction: Any) -> None:
    x, mean = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    std = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    terms = torch.distributions.Normal(mean, std.view(-1, 1, 1)).log_prob(x).flatten(1)
    expected = terms.sum(1) if reduction == "sum" else terms.mean(1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduction), expected)


def test_a_multistep_by_hand() -> None:
    """Levels 4, 2, 1: equal steps in log sigma, so the estimate goes half its change further."""
    found = multistep(
        torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[0.4]]),
        torch.tensor(4.0), torch.tensor(2.0), torch.tensor(1.0),
    )  # fmt: skip
    assert found.item() == pytest.approx(0.5 * 2.0 + 0.5 * (1.0 + 0.6 / 2), rel=1e-6)


def stepped(eta: float) -> Any:
    return reverse_kernel(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1), eta)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: alpha_bars("linear", 0), "steps"),
        (lambda: alpha_bars("linear", 10, 0.0, 0.1), "betas"),
        (lambda: sampling_timesteps(10, 11, "leading"), "count"),
        (lambda: karras_sigmas(1, 0.1, 1.0), "count"),
        (lambda: karras_sigmas(5, 1.0, 0.1), "low"),
        (lambda: stepped(1.1), "eta"),
    ],
)
def test_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# ---- noise levels of continuous models


def test_exponential_and_linear_levels() -> None:
    # By hand: the geometric mean of 1 and 0.005 is sqrt(0.005), the arithmetic one 0.5025.
    torch.testing.assert_close(
        exponential_sigmas(3, 0.005, 1.0), torch.tensor([1.0, 0.0707107, 0.005]).double(),
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip
    torch.testing.assert_close(
        linear_sigmas(3, 0.005, 1.0), torch.tensor([1.0, 0.5025, 0.005]).double()
    )
    for levels in (exponential_sigmas, linear_sigmas):
        assert levels(1, 0.1, 2.0).tolist() == pytest.approx([2.0])
        for bad in ((0, 0.1, 1.0), (3, 0.0, 1.0), (3, 1.0, 1.0)):
            with pytest.raises(ValueError, match="0 < low < high"):
                levels(*bad)


def test_truncated_log_logistic_is_the_inverse_of_its_distribution() -> None:
    loc, scale, low, high = math.log(0.5), 0.5, 0.005, 1.0
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = truncated_log_logistic(uniform, loc, scale, low, high)
    law = stats.fisk(1 / scale, scale=math.exp(loc))
    below, above = law.cdf([low, high])
    expected = law.ppf(below + uniform.numpy() * (above - below))
    torch.testing.assert_close(sigma, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert sigma[0] == pytest.approx(low) and sigma[-1] == pytest.approx(high)
    single = truncated_log_logistic(torch.tensor([0.0, 0.999999]), loc, scale, low, high)
    assert single.dtype == torch.float32 and (single >= low).all() and (single <= high).all()
    with pytest.raises(ValueError, match="scale > 0"):
        truncated_log_logistic(uniform, loc, 0.0, low, high)

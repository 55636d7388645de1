"""Denoisers: what a network's output stands for, guidance, and mixtures that are exact."""

import importlib
from typing import Any

import pytest
import torch

from esscher.adapters.diffusers import FlowMatching, noise_table
from esscher.distributions.diffusion import DiffusionModel
from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError
from esscher.functional.diffusion import alpha_bars, eps_of, score_of
from esscher.samplers.denoisers import (
    Counted,
    Discrete,
    both,
    classifier_free,
    expanded,
    repeated,
    rows_of,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- networks


class Remembering:
    """A network that answers what it is told to, and keeps what it was asked."""

    def __init__(self, answer: torch.Tensor):
        self.answer = answer

    def __call__(self, z: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        self.z, self.t, self.condition = z, t, condition
        return self.answer


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_network_gives_the_clean_sample(prediction: Any) -> None:
    """Fed z = sqrt(abar) x0 + sqrt(1 - abar) eps of a training step, and told that step."""
    bars, steps = alpha_bars("linear", 1000), torch.tensor([0, 10, 500, 999])
    x0, eps = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    bar = bars[steps].view(-1, 1, 1)
    answers = {"epsilon": eps, "sample": x0}
    answers["v_prediction"] = bar.sqrt() * eps - (1 - bar).sqrt() * x0
    network = Remembering(answers[prediction])
    denoiser = Discrete(network, bars, prediction)
    sigma = ((1 - bar) / bar).sqrt()
    found = denoiser(x0 + sigma * eps, sigma.flatten(), None)
    torch.testing.assert_close(found, x0)
    torch.testing.assert_close(network.z, bar.sqrt() * x0 + (1 - bar).sqrt() * eps)
    torch.testing.assert_close(network.t, steps.float(), rtol=0, atol=1e-3)


def test_steps_between_those_of_training() -> None:
    bars = alpha_bars("linear", 100)
    denoiser = Discrete(Remembering(torch.zeros(0)), bars, "epsilon")
    levels = ((1 - bars) / bars).sqrt()
    between = 0.75 * levels[40] + 0.25 * levels[41]
    asked = torch.stack([between, levels[99] * 2, levels[0] / 2])
    expected = torch.tensor([40.25, 99.0, 0.0])
    torch.testing.assert_close(denoiser.timestep(asked), expected)


def test_a_perfect_flow_gives_the_clean_sample() -> None:
    x0, eps, time = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9]).double()
    network = Remembering(eps - x0)
    sigma = time / (1 - time)
    found = FlowMatching(network, 1000)(x0 + sigma.view(-1, 1) * eps, sigma)
    torch.testing.assert_close(found, x0)
    mixed = (1 - time).view(-1, 1) * x0 + time.view(-1, 1) * eps
    torch.testing.assert_close(network.z, mixed)
    torch.testing.assert_close(network.t, 1000 * time)


def test_no_signal_is_refused() -> None:
    bars = alpha_bars("linear", 10)
    with pytest.raises(UserError, match="signal"):
        Discrete(Remembering(bars), torch.cat([bars, torch.zeros(1)]), "epsilon")
    with pytest.raises(UserError, match="fall"):
        Discrete(Remembering(bars), bars.flip(0), "epsilon")


def test_betas_without_a_last_signal() -> None:
    """Of what predicts the noise refused; else the schedule is diffusers' own, nearly 0 at its end."""
    diffusers: Any = importlib.import_module("diffusers")
    options: dict[str, Any] = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        noise_table(diffusers.DDIMScheduler(**options))
    options |= {"prediction_type": "v_prediction"}
    for kind, least in (("EulerDiscreteScheduler", 2.0**-24), ("DDIMScheduler", 2.0**-40)):
        scheduler = getattr(diffusers, kind)(**options)
        table = noise_table(scheduler)
        theirs = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(table, theirs, rtol=0, atol=1e-6)
        assert table[-1] == least
        highest = Discrete(Remembering(table), table, "v_prediction").sigmas[-1]
        assert highest == pytest.approx(least**-0.5)
    with pytest.raises(UserError, match="has 1 training step, and rescale_betas_zero_snr needs"):
        noise_table(diffusers.DDIMScheduler(num_train_timesteps=1, **options))


# ---- guidance


def labelled() -> Any:
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [1.0, -1.0]]).double()
    std = torch.tensor([0.3, 0.5, 0.8]).double()
    weights = torch.tensor([1.0, 2.0, 3.0])
    return GaussianMixture(means, std, weights, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, -1.0])
def test_guidance_by_the_formula(scale: float) -> None:
    model, x, sigma = labelled(), normal(4, 2), torch.tensor([0.2, 0.7, 1.0, 3.0]).double()
    label = torch.tensor([0, 1, 1, 0])
    counted = Counted(model)
    guided = classifier_free(counted, torch.tensor([-1]), scale)(x, sigma, label)
    expected = (1 - scale) * model(x, sigma, None) + scale * model(x, sigma, label)
    torch.testing.assert_close(guided, expected)
    assert counted.evaluations == (4 if scale == 1 else 8)


def test_a_null_condition_a_sample() -> None:
    model, x, sigma = labelled(), normal(2, 2), torch.ones(2).double()
    away = torch.tensor([1, 0])
    guided = classifier_free(model, away, 2.0)(x, sigma, torch.tensor([0, 1]))
    expected = 2 * model(x, sigma, torch.tensor([0, 1])) - model(x, sigma, away)
    torch.testing.assert_close(guided, expected)


def test_null_conditions_that_do_not_fit() -> None:
    model, x, sigma = labelled(), normal(3, 2), torch.ones(3).double()
    label = torch.tensor([0, 1, 1])
    with pytest.raises(UserError, match="2 rows for 3 samples"):
        classifier_free(model, torch.tensor([-1, -1]), 2.0)(x, sigma, label)
    with pytest.raises(UserError, match="alike"):
        classifier_free(model, torch.zeros(1, 5), 2.0)(x, sigma, torch.zeros(3, 4))
    with pytest.raises(UserError, match="null condition"):
        classifier_free(model, None, 2.0)(x, sigma, label)
    with pytest.raises(UserError, match="same kind"):
        classifier_free(model, torch.tensor([-1]), 2.0)(x, sigma, None)
    with pytest.raises(UserError, match="same kind"):
        both({"a": label}, {"b": label})
    with pytest.raises(UserError, match="scale"):
        classifier_free(model, torch.tensor([-1]), float("inf"))


def test_a_model_without_a_null_condition_takes_no_guidance() -> None:
    model = DiffusionModel(labelled(), [2], lambda steps: torch.tensor([1.0, 0.0]))
    assert model.guided(1.0) is model.denoiser
    with pytest.raises(UserError, match="scale must be 1, which is no guidance, got"):
        model.guided(2.0)
    with pytest.raises(UserError, match="scale must be 1, which is no guidance, got"):
        model.draw(None, [1], steps=1, scale=2.0)


def test_conditions_of_some_and_of_many() -> None:
    several = {"a": torch.tensor([[1], [2]]), "b": torch.tensor([3, 4])}
    part: Any = rows_of(several, slice(1, 2))
    assert part["a"].tolist() == [[2]] and part["b"].tolist() == [4]
    many: Any = repeated(several, 2)
    assert many["b"].tolist() == [3, 3, 4, 4]
    wide: Any = expanded({"a": torch.tensor([[7, 8]])}, 3)
    assert wide["a"].tolist() == [[7, 8]] * 3
    assert rows_of(None, slice(0, 1)) is None and repeated(None, 2) is None


# ---- mixtures


@pytest.mark.parametrize("label", [None, 0, 1])
def test_scores_are_gradients_of_the_log_density(label: int | None) -> None:
    """Tweedie: the denoised estimate is x + sigma^2 times that gradient."""
    model = labelled()
    x = normal(5, 2).requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0]).double()
    asked = None if label is None else torch.full((5,), label)
    # One level a row, so densities are taken row by row.
    logp = torch.stack(
        [
            model.log_prob(x[n : n + 1], float(sigma[n]), None if asked is None else asked[:1])
            for n in range(5)
        ]
    )
    (gradient,) = torch.autograd.grad(logp.sum(), x)
    denoised = model(x, sigma, asked)
    torch.testing.assert_close(score_of(x, denoised, sigma), gradient)
    torch.testing.assert_close(eps_of(x, denoised, sigma), -gradient * sigma.view(-1, 1))
    torch.testing.assert_close(denoised, x + sigma.view(-1, 1) ** 2 * gradient)


def test_densities_are_those_of_torch() -> None:
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    model, x, noise = labelled(), normal(6, 2), 0.7
    std = (torch.tensor([0.3, 0.5, 0.8]).double() ** 2 + noise**2).sqrt()
    parts = Independent(Normal(model.means, std.unsqueeze(-1).expand(3, 2)), 1)
    weights = torch.tensor([1.0, 2.0, 3.0]).double()
    theirs = MixtureSameFamily(Categorical(weights), parts)
    torch.testing.assert_close(model.log_prob(x, noise), theirs.log_prob(x))
    within = MixtureSameFamily(
        Categorical(weights[1:]),
        Independent(Normal(model.means[1:], std[1:].unsqueeze(-1).expand(2, 2)), 1),
    )
    label = torch.ones(6, dtype=torch.long)
    torch.testing.assert_close(model.log_prob(x, noise, label), within.log_prob(x))


def test_the_denoised_estimate_is_a_posterior_mean() -> None:
    """By a sum over a fine grid of clean samples of one dimension."""
    model = GaussianMixture(
        torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([0.4, 0.7]).double()
    )
    grid = torch.linspace(-8, 9, 20_001, dtype=torch.float64)
    prior = 0.5 * sum(
        torch.distributions.Normal(m, s).log_prob(grid).exp() for m, s in ((-1.0, 0.4), (2.0, 0.7))
    )
    x, sigma = torch.tensor([[-2.0], [0.3], [1.0]]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    weight = prior * torch.exp(-0.5 * ((x - grid) / sigma.unsqueeze(-1)) ** 2)
    expected = (weight * grid).sum(-1) / weight.sum(-1)
    torch.testing.assert_close(model(x, sigma).squeeze(-1), expected)


def test_samples_of_a_mixture() -> None:
    """Weights 1/6, 1/3, 1/2: means and shares within 5 standard errors of 20000 draws."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = labelled()
        drawn = model.sample(20_000)
        of_class = model.sample(4_000, torch.zeros(4_000, dtype=torch.long))
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [1.0, -1.0]]).double()
    mean = (torch.tensor([1.0, 2.0, 3.0]).double() / 6) @ expected
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(of_class.mean(0), expected[0], rtol=0, atol=0.025)
    assert of_class.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)


def test_a_class_of_a_mixture_without_classes() -> None:
    model = GaussianMixture(torch.zeros(2, 2), 1.0)
    with pytest.raises(UserError, match="no classes"):
        model(torch.zeros(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(UserError, match="positive"):
        GaussianMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, 0.0]))
    with pytest.raises(UserError, match="positive"):
        GaussianMixture(torch.zeros(2, 2), 0.0)

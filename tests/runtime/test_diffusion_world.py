"""Runs about diffusion models: what is drawn, judged, kept and refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import esscher
from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import UserError
from esscher.experiment import EvaluationConfig, ImageConfig, ModelConfig
from esscher.functional.diffusion import denoising_terms, reverse_kl_terms
from esscher.runtime.device import Runtime
from esscher.runtime.diffusion import DiffusionWorld
from esscher.types import Drawn
from support import RUNTIME, metrics, smoke, train


def levels(steps: int) -> torch.Tensor:
    return torch.linspace(4.0, 0.0, steps + 1, dtype=torch.float64)


class Shrinks(torch.nn.Module):
    """The denoiser of N(mean, 1) in two dimensions."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        share = (1 / (1 + sigma.square())).unsqueeze(-1)
        return share * x + (1 - share) * self.mean


def gaussian() -> DiffusionModel:
    return DiffusionModel(Shrinks(0.0), [2], levels)


def first_component(images: Any, rows: Any) -> torch.Tensor:
    return images[:, 0]


class SecondMoment:
    def embed(self, images: Any, rows: Any) -> torch.Tensor:
        return images

    def of_set(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding.square().sum(-1).mean()


class Fixed:
    """A method that draws the same samples always, and stands `shift` away from its reference."""

    def __init__(self, model: DiffusionModel, shift: float):
        self._reference = model.frozen()
        self.policy = model
        with torch.no_grad():
            model.denoiser.mean += shift

    def draw(self, asked: Any, seeds: Any) -> Drawn:
        x = torch.tensor([[float(seed % 97), 1.0] for seed in seeds])
        return Drawn(x=x, told={"worth": x[:, 0], "cost": 2 * x[:, 0]})


def function(x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
    return 0 * x


function.shape = (2,)  # type: ignore[attr-defined]


def function_alone() -> Any:
    return function


class Wavers(torch.nn.Module):
    """A denoiser that answers otherwise each time while it is in training mode."""

    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> torch.Tensor:
        return self.dropout(self.weight * x / (1 + sigma.square()).unsqueeze(-1))


def world_of(
    reward: str | None = None,
    episodes: int = 6,
    slug: str = "adaptive_guidance",
    model: str = "gaussian",
) -> DiffusionWorld:
    experiment = esscher.Experiment.of(
        slug,
        model=ModelConfig(source=f"{__name__}:{model}"),
        image=ImageConfig(reward=reward, at_once=4),
        steps=1,
        evaluation=EvaluationConfig(episodes=episodes),
        runtime=RUNTIME,
    )
    return DiffusionWorld(experiment, Runtime(RUNTIME))


def test_samples_are_worth_their_reward_or_the_first_thing_told() -> None:
    world = world_of(f"{__name__}:first_component")
    found = world.evaluate(Fixed(world.spec.model, 0.0), 0)
    assert found.measure == "reward" and len(found.returns) == 6
    assert found.extras["cost_mean"] == pytest.approx(2 * found.mean)
    world = world_of()
    again = world.evaluate(Fixed(world.spec.model, 0.0), 0)
    assert again.measure == "worth" and again.returns == found.returns
    world = world_of(f"{__name__}:SecondMoment", slug="dragon")
    assert world.spec.of_sets
    whole = world.evaluate(Fixed(world.spec.model, 0.0), 0)
    expected = sum(value**2 + 1 for value in found.returns) / 6
    assert whole.returns == pytest.approx([expected])


def test_what_cannot_work_is_said_before_work_starts() -> None:
    sets = f"{__name__}:SecondMoment"
    with pytest.raises(UserError, match="judges sets of samples, and here each .* use dragon"):
        world_of(sets, slug="b2_diffurl")
    with pytest.raises(UserError, match="evaluation.episodes must be >= 2, the set .*, got 1"):
        world_of(sets, slug="dragon", episodes=1)
    with pytest.raises(
        UserError, match="function_alone has none: give one whose denoiser is a mod"
    ):
        world_of(f"{__name__}:first_component", slug="dragon", model="function_alone")
    world_of(model="function_alone")  # To draw from it, it needs none.


def test_denoisers_never_drop_out() -> None:
    """Neither in drawing nor in training: a sample depends on its seed and the weights alone."""
    model = world_of(model="Wavers").spec.model
    x, sigma = torch.ones(3, 2), torch.zeros(3)
    torch.testing.assert_close(model.denoiser(x, sigma), x)
    torch.testing.assert_close(model.frozen().denoiser(x, sigma), x)


def test_a_reference_is_as_exact_as_the_run() -> None:
    """With --model.dtype bfloat16 too: 1 + 2^-9 is not among its numbers."""
    for precision, expected in (("float32", 1 + 2**-9), ("bfloat16", 1.0)):
        experiment = esscher.Experiment.of(
            "dragon",
            model=ModelConfig(source="esscher.images:tiny_unet", dtype="bfloat16"),
            image=ImageConfig(reward=f"{__name__}:first_component"),
            steps=1,
        )
        config = replace(RUNTIME, precision=precision)
        model = DiffusionWorld(experiment, Runtime(config)).spec.model
        next(model.parameters()).data.fill_(1 + 2**-9)
        assert float(next(model.frozen().parameters()).flatten()[0]) == expected


def test_the_distance_to_the_model_of_before_in_closed_form() -> None:
    """Denoisers of N(0, 1) and N(a, 1) differ by a s^2 / (1 + s^2) in each component."""
    world, shift = world_of(), 0.3
    found = world.evaluate(Fixed(world.spec.model, shift), 0).extras["kl_to_reference"]
    expected = 0.0
    sigmas = levels(20)[:-1].tolist()
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        apart = 2 * (shift * sigma**2 / (1 + sigma**2)) ** 2
        expected += (1 / following**2 - 1 / sigma**2) / 2 * apart
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_kl_of_a_step_against_torch(eta: float) -> None:
    torch.manual_seed(0)
    ours, other, x = torch.randn(3, 5, 7, dtype=torch.float64)
    sigma, following = torch.tensor(2.0).double(), torch.tensor(1.5).double()
    std = eta * following * (1 - (following / sigma) ** 2).sqrt()
    kept = (following**2 - std**2).sqrt()

    def law(denoised: torch.Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(denoised + kept * (x - denoised) / sigma, std)

    expected = torch.distributions.kl_divergence(law(ours), law(other)).sum(-1)
    torch.testing.assert_close(reverse_kl_terms(ours, other, sigma, following, eta), expected)


def test_errors_of_every_prediction() -> None:
    torch.manual_seed(0)
    x0, noise, wrong = torch.randn(3, 4, 6, dtype=torch.float64)
    sigma = torch.rand(4).double() + 0.2
    s = sigma.unsqueeze(-1)
    x = x0 + s * noise

    def error(truth: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return (truth - told).square().mean(-1)

    told = (x - wrong) / s
    alpha, beta = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    expected: dict[str, Any] = {
        "sample": error(x0, wrong),
        "epsilon": error(noise, told),
        "v_prediction": error(alpha * noise - beta * x0, alpha * told - beta * wrong),
        "flow_prediction": error(noise - x0, told - wrong),
    }
    for name, value in expected.items():
        kind: Any = name
        torch.testing.assert_close(denoising_terms(wrong, x0, sigma, kind), value)


def test_a_run_shows_what_was_drawn_before_and_after_from_the_same_noise(tmp_path: Path) -> None:
    from esscher.report.page import write_report

    train(smoke("ddpm"), tmp_path / "run")
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pictures == ["step_000000000.png", "step_000000005.png", "step_000000010.png"]
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert page.count("data:image/png") >= 2
    assert "before training" in page and "after 10 steps" in page


def test_what_a_model_cannot_be_asked_for_is_refused_before_work(tmp_path: Path) -> None:
    def start(**changes: Any) -> None:
        whole = smoke("adaptive_guidance")
        stage = replace(whole.stages[-1], **changes)
        train(replace(whole, stages=(stage,)), tmp_path / "run")

    with pytest.raises(UserError, match="draws by label, and anything has no such column"):
        start(image=ImageConfig())
    with pytest.raises(UserError, match="label must be a class from 0 to 7"):
        start(image=ImageConfig(labels=(8,)))
    with pytest.raises(UserError, match="exclude each other"):
        start(image=ImageConfig(labels=(1,)), data="esscher.datasets:sums_asked")
    with pytest.raises(UserError, match="trained without"):
        start(model=ModelConfig(source="esscher.images:mixture"), image=ImageConfig())
    with pytest.raises(UserError, match="needs a diffusion model"):
        start(model=ModelConfig())
    with pytest.raises(UserError, match="cannot be imported"):
        start(image=ImageConfig(labels=(1,), reward="nowhere:at_all"))
    assert not (tmp_path / "run").exists()
    unrewarded = smoke("diffusion_tree_sampling")
    stage = replace(unrewarded.stages[-1], image=ImageConfig(labels=(0,)))
    with pytest.raises(UserError, match="needs a reward"):
        train(replace(unrewarded, stages=(stage,)), tmp_path / "run")
    with pytest.raises(UserError, match="learns from real samples"):
        esscher.Experiment.of("ddpm", model="esscher.images:mixture").resolved()


def test_another_model_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    train(smoke("ddpm"), tmp_path / "first")
    second = replace(
        smoke("ddpm"),
        stages=(
            replace(
                smoke("ddpm").stages[-1],
                model=ModelConfig(
                    source=str(tmp_path / "first" / "model"), kwargs={"null_class": 10}
                ),
            ),
        ),
    )
    train(second, tmp_path / "second")
    (tmp_path / "first" / "model").rename(tmp_path / "elsewhere")
    (tmp_path / "second" / "model").rename(tmp_path / "first" / "model")
    with pytest.raises(UserError, match="other weights"):
        esscher.load(tmp_path / "second")


def test_training_really_lowers_the_loss_of_real_digits(tmp_path: Path) -> None:
    """Untrained, a network that says 0 is off by the noise itself: 1. Trained a little: below 0.5."""
    stage = replace(smoke("ddpm").stages[-1], steps=60)
    whole = smoke("ddpm")
    config = replace(whole.method, batch_size=64, learning_rate=5e-3)
    train(replace(whole, method=config, stages=(stage,)), tmp_path / "run")
    trained = [row["loss"] for row in metrics(tmp_path / "run") if row["phase"] == "train"]
    assert trained[0] > 0.8 and sum(trained[-5:]) / 5 < 0.5
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["measure"] == "negative energy distance"
    assert math.isfinite(result["return_mean"])


def test_a_judge_has_its_own_say_and_nothing_learns_from_it() -> None:
    experiment = esscher.Experiment.of(
        "adaptive_guidance",
        model=ModelConfig(source=f"{__name__}:gaussian"),
        image=ImageConfig(reward=f"{__name__}:first_component", judge=f"{__name__}:SecondMoment"),
        steps=1,
        evaluation=EvaluationConfig(episodes=3),
        runtime=RUNTIME,
    )
    world = DiffusionWorld(experiment, Runtime(RUNTIME))
    found = world.evaluate(Fixed(world.spec.model, 0.0), 0)
    assert found.extras["judge_mean"] == pytest.approx(sum(v**2 + 1 for v in found.returns) / 3)

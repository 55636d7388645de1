"""f-distill: its loss against a slow one, what moves and what does not, bins, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esscher.adapters.diffusers import load_diffusion, save_diffusion
from esscher.datasets import ring
from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError
from esscher.experiment import ModelConfig
from esscher.images import mixture
from esscher.methods.diffusion.f_distill import Config, FDistill
from esscher.registry import recipes
from esscher.runtime.device import Runtime
from esscher.types import Asked, Samples
from support import RUNTIME, learner

RING = {"components": 4, "radius": 1.0, "std": 0.2, "width": 8}


class Says(nn.Module):
    """A denoiser that says a function of the noisy sample."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> Any:
        return self.function(x)


def method_of(model: DiffusionModel | None = None, seed: int = 0, **options: Any) -> FDistill:
    torch.manual_seed(seed)
    model = mixture(**RING) if model is None else model
    defaults = {"batch_size": 8, "num_bins": 2, "first_sigma": 2.0, "head_width": 8}
    return FDistill(Config(**{**defaults, **options}), ImageSpec(model=model), Runtime(RUNTIME))


def disturb(method: Any, size: float = 0.3) -> Any:
    """Away from where the student, the fake score and the teacher agree and the logits are 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (method.student, method.fake, method.discriminator):
            for parameter in module.parameters():
                parameter.add_(size * torch.randn_like(parameter))
    return method


def batch_of(count: int = 8, *shape: int, condition: Any = None) -> Samples:
    torch.manual_seed(2)
    return Samples(x=torch.randn(count, *(shape or (2,))), condition=condition)


def asked_of(method: Any, count: int = 8) -> tuple[torch.Tensor, ...]:
    """Start, noise levels and noise."""
    torch.manual_seed(3)
    shape = (count, *method.student.shape)
    return torch.randn(shape), 0.1 + 2 * torch.rand(count), torch.randn(shape)


def parameters_of(method: Any) -> dict[str, list[torch.Tensor]]:
    names = ("student", "average", "fake", "discriminator", "_teacher")
    return {n: [p.detach().clone() for p in getattr(method, n).parameters()] for n in names}


def moved(method: Any, before: dict[str, list[torch.Tensor]]) -> set[str]:
    after = parameters_of(method)
    return {
        name
        for name, old in before.items()
        if any(not torch.equal(a, b) for a, b in zip(old, after[name], strict=True))
    }


# ---- the student's loss


H = {
    "reverse_kl": lambda r: 1.0,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "js": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: math.sqrt(r),
    "kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi2": lambda r: 1 / r,
    "pearson_chi2": lambda r: r * r,
}


def slowly(method: Any, start: Any, sigma: Any, noise: Any) -> list[list[float]]:
    """The gradient of matching to each sample, row by row and in plain numbers."""
    first = torch.full((1,), 2.0)
    rows = []
    with torch.no_grad():
        for k in range(len(start)):
            level = sigma[k : k + 1]
            x = method.student.denoiser(2.0 * start[k : k + 1], first)
            noisy = x + float(level) * noise[k : k + 1]
            logit = float(method.discriminator(noisy, level))
            teacher = method._teacher.denoiser(noisy, level)[0].tolist()
            fake = method.fake.denoiser(noisy, level)[0].tolist()
            ratio = min(max(math.exp(min(max(logit, -1.0), 1.0)), 0.5), 2.0)
            rows.append([x[0].tolist(), teacher, fake, float(level), ratio])
    low, high = math.log(0.1), math.log(3.0)
    place = [int((math.log(row[3]) - low) / (high - low) * 2) for row in rows]
    mean = {b: sum(r[4] for r, p in zip(rows, place, strict=True) if p == b) for b in (0, 1)}
    mean = {b: m / max(1, place.count(b)) for b, m in mean.items()}
    weight = [H[method.cfg.divergence](r[4] / mean[p]) for r, p in zip(rows, place, strict=True)]
    average = sum(weight) / len(weight)
    found = []
    for (x, teacher, fake, *_), w in zip(rows, weight, strict=True):
        size = sum(abs(a - b) for a, b in zip(x, teacher, strict=True)) / 2
        found.append([w / average / size * (q - p) for p, q in zip(teacher, fake, strict=True)])
    return found


@pytest.mark.parametrize("divergence", H)
def test_the_gradient_is_that_of_the_paper_row_by_row(divergence: Any) -> None:
    """With the bounds of logit, then ratio, in effect, and both normalisations."""
    method = disturb(
        method_of(
            divergence=divergence,
            logit_limit=1.0,
            ratio_low=0.5,
            ratio_high=2.0,
            noise="log_uniform",
            low_sigma=0.1,
            high_sigma=3.0,
        )
    )
    start, sigma, noise = asked_of(method)
    drawn: list[torch.Tensor] = []
    generate = method.generate
    method.generate = lambda *a: drawn.append(generate(*a)) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
    loss, told = method.student_loss(start, sigma, noise, None)
    (found,) = torch.autograd.grad(loss, drawn[0], retain_graph=True)
    noisy = drawn[0].detach().requires_grad_()
    logits = method.discriminator(noisy + sigma.unsqueeze(1) * noise, sigma)
    # softplus(-l), written out.
    gan = (1 + (-logits).exp()).log().mean()
    (of_gan,) = torch.autograd.grad(gan, noisy)
    expected = torch.tensor(slowly(method, start, sigma, noise)) / found.numel() + 1e-3 * of_gan
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert told["gan_loss"].item() == pytest.approx(gan.item(), rel=1e-5)
    assert (divergence == "reverse_kl") == (told["weight_std"].item() < 1e-6)


def test_nothing_flows_through_what_stands_still() -> None:
    method = disturb(method_of(divergence="kl", gan_weight=1.0, matching_weight=0.0))
    loss, _ = method.student_loss(*asked_of(method), None)
    found = torch.autograd.grad(loss, method.student.trained, allow_unused=True, retain_graph=True)
    assert all(g is not None and g.abs().max() > 0 for g in found)
    # Without the GAN neither the discriminator nor the fake score is reached.
    method = disturb(method_of(divergence="kl", gan_weight=1e-30))
    loss, _ = method.student_loss(*asked_of(method), None)
    others = [*method.fake.parameters(), *method._teacher.parameters()]
    others = [p for p in others if p.requires_grad]
    found = torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True)
    assert all(g is None for g in found)
    heads = torch.autograd.grad(loss, list(method.discriminator.parameters()))
    assert all(g.abs().max() < 1e-25 for g in heads)


def test_a_step_of_matching_moves_towards_the_teacher() -> None:
    """The fake score knows the student; where it and the teacher differ, samples follow the teacher."""
    method = method_of(divergence="reverse_kl", gan_weight=0.0, learning_rate=1e-2, scale=1.0)
    place = torch.tensor([2.0, 0.0])
    method._teacher.denoiser = Says(lambda x: x * 0 + place)
    method.fake.denoiser = Says(lambda x: x * 0 - place)
    start, sigma, noise = asked_of(method)

    def along() -> float:
        return method.generate(method.student, start, None)[:, 0].mean().item()

    before = along()
    for _ in range(10):
        method.student_opt.minimize(method.student_loss(start, sigma, noise, None)[0])
    assert along() > before + 0.05


def test_samples_that_the_student_draws_too_rarely_weigh_more_under_kl() -> None:
    """And less under neyman_chi2: what an inverted ratio would turn round."""
    weights = {}
    for divergence in ("kl", "neyman_chi2"):
        method = method_of(divergence=divergence, num_bins=1)
        # Half of the samples are where real ones are twice as frequent: logit log 2.
        logits = torch.tensor([math.log(2), -math.log(2)] * 4).unsqueeze(1)
        weights[divergence] = method.weights(logits, torch.ones(8))[0]
    # Ratios 2 and 1/2 over their mean 5/4; kl: over their mean again, 1.
    assert weights["kl"].tolist() == pytest.approx([1.6, 0.4] * 4, rel=1e-4)
    assert weights["neyman_chi2"].tolist() == pytest.approx([0.4, 1.6] * 4, rel=1e-4)


def test_guidance_of_the_teacher_alone() -> None:
    ways = []
    for scale in (1.0, 3.0):
        torch.manual_seed(0)  # The same model twice.
        method = disturb(
            method_of(mixture(**RING, classes=True), scale=scale, divergence="reverse_kl")
        )
        start, sigma, noise = asked_of(method)
        label = torch.tensor([0, 1, 2, 3] * 2)
        drawn: list[torch.Tensor] = []
        generate = method.generate
        method.generate = lambda *a, g=generate, d=drawn: d.append(g(*a)) or d[-1]  # type: ignore[method-assign,func-returns-value]
        loss, _ = method.student_loss(start, sigma, noise, label)
        ways.append(torch.autograd.grad(loss, drawn[0])[0])
        x = drawn[0].detach()
    noisy = x + sigma.unsqueeze(1) * noise
    with torch.no_grad():
        told, untold, fake = (
            denoiser(noisy, sigma, c)
            for denoiser, c in (
                (method._teacher.denoiser, label),
                (method._teacher.denoiser, torch.full((8,), -1)),
                (method.fake.denoiser, label),
            )
        )
    guided = untold + 3 * (told - untold)
    expected = (fake - guided) / (x - guided).abs().mean(1, keepdim=True)
    # What is left is the GAN's, which the two scales have in common.
    plain = (fake - told) / (x - told).abs().mean(1, keepdim=True)
    difference = (expected - plain) / x.numel()
    torch.testing.assert_close(ways[1] - ways[0], difference, rtol=1e-3, atol=1e-6)


# ---- bins


def test_means_of_bins_are_state_and_move_by_the_average() -> None:
    method = method_of(
        divergence="kl", ratio_average=0.5, noise="log_uniform", low_sigma=0.01, high_sigma=1.0
    )
    logits = torch.tensor([[math.log(2)], [math.log(4)]])
    weight, told = method.weights(logits, torch.tensor([0.02, 0.5]))
    # log 0.02 lies in the lower half of log 0.01 to log 1, log 0.5 in the upper.
    assert method.bin_means.tolist() == pytest.approx([1.5, 2.5])
    ratio = torch.tensor([2 / 1.5, 4 / 2.5])
    torch.testing.assert_close(weight, ratio / ratio.mean(), rtol=1e-5, atol=0)
    assert told["ratio"].item() == pytest.approx(3.0)
    assert torch.equal(method.state_dict()["bin_means"], method.bin_means)


def test_bins_of_time_are_those_of_the_training_steps() -> None:
    steps = learner("f_distill", bins="time", num_bins=2)
    table = steps._teacher.denoiser.sigmas.float()
    assert steps._place(table[[0, 250, 999]]).tolist() == pytest.approx(
        [0.0, 250.0, 999.0], abs=0.5
    )
    assert (steps._low_place, steps._high_place) == pytest.approx((0.0, 999.0), abs=0.5)
    plain = method_of(bins="time", noise="karras", low_sigma=0.01, high_sigma=2.0)
    assert plain._place(torch.tensor([0.3])).tolist() == pytest.approx([0.3])
    assert plain._high_place == pytest.approx(2.0)


@pytest.mark.parametrize("noise", ["model", "log_uniform", "karras"])
def test_noise_levels_stay_between_their_ends(noise: Any) -> None:
    method = method_of(noise=noise, low_sigma=0.01, high_sigma=2.0)
    sigma = method.noise_levels(4_000)
    low, high = (0.2 / 20, 20.0) if noise == "model" else (0.01, 2.0)
    assert low * 0.999 <= sigma.min() < low * 1.2 and high / 1.2 < sigma.max() <= high * 1.001
    middle = {
        "log_uniform": math.sqrt(0.01 * 2),
        "karras": ((0.01 ** (1 / 7) + 2 ** (1 / 7)) / 2) ** 7,
        "model": ((0.01 ** (1 / 7) + 20 ** (1 / 7)) / 2) ** 7,
    }[noise]
    assert sigma.median().item() == pytest.approx(middle, rel=0.2)


# ---- what moves


def test_each_update_moves_its_own() -> None:
    method = method_of(student_update_every=3, average=0.9)
    for step in range(1, 3):
        before = parameters_of(method)
        told = method.update(batch_of(), step)
        assert moved(method, before) == {"fake", "discriminator"}
        assert told.keys() == {"fake_loss", "discriminator_loss", "real_logit", "fake_logit"}
    before = parameters_of(method)
    told = method.update(batch_of(), 3)
    assert moved(method, before) == {"student", "average"}
    assert {"matching_loss", "gan_loss", "ratio", "clipped_share", "weight_std"} == told.keys()
    # The average goes half of the way while it is young (one update before: 1 / 3).
    for old, new, mean in zip(
        before["average"], method.student.parameters(), method.average.parameters(), strict=True
    ):
        torch.testing.assert_close(mean, old + (new - old) / 3, rtol=1e-4, atol=1e-6)


def test_without_a_gan_there_is_no_discriminator() -> None:
    method = method_of(divergence="reverse_kl", gan_weight=0.0, student_update_every=2)
    assert not hasattr(method, "discriminator")
    assert method.update(batch_of(), 1).keys() == {"fake_loss"}
    assert method.update(batch_of(), 2)["gan_loss"].item() == pytest.approx(math.log(2))


def test_a_gan_alone_ignores_the_teacher() -> None:
    method = disturb(method_of(matching_weight=0.0, gan_weight=1.0, divergence="js"))
    asked = asked_of(method)
    one, _ = method.student_loss(*asked, None)
    method._teacher.denoiser = Says(lambda x: x * 0)
    assert method.student_loss(*asked, None)[0].item() == one.item()


def test_the_fake_score_learns_what_the_student_draws() -> None:
    method = method_of(fake_learning_rate=1e-2)
    x = torch.full((64, 2), 0.5)
    sigma = torch.full((64,), 0.5)
    for _ in range(100):
        noisy = x + 0.5 * torch.randn_like(x)
        method.fake_opt.minimize(method.fake_loss(x, noisy, sigma, None))
    noisy = x + 0.5 * torch.randn_like(x)
    assert (method.fake.denoiser(noisy, sigma) - x).abs().mean() < 0.1
    assert (method._teacher.denoiser(noisy, sigma) - x).abs().mean() > 0.2


def test_the_fake_loss_by_hand() -> None:
    method = method_of(fake_weighting="epsilon")
    method.fake.denoiser = Says(lambda x: x)
    x, noisy = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    # Mean squares 5 and 2, over sigma squared 4 and 1.
    loss = method.fake_loss(x, noisy, torch.tensor([2.0, 1.0]), None)
    assert loss.item() == pytest.approx((5 / 4 + 2) / 2)


def test_the_fake_score_lowers_the_error_of_what_the_model_predicts() -> None:
    assert learner("f_distill")._weighting == "epsilon"
    assert learner("f_distill", fake_weighting="sample")._weighting == "sample"
    assert method_of()._weighting == "v_prediction"


def test_the_discriminator_prefers_real_samples_after_a_few_steps() -> None:
    method = method_of(discriminator_learning_rate=1e-2, r1_weight=0.1)
    torch.manual_seed(5)
    real, fake = torch.randn(128, 2) + 2, torch.randn(128, 2) - 2
    sigma = torch.full((128,), 0.5)
    first = method.discriminator_loss(real, fake, sigma, None)[1]
    assert first["discriminator_loss"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
    for _ in range(100):
        method.discriminator_opt.minimize(method.discriminator_loss(real, fake, sigma, None)[0])
    told = method.discriminator_loss(real, fake, sigma, None)[1]
    assert told["real_logit"] > 1 and told["fake_logit"] < -1
    assert told["discriminator_loss"] < 0.5


def test_the_penalty_is_that_of_nudged_real_samples() -> None:
    losses = []
    for weight in (0.0, 2.0):
        method = disturb(method_of(r1_weight=weight, r1_noise=0.5))
        torch.manual_seed(7)
        real, fake, sigma = torch.randn(8, 2), torch.randn(8, 2), torch.ones(8)
        torch.manual_seed(8)
        losses.append(method.discriminator_loss(real, fake, sigma, None)[0].item())
    torch.manual_seed(8)
    nudged = real + 0.5 * torch.randn(8, 2)
    with torch.no_grad():
        change = method.discriminator(real, sigma) - method.discriminator(nudged, sigma)
    assert losses[1] - losses[0] == pytest.approx(2 * (change**2).mean().item(), rel=1e-4)


# ---- real networks


def test_the_gan_reaches_the_student_through_the_frozen_features() -> None:
    method = disturb(learner("f_distill", matching_weight=0.0, gan_weight=1.0), 0.05)
    assert method._middle is method._teacher.denoiser.network.inner.mid_block
    start, sigma, noise = asked_of(method)
    label = torch.tensor([0, 1, 2, 3] * 2)
    loss, _ = method.student_loss(start, sigma, noise, label)
    found = torch.autograd.grad(loss, method.student.trained, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in found if g is not None) > 0
    assert all(not p.requires_grad for p in method._teacher.parameters())
    assert not method._middle._forward_hooks, "nothing keeps watching"


def test_a_transformer_is_read_in_its_middle() -> None:
    source = ModelConfig(source="esscher.images:tiny_dit", kwargs={"size": 4, "width": 16})
    method = method_of(load_diffusion(source, torch.device("cpu")), student_update_every=2)
    assert method.discriminator.last.in_features == 8
    label = torch.tensor([0, 1, 2, 3] * 2)
    for step in range(2):
        told = method.update(batch_of(8, 4, 4, 4, condition=label), step)
        assert all(value.isfinite() for value in told.values())


def test_labels_reach_the_head_of_plain_samples() -> None:
    method = disturb(method_of(mixture(**RING, classes=True)))
    x, sigma = torch.zeros(3, 2), torch.ones(3)
    logits = method.discriminator(x, sigma, torch.tensor([0, 1, -1]))
    assert len(set(logits.flatten().tolist())) == 3


def test_drawing_is_one_evaluation_at_the_first_level() -> None:
    method = disturb(method_of(mixture(**RING)))
    calls: list[tuple[int, float]] = []
    method.average.denoiser.register_forward_pre_hook(
        lambda _, told: calls.append((len(told[0]), float(told[1][0])))
    )
    asked = Asked(row=[0, 0], rows=[{}, {}], condition=None)
    one, two = method.draw(asked, [3, 4]).x, method.draw(asked, [3, 5]).x
    assert calls == [(2, 2.0)] * 2
    assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
    assert method_of(first_sigma=0.0)._first_sigma == pytest.approx(20.0)


@pytest.mark.parametrize("first_sigma", [0.0, 10.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_pipeline_that_is_saved_draws_in_one_step(
    tmp_path: Path, first_sigma: float, prediction: str
) -> None:
    """Images of diffusers by one step are those of the method, from the same noise."""
    diffusers: Any = pytest.importorskip("diffusers")
    kwargs: dict[str, Any] = {"size": 8, "channels": 1, "width": 8, "prediction": prediction}
    source = ModelConfig(source="esscher.images:tiny_unet", kwargs=kwargs)
    model = load_diffusion(source, torch.device("cpu"))
    method = method_of(model, first_sigma=first_sigma)
    drawn = method.draw(Asked(row=[0, 0], rows=[{}, {}], condition=None), [3, 4]).x
    ours = method.policy.decode(drawn)
    save_diffusion(method.policy, tmp_path / "model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    options = {"num_inference_steps": 1, "output_type": "pt", "generator": generator}
    theirs = pipeline(batch_size=2, **options).images
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-4)
    assert ours.std() > 0.05
    # And those of one step of the folder that is read again.
    again = load_diffusion(ModelConfig(source=str(tmp_path / "model")), torch.device("cpu"))
    torch.testing.assert_close(again.draw(None, [3, 4], steps=1), drawn, rtol=1e-4, atol=1e-4)
    assert again.levels(1).tolist() == pytest.approx([method._first_sigma, 0.0])


def test_the_one_step_begins_at_a_level_of_the_model() -> None:
    with pytest.raises(
        UserError, match=r"first_sigma must be 0 or in \[.*, 20\], the noise levels"
    ):
        method_of(first_sigma=21.0)
    kwargs: dict[str, Any] = {"size": 8, "channels": 1, "width": 8, "prediction": "flow"}
    flow = ModelConfig(source="esscher.images:tiny_unet", kwargs=kwargs)
    model = load_diffusion(flow, torch.device("cpu"))
    with pytest.raises(UserError, match="first_sigma must be 0 for a flow"):
        method_of(model, first_sigma=3.0)
    method_of(model, first_sigma=0.0)


def test_a_flow_is_weighted_and_cut_into_bins_as_one() -> None:
    kwargs: dict[str, Any] = {"size": 8, "channels": 1, "width": 8, "prediction": "flow"}
    source = ModelConfig(source="esscher.images:tiny_unet", kwargs=kwargs)
    model = load_diffusion(source, torch.device("cpu"))
    method = method_of(model, first_sigma=0.0, bins="time", num_bins=2)
    assert method._weighting == "flow_prediction"
    # t = sigma / (1 + sigma), in thousandths.
    sigma = torch.tensor([0.25, 1.0, 4.0])
    torch.testing.assert_close(method._place(sigma), torch.tensor([200.0, 500.0, 800.0]))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "js", "gan_weight": 0.0}, "gan_weight must be > 0"),
        ({"divergence": "reverse_kl", "gan_weight": 0.0, "matching_weight": 0.0}, "gan_weight"),
        ({"batch_size": 39}, "batch_size must be at least 4 num_bins = 40"),
        ({"ratio_low": 20.0}, "ratio_low must be in"),
        ({"low_sigma": 90.0}, "low_sigma must be in"),
        ({"student_update_every": 1}, "student_update_every"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"average": 1.0}, "average"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Config(**changes)
    Config(batch_size=8, ratio_average=0.5)
    Config(divergence="reverse_kl", gan_weight=0.0)


class Pictures(nn.Module):
    """A denoiser of images without a part that is called the middle."""

    shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> Any:
        return self.layer(x)


def test_models_without_what_is_needed_are_refused() -> None:
    levels = mixture(**RING).levels
    with pytest.raises(
        UserError, match="mid_block or transformer_blocks, and Pictures has neither"
    ):
        method_of(DiffusionModel(Pictures(), (1, 4, 4), levels))
    plain = method_of(
        DiffusionModel(Pictures(), (1, 4, 4), levels), divergence="reverse_kl", gan_weight=0.0
    )
    assert plain.update(batch_of(8, 1, 4, 4), 1)["fake_loss"].isfinite()
    with pytest.raises(UserError, match="has none"):
        method_of(DiffusionModel(lambda x, s, c=None: x, (2,), levels))
    with pytest.raises(UserError, match="scale must be 1, which is no guidance"):
        method_of(mixture(**RING), scale=2.0)


class Uncalled(Pictures):
    """A middle whose inner layer is called in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> Any:
        return self.mid_block[0](x)


def test_a_middle_that_is_not_called_is_refused() -> None:
    model = DiffusionModel(Uncalled(), (1, 4, 4), mixture(**RING).levels)
    with pytest.raises(
        UserError, match="middle block .Sequential. returns, and .* does not call it"
    ):
        method_of(model)


def test_adapters_are_refused() -> None:
    smoke = recipes("f_distill")["smoke"]().stages[-1].model
    model = load_diffusion(replace(smoke, lora_rank=2), torch.device("cpu"))
    with pytest.raises(UserError, match="lora_rank 0"):
        method_of(model)


# ---- the toy


def test_the_ring_is_what_the_mixture_draws() -> None:
    weights = (0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04)
    x = torch.from_numpy(ring()["sample"])
    assert x.shape == (50_000, 2)
    place = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    share = torch.bincount(place, minlength=8) / len(x)
    assert share.tolist() == pytest.approx(weights, abs=0.01)
    angle = place * (math.pi / 4)
    centred = x - 3 * torch.stack([angle.cos(), angle.sin()], -1)
    assert centred.std().item() == pytest.approx(0.25, abs=0.01)
    assert centred.mean().item() == pytest.approx(0.0, abs=0.01)


def test_the_mixture_has_as_many_hidden_layers_as_it_is_told() -> None:
    for depth in (1, 3):
        layers = mixture(depth=depth, width=8).denoiser.network
        assert [m.out_features for m in layers if isinstance(m, nn.Linear)] == [8] * depth + [2]
    with pytest.raises(UserError, match="depth must be >= 1"):
        mixture(depth=0)

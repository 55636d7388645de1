"""DRAGON: its steps against loops, which samples stand in which set, and what stays put."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from esscher.adapters.image_rewards import ImageReward
from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError
from esscher.functional.diffusion import Prediction
from esscher.images import mixture
from esscher.methods.diffusion.dragon import DRAGON, Config
from esscher.runtime.device import Runtime
from esscher.types import Asked
from support import RUNTIME

ASKS: list[tuple[torch.Tensor, ...]] = []


class Linear(nn.Module):
    """D(x, sigma, condition) = w x + condition, and what it was asked when gradients were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.3]))

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> Any:
        if torch.is_grad_enabled():
            ASKS.append((x.detach(), sigma, condition))
        return self.weight * x + condition.unsqueeze(-1)


class Along:
    """Of a sample: its first component; of a set, where `of_sets`: their mean."""

    def __init__(self, of_sets: bool = False, sign: float = 1.0):
        self.of_sets, self.sign, self.rows, self.sizes = of_sets, sign, [], []

    def __call__(self, x: Any, rows: Any) -> Any:
        assert not self.of_sets
        self.rows += list(rows)
        return self.sign * x[:, 0]

    def embed(self, x: Any, rows: Any) -> Any:
        assert self.of_sets
        self.rows += list(rows)
        return self.sign * x[:, :1]

    def of_set(self, embedding: Any) -> float:
        self.sizes.append(len(embedding))
        return embedding.double().mean().item()


class Indifferent(Along):
    def __call__(self, x: Any, rows: Any) -> Any:
        return torch.zeros(len(x))

    def of_set(self, embedding: Any) -> float:
        return 0.25


def linear() -> DiffusionModel:
    return DiffusionModel(Linear(), [2], lambda steps: torch.linspace(3, 0.5, steps + 1).double())


def method_of(
    model: DiffusionModel | None = None, *, of_sets: bool = False, **changes: Any
) -> DRAGON:
    torch.manual_seed(0)
    model = mixture(radius=3.0, std=0.4, width=16, classes=True) if model is None else model
    settings = {
        "beta": 20.0,
        "batch_size": 6,
        "inner_steps": 2,
        "draw_steps": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    }
    spec = ImageSpec(model=model, of_sets=of_sets)
    return DRAGON(Config(**settings | changes), spec, Runtime(RUNTIME))


def asked_of(count: int = 6) -> Asked:
    labels = [number % 8 for number in range(count)]
    rows: Any = [{"label": label} for label in labels]
    return Asked(row=labels, rows=rows, condition=torch.tensor(labels))


def weights(module: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def gradient_of(method: DRAGON, *given: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What a step reports, and the gradient that it hands to the optimiser."""
    found: list[list[torch.Tensor]] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    ASKS.clear()
    torch.manual_seed(3)
    told = method.descend(*given)
    return told, found[0]


# ---- a step


X = torch.tensor([[1.0, 0.2], [-0.5, 2.0], [0.3, 0.4], [1.5, -1.0], [0.0, 0.7], [-2.0, 0.1]])
CONDITION = torch.tensor([0.1, 0.1, -0.2, -0.2, 0.4, 0.4])
PAIRED = torch.tensor([[1, 0], [2, 3], [5, 4]])
HALVED = torch.tensor([[3, 0], [1, 4], [2, 5]])


def slowly(loss: str, weight: torch.Tensor, split: Any, beta: float) -> torch.Tensor:
    """The mean loss in loops, from what the denoiser was asked."""
    noisy, sigma, _ = (torch.cat(parts) for parts in zip(*ASKS, strict=True))
    columns = 1 if loss == "sft" else 2
    implicit: list[list[torch.Tensor]] = []
    errors: list[torch.Tensor] = []
    for row, places in enumerate(split.tolist()):
        implicit.append([])
        for column, place in enumerate(places[:columns]):
            at = row * columns + column
            noise = (noisy[at] - X[place]) / sigma[at]
            models = []
            for w in (weight, torch.tensor([0.5, 0.3])):
                estimate = w * noisy[at] + CONDITION[place]
                models.append((noise - (noisy[at] - estimate) / sigma[at]).square().sum() / 2)
            errors.append(models[0])
            implicit[-1].append(models[1] - models[0])
    if loss == "sft":
        return sum(errors) / len(errors)  # type: ignore[return-value]
    if loss == "dpo":
        terms = [-torch.log(torch.sigmoid(beta / 2 * (g[0] - g[1]))) for g in implicit]
        return torch.stack(terms).mean()
    baseline = max(torch.stack([x for g in implicit for x in g]).mean().item(), 0.0)
    terms = []
    for positive, negative in implicit:
        terms.append(1 - torch.sigmoid(beta * (positive - baseline)))
        terms.append(1 - torch.sigmoid(-beta * (negative - baseline)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
@pytest.mark.parametrize(
    ("loss", "pairing", "split"),
    [
        ("dpo", "paired", PAIRED),
        ("kto", "paired", PAIRED),
        ("kto", "unpaired", HALVED),
        ("sft", "paired", PAIRED),
        ("sft", "unpaired", HALVED),
    ],
)
@pytest.mark.parametrize("moved", [(0.4, 0.2), (0.55, 0.35)])
def test_loss_and_gradient_are_those_of_loops(
    loss: Any, pairing: Any, split: Any, micro_batch_size: int, moved: tuple[float, float]
) -> None:
    settings = {"beta": 3.0, "micro_batch_size": micro_batch_size, "pairing": pairing}
    method = method_of(linear(), loss=loss, **settings)
    method.model.denoiser.weight.data = torch.tensor(moved)
    told, (gradient,) = gradient_of(method, X, CONDITION, split)
    weight = torch.tensor(moved, requires_grad=True)
    expected = slowly(loss, weight, split, 3.0)
    expected.backward()
    assert told["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-4)
    assert gradient.abs().min() > 1e-3


def test_kto_compares_with_a_baseline_above_0_too() -> None:
    """The two models of the test above are better and worse than the reference on these samples."""
    means = []
    for moved in ((0.4, 0.2), (0.55, 0.35)):
        method = method_of(linear(), loss="kto")
        method.model.denoiser.weight.data = torch.tensor(moved)
        ASKS.clear()
        torch.manual_seed(3)
        sigma, noise = method.model.noise_levels(3), torch.randn(3, 2)
        ours, before = (
            method.errors(model, X, CONDITION, PAIRED, sigma, noise)
            for model in (method.model, method._reference)
        )
        means.append((before - ours).mean().item())
    assert min(means) < -0.01 and max(means) > 0.01


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_both_members_of_a_pair_stand_in_the_same_noise(loss: Any) -> None:
    gradient_of(method_of(linear(), loss=loss), X, CONDITION, PAIRED)
    ((noisy, sigma, condition),) = ASKS
    noise = (noisy - X[PAIRED.flatten()]) / sigma.unsqueeze(-1)
    torch.testing.assert_close(noise[0::2], noise[1::2], rtol=1e-4, atol=1e-5)
    assert torch.equal(sigma[0::2], sigma[1::2])
    assert torch.equal(condition, CONDITION[PAIRED.flatten()])
    assert len(set(sigma.tolist())) == 3
    assert (noise[0] - noise[2]).abs().max() > 0.1


def test_a_first_step_has_learned_nothing_yet() -> None:
    told, _ = gradient_of(method_of(linear()), X, CONDITION, PAIRED)
    assert told["loss"].item() == pytest.approx(math.log(2))
    assert told["implicit_accuracy"].item() == 0.5


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
def test_steps_denoise_the_positive_set_better(loss: Any) -> None:
    """Fails with the sign of a loss flipped."""
    method = method_of(loss=loss, learning_rate=3e-3)
    draw = torch.Generator().manual_seed(1)
    positive = torch.tensor([3.0, 0.0]) + 0.4 * torch.randn(16, 2, generator=draw)
    x = torch.stack([positive, -positive], 1).flatten(0, 1)
    labels, split = torch.full((32,), -1), torch.arange(32).view(16, 2)
    sigma, noise = torch.linspace(0.3, 4, 16), torch.randn(16, 2, generator=draw)

    def errors() -> Any:
        with torch.no_grad():
            return method.errors(method.model, x, labels, split, sigma, noise).mean(0)

    before = errors()
    told = [method.descend(x, labels, split) for _ in range(60)]
    change = errors() - before
    if loss != "kto":  # That may lose some of the positive set too, if the negative one loses more.
        assert change[0] < -0.005
    if loss != "sft":
        assert change[1] > change[0] + 0.01
        assert told[-1]["implicit_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("weighting", "factor"),
    [
        ("epsilon", lambda s: 1 / s**2),
        ("sample", lambda s: s**0),
        ("v_prediction", lambda s: (1 + s**2) / s**2),
    ],
)
def test_errors_are_means_of_what_is_weighted(weighting: Prediction, factor: Any) -> None:
    method = method_of(linear(), weighting=weighting)
    sigma, noise = torch.tensor([2.0]), torch.tensor([[1.0, -1.0]])
    found = method.errors(method.model, X, CONDITION, torch.tensor([[3]]), sigma, noise)
    # x = (1.5, -1) + 2 (1, -1) = (3.5, -3); D = (1.75, -0.9) - 0.2; D - x0 = (0.05, -0.1).
    assert found.item() == pytest.approx((0.05**2 + 0.1**2) / 2 * factor(2.0), rel=1e-4)


# ---- the two sets


def divided(method: DRAGON, reward: Any, count: int = 6) -> tuple[Any, Any, Any, Any, Any]:
    """What `improve` reports, and the samples, conditions and split that it would learn from."""
    given: list[Any] = []

    def descend(*what: Any) -> Any:
        given.extend(what)
        return {}

    method.descend = descend  # type: ignore[method-assign]
    torch.manual_seed(5)
    told, rewards = method.improve(asked_of(count), reward, 1)
    return told, rewards, *given[:3]


def test_of_each_pair_the_better_one() -> None:
    reward = Along()
    told, rewards, x, condition, split = divided(method_of(), reward)
    assert len(x) == 12 and torch.equal(rewards, x[:, 0])
    assert [row["label"] for row in reward.rows] == [k for k in range(6) for _ in range(2)]
    assert condition.tolist() == [k for k in range(6) for _ in range(2)]
    for pair, (positive, negative) in enumerate(split.tolist()):
        assert {positive, negative} == {2 * pair, 2 * pair + 1}
        assert x[positive, 0] > x[negative, 0]
    mean = {
        "positive_reward": x[split[:, 0], 0].mean(),
        "negative_reward": x[split[:, 1], 0].mean(),
    }
    for name, value in mean.items():
        assert told[name].item() == pytest.approx(value.item())
    assert told["reward_difference"].item() == pytest.approx(
        (mean["positive_reward"] - mean["negative_reward"]).item()
    )
    assert told["skipped"] == 0


def test_a_mean_as_reward_of_sets_gives_the_same_sets() -> None:
    told, _, x, _, split = divided(method_of(), Along())
    reward = Along(of_sets=True)
    told_of_set, rewards, same_x, _, split_of_set = divided(method_of(), reward)
    assert torch.equal(x, same_x)
    assert torch.equal(split, split_of_set)
    for name in ("positive_reward", "negative_reward", "reward_difference"):
        assert told_of_set[name].item() == pytest.approx(told[name].item(), rel=1e-4)
    # The reward of an iteration is that of the first sample of each pair.
    assert rewards.tolist() == pytest.approx([x[0::2, 0].mean().item()])
    assert told_of_set["swaps"] == int((split[:, 0] % 2).sum()) and set(reward.sizes) == {6}


def test_sets_may_take_several_passes() -> None:
    counts = []
    for passes in (1, 3):
        reward = Along(of_sets=True)
        divided(method_of(passes=passes), reward)
        counts.append(len(reward.sizes))
    # The second pass finds nothing, and is the last.
    assert counts[1] == counts[0] + 6


def test_the_better_half_of_all() -> None:
    _, _, x, _, split = divided(method_of(loss="kto", pairing="unpaired"), Along())
    assert sorted(split.flatten().tolist()) == list(range(12))
    assert x[split[:, 0], 0].min() > x[split[:, 1], 0].max()


@pytest.mark.parametrize(
    ("pairing", "of_sets"), [("paired", False), ("unpaired", False), ("paired", True)]
)
def test_lots_ignore_the_reward(pairing: Any, of_sets: bool) -> None:
    after, skipped, differences = [], [], []
    for sign in (1.0, -1.0):
        method = method_of(loss="kto", pairing=pairing, divided_by="lot")
        torch.manual_seed(2)
        for step in range(1, 4):
            told, _ = method.improve(asked_of(), Along(of_sets, sign), step)
            skipped.append(told["skipped"].item())
            differences.append(told["reward_difference"].item())
        after.append(weights(method.model))
    assert same(*after)
    # Nor are those draws left out that happen to be worse.
    assert skipped == [0.0] * 6
    assert differences[:3] == pytest.approx([-value for value in differences[3:]])
    assert min(differences) < 0 < max(differences)


def test_lots_hold_every_sample_once() -> None:
    for pairing in ("paired", "unpaired"):
        method = method_of(loss="kto", pairing=pairing, divided_by="lot")
        _, _, _, _, split = divided(method, Along())
        assert sorted(split.flatten().tolist()) == list(range(12))


# ---- an iteration


@pytest.mark.parametrize("of_sets", [False, True])
def test_without_a_gain_nothing_moves(of_sets: bool) -> None:
    method = method_of(average=0.5, weight_decay=0.1)
    before, states = weights(method.model), weights(method.average)
    told, _ = method.improve(asked_of(), Indifferent(of_sets), 1)
    assert told["skipped"] == 1 and told["reward_difference"] == 0 and "loss" not in told
    assert same(weights(method.model), before) and same(weights(method.average), states)
    assert method.opt.num_steps == 0
    told, _ = method.improve(asked_of(), Along(of_sets), 2)
    assert told["skipped"] == 0 and told["loss"].isfinite()
    assert not same(weights(method.model), before)
    assert method.opt.num_steps == 2


def test_the_reference_stays_the_model_of_before() -> None:
    method = method_of()
    before = weights(method.model)
    for step in range(1, 4):
        method.improve(asked_of(), Along(), step)
    assert same(weights(method._reference), before)
    assert not same(weights(method.model), before)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_how_samples_are_cut_does_not_matter(micro_batch_size: int) -> None:
    after = []
    for size in (0, micro_batch_size):
        method = method_of(loss="kto", micro_batch_size=size)
        torch.manual_seed(2)
        _, rewards = method.improve(asked_of(), Along(), 1)
        after.append([rewards, *weights(method.model)])
    for one, two in zip(*after, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_from_is_the_average() -> None:
    method = method_of(average=0.75, inner_steps=1)
    before = weights(method.model)
    method.improve(asked_of(), Along(), 1)
    for ours, old, new in zip(weights(method.average), before, weights(method.model), strict=True):
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * new)
    assert method.policy is method.average
    asked, options = asked_of(), {"steps": 4}
    drawn = method.draw(asked, range(6)).x
    assert torch.equal(drawn, method.average.draw(asked.condition, range(6), **options))
    assert not torch.equal(drawn, method.model.draw(asked.condition, range(6), **options))
    newest = method_of(average=0.0)
    assert newest.policy is newest.model


def test_iterations_learn_from_samples_of_the_newest_weights() -> None:
    method = method_of(average=0.9)
    method.model.denoiser.network[-1].bias.data += 1.0
    _, _, x, condition, _ = divided(method, Along())
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (12,)).tolist()
    assert torch.equal(x, method.model.draw(condition, seeds, steps=4))
    assert not torch.equal(x, method.average.draw(condition, seeds, steps=4))


def test_weights_decay_and_gradients_are_cut() -> None:
    """AdamW: a first step is the sign of the gradient, unless its epsilon of 1e-8 is felt."""
    moved = []
    for changes in ({}, {"weight_decay": 0.5}, {"max_grad_norm": 1e-9}):
        method = method_of(linear(), learning_rate=0.01, **changes)
        before = method.model.denoiser.weight.detach().clone()
        torch.manual_seed(3)
        method.descend(X, CONDITION, PAIRED)
        moved.append(method.model.denoiser.weight.detach() - before)
    torch.testing.assert_close(moved[0].abs(), torch.full((2,), 0.01))
    torch.testing.assert_close(moved[1] - moved[0], -0.01 * 0.5 * before)
    assert moved[2].abs().max() < 0.002


def test_drawing_is_guided_and_by_the_solver_asked_for() -> None:
    method = method_of(scale=3.0, solver="heun", draw_steps=5)
    _, _, x, condition, _ = divided(method, Along())
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (12,)).tolist()
    expected = method.model.draw(condition, seeds, steps=5, scale=3.0, solver="heun")
    assert torch.equal(x, expected)
    assert len({tuple(row) for row in x.tolist()}) == 12


@pytest.mark.parametrize("of_sets", [False, True])
@pytest.mark.parametrize(("loss", "beta"), [("dpo", 10.0), ("kto", 20.0), ("sft", 1.0)])
def test_samples_move_up_the_reward(of_sets: bool, loss: Any, beta: float) -> None:
    """Eight Gaussians on a ring of radius 3, and the first component is to be large."""
    model = mixture(radius=3.0, std=0.4, width=32)
    settings = {"batch_size": 32, "inner_steps": 4, "learning_rate": 3e-3, "draw_steps": 10}
    method = method_of(model, loss=loss, beta=beta, **settings)
    asked = Asked(row=[0] * 32, rows=[{}] * 32, condition=None)

    def height() -> float:
        return method.model.draw(None, range(200), steps=10)[:, 0].mean().item()

    before = height()
    torch.manual_seed(1)
    for step in range(1, 16):
        method.improve(asked, Along(of_sets), step)
    assert height() > before + 0.5


# ---- what is refused


def test_sets_of_one_sample_are_refused_before_work_starts() -> None:
    with pytest.raises(UserError, match="batch_size must be >= 2 with a reward of sets.* got 1"):
        method_of(of_sets=True, batch_size=1)
    method_of(batch_size=1).improve(asked_of(1), Along(), 1)


def test_halves_of_sets_are_refused_before_work_starts() -> None:
    with pytest.raises(UserError, match="pairing must be paired with a reward of sets"):
        method_of(of_sets=True, loss="kto", pairing="unpaired")


def test_more_steps_than_the_model_takes_are_refused_before_work_starts() -> None:
    model = DiffusionModel(Linear(), [2], torch.tensor([3.0, 1.0, 0.0]))
    with pytest.raises(
        UserError, match="draw_steps must be 2, the steps that this model takes, got"
    ):
        method_of(model, draw_steps=4)
    method_of(model, draw_steps=2)


def test_dpo_without_pairs_is_refused() -> None:
    with pytest.raises(UserError, match="pairing must be paired with loss dpo"):
        Config(pairing="unpaired")
    Config(pairing="unpaired", loss="kto")


def test_guidance_of_a_model_without_conditions_is_refused() -> None:
    with pytest.raises(UserError, match="scale must be 1, which is no guidance, got"):
        method_of(mixture(), scale=2.0)


def test_a_reward_that_is_not_finite_ends_the_run() -> None:
    reward = ImageReward(f"{__name__}:broken", {}, lambda x: x)
    method = method_of()
    before = weights(method.model)
    with pytest.raises(UserError, match="returned nan for an image"):
        method.improve(asked_of(), reward, 1)
    assert same(weights(method.model), before)


def broken(images: Any, rows: Any) -> Any:
    return torch.full((len(images),), math.nan)

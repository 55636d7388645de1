"""B2-DiffuRL: schedule, selection and normalisation by hand, its loss and gradient against plain loops
over samples and steps, and what branches share.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from esscher.adapters.diffusers import load_diffusion
from esscher.denoising_chains import ETA, LuckAndSkill, chain, luck_and_state
from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError
from esscher.experience.conditions import Wanted
from esscher.experiment import ModelConfig
from esscher.images import mixture
from esscher.methods.diffusion.b2_diffurl import (
    DDPO,
    B2DiffuRL,
    Config,
    Paths,
    _of_chain,
    contrast,
    suffix_length,
)
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.diffusion import DiffusionWorld
from esscher.types import Asked

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
SMALL: dict[str, Any] = {
    "draw_batch_size": 0,
    "minibatch_size": 1_000,
    "micro_batch_size": 0,
    "weight_decay": 0.0,
    "num_stages": 1,
    "epochs": 1,
}


class Constant(nn.Module):
    """The same clean estimate of every sample."""

    def __init__(self, size: int):
        super().__init__()
        self.estimate = nn.Parameter(torch.zeros(size))

    def forward(self, x: Any, sigma: Any, condition: Any = None) -> Any:
        return self.estimate.expand_as(x) + 0 * x


def constant(size: int = 1, levels: Any = (2.0, 1.0)) -> DiffusionModel:
    """Between noise levels 2 and 1 with all noise std^2 = 3/4, and the mean is 3/4 D + 1/4 x."""
    table = torch.tensor(levels, dtype=torch.float64)
    return DiffusionModel(Constant(size), [size], lambda steps: table)


def method_of(model: DiffusionModel, rows: int = 1, **changes: Any) -> B2DiffuRL:
    steps = changes.get("draw_steps", 1)
    settings = (
        SMALL | {"first_suffix": steps, "last_suffix": steps, "scale": 1.0} | {"draw_steps": 1}
    )
    torch.manual_seed(0)
    config = Config(**(settings | {"batch_size": rows} | changes))
    method = B2DiffuRL(config, ImageSpec(model=model), Runtime(RUNTIME))
    method.experience(wanted_of(model, rows))
    return method


def wanted_of(model: DiffusionModel, rows: int) -> Wanted:
    return Wanted(name="rows", rows=[{"label": k} for k in range(rows)], encode=model.encode)


def asked_of(model: DiffusionModel, rows: list[int]) -> Asked:
    return wanted_of(model, max(rows) + 1).asked(rows)


class Told:
    """A reward that says what it was given, in turn."""

    of_sets = False

    def __init__(self, values: Any):
        self.values = torch.tensor(values)

    def __call__(self, x: Any, rows: Any) -> Any:
        now, self.values = self.values.split([len(x), len(self.values) - len(x)])
        return now

    def embed(self, x: Any, rows: Any) -> Any:
        raise NotImplementedError

    def of_set(self, embedding: Any) -> float:
        raise NotImplementedError


def gradient_of(method: B2DiffuRL, work: Any) -> list[torch.Tensor]:
    """What an optimiser's step is given."""
    found: list[Any] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    work()
    (gradient,) = found
    return gradient


# ---- schedule


def test_the_suffix_grows_when_the_authors_script_says() -> None:
    lengths = [suffix_length(j, 14, 20, 100) for j in range(100)]
    assert lengths[0] == 14 and lengths[-1] == 20
    changes = {
        j: (lengths[j - 1], lengths[j]) for j in range(1, 100) if lengths[j] > lengths[j - 1]
    }
    assert changes == {
        15: (14, 15),
        29: (15, 16),
        43: (16, 17),
        58: (17, 18),
        72: (18, 19),
        86: (19, 20),
    }
    assert suffix_length(100, 14, 20, 100) == suffix_length(10_000, 14, 20, 100) == 20
    assert {suffix_length(j, 20, 20, 7) for j in range(9)} == {20}
    # Fewer stages than lengths: the formula, and the last length from J on.
    assert [suffix_length(j, 14, 20, 3) for j in range(5)] == [14, 16, 18, 20, 20]


@pytest.mark.parametrize(("step", "suffix"), [(1, 2), (2, 2), (3, 3), (5, 4), (9, 4)])
def test_stage_0_is_iteration_1(step: int, suffix: int) -> None:
    method = method_of(chain(steps=4), **four_steps(first_suffix=2, num_stages=6))
    told, _ = method.improve(asked_of(method.model, [0]), Told([1.0, 2.0]), step)
    assert told["suffix"].item() == suffix


def four_steps(**changes: Any) -> dict[str, Any]:
    settings = {"draw_steps": 4, "first_suffix": 4, "last_suffix": 4, "eta": ETA, "branches": 2}
    return settings | changes


# ---- selection


def test_best_and_worst_beyond_their_thresholds() -> None:
    table = [
        ([0.5, 0.0, -0.5], [1, 0, 0]),  # >= keeps a best at its threshold, < drops a worst at it.
        ([0.4, 0.0, -0.6], [0, 0, 1]),
        ([0.9, 2.0, 1.0], [0, 1, 0]),  # The worst is not bad.
        ([-0.9, -2.0, -1.0], [0, 1, 0]),  # The best is not good.
        ([-3.0, 0.7, 3.0], [1, 0, 1]),
        ([0.4, 0.1, -0.4], [0, 0, 0]),
        ([1.0, 1.0, 1.0], [1, 0, 0]),
    ]
    forks, expected = (torch.tensor(column) for column in zip(*table, strict=True))
    assert torch.equal(contrast(forks, 0.5, -0.5), expected.bool())
    alone = contrast(torch.tensor([[0.5], [0.2], [-0.5], [-0.6]]), 0.5, -0.5)
    assert alone.flatten().tolist() == [True, False, False, True]


def test_all_are_kept_where_all_are_asked_for() -> None:
    method = method_of(constant(), branches=3, selection="all")
    assert method.selected(torch.tensor([0.1, -0.1, 3.0])).tolist() == [True] * 3


# ---- rating


def test_rewards_are_normalised_by_prompt_with_those_of_stages_before() -> None:
    method = method_of(constant(), rows=3, history=1, branches=2)
    first = method.advantages(torch.tensor([1.0, 3.0, 10.0, 10.0]), [0, 2], 1)
    # Prompt 0: mean 2, deviation sqrt(2); prompt 2: nothing to tell.
    assert first.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2), 0, 0])
    # Prompt 0: 1, 3, 5, 7 have mean 4 and deviation sqrt(20 / 3); prompt 1 has no past.
    second = method.advantages(torch.tensor([0.0, 4.0, 5.0, 7.0]), [1, 0], 2)
    root = math.sqrt(20 / 3)
    assert second.tolist() == pytest.approx(
        [-1 / math.sqrt(2), 1 / math.sqrt(2), 1 / root, 3 / root]
    )
    # Only the stage before counts: 5, 7, 9, 11 for prompt 0, and for prompt 2 nothing but now.
    third = method.advantages(torch.tensor([9.0, 11.0, 0.0, 2.0]), [0, 2], 3)
    assert third.tolist() == pytest.approx(
        [1 / root, 3 / root, -1 / math.sqrt(2), 1 / math.sqrt(2)]
    )


def test_without_history_each_stage_stands_alone() -> None:
    method = method_of(constant(), history=0, branches=2)
    for step in (1, 2):
        told = method.advantages(torch.tensor([1.0, 3.0]) * step, [0], step)
        assert told.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])


def test_copies_of_a_prompt_are_rated_together_and_forks_alone() -> None:
    rewards = torch.tensor([0.0, 2.0, 100.0, 102.0])
    method = method_of(constant(), branches=2, copies=2, history=0)
    # Mean 51; squared deviations 51^2, 49^2, 49^2, 51^2 over 3.
    std = math.sqrt((2 * 51**2 + 2 * 49**2) / 3)
    expected = [-51 / std, -49 / std, 49 / std, 51 / std]
    assert method.advantages(rewards, [0], 1).tolist() == pytest.approx(expected)
    method = method_of(constant(), branches=2, copies=2, advantage="branch")
    half = 1 / math.sqrt(2)
    assert method.advantages(rewards, [0], 1).tolist() == pytest.approx([-half, half, -half, half])


@pytest.mark.parametrize("value", [0.1, 1e6 / 3])
def test_a_prompt_of_equal_rewards_or_a_single_one_tells_nothing(value: float) -> None:
    method = method_of(constant(), rows=2, branches=1, history=1, selection="all")
    for step in (1, 2, 3):
        told = method.advantages(torch.full((2,), value), [0, 1], step)
        assert told.tolist() == [0.0, 0.0]
        assert not method.selected(told).any()


def test_advantages_are_clipped_and_weighted_by_their_sign() -> None:
    model = constant()
    method = method_of(model, branches=4, positive_weight=2.0, negative_weight=0.5)
    found, _ = method.drawn(asked_of(model, [0]), Told([0.0] * 4), 1)
    paths = method.paths(asked_of(model, [0]), found, torch.tensor([7.0, 1.0, -1.0, -9.0]))
    assert paths.advantage.tolist() == [10.0, 2.0, -0.5, -2.5]


# ---- the loss by hand


def step_paths(ratios: Any, advantages: Any) -> Paths:
    """Steps from 0 at noise level 2 to 1 at level 1, of a model that says 0: mean 0, std^2 3/4."""
    logp = Normal(0.0, math.sqrt(0.75)).log_prob(torch.tensor(1.0))
    count = len(ratios)
    return Paths(
        x=torch.tensor([0.0, 1.0]).view(1, 2, 1).repeat(count, 1, 1),
        condition=None,
        old_logp=(logp - torch.tensor(ratios).log()).unsqueeze(1),
        advantage=torch.tensor(advantages),
    )


CASES: list[Any] = [
    # ratio, A, max(-A ratio, -A clip(ratio, 0.9, 1.1)), whether it has a gradient, DPOK's, and its.
    (1.05, 2.0, -2.1, True, -2.1, True),
    (1.3, 2.0, -2.2, False, -2.2, False),
    (0.5, 2.0, -1.0, True, -1.8, False),
    (1.3, -1.0, 1.3, True, 1.1, False),
    (0.8, -1.0, 0.9, False, 0.9, False),
    (1.0, -3.0, 3.0, True, 3.0, True),
]


@pytest.mark.parametrize("algorithm", ["ddpo", "dpok"])
def test_loss_by_hand(algorithm: str) -> None:
    method = method_of(constant(), algorithm=algorithm, clip=0.1)
    ratios, advantages, ddpo, moves, dpok, pulled = zip(*CASES, strict=True)
    paths = step_paths(ratios, advantages)
    row, step = torch.arange(len(CASES)), torch.zeros(len(CASES), dtype=torch.long)
    terms, outside, distance = method.terms(paths, row, step, torch.tensor([2.0, 1.0]))
    expected = ddpo if algorithm == "ddpo" else dpok
    assert terms.tolist() == pytest.approx(expected, rel=1e-5)
    assert outside.tolist() == [abs(ratio - 1) > 0.1 for ratio in ratios]
    assert distance.tolist() == [0.0] * len(CASES)  # The model is still that of before.
    for term, ratio, advantage, alive in zip(
        terms, ratios, advantages, moves if algorithm == "ddpo" else pulled, strict=True
    ):
        (slope,) = torch.autograd.grad(term, method.model.trained, retain_graph=True)
        # d logp / d estimate = (1 - mean) / std^2 * 3/4 = 1.
        assert slope.item() == pytest.approx(-advantage * ratio * alive, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dpoks_pull_by_hand(reduction: Any) -> None:
    method = method_of(
        constant(2), algorithm="dpok", kl_weight=0.5, reduction=reduction, advantage_clip=1.0
    )
    with torch.no_grad():
        method.model.denoiser.estimate.copy_(torch.tensor([2.0, 4.0]))
    paths = Paths(
        x=torch.zeros(1, 2, 2),
        condition=None,
        old_logp=torch.zeros(1, 1),
        advantage=torch.zeros(1),
    )
    one = torch.zeros(1, dtype=torch.long)
    terms, _, distance = method.terms(paths, one, one, torch.tensor([2.0, 1.0]))
    # Means 1.5 and 3 against 0: (2.25 + 9) / (2 * 0.75) = 7.5 nats over both components.
    expected = 7.5 if reduction == "sum" else 3.75
    assert distance.item() == pytest.approx(expected, rel=1e-5)
    assert terms.item() == pytest.approx(0.5 * expected, rel=1e-5)
    (slope,) = torch.autograd.grad(terms.sum(), method.model.trained)
    assert (slope > 0).all()  # Down the gradient is back towards 0.


@pytest.mark.parametrize("algorithm", ["ddpo", "dpok"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_what_was_good_becomes_likelier_and_what_was_bad_less(
    algorithm: str, advantage: float
) -> None:
    method = method_of(constant(), algorithm=algorithm, learning_rate=1e-2)
    method.learn(step_paths([1.0], [advantage]), torch.tensor([2.0, 1.0]))
    # The step went to 1, the mean was 0.
    assert method.model.denoiser.estimate.item() == pytest.approx(1e-2 * advantage, rel=1e-3)


# ---- against plain loops


def small_mixture() -> DiffusionModel:
    torch.manual_seed(3)
    model = mixture(components=4, width=8, classes=True)
    with torch.no_grad():
        for parameter in model.trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def plain_logp(model: DiffusionModel, x: Any, next_x: Any, sigma: Any, following: Any, **how: Any):
    """Mean log-probability of a sample's components in one guided step, as the paper writes it."""

    def ask(label: int) -> Any:
        return model.denoiser(x[None], sigma[None], torch.tensor([label]))[0].double()

    conditional, unconditional = ask(how["label"]), ask(-1)
    denoised = unconditional + how["scale"] * (conditional - unconditional)
    x, next_x, sigma, following = (value.double() for value in (x, next_x, sigma, following))
    # In z = x / sqrt(1 + sigma^2): DDIM with abar = 1 / (1 + sigma^2).
    abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
    noise = (x - denoised) / sigma
    std = how["eta"] * torch.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    mean = abar_next.sqrt() * denoised + torch.sqrt(1 - abar_next - std**2) * noise
    z = abar_next.sqrt() * next_x
    # The density of x is that of z times sqrt(abar_next).
    return (Normal(mean, std).log_prob(z) + 0.5 * abar_next.log()).mean()


LOOPS: dict[str, Any] = {
    "ddpo": {"first_suffix": 4, "copies": 3, **DDPO},
    "b2": {"first_suffix": 3, "branches": 3, "positive_threshold": 0.2, "negative_threshold": -0.2},
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("micro_batch_size", [0, 1, 4])
def test_gradient_is_that_of_plain_loops(kind: str, micro_batch_size: int) -> None:
    model = small_mixture()
    method = method_of(
        model,
        rows=2,
        **({"draw_steps": 4, "last_suffix": 4, "scale": 1.5, "eta": 0.8} | LOOPS[kind]),
        micro_batch_size=micro_batch_size,
        clip=0.9,
        num_stages=2,
    )
    cfg, asked = method.cfg, asked_of(model, [1, 0])
    told, rewards = method.drawn(asked, Told(torch.randn(6).tolist()), cfg.first_suffix)
    advantage = method.advantages(rewards, asked.row, 1)
    kept = method.selected(advantage).nonzero().squeeze(-1)
    assert (len(kept) == 6) == (kind == "ddpo") and len(kept) >= 2
    with torch.no_grad():  # Off policy, so that ratios are not 1.
        for parameter in model.trained:
            parameter.add_(0.005 * torch.randn_like(parameter))
    paths = method.paths(asked, told, advantage).index(kept)
    ours = gradient_of(method, lambda: method.learn(paths, told.sigma))
    labels, losses, ratios = [1, 1, 1, 0, 0, 0], [], []
    for sample in kept.tolist():
        for step in range(cfg.first_suffix - 1):  # The last step is no draw.
            ends = told.x[step, sample], told.x[step + 1, sample]
            levels = told.sigma[step], told.sigma[step + 1]
            how = {"label": labels[sample], "scale": 1.5, "eta": 0.8}
            ratio = (plain_logp(model, *ends, *levels, **how) - told.logp[step, sample]).exp()
            losses.append(-advantage[sample] * ratio)  # None lies outside the clip.
            ratios.append(ratio.item())
    assert all(0.1 < r < 1.9 for r in ratios) and max(abs(r - 1) for r in ratios) > 1e-3
    plain = torch.autograd.grad(torch.stack(losses).mean(), model.trained)
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-5)
    assert max(g.abs().max().item() for g in ours) > 1e-3


def test_gradient_of_the_exact_chain_in_closed_form() -> None:
    model = chain(steps=4)
    method = method_of(model, **four_steps(branches=1, copies=64, selection="all", history=0))
    told, _ = method.drawn(asked_of(model, [0]), Told([0.0] * 64), 4)
    skill = LuckAndSkill(luck=0.0)
    advantage = method.advantages(skill(model.decode(told.x[-1]), [{}] * 64), [0], 1)
    paths = method.paths(asked_of(model, [0]), told, advantage)
    (ours,) = gradient_of(method, lambda: method.learn(paths, told.sigma))
    # d logp / d delta_k = n_k / 0.3, and 0.3 n_k is what the step moved by.
    start = 16 * (told.x[0] / 16).round()
    moved = torch.diff(torch.stack([start, *told.x[1:]]), dim=0).squeeze(-1)
    expected = -(advantage * moved).mean(1) / 0.09 / 4
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3)
    # R rises with v below 2: all steps should go up.
    assert (expected < 0).all()


def test_first_ratios_are_1_and_log_probabilities_a_mean_over_components() -> None:
    model = small_mixture()
    method = method_of(model, rows=2, draw_steps=4, last_suffix=4, scale=1.5, branches=2)
    told, _ = method.drawn(asked_of(model, [0, 1]), Told([0.0] * 4), 4)
    for sample, label in enumerate([0, 0, 1, 1]):
        for step in range(3):
            ends = told.x[step, sample], told.x[step + 1, sample]
            how = {"label": label, "scale": 1.5, "eta": 1.0}
            logp = plain_logp(model, *ends, told.sigma[step], told.sigma[step + 1], **how)
            assert told.logp[step, sample].item() == pytest.approx(logp.item(), rel=1e-3, abs=1e-4)
    assert told.logp[3].tolist() == [0.0] * 4  # To noise level 0: no draw.
    paths = method.paths(asked_of(model, [0, 1]), told, torch.ones(4))
    assert paths.old_logp.shape == (4, 3)
    told = method.learn(paths, told.sigma)
    assert told["loss"].item() == pytest.approx(-1, rel=1e-5)
    assert told["outside_clip"].item() == 0


# ---- what branches share


@pytest.mark.parametrize(("suffix", "draw_batch_size"), [(2, 0), (2, 1), (4, 0)])
def test_branches_share_what_comes_before_their_fork(suffix: int, draw_batch_size: int) -> None:
    model = small_mixture()
    method = method_of(
        model,
        rows=2,
        draw_steps=4,
        last_suffix=4,
        branches=3,
        copies=2,
        draw_batch_size=draw_batch_size,
    )
    asks: list[int] = []
    denoise = method._denoise
    method._denoise = lambda x, *rest: (asks.append(len(x)), denoise(x, *rest))[1]
    told, _ = method.drawn(asked_of(model, [0, 1]), Told([0.0] * 12), suffix)
    forks = told.x.view(suffix + 1, 4, 3, 2)
    assert torch.equal(forks[0], forks[0, :, :1].expand_as(forks[0]))
    assert len(forks[0, :, 0].unique(dim=0)) == 4
    for level in forks[1:]:
        assert len(level.flatten(0, 1).unique(dim=0)) == 12
    assert sum(asks) == (4 - suffix) * 4 + suffix * 12


def test_each_sample_is_judged_by_its_own_row() -> None:
    model = small_mixture()
    method = method_of(
        model, rows=3, branches=2, copies=2, draw_batch_size=3, draw_steps=2, last_suffix=2
    )
    labels: list[int] = []

    class Noting(Told):
        def __call__(self, x: Any, rows: Any) -> Any:
            labels.extend(row["label"] for row in rows)
            return super().__call__(x, rows)

    method.drawn(asked_of(model, [2, 0, 1]), Noting([0.0] * 12), 2)
    assert labels == [2] * 4 + [0] * 4 + [1] * 4


# ---- a stage


def parameters_of(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0, 0.1, 0.2, 0.3]])
def test_a_stage_that_selects_nothing_is_skipped_and_says_so(rewards: list[float]) -> None:
    model = chain(steps=4)
    extreme = {"positive_threshold": 50.0, "negative_threshold": -50.0}
    method = method_of(model, **four_steps(branches=4, **extreme), learning_rate=0.1)
    before = parameters_of(model)
    told, judged = method.improve(asked_of(model, [0]), Told(rewards), 1)
    assert told["skipped"].item() == 1 and told["kept"].item() == 0
    assert judged.tolist() == pytest.approx(rewards)
    assert all(torch.equal(p, q) for p, q in zip(before, parameters_of(model), strict=True))
    assert method.opt.num_steps.item() == 0
    # What was rated is remembered all the same.
    assert method.past[0, 0, 0].item() == 4


@pytest.mark.parametrize(
    ("count", "size", "steps"), [(5, 2, 3), (5, 5, 1), (1, 64, 1), (6, 4, 2), (5, 1, 5)]
)
def test_no_sample_is_dropped_whatever_the_minibatch(count: int, size: int, steps: int) -> None:
    method = method_of(constant(), minibatch_size=size, epochs=2)
    sizes: list[list[int]] = []
    descend = method.descend
    method.descend = lambda paths, rows, sigma, count: (  # type: ignore[method-assign]
        sizes.append(rows.tolist()),
        descend(paths, rows, sigma, count),
    )[1]
    method.learn(step_paths([1.0] * count, [1.0] * count), torch.tensor([2.0, 1.0]))
    assert len(sizes) == 2 * steps and method.opt.num_steps.item() == 2 * steps
    for epoch in (sizes[:steps], sizes[steps:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(count))
        lengths = [len(rows) for rows in epoch]
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("algorithm", ["ddpo", "dpok"])
def test_only_the_policy_moves(algorithm: str) -> None:
    model = small_mixture()
    method = method_of(
        model,
        rows=2,
        algorithm=algorithm,
        draw_steps=3,
        last_suffix=3,
        branches=3,
        learning_rate=0.01,
    )
    fixed, moving = parameters_of(method._reference), parameters_of(model)
    for step in (1, 2):
        method.improve(asked_of(model, [0, 1]), Told(torch.randn(6).tolist()), step)
    assert all(
        torch.equal(p, q) for p, q in zip(fixed, method._reference.parameters(), strict=True)
    )
    assert all(not torch.equal(p, q) for p, q in zip(moving, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_adapters_learn_and_nothing_else_does() -> None:
    config = ModelConfig(source="esscher.images:tiny_stable_diffusion", lora_rank=2)
    model = load_diffusion(config, torch.device("cpu"))
    method = method_of(
        model,
        rows=1,
        algorithm="dpok",
        draw_steps=2,
        last_suffix=2,
        scale=2.0,
        branches=2,
        epochs=2,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    encoded = model.encode([{"prompt": "a cat"}])
    asked = Asked(row=[0], rows=[{"prompt": "a cat"}], condition=encoded)
    told, _ = method.improve(asked, Told([0.0, 1.0]), 1)
    assert told["step_kl"].item() > 0  # In the second epoch it has left the model before.
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert not moved or "lora_" in name
    assert any(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_B" in name
    )
    last = model.levels(2)[-1]
    assert last > 0 and told["outside_clip"].isfinite()  # Here the last step is a draw too.


def test_the_past_is_saved_and_opened_without_rows() -> None:
    model = constant()
    method = method_of(model, rows=3, branches=2)
    method.advantages(torch.tensor([1.0, 3.0]), [1], 1)
    state = {name: copy.deepcopy(value) for name, value in method.state_dict().items()}
    other = B2DiffuRL(method.cfg, ImageSpec(model=constant()), Runtime(RUNTIME))
    other.load_state_dict(state)
    assert torch.equal(other.past, method.past) and other.past.shape == (3, 8, 3)
    assert other.past[1, 0].tolist() == [2.0, 2.0, 2.0]


def test_rows_of_one_prompt_are_rated_together() -> None:
    """1, 3, 11 and 13 of one prompt in two rows have mean 7 and deviation sqrt(104 / 3)."""
    model = constant()
    model.columns = ("prompt",)
    method = method_of(model, rows=2, branches=2, history=1)
    rows = [{"prompt": "a", "number": 0}, {"prompt": "b"}, {"prompt": "a", "number": 1}]
    method.experience(Wanted(name="rows", rows=rows, encode=model.encode))
    assert method._prompt_of == [0, 1, 0] and len(method.past) == 2
    told = method.advantages(torch.tensor([1.0, 3.0, 11.0, 13.0]), [0, 0], 1)
    expected = [value / (104 / 3) ** 0.5 for value in (-6, -4, 4, 6)]
    assert told.tolist() == pytest.approx(expected)
    # Without columns rows are prompts, and alike where all of them is.
    model.columns = ()
    method.experience(Wanted(name="rows", rows=[{}, {"k": 1}, {"k": 1}], encode=model.encode))
    assert method._prompt_of == [0, 1, 1]


def test_every_sample_counts_where_all_are_selected() -> None:
    model = constant()
    advantage = torch.tensor([1.0, 0.0, -1.0, 0.0])
    for algorithm in ("ddpo", "dpok"):
        method = method_of(model, rows=2, branches=2, selection="all", algorithm=algorithm)
        assert method.selected(advantage).tolist() == [True] * 4
        # DPOK's pull needs no reward.
        assert method.selected(0 * advantage).tolist() == [algorithm == "dpok"] * 4


def test_dpok_has_no_gradient_that_is_no_number_however_far_a_ratio_is() -> None:
    model = constant(2)
    method = method_of(model, algorithm="dpok", reduction="sum", kl_weight=0.0)
    paths = Paths(
        x=torch.zeros(1, 2, 2),
        condition=None,
        old_logp=torch.full((1, 1), -200.0),
        advantage=torch.ones(1),
    )
    row = step = torch.zeros(1, dtype=torch.long)
    terms, outside, _ = method.terms(paths, row, step, torch.tensor([2.0, 1.0]))
    assert terms.tolist() == pytest.approx([-1.1]) and outside.tolist() == [1]
    (gradient,) = torch.autograd.grad(terms.sum(), [model.denoiser.estimate])
    assert gradient.tolist() == [0, 0]


def test_the_chain_of_the_proof_begins_as_a_run() -> None:
    experiment = _of_chain("b2", 50)
    world = DiffusionWorld(experiment, Runtime(experiment.runtime))
    B2DiffuRL(experiment.method, world.spec, Runtime(experiment.runtime))
    assert len(world.spec.model.levels(20)) == 21


# ---- drawing


def test_what_is_rewarded_is_the_sample_and_chains_begin_as_the_model_says() -> None:
    """Between levels 2 and 1 of a model in the network's coordinates: sqrt(5) and 1 / sqrt(2)."""
    table, seen = torch.tensor([2.0, 1.0], dtype=torch.float64), []
    model = DiffusionModel(Constant(1), [1], table, unit_start=True, unit_end=True)

    class Watching(Told):
        def __call__(self, x: Any, rows: Any) -> Any:
            seen.append(x)
            return super().__call__(x, rows)

    method = method_of(model, branches=2_000)
    torch.manual_seed(0)
    told, _ = method.drawn(asked_of(model, [0]), Watching([0.0] * 2_000), 1)
    torch.testing.assert_close(seen[0], told.x[-1] / 2**0.5)
    method = method_of(model, branches=1, copies=4_000, history=1)
    told, _ = method.drawn(asked_of(model, [0]), Told([0.0] * 4_000), 1)
    assert float(told.x[0].std()) == pytest.approx(5**0.5, rel=0.04)


def test_drawing_is_the_policy_by_seeds() -> None:
    model = small_mixture()
    method = method_of(model, rows=2, draw_steps=4, last_suffix=4, scale=1.5, eta=0.5)
    one, two = (method.draw(asked_of(model, rows), [5, 6]).x for rows in ([0, 1], [1, 1]))
    torch.testing.assert_close(one[1], two[1])
    assert not torch.allclose(one[0], two[0])
    plain = model.draw(torch.tensor([0, 1]), [5, 6], steps=4, scale=1.5, solver="ddim", eta=0.5)
    torch.testing.assert_close(one, plain)


def test_the_chain_is_what_its_module_says() -> None:
    """E[v] is the sum of the deltas, Var[v] is 0.09 T, luck is standard normal and nothing moves it."""
    model = chain(steps=20)
    with torch.no_grad():
        model.denoiser.delta.copy_(torch.linspace(-0.1, 0.3, 20))
    drawn = model.draw(None, list(range(4_000)), steps=20, eta=ETA)
    luck, state = model.decode(drawn).unbind(-1)
    assert state.mean().item() == pytest.approx(2.0, abs=4 * math.sqrt(1.8 / 4_000))
    assert state.var().item() == pytest.approx(1.8, rel=0.1)
    assert luck.mean().item() == pytest.approx(0.0, abs=0.07)
    assert luck.var().item() == pytest.approx(1 + 1 / 108, rel=0.1)
    start = torch.stack(
        [torch.randn(1, generator=torch.Generator().manual_seed(s)) for s in range(4_000)]
    )
    assert torch.equal(luck, (48 * start.squeeze(-1) / 16).round() / 3)
    assert luck_and_state(torch.tensor([[33.0]])).tolist() == [[pytest.approx(2 / 3), 1.0]]
    reward = LuckAndSkill(luck=3.0, target=2.0)
    assert reward(torch.tensor([[2.0, 5.0]]), [{}]).tolist() == [6.0 - 9.0]
    with pytest.raises(UserError, match="steps must be 20"):
        model.levels(10)


# ---- settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eta": 0.0}, "^eta must be in"),
        ({"last_suffix": 21}, "^last_suffix must be in .1, 20."),
        ({"first_suffix": 19, "last_suffix": 18}, "^first_suffix must be in"),
        ({"negative_threshold": 0.6}, "^negative_threshold must be <= positive_threshold 0.5"),
        ({"clip": 1.0}, "^clip must be in"),
        ({"branches": 1, "advantage": "branch"}, "^branches must be >= 2"),
        ({"branches": 1, "history": 0}, "^history must be >= 1"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(**changes)


def test_a_suffix_without_a_draw_is_refused() -> None:
    model = small_mixture()
    with pytest.raises(UserError, match="first_suffix must be >= 2, for the last step"):
        method_of(model, draw_steps=4, first_suffix=1, last_suffix=4)
    method_of(chain(steps=4), **four_steps(first_suffix=1))  # Its last step is a draw.


def test_a_batch_has_each_row_once() -> None:
    with pytest.raises(UserError, match=r"batch_size must be in \[1, 1\], the rows of rows"):
        method_of(constant(), batch_size=2)

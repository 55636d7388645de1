"""Discrete Diffusion VLA: losses by hand, laws that add up to 1, passes counted, no leaks."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llavas
from esscher.distributions.vision_language import VisionLanguage
from esscher.errors import UserError
from esscher.experience.scenes import SceneData
from esscher.methods.robots import discrete_diffusion_vla as vla
from esscher.methods.robots.discrete_diffusion_vla import Config, DiscreteDiffusionVLA
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.samplers.masked import MaskedDecoding
from esscher.types import SceneChunks

HEADS = ["masked", "autoregressive", "diffusion", "regression"]
TOKENS = ["masked", "autoregressive"]


def method_of(spec: Any = None, precision: Any = "float32", **changes: Any) -> DiscreteDiffusionVLA:
    """Two actions of two components in four bins, whose range is [-1, 1]."""
    spec = llavas.vision_spec() if spec is None else spec
    settings = {"horizon": 2, "bins": 4, "levels": 3, "rounds": 3, "batch_size": 4}
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager", precision=precision))
    torch.manual_seed(0)
    method = DiscreteDiffusionVLA(Config(**(settings | changes)), spec, runtime)
    method.acting.actions.low.fill_(-1)
    method.acting.actions.high.fill_(1)
    method.acting.network.state_scaling.as_is()
    return method


def batch_of(spec: Any, count: int = 4, horizon: int = 2, seed: int = 0) -> SceneChunks:
    """The last row ends with its first action."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, horizon, dtype=torch.bool)
    mask[-1, 1:] = False
    size = spec.robot.action_dim
    return SceneChunks(
        scenes=llavas.scenes(spec, count, seed),
        action=torch.rand(count, horizon, size, generator=draw) * 2 - 1,
        mask=mask,
    )


def data_of(action: Tensor, lengths: tuple[int, ...], of: Any = None) -> SceneData:
    of, count = llavas.robot() if of is None else of, len(action)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 8, 8, 3), generator=draw, dtype=torch.uint8)
    return SceneData(
        images=images,
        state=torch.randn(count, of.state_dim, generator=draw) * 3 + 5,
        action=action,
        episode=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        task=torch.arange(len(lengths)) % 2,
        spec=of,
        name="demonstrations",
    )


def sight_of(method: DiscreteDiffusionVLA, scenes: Any) -> Any:
    return method.acting.network(scenes)


def shake(method: DiscreteDiffusionVLA) -> None:
    """Own weights far from their beginning, so that logits differ by much."""
    with torch.no_grad():
        for parameter in method.acting.head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


class Passes:
    """Counts the passes of the language model, and their tokens."""

    def __init__(self, method: DiscreteDiffusionVLA, patch: pytest.MonkeyPatch):
        self.lengths: list[int] = []
        model = method.acting.network.model
        inner = model._pass

        def counted(embeddings: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.lengths.append(embeddings.shape[1])
            return inner(embeddings, *args, **kwargs)

        patch.setattr(model, "_pass", counted)


# ---- actions as tokens


def test_tokens_by_hand_and_back() -> None:
    method = method_of(spec_with(action_dim=2), binary=(1,), bins=4)
    actions = method.acting.actions
    given = torch.tensor([[[-1.0, -1.0], [-0.4, 1.0]], [[0.1, 0.2], [5.0, -0.1]]])
    # Bins of width 0.5 from -1; of the gripper, which side of 0.
    assert actions.tokens(given).tolist() == [[0, 0, 1, 1], [2, 1, 3, 0]]
    found = actions.values(torch.tensor([[0, 0, 1, 1], [2, 1, 3, 0]]))
    assert found.tolist() == [[[-0.75, -1.0], [-0.25, 1.0]], [[0.25, 1.0], [0.75, -1.0]]]
    assert actions.permitted(2).long().tolist() == [[1] * 4, [1, 1, 0, 0]] * 2


def spec_with(**robot: Any) -> Any:
    return llavas.vision_spec(of=llavas.robot(**robot))


def test_statistics_are_the_datas_quantiles_and_extremes() -> None:
    draw = np.random.default_rng(0)
    action = torch.from_numpy(draw.uniform(-1, 1, (300, 2)) ** 3).float()
    action[:, 1] = torch.where(torch.arange(300) == 7, 0.9, -0.4)
    method = method_of(binary=(1,), quantile=0.05, batch_size=8)
    windows = method.experience(data_of(action, (100, 200)))
    low, high = method.acting.actions.low, method.acting.actions.high
    expected = np.quantile(action[:, 0].numpy(), [0.05, 0.95])
    np.testing.assert_allclose([low[0], high[0]], expected, rtol=1e-5)
    assert (low[1].item(), high[1].item()) == pytest.approx((-0.4, 0.9))
    state = method.acting.network.state_scaling
    scaled = state(windows.at(range(300)).scenes.state)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3))


def test_a_component_without_range_is_refused() -> None:
    action = torch.rand(40, 2) * 2 - 1
    action[:, 1] = 0.25
    action[3, 1] = 1.0  # Beyond the quantiles.
    with pytest.raises(UserError, match=r"action 1 has zero range .* always 0\.25.*lower quantile"):
        method_of(quantile=0.1).experience(data_of(action, (40,)))
    method_of(quantile=0.1, binary=(1,)).experience(data_of(action, (40,)))
    with pytest.raises(UserError, match=r"action 1 is named in constant and changes .* 0\.25 to 1"):
        method_of(constant=(1,)).experience(data_of(action, (40,)))
    action[3, 1] = 0.25
    with pytest.raises(UserError, match=r"action 1 has zero range .*--method\.constant 1"):
        method_of(binary=(1,)).experience(data_of(action, (40,)))


@pytest.mark.parametrize("head", ["masked", "autoregressive", "diffusion", "regression"])
def test_a_constant_component_is_executed_as_it_was(head: str) -> None:
    action = torch.rand(40, 2) * 2 - 1
    action[:, 1] = 0.25
    method = method_of(head=head, constant=(1,), rounds=2, levels=2)
    windows = method.experience(data_of(action, (40,)))
    shake(method)
    torch.manual_seed(0)
    drawn = method.policy.chunk(windows.at(range(5)).scenes)
    assert drawn[..., 1].tolist() == [[0.25] * drawn.shape[1]] * 5
    if head in ("masked", "autoregressive"):
        assert drawn[..., 0].std() > 0
        tokens = method.acting.actions.tokens(action[:8].unsqueeze(0))
        assert tokens[0, 1::2].tolist() == [0] * 8


def test_a_component_has_one_value_or_two() -> None:
    with pytest.raises(UserError, match="binary and constant name the same component"):
        method_of(binary=(1,), constant=(1,))
    with pytest.raises(UserError, match="constant must be components in"):
        method_of(constant=(9,))


def test_continuous_heads_see_the_same_range() -> None:
    actions = method_of(binary=(1,)).acting.actions
    actions.low.copy_(torch.tensor([-0.5, -1.0]))
    actions.high.copy_(torch.tensor([0.3, 1.0]))
    given = torch.tensor([[[-0.5, -1.0], [-0.1, 1.0], [0.9, 1.0]]])
    assert actions.scaled(given).tolist() == [
        [[-1.0, -1.0], pytest.approx([0.0, 1.0], abs=1e-6), [1.0, 1.0]]
    ]
    back = actions.restored(torch.tensor([[[-1.0, -0.2], [0.0, 0.1], [2.0, 0.9]]]))
    torch.testing.assert_close(back, torch.tensor([[[-0.5, -1.0], [-0.1, 1.0], [0.3, 1.0]]]))


# ---- losses by hand


def told_alike(method: DiscreteDiffusionVLA, p: tuple[float, ...]) -> None:
    """Tokens have these probabilities, whatever is seen."""
    with torch.no_grad():
        method.acting.head.to_logits.weight.zero_()
        method.acting.head.to_logits.bias.copy_(torch.tensor(p).log())


def test_masked_loss_by_hand_is_a_mean_over_the_batchs_masked_tokens() -> None:
    method = method_of()
    told_alike(method, (0.1, 0.2, 0.3, 0.4))
    sight = sight_of(method, llavas.scenes(method.spec, 2))
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]])
    masked = torch.tensor([[True, True, False, True], [False, True, False, False]])
    told = method.acting.head.loss_at(sight, tokens, torch.ones_like(masked), masked)
    # Four masked tokens in all: 0, 1 and 3, and a 3. The mean of the rows' means would be another.
    by_hand = -(math.log(0.1) + math.log(0.2) + 2 * math.log(0.4)) / 4
    assert told["loss"].item() == pytest.approx(by_hand, rel=1e-5)
    assert told["accuracy"].item() == pytest.approx(0.5)
    assert told["masked"].item() == pytest.approx(0.5)


def test_components_with_two_values_have_two_tokens() -> None:
    method = method_of(binary=(1,))
    told_alike(method, (0.1, 0.3, 0.2, 0.4))
    sight = sight_of(method, llavas.scenes(method.spec, 1))
    logits = method.acting.head.predicted(sight, torch.full((1, 4), 4))
    expected = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.25, 0.75, 0, 0]]).repeat(2, 1)
    torch.testing.assert_close(logits.softmax(-1)[0], expected)


def test_autoregressive_loss_by_hand_leaves_out_what_is_not_in_the_episode() -> None:
    method = method_of(head="autoregressive")
    told_alike(method, (0.1, 0.2, 0.3, 0.4))
    batch = batch_of(method.spec, 2)
    action = torch.tensor([[[-0.9, -0.4], [0.1, 0.9]], [[0.9, -0.9], [0.0, 0.0]]])
    batch = replace(batch, action=action)
    told = method.acting.loss(batch)
    # Tokens 0 1 2 3, and 3 0 with two that do not count.
    by_hand = -(2 * math.log(0.1) + math.log(0.2) + math.log(0.3) + 2 * math.log(0.4)) / 6
    assert told["loss"].item() == pytest.approx(by_hand, rel=1e-5)
    assert told["accuracy"].item() == pytest.approx(2 / 6)


def test_diffusion_and_regression_losses_by_hand() -> None:
    method = method_of(head="diffusion")
    head, batch = method.acting.head, batch_of(method.spec, 2)
    with torch.no_grad():
        head.to_noise.weight.zero_()
        head.to_noise.bias.copy_(torch.tensor([1.0, 0.0]))
    noise = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 1.0], [50.0, 50.0]]])
    sight = sight_of(method, batch.scenes)
    loss = head.loss_at(sight, batch.action, batch.mask, torch.tensor([0, 2]), noise)
    # Errors (0, -2), (-2, 0), (1, -1) squared: means 2, 2, 1 of three rows; the fourth is no part.
    assert loss.item() == pytest.approx(5 / 3, rel=1e-5)
    method = method_of(head="regression")
    with torch.no_grad():
        method.acting.head.to_action.weight.zero_()
        method.acting.head.to_action.bias.copy_(torch.tensor([0.5, -0.5]))
    action = torch.tensor([[[0.5, 0.5], [1.0, -1.0]], [[-0.5, -0.5], [0.0, 0.0]]])
    loss = method.acting.loss(replace(batch, action=action))["loss"]
    # |0|, |1|; |0.5|, |0.5|; |1|, |0|.
    assert loss.item() == pytest.approx((0.5 + 0.5 + 0.5) / 3, rel=1e-5)


def test_what_the_diffusion_head_is_given_is_noised_as_its_level_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import DDPMScheduler

    method = method_of(head="diffusion", levels=10)
    head, batch, found = method.acting.head, batch_of(method.spec, 2), []
    monkeypatch.setattr(
        head, "predicted", lambda sight, z, level, mask: found.append(z) or torch.zeros_like(z)
    )
    noise, level = torch.randn(2, 2, 2), torch.tensor([1, 8])
    head.loss_at(None, batch.action, batch.mask, level, noise)
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(found[0], scheduler.add_noise(batch.action, noise, level))


# ---- what is masked, and who sees whom


def test_masks_are_drawn_by_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0, 1/3, 2/3: of four tokens 4 cos(0) = 4, 3.46 -> 3, 2; of two 2 cos(pi / 3) = 1."""
    method, seen = method_of(), []
    head, batch = method.acting.head, batch_of(method.spec, 4)
    monkeypatch.setattr(head, "loss_at", lambda *args: seen.append(args) or {})
    uniform = torch.rand

    def fixed(*shape: Any, **kwargs: Any) -> Tensor:
        if shape == (4,):
            return torch.tensor([0.0, 1 / 3, 2 / 3, 2 / 3])
        return uniform(*shape, **kwargs)

    monkeypatch.setattr(vla.torch, "rand", fixed)
    counts = torch.zeros(4, 4)
    for _ in range(200):
        method.acting.loss(batch)
        *_, valid, masked = seen[-1]
        assert masked.sum(-1).tolist() == [4, 3, 2, 1]
        assert valid.tolist() == [[True] * 4] * 3 + [[True, True, False, False]]
        counts += masked
    torch.testing.assert_close(
        counts / 200,
        torch.tensor([[1.0] * 4, [0.75] * 4, [0.5] * 4, [0.5, 0.5, 0, 0]]),
        atol=0.15,
        rtol=0,
    )


def test_the_truth_at_masked_places_is_not_seen_and_the_rest_is() -> None:
    method = method_of()
    shake(method)
    head, scenes = method.acting.head, llavas.scenes(method.spec, 1)
    seen: list[Tensor] = []
    predicted = head.predicted

    def listened(*args: Any) -> Tensor:
        seen.append(predicted(*args))
        return seen[-1]

    head.predicted = listened
    masked = torch.tensor([[True, False, True, False]])
    every = torch.ones_like(masked)
    for tokens in ([0, 1, 2, 3], [3, 1, 0, 3], [0, 1, 2, 0]):
        head.loss_at(sight_of(method, scenes), torch.tensor([tokens]), every, masked)
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - seen[2]).abs().amax(-1).min() > 1e-4, "in both directions, at every place"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("attention", ["full", "prefix"])
def test_what_lies_outside_of_the_episode_changes_nothing(head: str, attention: Any) -> None:
    method = method_of(head=head, attention=attention)
    shake(method)
    batch = batch_of(method.spec)
    other = batch.action.clone()
    other[-1, 1] = 1 - other[-1, 1].abs()
    inside = batch.action.clone()
    inside[-1, 0] *= -1
    losses = []
    for action in (batch.action, other, inside):
        torch.manual_seed(3)
        losses.append(method.acting.loss(replace(batch, action=action))["loss"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_padding_of_the_instruction_changes_nothing(head: str) -> None:
    method = method_of(head=head)
    shake(method)
    scenes = llavas.scenes(method.spec, 2)
    wider = replace(
        scenes,
        instruction=torch.nn.functional.pad(scenes.instruction, (0, 3), value=5),
        instruction_mask=torch.nn.functional.pad(scenes.instruction_mask, (0, 3)),
    )
    told = []
    for given in (scenes, wider):
        torch.manual_seed(0)
        told.append(method.policy.chunk(given))
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["masked", "diffusion", "regression"])
@torch.no_grad()
def test_with_a_prefix_the_scene_is_computed_once_and_nothing_changes(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of(head=head, attention="prefix")
    shake(method)
    scenes, width = llavas.scenes(method.spec, 3), {"masked": 4}.get(head, 2)
    sight, rows = sight_of(method, scenes), torch.randn(3, width, 16)
    uncached, cached = sight.hidden(rows), sight.cached().hidden(rows)
    torch.testing.assert_close(uncached, cached, rtol=1e-4, atol=1e-5)
    whole = replace(sight, two_ways=True).hidden(rows)
    assert (whole - cached).abs().max() > 1e-3
    passes = Passes(method, monkeypatch)
    method.policy.chunk(scenes)
    # Four tokens of an image, three words, the state; then the actions alone.
    assert passes.lengths == [8] + [width] * method.policy.evaluations


@torch.no_grad()
def test_with_full_attention_the_scene_sees_the_actions() -> None:
    spec = llavas.vision_spec()
    scenes, found, inner = llavas.scenes(spec, 1), [], spec.model._pass

    def listened(*args: Any, **kwargs: Any) -> Any:
        found.append(inner(*args, **kwargs)[0])
        return found[-1], None

    spec.model._pass = listened
    for attention, sees in (("full", True), ("prefix", False)):
        sight = sight_of(method_of(spec, attention=attention), scenes)
        for rows in (torch.zeros(1, 4, 16), torch.ones(1, 4, 16)):
            sight.hidden(rows)
        moved = (found[-1] - found[-2])[:, :8].abs().max() > 1e-4
        assert bool(moved) == sees


# ---- from left to right


@torch.no_grad()
def test_likelihoods_from_left_to_right_add_up_to_one_and_are_products() -> None:
    method = method_of(head="autoregressive", bins=2)
    shake(method)
    head, scenes = method.acting.head, llavas.scenes(method.spec, 1)
    every = torch.tensor(list(itertools.product((0, 1), repeat=4)))
    sight = sight_of(method, replace_rows(scenes, 16))
    logits = head.predicted(sight, every)
    logp = logits.log_softmax(-1).gather(-1, every.unsqueeze(-1)).squeeze(-1).sum(-1)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert logp.std() > 0.1
    # One at a time, as it is drawn, with what came before in the cache.
    one = every[6:7]
    cached, total, last = sight_of(method, scenes).cached(), 0.0, torch.tensor([[2]])
    for number in range(4):
        step = head.logits(cached.next(head.of_token(last), number), number)
        last = one[:, number : number + 1]
        total += float(step.log_softmax(-1)[0, 0, last])
    assert total == pytest.approx(float(logp[6]), abs=1e-4)
    # And draws follow it.
    torch.manual_seed(0)
    drawn = method.acting.actions.tokens(method.policy.chunk(replace_rows(scenes, 4_000)))
    number = (drawn * torch.tensor([8, 4, 2, 1])).sum(-1)
    share = torch.bincount(number, minlength=16) / 4_000
    torch.testing.assert_close(share, logp.exp(), atol=0.03, rtol=0)


def replace_rows(scenes: Any, count: int) -> Any:
    """The first scene so many times."""
    return scenes.index(torch.zeros(count, dtype=torch.long))


def test_each_token_sees_those_before_it_only() -> None:
    method = method_of(head="autoregressive")
    shake(method)
    sight = sight_of(method, llavas.scenes(method.spec, 1))
    one, two = (
        method.acting.head.predicted(sight, torch.tensor([tokens]))
        for tokens in ([0, 1, 2, 3], [0, 1, 3, 3])
    )
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert (one[:, 3] - two[:, 3]).abs().max() > 1e-3


# ---- decoding


def test_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "masked": [12] * 5,
        "autoregressive": [8, 1, 1, 1, 1],
        "diffusion": [10] * 3,
        "regression": [10],
    }
    for head, lengths in expected.items():
        method = method_of(head=head, rounds=5, levels=3)
        passes = Passes(method, monkeypatch)
        chunk = method.policy.chunk(llavas.scenes(method.spec, 2))
        assert passes.lengths == lengths, head
        assert method.policy.evaluations == len(lengths) - (head == "autoregressive"), head
        assert chunk.shape == (2, 2, 2) and chunk.abs().max() <= 1


@torch.no_grad()
def test_one_round_takes_the_likeliest_of_each_token() -> None:
    method = method_of(rounds=1, temperature=0.0)
    shake(method)
    scenes = llavas.scenes(method.spec, 3)
    logits = method.acting.head.predicted(sight_of(method, scenes), torch.full((3, 4), 4))
    expected = method.acting.actions.values(logits.argmax(-1))
    assert torch.equal(method.policy.chunk(scenes), expected)


@torch.no_grad()
def test_the_settings_of_decoding_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "rounds": 5,
        "schedule": "square",
        "temperature": 0.5,
        "annealed": True,
        "score": "gap",
        "choice_temperature": 0.25,
        "remask": "drop",
        "eta": 0.1,
    }
    method, told = method_of(**settings), []
    monkeypatch.setattr(
        vla, "decode_masked", lambda p, start, m, d, **k: told.append((start, m, d)) or start * 0
    )
    method.policy.chunk(llavas.scenes(method.spec, 2))
    start, mask, decoding = told[0]
    assert decoding == MaskedDecoding(**settings)
    assert mask == 4 and start.tolist() == [[4] * 4] * 2


def test_ddim_of_the_exact_noise_ends_at_what_was_noised(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDPMScheduler

    method = method_of(head="diffusion", levels=7)
    clean = torch.tensor([[[0.3, -0.6], [0.9, 0.0]]])
    kept = DDPMScheduler(7, beta_schedule="squaredcos_cap_v2").alphas_cumprod

    def exact(sight: Any, z: Tensor, level: Tensor) -> Tensor:
        share = kept[level].view(-1, 1, 1)
        assert (level == level[0]).all()
        return (z - share.sqrt() * clean) / (1 - share).sqrt()

    monkeypatch.setattr(method.acting.head, "predicted", exact)
    found = method.policy.chunk(llavas.scenes(method.spec, 2))
    torch.testing.assert_close(found, clean.expand(2, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_torchs_generator_decides(head: str) -> None:
    method = method_of(head=head)
    shake(method)
    scenes, drawn = replace_rows(llavas.scenes(method.spec, 1), 20), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(method.policy.chunk(scenes))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (head == "regression")


# ---- pictures


def test_crops_are_parts_of_the_picture() -> None:
    images = torch.arange(2 * 2 * 10 * 10 * 3).view(2, 2, 10, 10, 3) % 251
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        part = vla.random_crop(images, 0.81)
        assert part.shape == (2, 2, 9, 9, 3)
        for n, c in itertools.product(range(2), range(2)):
            places = [
                (top, left)
                for top, left in itertools.product(range(2), range(2))
                if torch.equal(part[n, c], images[n, c, top : top + 9, left : left + 9])
            ]
            assert len(places) == 1
            seen.add((n, c, *places[0]))
    assert len(seen) == 16, "each picture has its own place"
    assert torch.equal(vla.centre_crop(images, 0.64), images[:, :, 1:9, 1:9])
    for crop in (vla.random_crop, vla.centre_crop):
        assert torch.equal(crop(images, 1.0), images)


# ---- updates


@pytest.mark.parametrize("head", HEADS)
def test_updates_go_on_exactly_from_a_saved_state(head: str) -> None:
    action = torch.rand(40, 2) * 2 - 1

    def fresh() -> tuple[Any, Any]:
        method = method_of(llavas.vision_spec(), head=head, decay_after=3)
        return method, method.experience(data_of(action, (20, 20)))

    def updated(method: Any, windows: Any, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            (batch,) = windows.batches(step)
            told = method.update(batch, step)
            assert all(v.dim() == 0 and not v.requires_grad for v in told.values())

    (whole, windows), (half, _), (rest, _) = fresh(), fresh(), fresh()
    before = {k: v.clone() for k, v in whole.policy.state_dict().items()}
    updated(whole, windows, range(5))
    updated(half, windows, range(2))
    updated(rest, windows, range(1))  # It has trained before it loads.
    rest.load_state_dict(
        {k: v.clone() if torch.is_tensor(v) else v for k, v in half.state_dict().items()}
    )
    updated(rest, windows, range(2, 5))
    for name, value in whole.state_dict().items():
        other = rest.state_dict()[name]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name
    assert whole.opt.learning_rate == pytest.approx(5e-5)
    moved = [k for k, v in whole.policy.state_dict().items() if not torch.equal(v, before[k])]
    assert any("network.model" in k for k in moved) and any(k.startswith("head.") for k in moved)


def test_statistics_are_saved_with_the_policy_and_needed_to_act() -> None:
    spec = llavas.vision_spec()
    method = method_of(spec)
    method.experience(data_of(torch.rand(40, 2), (40,)))
    other = DiscreteDiffusionVLA(method.cfg, spec, Runtime())
    scenes = llavas.scenes(spec, 2)
    with pytest.raises(UserError, match="statistics of actions are missing"):
        other.policy.chunk(scenes)
    other.acting.actions.load_state_dict(method.acting.actions.state_dict())
    with pytest.raises(UserError, match="statistics of state are missing"):
        other.policy.chunk(scenes)
    other.load_state_dict(method.state_dict())
    torch.manual_seed(0)
    one = other.policy.chunk(scenes)
    torch.manual_seed(0)
    assert torch.equal(one, method.policy.chunk(scenes))


def test_it_learns_what_belongs_together() -> None:
    """Chunks are all low or all high. Rounds draw such ones, one round does not."""
    spec = llavas.vision_spec()
    method = method_of(spec, horizon=3, learning_rate=3e-3, batch_size=32, rounds=6)
    scenes = replace_rows(llavas.scenes(spec, 1), 32)
    torch.manual_seed(0)
    for step in range(150):
        side = torch.randint(2, (32, 1, 1)) * 1.5 - 0.75
        action = side.expand(-1, 3, 2).clone()
        mask = torch.ones(32, 3, dtype=torch.bool)
        told = method.update(SceneChunks(scenes=scenes, action=action, mask=mask), step)
    assert told["loss"] < 0.6
    scenes = replace_rows(scenes, 200)

    def alike(**changes: Any) -> float:
        decoding = replace(method.cfg.decoding, **changes)
        chunk = method.policy.chunk(scenes, decoding=decoding).flatten(1)
        return float(((chunk == 0.75).all(-1) | (chunk == -0.75).all(-1)).float().mean())

    # Independent places: 2 of 64.
    assert alike() > 0.9 and alike(rounds=1) < 0.2


def test_adapters_alone_are_trained_and_kept(tmp_path: Any) -> None:
    from esscher.adapters.vision_language import load_vision_language, save_vision_language
    from esscher.experiment import ModelConfig

    model, processor = llavas.llava()
    save_vision_language(VisionLanguage(model), processor, tmp_path / "base")
    config = ModelConfig(source=str(tmp_path / "base"), lora_rank=2, gradient_checkpointing=True)
    backbone, _ = load_vision_language(config, torch.device("cpu"))
    spec = replace(llavas.vision_spec(), model=backbone)
    method = method_of(spec, learning_rate=1e-2)
    kept = [name for name in method.policy.state_dict() if "network.model.model" in name]
    assert kept and all("lora_" in name for name in kept)
    frozen = {n: p.clone() for n, p in backbone.named_parameters() if not p.requires_grad}
    batch = batch_of(spec)
    for step in range(2):
        method.update(batch, step)
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        elif "language_model" in name and "lora_B" in name:
            assert parameter.abs().max() > 0, name
    assert method.policy.chunk(llavas.scenes(spec, 2)).shape == (2, 2, 2)


def test_bfloat16_passes() -> None:
    method = method_of(precision="bfloat16", attention="prefix")
    told = method.update(batch_of(method.spec), 0)
    assert torch.isfinite(told["loss"])


# ---- bad input


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"binary must be components in \[0, 2\), got \(2,\)"):
        method_of(binary=(2,))
    with pytest.raises(UserError, match="executed must be None or in"):
        Config(horizon=4, executed=5)
    with pytest.raises(UserError, match="eta must be in"):
        Config(eta=1.5)
    short = llavas.vision_spec(context=11)
    with pytest.raises(
        UserError, match="4 tokens of images, 3 of the longest instruction and 4 of act"
    ):
        method_of(short)
    method_of(llavas.vision_spec(context=12))
    with pytest.raises(UserError, match="a chunk of 9 actions is longer than the shortest episode"):
        method_of(horizon=9).experience(data_of(torch.rand(28, 2), (20, 8)))
    method = method_of()
    other = llavas.scenes(spec_with(cameras=2), 2)
    with pytest.raises(UserError, match=r"of 1 camera\(s\), 8 x 8, as in the data, got 2 of 8 x 8"):
        method.policy.chunk(other)


def test_executed_is_all_of_a_chunk_or_what_is_asked() -> None:
    assert method_of().policy.executed == 2
    assert method_of(executed=1).policy.executed == 1


# ---- the proof


def test_the_oracle_is_the_posterior_and_its_figures_pass() -> None:
    told = vla.oracle(torch.tensor([[2, 2, 2], [2, 1, 2], [0, 2, 0]])).softmax(-1)
    assert told[:, 0].tolist() == [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]
    exact = {
        f"valid, {length} tokens, {rounds} rounds": [share]
        for (length, rounds), share in vla.ORACLE.items()
    }
    assert all(check.passed for check in vla._judge_oracle({"oracle": exact}))
    wrong = {**exact, "valid, 8 tokens, 2 rounds": [0.27]}
    assert sum(not check.passed for check in vla._judge_oracle({"oracle": wrong})) == 1


def test_one_kept_token_is_moved_by_half_of_the_bins_halfway() -> None:
    edit = vla._corrupt(MaskedDecoding(rounds=4), 8)
    tokens = torch.tensor([[8, 1, 8, 6], [8, 8, 8, 7]])
    assert torch.equal(edit(1, tokens), tokens)
    for _ in range(10):
        moved = edit(2, tokens)
        changed = moved != tokens
        assert changed.sum(-1).tolist() == [1, 1] and not changed[tokens == 8].any()
        assert ((moved - tokens)[changed].abs() == 4).all() and (moved <= 8).all()


@pytest.mark.parametrize("head", ["masked", "autoregressive"])
def test_the_proofs_figures_are_taken_of_a_learner(head: Any, monkeypatch: Any) -> None:
    """Of each way to decode, and of the passes."""
    from esscher.scenes import few_round_obstacle

    monkeypatch.setattr(vla, "CHUNKS", 4)
    data = few_round_obstacle()
    spec = llavas.vision_spec(of=replace(data.spec, instructions=("go home",)))
    method = method_of(spec, head=head, horizon=8, bins=32, rounds=12)
    method.experience(data)
    run: Any = SimpleNamespace(learner=method, experiment=SimpleNamespace(seed=0))
    found = vla._learned_figures(run)
    passes = {"masked": 12, "autoregressive": 16}[head]
    assert found["passes"] == passes and all(0 <= v <= 1 for k, v in found.items() if k != "passes")
    assert len(found) == {"masked": len(vla.DECODINGS) + 4, "autoregressive": 2}[head]


def test_the_proofs_judge_knows_good_from_bad() -> None:
    good = {
        "masked": {
            "valid, 12 rounds": [0.96],
            "valid, 1 round": [0.1],
            "valid, corrupted, threshold": [0.8],
            "valid, corrupted, none": [0.2],
            "passes": [12.0],
        },
        "autoregressive": {"valid": [0.965], "passes": [16.0]},
    }
    assert [c.passed for c in vla._judge_learned(good)] == [True] * 5
    for arm, name, value in (
        ("masked", "valid, 12 rounds", 0.94),
        ("masked", "valid, 1 round", 0.7),
        ("masked", "valid, corrupted, none", 0.8),
        ("masked", "passes", 16.0),
        ("autoregressive", "valid", 0.9),
    ):
        bad = {**good, arm: {**good[arm], name: [value]}}
        failed = [c for c in vla._judge_learned(bad) if not c.passed]
        assert len(failed) == 1, name

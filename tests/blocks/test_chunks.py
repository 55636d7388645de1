"""Steps of chunk models against diffusers' DDPMScheduler, and how chunks are executed."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esscher.adapters.chunk_models import from_diffusers, load_chunk_model
from esscher.distributions.chunks import ChunkModel, ChunkPolicy
from esscher.distributions.remembering import Player
from esscher.errors import UserError
from esscher.types import Spec

DDPMScheduler: Any = importlib.import_module("diffusers").DDPMScheduler
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
EXPERT = "esscher.chunk_models:dodge_expert"


class Predictor(nn.Module):
    """Some smooth function of all it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, z: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        shift = 0.1 * condition.sum(-1) + 0.02 * level
        return torch.tanh(self.scale * z + shift.view(-1, 1, 1)) + 0.1 * z


def scheduler_of(prediction: str, schedule: str, clip: bool = True) -> Any:
    return DDPMScheduler(
        num_train_timesteps=20,
        beta_schedule=schedule,
        prediction_type=prediction,
        clip_sample=clip,
    )


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_step_is_that_of_diffusers(prediction: str, schedule: str, clip: bool) -> None:
    scheduler = scheduler_of(prediction, schedule, clip)
    scheduler.set_timesteps(20)
    network = Predictor()
    model = from_diffusers(network, scheduler, SPEC, horizon=4)
    told = torch.randn(3, 2)
    for level in range(19, -1, -1):
        z = torch.randn(3, 4, 1)
        output = network(z, torch.full((3,), float(level)), told)
        torch.manual_seed(level)
        theirs = scheduler.step(output, level, z).prev_sample
        torch.manual_seed(level)
        noise = torch.randn(3, 4, 1)
        ours = model.step(z, level, told, noise if level else None)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_whole_draw_is_that_of_diffusers() -> None:
    scheduler, network = scheduler_of("epsilon", "squaredcos_cap_v2"), Predictor()
    scheduler.set_timesteps(20)
    model = from_diffusers(network, scheduler, SPEC, horizon=4)
    told, noises = torch.randn(3, 2), torch.randn(20, 3, 4, 1)
    ours = model.draw(told, lambda k: noises[k])
    z = noises[0]
    for place, level in enumerate(range(19, -1, -1)):
        output = network(z, torch.full((3,), float(level)), told)
        clean = scheduler.step(output, level, z).pred_original_sample
        if level == 0:
            z = clean
            continue
        kept, below = (float(scheduler.alphas_cumprod[k]) for k in (level, level - 1))
        alpha = kept / below
        mean = below**0.5 * (1 - alpha) / (1 - kept) * clean
        mean = mean + alpha**0.5 * (1 - below) / (1 - kept) * z
        std = ((1 - below) / (1 - kept) * (1 - alpha)) ** 0.5
        z = mean + std * noises[place + 1]
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-5)


def test_levels_may_be_left_out_by_a_jump() -> None:
    """DDPM's posterior between levels that are no neighbours, by its definition."""
    scheduler, network = scheduler_of("epsilon", "linear", clip=False), Predictor()
    model = from_diffusers(network, scheduler, SPEC, horizon=4)
    z, told, noise = torch.randn(2, 4, 1), torch.randn(2, 2), torch.randn(2, 4, 1)
    kept, below = (float(scheduler.alphas_cumprod[k]) for k in (12, 3))
    output = network(z, torch.full((2,), 12.0), told)
    clean = (z - (1 - kept) ** 0.5 * output) / kept**0.5
    alpha = kept / below
    mean = below**0.5 * (1 - alpha) / (1 - kept) * clean
    mean = mean + alpha**0.5 * (1 - below) / (1 - kept) * z
    std = ((1 - below) / (1 - kept) * (1 - alpha)) ** 0.5
    torch.testing.assert_close(model.step(z, 12, told, noise, 3), mean + std * noise)
    torch.testing.assert_close(model.step(z, 12, told, None, -1), clean)


class Telling(ChunkModel):
    """Chunks that tell how often one was drawn, and their rows: 0.1, 0.11, 0.12, ..."""

    def draw(self, condition: Tensor, noise: Any) -> Tensor:
        self.told = condition
        self.drawn = getattr(self, "drawn", 0) + 1
        rows = 0.1 * self.drawn + 0.01 * torch.arange(self.horizon)
        return rows.view(1, -1, 1).expand(len(condition), -1, 1)


def telling(obs_steps: int) -> Telling:
    model = from_diffusers(
        Predictor(), scheduler_of("epsilon", "linear"), SPEC, horizon=5, obs_steps=obs_steps
    )
    model.__class__ = Telling
    assert isinstance(model, Telling)
    return model


def test_rows_from_that_of_now_on_are_executed_and_states_are_remembered() -> None:
    model = telling(2)
    player = Player(ChunkPolicy(model, 3), explore=False)
    actions, told = [], []
    for step in range(5):
        actions.append(player(torch.tensor([[float(step), -float(step)]])).item())
        told.append(model.told.flatten().tolist())
    # Row obs_steps - 1 = 1 is that of now; a new chunk after three.
    assert actions == pytest.approx([0.11, 0.12, 0.13, 0.21, 0.22])
    assert told[0] == [0, 0, 0, 0], "the first observation stands in for the one before"
    assert told[3] == told[4] == [2, -2, 3, -3]
    assert player.memory is not None and player.memory.evaluations.tolist() == [40]


def test_the_network_is_asked_only_for_those_that_need_a_chunk() -> None:
    model = telling(1)
    player, obs = Player(ChunkPolicy(model, 3), explore=False), torch.zeros(2, 2)
    player(obs)
    action = player(obs, torch.tensor([False, True]))
    assert action.flatten().tolist() == pytest.approx([0.11, 0.2])
    assert len(model.told) == 1
    assert player.memory is not None and player.memory.evaluations.tolist() == [20, 20]


@pytest.mark.parametrize("executed", [0, 5])
def test_no_more_is_executed_than_a_chunk_holds(executed: int) -> None:
    with pytest.raises(UserError, match=r"executed must be in \[1, 4\], the rows"):
        ChunkPolicy(telling(2), executed)


def test_what_is_no_chunk_model_is_refused() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=20, variance_type="fixed_large")
    with pytest.raises(UserError, match="variance_type 'fixed_large' is not supported"):
        from_diffusers(Predictor(), scheduler, SPEC, horizon=4)
    with pytest.raises(UserError, match="horizon must be >= 2.*, got 1"):
        from_diffusers(Predictor(), scheduler_of("epsilon", "linear"), SPEC, horizon=1)
    scheduler = scheduler_of("epsilon", "linear")
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(UserError, match="prediction_type 'flow_prediction' has no discrete"):
        from_diffusers(Predictor(), scheduler, SPEC, horizon=4)
    with pytest.raises(UserError, match="no run folder here, and no module:function"):
        load_chunk_model("nothing", SPEC)
    with pytest.raises(UserError, match="returned a Spec"):
        load_chunk_model("copy:copy", SPEC)
    wide = Spec(obs_shape=(2,), action_shape=(2,), action_low=(-1.0,) * 2, action_high=(1.0,) * 2)
    assert load_chunk_model(EXPERT, wide).chunk_shape == (8, 2)


def test_the_dodging_expert_draws_its_own_mixture() -> None:
    """From noise through all levels: both sides, and about each the expert's deviation."""
    model = load_chunk_model(EXPERT, SPEC)
    generator = torch.Generator().manual_seed(0)
    told = torch.tensor([[0.0, 0.1]]).expand(2_000, 2)
    drawn = model.draw(told, lambda _: torch.randn(2_000, 8, 1, generator=generator)).squeeze(-1)
    up = drawn[:, 0] > 0
    assert 0.45 < up.float().mean() < 0.55
    # From y = 0.1: below, 4 (-0.6 - 0.1) = -2.8 is cut to -1, where the noise is cut too.
    y, expected = 0.1, []
    for _ in range(8):
        expected.append(max(-1.0, min(1.0, 4 * (0.6 - y))))
        y += 0.05 * expected[-1]
    inner = torch.tensor([value < 0.8 for value in expected])
    assert int(inner.sum()) >= 1
    above = drawn[up]
    torch.testing.assert_close(
        above.mean(0)[inner], torch.tensor(expected)[inner], rtol=0, atol=0.01
    )
    # The smaller of DDPM's variances, and a last step without noise, narrow what is drawn.
    assert 0.03 < float(above.std(0)[inner][0]) < 0.05
    sure = model.draw(
        torch.tensor([[0.0, -0.4]]).expand(50, 2),
        lambda _: torch.randn(50, 8, 1, generator=generator),
    )
    assert bool((sure[:, 0] < 0).all())

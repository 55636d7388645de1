"""Diffusion Policy and goal-conditioned cloning: losses by hand, schedules, and two modes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esscher.distributions.remembering import Player
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.functional.diffusion import alpha_bars
from esscher.types import Spec, Transitions
from support import learner, store

SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
SMALL: dict[str, Any] = {
    "network": "mlp",
    "hidden": (64, 64),
    "horizon": 4,
    "executed": 2,
    "obs_steps": 2,
}


def choices(count: int = 200, length: int = 6) -> Dataset:
    """Episodes that keep to 0.5 or to -0.5, with little noise."""
    side = torch.where(torch.arange(count) % 2 == 0, 0.5, -0.5).repeat_interleave(length)
    step = torch.arange(length).repeat(count)
    noise = 0.02 * torch.randn(len(step), generator=torch.Generator().manual_seed(0))
    obs = torch.stack([step / length, torch.zeros(len(step))], -1)
    ended = step == length - 1
    return Dataset(
        transitions=Transitions(
            obs=obs,
            action=(side + noise).unsqueeze(-1),
            reward=torch.zeros(len(step)),
            next_obs=obs,
            terminated=ended,
            truncated=torch.zeros_like(ended),
        ),
        step=step,
        name="choices",
    )


class Half(nn.Module):
    """Says that half of what it sees is noise."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, z: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        return self.share * z


def test_loss_by_hand_with_and_without_what_lies_outside() -> None:
    method = learner("diffusion_policy", SPEC, **SMALL, levels=10)
    method.network = Half()
    kept = alpha_bars("squaredcos_cap_v2", 10)
    chunk, noise = torch.randn(2, 2, 4, 1).unbind(0)
    level = torch.tensor([2, 7])
    errors = []
    for row in range(2):
        a = float(kept[level[row]])
        z = math.sqrt(a) * chunk[row] + math.sqrt(1 - a) * noise[row]
        errors.append((0.5 * z - noise[row]).square().squeeze(-1))
    error, told = torch.stack(errors), torch.zeros(2, 4)
    loss, (gradient,) = method.gradients(chunk, level, noise, told, torch.ones(2, 4))
    torch.testing.assert_close(loss, error.mean())
    assert gradient.shape == ()
    counts = torch.tensor([[0.0, 1, 1, 1], [1, 1, 0, 0]])
    loss, _ = method.gradients(chunk, level, noise, told, counts)
    torch.testing.assert_close(loss, (error * counts).sum() / 5)


def test_padding_is_counted_or_left_out_as_asked() -> None:
    seen: list[Tensor] = []
    for masked in (False, True):
        method = learner("diffusion_policy", SPEC, **SMALL, mask_padding=masked)
        windows = store(method, choices())

        def watched(*parts: Tensor, method: Any = method) -> Any:
            seen.append(parts[-1])
            return method.gradients(*parts)

        method._gradients = watched
        torch.manual_seed(0)
        for batch in windows.batches(0):
            method.update(batch, 0)
            assert not bool(batch.mask.all())
            assert torch.equal(seen[-1], batch.mask.float() if masked else torch.ones(32, 4))


def test_learning_rate_and_average_by_hand() -> None:
    method = learner(
        "diffusion_policy", SPEC, **SMALL, warmup_updates=4, cosine_updates=14, learning_rate=1e-2
    )
    windows, rates = store(method, choices()), []
    for step in (0, 3, 4, 9, 14, 20):
        for batch in windows.batches(step):
            method.update(batch, step)
        rates.append(method.opt.learning_rate)
    assert rates == pytest.approx([2.5e-3, 1e-2, 1e-2, 5e-3, 1e-12, 1e-12])
    fresh = learner("diffusion_policy", SPEC, **SMALL)
    for batch in store(fresh, choices()).batches(0):
        fresh.update(batch, 0)
    name = "net.weights.0"
    averaged = fresh.acting.model.network.state_dict()[name]
    assert torch.equal(averaged, fresh.network.state_dict()[name]), (
        "1 - 1^-0.75 = 0: nothing is kept"
    )
    before = averaged.clone()
    for batch in store(fresh, choices()).batches(1):
        fresh.update(batch, 15)
    kept = 1 - 16**-0.75
    torch.testing.assert_close(
        averaged, kept * before + (1 - kept) * fresh.network.state_dict()[name]
    )


def trained(slug: str, steps: int, **settings: Any) -> Any:
    method = learner(
        slug, SPEC, goal=(), achieved=(), learning_rate=3e-3, batch_size=128, **settings
    )
    windows = store(method, choices())
    for step in range(steps):
        torch.manual_seed(step)
        for batch in windows.batches(step):
            method.update(batch, step)
    return method


def test_a_chunk_is_of_one_mode_where_cloning_takes_the_mean() -> None:
    policy = trained("diffusion_policy", 800, **SMALL, levels=20).policy
    torch.manual_seed(0)
    player, obs = Player(policy, explore=True), torch.zeros(200, 2)
    first, second = player(obs).squeeze(-1), player(obs).squeeze(-1)
    assert 0.3 < (first > 0).float().mean() < 0.7
    assert (first.abs() - 0.5).abs().median() < 0.12
    assert (first.sign() == second.sign()).float().mean() > 0.95, "both of one chunk"
    mean = Player(trained("gc_bc", 300, hidden=(32,)).policy, explore=True)(obs)
    assert mean.abs().max() < 0.15


def test_cloning_by_hand() -> None:
    method = learner("gc_bc", replace(SPEC, obs_shape=(3,)), goal=(2,), achieved=(1,), hidden=())
    actor = method.actor
    with torch.no_grad():
        actor.net.weights[0].copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        actor.net.biases[0].zero_()
    for name, value in (("shift", 0.0), ("scale", 2.0)):
        getattr(actor.observed.scaling, name).fill_(value)
    for name, value in (("shift", 0.1), ("scale", 0.01), ("low", -1.0), ("high", 1.0)):
        getattr(actor.actions, name).fill_(value)
    # State (2, 4) / 2 and goal 6 / 2 give 1 + 4 + 9 = 14: an action of 0.1 + 0.14.
    assert actor(torch.tensor([[2.0, 4.0, 6.0]])).mode().item() == pytest.approx(0.24)
    state, goal = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    loss = method.descend(state, goal, torch.tensor([[12.0]]))["loss"]
    assert loss.item() == pytest.approx(4.0)
    assert actor.scaled(state, goal).item() < 14, "towards the action"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"horizon": 6, "network": "unet", "channels": (4, 8, 16)},
            "horizon must be a multiple of 4",
        ),
        ({"executed": 4}, r"executed must be in \[1, 3\]"),
        ({"unscaled": (1,)}, r"unscaled must be components in \[0, 1\)"),
        ({"embedding": 7}, "embedding must be even"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner("diffusion_policy", SPEC, **{**SMALL, **changes})


def test_a_chunk_longer_than_the_episode_is_refused() -> None:
    method = learner("diffusion_policy", SPEC, **{**SMALL, "horizon": 10})
    with pytest.raises(UserError, match="chunk of 10 steps with up to 2 .* choices, which has 6"):
        store(method, choices())

"""Memories: forgotten where an episode begins, and no episode depends on its neighbours."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esscher.controller import Controller
from esscher.distributions.chunks import ChunkPolicy
from esscher.distributions.remembering import Memory, Player
from esscher.errors import UserError
from esscher.methods.robots.rti_dp import Config, RealTimeIteration, load_chunk_model
from esscher.nn.scaling import Scaling
from esscher.types import Spec
from support import learner

SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
GAPS = Spec(obs_shape=(4,), action_shape=(2,), action_low=(-1.0, -1.0), action_high=(1.0, 1.0))


class Counting(nn.Module):
    """Acts by how often it was asked in this episode; its draws are its seed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def begin(self, seed: Tensor) -> Memory:
        return Memory(seed=seed, time=torch.zeros_like(seed), evaluations=torch.zeros_like(seed))

    def act(self, obs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        action = (memory.time + 1).float().unsqueeze(-1) / 10
        return action, dataclasses.replace(memory, time=memory.time + 1)


def policies() -> dict[str, Any]:
    """Of every kind, with the statistics of data that they never saw."""
    torch.manual_seed(0)
    made = {
        "beso": learner("beso", GAPS, window=3, keep_last_actions=True).policy,
        "chunks": ChunkPolicy(load_chunk_model("esscher.chunk_models:dodge_expert", SPEC), 3),
        "rti": RealTimeIteration(
            load_chunk_model("esscher.chunk_models:dodge_expert", SPEC),
            Config(steps=(2, 0), executed=2),
        ),
    }
    made["beso"].observed.scaling = Scaling.identity(2, "observation")
    made["beso"].actions = Scaling.identity(2, "action")
    return made


def observations(policy: str, steps: int, count: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    width = 4 if policy == "beso" else 2
    return 0.3 * torch.randn(steps, count, width, generator=draw)


def test_a_started_episode_forgets_and_its_neighbours_do_not() -> None:
    player, obs = Player(Counting(), explore=False), torch.zeros(3, 2)
    assert player(obs).flatten().tolist() == pytest.approx([0.1] * 3)
    started = torch.tensor([False, True, False])
    assert player(obs, started).flatten().tolist() == pytest.approx([0.2, 0.1, 0.2])
    assert player.memory is not None
    assert player.memory.seed.tolist() == [0, 1 + 3, 2], "a new episode has another number"
    assert player(obs).flatten().tolist() == pytest.approx([0.3, 0.2, 0.3])


@pytest.mark.parametrize("kind", ["beso", "chunks", "rti"])
def test_an_episode_does_not_depend_on_what_is_beside_or_before_it(kind: str) -> None:
    policy, obs = policies()[kind], observations(kind, 12, 3)
    player, together = Player(policy, explore=False), []
    for step in range(12):
        started = torch.tensor([False, step == 5, False])
        together.append(player(obs[step], started))
    seeds, begins = (0, 1 + 3, 2), (0, 5, 0)
    for row, (seed, begin) in enumerate(zip(seeds, begins, strict=True)):
        memory = policy.begin(torch.tensor([seed]))
        for step in range(begin, 12):
            action, memory = policy.act(obs[step, row : row + 1], memory)
            torch.testing.assert_close(action[0], together[step][row], rtol=1e-4, atol=1e-5)
    whole = torch.stack(together)
    assert (whole[1:] - whole[:-1]).abs().max() > 1e-3, "a constant would pass"


@pytest.mark.parametrize("kind", ["beso", "chunks", "rti"])
def test_exploring_draws_anew_and_the_mode_does_not(kind: str) -> None:
    policy, obs = policies()[kind], observations(kind, 1, 4)[0]

    def acted(explore: bool, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Player(policy, explore=explore)(obs)

    assert torch.equal(acted(False, 1), acted(False, 2))
    assert torch.equal(acted(True, 1), acted(True, 1))
    assert not torch.equal(acted(True, 1), acted(True, 2))
    assert len(acted(True, 3).flatten().unique()) > 1, "each environment has draws of its own"


def test_predict_carries_the_memory_in_its_state() -> None:
    policy, obs = Controller(Counting(), SPEC), np.zeros((2, 2), np.float32)
    action, state = policy.predict(obs, episode_start=np.ones(2, bool))
    action, state = policy.predict(obs, state=state, episode_start=np.zeros(2, bool))
    assert action.flatten().tolist() == pytest.approx([0.2, 0.2])
    action, state = policy.predict(obs, state=state, episode_start=np.array([True, False]))
    assert action.flatten().tolist() == pytest.approx([0.1, 0.3])
    action, _ = policy.predict(obs)
    assert action.flatten().tolist() == pytest.approx([0.1, 0.1]), "no state: all begin"
    with pytest.raises(ValueError, match="remembers 2 episodes and there are 3"):
        policy.predict(np.zeros((3, 2), np.float32), state=state)
    single, state = policy.predict(np.zeros(2, np.float32))
    assert single.shape == (1,) and len(state) == 1


def test_without_statistics_it_does_not_act() -> None:
    fresh = learner("beso", GAPS).policy
    with pytest.raises(UserError, match="statistics of observation are missing"):
        Player(fresh, explore=False)(torch.zeros(1, 4))


def test_an_action_without_range_is_refused_and_an_observation_left_out() -> None:
    values = torch.tensor([[0.0, 3.0], [2.0, 3.0]])
    with pytest.raises(UserError, match=r"action 1 has zero range in the data .it is always 3."):
        Scaling(2, "range", "action").fit(values, constant="refuse")
    for how in ("range", "standard"):
        scaling = Scaling(2, how, "observation")
        scaling.fit(values, constant="keep")
        assert scaling(values).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
        torch.testing.assert_close(scaling.inverse(scaling(values)), values)
        assert scaling.inverse(torch.tensor([[9.0, 9.0]])).tolist() == [[2.0, 3.0]]
    plain = Scaling(2, "range", "action", plain=(0,))
    plain.fit(torch.tensor([[-0.1, 1.0], [0.1, 2.0]]), constant="refuse")
    torch.testing.assert_close(plain(torch.tensor([0.1, 2.0])), torch.tensor([0.1, 1.0]))

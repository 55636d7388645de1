"""Mixture: whole episodes of one length, logged steps of their own time, and what is refused."""

from collections import Counter

import pytest
import torch

from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.experience.mixture import Mixture
from esscher.types import Action, Spec, Transitions

HORIZON = 3


def spec(num_envs=1):
    return Spec(
        obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,), num_envs=num_envs
    )


def logged(lengths=(3, 3, 2, 3), **changes):
    """Row k has the mark k in its first observation, its reward and its action."""
    step = torch.tensor([t for length in lengths for t in range(length)])
    ends = torch.tensor([t == length - 1 for length in lengths for t in range(length)])
    mark = torch.arange(len(step)).float()
    columns = {
        "obs": torch.stack([mark, step.float()], 1),
        "action": mark[:, None] / 100,
        "reward": mark,
        "next_obs": torch.stack([mark + 0.5, step + 1.0], 1),
        "terminated": ends,
        "truncated": torch.zeros_like(ends),
        **changes,
    }
    step = columns.pop("step", step)
    return Dataset(transitions=Transitions(**columns), step=step, name="logs")


def mixture(num_envs=1, batch_size=4, data=None, horizon=HORIZON):
    return Mixture(spec(num_envs), logged() if data is None else data, horizon, batch_size)


def add(store, time, *, terminated=None, truncated=False, told=None, mark=0.0):
    num_envs = store.rollout.reward.shape[1]
    ends = time == HORIZON - 1 if terminated is None else terminated
    told = time if told is None else told
    obs = torch.tensor([[mark + n, float(told)] for n in range(num_envs)])
    store.add(
        Transitions(
            obs=obs,
            action=torch.zeros(num_envs, 1),
            reward=torch.full((num_envs,), mark),
            next_obs=obs + 1,
            terminated=torch.full((num_envs,), bool(ends)),
            truncated=torch.as_tensor(truncated).expand(num_envs),
        ),
        Action(value=torch.zeros(num_envs, 1)),
    )


@pytest.mark.parametrize(("num_envs", "batch_size", "rows"), [(1, 4, 6), (1, 6, 6), (2, 7, 6)])
def test_a_rollout_holds_whole_episodes_and_as_many_logged_steps_of_each_time(
    num_envs, batch_size, rows
):
    store = mixture(num_envs, batch_size)
    for k in range(rows):
        assert list(store.batches(k)) == []
        add(store, k % HORIZON, mark=float(k))
    (batch,) = store.batches(rows)
    assert batch.rollout.reward[:, 0].tolist() == [float(k) for k in range(rows)]
    assert batch.logged.obs[:, 1].tolist() == [t for t in range(3) for _ in range(2 * num_envs)]
    assert list(store.batches(rows)) == []
    assert len(store) == 0 and not store.warming_up(0)


def test_logged_steps_come_whole_and_evenly_from_those_of_their_time():
    store, data = mixture(), logged()
    torch.manual_seed(0)
    rows = store.sample(4_000)
    assert rows.obs.shape == (12_000, 2)
    mark = rows.obs[:, 0].long()
    for name, column in rows.fields().items():
        assert torch.equal(column, data.transitions.fields()[name][mark]), name
    for time, marks in enumerate(({0, 3, 6, 8}, {1, 4, 7, 9}, {2, 5, 10})):
        found = Counter(mark[4_000 * time : 4_000 * (time + 1)].tolist())
        assert found.keys() == marks
        expected = 4_000 / len(marks)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_an_episode_that_a_reset_boundary_cuts_is_left_out():
    store = mixture()
    add(store, 0, mark=1.0)
    add(store, 1, mark=2.0, truncated=True)
    assert len(store) == 0
    for k in range(3):
        add(store, k, mark=10.0 + k)
    add(store, 0, mark=3.0, truncated=True)
    for k in range(3):
        add(store, k, mark=20.0 + k)
    (batch,) = store.batches(9)
    assert batch.rollout.reward[:, 0].tolist() == [10, 11, 12, 20, 21, 22]


def test_episodes_that_never_last_are_refused():
    store = mixture()
    add(store, 0, truncated=True)
    with pytest.raises(UserError, match="horizon is 3, and episodes are cut after 1 steps"):
        add(store, 0, truncated=True)


def test_episodes_of_another_length_are_refused():
    store = mixture(2)
    add(store, 0)
    with pytest.raises(UserError, match=r"an episode ended after 2 steps.*FiniteHorizon"):
        add(store, 1, terminated=True)
    store = mixture(2)
    add(store, 0)
    with pytest.raises(UserError, match="an episode ended after 2 steps"):
        add(store, 1, truncated=torch.tensor([True, False]))
    store = mixture()
    add(store, 0)
    add(store, 1)
    with pytest.raises(UserError, match="horizon is 3, and an episode goes on"):
        add(store, 2, terminated=False)


def test_observations_must_tell_the_time():
    store = mixture()
    add(store, 0)
    with pytest.raises(UserError, match=r"the time in the episode, which is 1 here, and got 0\.25"):
        add(store, 1, told=0.25)


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError, match=r"batch_size must be in \[1, 11\], the size of logs, got 12"
    ):
        mixture(batch_size=12)
    with pytest.raises(UserError, match="horizon must be >= 1, got 0"):
        mixture(horizon=0)
    with pytest.raises(UserError, match="logs has a step at time 2, and horizon is 2"):
        mixture(horizon=2)
    with pytest.raises(UserError, match="logs has no step at time 3, and horizon is 4"):
        mixture(horizon=4)
    obs = logged().transitions.obs.clone()
    obs[4, 1] = 7.0
    with pytest.raises(UserError, match="observations of logs .* row 4 has 7 where the time is 1"):
        mixture(data=logged(obs=obs))
    with pytest.raises(UserError, match="logs does not tell the time"):
        mixture(data=logged(step=torch.full((11,), -1)))


def test_state_holds_the_unfinished_rollout_and_refuses_other_data():
    store, other = mixture(2), mixture(2)
    for k in range(2):
        add(store, k, mark=5.0 + k)
    other.load_state_dict(store.state_dict())
    assert len(other) == 2
    add(other, 2, mark=7.0)
    (batch,) = other.batches(6)
    assert batch.rollout.reward[:, 1].tolist() == [5, 6, 7]
    changed = mixture(2, data=logged(reward=torch.zeros(11)))
    with pytest.raises(UserError, match="logs has changed"):
        changed.load_state_dict(store.state_dict())

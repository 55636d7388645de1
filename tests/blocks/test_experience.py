"""Replay and rollout: what is held, in which order, and which batches are owed."""

import math
from dataclasses import replace

import pytest
import torch

from esscher.errors import UserError
from esscher.experience import Dataset, Replay, RolloutBuffer
from esscher.types import Action, Spec, Transitions

SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))


def numbered(start: int, count: int) -> Transitions:
    """Rows whose every field tells their number."""
    number = torch.arange(start, start + count).float()
    return Transitions(
        obs=torch.stack([number, -number], -1),
        action=number.unsqueeze(-1) / 1000,
        reward=number * 10,
        next_obs=torch.stack([number + 1, -number - 1], -1),
        terminated=number % 2 == 0,
        truncated=number % 3 == 0,
    )


def add(replay: Replay, start: int, count: int) -> None:
    rows = numbered(start, count)
    replay.add(rows, Action(value=rows.action))


def held(replay: Replay) -> list[int]:
    pieces = replay.rows(replay.num_added - len(replay), replay.num_added)
    return [int(reward) // 10 for piece in pieces for reward in piece["reward"]]


def test_ring_overwrites_the_oldest() -> None:
    replay = Replay(SPEC, 5, 2)
    for number in range(13):
        add(replay, number, 1)
        assert len(replay) == min(number + 1, 5)
        assert held(replay) == list(range(max(0, number - 4), number + 1))


@pytest.mark.parametrize("num_envs", [2, 3, 5, 7])
def test_ring_wraps_with_several_rows_at_once(num_envs: int) -> None:
    replay = Replay(SPEC, 7, 2)
    for start in range(0, 6 * num_envs, num_envs):
        add(replay, start, num_envs)
        stop = start + num_envs
        assert held(replay) == list(range(max(0, stop - 7), stop))
    for piece in replay.rows(replay.num_added - 7, replay.num_added):
        for k, reward in enumerate(piece["reward"].tolist()):
            expected = numbered(int(reward) // 10, 1)
            for name, value in expected.fields().items():
                assert torch.equal(piece[name][k], value[0]), name


def test_more_rows_at_once_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="buffer_size 3"):
        add(Replay(SPEC, 3, 2), 0, 4)


def test_rows_that_are_gone_are_refused() -> None:
    replay = Replay(SPEC, 3, 2)
    add(replay, 0, 3)
    add(replay, 3, 2)
    with pytest.raises(ValueError, match="not all held"):
        list(replay.rows(1, 5))


@pytest.mark.parametrize(("capacity", "stored"), [(10, 6), (4, 6)])
def test_sample_is_uniform_over_whole_rows(capacity: int, stored: int) -> None:
    torch.manual_seed(0)
    replay = Replay(SPEC, capacity, 2)
    for number in range(stored):
        add(replay, number, 1)
    batch = replay.sample(6_000)
    number = (batch.reward / 10).round().long()
    for name, value in numbered(0, stored).fields().items():
        assert torch.equal(getattr(batch, name), value[number]), name
    counts = torch.bincount(number, minlength=stored)
    first = max(0, stored - capacity)
    assert not counts[:first].any()
    expected = 6_000 / (stored - first)
    assert ((counts[first:] - expected).abs() < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("ratio", "warmup", "num_envs"),
    [(1.0, 0, 1), (1.0, 10, 1), (2.0, 10, 1), (0.05, 10, 1), (1.0, 10, 3), (0.05, 10, 4)],
)
def test_batches_owed(ratio: float, warmup: int, num_envs: int) -> None:
    replay = Replay(SPEC, 50, 4, warmup=warmup, updates_per_step=ratio)
    given = 0
    for step in range(num_envs, 240, num_envs):
        add(replay, step, num_envs)
        now = len(list(replay.batches(step)))
        given += now
        exact = max(0, step - warmup) * ratio
        assert exact - 1 < given <= exact + 1e-9, f"step {step}"
        assert now <= max(1, math.ceil(ratio * num_envs)), "the warm-up must not be caught up"
        assert not list(replay.batches(step)), "asking twice owes nothing"
    assert given == replay.num_batches > 0


def test_warm_up_ends_where_it_says() -> None:
    replay = Replay(SPEC, 50, 4, warmup=10)
    assert replay.warming_up(9) and not replay.warming_up(10)


def test_memory_is_little_more_than_the_data() -> None:
    spec = replace(SPEC, obs_shape=(17,), action_shape=(6,))
    replay = Replay(spec, 1_000, 2)
    tensors = list(vars(replay)["_columns"].values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    raw = 1_000 * (4 * (17 + 6 + 1 + 17) + 2)
    assert raw <= sum(storages.values()) <= 1.15 * raw


def test_rows_are_views_and_counters_are_the_state() -> None:
    replay = Replay(SPEC, 5, 2)
    add(replay, 0, 4)
    (piece,) = replay.rows(0, 4)
    assert piece["obs"].untyped_storage().nbytes() == 5 * 2 * 4
    assert replay.state_dict() == {"num_added": 4, "num_batches": 0}


def test_discrete_actions_are_whole_numbers() -> None:
    replay = Replay(Spec(obs_shape=(2,), action_shape=(), num_actions=3), 5, 2)
    rows = numbered(0, 3)
    discrete = Transitions(**{**rows.fields(), "action": torch.tensor([0, 2, 1])})
    replay.add(discrete, Action(value=discrete.action))
    assert replay.sample(4).action.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"capacity": 3, "batch_size": 4}, "batch_size"),
        ({"capacity": 3, "batch_size": 0}, "batch_size"),
        ({"capacity": 3, "batch_size": 2, "updates_per_step": 0.0}, "updates_per_step"),
        ({"capacity": 3, "batch_size": 2, "updates_per_step": math.nan}, "updates_per_step"),
    ],
)
def test_impossible_replays_are_refused(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Replay(SPEC, **options)


# ---- rollouts


def test_rollout_is_given_once_in_order() -> None:
    spec = replace(SPEC, num_envs=2)
    buffer = RolloutBuffer(spec, 3, ("logp", "value"))
    for round_ in range(2):
        for t in range(3):
            assert not list(buffer.batches(0))
            rows = numbered(100 * round_ + 2 * t, 2)
            extras = {"logp": rows.reward + 0.5, "value": -rows.reward}
            buffer.add(rows, Action(value=rows.action, extras=extras))
            assert len(buffer) == t + 1
        (rollout,) = buffer.batches(0)
        assert len(buffer) == 0
        expected = numbered(100 * round_, 6)
        for name, value in expected.fields().items():
            assert torch.equal(getattr(rollout, name), value.reshape(3, 2, *value.shape[1:])), name
        assert torch.equal(rollout.extras["logp"], rollout.reward + 0.5)
        assert torch.equal(rollout.extras["value"], -rollout.reward)
    assert not buffer.warming_up(0)


def test_half_a_rollout_is_saved_and_continued() -> None:
    spec = replace(SPEC, num_envs=2)
    whole, half, resumed = (RolloutBuffer(spec, 3, ("logp",)) for _ in range(3))
    for t in range(3):
        rows = numbered(2 * t, 2)
        whole.add(rows, Action(value=rows.action, extras={"logp": rows.reward}))
        if t < 2:
            half.add(rows, Action(value=rows.action, extras={"logp": rows.reward}))
    junk = numbered(50, 2)
    resumed.add(junk, Action(value=junk.action, extras={"logp": junk.reward}))
    resumed.load_state_dict({k: v for k, v in half.state_dict().items()})
    last = numbered(4, 2)
    resumed.add(last, Action(value=last.action, extras={"logp": last.reward}))
    (a,), (b,) = whole.batches(0), resumed.batches(0)
    for name, value in a.fields().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(b, name)), name
    assert torch.equal(a.extras["logp"], b.extras["logp"])


def test_a_missing_extra_is_an_error() -> None:
    buffer = RolloutBuffer(SPEC, 3, ("logp",))
    rows = numbered(0, 1)
    with pytest.raises(KeyError, match="logp"):
        buffer.add(rows, Action(value=rows.action))


def test_rollout_length_is_checked() -> None:
    with pytest.raises(UserError, match="length"):
        RolloutBuffer(SPEC, 0)


# ---- records


def test_records_check_their_leading_axes() -> None:
    rows = numbered(0, 3)
    with pytest.raises(Exception, match=r"leading axes differ|Type-check"):
        Transitions(**{**rows.fields(), "reward": torch.zeros(2)})


def test_records_index_and_concatenate() -> None:
    rows = numbered(0, 4)
    both = Transitions.cat([rows.index(slice(0, 1)), rows.index(torch.tensor([3, 2]))])
    assert len(both) == 3
    assert both.reward.tolist() == [0.0, 30.0, 20.0]
    assert both.to("cpu").obs.tolist() == [[0, 0], [3, -3], [2, -2]]


# ---- several steps as one


def logged(reward: list[float], ends: dict[int, str]) -> Dataset:
    """Rows whose observation is their number, and whose successor is half a number on."""
    count = len(reward)
    obs = torch.arange(count, dtype=torch.float32)[:, None]
    kind = [ends.get(k, "") for k in range(count)]
    return Dataset(
        transitions=Transitions(
            obs=obs,
            action=torch.zeros(count, 1),
            reward=torch.tensor(reward),
            next_obs=obs + 0.5,
            terminated=torch.tensor([k == "terminated" for k in kind]),
            truncated=torch.tensor([k == "truncated" for k in kind]),
        ),
        step=torch.zeros(count, dtype=torch.int64),
        name="by hand",
    )


def test_n_steps_by_hand() -> None:
    data = logged([1.0, 2.0, 4.0, 8.0, 16.0], {2: "terminated", 4: "truncated"})
    found = data.n_step(2, 0.5)
    assert found.reward.tolist() == [2, 4, 4, 16, 16]
    assert found.next_obs.flatten().tolist() == [1.5, 2.5, 2.5, 4.5, 4.5]
    assert found.terminated.tolist() == [False, True, True, False, False]
    assert found.truncated.tolist() == [False, False, False, True, True]
    assert found.discount.tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]
    one = data.n_step(1, 0.9)
    for name, value in data.transitions.fields().items():
        assert torch.equal(getattr(one, name), value), name
    assert one.discount.tolist() == pytest.approx([0.9] * 5)


@pytest.mark.parametrize("num_steps", [2, 3, 50])
def test_n_steps_against_a_loop(num_steps: int) -> None:
    draw = torch.Generator().manual_seed(num_steps)
    reward = torch.randn(40, generator=draw).tolist()
    ends = {k: ("terminated", "truncated")[k % 2] for k in (0, 1, 7, 12, 13, 30, 39)}
    data, discount = logged(reward, ends), 0.8
    found = data.n_step(num_steps, discount)
    value = torch.randn(40, generator=draw)  # Of the successor of each row.
    for k in range(40):
        total, weight, row = 0.0, 1.0, k
        while True:
            total += weight * reward[row]
            weight *= discount
            if row in ends or row - k + 1 == num_steps:
                break
            row += 1
        target = total + (0.0 if ends.get(row) == "terminated" else weight * value[row].item())
        ahead = int(found.next_obs[k].item() - 0.5)
        own = found.reward[k] + found.discount[k] * value[ahead] * ~found.terminated[k]
        assert own.item() == pytest.approx(target, abs=1e-5)


def test_n_steps_are_checked() -> None:
    data = logged([1.0], {0: "truncated"})
    with pytest.raises(UserError, match="num_steps must be >= 1"):
        data.n_step(0, 0.9)
    with pytest.raises(UserError, match="discount"):
        data.n_step(1, 1.5)

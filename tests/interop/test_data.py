"""Data sets of others, read and refused; and ours, as the tools of others read them."""

import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file

import esscher
from esscher.adapters.data import describe, from_arrays, load_dataset
from esscher.adapters.gymnasium import Environments
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.methods.control.sac import SAC, Config
from esscher.runtime.collect import collect, combine
from esscher.types import Spec
from support import RUNTIME, train
from toys import Mixed, Toy

SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-2.0,), action_high=(2.0,))
LABELS = Spec(obs_shape=(2,), action_shape=(), num_actions=3, action_start=-1)


@pytest.fixture(autouse=True)
def _sets_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAC on a MuJoCo task, long enough to balance for a while."""
    folder = tmp_path_factory.mktemp("run") / "run"
    experiment = esscher.Experiment.of(
        Config(hidden=(32, 32), warmup=200),
        env="InvertedPendulum-v5",
        steps=900,
        evaluation=esscher.EvaluationConfig(every=0, episodes=1),
        checkpoint=esscher.CheckpointConfig(every=450),
        log=esscher.LogConfig(to=()),
        runtime=RUNTIME,
    )
    train(experiment, folder)
    return folder


# ---- ours, read by Minari and in its recovered environment


@pytest.mark.parametrize("policy", ["agent", "random"])
def test_a_recovered_environment_repeats_every_step(run: Path, policy: Any) -> None:
    collect(run, "pole/some-v0", policy=policy, episodes=10, display=False)
    dataset = minari.load_dataset("pole/some-v0")
    assert dataset.total_episodes == 10
    env = dataset.recover_environment()
    assert env.spec is not None and env.spec.id == "InvertedPendulum-v5"
    seeds = [m["seed"] for m in dataset.storage.get_episode_metadata(range(10))]
    assert len(set(seeds)) == 10
    for episode, seed in zip(dataset.iterate_episodes(), seeds, strict=True):
        assert episode.observations.dtype == np.float64 and episode.actions.dtype == np.float32
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(episode.observations[0], obs)
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(episode.observations[t + 1], obs)
            assert (episode.rewards[t], episode.terminations[t]) == (reward, terminated)
            assert episode.truncations[t] == truncated
        assert terminated or truncated
        assert len(episode.observations) == len(episode.rewards) + 1


def test_every_column_survives_the_way_there_and_back(run: Path) -> None:
    written = collect(run, "pole/some-v0", episodes=12, display=False, reference=(4.0, 1000.0))
    dataset = minari.load_dataset("pole/some-v0")
    dataset.set_seed(0)
    sampled = dataset.sample_episodes(12)
    assert [e.id for e in sampled] != sorted(e.id for e in sampled)
    env = Environments(esscher.EnvConfig(id="InvertedPendulum-v5"), 0)
    data = load_dataset("minari:pole/some-v0", env.spec)
    rows, ends = data.transitions, data.ends().tolist()
    starts = [0, *(end + 1 for end in ends)]
    assert len(data) == written.steps == dataset.total_steps
    for episode in sampled:
        part = slice(starts[episode.id], ends[episode.id] + 1)
        obs = episode.observations.astype(np.float32)
        np.testing.assert_array_equal(rows.obs[part], obs[:-1])
        np.testing.assert_array_equal(rows.next_obs[part], obs[1:])
        np.testing.assert_array_equal(rows.reward[part], episode.rewards.astype(np.float32))
        np.testing.assert_array_equal(rows.terminated[part], episode.terminations)
        np.testing.assert_array_equal(rows.truncated[part], episode.truncations)
        np.testing.assert_array_equal(data.step[part], np.arange(len(episode)))
        np.testing.assert_array_equal(rows.action[part], episode.actions / np.float32(3))
    assert [float(r) for r in data.returns()] == pytest.approx(written.returns)
    # Normalised as Minari does, but from 0 to 100.
    theirs = minari.get_normalized_score(dataset, np.array(written.returns))
    assert [data.score(r) for r in written.returns] == pytest.approx((100 * theirs).tolist())
    told = data.provenance["esscher"]
    assert (told["method"], told["policy"], told["step"], told["seed"]) == ("sac", "agent", 900, 1)
    assert told["version"] == esscher.__version__ and told["stochastic"] is True
    assert told["config"]["method"]["hidden"] == [32, 32] and len(told["code"]) >= 7
    assert data.provenance["algorithm_name"] == "sac"


def test_the_agent_acts_as_its_policy(run: Path) -> None:
    collect(run, "pole/mode-v0", episodes=9, stochastic=False, display=False)
    collect(run, "pole/early-v0", episodes=3, stochastic=False, step=450, display=False)
    for name, step in (("pole/mode-v0", 900), ("pole/early-v0", 450)):
        policy = esscher.load(run, step=step).policy
        for episode in minari.load_dataset(name).iterate_episodes():
            for obs, action in zip(episode.observations, episode.actions, strict=False):
                wanted, _ = policy.predict(obs)
                np.testing.assert_allclose(action, wanted, rtol=1e-4, atol=1e-5)
    told = minari.load_dataset("pole/early-v0").storage.metadata["esscher"]
    assert told["step"] == 450 and told["stochastic"] is False


def test_a_replay_is_written_as_it_is_stored(run: Path) -> None:
    collect(run, "pole/replay-v0", policy="replay", display=False)
    rows = load_dataset("minari:pole/replay-v0", None).transitions
    files = sorted(
        (run / "experience").glob("rows_*.safetensors"), key=lambda f: int(f.stem.split("_")[1])
    )
    stored = [load_file(file) for file in files]
    assert len(rows) == 900
    for name in ("obs", "reward", "next_obs", "terminated"):
        column = torch.cat([part[name] for part in stored])
        assert torch.equal(getattr(rows, name), column), name
    action = torch.cat([part["action"] for part in stored])
    spec = Environments(esscher.EnvConfig(id="InvertedPendulum-v5"), 0).spec
    read = load_dataset("minari:pole/replay-v0", spec).transitions.action
    torch.testing.assert_close(read, action, rtol=1e-6, atol=1e-6)
    truncated = torch.cat([part["truncated"] for part in stored])
    truncated[-1] |= ~rows.terminated[-1]
    assert torch.equal(rows.truncated, truncated)


def test_a_mixture_is_what_minari_would_combine(run: Path) -> None:
    names = ["pole/one-v0", "pole/two-v0"]
    collect(run, names[0], episodes=4, display=False, reference=(5.0, 900.0))
    collect(run, names[1], policy="random", episodes=6, display=False)
    combine([f"minari:{names[0]}", names[1]], "pole/both-v0", display=False)
    ours = minari.load_dataset("pole/both-v0")
    theirs = minari.combine_datasets([minari.load_dataset(n) for n in names], "pole/theirs-v0")
    assert ours.combined_datasets == theirs.combined_datasets == names
    assert ours.env_spec == theirs.env_spec and ours.total_episodes == 10
    for mine, other in zip(ours.iterate_episodes(), theirs.iterate_episodes(), strict=True):
        for column in ("id", "observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(other, column))
    assert ours.recover_environment().spec == theirs.recover_environment().spec
    metadata = ours.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (5.0, 900.0)
    assert metadata["esscher"]["parts"][names[1]]["policy"] == "random"
    seeds = [m["seed"] for m in ours.storage.get_episode_metadata(range(10))]
    parts = [minari.load_dataset(n).storage for n in names]
    assert seeds == [
        m["seed"] for p in parts for m in p.get_episode_metadata(range(p.total_episodes))
    ]


# ---- Minari sets of others


def record(env: gymnasium.Env[Any, Any], name: str, steps: int, **metadata: Any) -> list[Any]:
    """A set as Minari's own collector makes it; the actions."""
    collector = minari.DataCollector(env)
    collector.action_space.seed(0)
    actions = []
    collector.reset(seed=0)
    for _ in range(steps):
        actions.append(collector.action_space.sample())
        _, _, terminated, truncated, _ = collector.step(actions[-1])
        if terminated or truncated:
            collector.reset(seed=0)
    collector.create_dataset(name, **metadata)
    return actions


class Ordered(Toy):
    """A dictionary whose keys are not in the order of the alphabet."""

    def __init__(self) -> None:
        box = spaces.Box(-9, 9, (2,), np.float32)
        parts = OrderedDict([("place", box), ("goal", spaces.Discrete(3)), ("both", box)])
        super().__init__(spaces.Dict(parts))

    def observe(self) -> Any:
        place = np.array([self.time, -self.time], np.float32)
        return {"place": place, "goal": self.time % 3, "both": place / 2}


class Pair(Toy):
    """A tuple of unequal parts."""

    def __init__(self) -> None:
        parts = (spaces.MultiDiscrete([2, 3]), spaces.Box(-9, 9, (1, 2), np.float32))
        super().__init__(spaces.Tuple(parts))

    def observe(self) -> Any:
        return np.array([self.time % 2, self.time % 3]), np.full((1, 2), self.time, np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Mixed, Ordered, Pair])
def test_observations_are_flattened_as_in_training(kind: Any) -> None:
    actions = record(kind(), "toys/nested-v0", 12)
    module = "toys" if kind is Mixed else "test_data"
    envs = Environments(esscher.EnvConfig(id=f"{module}:{kind.__name__}"), 0)
    rows = load_dataset("minari:toys/nested-v0", envs.spec).transitions
    assert len(rows) == 12
    obs = envs.reset(0)
    for t, action in enumerate(actions):
        outcome = envs.step(torch.as_tensor(action)[None], t)
        np.testing.assert_array_equal(rows.obs[t], obs[0])
        np.testing.assert_array_equal(rows.next_obs[t], outcome.next_obs[0])
        np.testing.assert_array_equal(rows.action[t], action)
        assert bool(rows.terminated[t]) == bool(outcome.terminated[0])
        obs = outcome.obs
    assert rows.truncated.nonzero().tolist() == [[11]]  # The collector stopped in an episode.


@pytest.mark.filterwarnings("ignore")
def test_labels_and_metadata_of_others() -> None:
    env = gymnasium.make("CartPole-v1", max_episode_steps=9)
    told = {"author": "someone", "ref_min_score": 9.0, "ref_max_score": 500.0}
    actions = record(env, "cart/theirs-v3", 40, **told)
    spec = Environments(esscher.EnvConfig(id="CartPole-v1"), 0).spec
    data = load_dataset("minari:cart/theirs-v3", spec)
    assert data.transitions.action.tolist() == [int(a) for a in actions]
    assert data.reference == (9.0, 500.0) and data.score(254.5) == pytest.approx(50)
    assert data.provenance["author"] == ["someone"]
    assert data.name == "minari:cart/theirs-v3"


def test_a_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("Name or service not known\nand a long story")

    def without_hub(name: str) -> None:
        raise ImportError("huggingface_hub is not installed")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(UserError, match=r"'pole/near-v0' on this machine \(there are none yet\)"):
        load_dataset("minari:pole/near-v0", SPEC)
    collect(run, "pole/nearby-v0", policy="random", episodes=1, display=False)
    with pytest.raises(UserError, match=r"did you mean pole/nearby-v0\?.*not known\. Copy it into"):
        load_dataset("minari:pole/near-v0", SPEC)
    monkeypatch.setattr(minari, "download_dataset", without_hub)
    with pytest.raises(UserError, match=r'pip install "minari\[hf\]"'):
        load_dataset("minari:pole/near-v0", SPEC)
    for name in ("near", "pole/near", "../near-v0", "a b-v0"):
        with pytest.raises(UserError, match="is not a name of a Minari set"):
            load_dataset(f"minari:{name}", SPEC)

    def download(name: str) -> None:
        collect(run, name, policy="random", episodes=2, display=False)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert len(load_dataset("minari:pole/near-v0", None).ends()) == 2


def test_a_damaged_set_is_named(run: Path, tmp_path: Path) -> None:
    collect(run, "pole/some-v0", policy="random", episodes=1, display=False)
    (tmp_path / "minari/pole/some-v0/data/metadata.json").write_text("{")
    with pytest.raises(UserError, match="'pole/some-v0' in .* cannot be read"):
        load_dataset("minari:pole/some-v0", SPEC)


@pytest.mark.parametrize(
    ("source", "module"), [("minari:pole/some-v0", "minari"), ("some.hdf5", "h5py")]
)
def test_what_is_not_installed(source: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'needs {module}: pip install "esscher\[control\]"'):
        load_dataset(source, SPEC)


def test_nothing_is_imported_before_it_is_used() -> None:
    check = "import esscher.adapters.data, esscher.runtime.collect, esscher.runtime.run, sys; "
    check += "import esscher.cli; heavy = ('minari', 'h5py', 'jax', 'scipy.stats'); "
    check += "print([m for m in heavy if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- D4RL's files


def write_hdf5(path: Path, **columns: Any) -> str:
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = values
        file["infos/qpos"] = np.zeros((3, 1))
        file["metadata/algorithm"] = "SAC"
    return path.name


# Four episodes: over at row 2, out of time at row 4, one step and over, and the file ends.
OBS = np.stack([np.arange(8.0), np.arange(8.0) ** 2], 1)
TERMINALS = np.array([0, 0, 1, 0, 0, 1, 0, 0], bool)
TIMEOUTS = np.array([0, 0, 0, 0, 1, 0, 0, 0], bool)
D4RL = {
    "observations": OBS,
    "actions": np.linspace(-2, 2, 8)[:, None],
    "rewards": np.arange(8.0) / 10,
    "terminals": TERMINALS,
    "timeouts": TIMEOUTS,
}


def test_rows_without_a_successor_are_dropped(tmp_path: Path) -> None:
    data = load_dataset(write_hdf5(tmp_path / "some.hdf5", **D4RL), SPEC)
    rows = data.transitions
    # Rows 4 (out of time) and 7 (end of the file) have no successor; what is before them is cut.
    assert rows.obs[:, 0].tolist() == [0, 1, 2, 3, 5, 6]
    # A terminal row (2 and 5) stands for its own successor.
    assert rows.next_obs[:, 0].tolist() == [1, 2, 2, 4, 5, 7]
    assert rows.next_obs[:, 1].tolist() == [1, 4, 4, 16, 25, 49]
    assert rows.terminated.tolist() == [False, False, True, False, True, False]
    assert rows.truncated.tolist() == [False, False, False, True, False, True]
    assert data.step.tolist() == [0, 1, 2, 0, 0, 0]
    torch.testing.assert_close(rows.reward, torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 0.6]))
    expected = torch.tensor([-1, -5 / 7, -3 / 7, -1 / 7, 3 / 7, 5 / 7])
    torch.testing.assert_close(rows.action[:, 0], expected)
    assert data.returns().tolist() == pytest.approx([0.3, 0.3, 0.5, 0.6])


def test_given_successors_are_used(tmp_path: Path) -> None:
    columns = {**D4RL, "next_observations": OBS + 0.5}
    data = load_dataset(write_hdf5(tmp_path / "some.h5", **columns), SPEC)
    rows = data.transitions
    np.testing.assert_array_equal(rows.obs, OBS.astype(np.float32))
    np.testing.assert_array_equal(rows.next_obs, (OBS + 0.5).astype(np.float32))
    assert rows.terminated.tolist() == TERMINALS.tolist()
    assert rows.truncated.tolist() == [*TIMEOUTS.tolist()[:-1], True]
    assert data.step.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]


def test_random_files_against_the_rule_as_a_loop(tmp_path: Path) -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        size = int(draw.integers(2, 30))
        terminals, timeouts = draw.random(size) < 0.2, draw.random(size) < 0.2
        columns = {
            "observations": draw.normal(size=(size, 2)).astype(np.float32),
            "actions": draw.uniform(-2, 2, (size, 1)).astype(np.float32),
            "rewards": draw.normal(size=size).astype(np.float32),
            "terminals": terminals,
            "timeouts": timeouts,
        }
        wanted = []
        for i in range(size):
            final = i == size - 1
            if not terminals[i] and (timeouts[i] or final):
                continue
            after = columns["observations"][i if terminals[i] else i + 1]
            wanted.append((i, after, bool(terminals[i])))
        if not wanted:
            continue
        data = from_arrays(columns, SPEC, "random")
        rows = data.transitions
        np.testing.assert_array_equal(rows.obs, [columns["observations"][i] for i, _, _ in wanted])
        np.testing.assert_array_equal(rows.next_obs, [after for _, after, _ in wanted])
        np.testing.assert_array_equal(rows.reward, [columns["rewards"][i] for i, _, _ in wanted])
        assert rows.terminated.tolist() == [t for _, _, t in wanted]
        # A kept row is cut where the next kept one does not follow it.
        numbers = [i for i, _, _ in wanted]
        jumps = [b != a + 1 for a, b in zip(numbers, [*numbers[1:], size + 1], strict=True)]
        assert rows.truncated.tolist() == [
            jump and not t for jump, (_, _, t) in zip(jumps, wanted, strict=True)
        ]


def test_without_timeouts_it_warns(tmp_path: Path) -> None:
    columns = {name: values for name, values in D4RL.items() if name != "timeouts"}
    with pytest.warns(UserWarning, match="neither next_observations nor truncations"):
        data = load_dataset(write_hdf5(tmp_path / "some.hdf5", **columns), SPEC)
    assert data.transitions.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_unreadable_hdf5(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file 'nowhere.hdf5' here"):
        load_dataset("nowhere.hdf5", SPEC)
    (tmp_path / "text.hdf5").write_text("not a file of that kind")
    with pytest.raises(UserError, match="text.hdf5 cannot be read as HDF5"):
        load_dataset("text.hdf5", SPEC)
    write_hdf5(tmp_path / "other.hdf5", obs=OBS)
    with pytest.raises(UserError, match="has no observations: it holds infos, metadata, obs"):
        load_dataset("other.hdf5", SPEC)


# ---- folders of NumPy files


def episodes(length: int, first: float = 0.0, **changes: Any) -> dict[str, Any]:
    """One episode under Gymnasium's names."""
    time = np.arange(first, first + length)
    columns = {
        "observations": np.stack([time, time], 1),
        "actions": np.zeros((length, 1)),
        "rewards": time,
        "next_observations": np.stack([time, time], 1) + 1,
        "terminations": np.arange(length) == length - 1,
        "truncations": np.zeros(length, bool),
    }
    return {key: value for key, value in {**columns, **changes}.items() if value is not None}


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    np.savez(folder / "b.npz", **episodes(2, 10.0))
    cut = episodes(3, 0.0, terminations=np.zeros(3, bool))  # Ends without saying why.
    np.savez_compressed(folder / "a.npz", **cut, unrelated=np.array("text"))
    # D4RL's names, without successors: its last row is dropped.
    d4rl = episodes(3, 20.0, next_observations=None, terminations=None, truncations=None)
    np.savez(folder / "c.npz", **d4rl, terminals=np.zeros(3), timeouts=np.array([0, 0, 1]))
    # One episode as Minari holds it: an observation more than steps.
    whole = episodes(2, 30.0, next_observations=None)
    np.savez(folder / "d.npz", **{**whole, "observations": np.arange(30.0, 36.0).reshape(3, 2)})
    (folder / "notes.txt").write_text("not data")
    data = load_dataset("mine", SPEC)
    rows = data.transitions
    assert rows.reward.tolist() == [0, 1, 2, 10, 11, 20, 21, 30, 31]
    assert rows.obs[:, 0].tolist() == [0, 1, 2, 10, 11, 20, 21, 30, 32]
    assert rows.next_obs[:, 0].tolist() == [1, 2, 3, 11, 12, 21, 22, 32, 34]
    assert rows.terminated.nonzero().ravel().tolist() == [4, 8]
    assert rows.truncated.nonzero().ravel().tolist() == [2, 6]
    assert data.step.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert len(data.provenance["files"]) == 4
    assert len(load_dataset("mine/b.npz", SPEC)) == 2


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


def test_unreadable_npz(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="'mine' holds no .npz files"):
        load_dataset("mine", SPEC)
    bomb = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "mine/a.npz", **episodes(2, rewards=bomb))
    with pytest.raises(UserError, match="mine/a.npz holds pickled objects"):
        load_dataset("mine", SPEC)
    (tmp_path / "mine/a.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(UserError, match="mine/a.npz cannot be read as .npz"):
        load_dataset("mine", SPEC)
    np.save(tmp_path / "mine/single.npy", np.zeros(3))
    (tmp_path / "mine/single.npy").rename(tmp_path / "mine/a.npz")
    with pytest.raises(UserError, match="mine/a.npz cannot be read as .npz"):
        load_dataset("mine", SPEC)
    with pytest.raises(UserError, match="no data file 'none.npz' here"):
        load_dataset("none.npz", SPEC)


# ---- functions


def made() -> Any:
    return episodes(3)


def made_ready() -> Dataset:
    return from_arrays(episodes(3), SPEC, "ready")


def made_wrong() -> Any:
    return [1, 2]


def test_functions() -> None:
    data = load_dataset("test_data:made", SPEC)
    assert len(data) == 3 and data.name == "test_data:made"
    assert load_dataset("test_data:made_ready", SPEC).name == "ready"
    other = replace(SPEC, obs_shape=(5,))
    with pytest.raises(UserError, match=r"ready has observations of shape \[2\].* are \[5\]"):
        load_dataset("test_data:made_ready", other)
    with pytest.raises(UserError, match=r"ready has actions of shape \[1\].* are \[\]"):
        load_dataset("test_data:made_ready", LABELS)
    with pytest.raises(UserError, match="returned a list: return a dictionary of arrays"):
        load_dataset("test_data:made_wrong", SPEC)
    for source in ("test_data:unmade", "no_such_module:made", "test_data:"):
        with pytest.raises(UserError, match="cannot be imported"):
            load_dataset(source, SPEC)
    with pytest.raises(UserError, match="no data 'nothing' here: give minari:NAME"):
        load_dataset("nothing", SPEC)


# ---- what is refused


def refused(match: str, spec: Spec = SPEC, length: int = 4, **changes: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        from_arrays(episodes(length, **changes), spec, "mine")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("mine ")


def with_value(value: float, *place: int, shape: tuple[int, ...] = (4, 2)) -> Any:
    array = np.zeros(shape)
    array[place] = value
    return array


def test_columns_that_are_missing_or_do_not_match() -> None:
    refused("has no rewards: it holds actions, next_observations, obs", rewards=None)
    refused(
        r"does not say where episodes end: add terminations \(or terminals\).*\(or timeouts\)",
        terminations=None,
        truncations=None,
    )
    refused("observations 4, actions 3, rewards 4", actions=np.zeros((3, 1)))
    refused("columns of different lengths.*rewards 5", rewards=np.zeros(5))
    refused("has both terminations and terminals", terminals=np.zeros(4))
    refused("has a single value for actions", actions=0.0)
    refused("holds rewards of type <U1: they must be numbers", rewards=list("abcd"))
    refused("has truncations of 2 numbers: give one flag", truncations=np.zeros((4, 2)))
    refused("has 0.99 in terminations at row 2: give 0 or 1", terminations=[0, 0, 0.99, 1])
    refused("has nan in truncations at row 1: give 0 or 1", truncations=[0, np.nan, 0, 0])
    refused("rewards of 2 numbers, and the task's are of 1 number:", rewards=np.zeros((4, 2)))
    refused(
        "one observation more than rewards.*one ends at row 1: give next_observations",
        observations=np.zeros((5, 2)),
        next_observations=None,
        terminations=[0, 1, 0, 1],
    )
    refused(
        "no step whose successor is known",
        length=1,
        next_observations=None,
        terminations=[0],
        truncations=[1],
    )
    refused("is empty: it holds no step", length=0)


def test_sizes_of_another_task() -> None:
    wide = replace(SPEC, obs_shape=(3,))
    refused("observations of 2 numbers, and the task's are of 3 numbers.*--env.id", wide)
    refused("next_observations of 3 numbers", next_observations=np.zeros((4, 3)))
    refused("actions of 2 numbers, and the task's are of 1 number:", actions=np.zeros((4, 2)))
    refused(r"actions of 2 numbers.* are labels \(-1 to 1\)", LABELS, actions=np.zeros((4, 2)))


def test_values_that_are_not_finite() -> None:
    refused(r"nan in observations at row 3 \(component 1\)", observations=with_value(np.nan, 3, 1))
    refused(r"-inf in next_obs.* row 0 ", next_observations=with_value(-np.inf, 0, 0))
    refused("inf in rewards at row 2 ", rewards=with_value(np.inf, 2, shape=(4,)))
    refused("inf in rewards at row 2 ", rewards=with_value(1e300, 2, shape=(4,)))
    refused("nan in actions at row 1 ", actions=with_value(np.nan, 1, 0, shape=(4, 1)))
    refused("nan in actions at row 1 ", LABELS, actions=with_value(np.nan, 1, shape=(4,)))


def test_actions_outside_of_the_task() -> None:
    # The box is 4 wide: 0.0004 is taken as rounding, and cut off.
    near = from_arrays(episodes(4, actions=[[2.0003], [-2.0003], [1.0], [0.0]]), SPEC, "near")
    assert near.transitions.action[:, 0].tolist() == [1.0, -1.0, 0.5, 0.0]
    remedy = r"outside the task's box \[-2, 2\]: give actions in the task's own units"
    refused(rf"action 2.0005 at row 1 \(component 0\), {remedy}", actions=[[2], [2.0005], [3], [0]])
    refused(rf"action -30 at row 0 .*{remedy}", actions=[[-30], [0], [0], [0]])
    wanted = "at row 2, and the task's labels are -1 to 1: number them"
    for label in (2, -2, 0.5):
        refused(f"action {label} {wanted}", LABELS, actions=np.array([0, 1, label, 0]))


def test_uneven_boxes_and_labels() -> None:
    spec = replace(SPEC, action_shape=(2,), action_low=(-2.0, 0.1), action_high=(2.0, 0.3))
    columns = episodes(2, actions=np.array([[-2, 0.1], [1, 0.25]]))
    action = from_arrays(columns, spec, "mine").transitions.action
    torch.testing.assert_close(action, torch.tensor([[-1, -1], [0.5, 0.5]]))
    for labels in (np.array([-1, 1, 0]), np.array([[-1.0], [1.0], [0.0]])):
        data = from_arrays(episodes(3, actions=labels), LABELS, "mine")
        assert data.transitions.action.tolist() == [0, 2, 1]
        assert data.transitions.action.dtype == torch.int64


def test_one_label_an_agent() -> None:
    spec = Spec(obs_shape=(2,), action_shape=(2,), num_actions=3, action_start=1, num_agents=2)
    data = from_arrays(episodes(2, actions=np.array([[1, 3], [2, 2]])), spec, "mine")
    assert data.transitions.action.tolist() == [[0, 2], [1, 1]]
    refused(r"actions of 1 number, and the task's are 2 labels \(1 to 3\)", spec)
    refused(
        "action 4 at row 1, and the task's labels are 1 to 3", spec, 2, actions=[[1, 3], [2, 4]]
    )


def test_small_actions_of_a_symmetric_box_lose_nothing() -> None:
    action = (np.random.default_rng(0).normal(size=(500, 1)) * 1e-9).astype(np.float32)
    read = from_arrays(episodes(500, actions=action), SPEC, "mine").transitions.action
    np.testing.assert_array_equal(read, action / 2)


def several(lengths: list[int], terminated: bool) -> dict[str, Any]:
    ends = np.concatenate([np.arange(n) == n - 1 for n in lengths])
    none = np.zeros(len(ends), bool)
    over, cut = (ends, none) if terminated else (none, ends)
    return episodes(len(ends), terminations=over, truncations=cut)


def test_time_limits_that_look_like_ends_are_remarked_on(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match="all 3 episodes have 4 steps and end as terminated"):
        from_arrays(several([4, 4, 4], True), SPEC, "mine")
    recwarn.clear()
    for lengths, terminated in (([4, 4, 3], True), ([4, 4], False), ([4], True), ([1, 1], True)):
        from_arrays(several(lengths, terminated), SPEC, "mine")
    assert [w for w in recwarn if "terminated" in str(w.message)] == []


# ---- what is told


def test_sizes_can_come_from_the_data() -> None:
    data = load_dataset("test_data:made", None)
    assert data.transitions.obs.shape == (3, 2) and data.transitions.action.shape == (3, 1)
    np.savez("labels.npz", **episodes(3, actions=np.array([4, 2, 0])))
    assert load_dataset("labels.npz", None).transitions.action.tolist() == [4, 2, 0]
    np.savez("empty.npz", **episodes(0))
    with pytest.raises(UserError, match="is empty"):
        load_dataset("empty.npz", None)


def test_what_a_person_is_told() -> None:
    data = from_arrays(several([2, 4], True), SPEC, "mine")
    assert describe(data) == {
        "steps": "6",
        "episodes": "2",
        "return": "7.5 +- 6.5 (1.0 to 14.0)",  # 0 + 1, and 2 + 3 + 4 + 5
        "length": "3.0 +- 1.0 (2.0 to 4.0)",
        "terminated": "100.0% of episodes",
        "truncated": "0.0% of episodes",
        "observation": "2 numbers",
        "action": "1 number",
        "reference": "none stated",
    }
    told = describe(replace(data, reference=(5.0, 10.0)))
    assert told["reference"] == "return 5.0 counts as 0, 10.0 as 100"
    assert told["score"] == "50.0 (of the mean return)"


def test_a_run_finds_its_file_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAC, "data", "optional")
    (tmp_path / "here").mkdir()
    for source in ("here", str(tmp_path / "here")):
        stage = esscher.Experiment.of("sac", data=source, steps=20_000).resolved().stages[0]
        assert stage.data == str(tmp_path / "here")
    for source in ("minari:here/some-v0", "esscher.datasets:chain", "nowhere.hdf5"):
        stage = esscher.Experiment.of("sac", data=source, steps=20_000).resolved().stages[0]
        assert stage.data == source

"""Collecting data sets: whose actions, which episodes, what is left after a kill."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file

import esscher
from esscher.adapters.data import load_dataset
from esscher.errors import UserError
from esscher.methods.control.ppo import Config as PPO
from esscher.methods.control.sac import Config as SAC
from esscher.runtime import collect as collecting
from esscher.runtime.collect import collect, combine
from support import RUNTIME, train
from toys import Mixed, Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*end as terminated.*")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sets of a test go."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "minari"


class Endings(Toy):
    """Episodes of random lengths that end by termination, truncation, or both, as the seed says."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.length, self.kind = (int(n) for n in self.np_random.integers((1, 0), (7, 3)))
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        obs, _, ended, _, info = super().step(action)
        reward = self.time + float(action[0]) + float(self.np_random.normal())
        return obs, reward, ended and self.kind != 1, ended and self.kind != 0, info

    def observe(self) -> Any:
        return np.array([self.time, self.length, getattr(self, "kind", 0)], np.float32)


def trained(folder: Path, env: str, steps: int = 60, method: Any = None, **task: Any) -> Path:
    """A short run of SAC, or of another method."""
    small = SAC(hidden=(8,), warmup=10, batch_size=8, buffer_size=500)
    experiment = esscher.Experiment.of(
        method or small,
        env=esscher.EnvConfig(id=env, **task),
        steps=steps,
        evaluation=esscher.EvaluationConfig(every=0, episodes=1, step_limit=10),
        checkpoint=esscher.CheckpointConfig(every=steps // 2),
        log=esscher.LogConfig(to=()),
        runtime=RUNTIME,
    )
    train(experiment, folder)
    return folder


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run", "test_collect:Endings")


def episodes_of(name: str) -> list[Any]:
    return list(minari.load_dataset(name).iterate_episodes())


def same(left: list[Any], right: list[Any]) -> bool:
    columns = ("observations", "actions", "rewards", "terminations", "truncations")
    return len(left) == len(right) and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in zip(left, right, strict=True)
        for name in columns
    )


# ---- by acting


def test_every_episode_that_is_begun_is_kept(endings: Path) -> None:
    """Lengths are those of the seeds, not those of the shortest episodes."""
    written = collect(endings, "toys/a-v0", policy="random", episodes=37, display=False)
    storage = minari.load_dataset("toys/a-v0").storage
    seeds = [metadata["seed"] for metadata in storage.get_episode_metadata(range(37))]
    assert len(set(seeds)) == 37
    env, kinds = Endings(), set()
    for episode, seed, length in zip(episodes_of("toys/a-v0"), seeds, written.lengths, strict=True):
        env.reset(seed=seed)
        assert env.length == length == len(episode)
        assert (np.abs(episode.actions) <= 1).all()
        assert not (episode.terminations | episode.truncations)[:-1].any()
        over, cut = bool(episode.terminations[-1]), bool(episode.truncations[-1])
        assert (over, cut) == (env.kind != 1, env.kind != 0)
        kinds.add(env.kind)
    assert kinds == {0, 1, 2}
    returns = [float(e.rewards.sum()) for e in episodes_of("toys/a-v0")]
    assert returns == pytest.approx(written.returns)


def test_random_actions_fill_the_box(endings: Path) -> None:
    collect(endings, "toys/a-v0", policy="random", episodes=300, display=False)
    actions = np.concatenate([e.actions for e in episodes_of("toys/a-v0")])
    # Uniform in [-1, 1]: mean 0, variance 1/3, over about 1,050 actions (4 standard errors).
    assert abs(actions.mean()) < 4 * (1 / 3 / len(actions)) ** 0.5
    assert abs(actions.var() - 1 / 3) < 4 * ((1 / 5 - 1 / 9) / len(actions)) ** 0.5


def test_the_seed_decides_everything(endings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        for policy in ("agent", "random"):
            out = f"toys/{policy}-{name}-v0"
            collect(endings, out, policy=policy, episodes=11, seed=seed, display=False)  # type: ignore[arg-type]
    for policy in ("agent", "random"):
        a, b, c = (episodes_of(f"toys/{policy}-{name}-v0") for name in "abc")
        assert same(a, b) and not same(a, c)
    monkeypatch.setattr(collecting, "COPIES", 1)  # Episodes do not depend on their neighbours.
    collect(endings, "toys/alone-v0", policy="random", episodes=11, display=False)
    assert same(episodes_of("toys/random-a-v0"), episodes_of("toys/alone-v0"))


def test_the_agent_samples_or_takes_the_mode(endings: Path) -> None:
    spread = {}
    for name, stochastic in (("sampled", True), ("mode", False)):
        collect(endings, f"toys/{name}-v0", episodes=20, stochastic=stochastic, display=False)
        found = episodes_of(f"toys/{name}-v0")
        policy = esscher.load(endings).policy
        gaps = [
            abs(float(policy.predict(obs)[0][0] - action[0]))
            for episode in found
            for obs, action in zip(episode.observations, episode.actions, strict=False)
        ]
        spread[name] = max(gaps)
    assert spread["mode"] < 1e-5 < 0.1 < spread["sampled"]


def test_endless_tasks_are_cut(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "esscher.envs:GaussianReward")
    written = collect(run, "endless-v0", episodes=3, step_limit=25, display=False)
    assert written.lengths == [25, 25, 25] and written.steps == 75
    rows = load_dataset("minari:endless-v0", None).transitions
    assert rows.truncated.nonzero().ravel().tolist() == [24, 49, 74]
    assert not rows.terminated.any()


def test_an_end_at_the_limit_stays_an_end(endings: Path) -> None:
    collect(endings, "toys/a-v0", policy="random", episodes=30, step_limit=3, display=False)
    env, storage = Endings(), minari.load_dataset("toys/a-v0").storage
    seeds = [metadata["seed"] for metadata in storage.get_episode_metadata(range(30))]
    for episode, seed in zip(episodes_of("toys/a-v0"), seeds, strict=True):
        env.reset(seed=seed)
        assert len(episode) == min(3, env.length)
        over, cut = (env.kind != 1, env.kind != 0) if env.length <= 3 else (False, True)
        assert (episode.terminations[-1], episode.truncations[-1]) == (over, cut)


@pytest.mark.parametrize("policy", ["agent", "random"])
def test_labels(tmp_path: Path, policy: Any) -> None:
    method = PPO(hidden=(8,), rollout_length=8, num_minibatches=2, epochs=1)
    run = trained(tmp_path / "run", "toys:Choices", method=method)
    collect(run, "toys/labels-v0", policy=policy, episodes=20, display=False)
    found = episodes_of("toys/labels-v0")
    labels = np.concatenate([e.actions for e in found])
    assert labels.dtype == np.int64 and set(labels) == {-1, 0, 1}
    for episode in found:  # The toy shows the label that it got.
        np.testing.assert_array_equal(episode.observations[1:, 0], episode.actions)


class Together(Toy):
    """One label each for two agents; it shows them, from where the options say."""

    def __init__(self) -> None:
        super().__init__(action_space=spaces.MultiDiscrete([3, 3], start=[2, 2]))
        self.last, self.offset = np.zeros(2), 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.offset = (options or {}).get("offset", 0.0)
        self.last = np.zeros(2)
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.last = action
        return super().step(action)

    def observe(self) -> Any:
        return np.array([*self.last, self.offset], np.float32)


def test_one_label_an_agent(tmp_path: Path) -> None:
    experiment = esscher.Experiment.of("sac", env="test_collect:Together")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(experiment.to_json()))
    collect("run", "toys/both-v0", policy="random", episodes=30, display=False)
    labels = np.concatenate([e.actions for e in episodes_of("toys/both-v0")])
    assert labels.shape == (150, 2) and len(np.unique(labels, axis=0)) == 9
    for episode in episodes_of("toys/both-v0"):
        np.testing.assert_array_equal(episode.observations[1:, :2], episode.actions)


def test_episodes_begin_as_the_policy_asks(endings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = type(esscher.load(endings).policy.policy)
    monkeypatch.setattr(policy, "reset_options", {"offset": 7.0}, raising=False)
    config = json.loads((endings / "config.json").read_text())
    config["stages"][0]["env"] |= {"id": "test_collect:Shifted"}
    shutil.copytree(endings, "run")
    Path("run/config.json").write_text(json.dumps(config))
    collect("run", "toys/a-v0", episodes=3, display=False)
    assert all((e.observations[:, 2] == 7).all() for e in episodes_of("toys/a-v0"))
    collect("run", "toys/random-v0", policy="random", episodes=3, display=False)
    assert all((e.observations[:, 2] == 0).all() for e in episodes_of("toys/random-v0"))
    combine(["toys/a-v0", "toys/random-v0"], "toys/both-v0", display=False)
    storage = minari.load_dataset("toys/both-v0").storage
    told = [metadata.get("options") for metadata in storage.get_episode_metadata(range(6))]
    assert told == [{"offset": 7.0}] * 3 + [None] * 3


class Shifted(Together):
    """With one continuous action."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def observe(self) -> Any:
        return np.array([0, 0, self.offset], np.float32)


@pytest.mark.parametrize("policy", ["agent", "random"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_lie_in_the_box_and_have_its_type(tmp_path: Path, policy: Any, dtype: str) -> None:
    kwargs = {"low": -0.1, "high": 0.7, "dtype": dtype}
    run = trained(tmp_path / "run", "test_collect:OneEcho", kwargs=kwargs)
    collect(run, "toys/echo-v0", policy=policy, episodes=6, display=False)  # The toy asserts.
    for episode in episodes_of("toys/echo-v0"):
        assert episode.actions.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(episode.observations[1:], episode.actions)
        assert (episode.observations[0] == 0).all()


def OneEcho(low: float, high: float, dtype: str) -> Any:
    from toys import Echo

    return Echo([low], [high], dtype)


class Reusing(Toy):
    """Returns one array again and again, and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = np.zeros(3, np.float32)

    def observe(self) -> Any:
        self.memory[:] = super().observe()
        return self.memory


def test_observations_are_copied(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "test_collect:Reusing")
    collect(run, "toys/memory-v0", episodes=10, display=False)
    for episode in episodes_of("toys/memory-v0"):
        assert episode.observations[:, 1].tolist() == [0, 1, 2, 3, 4, 5]


def test_nested_observations_keep_their_form(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "toys:Mixed")
    for policy in ("agent", "replay"):
        name = f"toys/{policy}-v0"
        collect(run, name, policy=policy, display=False, episodes=3 if policy == "agent" else None)  # type: ignore[arg-type]
        dataset = minari.load_dataset(name)
        assert dataset.observation_space == Mixed().observation_space
        for episode in dataset.iterate_episodes():
            time = np.arange(len(episode) + 1)
            np.testing.assert_array_equal(episode.observations["goal"], time % 3)
            expected = np.arange(4).reshape(2, 2) + time[:, None, None] - 4
            np.testing.assert_array_equal(episode.observations["place"], expected)
        spec = esscher.load(run).policy.spec
        assert load_dataset(f"minari:{name}", spec).transitions.obs.shape[1] == 7


@pytest.mark.parametrize("what", ["reward", "obs"])
def test_values_that_are_not_finite_stop_it(root: Path, tmp_path: Path, what: str) -> None:
    run = trained(tmp_path / "run", "test_collect:Endings")
    config = json.loads((run / "config.json").read_text())
    config["stages"][0]["env"] |= {"id": "toys:NotFinite", "kwargs": {"what": what}}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"toys:NotFinite, episode 0, step 3, has an? \w+ that is"):
        collect(run, "toys/bad-v0", episodes=2, display=False)
    assert not (root / "toys").exists()


# ---- from a replay


def stored_rows(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Number of a row, counted from the first ever stored -> row, from all row files."""
    rows = {}
    for file in (run / "experience").glob("rows_*.safetensors"):
        columns, first = load_file(file), int(file.stem.split("_")[1])
        for k in range(len(columns["reward"])):
            rows[first + k] = {name: column[k] for name, column in columns.items()}
    return rows


@pytest.mark.parametrize("capacity", [500, 100])
def test_copies_that_took_turns_are_told_apart(tmp_path: Path, capacity: int) -> None:
    method = SAC(hidden=(8,), warmup=10, batch_size=8, buffer_size=capacity)
    run = trained(tmp_path / "run", "test_collect:Endings", steps=300, method=method, num=3)
    collect(run, "toys/replay-v0", policy="replay", display=False)
    rows, wanted = stored_rows(run), []
    for copy in range(3):
        episode: list[int] | None = None if capacity == 100 else []
        for number in range(max(0, 300 - capacity), 300):
            if number % 3 == copy:
                if episode is not None:
                    episode.append(number)
                if rows[number]["terminated"] or rows[number]["truncated"]:
                    wanted += [episode] if episode else []
                    episode = []
        wanted += [episode] if episode else []
    wanted.sort()
    found = episodes_of("toys/replay-v0")
    assert len(found) == len(wanted) > 20
    for episode, index in zip(found, wanted, strict=True):
        column = {name: torch.stack([rows[number][name] for number in index]) for name in rows[299]}
        np.testing.assert_array_equal(episode.observations[:-1], column["obs"])
        np.testing.assert_array_equal(episode.observations[1:], column["next_obs"])
        np.testing.assert_array_equal(episode.rewards, column["reward"])
        np.testing.assert_allclose(episode.actions, column["action"], atol=1e-6)
        np.testing.assert_array_equal(episode.terminations, column["terminated"])
        assert episode.terminations[-1] or episode.truncations[-1]
        assert not episode.truncations[:-1].any()


def test_a_jump_in_a_replay_ends_an_episode(endings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after resuming a task whose state could not be saved."""
    replay = collecting._replay

    def jumped(*arguments: Any) -> Any:
        rows, first, copies = replay(*arguments)
        rows.terminated[:], rows.truncated[:] = False, False
        rows.obs[:] = torch.arange(len(rows), dtype=torch.float32)[:, None]
        rows.next_obs[:] = rows.obs + 1
        rows.next_obs[29] = -1.0
        return rows, first, copies

    monkeypatch.setattr(collecting, "_replay", jumped)
    written = collect(endings, "toys/replay-v0", policy="replay", display=False)
    assert written.lengths == [30, 30]
    assert [e.truncations[-1] for e in episodes_of("toys/replay-v0")] == [True, True]


def test_methods_without_a_replay_say_so(tmp_path: Path) -> None:
    method = PPO(hidden=(8,), rollout_length=8, num_minibatches=2, epochs=1)
    run = trained(tmp_path / "run", "toys:Choices", method=method)
    with pytest.raises(UserError, match="ppo keeps no replay: leave out --policy replay"):
        collect(run, "toys/replay-v0", policy="replay", display=False)


# ---- whole, or not at all


def leftovers(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in root.rglob("*")] if root.exists() else []


def test_a_name_is_never_taken_twice(endings: Path, root: Path) -> None:
    collect(endings, "toys/a-v0", policy="random", episodes=1, display=False)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for write in (
        lambda: collect(endings, "toys/a-v0", episodes=1, display=False),
        lambda: collect(endings, "minari:toys/a-v0", episodes=1, display=False),
        lambda: combine(["toys/a-v0", "toys/b-v0"], "toys/a-v0", display=False),
    ):
        with pytest.raises(UserError, match=r"the name 'toys/a-v0' is taken.*minari delete toys/a"):
            write()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_name_taken_meanwhile_is_not_overwritten(
    endings: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = collecting._Copy.episode

    def episode(copy: Any) -> Any:
        (root / "toys/a-v0").mkdir(parents=True, exist_ok=True)
        return end(copy)

    monkeypatch.setattr(collecting._Copy, "episode", episode)
    with pytest.raises(UserError, match="is taken"):
        collect(endings, "toys/a-v0", episodes=1, display=False)
    assert leftovers(root / "toys/a-v0") == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_what_is_interrupted_leaves_nothing(
    endings: Path, root: Path, monkeypatch: pytest.MonkeyPatch, exception: Any
) -> None:
    monkeypatch.setattr(collecting, "STEPS_A_WRITE", 5)
    add, seen = collecting.Writer.add, []

    def interrupted(writer: Any, episode: Any) -> None:
        add(writer, episode)
        seen.append(list((root / ".esscher_writing").rglob("main_data.hdf5")))
        if len(seen) == 12:
            raise exception

    with monkeypatch.context() as context:
        context.setattr(collecting.Writer, "add", interrupted)
        with pytest.raises(exception):
            collect(endings, "toys/a-v0", episodes=20, display=False)
    assert len(seen[-1]) == 1 and leftovers(root) == []
    collect(endings, "toys/a-v0", episodes=20, display=False)
    assert len(episodes_of("toys/a-v0")) == 20
    assert not [name for name in leftovers(root) if "esscher_writing" in name]


def test_what_a_killed_process_left_is_replaced(endings: Path, root: Path) -> None:
    folder = root / ".esscher_writing" / "toys__a-v0" / "data"
    folder.mkdir(parents=True)
    (folder / "main_data.hdf5").write_text("half")
    assert minari.list_local_datasets() == {}
    collect(endings, "toys/a-v0", episodes=2, display=False)
    assert list(minari.list_local_datasets()) == ["toys/a-v0"]
    assert sorted(p.name for p in root.iterdir()) == ["toys"]


def test_two_processes_do_not_write_one_set(endings: Path, root: Path) -> None:
    folder = root / ".esscher_writing" / "toys__a-v0"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    (folder / "theirs").mkdir()
    with pytest.raises(UserError, match="toys/a-v0 is being written by another process"):
        collect(endings, "toys/a-v0", episodes=2, display=False)
    assert (folder / "theirs").exists()
    os.close(held)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_leaves_no_half_set(endings: Path, root: Path, number: int) -> None:
    arguments = [endings, "--episodes", 10**8, "--out", "toys/a-v0", "--policy", "random"]
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-m", "esscher.cli", "data", "collect", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    written = root / ".esscher_writing/toys__a-v0/data/main_data.hdf5"
    while not (written.exists() and written.stat().st_size > 1_000):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not (root / "toys").exists() and minari.list_local_datasets() == {}
    if number == signal.SIGINT:
        assert process.returncode == 130 and leftovers(root) == []
        assert "stopped; nothing was written under toys/a-v0" in said
    collect(endings, "toys/a-v0", episodes=3, display=False)
    assert len(episodes_of("toys/a-v0")) == 3


def test_a_run_that_still_runs_can_be_used(endings: Path, tmp_path: Path) -> None:
    run = tmp_path / "running"
    shutil.copytree(endings, run)
    (run / "result.json").unlink()
    collect(run, "toys/a-v0", episodes=2, display=False)
    shutil.rmtree(run / "checkpoints")  # Before its first checkpoint.
    collect(run, "toys/b-v0", policy="random", episodes=2, display=False)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        collect(run, "toys/c-v0", episodes=2, display=False)


# ---- options, mixtures


def test_options_that_make_no_sense(endings: Path, root: Path) -> None:
    wrong = [
        ({"episodes": 0}, "--episodes must be >= 1, got 0"),
        ({"step_limit": 0}, "--step-limit must be >= 1, got 0"),
        ({"policy": "replay", "episodes": 3}, "leave out --episodes"),
        ({"policy": "random", "step": 30}, "leave out --step"),
        ({"reference": (3.0, 3.0)}, "--reference must be LOW HIGH, LOW < HIGH, got 3 3"),
        ({"reference": (float("nan"), 3.0)}, "--reference must be"),
        ({"step": 7}, r"no checkpoint of step 7: it has \[30, 60\]"),
    ]
    for options, sentence in wrong:
        with pytest.raises(UserError, match=sentence):
            collect(endings, "toys/a-v0", display=False, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'toys/a' is not a name of a Minari set"):
        collect(endings, "toys/a", display=False)
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        collect("nowhere", "toys/a-v0", display=False)
    assert leftovers(root) == []


def test_mixtures_that_make_no_sense(endings: Path, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", "toys:Mixed")
    many = {"episodes": 1, "policy": "random", "display": False}
    collect(endings, "toys/a-v0", **many, reference=(1.0, 2.0))  # type: ignore[arg-type]
    collect(endings, "toys/b-v0", **many, reference=(1.0, 3.0))  # type: ignore[arg-type]
    collect(other, "toys/other-v0", **many)  # type: ignore[arg-type]
    wrong = [
        (["toys/a-v0"], "combine needs two sets or more"),
        (["toys/a-v0", "toys/a-v0"], "a set is named twice"),
        (["toys/a-v0", "toys/other-v0"], "are not of one task: the observation space is Dict"),
        (["toys/a-v0", "toys/b-v0"], r"different references: 1 2 \(toys/a-v0\), 1 3 \(toys/b-v0\)"),
    ]
    for names, sentence in wrong:
        with pytest.raises(UserError, match=sentence):
            combine(names, "toys/both-v0", display=False)
    combine(["toys/a-v0", "toys/b-v0"], "toys/both-v0", reference=(0.0, 9.0), display=False)
    assert load_dataset("minari:toys/both-v0", None).reference == (0.0, 9.0)


def test_sets_of_one_space_and_other_tasks_do_not_mix(tmp_path: Path) -> None:
    for name, gravity in (("a", 10.0), ("b", 5.0)):
        run = trained(tmp_path / name, "Pendulum-v1", kwargs={"g": gravity})
        collect(run, f"toys/{name}-v0", policy="random", episodes=1, display=False)
        spec = minari.load_dataset(f"toys/{name}-v0").recover_environment().spec
        assert spec is not None and spec.kwargs["g"] == gravity
    with pytest.raises(UserError, match="not of one task with equal settings: toys/a-v0 of Pend"):
        combine(["toys/a-v0", "toys/b-v0"], "toys/both-v0", display=False)


def test_images_are_kept_as_they_are(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "test_collect:Noise", steps=20)
    for name in ("a", "b"):
        collect(run, f"toys/{name}-v0", policy="random", episodes=1, seed=3, display=False)
    combine(["toys/a-v0", "toys/b-v0"], "toys/both-v0", display=False)
    env = Noise()
    (told,) = minari.load_dataset("toys/a-v0").storage.get_episode_metadata([0])
    wanted = [env.reset(seed=told["seed"])[0], *(env.step(np.zeros(1))[0] for _ in range(5))]
    for episode in [*episodes_of("toys/a-v0"), *episodes_of("toys/both-v0")]:
        np.testing.assert_array_equal(episode.observations, wanted)


class Noise(Toy):
    """Images that no lossy format keeps."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(0, 255, (32, 32, 3), np.uint8))

    def observe(self) -> Any:
        return self.np_random.integers(0, 256, (32, 32, 3), np.uint8)


def test_progress_says_how_long_it_takes(
    endings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "SECONDS_A_LINE", 0)
    monkeypatch.setenv("COLUMNS", "120")
    collect(endings, "toys/a-v0", episodes=4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("sac on test_collect:Endings: 1 of 4 episodes, ")
    assert lines[-1] == "sac on test_collect:Endings: 4 of 4 episodes, 0 s left"


def test_a_set_tells_how_it_was_made(endings: Path) -> None:
    """The whole experiment, which could be run again."""
    collect(endings, "toys/a-v0", episodes=1, display=False)
    told = minari.load_dataset("toys/a-v0").storage.metadata["esscher"]
    experiment = esscher.Experiment.from_json(told["config"])
    assert experiment == replace(experiment, seed=told["run_seed"])
    assert told["config"]["stages"][0]["data"] is None
    assert set(told["packages"]) == {"gymnasium", "minari", "mujoco", "torch"}

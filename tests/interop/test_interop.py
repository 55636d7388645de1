"""What a run leaves behind opens in the tools that a user already has."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esscher
import toys
from esscher.adapters.chunk_models import load_chunk_model
from esscher.controller import Controller
from esscher.distributions.chunks import ChunkPolicy
from esscher.distributions.remembering import Memory, remembers
from esscher.envs import Dodge
from esscher.errors import UserError
from esscher.types import Spec
from support import Killed, die_after, learner, of_world, smoke, spec_of, train, train_until

SLUGS = of_world("control")
SPEC = Spec(obs_shape=(5,), action_shape=(2,), action_low=(-2.0, 0.1), action_high=(2.0, 0.3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    parts = smoke(
        "sac", steps=300, log=esscher.LogConfig(every=70), env_max_episode_steps=60,
        checkpoint=esscher.CheckpointConfig(every=150),
    )  # fmt: skip
    train(parts, folder)
    return folder


# ---- Stable-Baselines3


def test_stable_baselines_evaluates_a_run(run: Path) -> None:
    policy = esscher.load(run).policy
    env = gymnasium.make("Pendulum-v1", max_episode_steps=60)
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=3, warn=False)  # type: ignore[arg-type]
    assert -16.3 * 60 < mean < 0
    # The same episodes by hand.
    env = gymnasium.make("Pendulum-v1", max_episode_steps=60)
    obs, _ = env.reset(seed=4)
    total, done = 0.0, False
    while not done:
        action, state = policy.predict(obs)
        assert action.shape == (1,) and state is None
        obs, reward, terminated, truncated, _ = env.step(action)
        total, done = total + float(reward), terminated or truncated
    vectorised = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1", max_episode_steps=60)])
    vectorised.seed(4)
    theirs, _ = evaluate_policy(policy, vectorised, n_eval_episodes=1, warn=False)  # type: ignore[arg-type]
    assert theirs == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("env", ["HalfCheetah-v5", "CartPole-v1"])
def test_stable_baselines_evaluates_untrained_policies(env: str, copies: int) -> None:
    made = gymnasium.make(env, max_episode_steps=20)
    if env == "CartPole-v1":
        spec, slug = Spec(obs_shape=(4,), action_shape=(), num_actions=2), "ppo"
    else:
        box = made.action_space
        spec, slug = (
            Spec(
                obs_shape=(17,),
                action_shape=(6,),
                action_low=tuple(box.low.tolist()),
                action_high=tuple(box.high.tolist()),
            ),
            "sac",
        )
    if slug not in SLUGS:
        pytest.skip(f"no {slug} in the catalogue")
    policy = Controller(learner(slug, spec).policy, spec)
    vectorised = DummyVecEnv([lambda: gymnasium.make(env, max_episode_steps=20)] * copies)
    for deterministic in (True, False):
        returns, lengths = evaluate_policy(
            policy,  # type: ignore[arg-type]
            vectorised,
            n_eval_episodes=4,
            deterministic=deterministic,
            return_episode_rewards=True,
            warn=False,
        )
        assert len(returns) == 4 and np.isfinite(returns).all() and max(lengths) <= 20


class Watching(torch.nn.Module):
    """Remembers how long its episode is, and compares it with what the environment tells."""

    def __init__(self, episodes: int) -> None:
        super().__init__()
        self.episodes = episodes
        self.register_buffer("begun", torch.zeros(()))

    def begin(self, seed: torch.Tensor) -> Memory:
        return Memory(seed=seed, time=torch.zeros_like(seed), evaluations=torch.zeros_like(seed))

    def act(self, obs: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        counted = obs[:, 0] <= self.episodes  # The tool asks on, and hears no more of the others.
        right = (obs[:, 1].long() == memory.time) | ~counted
        assert bool(right.all()), "forgotten at the wrong moment"
        self.begun += (memory.time == 0).sum()
        return torch.zeros(len(obs), 1), replace(memory, time=memory.time + 1)


@pytest.mark.parametrize("copies", [1, 3])
def test_stable_baselines_tells_a_memory_where_episodes_begin(copies: int) -> None:
    spec = Spec(obs_shape=(3,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    watching = Watching(12 // copies)
    vectorised = DummyVecEnv([toys.Countdown] * copies)
    vectorised.seed(0)
    _, lengths = evaluate_policy(
        Controller(watching, spec),  # type: ignore[arg-type]
        vectorised,
        n_eval_episodes=12,
        return_episode_rewards=True,
        warn=False,
    )
    assert len(lengths) == 12 and len(set(lengths)) > 2
    assert int(watching.begun) >= 12


@pytest.mark.parametrize("copies", [1, 3])
def test_stable_baselines_evaluates_policies_of_chunks(copies: int) -> None:
    spec = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    expert = load_chunk_model("esscher.chunk_models:dodge_expert", spec)
    vectorised = DummyVecEnv([Dodge] * copies)
    mean, _ = evaluate_policy(
        Controller(ChunkPolicy(expert, 8), spec),  # type: ignore[arg-type]
        vectorised,
        n_eval_episodes=6,
        warn=False,
    )
    assert mean == 1.0, "a chunk of the episode before would hit what stands there"


# ---- the controller itself


def test_predict_takes_one_or_many() -> None:
    policy = Controller(learner("sac", SPEC).policy, SPEC)
    obs = np.random.default_rng(0).normal(size=(4, 5))
    many, _ = policy.predict(obs)
    assert many.shape == (4, 2)
    mode = policy.policy(torch.from_numpy(obs).float()).mode().detach().numpy()
    expected = [[2 * a, 0.2 + 0.1 * b] for a, b in mode]
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-6)
    for row, expected in zip(obs, many, strict=True):
        one, _ = policy.predict(row)
        assert one.shape == (2,)
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)
        batch_of_one, _ = policy.predict(row[None])
        assert batch_of_one.shape == (1, 2)
    assert (many >= [-2.0, np.float32(0.1)]).all() and (many <= [2.0, np.float32(0.3)]).all()
    first, state = policy.predict(obs, state="mine", deterministic=False)
    second, _ = policy.predict(obs, deterministic=False)
    assert state == "mine" and not np.array_equal(first, second)


def test_predict_refuses_other_widths() -> None:
    policy = Controller(learner("sac", SPEC).policy, SPEC)
    with pytest.raises(ValueError, match="5 numbers"):
        policy.predict(np.zeros(4))
    with pytest.raises(ValueError, match="5 numbers"):
        policy.predict(np.zeros((3, 4)))


# ---- ONNX


def policy_for(slug: str, spec: Spec) -> torch.nn.Module | None:
    """An untrained policy, or None where the method refuses such a task."""
    try:
        return learner(slug, spec).policy
    except UserError:
        return None


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_onnx_acts_as_predict(slug: str, tmp_path: Path) -> None:
    choices = Spec(obs_shape=(5,), action_shape=(), num_actions=3, action_start=-1)
    theirs = np.eye(2)
    policies = [Controller(p, spec) for spec in (SPEC, choices) if (p := policy_for(slug, spec))]
    if not policies:  # It needs a task that tells it more than its spaces.
        policies = [Controller(learner(slug).policy, spec_of(slug))]
    for number, policy in enumerate(policies):
        path = tmp_path / f"policy{number}.onnx"
        if remembers(policy.policy):
            with pytest.raises(UserError, match="remembers its episode"):
                policy.to_onnx(path)
            continue
        policy.to_onnx(path)
        assert [p.name for p in tmp_path.iterdir() if p.stem == path.stem] == [path.name]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == ["obs"]
        assert [o.name for o in session.get_outputs()] == ["action"]
        for size in (1, 2, 7):
            wide = (size, policy.spec.obs_dim)
            obs = np.random.default_rng(size).normal(size=wide).astype(np.float32) * 3
            (theirs,) = session.run(None, {"obs": obs})
            ours, _ = policy.predict(obs)
            assert theirs.shape == ours.shape
            np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
        assert np.ptp(theirs, axis=0).max() > 0, "a constant would pass"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    policy = Controller(learner("sac", SPEC).policy, SPEC)
    policy.train()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    policy.to_onnx(tmp_path / "policy.onnx")
    assert policy.training
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


# ---- TensorBoard


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def expected_events(run: Path) -> dict[str, list[tuple[int, float]]]:
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                tag = f"{row['phase']}/{name}"
                expected.setdefault(tag, []).append((row["step"], float(np.float32(value))))
    return expected


def test_tensorboard_reads_the_same_values(run: Path) -> None:
    expected = expected_events(run)
    assert {"train/critic_loss", "train/return", "evaluate/return_mean"} <= expected.keys()
    assert events(run) == expected


def test_tensorboard_has_no_doubles_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    parts = smoke(
        "sac",
        steps=300,
        log=esscher.LogConfig(every=20),
        checkpoint=esscher.CheckpointConfig(every=50),
        evaluation=esscher.EvaluationConfig(every=50, episodes=1, step_limit=10),
    )
    train_until(parts, run, 100, monkeypatch)
    from esscher.runtime import checkpoint

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save", die)  # Rows up to 150 are on disk, and are undone.
        with pytest.raises(Killed):
            esscher.resume(run, display=False)
    die_after(200, monkeypatch, lambda: esscher.resume(run, display=False))
    esscher.resume(run, display=False)
    assert events(run) == expected_events(run)


# ---- safetensors


def test_safetensors_opens_every_file(run: Path) -> None:
    files = sorted(run.rglob("*.safetensors"))
    assert len(files) >= 3
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert names
            for name in names:
                assert math.isfinite(file.get_tensor(name).double().sum().item()) or "envs" in name
    with safe_open(run / "checkpoints" / "step_000000300" / "state.safetensors", "np") as file:
        weights = file.get_tensor("method.actor.net.weights.0")
    assert weights.shape == (3, 32)
    np.testing.assert_array_equal(weights, esscher.load(run).method.actor.net.weights[0].detach())

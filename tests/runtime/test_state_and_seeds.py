"""State by attribute name, seeds by counter, settings as data, metrics as means."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esscher
from esscher.errors import UserError
from esscher.experience import Replay
from esscher.experiment import EvaluationConfig
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.evaluate import Evaluator
from esscher.runtime.metrics import Averager, MetricsLog
from esscher.runtime.rng import Phase, mix, numpy_generator, seed_phase
from esscher.runtime.state import Stateful
from support import RUNTIME, smoke, train


class Part(Stateful):
    def __init__(self, value: float):
        self.weight = torch.full((2,), value)
        self.count = int(value)


class Whole(Stateful):
    def __init__(self, value: float):
        self.net = nn.Linear(2, 2)
        self.net.weight.data.fill_(value)
        self.norm = nn.BatchNorm1d(2)
        self.part = Part(value)
        self.parts = [Part(value + 1), Part(value + 2)]
        self.pair = (torch.tensor(value), 3 * value)
        self.table = {"a": torch.tensor([value]), "b": {"c": value}}
        self.name, self.flag, self.nothing = f"v{value}", value > 1, None
        self.cfg = object()
        self._cache = object()


def test_state_is_flat_and_complete() -> None:
    state = Whole(1.0).state_dict()
    assert {"net.weight", "net.bias", "norm.running_mean", "norm.num_batches_tracked"} <= set(state)
    assert {"part.weight", "part.count", "parts.0.weight", "parts.1.count"} <= set(state)
    assert {"pair.0", "pair.1", "table.a", "table.b.c", "name", "flag", "nothing"} <= set(state)
    assert not any(name.startswith(("cfg", "_cache")) for name in state)


def test_state_comes_back_in_place() -> None:
    one, two = Whole(1.0), Whole(5.0)
    kept = two.parts[1].weight
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in one.state_dict().items()}
    two.load_state_dict(state)
    for name, value in state.items():
        got = two.state_dict()[name]
        assert torch.equal(got, value) if torch.is_tensor(value) else got == value, name
    assert two.parts[1].weight is kept and isinstance(two.pair, tuple)
    one.parts[0].weight.fill_(9)
    assert not torch.equal(two.parts[0].weight, one.parts[0].weight)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.zeros(2), lambda: 1, [object()]])
def test_what_cannot_be_saved_is_refused_by_name(value: Any) -> None:
    whole = Whole(1.0)
    whole.extra = value
    with pytest.raises(TypeError, match=r"Whole\.extra"):
        whole.state_dict()


def test_states_that_do_not_fit_are_refused() -> None:
    whole = Whole(1.0)
    state = whole.state_dict()
    with pytest.raises(ValueError, match="missing.*part.count"):
        whole.load_state_dict({k: v for k, v in state.items() if k != "part.count"})
    with pytest.raises(ValueError, match="unexpected.*surplus"):
        whole.load_state_dict({**state, "surplus": 1})
    with pytest.raises(ValueError, match="part.weight has shape"):
        whole.load_state_dict({**state, "part.weight": torch.zeros(3)})


# ---- seeds


def test_mix_tells_its_arguments_apart() -> None:
    assert len({mix(), mix(0), mix(0, 0), mix(0, 0, 0), mix(1), mix(0, 1), mix(1, 0)}) == 7


def test_mix_spreads_every_bit() -> None:
    draw = np.random.default_rng(0)
    for position in range(3):
        for bit in (0, 1, 5, 17, 40):
            flips = np.zeros(63)
            for counters in draw.integers(0, 2**62, (200, 3)).tolist():
                changed = list(counters)
                changed[position] ^= 1 << bit
                difference = mix(*counters) ^ mix(*changed)
                flips += [(difference >> k) & 1 for k in range(63)]
            assert (np.abs(flips / 200 - 0.5) < 0.2).all()


def test_mix_stays_in_range_and_does_not_collide() -> None:
    values = [mix(0, 0, step, phase) for step in range(4_000) for phase in Phase]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)


def test_seed_phase_is_a_function_of_its_arguments() -> None:
    def draw(*arguments: Any, **options: Any) -> float:
        seed_phase(*arguments, **options)
        return torch.rand(3).sum().item()

    reference = draw(0, 5, Phase.ACT)
    torch.rand(100)
    assert draw(0, 5, Phase.ACT) == reference
    others = [(1, 5, Phase.ACT), (0, 6, Phase.ACT), (0, 5, Phase.UPDATE)]
    values = [draw(*other) for other in others] + [draw(0, 5, Phase.ACT, rank=1), reference]
    assert len(set(values)) == 5
    first, second = (numpy_generator(0, 5, Phase.ACT).random(4) for _ in range(2))
    assert np.array_equal(first, second)


# ---- experiments as data


def test_experiments_come_back_from_json() -> None:
    for experiment in (
        smoke("sac"),
        smoke("sac", env_kwargs={"g": 9.0}, env_max_episode_steps=7, label="mine", seed=2**62),
        smoke("sac", log=esscher.LogConfig(to=("tensorboard", "wandb"))),
    ):
        data = json.loads(json.dumps(experiment.to_json()))
        assert esscher.Experiment.from_json(data) == experiment


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("evaluation.evry", 3, ["evaluation", "evry", "every"]),
        ("evaluation.every", "3", ["evaluation.every", "int", "'3'"]),
        ("evaluation.every", 3.5, ["evaluation.every", "3.5"]),
        ("evaluation.episodes", True, ["evaluation.episodes", "True"]),
        ("evaluation.deterministic", 1, ["evaluation.deterministic", "bool"]),
        ("checkpoint.keep", 0, ["checkpoint.keep", ">= 1", "0"]),
        ("runtime.graph", "fast", ["graph", "auto, eager, compile", "fast"]),
        ("log.to", ["tensorbord"], ["log.to", "tensorbord"]),
        ("seed", -1, ["seed", "-1"]),
        ("seed", None, ["seed", "None"]),
        ("seeds", 1, ["seeds", "seed"]),
        ("stages", [], ["stages"]),
        ("stages.0.env.num", 0, ["env.num", "0"]),
        ("stages.0.data", 3, ["data"]),
        ("evaluation", 3, ["evaluation", "table"]),
        ("slug", "sacc", ["sacc", "sac"]),
    ],
)
def test_bad_settings_are_refused_by_name(path: str, value: Any, words: list[str]) -> None:
    data = json.loads(json.dumps(smoke("sac").to_json()))
    place: Any = data
    *parents, last = path.split(".")
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    with pytest.raises(UserError) as caught:
        esscher.Experiment.from_json(data)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_settings_are_checked_in_python_too() -> None:
    with pytest.raises(UserError, match=r"runtime\.graph must be one of auto, eager, compile"):
        smoke("sac", runtime=RuntimeConfig(graph="fast"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation\.every"):
        smoke("sac", evaluation=EvaluationConfig(every=2.5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="threads"):
        RuntimeConfig(threads=-1)
    with pytest.raises(UserError, match=r"runtime\.device is cuda.*use cpu"):
        if torch.cuda.is_available():
            raise UserError("runtime.device is cuda, use cpu")
        RuntimeConfig(device="cuda").resolve(10)


def test_automatic_choices() -> None:
    short, long = RuntimeConfig().resolve(100), RuntimeConfig(device="cpu").resolve(10**6)
    assert short.graph == "eager" and short.device != "auto" and 1 <= short.threads <= 4
    assert long.graph in ("eager", "compile")
    assert RUNTIME.resolve(10**6) == RUNTIME


def test_without_a_compiler_it_says_that_it_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="there is no compiler .* running eagerly"):
        assert RuntimeConfig(device="cpu", graph="compile").resolve(100).graph == "eager"


def test_bfloat16_computes_in_bfloat16() -> None:
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager", precision="bfloat16"))
    weight = torch.randn(4, 4)
    assert runtime.graph(lambda x: x @ weight)(torch.randn(2, 4)).dtype == torch.bfloat16
    assert Runtime(RUNTIME).graph(lambda x: x @ weight)(torch.randn(2, 4)).dtype == torch.float32


def test_bfloat16_sees_weights_after_a_step() -> None:
    """Autocast's own cache would go on with the cast of before the step."""
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager", precision="bfloat16"))
    weight = torch.nn.Parameter(torch.eye(4))

    def piece(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = (x @ weight).sum()
        with torch.no_grad():
            weight.mul_(3)
        return before, (x @ weight).sum()

    before, after = runtime.graph(piece)(torch.ones(2, 4))
    assert (before.item(), after.item()) == (8, 24)


def test_bfloat16_trains_in_float32(tmp_path: Path) -> None:
    runtime = RuntimeConfig(device="cpu", threads=1, graph="eager", precision="bfloat16")
    train(smoke("sac", steps=110, runtime=runtime), tmp_path / "run")
    method = esscher.load(tmp_path / "run").method
    assert all(p.dtype == torch.float32 for p in method.actor.parameters())


# ---- metrics


def test_averager_gives_means_since_the_last_drain() -> None:
    averager = Averager()
    averager.add([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(4.0)}], [])
    averager.add([{"loss": torch.tensor(7.0), "rare": torch.tensor(5.0)}], [(10.0, 4), (20.0, 8)])
    row = averager.drain()
    assert row == {"loss": 4.0, "rare": 5.0, "return": 15.0, "length": 6.0, "episodes": 2}
    assert averager.drain() == {}


def test_averager_does_not_change_what_it_is_given() -> None:
    averager, value = Averager(), torch.tensor(1.0)
    averager.add([{"loss": value}], [])
    averager.add([{"loss": torch.tensor(4.0)}], [])
    value.fill_(100.0)
    assert averager.drain() == {"loss": 2.5} and value.item() == 100.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_averager_continues_exactly(dtype: torch.dtype) -> None:
    def feed(averager: Averager, start: int, stop: int) -> None:
        for step in range(start, stop):
            value = torch.tensor((step + 1) * 1.1).to(dtype)
            averager.add([{"loss": value}], [(step * 0.1, step)])

    whole, first, second = Averager(), Averager(), Averager()
    feed(whole, 0, 50)
    feed(first, 0, 23)
    feed(second, 0, 7)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state, torch.device("cpu"))
    feed(second, 23, 50)
    assert second.drain() == whole.drain()


def test_rows_are_cut_at_the_offset(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, (), "x", {})
    log.append({"phase": "train", "step": 1})
    offset = log.offset
    log.append({"phase": "train", "step": 2})
    log.close()
    log = MetricsLog(tmp_path, (), "x", {}, offset, 1)
    assert log.offset == offset
    log.append({"phase": "train", "step": 3})
    assert log.offset == (tmp_path / "metrics.jsonl").stat().st_size
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3]


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log\.to wandb: not installed \(pip install wandb\)"):
        train(smoke("sac", log=esscher.LogConfig(to=("wandb",))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Replay.sample

    def poisoned(self: Replay, size: int) -> Any:
        batch = sample(self, size)
        batch.reward.fill_(math.inf)  # The next action is not a number.
        return batch

    monkeypatch.setattr(Replay, "sample", poisoned)
    with pytest.raises(UserError, match=r"step 10\d.*training has diverged"):
        train(smoke("sac"), tmp_path / "run")


# ---- evaluation


def test_evaluation_is_the_sum_of_each_first_episode() -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, obs: torch.Tensor) -> Any:
            class Zero:
                def mode(self) -> torch.Tensor:
                    return torch.zeros(len(obs), 1)

            return Zero()

    config = EvaluationConfig(episodes=6)
    env = esscher.EnvConfig(id="toys:Countdown")
    evaluator = Evaluator(env, config, seed=3)
    first, second = evaluator(Still()), evaluator(Still())
    assert first == second, "each evaluation starts from the same seeds"
    import toys

    for k in range(6):
        single = toys.Countdown()
        single.reset(seed=mix(3, 0, Phase.EVALUATE, k) % 2**31)
        total, length, done = 0.0, 0, False
        while not done:
            _, reward, terminated, truncated, _ = single.step(np.zeros(1, np.float32))
            total, length, done = total + reward, length + 1, terminated or truncated
        assert first.lengths[k] == length
        assert first.returns[k] == pytest.approx(total, rel=1e-5)
    assert len(set(first.lengths)) > 1
    assert first.mean == pytest.approx(np.mean(first.returns))
    other = Evaluator(env, config, seed=4)(Still())
    assert other.returns != first.returns
    evaluator.close()


def test_evaluation_by_samples_repeats_itself() -> None:
    config = EvaluationConfig(episodes=2, step_limit=20, deterministic=False)
    evaluator = Evaluator(esscher.EnvConfig(id="Pendulum-v1"), config, 0)
    policy = smoke_policy()
    torch.manual_seed(1)
    first = evaluator(policy)
    torch.manual_seed(2)
    assert evaluator(policy) == first
    evaluator.close()


def test_evaluation_is_cut_at_its_step_limit() -> None:
    policy = smoke_policy()
    evaluator = Evaluator(
        esscher.EnvConfig(id="Pendulum-v1"), EvaluationConfig(episodes=2, step_limit=7), 0
    )
    assert evaluator(policy).lengths == [7, 7]
    evaluator.close()


def smoke_policy() -> nn.Module:
    from esscher.types import Spec
    from support import learner

    spec = Spec(obs_shape=(3,), action_shape=(1,), action_low=(-2.0,), action_high=(2.0,))
    return learner("sac", spec).policy

"""What every method of the catalogue must do, the next one included: no list to extend."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, UnionType
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import esscher
from esscher.adapters.diffusers import load_diffusion
from esscher.errors import UserError
from esscher.experiment import ModelConfig
from esscher.method import act_by
from esscher.registry import catalogue, find, load_method, load_module, recipes, slug_of
from esscher.runtime import device
from esscher.runtime.device import compiler_available
from esscher.runtime.state import EXCLUDED
from esscher.samplers.decoding import Decoding
from esscher.samplers.tree import Tree
from support import (
    advance,
    assert_same_run,
    data_of,
    differences,
    final_state,
    metrics,
    of_world,
    parts_after,
    policy_leaves,
    smoke,
    spec_of,
    store,
    take_over,
    train,
    train_until,
)

SLUGS = list(catalogue())
CONTROL = of_world("control")


@pytest.fixture(scope="module", params=SLUGS)
def method(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A slug, and the folder of its finished smoke run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    steps = recipes(request.param)["smoke"]().stages[-1].steps
    checkpoint = esscher.CheckpointConfig(every=steps // 2)
    train(smoke(request.param, checkpoint=checkpoint), folder)
    return request.param, folder


# ---- the smoke run


def test_it_runs_and_learns_something_finite(method: Any) -> None:
    slug, run = method
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and result["updates"] > 0 and result["slug"] == slug
    state = final_state(run)
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.isfinite(value).all(), name
    method = parts_after(smoke(slug), 0).method
    fresh, leaves = method.state_dict(), policy_leaves(method)
    assert leaves and any(not torch.equal(fresh[n], state[f"method.{n}"]) for n in leaves)


def test_it_reports_finite_numbers(method: Any) -> None:
    _, run = method
    rows = metrics(run)
    trained = [row for row in rows if row["phase"] == "train" and row["updates"] > 0]
    assert len(trained) >= 2 and any(row["phase"] == "evaluate" for row in rows)
    counted = {"phase", "step", "updates", "return", "length", "episodes"}
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
    assert any(set(row) - counted for row in trained), "an update must report something"


def test_the_same_seed_gives_the_same_bits(method: Any, tmp_path: Path) -> None:
    slug, run = method
    evaluation = recipes(slug)["smoke"]().evaluation
    # Evaluated more often as well, which must not change anything that is learned.
    often = replace(evaluation, every=max(evaluation.every // 4, 1), deterministic=False)
    checkpoint = esscher.CheckpointConfig(every=0)
    train(smoke(slug, evaluation=often, checkpoint=checkpoint), tmp_path / "run")
    assert differences(final_state(run), final_state(tmp_path / "run")) == []
    rows, others = (
        [row for row in metrics(f) if row["phase"] == "train"] for f in (run, tmp_path / "run")
    )
    assert rows == others
    assert len(metrics(tmp_path / "run")) > len(metrics(run))


def test_resumed_at_half_it_equals_the_whole(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slug, run = method
    parts = smoke(slug)
    half = parts.stages[-1].steps // 2
    parts = replace(parts, checkpoint=esscher.CheckpointConfig(every=half))
    train_until(parts, tmp_path / "run", half, monkeypatch)
    esscher.resume(tmp_path / "run", display=False)
    assert_same_run(tmp_path / "run", run)


@pytest.mark.parametrize("slug", CONTROL)
def test_discrete_tasks_resume_exactly_or_are_refused(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two copies, and checkpoints that fall inside a rollout."""
    if data_of(slug) is not None:
        with pytest.raises(UserError):  # The method, or its data, do not fit.
            train(smoke(slug, env_id="CartPole-v1", env_kwargs={}), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    parts = smoke(
        slug,
        env_id="CartPole-v1",
        env_kwargs={},
        env_num=2,
        checkpoint=esscher.CheckpointConfig(every=150),
        evaluation=esscher.EvaluationConfig(every=0, episodes=1, step_limit=20),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    try:
        train(parts, whole)
    except UserError as error:
        assert "continuous" in str(error) and slug in str(error)
        assert not whole.exists()
        return
    train_until(parts, run, 150, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


@pytest.mark.parametrize("slug", SLUGS)
def test_another_seed_gives_another_learner(slug: str) -> None:
    experiment = smoke(slug)
    states = []
    for seed in (0, 1):
        parts = parts_after(replace(experiment, seed=seed), 2)
        states.append({k: v.clone() for k, v in parts.state_dict().items() if torch.is_tensor(v)})
        parts.close()
    (left, right), leaves = states, [f"method.{name}" for name in policy_leaves(parts.method)]
    for name in leaves:
        if name.endswith("weights.0"):
            assert not torch.equal(left[name], right[name]), name
    assert any(not torch.equal(left[name], right[name]) for name in leaves)
    assert parts.world.kind != "online" or not torch.equal(left["loop.obs"], right["loop.obs"])


# ---- saved and loaded


@pytest.mark.parametrize("slug", SLUGS)
def test_loaded_into_one_that_already_trained(slug: str) -> None:
    experiment = smoke(slug)
    # What a language model begins with belongs to the run, as do its rows held out.
    other = replace(experiment, seed=int(load_method(slug).world == "control"))
    one, two = parts_after(experiment, 3), parts_after(other, 4)
    state = take_over(one, two)
    assert differences(state, two.state_dict()) == []
    for parts in (one, two):
        advance(parts, experiment, 3)
        parts.close()
    assert differences(one.state_dict(), two.state_dict()) == []
    assert differences(state, one.state_dict()) != []


def reachable(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that hangs on a method, by whatever name."""
    if id(value) in seen or isinstance(value, type | ModuleType | str | int | float | bool | None):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, item in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{path}.{name}", item
    elif isinstance(value, MethodType):
        yield from reachable(value.__self__, path, seen)
    elif isinstance(value, FunctionType):
        for index, cell in enumerate(value.__closure__ or ()):
            yield from reachable(cell.cell_contents, f"{path}<{index}>", seen)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from reachable(item, f"{path}.{name}", seen)
    elif isinstance(value, list | tuple | set):
        for index, item in enumerate(value):
            yield from reachable(item, f"{path}.{index}", seen)
    elif isinstance(value, Tree):
        return  # Its tensors grow, and what is saved of them are copies: see test_tree.
    elif not isinstance(value, BuiltinFunctionType) and hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            if name not in EXCLUDED:
                yield from reachable(item, f"{path}.{name}", seen)


def hidden_scalars(value: Any, path: str) -> dict[str, Any]:
    """Counters under private names, which no checkpoint holds."""
    found: dict[str, Any] = {}
    for name, item in vars(value).items():
        if name.startswith("_") and isinstance(item, bool | int | float | str):
            found[f"{path}.{name}"] = item
        elif hasattr(item, "state_dict") and not isinstance(item, nn.Module):
            found |= hidden_scalars(item, f"{path}.{name}")
    return found


@pytest.mark.parametrize("slug", SLUGS)
def test_the_state_covers_every_attribute(slug: str) -> None:
    experiment = smoke(slug)
    parts = parts_after(experiment, 2)
    saved = {v.data_ptr() for v in parts.method.state_dict().values() if torch.is_tensor(v)}
    tensors = list(reachable(parts.method, slug, set()))
    assert len(tensors) >= 8
    forgotten = {path: tensor for path, tensor in tensors if tensor.data_ptr() not in saved}
    kept = {path: tensor.clone() for path, tensor in forgotten.items()}
    before = hidden_scalars(parts.method, slug) | hidden_scalars(parts.experience, "experience")
    advance(parts, experiment, 3)
    parts.close()
    after = hidden_scalars(parts.method, slug) | hidden_scalars(parts.experience, "experience")
    assert before == after, "what changes must be saved, so its name may not be private"
    if slug in CONTROL:
        assert list(forgotten) == []
    for path, tensor in forgotten.items():  # Frozen models are made again from their source.
        assert torch.equal(tensor, kept[path]), path


def test_deployed_it_does_as_when_it_was_saved(method: Any) -> None:
    slug, run = method
    check = {
        "control": acts_as_when_it_was_saved,
        "language": writes_as_when_it_was_saved,
        "diffusion": draws_as_when_it_was_saved,
        "sets": embeds_as_when_it_was_saved,
    }.get(load_method(slug).world)
    if check is not None:  # Of robots that see: tests/runtime/test_robot_world.py.
        check(slug, run)


def writes_as_when_it_was_saved(slug: str, run: Path) -> None:
    one, two = esscher.load(run), esscher.load(run)
    prompts, few = ["1+1=", "20+3="], Decoding(max_new_tokens=8)
    written = one.policy.complete(prompts, seed=3, decoding=few)
    assert written == two.policy.complete(prompts, seed=3, decoding=few)
    assert written != one.policy.complete(prompts, seed=4, decoding=few)
    opened = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    tokens = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        full = opened(tokens).logits[0, :-1].log_softmax(-1)
        ours = one.method.policy.log_prob(tokens, everything, everything)[0, 1:]
    torch.testing.assert_close(ours, full.gather(-1, tokens[0, 1:, None]).squeeze(-1))


def draws_as_when_it_was_saved(slug: str, run: Path) -> None:
    one, two = esscher.load(run), esscher.load(run)
    drawn = one.policy.draw(4, seed=3)
    assert torch.equal(drawn, two.policy.draw(4, seed=3))
    assert not torch.equal(drawn, one.policy.draw(4, seed=4))
    torch.testing.assert_close(drawn[:2], one.policy.draw(2, seed=3))
    saved = run / "model"
    assert saved.exists() is load_method(slug).trains
    if (saved / "model_index.json").exists():
        again = load_diffusion(ModelConfig(source=str(saved)), torch.device("cpu"))
        same = zip(one.policy.model.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    elif saved.exists():
        state = load_tensors((saved / "model.safetensors").read_bytes())
        assert differences(state, one.policy.model.denoiser.state_dict()) == []


def embeds_as_when_it_was_saved(slug: str, run: Path) -> None:
    one, two = esscher.load(run), esscher.load(run)
    spec, data = one.policy.spec, data_of(slug)
    sets = [spec.restored(data.x[start : start + 9].double()).numpy() for start in (0, 20, 40)]
    z = one.policy.embed(sets)
    assert torch.equal(z, two.policy.embed(sets))
    torch.testing.assert_close(z[1], one.policy.embed(sets[1:2])[0])
    torch.testing.assert_close(z[0], one.method.embed(data.x[None, :9])[0], atol=1e-4, rtol=1e-4)
    drawn = one.policy.sample(z, 5, seed=3)
    assert drawn.shape == (3, 5, *spec.shape)
    assert torch.equal(drawn, two.policy.sample(z, 5, seed=3))
    assert not torch.equal(drawn, one.policy.sample(z, 5, seed=4))
    torch.testing.assert_close(drawn[:2], one.policy.sample(z[:2], 5, seed=3))


def acts_as_when_it_was_saved(slug: str, run: Path) -> None:
    loaded, spec = esscher.load(run), spec_of(slug)
    method = loaded.method

    def act(explore: bool, obs: torch.Tensor) -> torch.Tensor:
        if hasattr(method, "act"):
            return method.act(obs, explore=explore).value
        return act_by(method.policy, obs, explore=explore)

    obs = torch.randn(5, *spec.obs_shape, generator=torch.Generator().manual_seed(0))
    action = act(False, obs)
    assert action.shape == (5, *spec.action_shape)
    deployed, _ = loaded.policy.predict(obs.numpy())
    if spec.num_actions is None:
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        native = (low + high) / 2 + action.clamp(-1, 1) * (high - low) / 2
        torch.testing.assert_close(torch.from_numpy(deployed), native)
    else:
        assert deployed.tolist() == (action + spec.action_start).tolist()
    assert torch.equal(action, act(False, obs))
    if method.loop == "online":
        many = obs.repeat(200, 1)  # Of all these one or another is not what is thought best.
        assert not torch.equal(act(True, many), act(True, many)), "exploring must be random"


# ---- compiled


@pytest.fixture(scope="module")
def captured() -> dict[str, Any]:
    """What compiled.py found, in a process without the run-time checks of this one."""
    environment = {**os.environ, "ESSCHER_TYPECHECK": "0"}
    command = [sys.executable, str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("slug", CONTROL)
def test_pieces_can_be_captured(slug: str, captured: dict[str, Any]) -> None:
    """Each as one graph without a break, run by torch's own kernels."""
    assert captured[slug]["pieces"] >= 1
    assert captured[slug]["difference"] < 1e-5


def test_bfloat16_is_captured_as_one_graph_too(captured: dict[str, Any]) -> None:
    """Casts of weights must not outlive the optimiser's step that changes the weights."""
    assert captured["bfloat16 sac"]["pieces"] >= 1
    assert captured["bfloat16 sac"]["difference"] < 1e-2


@pytest.mark.skipif(not compiler_available("cpu"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(captured: dict[str, Any]) -> None:
    """With the compiler itself: for one method only, because it takes half a minute each."""
    assert captured["compiled sac"]["pieces"] >= 1
    assert captured["compiled sac"]["difference"] < 1e-5


@pytest.mark.usefixtures("unchecked")
def test_without_a_compiler_it_runs_eagerly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.warns(UserWarning, match="running eagerly instead"):
            function = device._compile_or_fall_back(lambda x: (x + 1).tanh().sum())
            value = function(torch.ones(3))
        assert value.item() == pytest.approx(3 * math.tanh(2))
        assert function(torch.zeros(3)).item() == pytest.approx(3 * math.tanh(1))


# ---- settings


BAD = {
    "discount": [-0.1, 1.2],
    "tau": [0.0, -0.1, 1.1],
    "gae_lambda": [-0.1, 1.1],
    "batch_size": [0, 10**9],
    "buffer_size": [0],
    "updates_per_step": [0.0, -1.0],
    "num_critics": [0],
    "target_update_interval": [0],
    "policy_delay": [0],
    "conjugate_weight": [0.0, 1.0, -0.1],
    "backward_scale": [-0.1],
    "weight_cap": [0.0, -1.0],
    "max_exponent": [0.0, -1.0],
    "policy_weight_decay": [-0.1],
    "num_episodes": [0, 10**6],
    "delay_update": [0],
    "rollout_length": [0],
    "epochs": [0],
    "num_minibatches": [0, 10**6],
    "clip": [0.0, -0.1],
    "alpha": [-0.1],
    "initial_alpha": [0.0, -1.0],
    "reward_scale": [0.0, -1.0],
    "max_grad_norm": [0.0, -1.0],
    "log_std_range": [(1.0, 0.0)],
    "hidden": [(0,), (8, -1)],
    "policy_hidden": [(0,), (8, -1)],
}


def bad_by_type(kind: Any) -> list[Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        values = [bad_by_type(option) for option in arguments]
        return [v for v in values[0] if v != "nonsense"] + ["nonsense"]
    if origin is typing.Literal:
        return ["nonsense", 7]
    if origin is tuple:
        return ["nonsense", ("x", "y"), 3]
    return {float: [math.nan, math.inf, "nonsense"], int: [-1, 0.5, "nonsense"]}.get(
        kind, ["nonsense"]
    )


def bad_settings() -> list[Any]:
    cases = []
    for slug in SLUGS:
        config = load_method(slug).Config
        for name, kind in typing.get_type_hints(config).items():
            values = bad_by_type(kind) + BAD.get(name, [])
            if name.endswith("learning_rate"):
                values += [0.0, -1e-3]
            cases += [pytest.param(slug, name, v, id=f"{slug}-{name}-{v}") for v in values]
    return cases


@pytest.mark.parametrize(("slug", "name", "value"), bad_settings())
def test_a_bad_setting_is_refused_by_name(slug: str, name: str, value: Any) -> None:
    experiment = smoke(slug)
    with pytest.raises((ValueError, TypeError)) as caught:
        config = replace(experiment.method, **{name: value})
        experiment = replace(experiment, method=config)
        store(load_method(slug)(config, spec_of(slug), device.Runtime()), data_of(slug))
    if caught.type is UserError:
        assert name in str(caught.value), str(caught.value)
    else:
        assert isinstance(value, str | tuple) or value == 3, "only what is of another type"


@pytest.mark.parametrize("slug", SLUGS)
def test_settings_survive_the_round_trip(slug: str) -> None:
    for recipe in recipes(slug).values():
        experiment = recipe()
        data = json.loads(json.dumps(experiment.to_json()))
        assert esscher.Experiment.from_json(data) == experiment
    assert slug_of(experiment.method) == slug
    names = [field.name for field in dataclasses.fields(experiment.method)]
    name = next(name for name in ("hidden", "learning_rate", "batch_size") if name in names)
    wrong = {"hidden": "hiden", "learning_rate": "lerning_rate"}.get(name, "bacth_size")
    with pytest.raises(UserError, match=f"no setting '{wrong}': did you mean .*{name}"):
        esscher.Experiment.from_json({**data, "method": {**data["method"], wrong: 64}})
    with pytest.raises(UserError, match=name):
        esscher.Experiment.from_json({**data, "method": {**data["method"], name: "wide"}})


@pytest.mark.parametrize("slug", SLUGS)
def test_the_file_has_what_the_catalogue_needs(slug: str) -> None:
    entry, module = find(slug), load_module(slug)
    assert dataclasses.asdict(module.PAPER).items() >= entry.paper.items()
    assert entry.paper["title"] and entry.paper["purpose"].endswith(".")
    assert {"smoke", "paper"} <= set(recipes(slug)) or entry.baseline
    assert module.__doc__ and "|" in module.__doc__, "the symbol table"
    for field in dataclasses.fields(module.Config):
        assert field.kw_only and field.default is not dataclasses.MISSING, field.name

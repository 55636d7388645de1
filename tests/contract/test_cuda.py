"""Every method on a GPU, the next one included; skipped where there is none.

pytest tests/contract/test_cuda.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import esscher
from esscher.registry import catalogue, recipes
from esscher.runtime.device import RuntimeConfig
from support import assert_same_run, final_state, of_world, smoke, train, train_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = RuntimeConfig(device="cuda", threads=1, graph="eager")


def half(slug: str) -> int:
    return recipes(slug)["smoke"]().stages[-1].steps // 2


def on_gpu(slug: str, **runtime: Any) -> esscher.Experiment:
    checkpoint = esscher.CheckpointConfig(every=half(slug))
    return smoke(slug, runtime=replace(CUDA, **runtime), checkpoint=checkpoint)


@pytest.fixture(scope="module", params=list(catalogue()))
def method(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A slug, and the folder of its finished smoke run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(on_gpu(request.param), folder)
    return request.param, folder


def test_it_learns_something_finite(method: Any) -> None:
    slug, run = method
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and result["updates"] > 0
    for name, value in final_state(run).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.isfinite(value).all(), (slug, name)


def test_resumed_at_half_it_equals_the_whole(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slug, run = method
    train_until(on_gpu(slug), tmp_path / "run", half(slug), monkeypatch)
    esscher.resume(tmp_path / "run", display=False)
    assert_same_run(tmp_path / "run", run)


def test_it_is_read_on_the_cpu(method: Any) -> None:
    slug, run = method
    loaded = esscher.load(run)
    for name, value in loaded.method.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cpu", (slug, name)


@pytest.mark.parametrize("slug", list(catalogue()))
def test_bfloat16(slug: str, tmp_path: Path) -> None:
    train(on_gpu(slug, precision="bfloat16"), tmp_path / "run")
    for name, value in final_state(tmp_path / "run").items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.isfinite(value).all(), (slug, name)


@pytest.mark.parametrize("slug", of_world("control"))
@pytest.mark.usefixtures("unchecked")
def test_compiled(slug: str, tmp_path: Path) -> None:
    train(on_gpu(slug, graph="compile"), tmp_path / "run")

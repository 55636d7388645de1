"""Runs about populations: what is measured, shown, kept, refused, and what a user gets."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import esscher
from esscher.embedder import Embedder
from esscher.errors import UserError
from esscher.experiment import EvaluationConfig, SetConfig
from esscher.runtime.device import Runtime
from esscher.runtime.sets import SetWorld, redraw
from esscher.types import SetSpec
from support import RUNTIME, smoke, train

POPULATIONS: list[Any] = []
LAST = EvaluationConfig(every=0, episodes=3)
"""Only once, since a picture takes longer than so small a run."""


def given() -> list[Any]:
    return POPULATIONS


def populations(count: int = 12, size: int = 50) -> list[Any]:
    draw = np.random.default_rng(0)
    return [k + draw.normal(size=(size + k, 2)) for k in range(count)]


def world_of(share: float = 0.5, standardise: bool = False, **sets: Any) -> SetWorld:
    experiment = esscher.Experiment.of(
        "gde",
        data=f"{__name__}:given",
        sets=SetConfig(held_out_share=share, standardise=standardise, **sets),
        steps=1,
        evaluation=EvaluationConfig(episodes=5),
        runtime=RUNTIME,
    )
    return SetWorld(experiment, Runtime(RUNTIME))


class Shifted:
    """Embeds a set by its mean, and draws what it saw, moved."""

    cfg = SimpleNamespace(class_weight=0.0)

    def __init__(self, shift: float):
        self.shift, self.seen = shift, torch.zeros(0)

    def embed(self, x: torch.Tensor, mask: Any) -> torch.Tensor:
        assert mask is not None
        self.seen = x
        return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def draw(self, z: torch.Tensor, count: int, seeds: Any) -> torch.Tensor:
        assert count == self.seen.shape[1] and len(set(seeds)) == len(z)
        return self.seen + self.shift


def test_a_shift_is_as_far_as_it_is() -> None:
    """W2 of Gaussian fits is its length, the sliced one its length over the root of the dimension."""
    POPULATIONS[:] = populations()
    found = world_of().evaluate(Shifted(3.0), 0)
    assert found.measure == "negative Wasserstein-2 distance" and len(found.returns) == 5
    assert found.returns == pytest.approx([-3 * math.sqrt(2)] * 5, rel=1e-4)
    assert found.extras["sliced_w2_mean"] == pytest.approx(3, rel=0.1)
    assert found.extras["latent_rank_correlation"] > 0.95
    near = world_of().evaluate(Shifted(0.0), 0)
    assert near.mean == pytest.approx(0, abs=1e-3)


def test_wide_samples_are_compared_along_principal_axes(monkeypatch: Any) -> None:
    """Along the first axis, on which populations differ, a shift by 3 in each is 3 long."""
    POPULATIONS[:] = [one * np.array([1.0, 0.01]) for one in populations()]
    monkeypatch.setattr("esscher.runtime.sets.WIDE", 1)
    found = world_of().evaluate(Shifted(3.0), 0)
    assert found.returns == pytest.approx([-3] * 5, rel=1e-2)
    assert found.extras["sliced_w2_mean"] == pytest.approx(3, rel=1e-2)


def test_vectors_that_are_all_the_same_rank_nothing() -> None:
    POPULATIONS[:] = populations()

    class Blind(Shifted):
        def embed(self, x: torch.Tensor, mask: Any) -> torch.Tensor:
            return super().embed(x, mask) * 0

    assert world_of().evaluate(Blind(1.0), 0).extras["latent_rank_correlation"] == 0


def test_what_is_judged_is_held_out_and_always_the_same() -> None:
    POPULATIONS[:] = populations()
    world, method = world_of(), Shifted(0.0)
    world.evaluate(method, 0)
    first = method.seen.clone()
    world.evaluate(method, 7)
    assert torch.equal(method.seen, first)
    held = {tuple(row) for k in world.data.held_out.rows for row in world.data.x[k].tolist()}  # type: ignore[union-attr]
    there = [tuple(row) for row in first.flatten(0, 1).tolist() if any(row)]
    assert len(there) == len(set(there)) and set(there) <= held


def test_data_that_have_changed_are_noticed(tmp_path: Path) -> None:
    POPULATIONS[:] = populations()
    whole = smoke("gde")
    stage = replace(whole.stages[-1], data=f"{__name__}:given")
    train(replace(whole, stages=(stage,), evaluation=LAST), tmp_path / "run")
    assert esscher.load(tmp_path / "run").policy.embed([np.zeros((3, 2))]).shape == (1, 4)
    POPULATIONS[3] = POPULATIONS[3] + 1e-3
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="holds other samples than when this run began"):
        esscher.resume(tmp_path / "run", display=False)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    train(smoke("gde"), tmp_path / "run")
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pictures == ["step_000000000.png", "step_000000010.png", "step_000000020.png"]
    with (tmp_path / "run" / "embeddings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and {row["held_out"] for row in rows} == {"0", "1"}
    assert sorted(int(row["set_id"]) for row in rows) == list(range(24))
    world = SetWorld(esscher.load(tmp_path / "run").experiment, Runtime(RUNTIME))
    policy = esscher.load(tmp_path / "run").policy
    for row in rows[:3]:  # Populations are smaller than what is judged, so these are whole.
        number = world.data.training.names.index(row["set_id"])  # type: ignore[union-attr]
        own = world.spec.restored(world.data.x[world.data.training.rows[number]].double())  # type: ignore[union-attr]
        z = [float(row[f"z{k}"]) for k in range(4)]
        assert policy.embed([own.numpy()])[0].tolist() == pytest.approx(z, abs=1e-4)
    page = esscher.write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "esscher export" not in page
    assert "embeddings.csv" in page


def test_data_are_needed_and_nothing_is_written_without(tmp_path: Path) -> None:
    whole = smoke("gde")
    with pytest.raises(UserError, match="gde learns from sets of samples: give --data"):
        stage = replace(whole.stages[-1], data=None)
        train(replace(whole, stages=(stage,)), tmp_path / "run")
    with pytest.raises(UserError, match="sets.mixed must be at most 24"):
        stage = replace(whole.stages[-1], sets=SetConfig(mixed=99))
        train(replace(whole, stages=(stage,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sets", [SetConfig(mixed=2, held_out_share=0.3), SetConfig(bandwidth=1.0)])
def test_mixtures_and_neighbourhoods_run_and_resume(
    sets: SetConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    from support import assert_same_run, train_until

    whole = smoke("gde")
    stage = replace(whole.stages[-1], sets=replace(sets, size=10), steps=8)
    whole = replace(
        whole,
        stages=(stage,),
        evaluation=LAST,
        checkpoint=esscher.CheckpointConfig(every=4),
    )
    train(whole, tmp_path / "whole")
    train_until(whole, tmp_path / "run", 4, monkeypatch)
    esscher.resume(tmp_path / "run", display=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    names = [line.split(",")[0] for line in (tmp_path / "run" / "embeddings.csv").open()][1:]
    assert names and all("+" in name for name in names) is bool(sets.mixed)


def labelled() -> dict[str, Any]:
    """Tumours, small and large ones by class."""
    from esscher.datasets import tumours

    found = tumours()
    return {**found, "label": np.where(found["set_id"] < 12, "small", "large")}


def test_classes_are_judged_and_told(tmp_path: Path) -> None:
    whole = smoke("gde")
    stage = replace(whole.stages[-1], data=f"{__name__}:labelled", steps=30)
    method = replace(whole.method, class_weight=1.0, learning_rate=0.01)
    train(replace(whole, method=method, stages=(stage,), evaluation=LAST), tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["class_accuracy"] <= 1
    policy = esscher.load(tmp_path / "run").policy
    assert policy.spec.classes == ("large", "small")
    sets = np.zeros((2, 5, 7)) + np.arange(5)[:, None]
    chances = policy.classify(sets)
    torch.testing.assert_close(chances.sum(-1), torch.ones(2))
    train(smoke("gde", evaluation=LAST, steps=2), tmp_path / "other")
    with pytest.raises(UserError, match="learned no classes"):
        esscher.load(tmp_path / "other").policy.classify(sets)


# ---- what a user gets


def embedder() -> Embedder:
    """Of means, in units of 10 and 2 around (5, 1)."""

    def embed(x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x.mean(1)

    def draw(z: torch.Tensor, count: int, seeds: Any) -> torch.Tensor:
        noise = [torch.randn(count, 2, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return z.unsqueeze(1) + 0.1 * torch.stack(noise)

    spec = SetSpec(shape=(2,), mean=(5.0, 1.0), std=(10.0, 2.0))
    return Embedder(SimpleNamespace(embed=embed, draw=draw), spec)


def test_sets_are_in_the_users_units_and_of_any_length() -> None:
    sets = [np.array([[5.0, 1.0], [25.0, 5.0]]), np.full((7, 2), 5.0), np.array([[5.0, 3.0]] * 2)]
    z = embedder().embed(sets)
    torch.testing.assert_close(z, torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 1.0]]))
    padded = np.full((3, 7, 2), np.nan)
    mask = np.zeros((3, 7), bool)
    for place, one in enumerate(sets):
        padded[place, : len(one)], mask[place, : len(one)] = one, True
    torch.testing.assert_close(embedder().embed(padded, mask), z)
    torch.testing.assert_close(embedder().embed(torch.tensor(sets[0]).unsqueeze(0)), z[:1])
    distance = embedder().distances(sets)
    assert distance[0, 2].item() == pytest.approx(1) and (distance.diagonal() == 0).all()
    drawn = embedder().sample(z, 2_000, seed=1)
    assert drawn.shape == (3, 2_000, 2)
    torch.testing.assert_close(drawn[0].mean(0), torch.tensor([15.0, 3.0]), atol=0.1, rtol=0)
    assert not torch.equal(drawn, embedder().sample(z, 2_000, seed=2))
    line = embedder().interpolate(sets[0], sets[1], 5)
    torch.testing.assert_close(line[:, 0], torch.linspace(1, 0, 5))
    torch.testing.assert_close(line[:, 1], torch.linspace(1, 2, 5))


def test_small_differences_at_large_offsets_survive() -> None:
    spec = SetSpec(shape=(1,), mean=(1e7,), std=(1e-2,))
    method = SimpleNamespace(embed=lambda x: x.mean(1))
    z = Embedder(method, spec).embed([np.array([[1e7 + 0.01], [1e7 + 0.03]])])
    assert z.item() == pytest.approx(2, abs=1e-3)


def test_what_cannot_be_embedded_is_refused() -> None:
    good = np.zeros((3, 2))
    policy = embedder()
    for match, call in {
        "set 1 is empty": lambda: policy.embed([good, good[:0]]),
        "set 0 has one sample": lambda: policy.embed([good[:1]]),
        "is nan": lambda: policy.embed([np.array([[0.0, np.nan], [0, 0]])]),
        r"samples of shape \(3,\), and this run learned from \(2,\)": lambda: policy.embed(
            [np.zeros((4, 3))]
        ),
        r"set 1 has samples of shape \(3,\)": lambda: policy.embed([good, np.zeros((4, 3))]),
        r"mask must have the shape \(1, 3\)": lambda: policy.embed(good[None], np.ones((1, 4))),
        "there are no sets": lambda: policy.embed([]),
        "count must be >= 1": lambda: policy.sample(torch.zeros(1, 2), 0),
        "count must be >= 2": lambda: policy.interpolate(good, good, 1),
        "set 0 is empty": lambda: policy.embed(good[None], np.zeros((1, 3))),
    }.items():
        with pytest.raises(UserError, match=match):
            call()


def test_populations_are_drawn_again_into_a_file_that_can_be_read(tmp_path: Path) -> None:
    train(smoke("gde", evaluation=LAST, steps=2), tmp_path / "run")
    assert len(redraw(tmp_path / "run", tmp_path / "own.npz", count=5)) == 24
    with np.load(tmp_path / "own.npz") as found:
        assert found["sample"].shape == (24 * 5, 7) and len(set(found["set_id"])) == 24
    again = redraw(tmp_path / "run", tmp_path / "again.npz", count=5, seed=1)
    with np.load(tmp_path / "own.npz") as one, np.load(tmp_path / "again.npz") as two:
        assert not np.allclose(one["sample"], two["sample"]) and len(again) == 24
    POPULATIONS[:] = populations()
    with pytest.raises(
        UserError, match=r"given has samples of \(2,\), and this run learned from text"
    ):
        redraw(tmp_path / "run", tmp_path / "x.npz", data=f"{__name__}:given")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["env"].endswith("tumours")

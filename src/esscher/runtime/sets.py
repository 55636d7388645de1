"""The world of populations: samples of each, sets drawn of them, some held out to judge by."""

import csv
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from esscher.adapters.sets import all_groups, read_table, set_data
from esscher.errors import UserError
from esscher.experience.sets import Populations
from esscher.experiment import Experiment
from esscher.functional.sets import moments
from esscher.functional.transport import gaussian_w2, random_directions, sliced_w2_terms
from esscher.loops.offline import offline
from esscher.loops.online import LoopState, Progress
from esscher.runtime.checkpoint import require_unchanged
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.rng import Phase, mix, numpy_generator, seed_phase
from esscher.runtime.state import State
from esscher.types import Sets, SetSpec

JUDGED = 1_000
"""Most samples of a population that it is judged by, and drawn of it."""
WIDE = 256
"""Components above which distances are taken in so many principal ones of the real samples: a
covariance of more cannot be told from the samples that judge.
"""
DIRECTIONS = 100
"""Of the sliced distance."""
EMBEDDED = 10_000
"""Most populations that are listed with their vectors."""
AT_ONCE = 64
"""Sets that are embedded at once."""


class SetWorld:
    """Samples of populations.

    Args:
        experiment: its last stage is used.
        runtime: where to compute.
    """

    inexact_because: str | None = None
    judged_before: bool = True

    def __init__(self, experiment: Experiment, runtime: Runtime):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.kind = experiment.stages[-1], "offline"
        if self.stage.data is None:
            raise UserError(
                f"{experiment.slug} learns from sets of samples: give --data FILE.parquet"
            )
        table = read_table(self.stage.data, self.stage.sets)
        self.data, self.spec = set_data(table, self.stage.sets, experiment.seed)
        told = [table.group.tolist(), None if table.label is None else table.label.tolist()]
        self.digest = hashlib.sha256(table.x.tobytes() + repr(told).encode()).hexdigest()
        self._shown: tuple[Tensor, Sets, Tensor] | None = None

    def experience(self, method: Any) -> Any:
        return method.experience(self.data)

    def begin(self) -> Tensor:
        return torch.zeros(0)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        return offline(method, experience, state, seed=self.experiment.seed, steps=self.stage.steps)

    @torch.no_grad()
    def evaluate(self, method: Any, step: int) -> Evaluation:
        """Embed populations that were held out, draw as many samples of each from its vector, and
        measure how far these lie from the real ones, always from the same noise.
        """
        populations, seed = self.data.held_out, self.experiment.seed
        count = self.experiment.evaluation.episodes
        if populations.count is not None:
            count = min(count, populations.count)
        sets = self._judged(populations, count)
        seeds = [mix(seed, 0, Phase.EVALUATE, number) for number in range(count)]
        seed_phase(seed, 0, Phase.EVALUATE)
        vectors = _embedded(method, sets)
        drawn = method.draw(vectors, sets.x.shape[1], seeds).cpu()
        self._shown = vectors, sets, drawn
        x = sets.x
        if self.spec.dim > WIDE:
            every = x.flatten(0, 1)
            axes = torch.pca_lowrank(every, min(WIDE, len(every)))[2]
            x, drawn = x @ axes, drawn @ axes
        directions = random_directions(DIRECTIONS, x[0])
        mask = torch.ones(sets.x.shape[:2], dtype=torch.bool) if sets.mask is None else sets.mask
        sliced = sliced_w2_terms(drawn, x, directions, mask).sqrt()
        real = [moments(one[there]) for one, there in zip(x, mask, strict=True)]
        made = [moments(one[there]) for one, there in zip(drawn, mask, strict=True)]
        real, made = (
            tuple(torch.stack(part) for part in zip(*of, strict=True)) for of in (real, made)
        )
        distance = gaussian_w2(*real, *made)
        extras = {"sliced_w2_mean": float(sliced.mean())}
        if count > 2:
            extras["latent_rank_correlation"] = _rank_correlation(vectors, *real)
        if sets.label is not None and method.cfg.class_weight and (sets.label >= 0).any():
            known = sets.label >= 0
            found = method.classify(vectors).cpu().argmax(-1)
            extras["class_accuracy"] = float((found == sets.label)[known].float().mean())
        lengths = mask.sum(-1).tolist()
        measure = "negative Wasserstein-2 distance"
        return Evaluation((-distance).tolist(), lengths, measure, extras)

    def pictures(self) -> dict[str, Any]:
        """A map of the vectors of the last evaluation, and some sets beside what was drawn of them."""
        from esscher.report.pictures import populations_figure

        if self._shown is None:
            return {}
        vectors, sets, drawn = self._shown
        names = [self.data.held_out.name(number) for number in sets.number.tolist()]
        mask = torch.ones(sets.x.shape[:2], dtype=torch.bool) if sets.mask is None else sets.mask
        pairs = [
            (self.spec.restored(x[m]), self.spec.restored(y[m]))
            for x, y, m in zip(sets.x, drawn, mask, strict=True)
        ]
        return {"samples": populations_figure(vectors, names, pairs, self.spec)}

    def score(self, evaluation: Evaluation) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {**asdict(self.spec), "digest": self.digest}

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise unless the data are still those that a run began with.

        Raises:
            UserError: they have changed.
        """
        require_unchanged(
            str(self.stage.data), "holds other samples", described["digest"], self.digest
        )

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        assert not state

    def finish(self, method: Any, folder: Path) -> None:
        """List every population with its vector in embeddings.csv, by JUDGED samples at most."""
        learned, judged = self.data.training, self.data.held_out
        parts = [(judged, True)] if learned is judged else [(learned, False), (judged, True)]
        with (folder / "embeddings.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            latent = [f"z{number}" for number in range(self.experiment.method.latent)]
            writer.writerow(["set_id", "held_out", *latent])
            for populations, held_out in parts:
                count = self.experiment.evaluation.episodes
                if populations.count is not None:
                    count = min(populations.count, EMBEDDED)
                sets = self._judged(populations, count)
                for number, vector in zip(
                    range(count), _embedded(method, sets).tolist(), strict=True
                ):
                    writer.writerow([populations.name(number), int(held_out), *vector])

    def close(self) -> None:
        pass

    def _judged(self, populations: Populations, count: int) -> Sets:
        """The first populations, each by samples that are always the same."""
        generator = numpy_generator(self.experiment.seed, 0, Phase.EVALUATE)
        return self.data.sets(populations, range(count), JUDGED, generator)


def spec_of(described: Mapping[str, Any]) -> SetSpec:
    """The specification that a checkpoint describes."""
    told = [tuple(described[n]) for n in ("shape", "mean", "std", "columns", "classes")]
    shape, mean, std, columns, classes = told
    return SetSpec(shape=shape, mean=mean, std=std, columns=columns, classes=classes)


def redraw(
    folder: Path,
    out: Path,
    *,
    data: str | None = None,
    count: int | None = None,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """Embed populations, draw samples of each from its vector, and write them in the form in which data
    are read: an .npz with `sample` and `set_id`. Returns the names of the populations.

    Args:
        folder: of the run.
        out: the file.
        data: populations in the form of the run's data; None: the run's own.
        count: of samples of each; None: as many as it has, at most JUDGED.
        seed: decides the draws.
        step: of the checkpoint; None: the newest.

    Raises:
        UserError: as `load` and `read_table` do, or samples of other components than the run's.
    """
    from esscher.runtime.load import load

    loaded = load(folder, step=step)
    stage = loaded.experiment.stages[-1]
    table = read_table(data or str(stage.data), stage.sets)
    spec: SetSpec = loaded.policy.spec
    if (table.shape, table.columns) != (spec.shape, spec.columns):
        theirs, ours = (", ".join(part.columns) or part.shape for part in (table, spec))
        raise UserError(f"{table.name} has samples of {theirs}, and this run learned from {ours}")
    groups = all_groups(table)
    drawn, names = [], []
    for number, rows in enumerate(groups.rows):
        z = loaded.policy.embed([table.x[rows].reshape(-1, *spec.shape)])
        size = count or min(len(rows), JUDGED)
        drawn.append(loaded.policy.sample(z, size, seed=mix(seed, number))[0].numpy())
        names += [groups.name(number)] * size
    np.savez(out, sample=np.concatenate(drawn), set_id=np.array(names))
    return list(groups.names)


@torch.no_grad()
def _embedded(method: Any, sets: Sets) -> Tensor:
    return torch.cat([method.embed(part.x, part.mask).cpu() for part in sets.split(AT_ONCE)])


def _rank_correlation(vectors: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Spearman's, over all pairs of populations: of the distance of their vectors and the Wasserstein-2
    distance of their Gaussian fits. 0 where the vectors are all the same.
    """
    first, second = torch.tensor(list(itertools.combinations(range(len(vectors)), 2))).T
    latent = (vectors[first] - vectors[second]).norm(dim=-1)
    distance = gaussian_w2(mean[first], covariance[first], mean[second], covariance[second])
    if bool((latent == latent[0]).all()):
        return 0.0
    found: Any = spearmanr(latent, distance)
    return float(found.statistic)

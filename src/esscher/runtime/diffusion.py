"""The world of diffusion models: a model, what to draw with it, a reward where drawings are judged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esscher.adapters.diffusers import digest_of, load_diffusion, save_diffusion
from esscher.adapters.image_rewards import ImageReward
from esscher.adapters.text import read_rows
from esscher.distributions.diffusion import ImageSpec
from esscher.errors import UserError
from esscher.experience.conditions import Wanted
from esscher.experiment import Experiment
from esscher.loops.online import LoopState, Progress
from esscher.loops.sample import sample
from esscher.registry import load_method
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.rng import Phase, mix, seed_phase
from esscher.runtime.state import State
from esscher.types import Asked


class DiffusionWorld:
    """A model, the rows that say what to draw, and a reward if there is one.

    Args:
        experiment: its last stage is used.
        runtime: where to put the model.
        with_rows: read what to draw; without it the world only serves to open a finished run.
    """

    inexact_because: str | None = None
    judged_before: bool = True

    def __init__(self, experiment: Experiment, runtime: Runtime, *, with_rows: bool = True):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.method_class = experiment.stages[-1], load_method(experiment.slug)
        self.kind = self.method_class.loop
        seed_phase(experiment.seed, 0, Phase.INITIALISE)  # For models that are made, not read.
        model = load_diffusion(self.stage.model, runtime.device)
        self.digest = digest_of(model)
        self.spec = ImageSpec(model=model)
        self.reward: ImageReward | None = None
        if with_rows:
            self.wanted = self._wanted()
            if self.stage.image.reward is not None:
                self.reward = ImageReward(self.stage.image.reward, model.decode)

    def experience(self, method: Any) -> Any:
        return method.experience(self.wanted)

    def begin(self) -> Tensor:
        return torch.zeros(0)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        limits = {"seed": self.experiment.seed, "steps": self.stage.steps}
        return sample(method, experience, self._reward_of, state, **limits)

    @torch.no_grad()
    def evaluate(self, method: Any, step: int) -> Evaluation:
        """Draw as many samples as there are evaluation episodes, from noise that never changes."""
        count, rows = self.experiment.evaluation.episodes, len(self.wanted.rows)
        asked = self.wanted.asked([number % rows for number in range(count)])
        seeds = [mix(self.experiment.seed, 0, Phase.EVALUATE, number) for number in range(count)]
        method.policy.eval()
        samples, extras = method.draw(asked, seeds), {}
        self._drawn = self.spec.model.decode(samples).float().cpu()
        extras = {name: float(value) for name, value in getattr(method, "told", {}).items()}
        if self.reward is None:
            # Nothing says what is better: the numbers are only there to be looked at.
            values, measure = [0.0] * count, "no reward"
        else:
            values, measure = self.reward(samples, asked.rows).tolist(), "reward"
        return Evaluation(values, [1] * count, measure, extras)

    def pictures(self) -> dict[str, Any]:
        """What the last evaluation drew."""
        from esscher.report.pictures import samples_figure

        return {} if self._drawn is None else {"samples": samples_figure(self._drawn)}

    _drawn: Tensor | None = None

    def score(self, evaluation: Evaluation) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"model": self.stage.model.source, "digest": self.digest}

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise unless the model is still the one that a run began with.

        Raises:
            UserError: its weights have changed.
        """
        if described["digest"] != self.digest:
            raise UserError(
                f"the model {self.stage.model.source} has other weights than when this run began: put "
                "those back, or start a new run"
            )

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        assert not state

    def finish(self, method: Any, folder: Path) -> None:
        if self.kind != "sample":
            save_diffusion(method.policy, folder / "model")

    def close(self) -> None:
        pass

    def _reward_of(self, asked: Asked) -> Any:
        return None if self.reward is None else self.reward.of(asked.rows)

    def _wanted(self) -> Wanted:
        stage, model = self.stage, self.spec.model
        config = stage.image
        rows: list[Mapping[str, Any]]
        if stage.data is not None:
            name = Path(stage.data).name
            rows = [_renamed(row, config.columns) for row in read_rows(stage.data, split=config.split)]
        else:
            name = "labels" if config.labels else "anything"
            rows = [{"label": label} for label in config.labels] or [{}]
        if not rows:
            raise UserError(f"{name} has no rows: there is nothing to draw")
        wanted = Wanted(name=name, rows=rows, encode=model.encode, seed=self.experiment.seed)
        missing = [column for column in model.columns if column not in rows[0]]
        if missing:
            known = ", ".join(rows[0]) or "none"
            raise UserError(
                f"this model draws by {missing[0]}, and {name} has no such column (it has {known}): "
                "give --image.labels 0 1 2, --data FILE.jsonl, or --image.columns "
                f"{missing[0]} OTHER"
            )
        model.encode(rows[:1])  # What cannot be told to the model shows here, before work starts.
        return wanted


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return dict(row) | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}

"""The world of diffusion models: a model, what to draw or real samples, a reward where samples are
judged.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esscher.adapters.diffusers import load_diffusion, save_diffusion
from esscher.adapters.image_rewards import ImageReward
from esscher.adapters.own_denoiser import try_out
from esscher.adapters.pretrained import digest_of
from esscher.adapters.real_samples import read_samples
from esscher.adapters.text import read_rows
from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError, require
from esscher.experience.conditions import RealSamples, Wanted
from esscher.experiment import Experiment
from esscher.functional.diffusion import reverse_kl_terms
from esscher.functional.sets import energy_distance
from esscher.loops.draw import draw
from esscher.loops.offline import offline
from esscher.loops.online import LoopState, Progress
from esscher.nn.sharding import whole_on_cpu
from esscher.registry import load_method
from esscher.runtime.checkpoint import require_unchanged
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.rng import Phase, mix, seed_phase
from esscher.runtime.state import State
from esscher.samplers.denoisers import rows_of
from esscher.samplers.solvers import level_pairs, seeded_noise
from esscher.types import Asked, Drawn

DISTANCE_STEPS = 20
"""Most, of the chain along which the distance to the model of before is measured."""


class DiffusionWorld:
    """A model, the rows that say what to draw or come with real samples, and a reward if there is one.

    Args:
        experiment: its last stage is used.
        runtime: where to put the model.
    """

    inexact_because: str | None = None
    judged_before: bool = True

    def __init__(self, experiment: Experiment, runtime: Runtime):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.method_class = experiment.stages[-1], load_method(experiment.slug)
        self.kind = self.method_class.loop
        model = self._as_it_began(runtime.device)
        if self.method_class.trains and not model.trained:
            raise UserError(
                f"{experiment.slug} trains the model's weights, and model {self.stage.model.source} "
                "has none: give one whose denoiser is a module of torch with parameters"
            )
        if runtime.config.precision == "float32":
            model.frozen_dtype = torch.float32  # A reference is the model that training began with.
        if runtime.config.graph == "compile":
            model.compiled(final=not self.method_class.trains)
        self.digest = digest_of(model)
        config = self.stage.image
        self.reward: ImageReward | None = None
        if config.reward is not None:
            self.reward = ImageReward(config.reward, config.reward_kwargs, model.decode)
        self.judge: ImageReward | None = None
        if config.judge is not None:
            self.judge = ImageReward(config.judge, config.judge_kwargs, model.decode)
        self._check_rewards()
        of_sets = self.reward is not None and self.reward.of_sets
        self.spec = ImageSpec(model=model, of_sets=of_sets)
        self.real: RealSamples | None = None
        if self.kind == "offline":
            self.real = self._real_samples()
            self.wanted = self.real.wanted
        else:
            self.wanted = self._wanted()
        self._shown: Tensor | None = None

    def _check_rewards(self) -> None:
        if self.reward is None and self.method_class.rewarded:
            raise UserError(f"{self.experiment.slug} needs a reward: give --reward module:function")
        if self.reward is not None and self.kind == "draw" and not self.method_class.sets:
            self.reward.require_samples()
        episodes = self.experiment.evaluation.episodes
        for judging in (self.reward, self.judge):
            if judging is not None and judging.of_sets:
                told = f">= 2, the set of samples that reward {judging.source} judges"
                require("evaluation.episodes", episodes, episodes >= 2, told)

    def _as_it_began(self, device: torch.device) -> DiffusionModel:
        seed_phase(self.experiment.seed, 0, Phase.INITIALISE)  # For models that are made, not read.
        return load_diffusion(self.stage.model, device)

    def experience(self, method: Any) -> Any:
        return method.experience(self.wanted if self.real is None else self.real)

    def begin(self) -> Tensor:
        return torch.zeros(0)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        limits = {"seed": self.experiment.seed, "steps": self.stage.steps}
        if self.kind == "offline":
            return offline(method, experience, state, **limits)
        return draw(method, experience, self.reward, state, **limits)

    @torch.no_grad()
    def evaluate(self, method: Any, step: int) -> Evaluation:
        """Draw as many samples as there are evaluation episodes, from noise that never changes."""
        count, size = self.experiment.evaluation.episodes, self.stage.image.at_once
        rows = [number % len(self.wanted.rows) for number in range(count)]
        seeds = [mix(self.experiment.seed, 0, Phase.EVALUATE, number) for number in range(count)]
        drawn: list[Drawn] = []
        shown: list[Tensor] = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            asked = self.wanted.asked(rows[part])
            seed_phase(self.experiment.seed, start, Phase.EVALUATE)
            drawn.append(method.draw(asked, seeds[part]))
            shown.append(self.spec.model.decode(drawn[-1].x).float().cpu())
        every = _joined(drawn)
        asked = self.wanted.asked(rows)
        self._shown = torch.cat(shown)
        extras = {f"{name}_mean": float(value.float().mean()) for name, value in every.told.items()}
        reference: DiffusionModel | None = getattr(method, "_reference", None)
        if reference is not None:
            extras["kl_to_reference"] = self._distance(
                method.policy, reference, every.x, asked, seeds
            )
        if self.judge is not None:
            extras["judge_mean"] = self._second_opinion(every.x, asked)
        values, measure = self._judged(every, asked)
        return Evaluation(values, [1] * len(values), measure, extras)

    def _judged(self, drawn: Drawn, asked: Asked) -> tuple[list[float], str]:
        """What the samples are worth: by the reward, against real samples, or by the first thing that
        the method says of each.
        """
        x, rows = drawn.x, asked.rows
        if self.reward is not None and self.reward.of_sets:
            return [self.reward.of_set(self.reward.embed(x, rows))], "reward of the set"
        if self.reward is not None:
            return self.reward(x, rows).double().tolist(), "reward"
        if self.real is not None:
            real = self.real.x[: 4 * len(x)]
            return [-float(energy_distance(x, real))], "negative energy distance"
        if drawn.told:
            name, values = next(iter(drawn.told.items()))
            return values.double().tolist(), name.replace("_", " ")
        return [0.0] * len(x), "no reward"

    def _second_opinion(self, x: Tensor, asked: Asked) -> float:
        assert self.judge is not None
        if self.judge.of_sets:
            return self.judge.of_set(self.judge.embed(x, asked.rows))
        return float(self.judge(x, asked.rows).double().mean())

    def _distance(
        self, model: DiffusionModel, reference: DiffusionModel, x: Tensor, asked: Asked, seeds: Any
    ) -> float:
        """KL to the model of before, nats a sample: an estimate of that of the stochastic chains,
        conditional models without guidance, at states of noised samples.
        """
        ask, ask_before = model.guided(1.0), reference.guided(1.0)
        levels = model.levels_up_to(DISTANCE_STEPS)
        levels = levels[levels > 0]
        total, size = 0.0, self.stage.image.at_once
        for start in range(0, len(x), size):
            rows = torch.arange(len(x), device=x.device)[start : start + size]
            condition = rows_of(asked.condition, rows)
            _, noise = seeded_noise(seeds[start : start + size], model.shape, x.device)
            for step, (sigma, following) in enumerate(level_pairs(levels, x)):
                level = sigma.expand(len(rows))
                noisy = x[rows] + sigma * noise(step)
                asks = (noisy, level, condition)
                ours, before = ask(*asks), ask_before(*asks)
                total += float(reverse_kl_terms(ours, before, sigma, following, 1.0).sum())
        return total / len(x)

    def pictures(self) -> dict[str, Any]:
        """What the last evaluation drew."""
        from esscher.report.pictures import samples_figure

        return {} if self._shown is None else {"samples": samples_figure(self._shown)}

    def score(self, evaluation: Evaluation) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"model": self.stage.model.source, "digest": self.digest}

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise unless the model is still the one that a run began with.

        Raises:
            UserError: its weights have changed.
        """
        what = f"the model {self.stage.model.source}"
        require_unchanged(what, "has other weights", described["digest"], self.digest)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        assert not state

    def finish(self, method: Any, folder: Path) -> None:
        if self.reward is not None:
            self.reward.warn_if_constant()
        if not self.method_class.trains:
            return
        model, first = method.policy, self.runtime.rank == 0
        if self.runtime.sharding is not None:  # All processes give their parts, to a whole one.
            state = whole_on_cpu(model.state_dict(), keep=first)
            if first:
                model = self._as_it_began(torch.device("cpu"))
                model.load_state_dict(state)
                model.one_step_at = method.policy.one_step_at
        if first:
            save_diffusion(model, folder / "model")

    def close(self) -> None:
        pass

    def _wanted(self) -> Wanted:
        stage, config = self.stage, self.stage.image
        rows: list[Mapping[str, Any]]
        if stage.data is not None:
            name = Path(stage.data).name
            rows = [
                _renamed(row, config.columns) for row in read_rows(stage.data, split=config.split)
            ]
        else:
            name = "labels" if config.labels else "anything"
            rows = [{"label": label} for label in config.labels] or [{}]
        return self._checked(name, rows)

    def _real_samples(self) -> RealSamples:
        stage, config, model = self.stage, self.stage.image, self.spec.model
        assert stage.data is not None
        with torch.no_grad():
            like = torch.zeros((1, *model.shape), device=self.runtime.device)
            shape = model.decode(like).shape[1:]
            found = read_samples(stage.data, shape, columns=config.columns, split=config.split)
            shown, rows = found
            parts = shown.to(self.runtime.device).split(config.at_once)
            x = torch.cat([model.invert(part) for part in parts])
        return RealSamples(x=x, wanted=self._checked(Path(stage.data).name, rows))

    def _checked(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Wanted:
        model = self.spec.model
        wanted = Wanted(name=name, rows=rows, encode=model.encode, seed=self.experiment.seed)
        missing = [column for column in model.columns if column not in rows[0]]
        if missing:
            known = ", ".join(rows[0]) or "none"
            raise UserError(
                f"this model draws by {missing[0]}, and {name} has no such column (it has {known}): "
                f"give --image.labels 0 1 2, --data FILE.jsonl, or --image.columns {missing[0]} OTHER"
            )
        # What cannot be told to the model shows here, before work starts.
        if model.pipeline is None:
            assert self.stage.model.source is not None
            try_out(model, rows[:64], self.stage.model.source)
        else:
            model.check(rows)
            model.encode(rows[:64])
        return wanted


def _joined(drawn: list[Drawn]) -> Drawn:
    told = {name: torch.cat([part.told[name] for part in drawn]) for name in drawn[0].told}
    return Drawn(x=torch.cat([part.x for part in drawn]), told=told)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return dict(row) | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}

"""Adaptive Guidance: almost the images of classifier-free guidance, for a quarter fewer evaluations.

Guidance asks the network twice a step, eps = eps_u + s (eps_c - eps_u), with x = x0 + sigma eps. Late
in sampling both answers point the same way, and a sample then leaves guidance for good:

    gamma_i = <eps_c, eps_u> / (|eps_c| |eps_u|)
    eps_i   = eps_u + s (eps_c - eps_u)   until gamma_i >= threshold,   eps_c   from then on

LinearAG asks less still: along a path of guidance eps_u is nearly a linear function of the path so far,

    eps_u,i ~ sum_{j <= i} a_ij eps_c,j + sum_{j < i} b_ij eps_u,j

with numbers a, b fitted once by ordinary least squares to some 200 paths; half of the guided steps
are then taken with the estimate. Nothing is trained: the first iteration fits what is to be fitted,
and each one draws a batch and reports what was saved and how far from full guidance that led.

Compared with fewer steps, guidance in a fixed interval or at every other step, the number of guided
steps is decided sample by sample. Thresholds do not carry over between models: `cosine_by_step` in the
figures says what this one's are.

| variable | paper | shape | unit |
|---|---|---|---|
| threshold | gamma-bar | scalar | cosine |
| scale | s; 1 is no guidance | scalar | |
| evaluations | NFE of a sample | b | rows that the network was asked about |
| error | squared distance to full guidance from the same noise, a component | b | |

`esscher.adapters.guided_pipeline.adaptive_guidance(pipeline)` does the same inside a pipeline of
diffusers, whatever its scheduler.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError, require
from esscher.experience.conditions import Turns, Wanted
from esscher.experiment import EvaluationConfig, Experiment, ImageConfig, LogConfig, ModelConfig
from esscher.method import Judge, Method, Paper
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.samplers.denoisers import rows_of
from esscher.samplers.guidance import (
    Guided,
    LinearGuidance,
    Policy,
    adaptive_solve,
    cut_off,
    fit_linear,
    full,
    interleaved,
    least_guided,
    linear_guidance,
)
from esscher.samplers.solvers import Solver, seeded_noise
from esscher.types import Asked, Drawn, Metrics

PAPER = Paper(
    title="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
    year=2023,
    arxiv="2312.12487",
    purpose="Images of classifier-free guidance for a quarter fewer evaluations, without training.",
    claim="Once the conditional and the unconditional answer point the same way, guidance changes "
    "nothing: leaving it there gives the same samples for a quarter fewer evaluations, where as many "
    "fewer steps do not; and an estimate of the unconditional answer that is linear in the path so far "
    "saves more, better than leaving it out at every other step.",
    sections="adaptive policy, LinearAG",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of Adaptive Guidance."""

    policy: Literal["adaptive", "linear", "full", "cut_off", "interleaved"] = "adaptive"
    """adaptive: guidance until the threshold; linear: LinearAG, 25 evaluations for 20 steps. To compare
    with: full guidance; guidance in the first `guided_steps` alone; at every other of these."""
    threshold: float = 0.991
    """Cosine at which a sample leaves adaptive guidance, in (-1, 1] (the paper: 0.991 for about 30 of
    40 evaluations; it depends on the model)."""
    min_guided_steps: int | None = None
    """Steps before which no sample leaves, >= 0; None: a quarter of all, never at a level without
    signal, and only once its cosine has been below the threshold. Near pure noise the cosine is high
    for another reason, so with a number guidance may end before it has begun to matter."""
    guided_steps: int = 10
    """Of the fixed policies, >= 0."""
    scale: float = 7.5
    """Of guidance, not 1 (from memory of the paper, for Stable Diffusion)."""
    draw_steps: int = 20
    """Of drawing, >= 1."""
    solver: Solver = "ddim"
    """One that asks once a step: ddim, euler or dpmpp_2m."""
    eta: float = 0.0
    """Share of the ancestral noise, in [0, 1]; 0 where the policy is linear."""
    linear_paths: int = 200
    """Of full guidance, that the estimate is fitted to, >= 1."""
    intercept: bool = False
    """Whether the fit has a constant at each step."""
    batch_size: int = 16
    """Samples an iteration, >= 1."""
    compare: bool = True
    """Whether each iteration draws its samples with full guidance too, to report the error."""
    reference_steps: int = 0
    """Of that full guidance, >= 0; 0: `draw_steps`."""

    def __post_init__(self) -> None:
        require("threshold", self.threshold, -1 < self.threshold <= 1, "in (-1, 1]")
        for name in ("draw_steps", "linear_paths", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        least, most = self.min_guided_steps, self.draw_steps
        inside = least is None or 0 <= least <= most
        require("min_guided_steps", least, inside, f"None or in [0, {most}]")
        if self.policy in ("cut_off", "interleaved"):
            guided = self.guided_steps
            require("guided_steps", guided, 0 <= guided <= most, f"in [0, {most}]")
        for name in ("guided_steps", "reference_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("scale", self.scale, abs(self.scale) < float("inf"), "finite")
        require("scale", self.scale, self.scale != 1, "not 1, which is no guidance")
        require("eta", self.eta, 0 <= self.eta <= 1, "in [0, 1]")
        require("solver", self.solver, self.solver != "heun", "one that asks once a step")
        if self.policy == "linear":
            require("draw_steps", self.draw_steps, most >= 4, ">= 4, of which one is estimated")
            require("eta", self.eta, self.eta == 0, "0 where the policy is linear")
        if self.solver != "ddim":
            require("eta", self.eta, self.eta == 0, "0 unless the solver is ddim")


class AdaptiveGuidance(Method):
    """Draws with guidance for as long as it changes anything."""

    Config = Config
    world = "diffusion"
    loop = "draw"
    trains = False
    headline = "evaluations"

    def __init__(self, cfg: Config, spec: ImageSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        self._model = spec.model
        if self._model.null is None:
            raise UserError(
                "adaptive_guidance needs a model with a null condition, and this one was trained "
                "without, so that there is no guidance to save on: give another --model (of a "
                "UNet2DModel, say which class stands for none: --model.kwargs null_class 10)"
            )
        self._levels = self._model.levels(cfg.draw_steps)
        self._reference_levels = self._model.levels(cfg.reference_steps or cfg.draw_steps)
        if cfg.policy == "adaptive":
            least_guided(self._levels, cfg.min_guided_steps, cfg.threshold)
        steps = len(self._levels) - 1
        self._policy: Policy = {
            "adaptive": lambda: full(steps),
            "full": lambda: full(steps),
            "linear": lambda: linear_guidance(steps),
            "cut_off": lambda: cut_off(steps, cfg.guided_steps),
            "interleaved": lambda: interleaved(steps, cfg.guided_steps),
        }[cfg.policy]()
        self.conditional_weights = torch.zeros(steps, steps, dtype=torch.float64)
        self.unconditional_weights = torch.zeros(steps, steps, dtype=torch.float64)
        self.intercepts = torch.zeros(steps, dtype=torch.float64)
        self.unexplained = torch.zeros(steps, dtype=torch.float64)
        self.is_fitted = False
        self.cosine_sum = torch.zeros(steps, dtype=torch.float64)
        self.cosine_count = torch.zeros(steps, dtype=torch.float64)
        self._is_warned = False

    @property
    def policy(self) -> DiffusionModel:
        return self._model

    def experience(self, wanted: Wanted) -> Turns:
        return Turns(wanted, self.cfg.batch_size)

    @torch.no_grad()
    def improve(
        self, asked: Asked, reward: Judge | None, step: int
    ) -> tuple[Metrics, Float[Tensor, "n"]]:
        """Draw a batch; the first one also fits the estimate of LinearAG."""
        if self.cfg.policy == "linear" and not self.is_fitted:
            self._fit(asked)
        seeds = torch.randint(2**62, (len(asked),)).tolist()
        found = self._drawn(asked, seeds, self._policy)
        seen = ~found.cosine.isnan()
        self._warn_if_never_low(found)
        self.cosine_sum += torch.where(seen, found.cosine, 0.0).double().sum(-1).cpu()
        self.cosine_count += seen.double().sum(-1).cpu()
        told: Metrics = {
            "evaluations": found.evaluations.double().mean(),
            "saved": self._saved(found).mean(),
            "guided_steps": found.guided.double().sum(0).mean(),
        }
        if self.cfg.policy == "linear":
            told["unexplained"] = self.unexplained.max()
        reward_of = None if reward is None else reward(found.x, asked.rows)
        if self.cfg.compare:
            whole = self._drawn(asked, seeds, None)
            errors = (found.x - whole.x).double().square().flatten(1).mean(-1)
            told |= {"error": errors.mean(), "median_error": errors.median()}
            if reward is not None and reward_of is not None:
                told["reward_of_full"] = reward(whole.x, asked.rows).mean()
        return told, torch.zeros(0) if reward_of is None else reward_of

    @torch.no_grad()
    def draw(self, asked: Asked, seeds: Sequence[int]) -> Drawn:
        """Samples; before the first iteration of LinearAG with full guidance."""
        ready = self.cfg.policy != "linear" or self.is_fitted
        policy = self._policy if ready else full(len(self._policy))
        found = self._drawn(asked, seeds, policy)
        told = {
            "evaluations_saved": self._saved(found).float(),
            "evaluations": found.evaluations.float(),
        }
        return Drawn(x=found.x, told=told)

    def figures(self) -> dict[str, Any]:
        """The cosine of both answers at each step, where both were asked for."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        mean = self.cosine_sum / self.cosine_count
        axes.plot(range(1, len(mean) + 1), mean.numpy(), marker="o", markersize=3)
        if self.cfg.policy == "adaptive":
            axes.axhline(self.cfg.threshold, linestyle="--", linewidth=1, color="0.5")
        axes.set_xlabel("step")
        axes.set_ylabel("cosine of both answers")
        return {"cosine_by_step": figure}

    def _drawn(self, asked: Asked, seeds: Sequence[int], policy: Policy | None) -> Guided:
        """By a policy; None: by full guidance, to compare with."""
        cfg, model = self.cfg, self._model
        levels = self._reference_levels if policy is None else self._levels
        if asked.condition is None:
            raise UserError(
                "guidance needs something to guide towards: this model has no conditions"
            )
        start, noise = seeded_noise(seeds, model.shape, model.device)
        adaptive = policy is not None and cfg.policy == "adaptive"
        found = adaptive_solve(
            model.denoiser,
            start * model.start(levels),
            levels,
            asked.condition,
            model.null,
            scale=cfg.scale,
            threshold=cfg.threshold if adaptive else None,
            min_guided_steps=cfg.min_guided_steps,
            solver=cfg.solver,
            eta=cfg.eta,
            noise=noise if cfg.eta > 0 else None,
            clip=model.clip,
            keeps_noise=model.keeps_noise,
            policy=full(len(levels) - 1) if policy is None else policy,
            linear=self._linear() if policy is not None and "linear" in policy else None,
        )
        return replace(found, x=found.x * model.end(levels))

    def _fit(self, asked: Asked) -> None:
        """Least squares on paths of full guidance towards what this batch asks for."""
        cfg, model = self.cfg, self._model
        x = torch.randn((cfg.linear_paths, *model.shape)).to(model.device)
        rows = torch.arange(cfg.linear_paths, device=model.device) % len(asked)
        fitted = fit_linear(
            model.denoiser,
            x * model.start(self._levels),
            self._levels,
            rows_of(asked.condition, rows),
            model.null,
            scale=cfg.scale,
            solver=cfg.solver,
            clip=model.clip,
            keeps_noise=model.keeps_noise,
            intercept=cfg.intercept,
            batch_size=max(1, min(cfg.batch_size, cfg.linear_paths)),
        )
        self.conditional_weights.copy_(fitted.conditional)
        self.unconditional_weights.copy_(fitted.unconditional)
        self.intercepts.copy_(fitted.intercept)
        self.unexplained.copy_(fitted.unexplained)
        self.is_fitted = True

    def _linear(self) -> LinearGuidance:
        return LinearGuidance(
            conditional=self.conditional_weights,
            unconditional=self.unconditional_weights,
            intercept=self.intercepts,
            unexplained=self.unexplained,
            sigmas=self._levels,
            scale=self.cfg.scale,
            solver=self.cfg.solver,
            null=self._model.null,
        )

    def _warn_if_never_low(self, found: Guided) -> None:
        """Say once that the threshold says nothing, where no cosine is below it."""
        if self._is_warned or self.cfg.policy != "adaptive":
            return
        lowest = float(found.cosine.nan_to_num(nan=torch.inf).min())
        if lowest >= self.cfg.threshold:
            self._is_warned = True
            what = (
                "all samples keep full guidance"
                if self.cfg.min_guided_steps is None
                else "samples leave guidance whatever it does"
            )
            warnings.warn(
                f"the cosine of the conditional and the unconditional answer is never below the "
                f"threshold {self.cfg.threshold:g} (at least {lowest:.5f}, from noise level "
                f"{float(self._levels[0]):.4g} on), so that it says nothing on this model, and {what}: "
                "raise --method.threshold, or leave after a fixed number of steps (--method.policy "
                "cut_off)",
                stacklevel=2,
            )

    def _saved(self, found: Guided) -> Float[Tensor, "b"]:
        """Share of the evaluations of full guidance that a sample did without."""
        return 1 - found.evaluations.double() / (2 * len(self._policy))


# ---- recipes


def smoke() -> Experiment:
    """Four batches from a mixture of Gaussians, with LinearAG."""
    return replace(
        Experiment.of(
            Config(policy="linear", draw_steps=6, scale=3.0, batch_size=4, linear_paths=32),
            model=ModelConfig(source="esscher.images:mixture", kwargs={"classes": True}),
            image=ImageConfig(labels=(0, 1, 2)),
            steps=4,
        ),
        evaluation=EvaluationConfig(every=2, episodes=4),
        log=LogConfig(every=1),
    )


def paper() -> Experiment:
    """The paper's settings for Stable Diffusion: give --model and --data with a column prompt."""
    return Experiment.of(Config(), model="stable-diffusion-v1-5/stable-diffusion-v1-5")


def digits() -> Experiment:
    """Handwritten digits by class, from a small U-Net that is trained first (about two minutes), guided
    in the first half alone: of images so small the cosine says little.
    """
    return Experiment.of(
        Config(policy="cut_off", guided_steps=10, scale=3.0, batch_size=50),
        model="esscher.images:digits_unet",
        image=ImageConfig(labels=tuple(range(10))),
        steps=2,
    )


# ---- proof


def proof() -> Proof:
    """The sheet's miniatures: exact class-conditional mixtures, and digits drawn by a trained U-Net."""
    return Proof(
        claims=(
            Claim(
                name="saving",
                statement="Samples of full guidance (20 steps, 40 evaluations) for at most 30, ten "
                "times closer to it than 15 guided steps come; the closer, the higher the threshold.",
                arms={
                    "0.999": lambda seed: _from_mixture(threshold=0.999, min_guided_steps=0),
                    "0.995": lambda seed: _from_mixture(threshold=0.995, min_guided_steps=0),
                    "0.98": lambda seed: _from_mixture(threshold=0.98, min_guided_steps=0),
                    "fewer steps": lambda seed: _from_mixture(
                        policy="full", draw_steps=15, reference_steps=20
                    ),
                },
                measure=_errors,
                judge=_judge_saving,
                num_seeds=5,
            ),
            Claim(
                name="linear estimate",
                statement="An estimate of the unconditional answer at every other step comes ten times "
                "closer to full guidance than leaving it out there does, at 25 evaluations each.",
                arms={
                    "linear": lambda seed: _from_narrow_mixture(policy="linear"),
                    "affine": lambda seed: _from_narrow_mixture(policy="linear", intercept=True),
                    "interleaved": lambda seed: _from_narrow_mixture(policy="interleaved"),
                    "cut off": lambda seed: _from_narrow_mixture(policy="cut_off"),
                },
                measure=_errors,
                judge=_judge_linear,
                num_seeds=5,
            ),
            Claim(
                name="trained model",
                statement="Digits drawn by a trained U-Net are closer to those of full guidance than "
                "15 guided steps make them, for no more evaluations.",
                arms={
                    "adaptive": lambda seed: _digits(threshold=0.99, min_guided_steps=5),
                    "0.9995": lambda seed: _digits(threshold=0.9995, min_guided_steps=5),
                    "once it has fallen": lambda seed: _digits(threshold=0.99),
                    "cut off": lambda seed: _digits(policy="cut_off", guided_steps=10),
                    "fewer steps": lambda seed: _digits(
                        policy="full", draw_steps=15, reference_steps=20
                    ),
                    "adaptive, trained six times longer": lambda seed: _digits(
                        LONGER, threshold=0.99, min_guided_steps=5
                    ),
                    "fewer steps, trained six times longer": lambda seed: _digits(
                        LONGER, policy="full", draw_steps=15, reference_steps=20
                    ),
                },
                measure=_errors,
                judge=_judge_digits,
                num_seeds=3,
            ),
        ),
        notes="Errors are squared distances to the samples of full guidance from the same noise, a "
        "component. Of 512 samples; the linear estimate's mean is ruled by the few samples (about one "
        "in a hundred) that end in another component, so that its median is given beside it. The "
        "ratio of means is about a tenth, with an intercept on the other side of it; that of medians "
        "is 1 to 30. On digits of 8 x 8, drawn as pixels, the cosine falls where the paper's rises: it "
        "begins near 1, in nothing but noise, and guidance matters late, so that a sample which leaves "
        "after a quarter of the steps leaves before it does. The default lets nobody leave before the "
        "cosine has been below the threshold, and then nearly nobody leaves. That is not for want of "
        "training: trained longer, fewer steps come closer still. Arms that no check names are shown, "
        "not judged.",
    )


LONGER = {"updates": 3_600}


def _from_mixture(**options: Any) -> Experiment:
    return _miniature({"spread": 6.0, "components": 3}, **options)


def _from_narrow_mixture(**options: Any) -> Experiment:
    return _miniature({"spread": 3.0, "components": 4}, **options)


def _miniature(model: dict[str, Any], **options: Any) -> Experiment:
    """512 samples of the first of four classes in 16 dimensions, on Stable Diffusion's noise levels."""
    kwargs: dict[str, Any] = {
        "dimensions": 16,
        "classes": 4,
        "std": 1.0,
        "schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "train_steps": 1000,
        **model,
    }
    return replace(
        Experiment.of(
            Config(batch_size=512, **options),
            model=ModelConfig(source="esscher.images:exact_mixture", kwargs=kwargs),
            image=ImageConfig(labels=(0,)),
            steps=1,
        ),
        evaluation=EvaluationConfig(every=0, episodes=16),
        log=LogConfig(every=1),
        runtime=RuntimeConfig(threads=1),
    )


def _digits(model: Mapping[str, Any] | None = None, **options: Any) -> Experiment:
    return replace(
        Experiment.of(
            Config(scale=3.0, batch_size=200, **options),
            model=ModelConfig(source="esscher.images:digits_unet", kwargs=dict(model or {})),
            image=ImageConfig(labels=tuple(range(10))),
            steps=1,
        ),
        evaluation=EvaluationConfig(every=0, episodes=50),
        log=LogConfig(every=1),
        runtime=RuntimeConfig(threads=1),
    )


def _errors(run: FinishedRun) -> dict[str, float]:
    row = run.rows("train")[-1]
    return {name: row[name] for name in ("error", "median_error", "evaluations")}


def _mean(figures: Figures, arm: str, name: str) -> float:
    return fmean(figures[arm][name])


def _judge_saving(figures: Figures) -> list[Check]:
    fewer = _mean(figures, "fewer steps", "error")
    good = [
        arm
        for arm in ("0.999", "0.995")
        if _mean(figures, arm, "evaluations") <= 30 and _mean(figures, arm, "error") < fewer / 10
    ]
    order = [_mean(figures, arm, "error") for arm in ("0.999", "0.995", "0.98")]
    best = min(_mean(figures, arm, "error") for arm in ("0.999", "0.995"))
    return [
        Check(
            "error of the best threshold of 0.99 or more with at most 30 evaluations, over that of 15 "
            "guided steps",
            best / fewer,
            "< 0.1",
            bool(good),
        ),
        Check(
            "most evaluations of the thresholds",
            max(_mean(figures, arm, "evaluations") for arm in ("0.999", "0.995", "0.98")),
            "<= 30",
            all(_mean(figures, a, "evaluations") <= 30 for a in ("0.999", "0.995", "0.98")),
        ),
        Check(
            "error at 0.98 over that at 0.999",
            order[2] / order[0],
            "errors rise as the threshold falls",
            order[0] < order[1] < order[2],
        ),
    ]


def _judge_linear(figures: Figures) -> list[Check]:
    linear, left_out = (_mean(figures, arm, "error") for arm in ("linear", "interleaved"))
    evaluations = _mean(figures, "linear", "evaluations")
    return [
        Check(
            "error of the estimate over that of leaving out",
            linear / left_out,
            "< 0.1",
            linear < left_out / 10,
        ),
        Check("evaluations", evaluations, "25", evaluations == 25),
    ]


def _judge_digits(figures: Figures) -> list[Check]:
    adaptive, fewer = (_mean(figures, arm, "error") for arm in ("adaptive", "fewer steps"))
    evaluations = _mean(figures, "adaptive", "evaluations")
    return [
        Check("error over that of 15 guided steps", adaptive / fewer, "< 1", adaptive < fewer),
        Check("evaluations", evaluations, "<= 30", evaluations <= 30),
    ]

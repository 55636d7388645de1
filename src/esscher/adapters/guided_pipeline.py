"""Adaptive Guidance inside a pipeline of diffusers, whatever its scheduler:

    with adaptive_guidance(pipeline, threshold=0.991) as counted:
        images = pipeline(prompts, num_inference_steps=20).images
    print(counted.evaluations)

Such a pipeline asks its network about all samples twice in one call, without and with their conditions.
Here the call is taken apart: what makes no difference to a sample is not asked, and two answers are
given all the same, of which the pipeline makes what the policy says, by its own scale and scheduler.
LinearAG first watches full guidance, in as many steps and at the scale that it is to be used with:

    with recorded_guidance(pipeline) as recorded:
        pipeline(prompts, num_inference_steps=20)
    with adaptive_guidance(pipeline, linear=recorded.fit()) as counted:
        images = pipeline(prompts, num_inference_steps=20).images

A call of the pipeline that does not guide goes through as it is, where the pipeline says so
(`do_classifier_free_guidance`). Every call begins anew, whatever became of the one before.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.adapters.diffusers import LATEST, LESS_SIGNAL
from esscher.errors import UserError, nearest, require
from esscher.functional.diffusion import (
    Prediction,
    denoised_of,
    eps_of,
    guided_estimate,
    input_scale,
    over,
    sigma_of_alpha_bar,
)
from esscher.samplers.guidance import (
    ONE_ANSWER,
    LinearGuidance,
    Policy,
    accurate,
    check_policy,
    cosine,
    full,
    least_guided,
    linear_guidance,
    regressed,
)

CONDITIONAL_FIRST = ("DiTPipeline",)
"""All others put the conditional half second."""
DRAWING_NOISE = ("Ancestral", "DDPM", "LCM", "SDE", "TCD")
"""In the names of schedulers that add noise on the way."""
SAME = 0.01
"""Relative distance up to which two null conditions are one: text encoders round by the batch."""


@dataclass
class CountedGuidance:
    """What the network was asked by the newest call of the pipeline."""

    evaluations: Int[Tensor, "b"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Of each sample."""
    cosines: list[Float[Tensor, "b"]] = field(default_factory=list)
    """Of both answers, as noise, at each step; NaN where not both were asked for."""


@dataclass(frozen=True, kw_only=True)
class PipelineFit:
    """A linear guidance, and the pipeline's settings that it belongs to beside its own.

    It cannot recognise the network.
    """

    linear: LinearGuidance
    """Its solver is the pipeline's scheduler, whatever it says."""
    scheduler: str
    """By name, with what the network predicts."""

    def check(self, asked: "PipelineFit") -> None:
        """Refuse other settings than those of the fit.

        Raises:
            UserError: naming what differs.
        """
        if self.scheduler != asked.scheduler:
            raise UserError(
                f"the linear guidance was fitted with {self.scheduler}, not {asked.scheduler}: fit it "
                "again"
            )
        own, other = self.linear, asked.linear
        null = own.null if _is_same(own.null, other.null) else other.null
        own.check(other.sigmas, other.scale, own.solver, null)


class RecordedGuidance:
    """Paths under full guidance, each as it passes; none is kept."""

    def __init__(self) -> None:
        self.paths = 0
        """Whole ones, of one sample each."""
        self._fit: PipelineFit | None = None
        self._columns: list[Tensor] = []
        self._factor = torch.zeros(0, 0, dtype=torch.float64)

    def fit(self) -> PipelineFit:
        """The unconditional eps of every step, regressed on the path before it by least squares.

        As in `samplers.guidance.fit_linear`, without an intercept. The paper has 200 paths.

        Raises:
            UserError: no whole path, or fewer components in all paths than coefficients.
        """
        if self._fit is None or self.paths == 0:
            raise UserError(
                "no path was recorded to its end: call the pipeline, with guidance, before fit"
            )
        have, columns = len(self._factor), self._factor.shape[1]
        require("components of all paths", have, have >= columns, f"at least {columns}")
        settings = {
            name: getattr(self._fit.linear, name) for name in ("sigmas", "scale", "solver", "null")
        }
        found = regressed(self._factor, dtype=torch.float32, **settings)
        return replace(self._fit, linear=found)

    def begin(self, fit: PipelineFit) -> None:
        """A new drawing, under the settings of an empty fit; one that was stopped is forgotten."""
        if self._fit is None:
            self._fit = fit
            columns = 2 * len(fit.linear.unexplained)
            self._factor = torch.zeros(0, columns, dtype=torch.float64)
        self._fit.check(fit)
        self._columns = []

    def add(self, conditional: Float[Tensor, "b *d"], unconditional: Float[Tensor, "b *d"]) -> None:
        """Both eps of a step."""
        self._columns += [eps.flatten().cpu().double() for eps in (conditional, unconditional)]
        if len(self._columns) == self._factor.shape[1]:
            path = torch.stack(self._columns, 1)
            self._factor = torch.linalg.qr(torch.cat([self._factor, path]), mode="r").R
            self.paths, self._columns = self.paths + len(conditional), []


@contextmanager
def adaptive_guidance(
    pipeline: Any,
    *,
    threshold: float | None = 0.991,
    min_guided_steps: int | None = None,
    guided_at_crossing: bool = True,
    policy: Policy | None = None,
    linear: PipelineFit | None = None,
) -> Iterator[CountedGuidance]:
    """While it lasts, samples follow the policy until both answers point the same way.

    From then on a sample is conditional, for good, at one evaluation a step. Only the network is asked
    less: what else the pipeline runs (a ControlNet, an encoder) still sees all rows.

    Args:
        pipeline: with a `unet` or `transformer` and a scheduler, whose guidance asks about both halves
            of a batch in one call.
        threshold: cosine of both answers, as noise, at which a sample leaves, in (-1, 1]; None: no
            sample leaves the policy.
        min_guided_steps: steps of the policy before which none leaves; None: a quarter of all that the
            call makes, rounded up, never at a level without signal, and only once its cosine has been
            below the threshold.
        guided_at_crossing: whether a step is guided still at which the cosine reaches the threshold.
        policy: one entry a call of the network; None: `linear_guidance` if `linear` is given, or else
            `full`. A "guided" step has the pipeline's own guidance_scale.
        linear: from `recorded_guidance`, for the same network, schedule, scale and null condition;
            with a scheduler that adds no noise on the way (of DDIM eta 0, which cannot be seen here).

    Source: Castillo et al. 2023, Adaptive Guidance (arXiv 2312.12487).
    Raises: UserError if an argument is out of range, or the pipeline has no such network, does not
        guide, or has a scheduler whose noise levels are not known here; and from a call of the
        pipeline that asks otherwise, or that policy or fit were not made for.
    """
    if threshold is not None:
        require("threshold", threshold, -1 < threshold <= 1, "in (-1, 1], or None")
    least = min_guided_steps
    require("min_guided_steps", least, least is None or least >= 0, "None or >= 0")
    told = CountedGuidance()
    guided = _Guided(pipeline, told, threshold, least, guided_at_crossing, policy, linear)
    with _in_place_of_network(pipeline, guided):
        yield told


@contextmanager
def recorded_guidance(pipeline: Any) -> Iterator[RecordedGuidance]:
    """While it lasts, paths of the pipeline's own calls are recorded, which stay as they are.

    Args:
        pipeline: as in `adaptive_guidance`; it says its `guidance_scale`.

    Raises: UserError as `adaptive_guidance`; and from a call whose schedule, scale or null condition
        is another than the first one's.
    """
    recorded = RecordedGuidance()
    guided = _Guided(pipeline, CountedGuidance(), None, recorded=recorded)
    with _in_place_of_network(pipeline, guided):
        yield recorded


@contextmanager
def _in_place_of_network(pipeline: Any, guided: "_Guided") -> Iterator[None]:
    network: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    _check_pipeline(pipeline, network)
    _prediction_of(pipeline.scheduler)
    own = vars(network)
    before = {"forward": own["forward"]} if "forward" in own else {}
    guided.forward = network.forward
    network.forward = guided
    try:
        yield
    finally:
        own.pop("forward", None)
        own.update(before)


def _check_pipeline(pipeline: Any, network: Any) -> None:
    name = type(pipeline).__name__
    if network is None:
        raise UserError(f"{name} has no unet or transformer to guide")
    if isinstance(vars(network).get("forward"), _Guided):
        raise UserError(f"{name} is under adaptive guidance already: leave that first")
    options = inspect.signature(type(pipeline).__call__).parameters if callable(pipeline) else {}
    others = any(option.kind is option.VAR_KEYWORD for option in options.values())
    if options and not others and not any("guidance" in option for option in options):
        raise UserError(f"{name} draws without guidance: adaptive guidance saves nothing there")
    for option in ("image_guidance_scale", "img_guidance_scale"):
        if option in options:
            raise UserError(
                f"{name} guides by three answers a sample ({option}), and adaptive guidance knows two: "
                "call it without"
            )


class _Guided:
    """The network's own forward, asked about fewer rows."""

    forward: Callable[..., Any]

    def __init__(
        self,
        pipeline: Any,
        told: CountedGuidance,
        threshold: float | None,
        asked: int | None = None,
        at_crossing: bool = True,
        policy: Policy | None = None,
        linear: PipelineFit | None = None,
        recorded: RecordedGuidance | None = None,
    ):
        self._pipeline, self._told, self._threshold = pipeline, told, threshold
        self._asked, self._at_crossing = asked, at_crossing
        self._asked_policy, self._linear, self._recorded = policy, linear, recorded
        self._conditional_first = type(pipeline).__name__ in CONDITIONAL_FIRST
        self._timesteps: Any = None
        self._kind: Prediction = "epsilon"

    def __call__(self, *given: Any, **named: Any) -> Any:
        z = given[0] if given else named.get("sample", named.get("hidden_states"))
        told = named.get("timestep", given[1] if len(given) > 1 else None)
        if not isinstance(z, Tensor) or told is None:
            raise self._refusal("does not tell its network a sample and a timestep")
        time = torch.as_tensor(told)
        if getattr(self._pipeline, "do_classifier_free_guidance", True):
            return self._guided(z, time, given, named)
        return self._unguided(z, time, given, named)

    def _guided(
        self, z: Tensor, time: Tensor, given: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        if self._is_new(len(z) / 2, time):
            self._begin(z, time, named)
        if not self._policy:
            raise self._refusal("begins to guide in the middle of a drawing")
        if not self._is_at(self._step, time):
            expected = float(self._timesteps[self._first + self._step])
            raise self._refusal(
                f"tells its network the time {float(time.max()):g} where its scheduler is at "
                f"{expected:g}"
            )
        step, guiding, everybody = self._policy[self._step], self._guiding, self._everybody
        compared = guiding & (step not in ONE_ANSWER)
        alone = step == "unconditional"
        asks_c, asks_u = (~guiding, guiding) if alone else (everybody, compared)
        rows = self._together(asks_c, asks_u)
        if bool(rows.all()):
            answer = self.forward(*given, **named)
        else:
            answer = self.forward(*_rows_of(given, rows), **_rows_of(named, rows))
        output = answer[0] if isinstance(answer, tuple) else answer.sample
        whole = output.new_zeros(len(rows), *output.shape[1:])
        whole[rows] = output
        self._told.evaluations += asks_c.long() + asks_u.long()
        halves = self._take(self._halves(z)[0], *self._halves(whole), compared)
        self._step += 1
        together = self._together(*halves)
        if isinstance(answer, tuple):
            return (together, *answer[1:])
        answer.sample = together
        return answer

    def _unguided(
        self, z: Tensor, time: Tensor, given: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """The call as it is, of a sample a row."""
        if self._recorded is not None:
            raise self._refusal("does not guide, and its guidance is to be recorded")
        self._check_terms()
        if self._is_new(len(z), time):
            self._begin_counting(len(z), time, z.device)
            self._timesteps = self._pipeline.scheduler.timesteps
        answer = self.forward(*given, **named)
        self._told.evaluations += 1
        self._told.cosines.append(torch.full((len(z),), math.nan, device=z.device))
        self._step += 1
        return answer

    def _together(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Both halves as the pipeline orders them."""
        halves = conditional, unconditional
        return torch.cat(halves if self._conditional_first else halves[::-1])

    def _halves(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional one, and the other."""
        first, second = whole.chunk(2)
        return (first, second) if self._conditional_first else (second, first)

    # ---- where the pipeline stands

    def _is_new(self, count: float, time: Tensor) -> bool:
        """Whether this is the first call of a drawing of so many samples.

        A pipeline sets the timesteps of its scheduler whenever it is called. A loop of another kind may
        take them again, from the first one on.
        """
        return (
            self._pipeline.scheduler.timesteps is not self._timesteps
            or count != len(self._guiding)
            or self._step == self._steps
            or (not self._is_at(self._step, time) and self._is_at(0, time))
        )

    def _is_at(self, step: int, time: Tensor) -> bool:
        """Whether a step's network is told this time: the scheduler's, or a flow's share of all."""
        told, expected = float(time.max()), float(self._timesteps[self._first + step])
        slack = 2 * torch.finfo(time.dtype).eps if time.is_floating_point() else 0.0
        return any(
            math.isclose(told, expected / unit, rel_tol=slack, abs_tol=1e-6) for unit in self._units
        )

    def _begin_counting(self, count: int, time: Tensor, device: torch.device) -> None:
        scheduler = self._pipeline.scheduler
        self._timesteps = None  # What is refused from here on is no drawing that goes on.
        self._kind, levels = _noise_levels(scheduler)
        times = torch.as_tensor(scheduler.timesteps).cpu().double()
        flow = self._kind == "flow_prediction"
        self._units = (1, scheduler.config.num_train_timesteps) if flow else (1,)
        first = getattr(scheduler, "begin_index", None)
        if first is None:
            apart = torch.stack([(times / unit - float(time.max())).abs() for unit in self._units])
            first = int(apart.amin(0).argmin())
        steps = len(times) - first
        if getattr(self._pipeline, "denoising_end", None) is not None:
            steps = min(steps, self._pipeline.num_timesteps)
        self._levels = levels[first : first + steps + 1]
        self._first, self._steps, self._step = first, steps, 0
        self._policy: Policy = ()
        self._guiding = self._everybody = torch.ones(count, dtype=torch.bool, device=device)
        self._told.evaluations = torch.zeros(count, dtype=torch.long, device=device)
        self._told.cosines = []

    def _begin(self, z: Tensor, time: Tensor, named: Mapping[str, Any]) -> None:
        self._check_terms()
        self._check_rows(z, named)
        self._begin_counting(len(z) // 2, time, z.device)
        # Noise that is predicted differs without signal too.
        threshold = None if self._kind == "epsilon" else self._threshold
        self._least = least_guided(self._levels, self._asked, threshold, self._at_crossing)
        self._may_leave = self._everybody & (self._asked is not None)
        policy, linear = self._asked_policy, self._linear
        if policy is None:
            policy = full(self._steps) if linear is None else linear_guidance(self._steps)
        check_policy(policy, self._steps, None if linear is None else linear.linear)
        self._policy = policy
        if any(not isinstance(step, str) for step in policy):
            self._scale = self._said_scale()
        if linear is not None:
            linear.check(self._empty_fit(named))
        if self._recorded is not None:
            self._recorded.begin(self._empty_fit(named))
        estimated = (place for place, step in enumerate(policy) if step == "linear")
        self._last_estimate = max(estimated, default=-1)
        self._history_c: list[Tensor] = []
        self._history_u: list[Tensor] = []
        self._timesteps = self._pipeline.scheduler.timesteps

    def _check_terms(self) -> None:
        if getattr(self._pipeline, "do_perturbed_attention_guidance", False):
            raise self._refusal("guides by perturbed attention too (pag_scale)")

    def _check_rows(self, z: Tensor, named: Mapping[str, Any]) -> None:
        """Without guidance, and with that of three terms, halves are of samples that differ."""
        twice = len(z) % 2 == 0 and torch.equal(*z.chunk(2))
        if twice and self._conditional_first:
            _, null = self._halves(named["class_labels"])
            twice = bool((null == self._pipeline.transformer.config.num_embeds_ada_norm).all())
        if not twice:
            raise self._refusal(
                f"asks about {len(z)} rows in one call, not about each sample twice"
            )

    def _empty_fit(self, named: Mapping[str, Any]) -> PipelineFit:
        """What a linear guidance belongs to here, without its coefficients."""
        scheduler, name = self._pipeline.scheduler, type(self._pipeline).__name__
        kind, config = type(scheduler).__name__, scheduler.config
        noisy = any(part in kind for part in DRAWING_NOISE)
        noisy = noisy or str(config.get("algorithm_type", "")).startswith("sde")
        if noisy or config.get("stochastic_sampling", False):
            raise UserError(
                f"linear guidance needs a path without noise, and {kind} adds some on the way, which "
                "cannot be foreseen from the path so far: use another scheduler, or adaptive guidance "
                "alone"
            )
        states = named.get("encoder_hidden_states")
        if not isinstance(states, Tensor) or len(states) != 2 * len(self._guiding):
            raise UserError(
                f"linear guidance belongs to one null condition, and {name} tells its network none "
                "that is known here (encoder_hidden_states): use adaptive guidance alone"
            )
        null = self._halves(states)[1]
        if not all(_is_same(null[:1], row) for row in null.split(1)):
            raise UserError(
                f"linear guidance belongs to one null condition, got {len(null)} that differ: give all "
                "samples the same negative prompt, or none"
            )
        told = f"{kind} ({self._kind})"
        if rescale := getattr(self._pipeline, "guidance_rescale", 0.0):
            told += f" and guidance_rescale {rescale:g}"
        square = torch.zeros(self._steps, self._steps, dtype=torch.float64)
        linear = LinearGuidance(
            conditional=square,
            unconditional=square,
            intercept=square[0],
            unexplained=square[0],
            sigmas=self._levels,
            scale=self._said_scale(),
            solver="euler",
            null=null[:1],
        )
        return PipelineFit(linear=linear, scheduler=told)

    def _said_scale(self) -> float:
        scale = getattr(self._pipeline, "guidance_scale", None)
        if scale is None:
            raise UserError(
                f"{type(self._pipeline).__name__} does not say its guidance_scale, which linear steps "
                "and those of a scale of their own need: leave them out of the policy"
            )
        return float(scale)

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"{type(self._pipeline).__name__} {what}: adaptive guidance needs one call a step that "
            "asks about each sample twice, with a guidance_scale above 1; call this pipeline without"
        )

    # ---- guidance

    def _take(
        self, z: Tensor, conditional: Tensor, unconditional: Tensor, compared: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Answers from which the pipeline makes the step of the policy; and who is guided in the next.

        Args:
            conditional, unconditional: 0 where they were not asked for.
            compared: where both were.
        """
        step, place = self._policy[self._step], self._step
        part = self._part(conditional, z)
        of_output, of_input = _noise_terms(self._kind, float(self._levels[place]))
        share = of_input * accurate(z[part])
        eps_c = of_output * accurate(conditional[part]) + share
        eps_u = of_output * accurate(unconditional[part]) + share
        gamma = cosine(eps_c, eps_u).masked_fill(~compared, math.nan)
        self._told.cosines.append(gamma)
        if self._recorded is not None:
            self._recorded.add(eps_c, eps_u)
        if self._linear is not None and place <= self._last_estimate:
            # Rows that have left guidance hold nonsense here, which is never looked at again.
            self._history_c.append(eps_c)
            if step != "guided":
                eps_u = self._linear.linear.estimate(self._history_c, self._history_u)
            self._history_u.append(eps_u)
            if step == "linear":
                unconditional = conditional.clone()
                unconditional[part] = ((eps_u - share) / of_output).to(conditional)

        made = place + 1 if self._at_crossing else place
        threshold = math.inf if self._threshold is None else self._threshold
        leaves = compared & (gamma >= threshold) & self._may_leave & (made >= self._least)
        if self._threshold is not None:
            self._may_leave = self._may_leave | (compared & (gamma < threshold))
        guided = self._guiding & (step != "conditional")
        if not self._at_crossing:
            guided = guided & ~leaves
        self._guiding = self._guiding & ~leaves
        use = over(guided, conditional)
        towards = conditional
        if step == "unconditional":
            towards = torch.where(use, unconditional, conditional)
        elif not isinstance(step, str):
            wanted = guided_estimate(conditional, unconditional, step / self._scale)
            towards = torch.where(use, wanted, conditional)
        return towards, torch.where(use, unconditional, conditional)

    def _part(self, output: Tensor, z: Tensor) -> tuple[slice, ...]:
        """Of which both hold the sample: not variances, nor what the network is told beside it."""
        sizes = list(output.shape)
        if str(self._pipeline.scheduler.config.get("variance_type")).startswith("learned"):
            sizes[1] //= 2
        return tuple(slice(min(pair)) for pair in zip(sizes, z.shape, strict=True))


def _noise_terms(kind: Prediction, sigma: float) -> tuple[float, float]:
    """(a, b) of eps = a output + b z, whatever the network predicts."""
    if kind == "epsilon":
        return 1.0, 0.0
    level = torch.tensor([sigma], dtype=torch.float64)

    def eps(output: Tensor, z: Tensor) -> float:
        x = z / input_scale(kind, level)
        return float(eps_of(x, denoised_of(kind, output, x, level), level))

    one = torch.ones_like(level)
    return eps(one, 0 * one), eps(0 * one, one)


def _prediction_of(scheduler: Any) -> Prediction:
    """What the network predicts.

    Raises:
        UserError: that is not known here, or what z is made of is not.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if hasattr(scheduler, "precondition_inputs"):
        raise UserError(f"{name} has preconditioning of its own, which is not supported")
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(f"{name} has continuous steps (timestep_type), which are not supported")
    if config.get("invert_sigmas", False):
        raise UserError(
            f"{name} counts its steps backwards (invert_sigmas), which is not supported"
        )
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    kind = "flow_prediction" if flow else config.get("prediction_type")
    known = get_args(Prediction)
    if kind not in known:
        told = nearest(str(kind), known)
        raise UserError(f"{name} has prediction_type {kind!r}, which is not known here: {told}")
    return kind


def _noise_levels(scheduler: Any) -> tuple[Prediction, Float[Tensor, "k"]]:
    """What the network predicts, and noise over signal at each step of sampling and after it."""
    kind = _prediction_of(scheduler)
    times = torch.as_tensor(scheduler.timesteps).cpu().double()
    sigmas = getattr(scheduler, "sigmas", None)
    # Of two stages a step, some schedulers keep the levels of one alone there.
    told = sigmas is not None and len(sigmas) == len(times) + 1
    told = told and not hasattr(scheduler, "sigmas_interpol")
    if kind == "flow_prediction":
        share = times / scheduler.config.num_train_timesteps
        share = (
            torch.as_tensor(sigmas).cpu().double() if told else torch.cat([share, 0 * share[:1]])
        )
        share = share.clamp(max=LATEST)
        return kind, share / (1 - share)
    if told:
        return kind, torch.as_tensor(sigmas).cpu().double()
    table = sigma_of_alpha_bar(scheduler.alphas_cumprod.cpu().double().clamp(min=LESS_SIGNAL))
    levels = table[times.round().long().clamp(max=len(table) - 1)]
    return kind, torch.cat([levels, levels.new_zeros(1)])


def _rows_of(value: Any, rows: Tensor) -> Any:
    """The rows asked for, of whatever has one for each of the batch."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == len(rows) else value
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows_of(item, rows) for item in value)
    return value


def _is_same(null: Any, other: Any) -> bool:
    """Whether two null conditions are one."""
    if null.shape != other.shape:
        return False
    apart = (null.float() - other.to(null.device).float()).norm()
    return bool(apart <= SAME * null.float().norm())

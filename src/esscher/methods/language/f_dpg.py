"""Any f-divergence to any unnormalised target (f-DPG): the distribution is written down, then learned.

A language model is to sample from p(x | c) = P(x | c) / Z_c, where P can be computed for a completion x
of a prompt c, and Z_c is unknown. P is a product of what is chosen from

    a(x)                          the model as it was (the base)
    exp(r(x) / beta)              a reward: the optimum of RL with a KL penalty
    b(x), or 1 where b(x) > 0     pointwise constraints
    exp(lambda . phi(x))          moments: E_p[phi] = mu, "half of all answers mention women"

and the model descends D_f(pi || p) = E_p[f(t)], t = pi / p, by a policy gradient whose reward is
-f'(t):

    grad D_f = E_pi[f'(t) grad log pi]          though t changes with pi

    L = -mean_x rho (-f'(t) - baseline) log pi(x),   log t = log pi - log P + log Z,   x ~ q

Compared with its ancestors:
- forward_kl is DPG and GDC, which cover all of p: -f'(t) = p / pi;
- reverse_kl is RL with a KL penalty (KL-control), which seeks a mode: -f'(t) = log p / pi - 1;
- js, the default, and total_variation lie between, and their rewards are bounded.

Z_c is a mean of P / q over all samples of c so far. Completions are drawn without temperature or
truncation, because log q must be what they are drawn from.

| variable | paper | shape | unit |
|---|---|---|---|
| logp | log pi(x given c), summed over tokens | b | nats |
| log_proposal | log q; q is pi, or an older pi (lagged) | b | nats |
| log_target | log P | b | nats |
| log_partition | log Z_c | b | nats |
| log_ratio | log t = log pi / p | b | nats |
| tilt | lambda | k | nats per feature |
| features | phi | b k | |
| beta | beta | scalar | reward |

Names of divergences are those of f_dpo: reverse_kl is KL(pi || p), the generator kl of
functional/divergences.py, and forward_kl is KL(p || pi), which the paper calls KL.
"""

import math
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError, nearest, require
from esscher.experience.text import Batches, Text, collate_prompts
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
    TextConfig,
)
from esscher.functional.divergences import FDivergence, by_name
from esscher.functional.matching import (
    divergence_estimates,
    finite_at_zero_target,
    fit_tilt,
    log_density_ratio,
    log_partition_update,
    matching_terms,
    pseudo_reward,
)
from esscher.method import Method, Paper
from esscher.models import character_tokenizer
from esscher.nn.sharding import own_part
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, within
from esscher.runtime.device import Runtime, RuntimeConfig, sum_over_processes
from esscher.runtime.optim import Optim
from esscher.runtime.state import State, Stateful
from esscher.samplers.decoding import Decoding
from esscher.types import Completions, Metrics, Prompts, Record, Scored, record

PAPER = Paper(
    title="Aligning Language Models with Preferences through f-divergence Minimization",
    year=2023,
    arxiv="2302.08215",
    sections="theorem 1, algorithm 1; GDC: arXiv 2012.11635",
    purpose="A language model that samples from a distribution which you write down: a reward, hard "
    "constraints, shares of the outputs, each on top of the model as it is.",
    claim="One policy gradient, with reward -f'(pi / p), descends any f-divergence to the target; "
    "forward KL covers it, reverse KL seeks its mode, Jensen-Shannon is the best compromise.",
)

INFINITY = float("inf")

GENERATORS = {"reverse_kl": "kl", "forward_kl": "reverse_kl"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of f-DPG; defaults are those of the authors' code (naver/disco) unless a line says
    otherwise.
    """

    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "total_variation",
        "js",
        "neyman_chi2",
        "pearson_chi2",
        "squared_hellinger",
        "alpha",
    ] = "js"
    """From the model to the target. forward_kl covers the target and keeps most diversity; reverse_kl
    gives up modes for the highest reward; js and total_variation lie between."""
    alpha: float = 0.5
    """Of the alpha-divergence, in (0, 1): from reverse_kl (0) to forward_kl (1)."""
    base: bool = True
    """Whether the model as it was is a factor of the target. False: the other factors are all of it,
    such as exp(r / beta) of a reward that is a log-density."""
    beta: float | None = 0.1
    """The reward enters as exp(reward / beta), > 0: lower strays further from the base. None: it does
    not enter (our choice; the paper's tasks differ)."""
    pointwise: tuple[tuple[str, Literal["indicator", "factor"]], ...] = ()
    """Components b of the reward that the target is multiplied by, with how: indicator, 1 where b > 0
    and 0 elsewhere; factor, b itself, which must be >= 0. They may lie in the reward's sum as well."""
    floor: float = 0.0
    """Least value of each of these multipliers, in [0, 1). Divergences that punish an impossible
    completion infinitely (reverse_kl, pearson_chi2) need one, and permit a little of it."""
    moments: tuple[tuple[str, float], ...] = ()
    """Components of the reward, with the mean that each is to have: the least change of the target
    that makes it so. Means are over all prompts alike."""
    moment_samples: int = 10_240
    """Completions of the base that the moments are fitted on, before anything is learned, >= 1,
    rounded up to whole batches (GDC: 10,240 to 20,480; the authors' newer code: 512)."""
    partition: Literal["running", "batch", "fixed"] = "running"
    """Where Z comes from. running: all samples so far, of each prompt; too low once the model has left
    a part of the target, which then returns less easily. batch: this batch. fixed: log_partition."""
    log_partition: float = 0.0
    """Log Z in nats, if partition is fixed (for one prompt)."""
    proposal: Literal["policy", "lagged"] = "policy"
    """Who draws the completions: the model itself, or an older copy of it that is replaced only by
    a better one (with importance weights)."""
    proposal_interval: int = 16
    """Updates after which the older copy is compared with the model, >= 1."""
    proposal_metric: Literal["kl", "total_variation"] = "kl"
    """The divergence from the target by which they are compared."""
    baseline_window: int = 1_024
    """Completions whose mean reward -f' is the baseline, >= 0; 0: none. More variance without."""
    batch_size: int = 16
    """Prompts an update, over all processes, >= 1; 1 for generation without prompts."""
    group_size: int = 64
    """Completions of each prompt, >= 1 (the authors: 1,024)."""
    micro_batch_size: int = 0
    """Completions whose activations are held at once, >= 0; 0: all. Does not change the objective."""
    learning_rate: float = 1.41e-5
    """Adam step, > 0."""
    warmup_updates: int = 12
    """Updates over which the step grows to its size, in a straight line, >= 0."""
    decay_updates: int = 0
    """Updates over which the step shrinks to nothing, in a straight line, >= 0; 0: it stays (the
    authors). A sign as reward (total_variation) needs it to settle."""
    max_grad_norm: float | None = None
    """The gradient is scaled down to this length, > 0; None: it is not."""
    max_new_tokens: int = 40
    """Longest completion, tokens, >= 1; one that is cut there counts as it is."""

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 < self.alpha < 1, "in (0, 1)")
        require("beta", self.beta, self.beta is None or self.beta > 0, "None or > 0")
        require("floor", self.floor, 0 <= self.floor < 1, "in [0, 1)")
        norm = self.max_grad_norm
        require("max_grad_norm", norm, norm is None or norm > 0, "None or > 0")
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        for name in ("moment_samples", "proposal_interval", "batch_size", "group_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        require("batch_size", self.batch_size, self.batch_size <= 1_000_000, "<= 1,000,000")
        for name in ("baseline_window", "micro_batch_size", "warmup_updates", "decay_updates"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1")
        self._check_target()
        if self.partition == "fixed" and self.moments:
            raise UserError(
                "partition fixed needs a target that is known in advance, and moments are fitted: "
                "choose partition running"
            )
        if self.partition == "batch" and self.group_size == 1:
            raise UserError(
                "group_size must be >= 2 for partition batch, got 1: Z would be the sample's own"
            )

    def _check_target(self) -> None:
        if self.beta is None and not self.pointwise and not self.moments:
            raise UserError(
                "beta is None and neither pointwise nor moments are given: the target would be the "
                "base model itself"
            )
        for field in ("pointwise", "moments"):
            names = [entry[0] for entry in getattr(self, field)]
            require(field, names, len(set(names)) == len(names), "different components")
        if self.hard and not finite_at_zero_target(self.generator):
            raise UserError(
                f"divergence {self.divergence} is infinite as soon as a completion is impossible under "
                "the target, as pointwise makes it: choose js, total_variation or forward_kl, or give "
                "a floor"
            )

    @property
    def generator(self) -> FDivergence:
        """Of the divergence, by this library's name."""
        if self.divergence == "alpha":
            return by_name(f"alpha({self.alpha})")
        return by_name(GENERATORS.get(self.divergence, self.divergence))

    @property
    def hard(self) -> bool:
        """Whether completions can be impossible under the target."""
        return bool(self.pointwise) and self.floor == 0


@record
class Samples(Record):
    """Completions of equally many of each prompt, as the loss sees them; log-densities in nats."""

    tokens: Int[Tensor, "b t"]
    token_mask: Bool[Tensor, "b t"]
    completion_mask: Bool[Tensor, "b t"]
    valid: Bool[Tensor, "b"]
    weight: Float[Tensor, "b"]
    """In means over prompts of means over completions; adds up to 1 over all processes."""
    features: Float[Tensor, "b k"]
    log_proposal: Float[Tensor, "b"]
    ref_logp: Float[Tensor, "b"]
    log_target: Float[Tensor, "b"]
    log_partition: Float[Tensor, "b"]

    @property
    def known(self) -> Bool[Tensor, "b"]:
        """Whether a possible completion of the prompt was ever drawn, so that Z > 0."""
        return self.log_partition > -INFINITY

    @property
    def log_density(self) -> Float[Tensor, "b"]:
        """Log p; -inf where it is unknown."""
        return (self.log_target - self.log_partition).masked_fill(~self.known, -INFINITY)


class Partition(Stateful):
    """Log Z of each prompt of the data: the log of the mean of P / q over all samples so far."""

    def __init__(self, num_prompts: int, device: torch.device):
        self.log_mean = torch.zeros(num_prompts, dtype=torch.float64, device=device)
        self.count = torch.zeros(num_prompts, dtype=torch.long, device=device)

    def update(
        self, prompts: list[int], log_weight: Float[Tensor, "p n"], valid: Bool[Tensor, "p n"]
    ) -> None:
        """Take in samples; a prompt may be there more than once."""
        for prompt, weight, counts in zip(prompts, log_weight, valid, strict=True):
            self.log_mean[prompt], self.count[prompt] = log_partition_update(
                self.log_mean[prompt], self.count[prompt], weight, counts
            )


class Collected(Stateful):
    """Completions of the base, on which the moments are fitted; room for none where there are none."""

    def __init__(self, cfg: Config, device: torch.device):
        batches = math.ceil(cfg.moment_samples / (cfg.batch_size * cfg.group_size))
        size = batches * cfg.batch_size if cfg.moments else 0
        shape = (size, cfg.group_size)
        self.log_weight = torch.zeros(shape, dtype=torch.float64, device=device)
        self.valid = torch.zeros(shape, dtype=torch.bool, device=device)
        self.features = self.log_weight.new_zeros(*shape, len(cfg.moments))
        self.prompt = torch.zeros(size, dtype=torch.long, device=device)
        self.num_prompts = 0

    @property
    def full(self) -> bool:
        return self.num_prompts == len(self.prompt)

    def add(
        self,
        prompt: Int[Tensor, "p"],
        log_weight: Float[Tensor, "p n"],
        valid: Bool[Tensor, "p n"],
        features: Float[Tensor, "p n k"],
    ) -> None:
        """Completions of a batch of prompts, with log P / a."""
        place = slice(self.num_prompts, self.num_prompts + len(prompt))
        self.prompt[place], self.log_weight[place] = prompt, log_weight
        self.valid[place], self.features[place] = valid, features
        self.num_prompts += len(prompt)


class FDPG(Method):
    """See the module; `update` is one iteration on the completions of a batch of prompts."""

    Config = Config
    world = "language"
    loop = "generate"
    rows = "prompts"
    data = "optional"
    headline = "jensen_shannon"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        runtime.share(cfg.batch_size)  # Said before work starts where they cannot.
        self.model = spec.model
        self._reference = spec.model.frozen()
        runtime.prepare(self.model, self._reference)
        trained = self.model.trained
        self.opt = Optim(trained, cfg.learning_rate, max_grad_norm=cfg.max_grad_norm)
        lagged = cfg.proposal == "lagged"
        self.proposal = [p.detach().clone() for p in trained] if lagged else []
        self.partition = Partition(1, runtime.device)
        options: dict[str, Any] = {"dtype": torch.float64, "device": runtime.device}
        self.recent_reward = torch.zeros(cfg.baseline_window, **options)
        self.recent_weight = torch.zeros(cfg.baseline_window, **options)
        self.tilt = torch.zeros(len(cfg.moments), **options)
        self.collected = Collected(cfg, runtime.device)
        self._prompt_of: list[int] = []
        self._asked: list[int] = []
        self._log_probs = runtime.autocast(self.log_probs)

    @property
    def policy(self) -> nn.Module:
        return self.model

    @property
    def decoding(self) -> Decoding:
        return Decoding(max_new_tokens=self.cfg.max_new_tokens)

    def load_state_dict(self, state: State) -> None:
        """Of as many prompts as there were: whoever opens a finished run has no data."""
        self.partition = Partition(len(state["partition.count"]), self.runtime.device)
        super().load_state_dict(state)

    def experience(self, text: Text[list[int]]) -> Batches[Prompts]:
        numbers: dict[str, int] = {}
        rows = text.rows or text.train
        # Equal rows are one prompt with one Z: so generation without prompts is a set of empty ones.
        self._prompt_of = [numbers.setdefault(repr(row), len(numbers)) for row in rows]
        if self.cfg.partition == "fixed" and len(numbers) > 1:
            raise UserError(
                f"partition fixed gives one Z, and {text.name} has {len(numbers)} different prompts: "
                "choose partition running or batch"
            )
        self.partition = Partition(len(numbers), self.runtime.device)
        return Batches(text, collate_prompts, self.cfg.batch_size)

    def propose(self, prompts: Prompts, step: int) -> Completions:
        self._asked = [self._prompt_of[row] for row in prompts.row.tolist()]
        prompts, runtime = prompts.to(self.runtime.device), self.runtime
        count = len(prompts) * self.cfg.group_size
        # Processes may be asked the same, and must not all answer the same.
        seeds = torch.randint(2**62, (runtime.world, count))[runtime.rank].tolist()
        with self.as_proposal():
            return self.model.generate(prompts.tokens, prompts.mask, seeds, self.decoding)

    @contextmanager
    def as_proposal(self) -> Iterator[None]:
        """The model has the older copy's weights for a while, if there is one."""
        self.exchange_weights()
        try:
            yield
        finally:
            self.exchange_weights()

    @torch.no_grad()
    def exchange_weights(self) -> None:
        """Between the model and the older copy, one tensor after the other, in their own memory."""
        if self.proposal:
            for older, parameter in zip(self.proposal, self.model.trained, strict=True):
                theirs, own = own_part(older), own_part(parameter)
                kept = own.clone()
                own.copy_(theirs)
                theirs.copy_(kept)

    def update(self, batch: Scored, step: int) -> Metrics:
        cfg, scored = self.cfg, batch.to(self.runtime.device)
        samples = self.judged(scored)
        if not self.collected.full:
            return self.collect(samples) | self.told(scored, samples, samples.log_proposal)
        samples = self.matched(samples)
        baseline = self.recent_reward @ self.recent_weight / self.recent_weight.sum().clamp(min=1)
        found: list[Tensor] = []

        def loss(part: Samples) -> Float[Tensor, ""]:
            logp = self._log_probs(self.model, part)
            reward = self.pseudo_reward(logp, part)
            found.append(torch.stack([logp.detach(), reward], 1))
            return (part.weight * self.terms(logp, reward - baseline, part)).sum()

        self.opt.learning_rate = self.learning_rate(step)
        self.opt.minimize_sum(loss, samples.split(cfg.micro_batch_size))
        logp, reward = torch.cat(found).unbind(1)
        self.remember(reward, samples)
        told = self.told(scored, samples, logp) | {"baseline": baseline}
        if self.proposal and (step + 1) % cfg.proposal_interval == 0:
            told["proposal_replaced"] = self.renew_proposal(logp, samples)
        return told

    # ---- the target

    @torch.no_grad()
    def judged(self, scored: Scored) -> Samples:
        """All of log P but for the moments; rows without a verdict keep log P = log q and no weight."""
        cfg, completions = self.cfg, scored.completions
        components = {name: self.component(scored, name) for name, _ in cfg.pointwise + cfg.moments}
        valid = scored.valid.clone()
        for value in components.values():
            valid &= ~value.isnan()
        components = {n: x.masked_fill(~valid, 0.0).double() for n, x in components.items()}
        features = [components[name] for name, _ in cfg.moments]
        nothing = torch.zeros_like(scored.reward, dtype=torch.float64)
        samples = Samples(
            tokens=completions.tokens,
            token_mask=completions.token_mask,
            completion_mask=completions.completion_mask,
            valid=valid,
            weight=self.weights(completions.group, valid),
            features=torch.stack(features, 1) if features else nothing.new_zeros(len(valid), 0),
            log_proposal=completions.logp.double().sum(-1),
            ref_logp=nothing,
            log_target=nothing,
            log_partition=nothing,
        )
        parts = samples.split(cfg.micro_batch_size)
        ref_logp = torch.cat([self._log_probs(self._reference, part) for part in parts])
        log_target = ref_logp if cfg.base else nothing
        if cfg.beta is not None:
            log_target = log_target + scored.reward.double() / cfg.beta
        for name, how in cfg.pointwise:
            log_target = log_target + self.log_multiplier(name, how, components[name])
        log_target = log_target.where(valid, samples.log_proposal)
        return replaced(samples, ref_logp=ref_logp, log_target=log_target)

    def component(self, scored: Scored, name: str) -> Float[Tensor, "b"]:
        """Of the reward; NaN where it is missing."""
        if not scored.parts:  # Every call of the reward has failed.
            return torch.full_like(scored.reward, math.nan)
        if name not in scored.parts:
            raise UserError(f"the reward has no component {name!r}: {nearest(name, scored.parts)}")
        return scored.parts[name]

    def log_multiplier(self, name: str, how: str, value: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        if how == "indicator":
            value = (value > 0).double()
        # Waiting for the device here is little beside what drew the completions.
        elif bool((value < 0).any()):
            raise UserError(
                f"component {name!r} is a factor of the target and was {float(value.min()):g}: it "
                "must be >= 0; or use it as an indicator"
            )
        return value.clamp(min=self.cfg.floor).log()

    def weights(self, group: Int[Tensor, "b"], valid: Bool[Tensor, "b"]) -> Float[Tensor, "b"]:
        """Every prompt counts alike, and every judged completion of it."""
        count = torch.zeros(len(self._asked), dtype=torch.float64, device=valid.device)
        count = count.index_add(0, group, valid.double())
        num_prompts = (count > 0).sum()
        sum_over_processes([num_prompts])
        return valid / (count[group] * num_prompts).clamp(min=1)

    def collect(self, samples: Samples) -> Metrics:
        """Keep completions of the base; when there are enough, fit the moments on them."""
        held = self.collected
        shape = (-1, self.cfg.group_size)
        held.add(
            self.runtime.joined(torch.tensor(self._asked, device=self.runtime.device)),
            self.runtime.joined((samples.log_target - samples.log_proposal).view(shape)),
            self.runtime.joined(samples.valid.view(shape)),
            self.runtime.joined(samples.features.view(*shape, samples.features.shape[1])),
        )
        if held.full:
            names = [name for name, _ in self.cfg.moments]
            moments = torch.tensor([m for _, m in self.cfg.moments], device=self.runtime.device)
            log_weight = held.log_weight.masked_fill(~held.valid, -INFINITY)
            try:
                self.tilt.copy_(fit_tilt(log_weight, held.features, moments.double()))
            except ValueError as error:
                raise UserError(
                    f"moments cannot be had (features are, from 0: {', '.join(names)}): {error}"
                ) from error
            if self.cfg.partition == "running":
                log_weight = held.log_weight + held.features @ self.tilt
                self.partition.update(held.prompt.tolist(), log_weight, held.valid)
        return {"moments_fitted": torch.tensor(float(held.full))}

    @torch.no_grad()
    def matched(self, samples: Samples) -> Samples:
        """With the moments in log P, and with log Z, which takes these samples in."""
        cfg, shape = self.cfg, (-1, self.cfg.group_size)
        tilted = samples.log_target + samples.features @ self.tilt
        log_target = tilted.where(samples.valid, samples.log_proposal)
        prompt = torch.tensor(self._asked, device=self.runtime.device)
        if cfg.partition == "fixed":
            log_partition = torch.full_like(log_target, cfg.log_partition)
        else:
            running = cfg.partition == "running"
            partition = self.partition
            if not running:
                partition = Partition(len(partition.count), self.runtime.device)
            partition.update(
                self.runtime.joined(prompt).tolist(),
                self.runtime.joined((log_target - samples.log_proposal).view(shape)),
                self.runtime.joined(samples.valid.view(shape)),
            )
            log_partition = partition.log_mean[prompt].repeat_interleave(cfg.group_size)
        return replaced(samples, log_target=log_target, log_partition=log_partition)

    # ---- the gradient

    def learning_rate(self, step: int) -> float:
        cfg = self.cfg
        left = max(0.0, 1 - step / cfg.decay_updates) if cfg.decay_updates else 1.0
        return cfg.learning_rate * left * min(1, (step + 1) / max(cfg.warmup_updates, 1))

    def log_probs(self, model: LanguageModel, part: Samples) -> Float[Tensor, "b"]:
        """Of whole completions, added up in float64."""
        logp = model.log_prob(part.tokens, part.token_mask, part.completion_mask)
        return logp.double().sum(-1)

    def pseudo_reward(self, logp: Float[Tensor, "b"], part: Samples) -> Float[Tensor, "b"]:
        """-f'(t); 0 where there was no possible completion yet, and so no p to move to."""
        log_ratio = log_density_ratio(logp, part.log_target, part.log_partition)
        return pseudo_reward(log_ratio, self.cfg.generator).masked_fill(~part.known, 0.0)

    def terms(
        self, logp: Float[Tensor, "b"], advantage: Float[Tensor, "b"], part: Samples
    ) -> Float[Tensor, "b"]:
        """Of each completion: -rho A log pi."""
        advantage = advantage.masked_fill(~part.known, 0.0)
        return matching_terms(logp, advantage, logp - part.log_proposal)

    @torch.no_grad()
    def remember(self, reward: Float[Tensor, "b"], samples: Samples) -> None:
        """For the baseline of later batches: that of a batch must not depend on it."""
        weight = (samples.valid & samples.known).double()
        for held, new in ((self.recent_reward, reward), (self.recent_weight, weight)):
            if len(held):
                held.copy_(torch.cat([held, self.runtime.joined(new)])[-len(held) :])

    @torch.no_grad()
    def renew_proposal(self, logp: Float[Tensor, "b"], samples: Samples) -> Tensor:
        """The model's weights become the proposal's if it is nearer to the target, and whether so.

        Judged on samples of the proposal, by the model of before this update.
        """
        policy = logp - samples.log_proposal
        target = samples.log_density - samples.log_proposal
        nearer = {
            "kl": target.exp() * policy,
            "total_variation": 0.5
            * ((1 - target.exp()).abs() - (policy.exp() - target.exp()).abs()),
        }
        gain = (samples.weight * nearer[self.cfg.proposal_metric]).sum()
        sum_over_processes([gain])
        for older, parameter in zip(self.proposal, self.model.trained, strict=True):
            theirs, own = own_part(older), own_part(parameter)
            theirs.copy_(torch.where(gain > 0, own, theirs))
        return (gain > 0).double()

    # ---- the report

    @torch.no_grad()
    def told(self, scored: Scored, samples: Samples, logp: Float[Tensor, "b"]) -> Metrics:
        """Estimates under the model that was updated, whoever drew the completions."""
        watched = {
            "reward": scored.reward,
            **{f"mean_{name}": x for name, x in scored.parts.items() if name != "reward"},
            "entropy": -logp,
            "kl_to_base": logp - samples.ref_logp,
        }
        values = torch.stack(
            [x.double().masked_fill(~samples.valid, 0.0) for x in watched.values()]
        )
        found = divergence_estimates(
            logp, samples.log_density, samples.log_proposal, 0.0, values.T, samples.weight
        )
        told = dict(zip(watched, found.moments.unbind(), strict=True))
        told["failed_rewards"] = (~samples.valid).double().mean() / self.runtime.world
        if self.collected.full:
            told |= found._asdict() | {
                "effective_share": self.effective_share(samples),
                "known_partition": samples.weight @ samples.known.double(),
                "log_partition": samples.weight
                @ samples.log_partition.masked_fill(~samples.known, 0.0),
            }
            del told["moments"]
            if self.cfg.hard:  # Infinite, unless no impossible completion was drawn.
                del told["kl_policy_target"]
        sum_over_processes(list(told.values()))
        if self.collected.full:  # A mean over the prompts where it is known.
            told["log_partition"] /= told["known_partition"].clamp(min=1e-9)
        tilts = {name: value for (name, _), value in zip(self.cfg.moments, self.tilt, strict=True)}
        return told | {f"tilt_{name}": value.clone() for name, value in tilts.items()}

    def effective_share(self, samples: Samples) -> Float[Tensor, ""]:
        """Effective sample size of the weights P / q over their number: 1 where q is p."""
        log_weight = samples.log_target - samples.log_proposal
        log_weight = log_weight.masked_fill(~samples.valid, -INFINITY).view(-1, self.cfg.group_size)
        count = samples.valid.view(log_weight.shape).sum(-1)
        share = (2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)).exp() / count
        prompts = samples.weight.view(log_weight.shape).sum(-1)
        return (prompts * share.nan_to_num(0.0)).sum()


def replaced(samples: Samples, **fields: Tensor) -> Samples:
    return Samples(**{**samples.fields(), **fields})


# ---- recipes


def smoke() -> Experiment:
    """Ten updates of a tiny model: a reward and a moment, with an older copy as proposal."""
    return Experiment.of(
        Config(
            beta=1.0,
            moments=(("begins_with_a_digit", 0.5),),
            moment_samples=16,
            proposal="lagged",
            proposal_interval=2,
            baseline_window=24,
            batch_size=2,
            group_size=8,
            micro_batch_size=5,
            learning_rate=1e-3,
            warmup_updates=2,
            max_new_tokens=6,
        ),
        model=ModelConfig(
            source="esscher.models:tiny_llama", kwargs={"characters": "0123456789+-*/=() "}
        ),
        data="esscher.datasets:sums_asked",
        text=TextConfig(reward="esscher.rewards:digits"),
        steps=10,
        evaluation=EvaluationConfig(every=5, episodes=4, deterministic=False),
        checkpoint=CheckpointConfig(every=5),
    )


def paper() -> Experiment:
    """The paper's lexical constraint on GPT-2: every text says amazing, as it otherwise would be."""
    return _amazing("js")


def gdc() -> Experiment:
    """GDC, which for one constraint is DPG, on the same task: the forward KL."""
    return _amazing("forward_kl")


def kl_control() -> Experiment:
    """RL with a KL penalty on the same task: the reverse KL, to a target that rewards the word."""
    return _amazing("reverse_kl", pointwise=(), beta=0.1)


def _amazing(divergence: Any, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "beta": None,
        "pointwise": (("says_amazing", "indicator"),),
        "batch_size": 1,
        "group_size": 1_024,
        "micro_batch_size": 64,
        "warmup_updates": 100,
    }
    return Experiment.of(
        Config(divergence=divergence, **{**settings, **changes}),
        model="gpt2",
        data="esscher.datasets:empty_prompts",
        text=TextConfig(reward=f"{HERE}:_says_amazing"),
        steps=1_024,
        evaluation=EvaluationConfig(every=64, episodes=64, deterministic=False),
    )


HERE = "esscher.methods.language.f_dpg"


def _says_amazing(prompt: str, completion: str, row: Any) -> dict[str, float]:
    return {"says_amazing": float(re.search(r"\bamazing\b", completion) is not None)}


def proof() -> Proof:
    """The sheet's miniature: an identity, a trade-off with an exact answer, a pipeline without one."""
    return Proof(
        claims=(
            Claim(
                name="gradient identity",
                statement="On a softmax over seven outcomes the mean gradient of the loss is that of "
                "D_f itself, for all six divergences of the authors' code.",
                arms={"softmax": _softmax},
                measure=_identity_figures,
                judge=_judge_identity,
                num_seeds=5,
            ),
            Claim(
                name="trade-off",
                statement="A Gaussian on 41 numbers cannot cover the two intervals that are rewarded. "
                "From forward KL over total variation and JS to reverse KL, reward is bought with "
                "entropy; each divergence is lowest for the policy that descends it; and reward comes "
                "out as at the exact optimum, for total variation with Z known in advance.",
                arms={
                    "forward_kl": partial(_trade_off, "forward_kl"),
                    "total_variation": partial(_trade_off, "total_variation"),
                    "total_variation, Z known": partial(
                        _trade_off,
                        "total_variation",
                        partition="fixed",
                        log_partition=LINE_LOG_PARTITION,
                    ),
                    "js": partial(_trade_off, "js"),
                    "reverse_kl": partial(_trade_off, "reverse_kl"),
                },
                measure=_trade_off_figures,
                judge=_judge_trade_off,
                num_seeds=5,
            ),
            Claim(
                name="well specified",
                statement="Where the target can be had, every divergence leads to it: 64 sequences of "
                "three letters, a table of logits for each position.",
                arms={name: partial(_well_specified, name) for name in WELL_SPECIFIED},
                measure=_chain_figures,
                judge=_judge_well_specified,
                num_seeds=3,
            ),
        ),
        notes="",
    )


# ---- toy models, whose distribution is a formula


class Toy(nn.Module):
    """What `LanguageModel` asks of a causal model: states, and an output matrix that is not trained.

    Args:
        states: (tokens, positions) -> states "b t d".
        output: its rows are the tokens; the first three are special and are never drawn.
    """

    def __init__(self, states: nn.Module, output: Float[Tensor, "v d"], longest: int):
        super().__init__()
        self.states, self.output = states, Output(output)
        self.config = SimpleNamespace(max_position_embeddings=longest)
        self.generation_config = None

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"],
        position_ids: Int[Tensor, "b t"],
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        hidden = self.states(input_ids, position_ids)
        logits = hidden[:, -logits_to_keep:] @ self.output.weight.T + self.output.bias
        return SimpleNamespace(
            last_hidden_state=hidden, logits=logits, past_key_values=NothingToRemember()
        )

    @property
    def base_model(self) -> "Toy":
        return self

    def get_input_embeddings(self) -> "Output":
        return self.output

    def get_output_embeddings(self) -> "Output":
        return self.output

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / "model.safetensors")


class Output(nn.Linear):
    """An output matrix that no optimiser moves, and that never says a special token."""

    def __init__(self, weight: Float[Tensor, "v d"]):
        weight = nn.functional.pad(weight, (0, 0, 3, 0))
        super().__init__(weight.shape[1], len(weight))
        del self.weight, self.bias
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.where(torch.arange(len(weight)) < 3, -1e4, 0.0))


class NothingToRemember:
    """The cache of a model that looks back at one token."""

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...


class Line(nn.Module):
    """One token x in {0, ..., 40}: log pi = -(x - mean)^2 / (2 std^2) + const, around a centre."""

    def __init__(self, mean: float, log_std: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(log_std))

    def forward(self, tokens: Tensor, positions: Tensor) -> Float[Tensor, "b t 2"]:
        precision = (-2 * self.log_std).exp()
        natural = torch.stack([self.mean * precision, -0.5 * precision])
        return natural.expand(*tokens.shape, 2)


class Table(nn.Module):
    """Logits of the next token from the position and the token there."""

    def __init__(self, logits: Float[Tensor, "t v d"]):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor, positions: Tensor) -> Float[Tensor, "b t d"]:
        return self.logits[positions.clamp(max=len(self.logits) - 1), tokens]


# ---- the gradient identity


def _softmax(seed: int) -> Experiment:
    cfg = Config(batch_size=1, group_size=4, max_new_tokens=1)
    return _toy(cfg, "_random_softmax", "_letter", 1)


def _random_softmax() -> tuple[Any, Any]:
    return Toy(Table(torch.randn(1, 10, 7)), torch.eye(7), 2), character_tokenizer("abcdefg")


def _letter(prompt: str, completion: str, row: Any) -> float:
    return float("abcdefg".index(completion))


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda pi, p: (p * (p / pi).log()).sum(),
    "reverse_kl": lambda pi, p: (pi * (pi / p).log()).sum(),
    "total_variation": lambda pi, p: (pi - p).abs().sum() / 2,
    "js": lambda pi, p: (pi * (2 * pi / (pi + p)).log() + p * (2 * p / (pi + p)).log()).sum(),
    "neyman_chi2": lambda pi, p: ((pi - p) ** 2 / pi).sum(),
    "pearson_chi2": lambda pi, p: ((pi - p) ** 2 / p).sum(),
}
"""As the paper writes them; js is twice the half-weighted Jensen-Shannon divergence."""


def _identity_figures(run: FinishedRun) -> dict[str, float]:
    """Largest error of the loss's mean gradient, over all outcomes, against autograd of D_f."""
    method: FDPG = run.learner
    for model in (method.model, method._reference):
        model.model.double()
    table = method.model.trained[0]
    draw = torch.Generator().manual_seed(run.experiment.seed)
    log_target = torch.randn(7, generator=draw, dtype=torch.float64)
    errors = {}
    for name, exact in EXACT.items():
        twin = FDPG(replace(method.cfg, divergence=name), method.spec, method.runtime)
        samples = _all_samples(twin, "abcdefg", 1)
        samples = replaced(
            samples, log_target=log_target, log_partition=log_target.logsumexp(0).expand(7)
        )
        logp = twin.log_probs(twin.model, samples)
        pi, p = logp.exp(), log_target.softmax(0)
        # A baseline must not change anything.
        advantage = twin.pseudo_reward(logp, samples) - 0.7
        loss = (pi.detach() * twin.terms(logp, advantage, samples)).sum()
        ours, theirs = (
            torch.autograd.grad(value, table, retain_graph=True)[0]
            for value in (loss, exact(pi, p))
        )
        errors[name] = float((ours - theirs).abs().max())
    return errors


def _judge_identity(figures: Figures) -> list[Check]:
    return [
        Check(f"error, {name}, seed {seed}", error, "< 1e-12", error < 1e-12)
        for name, errors in figures["softmax"].items()
        for seed, error in enumerate(errors)
    ]


# ---- the trade-off


def _trade_off(divergence: Any, seed: int, **changes: Any) -> Experiment:
    cfg = Config(
        divergence=divergence,
        beta=0.25,
        batch_size=1,
        group_size=512,
        learning_rate=0.02,
        warmup_updates=0,
        decay_updates=2_000,
        max_new_tokens=1,
        **changes,
    )
    return _toy(cfg, "_line", "_wanted", 2_000)


def _line() -> tuple[Any, Any]:
    x = torch.arange(41.0) - 20
    model = Toy(Line(0.0, math.log(8)), torch.stack([x, x**2], 1), longest=2)
    return model, character_tokenizer(NUMBERS)


NUMBERS, LINE_LOG_PARTITION = string.ascii_letters[:41], math.log(16.318)


def _wanted(prompt: str, completion: str, row: Any) -> float:
    """1 on two intervals of the line, which one Gaussian cannot cover together."""
    x = NUMBERS.index(completion)
    return float(22 <= x <= 27 or 3 <= x <= 6)


def _trade_off_figures(run: FinishedRun) -> dict[str, float]:
    method: FDPG = run.learner
    figures = _exact_figures(method, NUMBERS, 1, _wanted)
    line = method.model.model.states
    spread = {"mean": 20 + line.mean.item(), "std": line.log_std.exp().item()}
    return spread | figures


def _judge_trade_off(figures: Figures) -> list[Check]:
    order = ("forward_kl", "total_variation", "js", "reverse_kl")
    exact = {
        "forward_kl": 0.340,
        "js": 0.920,
        "reverse_kl": 0.948,
        "total_variation, Z known": 0.824,
    }
    checks = []
    for name, sign in (("reward", 1), ("entropy", -1)):
        for less, more in pairwise(order if sign > 0 else order[::-1]):
            pairs = zip(figures[less][name], figures[more][name], strict=True)
            checks += [
                Check(f"{name}, {more} minus {less}, seed {k}", b - a, "> 0", b > a)
                for k, (a, b) in enumerate(pairs)
            ]
    for arm, optimum in exact.items():
        checks += [
            within(f"reward, {arm}, seed {k}", x, optimum - 0.03, optimum + 0.03)
            for k, x in enumerate(figures[arm]["reward"])
        ]
    arms = [arm for arm in figures if arm != "total_variation"]
    for arm in arms:
        own = figures[arm][arm.partition(",")[0]]
        for k, value in enumerate(own):
            best = min(figures[other][arm.partition(",")[0]][k] for other in arms if other != arm)
            gap = best - value
            name = f"{arm.partition(',')[0]} of the best other policy minus own, seed {k}"
            checks.append(Check(name, gap, "> 0", gap > 0))
    return checks


# ---- a target that can be had


WELL_SPECIFIED = tuple(EXACT)


def _well_specified(divergence: Any, seed: int) -> Experiment:
    cfg = Config(
        divergence=divergence,
        beta=1.0,
        batch_size=1,
        group_size=128,
        learning_rate=0.01,
        warmup_updates=0,
        decay_updates=2_000,
        max_new_tokens=3,
    )
    return _toy(cfg, "_chain", "_last_minus_first_letter", 2_000)


def _chain() -> tuple[Any, Any]:
    """64 sequences of three of four letters; a table for each position, so all of them can be had."""
    rows = [[1, 0.2, -0.3, 0.5], [0, 1.2, 0.4, -0.6], [0.3, -0.4, 0.8, 0.1], [-0.2, 0.6, 0.2, 0.9]]
    logits = torch.zeros(3, 7, 4)
    logits[0] = torch.tensor([0.2, 0.0, 0.4, -0.1])
    logits[1:, 3:] = torch.tensor(rows)
    return Toy(Table(logits), torch.eye(4), longest=4), character_tokenizer("abcd")


def _last_minus_first_letter(prompt: str, completion: str, row: Any) -> float:
    return float(completion.count("d") - completion.count("a"))


def _chain_figures(run: FinishedRun) -> dict[str, float]:
    return _exact_figures(run.learner, "abcd", 3, _last_minus_first_letter)


def _judge_well_specified(figures: Figures) -> list[Check]:
    return [
        Check(f"total variation, {arm}, seed {k}", x, "< 0.03", x < 0.03)
        for arm, measured in figures.items()
        for k, x in enumerate(measured["total_variation"])
    ]


# ---- what they share


def _toy(cfg: Config, model: str, reward: str, steps: int) -> Experiment:
    return Experiment.of(
        cfg,
        model=f"{HERE}:{model}",
        data="esscher.datasets:empty_prompts",
        text=TextConfig(reward=f"{HERE}:{reward}"),
        steps=steps,
        evaluation=EvaluationConfig(every=0, episodes=1, deterministic=False),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _all_samples(method: FDPG, letters: str, length: int) -> Samples:
    """Every sequence once, drawn by the model itself."""
    ids = method.spec.tokenizer.convert_tokens_to_ids(list(letters))
    tokens = torch.cartesian_prod(*[torch.tensor(ids)] * length).view(-1, length)
    begin = torch.full((len(tokens), 1), method.spec.tokenizer.bos_token_id)
    mask = torch.ones(len(tokens), 1 + length, dtype=torch.bool)
    nothing = torch.zeros(len(tokens), dtype=torch.float64)
    samples = Samples(
        tokens=torch.cat([begin, tokens], 1),
        token_mask=mask,
        completion_mask=mask & (torch.arange(1 + length) > 0),
        valid=mask.all(1),
        weight=nothing,
        features=nothing.new_zeros(len(tokens), 0),
        log_proposal=nothing,
        ref_logp=nothing,
        log_target=nothing,
        log_partition=nothing,
    )
    with torch.no_grad():
        logp, ref_logp = (method.log_probs(m, samples) for m in (method.model, method._reference))
    return replaced(samples, log_proposal=logp, ref_logp=ref_logp)


def _exact_figures(
    method: FDPG, letters: str, length: int, reward: Callable[[str, str, Any], float]
) -> dict[str, float]:
    """Of the trained model, by enumeration, with all divergences from p as in EXACT."""
    samples = _all_samples(method, letters, length)
    texts = map("".join, product(letters, repeat=length))
    rewards = torch.tensor([reward("", text, None) for text in texts], dtype=torch.float64)
    assert method.cfg.beta is not None
    log_target = samples.ref_logp + rewards / method.cfg.beta
    logp, p = samples.log_proposal, log_target.softmax(0)
    found = {name: float(exact(logp.exp(), p)) for name, exact in EXACT.items()}
    return found | {
        "reward": float(logp.exp() @ rewards),
        "entropy": -float(logp.exp() @ logp),
        "log Z": float(log_target.logsumexp(0)),
        "log Z, estimated": float(method.partition.log_mean[0]),
    }

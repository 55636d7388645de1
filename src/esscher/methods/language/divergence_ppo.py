"""PPO on a language model's tokens, held near its reference by a divergence of choice.

The baseline of f-DPO: the same problem, max E[r] - coefficient D_f(pi || pi_ref), by rewards and
rollouts in place of pairs. Each token is an action; the completion's reward comes with its last token,
and a critic of its own gives every token a value. With k = pi_ref / pi of a token and g the generator
of D_f written in k, a token pays

    penalty = g(k) - g'(1) (k - 1)      never negative, and D_f on average

- either inside the reward, r_t - coefficient penalty_t, so that values must learn it too;
- or as a term of the loss, coefficient mean_t penalty_t, which acts on its token alone.

| variable | paper | shape | unit |
|---|---|---|---|
| logp, old_logp, ref_logp | log pi_theta, log pi_old, log pi_ref of each token | b t | nats |
| reward | of each token: all of it with the last one | b t | reward |
| value | V of what stands before a token | b t | reward |
| advantage | generalised advantage estimate, whitened | b t | |
| coefficient | weight of the penalty | scalar | reward |

A completion whose reward failed is in no loss. One that is cut at max_new_tokens counts as ended.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.critics.text import TokenValue, body_of, twin_of
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import require
from esscher.experience.text import Batches, Text, collate_prompts
from esscher.experience.turns import packed
from esscher.experiment import CheckpointConfig, EvaluationConfig, Experiment, TextConfig
from esscher.functional.divergences import FDivergence, by_name
from esscher.functional.preferences import penalty_terms
from esscher.functional.reductions import masked_mean, masked_sum, masked_whiten
from esscher.functional.returns import gae
from esscher.functional.surrogates import clip_fraction, clipped_ratio_terms
from esscher.method import Method, Paper
from esscher.runtime.device import Runtime, sum_over_processes
from esscher.runtime.optim import Optim
from esscher.samplers.decoding import Decoding
from esscher.types import Completions, Metrics, Prompts, Record, Scored, record

PAPER = Paper(
    title="Fine-Tuning Language Models from Human Preferences",
    year=2019,
    arxiv="1909.08593",
    purpose="A language model from a reward, by PPO on tokens, near its reference by any divergence.",
    claim="",
    sections="2; divergences as in the authors' code of f-DPO (arXiv 2309.16240)",
    baseline=True,
)

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
GENERATORS = {"reverse_kl": "kl", "forward_kl": "reverse_kl", "js": "js"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PPO on tokens; defaults from the code of f-DPO for IMDB."""

    divergence: Divergence = "reverse_kl"
    """What holds the policy near its reference."""
    alpha: float = 0.5
    """Of the alpha-divergence, in (0, 1), in f-DPO's convention."""
    coefficient: float = 0.1
    """Weight of the penalty, >= 0 (the authors: 0.03 to 0.3)."""
    placement: Literal["reward", "loss"] = "reward"
    """Where a token pays; inside the reward, forward_kl and js make values hard to learn."""
    batch_size: int = 128
    """Completions an iteration, one a prompt, over all processes, >= 1."""
    epochs: int = 4
    """Passes over them, >= 1."""
    num_minibatches: int = 4
    """Steps a pass, of equally many completions, >= 1."""
    micro_batch_size: int = 0
    """Completions whose activations are held at once, >= 0; 0: all. Does not change the objective."""
    discount: float = 1.0
    """Weight of a reward one token later, in [0, 1]."""
    gae_lambda: float = 0.95
    """Trace decay of the advantage, in [0, 1]."""
    clip: float = 0.2
    """A ratio outside 1 +- clip stops paying, in (0, 1)."""
    learning_rate: float = 1e-5
    """AdamW step of the policy, > 0."""
    value_learning_rate: float = 1e-5
    """AdamW step of the critic, > 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this length, > 0."""
    max_new_tokens: int = 60
    """Longest completion, tokens, >= 1."""

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 < self.alpha < 1, "in (0, 1)")
        require("clip", self.clip, 0 < self.clip < 1, "in (0, 1)")
        for name in ("discount", "gae_lambda"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("learning_rate", "value_learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("coefficient", "micro_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("batch_size", "epochs", "num_minibatches", "max_new_tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        count, size = self.num_minibatches, self.batch_size
        require("num_minibatches", count, size % count == 0, f"a divisor of batch_size {size}")

    @property
    def generator(self) -> FDivergence:
        """Of the divergence, by this library's name."""
        return by_name(GENERATORS.get(self.divergence, f"alpha({self.alpha})"))


@record
class Rollouts(Record):
    """Completions as the losses see them, padded on the right."""

    tokens: Int[Tensor, "b t"]
    token_mask: Bool[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    """Tokens that are learned from."""
    old_logp: Float[Tensor, "b t"]
    ref_logp: Float[Tensor, "b t"]
    advantage: Float[Tensor, "b t"]
    returns: Float[Tensor, "b t"]


class DivergencePPO(Method):
    """See the module; `update` is one iteration on the completions of a batch of prompts."""

    Config = Config
    world = "language"
    loop = "generate"
    rows = "prompts"
    data = "optional"
    headline = "reward"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        own, count = runtime.share(cfg.batch_size), cfg.num_minibatches
        require("num_minibatches", count, own % count == 0, f"a divisor of a process's {own} rows")
        self.model = spec.model
        self._reference = spec.model.frozen()
        self.critic = TokenValue(twin_of(body_of(self.model.model)))
        runtime.prepare(self.model, self._reference, self.critic)
        norm = cfg.max_grad_norm
        self.opt = Optim(self.model.trained, cfg.learning_rate, max_grad_norm=norm)
        self.critic_opt = Optim(self.critic.trained, cfg.value_learning_rate, max_grad_norm=norm)
        self._log_probs = runtime.autocast(self.log_probs)
        self._values = runtime.autocast(self.values)

    @property
    def policy(self) -> nn.Module:
        return self.model

    @property
    def decoding(self) -> Decoding:
        return Decoding(max_new_tokens=self.cfg.max_new_tokens)

    def experience(self, text: Text[list[int]]) -> Batches[Prompts]:
        return Batches(text, collate_prompts, self.cfg.batch_size)

    def propose(self, prompts: Prompts, step: int) -> Completions:
        prompts, runtime = prompts.to(self.runtime.device), self.runtime
        seeds = torch.randint(2**62, (runtime.world, len(prompts)))[runtime.rank].tolist()
        return self.model.generate(prompts.tokens, prompts.mask, seeds, self.decoding)

    def update(self, batch: Scored, step: int) -> Metrics:
        cfg, scored = self.cfg, batch.to(self.runtime.device)
        rollouts = self.rollouts(scored)
        reports: list[Metrics] = []
        for _ in range(cfg.epochs):
            order = torch.randperm(len(rollouts), device=rollouts.tokens.device)
            minibatches = order.view(cfg.num_minibatches, -1)
            reports += [self.descend(rollouts.index(index)) for index in minibatches]
        told = {name: torch.stack([r[name] for r in reports]).mean() for name in reports[0]}
        terms = penalty_terms(rollouts.old_logp - rollouts.ref_logp, cfg.generator)
        divergence, count = masked_sum(terms, rollouts.mask), rollouts.mask.sum()
        sum_over_processes([*told.values(), divergence, count])
        reward, valid, length = (
            self.runtime.joined(x) for x in (scored.reward, scored.valid, rollouts.mask.sum(1))
        )
        return told | {
            "reward": masked_mean(reward, valid),
            "divergence": divergence / count.clamp(min=1),
            "completion_length": length.double().mean(),
            "failed_rewards": (~valid).double().mean(),
        }

    @torch.no_grad()
    def rollouts(self, scored: Scored) -> Rollouts:
        """Advantages and returns of every token that was written."""
        cfg, completions = self.cfg, scored.completions
        tokens, token_mask = packed(completions.tokens, completions.token_mask)
        begin = completions.prompt_mask.sum(1, keepdim=True)
        written = token_mask & (torch.arange(tokens.shape[1], device=tokens.device) >= begin)
        nothing = torch.zeros(tokens.shape, device=tokens.device)
        parts = Rollouts(
            tokens=tokens,
            token_mask=token_mask,
            mask=written & scored.valid.unsqueeze(1),
            **dict.fromkeys(("old_logp", "ref_logp", "advantage", "returns"), nothing),
        ).split(cfg.micro_batch_size)
        old_logp = torch.cat([self._log_probs(self.model, part) for part in parts])
        ref_logp = torch.cat([self._log_probs(self._reference, part) for part in parts])
        value = torch.cat([self._values(part) for part in parts])
        mask = torch.cat([part.mask for part in parts])
        reward, last = self.token_rewards(scored.reward, old_logp - ref_logp, mask)
        advantage = gae(
            reward.T,
            value.T,
            value.roll(-1, 1).T,
            last.T,
            torch.zeros_like(last).T,
            cfg.discount,
            cfg.gae_lambda,
        ).T
        return Rollouts(
            tokens=tokens,
            token_mask=token_mask,
            mask=mask,
            old_logp=old_logp,
            ref_logp=ref_logp,
            advantage=self.whitened(advantage, mask),
            returns=advantage + value,
        )

    def whitened(
        self, advantage: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b t"]:
        """With mean 0 and standard deviation 1 over the tokens of all processes."""
        runtime, (rows, width) = self.runtime, advantage.shape
        widest = int(runtime.joined(torch.tensor([width], device=advantage.device)).max())
        values, known = (
            runtime.joined(nn.functional.pad(x, (0, widest - width))) for x in (advantage, mask)
        )
        own = slice(runtime.rank * rows, (runtime.rank + 1) * rows)
        return masked_whiten(values, known)[own, :width]

    def token_rewards(
        self, reward: Float[Tensor, "b"], log_ratio: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Of each token, less its penalty if that is where it is paid; and which is the last one."""
        place = torch.arange(mask.shape[1], device=mask.device)
        last = mask & (place == (mask * place).argmax(1, keepdim=True))
        found = last * reward.unsqueeze(1)
        if self.cfg.placement == "reward":
            found = found - self.cfg.coefficient * penalty_terms(log_ratio, self.cfg.generator)
        return found.masked_fill(~mask, 0.0), last

    def descend(self, minibatch: Rollouts) -> Metrics:
        """One step of the policy and one of the critic."""
        cfg, count = self.cfg, minibatch.mask.sum()
        sum_over_processes([count])
        count = count.clamp(min=1)
        parts, found, losses = minibatch.split(cfg.micro_batch_size), [], []

        def policy_loss(part: Rollouts) -> Float[Tensor, ""]:
            logp = self._log_probs(self.model, part)
            log_ratio, advantage = logp - part.old_logp, part.advantage
            terms = clipped_ratio_terms(log_ratio, advantage, cfg.clip, cfg.clip)
            if cfg.placement == "loss":
                penalty = penalty_terms(logp - part.ref_logp, cfg.generator)
                terms = terms + cfg.coefficient * penalty
            clipped = clip_fraction(
                log_ratio.detach(), advantage, part.mask, cfg.clip, cfg.clip, denominator=count
            )
            value = masked_sum(terms, part.mask) / count
            found.append(torch.stack([value.detach(), clipped]))
            return value

        def value_loss(part: Rollouts) -> Float[Tensor, ""]:
            error = (self._values(part) - part.returns).square()
            losses.append(0.5 * masked_sum(error, part.mask) / count)
            return losses[-1]

        self.opt.minimize_sum(policy_loss, parts)
        self.critic_opt.minimize_sum(value_loss, parts)
        loss, clipped = torch.stack(found).sum(0)
        value_error = torch.stack(losses).detach().sum()
        return {"policy_loss": loss, "clip_fraction": clipped, "value_loss": value_error}

    def log_probs(self, model: LanguageModel, part: Rollouts) -> Float[Tensor, "b t"]:
        return model.log_prob(part.tokens, part.token_mask, part.mask)

    def values(self, part: Rollouts) -> Float[Tensor, "b t"]:
        return self.critic(part.tokens, part.token_mask)


# ---- recipes


def smoke() -> Experiment:
    """Ten iterations of a tiny model."""
    return Experiment.of(
        Config(
            divergence="js",
            batch_size=4,
            epochs=2,
            num_minibatches=2,
            learning_rate=1e-3,
            value_learning_rate=1e-3,
            max_new_tokens=5,
        ),
        model="esscher.models:tiny_llama",
        data="esscher.datasets:sums_asked",
        text=TextConfig(reward="esscher.rewards:exact_answer"),
        steps=10,
        evaluation=EvaluationConfig(every=5, episodes=4),
        checkpoint=CheckpointConfig(every=5),
    )

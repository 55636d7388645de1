"""Direct preference optimisation under other divergences than the reverse KL (f-DPO).

A language model learns from pairs of answers which one people prefer, without a reward model. What
keeps it near its reference is an f-divergence of choice:

    max_pi E_pi[r(x, y)] - beta D_f(pi || pi_ref),   D_f(pi || pi_ref) = E_ref[f(pi / pi_ref)]

At the optimum r(x, y) = beta f'(u) + const(x), if f' can be inverted and has no value at u = 0; the
constant cancels in a comparison of two answers, which leaves

    L = -E log sigma(beta f'(u_chosen) - beta f'(u_rejected))

Compared with DPO:
- f' in place of the logarithm; DPO is the case reverse_kl;
- forward_kl and alpha punish answers that the reference gives and the policy does not any more, so
  more diversity is kept; js lies between, and its margin is bounded;
- beta does not compare across divergences: see the margins in the evaluations.

| variable | paper | shape | unit |
|---|---|---|---|
| log_ratio | log u = log pi(y given x) / pi_ref(y given x), summed over tokens | b | nats |
| score | f'(u) up to a constant | b | |
| beta | beta | scalar | reward |
| alpha | alpha: 0 is reverse_kl, 1 forward_kl; 1 - alpha in TRL from 0.29 on | scalar | |

Names of divergences are the paper's; reverse_kl is the generator kl of functional/divergences.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.autoregressive import TextSpec
from esscher.errors import require
from esscher.experience.text import Batches, Text, collate_pairs
from esscher.experiment import CheckpointConfig, EvaluationConfig, Experiment, TextConfig
from esscher.functional.divergences import FDivergence, by_name
from esscher.functional.preferences import implicit_score, preference_terms
from esscher.method import Method, Paper
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim
from esscher.types import Metrics, Pairs, Tokens

PAPER = Paper(
    title="Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
    "Constraints",
    year=2023,
    arxiv="2309.16240",
    purpose="A language model from pairs of answers, with a choice of what is kept of the reference.",
    claim="With f' in place of the logarithm, DPO's loss has the optimum of the problem under any "
    "f-divergence whose f' can be inverted and has no value at 0; each divergence is best by its own "
    "measure.",
    sections="4, theorem 1, table 1",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of f-DPO; where the paper's vary from task to task, TRL's."""

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """What holds the policy near its reference; reverse_kl is DPO."""
    alpha: float = 0.5
    """Of the alpha-divergence, in (0, 1); the paper tries 0.1 to 0.9."""
    beta: float = 0.1
    """Weight of the divergence, > 0. The paper: 0.1 (reverse_kl, js), 0.01 (alpha), 1e-5
    (forward_kl) on IMDB; 0.1 to 0.3 and 0.03 (forward_kl) on Anthropic HH."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round, in [0, 0.5) (conservative DPO)."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop, the authors': no momentum, squares decayed by 0.99 (here with their bias corrected)."""
    learning_rate: float = 1e-6
    """Step size, > 0 (TRL; the authors: 5e-7)."""
    warmup_updates: int = 150
    """Updates over which the step grows to its size, in a straight line, >= 0."""
    max_grad_norm: float = 10.0
    """The gradient is scaled down to this length, > 0."""
    batch_size: int = 64
    """Pairs an update, over all processes, >= 1."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at once, >= 0; 0: all. Does not change the objective."""

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 < self.alpha < 1, "in (0, 1)")
        require(
            "label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)"
        )
        for name in ("beta", "learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("warmup_updates", "micro_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")

    @property
    def generator(self) -> FDivergence:
        """Of the divergence, by this library's name."""
        names = {
            "reverse_kl": "kl",
            "forward_kl": "reverse_kl",
            "js": "js",
            "alpha": f"alpha({self.alpha})",
        }
        return by_name(names[self.divergence])


class FDPO(Method):
    """Direct preference optimisation under an f-divergence."""

    Config = Config
    world = "language"
    loop = "offline"
    data = "optional"
    rows = "pairs"
    headline = "accuracy"

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        self.model = spec.model
        self._reference = spec.model.frozen()
        self.opt = Optim(
            self.model.trained,
            cfg.learning_rate,
            betas=(0.9, 0.999) if cfg.optimizer == "adamw" else (0.0, 0.99),
            max_grad_norm=cfg.max_grad_norm,
        )
        self._log_ratios = runtime.autocast(self._both_log_ratios)

    @property
    def policy(self) -> nn.Module:
        return self.model

    def experience(self, text: Text[tuple[Tokens, Tokens]]) -> Batches[Pairs]:
        return Batches(text, collate_pairs, self.cfg.batch_size)

    def update(self, batch: Pairs, step: int) -> Metrics:
        cfg, batch = self.cfg, batch.to(self.runtime.device)
        found: list[Tensor] = []

        def loss(part: Pairs) -> Float[Tensor, ""]:
            log_ratio = self._log_ratios(part)
            label = 1 - cfg.label_smoothing
            chosen, rejected = log_ratio.unbind(1)
            terms = preference_terms(chosen, rejected, cfg.generator, cfg.beta, label)
            found.append(torch.cat([terms.unsqueeze(1), log_ratio], 1).detach())
            return terms.sum() / cfg.batch_size

        self.opt.learning_rate = cfg.learning_rate * min(1, (step + 1) / max(cfg.warmup_updates, 1))
        self.opt.minimize_sum(loss, batch.split(cfg.micro_batch_size))
        terms, *log_ratio = torch.cat(found).unbind(1)
        told = self._told(torch.stack(log_ratio, 1))
        return {"loss": terms.mean(), **{name: value.mean() for name, value in told.items()}}

    def judge(self, batch: Pairs) -> Metrics:
        """Of each pair: whether the implied reward prefers the chosen answer, and what it says."""
        told = self._told(self._log_ratios(batch))
        return {"preference_accuracy": told.pop("accuracy"), **told}

    def _told(self, log_ratio: Float[Tensor, "b 2"]) -> dict[str, Tensor]:
        """TRL's rewards are beta times the log-ratios, whatever the divergence."""
        chosen, rejected = implicit_score(log_ratio, self.cfg.generator).unbind(1)
        return {
            "accuracy": (chosen > rejected) + 0.5 * (chosen == rejected),
            "margin": self.cfg.beta * (chosen - rejected),
            "chosen_log_ratio": log_ratio[:, 0],
            "rejected_log_ratio": log_ratio[:, 1],
        }

    def _both_log_ratios(self, batch: Pairs) -> Float[Tensor, "b 2"]:
        """One pass over chosen and rejected together."""
        tokens, token_mask = batch.tokens.flatten(0, 1), batch.token_mask.flatten(0, 1)
        completion_mask = batch.completion_mask.flatten(0, 1)
        logp, ref_logp = (
            model.log_prob(tokens, token_mask, completion_mask).sum(-1)
            for model in (self.model, self._reference)
        )
        return (logp - ref_logp).view(-1, 2)


# ---- recipes


def smoke() -> Experiment:
    """Ten updates of a tiny model."""
    return Experiment.of(
        Config(divergence="js", batch_size=4, learning_rate=1e-3, warmup_updates=2),
        model="esscher.models:tiny_llama",
        data="esscher.datasets:sums_compared",
        steps=10,
        evaluation=EvaluationConfig(every=5, episodes=4),
        checkpoint=CheckpointConfig(every=5),
    )


def paper() -> Experiment:
    """The authors' settings for Anthropic HH with Pythia-2.8B; give the model and the pairs."""
    cfg = Config(
        divergence="js",
        beta=0.1,
        optimizer="rmsprop",
        learning_rate=5e-7,
        warmup_updates=150,
        batch_size=64,
        micro_batch_size=8,
    )
    return Experiment.of(cfg, steps=2_500, text=TextConfig(max_length=512, too_long="drop"))

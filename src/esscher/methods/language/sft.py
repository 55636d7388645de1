"""Supervised fine-tuning: imitate the completions of a data set, token by token.

The baseline of every method that begins where it ends, and the way to a small model of one's own:

    L = -(1 / N) sum_bt mask_bt log pi(y_bt | x_b, y_b,<t),   N tokens of completions in the batch

| variable | meaning | shape | unit |
|---|---|---|---|
| logp | log pi(y_t given all before it) | b t | nats |
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.autoregressive import TextSpec
from esscher.errors import require
from esscher.experience.text import Batches, Text, collate_demonstrations
from esscher.experiment import CheckpointConfig, EvaluationConfig, Experiment, ModelConfig
from esscher.functional.reductions import masked_sum
from esscher.functional.sequences import sequence_log_prob
from esscher.method import Method, Paper
from esscher.runtime.device import Runtime, sum_over_processes
from esscher.runtime.optim import Optim
from esscher.types import Demonstrations, Metrics, Tokens

PAPER = Paper(
    title="Training Language Models to Follow Instructions with Human Feedback",
    year=2022,
    arxiv="2203.02155",
    purpose="A language model that imitates given completions: where preference methods begin.",
    claim="",
    sections="3.5, supervised fine-tuning",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of supervised fine-tuning."""

    learning_rate: float = 1e-4
    """AdamW step, > 0; for whole models of billions of weights about 1e-5."""
    warmup_updates: int = 0
    """Updates over which the step grows to its size, in a straight line, >= 0."""
    weight_decay: float = 0.0
    """Decoupled, per unit learning rate, >= 0."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length, > 0."""
    batch_size: int = 32
    """Rows an update, over all processes, >= 1."""
    micro_batch_size: int = 0
    """Rows whose activations are held at once, >= 0; 0: all. Does not change the objective."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("warmup_updates", "weight_decay", "micro_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")


class SFT(Method):
    """Supervised fine-tuning."""

    Config = Config
    world = "language"
    loop = "offline"
    data = "optional"
    rows = "demonstrations"
    headline = "loss"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        self.model = spec.model
        if runtime.sharding is not None:  # All processes must ask the model equally often.
            runtime.share(cfg.batch_size)
        runtime.prepare(self.model)
        self.opt = Optim(
            self.model.trained,
            cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
        )
        self._terms = runtime.autocast(self._log_probs)

    @property
    def policy(self) -> nn.Module:
        return self.model

    def experience(self, text: Text[Tokens]) -> Batches[Demonstrations]:
        return Batches(text, collate_demonstrations, self.cfg.batch_size)

    def update(self, batch: Demonstrations, step: int) -> Metrics:
        cfg, batch = self.cfg, batch.to(self.runtime.device)
        own = batch.completion_mask.sum()
        sum_over_processes([count := own.clone()])
        losses: list[Tensor] = []

        def loss(part: Demonstrations) -> Float[Tensor, ""]:
            losses.append(-masked_sum(self._terms(part), part.completion_mask) / count)
            return losses[-1]

        self.opt.learning_rate = cfg.learning_rate * min(1, (step + 1) / max(cfg.warmup_updates, 1))
        self.opt.minimize_sum(loss, batch.split(cfg.micro_batch_size))
        return {"loss": torch.stack(losses).detach().sum() * count / own}

    def judge(self, batch: Demonstrations) -> Metrics:
        """Mean log-probability of a token, nats, of each row."""
        found = sequence_log_prob(self._terms(batch), batch.completion_mask)
        return {"log_likelihood_per_token": found.mean}

    def _log_probs(self, batch: Demonstrations) -> Float[Tensor, "b t"]:
        return self.model.log_prob(batch.tokens, batch.token_mask, batch.completion_mask)


# ---- recipes


def smoke() -> Experiment:
    """Ten updates of a tiny model."""
    return replace(
        Experiment.of(
            Config(batch_size=4, learning_rate=1e-3),
            model="esscher.models:tiny_llama",
            data="esscher.datasets:sums_demonstrated",
            steps=10,
        ),
        evaluation=EvaluationConfig(every=5, episodes=4),
        checkpoint=CheckpointConfig(every=5),
    )


def sums() -> Experiment:
    """A small model that adds numbers of two digits, from nothing, in about two minutes."""
    model = ModelConfig(
        source="esscher.models:tiny_llama", kwargs={"layers": 4, "width": 128, "context": 64}
    )
    return Experiment.of(
        Config(batch_size=64, learning_rate=1e-3, warmup_updates=50),
        model=model,
        data="esscher.datasets:sums_demonstrated",
        steps=1_500,
    )

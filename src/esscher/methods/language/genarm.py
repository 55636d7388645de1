"""Reward-guided generation with an autoregressive reward model (GenARM).

A language model that cannot be trained, too large say, is to write what people prefer. A small model
learns from pairs of answers, and the reward that it learns is its own log-probability:

    r(x, y) = log pi_r(y given x) = sum_t log pi_r(y_t given x, y_<t)
    L = -E log sigma(beta [r(x, y_chosen) - r(x, y_rejected)] - gamma)

So the reward has a value at every token, and guides the other model while it writes:

    log pi(y_t given x, y_<t) = log pi_base + weight log pi_r + sum_k weight_k log pi_k - log Z(x, y_<t)

Compared with DPO:
- no reference in the loss, and a sum over tokens that no length divides;
- the base model never changes. It can be larger than the reward model (weak to strong), and several
  reward models can be mixed by weights that are chosen when text is written.

Compared with rewards of whole answers (`reward="trajectory"`, a number read off the last token, which
guides as in ARGS or chooses the best of several answers):
- unfinished text gets the reward that was trained for it, for one pass a token.

The product is normalised token by token, the optimum pi_base exp(r / beta) over whole answers: they
differ, unless Z is the same everywhere. `beta` belongs to training: in decoding `weight` stands for
1 / beta of the objective E[r] - beta KL(pi, pi_base), and no other factor enters.

| variable | paper | shape | unit |
|---|---|---|---|
| reward | r(x, y): log pi_r(y given x), or the number off the last token | b 2 | nats, or none |
| beta | beta_r: a pair's log-odds per unit of reward | scalar | |
| target_margin | gamma (in the authors' code only) | scalar | log-odds |
| weight, other_weights | alpha = 1 / beta, alpha_k | scalar, k | |

`esscher.load(RUN).policy.complete` writes so; `GenARM.write` takes other weights. A finished model
guides any other that has its tokens: esscher.samplers.guided.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher import words
from esscher.adapters.models import frozen_model
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError, require
from esscher.experience.text import Batches, Text, collate_pairs
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    LogConfig,
    ModelConfig,
    TextConfig,
    whole_path,
)
from esscher.functional.preferences import bradley_terry_terms
from esscher.method import Method, Paper
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.registry import load_method
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.runtime.rng import mix
from esscher.runtime.sweep import run_folder
from esscher.samplers.decoding import Decoding
from esscher.samplers.generation import NextLogits
from esscher.samplers.guided import best_of, product, reranked, write
from esscher.types import Completions, Metrics, Pairs, Tokens

PAPER = Paper(
    title="GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment",
    year=2024,
    arxiv="2410.08193",
    purpose="Text that people prefer from a model that stays as it is, guided by a small one.",
    claim="A reward that is the log-probability of a language model guides a frozen model, token by "
    "token, to more reward at the same distance than rewards of whole answers do, as far as training "
    "it would; it guides larger models too, and several rewards can be mixed as text is written.",
    sections="autoregressive reward model, guided decoding, several rewards",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of GenARM; defaults are the authors' for Anthropic HH unless a line says otherwise."""

    reward: Literal["autoregressive", "trajectory"] = "autoregressive"
    """What is learnt: a language model, or a number read off the last token of a whole answer."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """hinge: max(0, 1 - margin), of the authors' code."""
    beta: float = 0.05
    """Log-odds of a preference per unit of reward, > 0. The authors: 0.05 (HH), 0.5 (helpful) and
    0.01 (harmless, SafeRLHF), 0.1 (UltraFeedback); 1 for a trajectory reward."""
    target_margin: float = 0.0
    """Log-odds by which the chosen answer is to win, >= 0; of the sigmoid loss only."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round, in [0, 0.5); of the sigmoid loss only."""
    learning_rate: float = 5e-4
    """AdamW step, > 0: for adapters (--model.lora-rank 8); for all weights of 7 billion 5e-7."""
    weight_decay: float = 0.05
    """Decoupled, per unit learning rate, >= 0."""
    warmup_updates: int = 100
    """Updates over which the step grows to its size, in a straight line, >= 0."""
    decay_updates: int = 0
    """Update at which the step has fallen to 0, along half a cosine after the warm-up: the length of
    the run (the authors); 0: it does not fall."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length, > 0 (transformers' default)."""
    batch_size: int = 32
    """Pairs an update, over all processes, >= 1."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at once, >= 0; 0: all. Does not change the objective."""
    base: str | None = None
    """The model that writes: a folder, a Hugging Face name or module:function, with the same tokens.
    None: the model that training began with. It is held in memory from the start."""
    weight: float = 1.0
    """Weight of the reward in decoding, >= 0. Higher: more reward, further from the base model;
    0: the base model alone."""
    others: tuple[str, ...] = ()
    """Further autoregressive reward models, trained before (RUN/model)."""
    other_weights: tuple[float, ...] = ()
    """One for each of them, >= 0."""
    guidance: Literal["token", "answer"] = "token"
    """Guide every token (with a trajectory reward: ARGS), or write several whole answers with the
    base model and keep the one of the highest reward (best of n)."""
    candidates: int = 10
    """Of ARGS, likeliest tokens that are judged (its authors: 10); of best of n, answers; >= 1."""

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        require("label_smoothing", smoothing, 0 <= smoothing < 0.5, "in [0, 0.5)")
        for name in ("beta", "learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in (
            "target_margin",
            "weight_decay",
            "warmup_updates",
            "decay_updates",
            "micro_batch_size",
            "weight",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("batch_size", "candidates"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("target_margin", "label_smoothing"):
            value = getattr(self, name)
            require(name, value, value == 0 or self.loss == "sigmoid", "0 with the hinge loss")
        if self.decay_updates:
            many = self.decay_updates
            require("decay_updates", many, many > self.warmup_updates, "0 or > warmup_updates")
        if len(self.others) != len(self.other_weights):
            raise UserError(
                f"others and other_weights must be equally many, got {len(self.others)} and "
                f"{len(self.other_weights)}"
            )
        weights = self.other_weights
        require("other_weights", weights, all(w >= 0 for w in weights), ">= 0")
        guides = self.reward == "autoregressive" and self.guidance == "token"
        require("others", self.others, not self.others or guides, "empty unless tokens are guided")

    def resolved(self) -> "Config":
        """With folders named by their whole paths."""
        others = tuple(str(whole_path(other)) for other in self.others)
        return replace(self, base=whole_path(self.base), others=others)


class GenARM(Method):
    """An autoregressive reward model, and a model that it guides."""

    Config = Config
    world = "language"
    loop = "offline"
    data = "optional"
    rows = "pairs"
    headline = "accuracy"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        if runtime.sharding is not None:  # All processes must ask the model equally often.
            runtime.share(cfg.batch_size)
        self.model = spec.model
        tokenizer, device = spec.tokenizer, runtime.reading_device
        if cfg.base is None:
            self._base = spec.model.frozen()
        else:
            self._base, tokenizer = frozen_model(cfg.base, device, "base")
            _check_tokens(spec.tokenizer, tokenizer, f"the base model {cfg.base}")
        self._others: list[LanguageModel] = []
        for source in cfg.others:
            other, its_tokenizer = frozen_model(source, device, "others")
            _check_tokens(its_tokenizer, tokenizer, f"the other reward model {source}")
            self._others.append(other)
        self._vocabulary = len(tokenizer)
        self.head: nn.Linear | None = None
        if cfg.reward == "trajectory":
            width = self.model.head.weight.shape[1]
            self.head = nn.Linear(width, 1, bias=False, device=runtime.device)
        runtime.prepare(self.model, self._base, *self._others)
        self.opt = Optim(
            [*self.model.trained, *([] if self.head is None else self.head.parameters())],
            cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
        )
        self._rewards = runtime.autocast(self._both_rewards)

    @property
    def policy(self) -> LanguageModel:
        """The reward model."""
        return self.model

    def experience(self, text: Text[tuple[Tokens, Tokens]]) -> Batches[Pairs]:
        return Batches(text, collate_pairs, self.cfg.batch_size)

    def update(self, batch: Pairs, step: int) -> Metrics:
        cfg, batch = self.cfg, batch.to(self.runtime.device)
        found: list[Tensor] = []

        def loss(part: Pairs) -> Float[Tensor, ""]:
            reward = self._rewards(part)
            terms = self.preference_terms(reward)
            found.append(torch.cat([terms.unsqueeze(1), reward], 1).detach())
            return terms.sum() / cfg.batch_size

        self.opt.learning_rate = _scheduled(cfg, step)
        self.opt.minimize_sum(loss, batch.split(cfg.micro_batch_size))
        terms, *reward = torch.cat(found).unbind(1)
        told = self._told(torch.stack(reward, 1))
        return {"loss": terms.mean(), **{name: value.mean() for name, value in told.items()}}

    def preference_terms(self, reward: Float[Tensor, "b 2"]) -> Float[Tensor, "b"]:
        """-log sigma(beta (r_chosen - r_rejected) - gamma), or the hinge."""
        cfg, (chosen, rejected) = self.cfg, reward.unbind(1)
        margin = cfg.beta * (chosen - rejected) - cfg.target_margin
        if cfg.loss == "hinge":
            return (1 - margin).relu()
        return bradley_terry_terms(margin, 1 - cfg.label_smoothing)

    def judge(self, batch: Pairs) -> Metrics:
        """Of each pair: whether the reward prefers the chosen answer, and what it says."""
        told = self._told(self._rewards(batch))
        return {"preference_accuracy": told.pop("accuracy"), **told}

    def write(
        self,
        tokens: Int[Tensor, "p t"],
        mask: Bool[Tensor, "p t"],
        seeds: Sequence[int],
        decoding: Decoding,
        *,
        weights: Sequence[float] | None = None,
    ) -> Completions:
        """Completions by the base model and the rewards; see `LanguageModel.generate`.

        Args:
            tokens: prompts, padded on the left.
            mask: what is no padding.
            seeds: one a completion.
            decoding: the temperature divides the sum; 1 is the theory's.
            weights: of this reward model and the others, in place of the configured ones.
        """
        cfg, base = self.cfg, self._base
        with ExitStack() as stack:
            for model in (self.model, base, *self._others):
                stack.enter_context(model.writing())
            if cfg.guidance == "token":
                models = [base, self.model, *self._others]
                return write(self.rule(weights), models, tokens, mask, seeds, decoding)
            many = [mix(seed, number) for seed in seeds for number in range(cfg.candidates)]
            alone = product(base, [], [], vocabulary=self._vocabulary)
            answers = write(alone, [base], tokens, mask, many, decoding)
            return best_of(cfg.candidates, answers, self._reward_of_answers)

    def rule(self, weights: Sequence[float] | None = None) -> NextLogits:
        """What is drawn from at every token, before `Decoding`'s temperature and truncation."""
        cfg, base = self.cfg, self._base
        weights = (cfg.weight, *cfg.other_weights) if weights is None else weights
        if cfg.reward == "trajectory":
            (weight,) = weights
            return reranked(base, self._trajectory_reward, weight, candidates=cfg.candidates)
        rewards = [self.model, *self._others]
        return product(base, rewards, weights, vocabulary=self._vocabulary)

    def _told(self, reward: Float[Tensor, "b 2"]) -> dict[str, Tensor]:
        chosen, rejected = reward.unbind(1)
        return {
            "accuracy": (chosen > rejected) + 0.5 * (chosen == rejected),
            "margin": self.cfg.beta * (chosen - rejected),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }

    def _both_rewards(self, batch: Pairs) -> Float[Tensor, "b 2"]:
        """One pass over chosen and rejected together."""
        tokens, token_mask = batch.tokens.flatten(0, 1), batch.token_mask.flatten(0, 1)
        if self.head is not None:
            return self._trajectory_reward(tokens, token_mask).view(-1, 2)
        logp = self.model.log_prob(tokens, token_mask, batch.completion_mask.flatten(0, 1))
        return logp.sum(-1).view(-1, 2)

    def _trajectory_reward(
        self, tokens: Int[Tensor, "b t"], token_mask: Bool[Tensor, "b t"]
    ) -> Float[Tensor, "b"]:
        """Read off the last token of each text, finished or not."""
        assert self.head is not None
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = (token_mask * place).argmax(-1)
        hidden = self.model.hidden(tokens, token_mask)
        return self.head(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1)

    def _reward_of_answers(self, answers: Completions) -> Float[Tensor, "b"]:
        if self.head is not None:
            return self._trajectory_reward(answers.tokens, answers.token_mask)
        where = (answers.tokens, answers.token_mask, answers.completion_mask)
        return self.model.log_prob(*where).sum(-1)


def _scheduled(cfg: Config, step: int) -> float:
    """The step's size: warm-up in a straight line, then half a cosine."""
    size = cfg.learning_rate * min(1, (step + 1) / max(cfg.warmup_updates, 1))
    if cfg.decay_updates == 0:
        return size
    done = (step - cfg.warmup_updates) / (cfg.decay_updates - cfg.warmup_updates)
    return size * (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2


def _check_tokens(reward: Any, base: Any, what: str) -> None:
    """Every token of the base model must be the reward model's of the same number.

    Raises:
        UserError: they are different tokenizers.
    """
    theirs = reward.get_vocab()
    differing = [token for token, k in base.get_vocab().items() if theirs.get(token) != k]
    if differing:
        raise UserError(
            f"{what} has other tokens than it should share ({differing[0]!r}, and {len(differing)} "
            "in all): a reward model can only guide a model with its own tokenizer"
        )


# ---- recipes

ONE_THREAD = RuntimeConfig(device="cpu", threads=1, graph="eager")


def smoke() -> Experiment:
    """Ten updates of a tiny model."""
    return Experiment.of(
        Config(batch_size=4, learning_rate=1e-3, warmup_updates=2, decay_updates=20),
        model="esscher.models:tiny_llama",
        data="esscher.datasets:sums_compared",
        steps=10,
        evaluation=EvaluationConfig(every=5, episodes=4),
        checkpoint=CheckpointConfig(every=5),
        runtime=ONE_THREAD,
    )


def paper() -> Experiment:
    """The authors' reward model of helpful and harmless answers: one epoch, adapters on 7 billion."""
    return Experiment.of(
        Config(decay_updates=3_500, micro_batch_size=4),
        model=ModelConfig(source="argsearch/llama-7b-sft-float32", lora_rank=8, lora_alpha=16.0),
        text=TextConfig(max_length=1024, too_long="drop"),
        data="Dahoas/full-hh-rlhf",
        steps=3_500,
    )


def proof() -> Proof:
    """The sheet's miniature: a language of 1,024 words, in which every distribution is known."""
    return Proof(
        claims=(
            Claim(
                name="guided decoding",
                statement="Words of a random language, preferred under a known reward R: at weight 1 "
                "GenARM reaches more E[R] than ARGS does at the same KL to the base model, as much as "
                "DPO, more with more weight, and never more than the exact optimum at the same KL. "
                "The same reward model guides a base model of twice the width and depth. Labels "
                "drawn by a coin do not.",
                arms={
                    "genarm": lambda seed: _of_words(Config(beta=0.5, **BY_ADAM), seed),
                    "args": _args,
                    "dpo": _dpo,
                    "coin": lambda seed: _of_words(Config(beta=0.5, **BY_ADAM), seed, "_random"),
                },
                measure=_guided_figures,
                judge=_judge_guided,
            ),
            Claim(
                name="several rewards",
                statement="Two reward models, one for each part of R: E of each part rises with the "
                "weight of its own model, at every weight of the other.",
                arms={
                    part: lambda seed, part=part: _of_words(
                        Config(beta=0.5, **BY_ADAM), seed, f"_{part}", steps=600
                    )
                    for part in PARTS
                },
                measure=_mixed_figures,
                judge=_judge_mixed,
            ),
        ),
        notes="All figures are exact: distributions over the 1,024 words are computed, not sampled. "
        "Differences from the sheet: transformers of width 32 for its recurrent networks; the reward "
        "models begin with the base model's weights, as the paper's do; what the sheet asks of "
        "several rewards is tried after 600 updates. Added: twice the width and depth, with at least "
        "half of the gain of the exact optimum at beta = 0.5, and the coin, with less than half of "
        "the gain of true labels. Best of 16 answers is measured beside ARGS, without a check.",
    )


WEIGHTS, MIXED = (0.25, 0.5, 1.0, 2.0), (0.0, 0.5, 1.0)
ARGS_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
PARTS = ("rising", "closing")
AT_ONCE: Mapping[str, Any] = {
    "learning_rate": 3e-3,
    "warmup_updates": 0,
    "max_grad_norm": 10.0,
    "batch_size": 256,
}
BY_ADAM: Mapping[str, Any] = {**AT_ONCE, "weight_decay": 0.0}


def _args(seed: int) -> Experiment:
    cfg = Config(reward="trajectory", beta=1.0, candidates=len(words.LETTERS), **BY_ADAM)
    return _of_words(cfg, seed)


def _dpo(seed: int) -> Experiment:
    return _of_words(load_method("f_dpo").Config(beta=0.5, **AT_ONCE), seed)


def _of_words(cfg: Any, seed: int, preferred: str = "", steps: int = 1_500) -> Experiment:
    """Model and data differ from seed to seed."""
    return Experiment.of(
        cfg,
        model=ModelConfig(source="esscher.words:model", kwargs={"seed": seed}),
        text=TextConfig(
            columns={name: f"{name}{preferred}" for name in ("chosen", "rejected")},
            held_out_share=1 / 16,
        ),
        data=f"esscher.words:compared_{seed}",
        steps=steps,
        evaluation=EvaluationConfig(every=0, episodes=400),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=100, to=()),
        runtime=ONE_THREAD,
    )


def _guided_figures(run: FinishedRun) -> dict[str, float]:
    method = run.learner
    if not isinstance(method, GenARM):
        base = words.log_probs(method._reference.next_logits)
        return _placed("", words.log_probs(method.policy.next_logits), base)
    rule, base = method.rule, words.log_probs(method._base.next_logits)
    figures = {"base: reward": _expected(base)}
    for weight in ARGS_WEIGHTS if method.cfg.reward == "trajectory" else WEIGHTS:
        figures |= _placed(f"weight {weight:g}: ", words.log_probs(rule((weight,))), base)
    if method.cfg.reward == "trajectory":
        return figures | _placed("best of 16: ", _best_of_exactly(16, method, base), base)
    local, whole = words.log_probs(rule((1.0,))), base + words.log_probs(method.model.next_logits)
    figures["local to global"] = _kl(local, whole.log_softmax(0))
    seed = int(run.experiment.stages[-1].model.kwargs["seed"])
    large = words.speaker(seed=100 + seed, width=64, layers=4)
    its_base = words.log_probs(large.next_logits)
    guided = words.log_probs(product(large, [method.model], [1.0]))
    figures |= {"large, base: reward": _expected(its_base)}
    figures |= _placed("large, weight 1: ", guided, its_base)
    return figures | {"large, optimum: reward": _expected(_optimum(its_base, 0.5))}


def _best_of_exactly(count: int, method: GenARM, base: Tensor) -> Tensor:
    """Log-probability of each word as the best of so many, by its reward, of the base model."""
    letters = words.all_words()
    end = torch.full((len(letters), 1), method.model.end_tokens[0])
    text = torch.cat([words.prompt().expand(len(letters), -1), letters, end], 1)
    with torch.no_grad():
        order = method._trajectory_reward(text, torch.ones_like(text, dtype=torch.bool)).argsort()
    upto = base[order].exp().cumsum(0)
    share = torch.diff((upto / upto[-1]) ** count, prepend=torch.zeros(1, dtype=upto.dtype))
    return torch.empty_like(base).scatter(0, order, share.clamp(min=1e-300).log())


def _placed(name: str, logp: Tensor, base: Tensor) -> dict[str, float]:
    """Of a distribution: E[R], KL to the base model, and the most that can be had at this KL."""
    distance = _kl(logp, base)
    low, high = 1e-3, 1e3  # 1 / beta, found by bisection.
    for _ in range(60):
        middle = (low * high) ** 0.5
        too_near = _kl(_optimum(base, 1 / middle), base) < distance
        low, high = (middle, high) if too_near else (low, middle)
    best = _expected(_optimum(base, 1 / high))
    return {f"{name}reward": _expected(logp), f"{name}distance": distance, f"{name}optimum": best}


def _optimum(base: Tensor, beta: float) -> Tensor:
    """Logarithm of pi_base exp(R / beta) / Z."""
    return (base + words.REWARDS[""]() / beta).log_softmax(0)


def _expected(logp: Tensor, part: str = "") -> float:
    return float(logp.exp() @ words.REWARDS[part]())


def _kl(logp: Tensor, base: Tensor) -> float:
    return float(logp.exp() @ (logp - base))


def _judge_guided(figures: Figures) -> list[Check]:
    arm, args, checks = figures["genarm"], figures["args"], []
    for k, reward in enumerate(arm["weight 1: reward"]):
        names = ["base", *(f"weight {w:g}" for w in ARGS_WEIGHTS)]
        far = [0.0, *(args[f"{name}: distance"][k] for name in names[1:])]
        high = [args[f"{name}: reward"][k] for name in names]
        there = float(np.interp(arm["weight 1: distance"][k], far, high))
        gain, coin = (
            figures[name]["weight 1: reward"][k] - figures[name]["base: reward"][k]
            for name in ("genarm", "coin")
        )
        large, best = (
            arm[f"large, {name}: reward"][k] - arm["large, base: reward"][k]
            for name in ("weight 1", "optimum")
        )
        gap = abs(reward - figures["dpo"]["reward"][k])
        checks += [
            Check(f"over ARGS at the same KL, seed {k}", reward - there, "> 0", reward > there),
            Check(f"distance from DPO, seed {k}", gap, "<= 0.3", gap <= 0.3),
            Check(
                f"gain of a larger model over the optimum's, seed {k}",
                large / best,
                ">= 0.5",
                large >= 0.5 * best,
            ),
            Check(f"gain by a coin, seed {k}", coin / gain, "< 0.5", coin < 0.5 * gain),
        ]
        for less, more in itertools.pairwise(WEIGHTS[:3]):
            rise = arm[f"weight {more:g}: reward"][k] - arm[f"weight {less:g}: reward"][k]
            checks.append(Check(f"weight {less:g} to {more:g}, seed {k}", rise, "> 0", rise > 0))
        for name in (*(f"weight {w:g}" for w in WEIGHTS), "large, weight 1"):
            over = arm[f"{name}: reward"][k] - arm[f"{name}: optimum"][k]
            checks.append(Check(f"over the optimum, {name}, seed {k}", over, "<= 0", over <= 1e-6))
    return checks


def _mixed_figures(run: FinishedRun) -> dict[str, float]:
    """E of both parts on a grid of weights, told by the run of the first part."""
    method, experiment = run.learner, run.experiment
    figures = {"preference accuracy": run.rows("evaluate")[-1]["return_mean"]}
    if experiment.label != PARTS[0]:
        return figures
    sibling = run_folder(run.folder.parents[1], replace(experiment, label=PARTS[1]))
    other, _ = frozen_model(str(sibling / "model"), torch.device("cpu"), "others")
    for first, second in itertools.product(MIXED, MIXED):
        logp = words.log_probs(product(method._base, [method.model, other], [first, second]))
        for part in PARTS:
            figures[f"{part} at {first:g}, {second:g}"] = _expected(logp, f"_{part}")
    return figures


def _judge_mixed(figures: Figures) -> list[Check]:
    told, checks = figures[PARTS[0]], []
    for other, (low, high) in itertools.product(MIXED, itertools.pairwise(MIXED)):
        for part, ends in (
            (PARTS[0], (f"{low:g}, {other:g}", f"{high:g}, {other:g}")),
            (PARTS[1], (f"{other:g}, {low:g}", f"{other:g}, {high:g}")),
        ):
            pairs = zip(*(told[f"{part} at {end}"] for end in ends), strict=True)
            checks += [
                Check(f"{part}, {' to '.join(ends)}, seed {k}", more - less, "> 0", more > less)
                for k, (less, more) in enumerate(pairs)
            ]
    return checks

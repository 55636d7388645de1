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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.autoregressive import TextSpec
from esscher.errors import require
from esscher.experience.text import Batches, Text, collate_pairs
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
    TextConfig,
)
from esscher.functional.divergences import FDivergence, by_name, divergence
from esscher.functional.preferences import implicit_score, preference_terms, tilted
from esscher.method import Method, Paper
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, within
from esscher.runtime.device import Runtime, RuntimeConfig
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


Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of f-DPO; where the paper's vary from task to task, TRL's."""

    divergence: Divergence = "reverse_kl"
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
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: TextSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        self.model = spec.model
        self._reference = spec.model.frozen()
        if runtime.sharding is not None:  # All processes must ask the model equally often.
            runtime.share(cfg.batch_size)
        runtime.prepare(self.model, self._reference)
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


# ---- proof


def proof() -> Proof:
    """The sheet's miniature: six answers in a table, then pairs sampled from a small language."""
    return Proof(
        claims=(
            Claim(
                name="exact recovery",
                statement="Six answers, every pair of different ones with its exact preference: "
                "descent on the loss ends within total variation 1e-4 of the optimum of "
                "E[r] - beta D_f, whichever the divergence, and always at the loss 0.586795.",
                arms={name: partial(_beside_table, name, 0.5) for name in DIVERGENCES},
                measure=_measure_recovery,
                judge=_judge_recovery,
                num_seeds=1,
            ),
            Claim(
                name="divergence efficiency",
                statement="With beta such that E[r] = 1.2 at the optimum, the policy that descent on "
                "each divergence's loss finds has the least of that divergence; all sixteen values "
                "match the sheet's to 1e-3.",
                arms={name: partial(_beside_table, name, 1.0) for name in DIVERGENCES},
                measure=_measure_efficiency,
                judge=_judge_efficiency,
                num_seeds=1,
            ),
            Claim(
                name="diversity",
                statement="A tiny Llama that speaks 64 sequences learns from 2,000 sampled pairs, at "
                "three weights of each divergence: where both reach the same reward, the sequence "
                "that lost most keeps more of its probability under forward KL than reverse KL.",
                arms={
                    f"{name}, beta {beta:g}": partial(_speaking, name, beta)
                    for name, betas in WEIGHTS.items()
                    for beta in betas
                },
                measure=_measure_diversity,
                judge=_judge_diversity,
            ),
        ),
        notes="The first two claims are computed in tables, with this file's loss and optimiser; "
        "their runs only carry the settings. The loss 0.586795 is the mean over pairs of different "
        "answers (the sheet does not say so). In the third, the sheet's recurrent network is a Llama "
        "of one layer; reward and probabilities are exact, of the 64 sequences among themselves: "
        "comparisons within them leave the mass that they have together free under reverse KL, and "
        "it can vanish (the figure mass). Both divergences are compared at the middle of the rewards "
        "that the weights of both span, where the logarithm of the least ratio is interpolated in "
        "the reward.",
    )


DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
REFERENCE = (0.30, 0.25, 0.20, 0.15, 0.07, 0.03)
REWARD = (0.0, 0.5, -0.5, 1.0, 1.5, 2.0)
# The sheet's figures: optima at beta = 0.5; then beta and the four divergences, in their order here.
OPTIMA = {
    "reverse_kl": (0.0576, 0.1306, 0.0141, 0.2129, 0.2701, 0.3147),
    "forward_kl": (0.0742, 0.0821, 0.0396, 0.0733, 0.0670, 0.6638),
    "js": (0.0054, 0.0127, 0.0013, 0.0226, 0.0387, 0.9192),
    "alpha": (0.0606, 0.0841, 0.0269, 0.1000, 0.1333, 0.5950),
}
EFFICIENCY = {
    "reverse_kl": (0.5696, 0.7634, 0.7463, 0.3320, 0.7052),
    "forward_kl": (0.8584, 0.9406, 0.5506, 0.3084, 0.6720),
    "js": (1.6352, 0.8481, 0.5691, 0.3014, 0.6491),
    "alpha": (0.7248, 0.8258, 0.5782, 0.3022, 0.6474),
}


def _beside_table(name: Divergence, beta: float, seed: int) -> Experiment:
    """One update, for the record; what is measured is in tables."""
    source = "esscher.models:tiny_llama"
    return Experiment.of(
        Config(divergence=name, beta=beta, batch_size=2),
        model=ModelConfig(source=source, kwargs={"layers": 1, "width": 8, "heads": 1}),
        data="esscher.datasets:sums_compared",
        steps=1,
        evaluation=EvaluationConfig(every=0, episodes=1),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _table() -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """Log-probabilities of the reference, and rewards."""
    return (torch.tensor(x, dtype=torch.float64) for x in (REFERENCE, REWARD))  # pyright: ignore[reportReturnType]


def descended(f: FDivergence, beta: float) -> tuple[Float[Tensor, "k"], Float[Tensor, ""]]:
    """Probabilities at the end of a descent on the expected loss, and that loss.

    Pairs of different answers are drawn from the reference and preferred as Bradley and Terry say.
    """
    reference, reward = _table()
    one, two = torch.combinations(torch.arange(len(reward))).unbind(1)
    weight = reference[one] * reference[two] / (reference[one] * reference[two]).sum()
    label = torch.sigmoid(reward[one] - reward[two])
    logits = reference.log().requires_grad_()

    def loss() -> Float[Tensor, ""]:
        log_ratio = logits.log_softmax(-1) - reference.log()
        return (weight * preference_terms(log_ratio[one], log_ratio[two], f, beta, label)).sum()

    opt = Optim([logits], 0.02)
    for step in range(8_000):
        opt.learning_rate = 0.02 if step < 4_000 else 0.002
        opt.minimize(loss())
    return logits.detach().softmax(-1), loss().detach()


def _measure_recovery(run: FinishedRun) -> dict[str, float]:
    cfg = run.experiment.method
    reference, reward = _table()
    optimum = tilted(reference.log(), reward, cfg.generator, cfg.beta).exp()
    probability, loss = descended(cfg.generator, cfg.beta)
    return {
        "total variation": (probability - optimum).abs().sum().item() / 2,
        "loss": loss.item(),
        **{f"probability {k}": p for k, p in enumerate(probability.tolist(), 1)},
    }


def _judge_recovery(figures: Figures) -> list[Check]:
    checks = []
    for name, optimum in OPTIMA.items():
        found = {key: values[0] for key, values in figures[name].items()}
        distance = found["total variation"]
        error = max(abs(found[f"probability {k}"] - p) for k, p in enumerate(optimum, 1))
        checks += [
            Check(f"total variation, {name}", distance, "< 1e-4", distance < 1e-4),
            Check(f"largest difference from the sheet, {name}", error, "< 1e-4", error < 1e-4),
            within(f"loss, {name}", found["loss"], 0.586795 - 1e-6, 0.586795 + 1e-6),
        ]
    return checks


def _measure_efficiency(run: FinishedRun) -> dict[str, float]:
    f = run.experiment.method.generator
    reference, reward = _table()
    low, high = 0.1, 10.0
    while high - low > 1e-9:
        beta = (low + high) / 2
        expected = tilted(reference.log(), reward, f, beta).exp() @ reward
        low, high = (beta, high) if expected > 1.2 else (low, beta)
    probability, _ = descended(f, low)
    others = {name: Config(divergence=name).generator for name in DIVERGENCES}
    return {
        "beta": low,
        "reward": (probability @ reward).item(),
        **{
            f"D {name}": divergence(probability.log(), reference.log(), g).item()
            for name, g in others.items()
        },
    }


def _judge_efficiency(figures: Figures) -> list[Check]:
    checks = []
    for column, name in enumerate(DIVERGENCES):
        found = {arm: figures[arm][f"D {name}"][0] for arm in DIVERGENCES}
        lead = min(value for arm, value in found.items() if arm != name) - found[name]
        told = f"{name}: least of the other policies less its own"
        checks.append(Check(told, lead, "> 0", lead > 0))
        for arm, expected in EFFICIENCY.items():
            error = abs(found[arm] - expected[1 + column])
            told = f"{name} of the policy of {arm}, difference from the sheet"
            checks.append(Check(told, error, "< 1e-3", error < 1e-3))
    return checks


# ---- a language of 64 sequences, whose pairs are sampled


WEIGHTS: dict[Divergence, tuple[float, ...]] = {
    "reverse_kl": (0.7, 1.0, 1.5),
    "forward_kl": (0.3, 0.6, 1.2),
}
SYMBOLS = "abcd"
SENTENCES = ["".join(symbols) for symbols in product(SYMBOLS, repeat=3)]
FREQUENCY = dict(zip(SYMBOLS, (0.4, 0.3, 0.2, 0.1), strict=True))
WORTH = dict(zip(SYMBOLS, (-1.0, -1 / 3, 1 / 3, 1.0), strict=True))


def _law() -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """Probability of each sentence, its symbols being independent, and its reward: their worth."""
    frequency = torch.tensor([[FREQUENCY[s] for s in x] for x in SENTENCES], dtype=torch.float64)
    worth = torch.tensor([[WORTH[s] for s in x] for x in SENTENCES], dtype=torch.float64)
    return frequency.prod(-1), worth.sum(-1)


def _sentences(tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of all sentences with their first and their end token, and masks, for `log_prob`."""
    rows = tokenizer(SENTENCES, add_special_tokens=False)["input_ids"]
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokens = torch.tensor([[first, *row, end] for row in rows])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return tokens, mask, mask & (torch.arange(tokens.shape[1]) > 0)


def speaker() -> tuple[Any, Any]:
    """A Llama of one layer that speaks the language, and its tokenizer; about 2 seconds."""
    from esscher.models import tiny_llama

    model, tokenizer = tiny_llama(layers=1, width=32, heads=2, context=8, characters=SYMBOLS)
    probability, _ = _law()
    tokens, mask, _ = _sentences(tokenizer)
    opt = Optim(model.parameters(), 1e-2)
    for step in range(400):
        opt.learning_rate = 1e-2 * (1 - step / 400)
        logp = model(input_ids=tokens, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
        chosen = logp.gather(-1, tokens[:, 1:, None]).squeeze(-1).sum(-1)
        opt.minimize(-(probability.float() * chosen).sum())
    return model, tokenizer


def sentences_compared() -> list[dict[str, str]]:
    """2,200 pairs of different sentences, preferred as Bradley and Terry say.

    Drawn with torch's own generator, which a run seeds before it reads its data.
    """
    probability, reward = _law()
    one, two = torch.multinomial(probability, 6_000, replacement=True).view(2, -1)
    different = one != two
    one, two = one[different][:2_200], two[different][:2_200]
    preferred = torch.rand(len(one)).double() < torch.sigmoid(reward[one] - reward[two])
    chosen, rejected = torch.where(preferred, one, two), torch.where(preferred, two, one)
    return [
        {"prompt": "", "chosen": SENTENCES[good], "rejected": SENTENCES[bad]}
        for good, bad in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]


def _speaking(name: Divergence, beta: float, seed: int) -> Experiment:
    here = "esscher.methods.language.f_dpo"
    return Experiment.of(
        Config(divergence=name, beta=beta, learning_rate=1e-3, warmup_updates=0, batch_size=64),
        model=f"{here}:speaker",
        data=f"{here}:sentences_compared",
        text=TextConfig(held_out_share=1 / 11),
        steps=500,
        evaluation=EvaluationConfig(every=0, episodes=200),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


@torch.no_grad()
def _measure_diversity(run: FinishedRun) -> dict[str, float]:
    method = run.learner
    tokens, mask, completion = _sentences(method.spec.tokenizer)
    logp, ref_logp = (
        model.log_prob(tokens, mask, completion).sum(-1).double()
        for model in (method.model, method._reference)
    )
    _, reward = _law()
    probability = logp.softmax(-1)
    return {
        "reward": (probability @ reward).item(),
        "reward of the reference": (ref_logp.softmax(-1) @ reward).item(),
        "least ratio": (probability / ref_logp.softmax(-1)).min().item(),
        "mass": logp.exp().sum().item(),
        "accuracy": run.rows("evaluate")[-1]["return_mean"],
    }


def _judge_diversity(figures: Figures) -> list[Check]:
    checks = []
    for seed in range(len(next(iter(figures.values()))["reward"])):
        curves = {
            name: sorted(
                (found["reward"][seed], found["least ratio"][seed])
                for arm, found in figures.items()
                if arm.startswith(name)
            )
            for name in WEIGHTS
        }
        low = max(curve[0][0] for curve in curves.values())
        high = min(curve[-1][0] for curve in curves.values())
        forward, reverse = (
            _interpolated(curves[name], (low + high) / 2) for name in ("forward_kl", "reverse_kl")
        )
        told = f"least ratio, forward KL's over reverse KL's, at the same reward, seed {seed}"
        passed = low < high and forward > reverse
        checks.append(Check(told, forward / reverse, "> 1", passed))
    return checks


def _interpolated(curve: Sequence[tuple[float, float]], at: float) -> float:
    """Of positive values over sorted places, linear in their logarithms."""
    for (x, y), (next_x, next_y) in zip(curve, curve[1:], strict=False):
        if at <= next_x or next_x == curve[-1][0]:
            return y * (next_y / y) ** ((at - x) / (next_x - x))
    raise ValueError("a curve needs two places")

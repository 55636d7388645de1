"""Decoding that follows rewards without touching the model that writes.

| who judges | when | here |
|---|---|---|
| language models whose log-probability is the reward (GenARM) | every token | `product` |
| a reward of whole texts, asked about unfinished ones (ARGS) | every candidate token | `reranked` |
| a reward of whole texts | once all are written | `best_of` |

The first two are rules of `samplers.generation.complete`. A product of models token by token is
normalised at every token: over whole sequences it is not pi_base pi_reward^w up to one constant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.samplers.decoding import Decoding
from esscher.samplers.generation import NextLogits, complete
from esscher.types import Completions


@runtime_checkable
class NextTokenModel(Protocol):
    """What decoding asks of a language model."""

    end_tokens: tuple[int, ...]
    pad_token: int

    @property
    def vocabulary(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    def next_logits(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b s"], cache: Any = None
    ) -> tuple[Float[Tensor, "b v"], Any]: ...


TextReward = Callable[[Int[Tensor, "b t"], Bool[Tensor, "b t"]], Float[Tensor, "b"]]
"""(tokens, mask of what is no padding) -> reward of each text; padding may stand on either side."""


def product(
    base: NextTokenModel,
    rewards: Sequence[NextTokenModel],
    weights: Sequence[float],
    *,
    vocabulary: int | None = None,
) -> NextLogits:
    """Reward-guided generation: every token from base and rewards together.

    log pi(y_t | x, y_<t) = log pi_base + sum_k w_k log pi_reward_k - log Z(x, y_<t)

    One pass of each model a token, each with its own cache; a model of weight 0 is not asked. A
    temperature divides the sum: 1 is the theory's.

    Args:
        base: writes.
        rewards: their token log-probabilities are rewards. They share the base model's tokens.
        weights: one a reward, >= 0; a weight is 1 / beta of the objective E[r] - beta KL.
        vocabulary: tokens that all share, the rest is never drawn; None: of the smallest model.

    Source: Xu et al. 2024, GenARM (arXiv 2410.08193).
    Raises: UserError if weights are not one a reward, or one is negative; from the rule, if a prompt
        holds a token that one of the models does not have.
    """
    require("weights", tuple(weights), len(weights) == len(rewards), f"{len(rewards)} numbers")
    require("weights", tuple(weights), all(0 <= w < float("inf") for w in weights), ">= 0")
    asked = [(base, 1.0), *(pair for pair in zip(rewards, weights, strict=True) if pair[1] != 0)]
    shared = min(model.vocabulary for model, _ in asked)
    size = shared if vocabulary is None else min(vocabulary, shared)

    def next_logits(tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if cache is None:
            _check_known(tokens, mask, shared)
            cache = _Together([None] * len(asked))
        found = [
            model.next_logits(tokens, mask, its_cache)
            for (model, _), its_cache in zip(asked, cache.parts, strict=True)
        ]
        # What normalises each model is the same for all tokens, so Z takes it up.
        total = torch.zeros((), device=tokens.device)
        for (_, weight), (logits, _) in zip(asked, found, strict=True):
            total = total + weight * logits[:, :size].float()
        return total, _Together([its_cache for _, its_cache in found])

    return next_logits


def reranked(
    base: NextTokenModel, reward: TextReward, weight: float, *, candidates: int = 10
) -> NextLogits:
    """ARGS: a reward of whole texts, asked about the unfinished text with each candidate token.

    score(v) = log pi_base(v | x, y_<t) + w r(x, y_<t, v), v among the likeliest tokens of the base
    model; then softmax (temperature 0: the best, as in the paper).

    Args:
        base: writes.
        reward: reads the text so far from its beginning, for every candidate of every token.
        weight: w, >= 0.
        candidates: likeliest tokens that are judged; no other is ever drawn.

    Source: Khanov et al. 2024, ARGS (arXiv 2402.01694).
    Raises: UserError if weight is negative or candidates < 1.
    """
    require("weight", weight, 0 <= weight < float("inf"), ">= 0")
    require("candidates", candidates, candidates >= 1, ">= 1")

    def next_logits(tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        before, its_cache = (tokens[:, :0], None) if cache is None else (cache.text, cache.parts[0])
        text = torch.cat([before, tokens], 1)
        logits, its_cache = base.next_logits(tokens, mask, its_cache)
        remembered = _Together([its_cache], text)
        logp = logits.float().log_softmax(-1)
        if weight == 0:
            return logp, remembered
        best, token = logp.topk(min(candidates, logp.shape[-1]))
        copies = token.shape[1]
        longer = torch.cat([text.repeat_interleave(copies, 0), token.view(-1, 1)], 1)
        longer_mask = nn.functional.pad(mask.repeat_interleave(copies, 0), (0, 1), value=True)
        score = best + weight * reward(longer, longer_mask).float().view_as(best)
        return torch.full_like(logp, -torch.inf).scatter(-1, token, score), remembered

    return next_logits


def write(
    rule: NextLogits,
    models: Sequence[NextTokenModel],
    prompts: Int[Tensor, "p t"],
    prompt_mask: Bool[Tensor, "p t"],
    seeds: Sequence[int],
    decoding: Decoding,
) -> Completions:
    """`complete` by a rule made of several models, the one that writes first.

    An end token of any of them ends a completion; prompt and completion fit the shortest context.
    Log-probabilities are those of the rule: what tokens were really drawn from.

    Raises: UserError as `complete` does.
    """
    limits = [m.context_length for m in models if m.context_length is not None]
    return complete(
        rule,
        prompts,
        prompt_mask,
        seeds,
        decoding,
        end_tokens=sorted({token for model in models for token in model.end_tokens}),
        pad_token=models[0].pad_token,
        context_length=min(limits, default=None),
    )


@torch.no_grad()
def best_of(
    count: int, completions: Completions, reward: Callable[[Completions], Float[Tensor, "b"]]
) -> Completions:
    """Of every `count` completions that follow each other, the one of the highest reward.

    Its `logp` stays that of the distribution that it was drawn from, not of the choice. The first
    of several best ones is taken.

    Raises: UserError if the completions cannot be divided so.
    """
    total = len(completions.tokens)
    if count < 1 or total % count:
        raise UserError(f"count must divide the {total} completions, got {count}")
    best = reward(completions).view(-1, count).argmax(-1)
    return completions.index(best + count * torch.arange(total // count, device=best.device))


@dataclass
class _Together:
    """What several models remember, with the text so far where a rule reads it again."""

    parts: list[Any]
    text: Tensor | None = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.parts:
            part.batch_repeat_interleave(repeats)
        if self.text is not None:
            self.text = self.text.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        for part in self.parts:
            part.batch_select_indices(indices)
        if self.text is not None:
            self.text = self.text[indices]


def _check_known(tokens: Tensor, mask: Tensor, size: int) -> None:
    largest = int(tokens.masked_fill(~mask, 0).max())
    if largest >= size:
        raise UserError(
            f"a prompt holds token {largest}, and the models share only the first {size}: they need "
            "one tokenizer"
        )

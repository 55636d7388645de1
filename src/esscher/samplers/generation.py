"""Completions, token by token: one loop for every rule of what comes next.

A rule says how likely each next token is, and hands back what it wants to remember. The loop draws
from it, keeps what was drawn, and drops rows that are done as soon as they are many.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from esscher.errors import UserError
from esscher.samplers.decoding import Decoding, decoding_log_probs, draw, uniforms
from esscher.types import Completions

NextLogits = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""(tokens "b t", mask "b s", cache) -> (logits "b v" of the token after each row, cache).

Rows are padded on the left. The cache is None at first, and then what the rule returned: `tokens`
are those that it has not seen, `mask` tells all of them from padding. A cache must be able to
`batch_repeat_interleave(copies)` and `batch_select_indices(rows)`, as those of transformers are.
"""

KEPT_SHARE = 0.75
"""Rows that are done are dropped when fewer than this share is left: dropping copies the cache."""


@torch.no_grad()
def complete(
    next_logits: NextLogits,
    prompts: Int[Tensor, "p t"],
    prompt_mask: Bool[Tensor, "p t"],
    seeds: Sequence[int],
    decoding: Decoding,
    *,
    end_tokens: Sequence[int],
    pad_token: int,
    context_length: int | None,
) -> Completions:
    """Completions of prompts, equally many of each: as many in all as there are seeds.

    Args:
        next_logits: the rule.
        prompts: padded on the left.
        prompt_mask: what is no padding.
        seeds: one a completion, those of the first prompt first. A completion depends on its
            prompt, its seed and the rule (up to rounding, which depends on the batch).
        decoding: how to draw.
        end_tokens: any of them ends a completion, and counts as a part of it.
        pad_token: fills up rows.
        context_length: most tokens of a prompt and its completion together, if there is a limit.

    Raises:
        UserError: prompts and completions do not fit the context, a prompt is empty, or the seeds
            cannot be shared equally among the prompts.
    """
    copies = _checked(prompts, prompt_mask, len(seeds), decoding, context_length)
    device, count, limit = prompts.device, len(seeds), decoding.max_new_tokens
    uniform = uniforms(seeds, limit).to(device)
    tokens = torch.full((count, limit), pad_token, device=device)
    logp = torch.zeros(count, limit, device=device)
    length = torch.zeros(count, dtype=torch.long, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    ends = torch.tensor(tuple(end_tokens), device=device)
    rows = torch.arange(count, device=device)
    going = ~finished  # Of `rows`, which are those that the model is still asked about.
    mask = prompt_mask
    logits, cache = next_logits(prompts, mask, None)
    cache.batch_repeat_interleave(copies)
    logits = logits.repeat_interleave(copies, 0)
    mask = mask.repeat_interleave(copies, 0)
    for position in range(limit):
        distribution = decoding_log_probs(logits, decoding)
        token = draw(distribution, uniform[rows, position])
        tokens[rows, position] = torch.where(going, token, pad_token)
        told = distribution.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        logp[rows, position] = torch.where(going, told, 0.0)
        length[rows] += going
        going = going & ~torch.isin(token, ends)
        finished[rows] = ~going
        left = int(going.sum())
        if left == 0 or position + 1 == limit:
            break
        if left < KEPT_SHARE * len(rows):
            kept = going.nonzero().squeeze(-1)
            rows, token, mask, going = rows[kept], token[kept], mask[kept], going[kept]
            cache.batch_select_indices(kept)
        mask = nn.functional.pad(mask, (0, 1), value=True)
        logits, cache = next_logits(token.unsqueeze(-1), mask, cache)
    longest = int(length.max())
    completion = torch.arange(longest, device=device) < length.unsqueeze(-1)
    return Completions(
        tokens=torch.cat([prompts.repeat_interleave(copies, 0), tokens[:, :longest]], 1),
        prompt_mask=nn.functional.pad(
            prompt_mask.repeat_interleave(copies, 0), (0, longest), value=False
        ),
        completion_mask=nn.functional.pad(completion, (prompts.shape[1], 0), value=False),
        logp=nn.functional.pad(logp[:, :longest], (prompts.shape[1], 0)),
        group=torch.arange(len(prompts), device=device).repeat_interleave(copies),
        finished=finished,
    )


def _checked(
    prompts: Tensor, mask: Tensor, count: int, decoding: Decoding, limit: int | None
) -> int:
    """Completions a prompt."""
    copies, rest = divmod(count, len(prompts))
    if copies == 0 or rest:
        raise UserError(f"seeds must be a multiple of the {len(prompts)} prompts, got {count}")
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0])
        raise UserError(f"prompt {row} is empty: give it at least a beginning-of-text token")
    longest = int(mask.sum(-1).max())
    if limit is not None and longest + decoding.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens {decoding.max_new_tokens} exceed "
            f"the model's context of {limit}: shorten the prompt, or lower max_new_tokens"
        )
    return copies

"""Log-probabilities of a causal language model's tokens from its hidden states, in nats.

Logits over a vocabulary of v are made for a chunk of positions at a time, and made again for the
gradient: one matrix product more, and never a tensor of all positions times v. True in a mask
marks the tokens that count; what stands elsewhere, be it NaN, reaches neither result nor gradient.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 512
"""Positions whose logits are held at a time; more gain no speed on a CPU (width 256, v 32,000)."""
# exp(-1e4) is 0 in every float type: a floor for z where exp(z) z must be 0, not 0 * -inf.
LOG_ZERO = -1e4


class TokenLogProbs(NamedTuple):
    """Of each token, in nats; 0 where masked."""

    logp: Float[Tensor, "*s"]
    entropy: Float[Tensor, "*s"]
    """Entropy of the distribution that the token was scored under; carries no gradient."""


class SequenceLogProb(NamedTuple):
    """Of each sequence: log-probability and its mean over tokens, in nats; number of tokens."""

    sum: Float[Tensor, "b"]
    mean: Float[Tensor, "b"]
    count: Int[Tensor, "b"]  # pyright: ignore[reportIncompatibleMethodOverride]


def token_log_probs(
    hidden: Float[Tensor, "*s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*s"],
    mask: Bool[Tensor, "*s"],
    *,
    bias: Float[Tensor, "v"] | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Float[Tensor, "*s"]:
    """Log-probability of each target under the softmax of the logits; 0 where masked.

    log softmax((hidden weight^T + bias) / temperature)[target]: hidden[b, i] is the state that
    predicts targets[b, i] (see `shifted`). The product is made in the dtype of hidden and weight,
    or autocast's; all after it, and the sum of the weight's gradient over chunks, in float32 (in
    float64 for float64). Waits for the device once, to find the positions that count.

    Gradient: to hidden where the mask is True, to weight and bias; no second derivatives.
    Raises: ValueError if shapes or dtypes do not fit, or temperature or chunk is out of range;
    RuntimeError in a backward pass with create_graph=True.
    """
    return _token_log_probs(hidden, weight, targets, mask, bias, temperature, chunk, False)[0]


def token_log_probs_and_entropy(
    hidden: Float[Tensor, "*s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, "*s"],
    mask: Bool[Tensor, "*s"],
    *,
    bias: Float[Tensor, "v"] | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> TokenLogProbs:
    """`token_log_probs`, with the entropy of each token's distribution from the same logits.

    H = -sum_v p_v log p_v of p = softmax((hidden weight^T + bias) / temperature).

    Gradient: as of `token_log_probs`; none through the entropy.
    Raises: as `token_log_probs`.
    """
    found = _token_log_probs(hidden, weight, targets, mask, bias, temperature, chunk, True)
    return TokenLogProbs(*found)


def shifted(
    tokens: Int[Tensor, "b t"], completion_mask: Bool[Tensor, "b t"]
) -> tuple[Int[Tensor, "b t-1"], Bool[Tensor, "b t-1"]]:
    """Targets and mask of the states hidden[:, :-1].

    The state at position i predicts token i+1: that of the last prompt token the first token of
    the completion, and that of the last text token the end token, which counts as the mask says.
    Nothing predicts a row's first token, so a completion without a prompt loses it.
    """
    return tokens[:, 1:], completion_mask[:, 1:]


def sequence_log_prob(
    token_logp: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> SequenceLogProb:
    """Log-probability of each sequence from that of its tokens; an empty row has 0, 0 and 0.

    sum_t mask_t logp_t, the same over count, and count = sum_t mask_t.

    Gradient: of sum and mean, to `token_logp` where the mask is True.
    """
    total, count = token_logp.masked_fill(~mask, 0.0).sum(-1), mask.sum(-1)
    return SequenceLogProb(total, total / count.clamp(min=1), count)


def _token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be in (0, inf), got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    for name, tensor, shape in (
        ("targets", targets, hidden.shape[:-1]),
        ("mask", mask, hidden.shape[:-1]),
        ("weight", weight, (len(weight), hidden.shape[-1])),
        ("bias", bias, (len(weight),)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    elif weight.dtype != dtype:
        raise ValueError(
            f"weight must have hidden's dtype {dtype} outside autocast, got {weight.dtype}"
        )
    where = mask.nonzero(as_tuple=True)
    found = _ChunkedLogProbs.apply(
        hidden[where], weight, bias, targets[where], dtype, temperature, chunk, with_entropy
    )
    logp, entropy = (x.new_zeros(mask.shape).index_put(where, x.squeeze(-1)) for x in found)
    return logp, entropy


def _buffers(rows: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """For the logits of a chunk, in rows' dtype and in at least float32; one tensor if that is one."""
    narrow = rows.new_empty(min(chunk, len(rows)), len(weight))
    return narrow, narrow.to(torch.promote_types(rows.dtype, torch.float32))


def _logits(
    block: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    buffers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Logits / temperature of a chunk of rows, in the first of the buffers and in the second."""
    narrow, wide = (buffer[: len(block)] for buffer in buffers)
    scale, addend = 1 / temperature, weight[:, 0] if bias is None else bias
    # At beta = 0 the addend is not read, and no pass is spent on filling the buffer with it.
    beta = 0.0 if bias is None else scale
    torch.addmm(addend, block, weight.T, beta=beta, alpha=scale, out=narrow)
    return narrow, narrow if buffers[0] is buffers[1] else wide.copy_(narrow)


class _ChunkedLogProbs(torch.autograd.Function):
    """Rows [n, d] and targets [n] to log-probability and entropy [n, 1].

    Autocast is answered by `dtype`; products with `out=` or in place are out of its reach.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings, ctx.dtypes = (temperature, chunk), (rows.dtype, weight.dtype)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        targets = targets.long().unsqueeze(-1)
        logp = torch.empty_like(targets, dtype=torch.promote_types(dtype, torch.float32))
        normaliser, entropy = torch.empty_like(logp), torch.zeros_like(logp)
        buffers = _buffers(rows, weight, chunk)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            _, logits = _logits(rows[part], weight, bias, temperature, buffers)
            top = logits.amax(-1, keepdim=True)
            chosen = logits.sub_(top).gather(-1, targets[part])
            exponents = logits.clamp(min=LOG_ZERO) if with_entropy else None
            total = logits.exp_().sum(-1, keepdim=True)
            logp[part] = chosen - total.log()
            normaliser[part] = top + total.log()
            if exponents is not None:
                entropy[part] = total.log() - logits.mul_(exponents).sum(-1, keepdim=True) / total
            elif start + chunk >= len(rows):
                logits.div_(total)
        # The last chunk's probabilities are still there: their gradient needs no second product.
        keep = any(ctx.needs_input_grad) and not with_entropy
        ctx.buffers = buffers if keep else None
        ctx.save_for_backward(rows, weight, bias, targets, normaliser)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # Under create_graph=True, where this would be a constant.
            raise RuntimeError("token_log_probs has no second derivatives: pass no create_graph")
        rows, weight, bias, targets, normaliser = ctx.saved_tensors
        temperature, chunk = ctx.settings
        # d logp / d logits = (onehot - p) / temperature. Each row's factor stays out of the
        # [chunk, v] buffer: it multiplies rows of width d, on either side of the products.
        scale = grad_outputs[0] / -temperature
        scaled = (rows * scale).to(rows.dtype)
        (to_rows, to_weight, to_bias), wide = ctx.needs_input_grad[:3], scale.dtype
        grad_rows = torch.empty_like(rows) if to_rows else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if to_bias else None
        product = torch.empty_like(weight) if to_weight and weight.dtype != wide else None
        kept, ctx.buffers = ctx.buffers, None  # Overwritten below: good for one backward pass.
        buffers = kept or _buffers(rows, weight, chunk)
        for start in reversed(range(0, len(rows), chunk)):
            part = slice(start, start + chunk)
            hot = targets[part]
            if kept is not None and start + chunk >= len(rows):
                narrow, p = (buffer[: len(hot)] for buffer in kept)
            else:
                narrow, logits = _logits(rows[part], weight, bias, temperature, buffers)
                p = logits.sub_(normaliser[part]).exp_()
            narrow.copy_(p.scatter_(-1, hot, p.gather(-1, hot) - 1))
            if grad_rows is not None:
                torch.mm(narrow, weight, out=grad_rows[part])
            if grad_weight is not None and product is not None:
                grad_weight.add_(torch.mm(narrow.T, scaled[part], out=product))
            elif grad_weight is not None:
                grad_weight.addmm_(narrow.T, scaled[part])
            if grad_bias is not None:
                grad_bias.addmv_(p.T, scale[part].squeeze(-1))
        to_rows, to_weight = ctx.dtypes
        return (
            None if grad_rows is None else (grad_rows * scale).to(to_rows),
            None if grad_weight is None else grad_weight.to(to_weight),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )

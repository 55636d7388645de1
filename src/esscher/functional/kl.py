"""Kullback-Leibler divergences in nats: sampled estimators and exact closed forms.

KL(p || q) = E_{x~p}[log p(x) - log q(x)] throughout. The sampled estimators take
log_ratio = log p(x) - log q(x) at x drawn from p, the FIRST argument: for a penalty that holds
a policy near a reference, p is the policy and q the reference. Sheets that write
k3 = exp(d) - d - 1 with d = logp_ref - logp mean log_ratio = -d.

Estimating a value and estimating its gradient differ, because x was drawn from p without
gradient: differentiating a term averaged over x misses how p moves the samples.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def kl_k1_terms(log_ratio: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Unbiased estimate of KL(p || q), of either sign: k1 = log_ratio.

    Source: Schulman, Approximating KL divergence (2020).
    Gradient: to log_ratio; with x ~ p fixed its mean is zero, so it regularises nothing.
    """
    return log_ratio


def kl_k2_terms(log_ratio: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Biased, never negative estimate of KL(p || q): k2 = log_ratio^2 / 2.

    Source: Schulman, Approximating KL divergence (2020).
    Gradient: to log_ratio; with x ~ p fixed its mean is the gradient of KL(p || q).
    """
    return 0.5 * log_ratio.square()


def kl_k3_terms(log_ratio: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Unbiased, never negative estimate of KL(p || q): k3 = exp(-log_ratio) - 1 + log_ratio.

    Source: Schulman, Approximating KL divergence (2020).
    Gradient: to log_ratio; with x ~ p fixed its mean is the gradient of KL(q || p).
    """
    return torch.expm1(-log_ratio) + log_ratio


def categorical_kl(
    p_logits: Float[Tensor, "*s k"], q_logits: Float[Tensor, "*s k"]
) -> Float[Tensor, "*s"]:
    """Exact KL(p || q) of categorical distributions from unnormalised logits over the last axis.

    sum_k p_k (log p_k - log q_k), where p_k = 0 (a logit of -inf) adds 0; inf if q_k = 0 < p_k.

    Gradient: to both arguments (finite also beside logits of -inf shared by both).
    """
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    # -inf - (-inf) is NaN, and so is its gradient even under a zero weight.
    impossible = log_p == -float("inf")
    log_ratio = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    return (log_p.exp() * log_ratio).sum(-1)


def gaussian_kl(
    p_mean: Float[Tensor, "*s d"],
    p_std: Float[Tensor, "*s d"],
    q_mean: Float[Tensor, "*s d"],
    q_std: Float[Tensor, "*s d"],
) -> Float[Tensor, "*s"]:
    """Exact KL(p || q) of diagonal Gaussians, summed over the last axis.

    sum_d log(q_std/p_std) + (p_std^2 + (p_mean - q_mean)^2) / (2 q_std^2) - 1/2, stds > 0.

    Gradient: to all four arguments.
    """
    ratio, shift = p_std / q_std, (p_mean - q_mean) / q_std
    return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)

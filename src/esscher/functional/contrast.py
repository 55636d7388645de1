"""A positive and a negative set of samples of a diffusion model, and losses that tell them apart.

Samples come two for each condition, "n 2"; a split is their places in the flat "2n", positive ones
in column 0 and negative ones in column 1, so that every sample stands in one of the two sets, once.

A model's implicit reward of a sample is how much better than a reference it explains that sample,
here at one noise level and with one draw of the noise:

    g = -(m - m_ref),   m = error of the model's estimate, averaged over components

Where a paper has m as a sum over components, its beta is ours divided by their number.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.functional.preferences import bradley_terry_terms


def implicit_reward(
    error: Float[Tensor, "*s"], ref_error: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """-(m - m_ref): above 0 where the model denoises a sample better than the reference.

    Source: Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908), eq. 14, at one noise level.
    Gradient: to error.
    """
    return ref_error.detach() - error


def diffusion_dpo_terms(reward: Float[Tensor, "b 2"], beta: float) -> Float[Tensor, "b"]:
    """Of each pair of a positive and a negative sample: -log sigma((beta / 2) (g+ - g-)).

    Args:
        reward: implicit rewards; both members at the same noise level and with the same noise.
        beta: > 0; the half is that of the authors' code.

    Source: Wallace et al. 2023 (arXiv 2311.12908), eq. 14; their train.py.
    Gradient: to reward; at equal ones -beta / 4 and beta / 4.
    Raises: ValueError if beta is not positive.
    """
    _check_beta(beta)
    return bradley_terry_terms(beta / 2 * (reward[:, 0] - reward[:, 1]))


def kto_baseline(reward: Float[Tensor, "b 2"]) -> Float[Tensor, ""]:
    """Q = max(mean of g over both sets, 0), what an implicit reward is compared with.

    Source: Li et al. 2024 (Diffusion-KTO, arXiv 2404.04465), sec. 4; their train_kto_sd_v1.5.py.
    Gradient: none.
    """
    return reward.detach().mean().clamp(min=0)


def diffusion_kto_terms(
    reward: Float[Tensor, "b 2"], beta: float, baseline: Float[Tensor, ""]
) -> Float[Tensor, "b 2"]:
    """Of each sample: 1 - sigma(s beta (g - Q)), s = 1 for positive and -1 for negative ones.

    Source: Li et al. 2024 (arXiv 2404.04465), sec. 4, Kahneman and Tversky's utility, weights 1.
    Gradient: to reward; at g = Q = 0 it is -beta / 4 and beta / 4.
    Raises: ValueError if beta is not positive.
    """
    _check_beta(beta)
    sign = reward.new_tensor([1.0, -1.0])
    return torch.sigmoid(-sign * beta * (reward - baseline.detach()))


def paired_split(reward: Float[Tensor, "n 2"]) -> Int[Tensor, "n 2"]:
    """The better and the worse sample of each pair; of two equal ones the first is the better."""
    return _split_of((reward[:, 1] > reward[:, 0]).long())


def halved_split(reward: Float[Tensor, "n 2"]) -> Int[Tensor, "n 2"]:
    """The better and the worse half of all samples together, of equal ones the earlier as better.

    A row is no pair: its two samples may have different conditions.
    """
    best_first = reward.flatten().argsort(descending=True, stable=True)
    return best_first.view(2, -1).T


def greedy_split(
    embedding: Float[Tensor, "n 2 e"],
    of_set: Callable[[Float[Tensor, "n e"]], float],
    order: Int[Tensor, "passes n"],
) -> Int[Tensor, "n 2"]:
    """A set of one sample a pair that is worth much together, and the set of what is left.

    It begins with the first sample of every pair; pair after pair its two samples change places if
    this raises what the positive set is worth. So that is never below the first samples' worth.

    Args:
        embedding: of both samples of each pair.
        of_set: what a set is worth, whatever its order.
        order: of the pairs, a permutation a pass; a pass without a swap is the last.

    Source: Bai et al. 2025 (DRAGON, arXiv 2504.15217), the positive and negative sets of rewards of
        sets.
    """
    member = [0] * len(embedding)
    positive = embedding[:, 0].clone()
    best = of_set(positive)
    for pairs in order.tolist():
        found = False
        for pair in pairs:
            positive[pair] = embedding[pair, 1 - member[pair]]
            worth = of_set(positive)
            if worth > best:
                best, found = worth, True
                member[pair] = 1 - member[pair]
            else:
                positive[pair] = embedding[pair, member[pair]]
        if not found:
            break
    return _split_of(torch.tensor(member, device=embedding.device))


def _split_of(member: Int[Tensor, "n"]) -> Int[Tensor, "n 2"]:
    """Of each pair the sample of this number, 0 or 1, is positive and the other negative."""
    first = 2 * torch.arange(len(member), device=member.device)
    return torch.stack([first + member, first + 1 - member], -1)


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}")

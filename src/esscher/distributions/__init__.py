"""Distributions that say what they can do: sample, score, reparameterise, name their mode."""

from esscher.distributions.capabilities import Density, HasEntropy, HasMode, Reparam, Samples
from esscher.distributions.categorical import Categorical
from esscher.distributions.normal import Normal, TanhNormal

__all__ = [
    "Categorical",
    "Density",
    "HasEntropy",
    "HasMode",
    "Normal",
    "Reparam",
    "Samples",
    "TanhNormal",
]

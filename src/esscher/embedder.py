"""A trained encoder of populations as its user wants it: sets in, vectors out, and samples back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from esscher.adapters.sets import checked_sets
from esscher.errors import UserError, require
from esscher.runtime.rng import mix
from esscher.types import SetSpec

AT_ONCE = 65_536
"""Samples that are embedded at once; one set is always whole."""


class Embedder:
    """Vectors of sets, and samples of vectors, all in the data's own units.

    Args:
        method: with `embed` and `draw`, for standardised samples.
        spec: of the samples.
    """

    def __init__(self, method: Any, spec: SetSpec):
        self.method, self.spec = method, spec

    def embed(
        self, sets: Sequence[ArrayLike] | ArrayLike, mask: ArrayLike | None = None
    ) -> Float[Tensor, "b l"]:
        """The vector of each set.

        Args:
            sets: a list of sets, (m, *shape) each, of whatever lengths; or one array (b, m, *shape).
            mask: of an array that is padded, (b, m): which samples are there.

        Raises:
            UserError: no sets, an empty one, one of a single sample or of other components than in
                training, values that are not finite, or sets of different lengths without a mask.
        """
        if mask is not None:
            there = np.asarray(mask, dtype=bool)
            padded = np.asarray(sets)
            if there.shape != padded.shape[:2]:
                raise UserError(
                    f"mask must have the shape {padded.shape[:2]} of sets and samples, got "
                    f"{there.shape}"
                )
            sets = [one[own] for one, own in zip(padded, there, strict=True)]
        arrays = checked_sets(sets, place="sets")
        if arrays[0].shape[1:] != self.spec.shape:
            raise UserError(
                f"sets have samples of shape {arrays[0].shape[1:]}, and this run learned from "
                f"{self.spec.shape}"
            )
        # Sets of one length go together, so that nothing is padded.
        lengths = [len(one) for one in arrays]
        vectors: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            places = [place for place, own in enumerate(lengths) if own == length]
            size = max(1, AT_ONCE // length)
            for start in range(0, len(places), size):
                part = places[start : start + size]
                x = self._flat([arrays[place] for place in part])
                vectors |= dict(zip(part, self.method.embed(x).cpu(), strict=True))
        return torch.stack([vectors[place] for place in range(len(arrays))])

    def classify(self, sets: Sequence[ArrayLike] | ArrayLike) -> Float[Tensor, "b c"]:
        """Probabilities of the classes `spec.classes` of each set's population.

        Raises:
            UserError: the run learned no classes, or as `embed` does.
        """
        if not self.method.cfg.class_weight:
            raise UserError("this run learned no classes: train it with --method.class-weight 1")
        return self.method.classify(self.embed(sets)).exp().cpu()

    def sample(
        self, z: Float[Tensor, "b l"], count: int, *, seed: int = 0
    ) -> Float[Tensor, "b n *s"]:
        """`count` samples of the distribution that each vector stands for.

        Args:
            z: vectors, of `embed` or `interpolate`.
            count: >= 1.
            seed: the samples of a vector depend on it and on the vector's place.
        """
        require("count", count, count >= 1, ">= 1")
        seeds = [mix(seed, number) for number in range(len(z))]
        drawn = self.spec.restored(self.method.draw(z, count, seeds).cpu())
        return drawn.reshape(len(z), count, *self.spec.shape)

    def interpolate(self, first: ArrayLike, second: ArrayLike, count: int) -> Float[Tensor, "n l"]:
        """Vectors on the straight line from that of one set to that of another, both ends included:
        what is drawn of them lies about on the path of optimal transport.

        Args:
            first: samples (m, *shape) of where the line begins.
            second: of where it ends.
            count: of vectors, >= 2.
        """
        require("count", count, count >= 2, ">= 2")
        begin, end = self.embed([first, second])
        return torch.lerp(begin, end, torch.linspace(0, 1, count).unsqueeze(-1))

    def distances(self, sets: Sequence[ArrayLike] | ArrayLike) -> Float[Tensor, "b b"]:
        """Euclidean distances of the vectors of all pairs of sets."""
        z = self.embed(sets)
        return torch.cdist(z, z)

    def _flat(self, arrays: Sequence[NDArray[Any]]) -> Float[Tensor, "b m d"]:
        """Standardised, in double precision first: large offsets keep their small differences."""
        x = torch.from_numpy(np.stack(arrays).astype(np.float64)).flatten(2)
        return self.spec.standardised(x).float()

"""Rewards of images that come with the library: of single images, and of whole sets.

Use them like your own, with what they are made of: `--reward esscher.image_rewards:ClassProbability
--image.reward-kwargs classifier my_module:my_classifier target 3`. See docs/rewards.md.

Images are "b c h w" in [0, 1], or whatever the model draws; rows are those of the data, one an image.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from esscher.adapters.imports import made, needed, users_own
from esscher.errors import UserError, require
from esscher.files import readable
from esscher.functional.sets import (
    frechet_distance_by_roots,
    gaussian_of,
    root_of,
    vendi_score,
    vendi_score_of_kernel,
)

Rows = Sequence[Mapping[str, Any]]


class ClassProbability:
    """log p(class | image), nats, of a classifier of yours.

    Args:
        classifier: module:function that takes images and returns logits "b classes", or that is
            called without arguments and returns such a function.
        target: the class; -1: that of each row's column `column`.
        column: see target.
    """

    def __init__(self, classifier: str, target: int = -1, column: str = "label"):
        self._classify = _made(classifier, "classifier")
        self._target, self._column = target, column

    def __call__(self, images: Float[Tensor, "b *s"], rows: Rows) -> Float[Tensor, "b"]:
        logits = self._classify(images)
        if logits.ndim != 2 or len(logits) != len(images):
            raise UserError(
                f"the classifier of ClassProbability must return logits of {len(images)} images, one "
                f"row each, got shape {tuple(logits.shape)}"
            )
        logp = logits.log_softmax(-1)
        wanted: list[Any] = [self._target] * len(rows)
        if self._target < 0:
            wanted = _column(rows, self._column, "ClassProbability")
        for target in wanted:
            fits = isinstance(target, int | np.integer) and bool(0 <= target < logp.shape[-1])
            require("class", target, fits, f"in [0, {logp.shape[-1]}), the classifier's")
        place = torch.tensor(wanted, device=logp.device).unsqueeze(-1)
        return logp.gather(-1, place).squeeze(-1)


class Compressibility:
    """Minus the size of an image as JPEG, in kilobytes.

    Args:
        quality: of the JPEG, in [1, 95].
        sign: 1, or -1 for images that are hard to compress.
    """

    def __init__(self, quality: int = 95, sign: int = 1):
        require("quality", quality, 1 <= quality <= 95, "in [1, 95]")
        require("sign", sign, sign in (1, -1), "1 or -1")
        self._quality, self._sign = quality, sign

    def __call__(self, images: Float[Tensor, "b c h w"], rows: Rows) -> Float[Tensor, "b"]:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                "Compressibility judges images of 1 or 3 channels, b c h w, and this model draws "
                f"{tuple(images.shape)}: give another reward"
            )
        pillow: Any = needed("PIL.Image", "Compressibility", "diffusion")
        sizes = []
        for image in (images.detach().cpu().numpy().clip(0, 1) * 255).round().astype(np.uint8):
            buffer = io.BytesIO()
            picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            pillow.fromarray(picture).save(buffer, "JPEG", quality=self._quality)
            sizes.append(buffer.tell() / 1000)
        return torch.tensor(sizes, device=images.device) * -self._sign


class EmbeddingSimilarity:
    """Cosine of an image's embedding and of what its row asks for.

    Args:
        embed: module:function, images -> vectors "b e".
        other: module:function, values of the column -> vectors "b e"; of an image and text model its
            text side.
        column: of the rows.
    """

    def __init__(self, embed: str, other: str, column: str = "prompt"):
        self._embed, self._other = _made(embed, "embed"), _made(other, "other")
        self._column = column

    def __call__(self, images: Float[Tensor, "b *s"], rows: Rows) -> Float[Tensor, "b"]:
        asked = self._other(_column(rows, self._column, "EmbeddingSimilarity"))
        return torch.cosine_similarity(self._embed(images), asked.to(images.device), dim=-1)


class Frechet:
    """Of a set: minus the Frechet distance of its embeddings to those of exemplars.

    Args:
        exemplars: module:function that returns samples as the model shows them, or FILE.npy of them;
            an array "n e" in a file is of embeddings already; FILE.npz has their mean "mu" and
            covariance "sigma", as tools for the Frechet inception distance save them.
        embed: module:function, images -> vectors "b e"; empty: their components.
    """

    def __init__(self, exemplars: str, embed: str = ""):
        self._embed = _made(embed, "embed") if embed else _components
        self._exemplars = _Exemplars(exemplars, self._embed)

    def embed(self, images: Float[Tensor, "b *s"], rows: Rows) -> Float[Tensor, "b e"]:
        return self._exemplars.comparable(self._embed(images))

    def of_set(self, embedding: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
        if len(embedding) < 2:
            raise UserError(f"a Frechet distance needs at least 2 samples, got {len(embedding)}")
        return -self._exemplars.distance(embedding)


class FrechetOfEach:
    """Of an image: minus the Frechet distance of its several embeddings (of its patches, or of the
    frames of a sound) to those of exemplars.

    With one embedding an image that is -(|e - mean|^2 + variance): how far it is from the middle.

    Args:
        exemplars: as those of `Frechet`.
        embed: module:function, images -> vectors "b f e", or "b e"; empty: their components.
    """

    def __init__(self, exemplars: str, embed: str = ""):
        self._embed = _made(embed, "embed") if embed else _components
        self._exemplars = _Exemplars(exemplars, self._embed)

    def __call__(self, images: Float[Tensor, "b *s"], rows: Rows) -> Float[Tensor, "b"]:
        found = self._exemplars.comparable(self._embed(images))
        return -self._exemplars.distance(found.unsqueeze(1) if found.ndim == 2 else found)


class Vendi:
    """Of a set: the effective number of different samples in it, by how alike their embeddings are.

    Args:
        embed: module:function, images -> vectors "b e"; empty: their components.
        bandwidth: 0: likeness is the cosine, which is near 1 for all pictures that are mostly of one
            brightness; > 0: exp(-distance^2 / (2 bandwidth^2)).
    """

    def __init__(self, embed: str = "", bandwidth: float = 0.0):
        require("bandwidth", bandwidth, 0 <= bandwidth < math.inf, ">= 0")
        self._embed = _made(embed, "embed") if embed else _components
        self._bandwidth = bandwidth

    def embed(self, images: Float[Tensor, "b *s"], rows: Rows) -> Float[Tensor, "b e"]:
        return self._embed(images)

    def of_set(self, embedding: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
        if len(embedding) < 2:
            raise UserError(f"a Vendi score needs at least 2 samples, got {len(embedding)}")
        if self._bandwidth == 0:
            return vendi_score(embedding)
        apart = torch.cdist(embedding.double(), embedding.double()) / self._bandwidth
        return vendi_score_of_kernel((-apart.square() / 2).exp())


# ---- for the small models of esscher.images


def nearness(samples: Float[Tensor, "b 2"], rows: Rows) -> Float[Tensor, "b"]:
    """Minus the distance of a point of the plane to (1, 0)."""
    return -(samples - torch.tensor([1.0, 0.0], device=samples.device)).norm(dim=-1)


def rising_modes(samples: Float[Tensor, "b 2"], rows: Rows) -> Float[Tensor, "b"]:
    """Log sum_i exp(0.6 i - |x - mean_i|^2 / (2 0.3^2)), of eight means on a circle of radius 4."""
    return _bumps(samples, 0.3)


def narrow_modes(samples: Float[Tensor, "b 2"], rows: Rows) -> Float[Tensor, "b"]:
    """The same with 0.05 in place of 0.3; at most 4.2."""
    return _bumps(samples, 0.05)


def _bumps(samples: Tensor, width: float) -> Tensor:
    number = torch.arange(8, device=samples.device)
    angle = number * (2 * math.pi / 8)
    means = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    distance = (samples.double().unsqueeze(1) - means).square().sum(-1)
    return (0.6 * number - distance / (2 * width**2)).logsumexp(-1).to(samples.dtype)


class _Exemplars:
    """The Gaussian of the embeddings of exemplars.

    Args:
        source: see `Frechet`.
        embed: images -> vectors.

    Raises:
        UserError: they cannot be read, are fewer than 2, or not finite.
    """

    def __init__(self, source: str, embed: Callable[[Tensor], Tensor]):
        told, found = f"exemplars {source}", None
        from_file = source.endswith((".npy", ".npz"))
        with readable(f"{told} cannot be read"):
            if from_file:
                found = np.load(source, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            self.mean, self.root = _statistics(found, told)
        else:
            samples = torch.as_tensor(made(source, "exemplars") if found is None else found).float()
            with torch.no_grad():
                embedded = samples if from_file and samples.ndim == 2 else embed(samples)
            embedded = embedded.flatten(0, -2)
            if len(embedded) < 2:
                raise UserError(f"{told} must be at least 2, got {len(embedded)}")
            self.mean, self.root = gaussian_of(embedded)
        if not bool(self.mean.isfinite().all() & self.root.isfinite().all()):
            raise UserError(f"{told} must be finite, and some are not")

    def comparable(self, found: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
        """Embeddings, if they have the exemplars' dimensions."""
        if found.shape[-1:] != self.mean.shape:
            raise UserError(
                f"images are embedded in {found.shape[-1]} dimensions and the exemplars in "
                f"{len(self.mean)}: give the same embedding for both"
            )
        return found

    def distance(self, embedding: Float[Tensor, "*b n e"]) -> Float[Tensor, "*b"]:
        """Frechet's, of a set or of several."""
        there = self.mean.to(embedding.device), self.root.to(embedding.device)
        return frechet_distance_by_roots(*gaussian_of(embedding), *there)


def _statistics(stored: Any, told: str) -> tuple[Tensor, Tensor]:
    """Mean and root of the covariance, of a file that holds "mu" and "sigma"."""
    if missing := {"mu", "sigma"} - set(stored.files):
        raise UserError(f"{told} must hold mu and sigma, and have no {min(missing)}")
    with readable(f"{told} cannot be read"):
        mean, covariance = (torch.as_tensor(stored[name]).double() for name in ("mu", "sigma"))
    try:
        root = root_of(covariance)
    except ValueError as error:
        raise UserError(f"{told}, sigma: {error}") from error
    if mean.shape != covariance.shape[:1]:
        raise UserError(
            f"{told}: mu must have the {len(covariance)} components of sigma, got shape "
            f"{tuple(mean.shape)}"
        )
    return mean, root


def _components(images: Float[Tensor, "b *s"]) -> Float[Tensor, "b e"]:
    return images.flatten(1)


def _column(rows: Rows, column: str, reward: str) -> list[Any]:
    missing = next((row for row in rows if column not in row), None)
    if missing is not None:
        raise UserError(
            f"{reward} reads the column {column} of the data, and a row has "
            f"{', '.join(map(str, missing)) or 'none'}: give --data FILE.jsonl with it, or "
            "--image.labels 0 1 2 for the column label, or --image.reward-kwargs column OTHER"
        )
    return [row[column] for row in rows]


def _made(source: str, what: str) -> Callable[..., Any]:
    """A function of tensors, or what such a function's maker returns."""
    found = users_own(source, what)
    if isinstance(found, torch.nn.Module):
        return found
    import inspect

    needs = [
        p
        for p in inspect.signature(found).parameters.values()
        if p.default is inspect.Parameter.empty
    ]
    return found if needs else found()

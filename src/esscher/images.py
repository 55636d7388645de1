"""Small diffusion models for trying things out: pipelines of real diffusers classes, untrained, and a
mixture of Gaussians in the plane that needs no training.

Use them like any other: `--model esscher.images:tiny_unet --model.kwargs size 8 classes 4`.
"""

import json
import math
import string
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.adapters.imports import needed
from esscher.distributions.diffusion import DiffusionModel
from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import require
from esscher.functional.diffusion import edm_scalings, karras_sigmas, over


def mixture(
    *,
    components: int = 8,
    radius: float = 1.0,
    std: float = 0.1,
    width: int = 64,
    depth: int = 2,
    classes: bool = False,
    weights: str = "",
) -> DiffusionModel:
    """Gaussians on a circle in the plane, as a network that knows them before any training.

    D(x, sigma, label) = E[x0 | x] + out F(in x, log(sigma) / 4, label), with F a network whose last
    layer begins at 0 and scalings as in EDM; so the first samples are exact, and training may move the
    model anywhere.

    Args:
        components: of the mixture, >= 1.
        radius: of the circle, > 0.
        std: of each component, > 0.
        width: of the hidden layers.
        depth: number of hidden layers, >= 1.
        classes: each component is a class, drawn by the column label; -1 is no class.
        weights: of the components, separated by commas; empty: all equal.
    """
    require("components", components, components >= 1, ">= 1")
    require("radius", radius, radius > 0, "> 0")
    require("std", std, std > 0, "> 0")
    parts = [float(part) for part in weights.split(",")] if weights else [1.0] * components
    positive = len(parts) == components and all(part > 0 for part in parts)
    require("weights", weights, positive, f"{components} positive numbers")
    require("depth", depth, depth >= 1, ">= 1")
    denoiser = MixtureNetwork(
        components, radius, std, [width] * depth, classes, torch.tensor(parts)
    )

    def levels(steps: int) -> Float[Tensor, "k"]:
        require("steps", steps, steps >= 1, ">= 1")
        high = torch.tensor([20 * radius], dtype=torch.float64)
        falling = high if steps == 1 else karras_sigmas(steps, std / 20, 20 * radius)
        return torch.cat([falling, high.new_zeros(1)])

    if not classes:
        return DiffusionModel(denoiser, [2], levels)
    null, columns = torch.tensor([-1]), ["label"]
    return DiffusionModel(denoiser, [2], levels, null=null, encode=denoiser.encode, columns=columns)


class MixtureNetwork(nn.Module):
    """See `mixture`."""

    def __init__(
        self,
        components: int,
        radius: float,
        std: float,
        hidden: Sequence[int],
        classes: bool,
        weights: Float[Tensor, "k"],
    ):
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)
        angle = torch.arange(components) * (2 * math.pi / components)
        means = radius * torch.stack([angle.cos(), angle.sin()], -1)
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("labels", torch.arange(components), persistent=False)
        self.std, self.classes = std, classes
        self.spread = math.sqrt(radius**2 / 2 + std**2)
        sizes, layers = [3 + components * classes, *hidden, 2], []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.network = nn.Sequential(*layers[:-1])
        last: Any = self.network[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    means: Tensor
    labels: Tensor
    weights: Tensor

    def encode(self, rows: Any) -> Int[Tensor, "b"]:
        """Class of each row."""
        labels = [row.get("label") for row in rows]
        for label in labels:
            whole = isinstance(label, int) and not isinstance(label, bool)
            inside = whole and -1 <= label < len(self.means)
            require("label", label, inside, f"a class from 0 to {len(self.means) - 1}, or -1")
        return torch.tensor(labels, device=self.means.device)

    def forward(
        self,
        x: Float[Tensor, "b d"],
        sigma: Float[Tensor, "b"],
        condition: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        mixture = GaussianMixture(self.means, self.std, self.weights, self.labels)
        exact = mixture(x, sigma, condition)
        _, out, scale, noise = edm_scalings(sigma, self.spread)
        features = [over(scale, x) * x, noise.unsqueeze(-1)]
        if self.classes:
            asked = x.new_zeros(len(x), len(self.means))
            if condition is not None:
                asked = (self.labels == condition.unsqueeze(-1)).to(x)
            features.append(asked)
        return exact + over(out, x) * self.network(torch.cat(features, -1))


def tiny_unet(
    *,
    size: int = 16,
    channels: int = 3,
    width: int = 32,
    classes: int = 0,
    prediction: str = "epsilon",
    train_steps: int = 1000,
) -> Any:
    """A DDPMPipeline with a U-Net of random weights, that draws images.

    Args:
        size: of an image, divisible by 2.
        channels: of an image.
        width: of the first block, a multiple of 8; the second is twice as wide, with attention.
        classes: drawn by the column label; one more class stands for none. 0: there are none.
        prediction: epsilon, sample, v_prediction, or flow for flow matching.
        train_steps: noise levels.
    """
    diffusers: Any = needed("diffusers", "a diffusion model", "diffusion")
    unet = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=classes + 1 if classes else None,
    )
    pipeline = diffusers.DDPMPipeline(unet, _scheduler(diffusers, prediction, train_steps))
    if classes:
        pipeline.null_class = classes
    return pipeline


def tiny_dit(
    *,
    size: int = 8,
    layers: int = 2,
    heads: int = 2,
    width: int = 32,
    classes: int = 10,
    train_steps: int = 1000,
) -> Any:
    """A DiTPipeline with random weights, that draws images of twice the latent's size by class.

    Args:
        size: of a latent, which has 4 channels; patches are 2 x 2.
        layers: of the transformer.
        heads: of attention; they divide the width.
        width: of the transformer.
        classes: drawn by the column label; one more class stands for none.
        train_steps: noise levels.
    """
    diffusers: Any = needed("diffusers", "a diffusion model", "diffusion")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        norm_num_groups=8,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=train_steps, clip_sample=False)
    return diffusers.DiTPipeline(transformer, _autoencoder(diffusers, size), scheduler)


def tiny_stable_diffusion(
    *, size: int = 8, width: int = 32, context: int = 16, train_steps: int = 1000
) -> Any:
    """A StableDiffusionPipeline with random weights, that draws images of twice the latent's size by
    the column prompt, lower-case letters, digits and a little punctuation.

    Args:
        size: of a latent, which has 4 channels; divisible by 2.
        width: of the first block, a multiple of 8; the second is twice as wide, with attention.
        context: tokens of a prompt, its ends included.
        train_steps: noise levels.
    """
    diffusers: Any = needed("diffusers", "a diffusion model", "diffusion")
    transformers: Any = needed("transformers", "a text encoder", "diffusion")
    tokenizer = _letters(transformers, context)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=train_steps,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=_autoencoder(diffusers, size),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _scheduler(diffusers: Any, prediction: str, train_steps: int) -> Any:
    if prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_steps)
    return diffusers.DDPMScheduler(
        num_train_timesteps=train_steps, clip_sample=False, prediction_type=prediction
    )


def _autoencoder(diffusers: Any, size: int) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(
        **blocks,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=2 * size,
    )


def _letters(transformers: Any, context: int) -> Any:
    """A CLIP tokenizer whose tokens are single characters."""
    letters = [*string.ascii_lowercase, *string.digits, *".,!?'-"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context,
            "bos_token": tokens[0],
            "eos_token": tokens[1],
            "unk_token": tokens[1],
            "pad_token": tokens[1],
        }
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return transformers.CLIPTokenizer.from_pretrained(folder)

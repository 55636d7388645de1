"""Small diffusion models for trying things out: pipelines of real diffusers classes, and
mixtures of Gaussians that need no training.

Use them like any other: `--model esscher.images:tiny_unet --model.kwargs size 8 classes 4`.
"""

import copy
import functools
import json
import math
import string
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.adapters.imports import needed
from esscher.distributions.diffusion import DiffusionModel
from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError, require
from esscher.functional.diffusion import (
    BetaSchedule,
    alpha_bars,
    edm_scalings,
    karras_sigmas,
    over,
    sampling_timesteps,
    sigma_of_alpha_bar,
)
from esscher.runtime.rng import Phase, seed_phase


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
        self.register_buffer("means", radius * _circle(components), persistent=False)
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
        return _classes_of(rows, len(self.means))

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


def exact_mixture(
    *,
    dimensions: int = 2,
    components: int = 8,
    classes: int = 0,
    radius: float = 0.0,
    spread: float = 6.0,
    std: float = 1.0,
    schedule: str = "linear",
    beta_start: float = 0.001,
    beta_end: float = 0.07,
    train_steps: int = 100,
) -> DiffusionModel:
    """A mixture of Gaussians with its exact denoiser and the noise levels of a DDPM; nothing to train.

    Args:
        dimensions: of a sample, >= 1.
        components: of the mixture, or of each class.
        classes: drawn by the column label, -1 is no class; 0: there are none.
        radius: of a circle in the plane that the means lie on; 0: they are drawn, once a run.
        spread: standard deviation of means that are drawn, > 0.
        std: of each component, > 0.
        schedule: linear, scaled_linear or squaredcos_cap_v2.
        beta_start, beta_end: of the schedule.
        train_steps: of the schedule, >= 1.
    """
    require("components", components, components >= 1, ">= 1")
    require("radius", radius, radius == 0 or dimensions == 2, "0 except in the plane")
    schedules = get_args(BetaSchedule)
    if schedule not in schedules:
        raise UserError(f"schedule must be one of {', '.join(schedules)}, got {schedule!r}")
    count = components * max(classes, 1)
    means = radius * _circle(count) if radius else spread * torch.randn(count, dimensions)
    labels = torch.arange(count) // components if classes else None
    kind: Any = schedule
    table = sigma_of_alpha_bar(alpha_bars(kind, train_steps, beta_start, beta_end))

    def levels(steps: int) -> Float[Tensor, "k"]:
        chosen = sampling_timesteps(train_steps, steps, "trailing").long()
        return torch.cat([table[chosen], table.new_zeros(1)])

    denoiser: Any = GaussianMixture(means, std, labels=labels)
    if not classes:
        return DiffusionModel(denoiser, [dimensions], levels, most_steps=train_steps)

    def encode(rows: Any) -> Int[Tensor, "b"]:
        return _classes_of(rows, classes)

    null, columns = torch.tensor([-1]), ["label"]
    return DiffusionModel(
        denoiser,
        [dimensions],
        levels,
        null=null,
        encode=encode,
        columns=columns,
        most_steps=train_steps,
    )


def _circle(count: int) -> Float[Tensor, "k 2"]:
    angle = torch.arange(count) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], -1)


def _classes_of(rows: Any, count: int) -> Int[Tensor, "b"]:
    labels = [row.get("label") for row in rows]
    for label in labels:
        whole = isinstance(label, int) and not isinstance(label, bool)
        require(
            "label", label, whole and -1 <= label < count, f"a class from 0 to {count - 1}, or -1"
        )
    return torch.tensor(labels)


def digits_unet(*, updates: int = 600, width: int = 16) -> Any:
    """A pipeline that draws handwritten digits of 8 x 8 by class, trained as it is made: two minutes.

    Args:
        updates: of denoising diffusion with 128 images each, >= 1.
        width: of the first block, a multiple of 8.
    """
    require("updates", updates, updates >= 1, ">= 1")
    return copy.deepcopy(_trained_digits(updates, width))


@functools.cache
def _trained_digits(updates: int, width: int) -> Any:
    from esscher.datasets import digits

    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        seed_phase(0, 0, Phase.INITIALISE)  # One model, whatever the run's seed.
        pipeline = tiny_unet(size=8, channels=1, width=width, classes=10)
        # Proofs compare what the network itself says with and without guidance.
        pipeline.scheduler.register_to_config(clip_sample=False)
        data = digits()
        images = 2 * torch.from_numpy(data["image"]).unsqueeze(1) - 1
        labels = torch.from_numpy(data["label"])
        table = pipeline.scheduler.alphas_cumprod
        unet = pipeline.unet.train()
        optimiser = torch.optim.Adam(unet.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
        for _ in range(updates):
            rows = torch.randint(len(images), (128,))
            step = torch.randint(len(table), (128,))
            kept, noise = table[step].view(-1, 1, 1, 1), torch.randn(128, 1, 8, 8)
            told = torch.where(torch.rand(128) < 0.15, 10, labels[rows])
            noisy = kept.sqrt() * images[rows] + (1 - kept).sqrt() * noise
            loss = (unet(noisy, step, told).sample - noise).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        unet.eval()
    return pipeline


def digits_classifier() -> nn.Module:
    """A network that tells handwritten digits of 8 x 8 apart, trained as it is made: two seconds.

    It takes images in [0, 1] and returns logits; about 98 in 100 digits that it has not seen are right.
    """
    return _digits_classifier(seed=0, width=64)


def digits_judge() -> nn.Module:
    """Another one, of another shape and on other images, for judging what the first has been a reward
    of.
    """
    return _digits_classifier(seed=1, width=96)


def _digits_classifier(seed: int, width: int) -> nn.Module:
    from esscher.datasets import digits

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        seed_phase(seed, 0, Phase.INITIALISE)
        data = digits()
        images = torch.from_numpy(data["image"]).unsqueeze(1)
        labels = torch.from_numpy(data["label"])
        network = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, width // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(8 * width, width),
            nn.SiLU(),
            nn.Linear(width, 10),
        )
        # One half of the images each: a judge must not have learned the same mistakes.
        own = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).chunk(2)[seed]
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(400):
            rows = own[torch.randint(len(own), (128,))]
            noisy = images[rows] + 0.1 * torch.randn(128, 1, 8, 8)
            loss = nn.functional.cross_entropy(network(noisy), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval().requires_grad_(False)


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


def tiny_pixel_dit(
    *,
    size: int = 8,
    channels: int = 1,
    layers: int = 4,
    heads: int = 4,
    width: int = 64,
    classes: int = 10,
    prediction: str = "epsilon",
    train_steps: int = 1000,
) -> Any:
    """A transformer with random weights that draws images themselves by class: a DiTPipeline without
    an autoencoder. Its folders are read here as any, and by DiTPipeline.from_pretrained(FOLDER,
    vae=None), of which the transformer and the scheduler serve: its own call wants an autoencoder.

    Args:
        size: of an image, divisible by 2; patches are 2 x 2.
        channels: of an image.
        layers: of the transformer.
        heads: of attention; they divide the width.
        width: of the transformer.
        classes: drawn by the column label; one more class stands for none.
        prediction: epsilon, sample, v_prediction, or flow for flow matching.
        train_steps: noise levels.
    """
    diffusers: Any = needed("diffusers", "a diffusion model", "diffusion")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    scheduler = _scheduler(diffusers, prediction, train_steps)
    return diffusers.DiTPipeline(transformer, None, scheduler)


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
    return diffusers.DDPMScheduler(num_train_timesteps=train_steps, prediction_type=prediction)


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

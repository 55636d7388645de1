"""A vision-language model of the transformers library as a backbone: what cameras and instructions say,
and the hidden states of whatever stands behind it, under any attention mask.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from esscher.errors import UserError
from esscher.types import RobotSpec, Scenes

REFUSED = (
    "cannot carry actions: it needs get_image_features and a language model that takes inputs_embeds "
    "with an attention mask of its own (llava, paligemma and smolvlm do)"
)


class VisionLanguage(nn.Module):
    """Scenes to embeddings, and embeddings to hidden states.

    Dropout is switched off, also in training.

    Args:
        model: an AutoModelForImageTextToText, or one with adapters of peft around it.
        image_mean: of the colours, of images in [0, 1].
        image_std: likewise, > 0.

    Raises:
        UserError: the model has no such parts, or attends to earlier tokens only, whatever the mask.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.model: Any = model
        device = next(model.parameters()).device
        for name, values in (("mean", image_mean), ("std", image_std)):
            buffer = torch.tensor(tuple(values), device=device).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._check()

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns that the vision tower wants."""
        size = self._whole.config.vision_config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def context_length(self) -> int | None:
        """Most tokens of images, instruction and actions together; None where there is no limit."""
        return getattr(self.language.config, "max_position_embeddings", None)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimiser moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def language(self) -> Any:
        """The language model, without its output matrix."""
        inner = getattr(self._whole, "model", self._whole)
        return getattr(inner, "language_model", None) or getattr(inner, "text_model", None)

    @property
    def _whole(self) -> Any:
        """The model without what peft wraps around it; its adapters, which lie inside, stay."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def context(self, scenes: Scenes) -> tuple[Float[Tensor, "n t d"], Bool[Tensor, "n t"]]:
        """Embeddings of the images of every camera and of the instruction behind them, and what of
        them is no padding.

        Raises:
            UserError: images are not of whole numbers from 0 to 255.

        Gradient: to the model's parameters.
        """
        count = len(scenes)
        features = self.image_features(scenes.images.flatten(0, 1))
        features = features.view(count, -1, self.hidden_size)
        words = self._whole.get_input_embeddings()(scenes.instruction)
        there = scenes.instruction_mask.new_ones(features.shape[:2])
        mask = torch.cat([there, scenes.instruction_mask], 1)
        return torch.cat([features, words.to(features.dtype)], 1), mask

    def image_features(self, images: UInt8[Tensor, "m h w 3"]) -> Float[Tensor, "m f d"]:
        """Embeddings of images, resized to what the model wants where they are of another size.

        Raises:
            UserError: images are not of whole numbers from 0 to 255.

        Gradient: to the model's parameters.
        """
        if images.dtype != torch.uint8:
            kind = str(images.dtype).removeprefix("torch.")
            raise UserError(f"images must be uint8, 0 to 255, got {kind}")
        pixels = images.movedim(-1, 1).float() / 255
        if tuple(pixels.shape[-2:]) != self.image_size:
            pixels = interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        pixels = ((pixels - self.mean) / self.std).to(self.language.dtype)
        if self._whole.config.model_type in ("idefics3", "smolvlm"):
            pixels = pixels.unsqueeze(1)  # Several images a row of text: here one.
        found = self._whole.get_image_features(pixels)
        found = getattr(found, "pooler_output", found)
        return found if isinstance(found, Tensor) else torch.stack(list(found))

    def hidden(
        self,
        embeddings: Float[Tensor, "n t d"],
        attention: Bool[Tensor, "n t s"],
        positions: Int[Tensor, "n t"],
        cache: Any = None,
    ) -> Float[Tensor, "n t d"]:
        """Last hidden states.

        Args:
            embeddings: of all tokens, or of those behind the cached ones.
            attention: which tokens each one sees, the s - t cached ones first; at least one.
            positions: of the tokens, counted from 0.
            cache: of `extended`, which stays as it is.

        Gradient: to the model's parameters and to the embeddings.
        """
        states, _ = self._pass(embeddings, attention, positions, cache, use_cache=cache is not None)
        if cache is not None:
            cache.crop(-embeddings.shape[1])
        return states

    def extended(
        self,
        embeddings: Float[Tensor, "n t d"],
        attention: Bool[Tensor, "n t s"],
        positions: Int[Tensor, "n t"],
        cache: Any = None,
    ) -> tuple[Float[Tensor, "n t d"], Any]:
        """Last hidden states as of `hidden`, and the cache with keys and values of these tokens.

        Args:
            cache: to be extended, in place; None: a new one.
        """
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache()
        return self._pass(embeddings, attention, positions, cache, use_cache=True)

    def _pass(
        self,
        embeddings: Tensor,
        attention: Tensor,
        positions: Tensor,
        cache: Any,
        use_cache: bool,
    ) -> tuple[Tensor, Any]:
        kind = self.language.dtype
        # Whole numbers would be taken for padding; four dimensions are taken as they are.
        seen = torch.zeros(attention.shape, dtype=kind, device=attention.device)
        seen = seen.masked_fill(~attention, torch.finfo(kind).min).unsqueeze(1)
        taken = inspect.signature(self.language.forward).parameters
        # transformers has renamed it.
        name = "cache" if "cache" in taken else "past_key_values"
        output = self.language(
            inputs_embeds=embeddings.to(kind),
            attention_mask=seen,
            position_ids=positions,
            use_cache=use_cache,
            **{name: cache},
        )
        return output.last_hidden_state.float(), cache

    @torch.no_grad()
    def _check(self) -> None:
        """Draws from no generator of torch's."""
        name = type(self._whole).__name__
        if not hasattr(self._whole, "get_image_features") or self.language is None:
            raise UserError(f"{name} {REFUSED}")
        training = self.model.training
        self.model.eval()
        try:
            device = self.language.get_input_embeddings().weight.device
            wave = torch.linspace(0, 20, 3 * self.hidden_size, device=device).sin()
            tokens = wave.view(1, 3, -1)
            other = torch.cat([tokens[:, :2], -tokens[:, 2:]], 1)
            everything = torch.ones(1, 3, 3, dtype=torch.bool, device=device)
            positions = torch.arange(3, device=device).unsqueeze(0)
            here, there = (self.hidden(x, everything, positions) for x in (tokens, other))
            black = torch.zeros(1, *self.image_size, 3, dtype=torch.uint8, device=device)
            self.image_tokens = self.image_features(black).shape[1]
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"{name} {REFUSED}") from error
        finally:
            self.model.train(training)
        if torch.allclose(here[:, 0], there[:, 0], atol=1e-7):
            raise UserError(
                f"{name} attends to earlier tokens only, whatever the mask, so actions could not be "
                "decoded in parallel: take a model with attention (llava, paligemma, smolvlm)"
            )


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """What a method with a vision-language model has to know of its task."""

    robot: RobotSpec
    model: VisionLanguage
    """To be trained."""
    instruction: tuple[Tensor, Tensor]
    """Tokens of each of the data's instructions "i l", padded on the right, and what is no padding."""
    tokenizer: Any
    """Of the transformers library, or a processor with one."""
    num_agents: int = 1

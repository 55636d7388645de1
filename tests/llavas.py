"""Tiny vision-language models of real classes, which several tests share."""

from typing import Any

import torch
from torch import nn

from esscher.adapters.vision_language import instruction_tokens
from esscher.distributions.vision_language import VisionLanguage, VisionSpec
from esscher.models import tiny_llava
from esscher.types import RobotSpec, Scenes
from llamas import shaken

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llava(**changes: Any) -> tuple[Any, Any]:
    """Random weights, far from uniform, so that mistakes show; its processor."""
    torch.manual_seed(0)
    settings = {"width": 16, "heads": 2, "image_size": 8, "patch_size": 4, "words": "go home now"}
    model, processor = tiny_llava(**(settings | changes))
    shaken(model.parameters(), 0.2)
    return model, processor


def paligemma() -> nn.Module:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=16),
        text_config=GemmaConfig(**TEXT, head_dim=8),
        projection_dim=16,
        image_token_index=19,
    )
    return PaliGemmaForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        scale_factor=2,
        image_token_id=19,
        pad_token_id=0,
    )
    return SmolVLMForConditionalGeneration(config)


def robot(cameras: int = 1, action_dim: int = 2, state_dim: int = 3) -> RobotSpec:
    return RobotSpec(
        cameras=tuple(f"camera {k}" for k in range(cameras)),
        image_size=(8, 8),
        state_dim=state_dim,
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        instructions=("go home now", "go"),
        tasks=("", ""),
    )


def vision_spec(model: Any = None, of: RobotSpec | None = None, **changes: Any) -> VisionSpec:
    """Around a tiny Llava, or a model with its processor."""
    model, processor = llava(**changes) if model is None else model
    of = robot() if of is None else of
    tokens = instruction_tokens(processor, of.instructions, None)
    return VisionSpec(
        robot=of, model=VisionLanguage(model), instruction=tokens, tokenizer=processor
    )


def scenes(spec: VisionSpec, count: int = 3, seed: int = 0) -> Scenes:
    """Random ones; instructions in turn."""
    draw, of = torch.Generator().manual_seed(seed), spec.robot
    tokens, mask = spec.instruction
    which = torch.arange(count) % len(tokens)
    shape = (count, len(of.cameras), *of.image_size, 3)
    return Scenes(
        images=torch.randint(256, shape, generator=draw, dtype=torch.uint8),
        state=torch.randn(count, of.state_dim, generator=draw),
        instruction=tokens[which],
        instruction_mask=mask[which],
    )

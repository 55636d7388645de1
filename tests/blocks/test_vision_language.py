"""Vision-language models as backbones: against transformers' own passes, and masks that hold."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llavas
from esscher.distributions.vision_language import VisionLanguage
from esscher.errors import UserError

EVERY = {
    "llava": lambda: llavas.llava()[0],
    "paligemma": llavas.paligemma,
    "smolvlm": llavas.smolvlm,
}


def embeddings(count: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(count, length, 16, generator=torch.Generator().manual_seed(1))


def positions(count: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(count, -1)


def seen(count: int, length: int) -> torch.Tensor:
    return torch.ones(count, length, length, dtype=torch.bool)


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_the_mask_of_the_model_itself_gives_its_own_states(kind: str) -> None:
    """Causal, but PaliGemma's, where all tokens of the prompt see each other."""
    model = EVERY[kind]().eval()
    backbone, x = VisionLanguage(model), embeddings()
    own = seen(2, 5) if kind == "paligemma" else seen(2, 5).tril()
    ours = backbone.hidden(x, own, positions(2, 5))
    inner = model.model
    language = inner.text_model if kind == "smolvlm" else inner.language_model
    theirs = language(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_the_mask_alone_decides_who_sees_whom(kind: str) -> None:
    backbone, x = VisionLanguage(EVERY[kind]().eval()), embeddings(1)
    changed = x.clone()
    changed[:, 3] += 1.0
    all_see = seen(1, 5)
    one, two = (backbone.hidden(y, all_see, positions(1, 5)) for y in (x, changed))
    assert ((one - two).abs().amax(-1) > 1e-4).all(), "what comes later must be seen before"
    unseen = all_see.clone()
    unseen[:, :3, 3] = unseen[:, 4, 3] = False
    # Those that see 3 see it for themselves alone: others would carry the news in a second layer.
    unseen[:, 3] = False
    unseen[:, 3, 3] = True
    one, two = (backbone.hidden(y, unseen, positions(1, 5)) for y in (x, changed))
    others = [0, 1, 2, 4]
    torch.testing.assert_close(one[:, others], two[:, others])
    assert (one[:, 3] - two[:, 3]).abs().max() > 1e-4


@torch.no_grad()
def test_a_cache_changes_nothing_and_stays_as_it_is() -> None:
    backbone, x = VisionLanguage(llavas.llava()[0].eval()), embeddings(length=6)
    mask = seen(2, 6)
    mask[:, :4, 4:] = False
    mask[1, :, 1] = False
    whole = backbone.hidden(x, mask, positions(2, 6))
    first, cache = backbone.extended(x[:, :4], mask[:, :4, :4], positions(2, 4))
    torch.testing.assert_close(first, whole[:, :4], rtol=1e-4, atol=1e-5)
    for _ in range(2):
        rest = backbone.hidden(x[:, 4:], mask[:, 4:], positions(2, 6)[:, 4:], cache)
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)
    one, cache = backbone.extended(x[:, 4:5], mask[:, 4:5, :5], positions(2, 6)[:, 4:5], cache)
    two, _ = backbone.extended(x[:, 5:], mask[:, 5:], positions(2, 6)[:, 5:], cache)
    lower = mask.clone()
    lower[:, 4, 5] = False
    torch.testing.assert_close(
        torch.cat([one, two], 1),
        backbone.hidden(x, lower, positions(2, 6))[:, 4:],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_context_is_images_and_then_the_instruction(kind: str) -> None:
    model, spec = EVERY[kind]().eval(), llavas.vision_spec(of=llavas.robot(cameras=2))
    backbone, scenes = VisionLanguage(model), llavas.scenes(spec, 2)
    found, mask = backbone.context(scenes)
    per_image = {"llava": 4, "paligemma": 4, "smolvlm": 1}[kind]
    assert backbone.image_tokens == per_image
    assert found.shape == (2, 2 * per_image + 3, 16)
    assert mask.tolist() == [
        [True] * (2 * per_image) + row for row in ([True] * 3, [True, False, False])
    ]
    words = model.get_input_embeddings()(scenes.instruction)
    torch.testing.assert_close(found[:, 2 * per_image :], words)
    second = backbone.image_features(scenes.images[:, 1])
    torch.testing.assert_close(found[:, per_image : 2 * per_image], second, rtol=1e-4, atol=1e-5)
    assert (second - found[:, :per_image]).abs().max() > 1e-3


@torch.no_grad()
def test_images_are_normalised_as_the_processor_has_it() -> None:
    model, processor = llavas.llava()
    model.eval()
    processor.image_processor.image_mean = [0.3, 0.4, 0.5]
    processor.image_processor.image_std = [0.2, 0.3, 0.4]
    backbone = VisionLanguage(model, image_mean=(0.3, 0.4, 0.5), image_std=(0.2, 0.3, 0.4))
    images = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    given = processor.image_processor(list(images.numpy()), return_tensors="pt").pixel_values
    theirs = torch.stack(list(model.get_image_features(given).pooler_output))
    torch.testing.assert_close(backbone.image_features(images), theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_sizes_are_resized_as_pillow_does() -> None:
    backbone = VisionLanguage(llavas.llava()[0].eval())
    large = torch.randint(256, (1, 24, 12, 3), dtype=torch.uint8)
    small = Image.fromarray(large[0].numpy()).resize((8, 8), Image.Resampling.BILINEAR)
    theirs = torch.from_numpy(np.array(small)).unsqueeze(0)
    found, wanted = (backbone.image_features(x) for x in (large, theirs))
    # Pillow rounds to whole numbers.
    size = (found - wanted).abs().max()
    assert size < 0.1 * wanted.abs().max()
    other = backbone.image_features(theirs.flip(1))
    assert (found - other).abs().max() > 5 * size


@pytest.mark.usefixtures("unchecked")
def test_images_of_another_kind_are_refused() -> None:
    backbone = VisionLanguage(llavas.llava()[0])
    with pytest.raises(UserError, match="images must be uint8, 0 to 255, got float32"):
        backbone.image_features(torch.rand(1, 8, 8, 3))


def test_what_cannot_carry_actions_is_refused() -> None:
    import transformers

    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llavas.TEXT))
    with pytest.raises(
        UserError, match="LlamaForCausalLM cannot carry actions: it needs get_image"
    ):
        VisionLanguage(text)
    model: Any = llavas.llava()[0]
    inner = model.model.language_model
    forward = inner.forward

    @functools.wraps(forward)
    def causal(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    inner.forward = causal
    with pytest.raises(UserError, match="earlier tokens only, whatever the mask"):
        VisionLanguage(model)


def test_making_one_leaves_torchs_generator_and_the_mode_alone() -> None:
    model = llavas.llava()[0].train()
    before = torch.get_rng_state()
    VisionLanguage(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training

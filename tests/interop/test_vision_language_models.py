"""Vision-language models from folders and back, through transformers itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llavas
from esscher.adapters.vision_language import (
    instruction_tokens,
    load_vision_language,
    save_vision_language,
)
from esscher.distributions.vision_language import VisionLanguage
from esscher.errors import UserError
from esscher.experiment import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model, processor = llavas.llava()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return save_vision_language(VisionLanguage(model), processor, tmp_path / "base")


def states(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_a_saved_folder_is_one_of_transformers_own(base: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    opened = AutoModelForImageTextToText.from_pretrained(base).eval()
    assert type(opened).__name__ == "LlavaForConditionalGeneration"
    torch.testing.assert_close(states(opened), states(llavas.llava()[0].eval()))
    assert AutoProcessor.from_pretrained(base).tokenizer("go home").input_ids == [4, 5]
    backbone, processor = load_vision_language(ModelConfig(source=str(base)), CPU)
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert backbone.image_size == (8, 8) and backbone.image_tokens == 4
    assert all(p.requires_grad and p.dtype == torch.float32 for p in backbone.parameters())
    assert processor.tokenizer("go home").input_ids == [4, 5]
    assert [p.name for p in base.parent.iterdir()] == ["base"], "nothing half written is left"


def test_adapters_are_saved_alone_and_opened_on_their_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    config = ModelConfig(source=str(base), lora_rank=2, dtype="bfloat16")
    backbone, processor = load_vision_language(config, CPU)
    kinds = {p.requires_grad: p.dtype for p in backbone.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    names = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in names), part
    torch.manual_seed(0)
    llavas.shaken([p for p in backbone.parameters() if p.requires_grad], 0.5)
    folder = save_vision_language(backbone, processor, tmp_path / "adapters")
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    opened = AutoModelForImageTextToText.from_pretrained(folder).eval().float()
    backbone.model.float().eval()
    torch.testing.assert_close(states(opened), states(backbone.model), rtol=0, atol=0.05)
    # The base is rounded to bfloat16 in ours and not in theirs.
    plain = AutoModelForImageTextToText.from_pretrained(base).eval()
    assert (states(plain) - states(opened)).abs().max() > 0.1


def test_recomputed_activations_give_the_same_gradients(base: Path) -> None:
    found = []
    for recomputed in (False, True):
        config = ModelConfig(source=str(base), gradient_checkpointing=recomputed)
        backbone, _ = load_vision_language(config, CPU)
        scenes = llavas.scenes(llavas.vision_spec(), 2)
        x, mask = backbone.context(scenes)
        everything = mask.unsqueeze(1).expand(-1, mask.shape[1], -1)
        positions = torch.arange(mask.shape[1]).expand(2, -1)
        backbone.hidden(x, everything, positions).square().sum().backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_an_output_matrix_of_its_own_is_not_trained(tmp_path: Path) -> None:
    model, processor = llavas.llava()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    folder = save_vision_language(VisionLanguage(model), processor, tmp_path / "untied")
    backbone, _ = load_vision_language(ModelConfig(source=str(folder)), CPU)
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen == ["model.lm_head.weight"]


def test_instructions_are_padded_on_the_right() -> None:
    _, processor = llavas.llava()
    for reader in (processor, processor.tokenizer):
        tokens, mask = instruction_tokens(reader, ["go", "go home now", "go away"], 3)
        assert tokens.tolist() == [[4, 0, 0], [4, 5, 6], [4, 3, 0]]
        assert mask.tolist() == [[True, False, False], [True] * 3, [True, True, False]]


def test_what_cannot_be_used_is_refused(base: Path, tmp_path: Path) -> None:
    _, processor = llavas.llava()
    with pytest.raises(
        UserError, match=r"'go home now' has 3 tokens, and the .* room for 2: shorten"
    ):
        instruction_tokens(processor, ["go", "go home now"], 2)
    with pytest.raises(UserError, match="instruction '' has no tokens"):
        instruction_tokens(processor, [""], 2)
    with pytest.raises(UserError, match="there is no such folder"):
        load_vision_language(ModelConfig(source=str(tmp_path / "missing")), CPU)
    (base / "processor_config.json").unlink()
    with pytest.raises(UserError, match="--model .*base"):
        load_vision_language(ModelConfig(source=str(base)), CPU)
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_vision_language(ModelConfig(source=str(base)), CPU)

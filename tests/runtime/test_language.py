"""Runs of language models: what they leave, resume exactly, and refuse before they start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import esscher
from esscher.adapters.models import load_model
from esscher.errors import UserError
from esscher.experiment import ModelConfig, TextConfig
from esscher.models import byte_tokenizer, tiny_llama
from esscher.samplers.decoding import Decoding
from support import assert_same_run, metrics, smoke, train, train_until

CPU = torch.device("cpu")


def pairs(folder: Path, count: int = 12) -> Path:
    path = folder / "prefs.jsonl"
    rows = [{"prompt": f"{k}+1=", "chosen": str(k + 1), "rejected": "no"} for k in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def f_dpo(**stage: Any) -> esscher.Experiment:
    experiment = smoke("f_dpo")
    return replace(experiment, stages=(replace(experiment.stages[-1], **stage),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, as users have them."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    model, tokenizer = tiny_llama()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ---- models


def test_a_folder_is_read_and_its_weights_are_trained_in_float32(folder: Path) -> None:
    model, tokenizer = load_model(ModelConfig(source=str(folder)), CPU)
    assert len(tokenizer) == 259 and model.pad_token == 0 and model.end_tokens == (2,)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.trained} == {torch.float32}
    assert len(model.trained) == len(list(expected.parameters()))


def test_adapters_train_alone_on_frozen_weights(folder: Path) -> None:
    config = ModelConfig(source=str(folder), lora_rank=3, dtype="bfloat16")
    model, _ = load_model(config, CPU)
    # Seven linear layers in each of two blocks: rank x (into + out) weights each.
    attention, feed_forward = 4 * 3 * (64 + 64), 3 * 3 * (64 + 256)
    assert sum(p.numel() for p in model.trained) == 2 * (attention + feed_forward)
    assert {p.dtype for p in model.trained} == {torch.float32}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert len(model.state_dict()) == len(model.trained)
    twin = model.frozen()
    with torch.no_grad():
        for parameter in model.trained:
            parameter.add_(0.05)
    tokens = torch.arange(3, 13).unsqueeze(0)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    original, _ = load_model(ModelConfig(source=str(folder), dtype="bfloat16", lora_rank=3), CPU)
    where = (tokens, everything, everything)
    assert torch.equal(twin.log_prob(*where), original.log_prob(*where))
    assert not torch.equal(model.log_prob(*where), original.log_prob(*where))
    assert not twin.log_prob(*where).requires_grad


def test_recomputed_activations_change_neither_gradient_nor_writing(folder: Path) -> None:
    tokens = torch.arange(3, 23).view(2, 10)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    found = []
    for checkpointing in (False, True):
        config = ModelConfig(source=str(folder), gradient_checkpointing=checkpointing)
        model, _ = load_model(config, CPU)
        loss = model.log_prob(tokens, everything, everything).sum()
        gradients = torch.autograd.grad(loss, model.trained)
        written = model.generate(tokens, everything, [1, 2], Decoding(max_new_tokens=6))
        assert model.model.training
        found.append((gradients, written.tokens))
    (left, wrote), (right, wrote_too) = found
    for one, two in zip(left, right, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(wrote, wrote_too)


def test_models_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(source: Any, said: str) -> None:
        with pytest.raises(UserError, match=said):
            load_model(ModelConfig(source=str(source)), CPU)

    refused(tmp_path / "nowhere", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot be read")
    refused("esscher.models:missing", "cannot be imported")
    larger = tmp_path / "larger"
    shutil.copytree(folder, larger)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(larger)
    refused(larger, "the tokenizer has 261 tokens and the model 259: they do not belong together")
    endless = tmp_path / "endless"
    shutil.copytree(folder, endless)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    refused(endless, "the tokenizer has no end token")
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    model, _ = tiny_llama()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    refused(pickled, "cannot be read")


def test_without_a_pad_token_padding_is_masked_all_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").unlink()
    tokenizer.save_pretrained(tmp_path / "model")
    model, _ = load_model(ModelConfig(source=str(tmp_path / "model")), CPU)
    assert model.pad_token == 2


# ---- runs


def test_a_run_leaves_a_model_that_transformers_opens(folder: Path, tmp_path: Path) -> None:
    experiment = f_dpo(model=ModelConfig(source=str(folder)), data=str(pairs(tmp_path)))
    result = train(experiment, tmp_path / "run")
    assert result.evaluation.measure == "preference accuracy"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ours = esscher.load(tmp_path / "run").policy.model
    before = AutoModelForCausalLM.from_pretrained(folder)
    pairs_ = list(zip(opened.parameters(), ours.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs_)
    assert any(not torch.equal(a, c) for a, _, c in pairs_)
    samples = json.loads((tmp_path / "run/samples/step_000000010.json").read_text())
    assert set(samples[0]) == {"prompt", "completion", "finished"}


def test_what_training_begins_with_is_judged_as_well(folder: Path, tmp_path: Path) -> None:
    experiment = f_dpo(model=ModelConfig(source=str(folder)), data=str(pairs(tmp_path)))
    often = replace(experiment, evaluation=replace(experiment.evaluation, every=5))
    train(often, tmp_path / "often")
    rows = [row for row in metrics(tmp_path / "often") if row["phase"] == "evaluate"]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert rows[0]["kl_to_reference"] == 0 != rows[-1]["kl_to_reference"]
    drawn = sorted(path.stem for path in (tmp_path / "often/samples").iterdir())
    assert drawn == ["step_000000000", "step_000000005", "step_000000010"]
    rarely = replace(experiment, evaluation=replace(experiment.evaluation, every=0))
    train(rarely, tmp_path / "rarely")
    assert [row["step"] for row in metrics(tmp_path / "rarely") if "returns" in row] == [10]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_killed_and_resumed_it_equals_the_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int
) -> None:
    experiment = f_dpo(
        model=ModelConfig(source=str(folder), lora_rank=lora_rank), data=str(pairs(tmp_path))
    )
    train(experiment, tmp_path / "whole")
    train_until(experiment, tmp_path / "killed", 5, monkeypatch)
    esscher.resume(tmp_path / "killed", display=False)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_another_model_under_the_same_name_is_noticed(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(folder, source)
    experiment = f_dpo(model=ModelConfig(source=str(source)), data=str(pairs(tmp_path)))
    train(experiment, tmp_path / "run")
    torch.manual_seed(1)
    tiny_llama()[0].save_pretrained(source)
    with pytest.raises(UserError, match="has other weights than when this run began"):
        esscher.load(tmp_path / "run")


def test_rows_held_out_are_never_learned_from(tmp_path: Path) -> None:
    from support import parts_after

    parts = parts_after(f_dpo(data=str(pairs(tmp_path, 20)), steps=10), 0)
    text = parts.world.text
    parts.close()
    assert len(text.train) == 18 and len(text.held_out) == 2
    asked = {tuple(pair[0].prompt) for pair in text.train}
    assert not asked & {tuple(pair[0].prompt) for pair in text.held_out}
    seen = [row for step in range(1, 10) for row in parts.experience.batch(step).row.tolist()]
    assert sorted(seen[:16] + seen[16:18]) == list(range(18)), "every row once an epoch"
    assert seen[:18] != seen[18:36], "in another order each time"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"model": ModelConfig()}, "f_dpo needs a language model: give --model"),
        ({"data": None}, r"learns from rows of text \(columns prompt, chosen, rejected\)"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"text": TextConfig(max_length=4)}, "row 0 has .* tokens, and 4 fit"),
        ({"text": TextConfig(columns={"chosen": "best"})}, "row 0 has no column 'best'"),
        ({"text": TextConfig(task="reasoning_gym:chain_sum")}, "--data and --task exclude"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    stage: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(f_dpo(**stage), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size 4 exceeds the 3 rows of prefs.jsonl"):
        train(f_dpo(data=str(pairs(tmp_path, 4))), tmp_path / "run")


def test_a_controller_takes_no_model(tmp_path: Path) -> None:
    experiment = smoke("sac")
    stage = replace(experiment.stages[-1], model=ModelConfig(source="x"))
    with pytest.raises(UserError, match="sac trains a controller, not a language model"):
        train(replace(experiment, stages=(stage,)), tmp_path / "run")

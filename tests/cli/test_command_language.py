"""The command for language models: short options, what is printed, sampling and handing over."""

import json
from pathlib import Path

import pytest
from command_line import esscher
from transformers import AutoModelForCausalLM

TINY = ["--model", "esscher.models:tiny_llama", "--log.to"]
PAIRS = ["--data", "esscher.datasets:sums_compared", "--batch-size", "4", "--steps", "4"]
FEW = ["--evaluation.episodes", "4", "--runtime.threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapted"
    arguments = [*TINY, *PAIRS, *FEW, "--lora-rank", "2", "--divergence", "js", "--beta=0.3"]
    done = esscher("run", "f_dpo", *arguments, "--directory", str(folder))
    assert done.returncode == 0, done.stderr
    assert "f_dpo: preference accuracy" in done.stdout
    assert f"model: {folder / 'model'}" in done.stdout
    return folder


def test_short_options_are_those_of_the_only_group_that_has_them(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["divergence"] == "js" and config["method"]["beta"] == 0.3
    model = config["stages"][-1]["model"]
    assert model["source"] == "esscher.models:tiny_llama" and model["lora_rank"] == 2


def test_the_report_shows_what_was_written(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "What the model wrote after prompts held out" in page
    assert "Preference accuracy after 4 steps" in page
    assert "esscher export" in page and "--to transformers" in page


def test_it_writes_and_repeats_itself(run: Path) -> None:
    line = ["sample", str(run), "--prompt", "1+1=", "2+2=", "--decoding.max-new-tokens", "4"]
    one, two = (esscher(*line, "--json").stdout for _ in range(2))
    assert one == two
    assert [json.loads(row)["prompt"] for row in one.splitlines()] == ["1+1=", "2+2="]
    assert esscher(*line, "--json", "--seed", "5").stdout != one
    nothing = esscher("sample", str(run))
    assert nothing.returncode == 2 and "--prompt TEXT" in nothing.stderr


def test_it_is_judged_again(run: Path) -> None:
    told = json.loads(esscher("eval", str(run), "--episodes", "5", "--json").stdout)
    assert told["measure"] == "preference accuracy" and len(told["returns"]) == 5


def test_adapters_are_merged_when_it_is_handed_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = esscher("export", str(run), "--out", str(out))
    assert done.returncode == 0 and (out / "model.safetensors").exists()
    assert not (out / "adapter_config.json").exists()
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"
    again = esscher("export", str(run), "--out", str(out))
    assert again.returncode == 2 and "exists: choose another --out" in again.stderr
    wrong = esscher("export", str(run), "--to", "onnx")
    assert wrong.returncode == 2 and "trained a language model: --to transformers" in wrong.stderr


def test_methods_on_different_rows_are_not_compared() -> None:
    done = esscher("compare", "f_dpo", "sft", *TINY[:2], "--data", "x.jsonl")
    assert done.returncode == 2
    assert "learn from different things, so compare them apart: f_dpo pairs, sft" in done.stderr


def test_seeds_are_compared_and_resumed(tmp_path: Path) -> None:
    line = ["compare", "f_dpo", *TINY, *PAIRS, *FEW, "--seeds", "2", "--directory", str(tmp_path)]
    for _ in range(2):
        done = esscher(*line)
        assert done.returncode == 0, done.stderr
    assert "sums_compared" in (tmp_path / "report.html").read_text()

"""lm-evaluation-harness scores an exported model, on a task of a few lines, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esscher import cli
from support import smoke, train

ROWS = [
    {"prompt": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), "sum"], "answer": 0}
    for a, b in ((1, 2), (10, 20), (33, 4), (50, 49), (7, 7), (12, 90))
]
TASK = """\
task: esscher_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


def log_likelihood(model: Any, tokenizer: Any, prompt: str, continuation: str) -> float:
    """Of the continuation's tokens, by hand."""
    whole = tokenizer(prompt + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logp = model(whole).logits.log_softmax(-1)
    places = range(start, whole.shape[1])
    return sum(logp[0, place - 1, whole[0, place]].item() for place in places)


def test_the_harness_scores_an_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    train(smoke("sft"), tmp_path / "run")
    out = tmp_path / "exported"
    assert cli.run_command(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    own = tmp_path / "tasks"
    own.mkdir()
    rows = own / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (own / "sums.yaml").write_text(TASK.format(rows=rows))
    scored = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(out), "dtype": "float32"},
        tasks=["esscher_sums"],
        task_manager=tasks.TaskManager(include_path=str(own), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = []
    for row in ROWS:
        found = [log_likelihood(model, tokenizer, row["prompt"], c) for c in row["choices"]]
        expected.append(float(max(range(3), key=found.__getitem__) == row["answer"]))
    assert scored["results"]["esscher_sums"]["acc,none"] == sum(expected) / len(expected)
    # And the numbers behind it.
    (theirs, *_) = scored["samples"]["esscher_sums"]
    row = ROWS[theirs["doc_id"]]
    for choice, answer in zip(row["choices"], theirs["filtered_resps"], strict=True):
        by_hand = log_likelihood(model, tokenizer, row["prompt"], choice)
        assert answer[0] == pytest.approx(by_hand, abs=1e-4)

"""The command for diffusion models: short options, what is printed, drawing and handing over."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from command_line import esscher
from PIL import Image

from esscher import load
from esscher.errors import UserError

FEW = ["--evaluation.episodes", "4", "--runtime.threads", "1", "--log.to"]
UNET = ["--model", "esscher.images:tiny_unet"]
SMALL = ["--model.kwargs", "size", "8", "width", "8", "channels", "1", "classes", "10"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "digits"
    data = ["--data", "esscher.datasets:digits", "--steps", "3", "--batch-size", "4"]
    arguments = [*UNET, *SMALL, *data, *FEW, "--draw-steps", "3", "--lora-rank", "2"]
    done = esscher("run", "ddpm", *arguments, "--directory", str(folder))
    assert done.returncode == 0, done.stderr
    assert "ddpm: negative energy distance" in done.stdout
    assert f"model: {folder / 'model'}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tree"
    arguments = ["--model", "esscher.images:mixture", "--reward", "esscher.image_rewards:nearness"]
    options = ["--draw-steps", "10", "--evaluations", "100", "--steps", "2", *FEW]
    done = esscher(
        "run", "diffusion_tree_sampling", *arguments, *options, "--directory", str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert "diffusion_tree_sampling: reward " in done.stdout and "model:" not in done.stdout
    return folder


def test_short_options_are_those_of_the_only_group_that_has_them(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["draw_steps"] == 3 and config["method"]["batch_size"] == 4
    model = config["stages"][-1]["model"]
    assert model["source"] == "esscher.images:tiny_unet" and model["lora_rank"] == 2


def test_what_was_saved_opens_in_diffusers(run: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(run / "model")
    assert type(pipeline).__name__ == "DDPMPipeline"
    assert pipeline.unet.config.num_class_embeds == 11


def test_it_draws_and_repeats_itself(run: Path, tmp_path: Path) -> None:
    line = ["sample", str(run), "--label", "3", "4", "--count", "2"]
    for name in ("one", "two"):
        done = esscher(*line, "--out", str(tmp_path / name))
        assert done.returncode == 0 and "(4 samples)" in done.stdout
    assert esscher(*line, "--out", str(tmp_path / "three"), "--seed", "5").returncode == 0
    one, two, three = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())]
        for name in ("one", "two", "three")
    )
    assert len(one) == 4 and one[0].shape == (8, 8)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert not all((a == b).all() for a, b in zip(one, three, strict=True))
    taken = esscher(*line, "--out", str(tmp_path / "one"))
    assert taken.returncode == 2 and "exists" in taken.stderr


def test_without_a_compiler_nothing_is_compiled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    done = esscher("sample", str(run), "--compile", "--out", str(tmp_path / "drawn"))
    assert done.returncode == 2 and "leave --compile out" in done.stderr
    assert not (tmp_path / "drawn").exists()


def test_how_many_at_once_changes_no_image(run: Path) -> None:
    """But by rounding."""
    painter, rows = load(run).policy, [{"label": k} for k in range(5)]
    together = painter.draw(rows, seed=3)
    sizes = []
    draw = painter._draw
    painter._draw = lambda asked, seeds: sizes.append(len(seeds)) or draw(asked, seeds)
    for at_once, expected in ((2, [2, 2, 2]), (4, [3, 3]), (64, [5])):
        painter._at_once = at_once
        torch.testing.assert_close(painter.draw(rows, seed=3), together, rtol=0, atol=1e-4)
        assert sizes == expected, "one size, for which a network is compiled once"
        sizes.clear()
    assert not torch.allclose(painter.draw(rows, seed=4), together, atol=0.1)
    with pytest.raises(UserError, match="at least one row"):
        painter.draw([])


def test_points_are_kept_as_an_array(searched: Path, tmp_path: Path) -> None:
    done = esscher("sample", str(searched), "--count", "5", "--out", str(tmp_path / "drawn"))
    assert done.returncode == 0 and np.load(tmp_path / "drawn" / "samples.npy").shape == (5, 2)
    none = esscher("sample", str(searched), "--count", "0", "--out", str(tmp_path / "none"))
    assert none.returncode == 2 and "--count must be >= 1, got 0" in none.stderr
    both = esscher("sample", str(searched), "--label", "1", "--prompt", "a")
    assert both.returncode == 2 and "exclude each other" in both.stderr


def searched_for(labels: str, tmp_path: Path) -> Path:
    folder = tmp_path / "labelled"
    model = ["--model", "esscher.images:mixture", "--model.kwargs", "classes", "True"]
    options = ["--draw-steps", "10", "--evaluations", "100", "--steps", "2", "--batch-size", "2"]
    reward = ["--reward", "esscher.image_rewards:nearness", "--labels", *labels.split()]
    arguments = [*model, *reward, *options, *FEW, "--directory", str(folder)]
    done = esscher("run", "diffusion_tree_sampling", *arguments)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_row_of_the_run_is_drawn_from_its_tree(tmp_path: Path) -> None:
    folder = searched_for("2 5", tmp_path)
    line = ["sample", str(folder), "--count", "3", "--out"]
    done = esscher(*line, str(tmp_path / "drawn"), "--label", "5")
    assert done.returncode == 0, done.stderr
    tree = load(folder).method.tree(1)
    leaves, _ = tree.leaf_log_probs()
    known = {tuple(row) for row in tree.leaves(leaves).x.tolist()}
    found = np.load(tmp_path / "drawn" / "samples.npy")
    assert {tuple(row) for row in found.tolist()} <= known
    wrong = esscher(*line, str(tmp_path / "none"), "--label", "3")
    assert wrong.returncode == 2 and "no tree has grown for {'label': 3}" in wrong.stderr


def test_evaluations_are_told_of_what_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = ["--model", "esscher.images:mixture", "--labels", "0", "1"]
    classes = ["--model.kwargs", "classes", "True", "--scale", "3", "--policy", "cut_off"]
    options = ["--draw-steps", "6", "--guided-steps", "2", "--steps", "1", *FEW]
    arguments = [*model, *classes, *options, "--directory", str(folder)]
    done = esscher("run", "adaptive_guidance", *arguments)
    assert done.returncode == 0, done.stderr
    done = esscher("sample", str(folder), "--count", "4")
    assert "(4 samples, evaluations saved 0.3333, evaluations 8)" in done.stdout


def test_a_recipe_leaves_its_kwargs_behind_with_its_model(run: Path, tmp_path: Path) -> None:
    few = [*FEW, "--steps", "1", "--batch-size", "8", "--num-bins", "2"]
    folder = str(tmp_path / "run")
    done = esscher(
        "run", "f_distill:smoke", "--model", str(run / "model"), *few, "--directory", folder
    )
    assert done.returncode == 0, done.stderr
    stage = json.loads((tmp_path / "run" / "config.json").read_text())["stages"][-1]
    assert stage["model"] == {**stage["model"], "source": str(run / "model"), "kwargs": {}}


def test_kwargs_of_a_recipe_are_given_as_the_help_says(tmp_path: Path) -> None:
    few = [*FEW, "--steps", "1", "--model.kwargs", "width", "16", "prediction", "v_prediction"]
    done = esscher("run", "f_distill:smoke", *few, "--directory", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    stage = json.loads((tmp_path / "run" / "config.json").read_text())["stages"][-1]
    expected = {"size": 8, "channels": 1, "width": 16, "classes": 10, "prediction": "v_prediction"}
    assert stage["model"]["kwargs"] == expected
    wrong = esscher("run", "f_distill:smoke", "--model.kwargs", "width")
    assert wrong.returncode == 2
    assert "--model.kwargs takes names, each with its value, got 'width'" in wrong.stderr


def test_adapters_alone_are_for_their_pipeline(tmp_path: Path) -> None:
    esscher_images: Any = pytest.importorskip("esscher.images")
    esscher_images.tiny_stable_diffusion(width=16).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n')
    arguments = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl")]
    arguments += ["--reward", "esscher.image_rewards:Compressibility", "--lora-rank", "2"]
    arguments += [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--draw-steps",
        "2",
        "--learning-rate",
        "1e-2",
    ]
    folder = str(tmp_path / "run")
    done = esscher("run", "dragon", *arguments, *FEW, "--directory", folder)
    assert done.returncode == 0, done.stderr
    done = esscher("export", folder, "--to", "adapters", "--out", str(tmp_path / "adapters"))
    assert done.returncode == 0 and "load_lora_weights" in done.stdout
    images = []
    for source, adapters in (("base", "adapters"), ("run/model", None), ("base", None)):
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / source)
        pipeline.set_progress_bar_config(disable=True)
        if adapters:
            pipeline.load_lora_weights(tmp_path / adapters)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        options = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "pt"}
        images.append(pipeline("a cat", latents=latents, **options).images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    assert (images[1] - images[2]).abs().max() > 1e-3


def test_it_is_judged_again(run: Path, searched: Path) -> None:
    done = esscher("eval", str(searched), "--episodes", "8", "--json")
    told = json.loads(done.stdout)
    assert told["measure"] == "reward" and len(told["returns"]) == 8
    done = esscher("eval", str(run), "--episodes", "8")
    assert "ddpm on digits" in done.stdout or "negative energy distance" in done.stdout


def test_it_is_handed_over(run: Path, tmp_path: Path) -> None:
    done = esscher("export", str(run), "--to", "diffusers", "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "DiffusionPipeline.from_pretrained" in done.stdout
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out") is not None
    wrong = esscher("export", str(run), "--to", "onnx")
    assert wrong.returncode == 2 and "--to diffusers" in wrong.stderr


def test_a_module_of_ones_own_is_handed_over_as_weights(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    done = esscher("export", str(searched), "--out", str(out))
    assert "(load_state_dict of your module takes model.safetensors)" in done.stdout, done.stderr
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_methods_are_compared_on_one_model(tmp_path: Path) -> None:
    arguments = ["--model", "esscher.images:mixture", "--steps", "2", "--seeds", "1"]
    reward = ["--reward", "esscher.image_rewards:nearness", "--batch-size", "2"]
    done = esscher(
        "compare",
        "dragon",
        "diffusion_tree_sampling",
        *arguments,
        *reward,
        *FEW,
        "--workers",
        "1",
        "--directory",
        str(tmp_path / "all"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all" / "report.html").exists()
    mixed = esscher("compare", "ddpm", "dragon", *arguments)
    assert mixed.returncode == 2 and "learn from different things" in mixed.stderr


def test_the_card_says_how_to_use_it() -> None:
    shown = esscher("show", "dragon").stdout
    assert "--reward module:function" in shown.replace("\n", " ")
    assert "FOLDER_OF_IMAGES" in esscher("show", "ddpm").stdout

"""Synthetic run folders in the runner's format."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_run(
    folder: Path,
    slug: str = "sac",
    env: str = "Hopper-v5",
    seed: int = 0,
    *,
    label: str | None = None,
    height: float = 2000.0,
    noise: float = 150.0,
    steps: int = 100_000,
    reached: int | None = None,
    evaluated: bool = True,
    method: dict | None = None,
    half_line: bool = False,
    measure: str | None = None,
    distance: float | None = None,
) -> Path:
    """Writes a run that learns towards `height`; `reached` below `steps` leaves it unfinished.

    measure: what its evaluations say they are. distance: KL to the model of before at the end, which
    grows evenly.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng([seed, len(slug), len(env), int(height)])
    reached = steps if reached is None else reached
    offset = generator.normal(0, noise)
    config = {
        "esscher_version": "0.1.0",
        "slug": slug,
        "seed": seed,
        "method": {"lr": 3e-4, "tau": 0.005, "hidden": [256, 256]} | (method or {}),
        "stages": [{"env": {"id": env, "num": 1}, "steps": steps}],
        "evaluation": {"every": steps // 20, "episodes": 10},
        "checkpoint": {"every": steps // 10},
        "runtime": {"device": "cpu", "threads": 1, "precision": "float32", "graph": "eager"},
        "log": {"every": steps // 100},
        "label": label,
    }
    if measure is not None:
        config["stages"][0] |= {"model": {"source": "models/small"}, "data": env}
    (folder / "config.json").write_text(json.dumps(config))

    def expected(step: int) -> float:
        return (height + offset) * (1 - np.exp(-3 * step / steps)) + generator.normal(0, noise / 3)

    lines = []
    returns: list[float] = []
    for step in range(steps // 100, reached + 1, steps // 100):
        row = {"phase": "train", "step": step, "updates": step - 100, "seconds": step / 150.0}
        row |= {"steps_per_second": 150 + generator.normal(), "episodes": 2}
        if step % (steps // 50) == 0:
            row["return"] = expected(step) - 50
        row |= {"critic_loss": 100 * np.exp(-8 * step / steps) + 1e-3, "alpha": 0.2 - step * 1e-7}
        row |= {"q_mean": expected(step) / 15, "entropy": -1.5 + generator.normal(0, 0.1)}
        lines.append(json.dumps(row))
        if evaluated and step % (steps // 20) == 0:
            returns = [expected(step) for _ in range(10)]
            mean, deviation = float(np.mean(returns)), float(np.std(returns))
            row = {"phase": "evaluate", "step": step, "seconds": step / 150.0 + 1}
            row |= {"return_mean": mean, "return_std": deviation, "returns": returns}
            row |= {} if measure is None else {"measure": measure}
            row |= {} if distance is None else {"kl_to_reference": distance * step / steps}
            lines.append(json.dumps(row | {"length_mean": 150.0}))
    text = "\n".join(lines) + "\n"
    if half_line:
        text += '{"phase": "evaluate", "step": 999999, "return_me'
    (folder / "metrics.jsonl").write_text(text)
    if reached >= steps:
        result = {"status": "finished", "slug": slug, "env": env, "seed": seed, "steps": steps}
        result |= {"updates": steps - 100, "seconds": steps / 150.0 + 2}
        if returns:
            result |= {"return_mean": mean, "return_std": deviation, "returns": returns}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_samples(run: Path, step: int, completions: dict[str, str], **marks) -> None:
    """What a language model wrote at a step; {prompt: completion}."""
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    samples = [{"prompt": p, "completion": c, **marks} for p, c in completions.items()]
    (folder / f"step_{step:09d}.json").write_text(json.dumps(samples))


def write_picture(run: Path, step: int, shade: int) -> bytes:
    """What a diffusion model drew at a step: a grey square; its bytes."""
    folder = run / "samples"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:09d}.png"
    Image.new("L", (16, 16), shade).save(path)
    return path.read_bytes()

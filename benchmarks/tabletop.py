"""Success of three ways to decode actions on three tasks of Meta-World: same data, same small Llava.

Thirty demonstrations a task, in images of 64 x 64; 1,200 updates; 40 episodes a task, from places that
the data do not hold. Every command is one that a user types, so a folder that holds some of the results
goes on from there.

    python benchmarks/tabletop.py FOLDER            writes benchmarks/tabletop.json

It needs the extra robots and a renderer (docs/data.md); half an hour or so of one core.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from esscher import __version__

HERE = Path(__file__).parent
TASKS = ("reach-v3", "button-press-topdown-v3", "drawer-close-v3")
HEADS = ("masked", "autoregressive", "diffusion")
TRAINING = (
    "--steps 1200 --method.decay-after 900 --runtime.device cpu --runtime.threads 1 "
    "--evaluation.every 0 --evaluation.episodes 40"
)


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "esscher.cli", *map(str, words)], check=True)


def found(run: Path) -> dict[str, Any]:
    """Of each task: success, and Wilson's interval of 95 %; what a decision takes."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    rates = {
        task: [
            round(result[f"success of metaworld:{task}{end}"], 4) for end in ("", ", low", ", high")
        ]
        for task in TASKS
    }
    told = subprocess.run(
        [sys.executable, "-m", "esscher.cli", "eval", run, "--episodes", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    evaluated = json.loads(told.stdout)
    return {
        "success": rates,
        "mean": round(result["return_mean"], 4),
        "action_error": round(result["action_error"], 4),
        "evaluation": {k: v for k, v in evaluated.items() if "milli" in k or "evaluations" in k},
        "machine": result["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "tabletop.json")
    options = parser.parse_args()
    data = options.folder / "three"
    if not data.exists():
        tasks = [f"metaworld:{task}" for task in TASKS]
        command("data", "collect", *tasks, "--episodes", 30, "--images", 64, "--out", data)
    heads = {}
    for head in HEADS:
        run = options.folder / head
        if not (run / "result.json").exists():
            words = ["discrete_diffusion_vla:tabletop", "--data", data, "--method.head", head]
            verb = ["resume", run] if run.exists() else ["run", *words, *TRAINING.split()]
            command(*verb, *([] if run.exists() else ["--directory", run]))
        heads[head] = found(run)
        print(head, heads[head]["success"], flush=True)
    record = {
        "what": "share of 40 episodes a task, with Wilson's interval of 95 %; one seed",
        "heads": heads,
        "commands": [
            "esscher data collect "
            + " ".join(f"metaworld:{task}" for task in TASKS)
            + " --episodes 30 --images 64 --out three",
            f"esscher run discrete_diffusion_vla:tabletop --data three --method.head HEAD {TRAINING}",
        ],
        "esscher": __version__,
        "torch": torch.__version__,
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

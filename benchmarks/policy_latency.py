"""What a decision of each diffusion policy takes, in one environment on one thread.

The reference is Diffusion Policy as LeRobot runs it: a U-Net along time, asked at all 100 levels of
diffusers' DDPMScheduler. LeRobot itself needs torchvision, so its loop is written here with the same
scheduler and torch's own convolutions; the weights (observations of 20, actions of 7, chunks of 16) are
the same on both sides, and so are the chunks, which are compared. BESO has its own transformer, half as
large.

    python benchmarks/policy_latency.py             writes benchmarks/policy_latency.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from esscher import __version__
from esscher.adapters.data import from_arrays
from esscher.distributions.remembering import Player
from esscher.methods.robots import beso, diffusion_policy, rti_dp
from esscher.nn import unet1d
from esscher.runtime.device import Runtime
from esscher.types import Spec

HERE = Path(__file__).parent
OBS, ACTION, HORIZON, LEVELS = 20, 7, 16, 100
SPEC = Spec(
    obs_shape=(OBS,),
    action_shape=(ACTION,),
    action_low=(-1.0,) * ACTION,
    action_high=(1.0,) * ACTION,
)


def logged() -> Any:
    """Random episodes, for the policies' statistics."""
    draw, rows = np.random.default_rng(0), 400
    ends = (np.arange(rows) + 1) % 40 == 0
    columns = {
        "observations": draw.normal(size=(rows, OBS)).astype(np.float32),
        "actions": draw.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        "rewards": np.zeros(rows, np.float32),
        "next_observations": draw.normal(size=(rows, OBS)).astype(np.float32),
        "terminations": np.zeros(rows, bool),
        "truncations": ends,
    }
    return from_arrays(columns, SPEC, "random rows")


def policies() -> dict[str, Any]:
    """With random weights."""
    torch.manual_seed(0)
    data, runtime = logged(), Runtime()
    config = diffusion_policy.Config(channels=(128, 256, 512), levels=LEVELS, horizon=HORIZON)
    diffusion = diffusion_policy.DiffusionPolicy(config, SPEC, runtime)
    diffusion.experience(data)
    model = diffusion.policy.model
    scored = beso.BESO(beso.Config(batch_size=64), SPEC, runtime)
    scored.experience(data)
    return {
        "diffusion_policy": diffusion.policy,
        "rti_dp, levels 2 1 0": rti_dp.RealTimeIteration(model, rti_dp.Config(steps=(2, 1, 0))),
        "beso, 3 steps": scored.policy,
    }


def reference(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A chunk from the first noise and a condition, by diffusers' scheduler."""
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=LEVELS,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        clip_sample_range=1.0,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(LEVELS)

    @torch.no_grad()
    def draw(z: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(unet1d, "SHORT", 0):
            for level in scheduler.timesteps:
                predicted = model.network(z, level.expand(len(z)).float(), condition)
                z = scheduler.step(predicted, int(level), z).prev_sample
        return z

    return draw


def difference(model: Any) -> float:
    """Largest, of the chunks of both loops: same first noise, and none in the steps, which differ by
    their draws alone. Their mean is what the scheduler adds its noise to.
    """
    condition = torch.randn(4, 2 * OBS)
    scheduler = diffusers.DDPMScheduler(
        LEVELS, beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.0
    )
    scheduler._get_variance = lambda *_, **__: torch.zeros(())
    z = start = torch.randn(4, HORIZON, ACTION)
    with torch.no_grad():
        ours = model.draw(condition, lambda draw: start if draw == 0 else torch.zeros_like(start))
        for level in range(LEVELS - 1, -1, -1):
            predicted = model.network(z, torch.full((4,), float(level)), condition)
            z = scheduler.step(predicted, level, z).prev_sample
    return float((ours - z).abs().max())


def milliseconds(policy: Any, decisions: int) -> list[float]:
    """Of each decision that asks the network, after the first."""
    player, obs, spent = Player(policy, explore=False), torch.zeros(1, OBS), []
    player(obs)
    while len(spent) < decisions:
        before = int(player.memory.evaluations) if player.memory is not None else 0
        began = time.perf_counter()
        player(obs)
        took = 1000 * (time.perf_counter() - began)
        if player.memory is not None and int(player.memory.evaluations) > before:
            spent.append(took)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "policy_latency.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours = policies()
    model = ours["diffusion_policy"].model
    draw, condition = reference(model), torch.randn(1, 2 * OBS)
    spent: dict[str, list[float]] = {name: [] for name in ("reference", *ours)}
    draw(torch.randn(1, HORIZON, ACTION), condition)
    for _ in range(options.repetitions):
        told = []
        for _ in range(options.decisions):
            began = time.perf_counter()
            draw(torch.randn(1, HORIZON, ACTION), condition)
            told.append(1000 * (time.perf_counter() - began))
        spent["reference"].append(statistics.median(told))
        for name, policy in ours.items():
            spent[name].append(statistics.median(milliseconds(policy, options.decisions)))
    sizes = {
        "U-Net": sum(p.numel() for p in model.network.parameters()),
        "beso": sum(p.numel() for p in ours["beso, 3 steps"].parameters()),
    }
    ratios = {
        name: statistics.median(
            theirs / own for theirs, own in zip(spent["reference"], spent[name], strict=True)
        )
        for name in ours
    }
    record = {
        "what": "milliseconds of a decision, one environment, one thread, float32",
        "weights": sizes,
        "milliseconds": spent,
        "median_times_faster_than_reference": ratios,
        "largest_difference_of_chunks": difference(model),
        "versions": {
            "esscher": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "machine": platform.processor() or platform.machine(),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()

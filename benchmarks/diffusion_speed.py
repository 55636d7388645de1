"""Images a second: this library's sampling against a pipeline of diffusers, same network and steps.

A U-Net for 32 x 32 colour images, batches of 16, DDIM with 20 steps, float32 and,
on processors with instructions for it, bfloat16 (weights and activations; solver in float32). Both
start from noise and end with arrays in [0, 1]. Ours is compiled (`--runtime.graph compile`); as it is
without, and what the pipeline does when its network is compiled by hand, stand beside it. All in one
process, in turn, after a batch of each that is not counted; the median of the pairs' ratios.

Images from the same noise are compared in benchmarks' record as well: the largest difference to
diffusers' own schedulers for DDIM, Euler and DPM-Solver++(2M), uncompiled and compiled.

    python benchmarks/diffusion_speed.py            writes benchmarks/diffusion_speed.json
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from esscher import __version__
from esscher.adapters.diffusers import load_diffusion
from esscher.distributions.diffusion import DiffusionModel
from esscher.experiment import ModelConfig
from esscher.samplers.solvers import Solver, solve

BATCH, STEPS = 16, 20
HERE = Path(__file__).parent


def pipeline() -> Any:
    """With random weights; fixed for all who ask."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    found = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler(clip_sample=False))
    found.set_progress_bar_config(disable=True)
    return found


def model() -> DiffusionModel:
    return load_diffusion(ModelConfig(source=f"{__name__}:pipeline"), torch.device("cpu"))


def seconds(draw: Callable[[], Any]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


def drawer_of_pipeline(of: Any) -> Callable[[], Any]:
    @torch.no_grad()
    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return of(
            batch_size=BATCH, num_inference_steps=STEPS, output_type="np", generator=generator
        ).images

    return draw


def drawer_of_model(of: DiffusionModel, dtype: torch.dtype) -> Callable[[], Any]:
    def draw() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return of.decode(of.draw(None, range(BATCH), steps=STEPS)).float().numpy()

    return draw


@torch.no_grad()
def largest_difference(of: DiffusionModel, solver: Solver) -> float:
    """Of images from the same noise to those of diffusers' scheduler."""
    reference, config = pipeline(), {"clip_sample": False}
    scheduler: Any = {
        "ddim": lambda: diffusers.DDIMScheduler(**config),
        "euler": lambda: diffusers.EulerDiscreteScheduler(),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True
        ),
    }[solver]()
    scheduler.set_timesteps(STEPS)
    noise = torch.randn((4, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    z = noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        output = reference.unet(scheduler.scale_model_input(z, step), step).sample
        z = scheduler.step(output, step, z).prev_sample
    from esscher.adapters.diffusers import levels_of

    levels = levels_of(scheduler)(STEPS)
    ours = solve(of.denoiser, noise * float(levels[0]), levels, solver=solver)
    if (
        solver != "euler"
    ):  # These begin with noise of variance 1 at a level that has signal as well.
        start = noise * (1 + float(levels[0]) ** 2) ** 0.5
        ours = solve(of.denoiser, start, levels, solver=solver)
    images = (z / 2 + 0.5).clamp(0, 1)
    return float((of.decode(ours) - images).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    theirs, plain, compiled = pipeline(), model(), model().compiled()
    by_hand = pipeline()
    by_hand.unet.compile()
    draws = {
        "diffusers": drawer_of_pipeline(theirs),
        "diffusers, network compiled by hand": drawer_of_pipeline(by_hand),
        "esscher, eager": drawer_of_model(plain, torch.float32),
        "esscher": drawer_of_model(compiled, torch.float32),
    }
    with_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if with_bfloat16:
        half = copy.deepcopy(model())
        half.compiled()
        draws["esscher, bfloat16"] = drawer_of_model(half, torch.bfloat16)
    for draw in draws.values():
        draw()
    taken: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(options.pairs):
        for name, draw in draws.items():
            taken[name].append(seconds(draw))
    ratios = {
        name: statistics.median(
            base / own for base, own in zip(taken["diffusers"], values, strict=True)
        )
        for name, values in taken.items()
    }
    record = {
        "images_per_second": {n: BATCH / statistics.median(v) for n, v in taken.items()},
        "ratio_to_diffusers": ratios,
        "seconds": taken,
        "largest_difference": {
            kind: {
                solver: largest_difference(of, solver) for solver in ("ddim", "euler", "dpmpp_2m")
            }
            for kind, of in {"eager": plain, "compiled": compiled}.items()
        },
        "bfloat16": "measured" if with_bfloat16 else "this processor has no instructions for it",
        "threads": options.threads,
        "batch": BATCH,
        "steps": STEPS,
        "esscher": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "machine": {"processor": platform.processor(), "system": platform.platform()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    (HERE / "diffusion_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        json.dumps({k: record[k] for k in ("ratio_to_diffusers", "largest_difference")}, indent=1)
    )


if __name__ == "__main__":
    main()

"""Images a second: this library's sampling against a pipeline of diffusers, same network and steps.

Two U-Nets for 32 x 32 colour images, of 64, 96 and 128 channels and of 32 and 64, batches of 16, DDIM
with 20 steps, float32 and, on processors with instructions for it, bfloat16 (matrix products and
convolutions; solver in float32). All start from noise and end with arrays in [0, 1]. Ours is
`esscher sample --compile`; beside it stand ours without, and the pipeline with its network compiled by
hand. All in one process, in turn, after a batch of each that is not counted; the median of the pairs'
ratios. With one thread, and with one a processor.

Images from the same noise are compared too: the largest difference to those of diffusers' own
schedulers for DDIM, Euler and DPM-Solver++(2M), eager and compiled.

    python benchmarks/diffusion_speed.py            writes benchmarks/diffusion_speed.json
"""

import argparse
import json
import platform
import statistics
import tempfile
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
from esscher.runtime.device import available_processors
from esscher.samplers.solvers import Solver

BATCH, STEPS = 16, 20
HERE = Path(__file__).parent


WIDTHS = {"64, 96, 128": (64, 96, 128), "32, 64": (32, 64)}


def pipeline(name: str) -> Any:
    """With random weights; fixed for all who ask."""
    torch.manual_seed(0)
    widths = WIDTHS[name]
    plain = ["DownBlock2D", "UpBlock2D"]
    attentive = ["AttnDownBlock2D", "AttnUpBlock2D"]
    kinds = [plain, attentive, *[plain] * (len(widths) - 2)]
    unet = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        down_block_types=tuple(down for down, _ in kinds),
        up_block_types=tuple(up for _, up in reversed(kinds)),
        layers_per_block=1,
        norm_num_groups=8,
    )
    found = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler(clip_sample=False))
    found.set_progress_bar_config(disable=True)
    return found


def model(name: str) -> DiffusionModel:
    config = ModelConfig(source=f"{__name__}:pipeline", kwargs={"name": name})
    return load_diffusion(config, torch.device("cpu"))


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
    @torch.no_grad()
    def draw() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return of.decode(of.draw(None, range(BATCH), steps=STEPS)).float().numpy()

    return draw


@torch.no_grad()
def largest_difference(name: str, of: DiffusionModel, solver: Solver, folder: Path) -> float:
    """Of images from the same noise to those of diffusers' scheduler, with the networks of `of`."""
    reference, config = pipeline(name), {"clip_sample": False}
    scheduler: Any = {
        "ddim": lambda: diffusers.DDIMScheduler(**config),
        "euler": lambda: diffusers.EulerDiscreteScheduler(),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True
        ),
    }[solver]()
    # A pipeline for DDIM alone would make DDIM of the others.
    diffusers.DDPMPipeline(reference.unet, scheduler).save_pretrained(folder)
    told = load_diffusion(ModelConfig(source=str(folder)), torch.device("cpu"))
    told.denoiser.network = of.denoiser.network
    scheduler.set_timesteps(STEPS)
    seeds = range(4)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn((3, 32, 32), generator=each) for each in generators])
    z = noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        output = reference.unet(scheduler.scale_model_input(z, step), step).sample
        z = scheduler.step(output, step, z).prev_sample
    ours = told.draw(None, seeds, steps=STEPS, solver=solver)
    images = (z / 2 + 0.5).clamp(0, 1)
    return float((told.decode(ours) - images).abs().max())


def measured(name: str, threads: int, pairs: int, with_bfloat16: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # What was compiled before is for another network or number of threads.
    plain, compiled, by_hand = model(name), model(name).compiled(final=True), pipeline(name)
    by_hand.unet.compile()
    draws = {
        "diffusers": drawer_of_pipeline(pipeline(name)),
        "diffusers, network compiled by hand": drawer_of_pipeline(by_hand),
        "esscher, eager": drawer_of_model(plain, torch.float32),
        "esscher": drawer_of_model(compiled, torch.float32),
    }
    if with_bfloat16:
        draws["esscher, bfloat16"] = drawer_of_model(
            model(name).compiled(final=True), torch.bfloat16
        )
    for draw in draws.values():
        draw()
    taken: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(pairs):
        for way, draw in draws.items():
            taken[way].append(seconds(draw))
    base = taken["diffusers"]
    with tempfile.TemporaryDirectory() as folder:
        apart = {
            kind: {
                solver: largest_difference(name, of, solver, Path(folder) / solver)
                for solver in ("ddim", "euler", "dpmpp_2m")
            }
            for kind, of in {"eager": plain, "compiled": compiled}.items()
        }
    return {
        "images_per_second": {n: BATCH / statistics.median(v) for n, v in taken.items()},
        "ratio_to_diffusers": {
            name: statistics.median(b / own for b, own in zip(base, values, strict=True))
            for name, values in taken.items()
        },
        "seconds": taken,
        "largest_difference": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, available_processors()])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    record: dict[str, Any] = {"networks": {}}
    for name in WIDTHS:
        record["networks"][name] = by_threads = {}
        for threads in sorted(set(options.threads)):
            found = measured(name, threads, options.pairs, with_bfloat16)
            by_threads[f"{threads} threads"] = found
            shown = {k: found[k] for k in ("ratio_to_diffusers", "largest_difference")}
            print(name, f"{threads} threads", json.dumps(shown, indent=1), flush=True)
    record |= {
        "bfloat16": "measured" if with_bfloat16 else "this processor has no instructions for it",
        "batch": BATCH,
        "steps": STEPS,
        "esscher": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "machine": {"processor": platform.processor(), "system": platform.platform()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    (HERE / "diffusion_speed.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

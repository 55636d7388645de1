"""Real images end to end: the diffusion methods on MNIST and CIFAR-10, in minutes on two cores.

Both come as text in the source archive of the package bigbench 1.0.0 (`pip download --no-deps
--no-binary :all: bigbench==1.0.0`): CIFAR-10 as 10,000 pictures of 32 x 32, MNIST as drawings of
characters, of which the 35,038 of 28 x 28 are read, black on white as they are. Squares of four
points are averaged, and the 14 x 14 pixels put in the middle of 16 x 16.

Models are trained from nothing by the commands that users type; then classifiers look at 1,000 samples
of each. Each classifier learned from one half of the real images: the first is the reward of what is
trained on one, the other only judges. The distance is Frechet's, in the judge's 64 features, to real
images that it has not seen; that of another 1,000 real images stands beside it.

    python benchmarks/real_images.py prepare bigbench-1.0.0.tar.gz FOLDER    once
    python benchmarks/real_images.py run FOLDER     writes benchmarks/real_images.json and .png
"""

import argparse
import base64
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import esscher
from esscher.functional.sets import frechet_distance, moments

HERE = Path(__file__).parent
TASKS = {
    "mnist": "bigbench-1.0.0/bigbench/benchmark_tasks/mnist_ascii/task.json",
    "cifar10": "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json",
}
SAMPLES = 1_000


# ---- images


def prepare(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {task: name for name, task in TASKS.items()}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            if name := names.get(member.name):
                file = members.extractfile(member)
                assert file is not None
                examples = json.load(file)["examples"]
                to_image = mnist_image if name == "mnist" else cifar_image
                found = [(to_image(e["input"]), e["target_scores"]) for e in examples]
                images = np.stack([image for image, _ in found if image is not None])
                labels = [
                    list(scores.values()).index(1) for image, scores in found if image is not None
                ]
                order = np.random.default_rng(0).permutation(len(images))
                np.savez_compressed(
                    folder / f"{name}.npz", image=images[order], label=np.array(labels)[order]
                )
                print(f"{name}: {len(images)} images of {images.shape[1:]}", flush=True)
    for name in TASKS:
        train_classifiers(name, folder)


def mnist_image(drawing: str) -> Any:
    """16 x 16, 0 to 255; None: not one of 28 x 28."""
    rows = [line for line in drawing.split("\n") if line]
    if len(rows) != 28:
        return None
    ink = np.array([[c == "B" for c in row] for row in rows], float)
    halved = ink.reshape(14, 2, 14, 2).mean((1, 3)) * 255
    return np.pad(halved.round().astype(np.uint8), 1)


def cifar_image(text: str) -> Any:
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def read(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    with np.load(folder / f"{name}.npz") as arrays:
        images, labels = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"])
    images = images.float() / 255
    return (images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)), labels


def halves(count: int) -> list[slice]:
    """Of the images: what the reward learns from, what the judge does, what neither has seen."""
    part = (count - 2 * SAMPLES) // 2
    return [slice(0, part), slice(part, 2 * part), slice(2 * part, count)]


# ---- classifiers


class Classifier(nn.Module):
    """Three convolutions, 64 features, 10 classes."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(16 * width, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def embed(self, images: Tensor) -> Tensor:
        return self.features(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))


WIDTHS = {"reward": 16, "judge": 24}


def train_classifiers(name: str, folder: Path) -> None:
    images, labels = read(name, folder)
    *own, held = halves(len(images))
    for seed, (role, width) in enumerate(WIDTHS.items()):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], width)
        epochs = 4 if name == "mnist" else 20
        updates = epochs * (own[seed].stop - own[seed].start) // 128
        optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, updates)
        for _ in range(updates):
            rows = torch.randint(own[seed].start, own[seed].stop, (128,))
            x = images[rows]
            if name == "cifar10":
                x = nn.functional.pad(
                    torch.where(torch.rand(128, 1, 1, 1) < 0.5, x, x.flip(-1)), [2] * 4
                )
                top, left = torch.randint(0, 5, (2,)).tolist()
                x = x[:, :, top : top + 32, left : left + 32]
            loss = nn.functional.cross_entropy(network(x), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = (network(images[held]).argmax(-1) == labels[held]).float().mean()
        save_file(network.state_dict(), folder / f"{name}_{role}.safetensors")
        print(f"{name} {role}: {right:.3f} of unseen images right", flush=True)


def classifier(name: str, role: str, folder: Path | None = None) -> Classifier:
    folder = folder or Path(os.environ["REAL_IMAGES"])
    network = Classifier(1 if name == "mnist" else 3, WIDTHS[role])
    network.load_state_dict(load_file(folder / f"{name}_{role}.safetensors"))
    return network.eval().requires_grad_(False)


def mnist_reward() -> Classifier:
    return classifier("mnist", "reward")


def mnist_judge() -> Classifier:
    return classifier("mnist", "judge")


# ---- runs

TRAINED = (
    "--method.learning-rate 1e-3 --method.average 0.995 --method.batch-size 64 --evaluation.every 0"
)
PROBABILITY = "esscher.image_rewards:ClassProbability"
JOBS = {
    "mnist_unet": f"ddpm --data FOLDER/mnist.npz --steps 1500 {TRAINED} "
    "--model esscher.images:tiny_unet --model.kwargs size 16 channels 1 classes 10 width 16",
    "mnist_transformer": f"ddpm --data FOLDER/mnist.npz --steps 4000 {TRAINED} "
    "--model esscher.images:tiny_pixel_dit --model.kwargs size 16 channels 1 classes 10 width 64",
    "mnist_unet_dragon": "dragon --model FOLDER/runs/mnist_unet/model --model.kwargs null_class 10 "
    f"--image.labels 0 1 2 3 4 5 6 7 8 9 --reward {PROBABILITY} --judge {PROBABILITY} "
    "--image.reward-kwargs classifier real_images:mnist_reward "
    "--image.judge-kwargs classifier real_images:mnist_judge --method.learning-rate 1e-4 "
    "--method.batch-size 64 --method.draw-steps 20 --steps 30 --evaluation.every 10 "
    "--evaluation.episodes 200",
    "cifar10_unet": f"ddpm --data FOLDER/cifar10.npz --steps 1200 {TRAINED} "
    "--model esscher.images:tiny_unet "
    "--model.kwargs size 32 classes 10 width 16 prediction v_prediction",
}


def run(folder: Path, threads: int) -> None:
    os.environ["REAL_IMAGES"] = str(folder.resolve())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(HERE))
    record: dict[str, Any] = {"runs": {}, "real images": {}}
    pictures: dict[str, Tensor] = {}
    for name in TASKS:
        images, labels = read(name, folder)
        *_, held = halves(len(images))
        unseen, right = images[held], labels[held]
        judge = classifier(name, "judge", folder)
        record["real images"][name] = seen_by(
            judge, unseen[:SAMPLES], right[:SAMPLES], unseen[SAMPLES:]
        )
        pictures[f"{name}, real"] = unseen[:30]
    for title, options in JOBS.items():
        name, directory = title.split("_")[0], folder / "runs" / title
        begun = time.perf_counter()
        if not (directory / "result.json").exists():
            told = [word.replace("FOLDER", str(folder)) for word in options.split()]
            command = [sys.executable, "-m", "esscher.cli", "run", *told]
            command += ["--directory", str(directory), "--runtime.threads", str(threads)]
            subprocess.run(command, check=True)
        images, _ = read(name, folder)
        *_, held = halves(len(images))
        asked = [{"label": number % 10} for number in range(SAMPLES)]
        drawn = esscher.load(directory).policy.draw(asked, seed=1)
        labels = torch.arange(SAMPLES) % 10
        found = seen_by(classifier(name, "judge", folder), drawn, labels, images[held][SAMPLES:])
        result = json.loads((directory / "result.json").read_text())
        found["minutes of training"] = result["seconds"] / 60
        for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
            if row["phase"] == "evaluate" and "judge_mean" in row:
                keys = ("step", "return_mean", "judge_mean", "kl_to_reference")
                found.setdefault("evaluations", []).append({key: row[key] for key in keys})
        record["runs"][title] = found | {"command": f"esscher run {options}"}
        pictures[title] = drawn[:30]
        print(title, {k: v for k, v in found.items() if k != "evaluations"}, flush=True)
        print(f"  {time.perf_counter() - begun:.0f} s", flush=True)
    record |= {
        "esscher": esscher.__version__,
        "torch": torch.__version__,
        "threads": threads,
        "machine": {"processor": platform.processor(), "system": platform.platform()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    (HERE / "real_images.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_pictures(pictures)


@torch.no_grad()
def seen_by(judge: Classifier, images: Tensor, labels: Tensor, real: Tensor) -> dict[str, float]:
    """Share that is taken for what it was to be, and the distance of features to real ones."""
    features = judge.embed(images)
    right = (judge.head(features).argmax(-1) == labels).float().mean()
    distance = frechet_distance(*moments(features), *moments(judge.embed(real)))
    return {"right": float(right), "frechet": float(distance)}


def draw_pictures(pictures: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(pictures), 1, figsize=(9, 1.35 * len(pictures)))
    for axis, (title, images) in zip(rows, pictures.items(), strict=True):
        tiles = images.expand(-1, 3, -1, -1).unflatten(0, (2, 15)).permute(0, 3, 1, 4, 2)
        axis.imshow(tiles.flatten(0, 1).flatten(1, 2).numpy())
        axis.set_title(title, fontsize=8, loc="left")
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(HERE / "real_images.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    preparing = verbs.add_parser("prepare")
    preparing.add_argument("archive", type=Path)
    preparing.add_argument("folder", type=Path)
    running = verbs.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.verb == "prepare":
        prepare(options.archive, options.folder)
    else:
        run(options.folder, options.threads)


if __name__ == "__main__":
    main()

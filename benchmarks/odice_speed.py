"""One update of ODICE, eager, compiled and with bf16 compute, against it written plainly, as ratios.

Plainly: twin value networks as two modules, three backward passes with retained graphs, gradients
flattened and copied together for the projection, torch.optim.Adam, eager. Same sizes on both sides
(two value networks of 2 x 256 with layer normalisation, policy 2 x 1024, batch 256, observations
and actions as in Hopper), same rows, same threads, in one process and in turn.

    python benchmarks/odice_speed.py                writes benchmarks/odice_speed.json

bf16 compute is timed where the processor has instructions for it.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from esscher.methods.offline.odice import ODICE, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Spec, Transitions

HERE = Path(__file__).parent
OBS, ACTION, BATCH = 11, 3, 256
SETTLE = 5


def rows(count: int) -> list[Transitions]:
    """Batches of random rows."""
    draw = torch.Generator().manual_seed(0)
    return [
        Transitions(
            obs=torch.randn(BATCH, OBS, generator=draw),
            action=torch.rand(BATCH, ACTION, generator=draw) * 2 - 1,
            reward=torch.randn(BATCH, generator=draw),
            next_obs=torch.randn(BATCH, OBS, generator=draw),
            terminated=torch.rand(BATCH, generator=draw) < 0.01,
            truncated=torch.zeros(BATCH, dtype=torch.bool),
        )
        for _ in range(count)
    ]


def esscher(
    threads: int,
    graph: Literal["eager", "compile"],
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Callable[[Transitions], object]:
    """This library's update."""
    config = RuntimeConfig(device="cpu", threads=threads, graph=graph, precision=precision)
    runtime = Runtime(config)
    torch.manual_seed(0)
    low, high = (-1.0,) * ACTION, (1.0,) * ACTION
    spec = Spec(obs_shape=(OBS,), action_shape=(ACTION,), action_low=low, action_high=high)
    method = ODICE(Config(), spec, runtime)
    return lambda batch: method.update(batch, 0)


class Plain:
    """The update as it is written down, without care for speed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.cfg = Config()
        self.heads = nn.ModuleList(self.value_network() for _ in range(2))
        self.target = copy.deepcopy(self.heads).requires_grad_(False)
        self.mean = nn.Sequential(
            nn.Linear(OBS, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, ACTION),
        )
        self.log_std = nn.Parameter(torch.zeros(ACTION))
        cfg, policy = self.cfg, [*self.mean.parameters(), self.log_std]
        self.value_opt = torch.optim.Adam(self.heads.parameters(), lr=cfg.value_learning_rate)
        self.policy_opt = torch.optim.Adam(
            policy, lr=cfg.policy_learning_rate, weight_decay=cfg.policy_weight_decay
        )

    @staticmethod
    def value_network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(OBS, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, 1),
        )

    def both(self, heads: nn.ModuleList, obs: Tensor) -> Tensor:
        return torch.stack([head(obs).squeeze(-1) for head in heads])

    def conjugate(self, residual: Tensor) -> Tensor:
        ratio = torch.relu(residual / 2 + 1)
        return residual * ratio - (ratio - 1) ** 2

    def flat_gradient(self, loss: Tensor, *, retain: bool) -> Tensor:
        self.value_opt.zero_grad()
        loss.backward(retain_graph=retain)
        gradients = [p.grad for p in self.heads.parameters() if p.grad is not None]
        return torch.cat([gradient.clone().reshape(-1) for gradient in gradients])

    def __call__(self, batch: Transitions) -> None:
        cfg, weight = self.cfg, self.cfg.conjugate_weight
        with torch.no_grad():
            target = self.both(self.target, batch.obs).amin(0)
            target_next = self.both(self.target, batch.next_obs).amin(0)
        value, next_value = self.both(self.heads, batch.obs), self.both(self.heads, batch.next_obs)
        going = cfg.discount * (1 - batch.terminated.float())
        residual = batch.reward + going * target_next - value
        behind = batch.reward + going * next_value - target
        forward_loss = weight * self.conjugate(residual).mean()
        backward_loss = weight * cfg.backward_scale * self.conjugate(behind).mean()
        forward = self.flat_gradient(forward_loss, retain=True)
        backward = self.flat_gradient(backward_loss, retain=True)
        direct = self.flat_gradient((1 - weight) * value.mean(), retain=False)
        coefficient = (forward.dot(backward) / forward.dot(forward).clamp(min=1e-10)).item()
        gradient = direct + forward + backward - coefficient * forward
        offset = 0
        for parameter in self.heads.parameters():
            piece = gradient[offset : offset + parameter.numel()]
            parameter.grad = piece.reshape(parameter.shape)
            offset += parameter.numel()
        self.value_opt.step()
        with torch.no_grad():
            for mine, other in zip(self.target.parameters(), self.heads.parameters(), strict=True):
                mine.copy_((1 - cfg.tau) * mine + cfg.tau * other)
        sample_weight = residual.detach().clamp(min=0).clamp(max=cfg.weight_cap)
        std = self.log_std.clamp(*cfg.log_std_range).exp()
        policy = torch.distributions.Normal(self.mean(batch.obs), std)
        loss = -(sample_weight * policy.log_prob(batch.action).sum(-1)).mean()
        self.policy_opt.zero_grad()
        loss.backward()
        self.policy_opt.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "odice_speed.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    updates: dict[str, Callable[[Transitions], object]] = {
        "plain": Plain(),
        "eager": esscher(options.threads, "eager"),
        "compiled": esscher(options.threads, "compile"),
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        updates["bfloat16"] = esscher(options.threads, "compile", "bfloat16")
        updates["plain, bfloat16"] = torch.autocast("cpu", torch.bfloat16)(Plain())
    batches = rows(16)
    for update in updates.values():
        for batch in batches[:SETTLE]:
            update(batch)
    times: dict[str, list[float]] = {name: [] for name in updates}
    for repetition in range(options.repetitions):
        for name, update in updates.items():
            began = time.perf_counter()
            for index in range(options.updates):
                update(batches[index % len(batches)])
            times[name].append((time.perf_counter() - began) / options.updates * 1e3)
            print(f"{repetition} {name}: {times[name][-1]:.2f} ms an update", flush=True)
    ratios = {
        name: [other / mine for other, mine in zip(times["plain"], times[name], strict=True)]
        for name in times
        if not name.startswith("plain")
    }
    if "bfloat16" in times:
        pairs = zip(times["plain, bfloat16"], times["bfloat16"], strict=True)
        ratios["bfloat16, both sides"] = [other / mine for other, mine in pairs]
    record = {
        "what": "one update of ODICE, V 2 x (2 x 256) with layer norm, policy 2 x 1024, batch 256",
        "milliseconds_an_update": times,
        "times_faster_than_plain": ratios,
        "median_times_faster": {name: statistics.median(values) for name, values in ratios.items()},
        "threads": options.threads,
        "updates": options.updates,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": f"python benchmarks/odice_speed.py --updates {options.updates} "
        f"--threads {options.threads}",
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median_times_faster"]))


if __name__ == "__main__":
    main()

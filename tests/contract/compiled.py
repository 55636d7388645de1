"""Update pieces, captured, against the same pieces run eagerly: prints what it found as JSON.

A process of its own, because torch.compile cannot see through the checks that pytest installs.

    python tests/contract/compiled.py            the catalogue captured, and SAC compiled
    python tests/contract/compiled.py SLUG ...   these methods compiled, half a minute each
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from esscher.runtime.device import RuntimeConfig, compiler_available
from esscher.runtime.own_process import collect_seldom
from support import of_world, parts_after, smoke

UPDATES = 2
compile_ = torch.compile


def state_after(slug: str, graph: Any, precision: Any = "float32") -> dict[str, Any]:
    runtime = RuntimeConfig(device="cpu", threads=1, graph=graph, precision=precision)
    parts = parts_after(smoke(slug, runtime=runtime), UPDATES)
    parts.close()
    return {k: v.clone() for k, v in parts.method.state_dict().items() if torch.is_tensor(v)}


def compare(slug: str, backend: str, precision: str = "float32") -> dict[str, Any]:
    pieces: list[Any] = []

    def capture(function: Any, **options: Any) -> Any:
        pieces.append(function)
        if backend != "inductor":
            options = {"dynamic": options["dynamic"], "backend": backend}
        return compile_(function, fullgraph=True, **options)

    torch.compile = capture  # type: ignore[assignment]
    torch._dynamo.reset()
    eager, captured = (state_after(slug, graph, precision) for graph in ("eager", "compile"))
    difference = max(
        ((captured[k].double() - v.double()).abs() / (1 + v.double().abs())).max().item()
        for k, v in eager.items()
    )
    return {"pieces": len(pieces), "difference": difference}


if __name__ == "__main__":
    collect_seldom()
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    found = {} if wanted else {slug: compare(slug, "aot_eager") for slug in of_world("control")}
    if not wanted:
        found["bfloat16 sac"] = compare("sac", "aot_eager", "bfloat16")
    if compiler_available("cpu"):
        found |= {f"compiled {slug}": compare(slug, "inductor") for slug in wanted or ["sac"]}
    print(json.dumps(found))

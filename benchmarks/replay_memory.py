"""Memory of a replay of 1,000,000 HalfCheetah transitions, and of saving it.

python benchmarks/replay_memory.py              writes benchmarks/replay_memory.json
"""

import json
import resource
import tempfile
from pathlib import Path

import torch

from esscher.experience import Replay
from esscher.runtime import checkpoint
from esscher.types import Action, Spec, Transitions

ROWS, PIECE = 1_000_000, 10_000


def resident() -> int:
    """Bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    torch.set_num_threads(1)
    bounds = {"action_low": (-1.0,) * 6, "action_high": (1.0,) * 6}
    spec = Spec(obs_shape=(17,), action_shape=(6,), **bounds)
    piece = Transitions(
        obs=torch.randn(PIECE, 17),
        action=torch.rand(PIECE, 6),
        reward=torch.randn(PIECE),
        next_obs=torch.randn(PIECE, 17),
        terminated=torch.zeros(PIECE, dtype=torch.bool),
        truncated=torch.zeros(PIECE, dtype=torch.bool),
    )
    before = resident()
    replay = Replay(spec, ROWS, 256)
    for _ in range(ROWS // PIECE):
        replay.add(piece, Action(value=piece.action))
    held = resident() - before
    raw = ROWS * ((17 + 6 + 1 + 17) * 4 + 2)
    peak_before = peak()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        checkpoint.save(run, ROWS, dict(replay.state_dict()), {}, replay, keep=1)
        written = sum(f.stat().st_size for f in (run / "experience").iterdir())
    record = {
        "what": "replay of 1,000,000 HalfCheetah transitions",
        "raw_bytes": raw,
        "resident_over_raw": held / raw,
        "extra_peak_while_saving_over_raw": (peak() - peak_before) / raw,
        "written_over_raw": written / raw,
        "command": "python benchmarks/replay_memory.py",
    }
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

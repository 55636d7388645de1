"""Run a proof and write its record: figures of all seeds, verdict, where it was measured."""

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from esscher import __version__
from esscher.errors import UserError, nearest
from esscher.proof import Claim, FinishedRun, Proof
from esscher.registry import find, load_module
from esscher.report.proof_figure import write_proof_figure
from esscher.runtime.checkpoint import machine, write_atomically
from esscher.runtime.device import available_processors
from esscher.runtime.sweep import run_folder, sweep


def prove(
    slug: str,
    *,
    out: Path = Path("proofs"),
    work: Path | None = None,
    seeds: int | None = None,
    first_seed: int = 0,
    workers: int = 1,
    claims: Sequence[str] = (),
) -> dict[str, Any]:
    """Try every claim of a method's `proof()`; the record, also written to out/SLUG.json and .png.

    Raises:
        UserError: the method has no proof, or no claim of that name; one of its runs failed; or
            `work` holds runs that another commit made.
    """
    entry, module = find(slug), load_module(slug)
    if not hasattr(module, "proof"):
        kind = "a baseline" if entry.baseline else "without a proof yet"
        raise UserError(f"{slug} is {kind}: there is no claim to try")
    proof: Proof = module.proof()
    known = {claim.name: claim for claim in proof.claims}
    for name in claims:
        if name not in known:
            raise UserError(f"{slug} has no claim {name!r}: {nearest(name, known)}")
    chosen = [known[name] for name in claims] if claims else list(proof.claims)
    began, code = time.monotonic(), _commit()
    with tempfile.TemporaryDirectory() as temporary:
        root = work or Path(temporary)
        _of_one_commit(root, code)
        tried = [
            _try(claim, root / claim.name.replace(" ", "_"), seeds, first_seed, workers)
            for claim in chosen
        ]
    reproduced = all(claim["verdict"] == "reproduced" for claim in tried)
    record = {
        "slug": slug,
        "title": entry.paper["title"],
        "claim": entry.paper["claim"],
        "verdict": "reproduced" if reproduced else "not reproduced",
        "claims": tried,
        "notes": proof.notes,
        "command": f"esscher prove {slug}",
        "seeds": {"first": first_seed, "asked": seeds},
        "esscher_version": __version__,
        "code": code,
        "machine": {**machine(), "processors": available_processors()},
        "seconds": round(time.monotonic() - began, 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if not claims:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{slug}.json", json.dumps(record, indent=1) + "\n")
        write_proof_figure(record, out / f"{slug}.png")
    return record


def _try(
    claim: Claim, root: Path, seeds: int | None, first_seed: int, workers: int
) -> dict[str, Any]:
    count = claim.num_seeds if seeds is None else seeds
    experiments = {
        name: [replace(make(s), seed=s, label=name) for s in range(first_seed, first_seed + count)]
        for name, make in claim.arms.items()
    }
    outcomes = sweep([e for es in experiments.values() for e in es], root, workers=workers)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise UserError(f"{failed[0].folder} failed: {failed[0].error}")
    figures: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[Any]]] = {}
    for name, runs in experiments.items():
        finished = [FinishedRun(run_folder(root, e)) for e in runs]
        measured = [dict(claim.measure(run)) for run in finished]
        figures[name] = {key: [m[key] for m in measured] for key in measured[0]}
        curves[name] = _curves(finished)
    checks = claim.judge(figures)
    return {
        "name": claim.name,
        "statement": claim.statement,
        "verdict": "reproduced" if all(check.passed for check in checks) else "not reproduced",
        "checks": [
            {**asdict(check), "name": _seed_named(check.name, first_seed)} for check in checks
        ],
        "arms": figures,
        "curves": {name: curve for name, curve in curves.items() if len(curve["steps"]) > 1},
        "seeds": list(range(first_seed, first_seed + count)),
        "experiments": {name: runs[0].to_json() for name, runs in experiments.items()},
    }


def _seed_named(name: str, first_seed: int) -> str:
    """Name, in what a check is called, the seed itself and not its place among those of the claim."""
    return re.sub(r"\bseed (\d+)", lambda told: f"seed {first_seed + int(told[1])}", name)


def _of_one_commit(root: Path, code: str) -> None:
    """Keep a record from mixing runs of several versions of the code."""
    root.mkdir(parents=True, exist_ok=True)
    note = root / "commit.txt"
    if not any(root.iterdir()):
        write_atomically(note, code + "\n")
    made_by = note.read_text(encoding="utf-8").strip() if note.exists() else "unknown"
    if made_by != code:
        raise UserError(
            f"{root} holds runs of commit {made_by}, and this is {code}: choose another --work"
        )


def _curves(runs: Sequence[FinishedRun]) -> dict[str, list[Any]]:
    rows = [run.rows("evaluate") for run in runs]
    steps = [row["step"] for row in rows[0]]
    return {"steps": steps, "returns": [[row["return_mean"] for row in one] for one in rows]}


def _commit() -> str:
    """Commit of the code, with a plus sign if the tree has changes; unknown outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", str(here.parent)],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")

"""What language models wrote, beside what the model of before wrote after the same prompts."""

from typing import Any

from .figures import first_seeds
from .ranking import Group, Ranking
from .runs import RunRecord
from .words import moment, number, sentence

SAMPLES_SHOWN = 8
TABLES_SHOWN = 6


def sample_tables(group: Group) -> list[dict[str, Any]]:
    """A table a task where all methods began alike (same prompts, same first completions), else one a
    method; of the first seed of each. A cell is a text and a remark.
    """
    tables = [table for ranking in group.rankings for table in _tables(ranking)]
    return tables[:TABLES_SHOWN]


def _tables(ranking: Ranking) -> list[dict[str, Any]]:
    written = [(run, run.samples()) for run in first_seeds(ranking)]
    written = [(run, samples) for run, samples in written if samples]
    if not written:
        return []
    starts = [[(s["prompt"], s["completion"]) for s in samples[0][1]] for _, samples in written]
    begun = {samples[0][0] for _, samples in written}
    alike = all(start == starts[0] for start in starts) and begun == {0}
    if len(written) > 1 and alike and all(len(samples) > 1 for _, samples in written):
        seeds = sorted({run.seed for run, _ in written})
        columns = [("The model of before", written[0][1][0][1])]
        columns += [(f"{run.name}, {moment(s[-1][0])}", s[-1][1]) for run, s in written]
        return [_table(f"{ranking.name}, seed {seeds[0]}", columns)]
    return [_table(_named(run), [_column(step, own) for step, own in s]) for run, s in written]


def _column(step: int, samples: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    return ("The model of before" if step == 0 else sentence(moment(step))), samples


def _named(run: RunRecord) -> str:
    return f"{run.name} on {run.env}, seed {run.seed}"


def _table(name: str, columns: list[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    rows = [
        [(same[0]["prompt"], ""), *[(sample["completion"], _mark(sample)) for sample in same]]
        for same in zip(*[samples for _, samples in columns], strict=False)
    ]
    heads = ["Prompt", *[head for head, _ in columns]]
    return {"name": name, "columns": heads, "rows": rows[:SAMPLES_SHOWN]}


def _mark(sample: dict[str, Any]) -> str:
    marks = [] if sample["completion"] else ["nothing"]
    marks += [f"reward {number(sample['reward'])}"] if "reward" in sample else []
    return ", ".join(marks if sample.get("finished", True) else [*marks, "cut at the length limit"])

"""What a report says in words: numbers, the one-sentence answer, and what to beware of."""

from collections.abc import Iterator, Sequence

import numpy as np

from .aggregate import Interval
from .ranking import SEEDS_NEEDED, Entry, Ranking
from .runs import RunRecord

UNKNOWN = "\N{EN DASH}"
SEEDS_DEPENDABLE = 5  # with fewer, percentile bootstrap intervals are clearly too narrow


def number(value: float, like: Sequence[float] = ()) -> str:
    """A number for a reader: about three digits, thousands apart; `like` fixes the decimals."""
    if not np.isfinite(value):
        return UNKNOWN
    size = max(abs(other) for other in (value, *like) if np.isfinite(other))
    if size and not 1e-3 <= size < 1e9:
        text = f"{value:.2e}"
    else:
        decimals = next((places for places, least in enumerate((100, 10, 1)) if size >= least), 3)
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(estimate: Interval[float]) -> str:
    """Point and ends, as in "2,310 [1,900, 2,600]"; the point alone where no interval exists."""
    point, low, high = (number(value, estimate) for value in estimate)
    return point if low == UNKNOWN else f"{point} [{low}, {high}]"


def duration(seconds: float) -> str:
    """Seconds for a reader, as in "1 h 05 min"."""
    if not np.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plural(amount: int, thing: str) -> str:
    """Counts: "1 seed", "3 seeds"."""
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


def sentence(text: str) -> str:
    """With a capital at its start, names within it as they are."""
    return text[:1].upper() + text[1:]


def moment(step: int) -> str:
    """When something was drawn or written: "before training", "after 1,000 steps"."""
    return "before training" if step == 0 else f"after {plural(step, 'step')}"


def listed(names: Sequence[str]) -> str:
    """Joins: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def default_title(runs: Sequence[RunRecord]) -> str:
    """Such as "DSAC-T and SAC on Hopper-v5", or counts where there are many."""
    methods, tasks = sorted({run.name for run in runs}), sorted({run.env for run in runs})
    subject = listed(methods) if len(methods) <= 3 else plural(len(methods), "method")
    return f"{subject} on {listed(tasks) if len(tasks) <= 2 else plural(len(tasks), 'task')}"


def answer(ranking: Ranking) -> str:
    """One sentence: who is ahead, by how much, and whether that is more than chance."""
    if not ranking.scored:
        what = f"a {ranking.measure} yet, so there is nothing to rank"
        return f"On {ranking.name} no run has recorded {what}."
    where = (
        f"On {ranking.name} after {plural(ranking.step, 'step')}"
        if ranking.step is not None
        else f"Over {ranking.name}, {_plainly(ranking.measure)} normalised per task,"
    )
    first, *others = ranking.scored
    said = "" if ranking.measure == "return" or ranking.step is None else f"{ranking.measure} "
    reached = f"{said}{interval(first.final)} ({_meaning(first, ranking)})"
    if not others:
        alone = "No other method has a score here" if len(ranking.entries) > 1 else ""
        return f"{where} {first.method} reaches {reached}. {alone}{'.' if alone else ''}".strip()
    second = others[0]
    chance = (
        f"the probability that a run of {first.method} beats one of {second.method} is "
        f"{1.0 - second.over_first.point:.2f}"
    )
    tied = [entry for entry in others if not entry.separated]
    if not tied:
        return f"{where} {first.method} ranks first: {reached}; {chance}."
    fewest = min(entry.num_seeds for entry in (first, *tied))
    reason = "their intervals overlap"
    if fewest < SEEDS_NEEDED:
        reason = f"{plural(fewest, 'seed')} cannot tell; run at least {SEEDS_NEEDED}, better 10"
    return (
        f"{where} {first.method} is ahead but not separated from "
        f"{listed([entry.method for entry in tied])} ({reason}): {reached}, against "
        f"{interval(second.final)} for {second.method}; {chance}."
    )


def spoken(ranking: Ranking) -> str:
    """A figure's content in words, for those who cannot see it."""
    parts = [f"{entry.method} {interval(entry.final)}" for entry in ranking.scored]
    return f"Best first: {'; '.join(parts)}." if parts else "No score has been recorded."


def cautions(runs: Sequence[RunRecord], rankings: Sequence[Ranking]) -> list[str]:
    """What a careful reader has to know before believing the rankings."""
    found = [text for ranking in rankings for text in _task_cautions(ranking)]
    fewest = min((entry.num_seeds for ranking in rankings for entry in ranking.scored), default=0)
    if fewest == 1:
        found.append("With one seed there is no interval, and no order of methods can be claimed.")
    elif 1 < fewest < SEEDS_DEPENDABLE:
        found.append(
            f"With as few as {fewest} seeds bootstrap intervals come out too narrow; ten seeds "
            "give a dependable picture."
        )
    by_training = sorted({run.name for run in runs if run.returns_from == "train"})
    if by_training:
        found.append(
            f"{listed(by_training)}: some runs were never evaluated, so their training returns, "
            "with exploration noise, stand in."
        )
    found += [
        f"{run.folder}: {plural(run.unreadable_lines, 'unreadable line')} of metrics left out."
        for run in runs
        if run.unreadable_lines
    ]
    return found


def _task_cautions(ranking: Ranking) -> Iterator[str]:
    runs = [run for entry in ranking.entries for run in entry.runs]
    scored = {run.folder for entry in ranking.entries for run in entry.counted}
    for run in runs:
        remark = "" if run.folder in scored else ", drawn but not scored"
        remark = remark if len(run.steps) else f", no {ranking.measure} recorded yet"
        if remark or not run.finished:
            yield f"{run.name} on {run.env}, seed {run.seed}: {run.status}{remark}."
    if len({run.steps[-1] for run in runs if len(run.steps)}) > 1:
        those = "finished run" if any(run.finished for run in runs) else "run (none is finished)"
        yield (
            f"Runs on {ranking.name} end at different steps; all are compared at step "
            f"{ranking.step:,}, the last that every {those} reached."
        )
    for entry in ranking.entries:
        seeds = [run.seed for run in entry.runs]
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            yield (
                f"{entry.method} on {ranking.name} has several runs of seed "
                f"{listed([str(seed) for seed in repeated])}; they may not be independent."
            )


def _plainly(measure: str) -> str:
    return "returns" if measure == "return" else measure


def _meaning(entry: Entry, ranking: Ranking) -> str:
    seeds = plural(entry.num_seeds, "seed") + (" a task" if len(ranking.tasks) > 1 else "")
    if np.isnan(entry.final.low):
        return f"{seeds}: no interval"
    return f"IQM of {seeds}, 95% interval"

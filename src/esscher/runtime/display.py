"""What a person sees while a run goes on."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


def spoken_rate(steps_per_second: float) -> str:
    """Such as 1,250 steps/s, or 0.42 steps/s; empty before there is any."""
    if steps_per_second <= 0:
        return ""
    digits = ",.0f" if steps_per_second >= 10 else ".2g"
    return f"{steps_per_second:{digits}} steps/s"


def spoken_time(seconds: float) -> str:
    """Such as 95 s, 12 min or 3 h 5 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


class _Rate(TextColumn):
    def render(self, task: Task) -> Text:
        return Text(spoken_rate(task.fields["rate"]), style="cyan")


class Display:
    """A live line on a terminal; elsewhere a plain line now and then.

    Args:
        title: what runs.
        steps: environment steps in all.
        start: steps already done, when resuming.
        console: where to draw; None draws on standard error.
    """

    def __init__(self, title: str, steps: int, start: int = 0, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._title, self._steps, self._start = title, steps, start
        self._began = self._spoken = time.monotonic()
        self._fields: dict[str, Any] = {"rate": 0.0, "headline": ""}
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                _Rate(""),
                TimeRemainingColumn(),
                TextColumn("[green]{task.fields[headline]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task(
                title, total=steps, completed=start, **self._fields
            )
            self._progress.start()

    def update(self, step: int, headline: str | None = None) -> None:
        """Show where the run is; `headline` is the metric that matters, kept until replaced."""
        elapsed = time.monotonic() - self._began
        rate = (step - self._start) / max(elapsed, 1e-9)
        self._fields["rate"] = rate
        if headline is not None:
            self._fields["headline"] = headline
        if self._progress is not None:
            self._progress.update(self._task, completed=step, **self._fields)
        elif headline is not None and time.monotonic() - self._spoken > 10:
            self._spoken = time.monotonic()
            told = [f"step {step:,} of {self._steps:,}"]
            if rate > 0:
                left = max(self._steps - step, 0) / rate
                told += [spoken_rate(rate), f"{spoken_time(left)} left"]
            self._console.print(
                f"{self._title}: {', '.join([*told, headline])}",
                highlight=False,
                soft_wrap=True,  # One line in a log, however narrow the terminal that is not there.
            )

    def note(self, text: str) -> None:
        """A line above the progress."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

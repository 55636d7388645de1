"""What a run says of itself where no terminal redraws it."""

import pytest

from esscher.runtime import display
from esscher.runtime.display import Display, spoken_rate, spoken_time


def test_a_log_gets_whole_lines_and_no_time_before_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, *[120.0] * 3, *[140.0] * 3, *[160.0] * 3])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    shown = Display("dcg_map_elites on a task with a name that is long " * 2, 1_000, 0)
    shown.update(0, "evaluated return -3.0")  # Before any rate is known.
    shown.update(500, "qd score 12.0")
    shown.update(1_040, "qd score 14.0")  # An iteration that ends beyond the budget.
    shown.close()
    start, halfway, end = capsys.readouterr().err.splitlines()
    assert start.endswith("step 0 of 1,000, evaluated return -3.0")
    assert halfway.endswith("step 500 of 1,000, 12 steps/s, 40 s left, qd score 12.0")
    assert end.endswith("step 1,040 of 1,000, 17 steps/s, 0 s left, qd score 14.0")


def test_rates_and_times_are_said_in_what_they_are_large_in() -> None:
    rates = {0.0: "", 0.4213: "0.42 steps/s", 7.0: "7 steps/s", 1250.4: "1,250 steps/s"}
    assert {rate: spoken_rate(rate) for rate in rates} == rates
    times = {0.0: "0 s", 119.4: "119 s", 121.0: "2 min", 7_100.0: "118 min", 11_100.0: "3 h 5 min"}
    assert {seconds: spoken_time(seconds) for seconds in times} == times

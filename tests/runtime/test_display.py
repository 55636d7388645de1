"""What a run says of itself where no terminal redraws it."""

import pytest

from esscher.runtime import display
from esscher.runtime.display import Display


def test_a_log_gets_whole_lines_and_no_time_before_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 120.0, 120.0, 120.0, 140.0, 140.0, 140.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    shown = Display("dcg_map_elites on a task with a name that is long " * 2, 1_000, 0)
    shown.update(500, "qd score 12.0")
    shown.update(1_040, "qd score 14.0")  # An iteration that ends beyond the budget.
    shown.close()
    halfway, end = capsys.readouterr().err.splitlines()
    assert halfway.endswith("step 500 of 1,000, 25 steps/s, 20 s left, qd score 12.0")
    assert end.endswith("step 1,040 of 1,000, 26 steps/s, 0 s left, qd score 14.0")

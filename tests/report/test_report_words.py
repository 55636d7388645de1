"""Numbers and lists as a reader sees them."""

import numpy as np
import pytest

from esscher.report.aggregate import Interval
from esscher.report.words import duration, interval, listed, number, plural


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2310.4, "2,310"), (-42.06, "\N{MINUS SIGN}42.1"), (3.14159, "3.14"), (0.5, "0.500"),
        (0, "0.000"), (1e-5, "1.00e\N{MINUS SIGN}05"), (float("nan"), "\N{EN DASH}"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_interval():
    assert interval(Interval(2310.0, 1900.2, 2600.0)) == "2,310 [1,900, 2,600]"
    assert interval(Interval(9.0, 1.0, 120.0)) == "9 [1, 120]"
    assert interval(Interval(9.0, np.nan, np.nan)) == "9.00"


def test_durations_counts_and_lists():
    assert [duration(seconds) for seconds in (3.2, 59.6, 754, 4000, float("nan"))] == [
        "3 s", "1 min 00 s", "12 min 34 s", "1 h 06 min", "\N{EN DASH}",
    ]  # fmt: skip
    assert (plural(1, "seed"), plural(2, "seed")) == ("1 seed", "2 seeds")
    assert (listed(["a"]), listed(["a", "b", "c"])) == ("a", "a, b and c")

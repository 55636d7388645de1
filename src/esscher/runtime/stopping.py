"""Requests to stop, heard between steps rather than in the middle of one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a second one raises KeyboardInterrupt at once.

    Whoever loops looks whether the list has grown. Python's own KeyboardInterrupt is not enough: it
    is lost when it arrives inside a callback, such as that of a weak reference.
    """
    requested: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:
        pass  # Not in the main thread: whoever started the thread decides.
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

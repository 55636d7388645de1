"""Requests to stop are heard wherever they arrive."""

import os
import signal
import weakref

import pytest

from esscher.runtime.stopping import stop_requests


class Thing:
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_inside_a_callback_is_not_lost(number: int) -> None:
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    with stop_requests() as requested:
        del thing
        assert reference() is None and requested == [number]


def test_the_second_request_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_requests() as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

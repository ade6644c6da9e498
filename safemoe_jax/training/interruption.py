"""SIGTERM and Ctrl-C become a flag that the training loop reads between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


class Flag:
    """Set once a signal has come."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def signals_noted() -> Iterator[Flag]:
    """Within the context the first signal sets the flag; a second one acts as it always does."""
    flag = Flag()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        flag.is_set = True
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

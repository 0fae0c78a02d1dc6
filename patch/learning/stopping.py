"""Stopping in an orderly way: a signal asks, the loop answers after the step that is under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; what batch systems send before they kill (SIGTERM) and, if asked, some time before that (SIGUSR1)."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """The job was asked to stop; its state is saved where it has a directory for that."""

    def __init__(self, step: int, number: int, *, saved: bool):
        what = "; the state is saved" if saved else ""
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}{what}")
        self.step = step
        self.signal = number


class StopRequest:
    """`number` is the signal that came, 0 as long as none did."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice by a person: at once
        self.number = number


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Collect signals while the block runs. Outside the main thread, where Python allows none, nothing is collected."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

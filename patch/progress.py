"""Progress of a loop as log lines: how far, and how long still."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], what: str, log: logging.Logger, total: int | None = None) -> Iterator[Item]:
    """Yield `items`; log "what 12/30, 8 s left" at most every ten seconds."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            log.info("%s %d/%d, %s left", what, done, total, duration((now - started) / done * (total - done)))
            last = now


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""The ends of the jobs' own log files: they may be missing, rotated, half written, or full of progress bars."""

import re
from pathlib import Path

TAIL_BYTES = 4096
LINE_LENGTH = 160
# A job's log that is older than its start is from an earlier run; file servers' clocks may differ by this.
CLOCK_SKEW_SECONDS = 60

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def last_lines(path: str, count: int, since: float) -> list[str]:
    """Up to `count` last meaningful lines of the file; none if it is missing or older than `since` (epoch seconds).

    Meaningful is a line with a letter or digit in it. Of a line that was redrawn (carriage returns) its last state
    counts. Only the last 4 KiB are read.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
            is_old = Path(path).stat().st_mtime < since - CLOCK_SKEW_SECONDS
    except OSError:
        return []
    if is_old:
        return []
    lines = tail.decode("utf-8", errors="replace").split("\n")
    if size > TAIL_BYTES and len(lines) > 1:
        del lines[0]  # cut in the middle
    cleaned = (_clean(line) for line in lines)
    return [line for line in cleaned if any(c.isalnum() for c in line)][-count:]


def _clean(line: str) -> str:
    states = [state for state in _ESCAPES.sub("", line).split("\r") if state.strip()]
    text = _CONTROL.sub("", states[-1]).expandtabs(4).rstrip() if states else ""
    return text if len(text) <= LINE_LENGTH else text[: LINE_LENGTH - 1] + "…"

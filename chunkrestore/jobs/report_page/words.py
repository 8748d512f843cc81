"""Numbers and places in the words of the page."""

from __future__ import annotations

import time
from collections.abc import Sequence

from chunkrestore.jobs.passes import times


def place(item: Sequence[int]) -> str:
    """Return an item of a stage: its block, with time point and channel only where they are not the first."""
    (t, c), index = (*item, 0, 0)[:2], item[2:]
    plane = [f"time point {t}", f"channel {c}"] if t or c or not index else []
    return ", ".join([*map(str, index), *plane])


def shape_text(numbers: Sequence[int] | None) -> str:
    """Return lengths per axis."""
    return times(numbers) if numbers else ""


def duration(seconds: float) -> str:
    """Return how long something short took."""
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{1000 * seconds:.3g} ms"


def clock(at: float) -> str:
    """Return a moment in unix seconds as date and time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))

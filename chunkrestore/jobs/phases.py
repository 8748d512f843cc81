"""What a task spends its time on; and the lock that lets one block be computed while others are read and written.

A worker runs more tasks than it computes blocks: while one computes, the next reads its region and the one
before writes its result, so storage and processor work at the same time. Memory stays bounded by the number of
tasks, device memory by one block.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_computing = threading.Lock()
_local = threading.local()


@dataclass(frozen=True)
class Outcome:
    """What one task gave, and what it took."""

    result: Any
    """What the function returned."""
    seconds: dict[str, float]
    """Time of its phases: ``read``, ``compute``, ``write``; waiting for other blocks is none of them."""
    total: float
    """Wall time of the task in seconds, waiting included."""
    worker: str
    """Host and process that ran it."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Add the time spent inside to a phase of the task that this thread runs."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds: dict[str, float] = _local.__dict__.setdefault("seconds", {})
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def computing() -> Iterator[None]:
    """Wait until no other task of this process computes, then compute."""
    with _computing, phase("compute"):
        yield


def observed(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call a task's function and time its phases."""
    _local.seconds = {}
    started = time.perf_counter()
    result = function(*arguments)
    seconds = {name: round(spent, 4) for name, spent in _local.seconds.items()}
    total = round(time.perf_counter() - started, 4)
    return Outcome(result, seconds, total, f"{socket.gethostname()}:{os.getpid()}")

"""Looking at something every now and then while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(seconds: float, look: Callable[[], object]) -> Iterator[None]:
    """Call `look` in a thread, so many seconds after the last time, while inside."""
    over = threading.Event()

    def look_again() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=look_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

"""A few threads per process that take turns with chunks: what decodes and encodes them holds no interpreter lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

from chunkrestore import backend

Item = TypeVar("Item")

N_THREADS = max(2, min(8, backend.n_threads()))
"""At least two, since threads wait for storage as well, which costs 3 % of a processor where they do not."""


def side_by_side(work: Callable[[Item], object], items: Iterable[Item], n_threads: int = N_THREADS) -> None:
    """Call `work` on every item, on up to `n_threads` threads, of which the caller is one.

    Whatever happens, nothing runs any more when this returns or raises: what was given up cannot overwrite
    what is done again. An error stops the rest; of several, that of the first item is raised, whichever thread
    was faster.
    """
    remaining, lock = enumerate(items), threading.Lock()
    errors: dict[int, BaseException] = {}

    def take_turns() -> None:
        while not errors:
            with lock:
                number, item = next(remaining, (-1, None))
            if item is None:
                return
            try:
                work(item)
            except BaseException as error:
                errors[number] = error

    helpers = [_pool(os.getpid()).submit(take_turns) for _ in range(n_threads - 1)]
    try:
        take_turns()
    except BaseException as error:  # an interrupt between two items
        errors[-1] = error
    finally:
        # One that has not begun waits behind other callers' chunks: there is nothing left for it.
        wait([helper for helper in helpers if not helper.cancel()])
    if errors:
        raise errors[min(errors)]


@lru_cache(maxsize=1)
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(N_THREADS - 1, thread_name_prefix="chunks")

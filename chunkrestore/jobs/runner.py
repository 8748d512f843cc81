"""Run one function over many items, on a cluster or in this process, one task per item.

A task that fails is tried again as `chunkrestore.jobs.causes` says; one that is given up does not stop the
others. Whoever asked for the tasks is told of everything that happens and decides what it means for the job.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from chunkrestore.jobs.causes import Cause, RetryPolicy, cause_of
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import Outcome
from chunkrestore.jobs.places import place_for

if TYPE_CHECKING:
    from distributed import Client

_PATIENCE_SECONDS = 1.0
"""Longest wait for a task before signals, delays and the scheduler are looked at again."""

Arguments: TypeAlias = Callable[[Item], tuple[Any, ...]]
"""Gives the arguments of a task after its item."""


@dataclass(frozen=True)
class Finished:
    """A task came to its end."""

    item: Item
    outcome: Outcome


@dataclass(frozen=True)
class Retried:
    """A task failed and will be tried again."""

    item: Item
    cause: Cause
    message: str
    attempt: int
    """How often it failed for this cause."""
    delay: float
    """Seconds until it is tried again, at the earliest."""


@dataclass(frozen=True)
class Failed:
    """A task was given up."""

    item: Item
    cause: Cause
    message: str
    error: BaseException = field(compare=False)


Happening: TypeAlias = Finished | Retried | Failed


class BlockError(RuntimeError):
    """Blocks failed; the message names them, the cause of the first is chained."""

    def __init__(self, failures: list[Failed], n_items: int) -> None:
        self.failures = failures
        named = "; ".join(f"{place_of(f.item)} failed: {f.message}" for f in failures[:_MOST_NAMED])
        others = len(failures) - _MOST_NAMED
        more = f"; and {others} more of {n_items}" if others > 0 else ""
        super().__init__(
            f"{named}{more}. What is finished is kept; once the cause is mended, the same command or `chunkrestore "
            "retry-failed OUT` goes on"
        )


_MOST_NAMED = 5


class Draining:
    """Asked for by whoever catches signals: tasks in flight come to their end, no others are started."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._n_heeding = 0

    def request(self) -> bool:
        """Ask for it; return False if nobody heeds it, or it was asked for before."""
        first = not self._requested.is_set()
        self._requested.set()
        return first and self._n_heeding > 0

    def forget(self) -> None:
        """Take a request back."""
        self._requested.clear()

    @property
    def requested(self) -> bool:
        """Whether it was asked for."""
        return self._requested.is_set()

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than until it is asked for."""
        self._requested.wait(seconds)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Promise to look at `requested` while inside."""
        self._n_heeding += 1
        try:
            yield
        finally:
            self._n_heeding -= 1


draining = Draining()


class Runner:
    """Where tasks run.

    Parameters
    ----------
    client
        A `distributed.Client`, or None for this process.
    policy
        How often tasks are tried again.
    """

    def __init__(self, client: Client | None, policy: RetryPolicy | None = None) -> None:
        self._client = client
        self._policy = policy or RetryPolicy()

    def map(
        self, function: Callable[..., Any], items: Iterable[Item], arguments: Arguments
    ) -> Iterator[Happening]:
        """Run ``function(item, *arguments(item))`` for every item; yield what happens, in any order.

        Every item ends as `Finished` or as `Failed`. Items are asked for a few at a time, as tasks are started.

        Raises
        ------
        KeyboardInterrupt
            If draining was asked for, after the tasks in flight have come to their end.
        ClusterLostError
            If the scheduler goes away.
        """
        waiting = _Waiting(iter(items), self._policy)
        place = place_for(self._client)
        with draining.heeded():
            try:
                while not waiting.exhausted or place.n_running:
                    if draining.requested and not place.n_running:
                        raise KeyboardInterrupt
                    while not draining.requested and place.n_running < place.window():
                        item = waiting.next(place.n_running)
                        if item is None:
                            break
                        place.start(function, item, arguments(item))
                    if not place.n_running:
                        draining.wait(waiting.seconds())
                        continue
                    patience = waiting.seconds() if place.n_running < place.window() else _PATIENCE_SECONDS
                    for item, ending in place.ended(patience):
                        if isinstance(ending, Outcome):
                            yield Finished(item, ending)
                        else:
                            yield waiting.judge(item, ending)
            finally:
                place.abandon()


class _Waiting:
    """What is still to do: fresh items, those that are tried again after a while, those that are done alone."""

    def __init__(self, fresh: Iterator[Item], policy: RetryPolicy) -> None:
        self._fresh = fresh
        self._policy = policy
        self._delayed: list[tuple[float, Item]] = []
        self._alone: deque[Item] = deque()
        self._in_quarantine: Item | None = None
        self._n_failures: Counter[tuple[Item, Cause]] = Counter()
        self._ahead: list[Item] = []

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to start."""
        return not (self._delayed or self._alone or self._peek())

    def next(self, n_running: int) -> Item | None:
        """Return what to start beside `n_running` tasks, or None for now."""
        if self._in_quarantine is not None and n_running:
            return None
        self._in_quarantine = None
        if self._delayed and self._delayed[0][0] <= time.monotonic():
            return heapq.heappop(self._delayed)[1]
        if self._peek():
            return self._ahead.pop()
        if self._alone and not self._delayed and not n_running:
            self._in_quarantine = self._alone.popleft()
        return self._in_quarantine

    def seconds(self) -> float:
        """Return how long nothing new will be due, as far as is known."""
        due = self._delayed[0][0] - time.monotonic() if self._delayed else _PATIENCE_SECONDS
        return min(max(due, 0.0), _PATIENCE_SECONDS)

    def judge(self, item: Item, error: BaseException) -> Retried | Failed:
        """Decide what becomes of a task that failed."""
        cause, message = cause_of(error), message_of(error)
        self._n_failures[item, cause] += 1
        attempt = self._n_failures[item, cause]
        delay = self._policy.delay(cause, attempt)
        if delay is not None:
            heapq.heappush(self._delayed, (time.monotonic() + delay, item))
            return Retried(item, cause, message, attempt, delay)
        if self._policy.quarantines(cause) and item != self._in_quarantine:
            self._alone.append(item)
            return Retried(item, cause, message, attempt, 0.0)
        return Failed(item, cause, message, error)

    def _peek(self) -> bool:
        if not self._ahead:
            self._ahead.extend(item for _, item in zip(range(1), self._fresh, strict=False))
        return bool(self._ahead)


def place_of(item: Item) -> str:
    """Return which block an item is, in words."""
    t, c, *index = item
    return f"block {tuple(index)} of time point {t}, channel {c}"


def message_of(error: BaseException) -> str:
    """Return what went wrong in one line."""
    if type(error).__name__ == "KilledWorker":
        return (
            "its worker process was killed each time it was tried, most likely for want of memory; use a "
            "smaller `block_shape`, or fewer workers"
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join([what, *getattr(error, "__notes__", ())])

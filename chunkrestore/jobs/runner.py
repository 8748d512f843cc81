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
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from chunkrestore.jobs.causes import Cause, RetryPolicy, cause_of
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import Outcome, observed

if TYPE_CHECKING:
    from distributed import Client, Future

_WINDOW_PER_THREAD = 2
"""Tasks in flight per worker thread: one that runs and one behind it to hide the scheduler's latency."""

_REFRESH_SECONDS = 5.0
"""How often the worker threads are counted again: workers of a batch system come and go."""

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


class ClusterLostError(ConnectionError):
    """The scheduler is gone; what is finished is kept, and the job can be resumed."""


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
        place: _Place = _InProcess() if self._client is None else _OnCluster(self._client)
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
                    for item, outcome, error in place.ended(patience):
                        yield Finished(item, outcome) if error is None else waiting.judge(item, error)
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


Ended: TypeAlias = tuple[Item, Outcome, None] | tuple[Item, None, BaseException]
"""An item with what its task gave, or with its error."""


class _Place(Protocol):
    """Where tasks run, several at a time."""

    @property
    def n_running(self) -> int:
        """Tasks that were started and not yet handed out as ended."""

    def window(self) -> int:
        """How many tasks may be in flight."""

    def start(self, function: Callable[..., Any], item: Item, arguments: tuple[Any, ...]) -> None:
        """Start a task."""

    def ended(self, timeout: float) -> Iterator[Ended]:
        """Yield tasks that have ended; wait up to `timeout` seconds for the first."""

    def abandon(self) -> None:
        """Give up what still runs."""


class _InProcess:
    """One task after the other, in the driver itself."""

    def __init__(self) -> None:
        self._ended: list[Ended] = []

    @property
    def n_running(self) -> int:
        return len(self._ended)

    def window(self) -> int:
        return 1

    def start(self, function: Callable[..., Any], item: Item, arguments: tuple[Any, ...]) -> None:
        try:
            self._ended.append((item, observed(function, item, *arguments), None))
        except Exception as error:
            self._ended.append((item, None, error))

    def ended(self, timeout: float) -> Iterator[Ended]:
        while self._ended:
            yield self._ended.pop()

    def abandon(self) -> None:
        self._ended.clear()


class _OnCluster:
    """Several tasks at a time, on the workers of a Dask cluster."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._running: dict[Any, tuple[Future, Item]] = {}
        self._done: SimpleQueue[Any] = SimpleQueue()
        self._counted = -_REFRESH_SECONDS
        self._window = 0

    @property
    def n_running(self) -> int:
        return len(self._running)

    def window(self) -> int:
        if time.monotonic() - self._counted > _REFRESH_SECONDS:
            with _scheduler_needed():
                n_threads = sum(self._client.nthreads().values())
            self._window = _WINDOW_PER_THREAD * max(1, n_threads)
            self._counted = time.monotonic()
        return self._window

    def start(self, function: Callable[..., Any], item: Item, arguments: tuple[Any, ...]) -> None:
        with _scheduler_needed():
            future = self._client.submit(observed, function, item, *arguments, pure=False)
            self._running[future.key] = future, item
            future.add_done_callback(self._note)

    def _note(self, future: Future) -> None:
        self._done.put(future.key)

    def ended(self, timeout: float) -> Iterator[Ended]:
        try:
            key = self._done.get(timeout=timeout)
        except Empty:
            if self._client.status != "running":
                raise ClusterLostError(_LOST) from None
            return
        future, item = self._running.pop(key)
        # Released at once: a result that is still held when its worker dies would be computed again.
        ended = _ending(future, item)
        future.release()
        del future
        yield ended

    def abandon(self) -> None:
        if self._running and self._client.status == "running":
            self._client.cancel([future for future, _ in self._running.values()])
        self._running.clear()


_LOST = "the Dask scheduler is gone; what is finished is kept"


@contextmanager
def _scheduler_needed() -> Iterator[None]:
    """Turn what Dask raises without a scheduler into `ClusterLostError`."""
    from distributed import CancelledError

    try:
        yield
    except (OSError, CancelledError) as error:
        raise ClusterLostError(_LOST) from error


def _ending(future: Future, item: Item) -> Ended:
    """Return how a task has ended, fetching its result."""
    if future.status != "error":
        try:
            with _scheduler_needed():
                return (
                    item,
                    future.result(),
                    None,
                )  # raises if cancelled, as all are when the scheduler is lost
        except Exception:
            # A result that was lost with its worker is computed again, and that may have failed.
            if future.status != "error":
                raise
    return item, None, future.exception()


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

"""Where tasks run: in the driver, or on the workers of a cluster. One task is one item; nothing is tried again here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import Outcome, observed

if TYPE_CHECKING:
    from distributed import Client, Future

_REFRESH_SECONDS = 5.0
"""How often the worker threads are counted again: workers of a batch system come and go."""

_WINDOW_PER_THREAD = 2
"""Tasks in flight per worker thread: one that runs and one behind it to hide the scheduler's latency."""


class ClusterLostError(ConnectionError):
    """The scheduler is gone; what is finished is kept, and the job can be resumed."""


Ended: TypeAlias = tuple[Item, Outcome | BaseException]
"""An item with what its task gave, or with its error."""


class Place(Protocol):
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


def place_for(client: Client | None) -> Place:
    """Return where tasks run: on the workers of `client`, or without one in this process."""
    return _InProcess() if client is None else _OnCluster(client)


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
            self._ended.append((item, observed(function, item, *arguments)))
        except Exception as error:
            self._ended.append((item, error))

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
            keys = [self._done.get(timeout=timeout)]
        except Empty:
            if self._client.status != "running":
                raise ClusterLostError(_LOST) from None
            return
        with suppress(Empty):
            while True:
                keys.append(self._done.get_nowait())
        ended = [self._running.pop(key) for key in keys]
        outcomes = self._fetched([future for future, _ in ended])
        endings = [(item, outcomes.get(future.key) or _ending(future)) for future, item in ended]
        # All at once, before any is journalled: a result that is still held when its worker dies is computed again.
        for future, _ in ended:
            future.release()
        yield from endings

    def _fetched(self, futures: list[Future]) -> dict[Any, Outcome]:
        """Return results in one round trip; none if that fails for any of them."""
        finished = {future.key: future for future in futures if future.status == "finished"}
        if len(finished) < 2:
            return {}
        try:
            fetched: dict[Any, Outcome] = self._client.gather(finished)
        except Exception:
            return {}  # one by one then, to find out which
        return fetched

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


def _ending(future: Future) -> Outcome | BaseException:
    """Return how a task has ended, fetching its result."""
    if future.status != "error":
        try:
            with _scheduler_needed():
                # Raises if the future was cancelled, as all are when the scheduler is lost.
                outcome: Outcome = future.result()
                return outcome
        except Exception:
            # A result that was lost with its worker is computed again, and that may have failed.
            if future.status != "error":
                raise
    error: BaseException = future.exception()
    return error

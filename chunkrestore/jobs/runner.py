"""Run one function over many items, on a cluster or in this process, one task per item."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from chunkrestore.jobs.ledger import Item

if TYPE_CHECKING:
    from distributed import Client, Future

_WINDOW_PER_THREAD = 3
"""Tasks in flight per worker thread: one that runs, and enough behind it to hide the scheduler's latency."""

_REFRESH_SECONDS = 5.0
"""How often the worker threads are counted again: workers of a batch system come and go."""

Arguments: TypeAlias = Callable[[Item], tuple[Any, ...]]
"""Gives the arguments of a task after its item."""


interrupted = threading.Event()
"""Set by whoever catches signals: no more blocks are started."""


class BlockError(RuntimeError):
    """A block failed; the message names it, the cause is chained."""


class ClusterLostError(ConnectionError):
    """The scheduler is gone; what is finished is kept, and the job can be resumed."""


class Runner:
    """Where tasks run.

    Parameters
    ----------
    client
        A `distributed.Client`, or None for this process.
    """

    def __init__(self, client: Client | None) -> None:
        self._client = client

    def map(
        self, function: Callable[..., Any], items: Sequence[Item], arguments: Arguments
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *arguments(item)))`` as items finish, in any order.

        Raises
        ------
        BlockError
            As soon as one item fails. Tasks that run already may finish; no new ones are started.
        ClusterLostError
            If the scheduler goes away.
        """
        if self._client is not None:
            yield from _map_on_cluster(self._client, function, items, arguments)
            return
        for item in items:
            try:
                result = function(item, *arguments(item))
            except Exception as error:
                raise _block_error(item, error) from error
            yield item, result
            _stop_if_interrupted()


def _map_on_cluster(
    client: Client, function: Callable[..., Any], items: Sequence[Item], arguments: Arguments
) -> Iterator[tuple[Item, Any]]:
    from distributed import CancelledError, as_completed

    waiting = iter(items)
    running: dict[Future, Item] = {}
    completed = as_completed(loop=client.loop)
    window = _Window(client)

    def refill() -> None:
        for _, item in zip(range(window.size() - len(running)), waiting, strict=False):
            future = client.submit(function, item, *arguments(item), pure=False)
            running[future] = item
            completed.add(future)

    try:
        refill()
        for future in completed:
            item = running.pop(future)
            yield item, _result(item, future)
            # Released at once: a result that is still held when its worker dies would be computed again.
            future.release()
            _stop_if_interrupted()
            refill()
    except (OSError, CancelledError) as error:
        raise ClusterLostError("the Dask scheduler is gone; what is finished is kept") from error
    finally:
        if running and client.status == "running":
            client.cancel(list(running))


def _stop_if_interrupted() -> None:
    if interrupted.is_set():
        raise KeyboardInterrupt


class _Window:
    """How many tasks may be in flight, by the worker threads there are."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._counted = -_REFRESH_SECONDS
        self._size = 0

    def size(self) -> int:
        if time.monotonic() - self._counted > _REFRESH_SECONDS:
            self._size = _WINDOW_PER_THREAD * max(1, sum(self._client.nthreads().values()))
            self._counted = time.monotonic()
        return self._size


def _result(item: Item, future: Future) -> Any:
    if future.status != "error":
        return future.result()  # raises if the future was cancelled, as all are when the scheduler is lost
    error = future.exception()
    raise _block_error(item, error) from error


def _block_error(item: Item, error: BaseException) -> BlockError:
    t, c, *index = item
    what = _reason(error)
    notes = " ".join(getattr(error, "__notes__", ()))
    return BlockError(f"block {tuple(index)} of time point {t}, channel {c} failed: {what} {notes}".rstrip())


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return (
            "its worker process was killed each time it was tried, most likely for want of memory; use a "
            "smaller `block_shape`, or fewer workers"
        )
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""Run one function over many items, on a cluster or in this process, one task per item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from chunkrestore.jobs.ledger import Item

if TYPE_CHECKING:
    from distributed import Client

_WINDOW_PER_THREAD = 3
"""Tasks in flight per worker thread: one that runs, and enough behind it to hide the scheduler's latency."""


class BlockError(RuntimeError):
    """A block failed; the message names it, the cause is chained."""


class Runner:
    """Where tasks run.

    Parameters
    ----------
    client
        A `distributed.Client`, or None for this process.
    """

    def __init__(self, client: Client | None) -> None:
        self._client = client

    @property
    def n_threads(self) -> int:
        """Worker threads at this moment."""
        if self._client is None:
            return 1
        return sum(worker["nthreads"] for worker in self._client.scheduler_info(n_workers=-1)["workers"].values()) or 1

    def map(
        self, function: Callable[..., Any], items: Sequence[Item], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[tuple[Item, Any]]:
        """Yield ``(item, function(item, *arguments(item)))`` as items finish, in any order.

        Raises
        ------
        BlockError
            As soon as one item fails. Tasks that run already may finish; no new ones are started.
        """
        if self._client is None:
            for item in items:
                try:
                    yield item, function(item, *arguments(item))
                except Exception as error:
                    raise _block_error(item, error) from error
            return
        yield from self._map_on_cluster(self._client, function, items, arguments)

    def _map_on_cluster(
        self, client: Client, function: Callable[..., Any], items: Sequence[Item], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[tuple[Item, Any]]:
        from distributed import as_completed

        waiting = iter(items)
        running: dict[Any, tuple[Item, Any]] = {}
        completed = as_completed()

        def submit(n: int) -> None:
            for _, item in zip(range(n), waiting, strict=False):
                future = client.submit(function, item, *arguments(item), pure=False)
                running[future.key] = item, future
                completed.add(future)

        try:
            submit(_WINDOW_PER_THREAD * self.n_threads)
            for future in completed:
                item, _ = running.pop(future.key)
                if future.status != "finished":
                    error = future.exception()
                    raise _block_error(item, error) from error
                yield item, future.result()
                # Released at once: a result that is still held when its worker dies would be computed again.
                future.release()
                submit(1)
        finally:
            client.cancel([future for _, future in running.values()])


def _block_error(item: Item, error: BaseException) -> BlockError:
    t, c, *index = item
    what = str(error) or type(error).__name__
    notes = " ".join(getattr(error, "__notes__", ()))
    return BlockError(
        f"block {tuple(index)} of time point {t}, channel {c} failed: {type(error).__name__}: {what} {notes}".rstrip()
    )

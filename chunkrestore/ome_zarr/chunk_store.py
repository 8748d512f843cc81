"""Zarr stores for chunks: behind a URL, and for writing what is never read back.

Imported only where an array is opened, because it loads zarr.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any, Self

import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore, StorePath, WrapperStore

from chunkrestore.ome_zarr import remote
from chunkrestore.ome_zarr.remote_errors import named


class RemoteStore(ObjectStore[Any]):
    """The objects below a URL, with errors that name them and tell what can heal from what is damaged."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        super().__init__(remote.client(url), read_only=read_only)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store, to be read only or not."""
        return type(self)(self.url, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object or a part of it, or None if there is none."""
        with named(remote.join(self.url, key)):
            return await super().get(key, prototype, byte_range)

    async def get_up_to(self, key: str, prototype: BufferPrototype, limit: int) -> Buffer | None:
        """Return an object, or None if there is none; without asking for a part, which not all servers send.

        Raises
        ------
        ValueError
            If it has more than `limit` bytes, before any of them is read.
        """
        with named(remote.join(self.url, key)) as obstore:
            try:
                answer = await obstore.get_async(self.store, key)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None
            if answer.meta["size"] > limit:
                raise ValueError(
                    f"{key} has {answer.meta['size']} bytes, where a chunk takes at most {limit}"
                )
            return prototype.buffer.from_bytes(await answer.bytes_async())

    async def exists(self, key: str) -> bool:
        """Return whether there is an object."""
        with named(remote.join(self.url, key)):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object in one atomic step."""
        with named(remote.join(self.url, key)):
            await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object; an absent one is fine."""
        with named(remote.join(self.url, key)):
            await super().delete(key)

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yield the names below a prefix."""
        with named(remote.join(self.url, prefix)):
            async for name in super().list_dir(prefix):
                yield name


@contextmanager
def replacing(array: zarr.Array[Any]) -> Iterator[zarr.Array[Any]]:
    """Lend `array` for writing whole chunks or shards of it: nothing is read, and nothing is written later.

    zarr writes chunks side by side and raises the first error while others are still on their way. One that
    arrives after the caller has tried again would replace newer voxels by older ones.
    """
    chunks = _Replaced(array.store)
    try:
        yield zarr.Array(
            zarr.AsyncArray(array.metadata, StorePath(chunks, array.path), array.async_array.config)
        )
    finally:
        chunks.settle()


class _Replaced(WrapperStore[Store]):
    """A store whose chunks look absent, since what is replaced whole need not be read, and may be damaged."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._changed = Condition()
        self._n_under_way = 0
        self._is_over = False

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return None."""
        return None

    async def set(self, key: str, value: Buffer) -> None:
        """Write a chunk, unless it is too late."""
        with self._under_way() as on_time:
            if on_time:
                await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Remove a chunk, since it holds nothing but zeros, unless it is too late."""
        with self._under_way() as on_time:
            if on_time:
                await super().delete(key)

    def settle(self) -> None:
        """Let nothing more begin, and wait until what is under way has ended."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: self._n_under_way == 0)

    @contextmanager
    def _under_way(self) -> Iterator[bool]:
        with self._changed:
            on_time = not self._is_over
            self._n_under_way += 1
        try:
            yield on_time
        finally:
            with self._changed:
                self._n_under_way -= 1
                self._changed.notify_all()

"""The zarr store of an array in a zip file.

Imported only where an array is opened, because it loads zarr.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Self

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from chunkrestore.ome_zarr import zipped
from chunkrestore.ome_zarr.limits import MAX_SHARD_NBYTES


class ZippedStore(Store):
    """The members of a zip file below a folder; it can be read by any number of threads, and holds nothing open."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, folder: str, *, read_only: bool = True) -> None:
        super().__init__(read_only=read_only)
        self.folder = folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZippedStore) and other.folder == self.folder

    def with_read_only(self, read_only: bool = False) -> Self:
        """Return the same store; what is written to it raises either way."""
        return type(self)(self.folder, read_only=read_only)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a member or a part of it, or None if there is none."""
        match byte_range:
            case RangeByteRequest(start, end):
                start, nbytes = start, end - start
            case SuffixByteRequest(suffix):
                start, nbytes = -suffix, suffix
            case OffsetByteRequest(offset):
                start, nbytes = offset, MAX_SHARD_NBYTES
            case _:
                start, nbytes = 0, MAX_SHARD_NBYTES
        path = zipped.join(self.folder, key)
        content = await asyncio.to_thread(zipped.read_part, path, start, nbytes)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of members."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Return whether there is a member."""
        return zipped.is_file(zipped.join(self.folder, key))

    async def set(self, key: str, value: Buffer) -> None:
        """Raise: nothing can be written into a zip file."""
        zipped.writable(self.folder)

    async def delete(self, key: str) -> None:
        """Raise: nothing can be removed from a zip file."""
        zipped.writable(self.folder)

    def list(self) -> AsyncIterator[str]:
        """Raise: nothing here needs a list."""
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Raise: nothing here needs a list."""
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Raise: nothing here needs a list."""
        raise NotImplementedError

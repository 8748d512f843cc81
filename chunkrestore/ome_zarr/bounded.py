"""zarr arrays that read no more than their metadata allows: bounded files, bounded decompression.

A chunk of a few kilobytes can expand to gigabytes, and a chunk's file can be of any size, or no file at
all. Metadata says how many bytes a chunk decodes to, so both ends are known before anything is read: files are
read up to what an incompressible chunk would take, and a compressor has to arrive at the chunk's size.
Blosc, Zstandard and LZ4 frames tell their size in their header, which is compared before they are decoded by
the codecs as ever; the other formats tell none, and are decoded here until the chunk's size is exceeded.

Loaded on first use only, because it defines subclasses of zarr's classes.
"""

from __future__ import annotations

import asyncio
import bz2
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, StorePath, WrapperStore

from chunkrestore.ome_zarr.chunk_store import RemoteStore
from chunkrestore.ome_zarr.limits import CHECKSUMS, COMPRESSORS
from chunkrestore.ome_zarr.store import check_place
from chunkrestore.ome_zarr.untrusted import read_part

Json = dict[str, Any]

_SLACK = 2**16
"""Headers of codecs and index of a small shard."""


class BoundedStore(WrapperStore[Store]):
    """The store of one array, which reads whole objects and parts of them up to a limit each."""

    def __init__(self, store: Store, whole_nbytes: int, part_nbytes: int) -> None:
        super().__init__(store)
        self.whole_nbytes, self.part_nbytes = whole_nbytes, part_nbytes
        self._own: set[str] = set()

    @property
    def inner(self) -> Store:
        """The store that is read and written."""
        return self._store

    def _with_store(self, store: Store) -> BoundedStore:
        return type(self)(store, self.whole_nbytes, self.part_nbytes)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object or a part of it, or None if there is none.

        Raises
        ------
        ValueError
            If it is larger than an array of this kind can have made it.
        """
        if byte_range is None and isinstance(self._store, RemoteStore):
            return await self._store.get_up_to(key, prototype, self.whole_nbytes)
        if byte_range is None:
            # One byte more than allowed tells a large object apart without reading it
            found = await self._get(key, prototype, 0, self.whole_nbytes + 1)
            if found is not None and len(found) > self.whole_nbytes:
                raise ValueError(f"{key} is larger than {self.whole_nbytes} bytes, the most that it may have")
            return found
        start, n = _start_and_length(byte_range)
        if not 0 < n <= self.part_nbytes:
            raise ValueError(
                f"{key} is said to hold a part of {n} bytes, where a chunk has up to {self.part_nbytes}"
            )
        found = await self._get(key, prototype, start, n)
        if found is not None and len(found) != n:  # zarr would take what is missing for an empty chunk
            raise ValueError(f"{key} ends {n - len(found)} bytes before the part that its index names")
        return found

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object.

        Raises
        ------
        ValueError
            If a link inside the store leads to where it would be written.
        """
        self.check_own(key)
        await super().set(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object; as for `set`."""
        self.check_own(key)
        await super().delete(key)

    def check_own(self, key: str) -> None:
        """Raise if the folder of a file lies behind a link. The file may be one, and is replaced.

        Raises
        ------
        ValueError
            If it does.
        """
        folder = key.rpartition("/")[0]
        if folder and folder not in self._own and isinstance(self._store, LocalStore):
            check_place(str(self._store.root), folder, own=True)
            self._own.add(folder)

    async def _get(self, key: str, prototype: BufferPrototype, start: int, n: int) -> Buffer | None:
        """Return up to `n` bytes of an object; a negative `start` counts from its end."""
        if not isinstance(self._store, LocalStore):
            part = SuffixByteRequest(-start) if start < 0 else RangeByteRequest(start, start + n)
            return await self._store.get(key, prototype, part)
        data = await asyncio.to_thread(read_part, str(self._store.root / key), start, n)
        return None if data is None else prototype.buffer.from_bytes(data)


def _start_and_length(byte_range: ByteRequest) -> tuple[int, int]:
    """Return where a part begins, counted from the end if negative, and its length, 0 if it has none."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end - byte_range.start
    return (-byte_range.suffix, byte_range.suffix) if isinstance(byte_range, SuffixByteRequest) else (0, 0)


@dataclass(frozen=True)
class BoundedCodec(BytesBytesCodec):
    """A compressor of zarr v3 whose result must be as large as what went into it."""

    codec: BytesBytesCodec
    name: str
    """As in `COMPRESSORS`."""
    n_extra: int
    """Bytes that checksums appended to a chunk before it was compressed."""
    is_fixed_size = False

    def to_dict(self) -> Json:
        """Return the codec as it stands in metadata."""
        return self.codec.to_dict()

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> BoundedCodec:
        """Return the codec with what it takes from the array, such as the size of its numbers."""
        return replace(self, codec=self.codec.evolve_from_array_spec(array_spec))

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Raise: the size of a compressed chunk cannot be known."""
        raise NotImplementedError

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        itemsize = chunk_spec.dtype.to_native_dtype().itemsize
        nbytes = math.prod(chunk_spec.shape) * itemsize + self.n_extra
        data = chunk_data.as_numpy_array()
        if is_promised(self.name, data, nbytes):
            return await self.codec._decode_single(chunk_data, chunk_spec)
        content = await asyncio.to_thread(inflate, self.name, data, nbytes)
        return chunk_spec.prototype.buffer.from_bytes(content)

    async def _encode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await self.codec._encode_single(chunk_data, chunk_spec)


@dataclass(frozen=True)
class BoundedNumcodec:
    """A compressor of zarr v2 whose result must be as large as what went into it."""

    codec_id: ClassVar[str] = "bounded"
    codec: Any
    nbytes: int
    """Of a chunk after its filters."""

    def encode(self, buf: Any) -> Any:
        """Return `buf` compressed."""
        return self.codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return `buf` decompressed.

        Raises
        ------
        ValueError
            If it does not expand to `nbytes`.
        """
        data = np.frombuffer(buf, np.uint8)
        if is_promised(self.codec.codec_id, data, self.nbytes):
            return self.codec.decode(buf, out)
        return inflate(self.codec.codec_id, data, self.nbytes)

    def get_config(self) -> Json:
        """Return the codec as it stands in metadata."""
        config: Json = self.codec.get_config()
        return config

    @classmethod
    def from_config(cls, config: Json) -> BoundedNumcodec:
        """Raise: a configuration alone does not say how large a chunk is."""
        raise NotImplementedError


def is_promised(name: str, data: np.ndarray, nbytes: int) -> bool:
    """Return whether the header of compressed `data` says that it expands to `nbytes`.

    False if such data has no header that tells, and has to be decoded by `inflate`.

    Raises
    ------
    ValueError
        If the header says anything else.
    """
    head = data[:18].tobytes()
    if name == "blosc":
        claimed = int.from_bytes(head[4:8], "little")
        n_stored = int.from_bytes(head[12:16], "little")
        if len(head) < 16 or n_stored > data.size:  # Blosc trusts the second number and would read on
            raise ValueError(f"compressed data ends after {data.size} bytes instead of {n_stored}")
    elif name == "lz4":
        claimed = int.from_bytes(head[:4], "little")
    elif name == "zstd":
        known = _zstd_content_nbytes(head)
        if known is None:
            return False
        claimed = known
    else:
        return False
    if claimed != nbytes:
        raise ValueError(f"compressed data claims to hold {claimed} bytes, where a chunk has {nbytes}")
    return True


def _zstd_content_nbytes(head: bytes) -> int | None:
    """Return the content size in the header of a Zstandard frame (RFC 8878, 3.1.1.1), None without one."""
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6:
        raise ValueError("compressed data does not begin with a Zstandard frame")
    descriptor = head[4]
    is_single_segment = bool(descriptor & 0x20)
    size_flag = descriptor >> 6
    if size_flag == 0 and not is_single_segment:
        return None
    start = 5 + (0 if is_single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    field = head[start : start + (1, 2, 4, 8)[size_flag]]
    return int.from_bytes(field, "little") + (256 if size_flag == 1 else 0)


def inflate(name: str, data: np.ndarray, nbytes: int) -> bytes | np.ndarray:
    """Return `data` decompressed, without ever holding more than `nbytes` and a byte of it.

    Raises
    ------
    ValueError
        If it does not expand to `nbytes`, or cannot be decompressed.
    """
    if name == "zstd":
        from numcodecs.zstd import decompress

        return np.asarray(decompress(data, np.empty(nbytes, np.uint8)))
    decompressor: Any
    if name == "bz2":
        decompressor = bz2.BZ2Decompressor()
    else:
        decompressor = zlib.decompressobj(zlib.MAX_WBITS + (16 if name == "gzip" else 0))
    try:
        result: bytes = decompressor.decompress(data, nbytes + 1)
    except (zlib.error, OSError) as error:
        raise ValueError(f"compressed data is damaged: {error}") from None
    if len(result) != nbytes or not decompressor.eof:
        more = "or more" if len(result) > nbytes else "and then ends"
        raise ValueError(f"compressed data holds {len(result)} bytes {more}, where a chunk has {nbytes}")
    return result


def open_array(document: Json, store: Store, *, writable: bool) -> zarr.Array[Any]:
    """Return the array that `document` describes, in a store whose root it is.

    Parameters
    ----------
    document
        ``zarr.json`` or ``.zarray``; it has passed `chunkrestore.ome_zarr.limits.check_array`.
    store
        Holds the chunks; metadata is not read from it.
    writable
        Whether chunks may be written.
    """
    place = StorePath(store.with_read_only(not writable))
    plain = zarr.AsyncArray.from_dict(place, {"attributes": {}, **document})
    metadata: Any = plain.metadata
    n_voxels, n_chunks = (
        math.prod(plain.chunks),
        math.prod(plain.shards or plain.chunks) // math.prod(plain.chunks),
    )
    if metadata.zarr_format == 2:
        chunk_nbytes = _filtered_nbytes(metadata.filters or (), n_voxels, plain.dtype)
        if metadata.compressor is not None:
            metadata = replace(metadata, compressor=BoundedNumcodec(metadata.compressor, chunk_nbytes))
    else:
        chunk_nbytes = n_voxels * plain.dtype.itemsize
        metadata = replace(metadata, codecs=_bounded(metadata.codecs))
    part = _stored_nbytes(chunk_nbytes)
    index_nbytes = 16 * n_chunks + _SLACK
    bounded = BoundedStore(place.store, part * n_chunks + index_nbytes, max(part, index_nbytes))
    return zarr.Array(zarr.AsyncArray(metadata, StorePath(bounded)))


def _stored_nbytes(nbytes: int) -> int:
    """Return the most that a chunk takes: no compressor adds a sixteenth to what it cannot pack."""
    return nbytes + nbytes // 16 + _SLACK


def _filtered_nbytes(filters: Iterable[Any], n_voxels: int, dtype: np.dtype[Any]) -> int:
    """Return the size of a chunk after the filters of zarr v2."""
    n_extra = 0
    for codec in filters:
        dtype = getattr(codec, "astype", getattr(codec, "encode_dtype", dtype))
        n_extra += 4 * (codec.codec_id in CHECKSUMS)
    return n_voxels * dtype.itemsize + n_extra


def _bounded(codecs: Iterable[Any]) -> list[Any]:
    """Return codecs of zarr v3 with bounded compressors, in shards as well."""
    result: list[Any] = []
    n_extra = 0
    for codec in codecs:
        name = str(codec.to_dict()["name"]).removeprefix("numcodecs.")
        if isinstance(codec, ShardingCodec):
            codec = ShardingCodec(
                chunk_shape=codec.chunk_shape,
                codecs=_bounded(codec.codecs),
                index_codecs=codec.index_codecs,
                index_location=codec.index_location,
            )
        result.append(BoundedCodec(codec, name, n_extra) if name in COMPRESSORS else codec)
        n_extra += 4 * (name in CHECKSUMS)
    return result

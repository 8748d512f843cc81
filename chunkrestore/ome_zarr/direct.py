"""Chunks of local arrays, decoded and encoded one by one instead of by way of zarr's event loop.

zarr makes several tasks, thread switches and copies of every chunk, which together take longer than its
decompression (`benchmarks/store_throughput.py`). Here threads take one chunk after the other, decode it into a
buffer that stays in their cache, and copy what is wanted of it to its place. What comes out, and what is written,
is the same to the byte; limits are those of `chunkrestore.ome_zarr.bounded`.

Only the common kinds of arrays are handled: files on disk, C order, one compressor at most. zarr does the others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.storage import LocalStore

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr import local
from chunkrestore.ome_zarr.bounded import BoundedNumcodec, BoundedStore
from chunkrestore.ome_zarr.damage import DamagedUnitError
from chunkrestore.ome_zarr.encoding import Encoding, Json, encoding_of
from chunkrestore.ome_zarr.shards import Index, PartReader, ShardIndex, checked, place_of, with_checksum
from chunkrestore.ome_zarr.side_by_side import N_THREADS, side_by_side
from chunkrestore.ome_zarr.untrusted import open_regular, read_part

Fetch = Callable[[Index], bytes | None]
"""Returns the bytes of a chunk, or None if it is not stored."""

_SCRATCH_NBYTES = 2**28
"""Most that the buffers of all threads of one read or write take, unless one chunk takes more."""


@dataclass(frozen=True, eq=False)
class DirectArray:
    """An array whose files are read and written here."""

    encoding: Encoding
    codec: BoundedNumcodec | None
    """Its compressor."""
    fill: np.ndarray
    """Value of voxels that are not stored: an array without axes, in the store's byte order."""
    store: BoundedStore
    """Says how large files may be, and which folders may be written to."""
    folder: str
    """Of the array."""
    key: Callable[[Index], str]
    """Returns the name of the file of a chunk or shard."""

    def read(self, selection: Slices) -> np.ndarray:
        """Return a region, in native byte order.

        Parameters
        ----------
        selection
            Per axis as stored: start and stop inside the array, step 1.

        Raises
        ------
        DamagedUnitError
            If a chunk cannot be decoded.
        OSError
            If a file cannot be read.
        """
        lengths = tuple(s.stop - s.start for s in selection)
        out = np.empty(lengths, self.encoding.dtype.newbyteorder("="))
        if self.encoding.index is None:
            self._read_chunks(out, selection, selection, self._read_file)
            return out
        for unit in _touched(selection, self.encoding.unit):
            try:
                with self._shard(unit, self.encoding.index) as fetch:
                    self._read_chunks(out, selection, _common(unit, self.encoding.unit, selection), fetch)
            except ValueError as error:
                raise DamagedUnitError(unit, error) from error
        return out

    def write(self, selection: Slices, array: np.ndarray) -> None:
        """Replace whole chunks or shards; of those that the end of the array cuts, what lies inside.

        Nothing is read, every file is replaced in one atomic step, and nothing is written any more when this
        returns or raises. A file that would hold nothing but the fill value is removed.

        Parameters
        ----------
        selection
            As for `read`.
        array
            Of the same shape, of a dtype that can be cast safely.

        Raises
        ------
        OSError
            If a file cannot be written.
        ValueError
            If a link leads to where it would be written.
        """
        scratch = _Scratch(self.encoding)
        units = _touched(selection, self.encoding.unit)

        def encoded(chunk: Index) -> bytes | None:
            place = _common(chunk, self.encoding.chunk, selection)
            return self._encode(array[_seen_from(selection, place)], scratch)

        def write_chunk(chunk: Index) -> None:
            data = encoded(chunk)
            self._replace(chunk, [] if data is None else [data])

        if self.encoding.index is None:
            side_by_side(write_chunk, units, self._n_threads(selection))
            return
        for unit in units:
            region = _common(unit, self.encoding.unit, selection)
            parts: dict[Index, bytes | None] = {}

            def encode_chunk(chunk: Index, parts: dict[Index, bytes | None] = parts) -> None:
                parts[self._inside_unit(chunk)] = encoded(chunk)

            side_by_side(encode_chunk, _touched(region, self.encoding.chunk), self._n_threads(region))
            self._replace(unit, self.encoding.index.assemble(parts))

    def _read_chunks(self, out: np.ndarray, selection: Slices, region: Slices, fetch: Fetch) -> None:
        """Fill the part `region` of `out`, which holds `selection`."""
        scratch = _Scratch(self.encoding)

        def read_chunk(index: Index) -> None:
            place = _common(index, self.encoding.chunk, region)
            target = out[_seen_from(selection, place)]
            try:
                data = fetch(index)
                if data is None:
                    target[...] = self.fill
                    return
                fits = target.shape == self.encoding.chunk and target.flags.c_contiguous
                into = target if fits and out.dtype == self.encoding.dtype else scratch.chunk
                chunk = self._decode(data, into)
            except (OSError, MemoryError):
                raise
            except Exception as error:
                raise DamagedUnitError(index, error) from error
            if chunk is not target:
                origin = _cell(index, self.encoding.chunk)
                target[...] = chunk[_seen_from(origin, place)]

        side_by_side(read_chunk, _touched(region, self.encoding.chunk), self._n_threads(region))

    def _n_threads(self, region: Slices) -> int:
        """Return how many threads a region keeps busy within the memory that is meant for them."""
        n_chunks = sum(1 for _ in zip(_touched(region, self.encoding.chunk), range(N_THREADS), strict=False))
        return max(1, min(n_chunks, _SCRATCH_NBYTES // self.encoding.chunk_nbytes))

    def _read_file(self, chunk: Index) -> bytes | None:
        """Return the file of a chunk, of which one byte too many is read to tell a larger one apart."""
        limit = self.store.whole_nbytes
        data = read_part(self._path(chunk), 0, limit + 1)
        if data is not None and len(data) > limit:
            raise ValueError(f"the file is larger than {limit} bytes, the most that a chunk takes")
        return data

    @contextmanager
    def _shard(self, unit: Index, index: ShardIndex) -> Iterator[Fetch]:
        """Lend what reads the chunks of a shard, all of them from the same file even if it is replaced."""
        file = open_regular(self._path(unit))
        if file is None:
            yield lambda _chunk: None
            return
        with file:
            reader = PartReader(file)
            if reader.nbytes > self.store.whole_nbytes:
                raise ValueError(
                    f"the file is larger than {self.store.whole_nbytes} bytes, the most of a shard"
                )
            start = reader.nbytes - index.nbytes if index.at_end else 0
            table = index.parse(reader.part(start, index.nbytes))

            def fetch(chunk: Index) -> bytes | None:
                place = place_of(table, self._inside_unit(chunk))
                if place is not None and not 0 < place[1] <= self.store.part_nbytes:
                    raise ValueError(f"a chunk is said to have {place[1]} bytes, of {self.store.part_nbytes}")
                return None if place is None else reader.part(*place)

            yield fetch

    def _inside_unit(self, chunk: Index) -> Index:
        """Return the index of a chunk inside its shard."""
        units = zip(chunk, self.encoding.unit, self.encoding.chunk, strict=True)
        return tuple(i % (u // c) for i, u, c in units)

    def _decode(self, data: bytes, into: np.ndarray) -> np.ndarray:
        """Return the voxels of a chunk: `into` where they were put there, otherwise an array of their own."""
        if self.encoding.has_checksum:
            data = checked(data)
        if self.codec is None and len(data) != self.encoding.chunk_nbytes:
            raise ValueError(f"it holds {len(data)} bytes, where a chunk has {self.encoding.chunk_nbytes}")
        buffer = into.reshape(-1).view(np.uint8)
        decoded = data if self.codec is None else self.codec.decode(data, buffer)
        if decoded is buffer:
            return into
        return np.frombuffer(decoded, self.encoding.dtype).reshape(self.encoding.chunk)

    def _encode(self, part: np.ndarray, scratch: _Scratch) -> bytes | None:
        """Return the bytes of a chunk of which `part` lies inside the array, or None if it need not be stored."""
        chunk = part
        if (
            part.shape != self.encoding.chunk
            or part.dtype != self.encoding.dtype
            or not part.flags.c_contiguous
        ):
            chunk = scratch.chunk
            if part.shape != self.encoding.chunk:
                chunk[...] = self.fill
            np.copyto(chunk[tuple(map(slice, part.shape))], part, casting="safe")
        if _holds_only(chunk, self.fill):
            return None
        data = chunk.tobytes() if self.codec is None else bytes(self.codec.encode(chunk))
        return with_checksum(data) if self.encoding.has_checksum else data

    def _replace(self, unit: Index, parts: Sequence[bytes]) -> None:
        """Write the file of a chunk or shard in one atomic step; of no parts, remove it."""
        self.store.check_own(self.key(unit))
        if parts:
            local.write(self._path(unit), *parts)
        else:
            local.remove([self._path(unit)])

    def _path(self, unit: Index) -> str:
        return os.path.join(self.folder, self.key(unit))


class _Scratch(threading.local):
    """A chunk for every thread."""

    def __init__(self, encoding: Encoding) -> None:
        self.chunk = np.empty(encoding.chunk, encoding.dtype)


def direct(document: Json, array: zarr.Array[Any], *, writable: bool) -> DirectArray | None:
    """Return what reads and writes an array here, or None if that is left to zarr.

    Parameters
    ----------
    document
        Its ``zarr.json`` or ``.zarray``.
    array
        As `chunkrestore.ome_zarr.bounded.open_array` opened it.
    writable
        Whether it is going to be written.
    """
    encoding = encoding_of(document, array.metadata.zarr_format)
    store = array.store
    if encoding is None or not isinstance(store, BoundedStore) or not isinstance(store.inner, LocalStore):
        return None
    if writable and encoding.typesize not in (None, encoding.dtype.itemsize):
        return None
    codec = None
    if encoding.compressor is not None:
        codec = BoundedNumcodec(numcodecs.get_codec(encoding.compressor), encoding.chunk_nbytes)
    value = array.metadata.fill_value
    fill = np.asarray(0 if value is None else value).astype(encoding.dtype)
    return DirectArray(encoding, codec, fill, store, str(store.inner.root), array.metadata.encode_chunk_key)


def _touched(region: Slices, lengths: Index) -> Iterator[Index]:
    """Return the indices of the cells of a lattice that a region meets."""
    return product(*(range(s.start // n, -(-s.stop // n)) for s, n in zip(region, lengths, strict=True)))


def _cell(index: Index, lengths: Index) -> Slices:
    return tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, lengths, strict=True))


def _common(index: Index, lengths: Index, region: Slices) -> Slices:
    """Return what a cell and a region have in common."""
    return tuple(
        slice(max(s.start, i * n), min(s.stop, (i + 1) * n))
        for i, n, s in zip(index, lengths, region, strict=True)
    )


def _seen_from(outer: Slices, inner: Slices) -> Slices:
    """Return `inner` in the coordinates of `outer`, which contains it."""
    return tuple(slice(i.start - o.start, i.stop - o.start) for o, i in zip(outer, inner, strict=True))


def _holds_only(chunk: np.ndarray, value: np.ndarray) -> bool:
    """Return whether all numbers of a chunk have the bits of `value`: minus zero is not zero, a NaN is a NaN."""
    kind = np.dtype(f"u{chunk.dtype.itemsize}")
    bits, wanted = chunk.reshape(-1).view(kind), value.reshape(1).view(kind)
    return bool(bits[0] == wanted[0]) and bool((bits == wanted).all())

"""The index of a shard: where the chunks lie that one file holds (zarr v3, ``sharding_indexed``)."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import BinaryIO

import numpy as np

Index = tuple[int, ...]

_ABSENT = 2**64 - 1
"""Offset and length of a chunk that is not stored."""

_CHECKSUM_NBYTES = 4


@dataclass(frozen=True)
class ShardIndex:
    """How the index of an array's shards is stored."""

    per_shard: Index
    """Chunks per axis."""
    at_end: bool
    """Whether it follows the chunks; otherwise it precedes them."""
    has_checksum: bool
    """Whether a CRC-32C follows it."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 16 * math.prod(self.per_shard) + _CHECKSUM_NBYTES * self.has_checksum

    def parse(self, data: bytes) -> np.ndarray:
        """Return offset and length of every chunk.

        Returns
        -------
        numpy.ndarray
            uint64 of shape ``(*per_shard, 2)``.

        Raises
        ------
        ValueError
            If `data` has another size than `nbytes`, or does not match its checksum.
        """
        if len(data) != self.nbytes:
            raise ValueError(f"the file ends {self.nbytes - len(data)} bytes before its index does")
        content = checked(data) if self.has_checksum else data
        return np.frombuffer(content, "<u8").reshape(*self.per_shard, 2)

    def assemble(self, chunks: Mapping[Index, bytes | None]) -> list[bytes]:
        """Return the parts of a shard's file, index included, from its encoded chunks; of no chunks, none.

        Chunks lie in the order that zarr gives them, so the bytes are the same.
        """
        table = np.full((*self.per_shard, 2), _ABSENT, "<u8")
        position = 0 if self.at_end else self.nbytes
        parts = []
        for index in morton_order(self.per_shard):
            data = chunks.get(index)
            if data is not None:
                table[index] = position, len(data)
                position += len(data)
                parts.append(data)
        if not parts:
            return []
        head = with_checksum(table.tobytes()) if self.has_checksum else table.tobytes()
        return [*parts, head] if self.at_end else [head, *parts]


def place_of(table: np.ndarray, index: Index) -> tuple[int, int] | None:
    """Return offset and length of a chunk, or None if it is not stored."""
    start, nbytes = map(int, table[index])
    return None if start == nbytes == _ABSENT else (start, nbytes)


@lru_cache(maxsize=16)
def morton_order(lengths: Index) -> tuple[Index, ...]:
    """Return the indices below `lengths` by their Morton codes: the bits of all axes interleaved, the last first.

    An axis takes part with as many bits as its length needs, the lowest bits of all axes before any higher one.
    """
    n_bits = [(n - 1).bit_length() for n in lengths]
    places = [
        (axis, bit)
        for bit in range(max(n_bits, default=0))
        for axis in range(len(lengths))
        if bit < n_bits[axis]
    ]

    def code(index: Index) -> int:
        return sum((index[axis] >> bit & 1) << k for k, (axis, bit) in enumerate(places))

    return tuple(sorted(product(*map(range, lengths)), key=code))


def with_checksum(data: bytes) -> bytes:
    """Return `data` followed by its CRC-32C."""
    return data + _crc32c(data)


def checked(data: bytes) -> bytes:
    """Return `data` without the CRC-32C at its end.

    Raises
    ------
    ValueError
        If it does not match.
    """
    content = data[:-_CHECKSUM_NBYTES]
    if _crc32c(content) != data[-_CHECKSUM_NBYTES:]:
        raise ValueError("the CRC-32C checksum does not match")
    return content


def _crc32c(data: bytes) -> bytes:
    import google_crc32c  # a dependency of zarr, which computes them with it

    value: int = google_crc32c.value(data)
    return value.to_bytes(_CHECKSUM_NBYTES, "little")


def per_shard(unit: Sequence[int], chunk: Sequence[int]) -> Index:
    """Return the number of chunks per axis of a shard."""
    return tuple(u // c for u, c in zip(unit, chunk, strict=True))


class PartReader:
    """Parts of a shard's file, for several threads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self.nbytes = os.fstat(file.fileno()).st_size
        """Of the file."""

    def part(self, start: int, nbytes: int) -> bytes:
        """Return a part.

        Raises
        ------
        ValueError
            If it leaves the file. No memory is taken for it then.
        """
        if not 0 <= start <= start + nbytes <= self.nbytes:
            raise ValueError(f"the file ends after {self.nbytes} bytes, {nbytes} are wanted from {start} on")
        data = os.pread(self._file.fileno(), nbytes, start) if hasattr(os, "pread") else b""
        if (
            len(data) < nbytes
        ):  # On Windows, which has no such call; and of more than 2 GiB, which takes several
            with self._lock:
                self._file.seek(start)
                data = self._file.read(nbytes)
        return data

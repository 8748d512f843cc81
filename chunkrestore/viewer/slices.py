"""Tiles of planes through a pyramid: what a page draws, read chunk by chunk and never more than a budget.

A tile is up to 256 x 256 voxels of one plane of one level. Reading it decodes the chunks that it touches, which are
kept for a while: the next plane through the same chunks costs nothing. Volumes are ``zyx`` here, with one plane where
an image is 2-D.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from chunkrestore.ome_zarr import OmeZarrImage, RegionReader

TILE = 256
"""Voxels along both axes of a tile."""

PLANES = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}
"""Axes (of z, y, x) across a plane, down the screen and to the right."""

BUDGET_NBYTES = 2**26
"""What a tile may decode. A level that needs more is left out where another one needs less."""

MOST_NBYTES = 2**30
"""What a tile may decode where no level keeps to the budget."""

CACHE_NBYTES = 2**29
"""Decoded chunks that are kept."""

_READERS = 4
"""Reads at a time; those beyond the budget are done one by one."""

_ON_THE_WIRE = {
    "bool": "uint8", "float16": "float32", "uint8": "uint8", "int8": "int8", "uint16": "uint16", "int16": "int16",
    "uint32": "uint32", "int32": "int32", "float32": "float32",
}  # fmt: skip

Index = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Where a tile lies. Every number comes from a request and is checked when the tile is read."""

    source: int
    """Index of the image."""
    level: int
    """Level of its pyramid, 0 the finest."""
    plane: str
    """One of `PLANES`."""
    t: int
    """Time point."""
    c: int
    """Channel."""
    place: Index
    """Index of the plane, and of the tile down and to the right."""


def wire_dtype(image: OmeZarrImage) -> str:
    """Return the dtype that tiles are sent in; one that a browser has an array type for.

    Whole numbers of 64 bits are sent as they are in labels, where every id counts, and as float64 in images.
    """
    name = image.dtype.name
    return name if image.is_labels and name in ("int64", "uint64") else _ON_THE_WIRE.get(name, "float64")


def volume_shape(reader: RegionReader) -> Index:
    """Return the shape ``zyx`` of one volume."""
    return _padded(reader.spatial_shape)


def tile_nbytes(reader: RegionReader, plane: str) -> int:
    """Return the most that reading one tile of a level decodes."""
    across, *within = PLANES[plane]
    chunks, shape = _padded(reader.spatial_chunks), volume_shape(reader)
    voxels = math.prod(reader.chunks) // math.prod(chunks) * chunks[across]
    for axis in within:
        chunk, tile = chunks[axis], min(TILE, shape[axis])
        is_aligned = TILE % chunk == 0 or chunk % TILE == 0
        touched = -(-tile // chunk) if is_aligned else (tile + chunk - 2) // chunk + 1
        voxels *= min(touched, -(-shape[axis] // chunk)) * chunk
    return voxels * reader.dtype.itemsize


def readable_levels(image: OmeZarrImage, plane: str) -> list[int]:
    """Return the levels that tiles of a plane may be read from: those within the budget, else the cheapest one."""
    costs = [tile_nbytes(level.reader, plane) for level in image.levels]
    cheapest = min(range(len(costs)), key=costs.__getitem__)
    if costs[cheapest] > BUDGET_NBYTES:
        return [cheapest] if costs[cheapest] <= MOST_NBYTES else []
    return [k for k, cost in enumerate(costs) if cost <= BUDGET_NBYTES]


class TileReader:
    """Reads tiles of some images, for many threads at once.

    Parameters
    ----------
    images
        What `Tile.source` counts.
    cache_nbytes
        Decoded chunks that are kept.
    """

    def __init__(self, images: Sequence[OmeZarrImage], cache_nbytes: int = CACHE_NBYTES) -> None:
        self._images = tuple(images)
        self._readable = [{plane: readable_levels(image, plane) for plane in PLANES} for image in images]
        self._cache = _ChunkCache(cache_nbytes)
        self._slots = threading.BoundedSemaphore(_READERS)
        self._alone = threading.Lock()
        self._under_way = _Turns()

    def read(self, tile: Tile) -> np.ndarray:
        """Return a tile, rows down the screen, in the image's wire dtype and in C order.

        Raises
        ------
        LookupError
            If there is no such tile.
        ValueError
            If its level is beyond what may be read for one tile, or a chunk cannot be decoded.
        OSError
            If the store cannot be read.
        """
        reader = self._reader(tile)
        across, down, right = PLANES[tile.plane]
        region = _region(volume_shape(reader), tile)
        block = np.empty([s.stop - s.start for s in region], reader.dtype)
        for box, chunk in self._chunks(tile, reader, region):
            _paste(block, region, chunk, box)
        plane = block.transpose(across, down, right)[0]
        kind = np.dtype(wire_dtype(self._images[tile.source])).newbyteorder("<")
        return np.ascontiguousarray(plane, kind)

    def _reader(self, tile: Tile) -> RegionReader:
        """Return the handle on the level of a tile, if there is one and it may be read."""
        if tile.plane not in PLANES or not 0 <= tile.source < len(self._images):
            raise LookupError("there is no such image or plane")
        image = self._images[tile.source]
        if not 0 <= tile.level < len(image.levels):
            raise LookupError("there is no such level")
        reader = image.levels[tile.level].reader
        if not (0 <= tile.t < reader.n_t and 0 <= tile.c < reader.n_c):
            raise LookupError("there is no such time point or channel")
        if tile.level not in self._readable[tile.source][tile.plane]:
            raise ValueError(
                f"a tile of level {tile.level} decodes {tile_nbytes(reader, tile.plane)} bytes, "
                "more than is read at once"
            )
        return reader

    def _chunks(
        self, tile: Tile, reader: RegionReader, region: tuple[slice, ...]
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Yield the chunks that `region` touches, with where they lie."""
        lengths = _padded(reader.spatial_chunks)
        ranges = [range(s.start // n, (s.stop - 1) // n + 1) for s, n in zip(region, lengths, strict=True)]
        z, y, x = ranges
        wanted: list[Index] = list(itertools.product(z, y, x))
        owner = (tile.source, tile.level, tile.t, tile.c)
        # Tiles of one large chunk take turns, so that it is decoded once; others do not wait for each other.
        with self._under_way.turn((*owner, wanted[0])):
            kept = {index: self._cache.get((*owner, index)) for index in wanted}
            found = {index: chunk for index, chunk in kept.items() if chunk is not None}
            missing = [index for index in wanted if index not in found]
            if missing:
                is_large = tile_nbytes(reader, tile.plane) > BUDGET_NBYTES
                with self._alone if is_large else self._slots:
                    fresh = _read_chunks(reader, tile, missing, lengths)
                for index, chunk in fresh.items():
                    self._cache.put((*owner, index), chunk)
                found |= fresh
        for index, chunk in found.items():
            yield _box(index, lengths, volume_shape(reader)), chunk


class _ChunkCache:
    """The chunks used last, up to a number of bytes."""

    def __init__(self, most_nbytes: int) -> None:
        self._most = most_nbytes
        self._held = 0
        self._chunks: OrderedDict[object, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> np.ndarray | None:
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: object, chunk: np.ndarray) -> None:
        with self._lock:
            if (old := self._chunks.pop(key, None)) is not None:
                self._held -= old.nbytes
            self._chunks[key] = chunk
            self._held += chunk.nbytes
            while self._held > self._most and len(self._chunks) > 1:
                self._held -= self._chunks.popitem(last=False)[1].nbytes


class _Turns:
    """A lock per key, for as long as anybody holds it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[object, tuple[threading.Lock, int]] = {}

    @contextmanager
    def turn(self, key: object) -> Iterator[None]:
        with self._lock:
            own, n = self._held.get(key, (threading.Lock(), 0))
            self._held[key] = own, n + 1
        try:
            with own:
                yield
        finally:
            with self._lock:
                own, n = self._held[key]
                if n == 1:
                    del self._held[key]
                else:
                    self._held[key] = own, n - 1


def _padded(lengths: Sequence[int]) -> Index:
    z, y, x = (1,) * (3 - len(lengths)) + tuple(lengths)
    return z, y, x


def _region(shape: Index, tile: Tile) -> tuple[slice, ...]:
    """Return where a tile lies in its volume."""
    region = [slice(0)] * 3
    for axis, i, length in zip(PLANES[tile.plane], tile.place, (1, TILE, TILE), strict=True):
        start, stop = i * length, min((i + 1) * length, shape[axis])
        if not 0 <= start < stop:
            raise LookupError("there is no such tile")
        region[axis] = slice(start, stop)
    return tuple(region)


def _box(index: Index, lengths: Index, shape: Index) -> tuple[slice, ...]:
    return tuple(
        slice(i * n, min((i + 1) * n, stop)) for i, n, stop in zip(index, lengths, shape, strict=True)
    )


def _read_chunks(
    reader: RegionReader, tile: Tile, wanted: Sequence[Index], lengths: Index
) -> dict[Index, np.ndarray]:
    """Read the box around some chunks at once, so that they are decoded side by side, and cut it up."""
    shape = volume_shape(reader)
    low = _box(tuple(map(min, zip(*wanted, strict=True))), lengths, shape)  # type: ignore[arg-type]
    high = _box(tuple(map(max, zip(*wanted, strict=True))), lengths, shape)  # type: ignore[arg-type]
    box = tuple(slice(a.start, b.stop) for a, b in zip(low, high, strict=True))
    ndim = len(reader.spatial_axes)
    data = reader.read(tile.t, tile.c, box[-ndim:]).reshape([s.stop - s.start for s in box])
    cut = {}
    for index in wanted:
        own = _box(index, lengths, shape)
        part = data[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(own, box, strict=True))]
        cut[index] = data if part.shape == data.shape else part.copy()
    return cut


def _paste(block: np.ndarray, region: tuple[slice, ...], chunk: np.ndarray, box: tuple[slice, ...]) -> None:
    """Copy what a chunk at `box` has of `region` into `block`."""
    low = [max(r.start, b.start) for r, b in zip(region, box, strict=True)]
    high = [min(r.stop, b.stop) for r, b in zip(region, box, strict=True)]
    to = tuple(slice(a - r.start, b - r.start) for a, b, r in zip(low, high, region, strict=True))
    of = tuple(slice(a - o.start, b - o.start) for a, b, o in zip(low, high, box, strict=True))
    block[to] = chunk[of]

"""How much is decoded of a store for every voxel of a result: pure integers.

A chunk is decoded whole, however little of it a block reads: of its halo, a block of 256 voxels per axis that reads 16
more on each side decodes 3.4 times as much as it owns from chunks of 64, and 27 times as much from chunks of 256.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

from chunkrestore.grid import BlockGrid, Halo


class Chunked(Protocol):
    """What is known of an array; `chunkrestore.ome_zarr.RegionReader`, for one."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of what is decoded at once, spatial axes last."""

    @property
    def picks(self) -> tuple[Sequence[int], ...]:
        """Stored indices per axis."""


def decoded_voxels(
    edges: Sequence[Sequence[int]], halos: Sequence[Halo], chunks: Sequence[int], first: Sequence[int]
) -> int:
    """Return how many voxels are decoded by all blocks of a grid together.

    Read regions are products of ranges, each of which depends on one index: one walk along every axis is enough,
    however many blocks there are. A chunk that the end of the array cuts is stored, and decoded, whole.

    Parameters
    ----------
    edges
        Core borders per axis, from 0 on.
    halos
        What is read around every core, one after the other; those of a chain of operators, the last one's first.
    chunks
        Voxels per axis of what is decoded at once.
    first
        Where the volume begins in the stored array, per axis: chunks are counted from the array's beginning.
    """
    total = 1
    for axis, (borders, chunk, offset) in enumerate(zip(edges, chunks, first, strict=True)):
        n_chunks = 0
        for start, stop in itertools.pairwise(borders):
            for halo in halos:
                start, stop = halo.read_axis(start, stop, borders[-1], axis)
            n_chunks += -(-(stop + offset) // chunk) - (start + offset) // chunk
        total *= n_chunks * chunk
    return total


def amplification(reader: Chunked, grid: BlockGrid, halos: Sequence[Halo] | None = None) -> float:
    """Return voxels decoded divided by voxels of all cores, exactly, for one time point and channel.

    Chunks that hold several channels or time points count whole, since each is read alone.

    Parameters
    ----------
    reader
        Array, or selection of it, that blocks are read from.
    grid
        Blocks of its spatial axes.
    halos
        As for `decoded_voxels`; by default that of `grid`.
    """
    n = len(grid.edges)
    first = [pick[0] for pick in reader.picks[-n:]]
    around = [grid.halo] if halos is None else halos
    spatial = decoded_voxels(grid.edges, around, reader.chunks[-n:], first)
    return spatial * math.prod(reader.chunks[:-n]) / math.prod(grid.shape)

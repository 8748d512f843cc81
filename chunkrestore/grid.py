"""Blocks of a volume: cores that partition it, and the halo that each core reads.

Pure integers. A *core* is the part of the volume that one task owns and writes; cores partition the
volume. A task reads its core plus a *halo*, clipped at the volume's border, and trims the halo from its
result::

    image[block.read][block.trim] == image[block.core]

All slices are in the coordinates of the volume unless a name says otherwise. Only the spatial axes
(``zyx`` or ``yx``) take part; time points and channels are looped over by the callers.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

Slices = tuple[slice, ...]


@lru_cache(maxsize=4096)
def fast_length(n: int) -> int:
    """Return the smallest even 7-smooth integer that is at least `n`.

    Real FFTs of such lengths are fast in every library (pocketfft, cuFFT, VkFFT); 1 stays 1, so that a
    single plane keeps its thickness.
    """
    if n <= 1:
        return 1
    # Every odd 7-smooth number below n, doubled until it reaches n: the gaps between smooth numbers are too long
    # to try one candidate after the other where lengths come from hostile metadata.
    best = 1 << max(1, (n - 1).bit_length())
    odd = [7**i * 5**j for i in range(n.bit_length()) for j in range(n.bit_length()) if 7**i * 5**j < n]
    for factor in odd:
        while factor < n:
            doublings = max(1, (-(-n // factor) - 1).bit_length())
            best = min(best, factor << doublings)
            factor *= 3
    return best


@dataclass(frozen=True)
class Halo:
    """What an operator must read around a core."""

    depth: tuple[int, ...]
    """Voxels per axis on each side."""
    align: tuple[int, ...] = ()
    """Read regions begin (and end) on multiples of this, shifted by `offset`; all 1 when empty."""
    offset: tuple[int, ...] = ()
    """Position of the volume's first voxel on the alignment grid (a network's padding before it)."""
    fast: bool = False
    """Grow reads to FFT-friendly lengths with real data where the volume has it."""

    def __post_init__(self) -> None:
        ndim = len(self.depth)
        for name, neutral in (("align", 1), ("offset", 0)):
            if not getattr(self, name):
                object.__setattr__(self, name, (neutral,) * ndim)
        if len(self.align) != ndim or len(self.offset) != ndim:
            raise ValueError(
                f"`depth` {self.depth}, `align` {self.align} and `offset` {self.offset} must have one number per axis"
            )
        if min(self.depth, default=0) < 0 or min(self.align, default=1) < 1:
            raise ValueError(f"`depth` {self.depth} must be at least 0 and `align` {self.align} at least 1")

    def read(self, core: Slices, shape: Sequence[int]) -> Slices:
        """Return the region to read for `core` of a volume of `shape`, clipped at its border."""
        return tuple(
            slice(*self.read_axis(c.start, c.stop, n, axis))
            for axis, (c, n) in enumerate(zip(core, shape, strict=True))
        )

    def read_axis(self, start: int, stop: int, n: int, axis: int) -> tuple[int, int]:
        """Return the start and stop of what is read for a core from `start` to `stop` on an axis of length `n`."""
        depth, align, offset = self.depth[axis], self.align[axis], self.offset[axis]
        first = (start - depth + offset) // align * align - offset
        last = -((-(stop + depth + offset)) // align) * align - offset
        if self.fast and first > 0 and last < n:
            missing = fast_length(last - first) - (last - first)
            before = min(missing // 2 // align * align, first)
            last += missing - before
            first -= before
        return max(first, 0), min(last, n)


@dataclass(frozen=True)
class Block:
    """One task's part of a volume."""

    core: Slices
    """Region that the task owns and writes."""
    read: Slices
    """Region that the task reads; contains `core`."""
    volume_shape: tuple[int, ...]
    """Shape of the whole volume."""
    index: tuple[int, ...] = ()
    """Position in the block grid; empty for a block outside any grid."""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Block:
        """Return the single block that is the whole volume."""
        everything = tuple(slice(0, n) for n in shape)
        return cls(everything, everything, tuple(shape), (0,) * len(everything))

    @classmethod
    def around(cls, core: Slices, shape: Sequence[int], halo: Halo, index: tuple[int, ...] = ()) -> Block:
        """Return the block that reads `core` with `halo` from a volume of `shape`."""
        return cls(tuple(core), halo.read(core, shape), tuple(shape), index)

    @property
    def trim(self) -> Slices:
        """The core in the coordinates of the read region."""
        return tuple(
            slice(c.start - r.start, c.stop - r.start) for c, r in zip(self.core, self.read, strict=True)
        )

    @property
    def core_shape(self) -> tuple[int, ...]:
        """Shape of the core."""
        return tuple(s.stop - s.start for s in self.core)

    @property
    def read_shape(self) -> tuple[int, ...]:
        """Shape of the read region."""
        return tuple(s.stop - s.start for s in self.read)

    @property
    def at_border(self) -> tuple[tuple[bool, bool], ...]:
        """For each axis, whether the read region touches the volume's first and last voxel."""
        return tuple((r.start == 0, r.stop == n) for r, n in zip(self.read, self.volume_shape, strict=True))

    def __str__(self) -> str:
        core = ", ".join(f"{s.start}:{s.stop}" for s in self.core)
        return f"block {self.index} (core {core})"


@dataclass(frozen=True)
class BlockGrid:
    """A partition of a volume into cores, with the halo that each of them reads.

    Parameters are plain integers; the grid itself holds one list of core borders per axis, so a grid of
    a million blocks costs nothing until its blocks are asked for.
    """

    edges: tuple[tuple[int, ...], ...]
    """Per axis: ascending core borders, from 0 to the length of the axis."""
    halo: Halo

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.halo.depth):
            raise ValueError(f"`halo` has {len(self.halo.depth)} axes but the grid has {len(self.edges)}")
        for axis, edges in enumerate(self.edges):
            if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges)):
                raise ValueError(f"`edges` of axis {axis} must rise from 0 to the axis length, got {edges}")

    @classmethod
    def regular(
        cls,
        shape: Sequence[int],
        block_shape: Sequence[int],
        halo: Halo | None = None,
        *,
        write_unit: Sequence[int] | None = None,
    ) -> BlockGrid:
        """Cut a volume of `shape` into equal cores of `block_shape`; the last one per axis may be shorter.

        Parameters
        ----------
        shape, block_shape
            Voxels per spatial axis.
        halo
            What each core reads around itself; nothing by default.
        write_unit
            Chunk or shard shape of the output. Cores must lie on its borders, so that no two tasks ever
            write one chunk or shard.

        Raises
        ------
        ValueError
            If lengths disagree, a block is empty, or cores would share a write unit.
        """
        shape, block_shape = tuple(shape), tuple(block_shape)
        if len(shape) != len(block_shape):
            raise ValueError(f"`block_shape` {block_shape} must have one length per axis of shape {shape}")
        if min(block_shape) < 1 or min(shape) < 1:
            raise ValueError(
                f"`block_shape` {block_shape} and shape {shape} must be at least 1 on every axis"
            )
        for axis, unit in enumerate(write_unit or ()):
            if block_shape[axis] % unit and block_shape[axis] < shape[axis]:
                raise ValueError(
                    f"`block_shape` {block_shape[axis]} on axis {axis} is not a multiple of the output chunk or "
                    f"shard length {unit}; use {max(1, block_shape[axis] // unit) * unit}"
                )
        edges = tuple((*range(0, n, b), n) for n, b in zip(shape, block_shape, strict=True))
        return cls(edges, halo or Halo((0,) * len(shape)))

    @classmethod
    def from_chunks(cls, chunks: Sequence[Sequence[int]], halo: Halo | None = None) -> BlockGrid:
        """Make every chunk of a dask array (`chunks` as in ``x.chunks``) a core."""
        edges = tuple((0, *itertools.accumulate(lengths)) for lengths in chunks)
        return cls(edges, halo or Halo((0,) * len(edges)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the volume."""
        return tuple(edges[-1] for edges in self.edges)

    @property
    def n_blocks(self) -> tuple[int, ...]:
        """Number of blocks per axis."""
        return tuple(len(edges) - 1 for edges in self.edges)

    def __len__(self) -> int:
        return math.prod(self.n_blocks)

    def block(self, index: Sequence[int]) -> Block:
        """Return the block at `index`, one number per axis."""
        core = tuple(slice(edges[i], edges[i + 1]) for edges, i in zip(self.edges, index, strict=True))
        return Block.around(core, self.shape, self.halo, tuple(index))

    def __iter__(self) -> Iterator[Block]:
        for index in itertools.product(*(range(n) for n in self.n_blocks)):
            yield self.block(index)

    def indices_meeting(self, region: Slices) -> Iterator[tuple[int, ...]]:
        """Yield the indices of the blocks whose cores share a voxel with `region`."""
        per_axis = [
            range(max(bisect_right(edges, r.start) - 1, 0), min(bisect_left(edges, r.stop), len(edges) - 1))
            if r.start < r.stop
            else range(0)
            for edges, r in zip(self.edges, region, strict=True)
        ]
        yield from itertools.product(*per_axis)

    def around(self, index: Sequence[int], reach: int) -> list[tuple[int, ...]]:
        """Return the indices of the other blocks that are at most `reach` blocks away on every axis."""
        near = (
            range(max(i - reach, 0), min(i + reach + 1, n)) for i, n in zip(index, self.n_blocks, strict=True)
        )
        return [other for other in itertools.product(*near) if other != tuple(index)]

    @property
    def reach(self) -> int:
        """How many blocks away, on any axis, is the furthest core that a block reads from."""
        furthest = 0
        for axis, edges in enumerate(self.edges):
            for i, (start, stop) in enumerate(itertools.pairwise(edges)):
                first, last = self.halo.read_axis(start, stop, edges[-1], axis)
                before, after = i - bisect_right(edges, first) + 1, bisect_left(edges, last) - 1 - i
                furthest = max(furthest, before, after)
        return furthest

    @property
    def halo_overhead(self) -> float:
        """Voxels read divided by voxels written, exactly, over the whole grid."""
        read = 1
        for axis, edges in enumerate(self.edges):
            read *= sum(
                last - first
                for first, last in (
                    self.halo.read_axis(a, b, edges[-1], axis) for a, b in itertools.pairwise(edges)
                )
            )
        return read / math.prod(self.shape)

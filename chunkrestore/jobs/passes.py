"""One pass of a job: operators that run together on each block, and what that takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from chunkrestore.grid import Block, BlockGrid
from chunkrestore.jobs.tasks import chain
from chunkrestore.ome_zarr.amplification import decoded_voxels
from chunkrestore.ome_zarr.levels import fused_levels, pyramid_steps, stored_units
from chunkrestore.operators.base import LabelOperator, Operator, channels_of
from chunkrestore.operators.deconvolution import Deconvolution
from chunkrestore.operators.network import NetworkOperator
from chunkrestore.operators.storing import only_copies, result_dtype

_MUCH_HALO = 4
"""Voxels read per voxel written that are worth a hint: cubic cores are shorter than 3.4 times the depth then."""

_MUCH_DECODED = 4
"""Voxels decoded per voxel read that are worth a hint: a chunk as long as a block makes eight."""

_NUMBERS_WITHOUT_RANKS = {"mean", "pilot"}
"""What needs no percentile: one reading tells the mean, and pilots read a few regions only."""


@dataclass(frozen=True)
class Pass:
    """Operators that run together on each block, from one stored image to the next."""

    operators: tuple[Operator, ...]
    """Image operators, or one label operator."""
    dtype: np.dtype[Any]
    """Of what the pass reads."""
    grid: BlockGrid
    """Cores, with the halo of the last operator."""
    chunks: tuple[int, ...]
    """Chunk shape of what the pass writes."""
    shards: tuple[int, ...] | None
    """Shape of what is stored as one file, if that is not a chunk."""
    levels: tuple[tuple[int, ...], ...]
    """Shape of every resolution that the pass writes, finest first."""
    is_first: bool
    """Whether the pass reads the job's input, and not what we have written."""
    source_chunks: tuple[int, ...] | None = None
    """Voxels per axis that are decoded at once of what the pass reads; None if it is not known how that is stored."""
    source_first: tuple[int, ...] | None = None
    """Where the volume begins in the array that it is read from; None for the array's own beginning."""

    def __post_init__(self) -> None:
        for edges, unit in zip(self.grid.edges, self.shards or self.chunks, strict=True):
            # Two tasks that write into one file lose what one of them wrote, without any error.
            assert all(edge % unit == 0 for edge in edges[:-1]), f"borders {edges} cut files of {unit} voxels"

    @property
    def makes_labels(self) -> bool:
        """Whether the pass ends in labels."""
        return isinstance(self.operators[-1], LabelOperator)

    @cached_property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of what the pass writes, as far as it is known before objects are counted."""
        dtype = self.dtype
        for operator in self.operators:
            dtype = result_dtype(operator, dtype)
        return dtype

    @property
    def only_copies(self) -> bool:
        """Whether voxels go through as they are."""
        return only_copies(self.operators)

    @property
    def n_channels(self) -> int:
        """Channels that one block holds: 1, or all of them for an operator that takes them together."""
        return channels_of(self.operators[0])

    @property
    def has_seams(self) -> bool:
        """Whether an operator makes seams that are small and not nil, so that they are probed."""
        return any(hasattr(operator, "tolerance") for operator in self.operators)

    @property
    def needs(self) -> frozenset[float | str]:
        """Numbers of the pass's input that must be known before its first block."""
        return self.operators[0].needs

    def blocks(self, block: Block) -> list[Block]:
        """Return one block per operator, ending on the core of `block`."""
        return chain(self.operators, block.core, self.grid.shape, block.index)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of all cores but the last ones along an axis."""
        return tuple(edges[1] for edges in self.grid.edges)

    @cached_property
    def n_voxels_read(self) -> int:
        """Voxels read by all blocks of one time point and channel, exactly.

        Read regions are products of ranges, each of which depends on one index: one walk along every axis
        is enough, however many blocks there are.
        """
        halos = [operator.halo(self.grid.shape) for operator in reversed(self.operators)]
        total = 1
        for axis, edges in enumerate(self.grid.edges):
            along = 0
            for start, stop in itertools.pairwise(edges):
                for halo in halos:
                    start, stop = halo.read_axis(start, stop, edges[-1], axis)
                along += stop - start
            total *= along
        return total

    @property
    def halo_overhead(self) -> float:
        """Voxels read divided by voxels written."""
        return self.n_voxels_read / math.prod(self.grid.shape)

    @cached_property
    def read_amplification(self) -> float | None:
        """Voxels decoded divided by voxels written: chunks are decoded whole, however little a block reads of them."""
        if self.source_chunks is None:
            return None
        halos = [operator.halo(self.grid.shape) for operator in reversed(self.operators)]
        first = self.source_first or (0,) * len(self.source_chunks)
        decoded = decoded_voxels(self.grid.edges, halos, self.source_chunks, first)
        return decoded / math.prod(self.grid.shape)

    @property
    def n_scans(self) -> int:
        """How often the whole input is read for numbers of it, before the first block.

        Percentiles of floats take two readings. A float image that is not our own is read for NaN in any case.
        """
        is_float = self.dtype.kind == "f" and not self.only_copies
        if self.has_seams or self.needs - _NUMBERS_WITHOUT_RANKS:
            return 1 + is_float
        return int("mean" in self.needs or (is_float and self.is_first))

    @cached_property
    def levels_read(self) -> tuple[int, ...]:
        """Levels that are read again for those above them: none that blocks hold together with the next ones."""
        factors, units = stored_units(self.levels, self.chunks, self.shards)
        n_done = fused_levels(self.grid.edges, units, factors)
        return tuple(step.first - 1 for step in pyramid_steps(self.levels, units, factors, n_done))

    @property
    def read_nbytes(self) -> int:
        """Bytes of voxels read for one time point and channel: scans, blocks with halos, levels read again."""
        own = self.n_scans * math.prod(self.grid.shape) + self.n_voxels_read
        return self.dtype.itemsize * own + self.stored_dtype.itemsize * sum(
            math.prod(self.levels[level]) for level in self.levels_read
        )

    @property
    def written_nbytes(self) -> int:
        """Bytes of voxels written for one time point and channel, pyramid included, before compression."""
        return self.stored_dtype.itemsize * sum(map(math.prod, self.levels))

    @property
    def memory_nbytes(self) -> int:
        """Peak bytes that operators allocate for one block."""
        return peak_nbytes(self.operators, self.grid.shape, self.block_shape)

    @property
    def device_nbytes(self) -> int:
        """The same for operators that can run on a device, by the formulas of the host; 0 without any.

        What the FFT library takes as its work area comes on top.
        """
        of_all = peaks(self.operators, self.grid.shape, self.block_shape)
        return max((n for o, n in of_all if isinstance(o, Deconvolution | NetworkOperator)), default=0)

    @property
    def worker_nbytes(self) -> int:
        """Peak bytes of a worker: one block computes, the next one is read and the one before is written."""
        core = central_block(self.grid.shape, self.block_shape)
        read = self.blocks(core)[0].read_shape
        waiting = 2 * (
            self.n_channels * self.dtype.itemsize * math.prod(read)
            + self.stored_dtype.itemsize * math.prod(core.core_shape)
        )
        return self.memory_nbytes + waiting

    def describe(self) -> dict[str, Any]:
        """Return what identifies the result of the pass."""
        return {
            "operators": [dict(operator.describe()) for operator in self.operators],
            "depth": [list(operator.halo(self.grid.shape).depth) for operator in self.operators],
            "block_shape": list(self.block_shape),
            "chunks": list(self.chunks),
            "shards": None if self.shards is None else list(self.shards),
        }

    def figures(self) -> dict[str, Any]:
        """Return what is known of the pass besides, as JSON-compatible values."""
        return {
            "n_blocks": list(self.grid.n_blocks),
            "halo_overhead": round(self.halo_overhead, 3),
            "read_amplification": None
            if self.read_amplification is None
            else round(self.read_amplification, 3),
            "n_scans": self.n_scans,
            "levels": [list(shape) for shape in self.levels],
            "memory_nbytes": self.memory_nbytes,
            "device_nbytes": self.device_nbytes,
            "worker_nbytes": self.worker_nbytes,
        }

    def __str__(self) -> str:
        depths = "; ".join(f"{o.name} depth {times(o.halo(self.grid.shape).depth)}" for o in self.operators)
        stored = f"chunks {times(self.chunks)}"
        if self.shards is not None:
            stored += f" in shards {times(self.shards)}"
        memory = (
            f"{format_nbytes(self.memory_nbytes)} per task, {format_nbytes(self.worker_nbytes)} per worker"
        )
        if self.device_nbytes:
            memory += f"; at most {format_nbytes(self.device_nbytes)} of it on a device"
        lines = [
            f"  halo     {depths}",
            f"  blocks   {times(self.grid.n_blocks)} of {times(self.block_shape)}, {stored}, {self._overhead()}",
            f"  memory   {memory}",
        ]
        if len(self.levels) > 1:
            lines.append(f"  pyramid  {len(self.levels)} levels down to {times(self.levels[-1])}")
        return "\n".join(lines)

    def _overhead(self) -> str:
        """Return how much is read and decoded for what is written, with a hint where that is much."""
        decoded = "" if self.read_amplification is None else f" and {self.read_amplification:.2f} decoded"
        overhead = f"{self.halo_overhead:.2f} voxels read{decoded} per voxel written"
        if self.halo_overhead > _MUCH_HALO:
            return f"{overhead}: more memory (--memory) makes larger blocks, which read less"
        if (
            self.source_chunks is not None
            and (self.read_amplification or 0) > _MUCH_DECODED * self.halo_overhead
        ):
            return (
                f"{overhead}: chunks of {times(self.source_chunks)} are large for such blocks; --memory makes larger "
                "blocks, and chunkrestore convert smaller chunks"
            )
        return overhead


def peak_nbytes(operators: Sequence[Operator], shape: Sequence[int], block_shape: Sequence[int]) -> int:
    """Return the peak bytes that a chain of operators allocates for one block."""
    return max(nbytes for _, nbytes in peaks(operators, shape, block_shape))


def peaks(
    operators: Sequence[Operator], shape: Sequence[int], block_shape: Sequence[int]
) -> list[tuple[Operator, int]]:
    """Return every operator with the peak bytes that it allocates for the block in the middle."""
    blocks = chain(operators, central_block(shape, block_shape).core, shape)
    return [(o, o.memory_nbytes(b.read_shape)) for o, b in zip(operators, blocks, strict=True)]


def central_block(shape: Sequence[int], block_shape: Sequence[int]) -> Block:
    """Return the core, without halo, of a block in the middle, which none exceeds in what it reads."""
    corner = ((-(-n // b) - 1) // 2 * b for n, b in zip(shape, block_shape, strict=True))
    core = tuple(slice(a, min(a + b, n)) for a, b, n in zip(corner, block_shape, shape, strict=True))
    return Block(core, core, tuple(shape))


def times(numbers: Sequence[int]) -> str:
    """Return a shape for people."""
    return " x ".join(map(str, numbers))


def format_nbytes(n: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"

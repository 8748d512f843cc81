"""What a job will do, computed from metadata alone."""

from __future__ import annotations

import itertools
import operator as integers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import cutting
from chunkrestore.jobs.passes import Pass, format_nbytes, peak_nbytes, times
from chunkrestore.ome_zarr.layout import CHUNK_LENGTH, default_pyramid, default_shards
from chunkrestore.operators.base import LabelOperator, Operator, channels_of
from chunkrestore.operators.storing import completed, result_dtype

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import RegionReader

MEMORY_NBYTES = 2 * 2**30
"""Peak memory per worker that blocks are sized for by default. A constant and not what happens to be free:
a resumed job must be cut into the same blocks, on whatever machine it goes on."""


@dataclass(frozen=True)
class Plan:
    """Passes over the time points and channels of an image.

    ``str(plan)`` is a table for people; nothing was computed to make it. A plan of a million blocks is as small as
    one of ten: blocks are made when they are asked for (``for block in plan.passes[0].grid``).
    """

    passes: tuple[Pass, ...]
    """In order; each reads what the one before it wrote."""
    n_timepoints: int
    """Time points to process."""
    n_channels: int
    """Channels to process."""
    free_nbytes: int | None = None
    """Free bytes where the output goes, if whoever asked for the plan has looked."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the input."""
        return self.passes[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the volume."""
        return self.passes[0].grid.shape

    @property
    def n_planes(self) -> int:
        """Time points times channels: volumes that are processed one by one."""
        return self.n_timepoints * self.n_channels

    def n_volumes(self, work: Pass) -> int:
        """Return how many volumes a pass goes through: fewer than `n_planes` if it takes channels together."""
        return self.n_planes // work.n_channels

    @property
    def n_blocks(self) -> int:
        """Blocks of all passes, time points and channels."""
        return sum(self.n_volumes(p) * len(p.grid) for p in self.passes)

    @property
    def read_nbytes(self) -> int:
        """Bytes of voxels read by all passes, halos, scans for statistics and pyramids included."""
        return self.n_planes * sum(p.read_nbytes for p in self.passes)

    @property
    def written_nbytes(self) -> int:
        """Bytes of voxels written by all passes, scratch and pyramids included, before compression."""
        return sum(self.n_volumes(p) * p.written_nbytes for p in self.passes)

    @property
    def disk_nbytes(self) -> int:
        """Most bytes of voxels that lie on disk at once, before compression.

        Tables of labels come on top: a few hundred bytes per object.
        """
        return self.largest_on_disk([self.n_volumes(p) * p.written_nbytes for p in self.passes])

    def largest_on_disk(self, nbytes: Iterable[int]) -> int:
        """Return the most bytes that lie on disk at once if every pass writes as many as given.

        What a pass writes for the next one alone is removed once that one is published.
        """
        last_image = max((i for i, p in enumerate(self.passes) if not p.makes_labels), default=-1)
        kept = scratch = most = 0
        for position, written in enumerate(nbytes):
            most = max(most, kept + scratch + written)
            scratch = written if position < last_image else 0
            kept += written - scratch
        return most

    @property
    def memory_nbytes(self) -> int:
        """Peak bytes that the operators of the hungriest pass allocate for one block."""
        return max(p.memory_nbytes for p in self.passes)

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "n_timepoints": self.n_timepoints,
            "n_channels": self.n_channels,
            "passes": [p.describe() | p.figures() for p in self.passes],
            "n_blocks": self.n_blocks,
            "read_nbytes": self.read_nbytes,
            "written_nbytes": self.written_nbytes,
            "disk_nbytes": self.disk_nbytes,
            "free_nbytes": self.free_nbytes,
            "memory_nbytes": self.memory_nbytes,
        }

    def __str__(self) -> str:
        lines = [
            f"volume     {times(self.shape)} {self.dtype.name}, "
            f"{self.n_timepoints} time points, {self.n_channels} channels"
        ]
        for number, p in enumerate(self.passes, 1):
            lines += [f"pass {number}     {' -> '.join(o.name for o in p.operators)}", str(p)]
        disk = f"at most {format_nbytes(self.disk_nbytes)} before compression"
        if self.free_nbytes is not None:
            enough = "" if self.disk_nbytes <= self.free_nbytes else ": only enough if it compresses well"
            disk += f", {format_nbytes(self.free_nbytes)} free{enough}"
        lines += [
            f"in all     {self.n_blocks} blocks, {format_nbytes(self.read_nbytes)} read, "
            f"{format_nbytes(self.written_nbytes)} written before compression",
            f"disk       {disk}",
        ]
        return "\n".join(lines)


def make_plan(
    operators: Sequence[Operator],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    *,
    n_timepoints: int = 1,
    n_channels: int = 1,
    voxel_size: Sequence[float] | None = None,
    block_shape: Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    memory_nbytes: int | None = None,
    source: RegionReader | None = None,
    version: str = "0.5",
) -> Plan:
    """Check operators against an image's metadata and cut the work into passes and blocks.

    Parameters
    ----------
    operators
        Image operators in order of application, optionally followed by one label operator; none to copy.
    shape, dtype
        Of the spatial axes of the input.
    n_timepoints, n_channels
        How many volumes there are.
    voxel_size
        Micrometres per spatial axis, which decide on the pyramid; equal sides by default.
    block_shape
        Core of a block; by default the largest multiple of what is stored as one file whose peak fits
        `memory_nbytes`.
    shards
        Shape of what is stored as one file, a multiple of the chunks; None: every chunk is a file, unless there would
        be many (`chunkrestore.ome_zarr.layout.default_shards`).
    depth
        Halo of every operator that takes one, instead of the derived halo.
    memory_nbytes
        Peak memory of one task that default blocks are sized for, as large as they get; None: `MEMORY_NBYTES`,
        and no block longer than `chunkrestore.jobs.cutting.longest_block`.
    source
        Handle on the input, which tells how it is stored.
    version
        OME-Zarr version that is written; 0.4 has no shards.

    Raises
    ------
    ValueError
        If the operators do not suit the image, or the blocks do not suit operators, shards, or what a job
        can keep count of.
    """
    # NumPy's integers, as metadata may hold them, would overflow in what follows.
    shape = tuple(map(integers.index, shape))
    n_timepoints, n_channels = integers.index(n_timepoints), integers.index(n_channels)
    if min(n_timepoints, n_channels) < 1:
        raise ValueError(f"`n_timepoints` {n_timepoints} and `n_channels` {n_channels} must be at least 1")
    cutting.check_shape(shape)
    operators = [with_depth(operator, depth, len(shape)) for operator in _checked_order(operators)]
    dtypes = [np.dtype(dtype)]
    for operator in operators:
        operator.check(shape, dtypes[-1])
        dtypes.append(result_dtype(operator, dtypes[-1]))
        if channels_of(operator) not in (1, n_channels):
            raise ValueError(
                f"{operator.name} takes {channels_of(operator)} channels together, but the image has {n_channels}; "
                "choose as many with `channel` (--channel), in the model's order"
            )
    block_shape = _lengths("block_shape", block_shape, shape)
    shards = _lengths("shards", shards, shape)
    passes: list[Pass] = []
    n_done = 0
    for group in _groups(operators, shape, block_shape):
        stored = None if source is None or passes else source.spatial_chunks
        grid, chunks = _cut(
            group, shape, block_shape, shards, memory_nbytes, n_timepoints * n_channels, stored
        )
        made = Pass(tuple(group), dtypes[n_done], grid, chunks, shards, (shape,), is_first=not passes)
        n_done += len(group)
        if shards is None and version != "0.4":
            made = replace(made, shards=_default_shards(made, n_timepoints * n_channels))
        passes.append(made)
    passes = _with_sources(passes, source)
    pyramid = default_pyramid(shape, voxel_size or (1.0,) * len(shape))
    last_image = max((i for i, p in enumerate(passes) if not p.makes_labels), default=0)
    for position in range(last_image, len(passes)):
        passes[position] = replace(passes[position], levels=tuple(level.shape for level in pyramid))
    return Plan(tuple(passes), n_timepoints, n_channels)


def _default_shards(work: Pass, n_planes: int) -> tuple[int, ...] | None:
    """Return what a pass stores as one file where chunks would make too many."""
    return default_shards(
        work.grid.shape,
        work.stored_dtype.itemsize,
        n_planes=n_planes,
        chunks=work.chunks,
        block_shape=work.block_shape,
    )


def _with_sources(passes: Sequence[Pass], source: RegionReader | None) -> list[Pass]:
    """Return the passes with what is known of how that is stored which they read."""
    if source is None:
        return list(passes)
    first = tuple(pick[0] for pick in source.picks[-len(source.spatial_shape) :])
    linked = [replace(passes[0], source_chunks=source.spatial_chunks, source_first=first)]
    for before, work in itertools.pairwise(passes):
        linked.append(replace(work, source_chunks=before.chunks))
    return linked


def with_depth(operator: Operator, depth: int | Sequence[int] | None, ndim: int) -> Operator:
    """Return the operator with its halo set to `depth`, if it takes one."""
    if depth is None or "depth" not in {f.name for f in fields(operator)}:  # type: ignore[arg-type]
        return operator
    per_axis = (depth,) * ndim if isinstance(depth, int) else tuple(depth)
    if len(per_axis) != ndim or min(per_axis) < 0:
        raise ValueError(f"`depth` {depth} must be at least 0 and have one number per axis of {ndim}")
    return replace(operator, depth=per_axis)  # type: ignore[type-var]


def _checked_order(operators: Sequence[Operator]) -> list[Operator]:
    for operator in operators[:-1]:
        if isinstance(operator, LabelOperator):
            raise ValueError(f"{operator.name} makes labels and must be the last operator")
    return completed(operators)


def _lengths(name: str, lengths: Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return `lengths` as integers, one per axis and none below 1."""
    if lengths is None:
        return None
    if len(lengths) != len(shape):
        raise ValueError(f"`{name}` {tuple(lengths)} must have one length per axis of {shape}")
    if min(lengths) < 1:
        raise ValueError(f"`{name}` {tuple(lengths)} must be at least 1 on every axis")
    return tuple(map(integers.index, lengths))


def _groups(
    operators: Sequence[Operator], shape: Sequence[int], block_shape: Sequence[int] | None
) -> list[list[Operator]]:
    """Split the operators into passes.

    An operator shares a pass with the one before it if it needs no number of that one's whole result, and
    if the chained halo is no deeper than a block, beyond which an intermediate store costs less than the
    halo; along an axis that one block spans there is no halo to pay for. Labels have a pass of their own:
    they read the image that the job writes anyway.
    """
    limit = block_shape or (cutting.LONGEST_BLOCK[len(shape)] // 2,) * len(shape)
    groups: list[list[Operator]] = []
    for operator in operators:
        joined = [*groups[-1], operator] if groups else [operator]
        depths = [sum(per_axis) for per_axis in zip(*(o.halo(shape).depth for o in joined), strict=True)]
        fits = all(d <= b or b >= n for d, b, n in zip(depths, limit, shape, strict=True))
        if len(joined) > 1 and fits and not operator.needs and not isinstance(operator, LabelOperator):
            groups[-1] = joined
        else:
            groups.append([operator])
    return groups


def _cut(
    operators: Sequence[Operator],
    shape: tuple[int, ...],
    block_shape: tuple[int, ...] | None,
    shards: tuple[int, ...] | None,
    memory_nbytes: int | None,
    n_planes: int,
    source_chunks: tuple[int, ...] | None,
) -> tuple[BlockGrid, tuple[int, ...]]:
    """Return the blocks and the chunks of a pass."""
    if shards is not None:
        unit, chunks = shards, cutting.chunks_of_shards(shards)
    elif block_shape is None:
        unit = chunks = tuple(min(CHUNK_LENGTH[len(shape)], n) for n in shape)
    else:
        block_shape = tuple(min(b, n) for b, n in zip(block_shape, shape, strict=True))
        unit = chunks = cutting.chunks_of_blocks(block_shape, shape)
    if block_shape is None:
        block_shape = _default_block(operators, shape, unit, memory_nbytes, source_chunks)
    cutting.check_count(shape, block_shape, n_planes)
    _check_align(operators, shape, block_shape)
    return BlockGrid.regular(shape, block_shape, operators[-1].halo(shape), write_unit=unit), chunks


def _default_block(
    operators: Sequence[Operator],
    shape: tuple[int, ...],
    unit: tuple[int, ...],
    memory_nbytes: int | None,
    source_chunks: tuple[int, ...] | None,
) -> tuple[int, ...]:
    """Return the largest block that fits `memory_nbytes`, or the default one."""
    if source_chunks is not None:
        unit = cutting.suited_unit(operators, shape, unit, source_chunks, memory_nbytes or MEMORY_NBYTES)
    if memory_nbytes is None:
        longest = cutting.longest_block(operators, shape)
        return cutting.largest_block(operators, shape, unit, MEMORY_NBYTES, longest=longest)
    block_shape = cutting.largest_block(operators, shape, unit, memory_nbytes, longest=None)
    peak = peak_nbytes(operators, shape, block_shape)
    if peak > memory_nbytes:
        raise ValueError(
            f"`memory` of {format_nbytes(memory_nbytes)} is too little: a block of {block_shape}, the least that is "
            f"stored as whole files, takes {format_nbytes(peak)} with its halo; give more, use fewer workers, or a "
            "smaller `depth`"
        )
    return block_shape


def _check_align(operators: Sequence[Operator], shape: tuple[int, ...], block_shape: tuple[int, ...]) -> None:
    for operator in operators:
        align = operator.halo(shape).align
        for axis, (b, a, n) in enumerate(zip(block_shape, align, shape, strict=True)):
            if b < min(a, n):
                raise ValueError(
                    f"`block_shape` {b} on axis {axis} is smaller than the pooling grid of {operator.name}; "
                    f"use at least {a}"
                )

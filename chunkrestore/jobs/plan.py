"""What a job will do, computed from metadata alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from chunkrestore.grid import Block, BlockGrid
from chunkrestore.jobs.tasks import chain
from chunkrestore.operators.base import LabelOperator, Operator

MEMORY_NBYTES = 2 * 2**30
"""Peak memory per worker that blocks are sized for by default. A constant and not what happens to be free:
a resumed job must be cut into the same blocks, on whatever machine it goes on."""

_CHUNK = {2: 512, 3: 64}
_MAX_BLOCK = {2: 4096, 3: 512}
_MAX_BLOCKS = 10_000_000


@dataclass(frozen=True)
class Pass:
    """Operators that run together on each block, from one stored image to the next."""

    operators: tuple[Operator, ...]
    """Image operators, or one label operator."""
    grid: BlockGrid
    """Cores, with the halo of the last operator."""
    chunks: tuple[int, ...]
    """Chunk shape of what the pass writes."""

    @property
    def makes_labels(self) -> bool:
        """Whether the pass ends in labels."""
        return isinstance(self.operators[-1], LabelOperator)

    @property
    def needs(self) -> frozenset[float | str]:
        """Numbers of the pass's input that must be known before its first block."""
        return self.operators[0].needs

    def blocks(self, block: Block) -> list[Block]:
        """Return one block per operator, ending on the core of `block`."""
        return chain(self.operators, block.core, self.grid.shape, block.index)

    @property
    def n_voxels_read(self) -> int:
        """Voxels read by all blocks of one time point and channel, exactly.

        Read regions are products of ranges, each of which depends on one index: one walk along every axis
        is enough, however many blocks there are.
        """
        total = 1
        for axis, n in enumerate(self.grid.n_blocks):
            along = [tuple(i if a == axis else 0 for a in range(len(self.grid.n_blocks))) for i in range(n)]
            reads = [self.blocks(self.grid.block(index))[0].read[axis] for index in along]
            total *= sum(r.stop - r.start for r in reads)
        return total

    @property
    def halo_overhead(self) -> float:
        """Voxels read divided by voxels written."""
        return self.n_voxels_read / math.prod(self.grid.shape)

    @property
    def memory_nbytes(self) -> int:
        """Peak bytes of one task."""
        return _peak_nbytes(self.operators, self.grid.block([n // 2 for n in self.grid.n_blocks]))

    def describe(self) -> dict[str, Any]:
        """Return what identifies the result of the pass."""
        return {
            "operators": [dict(operator.describe()) for operator in self.operators],
            "depth": [list(operator.halo(self.grid.shape).depth) for operator in self.operators],
            "block_shape": [edges[1] for edges in self.grid.edges],
            "chunks": list(self.chunks),
        }


@dataclass(frozen=True)
class Plan:
    """Passes over the time points and channels of an image.

    ``str(plan)`` is a table for people; nothing was computed to make it.
    """

    passes: tuple[Pass, ...]
    """In order; each reads what the one before it wrote."""
    n_timepoints: int
    """Time points to process."""
    n_channels: int
    """Channels to process."""
    dtype: np.dtype[Any]
    """Of the input."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the volume."""
        return self.passes[0].grid.shape

    @property
    def n_planes(self) -> int:
        """Time points times channels: volumes that are processed one by one."""
        return self.n_timepoints * self.n_channels

    @property
    def n_blocks(self) -> int:
        """Blocks of all passes, time points and channels."""
        return self.n_planes * sum(len(p.grid) for p in self.passes)

    @property
    def read_nbytes(self) -> int:
        """Bytes read as voxels by all passes, halos included; one more reading for statistics is not counted."""
        sizes = [self.dtype.itemsize] + [4] * (len(self.passes) - 1)
        return self.n_planes * sum(s * p.n_voxels_read for s, p in zip(sizes, self.passes, strict=True))

    @property
    def written_nbytes(self) -> int:
        """Bytes of full-resolution voxels written by all passes, before compression."""
        return 4 * self.n_planes * math.prod(self.shape) * len(self.passes)

    @property
    def memory_nbytes(self) -> int:
        """Peak bytes of a task of the hungriest pass."""
        return max(p.memory_nbytes for p in self.passes)

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "n_timepoints": self.n_timepoints,
            "n_channels": self.n_channels,
            "passes": [
                p.describe() | {"n_blocks": list(p.grid.n_blocks), "halo_overhead": round(p.halo_overhead, 3)}
                for p in self.passes
            ],
            "read_nbytes": self.read_nbytes,
            "written_nbytes": self.written_nbytes,
            "memory_nbytes": self.memory_nbytes,
        }

    def __str__(self) -> str:
        lines = [
            f"volume     {_times(self.shape)} {self.dtype.name}, "
            f"{self.n_timepoints} time points, {self.n_channels} channels"
        ]
        for number, p in enumerate(self.passes, 1):
            depths = "; ".join(f"{o.name} depth {_times(o.halo(p.grid.shape).depth)}" for o in p.operators)
            lines += [
                f"pass {number}     {' -> '.join(o.name for o in p.operators)}",
                f"  halo     {depths}",
                f"  blocks   {_times(p.grid.n_blocks)} of {_times([e[1] for e in p.grid.edges])}, "
                f"chunks {_times(p.chunks)}, {p.halo_overhead:.2f} voxels read per voxel written",
                f"  memory   {format_nbytes(p.memory_nbytes)} per task",
            ]
        lines.append(
            f"in all     {self.n_blocks} blocks, {format_nbytes(self.read_nbytes)} read, "
            f"{format_nbytes(self.written_nbytes)} written before compression"
        )
        return "\n".join(lines)


def make_plan(
    operators: Sequence[Operator],
    shape: Sequence[int],
    dtype: np.dtype[Any],
    *,
    n_timepoints: int = 1,
    n_channels: int = 1,
    block_shape: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    memory_nbytes: int | None = None,
) -> Plan:
    """Check operators against an image's metadata and cut the work into passes and blocks.

    Parameters
    ----------
    operators
        Image operators in order of application, optionally followed by one label operator.
    shape, dtype
        Of the spatial axes of the input.
    n_timepoints, n_channels
        How many volumes there are.
    block_shape
        Core of a block; by default the largest multiple of the chunks whose peak fits `memory_nbytes`.
    depth
        Halo of every operator that takes one, instead of the derived halo.
    memory_nbytes
        Peak memory of one task that default blocks are sized for, as large as they get; None: `MEMORY_NBYTES`,
        and no block longer than `_MAX_BLOCK`.

    Raises
    ------
    ValueError
        If the operators do not suit the image, or the blocks do not suit the operators.
    """
    shape = tuple(shape)
    operators = [with_depth(operator, depth, len(shape)) for operator in _checked_order(operators)]
    for position, operator in enumerate(operators):
        operator.check(shape, dtype if position == 0 else np.dtype(np.float32))
    if block_shape is not None and len(block_shape) != len(shape):
        raise ValueError(f"`block_shape` {tuple(block_shape)} must have one length per axis of {shape}")
    passes = tuple(
        _make_pass(group, shape, block_shape, memory_nbytes)
        for group in _groups(operators, shape, block_shape)
    )
    return Plan(passes, n_timepoints, n_channels, np.dtype(dtype))


def with_depth(operator: Operator, depth: int | Sequence[int] | None, ndim: int) -> Operator:
    """Return the operator with its halo set to `depth`, if it takes one."""
    if depth is None or "depth" not in {f.name for f in fields(operator)}:  # type: ignore[arg-type]
        return operator
    per_axis = (depth,) * ndim if isinstance(depth, int) else tuple(depth)
    if len(per_axis) != ndim or min(per_axis) < 0:
        raise ValueError(f"`depth` {depth} must be at least 0 and have one number per axis of {ndim}")
    return replace(operator, depth=per_axis)  # type: ignore[type-var]


def _checked_order(operators: Sequence[Operator]) -> list[Operator]:
    if not operators:
        raise ValueError("`operators` is empty; give at least one")
    for operator in operators[:-1]:
        if isinstance(operator, LabelOperator):
            raise ValueError(f"{operator.name} makes labels and must be the last operator")
    return list(operators)


def _groups(
    operators: Sequence[Operator], shape: Sequence[int], block_shape: Sequence[int] | None
) -> list[list[Operator]]:
    """Split the operators into passes.

    An operator shares a pass with the one before it if it needs no number of that one's whole result, and
    if the chained halo is no deeper than a block, beyond which an intermediate store costs less than the
    halo; along an axis that one block spans there is no halo to pay for. Labels have a pass of their own:
    they read the image that the job writes anyway.
    """
    limit = block_shape or (_MAX_BLOCK[len(shape)] // 2,) * len(shape)
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


def _make_pass(
    operators: Sequence[Operator],
    shape: tuple[int, ...],
    block_shape: Sequence[int] | None,
    memory_nbytes: int | None,
) -> Pass:
    halo = operators[-1].halo(shape)
    if block_shape is None:
        chunks = tuple(min(_CHUNK[len(shape)], n) for n in shape)
        block_shape = _largest_block(operators, shape, chunks, memory_nbytes)
    else:
        block_shape = tuple(min(b, n) for b, n in zip(block_shape, shape, strict=True))
        if min(block_shape) < 1:
            raise ValueError(f"`block_shape` {block_shape} must be at least 1 on every axis")
        chunks = tuple(
            _chunk_length(b, n, _CHUNK[len(shape)]) for b, n in zip(block_shape, shape, strict=True)
        )
    for operator in operators:
        align = operator.halo(shape).align
        for axis, (b, a, n) in enumerate(zip(block_shape, align, shape, strict=True)):
            if b < min(a, n):
                raise ValueError(
                    f"`block_shape` {b} on axis {axis} is smaller than the pooling grid of {operator.name}; "
                    f"use at least {a}"
                )
    grid = BlockGrid.regular(shape, block_shape, halo, write_unit=chunks)
    if len(grid) > _MAX_BLOCKS:
        raise ValueError(
            f"`block_shape` {block_shape} cuts the volume {shape} into {len(grid)} blocks, the limit is "
            f"{_MAX_BLOCKS}; use larger blocks or a region"
        )
    return Pass(tuple(operators), grid, chunks)


def _largest_block(
    operators: Sequence[Operator], shape: tuple[int, ...], chunks: tuple[int, ...], memory_nbytes: int | None
) -> tuple[int, ...]:
    """Return the largest multiple of `chunks` whose task fits into `memory_nbytes`; one chunk at least."""
    best = chunks
    longest = _MAX_BLOCK[len(shape)] if memory_nbytes is None else max(shape) + _CHUNK[len(shape)]
    for k in range(1, longest // _CHUNK[len(shape)] + 1):
        block_shape = tuple(min(k * c, -(-n // c) * c) for c, n in zip(chunks, shape, strict=True))
        block_shape = tuple(min(b, n) for b, n in zip(block_shape, shape, strict=True))
        grid = BlockGrid.regular(shape, block_shape, operators[-1].halo(shape))
        peak = _peak_nbytes(operators, grid.block([n // 2 for n in grid.n_blocks]))
        if k == 1 and memory_nbytes is not None and peak > memory_nbytes:
            raise ValueError(
                f"`memory` of {format_nbytes(memory_nbytes)} is too little: a block of one chunk {chunks} with its "
                f"halo takes {format_nbytes(peak)}; give more, use fewer workers, or a smaller `depth`"
            )
        if k > 1 and peak > (MEMORY_NBYTES if memory_nbytes is None else memory_nbytes):
            break
        best = block_shape
    return best


def _peak_nbytes(operators: Sequence[Operator], block: Block) -> int:
    blocks = chain(operators, block.core, block.volume_shape)
    return max(o.memory_nbytes(b.read_shape) for o, b in zip(operators, blocks, strict=True))


def _chunk_length(block: int, n: int, preferred: int) -> int:
    """Return a chunk length that divides `block`, unless that one block spans the axis of length `n`.

    The largest divisor up to `preferred`, or `block` itself if that would be tiny (a prime length).
    """
    if block >= n:
        return min(preferred, n)
    divisor = max(d for d in range(1, min(block, preferred) + 1) if block % d == 0)
    return divisor if 2 * divisor >= min(block, preferred) else block


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))


def format_nbytes(n: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"

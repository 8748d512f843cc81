"""Which levels of a pyramid are written together, so that none is read twice: pure integers.

A *step* reads the level below its first one once, region by region, and writes several levels from what it holds.
Where regions are the cores of blocks that have just been computed, nothing is read at all. All lists hold one entry
per level, finest first; shapes cover the spatial axes only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.ome_zarr.layout import Shape, factors_between, level_chunks, region_shape, shards_above

STEP_VOXELS = 2**21
"""Voxels that a step writes of its first level at once, unless one file holds more: 16 million are read for them."""


@dataclass(frozen=True)
class Step:
    """Levels that one pass writes, from one reading of the level below them."""

    first: int
    """Finest level that is written."""
    last: int
    """Coarsest level that is written."""
    grid: BlockGrid
    """Regions of level `first`; what they hold of the others lies on borders of files as well."""

    @property
    def name(self) -> str:
        """Which levels, as part of a stage's name."""
        return f"{self.first}to{self.last}"


def stored_units(
    shapes: Sequence[Sequence[int]], chunks: Sequence[int], shards: Sequence[int] | None
) -> tuple[list[Shape], list[Shape]]:
    """Return factors of the levels of `shapes`, and what each stores as one file, for chunks and shards of level 0."""
    factors = [(1,) * len(shapes[0]), *itertools.starmap(factors_between, itertools.pairwise(shapes))]
    units = []
    for shape, of_level in zip(shapes, factors, strict=True):
        shards = None if shards is None else shards_above(shards, chunks, of_level)
        clipped, unit = level_chunks(shape, chunks, shards)
        units.append(unit or clipped)
    return factors, units


def fused_levels(
    edges: Sequence[Sequence[int]], units: Sequence[Sequence[int]], factors: Sequence[Sequence[int]]
) -> int:
    """Return how many levels above the full resolution can be written by whoever owns cores of it.

    A core that begins and ends on multiples of ``F * unit``, for the cumulative factor ``F`` of a level and the
    shape `unit` of what it stores as one file, holds all voxels of the files that it touches there.

    Parameters
    ----------
    edges
        Per axis, the borders of the cores, with 0 and the length of the axis.
    units
        Per level, the shape of what is stored as one file.
    factors
        Per level, voxels of the level below per voxel.
    """
    covered = [1] * len(edges)
    for level in range(1, len(units)):
        covered = [n * f for n, f in zip(covered, factors[level], strict=True)]
        for inner, n, unit in zip(edges, covered, units[level], strict=True):
            if any(edge % (n * unit) for edge in inner[1:-1]):
                return level - 1
    return len(units) - 1


def pyramid_steps(
    shapes: Sequence[Sequence[int]],
    units: Sequence[Sequence[int]],
    factors: Sequence[Sequence[int]],
    n_done: int = 0,
) -> list[Step]:
    """Return the steps that write the levels above `n_done`, which is complete.

    As many levels share a step as regions of `STEP_VOXELS` allow, one at least.

    Parameters
    ----------
    shapes, units, factors
        Per level: shape, shape of what is stored as one file, voxels of the level below per voxel.
    n_done
        Coarsest level that exists.
    """
    steps = []
    while n_done + 1 < len(shapes):
        first = last = n_done + 1
        unit, covered = list(units[first]), [1] * len(units[first])
        while last + 1 < len(shapes):
            covered = [n * f for n, f in zip(covered, factors[last + 1], strict=True)]
            wider = [math.lcm(u, n * v) for u, n, v in zip(unit, covered, units[last + 1], strict=True)]
            if math.prod(map(min, wider, shapes[first])) > STEP_VOXELS:
                break
            unit, last = wider, last + 1
        region = region_shape(shapes[first], tuple(map(min, unit, shapes[first])))
        steps.append(Step(first, last, BlockGrid.regular(shapes[first], region)))
        n_done = last
    return steps


def above(region: Slices, factors: Sequence[int], shape: Sequence[int]) -> Slices:
    """Return what a region of one level holds of the next, of `shape`; an axis may be empty where that rounds down."""
    return tuple(
        slice(s.start // f, min(-(-s.stop // f), n)) for s, f, n in zip(region, factors, shape, strict=True)
    )


def below(region: Slices, factors: Sequence[int], shape: Sequence[int]) -> Slices:
    """Return the region of the level below, of `shape`, that a region of a level is computed from."""
    return tuple(
        slice(s.start * f, min(s.stop * f, n)) for s, f, n in zip(region, factors, shape, strict=True)
    )


def slabs(region: Slices, chunks: Sequence[int], factors: Sequence[int], n_voxels: int) -> Iterator[Slices]:
    """Cut a region along its first axis, where windows as well as chunks end, into parts of about `n_voxels`.

    Where one file of a level holds gigabytes, no more than a slab of what it is computed from is ever in memory.
    """
    along, *others = region
    whole = math.lcm(chunks[0], factors[0])
    per_row = math.prod(s.stop - s.start for s in others)
    step = max(1, n_voxels // (per_row * whole)) * whole
    start = along.start
    while start < along.stop:
        stop = min((start // whole * whole) + step, along.stop)
        yield (slice(start, stop), *others)
        start = stop

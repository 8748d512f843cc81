"""Pyramids, out of core: levels are computed from the one below, one region at a time, several levels at once.

A voxel of level ``l + 1`` covers ``factors`` voxels of level ``l`` that begin at ``factors * index``. Regions
lie on whole chunks or shards of the levels that they write, so they can be computed by any number of tasks in
any order, and no level depends on how it was cut, or on whether the level below came from a store or from memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.ome_zarr.downsampling import downsample
from chunkrestore.ome_zarr.layout import Shape, region_shape
from chunkrestore.ome_zarr.levels import STEP_VOXELS, Step, above, below, fused_levels, pyramid_steps, slabs

if TYPE_CHECKING:
    from chunkrestore.ome_zarr.arrays import RegionReader
    from chunkrestore.ome_zarr.target import RegionWriter
    from chunkrestore.ome_zarr.writer import ImageWriter


@dataclass(frozen=True)
class PyramidBlock:
    """One region of one level."""

    level: int
    """Level that is written."""
    t: int
    """Time point."""
    c: int
    """Channel."""
    slices: Slices
    """Region of the level, one slice per spatial axis, on write-unit borders."""


@dataclass(frozen=True)
class Cascade:
    """Consecutive levels that one task writes: each follows from the one before while that is in memory."""

    targets: tuple[RegionWriter, ...]
    """Handles on the levels, finest first."""
    factors: tuple[Shape, ...]
    """Per level and spatial axis: voxels of the level below per voxel."""
    method: str
    """How levels derive from each other."""
    last: int
    """Coarsest of them, by its number in the image."""

    @classmethod
    def of(cls, writer: ImageWriter, first: int, last: int) -> Self:
        """Return the levels `first` to `last` of an image under construction."""
        levels = slice(first, last + 1)
        return cls(writer.targets[levels], writer.factors[levels], writer.method, last)

    def regions(self, region: Slices) -> list[Slices]:
        """Return `region` of the first level and what it holds of the others, as far as it holds anything."""
        return regions_above(region, self.targets, self.factors)

    def reduce(self, array: np.ndarray, position: int, region: Slices) -> np.ndarray:
        """Return a region of the level at `position`, given what it covers of the level below."""
        reduced = downsample(array, self.factors[position], self.method)
        # Where a level was rounded down, the last voxels below belong to none of it.
        return reduced[tuple(slice(s.stop - s.start) for s in region)]

    def sources(self, source: RegionReader, region: Slices) -> Iterator[tuple[Slices, Slices]]:
        """Yield the parts of the level below that a region of the first level is computed from, and of what part.

        Several only where the files of the first level are very large.
        """
        factors, shape = self.factors[0], self.targets[0].spatial_shape
        n_voxels = STEP_VOXELS * int(np.prod(factors))
        whole = below(region, factors, source.spatial_shape)
        for part in slabs(whole, source.spatial_chunks, factors, n_voxels):
            yield part, above(part, factors, shape)


def regions_above(
    region: Slices, levels: Sequence[RegionReader], factors: Sequence[Sequence[int]]
) -> list[Slices]:
    """Return `region` of the first of several levels and what it holds of the others, as far as it holds anything."""
    regions = [region]
    for level, of_level in zip(levels[1:], factors[1:], strict=True):
        region = above(region, of_level, level.spatial_shape)
        if any(s.start >= s.stop for s in region):
            break
        regions.append(region)
    return regions


def fused_with(writer: ImageWriter, grid: BlockGrid) -> int:
    """Return how many levels above the full resolution the tasks can write that compute the cores of `grid`."""
    return fused_levels(grid.edges, [t.spatial_write_unit for t in writer.targets], writer.factors)


def steps_of(levels: Sequence[RegionReader], factors: Sequence[Sequence[int]], n_done: int = 0) -> list[Step]:
    """Return the steps that write the levels above `n_done`; see `chunkrestore.ome_zarr.levels.pyramid_steps`."""
    shapes, units = (
        [getattr(level, f"spatial_{what}") for level in levels] for what in ("shape", "write_unit")
    )
    return pyramid_steps(shapes, units, factors, n_done)


def pyramid_blocks(writer: ImageWriter, level: int) -> Iterator[PyramidBlock]:
    """Yield the regions that make up `level` (1 or above); each lies on whole chunks or shards.

    Raises
    ------
    ValueError
        If there is no such level.
    """
    target = writer.target(level)
    if level == 0:
        raise ValueError("`level` 0 is the full resolution; pyramid levels begin at 1")
    yield from level_blocks(target, level)


def level_blocks(target: RegionReader, level: int) -> Iterator[PyramidBlock]:
    """Yield the regions that make up `target`, the array of a pyramid's `level`."""
    unit = target.spatial_write_unit
    region = region_shape(target.spatial_shape, unit)
    grid = BlockGrid.regular(target.spatial_shape, region, write_unit=unit)
    for t in range(target.n_t):
        for c in range(target.n_c):
            for block in grid:
                yield PyramidBlock(level, t, c, block.core)


def build_block(writer: ImageWriter, block: PyramidBlock) -> None:
    """Compute one region of a level from the level below, and write it."""
    cascade = Cascade.of(writer, block.level, block.level)
    build_region(cascade, writer.target(block.level - 1), block.t, block.c, block.slices)


def build_region(cascade: Cascade, source: RegionReader, t: int, c: int, region: Slices) -> None:
    """Compute what a region of the first of several levels holds of all of them, and write it.

    Parameters
    ----------
    cascade
        The levels.
    source
        The level below them, which is complete.
    t, c
        Index of the time point and channel.
    region
        Of the first level, on borders of what all of them store as one file.
    """
    parts = [
        cascade.reduce(source.read(t, c, part), 0, made) for part, made in cascade.sources(source, region)
    ]
    array = np.concatenate(parts)
    for position, (target, part) in enumerate(zip(cascade.targets, cascade.regions(region), strict=False)):
        if position:
            array = cascade.reduce(array, position, part)
        target.write(t, c, part, array)


def build_pyramid(writer: ImageWriter, *, n_threads: int | None = None) -> None:
    """Compute all levels above 0 in a pool of threads; every level is read once at most.

    Parameters
    ----------
    writer
        Level 0 must be complete.
    n_threads
        Number of processors, at most 8, by default.
    """
    for step in steps_of(writer.targets, writer.factors):
        _build_step(writer, step, n_threads)


def _build_step(writer: ImageWriter, step: Step, n_threads: int | None) -> None:
    cascade, source = Cascade.of(writer, step.first, step.last), writer.target(step.first - 1)
    cores = (block.core for block in step.grid)
    places = itertools.product(range(source.n_t), range(source.n_c), cores)
    in_threads(lambda place: build_region(cascade, source, *place), places, n_threads)


def in_threads(work: Callable[[Any], None], items: Iterator[Any], n_threads: int | None = None) -> None:
    """Call `work` on every item in a pool of threads; the first error stops the rest and is raised."""
    with ThreadPoolExecutor(n_threads or min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

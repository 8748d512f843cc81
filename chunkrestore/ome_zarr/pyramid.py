"""Pyramids, out of core: each level is computed from the one below, one region at a time.

A voxel of level ``l + 1`` covers ``factors`` voxels of level ``l`` that begin at ``factors * index``. Regions
lie on whole chunks or shards of the level they write, so they can be computed by any number of tasks in
any order, and the level does not depend on how it was cut.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.ome_zarr.layout import region_shape

if TYPE_CHECKING:
    from chunkrestore.ome_zarr.arrays import RegionReader
    from chunkrestore.ome_zarr.writer import ImageWriter

METHODS = ("mean", "nearest", "mode")
"""How a level derives from the one below: images by mean, labels by nearest or mode."""

_INT32_WINDOW = 2**13
"""Windows of so many 16-bit integers can be summed, and doubled for rounding, in 32 bits."""


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


def downsample_mean(block: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Average windows of `factors` voxels.

    Integers are averaged exactly and rounded half up (towards plus infinity); floats are summed
    in their own precision, z first. A window that the end of an axis cuts off averages the voxels it has.

    Preserves the dtype.

    Parameters
    ----------
    block
        Integers of at most 32 bits, or floats.
    factors
        Window length per axis.

    Returns
    -------
    numpy.ndarray
        Shape ``ceil(block.shape / factors)``.
    """
    is_integer = block.dtype.kind in "iu"
    small = block.dtype.itemsize <= 2 and math.prod(factors) <= _INT32_WINDOW
    wide = np.dtype(np.int32 if small else np.int64) if is_integer else block.dtype
    total, count = block, np.ones((1,) * block.ndim, wide)
    for axis, (factor, n) in enumerate(zip(factors, block.shape, strict=True)):
        if factor > 1:
            total = _window_sums(total, factor, axis, wide)
            lengths = np.minimum(factor, n - np.arange(0, n, factor)).astype(wide)
            count = count * lengths.reshape([-1 if i == axis else 1 for i in range(block.ndim)])
    if total is block:
        return block.copy()
    mean: np.ndarray = (2 * total + count) // (2 * count) if is_integer else total / count
    return mean.astype(block.dtype, copy=False)


def downsample_nearest(labels: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Take the central voxel of each window of `factors` voxels (the lower one of two).

    Preserves the dtype; every value of the result occurs in `labels`.
    """
    index = []
    for n, factor in zip(labels.shape, factors, strict=True):
        starts = np.arange(0, n, factor)
        index.append(np.minimum(starts + (factor - 1) // 2, n - 1))
    return labels[np.ix_(*index)]


def downsample_mode(labels: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """Take the most frequent value of each window of `factors` voxels.

    Ties go to an object rather than background, then to the first in the window. A window that the end
    of an axis cuts off counts its last voxels again.

    Preserves the dtype; every value of the result occurs in `labels`.

    Notes
    -----
    Compares all pairs of a window: time grows with the square of its voxels.
    """
    padding = [(0, -n % f) for n, f in zip(labels.shape, factors, strict=True)]
    padded = np.pad(labels, padding, mode="edge")
    split = [part for n, f in zip(padded.shape, factors, strict=True) for part in (n // f, f)]
    axes = [*range(0, 2 * labels.ndim, 2), *range(1, 2 * labels.ndim, 2)]
    windows = padded.reshape(split).transpose(axes).reshape(*split[::2], -1)
    score = (windows[..., :, None] == windows[..., None, :]).sum(-1) * 2 + (windows != 0)
    return np.take_along_axis(windows, score.argmax(-1)[..., None], -1)[..., 0]


def downsample_labels(labels: np.ndarray, factors: Sequence[int], method: str = "nearest") -> np.ndarray:
    """Reduce instance labels by ``"nearest"`` (keeps small objects) or ``"mode"``; ids are never invented."""
    return _kernel(method)(labels, factors)


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
    below = writer.target(block.level - 1).read(block.t, block.c, source_of(writer, block))
    writer.target(block.level).write(block.t, block.c, block.slices, reduce_block(writer, block, below))


def source_of(writer: ImageWriter, block: PyramidBlock) -> Slices:
    """Return the region of the level below that a region of a level is computed from."""
    shape = writer.target(block.level - 1).spatial_shape
    factors = writer.factors[block.level]
    return tuple(
        slice(s.start * f, min(s.stop * f, n)) for s, f, n in zip(block.slices, factors, shape, strict=True)
    )


def reduce_block(writer: ImageWriter, block: PyramidBlock, below: np.ndarray) -> np.ndarray:
    """Return one region of a level, given what `source_of` it holds."""
    return _kernel(writer.method)(below, writer.factors[block.level])


def build_pyramid(writer: ImageWriter, *, n_threads: int | None = None) -> None:
    """Compute all levels above 0, level by level, in a pool of threads.

    Parameters
    ----------
    writer
        Level 0 must be complete.
    n_threads
        Number of processors, at most 8, by default.
    """
    for level in range(1, writer.n_levels):
        in_threads(lambda block: build_block(writer, block), pyramid_blocks(writer, level), n_threads)


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


def _window_sums(block: np.ndarray, factor: int, axis: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return sums over windows of `factor` along `axis`; the last window may be shorter."""
    lead = (slice(None),) * axis
    n = block.shape[axis]
    total = block[(*lead, slice(0, None, factor))].astype(dtype)
    for start in range(1, min(factor, n)):
        part = block[(*lead, slice(start, None, factor))]
        total[(*lead, slice(0, part.shape[axis]))] += part
    return total


def _kernel(method: str) -> Callable[[np.ndarray, Sequence[int]], np.ndarray]:
    kernels = {"mean": downsample_mean, "nearest": downsample_nearest, "mode": downsample_mode}
    if method not in kernels:
        raise ValueError(f"`method` {method!r} is unknown; use one of {', '.join(METHODS)}")
    return kernels[method]

"""Scores of arrays: NumPy arrays of any size on disk or in memory, block by block, and dask arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.metrics.blocks import ImageComparison, ImageScore, merged
from chunkrestore.metrics.contingency import Contingency, count_overlaps, merged_counts
from chunkrestore.metrics.instances import THRESHOLDS, LabelScore, score_contingency

_BLOCK = {2: 4096, 3: 256}
"""Voxels per axis of a block by default, by number of axes."""


def score_image(
    truth: Any,
    image: Any,
    *,
    voxel_size: Sequence[float] | None = None,
    background: float = 0.0,
    truth_background: float = 0.0,
    data_range: float | None = None,
    block_shape: Sequence[int] | None = None,
) -> ImageScore:
    """Compare an image with the truth, block by block.

    Parameters
    ----------
    truth, image
        One volume each, ``zyx`` or ``yx``, of the same shape: NumPy arrays, dask arrays (Dask computes the blocks), or
        anything else that gives NumPy arrays when it is sliced.
    voxel_size
        Micrometres per axis, for the Fourier shell correlation; None: without it.
    background, truth_background
        Known intensities without light, subtracted from `image` and `truth`. Nothing is fitted.
    data_range
        What PSNR and SSIM refer to; largest minus smallest value of `truth` by default.
    block_shape
        Voxels per axis that are compared at a time. No block shape changes a bit of the result.

    Returns
    -------
    ImageScore
        As of `skimage.metrics` of the whole arrays in float64, up to rounding. The shell correlation is that of `fsc`
        for volumes of at most 128 voxels per axis (512 in two dimensions); of larger ones the spectra of windows of
        that length, half overlapping, are added up (Welch 1967), so shells are as wide as those of a window.

    Raises
    ------
    ValueError
        If the shapes differ, have other than 2 or 3 axes, the range is not positive, or an image is constant and a
        voxel size was given.
    chunkrestore.statistics.NonFiniteError
        If a voxel is NaN or infinite.
    """
    grid = _grid(truth, image, block_shape)
    size = None if voxel_size is None else tuple(float(v) for v in voxel_size)
    compared = ImageComparison(grid.shape, size, float(truth_background), float(background))
    sums = merged(_of_blocks(grid, compared.errors_region, compared.errors, (truth, image)))
    peak = compared.data_range(sums, data_range)
    if compared.has_similarity:
        found = _of_blocks(grid, compared.similarity_region, compared.similarity, (truth, image), peak)
        sums |= merged(found)
    return compared.score(sums, peak)


def score_labels(
    truth: Any, labels: Any, *, iou: Sequence[float] = THRESHOLDS, block_shape: Sequence[int] | None = None
) -> LabelScore:
    """Compare a segmentation with the true one, block by block.

    Parameters
    ----------
    truth, labels
        Integer labels as for `score_image`; 0 is background, ids may be any and have gaps.
    iou
        Overlaps at which objects are matched, each above 0 and at most 1.
    block_shape
        Voxels per axis that are counted at a time.

    Returns
    -------
    LabelScore
        As of `stardist.matching.matching` of the whole arrays, for every threshold.

    Raises
    ------
    ValueError
        If shapes differ or thresholds are out of range.
    TypeError
        If labels are no integers.

    Notes
    -----
    Memory: a block of both, and 24 bytes per pair of objects that overlap.
    """
    grid = _grid(truth, labels, block_shape)
    counts = merged_counts(_of_blocks(grid, _itself, _counted, (truth, labels)))
    return score_contingency(Contingency.of(counts), iou)


def _itself(core: Slices) -> Slices:
    return core


def _counted(_: Slices, truth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return count_overlaps(truth, labels)


def _of_blocks(
    grid: BlockGrid,
    region: Callable[[Slices], Slices | None],
    function: Callable[..., Any],
    arrays: tuple[Any, Any],
    *rest: Any,
) -> list[Any]:
    """Call a function with the core of every block and what it needs of both arrays; with Dask, if one is Dask's."""
    wanted = [(block.core, part) for block in grid if (part := region(block.core)) is not None]
    if any(hasattr(array, "dask") for array in arrays):
        import dask

        later = dask.delayed(function, pure=False)
        return list(dask.compute(*[later(core, *(a[part] for a in arrays), *rest) for core, part in wanted]))
    return [function(core, *(np.asarray(a[part]) for a in arrays), *rest) for core, part in wanted]


def _grid(first: Any, second: Any, block_shape: Sequence[int] | None) -> BlockGrid:
    shape = tuple(int(n) for n in first.shape)
    if shape != tuple(second.shape):
        raise ValueError(f"`truth` {shape} and {tuple(second.shape)} must have one shape")
    if len(shape) not in _BLOCK or 0 in shape:
        raise ValueError(f"`truth` must have the axes zyx or yx and at least one voxel, got shape {shape}")
    return BlockGrid.regular(shape, block_shape or (_BLOCK[len(shape)],) * len(shape))

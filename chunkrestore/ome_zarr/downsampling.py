"""Kernels of pyramids: windows of voxels become one voxel, by mean, nearest or mode.

Pure functions of one array. They go through it slab by slab along the first axis, so that what they hold besides
stays in the processor's cache: three times faster than the same sums over the whole array.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

METHODS = ("mean", "nearest", "mode")
"""How a level derives from the one below: images by mean, labels by nearest or mode."""

_CACHED_VOXELS = 2**18
"""Voxels of a slab: sums of them are a megabyte."""

_NARROW_WINDOW = {1: 2**6, 2: 2**13}
"""Windows of so many integers of 1 and 2 bytes can be summed, and doubled for rounding, in twice as many bytes."""


def downsample(array: np.ndarray, factors: Sequence[int], method: str) -> np.ndarray:
    """Reduce windows of `factors` voxels to one by a method of `METHODS`.

    Raises
    ------
    ValueError
        If `method` is unknown.
    """
    kernels = {"mean": downsample_mean, "nearest": downsample_nearest, "mode": downsample_mode}
    if method not in kernels:
        raise ValueError(f"`method` {method!r} is unknown; use one of {', '.join(METHODS)}")
    return kernels[method](array, factors)


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
    return _by_slabs(_mean, block, factors)


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
    Windows of one value are told by comparing neighbours; of the others all pairs are compared, so time grows with
    the square of a window's voxels. Small objects lose at every level: of 400 balls of radius 9, 169 are left four
    levels up, and 285 by `downsample_nearest`. Giving background only what it has the majority of would keep 207,
    and giving it nothing makes objects grow sevenfold, so there is no third method (``benchmarks/pyramids.py``).
    """
    padding = [(0, -n % f) for n, f in zip(labels.shape, factors, strict=True)]
    padded = np.pad(labels, padding, mode="edge") if any(after for _, after in padding) else labels
    return _by_slabs(_mode, padded, factors)


def downsample_labels(labels: np.ndarray, factors: Sequence[int], method: str = "nearest") -> np.ndarray:
    """Reduce instance labels by ``"nearest"`` (keeps small objects) or ``"mode"``; ids are never invented."""
    return downsample(labels, factors, method)


def _by_slabs(
    kernel: Callable[[np.ndarray, Sequence[int]], np.ndarray], array: np.ndarray, factors: Sequence[int]
) -> np.ndarray:
    """Apply a kernel to slabs of whole windows along the first axis."""
    shape = tuple(-(-n // f) for n, f in zip(array.shape, factors, strict=True))
    reduced = np.empty(shape, array.dtype)
    n_rows = max(1, _CACHED_VOXELS // (factors[0] * math.prod(array.shape[1:])))
    for start in range(0, shape[0], n_rows):
        stop = start + n_rows
        reduced[start:stop] = kernel(array[start * factors[0] : stop * factors[0]], factors)
    return reduced


def _mean(block: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    wide = _wide(block.dtype, math.prod(factors))
    total: np.ndarray = block
    count: Any = 1
    for axis, (factor, n) in enumerate(zip(factors, block.shape, strict=True)):
        if factor == 1:
            continue
        total = _window_sums(total, factor, axis, wide)
        if n % factor == 0 or factor == 2:
            count = count * factor
        else:
            lengths = np.minimum(factor, n - np.arange(0, n, factor)).astype(wide)
            count = count * lengths.reshape([-1 if i == axis else 1 for i in range(block.ndim)])
    if total is block:
        return block
    if block.dtype.kind == "f":
        return total / np.asarray(count, wide)
    if isinstance(count, int) and count.bit_count() == 1:
        # (2 total + count) // (2 count) without dividing
        total += count // 2
        total >>= count.bit_length() - 1
        return total
    rounded: np.ndarray = (2 * total + count) // (2 * count)
    return rounded


def _wide(dtype: np.dtype[Any], n_window: int) -> np.dtype[Any]:
    """Return the dtype that sums of windows fit into."""
    if dtype.kind == "f":
        return dtype
    narrow = n_window <= _NARROW_WINDOW.get(dtype.itemsize, 0)
    return np.dtype(f"i{2 * dtype.itemsize}" if narrow else "i8")


def _window_sums(block: np.ndarray, factor: int, axis: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return sums over windows of `factor` along `axis`; the last window may be shorter.

    A lone last voxel counts twice in windows of two, so that all windows have as many.
    """
    lead = (slice(None),) * axis
    n = block.shape[axis]
    total = block[(*lead, slice(0, None, factor))].astype(dtype)
    for start in range(1, min(factor, n)):
        part = block[(*lead, slice(start, None, factor))]
        total[(*lead, slice(0, part.shape[axis]))] += part
    if factor == 2 and n % 2:
        total[(*lead, slice(-1, None))] *= 2
    return total


def _mode(labels: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    starts = itertools.product(*(range(f) for f in factors))
    corners = [labels[tuple(slice(s, None, f) for s, f in zip(at, factors, strict=True))] for at in starts]
    result = corners[0].copy()
    mixed = np.zeros(result.shape, bool)
    for corner in corners[1:]:
        mixed |= corner != result
    if mixed.any():
        result[mixed] = _vote([corner[mixed] for corner in corners])
    return result


def _vote(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the most frequent of several values, element by element; each array holds one of a window."""
    kind = np.uint8 if len(values) < 128 else np.uint32
    scores = [(value != 0).astype(kind) for value in values]
    for (a, of_a), (b, of_b) in itertools.combinations(zip(values, scores, strict=True), 2):
        agree = (a == b).astype(kind)
        agree += agree
        of_a += agree
        of_b += agree
    best, highest = values[0].copy(), scores[0]
    for value, score in zip(values[1:], scores[1:], strict=True):
        np.copyto(best, value, where=score > highest)
        np.maximum(highest, score, out=highest)
    return best

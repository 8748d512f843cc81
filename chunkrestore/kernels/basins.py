"""Basins of a landscape as a forest of pointers that are found locally. Loads numba: import it inside functions.

Voxels have one strict order: by height, then by raster index in the volume. Every voxel of the mask points to a higher
one, or to itself:

- to the neighbour (of those that differ by at most 1 along every axis) that it ascends to most steeply;
- a summit, which has no higher neighbour, to the first higher voxel that a flood reaches which begins at the summit
  and always goes on at the highest voxel that it has touched, through the mask and within `reach` of the summit: the
  basin across its highest pass. A summit without one stands for an object.

So an object is a tree, and an object's summit is the highest voxel of all that are connected to it within `reach`. A
voxel's pointer depends on nothing but heights and mask within `reach` of it: blocks find the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Slices
from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.crossings import REACHED, steps

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]


def pointers(height: Floats, region: Slices, spacing: Sequence[float], reach: float) -> Indices:
    """Return where every voxel of a mask in `region` points to.

    Parameters
    ----------
    height
        float32 (z, y, x); minus infinity outside the mask.
    region
        Where pointers are wanted; all within `steps` of it is looked at.
    spacing
        Length of a voxel's edges.
    reach
        How far the flood of a summit goes, in the same unit.

    Returns
    -------
    numpy.ndarray
        int32, shape of `height`: raster index in `height`; -1 outside the mask, and -2 outside the region.

    Raises
    ------
    OverflowError
        If there are more voxels than int32 counts.
    """
    if height.size > np.iinfo(np.int32).max:
        raise OverflowError(f"a block of {height.size} voxels is too large for int32; use smaller blocks")
    bounds = np.array([[s.start, s.stop] for s in region], np.int64)
    sizes = np.array(spacing, np.float64)
    return _point(height, bounds, sizes, np.array(steps(spacing, reach), np.int64), reach * reach * REACHED)


def follow(pointer: Indices, region: Slices) -> Indices:
    """Return labels of a region: voxels whose ways meet, as far as they are known, have the same one.

    Parameters
    ----------
    pointer
        Result of `pointers`.
    region
        Region, within that of `pointers`.

    Returns
    -------
    numpy.ndarray
        int32, shape of the region: 1 more than the raster index in `pointer` of the last voxel of the way that is
        known; 0 outside the mask.
    """
    bounds = np.array([[s.start, s.stop] for s in region], np.int64)
    return _follow(pointer, bounds)


@part
def _is_higher(height_a: float, a: int, height_b: float, b: int) -> bool:
    return height_a > height_b or (height_a == height_b and a > b)


@compiled
def _point(
    height: Floats,
    bounds: npt.NDArray[np.int64],
    spacing: npt.NDArray[np.float64],
    n_steps: npt.NDArray[np.int64],
    limit: float,
) -> Indices:
    result = np.full(height.shape, -2, np.int32)
    flat = height.ravel()
    inverse = np.zeros((2, 2, 2), np.float64)
    for z in range(2):
        for y in range(2):
            for x in range(2):
                if z + y + x:
                    square = (z * spacing[0]) ** 2 + (y * spacing[1]) ** 2 + (x * spacing[2]) ** 2
                    inverse[z, y, x] = 1 / np.sqrt(square)
    # Of a flood: a heap of voxels, and which are in it or were.
    box = 2 * n_steps + 1
    seen = np.zeros((box[0], box[1], box[2]), np.int64)
    heap = np.empty(seen.size, np.int32)
    n_floods = 0
    for z in range(bounds[0, 0], bounds[0, 1]):
        for y in range(bounds[1, 0], bounds[1, 1]):
            for x in range(bounds[2, 0], bounds[2, 1]):
                if height[z, y, x] == -np.inf:
                    result[z, y, x] = -1
                    continue
                target = _steepest(height, inverse, z, y, x)
                if target < 0:
                    n_floods += 1
                    target = _flood(height, flat, seen, heap, n_floods, (z, y, x), n_steps, spacing, limit)
                result[z, y, x] = target
    return result


@part
def _steepest(height: Floats, inverse: npt.NDArray[np.float64], z: int, y: int, x: int) -> int:
    """Return the neighbour up the steepest slope; of several the highest; -1 on a summit."""
    n_z, n_y, n_x = height.shape
    here = height[z, y, x]
    own = (z * n_y + y) * n_x + x
    best, best_slope, best_height = -1, np.float64(-1.0), here
    for k in range(max(z - 1, 0), min(z + 2, n_z)):
        for j in range(max(y - 1, 0), min(y + 2, n_y)):
            for i in range(max(x - 1, 0), min(x + 2, n_x)):
                there = height[k, j, i]
                if there < here:
                    continue
                index = (k * n_y + j) * n_x + i
                if there == here and index <= own:
                    continue
                slope = (np.float64(there) - np.float64(here)) * inverse[abs(k - z), abs(j - y), abs(i - x)]
                if slope > best_slope or (
                    slope == best_slope and _is_higher(there, index, best_height, best)
                ):
                    best, best_slope, best_height = index, slope, there
    return best


@part
def _flood(
    height: Floats,
    flat: Floats,
    seen: npt.NDArray[np.int64],
    heap: Indices,
    stamp: int,
    summit: tuple[int, int, int],
    n_steps: npt.NDArray[np.int64],
    spacing: npt.NDArray[np.float64],
    limit: float,
) -> int:
    """Return the first voxel above `summit` that is reached, or the summit itself."""
    n_z, n_y, n_x = height.shape
    z, y, x = summit
    own = (z * n_y + y) * n_x + x
    top = flat[own]
    seen[n_steps[0], n_steps[1], n_steps[2]] = stamp
    heap[0] = own
    n = 1
    while n:
        index = heap[0]
        n -= 1
        _sift_down(heap, flat, n)
        if _is_higher(flat[index], index, top, own):
            return index
        c, rest = divmod(index, n_y * n_x)
        b, a = divmod(rest, n_x)
        for k in range(max(c - 1, 0), min(c + 2, n_z)):
            for j in range(max(b - 1, 0), min(b + 2, n_y)):
                for i in range(max(a - 1, 0), min(a + 2, n_x)):
                    dz, dy, dx = k - z, j - y, i - x
                    if (
                        height[k, j, i] == -np.inf
                        or abs(dz) > n_steps[0]
                        or abs(dy) > n_steps[1]
                        or abs(dx) > n_steps[2]
                    ):
                        continue
                    distance = (dz * spacing[0]) ** 2 + (dy * spacing[1]) ** 2 + (dx * spacing[2]) ** 2
                    place = (dz + n_steps[0], dy + n_steps[1], dx + n_steps[2])
                    if distance <= limit and seen[place] != stamp:
                        seen[place] = stamp
                        _push(heap, flat, n, (k * n_y + j) * n_x + i)
                        n += 1
    return own


@part
def _push(heap: Indices, flat: Floats, n: int, index: int) -> None:
    """Add a voxel to a heap of `n`, the highest first."""
    place = n
    while place:
        parent = (place - 1) // 2
        if not _is_higher(flat[index], index, flat[heap[parent]], heap[parent]):
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = index


@part
def _sift_down(heap: Indices, flat: Floats, n: int) -> None:
    """Remove the highest voxel of a heap of `n` + 1."""
    index = heap[n]
    place = 0
    while 2 * place + 1 < n:
        child = 2 * place + 1
        other = child + 1
        if other < n and _is_higher(flat[heap[other]], heap[other], flat[heap[child]], heap[child]):
            child = other
        if not _is_higher(flat[heap[child]], heap[child], flat[index], index):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = index


@compiled
def _follow(pointer: Indices, bounds: npt.NDArray[np.int64]) -> Indices:
    n_y, n_x = pointer.shape[1], pointer.shape[2]
    flat = pointer.ravel()
    # Where every way ends, 1 more than the index; 0 until it is known.
    end = np.zeros(flat.size, np.int32)
    result = np.zeros(
        (bounds[0, 1] - bounds[0, 0], bounds[1, 1] - bounds[1, 0], bounds[2, 1] - bounds[2, 0]), np.int32
    )
    for z in range(bounds[0, 0], bounds[0, 1]):
        for y in range(bounds[1, 0], bounds[1, 1]):
            for x in range(bounds[2, 0], bounds[2, 1]):
                own = (z * n_y + y) * n_x + x
                if flat[own] < 0:
                    continue
                last = own
                while end[last] == 0 and flat[last] >= 0 and flat[last] != last:
                    last = flat[last]
                label = end[last] if end[last] else last + 1
                index = own
                while index != last:
                    end[index] = label
                    index = flat[index]
                end[last] = label
                result[z - bounds[0, 0], y - bounds[1, 0], x - bounds[2, 0]] = label
    return result

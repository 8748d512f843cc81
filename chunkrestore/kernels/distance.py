"""Distance to the background, clipped, with the same bits in every block. Loads numba: import it inside functions.

Squared distances are minima over sums of one tabulated square per axis, added x first and z last. A minimum does not
depend on what else was looked at, so the result depends on nothing but the background voxels within the clip. (SciPy's
exact transform measures to one nearest voxel out of several, which may differ by a last bit between blocks.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled

Floats = npt.NDArray[np.float32]


def clipped_distance(mask: npt.NDArray[np.bool_], spacing: Sequence[float], limit: float) -> Floats:
    """Return for every voxel of `mask` how far the nearest voxel outside the mask is, at most `limit`; float32.

    Parameters
    ----------
    mask
        bool (z, y, x). Beyond its border nothing is known: it counts neither as mask nor as background.
    spacing
        Length of a voxel's edges.
    limit
        Above 0, in the same unit.

    Notes
    -----
    Exact where `mask` covers everything within `limit`. To float32 rounding that of
    `scipy.ndimage.distance_transform_edt`, clipped (separable minima: Saito and Toriwaki, Pattern Recognit. 27:1551,
    1994).
    """
    squares = [squared_steps(s, limit) for s in spacing]
    rows = _along_rows(mask, squares[2], float(np.float32(limit) ** 2))
    columns = rows if mask.shape[1] == 1 else _along_columns(rows, squares[1])
    result = columns if mask.shape[0] == 1 else _along_columns(columns.swapaxes(0, 1), squares[0])
    if mask.shape[0] > 1:
        result = result.swapaxes(0, 1)
    return np.sqrt(result)


def squared_steps(spacing: float, limit: float) -> Floats:
    """Return the squares of 0, 1, 2, ... steps of `spacing` that are below the square of `limit`, float32."""
    n = int(np.ceil(limit / spacing)) + 1
    squares = ((np.arange(n) * spacing) ** 2).astype(np.float32)
    return squares[squares < np.float32(limit) ** 2]


@compiled
def _along_rows(mask: npt.NDArray[np.bool_], squares: Floats, largest: float) -> Floats:
    n_z, n_y, n_x = mask.shape
    result = np.empty(mask.shape, np.float32)
    limit = np.float32(largest)
    for z in range(n_z):
        for y in range(n_y):
            steps = len(squares)
            for x in range(n_x):
                steps = steps + 1 if mask[z, y, x] else 0
                result[z, y, x] = squares[steps] if steps < len(squares) else limit
            steps = len(squares)
            for x in range(n_x - 1, -1, -1):
                steps = steps + 1 if mask[z, y, x] else 0
                if steps < len(squares) and squares[steps] < result[z, y, x]:
                    result[z, y, x] = squares[steps]
    return result


@compiled
def _along_columns(before: Floats, squares: Floats) -> Floats:
    """Return the minimum of ``before + square`` along the second axis."""
    n_z, n_y, n_x = before.shape
    result = np.empty((n_z, n_y, n_x), np.float32)
    for z in range(n_z):
        for y in range(n_y):
            for x in range(n_x):
                best = before[z, y, x]
                step = 1
                # Squares rise: from the first that is no less than the best, none can be less with something added.
                while step < len(squares) and squares[step] < best:
                    if y >= step:
                        best = min(best, squares[step] + before[z, y - step, x])
                    if y + step < n_y:
                        best = min(best, squares[step] + before[z, y + step, x])
                    step += 1
                result[z, y, x] = best
    return result

"""Linear interpolation of a volume at the points of a lattice. This module loads numba: import it in functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled

Indices = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]


@compiled
def interpolate(
    volume: npt.NDArray[Any],
    voxels: tuple[Indices, Indices, Indices],
    weights: tuple[Weights, Weights, Weights],
    result: npt.NDArray[Any],
) -> None:
    """Fill `result` with `volume` at the points of a lattice.

    The order of products and sums, in float64, is that of `scipy.ndimage`, so that results are the same to
    the bit: ``((value * z) * y) * x``, summed with x changing fastest.

    Parameters
    ----------
    volume
        (nz, ny, nx), of any dtype.
    voxels
        Per axis, int64 (2, n_points): the two voxels that each point lies between.
    weights
        Per axis, float64 (2, n_points): their weights.
    result
        float32 or float64, one value per point of the lattice; written.
    """
    z, y, x = voxels
    wz, wy, wx = weights
    for k in range(result.shape[0]):
        for j in range(result.shape[1]):
            for i in range(result.shape[2]):
                total = 0.0
                for a in range(2):
                    for b in range(2):
                        for c in range(2):
                            value = np.float64(volume[z[a, k], y[b, j], x[c, i]])
                            total += value * wz[a, k] * wy[b, j] * wx[c, i]
                result[k, j, i] = total

"""An image at another sampling, as `scipy.ndimage.zoom` with ``order=1`` gives it, in the dtype of the image.

`chunkrestore.kernels.rescale` holds the lattice and the interpolation; this module adds what SciPy does to store
sums as integers, and what a voxel of the new lattice measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Slices
from chunkrestore.kernels.rescale import Rescaling, checked_scale

_SLAB_VOXELS = 2**20
"""Sums that are rounded at once: in float64 they would take several times the memory of the result."""


def checked_resampling(shape: Sequence[int], scale: float | Sequence[float]) -> Rescaling:
    """Return the lattice of a volume of `shape` with `scale` points per voxel and axis.

    Raises
    ------
    ValueError
        If `scale` is not one number above 0, or one per axis; or an axis that it changes has, before or after,
        fewer than two voxels, whose distance nothing would tell.
    """
    shape = tuple(int(n) for n in shape)
    lattice = Rescaling(shape, checked_scale(scale, len(shape)) or (1.0,) * len(shape))
    for n, m, s in zip(shape, lattice.zoomed_shape, lattice.scale, strict=True):
        if s != 1 and min(n, m) < 2:
            raise ValueError(
                f"`scale` {s:g} makes {m} of {n} voxels on an axis; both must be at least 2, so that there is a "
                "distance between them"
            )
    return lattice


def steps(lattice: Rescaling) -> tuple[float, ...]:
    """Return the voxels of the volume between two points, per axis: ``(n - 1) / (n_zoomed - 1)``.

    First and last point lie at the centres of the first and last voxel (SciPy's ``grid_mode=False``), so this is
    less than ``1 / scale`` where the scale is above 1, and the position of the first voxel stays.
    """
    lengths = zip(lattice.shape, lattice.zoomed_shape, strict=True)
    return tuple((n - 1) / (m - 1) if m > 1 and m != n else 1.0 for n, m in lengths)


def resample(
    image: npt.NDArray[Any],
    lattice: Rescaling,
    read: Slices,
    points: Slices,
    dtype: npt.DTypeLike | None = None,
) -> npt.NDArray[Any]:
    """Return a volume at `points` of another lattice.

    Parameters
    ----------
    image
        Voxels of the region `read`: uint8, uint16, int16 or float32.
    lattice
        Of the whole volume.
    read
        Region of the volume; contains ``lattice.source(points)``.
    points
        Region of the new lattice, not empty.
    dtype
        Of the result: that of `image` by default; float32 keeps what integers would round away.

    Returns
    -------
    numpy.ndarray
        The same bits as in `scipy.ndimage.zoom` of the whole volume with ``order=1`` and this ``output`` dtype.
        Integers are rounded, halves away from 0.
    """
    wanted = np.dtype(image.dtype if dtype is None else dtype)
    voxels = np.asarray(image, np.float32)  # exact for 8 and 16 bits
    if wanted.kind == "f":
        return lattice.zoom(voxels, read, points)
    result = np.empty(tuple(p.stop - p.start for p in points), wanted)
    first, *others = points
    step = max(1, _SLAB_VOXELS // math.prod(result.shape[1:]))
    for start in range(first.start, first.stop, step):
        slab = slice(start, min(start + step, first.stop))
        sums = lattice.zoom(voxels, read, (slab, *others), np.float64)
        # A mean of two voxels is in the range of their dtype.
        result[start - first.start :][: len(sums)] = np.trunc(sums + np.copysign(0.5, sums))
    return result

"""A volume at another scale, part by part: linear interpolation as `scipy.ndimage.zoom` does it on the whole.

Point ``p`` of the zoomed lattice, which has ``round(n * scale)`` points per axis, is interpolated at::

    x(p)  =  p * step        step = (n - 1) / (n_zoomed - 1), or 1 if there is one point

of the volume, in float64, so that first and last point fall on first and last voxel. That is not quite
``p / scale``, where StarDist draws what it found at ``p``; how far apart the two are at most is part of the halo.
Every part has the bits of the whole, also where rounding takes ``x`` of the last point past the last voxel: SciPy
then gives 0 (4 % of all pairs of lengths from 2 to 399).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block, Halo, Slices


def checked_scale(scale: float | Sequence[float] | None, n_dim: int) -> tuple[float, ...] | None:
    """Return `scale` as one number per axis, or None if it changes nothing.

    Raises
    ------
    ValueError
        If it is not one number above 0, or one for each of `n_dim` axes.
    """
    if scale is None:
        return None
    values = np.asarray(scale, np.float64)
    given = tuple(values.tolist() if values.ndim else [float(values)] * n_dim)
    if len(given) != n_dim or not all(0 < s < math.inf for s in given):
        raise ValueError(f"`scale` must be one number above 0, or one for each of {n_dim} axes, got {scale}")
    return None if all(s == 1 for s in given) else given


@dataclass(frozen=True)
class Rescaling:
    """The lattice of a volume zoomed by a scale.

    Example
    -------
    >>> Rescaling((9, 10), (0.5, 2.0)).zoomed_shape
    (4, 20)
    """

    shape: tuple[int, ...]
    """Voxels of the volume per axis."""
    scale: tuple[float, ...]
    """Points per voxel and axis."""

    @property
    def zoomed_shape(self) -> tuple[int, ...]:
        """Points per axis; 0 where the scale leaves nothing."""
        return tuple(round(n * s) for n, s in zip(self.shape, self.scale, strict=True))

    def own_points(self, core: Slices) -> Slices:
        """Return the points ``p`` of the zoomed lattice with ``core.start <= p / scale < core.stop``.

        Exact in rational numbers: every point belongs to one core of a partition. A thin core may own none.
        """
        return tuple(
            slice(*(min(math.ceil(Fraction(s) * edge), m) for edge in (c.start, c.stop)))
            for c, m, s in zip(core, self.zoomed_shape, self.scale, strict=True)
        )

    def nearest_voxels(self, points: Sequence[range]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return, per axis, the voxel nearest to ``p / scale`` for each of some points (of two, the even one)."""
        return tuple(
            np.minimum(np.rint(np.arange(p.start, p.stop, p.step) / s), n - 1).astype(np.int64)
            for p, n, s in zip(points, self.shape, self.scale, strict=True)
        )

    def source(self, points: Slices) -> Slices:
        """Return the voxels that a region of the zoomed lattice, not empty, is interpolated from."""
        ends = [(p.start * step, (p.stop - 1) * step) for p, step in zip(points, self._steps, strict=True)]
        return tuple(
            slice(math.floor(first), min(math.ceil(last) + 1, n))
            for (first, last), n in zip(ends, self.shape, strict=True)
        )

    def block(self, block: Block, halo: Halo) -> Block:
        """Return the block of the zoomed lattice that owns what `block` owns, reading with `halo` there."""
        core = self.own_points(block.core)
        return Block.around(core, self.zoomed_shape, halo, block.index)

    def halo(self, halo: Halo) -> Halo:
        """Return what a core of the volume must read for its block of the zoomed lattice to read with `halo`.

        Per axis, with ``d`` and ``a`` the depth and alignment of `halo` in points::

            depth  =  ceil((d + a - 1 + apart) / scale) + 2

        where ``apart = |(n - 1) * scale - (n_zoomed - 1)|``, at most ``|1 - scale| + 1/2``, is how far the point
        interpolated at a voxel and that voxel times `scale` can be apart. One voxel of the two is the
        second that a point is interpolated from, the other covers rounding.
        """
        rows = zip(self.shape, self.zoomed_shape, self.scale, halo.depth, halo.align, strict=True)
        depth = []
        for n, m, s, d, a in rows:
            apart = abs((n - 1) * Fraction(s) - (m - 1))
            depth.append(math.ceil((d + a - 1 + apart) / Fraction(s)) + 2)
        return Halo(tuple(depth))

    def zoom(
        self,
        image: npt.NDArray[Any],
        read: Slices,
        points: Slices,
        dtype: npt.DTypeLike = np.float32,
    ) -> npt.NDArray[Any]:
        """Return the volume at `points` of the zoomed lattice.

        Parameters
        ----------
        image
            Voxels of the region `read`, of any dtype; may have a trailing axis of channels.
        read
            Region of the volume; contains ``source(points)``.
        points
            Region of the zoomed lattice.
        dtype
            Of the result: float32, or float64 for sums as they are before they are rounded.

        Returns
        -------
        numpy.ndarray
            Shape of `points` (and channels); in float32, the same bits as in `scipy.ndimage.zoom` of the float32
            volume by `scale` with ``order=1``.
        """
        from chunkrestore.kernels.linear_zoom import interpolate

        ndim = len(self.shape)
        none = [(np.zeros((2, 1), np.int64), np.array([[1.0], [0.0]]))] * (3 - ndim)
        z, y, x = none + [self._samples(axis, read[axis], points[axis]) for axis in range(ndim)]
        volume = image.reshape((1,) * (3 - ndim) + image.shape[:ndim] + (-1,))
        zoomed = np.empty((*(len(voxels[0]) for voxels, _ in (z, y, x)), volume.shape[-1]), dtype)
        for k in range(volume.shape[-1]):
            interpolate(volume[..., k], (z[0], y[0], x[0]), (z[1], y[1], x[1]), zoomed[..., k])
        return zoomed.reshape(tuple(p.stop - p.start for p in points) + image.shape[ndim:])

    @property
    def _steps(self) -> tuple[float, ...]:
        lengths = zip(self.shape, self.zoomed_shape, strict=True)
        return tuple((n - 1) / (m - 1) if m > 1 else 1.0 for n, m in lengths)

    def _samples(
        self, axis: int, read: slice, points: slice
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the two voxels (2, n_points), counted from the start of `read`, and their weights."""
        x, last = np.arange(points.start, points.stop) * self._steps[axis], self.shape[axis] - 1
        lower = np.floor(x)
        weight = 1 - (x - lower)
        # SciPy's second weight is what the first leaves of 1, which differs from `x - lower` by rounding.
        weights = np.where(x > last, 0.0, np.stack([weight, 1 - weight]))
        voxels = np.minimum(np.stack([lower, lower + 1]), last).astype(np.int64) - read.start
        # A second voxel that was not read has no weight.
        return np.minimum(voxels, read.stop - read.start - 1), weights

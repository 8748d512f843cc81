"""A point spread function that changes with position: one per depth, per region, or along a light sheet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.prepare import prepare

_POWER = 4
# Of the distance in the weights of scattered positions: more than the number of axes, so that near positions
# matter more than many far ones. Weights are smooth.
_LEAST_SQUARE = 1e-8
# Added to squares of distances, in units of the extent of the positions: a voxel at a position sees its own
# point spread function alone, to rounding of float32.


@dataclass(frozen=True, eq=False)
class PsfField:
    """Point spread functions with the positions in the volume at which they hold.

    Between positions they are blended: linearly along each axis if the positions form a rectilinear grid
    (planes of depth are the simplest one), by inverse distance to the fourth power, in units of the extent
    of the positions, if they are scattered (Shepard 1968); give those that should count as one depth the same
    z. Beyond the outermost positions along an axis what holds there goes on.

    Parameters
    ----------
    psfs
        Point spread functions, `chunkrestore.psf.prepare` is applied to each. Smaller ones are padded with
        zeros, centre on centre, to the largest.
    positions
        For each of them its ``(z, y, x)`` (or ``(y, x)``) in voxels of the volume that is deconvolved.

    Raises
    ------
    TypeError, ValueError
        If a point spread function cannot be used, the numbers of either disagree, a position is not finite
        or given twice.

    Examples
    --------
    >>> from chunkrestore.psf import gaussian
    >>> field = PsfField([gaussian((1.0, 1.0)), gaussian((3.0, 1.0))], [(0, 0), (100, 0)])
    >>> field.shape
    (25, 9)
    """

    psfs: Sequence[npt.NDArray[np.float32]] = field(repr=False)
    positions: Sequence[tuple[float, ...]]

    def __post_init__(self) -> None:
        prepared = [prepare(psf) for psf in self.psfs]
        if not prepared:
            raise ValueError("`psfs` is empty; give at least one point spread function")
        ndim = prepared[0].ndim
        if any(psf.ndim != ndim for psf in prepared):
            raise ValueError(f"`psfs` have shapes {[p.shape for p in prepared]}; all must have as many axes")
        places = np.asarray(self.positions, dtype=np.float64)
        if places.shape != (len(prepared), ndim) or not np.isfinite(places).all():
            raise ValueError(
                f"`positions` must hold {ndim} finite numbers of voxels for each of the {len(prepared)} point "
                f"spread functions, got an array of shape {places.shape}"
            )
        if len(np.unique(places, axis=0)) < len(places):
            raise ValueError("`positions` names one place twice; give one point spread function per place")
        radius = [max(p.shape[axis] // 2 for p in prepared) for axis in range(ndim)]
        padded = tuple(_padded(psf, radius) for psf in prepared)
        for psf in padded:
            psf.setflags(write=False)
        object.__setattr__(self, "psfs", padded)
        object.__setattr__(self, "positions", tuple(tuple(map(float, place)) for place in places))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that all point spread functions have."""
        return self.psfs[0].shape

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of point spread functions and positions."""
        content = hashlib.sha256(repr((self.shape, self.positions)).encode())
        for psf in self.psfs:
            content.update(psf.tobytes())
        return content.hexdigest()

    def shifted(self, origin: Sequence[int]) -> PsfField:
        """Return the field in coordinates of a region of the volume that begins at `origin`."""
        places = [tuple(x - o for x, o in zip(place, origin, strict=True)) for place in self.positions]
        return PsfField(self.psfs, places)

    def weights(
        self, origin: Sequence[int], shape: Sequence[int], lattice: Sequence[int]
    ) -> dict[int, tuple[npt.NDArray[np.float32], ...]]:
        """Return the weight of every point spread function that matters on a lattice.

        Parameters
        ----------
        origin
            Voxel of the volume at the lattice's first voxel.
        shape
            How many voxels of each axis are the volume's; of the rest of the lattice, which is periodic, one
            half lies after them and one half before `origin`.
        lattice
            Lengths of the lattice.

        Returns
        -------
        dict
            For each index into `psfs` whose weight is not zero everywhere: factors, whose product
            broadcasts to `lattice`. Summed over all point spread functions, the products are 1.
        """
        coordinates = [_coordinates(*axis) for axis in zip(origin, shape, lattice, strict=True)]
        if self._is_grid:
            axes = self._knots
            found = {
                k: self._grid_factors(place, axes, coordinates) for k, place in enumerate(self.positions)
            }
        else:
            found = self._scattered_factors(coordinates)
        return {k: factors for k, factors in found.items() if all(factor.any() for factor in factors)}

    def weights_nbytes(self, lattice: Sequence[int]) -> int:
        """Return the bytes of the `weights` on a lattice: next to none if the positions form a grid."""
        return 0 if self._is_grid else 4 * len(self.positions) * math.prod(lattice)

    @cached_property
    def _knots(self) -> list[npt.NDArray[np.float64]]:
        """Per axis, the different positions, rising."""
        return [np.unique([place[axis] for place in self.positions]) for axis in range(self.ndim)]

    @property
    def _is_grid(self) -> bool:
        return len(self.positions) == math.prod(len(knots) for knots in self._knots)

    def _grid_factors(
        self, place: Sequence[float], axes: Sequence[np.ndarray], coordinates: Sequence[np.ndarray]
    ) -> tuple[npt.NDArray[np.float32], ...]:
        factors = []
        for axis, (knots, x) in enumerate(zip(axes, coordinates, strict=True)):
            if len(knots) > 1:
                hat = np.interp(x, knots, knots == place[axis])
                factors.append(
                    hat.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(self.ndim)])
                )
        return tuple(factors) or (np.ones((1,) * self.ndim, np.float32),)

    def _scattered_factors(
        self, coordinates: Sequence[np.ndarray]
    ) -> dict[int, tuple[npt.NDArray[np.float32], ...]]:
        places = np.asarray(self.positions)
        low, high = places.min(axis=0), places.max(axis=0)
        # In units of the extent of the positions, so that a flat volume's few planes count too; no further
        # than that extent, so that an axis along which they hardly differ does not make all equally far.
        extents = np.maximum(high - low, 1.0)
        clipped = map(np.clip, coordinates, low, high)
        scaled = [x / extent for x, extent in zip(clipped, extents, strict=True)]
        closeness = [_closeness(scaled, place) for place in places / extents]
        total = closeness[0].copy()
        for one in closeness[1:]:
            total += one
        for one in closeness:
            one /= total
        return {k: (one,) for k, one in enumerate(closeness)}


def _closeness(coordinates: Sequence[np.ndarray], place: np.ndarray) -> npt.NDArray[np.float32]:
    """Return the distance from `place` to the power of minus `_POWER` at all voxels of a lattice."""
    squares = np.float32(_LEAST_SQUARE)
    for offset in np.ix_(
        *(((x - p) ** 2).astype(np.float32) for x, p in zip(coordinates, place, strict=True))
    ):
        squares = squares + offset
    return np.asarray(squares ** np.float32(-_POWER / 2), dtype=np.float32)


def _padded(psf: npt.NDArray[np.float32], radius: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return `psf` with zeros around it: odd lengths ``2 * radius + 1``, centre on centre."""
    margins = [(r - n // 2, r + 1 - (n - n // 2)) for r, n in zip(radius, psf.shape, strict=True)]
    return np.pad(psf, margins)


def _coordinates(origin: int, n: int, lattice: int) -> npt.NDArray[np.float64]:
    index = np.arange(lattice)
    after = n + (lattice - n + 1) // 2
    return np.asarray(origin + np.where(index < after, index, index - lattice), dtype=np.float64)

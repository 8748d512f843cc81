r"""The step that keeps edges and smooths noise: total variation in Richardson-Lucy iterations.

Each iteration is multiplied by

.. math:: \frac{1}{1 - \lambda \, \mathrm{div} \frac{\nabla x}{\sqrt{|\nabla x|^2 + \epsilon^2}}}

(Dey et al. 2006, equation 12, with :math:`\epsilon` in place of a division by zero; it grows with
:math:`\lambda x`, see `STEEP`). Derivatives are differences of neighbours divided by their distance, in units
of the smallest voxel side, so that coarse planes do not count as edges. The gradient uses the next voxel and
the divergence the one before, its exact adjoint; both are 0 across the place where the lattice wraps around,
so that the first and the last plane of a volume are no neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from chunkrestore import backend
from chunkrestore.backend import Array

LARGEST = 0.1
"""Largest strength: 0.05 and more flatten objects at any noise. (The divergence is at most 3 + sqrt(3), so that
the factor is positive below 0.21.)"""
FLAT = 1e-3
"""Slope, relative to the start value of the estimate, below which an image counts as flat."""
STEEP = 10.0
"""Slope, relative to strength times estimate, below which an image counts as flat: the least for which small
ripples die out. On n axes an iteration reduces a checkerboard by 4 n / STEEP of itself, and heavy-ball iterations
converge up to 4/3 of it. Ripples that never settle cost seams of 3e-3 after 50 iterations at strength 0.02."""
_LEAST_LENGTH = 8
# Of a tile, whose surface is computed twice.
_TEMPORARIES = 3
# How many times more of them than other element-wise steps a tile takes: it is as much smaller.

Region: TypeAlias = tuple[slice, ...]


def smoothed(
    image: Array,
    estimate: Array,
    strength: float,
    scale: float,
    voxel_size: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
) -> Array:
    """Return `image` times the factor that belongs to `estimate`, in `image`.

    Parameters
    ----------
    image
        float32, shape of `estimate`.
    estimate
        float32, on a lattice that wraps around. Where it is flat, the factor is 1.
    strength
        Lambda, at least 0 and at most `LARGEST`; 1e-3 to 1e-2 are usual.
    scale
        Intensity to which `FLAT` is relative; the same for all blocks of a volume.
    voxel_size
        Length of a voxel per axis, in any unit; all equal by default.
    shape
        Of the image at the lattice's beginning; the whole lattice by default. One half of the other voxels
        lies after it and one half before it, and between these halves there is no slope.

    References
    ----------
    .. [1] Dey, N. et al. (2006). Microsc. Res. Tech. 69, 260-266. doi:10.1002/jemt.20294
    """
    xp, lattice = backend.namespace(estimate), estimate.shape
    sides = voxel_size or (1.0,) * estimate.ndim
    slopes = [min(sides) / side for side in sides]
    last = [(n + length - 1) // 2 for n, length in zip(shape or lattice, lattice, strict=True)]
    tiles = list(_tiles(xp, lattice))

    def run(some: Region) -> None:
        for tile in tiles[some[0]]:
            # Voxels of the lattice, from the one before the tile, that have no next one.
            ends = [(end - part.start + 1) % n for end, part, n in zip(last, tile, lattice, strict=True)]
            around = _around(estimate, tile)
            image[tile] = image[tile] * _factor(xp, around, ends, lattice, strength, FLAT * scale, slopes)

    backend.each_slab(xp, (len(tiles), math.prod(lattice) // len(tiles)), run)
    return image


def _tiles(xp: Any, shape: Sequence[int]) -> Iterator[Region]:
    """Yield regions, cut along the first two axes, whose temporaries stay in the processor's cache."""
    rest = math.prod(shape[2:]) * _TEMPORARIES
    for rows, *_ in backend.slabs(xp, (shape[0], shape[1] * rest), least_rows=_LEAST_LENGTH):
        plane = (shape[1], (rows.stop - rows.start) * rest)
        for columns, *_ in backend.slabs(xp, plane, least_rows=_LEAST_LENGTH):
            yield rows, columns, *(slice(0, n) for n in shape[2:])


def _around(estimate: Array, tile: Region, axis: int = 0) -> Array:
    """Return a tile, cut from `axis` on, with one voxel more at every side, periodic."""
    if axis == estimate.ndim:
        return estimate
    n, start, stop = estimate.shape[axis], tile[axis].start - 1, tile[axis].stop + 1
    runs = [(n - 1, n)] * (start < 0) + [(max(start, 0), min(stop, n))] + [(0, 1)] * (stop > n)
    # The other axes first, so that only voxels of the tile are copied.
    parts = [_around(estimate[(slice(None),) * axis + (slice(*run), ...)], tile, axis + 1) for run in runs]
    return parts[0] if len(parts) == 1 else backend.namespace(estimate).concat(parts, axis=axis)


def _factor(
    xp: Any,
    x: Array,
    ends: Sequence[int],
    lattice: Sequence[int],
    strength: float,
    flat: float,
    slopes: Sequence[float],
) -> Array:
    """Return the factor of all voxels of `x` but those at its surface."""
    # In units of `flat`, so that squares of very dim or bright images neither vanish nor overflow.
    here, units = x[_shift(x.ndim)], []
    steep = here * (STEEP * strength / flat)
    squares = steep * steep + 1.0
    for axis, (slope, end, n) in enumerate(zip(slopes, ends, lattice, strict=True)):
        difference = (x[_shift(x.ndim, axis)] - here) * (slope / flat)
        difference[(slice(None),) * axis + (slice(end, None, n), ...)] = 0.0
        units.append(difference)
        squares = difference * difference + squares
    length = xp.sqrt(squares)
    divergence = 0.0
    inner = (slice(1, None),) * x.ndim
    for axis, (difference, slope) in enumerate(zip(units, slopes, strict=True)):
        unit = difference / length
        before = unit[tuple(slice(-1) if a == axis else slice(1, None) for a in range(x.ndim))]
        divergence = (unit[inner] - before) * slope + divergence
    return 1.0 / (1.0 - strength * divergence)


def _shift(ndim: int, axis: int | None = None) -> Region:
    """Return the index of all voxels but the last of every axis, moved by one along `axis`."""
    return tuple(slice(1, None) if a == axis else slice(-1) for a in range(ndim))

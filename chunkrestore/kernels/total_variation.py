r"""The step that keeps edges and smooths noise: total variation in Richardson-Lucy iterations.

Each iteration is multiplied by

.. math:: \frac{1}{1 - \lambda \, \mathrm{div} \frac{\nabla x}{\sqrt{|\nabla x|^2 + \epsilon^2}}}

(Dey et al. 2006, equation 12, with :math:`\epsilon` in place of a division by zero). Derivatives are
differences of neighbours divided by their distance, in units of the smallest voxel side, so that coarse planes
do not count as edges. The gradient uses the next voxel and the divergence the one before, its exact
adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkrestore import backend
from chunkrestore.backend import Array

LARGEST = 0.2
"""Largest strength. The divergence is at most 2 sqrt(3), so the factor stays positive below 0.28."""
FLAT = 1e-3
"""Slope, relative to the start value of the estimate, below which an image counts as flat."""
_LEAST_ROWS = 4


def total_variation_factor(
    estimate: Array, strength: float, scale: float, voxel_size: Sequence[float] | None = None
) -> Array:
    """Return the factor by which an iteration is multiplied.

    Parameters
    ----------
    estimate
        float32, periodic.
    strength
        Lambda, at least 0 and at most `LARGEST`; 1e-3 to 1e-2 are usual.
    scale
        Intensity to which `FLAT` is relative; the same for all blocks of a volume.
    voxel_size
        Length of a voxel per axis, in any unit; all equal by default.

    Returns
    -------
    array
        float32, shape and namespace of `estimate`; 1 where it is flat.

    References
    ----------
    .. [1] Dey, N. et al. (2006). Microsc. Res. Tech. 69, 260-266. doi:10.1002/jemt.20294
    """
    xp = backend.namespace(estimate)
    sides = voxel_size or (1.0,) * estimate.ndim
    slopes = [min(sides) / side for side in sides]
    factor = xp.empty_like(estimate)

    def run(slab: tuple[Any, ...]) -> None:
        factor[slab] = _factor_of_rows(estimate, slab[0], strength, FLAT * scale, slopes)

    backend.each_slab(xp, estimate.shape, run, least_rows=_LEAST_ROWS)
    return factor


def _factor_of_rows(
    estimate: Array, rows: slice, strength: float, flat: float, slopes: Sequence[float]
) -> Array:
    xp, n = backend.namespace(estimate), estimate.shape[0]
    # One row more on each side.
    around = xp.remainder(xp.arange(rows.start - 1, rows.stop + 1, device=backend.device(estimate)), n)
    x = xp.take(estimate, around, axis=0)
    differences = [
        ((x[1:] if axis == 0 else xp.roll(x, -1, axis=axis)[:-1]) - x[:-1]) * slope
        for axis, slope in enumerate(slopes)
    ]
    # In units of `flat`, so that squares of very dim or bright images neither vanish nor overflow.
    differences = [d / flat for d in differences]
    length = xp.sqrt(sum(d * d for d in differences) + 1.0)
    divergence = 0.0
    for axis, (difference, slope) in enumerate(zip(differences, slopes, strict=True)):
        unit = difference / length
        before = unit[:-1] if axis == 0 else xp.roll(unit, 1, axis=axis)[1:]
        divergence = divergence + (unit[1:] - before) * slope
    return 1.0 / (1.0 - strength * divergence)

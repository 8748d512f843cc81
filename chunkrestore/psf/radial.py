"""From an intensity that is known along radius and depth to an array of voxels.

Every theoretical model here is symmetric about the optical axis. It is computed along the radius and depth,
found in focus, and integrated over the box of each voxel: that is what a camera pixel and an object voxel do.
At critical sampling (NA 0.8 in water) the integral widens the full width at half maximum by 6 % across and 9 %
along the axis against samples at voxel centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse, special

from chunkrestore.psf.files import check_voxel_size
from chunkrestore.psf.prepare import prepare

Float = npt.NDArray[np.float64]

STEPS_PER_PERIOD = 64
"""Radial samples per period of the highest frequency; linear interpolation between them errs by at most
(2 pi / 64)^2 / 8 = 0.12 % of that frequency's amplitude, and by less below it."""
LIGHT = 0.99
"""Share of each plane's light that an array of default size holds."""
DIM = 0.01
"""Of the brightest voxel: planes whose axis is darker than this are left out of an array of default size."""
SHARP_RADIUS = 80.0
"""In units of 1 / lateral cutoff, added to the radius of the cone of light: the largest default. In focus the
Airy pattern holds 99 % within 24, vectorial ones within 27 (NA 0.8, water), 41 (1.4, oil) and 73 (1.49, oil)."""
_MOST_VOXELS = 2**26
_MOST_PLANES = 65


@dataclass(frozen=True)
class Radial:
    """An intensity around the optical axis.

    Lengths are micrometres; planes are relative to the paraxial focus.
    """

    intensity: Callable[[Float, Float], Float]
    """Of planes z and radii r; returns ``(len(z), len(r))``."""
    lateral_cutoff: float
    """Highest frequency along the radius, in 1/um."""
    axial_cutoff: float
    """Highest frequency along the axis, in 1/um."""
    focus: tuple[float, float]
    """First and last plane in which the intensity on the axis can be greatest."""
    tail: float
    """How far beyond `focus` the intensity on the axis can matter."""
    slope: float
    """Radius of the cone of light per distance from focus."""
    plane_energy: Callable[[Float], Float] | None = None
    """Light in whole planes; by default what lies within the radius that is computed."""


def render(
    radial: Radial, voxel_size: Sequence[float], shape: Sequence[int] | None
) -> npt.NDArray[np.float32]:
    """Return the intensity in voxels, brightest plane of the axis in the middle.

    Parameters
    ----------
    radial
        The intensity.
    voxel_size
        Micrometres along z, y, x.
    shape
        Voxels along z, y, x; `default_shape` by default.

    Returns
    -------
    ndarray
        float32, sum 1, centre at ``n // 2`` of every axis, symmetric in y and x.

    Raises
    ------
    ValueError
        If `voxel_size` or `shape` is not three positive numbers, or a default shape would be too large.
    """
    size = check_voxel_size("voxel_size", voxel_size, 3)
    middle, reach = focal_planes(radial)
    lengths = _default_shape(radial, size, middle, reach) if shape is None else _checked_shape(shape)
    z, z_weight = _voxel_nodes(_positions(lengths[0]), size[0], radial.axial_cutoff)
    y, y_weight = _voxel_nodes(np.arange(lengths[1] // 2 + 1), size[1], radial.lateral_cutoff)
    x, x_weight = _voxel_nodes(np.arange(lengths[2] // 2 + 1), size[2], radial.lateral_cutoff)
    radius = np.hypot(y[:, None, :, None], x[None, :, None, :])
    weights = np.multiply.outer(y_weight, x_weight).ravel()
    step = radial_step(radial)
    r: Float = step * np.arange(math.ceil(float(radius.max()) / step) + 2, dtype=np.float64)
    along = radial.intensity(middle + z.ravel(), r).reshape(*z.shape, len(r))
    profile = np.tensordot(along, z_weight, axes=([1], [0]))
    matrix = interpolation(radius.reshape(-1, len(weights)), weights, step, len(r))
    quarter = (matrix @ profile.T).T.reshape(lengths[0], len(y), len(x))
    rows, columns = (np.abs(_positions(n)) for n in lengths[1:])
    return prepare(quarter[:, rows[:, None], columns[None, :]])


def focal_planes(radial: Radial) -> tuple[float, float]:
    """Return the plane where the axis is brightest, and how far from it the axis stays above `DIM` of it."""
    first, last = radial.focus[0] - radial.tail, radial.focus[1] + radial.tail
    n = 2 * math.ceil(16 * radial.axial_cutoff * (last - first)) + 1
    z = np.linspace(first, last, n)
    light = radial.intensity(z, np.zeros(1))[:, 0]
    peak = int(np.argmax(light))
    bright = np.flatnonzero(light >= DIM * light[peak])
    middle = z[peak]
    if 0 < peak < n - 1:
        before, at, after = light[peak - 1 : peak + 2]
        middle += 0.5 * (before - after) / (before - 2 * at + after) * (z[1] - z[0])
    return float(middle), float(max(z[bright[-1]] - middle, middle - z[bright[0]]))


def radial_step(radial: Radial) -> float:
    """Return the distance of radial samples."""
    return 1 / (STEPS_PER_PERIOD * radial.lateral_cutoff)


def interpolation(radius: Float, weights: Float, step: float, n_r: int) -> sparse.csr_matrix:
    """Return the matrix that turns samples along the radius into weighted sums at given radii.

    Parameters
    ----------
    radius
        Shape ``(n, m)``: the m radii that are summed for each of n results, below ``(n_r - 1) * step``.
    weights
        Shape ``(m,)``.
    step, n_r
        Samples lie at ``step * arange(n_r)``.

    Returns
    -------
    csr_matrix
        Shape ``(n, n_r)``, linear interpolation.
    """
    place = radius / step
    before = np.minimum(place.astype(np.int64), n_r - 2)
    share = place - before
    rows = np.broadcast_to(np.arange(len(radius))[:, None], radius.shape)
    values = np.stack([(1 - share) * weights, share * weights])
    columns = np.stack([before, before + 1])
    where = (np.stack([rows, rows]).ravel(), columns.ravel())
    return sparse.csr_matrix((values.ravel(), where), shape=(len(radius), n_r))


def _default_shape(
    radial: Radial, size: Sequence[float], middle: float, reach: float
) -> tuple[int, int, int]:
    """Return odd lengths that hold `DIM` along the axis and `LIGHT` of the light of each plane."""
    half = math.ceil(reach / size[0])
    n_z = min(2 * half + 1, _MOST_PLANES)
    z = middle + np.linspace(-half * size[0], half * size[0], n_z)
    limit = SHARP_RADIUS / radial.lateral_cutoff + radial.slope * half * size[0]
    step = 4 * radial_step(radial)
    r: Float = step * np.arange(math.ceil(limit / step) + 1, dtype=np.float64)
    light = np.cumsum(2 * math.pi * r * radial.intensity(z, r) * step, axis=1)
    total = light[:, -1] if radial.plane_energy is None else radial.plane_energy(z)
    enough = light >= LIGHT * total[:, None]
    # A plane whose light spreads beyond the cone (spherical aberration) takes all that was computed.
    radius = float(r[np.where(enough.any(axis=1), np.argmax(enough, axis=1), len(r) - 1).max()])
    shape = (2 * half + 1, *(2 * math.ceil(radius / d) + 1 for d in size[1:]))
    if math.prod(shape) > _MOST_VOXELS:
        raise ValueError(
            f"the point spread function would have {shape} voxels of `voxel_size` {tuple(size)} um; give `shape`, or "
            "correct the voxel size (micrometres) or the optics"
        )
    return shape[0], shape[1], shape[2]


def _voxel_nodes(index: npt.NDArray[np.int64], length: float, cutoff: float) -> tuple[Float, Float]:
    """Return ``(voxel, node)`` positions and weights of the Gauss-Legendre mean over each voxel."""
    node, weight = special.roots_legendre(2 + math.ceil(2 * length * cutoff))
    return length * (index[:, None] + node / 2), weight / 2


def _positions(n: int) -> npt.NDArray[np.int64]:
    return np.arange(n) - n // 2


def _checked_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    lengths = tuple(int(n) for n in shape)
    if len(lengths) != 3 or min(lengths) < 1 or math.prod(lengths) > _MOST_VOXELS:
        raise ValueError(
            f"`shape` must be three positive numbers of voxels (z, y, x), at most {_MOST_VOXELS} together, "
            f"got {tuple(shape)}"
        )
    return lengths[0], lengths[1], lengths[2]

"""Where the samples of a point spread function lie: centring and voxel size, by band-limited interpolation.

The centre is voxel ``n // 2`` of each axis. Every function returns a new float32 array and keeps the light as
it is (`chunkrestore.psf.prepare` scales it to 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.files import check_voxel_size
from chunkrestore.psf.prepare import check_psf

Psf = npt.NDArray[np.float32]
Landmark = Literal["peak", "centroid"]

_LARGEST_RATIO = 32.0
# Of voxel sizes. Beyond it lies a mistaken unit (nanometres for micrometres are a factor of 1000).
LEAST_SHIFT = 1e-3
# Voxels. Moving by less changes a sampled profile by less than the noise of any measurement.
_CAP = 0.7
# Of the peak: what counts as near it, 0.84 standard deviations of a Gaussian to either side. Weights fall to
# (almost) nothing there, so that the fit does not jump when a voxel comes in.
_LEAST_WEIGHT = 0.02
# Of the brightest voxel's direct neighbours, which count even if they are dimmer.
_FLAT = 1e-9
# Curvature per squared voxel that is rounding.
_RAMP = 16
# Voxels over which values at the array's edge fall to zero outside it, so that interpolation does not ring.
_REFINEMENTS = 8
# Of the peak's position; each leaves a few percent of the distance that remains.


def offset(psf: npt.ArrayLike, by: Landmark = "peak") -> tuple[float, ...]:
    """Return how far the peak or the centroid lies from the centre voxel ``n // 2``, in voxels per axis.

    The peak is the vertex of a sum of parabolas, one per axis, fitted to the logarithms of all voxels around
    the brightest that reach 0.7 of it (exact for a Gaussian, and moved less by noise than the brightest voxel
    and its neighbours are). The centroid is the mean position of all light.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`, and if `by` is neither.
    """
    array = checked(psf)
    if by == "centroid":
        found = [
            float(np.average(np.arange(n), weights=p))
            for n, p in zip(array.shape, _profiles(array), strict=True)
        ]
    elif by == "peak":
        found = _peak(array)
    else:
        raise ValueError(f'`by` must be "peak" or "centroid", got {by!r}')
    return tuple(position - n // 2 for position, n in zip(found, array.shape, strict=True))


def centre(psf: npt.ArrayLike, *, by: Landmark = "peak", subvoxel: bool = True) -> Psf:
    r"""Move the peak or the centroid to the centre voxel ``n // 2``.

    The fraction of a voxel is moved by band-limited interpolation,

    .. math:: h'_j = \sum_i h_i \, \mathrm{sinc}(j + s - i),

    the limit of a Fourier shift with endless zero padding, so nothing wraps around. Values at the edges of
    the array are continued by a ramp to zero, so that light cut off there does not ring.

    Preserves shape, orientation, and total light but for what is moved out of the array (pad it first with
    `pad_or_crop`, or let `prepare_psf` do so) and for negative lobes of the interpolation, which are set to
    zero and scaled out.

    Parameters
    ----------
    psf
        Background subtracted, not negative.
    by
        ``"peak"`` (objects then appear where they are brightest) or ``"centroid"`` (where their light is).
    subvoxel
        Move by fractions of a voxel; otherwise by the nearest whole number, without interpolation.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`, and if `by` is neither.
    """
    array = checked(psf)
    distance = np.array(offset(array, by))
    whole = np.round(distance).astype(int)
    if not subvoxel:
        return _moved(array, whole).astype(np.float32)
    # Light that leaves the array moves the centroid, and interpolation the fitted peak of a noisy profile:
    # what is left is added until it is nothing, or no longer shrinks.
    fraction, smallest, result = distance - whole, np.inf, array
    for _ in range(_REFINEMENTS):
        fraction = np.where(np.abs(fraction) < LEAST_SHIFT, 0, fraction)
        moved = _moved(_shifted(array, fraction), whole)
        rest = np.array(offset(moved, by))
        if np.abs(rest).max() >= smallest:
            break
        smallest, result = np.abs(rest).max(), moved
        if not LEAST_SHIFT / 2 <= smallest <= 1:  # beyond a voxel lies another maximum
            break
        fraction = fraction + rest
    return result.astype(np.float32)


def resample(psf: npt.ArrayLike, from_voxel_size: Sequence[float], to_voxel_size: Sequence[float]) -> Psf:
    r"""Return the point spread function as sampled with another voxel size.

    .. math:: h'_j = \sum_i h_i \, \mathrm{sinc}\left(\frac{x_j - i}{\max(1, r)}\right), \qquad x_j = r j

    per axis, positions counted from the centre, with ratio r of the new to the old voxel size: band-limited
    interpolation, with frequencies that the new sampling cannot hold cut off first (no aliasing).

    Preserves total light, centre and orientation. Negative lobes, which appear where the new sampling is too
    coarse for the point spread function, are set to zero and scaled out.

    Parameters
    ----------
    psf
        Background subtracted, not negative.
    from_voxel_size, to_voxel_size
        Micrometres per axis: of `psf`, and of the image. An axis of length 1 is left alone.

    Returns
    -------
    ndarray
        float32 of odd lengths that cover the extent of `psf`, centre at ``n // 2``.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`; if a voxel size is not one positive number per axis; if the two differ by more than
        a factor of 32, or the new voxel is as large as all of `psf`.

    Notes
    -----
    A sample counts as the value at a point. Averaging over the new voxel's area in place of it would widen
    the profile once more, although `psf` holds the blur of its detector's pixels already.
    """
    array = checked(psf)
    ratios = _ratios(array.shape, from_voxel_size, to_voxel_size)
    result = array
    for axis, (length, ratio) in enumerate(zip(array.shape, ratios, strict=True)):
        if length == 1 or (ratio == 1 and length % 2):
            continue
        # Voxels of the new size, symmetric about the centre, that cover the array's extent.
        radius = math.ceil((length // 2 + 0.5) / ratio - 0.5 - 1e-6)
        positions = length // 2 + ratio * np.arange(-radius, radius + 1)
        result = _interpolated(result, axis, positions, ratio)
    return _same_light(result, array).astype(np.float32)


def checked(psf: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return `psf` in float64 if it is a point spread function (`check_psf`), else raise."""
    check_psf(psf)
    return np.asarray(psf, dtype=np.float64)


def _profiles(array: np.ndarray) -> list[np.ndarray]:
    """Return the light per plane along each axis."""
    axes = range(array.ndim)
    return [array.sum(axis=tuple(a for a in axes if a != axis)) for axis in axes]


def _peak(array: np.ndarray) -> list[float]:
    """Return the vertex of a quadratic fitted around the brightest voxel; there, the middle of a plateau."""
    from scipy import ndimage

    relative = array / array.max()
    brightest = tuple(int(i) for i in np.unravel_index(int(np.argmax(array)), array.shape))
    regions, _ = ndimage.label(relative >= _CAP, np.ones((3,) * array.ndim))
    near = regions == regions[brightest]
    inner = [axis for axis, (i, n) in enumerate(zip(brightest, array.shape, strict=True)) if 0 < i < n - 1]
    for axis, i in enumerate(brightest):
        around = tuple(slice(i - 1, i + 2) if a == axis else b for a, b in enumerate(brightest))
        if axis in inner:
            near[around] = True
        else:  # at the array's edge there is nothing to interpolate
            near &= (np.arange(array.shape[axis]) == i).reshape(
                [-1 if a == axis else 1 for a in range(array.ndim)]
            )
    voxels, values = np.argwhere(near), relative[near]
    weights = np.maximum(values - _CAP, _LEAST_WEIGHT)
    heights = np.log(values) if values.min() > 0 else values
    at = voxels[:, inner] - np.array(brightest)[inner]
    terms = np.hstack([np.ones((len(at), 1)), at, at**2])
    fit = np.linalg.lstsq(terms * weights[:, None], heights * weights, rcond=None)[0]
    position = [float(i) for i in brightest]
    for axis, slope, curvature, distances in zip(inner, *np.split(fit[1:], 2), at.T, strict=True):
        flat = curvature > -_FLAT
        vertex = np.average(distances, weights=weights) if flat else -slope / (2 * curvature)
        position[axis] += float(np.clip(vertex, distances.min(), distances.max()))
    return position


def _moved(array: np.ndarray, distance: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the array with what lies at `distance` from the centre moved to it; zeros come in."""
    result = np.zeros_like(array)
    runs = [overlap(n, n, -int(d)) for n, d in zip(array.shape, distance, strict=True)]
    result[tuple(to for _, to in runs)] = array[tuple(source for source, _ in runs)]
    return result


def overlap(length: int, new_length: int, shift: int) -> tuple[slice, slice]:
    """Return which voxels of an axis remain and where they go, when voxel i goes to i + `shift`."""
    start, stop = max(0, -shift), min(length, new_length - shift)
    return slice(start, max(start, stop)), slice(start + shift, max(start, stop) + shift)


def _shifted(array: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    result = array
    for axis, (length, distance) in enumerate(zip(array.shape, fraction, strict=True)):
        if distance:
            result = _interpolated(result, axis, np.arange(length) + distance, 1.0)
    return _same_light(result, array)


def _interpolated(array: np.ndarray, axis: int, positions: np.ndarray, ratio: float) -> np.ndarray:
    """Return the values at `positions` along `axis`, low-passed for samples that lie `ratio` voxels apart."""
    length = array.shape[axis]
    width = max(1.0, ratio)
    outside = np.arange(1, _RAMP + 1)
    ramp = 0.5 + 0.5 * np.cos(np.pi * outside / (_RAMP + 1))

    def weights(samples: np.ndarray) -> np.ndarray:
        return np.sinc((positions[:, None] - samples) / width) / width

    matrix = weights(np.arange(length))
    matrix[:, 0] += weights(-outside) @ ramp
    matrix[:, -1] += weights(length - 1 + outside) @ ramp
    # A new voxel that does not touch the array holds nothing.
    edge = (1 + ratio) / 2 - 1e-6
    matrix[(positions <= -edge) | (positions >= length - 1 + edge)] = 0
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)


def _same_light(array: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the array without negative values, scaled to the light of `reference`."""
    result = np.maximum(array, 0)
    return result * (reference.sum() / result.sum())


def _ratios(
    shape: Sequence[int], from_voxel_size: Sequence[float], to_voxel_size: Sequence[float]
) -> tuple[float, ...]:
    """Return the new over the old voxel size per axis, 1 where there is nothing to resample."""
    old = check_voxel_size("from_voxel_size", from_voxel_size, len(shape))
    new = check_voxel_size("to_voxel_size", to_voxel_size, len(shape))
    for name, length, a, b in zip("zyx"[-len(shape) :], shape, old, new, strict=True):
        if length == 1:
            continue
        if not 1 / _LARGEST_RATIO <= b / a <= _LARGEST_RATIO:
            raise ValueError(
                f"`from_voxel_size` {a:g} and `to_voxel_size` {b:g} um along {name} differ by more than a "
                f"factor of {_LARGEST_RATIO:g}; give both in micrometres (not nanometres), in the order z, y, x"
            )
        if b >= length * a:
            raise ValueError(
                f"`to_voxel_size` {b:g} um along {name} is as large as the whole `psf` ({length} voxels of "
                f"{a:g} um); check both voxel sizes, or sum `psf` along {name} to length 1"
            )
    return tuple(1.0 if length == 1 else b / a for length, a, b in zip(shape, old, new, strict=True))

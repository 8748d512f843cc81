"""Checking, scaling and measuring point spread functions.

The centre of a point spread function is voxel ``n // 2`` of each axis, for odd and for even lengths: the
voxel that `numpy.fft.fftshift` moves the origin to. A point source at voxel ``i`` whose image peaks at voxel
``i`` therefore has its peak there. Nothing here moves, crops or clips a point spread function
(`chunkrestore.psf.shape` does).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FWHM_PER_SIGMA = 2 * np.sqrt(2 * np.log(2))
_SUM_TOLERANCE = 1e-6
# A float32 array that was scaled to sum 1 misses it by its rounding, far less than this.


def check_psf(psf: npt.ArrayLike, ndim: int | None = None) -> None:
    """Raise unless `psf` can be used as a point spread function of `ndim` dimensions.

    Parameters
    ----------
    psf
        Two- or three-dimensional, numbers that are finite, not negative, and not all zero.
    ndim
        Number of spatial axes of the image; any of 2 and 3 by default.

    Raises
    ------
    TypeError
        If `psf` does not hold real numbers.
    ValueError
        If the number of dimensions is wrong, `psf` is empty or all zero, or a value is NaN, infinite or
        negative. Every message names the fix.
    """
    array = check_numbers(psf, ndim)
    if array.min() < 0:
        raise ValueError(
            f"`psf` holds {int((array < 0).sum())} negative values (least {array.min():.6g}); subtract its "
            "background and clip, for instance numpy.maximum(psf - numpy.median(psf), 0)"
        )
    if not array.any():
        raise ValueError("`psf` is zero everywhere; pass a point spread function with a positive sum")


def check_numbers(psf: npt.ArrayLike, ndim: int | None = None) -> np.ndarray:
    """Return `psf` as an array if it has 2 or 3 dimensions (or `ndim`) of finite numbers, else raise.

    What a measured point spread function must be before its background is subtracted; `check_psf` asks for
    more. The array is not copied.
    """
    array = np.asarray(psf)
    if array.dtype.kind not in "uif":
        raise TypeError(
            f"`psf` must be an array of real numbers, got dtype {array.dtype}"
            + ("; read a file with chunkrestore.psf.read_psf" if array.dtype.kind in "US" else "")
        )
    if ndim is not None and array.ndim != ndim:
        raise ValueError(
            f"`psf` has {array.ndim} dimensions (shape {array.shape}) but the image has {ndim} spatial axes; "
            f"pass a {ndim}-dimensional point spread function"
        )
    if array.ndim not in (2, 3):
        raise ValueError(f"`psf` must have 2 or 3 dimensions (yx or zyx), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"`psf` is empty (shape {array.shape}); pass at least one voxel per axis")
    if not np.isfinite(array).all():
        raise ValueError(
            f"`psf` holds {int((~np.isfinite(array)).sum())} NaN or infinite values; replace them, for "
            "instance by numpy.nan_to_num(psf)"
        )
    return array


def prepare(psf: npt.ArrayLike, ndim: int | None = None) -> npt.NDArray[np.float32]:
    """Return `psf` checked, scaled to sum 1 (in float64) and stored as float32.

    Preserves shape, centre and shape of the profile; applying it twice gives the same numbers as once.

    Parameters
    ----------
    psf, ndim
        As in `check_psf`.

    Returns
    -------
    ndarray
        A new float32 array in C order.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`.
    """
    check_psf(psf, ndim)
    array = np.asarray(psf)
    if array.dtype == np.float32 and abs(array.sum(dtype=np.float64) - 1) < _SUM_TOLERANCE:
        return np.array(array, order="C")
    # Scaled by the largest value first, so that neither subnormal nor huge values lose the sum.
    scaled = np.asarray(array, dtype=np.float64) / float(array.max())
    return np.ascontiguousarray(scaled / scaled.sum(), dtype=np.float32)


def effective_sigma(psf: np.ndarray) -> tuple[float, ...]:
    """Return the width of the core of `psf` per axis, as the standard deviation of a Gaussian, in voxels.

    The full width at half maximum of the profile through the brightest voxel (between the outermost
    crossings, interpolated) divided by 2.355. A broad tail does not count; `energy_radius` sees that.
    Zero along an axis of length 1.
    """
    peak = np.unravel_index(int(np.argmax(psf)), psf.shape)
    widths = []
    for axis in range(psf.ndim):
        line = tuple(slice(None) if a == axis else p for a, p in enumerate(peak))
        widths.append(_full_width_half_maximum(psf[line]) / FWHM_PER_SIGMA if psf.shape[axis] > 1 else 0.0)
    return tuple(float(width) for width in widths)


def _full_width_half_maximum(profile: np.ndarray) -> float:
    values = np.concatenate([[0.0], np.asarray(profile, dtype=np.float64) / float(profile.max()), [0.0]])
    above = np.flatnonzero(values >= 0.5)
    first, last = above[0], above[-1]
    left = first - (values[first] - 0.5) / (values[first] - values[first - 1])
    right = last + (values[last] - 0.5) / (values[last] - values[last + 1])
    return float(right - left)


def energy_radius(psf: np.ndarray, fraction: float = 0.999) -> tuple[int, ...]:
    """Return per axis the least radius around the centre (``n // 2``) that holds `fraction` of the light.

    Light is summed over the other axes; a radius of r voxels means ``|i - n // 2| <= r``.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}")
    radii = []
    for axis, length in enumerate(psf.shape):
        others = tuple(a for a in range(psf.ndim) if a != axis)
        profile = psf.sum(axis=others, dtype=np.float64)
        distance = np.abs(np.arange(length) - length // 2)
        within = np.cumsum(np.bincount(distance, weights=profile))
        # Rounding of the sums must not ask for a voxel that holds nothing.
        target = fraction * within[-1] * (1 - 4 * np.finfo(np.float64).eps * length)
        radii.append(int(np.searchsorted(within, target)))
    return tuple(radii)

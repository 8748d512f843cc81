"""Steps that make a measured or computed array a point spread function fit for an image.

Each step is a function of its own: it takes an array, returns a new float32 array, and leaves its input as it
is. The centre is voxel ``n // 2`` of each axis throughout. None scales the light to 1
(`chunkrestore.psf.prepare` does); `prepare_psf` chains them and says what each one did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.prepare import check_numbers, energy_radius, prepare
from chunkrestore.psf.sampling import LEAST_SHIFT, Landmark, Psf, centre, checked, offset, overlap, resample


def edge_level(psf: npt.ArrayLike) -> float:
    """Return the median of the voxels on the array's faces (its first and last planes along every axis).

    An axis of length 1 has no faces. With no faces at all, the level is 0.
    """
    array = check_numbers(psf)
    on_face = np.zeros(array.shape, dtype=bool)
    for axis, length in enumerate(array.shape):
        if length > 1:
            np.moveaxis(on_face, axis, 0)[[0, -1]] = True
    return float(np.median(array[on_face])) if on_face.any() else 0.0


def subtract_background(psf: npt.ArrayLike, level: float | None = None) -> Psf:
    """Subtract a constant, and set what falls below zero to zero.

    Preserves shape. Noise around a level that was subtracted survives by its positive half: about 0.4 of its
    standard deviation per voxel, which adds up in a large array; `keep_largest_component` removes it.

    Parameters
    ----------
    psf
        Two- or three-dimensional; may hold negative values.
    level
        Intensity of the background; `edge_level` by default. Take 0 for a computed point spread function,
        whose light at the edges is its own.

    Raises
    ------
    TypeError
        If `psf` does not hold real numbers.
    ValueError
        If `psf` is not of 2 or 3 dimensions, holds NaN, or has nothing above `level`; if `level` is not finite.
    """
    array = check_numbers(psf).astype(np.float64)
    subtracted = edge_level(array) if level is None else float(level)
    if not math.isfinite(subtracted):
        raise ValueError(f"`level` must be a finite intensity, got {level}")
    if not array.max() > subtracted:
        raise ValueError(
            f"`psf` has no value above the background {subtracted:.6g} (largest {array.max():.6g}); pass a "
            "lower `level`"
        )
    return np.maximum(array - subtracted, 0).astype(np.float32)


def keep_largest_component(psf: npt.ArrayLike, threshold: float = 0.01) -> Psf:
    """Set everything to zero but the connected region that holds the most light.

    Removes neighbouring beads, hot pixels and scattered noise, and with them all light below `threshold`.

    Parameters
    ----------
    psf
        Background subtracted, not negative.
    threshold
        Share of the brightest voxel from which on voxels belong to a region; above 0 and below 1. Voxels
        that share a corner are connected. Lower than the dimmest part to keep, above the noise.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`, and if `threshold` is out of range.
    """
    from scipy import ndimage

    array = checked(psf)
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` must be above 0 and below 1 (a share of the peak), got {threshold}")
    regions, count = ndimage.label(array >= threshold * array.max(), np.ones((3,) * array.ndim))
    light = ndimage.sum_labels(array, regions, np.arange(1, count + 1))
    return np.where(regions == 1 + int(np.argmax(light)), array, 0).astype(np.float32)


def pad_or_crop(psf: npt.ArrayLike, shape: Sequence[int]) -> Psf:
    """Add planes of zeros or remove planes, with the centre ``n // 2`` at the centre of the new shape.

    Raises
    ------
    TypeError
        If `psf` does not hold real numbers.
    ValueError
        If `psf` is not of 2 or 3 dimensions or holds NaN, or `shape` is not one positive length per axis.
    """
    array = check_numbers(psf)
    wanted = tuple(int(length) for length in shape)
    if len(wanted) != array.ndim or min(wanted) < 1 or wanted != tuple(shape):
        raise ValueError(
            f"`shape` must have one positive length for each of the {array.ndim} axes, got {shape}"
        )
    result = np.zeros(wanted, dtype=np.float32)
    runs = [overlap(n, m, m // 2 - n // 2) for n, m in zip(array.shape, wanted, strict=True)]
    result[tuple(to for _, to in runs)] = array[tuple(source for source, _ in runs)]
    return result


def crop_to_energy(psf: npt.ArrayLike, fraction: float = 0.999) -> Psf:
    """Remove outer planes as long as each axis, by itself, keeps `fraction` of the light.

    The result is odd and symmetric about the centre; it is never longer than `psf`, but for one plane of
    zeros where an even length is kept whole. Light is not scaled up for what is cut off.

    Raises
    ------
    TypeError, ValueError
        As in `check_psf`, and if `fraction` is not above 0 and at most 1.
    """
    array = checked(psf)
    return pad_or_crop(array, [2 * radius + 1 for radius in energy_radius(array, fraction)])


def prepare_psf(
    psf: npt.ArrayLike,
    *,
    background: float | Literal["edge"] | None = "edge",
    component: float | None = None,
    centre_by: Landmark | None = "peak",
    voxel_size: Sequence[float] | None = None,
    image_voxel_size: Sequence[float] | None = None,
    energy: float | None = 0.999,
) -> tuple[Psf, tuple[str, ...]]:
    """Do the usual chain of steps, and say in words what each of them did.

    Background, component, centring (padded first, so that nothing leaves the array), voxel size, crop, sum 1.

    Parameters
    ----------
    psf
        Two- or three-dimensional, as measured or computed.
    background
        Intensity to subtract; ``"edge"`` for the median of the array's faces. None, for a computed point
        spread function, leaves values as they are.
    component
        Threshold of `keep_largest_component`; not done by default.
    centre_by
        What to move to the centre voxel, as in `centre`; None moves nothing.
    voxel_size, image_voxel_size
        Micrometres per axis of `psf` and of the image. Resampled if both are given and differ.
    energy
        Share of the light to keep per axis, as in `crop_to_energy`; None keeps all planes.

    Returns
    -------
    psf
        float32, sum 1, centre at ``n // 2``.
    steps
        One line per step.

    Raises
    ------
    TypeError, ValueError
        As the steps do, and if only one of the voxel sizes is given.

    Examples
    --------
    >>> from chunkrestore.psf import gaussian
    >>> psf, steps = prepare_psf(
    ...     gaussian((2, 1, 1)), background=None, voxel_size=(0.2, 0.1, 0.1), image_voxel_size=(0.4, 0.1, 0.1)
    ... )
    >>> psf.shape
    (7, 7, 7)
    """
    if (voxel_size is None) != (image_voxel_size is None):
        missing = "image_voxel_size" if image_voxel_size is None else "voxel_size"
        raise ValueError(
            f"`{missing}` is missing; give the voxel sizes of both the PSF and the image, or neither"
        )
    steps: list[str] = []
    array: np.ndarray = check_numbers(psf)
    if background is not None:
        array = _without_background(array, background, steps)
    if component is not None:
        array = _component(array, component, steps)
    if centre_by is not None:
        array = _centred(array, centre_by, steps)
    if voxel_size is not None and image_voxel_size is not None:
        array = _resampled(array, voxel_size, image_voxel_size, steps)
    if energy is not None:
        array = _cropped(array, energy, steps)
    steps.append("sum        scaled to 1")
    return prepare(array), tuple(steps)


def _without_background(array: np.ndarray, background: float | str, steps: list[str]) -> np.ndarray:
    if isinstance(background, str) and background != "edge":
        raise ValueError(f'`background` must be an intensity, "edge" or None, got {background!r}')
    level = edge_level(array) if isinstance(background, str) else float(background)
    result = subtract_background(array, level)
    origin = " (median of the faces)" if isinstance(background, str) else ""
    share = 1 - result.sum(dtype=np.float64) / np.maximum(array, 0).sum(dtype=np.float64)
    steps.append(f"background subtracted {level:.4g}{origin}, {share:.1%} of the light")
    return result


def _component(array: np.ndarray, threshold: float, steps: list[str]) -> np.ndarray:
    result = keep_largest_component(array, threshold)
    share = 1 - result.sum(dtype=np.float64) / array.sum(dtype=np.float64)
    steps.append(
        f"component  kept the largest above {threshold:.2g} of the peak; {share:.1%} of the light removed"
    )
    return result


def _centred(array: np.ndarray, by: Landmark, steps: list[str]) -> np.ndarray:
    distance = offset(array, by)
    if max(map(abs, distance)) < LEAST_SHIFT:
        steps.append(f"centre     the {by} is at the centre")
        return array
    room = [n + 2 * math.ceil(abs(d)) * (n > 1) for n, d in zip(array.shape, distance, strict=True)]
    steps.append(f"centre     {by} moved to the centre from {_listed(distance)} voxels beside it")
    return centre(pad_or_crop(array, room), by=by)


def _resampled(array: np.ndarray, old: Sequence[float], new: Sequence[float], steps: list[str]) -> np.ndarray:
    result = resample(array, old, new)
    if tuple(old) != tuple(new):
        steps.append(
            f"voxel size resampled from {_listed(old)} to {_listed(new)} um, shape {_shape(array)} to {_shape(result)}"
        )
    return result


def _cropped(array: np.ndarray, energy: float, steps: list[str]) -> np.ndarray:
    result = crop_to_energy(array, energy)
    if result.shape != array.shape:
        share = 1 - result.sum(dtype=np.float64) / array.sum(dtype=np.float64)
        steps.append(f"crop       from {_shape(array)} to {_shape(result)}, {share:.2%} of the light cut off")
    return result


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _shape(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))

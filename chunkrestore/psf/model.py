"""Point spread functions from a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt


def gaussian(
    sigma: Sequence[float],
    *,
    truncate: float = 4.0,
    tail: float = 0.0,
    tail_sigma: Sequence[float] | None = None,
) -> npt.NDArray[np.float32]:
    r"""Return a Gaussian point spread function with an optional broad tail.

    .. math:: h = (1 - t)\, g(\sigma) + t\, g(\sigma_t)

    where each :math:`g` is a Gaussian cut at `truncate` times the larger of the two widths and scaled to
    sum 1. A narrow core over a tail that holds some ten percent of the light is what a light-sheet
    microscope shows once scattering and the sheet's side lobes are counted.

    Parameters
    ----------
    sigma
        Standard deviation of the core in voxels, one number per axis (``zyx`` or ``yx``). Zero makes that
        axis a single plane (no blur along it) unless the tail widens it.
    truncate
        Half-width of the array, in standard deviations of the wider component.
    tail
        Share of the light in the tail, at least 0 and below 1.
    tail_sigma
        Standard deviation of the tail in voxels per axis; three times `sigma` by default.

    Returns
    -------
    ndarray
        float32, odd length on every axis, centred on the middle voxel, not negative, sum 1 to float32
        rounding. Symmetric under reversal of every axis.

    Raises
    ------
    ValueError
        If a width is negative or not finite, there is no axis, lengths disagree, `truncate` is not
        positive, or `tail` lies outside [0, 1).

    Examples
    --------
    >>> gaussian((2.0, 1.0, 1.0)).shape
    (17, 9, 9)
    """
    core_sigma = _widths("sigma", sigma)
    if not (math.isfinite(truncate) and truncate > 0):
        raise ValueError(f"`truncate` must be a positive number, got {truncate}")
    if not 0 <= tail < 1:
        raise ValueError(f"`tail` must be at least 0 and below 1 (a share of the light), got {tail}")
    broad_sigma = core_sigma
    if tail:
        broad_sigma = _widths("tail_sigma", [3 * s for s in core_sigma] if tail_sigma is None else tail_sigma)
        if len(broad_sigma) != len(core_sigma):
            raise ValueError(f"`tail_sigma` {broad_sigma} needs one number per axis of `sigma` {core_sigma}")
    radius = [math.ceil(truncate * max(pair)) for pair in zip(core_sigma, broad_sigma, strict=True)]
    psf = (1 - tail) * _separable_gaussian(core_sigma, radius)
    if tail:
        psf += tail * _separable_gaussian(broad_sigma, radius)
    return psf.astype(np.float32)


def _widths(name: str, values: Sequence[float]) -> tuple[float, ...]:
    widths = tuple(float(value) for value in values)
    if not widths or not all(math.isfinite(width) and width >= 0 for width in widths):
        raise ValueError(f"`{name}` needs one finite number of voxels, at least 0, per axis; got {widths}")
    return widths


def _separable_gaussian(sigma: Sequence[float], radius: Sequence[int]) -> npt.NDArray[np.float64]:
    profiles = []
    for width, half in zip(sigma, radius, strict=True):
        position = np.arange(-half, half + 1, dtype=np.float64)
        profile = np.exp(-0.5 * (position / width) ** 2) if width else (position == 0).astype(np.float64)
        profiles.append(profile / profile.sum())
    return reduce(np.multiply.outer, profiles)

"""Thresholds of a voxel's surroundings, in float64 and with the same bits wherever the surroundings were cut out.

Means of windows are sums of taps in a fixed order (`scipy.ndimage.correlate1d`), because running sums and integral
images round differently wherever they begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.gaussian import gaussian

METHODS = ("gaussian", "mean", "niblack", "sauvola")
"""What is known of a window: a weighted mean, a mean, a mean and a standard deviation."""

Floats: TypeAlias = npt.NDArray[np.float64]


def weighted_mean(image: npt.NDArray[np.generic], window: Sequence[int]) -> Floats:
    """Return the mean of each voxel's surroundings, weighted by a Gaussian of `window_sigma`."""
    return gaussian(image, window_sigma(window), np.float64)


def window_sigma(window: Sequence[int]) -> tuple[float, ...]:
    """Return the standard deviations of the Gaussian that stands for a window, as in scikit-image."""
    return tuple((n - 1) / 6 for n in window)


def mean(image: npt.NDArray[np.generic], window: Sequence[int], mode: str = "reflect") -> Floats:
    """Return the mean of each voxel's window."""
    from scipy import ndimage

    result = image.astype(np.float64)
    for axis, n in enumerate(window):
        if n > 1:
            result = ndimage.correlate1d(result, np.full(n, 1 / n), axis, mode=mode)
    return result


def mean_and_deviation(image: npt.NDArray[np.generic], window: Sequence[int]) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each voxel's window; beyond the border no voxel is counted twice."""
    average = mean(image, window, "mirror")
    variance = mean(image.astype(np.float64) ** 2, window, "mirror")
    variance -= average**2
    # Rounding leaves less than nothing where all voxels are equal.
    return average, np.sqrt(np.maximum(variance, 0, out=variance), out=variance)


def niblack(average: Floats, deviation: Floats, k: float) -> Floats:
    """Return ``m - k s`` (Niblack, An Introduction to Digital Image Processing, 1986)."""
    return average - k * deviation


def sauvola(average: Floats, deviation: Floats, k: float, dynamic_range: float) -> Floats:
    """Return ``m (1 + k (s / r - 1))``: Sauvola and Pietikainen, Pattern Recognit. 33:225 (2000), equation 5."""
    return average * (1 + k * (deviation / dynamic_range - 1))

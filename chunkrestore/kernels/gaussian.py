"""Gaussians by direct convolution: the same bits wherever a block was cut out of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TRUNCATE = 4.0
"""Standard deviations after which a Gaussian ends; SciPy's default."""


def gaussian_radius(sigma: Sequence[float]) -> tuple[int, ...]:
    """Return how many voxels a Gaussian of `sigma` voxels reaches on each side, as SciPy cuts it off."""
    return tuple(int(TRUNCATE * s + 0.5) for s in sigma)


def gaussian(image: np.ndarray, sigma: Sequence[float], dtype: Any = np.float32) -> np.ndarray:
    """Return `image` convolved with a Gaussian of `sigma` voxels, mirrored at its border, in float `dtype`."""
    from scipy import ndimage

    smooth: np.ndarray = ndimage.gaussian_filter(
        image, sigma, output=dtype, mode="reflect", truncate=TRUNCATE
    )
    return smooth

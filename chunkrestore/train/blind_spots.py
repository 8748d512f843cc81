"""Blind spots: learning to denoise from noisy images alone.

A network that predicts a voxel from its surroundings, without seeing the voxel itself, cannot learn its noise if
that is independent of the neighbours' (Noise2Void). So some voxels of a patch are replaced by the value of a random
neighbour, and the loss compares the prediction with the recorded values in those voxels alone::

    loss = sum(mask * (predicted - recorded)**2) / sum(mask)

References
----------
.. [1] A. Krull, T.-O. Buchholz, F. Jug, "Noise2Void - learning denoising from single noisy images", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.train.patches import FloatArray

FRACTION = 1 / 64
"""Share of the voxels that are masked: 64 of a patch of 64 x 64, as in the paper."""
RADIUS = 5
"""Voxels per axis up to which a neighbour is away."""


def blind_spots(
    x: FloatArray, rng: np.random.Generator, *, fraction: float = FRACTION, radius: int = RADIUS
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Replace some voxels of a patch by the recorded value of a random neighbour.

    One voxel is drawn in every box of a lattice, so that blind spots are spread evenly and seldom see each other.

    Parameters
    ----------
    x
        float32 (z, y, x) or (y, x), one channel.
    rng
        Random numbers; the same state gives the same result.
    fraction
        Share of voxels, up to the rounding of boxes to whole voxels; above 0, at most 1/2.
    radius
        Greatest distance of a neighbour per axis, in voxels.

    Returns
    -------
    masked : ndarray
        float32, a copy of `x` with other values where `mask` is set.
    mask : ndarray of bool
        The blind spots.

    Raises
    ------
    ValueError
        If `fraction` or `radius` is out of range, or `x` is a single voxel.
    """
    if not 0 < fraction <= 0.5 or radius < 1:
        raise ValueError(f"`fraction` {fraction} must be in (0, 0.5] and `radius` {radius} at least 1")
    if x.size < 2:
        raise ValueError(f"`x` of shape {x.shape} has no neighbours to take values from")
    spots = _one_per_box(x.shape, fraction, rng)
    others = _neighbours(spots, x.shape, radius, rng)
    masked, mask = np.array(x, np.float32), np.zeros(x.shape, bool)
    masked[tuple(spots)] = x[tuple(others)]
    mask[tuple(spots)] = True
    return masked, mask


def blind_pair(x: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Return what a network sees and what its loss needs: masked (..., 1); recorded values and mask (..., 2)."""
    masked, mask = blind_spots(x, rng)
    return masked[..., None], np.stack([x, mask], axis=-1, dtype=np.float32)


def _one_per_box(shape: Sequence[int], fraction: float, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Return (n_axes, n) coordinates, one in every box of a lattice of about ``1 / fraction`` voxels per box."""
    n_axes = sum(n > 1 for n in shape)
    edges = []
    for n in shape:
        count = max(1, round(n * fraction ** (1 / n_axes)))
        edges.append(np.arange(count + 1) * n // count)
    starts = np.stack(np.meshgrid(*(e[:-1] for e in edges), indexing="ij")).reshape(len(shape), -1)
    stops = np.stack(np.meshgrid(*(e[1:] for e in edges), indexing="ij")).reshape(len(shape), -1)
    return rng.integers(starts, stops)


def _neighbours(
    spots: npt.NDArray[np.intp], shape: Sequence[int], radius: int, rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Return a random voxel within `radius` of every spot and inside the patch, never the spot itself."""
    last = np.array(shape)[:, None] - 1
    first, final = np.maximum(spots - radius, 0), np.minimum(spots + radius, last)
    found = rng.integers(first, final + 1)
    while (same := (found == spots).all(axis=0)).any():
        found[:, same] = rng.integers(first[:, same], final[:, same] + 1)
    return found

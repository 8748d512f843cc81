"""Decisions that are taken once per volume, on a few small regions of it: the pilots.

Pilot regions depend on the volume alone, not on the block grid, so every grid gets the same decision.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Slices

Read: TypeAlias = Callable[[Slices], Any]
"""Returns the voxels of a region of the volume."""

N_PILOTS = 3
"""Regions that decide together."""
PILOT_LENGTHS = {2: (256, 256), 3: (48, 96, 96)}
"""Largest extent of a pilot region: half a million voxels, seconds of work."""
LEAST_CHANGE = 0.005
"""Relative decrease of the I-divergence by an iteration below which more of them are not worth it."""
_PLACES_PER_AXIS = 3
_BIN = 4


def pilot_candidates(shape: Sequence[int]) -> list[Slices]:
    """Return the regions of a volume of `shape` that may become pilots: a coarse lattice, without overlap."""
    lengths = [min(length, n) for length, n in zip(PILOT_LENGTHS[len(shape)], shape, strict=True)]
    starts = []
    for n, length in zip(shape, lengths, strict=True):
        places = min(_PLACES_PER_AXIS, n // length)
        starts.append([round((i + 0.5) / places * n - length / 2) for i in range(places)])
    return [
        tuple(slice(a, a + n) for a, n in zip(corner, lengths, strict=True))
        for corner in itertools.product(*starts)
    ]


def pilot_regions(read: Read, shape: Sequence[int]) -> list[Slices]:
    """Return the candidates that show most structure, at most `N_PILOTS`, best first.

    Structure is the standard deviation of means over 4 voxels per axis, which photon noise hardly raises.
    """
    ranked = sorted(pilot_candidates(shape), key=lambda region: -_structure(to_numpy(read(region))))
    return ranked[:N_PILOTS]


def _structure(image: np.ndarray) -> float:
    whole = image[tuple(slice(n // _BIN * _BIN if n >= _BIN else n) for n in image.shape)]
    bins = [size for n in whole.shape for size in ((n // _BIN, _BIN) if n >= _BIN else (1, n))]
    return float(whole.reshape(bins).mean(axis=tuple(range(1, len(bins), 2)), dtype=np.float64).std())


def best_iteration(curve: Sequence[float], *, least_change: float) -> int:
    """Return after how many iterations to stop, given a figure that should fall with every one of them.

    The last iteration before the figure rises, or before it falls by less than `least_change` of itself;
    element k - 1 of `curve` is the figure after k iterations.
    """
    for k, (before, now) in enumerate(itertools.pairwise(curve), 1):
        if now > before or before - now < least_change * abs(before):
            return k
    return len(curve)


def i_divergence(image: Any, expected: Any, mask: Any = None) -> float:
    r"""Return Csiszar's I-divergence :math:`\sum_i y_i \ln(y_i / m_i) - y_i + m_i` in double precision.

    For Poisson noise it is the negative logarithm of the likelihood less that of a perfect fit (Snyder et al.
    1992). Voxels at or below 0 count as 0.
    """
    y = np.maximum(to_numpy(image).astype(np.float64), 0.0)
    m = np.maximum(to_numpy(expected).astype(np.float64), np.finfo(np.float32).tiny)
    terms = np.where(y > 0, y * np.log(np.maximum(y, np.finfo(np.float32).tiny) / m), 0.0) - y + m
    return float(terms.sum() if mask is None else terms[to_numpy(mask)].sum())

"""Operators that see a volume at another sampling along z: how, and what follows for who applies them.

Such an operator works on the resampled volume: blocks, shapes and halos are of that lattice, and so is the result.
Whoever drives it (eager code, the lazy layer, a job) resamples what is read, and takes the numbers that it needs of
the volume before or after, as it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block
from chunkrestore.kernels.resample import checked_resampling, resample
from chunkrestore.operators.base import Operator


@dataclass(frozen=True)
class Sampling:
    """A volume at another sampling along z."""

    factor: float
    """Planes per plane."""
    dtype: str | None = None
    """Of the resampled volume: its own, rounded, or ``"float32"``."""
    measures_original: bool = False
    """Whether percentiles are those of the volume as it was."""

    @property
    def scale(self) -> tuple[float, ...]:
        """Voxels per voxel, z, y and x."""
        return (self.factor, 1.0, 1.0)

    def of_array(self, volume: Any) -> np.ndarray:
        """Return a whole volume resampled, on the host."""
        lattice = checked_resampling(volume.shape, self.scale)
        points = Block.whole(lattice.zoomed_shape).core
        return resample(to_numpy(volume), lattice, Block.whole(volume.shape).core, points, self.dtype)


def checked_factor(factor: Any) -> float:
    """Return a factor as a float; raise `ValueError` unless it is at least 1."""
    if isinstance(factor, bool) or not isinstance(factor, int | float | np.number):
        raise ValueError(f"`factor` must be one number of at least 1, got {factor!r}")
    if not 1 <= factor < math.inf:
        raise ValueError(
            f"`factor` must be at least 1, got {factor}: planes of the result per plane of the image"
        )
    return float(factor)


def factor_of(voxel_size: Sequence[float] | None) -> float:
    """Return the factor that makes voxels as long along z as along y, to six digits.

    Raises
    ------
    ValueError
        If the voxel size is not known, not of a volume, or shorter along z.
    """
    if voxel_size is None or len(voxel_size) != 3:
        raise ValueError(
            f"`factor` 'auto' needs an image with a voxel size along z, y and x, got {voxel_size}; give a number"
        )
    z, y, _ = voxel_size
    if z < y:
        raise ValueError(
            f"`factor` 'auto' is below 1 for voxels of {tuple(voxel_size)} micrometres; give a number"
        )
    return float(f"{z / y:.6g}")


def sampling_of(operator: Operator) -> Sampling | None:
    """Return how `operator` wants to see its volume, None: as it is."""
    return getattr(operator, "sampling", None)


def first_sampling(operators: Sequence[Operator]) -> Sampling | None:
    """Return how a chain of operators wants to see the volume that it begins with.

    Raises
    ------
    ValueError
        If an operator wants another sampling than the one before it leaves.
    """
    for operator in operators[1:]:
        if sampling_of(operator) is not None:
            raise ValueError(
                f"{operator.name} changes the sampling and must be the first operator; run what comes before it as a "
                "job of its own"
            )
    return sampling_of(operators[0]) if operators else None

"""What every phantom is: what is there, in a volume that is drawn region by region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeAlias

import numpy as np

from chunkrestore.simulate.painting import FloatArray, Labels

Range: TypeAlias = tuple[float, float]


class Phantom(Protocol):
    """A volume with known truth. Equal phantoms have equal voxels, bit by bit, for every cutting."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per axis (z, y, x)."""

    @property
    def seed(self) -> int:
        """Seed, not negative."""

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume.

        Parameters
        ----------
        region
            Part of the volume, one slice per axis.

        Returns
        -------
        labels : ndarray
            int32: the object at each voxel, 0 for none. Ids are positive and unique in the volume, with gaps.
        photons : ndarray
            float32: photons that each voxel emits.

        Raises
        ------
        ValueError
            If `region` does not lie in the volume.
        """

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, to be kept as JSON; `from_description` makes a phantom of it again."""


def described(phantom: Any) -> dict[str, Any]:
    """Return the kind and the parameters of a phantom, made of what JSON knows."""
    return {"kind": type(phantom).__name__, **_plain(asdict(phantom))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as integers; raise ValueError unless it is three lengths of at least 8 voxels."""
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"`shape` must be three lengths (z, y, x) of at least 8 voxels, got {shape}")
    return shape


def checked_range(name: str, ends: Sequence[float], least: float = 0.0) -> Range:
    """Return `ends` as two numbers; raise ValueError unless they rise and are positive and at least `least`."""
    low, high = (float(end) for end in ends)
    if not (0 < low <= high < math.inf) or low < least:
        limit = f"of at least {least:g}" if least else "of positive numbers"
        raise ValueError(f"`{name}` must be a rising pair {limit}, got ({low:g}, {high:g})")
    return low, high


def between(ends: Range, chance: float) -> float:
    """Return the number that lies `chance` (0 to 1) of the way from one end to the other."""
    return ends[0] + (ends[1] - ends[0]) * chance

"""Photons for labels that exist: real shapes and arrangements, with brightness and texture that are drawn.

What a voxel emits follows from its label, its position, and the labels a few voxels around it. So any region is
cut out of the whole exactly, and labels may lie in a store far larger than memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from chunkrestore.hashing import GAMMA, mixed
from chunkrestore.simulate.lattice import Region, checked_region
from chunkrestore.simulate.microscope import check_seed

FloatArray: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int32]

_TEXTURE = 301
"""Purpose of the random numbers of the texture."""
_TILE = 64
"""Edge of the periodic texture in voxels: larger than most objects, each of which sees it from another place on."""
_DEEPEST = 4
"""Voxels below the surface that are told apart: surface, rim of three, interior."""
_PROFILE = (0.6, 1.15, 1.15, 1.15, 1.0)
"""Brightness by depth: a voxel at the surface is partly outside; heterochromatin lines the envelope."""
_FLATTEST, _BRIGHTEST = 0.3, 2.5
"""Least and largest factor of the texture."""


@dataclass(frozen=True, eq=False)
class LabelledPhantom:
    """A phantom whose objects are those of a label volume.

    Every object draws its brightness, and the place from which it sees the texture, from a hash of its id and the
    seed. The surface is dimmer, since its voxels lie partly outside; a rim below it is brighter than the interior.
    """

    labels: Any = field(repr=False)
    """Ids, 0 for background, on 2 or 3 axes: an array, a dask array, or an image of `chunkrestore.ome_zarr.open_source`
    (of which the first time point and channel are taken)."""
    seed: int
    """Seed of brightness and texture, not negative."""
    photons: tuple[float, float] = (4.0, 14.0)
    """Ends of the range of photons per voxel in the interior of an object."""
    texture: float = 0.2
    """Standard deviation of the chromatin texture relative to the mean brightness."""
    grain: float = 1.3
    """Standard deviation of the Gaussian that smooths the texture, in voxels."""
    outside: float = 0.0
    """Photons per voxel outside all objects."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        object.__setattr__(self, "photons", tuple(map(float, self.photons)))
        low, high = self.photons
        if not (0 < low <= high < math.inf):
            raise ValueError(f"`photons` must be a rising pair of positive numbers, got {self.photons}")
        for name in ("texture", "grain", "outside"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {getattr(self, name)}")
        if np.dtype(self.labels.dtype).kind not in "iu":
            raise ValueError(f"`labels` must hold integer ids, got {self.labels.dtype}; convert them first")
        if len(self.shape) not in (2, 3):
            raise ValueError(f"`labels` must have 2 or 3 axes, got shape {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(self.labels.spatial_shape if self._is_stored else self.labels.shape)

    @property
    def _is_stored(self) -> bool:
        return hasattr(self.labels, "spatial_shape")

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume.

        Parameters
        ----------
        region
            Part of the volume, one slice per axis.

        Returns
        -------
        labels : ndarray
            int32, as they are.
        photons : ndarray
            float32: photons that each voxel emits.

        Raises
        ------
        ValueError
            If `region` does not lie in the volume, or an id is negative or beyond int32.
        """
        region = checked_region(region, self.shape)
        around = tuple(
            slice(max(s.start - _DEEPEST, 0), min(s.stop + _DEEPEST, n))
            for s, n in zip(region, self.shape, strict=True)
        )
        wide = self._read(around)
        trim = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(region, around, strict=True))
        labels, depth = np.ascontiguousarray(wide[trim]), _depth(wide)[trim]
        photons = np.full(labels.shape, self.outside, np.float32)
        inside = np.nonzero(labels)
        position = [i + s.start for i, s in zip(inside, region, strict=True)]
        photons[inside] = self._emitted(labels[inside], depth[inside], position)
        return labels, photons

    def _emitted(
        self,
        ids: npt.NDArray[np.int32],
        depth: npt.NDArray[np.uint8],
        position: Sequence[npt.NDArray[np.intp]],
    ) -> FloatArray:
        """Return the photons of voxels of objects."""
        drawn = _hashed(ids, self.seed)
        # Three times six bits shift the texture; of the others, 32 decide on the brightness.
        tile = _texture(self.seed, len(position), self.texture, self.grain)
        places = tuple(
            (p + (drawn >> np.uint64(6 * axis)).astype(np.intp)) % _TILE for axis, p in enumerate(position)
        )
        chance = (drawn >> np.uint64(32)).astype(np.float32) * np.float32(2**-32)
        low, high = map(np.float32, self.photons)
        profile = np.asarray(_PROFILE, np.float32)[depth]
        return np.asarray((low + (high - low) * chance) * profile * tile[places], np.float32)

    def _read(self, region: Region) -> Labels:
        part = self.labels.source(0).read(0, 0, region) if self._is_stored else self.labels[region]
        part = np.asarray(part.compute() if hasattr(part, "compute") else part)
        if part.size and (part.min() < 0 or part.max() > np.iinfo(np.int32).max):
            raise ValueError(
                f"`labels` hold ids from {part.min()} to {part.max()}; they must lie in 0 to {np.iinfo(np.int32).max}"
            )
        return part.astype(np.int32, copy=False)

    @cached_property
    def _identity(self) -> Any:
        """What identifies the labels: of stored ones their place and metadata, of others their values."""
        if self._is_stored:
            return self.labels.source(0).identity()
        if hasattr(self.labels, "__dask_graph__"):
            from dask.base import tokenize

            return tokenize(self.labels)
        return hashlib.sha256(repr(self.shape).encode() + np.ascontiguousarray(self.labels).data).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, as JSON-compatible values."""
        return {
            "kind": type(self).__name__,
            "labels": self._identity,
            "shape": list(self.shape),
            "seed": self.seed,
            "photons": list(self.photons),
            "texture": self.texture,
            "grain": self.grain,
            "outside": self.outside,
        }


def _depth(labels: Labels) -> npt.NDArray[np.uint8]:
    """Return how many voxels lie between a voxel and one with another label, at most `_DEEPEST`.

    Steps to faces and steps to corners take turns, so that shells are nearly round. Whole numbers, by comparison
    alone: exact `_DEEPEST` voxels away from where the array ends.
    """
    other = np.zeros(labels.shape, np.bool_)
    for axis in range(labels.ndim):
        a, b = _beside(labels, axis)
        differs = a != b
        for side in _beside(other, axis):
            side |= differs
    depth = np.zeros(labels.shape, np.uint8)
    for step in range(_DEEPEST):
        depth += ~other
        other = _widened(other, corners=step % 2 == 1)
    return depth


def _widened(mask: npt.NDArray[np.bool_], *, corners: bool) -> npt.NDArray[np.bool_]:
    """Return a mask with the voxels beside it."""
    wider = mask.copy()
    for axis in range(mask.ndim):
        before, after = _beside(wider.copy() if corners else mask, axis)
        low, high = _beside(wider, axis)
        low |= after
        high |= before
    return wider


def _beside(array: npt.NDArray[Any], axis: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return two views: of all voxels but the last along an axis, and of those after them."""
    ahead = (slice(None),) * axis
    return array[(*ahead, slice(None, -1))], array[(*ahead, slice(1, None))]


def _hashed(ids: npt.NDArray[np.int32], seed: int) -> npt.NDArray[np.uint64]:
    """Return 64 random bits per id."""
    key = np.random.SeedSequence([seed, _TEXTURE]).generate_state(1, np.uint64)
    return np.asarray(mixed((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA) + key), np.uint64)


@lru_cache(maxsize=4)
def _texture(seed: int, ndim: int, strength: float, grain: float) -> FloatArray:
    """Return the periodic texture: mean 1, standard deviation `strength` before its ends are cut."""
    noise = np.random.default_rng([seed, _TEXTURE, 1]).standard_normal((_TILE,) * ndim, dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, grain, mode="wrap")
    scaled = 1 + strength * (smooth - smooth.mean()) / smooth.std()
    return np.clip(scaled, _FLATTEST, _BRIGHTEST).astype(np.float32)

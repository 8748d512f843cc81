"""Drawing objects into a region: each on its own box, cut where the region ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.simulate.lattice import Region

FloatArray: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Drawn:
    """An object on its own box. It is computed there whole, so that its bits do not depend on who asks."""

    id: int
    """Its id in label volumes."""
    origin: tuple[int, ...]
    """The box's first voxel."""
    level: FloatArray
    """How deep each voxel lies: 0 in the middle, 1 on the surface."""
    photons: FloatArray
    """Photons that each voxel emits; 0 where the object is not."""


def paint(region: Region, objects: Iterable[Drawn]) -> tuple[Labels, FloatArray]:
    """Return labels and photons of `region`; a contested voxel goes to the object in which it lies deeper.

    Of two in which it lies equally deep it goes to the first, so `objects` must come in the order of their ids.
    """
    shape = tuple(part.stop - part.start for part in region)
    labels, photons = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    level = np.full(shape, np.inf, dtype=np.float32)
    for drawn in objects:
        common = overlap(region, drawn.origin, drawn.level.shape)
        if common is None:
            continue
        here, there = common
        deeper = (drawn.photons[there] > 0) & (drawn.level[there] < level[here])
        np.copyto(level[here], drawn.level[there], where=deeper)
        np.copyto(photons[here], drawn.photons[there], where=deeper)
        np.copyto(labels[here], np.int32(drawn.id), where=deeper & (drawn.level[there] < 1))
    return labels, photons


def overlap(region: Region, origin: tuple[int, ...], extent: tuple[int, ...]) -> tuple[Region, Region] | None:
    """Return what a box and `region` share, in coordinates of the region and of the box; None if nothing."""
    here, there = [], []
    for part, first, n in zip(region, origin, extent, strict=True):
        start, stop = max(part.start, first), min(part.stop, first + n)
        if start >= stop:
            return None
        here.append(slice(start - part.start, stop - part.start))
        there.append(slice(start - first, stop - first))
    return tuple(here), tuple(there)


def offsets(origin: tuple[int, ...], extent: tuple[int, ...], centre: Any) -> list[FloatArray]:
    """Return how far the voxels of a box lie from `centre` along each axis (float32), to be broadcast."""
    # Subtracted in float64: in a large volume coordinates have no digits left for the fraction of a voxel.
    return [
        (np.arange(first, first + n) - c)
        .astype(np.float32)
        .reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (first, n, c) in enumerate(zip(origin, extent, centre, strict=True))
    ]

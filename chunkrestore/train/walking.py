"""Walking through stored volumes block by block: numbers of the whole, what shows, patches.

Blocks are whole chunks of about four million voxels, and one is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore import statistics
from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.ome_zarr import RegionReader

Seen: TypeAlias = Callable[[Slices, npt.NDArray[Any]], None]
"""Is shown every block once: where it lies, and its voxels."""

IntArray: TypeAlias = npt.NDArray[np.int64]

_MOST_VOXELS = 2**22


@dataclass(frozen=True)
class Plane:
    """One time point and channel of a stored array."""

    reader: RegionReader
    t: int
    c: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per spatial axis."""
        return self.reader.spatial_shape

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.reader.name} (time point {self.t}, channel {self.c})"

    def read(self, region: Slices) -> npt.NDArray[Any]:
        """Return the voxels of a region."""
        return self.reader.read(self.t, self.c, region)

    def describe(self) -> dict[str, Any]:
        """Return what identifies it, as JSON."""
        return self.reader.identity() | {"timepoint": self.t, "channel": self.c}


def blocks(plane: Plane, unit: Sequence[int], block_shape: Sequence[int] | None = None) -> Iterator[Slices]:
    """Yield the blocks that a plane is read in: `block_shape`, by default whole chunks, in multiples of `unit`."""
    wanted = block_shape if block_shape is not None else _default_block(plane, unit)
    whole = [min(-(-int(b) // u) * u, n) for b, u, n in zip(wanted, unit, plane.shape, strict=True)]
    for block in BlockGrid.regular(plane.shape, whole):
        yield block.core


def survey(
    plane: Plane, needs: Sequence[float], block_shape: Sequence[int] | None = None
) -> dict[float | str, float]:
    """Return percentiles of a whole plane; integers are read once, floats twice (`chunkrestore.statistics`).

    Raises
    ------
    chunkrestore.statistics.NonFiniteError
        If a voxel is NaN or infinite; the message tells where.
    """
    unit = (1,) * len(plane.shape)
    summary: statistics.Summary | None = None
    for region in blocks(plane, unit, block_shape):
        voxels = plane.read(region)
        try:
            part = statistics.summarize(voxels)
        except statistics.NonFiniteError:
            raise _not_finite(plane, region, voxels) from None
        summary = part if summary is None else statistics.merge((summary, part))
    assert summary is not None
    wanted = statistics.refinement(summary, needs)
    if wanted is None:
        return statistics.values(summary, needs)
    refined = sum(
        statistics.refine(plane.read(region), wanted) for region in blocks(plane, unit, block_shape)
    )
    return statistics.values(summary, needs, wanted, np.asarray(refined))


def look(plane: Plane, seen: Seen, unit: Sequence[int], block_shape: Sequence[int] | None = None) -> None:
    """Show every block of a plane to `seen`; blocks begin on multiples of `unit`."""
    for region in blocks(plane, unit, block_shape):
        seen(region, plane.read(region))


def gather(
    plane: Plane,
    start: IntArray,
    out: npt.NDArray[Any],
    convert: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    block_shape: Sequence[int] | None = None,
) -> None:
    """Cut patches out of a plane: ``out[i] = convert(plane[start[i] : start[i] + patch_shape])``.

    Blocks that hold a part of a patch are read once, as far as patches reach, the others not at all.

    Parameters
    ----------
    plane
        What is read.
    start
        (n, n_axes): first voxel of each patch.
    out
        (n, *patch_shape); filled.
    convert
        Maps voxels to what is stored, one by one.
    block_shape
        Blocks to read; whole chunks by default.
    """
    stop = start + np.array(out.shape[1:])
    for region in blocks(plane, (1,) * len(plane.shape), block_shape):
        low, high = np.array([r.start for r in region]), np.array([r.stop for r in region])
        inside = np.flatnonzero(((start < high) & (stop > low)).all(axis=1))
        if not len(inside):
            continue
        first = np.maximum(start[inside].min(axis=0), low)
        last = np.minimum(stop[inside].max(axis=0), high)
        voxels = convert(plane.read(tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))))
        for i in inside:
            a, b = np.maximum(start[i], first), np.minimum(stop[i], last)
            out[i][_slices(a - start[i], b - start[i])] = voxels[_slices(a - first, b - first)]


def _slices(first: IntArray, last: IntArray) -> Slices:
    return tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))


def _default_block(plane: Plane, unit: Sequence[int]) -> tuple[int, ...]:
    """Return whole chunks of at most about `_MOST_VOXELS`, grown along the shortest axis first."""
    chunks = [-(-c // u) * u for c, u in zip(plane.reader.spatial_chunks, unit, strict=True)]
    block = [min(c, n) for c, n in zip(chunks, plane.shape, strict=True)]
    while True:
        longer = [
            (block[axis], axis, min(block[axis] + chunks[axis], n))
            for axis, n in enumerate(plane.shape)
            if block[axis] < n
        ]
        fitting = [step for step in longer if math.prod(block) // step[0] * step[2] <= _MOST_VOXELS]
        if not fitting:
            return tuple(block)
        _, axis, length = min(fitting)
        block[axis] = length


def _not_finite(plane: Plane, region: Slices, voxels: npt.NDArray[Any]) -> statistics.NonFiniteError:
    bad = np.argwhere(~np.isfinite(voxels))
    place = [int(k) + r.start for k, r in zip(bad[0], region, strict=True)]
    return statistics.NonFiniteError(
        f"{plane.name}: voxel {place} is NaN or infinite, and {len(bad) - 1} others in the same block; replace them "
        "first"
    )

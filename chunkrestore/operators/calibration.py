"""The least halo that keeps seams below the tolerance, measured on the image itself.

The default halo of a deconvolution is an envelope over many point spread functions and scenes. Here a pilot
region is deconvolved whole, as if it were the volume, and once more from the part that a block which ends
in its middle would read; the depth grows until both agree next to that cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Slices
from chunkrestore.operators.base import ImageOperator, numbers_of
from chunkrestore.operators.pilot import PILOT_LENGTHS, Read, pilot_regions
from chunkrestore.statistics import of_array

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)
"""Depths that are tried, relative to the default."""
_MARGIN = 0.5
"""Part of the tolerance that a pilot may use: other places of the volume may be worse."""
_RANGE = (0.1, 99.9)
_LEAST_CORE = 32


@dataclass(frozen=True)
class Calibration:
    """The depth that was found, and what was measured with it."""

    depth: tuple[int, ...]
    """Voxels per axis."""
    default_depth: tuple[int, ...]
    """What the operator would have taken."""
    seam: tuple[float | None, ...]
    """Per axis, the root mean square seam on the worst plane next to a cut, relative to the dynamic range;
    None where the volume is too short for blocks to meet."""
    regions: tuple[Slices, ...]
    """Where it was measured."""

    def describe(self) -> dict[str, Any]:
        """Return this as JSON-compatible values."""
        return {
            "depth": list(self.depth),
            "default_depth": list(self.default_depth),
            "seam_rms": [None if s is None else float(f"{s:.3g}") for s in self.seam],
            "regions": [[[s.start, s.stop] for s in region] for region in self.regions],
        }


def calibrate(operator: ImageOperator, read: Read, shape: Sequence[int]) -> Calibration:
    """Return the least depth whose measured seam is at most half of the operator's tolerance.

    Parameters
    ----------
    operator
        With a `tolerance` and a `depth`; data-dependent numbers are decided on the pilot region.
    read
        Returns the voxels of a region of the volume.
    shape
        Of the volume.

    Raises
    ------
    ValueError
        If the operator makes no seams, or no depth that was tried is deep enough.
    """
    if not hasattr(operator, "tolerance"):
        raise ValueError(
            f"`calibrate` has nothing to do: {getattr(operator, 'name', operator)} is exact with its own halo"
        )
    default = replace(operator, depth=None).halo(shape).depth  # type: ignore[type-var]
    centre = [(s.start + s.stop) // 2 for s in pilot_regions(read, shape)[0]]
    depths: list[int] = []
    seams: list[float | None] = []
    regions: list[Slices] = []
    for axis, n in enumerate(shape):
        if default[axis] == 0 or n < 2 * _LEAST_CORE:
            depths.append(default[axis])
            seams.append(None)
            continue
        region = _region_around(centre, shape, axis, default[axis])
        depth, seam = _axis_depth(operator, read(region), axis, default)
        depths.append(depth)
        seams.append(seam)
        regions.append(region)
    return Calibration(tuple(depths), tuple(default), tuple(seams), tuple(regions))


def _region_around(centre: Sequence[int], shape: Sequence[int], axis: int, depth: int) -> Slices:
    """Return a region that is long enough along `axis` for a cut in its middle with the deepest halo."""
    lengths = list(PILOT_LENGTHS[len(shape)])
    lengths[axis] = max(lengths[axis], 2 * (math.ceil(_SHARES[-1] * depth) + _LEAST_CORE))
    return tuple(
        slice(start := min(max(c - length // 2, 0), max(n - length, 0)), min(start + length, n))
        for c, length, n in zip(centre, lengths, shape, strict=True)
    )


def _axis_depth(operator: Any, image: Any, axis: int, default: Sequence[int]) -> tuple[int, float]:
    shape = tuple(image.shape)
    numbers = numbers_of(operator, lambda needs: of_array(image, needs), lambda region: image[region], shape)
    resolved = operator.resolve(numbers)
    whole = Block.whole(shape)
    reference = to_numpy(resolved(image, whole)).astype(np.float64)
    low, high = np.percentile(reference, _RANGE)
    scale = float(high - low) or 1.0
    middle = shape[axis] // 2
    measured = math.inf
    for depth in sorted({math.ceil(share * default[axis]) for share in _SHARES}):
        if middle + depth >= shape[axis]:
            break
        block = _cut(whole, axis, middle, depth)
        part = to_numpy(resolved(image[block.read], block))[block.trim]
        squares = np.square(part - reference[block.core])
        planes = np.moveaxis(squares, axis, 0)[-2:]
        measured = math.sqrt(max(float(plane.mean()) for plane in planes)) / scale
        if measured <= _MARGIN * operator.tolerance:
            return depth, measured
    raise ValueError(
        f"`calibrate` found no depth along axis {axis} that keeps seams below {_MARGIN * operator.tolerance:g} "
        f"of the dynamic range: the deepest that was tried leaves {measured:.2g}; give `depth`, use fewer "
        "`iterations`, or a larger `tolerance`"
    )


def _cut(whole: Block, axis: int, middle: int, depth: int) -> Block:
    """Return the block that ends at `middle` along one axis and reads `depth` voxels beyond."""
    core, read = list(whole.core), list(whole.read)
    core[axis], read[axis] = slice(0, middle), slice(0, middle + depth)
    return Block(tuple(core), tuple(read), whole.volume_shape, whole.index)

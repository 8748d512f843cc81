"""The part of a stored image that a job works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from chunkrestore.grid import Slices


class Readable(Protocol):
    """A stored array that can be read by region, from any process."""

    def read(self, t: int, c: int, region: Slices) -> np.ndarray:
        """Return the spatial region of one time point and channel."""


@dataclass(frozen=True)
class Selection:
    """Time points, channels and region of one level, as seen from the job: all counted from 0."""

    source: Readable
    """Where to read."""
    timepoints: tuple[int, ...]
    """Time points of the source, in the job's order."""
    channels: tuple[int, ...]
    """Channels of the source, in the job's order."""
    region: Slices
    """Spatial region of the source; its border is the volume's border for the job."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape of the region."""
        return tuple(s.stop - s.start for s in self.region)

    def read(self, t: int, c: int, region: Slices) -> np.ndarray:
        """Return a region, in the job's coordinates, of one time point and channel."""
        inside = tuple(
            slice(r.start + own.start, r.stop + own.start) for r, own in zip(region, self.region, strict=True)
        )
        return self.source.read(self.timepoints[t], self.channels[c], inside)


def select_region(region: Sequence[tuple[int, int] | slice] | None, shape: Sequence[int]) -> Slices:
    """Return `region` as slices within `shape`; everything if it is None.

    Raises
    ------
    ValueError
        If the region has the wrong number of axes, is empty, or leaves the volume.
    """
    if region is None:
        return tuple(slice(0, n) for n in shape)
    if len(region) != len(shape):
        raise ValueError(f"`region` has {len(region)} axes, the image has {len(shape)}")
    slices = []
    for axis, (part, n) in enumerate(zip(region, shape, strict=True)):
        start, stop, step = part.indices(n) if isinstance(part, slice) else (*part, 1)
        if not 0 <= start < stop <= n or step != 1:
            raise ValueError(f"`region` {start}:{stop} on axis {axis} must be a range within 0:{n}")
        slices.append(slice(start, stop))
    return tuple(slices)


def plain(value: Any) -> Any:
    """Return slices as lists, for JSON."""
    return [[s.start, s.stop] for s in value]

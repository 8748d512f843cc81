"""Cells of a volume: what image metrics are computed on, so that block grids do not show in them.

A cell depends on the volume's shape alone. It belongs to the block whose core holds its first voxel, which reads it
whole; arrays that a cell is computed from have the same shape whichever block it is, so its numbers have the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from chunkrestore.grid import Slices

_LENGTH = {2: 512, 3: 64}
"""Voxels per axis of a cell that is added up, by number of axes."""
_WINDOW = {2: 512, 3: 128}
"""Voxels per axis of a cell that is transformed."""


@dataclass(frozen=True)
class Cells:
    """Cells of a volume, in raster order."""

    shape: tuple[int, ...]
    """Of the volume."""
    bounds: tuple[tuple[tuple[int, int], ...], ...]
    """Start and stop of the cells along each axis, by rising start."""
    reach: int = 0
    """Voxels around a cell that are read with it, where the volume has them."""

    @classmethod
    def partition(cls, shape: Sequence[int], reach: int = 0, border: int = 0) -> Self:
        """Cut a volume into cells of 64 (in 2-D 512) voxels per axis, without `border` voxels at each end."""
        length = _LENGTH[len(shape)]
        bounds = tuple(
            tuple(
                (max(start, border), min(start + length, n - border))
                for start in range(0, n, length)
                if max(start, border) < min(start + length, n - border)
            )
            for n in shape
        )
        return cls(tuple(shape), bounds, reach)

    @classmethod
    def windows(cls, shape: Sequence[int]) -> Self:
        """Cover a volume by cells of one shape, 128 (512) voxels per axis, that overlap by half at least.

        The whole volume is one cell along axes that are not longer than that.
        """
        return cls(tuple(shape), tuple(_overlapping(n, _WINDOW[len(shape)]) for n in shape))

    def __iter__(self) -> Iterator[Slices]:
        return self.beginning_in(tuple(slice(0, n) for n in self.shape))

    def __len__(self) -> int:
        n = 1
        for of_axis in self.bounds:
            n *= len(of_axis)
        return n

    @property
    def window_shape(self) -> tuple[int, ...]:
        """Shape of the first cell; of windows, that of all."""
        return tuple(of_axis[0][1] - of_axis[0][0] for of_axis in self.bounds)

    def beginning_in(self, region: Slices) -> Iterator[Slices]:
        """Yield the cells whose first voxel lies in `region`."""
        chosen = [
            [slice(*b) for b in of_axis if part.start <= b[0] < part.stop]
            for of_axis, part in zip(self.bounds, region, strict=True)
        ]
        yield from itertools.product(*chosen)

    def around(self, cell: Slices) -> Slices:
        """Return what is read for a cell."""
        return tuple(
            slice(max(c.start - self.reach, 0), min(c.stop + self.reach, n))
            for c, n in zip(cell, self.shape, strict=True)
        )

    def read_for(self, region: Slices) -> Slices | None:
        """Return the box around everything that the cells beginning in `region` read; None if none begins there."""
        cells = [self.around(cell) for cell in self.beginning_in(region)]
        if not cells:
            return None
        return tuple(
            slice(min(cell[k].start for cell in cells), max(cell[k].stop for cell in cells))
            for k in range(len(self.shape))
        )


def within(cell: Slices, read: Slices) -> Slices:
    """Return `cell` in the coordinates of what was read."""
    return tuple(slice(c.start - r.start, c.stop - r.start) for c, r in zip(cell, read, strict=True))


def _overlapping(n: int, length: int) -> tuple[tuple[int, int], ...]:
    if n <= length:
        return ((0, n),)
    starts = [*range(0, n - length, length // 2), n - length]
    return tuple((start, start + length) for start in starts)

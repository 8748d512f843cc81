"""Small picklable handles on an array that is being written, for tasks that own a region of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader, region_text


@dataclass(frozen=True)
class RegionWriter(RegionReader):
    """An array that this package created, written in whole chunks or shards only."""

    _mode: ClassVar[str] = "r+"

    def write(self, t: int, c: int, slices: Slices, array: np.ndarray) -> None:
        """Write one region of one time point and channel, replacing whatever was stored there.

        The old chunk files are removed first: a damaged shard could not be overwritten otherwise, and
        nothing is ever read back.

        Parameters
        ----------
        t, c
            Index of the time point and channel; 0 where the array has no such axis.
        slices
            One per spatial axis; borders must lie on multiples of `write_unit` or on the array's end, so
            that no two tasks ever write one file.
        array
            Same shape as `slices`, of a dtype that the array's dtype can hold without loss.

        Raises
        ------
        ValueError
            If the region, shape or dtype does not fit.
        """
        region = self._region(t, c, slices)
        self._check_borders(slices)
        shape = tuple(s.stop - s.start for s in slices)
        if array.shape != shape:
            raise ValueError(f"`array` of shape {array.shape} does not fill `slices` {region_text(slices)}")
        if not np.can_cast(array.dtype, self.dtype, "safe"):
            raise ValueError(
                f"`array` of {array.dtype} would lose values in {self.name} of {self.dtype}; cast it"
            )
        target = self.open()
        units = (
            range(s.start // u, math.ceil(s.stop / u)) for s, u in zip(region, self.write_unit, strict=True)
        )
        keys = [target.metadata.encode_chunk_key(index) for index in itertools.product(*units)]
        stores.remove_keys(self.name, keys)
        target[region] = array.reshape(tuple(s.stop - s.start for s in region))

    def _check_borders(self, slices: Slices) -> None:
        for axis, s, unit, n in zip(
            self.spatial_axes, slices, self.spatial_write_unit, self.spatial_shape, strict=True
        ):
            if s.start % unit or (s.stop % unit and s.stop != n):
                raise ValueError(
                    f"`slices` {region_text(slices)} cuts a chunk or shard of {self.name}: on axis {axis} "
                    f"borders must be multiples of {unit} or the end {n}"
                )

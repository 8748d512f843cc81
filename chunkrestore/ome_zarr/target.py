"""Small picklable handles on an array that is being written, for tasks that own a region of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.damage import region_text
from chunkrestore.ome_zarr.metadata import OWN_KEY


@dataclass(frozen=True)
class RegionWriter(RegionReader):
    """An array that this package created, written in whole chunks or shards only."""

    _mode: ClassVar[str] = "r+"

    token: str = ""
    """Random, in the attributes of the group for as long as it is written; empty for an array of any other kind."""

    def write(self, t: int, c: int, slices: Slices, array: np.ndarray) -> None:
        """Write one region of one time point and channel, replacing whatever was stored there.

        Nothing is read back, so a damaged chunk or shard is replaced like any other, and each of them at once:
        a reader sees the old one or the new one.

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
            If the region, shape or dtype does not fit, or the group is no longer the one that this handle was
            made for: a task of a driver that was killed must not write into what another has begun since.
        OSError
            If it cannot be written; `ConnectionError` and `TimeoutError` if trying again can help.
        """
        from chunkrestore.ome_zarr.chunk_store import replacing

        region = self._region(t, c, slices)
        self._check_borders(slices)
        shape = tuple(s.stop - s.start for s in slices)
        if array.shape != shape:
            raise ValueError(f"`array` of shape {array.shape} does not fill `slices` {region_text(slices)}")
        if not np.can_cast(array.dtype, self.dtype, "safe"):
            raise ValueError(
                f"`array` of {array.dtype} would lose values in {self.name} of {self.dtype}; cast it"
            )
        self._check_token()
        array = array.reshape(tuple(s.stop - s.start for s in region))
        # What this package creates is in the order of `axes`; levels that it adds to another image may not be.
        as_stored = sorted(range(self.ndim), key=self.order.__getitem__)
        region, array = tuple(region[i] for i in as_stored), array.transpose(as_stored)
        opened = self._opened()
        if opened.direct is not None:
            opened.direct.write(region, array)
            return
        with replacing(opened.array) as target:
            target[region] = array

    def _check_token(self) -> None:
        if not self.token:
            return
        node = stores.read_node(self.store)
        own = node.attributes.get(OWN_KEY) if node is not None else None
        if not isinstance(own, dict) or own.get("token") != self.token:
            raise ValueError(
                f"{self.store} was finished or begun anew by another job; nothing was written to it"
            )

    def _check_borders(self, slices: Slices) -> None:
        for axis, s, unit, n in zip(
            self.spatial_axes, slices, self.spatial_write_unit, self.spatial_shape, strict=True
        ):
            if s.start % unit or (s.stop % unit and s.stop != n):
                raise ValueError(
                    f"`slices` {region_text(slices)} cuts a chunk or shard of {self.name}: on axis {axis} "
                    f"borders must be multiples of {unit} or the end {n}"
                )

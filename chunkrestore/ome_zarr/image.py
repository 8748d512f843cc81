"""An opened OME-Zarr image, and parts of it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.channels import pick_channels
from chunkrestore.ome_zarr.store import Json

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True)
class Level:
    """One resolution of an image."""

    reader: RegionReader
    """Handle on the array."""
    voxel_size: tuple[float, ...]
    """Micrometres per spatial axis."""
    translation: tuple[float, ...]
    """Position of the centre of the first voxel in micrometres, per spatial axis."""

    @property
    def path(self) -> str:
        """Path of the array inside the image."""
        return self.reader.array_path

    @property
    def shape(self) -> tuple[int, ...]:
        """Length per axis."""
        return self.reader.shape


@dataclass(frozen=True, repr=False)
class OmeZarrImage:
    """An OME-Zarr image (or labels), opened from its metadata; voxels are read when asked for.

    Axes come in the order ``tczyx`` whatever their order in the store.
    """

    path: str
    """Path of the group."""
    version: str
    """OME-Zarr version of the group, or ``""`` for a plain zarr array with axes given by hand."""
    axes: str
    """Letters of ``tczyx``, one per axis."""
    levels: tuple[Level, ...]
    """Resolutions, finest first."""
    channels: tuple[str, ...]
    """One name per channel; an unnamed channel is called by its index."""
    labels: tuple[str, ...]
    """Names in the ``labels`` group."""
    calibrated: bool
    """Whether the voxel size has a unit. Without one, numbers are taken as micrometres (1.0 if missing)."""
    is_labels: bool
    """Whether the group is an NGFF label image."""
    ome: Json = field(repr=False, compare=False)
    """The OME attributes as on disk (``multiscales``, ``omero``, ...), cut to the selection."""
    others: Json = field(repr=False, compare=False)
    """The other attributes of the group."""
    opened_with: Json = field(default_factory=dict, repr=False, compare=False)
    """What was said by hand when it was opened (axes, voxel size, ...): who opens it again says the same."""

    def __repr__(self) -> str:
        levels = f"{len(self.levels)} level" + "s" * (len(self.levels) != 1)
        return f"<OmeZarrImage {self.path} {self.axes} {self.shape} {self.dtype}, {levels}>"

    @property
    def attributes(self) -> Json:
        """All attributes of the group, in the layout of its version."""
        return metadata.unite(self.ome, self.others, self.version or "0.5")

    @property
    def shape(self) -> tuple[int, ...]:
        """Length per axis of level 0."""
        return self.levels[0].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.levels[0].reader.dtype

    @property
    def voxel_size(self) -> tuple[float, ...]:
        """Micrometres per spatial axis (z, y, x or y, x) of level 0."""
        return self.levels[0].voxel_size

    @property
    def translation(self) -> tuple[float, ...]:
        """Micrometres per spatial axis from the origin to the centre of the first voxel of level 0."""
        return self.levels[0].translation

    @property
    def spatial_axes(self) -> str:
        """``zyx`` or ``yx``."""
        return metadata.spatial(self.axes)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Shape of one volume of level 0."""
        return self.levels[0].reader.spatial_shape

    @property
    def n_t(self) -> int:
        """Number of time points; 1 without a ``t`` axis."""
        return self.levels[0].reader.n_t

    @property
    def n_c(self) -> int:
        """Number of channels; 1 without a ``c`` axis."""
        return self.levels[0].reader.n_c

    @cached_property
    def data(self) -> da.Array:
        """Level 0 as a lazy dask array, in chunks that are whole chunks or shards of the store."""
        return self.level(0)

    def level(self, k: int, chunks: Any = None) -> da.Array:
        """Return level `k` as a lazy dask array.

        Parameters
        ----------
        k
            Level, 0 the finest.
        chunks
            As in dask, per axis; by default the shards of the store, or its chunks where it has none.
            Reading at the block size is cheaper than rechunking later.

        Raises
        ------
        ValueError
            If there is no such level.
        """
        import dask.array as da

        reader = self.source(k)
        meta = np.empty((0,) * reader.ndim, reader.dtype)
        return da.from_array(reader, chunks or reader.write_unit, fancy=False, asarray=False, meta=meta)

    def source(self, level: int = 0) -> RegionReader:
        """Return a small picklable handle on a level, for tasks that read regions.

        Raises
        ------
        ValueError
            If there is no such level.
        """
        return self._level(level).reader

    def label(self, name: str) -> OmeZarrImage:
        """Open the labels called `name`.

        Raises
        ------
        ValueError
            If there are none.
        """
        if name not in self.labels:
            raise ValueError(f"label {name!r} does not exist in {self.path}; it has {_listed(self.labels)}")
        from chunkrestore.ome_zarr.read import open_label

        return open_label(self.path, name)

    def select(
        self,
        *,
        level: int = 0,
        t: int | Sequence[int] | None = None,
        c: str | int | Sequence[str | int] | None = None,
        region: Slices | None = None,
    ) -> OmeZarrImage:
        """Return a part of the image with its metadata cut to match; no axis is dropped.

        Parameters
        ----------
        level
            Level that becomes level 0.
        t, c
            Time points and channels (name or index) to keep, in that order; all by default.
        region
            One slice per spatial axis in voxels of `level`, with step 1. A region has one level only.

        Raises
        ------
        ValueError
            If a level, time point or channel does not exist, or the region is empty or leaves the volume.
        """
        first = self._level(level).reader
        picks: dict[str, Any] = {}
        if t is not None:
            picks["t"] = tuple(_index("time point", i, self.n_t, self.path) for i in _as_sequence(t))
        if c is not None:
            picks["c"] = tuple(select_channel(self, i) for i in _as_sequence(c))
        if region is not None:
            picks |= _region_picks(region, self.spatial_axes, first.spatial_shape, self.path)
        levels = self.levels[level : level + 1] if region is not None else self.levels[level:]
        return _cut(self, levels, picks)

    def resampled(self, scale: float | Sequence[float], *, dtype: str | None = None) -> OmeZarrImage:
        """Return the image at another sampling, interpolated linearly where it is read.

        Every region has the bits of ``scipy.ndimage.zoom(volume, scale, order=1)`` of the whole volume: an axis of n
        voxels gets ``m = round(n * scale)``, first and last at the centres of the first and last voxel. So voxels are
        ``(n - 1) / (m - 1)`` times as far apart, a little less than ``1 / scale``, and the position of the first one
        stays; voxel size and translation say so.

        Parameters
        ----------
        scale
            New voxels per voxel, for all spatial axes or each of them: ``(4, 1, 1)`` for four planes per plane.
        dtype
            ``"float32"`` keeps what integers would round; by default that of the image, halves rounded away from 0.

        Returns
        -------
        OmeZarrImage
            With one level and without labels, which lie on the stored voxels. What is selected before counts as
            the whole volume.

        Raises
        ------
        ValueError
            If `scale` does not suit the shape, or the image holds labels or is resampled already.
        """
        from chunkrestore.ome_zarr.resampled import resampled

        return resampled(self, scale, dtype=dtype)

    def _level(self, k: int) -> Level:
        return self.levels[_index("level", k, len(self.levels), self.path)]


def select_channel(image: OmeZarrImage, channel: str | int) -> int:
    """Return the index of a channel given by name or index (an integer, or its digits).

    Raises
    ------
    ValueError
        If there is no such channel, listing what exists, or if two channels share the name.
    """
    if isinstance(channel, str) and channel in image.channels:
        if image.channels.count(channel) > 1:
            raise ValueError(f"channel {channel!r} of {image.path} is not unique; give its index")
        return image.channels.index(channel)
    known = ", ".join(f"{i} {name!r}" for i, name in enumerate(image.channels))
    if isinstance(channel, str) and not channel.isdecimal():
        raise ValueError(f"channel {channel!r} does not exist in {image.path}; it has {known}")
    if not 0 <= int(channel) < image.n_c:
        raise ValueError(f"channel {channel} does not exist in {image.path}; it has {known}")
    return int(channel)


def _cut(image: OmeZarrImage, levels: tuple[Level, ...], picks: dict[str, Any]) -> OmeZarrImage:
    """Return `image` with only `levels` and, per axis, the indices `picks`."""
    ome = copy.deepcopy(image.ome)
    first = levels[0].reader
    start = image.levels.index(levels[0])
    ome["multiscales"][0]["datasets"] = ome["multiscales"][0]["datasets"][start : start + len(levels)]
    if "c" in picks:
        ome = pick_channels(ome, picks["c"])
    origin = [picks[axis][0] if axis in picks and axis != "c" else 0 for axis in image.axes]
    if any(origin):
        stored = [0] * len(origin)
        for position, value in zip(first.order, origin, strict=True):
            stored[position] = value
        ome["multiscales"][0] = metadata.moved(ome["multiscales"][0], stored)
    shift = origin[-len(image.spatial_axes) :]
    cut = tuple(
        Level(
            _picked(level.reader, picks),
            level.voxel_size,
            tuple(t + s * o for t, s, o in zip(level.translation, level.voxel_size, shift, strict=True)),
        )
        for level in levels
    )
    channels = tuple(image.channels[i] for i in picks["c"]) if "c" in picks else image.channels
    return replace(image, levels=cut, channels=channels, ome=ome)


def _region_picks(region: Slices, axes: str, shape: Sequence[int], path: str) -> dict[str, range]:
    """Return the indices of `region` per axis."""
    if len(region) != len(axes):
        raise ValueError(f"`region` must have one slice per axis {axes!r} of {path}, got {len(region)}")
    picks = {}
    for axis, s, n in zip(axes, region, shape, strict=True):
        picks[axis] = range(n)[s]
        if s.step not in (None, 1) or not picks[axis] or (s.stop or 0) > n:
            raise ValueError(
                f"`region` {s.start}:{s.stop} on axis {axis!r} is empty or leaves 0:{n} of {path}"
            )
    return picks


def _picked(reader: RegionReader, picks: dict[str, Any]) -> RegionReader:
    """Return `reader` restricted to the given indices per axis."""
    chosen = []
    for axis, stored in zip(reader.axes, reader.picks, strict=True):
        pick = picks.get(axis, range(len(stored)))
        if not isinstance(pick, range) and tuple(pick) == tuple(range(pick[0], pick[0] + len(pick))):
            pick = range(pick[0], pick[0] + len(pick))
        is_range = isinstance(pick, range)
        chosen.append(stored[pick.start : pick.stop] if is_range else tuple(stored[i] for i in pick))
    return replace(reader, picks=tuple(chosen))


def _as_sequence(value: Any) -> Sequence[Any]:
    values = (value,) if isinstance(value, str | int | np.integer) else tuple(value)
    if not values:
        raise ValueError("a selection of time points or channels must not be empty")
    return values


def _index(what: str, i: Any, n: int, path: str) -> int:
    if not 0 <= operator.index(i) < n:
        raise ValueError(f"{what} {i} does not exist in {path}; it has {n}: 0 to {n - 1}")
    return operator.index(i)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names) or "none"

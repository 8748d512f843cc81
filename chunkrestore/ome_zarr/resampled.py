"""Stored images seen at another sampling: voxels are interpolated where they are read.

A reader with the interface of `RegionReader` wraps the one of the stored image, so jobs, plans, statistics and
pyramids work on it as on any image, and every region has the bits of the whole resampled volume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.kernels.resample import checked_resampling, resample, steps
from chunkrestore.kernels.rescale import Rescaling
from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr.arrays import RegionReader, check_dtype
from chunkrestore.ome_zarr.image import Level, OmeZarrImage
from chunkrestore.ome_zarr.store import Json


@dataclass(frozen=True)
class ResampledReader(RegionReader):
    """An array at another sampling; `picks` count voxels of the new lattice, `chunks` are those read for one."""

    original: RegionReader
    """What is interpolated."""
    scale: tuple[float, ...]
    """New voxels per stored one and spatial axis."""

    @cached_property
    def lattice(self) -> Rescaling:
        """The new lattice of the whole volume."""
        return checked_resampling(self.original.spatial_shape, self.scale)

    @property
    def name(self) -> str:
        """Path of the array, for messages."""
        return self.original.name

    def identity(self) -> dict[str, Any]:
        """Return what identifies the array, the selection and the sampling, as JSON-compatible values."""
        told = {"scale": list(self.scale), "of": self.original.identity()}
        return super().identity() | {"resampled": told}

    def open(self) -> NoReturn:
        """What is interpolated is stored nowhere."""
        raise TypeError(f"{self.name}, resampled, is no zarr array; read it with `read`, or through `data`")

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        told = self.scale, self.dtype.name, str(self.picks)
        return type(self).__name__, self.original.__dask_tokenize__(), *told

    def _fetch(self, selection: tuple[Any, ...]) -> np.ndarray:
        """Return a selection; `order` is that of the axes."""
        n_lead = self.ndim - len(self.scale)
        chosen = [np.arange(s.start, s.stop, s.step) if isinstance(s, slice) else s for s in selection]
        # A selection with steps is cut out of the region around it.
        points = tuple(slice(int(i.min()), int(i.max()) + 1) for i in chosen[n_lead:])
        places = np.ix_(*(i - p.start for i, p in zip(chosen[n_lead:], points, strict=True)))
        volumes = [self._volume(lead, points)[places] for lead in itertools.product(*chosen[:n_lead])]
        return np.stack(volumes).reshape(tuple(map(len, chosen)))

    def _volume(self, lead: tuple[Any, ...], points: Slices) -> np.ndarray:
        """Return a region of one time point and channel."""
        place = dict(zip(self.axes, map(int, lead), strict=False))
        region = self.lattice.source(points)
        stored = self.original.read(place.get("t", 0), place.get("c", 0), region)
        return resample(stored, self.lattice, region, points, self.dtype)


def resampled(
    image: OmeZarrImage, scale: float | Sequence[float], *, dtype: str | None = None
) -> OmeZarrImage:
    """Return an image at another sampling; see `OmeZarrImage.resampled`."""
    if image.is_labels:
        raise ValueError(f"{image.path} holds labels, of which no value is a mean; resample its image")
    if "resampled" in image.opened_with:
        raise ValueError(f"{image.path} is resampled already; open it again and give the product as `scale`")
    first = image.levels[0]
    original = first.reader
    kind = check_dtype(image.dtype if dtype is None else dtype, image.path)
    if kind not in (check_dtype(image.dtype, image.path), np.dtype(np.float32)):
        raise ValueError(f"`dtype` {kind} must be that of {image.path}, {image.dtype}, or float32")
    lattice = checked_resampling(original.spatial_shape, scale)
    reader = _reader(original, lattice, kind)
    multiscale = _multiscale(image, lattice)
    geometry = metadata.geometry(multiscale, reader.axes, 0, image.path)
    told = _told(original, len(image.levels) == 1) | {"scale": list(lattice.scale)}
    if dtype is not None:
        told["dtype"] = kind.name
    return replace(
        image,
        levels=(Level(reader, *geometry),),
        labels=(),  # they lie on the stored lattice
        ome=image.ome | {"multiscales": [multiscale, *image.ome["multiscales"][1:]]},
        opened_with=image.opened_with | {"resampled": told},
    )


def resampled_again(image: OmeZarrImage, told: Mapping[str, Any]) -> OmeZarrImage:
    """Return a freshly opened image resampled as ``opened_with["resampled"]`` of another one tells.

    Raises
    ------
    ValueError
        If it has no such level, time point, channel or region any more.
    """
    paths = [level.path for level in image.levels]
    if told["array"] not in paths:
        raise ValueError(f"{image.path} has no level {told['array']!r} any more; restore it from a copy")
    region = told["region"]
    part = image.select(
        level=paths.index(told["array"]),
        t=told["t"],
        c=told["c"],
        region=None if region is None else tuple(slice(*bounds) for bounds in region),
    )
    return resampled(part, told["scale"], dtype=told.get("dtype"))


def _reader(original: RegionReader, lattice: Rescaling, dtype: np.dtype[Any]) -> ResampledReader:
    n_lead = original.ndim - len(lattice.scale)

    def scaled(lengths: Sequence[int]) -> tuple[int, ...]:
        spatial = zip(lengths[n_lead:], lattice.scale, lattice.zoomed_shape, strict=True)
        return (*lengths[:n_lead], *(max(1, min(math.ceil(n * s), m)) for n, s, m in spatial))

    return ResampledReader(
        store=original.store,
        array_path=original.array_path,
        axes=original.axes,
        dtype=dtype,
        chunks=scaled(original.chunks),
        write_unit=scaled(original.write_unit),
        picks=tuple(map(range, (*original.shape[:n_lead], *lattice.zoomed_shape))),
        order=tuple(range(original.ndim)),
        zarr_format=original.zarr_format,
        digest=original.digest,
        original=original,
        scale=lattice.scale,
    )


def _multiscale(image: OmeZarrImage, lattice: Rescaling) -> Json:
    """Return the multiscale with one level of the new lattice, its axes in the order of the reader's."""
    multiscale = metadata.take_axes(image.ome["multiscales"][0], image.levels[0].reader.order)
    scale, translation = metadata.transform(multiscale, 0, whole=False)
    n_lead = len(scale) - len(lattice.scale)
    scale = [s * f for s, f in zip(scale, (1.0,) * n_lead + steps(lattice), strict=True)]
    base = multiscale["datasets"][0]
    # The first voxel stays where it was.
    multiscale["datasets"] = [metadata.dataset(base["path"], scale, translation, base)]
    return multiscale


def _told(reader: RegionReader, is_cut: bool) -> Json:
    """Return what was selected of the stored array, as JSON-compatible values."""
    picks = dict(zip(reader.axes, reader.picks, strict=True))
    region = [[picks[axis][0], picks[axis][-1] + 1] for axis in reader.spatial_axes]
    return {
        "array": reader.array_path,
        "t": list(picks["t"]) if "t" in picks else None,
        "c": list(picks["c"]) if "c" in picks else None,
        "region": region if is_cut else None,
    }

"""TIFF files as images: the same interface as OME-Zarr, voxels read when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.channels import channel_names
from chunkrestore.ome_zarr.image import Level, OmeZarrImage
from chunkrestore.ome_zarr.limits import check_lengths
from chunkrestore.ome_zarr.read import check_voxel_size
from chunkrestore.ome_zarr.store import Json
from chunkrestore.ome_zarr.tiff.files import opened, read_series, series_of
from chunkrestore.ome_zarr.tiff.metadata import TiffFacts, facts_of
from chunkrestore.ome_zarr.tiff.pages import Stack

_UNIT_VOXELS = 2**22
"""Of what a lazy array takes as one chunk, if what is decoded at once is smaller."""


@dataclass(frozen=True)
class StackReader(RegionReader):
    """A stack of pages, seen as one volume per time point and channel; only what is touched is decoded."""

    def stack(self) -> Stack:
        """Return the pages, found once per process.

        Raises
        ------
        FileNotFoundError
            If they are gone.
        ValueError
            If they have changed since this handle was made.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Path, for messages."""
        return self.store

    def open(self) -> NoReturn:
        """Pages are no zarr array."""
        raise TypeError(f"{self.store} is no zarr array; read it with `read`, or through `OmeZarrImage.data`")

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return type(self).__name__, self.name, self.array_path, self.digest, str(self.picks)

    def _fetch(self, selection: tuple[Any, ...]) -> np.ndarray:
        return self.stack().read(selection)


@dataclass(frozen=True)
class TiffReader(StackReader):
    """One resolution of an image in a TIFF file, or in several that belong together."""

    series: int = 0
    """Which image of the file."""

    def stack(self) -> Stack:
        """Return the pages, found once per process; raises as `StackReader.stack`."""
        return read_series(self.store, self.series, self.digest).levels[int(self.array_path)]


def open_tiff(
    path: str | os.PathLike[str],
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
    series: int | None = None,
) -> OmeZarrImage:
    """Open a TIFF, BigTIFF, OME-TIFF, ImageJ, LSM or Micro-Manager file from its metadata alone.

    Colour samples are channels. The metadata that nothing here understands are in ``others``, so that they are carried
    over to whatever is made of the image.

    Parameters
    ----------
    path
        Path of the file; of an OME-TIFF in several files, any of them that names the others.
    axes
        One letter of ``tczyx`` per axis in the order of the file; from its metadata by default.
    voxel_size
        Micrometres per spatial axis (z, y, x); from its metadata by default.
    channels
        One name per channel; from its metadata by default.
    series
        Which image of a file that holds several, 0 the first.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no TIFF or a damaged one, pages are missing or cannot be decoded, its axes are unknown, or it
        holds several images and `series` does not say which.
    """
    name = stores.location(path)
    with opened(name) as file:
        found = series_of(file, name, series)
        facts = facts_of(file, found.index)
    letters = letters_of(found.letters, axes, found.levels[0].shape, name)
    readers = [
        TiffReader(**handle(name, str(k), stack, letters, found.digest), series=found.index)
        for k, stack in enumerate(found.levels)
    ]
    given = by_hand(axes=axes, voxel_size=voxel_size, channels=channels, series=series)
    return image_of(readers, letters, facts, given)


def letters_of(found: str, axes: str | None, shape: Sequence[int], where: str) -> str:
    """Return one letter of ``tczyx`` per stored axis: those given, else those found, colour samples as channels.

    Raises
    ------
    ValueError
        If there is none, or not one per axis.
    """
    if axes is not None:
        return metadata.check_letters(axes, f"{where}: `axes` {axes!r}", ndim=len(shape))
    if "c" in found and "s" in found:
        raise ValueError(
            f"{where}: axes {found!r} (shape {tuple(shape)}) hold channels of several colour samples each, which are "
            "two axes of channels; write it anew with a plane per channel"
        )
    return metadata.check_letters(
        found.replace("s", "c"), f"{where}: axes {found!r} (shape {tuple(shape)})", ndim=len(shape)
    )


def handle(path: str, level: str, stack: Stack, letters: str, digest: str) -> Json:
    """Return the fields that every handle on a stack of pages has."""
    check_lengths(stack.shape, letters, path)
    order = metadata.canonical_order(letters)
    chunks = stack.chunks
    unit = list(chunks)
    for axis in (letters.index("y"), letters.index("x")):
        n_times = max(1, _UNIT_VOXELS // math.prod(unit))
        unit[axis] = min(stack.shape[axis], unit[axis] * n_times)
    return {
        "store": path,
        "array_path": level,
        "axes": "".join(letters[i] for i in order),
        "dtype": stack.pages.layout.dtype,
        "chunks": tuple(chunks[i] for i in order),
        "write_unit": tuple(unit[i] for i in order),
        "picks": tuple(range(stack.shape[i]) for i in order),
        "order": order,
        "zarr_format": 0,
        "digest": digest,
    }


def by_hand(**arguments: Any) -> Json:
    """Return the arguments of `open_source` that were given, as JSON-compatible values."""
    given = {key: value for key, value in arguments.items() if value is not None}
    for key, kind in (("voxel_size", float), ("channels", str)):
        if key in given:
            given[key] = [kind(v) for v in given[key]]
    return given


def image_of(readers: Sequence[StackReader], letters: str, facts: TiffFacts, given: Json) -> OmeZarrImage:
    """Return the image of which `readers` read the resolutions, finest first.

    Parameters
    ----------
    readers
        At least one.
    letters
        Of the axes as they are stored.
    facts
        What the files say.
    given
        What was said by hand, which counts more.

    Raises
    ------
    ValueError
        If what was said does not fit.
    """
    first = readers[0]
    lengths = dict(facts.lengths)
    if "voxel_size" in given:
        lengths = dict(zip(first.spatial_axes, check_voxel_size(given["voxel_size"], letters), strict=True))
    multiscale = _multiscale(readers, letters, lengths, facts.seconds)
    ome: Json = {"multiscales": [multiscale]}
    if entries := _channels(first, facts, given.get("channels")):
        ome["omero"] = {"channels": entries}
    return OmeZarrImage(
        path=first.store,
        version="",
        axes=first.axes,
        levels=tuple(
            Level(reader, *metadata.geometry(multiscale, letters, k, first.store))
            for k, reader in enumerate(readers)
        ),
        channels=channel_names(ome, first.n_c),
        labels=(),
        calibrated=all(axis in lengths for axis in first.spatial_axes),
        is_labels=False,
        ome=ome,
        others={metadata.OWN_KEY: {"tiff": facts.kept}} if facts.kept else {},
        opened_with=given,
    )


def _multiscale(
    readers: Sequence[StackReader], letters: str, lengths: dict[str, float], seconds: float | None
) -> Json:
    """Return axes and resolutions; an axis whose length is not known has no unit."""
    axes: list[Json] = [{"name": a, "type": metadata.AXIS_TYPES[a]} for a in letters]
    base = [lengths.get(a, 1.0) for a in letters]
    for entry in axes:
        if entry["name"] in lengths:
            entry["unit"] = "micrometer"
    if "t" in letters and seconds is not None:
        base[letters.index("t")] = seconds
        axes[letters.index("t")]["unit"] = "second"
    datasets = []
    for reader in readers:
        factors = [_factor(a, readers[0], reader) for a in letters]
        scale = [b * f for b, f in zip(base, factors, strict=True)]
        # The centre of the first voxel is the centre of what it covers of the full resolution.
        shift = [b * (f - 1) / 2 for b, f in zip(base, factors, strict=True)]
        datasets.append(metadata.dataset(reader.array_path, scale, shift))
    return {"name": Path(readers[0].store).name, "axes": axes, "datasets": datasets}


def _factor(axis: str, finest: StackReader, reader: StackReader) -> float:
    """Return how many voxels of the finest resolution a voxel is long: an integer if lengths allow."""
    i = finest.axes.index(axis)
    n, reduced = finest.shape[i], reader.shape[i]
    whole = max(1, round(n / reduced))
    return float(whole) if reduced in (n // whole, -(-n // whole)) else n / reduced


def _channels(reader: StackReader, facts: TiffFacts, names: Sequence[str] | None) -> list[Json]:
    """Return the entries of ``omero``, none if nothing is known of channels."""
    entries = [dict(e) for e in facts.channels] if len(facts.channels) == reader.n_c else []
    if names is None:
        return entries if any(entries) else []
    if len(names) != reader.n_c or len(set(names)) != reader.n_c:
        raise ValueError(
            f"`channels` {tuple(names)} must hold one unique name for each of the {reader.n_c} channels of "
            f"{reader.store}"
        )
    return [entry | {"label": name} for entry, name in zip(entries or [{}] * len(names), names, strict=True)]

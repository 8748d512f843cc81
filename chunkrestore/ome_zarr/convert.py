"""TIFF stacks to OME-Zarr, slab by slab."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr.arrays import check_dtype
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.metadata import canonical_order, check_letters, in_micrometres, spatial
from chunkrestore.ome_zarr.pyramid import build_pyramid
from chunkrestore.ome_zarr.read import open_image
from chunkrestore.ome_zarr.write import create_image

if TYPE_CHECKING:
    import tifffile

    from chunkrestore.ome_zarr.target import RegionWriter

_SLAB_NBYTES = 2**29


def convert_tiff(
    tiff: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
    series: int = 0,
    **options: Any,
) -> OmeZarrImage:
    """Convert a TIFF, BigTIFF, OME-TIFF or ImageJ stack to OME-Zarr, and open it.

    Planes are read in slabs as thick as a chunk or shard, of at most about half a gigabyte.

    Parameters
    ----------
    tiff
        Path of the file.
    store
        Path of the new store.
    axes
        One letter of ``tczyx`` per axis in the order of the file; from its metadata by default.
    voxel_size
        Micrometres per spatial axis (z, y, x); from OME or ImageJ metadata by default.
    channels
        Names; from OME metadata by default.
    series
        Which image of a file that holds several.
    **options
        `chunks`, `shards`, `levels`, `version`, `compression` and `overwrite`, as for `create_image`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no TIFF, its axes are unknown, or as for `create_image`.
    """
    import tifffile
    import zarr

    path = Path(tiff)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; check the path of the TIFF")
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise ValueError(f"{path} is not a TIFF file: {error}") from None
    with file:
        if not 0 <= series < len(file.series):
            raise ValueError(f"`series` {series} does not exist in {path}; it has {len(file.series)}")
        page_series = file.series[series]
        letters = _letters(page_series, axes, path)
        order = canonical_order(letters)
        canonical = "".join(letters[i] for i in order)
        writer = create_image(
            store,
            shape=[page_series.shape[i] for i in order],
            dtype=check_dtype(page_series.dtype, str(path)),
            axes=canonical,
            voxel_size=voxel_size or _voxel_size(file, series, spatial(canonical)),
            channels=channels or _channel_names(file, series),
            **options,
        )
        view: Any = zarr.open(page_series.aszarr(), mode="r")
        for t, c, slices in _slabs(writer.target(0)):
            at = dict(zip(writer.target(0).spatial_axes, slices, strict=True))
            at |= {"t": slice(t, t + 1), "c": slice(c, c + 1)}
            slab = np.transpose(np.asarray(view[tuple(at[letter] for letter in letters)]), order)
            writer.target(0).write(t, c, slices, slab.reshape(slab.shape[-len(slices) :]))
    build_pyramid(writer)
    writer.publish({"converted_from": path.name})
    return open_image(writer.path)


def _slabs(target: RegionWriter) -> Iterator[tuple[int, int, Slices]]:
    """Yield regions of whole planes, or whole rows, on write-unit borders."""
    shape, step = target.spatial_shape, list(target.spatial_shape)
    for axis, unit in enumerate(target.spatial_write_unit[:-1]):
        rest = math.prod(step) // step[axis] * target.dtype.itemsize
        step[axis] = min(shape[axis], max(1, _SLAB_NBYTES // (rest * unit)) * unit)
    starts = itertools.product(*(range(0, n, s) for n, s in zip(shape, step, strict=True)))
    for corner in starts:
        slices = tuple(slice(a, min(a + s, n)) for a, s, n in zip(corner, step, shape, strict=True))
        yield from ((t, c, slices) for t in range(target.n_t) for c in range(target.n_c))


def _letters(series: tifffile.TiffPageSeries, axes: str | None, path: Path) -> str:
    """Return the letter of each axis; colour samples count as channels."""
    if axes is not None:
        return check_letters(axes, f"{path}: `axes` {axes!r}", ndim=len(series.shape))
    found = series.axes.lower()
    if "c" not in found:
        found = found.replace("s", "c")
    return check_letters(
        found, f"{path}: axes {series.axes!r} (shape {series.shape})", ndim=len(series.shape)
    )


def _voxel_size(file: tifffile.TiffFile, series: int, axes: str) -> tuple[float, ...] | None:
    """Return micrometres per spatial axis if the file states all of them, with a unit of length."""
    if file.is_ome:
        pixels = _ome_image(file, series).get("Pixels", {})
        names = [f"PhysicalSize{a.upper()}" for a in axes]
        sizes = [(pixels.get(name), pixels.get(f"{name}Unit", "um")) for name in names]
    elif file.is_imagej:
        facts = file.imagej_metadata or {}
        tags = file.pages.first.tags
        unit = str(facts.get("unit", "pixel")).encode().decode("unicode_escape", "ignore")
        values: dict[str, Any] = {"z": facts.get("spacing")}
        for axis, tag in (("y", "YResolution"), ("x", "XResolution")):
            per_unit, units = tags[tag].value if tag in tags else (0, 1)
            values[axis] = units / per_unit if per_unit else None
        sizes = [(values[a], unit) for a in axes]
    else:
        return None
    try:
        lengths = tuple(float(size) * in_micrometres(unit, "") for size, unit in sizes if size)
    except ValueError:
        return None  # "pixel" and the like: the file is not calibrated
    return lengths if len(lengths) == len(axes) else None


def _channel_names(file: tifffile.TiffFile, series: int) -> list[str] | None:
    """Return the channel names of OME metadata if all are named."""
    if not file.is_ome:
        return None
    channels = _ome_image(file, series).get("Pixels", {}).get("Channel", [])
    names = [c.get("Name") for c in (channels if isinstance(channels, list) else [channels])]
    return [str(n) for n in names] if names and all(names) and len(set(names)) == len(names) else None


def _ome_image(file: tifffile.TiffFile, series: int) -> dict[str, Any]:
    import tifffile

    images = tifffile.xml2dict(file.ome_metadata or "<OME/>").get("OME", {}).get("Image", [])
    images = images if isinstance(images, list) else [images]
    return images[series] if series < len(images) else {}

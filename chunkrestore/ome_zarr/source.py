"""Open whatever holds an image: OME-Zarr, zarr arrays, TIFF files, folders of planes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.read import open_image
from chunkrestore.ome_zarr.resampled import resampled_again
from chunkrestore.ome_zarr.tiff.image import open_tiff
from chunkrestore.ome_zarr.tiff.plane_names import SUFFIXES
from chunkrestore.ome_zarr.tiff.planes import open_planes
from chunkrestore.ome_zarr.untrusted import read_part

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF, in either byte order."""

_ZARR = ("zarr.json", ".zgroup", ".zarray", ".zattrs")


def open_source(
    store: str | os.PathLike[str] | OmeZarrImage,
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
    series: int | None = None,
    as_labels: bool = False,
    resampled: Mapping[str, Any] | None = None,
) -> OmeZarrImage:
    """Open an image from its metadata alone, whatever holds it; voxels are read when asked for.

    Parameters
    ----------
    store
        Path or URL of an OME-Zarr image or a plain zarr array; path of a TIFF file (OME, ImageJ, LSM, BigTIFF); a
        folder of TIFF files, or a pattern of their paths with fields ``{t}``, ``{c}``, ``{z}``
        (`chunkrestore.ome_zarr.tiff.planes.open_planes`). An image that is open already is returned as it is.
    axes
        One letter of ``tczyx`` per axis in the order of the array; from its metadata by default.
    voxel_size
        Micrometres per spatial axis (z, y, x); from its metadata by default.
    channels
        One name per channel of a TIFF file or folder.
    series
        Which image of a TIFF file that holds several, 0 the first.
    as_labels
        Whether voxels are ids of objects, where metadata do not say so: 0 is background, and no value is a mean.
    resampled
        How `OmeZarrImage.resampled` has made it before, as its ``opened_with`` tells; for who opens it again.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is no image, is damaged or incomplete, or needs one of the arguments; or as for `open_image`.
    PermissionError, ConnectionError, TimeoutError
        As for `open_image`.
    """
    if isinstance(store, OmeZarrImage):
        return store
    image = _opened(stores.location(store), axes, voxel_size, channels, series)
    if resampled is not None:
        return resampled_again(image, resampled)
    if not as_labels or image.is_labels:
        return image
    if image.dtype.kind not in "iu":
        raise ValueError(
            f"`as_labels` needs integers, but {image.path} holds {image.dtype}; convert it first"
        )
    return replace(image, is_labels=True, opened_with=image.opened_with | {"as_labels": True})


def _opened(
    path: str,
    axes: str | None,
    voxel_size: Sequence[float] | None,
    channels: Sequence[str] | None,
    series: int | None,
) -> OmeZarrImage:
    kind = "" if stores.is_url(path) else _kind(path)
    if series is not None and kind != "file":
        raise ValueError(f"`series` {series} is for TIFF files that hold several images; {path} is none")
    if kind == "file":
        return open_tiff(path, axes=axes, voxel_size=voxel_size, channels=channels, series=series)
    if kind == "planes":
        return open_planes(path, axes=axes, voxel_size=voxel_size, channels=channels)
    if channels is not None:
        raise ValueError(f"`channels` are for TIFF files, which often name none; {path} is none")
    return open_image(path, axes=axes, voxel_size=voxel_size)


def _kind(path: str) -> str:
    """Return ``"file"`` for a TIFF file, ``"planes"`` for several, and nothing for anything else."""
    place = Path(path)
    if place.is_file():
        is_tiff = (read_part(path, 0, 4) or b"") in _MAGIC
        # A damaged file is told to be one, and not to be no OME-Zarr.
        return "file" if is_tiff or place.suffix.lower() in SUFFIXES else ""
    if place.is_dir():
        if any((place / name).exists() for name in _ZARR):
            return ""
        with os.scandir(place) as entries:
            return "planes" if any(e.name.lower().endswith(SUFFIXES) for e in entries) else ""
    return "planes" if not place.exists() and any(c in path for c in "*?[{") else ""

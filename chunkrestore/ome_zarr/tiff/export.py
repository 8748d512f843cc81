"""Images as OME-TIFF, for programs that read nothing else."""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.image import Level, OmeZarrImage
from chunkrestore.ome_zarr.store import Json

if TYPE_CHECKING:
    import tifffile

COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "zlib": {"compression": "zlib", "compressionargs": {"level": 1}},
    "lzw": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
}
"""Codecs, with tifffile's arguments for them; the last two need the package imagecodecs. Of microscope noise the first
level of zlib stores 2.5 times less, like the default one, and takes a tenth of its time."""

_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")
"""Pixel types of OME that are not complex."""

_SLAB_NBYTES = 2**28
"""Planes that are read together, so that chunks which span several are not decoded for each of them."""

_CLASSIC_NBYTES = 2**32 - 2**25
"""Beyond, offsets need BigTIFF; what compression would save is not known before."""

_PYRAMID_TILE = (512, 512)


def export_tiff(
    image: OmeZarrImage,
    path: str | os.PathLike[str],
    *,
    compression: str = "zlib",
    tile: Sequence[int] | None = None,
    bigtiff: bool | str = "auto",
    pyramid: bool = False,
    overwrite: bool = False,
) -> None:
    """Write an image or labels as one OME-TIFF, with axes, voxel size, position, channel names and colours.

    Preserves shape, dtype and every voxel. What is held at once is a few times 256 MB, or a few planes where a plane
    has more, however large the image is.
    The file appears under its name when it is complete.

    Parameters
    ----------
    image
        What is to be written: `OmeZarrImage.select` chooses a level, channels, time points and a region.
    path
        New file, ``.tif`` or ``.tiff`` (``.ome.tif`` by convention).
    compression
        ``"zlib"``, ``"none"``, or ``"lzw"`` and ``"zstd"``, which need the package imagecodecs.
    tile
        Height and width of what is compressed alone, multiples of 16; strips of rows by default, and 512 x 512 with
        `pyramid`.
    bigtiff
        Whether offsets have 64 bits; ``"auto"``: where they have to, from 4 GiB of voxels on.
    pyramid
        Write the lower resolutions of `image` as well, as SubIFDs.
    overwrite
        Replace an existing file.

    Raises
    ------
    FileExistsError
        If there is a file and `overwrite` is not set.
    ValueError
        If OME-TIFF has no such dtype, or parameters do not fit. Nothing was written then.
    ImportError
        If the codec is not installed.
    """
    target = Path(stores.location(path))
    _check(image, target, compression, overwrite=overwrite)
    shape_of_tile = _checked_tile(tile if tile is not None else _PYRAMID_TILE if pyramid else None)
    levels = image.levels if pyramid else image.levels[:1]
    nbytes = sum(math.prod(level.shape) for level in levels) * image.dtype.itemsize
    is_big = nbytes > _CLASSIC_NBYTES if bigtiff == "auto" else bool(bigtiff)
    if not is_big and nbytes > _CLASSIC_NBYTES and compression == "none":
        raise ValueError(
            f"`bigtiff` must not be off for {nbytes} bytes, beyond the 4 GiB of TIFF; leave it out"
        )
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        _write(image, levels, partial, is_big, {**COMPRESSIONS[compression], "tile": shape_of_tile})
        os.replace(partial, target)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def _check(image: OmeZarrImage, target: Path, compression: str, *, overwrite: bool) -> None:
    """Raise before anything is written if it cannot be."""
    if target.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"`path` {target} must end in .tif or .tiff, by which programs know what it is")
    if not target.parent.is_dir():
        raise ValueError(f"folder {target.parent} of `path` does not exist; create it first")
    if target.is_dir():
        raise ValueError(f"`path` {target} is a folder; give the path of a file")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; give another path or pass overwrite=True (--overwrite)")
    if stores.same(str(target), image.path):
        raise ValueError(f"`path` {target} is what is exported; give another path")
    if image.dtype.name not in _DTYPES:
        raise ValueError(
            f"`dtype` {image.dtype} of {image.path} does not exist in OME-TIFF, only {', '.join(_DTYPES)}; convert it "
            "first, labels to int32"
        )
    if compression not in COMPRESSIONS:
        raise ValueError(f"`compression` {compression!r} is unknown; use one of {', '.join(COMPRESSIONS)}")
    if compression != "none":
        import tifffile

        try:
            tifffile.TIFF.COMPRESSORS[tifffile.COMPRESSION[_TAGS[compression]]]
        except KeyError:
            raise ImportError(
                f"`compression` {compression!r} needs imagecodecs; run: pip install imagecodecs"
            ) from None


_TAGS = {"zlib": "ADOBE_DEFLATE", "lzw": "LZW", "zstd": "ZSTD"}


def _checked_tile(tile: Sequence[int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    lengths = tuple(int(n) for n in tile)
    if len(lengths) != 2 or any(n < 16 or n % 16 for n in lengths):
        raise ValueError(f"`tile` {lengths} must hold height and width, multiples of 16")
    return lengths[0], lengths[1]


def _write(
    image: OmeZarrImage, levels: Sequence[Level], path: Path, is_big: bool, options: dict[str, Any]
) -> None:
    import tifffile

    common = {"photometric": "minisblack", "dtype": image.dtype, **options}
    with tifffile.TiffWriter(path, bigtiff=is_big, ome=True) as file:
        for k, level in enumerate(levels):
            first = {"subifds": len(levels) - 1, "metadata": _ome(image)}
            more = first if k == 0 else {"subfiletype": 1, "metadata": None}
            _write_level(file, level.reader, {**common, **more})


def _write_level(file: tifffile.TiffWriter, reader: RegionReader, options: dict[str, Any]) -> None:
    tile = options["tile"]
    pieces = _planes(reader)
    if tile is not None:
        pieces = (part for plane in pieces for part in _tiles(plane, tile))
    file.write(pieces, shape=reader.shape, **options)


def _planes(reader: RegionReader) -> Iterator[np.ndarray]:
    """Yield the planes of an image in its order, read in slabs as thick as chunks where memory allows."""
    *depth, height, width = reader.spatial_shape
    whole = slice(0, height), slice(0, width)
    for t, c in itertools.product(range(reader.n_t), range(reader.n_c)):
        if not depth:
            yield np.ascontiguousarray(reader.read(t, c, whole))
            continue
        fitting = max(1, _SLAB_NBYTES // (height * width * reader.dtype.itemsize))
        chunk = reader.spatial_chunks[0]
        # Whole chunks if one fits, else a divisor's worth of planes: no slab begins in the middle of another's chunk.
        step = fitting // chunk * chunk if fitting >= chunk else -(-chunk // -(-chunk // fitting))
        for start in range(0, depth[0], step):
            planes = slice(start, min(start + step, depth[0])), *whole
            yield from np.ascontiguousarray(reader.read(t, c, planes))


def _tiles(plane: np.ndarray, tile: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the tiles of a plane, those at its end filled up with zeros."""
    for y, x in itertools.product(*(range(0, n, k) for n, k in zip(plane.shape, tile, strict=True))):
        part = plane[y : y + tile[0], x : x + tile[1]]
        if part.shape != tile:
            full = np.zeros(tile, plane.dtype)
            full[: part.shape[0], : part.shape[1]] = part
            part = full
        yield np.ascontiguousarray(part)


def _ome(image: OmeZarrImage) -> Json:
    """Return what tifffile makes OME-XML of."""
    known: Json = {"axes": image.axes.upper(), "Name": stores.name_of(image.path)}
    multiscale = image.ome["multiscales"][0]
    units = {
        letter: multiscale["axes"][position].get("unit")
        for letter, position in zip(image.axes, image.source(0).order, strict=True)
    }
    for axis, length in zip(image.spatial_axes, image.voxel_size, strict=True):
        if units[axis] is not None:
            known |= {f"PhysicalSize{axis.upper()}": length, f"PhysicalSize{axis.upper()}Unit": "µm"}
    if units.get("t") in _SECONDS:
        scale, _ = metadata.transform(multiscale, 0)
        known["TimeIncrement"] = scale[image.source(0).order[image.axes.index("t")]] * _SECONDS[units["t"]]
        known["TimeIncrementUnit"] = "s"
    if not image.is_labels:
        known["Channel"] = {"Name": list(image.channels)} | _colors(image)
    if any(image.translation):
        known["Plane"] = _positions(image)
    return known


_SECONDS = {"millisecond": 1e-3, "second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}


def _colors(image: OmeZarrImage) -> Json:
    """Return the colours of channels, if all have one, as OME writes them: four bytes as a signed integer."""
    omero = image.ome.get("omero")
    entries = omero.get("channels") if isinstance(omero, dict) else None
    texts = [str(e.get("color")) for e in metadata.as_dicts(entries)]
    try:
        numbers = [int(text[:6], 16) << 8 | 0xFF for text in texts]
    except ValueError:
        return {}
    if len(numbers) != image.n_c or any(len(text) < 6 for text in texts):
        return {}
    return {"Color": [n - 2**32 if n >= 2**31 else n for n in numbers]}


def _positions(image: OmeZarrImage) -> Json:
    """Return where every plane lies: a region keeps its place."""
    n_planes = math.prod(image.shape[:-2])
    place = dict(zip(image.spatial_axes, image.translation, strict=True))
    known: Json = {}
    for axis, start in place.items():
        values = [start] * n_planes
        if axis == "z":
            depth, step = image.spatial_shape[0], image.voxel_size[0]
            values = [start + (i % depth) * step for i in range(n_planes)]
        known |= {f"Position{axis.upper()}": values, f"Position{axis.upper()}Unit": ["µm"] * n_planes}
    return known

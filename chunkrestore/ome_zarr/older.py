"""OME-Zarr 0.1 to 0.3, read as what 0.4 would have in their place.

These versions know no voxel size. 0.1 and 0.2 know no axes either: their arrays have five, ``tczyx``; 0.3 lists
letters. Between 0.1 and 0.2 only the separator in the names of chunks changed, which every array states itself.

Levels are taken to cover the same extent, so of level ``l`` with ``n_l`` of ``n_0`` voxels a voxel spans
``f = n_0 / n_l`` voxels of level 0, and the centre of the first lies at ``(f - 1) / 2``. That is exact for levels
made by averaging or resizing, and what ome-zarr-py writes for its levels since 0.21. No key says how they were made: of
levels that hold every ``f``-th voxel, the first one lies at 0 instead. Level 0 is the same either way, and so is what a
job makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.conform import first_multiscale
from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.metadata import AXIS_TYPES, check_letters, dataset, spatial
from chunkrestore.ome_zarr.store import Json

_IMPLIED_AXES = "tczyx"


def as_current(ome: Json, version: str, axes: str | None, where: str) -> Json:
    """Return the first multiscale with axes as objects, and with levels of scale 1 until `with_scales`.

    Parameters
    ----------
    ome
        Attributes of a version in `chunkrestore.ome_zarr.metadata.OLDER`.
    version
        That version.
    axes
        Letters given by hand, instead of those of the metadata.
    where
        Path of the group, for messages.

    Raises
    ------
    ValueError
        With the key that does not conform.
    """
    multiscale = first_multiscale(ome, where)
    letters = axes or _letters(multiscale, version, where)
    ones, zeros = [1.0] * len(letters), [0.0] * len(letters)
    return {
        **multiscale,
        "axes": [{"name": letter, "type": AXIS_TYPES.get(letter)} for letter in letters],
        "datasets": [dataset(entry["path"], ones, zeros, entry) for entry in multiscale["datasets"]],
    }


def with_scales(multiscale: Json, letters: str, shapes: Sequence[Sequence[int]]) -> Json:
    """Return the multiscale with scale and translation of every level, in voxels of level 0.

    Parameters
    ----------
    multiscale
        As of `as_current`.
    letters
        Letter of each axis of the arrays.
    shapes
        Of the levels' arrays, finest first.
    """
    is_spatial = [letter in spatial(letters) for letter in letters]
    datasets = []
    for entry, shape in zip(multiscale["datasets"], shapes, strict=True):
        spans = [n / m if s else 1.0 for n, m, s in zip(shapes[0], shape, is_spatial, strict=True)]
        datasets.append(dataset(entry["path"], spans, [(f - 1) / 2 for f in spans], entry))
    return {**multiscale, "datasets": datasets}


def check_separator(reader: RegionReader) -> None:
    """Raise if an array of zarr v2 does not say that its chunks lie in folders, and so would read as empty.

    Early writers of nested chunks left it to the reader to know.

    Raises
    ------
    ValueError
        With the key to add.
    """
    if reader.zarr_format != 2 or reader.ndim < 2:
        return
    document = stores.read_json(reader.name, ".zarray") or {}
    if document.get("dimension_separator") is None:
        n_chunks = [-(-n // c) for n, c in zip(reader.shape, reader.chunks, strict=True)]
        for index in ([0] * reader.ndim, [n // 2 for n in n_chunks]):
            key = "/".join(str(index[reader.order.index(i)]) for i in range(reader.ndim))
            if _is_there(stores.join(reader.name, key)):
                raise ValueError(
                    f"{stores.join(reader.name, '.zarray')} names no `dimension_separator`, which means '.', but its "
                    'chunks lie in folders; add "dimension_separator": "/" to it'
                )


def _is_there(path: str) -> bool:
    """Return whether a file lies at `path`, as far as can be told."""
    try:
        return stores.is_file(path)
    except PermissionError:
        return False  # so a bucket that must not be listed answers for what is absent


def _letters(multiscale: Json, version: str, where: str) -> str:
    """Return the letters of the axes, as listed or implied."""
    axes = multiscale.get("axes")
    if axes is None and version != "0.3":
        return _IMPLIED_AXES
    if not isinstance(axes, list) or not all(isinstance(a, str) and len(a) == 1 for a in axes):
        raise ValueError(
            f"{where}: `multiscales[0].axes` {short(axes)} does not conform to OME-Zarr {version}: it must list "
            f"letters of {_IMPLIED_AXES!r}; pass `axes`"
        )
    return check_letters("".join(axes), f"{where}: `multiscales[0].axes` {short(axes)}")

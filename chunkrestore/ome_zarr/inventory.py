"""What a store holds, as JSON-compatible values, from its metadata alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.channels import display_of
from chunkrestore.ome_zarr.collection import Collection, collection_of
from chunkrestore.ome_zarr.image import Level, OmeZarrImage
from chunkrestore.ome_zarr.limits import check_array, short
from chunkrestore.ome_zarr.members import UNFINISHED
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.ome_zarr.read import label_names, open_label
from chunkrestore.ome_zarr.source import open_source
from chunkrestore.ome_zarr.store import Json, Node
from chunkrestore.ome_zarr.tiff.image import StackReader

_FEW_WELLS = 16
"""Wells of a plate behind a URL that are read to tell their fields."""

_MOST_LABELS = 64
"""Labels that are opened to tell about them."""

_TABLE = "objects"


def facts_of(store: str | os.PathLike[str] | OmeZarrImage | Collection) -> dict[str, Any]:
    """Return what a store holds as JSON-compatible values, from its metadata alone.

    Parameters
    ----------
    store
        Image, labels, a group of labels, plate, well, bioformats2raw layout, zarr array or group, or whatever else
        `open_source` opens: its path or URL, or the opened image or (part of a) collection.

    Returns
    -------
    dict
        ``kind`` says which of these it is: ``"image"``, ``"labels"``, ``"labels group"``, ``"plate"``, ``"well"``,
        ``"series"``, ``"array"``, ``"group"`` or ``"unfinished"``. The ``fields`` of a plate behind a URL that has many
        wells are None; select some.

    Raises
    ------
    FileNotFoundError, ValueError, PermissionError, ConnectionError, TimeoutError
        As for `open_source`.
    """
    if isinstance(store, OmeZarrImage):
        return facts(store)
    if isinstance(store, Collection):
        return _collection(store)
    path = stores.location(store)
    node = stores.read_node(path)
    if node is None:
        return facts(open_source(path))
    if node.kind == "array":
        return _array(path, node)
    own = node.attributes.get(OWN_KEY)
    if isinstance(own, dict) and ("state" in own or UNFINISHED in own):
        what = "collection" if UNFINISHED in own else "image"
        return {"path": path, "kind": "unfinished", "of": what, "labels": list(label_names(path))}
    _, ome, others = metadata.split(node, path)
    found = collection_of(path, node)
    if found is not None:
        return _collection(found)
    if "multiscales" in ome:
        return facts(open_source(path))
    if isinstance(ome.get("labels"), list):
        return _labels_group(stores.parent(path), path)
    if label_names(path):
        return _labels_group(path, path)
    return {
        "path": path,
        "kind": "group",
        "zarr_format": node.zarr_format,
        "attributes": sorted(others)[:_MOST_LABELS],
    }


def facts(image: OmeZarrImage) -> dict[str, Any]:
    """Return what `image` holds as JSON-compatible values, from its metadata alone."""
    display = [] if image.is_labels else display_of(image.ome, image.channels)
    return {
        "path": image.path,
        "version": image.version or None,
        "format": "OME-Zarr" if image.version else "TIFF" if _is_tiff(image.levels[0]) else "zarr array",
        "kind": "labels" if image.is_labels else "image",
        "axes": image.axes,
        "shape": list(image.shape),
        "dtype": image.dtype.name,
        "nbytes": _nbytes(image.levels[0]),
        "voxel_size_um": list(image.voxel_size),
        "calibrated": image.calibrated,
        "translation_um": list(image.translation),
        "channels": list(image.channels) if not image.is_labels else [],
        "display": display,
        "labels": list(image.labels),
        "tables": _tables(image),
        "levels": [_level(level) for level in image.levels],
        "operators": operators_of(image.others.get(OWN_KEY)),
        "provenance": image.others.get(OWN_KEY),
    }


def operators_of(own: object) -> list[str]:
    """Return the operators that provenance tells of, first to last, each with its plain parameters in brackets."""
    found: list[str] = []
    while isinstance(own, dict) and len(found) < _MOST_LABELS:
        provenance = own.get("provenance")
        entries = provenance.get("operators") if isinstance(provenance, dict) else None
        texts = dict.fromkeys(_operator(entry) for entry in metadata.as_dicts(entries) if "operator" in entry)
        found = [*texts, *found]
        own = own.get("source")
    return found


def _operator(entry: Json) -> str:
    hidden = ("operator", "timepoint", "channel")
    plain = {
        key: value
        for key, value in entry.items()
        if key not in hidden and isinstance(value, int | float | str) and "sha256" not in key
    }
    text = ", ".join(f"{key}={short(value)}" for key, value in plain.items())
    return f"{str(entry['operator'])[:80]}({text})".removesuffix("()")


def _level(level: Level) -> dict[str, Any]:
    reader = level.reader
    return {
        "path": level.path,
        "shape": list(level.shape),
        "voxel_size_um": list(level.voxel_size),
        "translation_um": list(level.translation),
        "chunks": list(reader.chunks),
        "write_unit": list(reader.write_unit),
        "n_files": _n_files(level.shape, reader.write_unit),
        "nbytes": _nbytes(level),
        "codecs": None if _is_tiff(level) else _codecs_at(reader.name),
    }


def _collection(found: Collection) -> dict[str, Any]:
    known: dict[str, Any] = {
        "path": found.path,
        "version": found.version,
        "kind": found.kind,
        "name": found.name,
        "rows": list(found.rows),
        "columns": list(found.columns),
        "wells": list(found.wells),
        "acquisitions": [{"id": a.id, "name": a.name} for a in found.acquisitions],
        "field_count": found.field_count,
        "fields": None,
        "first": None,
        "problems": [],
        "operators": operators_of(found.others.get(OWN_KEY)),
    }
    try:
        if found.listed is not None or not stores.is_url(found.path) or len(found.wells) <= _FEW_WELLS:
            known["fields"] = [
                {"path": f.member, "well": f.well, "acquisition": f.acquisition} for f in found.fields
            ]
        known["first"] = facts(open_source(found.first.path))
    except (FileNotFoundError, ValueError) as error:
        # What is wrong with one well or field is worth telling, and no reason to say nothing about the others.
        known["problems"].append(str(error))
    return known


def _labels_group(image: str, path: str) -> dict[str, Any]:
    names = label_names(image)
    members = [facts(open_label(image, name)) for name in names[:_MOST_LABELS]]
    return {
        "path": path,
        "version": members[0]["version"] if members else None,
        "kind": "labels group",
        "labels": list(names),
        "members": members,
        "tables": {name: _files(stores.join(image, "labels", name)) for name in names[:_MOST_LABELS]},
    }


def _array(path: str, node: Node) -> dict[str, Any]:
    document = node.metadata
    check_array(document, node.zarr_format, path)
    grid = (
        document["chunk_grid"]["configuration"]["chunk_shape"]
        if node.zarr_format == 3
        else document["chunks"]
    )
    names = document.get("dimension_names")
    return {
        "path": path,
        "kind": "array",
        "zarr_format": node.zarr_format,
        "shape": document["shape"],
        "dtype": document["data_type" if node.zarr_format == 3 else "dtype"],
        "dimension_names": names if isinstance(names, list) else None,
        "write_unit": grid,
        "n_files": _n_files(document["shape"], grid),
        "codecs": codecs_of(document, node.zarr_format),
    }


def _tables(image: OmeZarrImage) -> dict[str, list[str]]:
    """Return the tables of objects: files beside labels, by name, and under ``""`` those in the ``tables`` group."""
    if image.is_labels:
        files = _files(image.path)
        return {stores.name_of(image.path): files} if files else {}
    found = {name: _files(stores.join(image.path, "labels", name)) for name in image.labels[:_MOST_LABELS]}
    node = None
    if stores.read_node(image.path) is not None:  # else a TIFF, which has nothing inside
        stores.check_place(image.path, "tables")
        node = _node(stores.join(image.path, "tables"))
    names = node.attributes.get("tables") if node is not None else None
    found[""] = [str(name)[:80] for name in names[:_MOST_LABELS]] if isinstance(names, list) else []
    return {name: files for name, files in found.items() if files}


def _files(labels: str) -> list[str]:
    """Return the names of the tables in a group of labels; web servers list nothing and are asked for each."""
    known = [f"{_TABLE}.{suffix}" for suffix in ("parquet", "csv")]
    if stores.is_url(labels) and not labels.startswith("s3:"):
        return [name for name in known if stores.is_file(stores.join(labels, name))]
    try:
        return [name for name in stores.contents(labels) or () if name in known]
    except PermissionError:
        return []


def _node(path: str) -> Node | None:
    try:
        return stores.read_node(path)
    except PermissionError:
        if stores.is_url(path):
            return None  # so a bucket that must not be listed answers for what is absent
        raise


def _codecs_at(path: str) -> list[str]:
    node = stores.read_node(path)
    return [] if node is None else codecs_of(node.metadata, node.zarr_format)


def codecs_of(document: Json, zarr_format: int) -> list[str]:
    """Return what is done to a chunk before it is stored, in words, such as ``"blosc zstd 3 bitshuffle"``."""
    if zarr_format == 2:
        codecs = [*(document.get("filters") or ()), document.get("compressor")]
        return [_codec(str(c.get("id")), c) for c in codecs if isinstance(c, dict)]
    found: list[str] = []
    for codec in metadata.as_dicts(document.get("codecs")):
        name = str(codec.get("name")).removeprefix("numcodecs.")
        settings = codec.get("configuration")
        settings = settings if isinstance(settings, dict) else {}
        if name == "sharding_indexed":
            found += codecs_of(settings, 3)
        elif name not in ("bytes", "endian"):
            found.append(_codec(name, settings))
    return found


def _codec(name: str, settings: Mapping[str, Any]) -> str:
    shuffles = {0: "", 1: "shuffle", 2: "bitshuffle", "noshuffle": "", None: "", -1: ""}
    shuffle = settings.get("shuffle") if name == "blosc" else None
    parts = [
        name,
        settings.get("cname"),
        settings.get("clevel", settings.get("level")),
        shuffles.get(shuffle, shuffle) if isinstance(shuffle, int | str | None) else None,
    ]
    return " ".join(str(part)[:40] for part in parts if part not in (None, ""))


def _n_files(shape: Any, unit: Any) -> int:
    """Return the chunks, or shards, that an array has at most; those of zeros alone are often left out."""
    return math.prod(-(-n // u) for n, u in zip(shape, unit, strict=True))


def _is_tiff(level: Level) -> bool:
    return isinstance(level.reader, StackReader)


def _nbytes(level: Level) -> int:
    return math.prod(level.shape) * level.reader.dtype.itemsize

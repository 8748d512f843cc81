"""What a store holds, for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from chunkrestore.ome_zarr.collection import Collection
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.inventory import facts, facts_of

__all__ = ["describe", "facts", "facts_of", "info"]

_MOST_NAMED = 96
_WIDTH = 100


def describe(store: str | os.PathLike[str] | OmeZarrImage | Collection) -> str:
    """Return what a store holds as a few lines of text.

    Parameters
    ----------
    store
        As for `facts_of`.

    Raises
    ------
    FileNotFoundError, ValueError, PermissionError, ConnectionError, TimeoutError
        As for `facts_of`.
    """
    known = facts_of(store)
    lines = {
        "image": _image,
        "labels": _image,
        "labels group": _labels_group,
        "plate": _collection,
        "well": _collection,
        "series": _collection,
        "array": _array,
        "unfinished": _unfinished,
        "group": _group,
    }[known["kind"]]
    return "\n".join(lines(known))


def info(image: OmeZarrImage) -> str:
    """Return what `image` holds as a few lines of text."""
    return "\n".join(_image(facts(image)))


def _image(known: Mapping[str, Any]) -> Iterator[str]:
    version = f" {known['version']}" if known["version"] else ""
    yield f"{known['path']}: {known['format']}{version}, {known['kind']}"
    yield from _voxels(known)


def _voxels(known: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """Yield what an image is made of."""
    size = " x ".join(f"{v:g}" for v in known["voxel_size_um"])
    unit = "um" if known["calibrated"] else "um (assumed: the store names no unit)"
    yield f"{indent}axes        {known['axes']}"
    yield f"{indent}shape       {_times(known['shape'])} {known['dtype']}, {_bytes(known['nbytes'])}"
    yield f"{indent}voxel size  {size} {unit}"
    if known["display"]:
        yield from _listed("channels", _capped([_channel(entry) for entry in known["display"]]), indent)
    if known["kind"] == "image":
        yield from _listed("labels", known["labels"], indent)
    tables = [
        f"{name}: {', '.join(files)}" if name else ", ".join(files) for name, files in known["tables"].items()
    ]
    if tables:
        yield from _listed("tables", tables, indent)
    codecs = [
        ", ".join(level["codecs"]) or "none" for level in known["levels"] if level["codecs"] is not None
    ]
    if codecs:
        yield from _listed("codecs", dict.fromkeys(codecs), indent)
    for k, level in enumerate(known["levels"]):
        yield f"{indent}level {k:<5} {_level(level)}"
    if known["operators"]:
        yield from _listed("made by", known["operators"], indent)


def _level(level: Mapping[str, Any]) -> str:
    if level["codecs"] is None:
        return (
            f"{_times(level['shape'])}, strips or tiles {_times(level['chunks'])}, {_bytes(level['nbytes'])}"
        )
    is_sharded = level["write_unit"] != level["chunks"]
    shards = f", shards {_times(level['write_unit'])}" if is_sharded else ""
    files = f"{level['n_files']} file{'s' * (level['n_files'] != 1)}"
    return f"{_times(level['shape'])}, chunks {_times(level['chunks'])}{shards}, {files}, {_bytes(level['nbytes'])}"


def _channel(entry: Mapping[str, Any]) -> str:
    window = entry["window"]
    shown = [
        *([f"#{entry['color']}"] if entry["color"] else []),
        *([f"{window['start']:g} to {window['end']:g}"] if window else []),
        *(["hidden"] if entry["active"] is False else []),
    ]
    return f"{entry['label']} ({', '.join(shown)})" if shown else str(entry["label"])


def _collection(known: Mapping[str, Any]) -> Iterator[str]:
    what = {"plate": "plate", "well": "well", "series": "images in the layout of bioformats2raw"}[
        known["kind"]
    ]
    name = f" {known['name']!r}" if known["name"] else ""
    yield f"{known['path']}: OME-Zarr {known['version']}, {what}{name}"
    if known["kind"] == "plate":
        wells = known["wells"]
        size = f"{len(wells)} of {len(known['rows'])} x {len(known['columns'])}"
        yield from _listed("wells", [f"{size}: {wells[0]}", *_capped(wells[1:])])
    if known["fields"] is None:
        most = (
            f"up to {known['field_count']} per well"
            if known["field_count"]
            else "not counted: wells were not read"
        )
        yield from _listed("fields", [most])
    else:
        yield from _listed("fields", _fields(known["fields"]))
    if known["acquisitions"]:
        names = [f"{a['id']} {a['name']}".strip() for a in known["acquisitions"]]
        yield from _listed("acquisition", _capped(names))
    if known["first"] is not None:
        yield f"  first       {known['first']['path']}"
        yield from _voxels(known["first"], "    ")
    for problem in known["problems"]:
        yield f"  problem     {problem}"


def _fields(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how many fields there are; wells that have the same ones are told of together."""
    by_well: dict[str, list[str]] = {}
    for field in fields:
        by_well.setdefault(field["well"], []).append(field["path"].removeprefix(f"{field['well']}/"))
    alike: dict[tuple[str, ...], list[str]] = {}
    for well, names in by_well.items():
        alike.setdefault(tuple(names), []).append(well)
    told = []
    for own, wells in alike.items():
        where = f" in each of {len(wells)} wells" if len(wells) > 1 else f" in {wells[0]}" if wells[0] else ""
        told.append(f"{len(own)}{where} ({' '.join(_capped(own))})")
    return _capped(told)


def _labels_group(known: Mapping[str, Any]) -> Iterator[str]:
    yield f"{known['path']}: OME-Zarr {known['version']}, labels"
    for name, member in zip(known["labels"], known["members"], strict=False):
        yield f"  {name}"
        yield from _voxels(member, "    ")
    if len(known["labels"]) > len(known["members"]):
        yield f"  and {len(known['labels']) - len(known['members'])} more"


def _array(known: Mapping[str, Any]) -> Iterator[str]:
    yield f"{known['path']}: zarr array (v{known['zarr_format']}), no OME-Zarr; say `axes` to open it as an image"
    yield f"  shape       {_times(known['shape'])} {known['dtype']}"
    yield f"  files       {known['n_files']} of {_times(known['write_unit'])}"
    yield from _listed("codecs", known["codecs"])
    if known["dimension_names"]:
        yield from _listed("axes", [str(name) for name in known["dimension_names"]])


def _unfinished(known: Mapping[str, Any]) -> Iterator[str]:
    yield f"{known['path']}: an unfinished {known['of']}; `chunkrestore status` tells how far it is"
    if known["labels"]:
        yield from _listed("labels", known["labels"])


def _group(known: Mapping[str, Any]) -> Iterator[str]:
    yield f"{known['path']}: zarr group (v{known['zarr_format']}) without any image"
    yield from _listed("attributes", known["attributes"])


def _listed(title: str, items: Iterable[str], indent: str = "  ") -> Iterator[str]:
    """Yield a title with items, on as many lines as they take."""
    line = ""
    for item in [*items] or ["none"]:
        if line and len(line) + len(item) > _WIDTH:
            yield f"{indent}{title:<11} {line},"
            title, line = "", ""
        line = f"{line}, {item}" if line else item
    yield f"{indent}{title:<11} {line}"


def _capped(items: Sequence[str]) -> list[str]:
    more = [f"and {len(items) - _MOST_NAMED} more"] if len(items) > _MOST_NAMED else []
    return [*items[:_MOST_NAMED], *more]


def _times(lengths: Any) -> str:
    return " x ".join(str(n) for n in lengths)


def _bytes(n: int) -> str:
    """Return a number of bytes with a binary prefix."""
    power = min(max(n.bit_length() - 1, 0) // 10, 5)
    return f"{n / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"

"""What TIFF files say about their images: voxel sizes, channels, time steps, and all that is only passed on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from chunkrestore.ome_zarr.metadata import in_micrometres
from chunkrestore.ome_zarr.store import Json

if TYPE_CHECKING:
    import tifffile

MAX_KEPT_NBYTES = 2**20
"""Of metadata that are passed on without being understood: they are in attributes, which every task reads."""

# Symbols of OME, and words that are found in files of ImageJ; all others as in OME-Zarr.
_MICROMETRES = {
    "pm": 1e-6, "Å": 1e-4, "microns": 1.0, "Mm": 1e12, "in": 25_400.0, "inches": 25_400.0, "thou": 25.4,
    "ft": 304_800.0,
}  # fmt: skip
_SECONDS = {
    "ns": 1e-9, "µs": 1e-6, "us": 1e-6, "ms": 1e-3, "msec": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0,
    "seconds": 1.0, "min": 60.0, "minutes": 60.0, "h": 3600.0, "hours": 3600.0, "d": 86_400.0,
}  # fmt: skip
_PRINTED = 25_400.0 / 601
"""Micrometres of a pixel that resolution tags mean a microscope by, and not a printer or a screen."""

_RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"), ("alpha", "FFFFFF"))


@dataclass(frozen=True)
class TiffFacts:
    """What a file says about one of its images; what it does not say is missing."""

    lengths: Mapping[str, float]
    """Micrometres per voxel of the axes ``z``, ``y`` and ``x``."""
    seconds: float | None = None
    """Between time points."""
    channels: Sequence[Json] = ()
    """Entries of ``omero``, one per channel."""
    kept: Json = field(default_factory=dict)
    """All other metadata as they are, up to `MAX_KEPT_NBYTES`."""


def facts_of(file: tifffile.TiffFile, index: int = 0) -> TiffFacts:
    """Return what a file says about image `index`.

    Lengths come from OME-XML, Zeiss LSM, Micro-Manager or ImageJ metadata, whichever the file has, in this order;
    from the resolution tags only if they name a unit of length.
    """
    first = file.pages.first
    kept = _kept(file)
    pixels = _ome_pixels(file, index) if file.is_ome else None
    lengths: dict[str, float | None] = _from_tags(first)
    seconds, channels = None, []
    if file.is_imagej:
        facts = file.imagej_metadata or {}
        lengths = _from_imagej(facts, first)
        seconds = _number(facts.get("finterval"))
        channels = _imagej_channels(facts, first)
    if file.is_micromanager:
        lengths |= _known(_from_micromanager(_micromanager(file)))
        channels = _named(_micromanager(file).get("ChNames"))
    if file.is_lsm:
        facts = file.lsm_metadata or {}
        lengths = {a: _length(facts.get(f"VoxelSize{a.upper()}"), "m") for a in "zyx"}
        seconds = _number(facts.get("TimeIntervall"))
        channels = _named((facts.get("ChannelColors") or {}).get("ColorNames"))
    if pixels is not None:
        lengths = {
            a: _length(
                pixels.get(f"PhysicalSize{a.upper()}"), pixels.get(f"PhysicalSize{a.upper()}Unit", "µm")
            )
            for a in "zyx"
        }
        step = _number(pixels.get("TimeIncrement"))
        unit = _SECONDS.get(pixels.get("TimeIncrementUnit", "s"))
        seconds = step * unit if step and unit else None
        channels = _ome_channels(pixels)
    if first.photometric == 2 and first.samplesperpixel > 1 and len(channels) in (0, 1):
        channels = [{"label": name, "color": color} for name, color in _RGB[: first.samplesperpixel]]
    return TiffFacts(_known(lengths), seconds if seconds and seconds > 0 else None, channels, kept)


def _known(lengths: Mapping[str, float | None]) -> dict[str, float]:
    return {axis: length for axis, length in lengths.items() if length is not None}


def _length(value: Any, unit: object) -> float | None:
    """Return micrometres, or None without a positive number or with a unit that is no length (``pixel``)."""
    number, text = _number(value), str(unit).strip()
    try:
        factor = _MICROMETRES.get(text) or _MICROMETRES.get(text.lower()) or in_micrometres(text, "")
    except ValueError:
        return None
    length = None if number is None else number * factor
    return length if length and 0 < length < math.inf else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _from_tags(page: tifffile.TiffPage) -> dict[str, float | None]:
    tags = page.tags
    if "ResolutionUnit" not in tags:
        return {}
    unit = {2: "inch", 3: "cm"}.get(int(tags["ResolutionUnit"].value), "none")
    y, x = _steps(page)
    # 72 dots per inch and the like are what programs write that know no size.
    lengths = {"y": _length(y, unit), "x": _length(x, unit)}
    is_real = all(length is not None and length < _PRINTED for length in lengths.values())
    return lengths if is_real else {}


def _from_imagej(facts: Mapping[str, Any], page: tifffile.TiffPage) -> dict[str, float | None]:
    # ImageJ writes the micro sign as the six characters of its escape.
    unit = str(facts.get("unit", "")).replace("\\u00B5", "µ")
    y, x = _steps(page)
    return {"z": _length(facts.get("spacing"), unit), "y": _length(y, unit), "x": _length(x, unit)}


def _from_micromanager(summary: Mapping[str, Any]) -> dict[str, float | None]:
    across = _length(summary.get("PixelSize_um"), "um")
    return {"z": _length(summary.get("z-step_um"), "um"), "y": across, "x": across}


def _micromanager(file: tifffile.TiffFile) -> Mapping[str, Any]:
    summary = (file.micromanager_metadata or {}).get("Summary")
    return summary if isinstance(summary, Mapping) else {}


def _steps(page: tifffile.TiffPage) -> tuple[float | None, float | None]:
    """Return the units of length per pixel along y and x."""
    rationals = (page.tags[n].value if n in page.tags else (0, 1) for n in ("YResolution", "XResolution"))
    y, x = (units / pixels if pixels else None for pixels, units in rationals)
    return y, x


def _ome_pixels(file: tifffile.TiffFile, index: int) -> ElementTree.Element | None:
    """Return the ``Pixels`` of an image, or None if it cannot be told which they are."""
    try:
        root = ElementTree.fromstring(file.ome_metadata or "<OME/>")
    except ElementTree.ParseError:
        return None
    found = [pixels for image in _children(root, "Image") for pixels in _children(image, "Pixels")]
    return found[index] if len(found) == len(file.series) else None


def _children(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    """Return the children of that name in whatever namespace: every release of OME has its own."""
    return [child for child in element if child.tag.rpartition("}")[2] == name]


def _ome_channels(pixels: ElementTree.Element) -> list[Json]:
    channels = []
    for element in _children(pixels, "Channel"):
        entry: Json = {}
        if name := element.get("Name"):
            entry["label"] = name
        color = _number(element.get("Color"))
        if color is not None:
            entry["color"] = f"{int(color) % 2**32 >> 8:06X}"  # red, green, blue, alpha as a signed integer
        channels.append(entry)
    return channels


def _imagej_channels(facts: Mapping[str, Any], page: tifffile.TiffPage) -> list[Json]:
    """Return colours and windows of channels; ImageJ names slices, not channels."""
    tables, ranges = facts.get("LUTs") or [], facts.get("Ranges") or ()
    dtype = page.dtype
    n = int(facts.get("channels", 1)) if len(tables) or len(ranges) else 0
    channels: list[Json] = [{} for _ in range(n)]
    for entry, table in zip(channels, tables, strict=False):
        entry["color"] = "".join(f"{int(v):02X}" for v in table[:, -1])
    for i, entry in enumerate(channels):
        start, end = (_number(v) for v in (*ranges[2 * i : 2 * i + 2], None, None)[:2])
        if start is not None and end is not None and start < end and dtype is not None:
            limit = float(2 ** (8 * dtype.itemsize) - 1) if dtype.kind == "u" else end
            entry["window"] = {"min": min(0.0, start), "max": max(limit, end), "start": start, "end": end}
    return channels


def _named(names: Any) -> list[Json]:
    return [{"label": str(name)} for name in names] if isinstance(names, list | tuple) else []


def _kept(file: tifffile.TiffFile) -> Json:
    """Return the metadata of a file that are passed on, shortened where they are too long to be."""
    kept: Json = {}
    tags = file.pages.first.tags
    for key, name in (("software", "Software"), ("date_time", "DateTime"), ("artist", "Artist")):
        if name in tags:
            kept[key] = str(tags[name].value)[:1024]
    if file.is_ome:
        kept |= _bounded("ome_xml", file.ome_metadata or "")
    elif not file.is_imagej and (description := file.pages.first.description):
        kept |= _bounded("description", description)
    for key, known in (("imagej", file.imagej_metadata), ("micromanager", file.micromanager_metadata)):
        if known:
            kept |= _bounded(key, _plain(known))
    if file.is_lsm:
        kept |= _bounded("lsm", _plain(file.lsm_metadata))
    return kept


_PER_PLANE = re.compile(
    r"<((?:\w+:)?(?:Plane|TiffData|BinData))\b(?:[^>]*/>|[^>]*>.*?</\1\s*>)\s*",
    re.DOTALL,
)


def _bounded(key: str, value: Any) -> Json:
    """Return an entry for `value`: all of it, or what is left without what there is per plane, or its size."""
    n = _nbytes(value)
    if n <= MAX_KEPT_NBYTES:
        return {key: value}
    omitted = f"{key}_omitted"
    if key == "ome_xml" and _nbytes(shorter := _PER_PLANE.sub("", value)) <= MAX_KEPT_NBYTES:
        return {key: shorter, omitted: f"elements Plane, TiffData and BinData, of {n} bytes in all"}
    return {omitted: f"{n} bytes, more than {MAX_KEPT_NBYTES}"}


def _nbytes(value: Any) -> int:
    return len(value.encode() if isinstance(value, str) else json.dumps(value).encode())


def _plain(value: Any, depth: int = 8) -> Any:
    """Return `value` with nothing in it but what JSON has; arrays and bytes only by their sizes."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if depth and isinstance(value, Mapping):
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, Iterable) and not hasattr(value, "shape"):
        return [_plain(v, depth - 1) for v in value]
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "size", 0) == 1:
        return _plain(item(), 0)
    return f"array {value.shape}" if hasattr(value, "shape") else str(value)

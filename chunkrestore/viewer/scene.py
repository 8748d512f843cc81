"""What a page is told about the images that it shows, as JSON; nothing of it is ever treated as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkrestore.ome_zarr import OmeZarrImage, metadata
from chunkrestore.ome_zarr.channels import display_of
from chunkrestore.viewer.slices import (
    BUDGET_NBYTES,
    PLANES,
    TILE,
    readable_levels,
    tile_nbytes,
    volume_shape,
    wire_dtype,
)
from chunkrestore.viewer.sources import MAX_LABELS, Source

Json = dict[str, Any]

_COLORS = ("00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF", "FFFFFF")
_MAX_CHANNELS = 64
"""Channels that a page lists."""
_MAX_ACTIVE = 4
"""Channels that are on at first where nobody said which."""
_MAX_COLORS = 2**14
"""Label colours that a page is sent; other ids get one by their number."""
_MAX_NAME = 120


def describe(sources: Sequence[Source], links: Sequence[Json] = ()) -> Json:
    """Return what the page needs to know: geometry in micrometres, channels, colours, and what cannot be shown.

    Parameters
    ----------
    sources
        What is looked at.
    links
        Other viewers: ``name`` and ``url``.
    """
    first = sources[0].image
    return {
        "title": sources[0].name[:_MAX_NAME],
        "tile": TILE,
        "unit": "µm" if first.calibrated else "units",
        "sources": [_source(source) for source in sources],
        "notes": [*_left_out(sources), *(note for source in sources for note in _notes(source))],
        "links": list(links),
    }


def _source(source: Source) -> Json:
    image = source.image
    is_labels = source.kind == "labels"
    return {
        "kind": source.kind,
        "name": source.name[:_MAX_NAME],
        "dtype": wire_dtype(image),
        "n_t": image.n_t,
        "levels": [_level(image, k) for k in range(len(image.levels))],
        "channels": [] if is_labels else shown_channels(image),
        "colors": label_colors(image) if is_labels else {},
    }


def _level(image: OmeZarrImage, k: int) -> Json:
    level = image.levels[k]
    n_missing = 3 - len(level.voxel_size)
    return {
        "shape": list(volume_shape(level.reader)),
        "scale": [1.0] * n_missing + list(level.voxel_size),
        "translation": [0.0] * n_missing + list(level.translation),
        "planes": [plane for plane in PLANES if k in readable_levels(image, plane)],
    }


def shown_channels(image: OmeZarrImage) -> list[Json]:
    """Return name, colour, window and whether it is on, of every channel that is listed."""
    said = display_of(image.ome, image.channels[:_MAX_CHANNELS])
    is_said = any(channel["active"] for channel in said)
    return [
        {
            "name": channel["label"][:_MAX_NAME],
            "color": _color(channel["color"], "FFFFFF" if image.n_c == 1 else _COLORS[i % len(_COLORS)]),
            "active": bool(channel["active"]) if is_said else i < _MAX_ACTIVE,
            "window": window_of(channel["window"]),
            "limits": _limits(image.dtype),
        }
        for i, channel in enumerate(said)
    ]


def _color(said: str | None, other: str) -> str:
    """Return the colour that is said, or the other one where that cannot be seen."""
    return (said if said and int(said, 16) else other).lower()


def window_of(window: Json | None) -> list[float] | None:
    """Return start and end of an ``omero`` window, None if there is none that makes sense."""
    return [window["start"], window["end"]] if window and window["start"] < window["end"] else None


def _limits(dtype: np.dtype[Any]) -> list[float] | None:
    return [float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)] if dtype.kind in "iu" else None


def label_colors(image: OmeZarrImage) -> dict[str, list[int]]:
    """Return ``image-label`` colours by id, those that conform."""
    own: Any = image.ome.get("image-label")
    colors: dict[str, list[int]] = {}
    for entry in metadata.as_dicts(own.get("colors") if isinstance(own, dict) else None)[:_MAX_COLORS]:
        value, rgba = entry.get("label-value"), entry.get("rgba")
        is_rgba = isinstance(rgba, list) and len(rgba) == 4 and all(type(v) is int for v in rgba)
        if isinstance(rgba, list) and is_rgba and type(value) is int and abs(value) < 2**63:
            colors[str(value)] = [min(max(v, 0), 255) for v in rgba]
    return colors


def _left_out(sources: Sequence[Source]) -> list[str]:
    n, n_all = sum(source.kind == "labels" for source in sources), len(sources[0].image.labels)
    return (
        [f"{n} of {n_all} label images are shown; name others to see them."]
        if n == MAX_LABELS and n_all > n
        else []
    )


def _notes(source: Source) -> list[str]:
    """Return sentences about what is left out or slow, and why."""
    image, notes = source.image, []
    if image.n_c > _MAX_CHANNELS and source.kind != "labels":
        notes.append(f"{source.name}: the first {_MAX_CHANNELS} of {image.n_c} channels are listed.")
    shape = volume_shape(image.levels[0].reader)
    told: dict[str, list[str]] = {}
    for plane, (_, down, right) in PLANES.items():
        levels, nbytes = readable_levels(image, plane), tile_nbytes(image.levels[0].reader, plane)
        if nbytes > BUDGET_NBYTES and min(shape[down], shape[right]) > 1:
            if 0 in levels:
                means = "so every step is slow"
            else:
                means = f"so level {levels[0]} is the finest shown" if levels else "so nothing is shown"
            told.setdefault(f"a tile of level 0 decodes {nbytes / 1e6:,.0f} MB, {means}", []).append(plane)
    for words, planes in told.items():
        notes.append(f"{source.name}, {', '.join(planes)}: {words}. Smaller chunks would help.")
    return notes

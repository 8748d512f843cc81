"""Channels of an image: their names, and the ``omero`` metadata that tells viewers how to show them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.ome_zarr.store import Json

if TYPE_CHECKING:
    from chunkrestore.ome_zarr.arrays import RegionReader

_COLORS = ("00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF", "FFFFFF")
_COLOR = re.compile(r"[0-9a-fA-F]{6}")
_WINDOW_KEYS = ("min", "max", "start", "end")
_SAMPLE_VOXELS = 2**21


def channel_names(ome: Json, n_c: int) -> tuple[str, ...]:
    """Return one name per channel: its ``omero`` label, or its index where there is none."""
    entries = _entries(ome)
    labels = [e.get("label") if isinstance(e, dict) else None for e in entries]
    return tuple(str(labels[i]) if i < len(labels) and labels[i] else str(i) for i in range(n_c))


def display_of(ome: Json, names: Sequence[str]) -> list[Json]:
    """Return how each of the channels called `names` is to be shown, as far as ``omero`` says so and makes sense.

    Keys are ``label``, ``color`` (six hexadecimal digits), ``window`` (four finite numbers) and ``active``; what is not
    said is None.
    """
    entries = _entries(ome)
    shown = []
    for i, name in enumerate(names):
        entry = entries[i] if i < len(entries) and isinstance(entries[i], dict) else {}
        color, window, active = entry.get("color"), entry.get("window"), entry.get("active")
        numbers: list[Any] = [window.get(k) if isinstance(window, dict) else None for k in _WINDOW_KEYS]
        known = [float(v) for v in numbers if type(v) in (int, float) and abs(v) < float("inf")]
        shown.append(
            {
                "label": name,
                "color": color.upper() if isinstance(color, str) and _COLOR.fullmatch(color) else None,
                "window": dict(zip(_WINDOW_KEYS, known, strict=True)) if len(known) == 4 else None,
                "active": active if isinstance(active, bool) else None,
            }
        )
    return shown


def pick_channels(ome: Json, indices: Sequence[int]) -> Json:
    """Return `ome` with only the channels at `indices`; unchanged without ``omero`` channels."""
    entries = _entries(ome)
    if not entries or max(indices) >= len(entries):
        return {key: value for key, value in ome.items() if key != "omero" or not entries}
    return {**ome, "omero": {**ome["omero"], "channels": [entries[i] for i in indices]}}


def named_channels(ome: Json, own_names: Sequence[str], names: Sequence[str] | None, n_c: int) -> Json:
    """Return ``omero`` metadata for `n_c` channels.

    Parameters
    ----------
    ome, own_names
        Attributes and channel names of the image that channels are taken over from; empty if there is none.
    names
        New names. A channel that `ome` has by that name keeps its entry. By default all channels of `ome` are
        kept if there are as many, else channels are named by their index.
    n_c
        Number of channels.
    """
    entries = [e if isinstance(e, dict) else {} for e in _entries(ome)]
    entries += [{}] * (len(own_names) - len(entries))
    if names is None and len(own_names) == n_c:
        pairs = list(zip(own_names, entries, strict=False))
    else:
        known = dict(zip(own_names, entries, strict=False))
        pairs = [(name, known.get(name, {})) for name in names or map(str, range(n_c))]
    colors = ("FFFFFF",) if n_c == 1 else _COLORS
    channels = [
        {"color": colors[i % len(colors)], "label": name, **(entry or {"active": True})}
        for i, (name, entry) in enumerate(pairs)
    ]
    omero = ome.get("omero")
    return {**(omero if isinstance(omero, dict) else {}), "channels": channels}


def with_view(omero: Json, n_t: int, n_z: int) -> Json:
    """Return `omero` with where a viewer begins: the middle plane of the first time point, where nothing is said.

    What is said and lies beyond the image, which may be a part of another, is left out.
    """
    said = omero.get("rdefs")
    if not isinstance(said, dict):
        return {**omero, "rdefs": {"defaultT": 0, "defaultZ": n_z // 2, "model": "color"}}
    ends = {"defaultT": n_t, "defaultZ": n_z}
    kept = {k: v for k, v in said.items() if k not in ends or (isinstance(v, int) and 0 <= v < ends[k])}
    return {**omero, "rdefs": kept}


def without_windows(omero: Json) -> Json:
    """Return `omero` without display windows; `fill_windows` computes them from the finished data."""
    return {**omero, "channels": [{k: v for k, v in c.items() if k != "window"} for c in omero["channels"]]}


def fill_windows(omero: Json, coarsest: RegionReader) -> Json:
    """Return `omero` with a display window for every channel that lacks one.

    The window shown spans the 0.1 to the 99.9 percentile of the coarsest level (at most its central 2
    million voxels, first time point); its limits are those of an integer dtype, or the sampled extremes.
    """
    channels = []
    for c, entry in enumerate(omero["channels"]):
        window = entry.get("window")
        is_complete = isinstance(window, dict) and all(
            isinstance(window.get(k), int | float) for k in _WINDOW_KEYS
        )
        channels.append(entry if is_complete else {**entry, "window": _window(coarsest, c)})
    return {**omero, "channels": channels}


def _window(coarsest: RegionReader, c: int) -> dict[str, float]:
    shape = coarsest.spatial_shape
    side = int(_SAMPLE_VOXELS ** (1 / len(shape)))
    first = [max(0, (n - side) // 2) for n in shape]
    centre = tuple(slice(a, min(n, a + side)) for a, n in zip(first, shape, strict=True))
    sample: np.ndarray[Any, Any] = coarsest.read(0, c, centre)
    if coarsest.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]  # JSON has no other numbers
        sample = sample if sample.size else np.zeros(1)
    low, high = (float(v) for v in (sample.min(), sample.max()))
    start, end = (float(v) for v in np.percentile(sample, (0.1, 99.9)))
    if coarsest.dtype.kind in "iu":
        limits = np.iinfo(coarsest.dtype)
        low, high = float(limits.min), float(limits.max)
    end = end if end > start else start + 1.0
    return {"min": min(low, start), "max": max(high, end), "start": start, "end": end}


def _entries(ome: Json) -> list[Any]:
    omero = ome.get("omero")
    entries = omero.get("channels") if isinstance(omero, dict) else None
    return entries if isinstance(entries, list) else []

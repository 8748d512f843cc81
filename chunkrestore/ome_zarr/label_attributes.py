"""What an image of labels says of its objects: colours, properties, and the image that they were found in."""

from __future__ import annotations

import copy
import json
import os
import posixpath
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.store import Json

Color = tuple[int, int, int, int]
"""Red, green, blue and opacity, 0 to 255."""

Colors = Mapping[int, Sequence[int]]
Properties = Mapping[int, Mapping[str, Any]]

MAX_ENTRIES = 10_000
"""Objects with a colour or properties of their own: a megabyte of JSON, which whoever opens the labels loads whole."""

MAX_NBYTES = 2**24
"""Of all properties."""

_OWN_IMAGE = "../../"
_REBUILT = ("version", "source")

# Fractional parts of the golden ratio and of two square roots: their multiples never come close to repeating.
_HUE_STEP, _SATURATION_STEP, _VALUE_STEP = 0.6180339887498949, 0.4142135623730951, 0.7320508075688772


def image_label(
    dtype: np.dtype[Any],
    *,
    colors: Colors | None = None,
    properties: Properties | None = None,
    like: OmeZarrImage | None = None,
) -> Json:
    """Return the ``image-label`` object of new labels, without their source.

    Parameters
    ----------
    dtype
        Of the labels.
    colors
        Red, green, blue and opacity from 0 to 255 by label id.
    properties
        JSON-compatible values by name, by label id.
    like
        Labels whose colours, properties and unknown keys are kept where none are given.

    Raises
    ------
    ValueError
        If an id is none of `dtype`, a colour or property is malformed, or there are more than `MAX_ENTRIES`.
    """
    result = {} if like is None else label_attributes(like)
    if colors is not None:
        ids = _checked_ids("colors", colors, dtype)
        _put(result, "colors", [{"label-value": i, "rgba": _rgba(i, c)} for i, c in ids])
    if properties is not None:
        ids = _checked_ids("properties", _completed(properties, colors), dtype)
        _put(result, "properties", [{"label-value": i, **_checked_properties(i, p)} for i, p in ids])
        nbytes = len(json.dumps(result.get("properties")))
        if nbytes > MAX_NBYTES:
            raise ValueError(
                f"`properties` take {nbytes} bytes of JSON, the limit is {MAX_NBYTES}; write the table of the objects"
            )
    return result


def label_attributes(labels: OmeZarrImage) -> Json:
    """Return what labels say of their objects, to be kept by a copy: ``image-label`` but for source and version.

    Empty for an image that is no labels.
    """
    own = labels.ome.get("image-label")
    return copy.deepcopy({k: v for k, v in own.items() if k not in _REBUILT}) if isinstance(own, dict) else {}


def source_image(path: str, root: str, like: OmeZarrImage | None) -> str | None:
    """Return the path from labels to the image that they were found in, or None if no relative path leads there.

    Parameters
    ----------
    path
        Of the group of the labels.
    root
        Of the group that they are in.
    like
        The image, or labels that were found in it; None: that in `root`.
    """
    place = None if like is None else _image_of(like)
    if place is None or stores.same(place, root):
        return _OWN_IMAGE
    if stores.is_url(place) != stores.is_url(path):
        return None
    if not stores.is_url(place):
        try:
            return Path(os.path.relpath(place, path)).as_posix()
        except ValueError:  # another drive
            return None
    (host, _, there), (own_host, _, here) = (_split(url) for url in (place, path))
    return posixpath.relpath(f"/{there}", f"/{here}") if host == own_host else None


def distinct_colors(ids: Iterable[int], *, opacity: int = 255) -> dict[int, Color]:
    """Return a colour for every id, which depends on the id alone: it stays when other objects come and go.

    Neighbouring ids differ in hue by more than a third of the circle; 0, the background, is transparent.

    Parameters
    ----------
    ids
        Label ids.
    opacity
        From 0 to 255.
    """
    return {int(i): _color(int(i), opacity) if i else (0, 0, 0, 0) for i in ids}


def class_colors(classes: Mapping[int, Hashable], *, opacity: int = 255) -> dict[int, Color]:
    """Return for every label id the colour of its class: the same for all objects of one.

    Parameters
    ----------
    classes
        Class by label id. Integers keep their colour whatever other classes there are, anything else is counted in
        the order in which it first comes.
    opacity
        From 0 to 255.
    """
    order = {c: i for i, c in enumerate(dict.fromkeys(classes.values()), 1)}
    # Classes are counted from 0 by some, and 0 is no background here.
    numbers = {c: c + 1 if isinstance(c, int) else i for c, i in order.items()}
    return {int(i): _color(numbers[c], opacity) for i, c in classes.items()}


def _color(i: int, opacity: int) -> Color:
    import colorsys

    rgb = colorsys.hsv_to_rgb(
        i * _HUE_STEP % 1.0, 0.5 + 0.5 * (i * _SATURATION_STEP % 1.0), 0.65 + 0.35 * (i * _VALUE_STEP % 1.0)
    )
    red, green, blue = (round(255 * v) for v in rgb)
    return red, green, blue, opacity


def _put(about: Json, key: str, entries: list[Json]) -> None:
    """Set `entries`, or remove them where there are none: an empty list is not allowed."""
    about.pop(key, None)
    if entries:
        about[key] = entries


def _checked_ids(name: str, entries: Any, dtype: np.dtype[Any]) -> list[tuple[int, Any]]:
    """Return ids, as Python integers, with what belongs to them."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"`{name}` {short(entries)} must be a mapping of label ids")
    if len(entries) > MAX_ENTRIES:
        raise ValueError(
            f"`{name}` has {len(entries)} entries, the limit of what viewers load whole is {MAX_ENTRIES}; leave it out "
            "(viewers colour labels by id) and write the table of the objects"
        )
    limits = np.iinfo(dtype)
    for i in entries:
        if isinstance(i, bool) or not isinstance(i, int | np.integer) or not limits.min <= i <= limits.max:
            raise ValueError(
                f"`{name}` name label id {short(i)}, which is no {dtype.name}: {limits.min} to {limits.max}"
            )
    return [(int(i), value) for i, value in entries.items()]


def _completed(properties: Any, colors: Colors | None) -> Any:
    """Return properties of all objects that have a colour, empty ones where there are none.

    There is a reader that refuses labels whose colours and properties are not of the same objects.
    """
    if not isinstance(properties, Mapping) or not isinstance(colors, Mapping):
        return properties
    without = [i for i in properties if i not in colors]
    if without:
        raise ValueError(
            f"`properties` name label {short(without[0])}, which is not among `colors`; give colours of all or none"
        )
    return {i: properties.get(i, {}) for i in colors}


def _rgba(i: int, color: Any) -> list[int]:
    """Return four integers of 8 bits."""
    values = list(color) if isinstance(color, Sequence | np.ndarray) and not isinstance(color, str) else []
    fits = all(isinstance(v, int | np.integer) and not isinstance(v, bool) and 0 <= v <= 255 for v in values)
    if len(values) != 4 or not fits:
        raise ValueError(
            f"`colors` of label {i} are {short(color)}; give red, green, blue and opacity as integers from 0 to 255"
        )
    return [int(v) for v in values]


def _checked_properties(i: int, values: Any) -> Json:
    """Return properties of one object."""
    if (
        not isinstance(values, Mapping)
        or not all(isinstance(k, str) for k in values)
        or "label-value" in values
    ):
        raise ValueError(
            f"`properties` of label {i} are {short(values)}; give values by name, none of them 'label-value'"
        )
    try:
        json.dumps(dict(values), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`properties` of label {i} are no JSON ({error}); use strings, finite numbers, lists and None"
        ) from None
    return dict(values)


def _image_of(like: OmeZarrImage) -> str | None:
    """Return where an image lies, or the image that labels were found in, by what they say."""
    if not like.is_labels:
        return like.path
    own = like.ome.get("image-label")
    source = own.get("source") if isinstance(own, dict) else None
    path = source.get("image") if isinstance(source, dict) else None
    if not isinstance(path, str) or "://" in path or posixpath.isabs(path) or not path.isprintable():
        return None
    if stores.is_url(like.path):
        scheme, _, rest = like.path.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"
    return os.path.normpath(os.path.join(like.path, path))


def _split(url: str) -> tuple[str, str, str]:
    """Return scheme and host, and the path behind them."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}", slash, path

"""What is looked at: an image, what it was made from, and labels, opened from the metadata of stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkrestore.ome_zarr import OmeZarrImage, metadata, open_image, open_source
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.read import label_names, open_label

Store = str | os.PathLike[str]

MAX_LABELS = 64
"""Label images that are opened where none are named."""


@dataclass(frozen=True)
class Source:
    """One image or label image of a scene."""

    kind: str
    """``"image"``, ``"before"`` or ``"labels"``."""
    name: str
    """For people."""
    image: OmeZarrImage
    """Opened; nothing of it was read."""


def open_sources(
    store: Store, *, before: Store | None = None, labels: str | Sequence[str] | None = None
) -> list[Source]:
    """Open what a store shows: its image, what that was made from, and its labels.

    Parameters
    ----------
    store
        OME-Zarr image, label image, or group that holds only labels; path or URL.
    before
        Image to compare with. By default the input that the provenance of the output names, if it is still there, on
        this machine, and of the same shape. Labels without an image are shown over it.
    labels
        Names of the labels to show; by default all, up to `MAX_LABELS`.

    Returns
    -------
    list of Source
        Image and before, of which one may be missing, then the labels; never empty.

    Raises
    ------
    FileNotFoundError, ValueError
        If `store` or `before` cannot be opened, or there are no such labels.
    """
    path = stores.location(store)
    image, overlays = _opened(path, labels)
    first = image or overlays[0].image
    earlier = _input_of(first) if before is None else open_source(before)
    if image is None and earlier is not None:
        return [Source("image", stores.name_of(earlier.path), earlier), *overlays]
    found = [] if image is None else [Source("image", stores.name_of(path), image)]
    if earlier is not None:
        found.append(Source("before", stores.name_of(earlier.path), earlier))
    return [*found, *overlays]


def _opened(path: str, labels: str | Sequence[str] | None) -> tuple[OmeZarrImage | None, list[Source]]:
    """Return the image of a store, None if it holds only labels, and the labels wanted."""
    try:
        image = open_image(path)
    except ValueError:
        if not stores.read_node(path) or not label_names(path):
            raise
        image = None
    if image is not None and image.is_labels:
        return None, [Source("labels", stores.name_of(path), image)]
    known = label_names(path) if image is None else image.labels
    names = known[:MAX_LABELS] if labels is None else (labels,) if isinstance(labels, str) else tuple(labels)
    if missing := [name for name in names if name not in known]:
        listed = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"`labels` {missing[0]!r} do not exist in {path}; it has {listed}")
    return image, [Source("labels", name, open_label(path, name)) for name in names]


def _input_of(image: OmeZarrImage) -> OmeZarrImage | None:
    """Return what `image` was made from, if its provenance tells and it is still as large."""
    content: Any = image.others.get(metadata.OWN_KEY)
    for key in ("provenance", "input"):
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        return None
    place, array = content.get("store"), content.get("array")
    # A store may come from anybody: it must not make this machine ask a server that it names.
    if not isinstance(place, str) or not isinstance(array, str) or stores.is_url(place):
        return None
    try:
        earlier = open_source(place)
        paths = [level.path for level in earlier.levels]
        earlier = earlier.select(level=paths.index(array))
    except (OSError, ValueError):
        return None
    is_alike = (earlier.spatial_shape, earlier.n_t) == (image.spatial_shape, image.n_t)
    return earlier if is_alike and not stores.same(earlier.path, image.path) else None

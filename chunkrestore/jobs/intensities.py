"""Which intensities a table of objects tells of: channels of images, and what their columns are called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from chunkrestore.jobs.object_columns import Channel
from chunkrestore.jobs.request import selected, selection_of
from chunkrestore.kernels.object_measures import INTENSITY_DTYPES
from chunkrestore.ome_zarr import OmeZarrImage, RegionReader, metadata, open_image, open_source
from chunkrestore.ome_zarr import store as stores

Store: TypeAlias = str | os.PathLike[str]
Images: TypeAlias = (
    "Store | OmeZarrImage | Sequence[Store | OmeZarrImage] | Mapping[str, Store | OmeZarrImage]"
)

_LONGEST_NAME = 64
"""Characters of a channel's name that its columns begin with: names come from anybody."""


@dataclass(frozen=True)
class Source:
    """One channel of one image."""

    column: Channel
    """What its columns are called, and their type."""
    reader: RegionReader
    """The image."""
    channel: int
    """Index in what the reader offers."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies it."""
        return {"name": self.column.name, "channel": self.channel} | self.reader.identity()


def sources_of(
    path: str,
    labels: OmeZarrImage,
    images: Images | None,
    channels: str | int | Sequence[str | int] | None,
    level: int,
) -> list[Source]:
    """Return the channels to measure, with the names of their columns.

    Parameters
    ----------
    path
        Store of the labels.
    labels
        At `level`.
    images, channels, level
        As for `chunkrestore.jobs.measure.measure`.

    Raises
    ------
    ValueError
        If an image is of another shape than the labels, or of a type that cannot be summed exactly; if a channel does
        not exist, or two would be called the same.
    """
    opened = _opened(path, images)
    found = []
    for prefix, image in opened.items():
        chosen = image.select(level=level, c=channels)
        reader = chosen.source(0)
        if chosen.spatial_shape != labels.spatial_shape or chosen.n_t != labels.n_t:
            raise ValueError(
                f"`images`: {image.path} has {chosen.n_t} time points of {chosen.spatial_shape} voxels, the labels "
                f"{labels.path} have {labels.n_t} of {labels.spatial_shape}; they must be the same"
            )
        if chosen.dtype.name not in INTENSITY_DTYPES:
            raise ValueError(
                f"`images`: {image.path} is of {chosen.dtype.name}; intensities can be {', '.join(INTENSITY_DTYPES)}. "
                "Convert it first (`chunkrestore convert`)"
            )
        for k, channel in enumerate(chosen.channels):
            title = f"{prefix}_{channel}" if len(opened) > 1 else channel
            found.append(Source(Channel(column_name(title), chosen.dtype), reader, k))
    names = [source.column.name for source in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"channels would be called {', '.join(names)}, and columns need different names; name images by a mapping, "
            "or choose `channels`"
        )
    return found


def places_of(images: Images | None) -> Any:
    """Return JSON-compatible values by which `images_at` finds images again."""
    if images is None:
        return None
    if isinstance(images, Mapping):
        return {"named": {str(name): places_of(image) for name, image in images.items()}}
    if isinstance(images, OmeZarrImage):
        return selection_of(images)
    if isinstance(images, str | os.PathLike):
        return stores.location(images)
    return [places_of(image) for image in images]


def images_at(places: Any) -> Images | None:
    """Return the images that `places_of` has described."""
    if isinstance(places, list):
        return [images_at(place) for place in places]  # type: ignore[misc]
    if not isinstance(places, dict):
        return places  # type: ignore[no-any-return]
    if "named" in places:
        return {name: images_at(place) for name, place in places["named"].items()}  # type: ignore[misc]
    return selected(places)


def _opened(path: str, images: Images | None) -> dict[str, OmeZarrImage]:
    """Return the images by name."""
    if images is None:
        image = own_image(path)
        return {} if image is None else {"": image}
    if isinstance(images, Mapping):
        return {str(name): open_source(image) for name, image in images.items()}
    several = [images] if isinstance(images, str | os.PathLike | OmeZarrImage) else list(images)
    opened = [open_source(image) for image in several]
    names = [re.sub(r"(\.ome)?\.zarr$", "", stores.name_of(image.path)) for image in opened]
    if len(set(names)) < len(names):
        raise ValueError(f"`images` would be called {', '.join(names)}; give a mapping from names to stores")
    return dict(zip(names, opened, strict=True))


def own_image(path: str) -> OmeZarrImage | None:
    """Return the image in a store, or None if the store holds labels only."""
    node = stores.read_node(path)
    if node is None or "multiscales" not in metadata.split(node, path)[1]:
        return None
    return open_image(path)


def column_name(title: str) -> str:
    """Return what the columns of a channel begin with: letters, digits and ``_`` alone, and no digit first.

    >>> column_name("DAPI (405 nm)"), column_name("0")
    ('DAPI_405_nm', 'channel_0')
    """
    name = re.sub(r"\W+", "_", title).strip("_")[:_LONGEST_NAME]
    return name if name and not name[0].isdigit() else f"channel_{name}".rstrip("_")

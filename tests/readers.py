"""OME-Zarr as other people's software sees it: one view for every reader, none of which shares code with us.

What a reader does not tell is None in its view, with the reason beside it. All of them read both versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class View:
    """What one reader says of one image."""

    axes: str
    """Letters, in the order of the array."""
    units: dict[str, str | None]
    """By axis."""
    scales: list[dict[str, float]]
    """By axis, of every level that the reader tells of, finest first."""
    translations: list[dict[str, float]] | None
    """The same."""
    levels: list[Any]
    """Arrays, lazy or not."""
    channels: list[tuple[str, str, tuple[float, float]]] | None = None
    """Name, colour and the window shown."""
    labels: list[str] | None = None
    """Names of the labels beside the image."""
    colors: dict[int, tuple[int, ...]] | None = field(default_factory=dict)
    """Of labels: red, green, blue and opacity by id."""
    properties: dict[int, dict[str, Any]] | None = field(default_factory=dict)
    """Of labels: values by name, by id."""

    def voxels(self) -> list[np.ndarray]:
        """Return every level."""
        return [np.asarray(level) for level in self.levels]


def by_ome_zarr(path: Path) -> View:
    """Read with ome-zarr-py, whose classes tell nothing of transformations of the whole multiscale."""
    from ome_zarr.io import parse_url
    from ome_zarr.reader import OMERO, Label, Labels, Multiscales, Node

    location = parse_url(str(path))
    assert location is not None
    node = Node(location, [])
    specs = {type(spec): spec for spec in node.specs}
    assert Multiscales in specs
    axes = node.metadata["axes"]
    names = [axis["name"] for axis in axes]
    scales, translations = _vectors(node.metadata["coordinateTransformations"], names)
    channels = None
    if OMERO in specs:
        colors = ["".join(f"{round(255 * v):02X}" for v in end) for _, end in node.metadata["colormap"]]
        windows = [tuple(limits) for limits in node.metadata["contrast_limits"]]
        channels = list(zip(node.metadata["channel_names"], colors, windows, strict=True))
    listed = next((n for n in node.post_nodes if any(isinstance(s, Labels) for s in n.specs)), None)
    labels = [n.metadata["name"] for n in listed.post_nodes] if listed is not None else []
    colors = node.metadata.get("color", {}) if Label in specs else {}
    return View(
        axes="".join(names),
        units={axis["name"]: axis.get("unit") for axis in axes},
        scales=scales,
        translations=translations,
        levels=node.data,
        channels=channels,
        labels=labels,
        colors={i: tuple(round(255 * v) for v in rgba) for i, rgba in colors.items()},
        properties=node.metadata.get("properties", {}),
    )


def by_ngff_zarr(path: Path) -> View:
    """Read with ngff-zarr, which decodes in Rust, checks the schema, and knows neither labels nor their colours."""
    import ngff_zarr

    multiscales = ngff_zarr.from_ngff_zarr(str(path), validate=True)
    images = multiscales.images
    omero = multiscales.metadata.omero
    channels = [
        (c.label, c.color, (c.window.start, c.window.end))
        for c in (omero.channels if omero is not None else [])
    ]
    return View(
        axes="".join(images[0].dims),
        units=dict(images[0].axes_units or dict.fromkeys(images[0].dims)),
        scales=[dict(image.scale) for image in images],
        translations=[dict(image.translation) for image in images],
        levels=[image.data for image in images],
        channels=channels or None,
        colors=None,
        properties=None,
    )


def by_ome_zarr_models(path: Path) -> View:
    """Read with ome-zarr-models, and its voxels with zarr-python."""
    import zarr
    from ome_zarr_models import open_ome_zarr, v04, v05

    group = zarr.open_group(path, mode="r")
    own = group.attrs.get("ome", group.attrs)
    if "image-label" in own:  # of 0.4, the image would do as well
        model = (v05 if "ome" in group.attrs else v04).ImageLabel.from_zarr(group)
    else:
        model = open_ome_zarr(group)
    attributes = getattr(model, "ome_attributes", None) or model.attributes
    view = _of_models(attributes, path)
    listed = getattr(model, "labels", None)
    found = [] if listed is None else listed.attributes
    view.labels = list(getattr(getattr(found, "ome", found), "labels", found))
    return view


def by_yaozarrs(path: Path) -> View:
    """Read with yaozarrs, which validates and drops the properties of labels, and its voxels with TensorStore."""
    import yaozarrs

    group = yaozarrs.validate_zarr_store(str(path))
    metadata = group.ome_metadata()
    view = _of_models(metadata, path)
    view.levels = [group[d.path].to_tensorstore().read().result() for d in metadata.multiscales[0].datasets]
    view.labels = list(group["labels"].ome_metadata().labels) if "labels" in group else []
    view.properties = None
    return view


def by_napari(path: Path) -> View:
    """Read with napari-ome-zarr, which tells the finest level's scale and no translation.

    Up to 0.10, a layer of an image says on which axis its channels lie; from 0.11 on, every channel is a layer.
    """
    from napari_ome_zarr import napari_get_reader

    layers = napari_get_reader(str(path))(str(path))
    if path.parent.name == "labels":  # then napari shows the image as well
        layers = [
            layer for layer in layers if layer[2] == "labels" and _last_part(layer[1]["name"]) == path.name
        ]
        labels = []
    else:
        labels = list(dict.fromkeys(_last_part(m["name"]) for _, m, kind in layers if kind == "labels"))
        layers = [layer for layer in layers if layer[2] == "image"]
    data, about, kind = layers[0]
    names = list(about["axis_labels"])
    units = [None if u == "pixel" else u for u in about.get("units", [None] * len(names))]
    view = View(
        axes="".join(names),
        units=dict(zip(names, units, strict=True)),
        scales=[dict(zip(names, about["scale"], strict=True))],
        translations=None,
        levels=data,
        channels=_napari_channels(layers) if kind == "image" else None,
        labels=labels,
        colors={i: tuple(round(255 * v) for v in c) for i, c in about.get("colormap", {}).items() if i}
        if kind == "labels"
        else {},
        properties=_napari_properties(about),
    )
    position = about.get("channel_axis", names.index("t") + 1 if "t" in names else 0)
    if "channel_axis" in about or len(layers) > 1:
        view.axes = "".join((*names[:position], "c", *names[position:]))
    if len(layers) > 1:
        view.levels = [
            np.stack([np.asarray(d[k]) for d, _, _ in layers], axis=position) for k in range(len(data))
        ]
    return view


def _napari_channels(layers: list[Any]) -> list[tuple[str, str, tuple[float, float]]] | None:
    """Return the channels of one layer, or of several."""
    channels = []
    for _, about, _ in layers:
        if "contrast_limits" not in about:
            return None
        has_several = "channel_axis" in about
        each = [about[k] if has_several else [about[k]] for k in ("name", "colormap", "contrast_limits")]
        for name, colormap, limits in zip(*each, strict=True):
            color = "".join(f"{round(255 * v):02X}" for v in colormap.colors[-1][:3])
            channels.append((name.split(": ", 1)[1], color, tuple(limits)))
    return channels


def _napari_properties(about: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return properties by id, of columns that hold nothing where an object has none."""
    if "features" in about:
        columns = {k: list(about["features"][k]) for k in about["features"]}
        ids = columns.pop("label_value")
    else:
        columns = dict(about.get("properties", {}))
        ids = columns.pop("index", [])
    return {
        int(i): {k: v[row] for k, v in columns.items() if v[row] is not None and v[row] == v[row]}
        for row, i in enumerate(ids)
    }


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1]


READERS = {
    "ome-zarr": by_ome_zarr,
    "ngff-zarr": by_ngff_zarr,
    "ome-zarr-models": by_ome_zarr_models,
    "yaozarrs": by_yaozarrs,
    "napari-ome-zarr": by_napari,
}


def _of_models(metadata: Any, path: Path) -> View:
    """Return the view of pydantic models, which are named alike in two libraries."""
    import zarr
    from ome_zarr_models.common.omero import Omero

    multiscale = metadata.multiscales[0]
    names = [axis.name for axis in multiscale.axes]
    steps = [
        [
            s.model_dump()
            for s in (*d.coordinateTransformations, *(multiscale.coordinateTransformations or ()))
        ]
        for d in multiscale.datasets
    ]
    scales, translations = _vectors(steps, names)
    omero = getattr(metadata, "omero", None)
    if isinstance(omero, dict):  # ome-zarr-models has no model of it in 0.5, where the text is that of 0.4
        omero = Omero.model_validate(omero)
    channels = [
        (c.label, c.color, (c.window.start, c.window.end))
        for c in (omero.channels if omero is not None else [])
    ]
    label = getattr(metadata, "image_label", None)
    dumps = [
        [entry.model_dump(by_alias=True) for entry in getattr(label, key, None) or ()]
        for key in ("colors", "properties")
    ]
    ids = [
        [entry.pop("label-value", entry.pop("label_value", None)) for entry in entries] for entries in dumps
    ]
    return View(
        axes="".join(names),
        units={axis.name: None if axis.unit is None else str(axis.unit) for axis in multiscale.axes},
        scales=scales,
        translations=translations,
        levels=[zarr.open_array(path / d.path, mode="r")[...] for d in multiscale.datasets],
        channels=channels or None,
        colors={int(i): tuple(entry["rgba"]) for i, entry in zip(ids[0], dumps[0], strict=True)},
        properties=dict(zip(ids[1], dumps[1], strict=True)),
    )


def _vectors(
    levels: list[list[dict[str, Any]]], names: list[str]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return scale and translation of every level, all of its steps composed."""
    scales, translations = [], []
    for steps in levels:
        scale, translation = np.ones(len(names)), np.zeros(len(names))
        for step in steps:
            if step["type"] == "scale":
                scale, translation = scale * step["scale"], translation * step["scale"]
            elif step["type"] == "translation":
                translation = translation + step["translation"]
        scales.append(dict(zip(names, scale.tolist(), strict=True)))
        translations.append(dict(zip(names, translation.tolist(), strict=True)))
    return scales, translations

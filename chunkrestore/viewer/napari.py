"""Stores in napari: layers with their pyramids, places in micrometres, colours, and what is known of the objects."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.viewer.objects import read_columns
from chunkrestore.viewer.scene import label_colors, shown_channels
from chunkrestore.viewer.sources import Source, Store, open_sources

if TYPE_CHECKING:
    import dask.array as da

LayerData = tuple[Any, dict[str, Any], str]
"""Array or pyramid, arguments of the layer, and its kind, as napari's readers give them."""

_QT = ("PyQt6", "PySide6", "PyQt5", "PySide2")
_OTHER_LABELS = (0.6, 0.6, 0.6, 1.0)
"""Colour of the labels that have none, where some have."""


def can_show() -> bool:
    """Return whether napari is installed with a library for windows; nothing is imported."""
    return all(find_spec(name) for name in ("napari", "qtpy")) and any(find_spec(name) for name in _QT)


def open_in_napari(
    store: Store,
    before: Store | None = None,
    labels: str | Sequence[str] | None = None,
    *,
    viewer: Any = None,
    block: bool = False,
) -> Any:
    """Add an image, what it was made from, and its labels to napari.

    Parameters
    ----------
    store, before, labels
        As for `chunkrestore.viewer.sources.open_sources`. The image before is added below the others.
    viewer
        ``napari.Viewer`` to add to; a new window by default.
    block
        Return when the window is closed.

    Returns
    -------
    napari.Viewer
        The viewer, on the middle plane.

    Raises
    ------
    ImportError
        If napari is not installed, or has no Qt to open a window with.
    FileNotFoundError, ValueError
        If there is nothing to show.
    """
    sources = open_sources(store, before=before, labels=labels)
    if viewer is None:
        if not can_show():
            raise ImportError(
                'napari with Qt is needed to open windows: pip install "napari[all]"; or viewer="web"'
            )
        import napari

        viewer = napari.Viewer(title=sources[0].name)
    from napari.layers import Layer

    for data in layers(sources):
        viewer.add_layer(Layer.create(*data))
    viewer.dims.axis_labels = _plain_axes(_widest(sources))
    # What napari draws over the canvas moved there in 0.9.
    overlays = viewer.canvas.overlays if hasattr(viewer, "canvas") else viewer
    overlays.scale_bar.visible = True
    if block:
        import napari

        napari.run()
    return viewer


def napari_get_reader(path: str | list[str]) -> Callable[[Any], list[LayerData]] | None:
    """Return a function that reads the OME-Zarr at `path`, None if there is none; the hook of napari's plugins."""
    if not isinstance(path, str | os.PathLike) or not os.path.isdir(path):
        return None
    try:
        open_sources(path)
    except (OSError, ValueError):
        return None
    return _read


def layers(sources: Sequence[Source]) -> Iterator[LayerData]:
    """Yield the layers of a scene, bottom first: before, image, labels; one per channel."""
    order = {"before": 0, "image": 1, "labels": 2}
    for source in sorted(sources, key=lambda s: order[s.kind]):
        yield from _label_layers(source) if source.kind == "labels" else _image_layers(source)


def _read(path: Any) -> list[LayerData]:
    """Return the image of a store with its labels; what it was made from is not added unasked."""
    return list(layers([source for source in open_sources(path) if source.kind != "before"]))


def _image_layers(source: Source) -> Iterator[LayerData]:
    image = source.image
    for c, channel in enumerate(shown_channels(image)):
        name = source.name if image.n_c == 1 else f"{source.name} {channel['name']}"
        options = {
            **_place(image),
            "name": name,
            "blending": "additive" if c else "translucent_no_depth",
            "colormap": _colormap(channel["color"]),
            "visible": bool(channel["active"]) and source.kind != "before",
        }
        if channel["window"] is not None:
            options["contrast_limits"] = channel["window"]
        data = [_without_channels(image, image.level(k), c) for k in _shrinking(image)]
        yield (
            (data, {**options, "multiscale": True}, "image") if len(data) > 1 else (data[0], options, "image")
        )


def _label_layers(source: Source) -> Iterator[LayerData]:
    image = source.image
    options = {**_place(image), "name": source.name, "opacity": 0.5}
    colors = label_colors(image)
    if colors:
        listed = {int(label): [v / 255 for v in rgba] for label, rgba in colors.items()}
        from napari.utils.colormaps import DirectLabelColormap

        known: dict[Any, Any] = {None: _OTHER_LABELS, 0: (0, 0, 0, 0), **listed}
        options["colormap"] = DirectLabelColormap(color_dict=known)
    columns = read_columns(image.path) if image.n_t * image.n_c == 1 else None
    if columns is not None:
        options["features"] = {"index": columns["label"], **columns}
    data = [_without_channels(image, image.level(k), 0) for k in _shrinking(image)]
    yield (data, {**options, "multiscale": True}, "labels") if len(data) > 1 else (data[0], options, "labels")


def _place(image: OmeZarrImage) -> dict[str, Any]:
    """Return where a layer lies: micrometres along space, indices along time."""
    axes = _plain_axes(image)
    n_lead = len(axes) - len(image.voxel_size)
    unit = "micrometer" if image.calibrated else "pixel"
    return {
        "scale": (1.0,) * n_lead + image.voxel_size,
        "translate": (0.0,) * n_lead + image.translation,
        "units": ("pixel",) * n_lead + (unit,) * len(image.voxel_size),
        "axis_labels": tuple(axes),
        "metadata": {"path": image.path},
    }


def _shrinking(image: OmeZarrImage) -> list[int]:
    """Return the levels that are smaller than the one before, as napari wants them."""
    kept = [0]
    for k, level in enumerate(image.levels):
        if math.prod(level.shape) < math.prod(image.levels[kept[-1]].shape):
            kept.append(k)
    return kept


def _without_channels(image: OmeZarrImage, data: da.Array, c: int) -> da.Array:
    return data[(slice(None),) * image.axes.index("c") + (c,)] if "c" in image.axes else data


def _colormap(color: str) -> Any:
    """Return a colour map from black to a colour; the name of napari's own where there is one."""
    if color == "ffffff":
        return "gray"
    from napari.utils.colormaps import Colormap

    rgb = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return Colormap([[0, 0, 0, 1], [*rgb, 1]], name=f"#{color}")


def _plain_axes(image: OmeZarrImage) -> str:
    return image.axes.replace("c", "")


def _widest(sources: Sequence[Source]) -> OmeZarrImage:
    """Return the image with most axes."""
    return max((source.image for source in sources), key=lambda image: len(_plain_axes(image)))

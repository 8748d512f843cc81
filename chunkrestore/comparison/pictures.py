"""Pictures of a comparison: slices, outlines, profiles and curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.comparison.result import Comparison
from chunkrestore.ome_zarr import OmeZarrImage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST = 384
"""Voxels per axis of what is shown; of larger volumes the middle."""
_ZOOM = 56
"""Voxels per axis of the enlarged part."""
_COLOURS = {"threshold": "#39d0ff", "watershed": "#ffd23f", "stardist": "#7cff6b", "truth": "#ff4fd8"}
_STYLES = {"threshold": ":", "watershed": "--", "stardist": "-"}


@dataclass(frozen=True)
class Row:
    """One image of the picture."""

    title: str
    """What it is."""
    image: OmeZarrImage
    """Of one time point and channel."""
    background: float
    """Subtracted before it is shown."""
    labels: Mapping[str, OmeZarrImage] = field(default_factory=dict)
    """Segmentations by name."""


@dataclass(frozen=True)
class Scene:
    """What is drawn."""

    rows: tuple[Row, ...]
    """One per method."""
    truth: Row | None
    """The true image."""
    labels: OmeZarrImage | None
    """The true labels."""

    @property
    def reference(self) -> Row:
        """What sets the grey scale: the truth, or without it the first image."""
        return self.truth or self.rows[0]


@dataclass(frozen=True)
class _View:
    """Which voxels are shown."""

    box: tuple[slice, slice, slice]
    """Middle of the volume; z has one plane in two dimensions."""
    zoom: tuple[slice, slice]
    """Enlarged part of the middle plane, in voxels of the box."""
    limits: tuple[float, float]
    """Intensities shown as black and white."""

    def read(self, image: OmeZarrImage, background: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the middle xy and xz plane."""
        z, y, x = self.box
        across = slice((y.start + y.stop) // 2, (y.start + y.stop) // 2 + 1)
        plane = slice((z.start + z.stop) // 2, (z.start + z.stop) // 2 + 1)
        flat = len(image.spatial_shape) == 2
        regions = [(plane, y, x), (z, across, x)]
        xy, xz = (image.source().read(0, 0, region[1:] if flat else region) for region in regions)
        shapes = [(y.stop - y.start, x.stop - x.start), (z.stop - z.start, x.stop - x.start)]
        planes = [part.reshape(shape) for part, shape in zip((xy, xz), shapes, strict=True)]
        if image.dtype.kind in "iu" and not background and image.is_labels:
            return planes[0], planes[1]
        return planes[0] - np.float64(background), planes[1] - np.float64(background)


def draw(comparison: Comparison, scene: Scene) -> None:
    """Draw ``comparison.png``, ``f1.png`` and ``fsc.png`` into the folder of a comparison."""
    _draw_images(comparison, scene)
    if any(one.segmentations for one in comparison.methods):
        _draw_f1(comparison)
    if any(one.score and one.score.image and one.score.image.fsc for one in comparison.methods):
        _draw_fsc(comparison)


def _draw_images(comparison: Comparison, scene: Scene) -> None:
    view = _view(scene)
    cuts = list(dict.fromkeys(key for row in scene.rows for key in row.labels))
    columns = ["xy", "xz", *(cuts or ["zoom"]), "profile"]
    rows = [*([scene.truth] if scene.truth else []), *scene.rows]
    figure, axes = _figure(len(rows), len(columns), 3.0)
    true_planes = None if scene.labels is None else view.read(scene.labels)
    truth = view.read(scene.reference.image, scene.reference.background)[0][view.zoom]
    for k, (row, places) in enumerate(zip(rows, axes, strict=True)):
        xy, xz = view.read(row.image, row.background)
        _show(places[0], xy, view)
        _rectangle(places[0], view)
        places[0].set_ylabel(row.title, fontsize=9)
        _show(places[1], xz, view)
        for place, key in zip(places[2:-1], cuts or ["zoom"], strict=True):
            _show(place, xy[view.zoom], view)
            if true_planes is not None:
                _outline(place, true_planes[0][view.zoom], _COLOURS["truth"], 0.8)
            if key in row.labels:
                _outline(place, view.read(row.labels[key])[0][view.zoom], _COLOURS.get(key, "white"), 1.2)
        _profile(places[-1], truth, xy[view.zoom], row.title)
        if k == 0:
            for place, name in zip(places, columns, strict=True):
                place.set_title(name if name not in _STYLES else f"zoom: {name}", fontsize=10)
    figure.savefig(comparison.folder / "comparison.png", dpi=110)


def _view(scene: Scene) -> _View:
    image = scene.reference.image
    shape = (1,) * (3 - len(image.spatial_shape)) + tuple(image.spatial_shape)
    box = tuple(
        slice(max((n - _LARGEST) // 2, 0), max((n - _LARGEST) // 2, 0) + min(n, _LARGEST)) for n in shape
    )
    first = _View((box[0], box[1], box[2]), (slice(None), slice(None)), (0.0, 1.0))
    xy, _ = first.read(image, scene.reference.background)
    low, high = np.percentile(xy, (1, 99.7))
    return _View(first.box, _busiest(xy), (float(min(low, 0.0)), float(max(high, low + 1e-6))))


def _busiest(plane: np.ndarray) -> tuple[slice, slice]:
    """Return the window of a plane whose intensities vary most, of those on a lattice of half windows."""
    sizes = [min(_ZOOM, n) for n in plane.shape]
    starts = [
        sorted({*range(0, n - s, max(s // 2, 1)), n - s}) for n, s in zip(plane.shape, sizes, strict=True)
    ]
    windows = [(slice(y, y + sizes[0]), slice(x, x + sizes[1])) for y in starts[0] for x in starts[1]]
    return max(windows, key=lambda window: float(plane[window].std()))


def _show(axis: Axes, plane: np.ndarray, view: _View) -> None:
    low, high = view.limits
    axis.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect="equal")
    axis.set_xticks([])
    axis.set_yticks([])


def _rectangle(axis: Axes, view: _View) -> None:
    from matplotlib.patches import Rectangle

    y, x = view.zoom
    corner, height, width = (x.start - 0.5, y.start - 0.5), y.stop - y.start, x.stop - x.start
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#ff9f1c", linewidth=1))
    middle = (y.start + y.stop) // 2
    axis.plot([x.start, x.stop - 1], [middle, middle], color="#ff9f1c", linewidth=0.6)


def _outline(axis: Axes, labels: np.ndarray, colour: str, width: float) -> None:
    """Draw the borders between different labels along the edges of voxels."""
    from matplotlib.collections import LineCollection

    lines: list[Any] = []
    for y, x in np.argwhere(labels[:, 1:] != labels[:, :-1]):
        lines.append([(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)])
    for y, x in np.argwhere(labels[1:] != labels[:-1]):
        lines.append([(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)])
    axis.add_collection(LineCollection(lines, colors=colour, linewidths=width))


def _profile(axis: Axes, truth: np.ndarray, image: np.ndarray, title: str) -> None:
    row = truth.shape[0] // 2
    axis.plot(truth[row], color=_COLOURS["truth"], linewidth=1, label="truth")
    axis.plot(image[row], color="black", linewidth=1, label=title)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("voxel", fontsize=7)


def _draw_f1(comparison: Comparison) -> None:
    cuts = list(dict.fromkeys(cut.key for one in comparison.methods for cut in one.segmentations))
    figure, axes = _figure(1, len(cuts), 4.2)
    for axis, key in zip(axes[0], cuts, strict=True):
        for one, colour in zip(comparison.methods, _palette(comparison), strict=True):
            for cut in one.segmentations:
                if cut.key == key:
                    x, y = zip(*((score.iou, score.f1) for score in cut.score.at), strict=True)
                    axis.plot(x, y, "o-", color=colour, markersize=3, label=one.title)
        axis.set(xlabel="intersection over union", ylabel="F1", ylim=(-0.02, 1.02), title=key)
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7)
    figure.savefig(comparison.folder / "f1.png", dpi=110)


def _draw_fsc(comparison: Comparison) -> None:
    figure, axes = _figure(1, 1, 5.0)
    for one, colour in zip(comparison.methods, _palette(comparison), strict=True):
        curve = one.score and one.score.image and one.score.image.fsc
        if curve:
            axes[0][0].plot(curve.frequency, curve.correlation, color=colour, label=one.title)
    axes[0][0].axhline(0.5, color="gray", linewidth=0.8, linestyle="--")
    axes[0][0].set(xlabel="cycles per micrometre", ylabel="correlation with the truth")
    axes[0][0].grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(comparison.folder / "fsc.png", dpi=110)


def _figure(n_rows: int, n_columns: int, inches: float) -> tuple[Figure, Any]:
    """Return a figure that no display is needed for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches * n_columns, inches * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _palette(comparison: Comparison) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](k % 10) for k in range(len(comparison.methods))]

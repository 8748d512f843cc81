"""Pictures of a training: losses, patches, outlines of objects, the receptive field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from chunkrestore.train.fit import History
    from chunkrestore.train.receptive_field import ReceptiveField

Array = npt.NDArray[Any]

TRUE, FOUND = "#2ca02c", "#ff3bd4"
"""Colours of true and of found objects."""
_DECADES = 6
_FINE = 6


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure in inches, without a window.

    Raises
    ------
    ImportError
        If Matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need Matplotlib; run: pip install matplotlib") from error
    figure: Any = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def losses_on(figure: Any, history: History) -> None:
    """Draw training and validation loss by step, and the step whose weights are kept."""
    axes = figure.subplots()
    steps = np.arange(1, len(history.loss) + 1)
    axes.plot(steps, history.loss, color="#9ab6d8", lw=0.5, label="training, every step")
    width = max(1, len(steps) // 50)
    mean = np.convolve(history.loss, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], mean, color="#1f4e8c", lw=1.5, label=f"training, mean of {width} steps")
    if history.validation:
        at, values = zip(*history.validation, strict=True)
        axes.plot(at, values, "o-", color="#d97f1e", ms=3, label="validation")
    axes.axvline(history.best_step, color="#777777", ls=":", label=f"best weights: step {history.best_step}")
    if min(history.loss.min(), *(v for _, v in history.validation), 1.0) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize=8)


def patches_on(figure: Any, rows: Sequence[Sequence[tuple[str, Array]]]) -> None:
    """Draw rows of images of one scale each: the middle plane of every volume."""
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        low, high = np.percentile(middle(row[-1][1]), (0.5, 99.8))
        for axes, (title, image) in zip(axes_row, row, strict=True):
            axes.imshow(middle(image), vmin=low, vmax=max(high, low + 1e-6), cmap="gray")
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()


def outlines_on(figure: Any, samples: Sequence[tuple[str, Array, Array, Array]]) -> None:
    """Draw image, true labels and found labels of samples: outlines over the middle plane."""
    from skimage.segmentation import find_boundaries

    grid = figure.subplots(1, len(samples), squeeze=False)[0]
    for axes, (title, image, truth, found) in zip(grid, samples, strict=True):
        plane = middle(image)
        low, high = np.percentile(plane, (0.5, 99.8))
        axes.imshow(plane, vmin=low, vmax=max(high, low + 1e-6), cmap="gray")
        for labels, colour in ((truth, TRUE), (found, FOUND)):
            # Fine lines: every voxel is drawn as several pixels.
            edge = find_boundaries(np.kron(middle(labels), np.ones((_FINE, _FINE), int)), mode="inner")
            rgba = np.zeros((*edge.shape, 4))
            rgba[edge] = (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1)
            extent = (-0.5, plane.shape[1] - 0.5, plane.shape[0] - 0.5, -0.5)
            axes.imshow(rgba, interpolation="nearest", extent=extent)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.supxlabel("outlines: green true, magenta found", fontsize=9)


def middle(volume: Array) -> Array:
    """Return the middle plane of a volume, or a plane as it is."""
    return volume[len(volume) // 2] if volume.ndim == 3 else volume


def receptive_field_on(figure: Any, field: ReceptiveField) -> None:
    """Draw the influence summed over an axis (logarithmic), with frames, and its profiles."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    ndim = field.influence.ndim
    names, size = "zyx"[-ndim:], field.voxel_size or (1.0,) * ndim
    unit = "um" if field.voxel_size else "voxels"
    views = [(1, 2), (0, 2)] if ndim == 3 else [(0, 1)]
    *maps, profiles = figure.subplots(1, len(views) + 1, width_ratios=[1] * len(views) + [1.4])
    for axes, view in zip(maps, views, strict=True):
        plane, extent = _summed(field, view, size)
        top = plane.max()
        norm = LogNorm(top * 10.0**-_DECADES, top)
        axes.imshow(
            np.maximum(plane, top * 10.0**-_DECADES),
            norm=norm,
            cmap="inferno",
            extent=extent,
            interpolation="nearest",
        )
        for lengths, colour, style in (
            (field.theoretical, "white", "-"),
            (field.measured_halo, "#6fd19c", "--"),
            (field.effective, "#62aee6", "-"),
        ):
            v, h = (lengths[a] * size[a] for a in view)
            axes.add_patch(Rectangle((-h, -v), 2 * h, 2 * v, fill=False, ec=colour, ls=style, lw=1.2))
        v, h = (1.15 * max(field.theoretical[a], max(field.reach[a])) * size[a] for a in view)
        axes.set(xlim=(-h, h), ylim=(v, -v))
        axes.set(xlabel=f"{names[view[1]]} ({unit})", ylabel=f"{names[view[0]]} ({unit})")
    _profiles_on(profiles, field, size)
    profiles.set(xlabel=f"offset ({unit})", ylabel="share of the influence", yscale="log")
    maps[0].set_title("halo by layers: white; measured: green; 99 %: blue", fontsize=8)


def _profiles_on(axes: Any, field: ReceptiveField, size: Sequence[float]) -> None:
    ndim = field.influence.ndim
    for axis, (name, colour) in enumerate(
        zip("zyx"[-ndim:], ("#d62728", "#1f77b4", "#2ca02c")[-ndim:], strict=True)
    ):
        profile, offsets = field.profile(axis), field.offsets(axis) * size[axis]
        shown = profile > 0
        axes.plot(offsets[shown], profile[shown], color=colour, lw=1.2, label=name)
        for sign in (-1, 1):
            axes.axvline(sign * field.effective[axis] * size[axis], color=colour, ls=":", lw=0.9)
    axes.legend(fontsize=8, title="dotted: 99 %", title_fontsize=8)


def _summed(
    field: ReceptiveField, view: tuple[int, int], size: Sequence[float]
) -> tuple[Array, tuple[float, float, float, float]]:
    """Return the influence in a plane, in cells of one output element, and left, right, bottom and top."""
    others = tuple(a for a in range(field.influence.ndim) if a not in view)
    plane, ends = field.influence.sum(axis=others), []
    for axis, a in enumerate(view):
        step, centre = field.output_step[a], plane.shape[axis] // 2
        # Output elements of a coarse grid are met at some offsets only; cells of its step are met by all.
        n_before = centre // step
        kept = slice(centre - n_before * step, centre + n_before * step)
        plane = np.moveaxis(plane, axis, 0)[kept]
        plane = np.moveaxis(plane.reshape(-1, step, plane.shape[1]).sum(axis=1), 0, axis)
        ends.append(((-n_before * step - 0.5) * size[a], (n_before * step - 0.5) * size[a]))
    (top, bottom), (left, right) = ends
    return plane, (left, right, bottom, top)

"""Figures of the examples: slices side by side, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def panels(
    path: Path, rows: Sequence[Mapping[str, Any]], *, limits: Sequence[tuple[float, float]] = ()
) -> None:
    """Draw one row of planes per mapping of titles to 2-D arrays; integers are labels, numbers are intensities.

    All images of a row share their grey scale, which is what makes them comparable: that of the row's `limits`, or from
    the half to the 99.8th percentile of its last image. (A pedestal that some images have: subtract it first.)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = max(map(len, rows))
    heights = [max(plane.shape[0] / plane.shape[1] for plane in row.values()) + 0.1 for row in rows]
    figure = Figure(figsize=(2.6 * n_columns, 2.6 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), n_columns, squeeze=False, height_ratios=heights)
    for i, (row, line) in enumerate(zip(rows, axes, strict=True)):
        images = [plane for plane in row.values() if plane.dtype.kind == "f"]
        low, high = (
            limits[i] if i < len(limits) else np.percentile(images[-1], (0.5, 99.8)) if images else (0, 1)
        )
        for axis in line:
            axis.set_axis_off()
        for axis, (title, plane) in zip(line, row.items(), strict=False):
            axis.set_title(title, fontsize=9)
            if plane.dtype.kind == "f":
                axis.imshow(plane, cmap="inferno", vmin=low, vmax=high, interpolation="nearest")
            else:
                axis.imshow(coloured(plane), interpolation="nearest")
    figure.savefig(path, dpi=100)


def curves(
    path: Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
) -> None:
    """Draw curves, each a name and its (x, y)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, (along, values) in lines.items():
        axis.plot(along, values, marker="o", markersize=3, label=name)
    axis.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def coloured(labels: np.ndarray) -> np.ndarray:
    """Return labels as RGB, neighbouring ids far apart in hue, on black."""
    from matplotlib import colormaps

    colours = np.asarray(colormaps["hsv"]((labels * 0.61803398875) % 1.0))[..., :3]
    return np.where((labels > 0)[..., None], colours, 0.0)


def middle(volume: Any, axis: int = 0) -> np.ndarray:
    """Return the middle plane of a volume."""
    return np.asarray(np.take(np.asarray(volume), np.shape(volume)[axis] // 2, axis))


def floats(plane: Any) -> np.ndarray:
    """Return a plane as floats, so that it is drawn as intensities."""
    return np.asarray(plane, dtype=np.float32)

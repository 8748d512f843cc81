"""Slices of input and result as images that a page can carry."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkrestore.ome_zarr import OmeZarrImage, open_image, open_source
from chunkrestore.ome_zarr.image import Level

_WIDE_ENOUGH = 512
"""Voxels along x that an overview should have at least."""
_WIDEST = 1024
"""Voxels along y and x that an overview has at most: more would be cut off around the middle."""
_DETAIL = 256
"""Voxels along y and x of the detail at full resolution."""
_COMPARABLE = 8.0
"""Ratio of intensity ranges beyond which one window of contrast cannot show both images."""
_LABEL_ALPHA = 120

Fractions = tuple[tuple[float, float], ...]
"""Start and stop along y and x, as parts of the volume's length: the same place on every level."""


@dataclass(frozen=True)
class View:
    """The same part of a plane before and after, ready for a page."""

    title: str
    """What it is."""
    caption: str
    """Where it lies and how its intensities are shown."""
    shape: tuple[int, int]
    """Pixels along y and x of the image before."""
    before: str
    """The input, as a data URI."""
    after: str | None
    """The result, unless there is none yet."""
    labels: str | None
    """Labels in colours, transparent elsewhere."""


def views(image: OmeZarrImage, result: OmeZarrImage | None, labels: OmeZarrImage | None) -> list[View]:
    """Return an overview of the middle plane, and a detail of it at full resolution where most is to be seen.

    The overview is taken from the coarsest level that is wide enough; what is larger than fits on a page is cut
    off around the middle. Time point and channel are the first ones.

    Raises
    ------
    OSError, ValueError
        If a region cannot be read.
    """
    level = _overview_level(image)
    *_, n_y, n_x = image.levels[level].reader.spatial_shape
    middle = tuple(_middle(n, _WIDEST) for n in (n_y, n_x))
    overview = _plane(image, level, middle)
    found = [_view("Overview", image, result, labels, level, middle)]
    *_, full_y, full_x = image.spatial_shape
    if max(overview.shape) * full_x / n_x > 1.5 * _DETAIL:
        lengths = tuple(min(1.0, _DETAIL / n) for n in (full_y, full_x))
        place = _busiest(overview, middle, lengths)
        found.append(_view("Detail at full resolution", image, result, labels, 0, place))
    return found


def selected_input(manifest: dict[str, Any]) -> OmeZarrImage:
    """Open the part of the input that a job's manifest names, at its first time point and channel.

    Raises
    ------
    OSError, ValueError
        If it is not there any more, or cannot be seen from here.
    """
    source = manifest["input"]
    image = open_source(source["store"], **source.get("opened_with", {}))
    paths = [level.path for level in image.levels]
    if source["array"] not in paths:
        raise ValueError(f"{image.path} has no level {source['array']!r} any more")
    level = paths.index(source["array"])
    first = {axis: pick[0] for axis, pick in zip(source["axes"], source["picks"], strict=True)}
    bounds = source["picks"][-len(image.spatial_axes) :]
    whole = [[0, n] for n in image.levels[level].reader.spatial_shape]
    region = None if bounds == whole else tuple(slice(*pair) for pair in bounds)
    return image.select(level=level, t=first.get("t"), c=first.get("c"), region=region)


def opened(path: str) -> OmeZarrImage | None:
    """Return the image or labels at `path`; None if they are not there any more."""
    try:
        return open_image(path)
    except (OSError, ValueError):
        return None


def _overview_level(image: OmeZarrImage) -> int:
    widths = [level.shape[-1] for level in image.levels]
    return max((k for k, n in enumerate(widths) if n >= _WIDE_ENOUGH), default=0)


def _middle(n: int, longest: int) -> tuple[float, float]:
    half = min(n, longest) / n / 2
    return 0.5 - half, 0.5 + half


def _busiest(overview: np.ndarray, place: Fractions, lengths: Sequence[float]) -> Fractions:
    """Return the window of the given lengths, inside what the overview shows, with most structure."""
    clipped = np.clip(overview, None, np.percentile(overview, 99.9))
    sides = [
        max(1, min(n, round(length / (stop - start) * n)))
        for n, length, (start, stop) in zip(overview.shape, lengths, place, strict=True)
    ]
    corners = [
        range(0, n - side + 1, max(1, side // 2)) for n, side in zip(overview.shape, sides, strict=True)
    ]
    best = max(
        ((y, x) for y in corners[0] for x in corners[1]),
        key=lambda corner: float(
            clipped[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]].std()
        ),
    )
    starts = (
        start + corner / n * (stop - start)
        for corner, n, (start, stop) in zip(best, overview.shape, place, strict=True)
    )
    return tuple(
        (min(s, 1 - length), min(s, 1 - length) + length) for s, length in zip(starts, lengths, strict=True)
    )


def _view(
    title: str,
    image: OmeZarrImage,
    result: OmeZarrImage | None,
    labels: OmeZarrImage | None,
    level: int,
    place: Fractions,
) -> View:
    shape = image.levels[level].reader.spatial_shape
    before = _plane(image, level, place)
    after = None if result is None else _plane(result, _nearest(result, shape), place)
    windows, words = _windows(before, after)
    painted = None if labels is None else _plane(labels, _nearest(labels, shape), place)
    return View(
        title=title,
        caption=f"{_where(image, level, place)}; {words}",
        shape=(before.shape[0], before.shape[1]),
        before=_grey(before, windows[0]),
        after=None if after is None else _grey(after, windows[1]),
        labels=None if painted is None else _coloured(painted),
    )


def _where(image: OmeZarrImage, level: int, place: Fractions) -> str:
    shape = image.levels[level].reader.spatial_shape
    ranges = [
        f"{axis} {round(start * n)} to {round(stop * n)}"
        for axis, n, (start, stop) in zip("yx", shape[-2:], place, strict=True)
    ]
    if len(shape) == 3:
        ranges.insert(0, f"plane {shape[0] // 2} of {shape[0]}")
    several = f" of level {image.levels[level].path}" if len(image.levels) > 1 else ""
    return ", ".join(ranges) + several


def _nearest(image: OmeZarrImage, shape: Sequence[int]) -> int:
    """Return the level whose shape is nearest to `shape`."""

    def distance(level: Level) -> int:
        return sum(abs(a - b) for a, b in zip(level.reader.spatial_shape, shape, strict=True))

    return min(range(len(image.levels)), key=lambda k: distance(image.levels[k]))


def _plane(image: OmeZarrImage, level: int, place: Fractions) -> np.ndarray:
    """Return a part of the middle plane, at the first time point and channel."""
    reader = image.source(level)
    shape = reader.spatial_shape
    region = [
        slice(min(n - 1, round(start * n)), max(1, round(stop * n)))
        for n, (start, stop) in zip(shape[-2:], place, strict=True)
    ]
    if len(shape) == 3:
        region.insert(0, slice(shape[0] // 2, shape[0] // 2 + 1))
    plane = np.asarray(reader.read(0, 0, tuple(region)))
    return plane.reshape(plane.shape[-2:])


def _windows(before: np.ndarray, after: np.ndarray | None) -> tuple[list[tuple[float, float]], str]:
    """Return the intensities shown as black and white for each image, and the same in words."""
    ranges = [_range(plane) for plane in (before, after) if plane is not None]
    spans = [high - low for low, high in ranges]
    if len(ranges) == 2 and min(spans) > 0 and max(spans) / min(spans) > _COMPARABLE:
        shown = " and ".join(f"{low:.4g} to {high:.4g}" for low, high in ranges)
        return ranges, f"intensities {shown}, a window for each because their ranges differ so much"
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    both = " in both" if len(ranges) == 2 else ""
    return [(low, high)] * 2, f"intensities {low:.4g} to {high:.4g}{both}"


def _range(plane: np.ndarray) -> tuple[float, float]:
    finite = plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane.ravel()
    low, high = np.percentile(finite, (0.5, 99.7)) if finite.size else (0.0, 1.0)
    return float(low), float(high)


def _grey(plane: np.ndarray, window: tuple[float, float]) -> str:
    low, high = window
    scaled = (plane.astype(np.float32) - low) * (255 / (high - low) if high > low else 1.0)
    pixels = np.nan_to_num(np.clip(scaled, 0, 255)).astype(np.uint8)
    return _uri(pixels, lambda picture: picture)


def _coloured(labels: np.ndarray) -> str:
    """Return labels in up to 255 colours, neighbouring ids in colours far from each other."""
    colours = [0, 0, 0]
    for i in range(255):
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65 + 0.35 * (i % 3) / 2, 1.0)
        colours += [round(255 * part) for part in rgb]

    def with_palette(picture: Any) -> Any:
        picture.putpalette(colours)
        return picture

    indices = np.where(labels > 0, (labels.astype(np.int64) - 1) % 255 + 1, 0).astype(np.uint8)
    return _uri(indices, with_palette, transparency=bytes([0] + [_LABEL_ALPHA] * 255))


def _uri(pixels: np.ndarray, dress: Callable[[Any], Any], **options: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    dress(Image.fromarray(pixels)).save(file, "PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""Measuring a point spread function from a file of beads, and a picture of what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.average import BeadPsf, average_beads
from chunkrestore.psf.bead_size import outer_layers
from chunkrestore.psf.beads import (
    BORDER,
    BRIGHT,
    DIM,
    FEWEST_TO_COMPARE,
    NEIGHBOUR,
    SATURATED,
    UNLIKE,
    WIDE,
    find_beads,
)
from chunkrestore.psf.distill import distill_psf
from chunkrestore.psf.files import read_psf_voxel_size, read_raw_psf, write_psf
from chunkrestore.psf.prepare import FWHM_PER_SIGMA, effective_sigma

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREEN = "#2ca02c"
_COLOURS = {
    SATURATED: "#d62728", BORDER: "#9467bd", DIM: "#7f7f7f", NEIGHBOUR: "#ff7f0e", WIDE: "#e377c2",
    BRIGHT: "#bcbd22", UNLIKE: "#17becf",
}  # fmt: skip
_RIM = 0.005
_DECADES = 3
"""Sections are shown on a logarithmic scale that ends at a thousandth of the peak."""


def fwhm(measured: BeadPsf) -> tuple[float, ...]:
    """Return the full widths at half maximum per axis, in micrometres if the voxel size is known, else voxels.

    Measured on the lines through the brightest voxel, interpolated.
    """
    size = measured.beads.voxel_size or (1.0,) * measured.psf.ndim
    return tuple(FWHM_PER_SIGMA * s * v for s, v in zip(effective_sigma(measured.psf), size, strict=True))


def measure(
    source: str,
    output: str,
    *,
    voxel_size: Sequence[float] | None = None,
    bead_diameter_um: float | None = None,
    method: str = "distill",
    shape: Sequence[int] | None = None,
    saturation: float | None = None,
    min_snr: float = 20.0,
    report: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Measure the point spread function of a file and write it; return what to say, line by line.

    Raises
    ------
    FileExistsError
        If an output exists and `overwrite` is not set.
    ValueError
        As `find_beads`, `average_beads` and `distill_psf` do; or if the voxel size is neither given nor known.
    """
    for path in filter(None, (output, report)):
        if Path(path).exists() and not overwrite:
            raise FileExistsError(f"{path} exists; give another name, or --overwrite")
    image = read_raw_psf(source)
    size = voxel_size or read_psf_voxel_size(source)
    if size is None:
        raise ValueError(f"the voxel size of {source} is unknown; give it by --voxel-size")
    found = find_beads(image, voxel_size=size, psf_shape=shape, saturation=saturation, min_snr=min_snr)
    solve = {"average": average_beads, "distill": distill_psf}[method]
    measured = solve(image, found, bead_diameter_um=bead_diameter_um)
    write_psf(output, measured.psf, None if output.lower().endswith(".npy") else size)
    lines = [*describe_beads(measured), f"wrote      {output}"]
    if report:
        draw_bead_report(image, measured, report)
        lines.append(f"wrote      {report}")
    return lines


def describe_beads(measured: BeadPsf) -> list[str]:
    """Say in lines of text how many beads were used and why not the others, widths, and what to look at."""
    beads, psf = measured.beads, measured.psf
    unit = _scale(measured)[1]
    names = "zyx"[-psf.ndim :]
    widths = ", ".join(f"{name} {width:.3g}" for name, width in zip(names, fwhm(measured), strict=True))
    lines = [f"beads      {len(beads)} found, {beads.n_used} used"]
    lines += [
        f"rejected   {beads.reasons.count(reason)} {reason}" for reason in _COLOURS if reason in beads.reasons
    ]
    lines.append(f"FWHM       {widths} {unit}")
    lines.append(f"shape      {' x '.join(map(str, psf.shape))}")
    rim = float(psf[outer_layers(psf.shape, 1)].max() / psf.max())
    if rim > _RIM:
        lines.append(f"cut off    {rim:.1%} of the peak is left at the rim; a larger shape would hold more")
    if beads.n_used < FEWEST_TO_COMPARE:
        lines.append(
            f"few beads  odd ones cannot be told with fewer than {FEWEST_TO_COMPARE}; look at the picture"
        )
    return lines


def draw_bead_report(image: npt.ArrayLike, measured: BeadPsf, path: str | os.PathLike[str]) -> None:
    """Draw sections and profiles of a measured point spread function, and the beads in their image.

    Above: the point spread function's sections through its centre, logarithmic over three decades, one scale
    for all lengths; its profiles along the axes with their full widths at half maximum. Below: the brightest
    voxel along each line of sight, with a green frame around each bead that was used and a coloured cross on
    each that was not; the table of reasons.

    Parameters
    ----------
    image
        The image of beads, as given to `find_beads`.
    measured
        What `average_beads` or `distill_psf` made of it.
    path
        New file; the ending decides the format (``.png``).

    Raises
    ------
    ImportError
        If Matplotlib is missing.
    ValueError
        If the folder of `path` does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a report picture needs Matplotlib; run: pip install matplotlib") from error
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f'folder "{file.parent}" of the report does not exist; create it first')
    figure: Any = Figure(figsize=(13, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    sections, profiles = above.subfigures(1, 2, width_ratios=(1.15, 1))
    _draw_sections(sections, measured)
    _draw_profiles(profiles.subplots(), measured)
    field, words = below.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_field(field, np.asarray(image), measured)
    _draw_words(words, measured)
    figure.savefig(file, dpi=110)


def _draw_sections(figure: Any, measured: BeadPsf) -> None:
    """Draw the sections side by side on one scale of lengths."""
    from matplotlib.colors import LogNorm

    psf, size, unit = measured.psf, *_scale(measured)
    shown = np.maximum(psf / psf.max(), 10.0**-_DECADES)
    centre = [n // 2 for n in psf.shape]
    names = "zyx"[-psf.ndim :]
    views = [(0, 2), (0, 1), (1, 2)] if psf.ndim == 3 else [(0, 1)]
    lengths = [n * s for n, s in zip(psf.shape, size, strict=True)]
    row = figure.subplots(1, len(views), squeeze=False, width_ratios=[lengths[h] for _, h in views])[0]
    for axes, (vertical, horizontal) in zip(row, views, strict=True):
        plane = shown[tuple(slice(None) if a in (vertical, horizontal) else c for a, c in enumerate(centre))]
        picture = axes.imshow(
            plane,
            norm=LogNorm(10.0**-_DECADES, 1),
            cmap="inferno",
            interpolation="nearest",
            extent=_extent(centre, psf.shape, size, vertical, horizontal),
        )
        axes.set(xlabel=f"{names[horizontal]} ({unit})", ylabel=f"{names[vertical]} ({unit})")
        tick = float(f"{0.35 * lengths[horizontal]:.1g}")
        axes.set_xticks([-tick, 0, tick], [f"{value:g}" for value in (-tick, 0, tick)])
    figure.colorbar(picture, ax=list(row), label="share of the peak (logarithmic)", shrink=0.9)
    figure.suptitle("sections through the centre", fontsize=11)


def _extent(
    centre: list[int], shape: tuple[int, ...], size: tuple[float, ...], vertical: int, horizontal: int
) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of a section, the centre voxel's middle at 0."""

    def ends(axis: int) -> tuple[float, float]:
        return (-0.5 - centre[axis]) * size[axis], (shape[axis] - 0.5 - centre[axis]) * size[axis]

    (left, right), (top, bottom) = ends(horizontal), ends(vertical)
    return left, right, bottom, top


def _draw_profiles(axes: Axes, measured: BeadPsf) -> None:
    psf, size, unit = measured.psf, *_scale(measured)
    peak = np.unravel_index(int(psf.argmax()), psf.shape)
    for axis, (name, width, colour) in enumerate(
        zip("zyx"[-psf.ndim :], fwhm(measured), ("#1f77b4", "#2ca02c", "#d62728"), strict=False)
    ):
        line = psf[tuple(slice(None) if a == axis else p for a, p in enumerate(peak))] / psf.max()
        position = (np.arange(len(line)) - psf.shape[axis] // 2) * size[axis]
        axes.plot(position, line, "o-", ms=3, lw=1, color=colour, label=f"{name}: FWHM {width:.3g} {unit}")
    axes.axhline(0.5, color="0.6", lw=0.8, ls="--")
    axes.set(xlabel=f"distance from the centre ({unit})", ylabel="share of the peak", ylim=(0, 1.05))
    axes.set_title("profiles through the brightest voxel", fontsize=11)
    axes.legend(frameon=False)


def _draw_field(axes: Axes, image: np.ndarray, measured: BeadPsf) -> None:
    from matplotlib.patches import Rectangle

    beads, size, unit = measured.beads, *_scale(measured)
    flat = image.max(axis=0) if image.ndim == 3 else image
    height, width = size[-2], size[-1]
    low = beads.background
    # The square root brings out dim beads and skirts beside bright ones.
    shown = np.sqrt(np.maximum(flat.astype(np.float64) - low, 0))
    extent = (-0.5 * width, (flat.shape[1] - 0.5) * width, (flat.shape[0] - 0.5) * height, -0.5 * height)
    axes.imshow(shown, cmap="gray", extent=extent, interpolation="nearest")
    for position, reason in zip(beads.positions, beads.reasons, strict=True):
        y, x = position[-2] * height, position[-1] * width
        if reason:
            axes.plot(x, y, "x", ms=8, mew=1.6, color=_COLOURS[reason])
            continue
        half_y, half_x = (beads.radius[-2] + 0.5) * height, (beads.radius[-1] + 0.5) * width
        axes.add_patch(
            Rectangle((x - half_x, y - half_y), 2 * half_x, 2 * half_y, fill=False, lw=1.4, ec=_GREEN)
        )
        axes.plot(x, y, "+", ms=6, color=_GREEN)
    what = "maximum along z" if image.ndim == 3 else "image"
    axes.set(xlabel=f"x ({unit})", ylabel=f"y ({unit})", xlim=extent[:2], ylim=extent[2:])
    axes.set_title(f"beads ({what}, square root)", fontsize=11)


def _draw_words(axes: Axes, measured: BeadPsf) -> None:
    beads = measured.beads
    axes.set_axis_off()
    lines = [(f"{measured.n_beads} beads used of {len(beads)} spots", "black")]
    for reason, colour in _COLOURS.items():
        if n := beads.reasons.count(reason):
            lines.append((f"✕  {n} {reason}", colour))
    _, unit = _scale(measured)
    widths = " x ".join(f"{width:.3g}" for width in fwhm(measured))
    shape = " x ".join(map(str, measured.psf.shape))
    size = (
        "not corrected for bead size"
        if measured.bead_diameter_um is None
        else f"bead diameter of {measured.bead_diameter_um:g} um taken out"
    )
    method = {"average": "trimmed mean of aligned beads", "distill": "distilled (deconvolved by the beads)"}
    snr = beads.snr[beads.used]
    lines += [
        ("", "black"),
        (f"FWHM {widths} {unit}", "black"),
        (f"{shape} voxels", "black"),
        (method[measured.method], "black"),
        (size, "black"),
        (f"signal to noise of the used beads {snr.min():.0f} to {snr.max():.0f}", "black"),
    ]
    for i, (text, colour) in enumerate(lines):
        axes.text(0, 0.97 - 0.075 * i, text, color=colour, transform=axes.transAxes, fontsize=11, va="top")


def _scale(measured: BeadPsf) -> tuple[tuple[float, ...], str]:
    size = measured.beads.voxel_size
    return (size, "um") if size else ((1.0,) * measured.psf.ndim, "voxels")

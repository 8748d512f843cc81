"""What is wrong with a point spread function, by itself and for a given image, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.faults import CHECKS, Case, Finding, listed, times, unusable
from chunkrestore.psf.files import check_voxel_size
from chunkrestore.psf.prepare import energy_radius

__all__ = ["Finding", "describe", "diagnose"]

_SATURATED_IMAGE = 1e-4
# Share of voxels at the largest value of the type.
_DARKEST = 0.05
# Darkest percent of the image relative to its brightest 0.1 percent, from which on an offset matters.


def diagnose(
    psf: npt.ArrayLike,
    *,
    psf_voxel_size: Sequence[float] | None = None,
    image_shape: Sequence[int] | None = None,
    image_voxel_size: Sequence[float] | None = None,
    image_sample: np.ndarray | None = None,
) -> list[Finding]:
    """Return what is wrong with `psf`, gravest first; an empty list for a good one.

    Parameters
    ----------
    psf
        As read (`read_raw_psf`), unprepared: what is wrong is reported and not raised.
    psf_voxel_size, image_voxel_size
        Micrometres per axis; what needs them is not looked at without them.
    image_shape
        Lengths of the image's (or block's) spatial axes.
    image_sample
        Some of the image's voxels, of any shape, in its own type: looked through for saturation and offset.

    Raises
    ------
    ValueError
        If a voxel size is not one positive number per axis of `psf`, or of the image.
    """
    array = np.asarray(psf)
    findings = list(unusable(array, image_shape))
    if not findings:
        sizes = [
            None if size is None else check_voxel_size(name, size, array.ndim)
            for name, size in (("psf_voxel_size", psf_voxel_size), ("image_voxel_size", image_voxel_size))
        ]
        shape = None if image_shape is None else tuple(int(n) for n in image_shape)
        case = Case(array, sizes[0], shape, sizes[1])
        findings = [finding for check in CHECKS for finding in check(case)]
    if image_sample is not None and image_sample.size:
        findings += _image(image_sample)
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def describe(psf: npt.ArrayLike, voxel_size: Sequence[float] | None = None) -> str:
    """Return shape, widths and extent of a point spread function as lines of text.

    Raises
    ------
    TypeError, ValueError
        If `psf` is unusable (`diagnose` says why) or `voxel_size` does not fit it.
    """
    array = np.asarray(psf)
    for finding in unusable(array, None):
        raise ValueError(f"`psf` {finding}")
    size = None if voxel_size is None else check_voxel_size("voxel_size", voxel_size, array.ndim)
    case = Case(array, size, None, None)
    names = ", ".join(case.axes)
    widths = f"FWHM       {listed(case.fwhm)} voxels ({names})"
    extent = energy_radius(case.positive, 0.999)
    lines = [f"shape      {times(array.shape)}, {array.dtype}", widths, ""]
    lines[2] = f"extent     99.9 % of the light within {listed(extent)} voxels of the centre"
    if size is not None:
        lines[0] += f", voxel size {listed(size)} um"
        lines[1] += f", {listed(w * s for w, s in zip(case.fwhm, size, strict=True))} um"
        lines[2] += f", {listed(r * s for r, s in zip(extent, size, strict=True))} um"
    return "\n".join(lines)


def _image(sample: np.ndarray) -> Iterator[Finding]:
    if sample.dtype.kind in "ui":
        full = float((sample == np.iinfo(sample.dtype).max).mean())
        if full > _SATURATED_IMAGE:
            found = f"{full:.2%} of the image's voxels are at the largest value of {sample.dtype}"
            fix = "mask them, or expect rings around them"
            yield Finding("warning", "image saturation", found, f"{_SATURATED_IMAGE:.2%}", fix)
    dark, bright = (float(value) for value in np.nanpercentile(sample, (1, 99.9)))
    if dark > _DARKEST * bright > 0:
        found = f"the image's darkest percent is at {dark:.4g}, its brightest at {bright:.4g}"
        fix = f"give the camera's offset as `background`, about {dark:.4g} if nothing is out of focus"
        yield Finding("note", "image background", found, f"{_DARKEST:.0%}", fix)

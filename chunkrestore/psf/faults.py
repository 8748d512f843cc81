"""What may be wrong with a point spread function: one function per fault, one constant per limit.

An error means that deconvolution would be refused or wrong, a warning that the result suffers, a note that
something is worth knowing. `chunkrestore.psf.check` puts them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from chunkrestore.psf.files import VOXEL_SIZE_TOLERANCE
from chunkrestore.psf.prepare import FWHM_PER_SIGMA, effective_sigma, energy_radius
from chunkrestore.psf.sampling import offset
from chunkrestore.psf.shape import edge_level

_PEDESTAL = 0.01
# Share of the light. The deconvolved image loses contrast by about as much.
_PEAK_OFFSET = 0.25
# Voxels. The whole result is displaced by this distance.
_CENTROID_OFFSET = 0.5
# Voxels between peak and centroid, beyond which a tail to one side is worth looking at.
_TRUNCATION = 0.01
# Share of the light that lies outside the array.
_FLAT_END = 0.005
# Share of the light in the outer eighth of an axis from which on it must fall off outwards.
_UNDERSAMPLED = 2.0
# Voxels per full width at half maximum: Nyquist's criterion for a profile near a Gaussian.
_OVERSAMPLED = 12.0
# Voxels per full width, in every axis: six times finer than needed costs 6^3 in memory and time.
_SECOND_MAXIMUM = 0.1
# Of the peak, as height and as depth of the valley between. Rings and side lobes of microscopes stay below.
_EMPTY = 4
# Times fewer voxels that hold 99.9 % of the light per axis.
_AXIAL_TO_LATERAL = 0.9
# No microscope with one objective resolves better along z than across; a tenth for noise.
_WORD_LENGTHS = (8, 10, 12, 14, 16)
# Bits of cameras.


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing."""

    severity: Literal["error", "warning", "note"]
    """``error``: refused or wrong; ``warning``: the result suffers; ``note``: worth knowing."""
    subject: str
    """What was looked at, one or two words that never change."""
    measured: str
    """What was found."""
    limit: str
    """What it was held against."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.measured} (limit: {self.limit}); {self.fix}"


@dataclass(frozen=True)
class Case:
    """A usable point spread function and what it is held against."""

    psf: np.ndarray
    voxel_size: tuple[float, ...] | None
    image_shape: tuple[int, ...] | None
    image_voxel_size: tuple[float, ...] | None

    @cached_property
    def level(self) -> float:
        """Median over the array's corners (an eighth of each axis) of their means.

        Corners and not faces: light that is cut off at a face is no background.
        """
        parts = [(slice(0, max(1, n // 8)), slice(n - max(1, n // 8), n)) for n in self.psf.shape if n > 1]
        corners = [
            np.squeeze(self.psf)[corner].mean(dtype=np.float64) for corner in itertools.product(*parts)
        ]
        return float(np.median(corners)) if parts else 0.0

    @cached_property
    def light(self) -> np.ndarray:
        """Intensities above the level, of either sign, float64."""
        light = self.psf.astype(np.float64) - self.level
        return light if light.max() > 0 else self.psf.astype(np.float64)

    @cached_property
    def positive(self) -> np.ndarray:
        """Intensities above the level."""
        return np.maximum(self.light, 0)

    @cached_property
    def fwhm(self) -> tuple[float, ...]:
        """Full width at half maximum in voxels; 0 for an axis of length 1."""
        return tuple(FWHM_PER_SIGMA * sigma for sigma in effective_sigma(self.positive))

    @property
    def axes(self) -> str:
        """``zyx`` or ``yx``."""
        return "zyx"[-self.psf.ndim :]


def unusable(psf: np.ndarray, image_shape: Sequence[int] | None) -> Iterator[Finding]:
    """Yield what keeps everything else from being looked at."""
    shape = f"shape {psf.shape}"
    if psf.dtype.kind not in "uif":
        yield Finding("error", "type", f"dtype {psf.dtype}", "real numbers", "pass an array of real numbers")
    elif psf.ndim not in (2, 3):
        fix = "select one channel and time point" if psf.ndim > 3 else "pass a plane or a volume"
        yield Finding("error", "dimensions", shape, "2 (yx) or 3 (zyx)", fix)
    elif image_shape is not None and psf.ndim != len(image_shape):
        limit = f"{len(image_shape)}, as the image"
        yield Finding("error", "dimensions", shape, limit, f"pass a {len(image_shape)}-dimensional one")
    elif not psf.size:
        yield Finding("error", "dimensions", shape, "one voxel per axis", "check the file")
    elif not np.isfinite(psf).all():
        count = int((~np.isfinite(psf)).sum())
        fix = "replace them, for instance by numpy.nan_to_num(psf)"
        yield Finding("error", "NaN", f"{count} values are NaN or infinite", "none", fix)
    elif not psf.max() > 0:
        fix = "check the file; it holds no point spread function"
        yield Finding("error", "light", f"no value above 0 (largest {psf.max():.4g})", "some light", fix)


def _negative(case: Case) -> Iterator[Finding]:
    if case.psf.min() < 0:
        found = f"{int((case.psf < 0).sum())} values, least {case.psf.min():.4g}"
        yield Finding("error", "negative values", found, "none", "subtract_background(psf) clips at 0")


def _voxel_size(case: Case) -> Iterator[Finding]:
    own, image = case.voxel_size, case.image_voxel_size
    if own is None and image is not None:
        fix = "give it, or make sure that it is the image's"
        yield Finding("note", "voxel size", "unknown", f"the image's {listed(image)} um", fix)
    elif own is not None and image is not None:
        lengths = zip(own, image, case.psf.shape, strict=True)
        if any(n > 1 and abs(a - b) > VOXEL_SIZE_TOLERANCE * b for a, b, n in lengths):
            limit = f"within {VOXEL_SIZE_TOLERANCE:.0%} of the image's {listed(image)} um"
            fix = "resample(psf, from_voxel_size, to_voxel_size)"
            yield Finding("error", "voxel size", f"{listed(own)} um", limit, fix)


def _pedestal(case: Case) -> Iterator[Finding]:
    total = case.psf.sum(dtype=np.float64)
    share = case.level * case.psf.size / total if total > 0 else 0.0
    if share > _PEDESTAL:
        relative = case.level / float(case.psf.max())
        found = f"corners at {case.level:.4g}, {relative:.2g} of the peak, {share:.0%} of the light"
        flat = edge_level(case.psf) > case.level / 2
        fix = "subtract_background(psf)" if flat else "keep_largest_component(psf) removes scattered noise"
        yield Finding("warning", "background", found, f"{_PEDESTAL:.0%} of the light", fix)


def _centre(case: Case) -> Iterator[Finding]:
    peak = offset(case.positive)
    middle = ", ".join(str(n // 2) for n in case.psf.shape)
    if max(map(abs, peak)) > _PEAK_OFFSET:
        found = f"the peak lies {listed(peak)} voxels from voxel {middle}"
        yield Finding("warning", "centre", found, f"{_PEAK_OFFSET} voxel", "centre(psf)")
        return
    centroid = offset(_around_peak(case.positive, 0.01), "centroid")
    distance = [c - p for c, p in zip(centroid, peak, strict=True)]
    if max(map(abs, distance)) > _CENTROID_OFFSET:
        found = f"the centroid lies {listed(distance)} voxels from the peak"
        fix = 'fine if the microscope does that; centre(psf, by="centroid") to keep the light in place'
        yield Finding("note", "asymmetry", found, f"{_CENTROID_OFFSET} voxel", fix)


def _saturation(case: Case) -> Iterator[Finding]:
    largest = case.psf.max()
    count = int((case.psf == largest).sum())
    full = case.psf.dtype.kind in "ui" and int(largest) in {2**bits - 1 for bits in _WORD_LENGTHS}
    # An even symmetric array has up to 2 equal voxels per axis.
    allowed = 1 if full else 2**case.psf.ndim
    if count > allowed and count < case.psf.size:
        found = f"{count} voxels share the largest value {float(largest):.6g}"
        fix = "its peak was probably cut off: take another bead, or a shorter exposure"
        yield Finding("warning", "saturation", found, f"at most {allowed}", fix)


def _second_maximum(case: Case) -> Iterator[Finding]:
    from scipy import ndimage

    relative = case.positive / case.positive.max()
    where = ndimage.find_objects((relative > _SECOND_MAXIMUM).astype(np.int8))[0]
    part, neighbours = relative[where], np.ones((3,) * relative.ndim)
    for height in np.arange(_SECOND_MAXIMUM, 1 - _SECOND_MAXIMUM, _SECOND_MAXIMUM):
        regions, count = ndimage.label(part > height, neighbours)
        tops = ndimage.maximum(part, regions, np.arange(1, count + 1))
        second = int(np.argsort(tops)[-2]) if count > 1 else None
        if second is not None and tops[second] > height + _SECOND_MAXIMUM:
            at = ndimage.maximum_position(part, regions, second + 1)
            position = [int(i) + s.start for i, s in zip(at, where, strict=True)]
            found = f"{tops[second]:.0%} of the peak at voxel {listed(position)}"
            fix = "a neighbouring bead or hot pixel: crop it, or keep_largest_component(psf)"
            yield Finding("warning", "second maximum", found, f"{_SECOND_MAXIMUM:.0%}", fix)
            return


def _truncation(case: Case) -> Iterator[Finding]:
    total = case.light.sum()
    for axis, (name, n) in enumerate(zip(case.axes, case.psf.shape, strict=True)):
        if n < 4:
            continue
        profile = case.light.sum(axis=tuple(a for a in range(case.psf.ndim) if a != axis)) / total
        ends = [_end(profile), _end(profile[::-1])]
        outer, beyond = sum(e[0] for e in ends), sum(e[1] for e in ends)
        held = f"the outer planes along {name} hold {outer:.1%} of the light"
        if name == "z" and beyond >= 1:
            fix = "as in widefield, where every plane holds as much: give it as many planes as blur matters"
            yield Finding(
                "note", "endless blur", f"{held}, which hardly falls off", "less beyond than inside", fix
            )
        elif beyond > _TRUNCATION:
            loss = f"about {beyond:.1%} lies outside" if beyond < 1 else "which hardly falls off"
            fix = f"record or compute more planes along {name}, or accept that this light is missing"
            yield Finding("warning", "truncation", f"{held}, {loss}", f"{_TRUNCATION:.0%} outside", fix)


def _end(profile: np.ndarray) -> tuple[float, float]:
    """Return the light in the outer eighth of a profile's end and, extrapolated, beyond it.

    If eighths fall by the factor q, those outside add up to q / (1 - q) times the last.
    """
    k = max(1, len(profile) // 8)
    outer, inner = float(profile[-k:].sum()), float(profile[-2 * k : -k].sum())
    if outer <= 0:
        return 0.0, 0.0
    if outer >= inner:
        return outer, math.inf if outer > _FLAT_END else 0.0
    return outer, outer * outer / (inner - outer)


def _sampling(case: Case) -> Iterator[Finding]:
    own, image = case.voxel_size, case.image_voxel_size
    ratios = [1.0] * case.psf.ndim
    if own is not None and image is not None:
        ratios = [a / b for a, b in zip(own, image, strict=True)]
    of_image = " of the image" if max(abs(r - 1) for r in ratios) > VOXEL_SIZE_TOLERANCE else ""
    widths = [width * r for width, r in zip(case.fwhm, ratios, strict=True)]
    blurred = [(a, w) for a, w, n in zip(case.axes, widths, case.psf.shape, strict=True) if n > 1]
    coarse = [f"{w:.2g} voxels{of_image} along {a}" for a, w in blurred if w < _UNDERSAMPLED]
    if coarse:
        limit = f"at least {_UNDERSAMPLED:g} voxels (Nyquist)"
        fix = "a finer sampled image is needed to gain resolution there"
        yield Finding("warning", "sampling", f"FWHM of {', '.join(coarse)}", limit, fix)
    if blurred and min(w for _, w in blurred) > _OVERSAMPLED:
        found = f"FWHM of {listed(w for _, w in blurred)} voxels{of_image}"
        fix = "binning the image by 2 saves most of memory and time and loses nothing"
        yield Finding("note", "sampling", found, f"at most {_OVERSAMPLED:g} voxels", fix)


def _axis_order(case: Case) -> Iterator[Finding]:
    size = case.voxel_size or case.image_voxel_size
    if size is None or case.psf.ndim != 3 or case.psf.shape[0] == 1:
        return
    widths = [w * s for w, s in zip(case.fwhm, size, strict=True)]
    if widths[0] < _AXIAL_TO_LATERAL * max(widths[1:]):
        found = f"FWHM {widths[0]:.3g} um along z, {widths[1]:.3g} and {widths[2]:.3g} um along y and x"
        fix = "check the order of the axes (z, y, x) and of the voxel size"
        yield Finding("warning", "axis order", found, "z is not the narrowest", fix)


def _extent(case: Case) -> Iterator[Finding]:
    shape, image = case.psf.shape, case.image_shape
    if image is not None and any(p > n for p, n in zip(shape, image, strict=True)):
        found, limit = times(shape), f"the image's {times(image)}"
        yield Finding("warning", "size", f"{found}, longer than the image", limit, "crop_to_energy(psf)")
    cropped = tuple(
        min(2 * r + 1, n) for r, n in zip(energy_radius(case.positive, 0.999), shape, strict=True)
    )
    if _EMPTY * math.prod(cropped) <= math.prod(shape):
        found = f"{times(shape)} for 99.9 % of the light in {times(cropped)}"
        fix = "crop_to_energy(psf)"
        if image is not None:
            whole, less = (
                math.prod(n + p - 1 for n, p in zip(image, s, strict=True)) for s in (shape, cropped)
            )
            fix += f" saves {1 - less / whole:.0%} of memory and time on {times(image)} voxels"
        yield Finding("note", "empty margin", found, f"{_EMPTY} times the voxels needed", fix)


def _kind(case: Case) -> Iterator[Finding]:
    if any(n % 2 == 0 for n in case.psf.shape):
        middle = ", ".join(str(n // 2) for n in case.psf.shape)
        fix = "nothing to do if the peak is at that voxel"
        yield Finding("note", "even size", f"{times(case.psf.shape)}, centre at voxel {middle}", "none", fix)
    if case.psf.dtype.kind in "ui":
        found = f"{case.psf.dtype}, largest value {case.psf.max()}"
        fix = f"prepare(psf) scales it; what is dimmer than 1/{case.psf.max()} of the peak is lost"
        yield Finding("note", "integers", found, "none", fix)


CHECKS = (
    _negative, _voxel_size, _pedestal, _centre, _saturation, _second_maximum, _truncation, _sampling,
    _axis_order, _extent, _kind,
)  # fmt: skip


def _around_peak(positive: np.ndarray, threshold: float) -> np.ndarray:
    """Return the array with only the region that is connected with the peak above a share of it."""
    from scipy import ndimage

    regions, _ = ndimage.label(positive >= threshold * positive.max(), np.ones((3,) * positive.ndim))
    return np.where(regions == regions.flat[int(np.argmax(positive))], positive, 0)


def listed(values: Iterable[float]) -> str:
    """Return numbers with three digits, separated by commas."""
    return ", ".join(f"{value:.3g}" for value in values)


def times(shape: Sequence[int]) -> str:
    """Return ``21 x 13 x 13``."""
    return " x ".join(map(str, shape))

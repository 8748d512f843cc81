"""Theoretical point spread functions of light-sheet microscopes, which change along the sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.files import check_voxel_size
from chunkrestore.psf.optics import Optics
from chunkrestore.psf.prepare import effective_sigma
from chunkrestore.psf.radial import Radial, focal_planes, render
from chunkrestore.psf.theory import Model, detection
from chunkrestore.psf.varying import PsfField

Float = npt.NDArray[np.float64]

_CURVE = 257
"""Distances from the waist at which the width is computed to place the samples of a field."""


@dataclass(frozen=True, kw_only=True)
class LightSheet:
    """A sheet of light along x with a Gaussian profile along z, given by its waist or its aperture.

    Lengths are micrometres.

    Raises
    ------
    ValueError
        If not exactly one of `waist_um` and `numerical_aperture` is given, or a value is not possible.
    """

    waist_um: float | None = None
    """Distance from the middle of the sheet at which the waist has fallen to 1/e^2."""
    numerical_aperture: float | None = None
    """Of the illumination; the waist is then wavelength / (pi aperture)."""
    focus_x_um: float | None = None
    """Where along x the waist lies, from the first voxel of the volume; its middle by default."""
    offset_um: float = 0.0
    """How much deeper along z the sheet lies than the focus of the detection."""

    def __post_init__(self) -> None:
        if (self.waist_um is None) == (self.numerical_aperture is None):
            raise ValueError(
                f"a light sheet needs `waist_um` ({self.waist_um}) or `numerical_aperture` "
                f"({self.numerical_aperture}), one of the two"
            )
        for name in ("waist_um", "numerical_aperture"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` of the light sheet must be a positive number, got {value}")
        if self.numerical_aperture is not None and self.numerical_aperture >= 1:
            raise ValueError(
                f"`numerical_aperture` of the light sheet must be below 1, got {self.numerical_aperture}; "
                "sheets have 0.02 to 0.3"
            )
        if not math.isfinite(self.offset_um) or not math.isfinite(self.focus_x_um or 0.0):
            raise ValueError(
                f"`offset_um` ({self.offset_um}) and `focus_x_um` ({self.focus_x_um}) must be finite"
            )

    def width_um(self, x_um: float, optics: Optics) -> float:
        r"""Return the 1/e^2 half-width at a distance `x_um` from the waist.

        :math:`w(x) = w_0 \sqrt{1 + (x / x_R)^2}` with the Rayleigh length
        :math:`x_R = \pi w_0^2 n / \lambda_{ex}` (paraxial Gaussian beam; n is the sample's index).
        """
        wavelength = optics.require_excitation("a light sheet")
        waist = self.waist_um
        if waist is None:
            waist = wavelength / (math.pi * float(self.numerical_aperture or 0))
        rayleigh = math.pi * waist**2 * optics.sample_index / wavelength
        return waist * math.hypot(1, x_um / rayleigh)


def light_sheet(
    optics: Optics,
    voxel_size: Sequence[float],
    sheet: LightSheet,
    *,
    x_um: float = 0.0,
    shape: Sequence[int] | None = None,
    model: Model = "vectorial",
) -> npt.NDArray[np.float32]:
    r"""Return the point spread function of a light-sheet microscope at a distance from the sheet's waist.

    .. math:: h(x, y, z) = I_{em}(\sqrt{x^2 + y^2}, z)\; e^{-2 (z - z_0)^2 / w(x_{sheet})^2}

    averaged over each voxel. The sheet is taken as constant over the extent of one point's image.

    Parameters
    ----------
    optics
        The detection, with `excitation_um`.
    voxel_size, shape, model
        As in `chunkrestore.psf.theory.widefield`; z is across the sheet.
    sheet
        The illumination.
    x_um
        Distance from the waist along the sheet.

    Returns
    -------
    ndarray
        float32, sum 1 at every distance (the light that a sheet loses by absorption is no part of it), centre
        at ``n // 2``: the plane where the product is brightest on the axis.

    Raises
    ------
    ValueError
        As in `chunkrestore.psf.theory.widefield`, and if the excitation is missing or `x_um` is not finite.

    Examples
    --------
    >>> water = Optics(numerical_aperture=0.8, emission_um=0.52, immersion_index=1.333, excitation_um=0.488)
    >>> light_sheet(water, (1.0, 0.3, 0.3), LightSheet(waist_um=2.0), shape=(9, 15, 15)).shape
    (9, 15, 15)
    """
    if not math.isfinite(x_um):
        raise ValueError(f"`x_um` must be a finite distance from the waist, got {x_um}")
    return render(_illuminated(detection(optics, model), optics, sheet, x_um), voxel_size, shape)


def light_sheet_field(
    optics: Optics,
    voxel_size: Sequence[float],
    volume_shape: Sequence[int],
    sheet: LightSheet,
    *,
    shape: Sequence[int] | None = None,
    max_change: float = 0.05,
    model: Model = "vectorial",
) -> PsfField:
    """Return point spread functions along a volume that is lit by a light sheet.

    They lie along x so that the axial width (full width at half maximum on the axis, before voxels average
    it) changes by at most `max_change` of the smaller from one to the next, by equal factors, from the first
    voxel of the volume to the last. A sheet that does not change within the volume gives a single one.

    Parameters
    ----------
    optics, voxel_size, sheet, shape, model
        As in `light_sheet`; by default all have the shape that the widest part of the sheet needs.
    volume_shape
        Voxels of the whole volume along z, y, x.
    max_change
        Greatest relative change of the axial width between neighbours.

    Returns
    -------
    PsfField
        With positions in voxels of the volume, in the middle of z and y.

    Raises
    ------
    ValueError
        As in `light_sheet`, and if `volume_shape` is not three positive numbers or `max_change` is not between
        0 and 1.
    """
    size = check_voxel_size("voxel_size", voxel_size, 3)
    volume = tuple(int(n) for n in volume_shape)
    if len(volume) != 3 or min(volume) < 1:
        raise ValueError(
            f"`volume_shape` must be three positive numbers of voxels, got {tuple(volume_shape)}"
        )
    if not 0 < max_change < 1:
        raise ValueError(f"`max_change` must be above 0 and below 1, got {max_change}; 0.05 is 5 %")
    last = (volume[2] - 1) * size[2]
    waist = last / 2 if sheet.focus_x_um is None else sheet.focus_x_um
    emitted = detection(optics, model)
    places = _places(emitted, optics, sheet, waist, last, math.log1p(max_change))
    distances = [place - waist for place in places]
    psfs = [light_sheet(optics, size, sheet, x_um=x, shape=shape, model=model) for x in distances]
    middle = ((volume[0] - 1) / 2, (volume[1] - 1) / 2)
    return PsfField(psfs, [(*middle, place / size[2]) for place in places])


def _illuminated(emitted: Radial, optics: Optics, sheet: LightSheet, x_um: float) -> Radial:
    """Return the emission weighted by the sheet at a distance from its waist."""
    width = sheet.width_um(x_um, optics)
    energy = emitted.plane_energy
    # The sheet lies in the plane that the detection images best.
    centre = focal_planes(emitted)[0] + sheet.offset_um

    def profile(z: Float) -> Float:
        return np.exp(-2 * ((z - centre) / width) ** 2)

    return replace(
        emitted,
        intensity=lambda z, r: emitted.intensity(z, r) * profile(z)[:, None],
        # The spectrum of the profile, exp(-(pi w f)^2 / 2), is below 1e-8 from f = 2 / w.
        axial_cutoff=emitted.axial_cutoff + 2 / width,
        plane_energy=None if energy is None else lambda z: energy(z) * profile(z),
    )


def _places(
    emitted: Radial, optics: Optics, sheet: LightSheet, waist: float, last: float, step: float
) -> list[float]:
    """Return where along x to sample, so that the logarithm of the axial width changes by at most `step`."""
    if last == 0:
        return [0.0]
    x = np.linspace(0, last, _CURVE)
    if 0 < waist < last:
        x = np.unique(np.append(x, waist))
    middle, _ = focal_planes(emitted)
    first, end = emitted.focus[0] - emitted.tail, emitted.focus[1] + emitted.tail
    fine = emitted.axial_cutoff + 2 / min(sheet.width_um(place - waist, optics) for place in x)
    z = np.linspace(first, end, 2 * math.ceil(32 * (end - first) * fine) + 1)
    axis = emitted.intensity(z, np.zeros(1))[:, 0]
    logs = np.empty(len(x))
    for i, place in enumerate(x):
        logs[i] = math.log(
            _axial_width(z, axis, middle + sheet.offset_um, sheet.width_um(place - waist, optics))
        )
    travelled = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(logs)))])
    n = math.ceil(travelled[-1] / step)
    if n == 0 or travelled[-1] < 1e-3 * step:
        return [last / 2]
    return [float(p) for p in np.interp(np.linspace(0, travelled[-1], n + 1), travelled, x)]


def _axial_width(z: Float, axis: Float, centre: float, width: float) -> float:
    """Return the full width at half maximum of the emission on the axis times the sheet."""
    light = axis * np.exp(-2 * ((z - centre) / width) ** 2)
    return effective_sigma(light)[0] * float(z[1] - z[0])

"""Theoretical point spread functions of widefield and confocal microscopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from chunkrestore.psf.diffraction import (
    axial_cutoff,
    lateral_cutoff,
    plane_energy,
    radial_intensity,
    zonal_focus,
)
from chunkrestore.psf.optics import Optics
from chunkrestore.psf.prepare import FWHM_PER_SIGMA, effective_sigma
from chunkrestore.psf.radial import Radial, interpolation, radial_step, render

Float = npt.NDArray[np.float64]
Model = Literal["scalar", "vectorial"]

_TAIL = 6.0
# In units of 1 / axial cutoff. Without aberration the axis follows sinc^2 of the distance times the cutoff,
# whose envelope 1 / (pi x)^2 falls to 1 % at x = 3.2.
_STEEPEST = 6.0


def widefield(
    optics: Optics,
    voxel_size: Sequence[float],
    shape: Sequence[int] | None = None,
    *,
    model: Model = "vectorial",
) -> npt.NDArray[np.float32]:
    r"""Return the point spread function of a widefield microscope.

    .. math:: h(x, y, z) = I(\sqrt{x^2 + y^2}, z)

    averaged over each voxel, with I as in `chunkrestore.psf.diffraction.radial_intensity`. The first axis is the
    movement of the focus: index z grows as the focus moves deeper into the sample, away from the objective
    (reverse the array for a stack that was taken the other way).

    Parameters
    ----------
    optics
        The microscope.
    voxel_size
        Micrometres along z (distance of planes), y, x.
    shape
        Voxels along z, y, x. By default odd lengths which hold 99 % of the light of each plane, and along z
        every plane whose axis is brighter than 1 % of the peak. Strong spherical aberration spreads light over
        tens of micrometres: there the array ends at the radius of the sharp cone of light plus 80 periods of the
        highest frequency, and holds less.
    model
        ``"vectorial"``, right for every aperture, or ``"scalar"``, good up to an aperture of about half of the
        refractive index.

    Returns
    -------
    ndarray
        float32, sum 1, centre at ``n // 2``. With spherical aberration the plane where the axis is
        brightest is the central one: the shift of the focus is left out, the asymmetry kept.

    Raises
    ------
    ValueError
        If `model` is neither, `voxel_size` or `shape` is not three positive numbers, or the default shape
        would be too large.

    References
    ----------
    S. F. Gibson and F. Lanni, J. Opt. Soc. Am. A 9 (1992) 154-166.
    B. Richards and E. Wolf, Proc. R. Soc. Lond. A 253 (1959) 358-379.

    Examples
    --------
    >>> air = Optics(numerical_aperture=0.3, emission_um=0.52, immersion_index=1.0)
    >>> widefield(air, (2.0, 0.4, 0.4), (11, 21, 21)).shape
    (11, 21, 21)
    """
    return render(detection(optics, model), voxel_size, shape)


def confocal(
    optics: Optics,
    voxel_size: Sequence[float],
    shape: Sequence[int] | None = None,
    *,
    model: Model = "vectorial",
) -> npt.NDArray[np.float32]:
    r"""Return the point spread function of a confocal microscope.

    .. math:: h = I_{ex} \cdot (I_{em} * p)

    where p is the disc of the pinhole as it appears in the sample and both intensities are those of
    `widefield`; the excitation fills the aperture evenly.

    Parameters
    ----------
    optics
        The microscope, with `excitation_um` and a pinhole.
    voxel_size, shape, model
        As in `widefield`.

    Returns
    -------
    ndarray
        As in `widefield`.

    Raises
    ------
    ValueError
        As in `widefield`, and if the excitation or the pinhole is missing.
    """
    excitation_um = optics.require_excitation("a confocal point spread function")
    pinhole = optics.pinhole_radius_um
    emitted, vectorial = detection(optics, model), model == "vectorial"

    def intensity(z: Float, r: Float) -> Float:
        excited = radial_intensity(optics, excitation_um, z, r, vectorial=vectorial)
        return excited * _through_pinhole(emitted, pinhole, z, r)

    return render(
        Radial(
            intensity,
            lateral_cutoff=emitted.lateral_cutoff + lateral_cutoff(optics, excitation_um),
            axial_cutoff=emitted.axial_cutoff + axial_cutoff(optics, excitation_um),
            focus=emitted.focus,
            tail=emitted.tail,
            slope=emitted.slope,
        ),
        voxel_size,
        shape,
    )


def detection(optics: Optics, model: Model = "vectorial") -> Radial:
    """Return the intensity of the emission around the optical axis, as `widefield` renders it."""
    if model not in ("scalar", "vectorial"):
        raise ValueError(f'`model` must be "scalar" or "vectorial", got {model!r}')
    vectorial = model == "vectorial"
    wavelength = optics.emission_um
    energy = plane_energy(optics, wavelength, vectorial=vectorial)
    zones = zonal_focus(optics)
    cutoff = axial_cutoff(optics, wavelength)
    ratio = optics.numerical_aperture / optics.immersion_index
    return Radial(
        lambda z, r: radial_intensity(optics, wavelength, z, r, vectorial=vectorial),
        lateral_cutoff=lateral_cutoff(optics, wavelength),
        axial_cutoff=cutoff,
        focus=(float(zones.min()), float(zones.max())),
        tail=_TAIL / cutoff,
        slope=min(ratio / math.sqrt(1 - ratio**2), _STEEPEST),
        plane_energy=lambda z: np.full(len(z), energy),
    )


def fwhm_um(psf: np.ndarray, voxel_size: Sequence[float]) -> tuple[float, ...]:
    """Return the full width at half maximum along each axis through the brightest voxel, in micrometres."""
    return tuple(
        FWHM_PER_SIGMA * sigma * d for sigma, d in zip(effective_sigma(psf), voxel_size, strict=True)
    )


def _through_pinhole(emitted: Radial, pinhole: float, z: Float, r: Float) -> Float:
    """Return the mean of the emission over a disc at radius `r`: what passes a pinhole there."""
    step = radial_step(emitted)
    n_rings = 4 + math.ceil(2 * pinhole * emitted.lateral_cutoff)
    node, weight = special.roots_legendre(n_rings)
    ring = pinhole * (node + 1) / 2
    n_angles = 2 * n_rings + 8
    angle = math.pi * (np.arange(n_angles) + 0.5) / n_angles
    # 2 s ds / pinhole^2, and a mean over angles.
    weights = np.repeat(weight * ring / pinhole / n_angles, n_angles)
    far: Float = np.sqrt(
        np.asarray(r)[:, None, None] ** 2
        + ring[:, None] ** 2
        + 2 * np.asarray(r)[:, None, None] * ring[:, None] * np.cos(angle)
    )
    n_r = math.ceil((float(np.max(r)) + pinhole) / step) + 2
    samples = emitted.intensity(z, step * np.arange(n_r, dtype=np.float64))
    return np.asarray((interpolation(far.reshape(len(r), -1), weights, step, n_r) @ samples.T).T)

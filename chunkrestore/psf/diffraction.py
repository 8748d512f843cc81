r"""Diffraction integrals of a circular aperture behind layers of different refractive index.

A point source lies at some depth in the sample, below a coverslip and the immersion medium. A ray leaves it
with the transverse component :math:`s = n \sin\theta`, the same number in every layer (Snell's law), from 0 to
the numerical aperture. With :math:`q_l(s) = \sqrt{n_l^2 - s^2}` the optical path relative to the design
conditions is

.. math:: W(s, z) = \sum_l t_l \left( q_l - \frac{n_i}{n_l} q_i \right) - z\, q_i

summed over the sample (thickness: the depth of the source), the coverslip, and with negative sign the design
coverslip and the design immersion layer (Gibson & Lanni 1992, with the immersion thickness solved for the
paraxial focus as in Aguet et al. 2009). `z` is how far the focus was moved deeper into the sample from the
paraxial focus; a layer that equals the immersion medium drops out. Beyond the critical angle
:math:`q_l` is imaginary and the wave decays with depth.

The integrals are Gauss-Legendre sums over the aperture angle, split at critical angles. Lengths are
micrometres, intensities are relative, and everything is float64.

References
----------
S. F. Gibson and F. Lanni, J. Opt. Soc. Am. A 9 (1992) 154-166.
B. Richards and E. Wolf, Proc. R. Soc. Lond. A 253 (1959) 358-379.
F. Aguet, S. Geissbuehler, I. Maerki, T. Lasser and M. Unser, Opt. Express 17 (2009) 6829-6848.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from chunkrestore.psf.optics import Optics

Float = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
_SPARE_NODES = 32


class _Aperture(NamedTuple):
    angle: Float
    weight: Float


def radial_intensity(
    optics: Optics, wavelength_um: float, z: Float, r: Float, *, vectorial: bool = True
) -> Float:
    r"""Return the intensity of a point source at radius `r` in planes `z`.

    Scalar, in the form of Gibson and Lanni:

    .. math:: I = \left| \int J_0(k r s)\, e^{ikW(s, z)} s\, ds \right|^2

    Vectorial, for light of all polarisations equally (a freely turning emitter, or circularly polarised
    excitation): :math:`I = |I_0|^2 + 2 |I_1|^2 + |I_2|^2`, where :math:`I_m` holds :math:`J_m`, the
    apodisation :math:`\sqrt{\cos\theta}` of an aplanatic lens, the transmission of the layers
    for both polarisations, and the projection of the field onto the axes of the sample. By reciprocity the
    same expression holds for emission and for focusing.

    Parameters
    ----------
    optics
        The microscope.
    wavelength_um
        Vacuum wavelength.
    z, r
        One-dimensional: planes relative to the paraxial focus, radii from the axis.
    vectorial
        The vectorial integrals instead of the scalar one.

    Returns
    -------
    ndarray
        Shape ``(len(z), len(r))``, not negative.
    """
    aperture = _aperture(optics, _n_nodes(optics, wavelength_um, z, r))
    k = 2 * math.pi / wavelength_um
    s = optics.immersion_index * np.sin(aperture.angle)
    axial = np.sqrt(optics.immersion_index**2 - s**2)
    defocus = np.exp(-1j * k * np.multiply.outer(np.asarray(z), axial - optics.immersion_index))
    argument = k * np.multiply.outer(s, np.asarray(r))
    intensity = np.zeros((len(z), len(r)))
    for order, share, amplitude in _amplitudes(optics, wavelength_um, aperture, vectorial):
        waves, rings = defocus * (amplitude * aperture.weight), _bessel(order, argument)
        # Two real products: a complex one would turn the rings into complex numbers first.
        intensity += share * ((waves.real @ rings) ** 2 + (waves.imag @ rings) ** 2)
    return intensity


def plane_energy(optics: Optics, wavelength_um: float, *, vectorial: bool = True) -> float:
    r"""Return the light in a whole plane, :math:`2\pi \int I r\, dr`, the same for every plane.

    By Parseval's theorem for the Hankel transform: the energy in the pupil,
    :math:`\frac{2\pi}{k^2} \int |g_m(s)|^2 s\, ds`.
    """
    aperture = _aperture(optics, _n_nodes(optics, wavelength_um, np.zeros(1), np.zeros(1)))
    k = 2 * math.pi / wavelength_um
    # s ds = n_i^2 sin cos d(angle); the amplitudes are per angle.
    area = optics.immersion_index**2 * np.sin(aperture.angle) * np.cos(aperture.angle)
    return sum(
        share * 2 * math.pi / k**2 * float(np.sum(aperture.weight * np.abs(amplitude) ** 2 / area))
        for _, share, amplitude in _amplitudes(optics, wavelength_um, aperture, vectorial)
    )


def zonal_focus(optics: Optics, n_zones: int = 256) -> Float:
    r"""Return where the rays of each zone of the aperture cross the axis, relative to the paraxial focus.

    The stationary point of :math:`W` in :math:`s^2`: :math:`z = \sum_l t_l (q_i / q_l - n_i / n_l)`. Zones
    beyond the critical angle of the sample carry no ray and are left out.
    """
    limit = min(optics.numerical_aperture, 0.999 * optics.sample_index)
    s = np.linspace(0, limit, n_zones)
    n = optics.immersion_index
    focus = np.zeros(n_zones)
    for thickness, index in _layers(optics):
        focus += thickness * (np.sqrt(n**2 - s**2) / np.sqrt(index**2 - s**2) - n / index)
    return focus


def axial_cutoff(optics: Optics, wavelength_um: float) -> float:
    r"""Return the highest axial frequency of the intensity, :math:`(n - \sqrt{n^2 - NA^2}) / \lambda`."""
    n = optics.immersion_index
    return (n - math.sqrt(n**2 - optics.numerical_aperture**2)) / wavelength_um


def lateral_cutoff(optics: Optics, wavelength_um: float) -> float:
    r"""Return the highest lateral frequency of the intensity, :math:`2 NA / \lambda`."""
    return 2 * optics.numerical_aperture / wavelength_um


def _layers(optics: Optics) -> tuple[tuple[float, float], ...]:
    """Return (thickness, index) of every layer that adds to the path; design layers are negative."""
    return (
        (optics.depth_um, optics.sample_index),
        (optics.coverslip_um, optics.coverslip_index),
        (-optics.coverslip_design_um, optics.coverslip_design_index),
        (-optics.working_distance_um, optics.immersion_design_index or optics.immersion_index),
    )


def _aberration(optics: Optics, s: Float) -> Complex:
    """Return the optical path in focus, relative to the axis; the imaginary part is evanescent decay."""
    n = optics.immersion_index
    path = np.zeros(s.shape, dtype=np.complex128)
    for thickness, index in _layers(optics):
        if thickness and index != n:
            q = np.sqrt(index**2 - s**2 + 0j)
            path += thickness * ((q - index) - n / index * (np.sqrt(n**2 - s**2) - n))
    return path


def _n_nodes(optics: Optics, wavelength_um: float, z: Float, r: Float) -> int:
    """Return a number of nodes that resolves the phase: more than pi per turn, and a constant."""
    k = 2 * math.pi / wavelength_um
    s = np.linspace(0, optics.numerical_aperture, 512)
    aberration = _aberration(optics, s)
    turn = k * float(np.abs(np.diff(aberration)).sum())
    turn += 2 * math.pi * axial_cutoff(optics, wavelength_um) * float(np.abs(z).max())
    turn += k * optics.numerical_aperture * float(np.abs(r).max())
    return _SPARE_NODES + math.ceil(0.75 * turn)


def _aperture(optics: Optics, n_nodes: int) -> _Aperture:
    """Return nodes and weights over the aperture angle, split where a layer becomes evanescent."""
    n = optics.immersion_index
    critical = {index for _, index in _layers(optics) if index < optics.numerical_aperture}
    borders = [0.0, *(math.asin(index / n) for index in sorted(critical))]
    borders.append(math.asin(optics.numerical_aperture / n))
    node, weight = special.roots_legendre(n_nodes)
    half = np.diff(borders) / 2
    middle = np.asarray(borders[:-1]) + half
    return _Aperture(
        (middle[:, None] + half[:, None] * node).ravel(), (half[:, None] * weight[None, :]).ravel()
    )


def _amplitudes(
    optics: Optics, wavelength_um: float, aperture: _Aperture, vectorial: bool
) -> list[tuple[int, float, Complex]]:
    """Return (order of the Bessel function, share in the intensity, amplitude per angle)."""
    n = optics.immersion_index
    sine, cosine = np.sin(aperture.angle), np.cos(aperture.angle)
    s = n * sine
    phase: Complex = np.exp(2j * math.pi / wavelength_um * _aberration(optics, s))
    if not vectorial:
        return [(0, 1.0, phase * (n**2 * sine * cosine))]
    glass = (optics.coverslip_index,) if optics.coverslip_um else ()
    across, along = _transmission((n, *glass, optics.sample_index), s)
    sample_cosine = np.sqrt(optics.sample_index**2 - s**2 + 0j) / optics.sample_index
    common = np.sqrt(cosine) * sine * phase
    return [
        (0, 1.0, common * (across + along * sample_cosine)),
        (1, 2.0, common * along * s / optics.sample_index),
        (2, 1.0, common * (across - along * sample_cosine)),
    ]


def _transmission(indices: tuple[float, ...], s: Float) -> tuple[Complex, Complex]:
    """Return Fresnel's amplitude transmission (perpendicular, parallel) through a stack of layers."""
    across = np.ones(s.shape, dtype=np.complex128)
    along = np.ones(s.shape, dtype=np.complex128)
    for n1, n2 in pairwise(indices):
        q1, q2 = np.sqrt(n1**2 - s**2 + 0j), np.sqrt(n2**2 - s**2 + 0j)
        across *= 2 * q1 / (q1 + q2)
        along *= 2 * n1 * n2 * q1 / (n2**2 * q1 + n1**2 * q2)
    return across, along


def _bessel(order: int, x: Float) -> Float:
    if order == 0:
        return special.j0(x)
    first = special.j1(x)
    if order == 1:
        return first
    # The recurrence: ten times faster than the general function. Its rounding at small x is absolute.
    return 2 * np.divide(first, x, out=np.full_like(x, 0.5), where=x > 0) - special.j0(x)

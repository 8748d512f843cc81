r"""Back projectors that are not the adjoint of the blur, so that Richardson-Lucy needs fewer iterations.

Both are a Wiener inverse of the transfer function :math:`\hat h`, held back by a window :math:`A` where the
microscope passes next to no light,

.. math:: \hat b = \frac{A \, \hat h^*}{|\hat h|^2 + \alpha}, \qquad \text{scaled to } \hat b(0) = 1 .

They are made once, on a reference lattice that follows from the point spread function alone, and cut in space
to where they differ from zero. So they depend on no block's lattice, every block multiplies by the same
numbers, and how far they reach is known.

The kernels returned here are oriented like the point spread function: it is the *adjoint* of the blur by one
(`chunkrestore.kernels.blur.Blur`) that back projects. They have negative rings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage, spatial

from chunkrestore.grid import fast_length
from chunkrestore.psf import effective_sigma
from chunkrestore.psf.prepare import FWHM_PER_SIGMA

Kernel = npt.NDArray[np.float32]

LEFT_OUT = 0.02
"""Share of a kernel's absolute values that lies beyond the box to which it is cut, per axis. On simulated
nuclei (2-D, 20 and 500 photons) shares of 0.001 to 0.05 gave the same PSNR to 0.1 dB, and boxes that differ
threefold in length."""
PEAK_NBYTES = 64
"""Measured peak while a kernel is made, per voxel of the reference lattice, rounded up."""
_ROOM = 32
# Lattice beyond the point spread function, in standard deviations of its core. Another one gives the same
# Wiener-Butterworth kernel to the share that is cut off; masked ones, whose mask has its corners on the lattice,
# differ by up to 10 % of their absolute values.
_ORDER = 10
# Of the Butterworth window, as in the publication.
_PASSED, _LEAST_PASSED = 0.9, 1e-3
# The mask is where |h| exceeds the value above which this share of its sum lies, at least the second number.
_FLAT = 0.8
# Share of the way to the mask's edge up to which the masked Wiener projector is not attenuated.


def wiener_butterworth(psf: np.ndarray, alpha: float, *, order: int = _ORDER) -> Kernel:
    r"""Return the Wiener-Butterworth back projector.

    .. math::

       A = \left[1 + \epsilon \left(\sum_i (k_i / c_i)^2\right)^n\right]^{-1/2}, \qquad
       \epsilon = \frac{g}{\beta^2} - 1

    with the resolution limits :math:`c_i = 1 / \mathrm{FWHM}_i` in cycles per voxel, and :math:`\beta` and
    :math:`g` the means over the axes of :math:`|\hat h|` and of :math:`|\hat h| / (|\hat h|^2 + \alpha)`
    there (the published program takes g from the first axis alone).

    Parameters
    ----------
    psf
        As `chunkrestore.psf.prepare` returns it.
    alpha
        Above 0; smaller restores more and amplifies more noise.
    order
        Of the Butterworth window.

    Returns
    -------
    ndarray
        float32, odd lengths, centre at ``n // 2``, sum 1, in part negative.

    References
    ----------
    .. [1] Guo, M. et al. (2020). Nat. Biotechnol. 38, 1337-1346. doi:10.1038/s41587-020-0560-x
    """
    cutoffs = {
        axis: min(1 / (FWHM_PER_SIGMA * sigma), 0.5)  # no lattice holds more than half a cycle per voxel
        for axis, sigma in enumerate(effective_sigma(psf))
        if psf.shape[axis] > 1
    }
    if not cutoffs:
        return np.ones(psf.shape, np.float32)
    passed = np.array([_passed(psf, axis, cutoff) for axis, cutoff in cutoffs.items()])
    gain = float((passed / (passed**2 + alpha)).mean())
    strength = max(gain / float(passed.mean()) ** 2 - 1, 0.0)

    def window(otf: np.ndarray, lattice: Sequence[int]) -> np.ndarray:
        k = _frequencies(lattice)
        squared = sum(((k[axis] / cutoff) ** 2 for axis, cutoff in cutoffs.items()), np.zeros(()))
        return 1 / np.sqrt(1 + strength * squared**order)

    return _kernel(psf, alpha, window)


def masked_wiener(psf: np.ndarray, alpha: float) -> Kernel:
    r"""Return the Wiener back projector that is masked by the support of the transfer function.

    The support is where :math:`|\hat h|` reaches a threshold (opened, the part that holds zero frequency,
    its convex hull); :math:`A` falls from 1 at 0.8 of the way to its edge to 0 at the edge as a squared
    cosine. Geometry is orthogonal: one component, unlike that of data skewed by a scanned stage.

    Parameters
    ----------
    psf, alpha
        As in `wiener_butterworth`.

    Returns
    -------
    ndarray
        As in `wiener_butterworth`.

    References
    ----------
    .. [1] Ruan, X. et al. (2024). Nat. Methods 21, 2342-2352 (PetaKit5D). doi:10.1038/s41592-024-02475-4
    """
    if max(psf.shape) == 1:
        return np.ones(psf.shape, np.float32)

    def window(otf: np.ndarray, lattice: Sequence[int]) -> np.ndarray:
        way = _way_to_edge(_support(np.abs(otf), lattice), lattice)
        return np.cos(np.pi / 2 * np.clip((way - _FLAT) / (1 - _FLAT), 0, 1)) ** 2

    return _kernel(psf, alpha, window)


BACK_PROJECTORS: Mapping[str, Callable[[np.ndarray, float], Kernel]] = {
    "wiener-butterworth": wiener_butterworth,
    "masked-wiener": masked_wiener,
}


def reference_lattice(psf: np.ndarray) -> tuple[int, ...]:
    """Return the lengths of the lattice on which the kernels of `psf` are made, on the host.

    That takes up to `PEAK_NBYTES` bytes per voxel of it.
    """
    return tuple(
        fast_length(n + math.ceil(_ROOM * sigma)) if n > 1 else 1
        for n, sigma in zip(psf.shape, effective_sigma(psf), strict=True)
    )


def _kernel(
    psf: np.ndarray, alpha: float, window: Callable[[np.ndarray, Sequence[int]], np.ndarray]
) -> Kernel:
    """Return the conjugate of b in space, cut and scaled."""
    lattice = reference_lattice(psf)
    embedded = np.zeros(lattice)
    embedded[tuple(slice(n) for n in psf.shape)] = psf
    centred = np.roll(embedded, [-(n // 2) for n in psf.shape], axis=range(psf.ndim))
    otf = fft.rfftn(centred / psf.sum(dtype=np.float64))
    conjugate = otf * (window(otf, lattice) / (np.abs(otf) ** 2 + alpha))
    whole = fft.fftshift(fft.irfftn(conjugate, lattice))
    cut = whole[_box(np.abs(whole))]
    return np.ascontiguousarray(cut / cut.sum(), dtype=np.float32)


def _box(magnitude: np.ndarray) -> tuple[slice, ...]:
    """Return the box about the centre beyond which, per axis, a share of `LEFT_OUT` lies."""
    box = []
    for axis, n in enumerate(magnitude.shape):
        profile = magnitude.sum(axis=tuple(a for a in range(magnitude.ndim) if a != axis))
        within = np.cumsum(np.bincount(np.abs(np.arange(n) - n // 2), weights=profile))
        radius = min(int(np.searchsorted(within, (1 - LEFT_OUT) * within[-1])), (n - 1) // 2)
        box.append(slice(n // 2 - radius, n // 2 + radius + 1))
    return tuple(box)


def _passed(psf: np.ndarray, axis: int, frequency: float) -> float:
    """Return |h| at a frequency (cycles per voxel) along one axis, whatever the lattice."""
    profile = psf.sum(axis=tuple(a for a in range(psf.ndim) if a != axis), dtype=np.float64)
    waves = np.exp(-2j * np.pi * frequency * np.arange(len(profile)))
    return float(abs(waves @ profile) / profile.sum())


def _frequencies(lattice: Sequence[int]) -> list[np.ndarray]:
    """Return the frequencies of a half spectrum per axis, in cycles per voxel, that broadcast to it."""
    *leading, last = lattice
    each = [*(fft.fftfreq(n) for n in leading), fft.rfftfreq(last)]
    return [k.reshape([-1 if a == axis else 1 for a in range(len(each))]) for axis, k in enumerate(each)]


def _support(magnitude: np.ndarray, lattice: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the frequencies (points x axes longer than 1) that the transfer function passes."""
    long = [n for n in lattice if n > 1]
    whole = _whole(magnitude, lattice).reshape(long)
    descending = np.sort(whole, axis=None)[::-1]
    sums = np.cumsum(descending)
    threshold = max(float(descending[np.searchsorted(sums, _PASSED * sums[-1])]), _LEAST_PASSED)
    centre = tuple(n // 2 for n in long)
    zero = np.zeros(whole.shape, bool)
    zero[centre] = True
    # With the neighbours of zero frequency, so that the hull has a volume.
    opened = ndimage.binary_opening(fft.fftshift(whole >= threshold)) | ndimage.binary_dilation(zero)
    regions, _ = ndimage.label(opened)
    return np.asarray((np.argwhere(regions == regions[centre]) - centre) / long)


def _whole(half: np.ndarray, lattice: Sequence[int]) -> np.ndarray:
    """Return a real, point-symmetric spectrum from its half."""
    mirrored = half[..., 1 : (lattice[-1] + 1) // 2][..., ::-1]
    for axis in range(half.ndim - 1):
        mirrored = np.roll(np.flip(mirrored, axis), 1, axis)
    return np.concatenate([half, mirrored], axis=-1)


def _way_to_edge(points: np.ndarray, lattice: Sequence[int]) -> np.ndarray:
    """Return per frequency its distance from zero relative to that of the hull's edge in its direction.

    The hull, convex and point-symmetric, is where no :math:`|n_j k|` exceeds 1, so that the ratio is the
    largest of them.
    """
    k = [each for each, n in zip(_frequencies(lattice), lattice, strict=True) if n > 1]
    if len(k) == 1:
        return np.asarray(np.abs(k[0]) / np.abs(points).max())
    equations = spatial.ConvexHull(np.concatenate([points, -points])).equations
    normals = equations[:, :-1] / -equations[:, -1:]
    first = np.array([row[np.flatnonzero(np.abs(row) > 1e-9)[0]] for row in normals])
    # Beyond the hull's extent along an axis, nothing is within: only the rest is computed.
    near = [
        np.flatnonzero(np.abs(each) <= extent)
        for each, extent in zip(k, np.abs(points).max(axis=0), strict=True)
    ]
    within = [each.ravel()[chosen] for each, chosen in zip(k, near, strict=True)]
    way = np.zeros([len(each) for each in within])
    for normal in np.unique(np.round(normals * np.sign(first)[:, None], 6), axis=0):
        along = reduce(np.add.outer, [c * each for c, each in zip(normal, within, strict=True)])
        np.maximum(way, np.abs(along), out=way)
    everywhere = np.full([max(each.shape) for each in k], np.inf)
    everywhere[np.ix_(*near)] = way
    return everywhere.reshape([max(each.shape) for each in _frequencies(lattice)])

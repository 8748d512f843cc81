r"""Inverse filters: one multiplication in Fourier space.

.. math:: X = (1 + \alpha |L_0|^2) \frac{H^*}{|H|^2 + \alpha |L|^2} \, Y

With L = 1 Wiener's filter for a constant ratio alpha of noise power to signal power; with L the Laplacian
the filter that minimises :math:`|Hx - y|^2 + \alpha |Lx|^2`. The factor in front (L_0 is L at frequency 0: 1
or 0) keeps the mean: the filter sums to 1, so that constants and the total light stay.

Linear, so that the only thing to decide is what lies beyond the border of the volume: its mirror image, which
neither darkens nor rings, as zeros or the opposite border would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.backend import Array
from chunkrestore.grid import fast_length
from chunkrestore.kernels.blur import Blur, Borders

PRIORS = ("constant", "laplacian")
_ROUNDING = 1e-6
_SHORTEST, _LONGEST = 64, 4096
# Lengths of the lattice on which the reach of a filter is looked for.
_IN_PLANE = 32
# Frequencies per axis of a plane: transfer functions are smooth, and fewer samples of one are still exact.


def mirrored_lattice(
    shape: Sequence[int], psf_shape: Sequence[int], reach: Sequence[int], at_border: Borders
) -> tuple[int, ...]:
    """Return the lengths of the periodic lattice on which a block is filtered.

    `reach` voxels more for each end that is a border of the volume, rounded up to a length that FFTs like. An
    axis along which the point spread function has one voxel is left alone.
    """
    return tuple(
        n if p == 1 else fast_length(n + r * sum(border))
        for n, p, r, border in zip(shape, psf_shape, reach, at_border, strict=True)
    )


def inverse_filter(
    psf: np.ndarray,
    lattice: Sequence[int],
    reference: Array,
    *,
    regularization: float,
    prior: str = "constant",
    voxel_size: Sequence[float] | None = None,
) -> Blur:
    """Return the filter as a blur, in the namespace and on the device of `reference`.

    Parameters
    ----------
    psf
        Checked and scaled to sum 1 (`chunkrestore.psf.prepare`), on the host. Axes of length 1 are neither
        sharpened nor smoothed.
    lattice
        Lengths of the periodic lattice; what `psf` exceeds it by wraps around.
    regularization
        Alpha, above 0.
    prior
        ``"constant"`` (L = 1) or ``"laplacian"``: second differences, so that slowly varying light is left
        alone and noise is suppressed the more the finer it is.
    voxel_size
        Length of a voxel per axis, in any unit, all equal by default. Second differences are divided by the
        square of it, relative to the smallest.
    """
    blur = Blur.from_psf(psf, lattice, reference)
    if prior == "constant":
        otf = backend.elementwise(_constant_prior, blur.otf, blur.otf, regularization)
    else:
        differences = _second_differences(blur, reference, voxel_size)
        otf = backend.elementwise(_laplacian_prior, blur.otf, blur.otf, regularization, *differences)
    return Blur(otf, blur.lattice, blur.axes)


def inverse_reach(psf: np.ndarray, tolerance: float, **options: Any) -> tuple[int, ...]:
    r"""Return per axis from which distance on voxels change the result by less than `tolerance`.

    The filter's kernel is cut into planes at distance k along the axis. A plane acts on the plane of the
    image that it meets as a filter of strength :math:`s_k`, the largest gain over all frequencies in the
    plane. If everything further than d is replaced by something as large and unrelated (real voxels by what
    wraps around), and its planes are unrelated among each other, the result changes, relative to its own
    size, by at most

    .. math:: \sqrt{2 \sum_{|k| > d} s_k^2 \Big/ \sum_k s_k^2}

    as root mean square. Returned is the smallest such d. A model, since planes of real images are related;
    `chunkrestore.operators.wiener.Wiener` gives the seams that were measured.

    Parameters
    ----------
    psf
        Checked and scaled to sum 1, on the host.
    tolerance
        Values below 1e-6, where float32 leaves nothing but rounding, count as 1e-6.
    options
        ``regularization``, ``prior`` and ``voxel_size``, as for `inverse_filter`.
    """
    return tuple(
        0 if p == 1 else _reach_along(psf, axis, max(tolerance, _ROUNDING), options)
        for axis, p in enumerate(psf.shape)
    )


def _reach_along(psf: np.ndarray, axis: int, tolerance: float, options: Mapping[str, Any]) -> int:
    length = fast_length(max(4 * psf.shape[axis], _SHORTEST))
    while True:
        energy = np.square(_plane_strengths(psf, axis, length, options))
        distance = np.minimum(np.arange(length), length - np.arange(length))
        beyond = np.bincount(distance, energy)[::-1].cumsum()[::-1]
        error = np.sqrt(2 * beyond[1:] / beyond[0])
        small = np.flatnonzero(error <= tolerance)
        # Beyond a quarter of the lattice a slowly falling kernel would meet itself.
        if small.size and small[0] <= length // 4:
            return int(small[0])
        if length >= _LONGEST:
            return length // 4
        length *= 2


def _plane_strengths(psf: np.ndarray, axis: int, length: int, options: Mapping[str, Any]) -> np.ndarray:
    """Return, per plane of the filter's kernel across `axis`, its largest gain; element 0 is the centre."""
    lattice = [
        length if a == axis else (1 if p == 1 else fast_length(min(2 * p, _IN_PLANE)))
        for a, p in enumerate(psf.shape)
    ]
    inverse = inverse_filter(psf, lattice, np.zeros(0, np.float32), **options)
    others = [a for a in range(psf.ndim) if a != axis]
    planes = np.abs(np.fft.fftn(inverse.synthesise(inverse.otf), axes=others))
    return planes.max(axis=tuple(others)).astype(np.float64)


def inverse_filtered(
    image: Array, inverse: Blur, *, before: Sequence[int], background: float = 0.0, non_negative: bool = False
) -> Array:
    """Return `image` less `background`, filtered.

    Parameters
    ----------
    image
        Real numbers in any namespace of the array API, two- or three-dimensional. Not modified.
    inverse
        From `inverse_filter`, on a lattice at least as large as `image`.
    before
        How many of the lattice's further voxels per axis hold the mirror image of the first voxels; the
        others hold that of the last ones.
    background
        Intensity of a voxel without any light.
    non_negative
        Whether negative results become 0.

    Returns
    -------
    array
        float32, shape of `image`.

    Notes
    -----
    Two real transforms. Peak: the lattice in float32, its half spectrum and the filter.
    """
    xp = backend.namespace(image)
    # Nested, so that the padded image is freed before the last transform makes another array of this size.
    spectrum = inverse.analyse(mirror_padded(image, inverse.lattice, before, inverse.axes, background))
    result = inverse.synthesise(inverse.filtered(spectrum), image.shape)
    del spectrum
    result = xp.asarray(result, copy=True)
    return backend.elementwise(_not_negative, result, result, 0.0) if non_negative else result


def mirror_padded(
    image: Array, lattice: Sequence[int], before: Sequence[int], axes: Sequence[int], background: float
) -> Array:
    """Return `image` less `background` in float32, continued by its mirror image on a periodic lattice.

    The voxel beyond the last one equals the last one. Further than one length away the image is repeated, as
    in an endless corridor between two mirrors. The first voxel stays at 0; what lies before it is at the end
    of the lattice.
    """
    xp = backend.namespace(image)
    padded = backend.full(lattice, 0.0, image)
    inner = tuple(slice(n) for n in image.shape)

    def above(slab: tuple[Any, ...]) -> None:
        padded[(slab[0], *inner[1:])] = xp.astype(image[slab], xp.float32, copy=False) - background

    backend.each_slab(xp, image.shape, above)
    for axis in axes:
        n, done = image.shape[axis], (slice(None),) * axis
        for target, source, flipped in _mirrored_runs(n, lattice[axis], before[axis]):
            part = padded[(*done, source, *inner[axis + 1 :])]
            padded[(*done, target, *inner[axis + 1 :])] = xp.flip(part, axis=axis) if flipped else part
    return padded


def _mirrored_runs(n: int, lattice: int, before: int) -> Iterator[tuple[slice, slice, bool]]:
    """Yield runs of voxels of a periodic axis beyond the first `n`, their values' place, and if reversed."""
    for start, stop, origin in ((n, lattice - before, 0), (-before, 0, lattice)):
        position = start
        while position < stop:
            turn, offset = divmod(position, n)
            run = min(n - offset, stop - position)
            target = slice(origin + position, origin + position + run)
            if turn % 2:
                yield target, slice(n - offset - run, n - offset), True
            else:
                yield target, slice(offset, offset + run), False
            position += run


def _second_differences(blur: Blur, reference: Array, voxel_size: Sequence[float] | None) -> Iterator[Array]:
    """Yield, for three axes, the transfer function of minus the second difference; 0 for axes left alone."""
    ndim = len(blur.lattice)
    sides = voxel_size or (1.0,) * ndim
    finest = min(sides[axis] for axis in blur.axes)
    for axis in range(3):
        if axis not in blur.axes:
            yield backend.full((), 0.0, reference)
            continue
        n = blur.lattice[axis]
        k = np.arange(n // 2 + 1 if axis == blur.axes[-1] else n)
        # 4 sin^2, not 2 - 2 cos, which loses its digits in float32 at low frequencies.
        response = 4 * np.sin(np.pi * k / n) ** 2 * (finest / sides[axis]) ** 2
        along = [-1 if a == axis else 1 for a in range(ndim)]
        yield backend.asarray_like(response.astype(np.float32).reshape(along), reference)


def _constant_prior(xp: Any, otf: Array, alpha: Array) -> Array:
    return xp.conj(otf) * (1.0 + alpha) / (otf * xp.conj(otf) + alpha)


def _laplacian_prior(xp: Any, otf: Array, alpha: Array, z: Array, y: Array, x: Array) -> Array:
    laplacian = z + y + x
    return xp.conj(otf) / (otf * xp.conj(otf) + alpha * (laplacian * laplacian))


def _not_negative(xp: Any, image: Array, zero: Array) -> Array:
    return xp.maximum(image, zero)

r"""Richardson-Lucy iterations that go on only where two halves of the photons agree on the direction.

The image is split into two halves :math:`y_1 + y_2 = y` with independent noise
(`chunkrestore.kernels.photon_splitting`). With blur :math:`H`, background :math:`b`, the mask :math:`M` of
observed voxels and :math:`W` as in `chunkrestore.kernels.richardson_lucy`, one iteration is

.. math::

   g_i &= W \, H^T\left[M \left(\frac{y_i}{\max(H x + b, \epsilon) / 2} - 1\right)\right] \\
   c &= H^T H \left[\min(\max(g_1 g_2, -1), 1)\right] \\
   a &= \min(\max(c / s, 0), 1), \qquad
   \frac{1}{s} = \frac{(x + b)^2}{v \, (x + d + v)} + 10 \\
   x &\leftarrow x \left(1 + a \, \frac{g_1 + g_2}{2}\right)

:math:`(g_1 + g_2) / 2` is the relative gradient of Richardson-Lucy on the whole image, so the fixed point is
:math:`H x + b = y` and light is kept (a step :math:`r_1 + r_2`, as in some programs, leads to twice of it).
Where noise is all that is left to fit, the halves pull apart and the voxel rests.

The idea, and :math:`c`, are those of Manton and York [1]_. Three things differ:

- They update wherever :math:`c \ge 0`. A voxel near 0 then goes or rests by its last digit, and seams hardly
  fall with the halo (rms 4e-3 and single voxels 0.1 of the dynamic range at 16 standard deviations of the
  point spread function, 50 accelerated iterations). Here agreement :math:`a` grows with :math:`c` up to
  :math:`s`, the variance that photon noise gives a relative gradient, at most 0.1: :math:`v` is the intensity
  per photon times :math:`\sum h^2`, and :math:`d` the part of :math:`b` that is photons. On simulated nuclei
  the best PSNR stayed within 0.05 dB, and later iterations lost less of it.
- The product is limited, so that one hot voxel does not outvote its surroundings nor drown them in rounding.
- Outside the image nobody votes, and voxels there are always updated: as good, and no larger lattice is needed
  to keep one border from voting at the other.

References
----------
.. [1] Manton, J. D. and York, A. G. (2023). Gradient consensus for Richardson-Lucy deconvolution.
   doi:10.5281/zenodo.10278919
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.backend import Array
from chunkrestore.kernels.blur import AnyBlur, Blur
from chunkrestore.kernels.richardson_lucy import (
    LEAST_BLURRED,
    LEAST_WEIGHT,
    extrapolated,
    known,
    updated,
    weights_of,
)

LARGEST_VOTE = 1.0
"""Limit of the product of the two relative gradients. A gradient is at least -1, where a voxel is to become 0."""
LARGEST_VARIANCE = 0.1
"""Limit of the variance that noise is believed to give a relative gradient, so that dark voxels still get darker."""


def consensus_estimates(
    image: Array,
    first: Array,
    blur: AnyBlur,
    *,
    iterations: int,
    start: float,
    noise: float,
    background: float = 0.0,
    stray: float = 0.0,
    acceleration: str | None = "heavy-ball",
    mask: Array | None = None,
) -> Iterator[Array]:
    """Yield the estimate on the lattice after every iteration; it must not be modified, nor kept.

    Preserves shape and namespace, a constant image, and total light as Richardson-Lucy does. Inputs are not
    modified.

    Parameters
    ----------
    image
        Real numbers in any namespace of the array API, two- or three-dimensional.
    first
        One half of its photons, float32, shape and namespace of `image`; the other half is the rest.
    blur
        On a lattice as `chunkrestore.kernels.blur.lattice_shape` gives it.
    iterations
        Number of iterations, at least 1.
    start
        Value of the flat start estimate, above 0.
    noise
        Variance that photon noise gives a relative gradient at intensity 1: intensity per photon times the
        sum of squares of the point spread function.
    background
        Expected intensity without any object, part of the model.
    stray
        The part of it that is photons (stray light) and not the camera's offset.
    acceleration
        ``"heavy-ball"`` (as `chunkrestore.kernels.richardson_lucy`) or None.
    mask
        Boolean, shape of `image`: where it was observed; everywhere by default.

    Notes
    -----
    Eight real transforms per iteration (blurred estimate, two gradients, consensus), sixteen with a blur
    that is blended of two. At most 28 bytes per lattice voxel (24 without acceleration; 4 less for blocks
    inside the volume) besides the image, its half and the result.
    """
    floor = max(LEAST_BLURRED * start, float(np.finfo(np.float32).tiny))
    data = _Data(image, first, mask, background, floor, noise, stray)
    weights = weights_of(blur, image, mask)
    estimate = backend.full(blur.lattice, start, image)
    previous = backend.full(blur.lattice, start, image) if acceleration else None
    for k in range(1, iterations + 1):
        if previous is not None and k > 1:
            ahead = backend.elementwise(extrapolated, previous, estimate, previous, (k - 1) / (k + 2))
            estimate, previous = ahead, estimate
        correction = _agreed_correction(data, blur, estimate, weights)
        estimate = backend.elementwise(updated, estimate, estimate, correction, weights, 0.0)
        del correction
        if mask is not None and k == iterations:
            estimate = backend.elementwise(known, estimate, estimate, weights, 1 / LEAST_WEIGHT)
        yield estimate


@dataclass(frozen=True)
class _Data:
    """What was observed, and what is expected without any object."""

    image: Array
    first: Array
    mask: Array | None
    background: float
    floor: float
    noise: float
    stray: float

    def residuals(self, blurred: Array) -> list[Array]:
        """Return M (y_i / (max(blurred + background, floor) / 2) - 1) of both halves; destroys `blurred`."""
        numbers, out = (self.background, self.floor), backend.namespace(blurred).empty_like(blurred)
        one, other = (_half, _rest) if self.mask is None else (_half_observed, _rest_observed)
        mask = () if self.mask is None else (self.mask,)
        return [
            backend.elementwise(one, out, self.first, blurred, *numbers, *mask),
            backend.elementwise(other, blurred, self.image, self.first, blurred, *numbers, *mask),
        ]


def _agreed_correction(data: _Data, blur: AnyBlur, estimate: Array, weights: Array | float) -> Array:
    """Return a (g_1 + g_2) / (2 W) on the lattice, with a = 1 outside the image."""
    xp, shape = backend.namespace(estimate), tuple(data.image.shape)
    inside = tuple(slice(n) for n in shape)
    residuals = data.residuals(blur.forward(estimate, shape))
    # Popped, so that `adjoint` holds the only reference and can free the residual half way.
    one = blur.adjoint(residuals.pop())
    other = blur.adjoint(residuals.pop())
    near = weights if isinstance(weights, float) else weights[inside]
    pair, limits = (one[inside], other[inside]), (-LARGEST_VOTE, LARGEST_VOTE)
    votes = [backend.elementwise(_vote, xp.empty_like(one[inside]), *pair, near, *limits)]
    correction = backend.elementwise(_mean, one, one, other)
    del one, other, pair
    consensus = _spread(blur, votes, shape)
    there = correction[inside], estimate[inside]
    numbers = data.background, data.stray + data.noise, data.noise, 1 / LARGEST_VARIANCE, 0.0, 1.0
    correction[inside] = backend.elementwise(_times_agreement, consensus, *there, consensus, *numbers)
    return correction


def _spread(blur: AnyBlur, votes: list[Array], shape: tuple[int, ...]) -> Array:
    """Return the first `shape` voxels of H^T H times the only element of `votes`, which is taken out."""
    if not isinstance(blur, Blur):
        return blur.adjoint(blur.forward(votes.pop()), shape)
    spectrum = blur.analyse(votes.pop())
    return blur.synthesise(blur.filtered(blur.filtered(spectrum), adjoint=True), shape)


def _half(xp: Any, half: Array, blurred: Array, background: Array, floor: Array) -> Array:
    return 2.0 * half / xp.maximum(blurred + background, floor) - 1.0


def _half_observed(
    xp: Any, half: Array, blurred: Array, background: Array, floor: Array, mask: Array
) -> Array:
    return _half(xp, half, blurred, background, floor) * xp.astype(mask, xp.float32)


def _rest(xp: Any, image: Array, first: Array, blurred: Array, background: Array, floor: Array) -> Array:
    return _half(xp, xp.astype(image, xp.float32, copy=False) - first, blurred, background, floor)


def _rest_observed(
    xp: Any, image: Array, first: Array, blurred: Array, background: Array, floor: Array, mask: Array
) -> Array:
    return _rest(xp, image, first, blurred, background, floor) * xp.astype(mask, xp.float32)


def _vote(xp: Any, one: Array, other: Array, weights: Array, least: Array, most: Array) -> Array:
    return xp.minimum(xp.maximum((one * weights) * (other * weights), least), most)


def _mean(xp: Any, one: Array, other: Array) -> Array:
    return 0.5 * (one + other)


def _times_agreement(
    xp: Any,
    correction: Array,
    estimate: Array,
    consensus: Array,
    background: Array,
    least_photons: Array,
    noise: Array,
    least_precision: Array,
    none: Array,
    full: Array,
) -> Array:
    expected = estimate + background
    precision = expected * (expected / (noise * (estimate + least_photons))) + least_precision
    return correction * xp.minimum(xp.maximum(consensus * precision, none), full)

"""Richardson-Lucy iterations with an unmatched back projector.

Nothing makes iterations with a back projector of `chunkrestore.kernels.back_projectors` converge, so these differ
in three ways from `chunkrestore.kernels.richardson_lucy`: they begin with the data, back projected by the
*matched* projector; a voxel changes by a limited factor; and what lies outside the image is not stepped further
for being seen less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.backend import Array
from chunkrestore.kernels.blur import Blur, share_seen
from chunkrestore.kernels.richardson_lucy import LEAST_BLURRED, LEAST_WEIGHT, residual

LARGEST_STEP = 1.5
"""An iteration changes a voxel at most by this factor, up or down. On simulated nuclei (3-D, dense and
sparse, 20 to 500 photons) 1.5 gave 0.2 to 0.4 dB more than 10 after as many iterations; 1.25 gave another
0.15 dB, but one or two iterations later."""
LARGEST_WEIGHT = 2.0
"""Largest W. The correction does not fall with the light that reaches observed voxels, as H^T[...] does: with
weights of up to 100, as in matched iterations, the rim diverged from the fifth iteration (22 instead of
27.5 dB after 8); with any limit from 1.4 to 4 it did not."""


def unmatched_estimates(
    image: Array,
    blur: Blur,
    back_projector: Blur,
    *,
    iterations: int,
    start: float,
    background: float = 0.0,
    mask: Array | None = None,
) -> Iterator[Array]:
    r"""Yield the estimate on the lattice after every iteration; it must not be modified, nor kept.

    .. math::

       x_0 = \frac{\max(H^T M (y - b), 0) + \delta m}{H^T M + \delta}, \qquad
       x \leftarrow x \left\{1 + W B\left[M \left(\frac{y}{\max(H x + b, \epsilon)} - 1\right)\right]\right\}

    with :math:`W = 1 / \max(H^T M, 1/2)`, the braces limited to 2/3 and 3/2, :math:`\delta = 0.01` and m the
    `start` value, which counts only where little light was seen. A constant image stays constant.

    Parameters
    ----------
    image
        Real numbers in any namespace of the array API, two- or three-dimensional.
    blur, back_projector
        On one lattice, which has room for both (`chunkrestore.kernels.blur.lattice_shape`); it is the
        adjoint of the second that back projects.
    iterations
        Number of iterations, at least 1.
    start
        Above 0; the same for all blocks of a volume.
    background, mask
        As for `chunkrestore.kernels.richardson_lucy.estimates`.
    """
    floor = max(LEAST_BLURRED * start, float(np.finfo(np.float32).tiny))
    share = share_seen(blur, image, mask)
    estimate = blur.adjoint(_above(image, background, mask))
    estimate = backend.elementwise(_begun, estimate, estimate, share, start, LEAST_WEIGHT, 0.0)
    for k in range(1, iterations + 1):
        # Nested, so that `adjoint` holds the only reference to the ratio and can free it half way.
        correction = back_projector.adjoint(
            residual(image, blur.forward(estimate, image.shape), background, floor, mask)
        )
        limits = 1 / LARGEST_WEIGHT, 1 / LARGEST_STEP, LARGEST_STEP
        estimate = backend.elementwise(_stepped, estimate, estimate, correction, share, *limits)
        del correction
        if mask is not None and k == iterations:
            estimate = backend.elementwise(_known, estimate, estimate, share, LEAST_WEIGHT)
        yield estimate


def _above(image: Array, background: float, mask: Array | None) -> Array:
    """Return M (image - background), float32."""
    above = backend.full(image.shape, 0.0, image)
    if mask is None:
        return backend.elementwise(_difference, above, image, background)
    return backend.elementwise(_difference_observed, above, image, background, mask)


def _difference(xp: Any, image: Array, background: Array) -> Array:
    return xp.astype(image, xp.float32, copy=False) - background


def _difference_observed(xp: Any, image: Array, background: Array, mask: Array) -> Array:
    return _difference(xp, image, background) * xp.astype(mask, xp.float32)


def _begun(xp: Any, light: Array, share: Array, start: Array, delta: Array, zero: Array) -> Array:
    return (xp.maximum(light, zero) + delta * start) / (share + delta)


def _stepped(
    xp: Any, estimate: Array, correction: Array, share: Array, seen: Array, least: Array, most: Array
) -> Array:
    return estimate * xp.minimum(xp.maximum(1.0 + correction / xp.maximum(share, seen), least), most)


def _known(xp: Any, estimate: Array, share: Array, least: Array) -> Array:
    """Return 0 where no observed voxel tells of the estimate."""
    return estimate * xp.astype(share > least, xp.float32)

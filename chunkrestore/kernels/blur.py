"""Blur by a point spread function on a periodic lattice, its adjoint, and blurs that vary with position.

The adjoint is the conjugate of the transfer function, never a mirrored array, so that nothing moves whatever
the size and symmetry of the point spread function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from chunkrestore import backend
from chunkrestore.backend import Array
from chunkrestore.grid import fast_length

Borders: TypeAlias = Sequence[tuple[bool, bool]]
"""Per axis, whether the image ends at the volume's first and last voxel (as `Block.at_border`)."""


def lattice_shape(shape: Sequence[int], psf_shape: Sequence[int], at_border: Borders) -> tuple[int, ...]:
    """Return the lengths of the periodic lattice on which a block is deconvolved.

    An axis that reaches the volume's border at either end gets room for everything outside that could have
    sent light in, at least ``n + p - 1``, so that nothing wraps around. An axis inside the volume stays as
    it is (its halo is real data, and what wraps around is trimmed with it). Both are rounded up to a length
    that FFTs like; an axis along which the point spread function has one voxel is left alone.
    """
    return tuple(
        n if p == 1 else fast_length(n + p - 1 if any(border) else n)
        for n, p, border in zip(shape, psf_shape, at_border, strict=True)
    )


@dataclass(frozen=True)
class Blur:
    """Convolution with a point spread function on a periodic lattice, and its exact adjoint.

    Images may cover a corner of the lattice: what is given is padded with zeros, and ``shape`` asks for a
    corner of the result.
    """

    otf: Array
    """Half spectrum of the point spread function, complex64; length 1 along axes that are not blurred."""
    lattice: tuple[int, ...]
    """Lengths of the lattice."""
    axes: tuple[int, ...]
    """Axes that are transformed; the last of them is halved."""

    @classmethod
    def from_psf(cls, psf: np.ndarray, lattice: Sequence[int], reference: Array) -> Blur:
        """Return the blur by `psf`, centred on voxel ``n // 2``, in the namespace and device of `reference`.

        A point spread function longer than the lattice wraps around, as periodic convolution demands.
        """
        axes = tuple(axis for axis, p in enumerate(psf.shape) if p > 1) or (psf.ndim - 1,)
        lengths = tuple(n if axis in axes else 1 for axis, n in enumerate(lattice))
        local, embedded = backend.asarray_like(psf, reference), backend.full(lengths, 0.0, reference)
        runs = (_wrapped_runs(p, n) for p, n in zip(psf.shape, lengths, strict=True))
        for combination in itertools.product(*runs):
            source, target = zip(*combination, strict=True)
            embedded[target] = embedded[target] + local[source]
        otf = backend.fft(backend.namespace(reference)).rfftn(embedded, lengths, axes)
        return cls(otf, tuple(lattice), axes)

    def forward(self, image: Array, shape: Sequence[int] | None = None) -> Array:
        """Return H `image`, float32, or its first `shape` voxels."""
        return self.synthesise(self.filtered(self.analyse(image)), shape)

    def adjoint(self, image: Array, shape: Sequence[int] | None = None) -> Array:
        """Return H^T `image`, float32, or its first `shape` voxels."""
        spectrum = self.analyse(image)
        del image  # before the last transform makes another array of this size
        return self.synthesise(self.filtered(spectrum, adjoint=True), shape)

    def analyse(self, image: Array) -> Array:
        """Return the half spectrum of `image`, padded with zeros to the lattice."""
        return backend.fft(backend.namespace(image)).rfftn(image, self.lattice, self.axes)

    def filtered(self, spectrum: Array, *, adjoint: bool = False, out: Array | None = None) -> Array:
        """Return `spectrum` times the transfer function, or its conjugate; in place unless `out` is given."""
        function = _times_conjugate if adjoint else _times
        return backend.elementwise(function, spectrum if out is None else out, spectrum, self.otf)

    def synthesise(self, spectrum: Array, shape: Sequence[int] | None = None) -> Array:
        """Return the image of a half spectrum, or its first `shape` voxels. Destroys `spectrum`."""
        fft = backend.fft(backend.namespace(spectrum))
        return fft.irfftn(spectrum, self.lattice, self.axes, shape or self.lattice)


@dataclass(frozen=True)
class BlendedBlur:
    r"""A blur that changes with position: :math:`H x = \sum_k h_k * (w_k x)`.

    The weights :math:`w_k` sum to 1 everywhere, so that light at a voxel is spread by the point spread
    functions of its neighbourhood, in their proportions (Nagy and O'Leary, SIAM J. Sci. Comput. 19, 1063,
    1998, weight the image instead). The adjoint is exact: :math:`H^T y = \sum_k w_k \, (h_k^T * y)`. Weights
    belong to positions in the volume, so blocks agree.
    """

    parts: tuple[Blur, ...]
    """Blurs, all on one lattice."""
    weights: tuple[tuple[Array, ...], ...]
    """For each blur, float32 factors of its weight that broadcast to the lattice."""

    @property
    def lattice(self) -> tuple[int, ...]:
        """Lengths of the lattice."""
        return self.parts[0].lattice

    def forward(self, image: Array, shape: Sequence[int] | None = None) -> Array:
        """Return H `image`, float32, or its first `shape` voxels."""
        total = cast(Any, None)
        for part, factors in zip(self.parts, self.weights, strict=True):
            spectrum = part.filtered(part.analyse(_weighted(image, factors)))
            total = spectrum if total is None else backend.elementwise(_plus, total, total, spectrum)
            del spectrum
        return self.parts[0].synthesise(total, shape)

    def adjoint(self, image: Array, shape: Sequence[int] | None = None) -> Array:
        """Return H^T `image`, float32, or its first `shape` voxels."""
        xp, total = backend.namespace(image), cast(Any, None)
        spectrum = self.parts[0].analyse(image)
        del image
        for part, factors in zip(self.parts, self.weights, strict=True):
            # Nested, so that the transform holds the only reference to the spectrum that it destroys.
            seen = part.synthesise(part.filtered(spectrum, adjoint=True, out=xp.empty_like(spectrum)))
            total = _weighted(seen, factors, out=seen) if total is None else _added(total, seen, factors)
            del seen
        return total if shape is None else total[tuple(slice(n) for n in shape)]


AnyBlur: TypeAlias = Blur | BlendedBlur


def share_seen(blur: AnyBlur, image: Array, mask: Array | None) -> Array | float:
    """Return H^T M: of the light that each lattice voxel sends out, the share that reaches observed voxels.

    `mask` is true where `image` was observed, None everywhere. 1 where no light is lost: on a lattice that is
    observed as a whole.
    """
    if mask is None and blur.lattice == tuple(image.shape):
        return 1.0
    xp = backend.namespace(image)
    return blur.adjoint(
        backend.full(image.shape, 1.0, image) if mask is None else xp.astype(mask, xp.float32)
    )


def _weighted(image: Array, factors: Sequence[Array], out: Array | None = None) -> Array:
    """Return `image`, which may cover a corner of the lattice, times the factors that broadcast to it."""
    corner = [f[tuple(slice(min(n, m)) for n, m in zip(image.shape, f.shape, strict=True))] for f in factors]
    if out is None:
        out = backend.namespace(image).empty_like(image)
    return backend.elementwise(_TIMES_FACTORS[len(factors)], out, image, *corner)


def _added(total: Array, image: Array, factors: Sequence[Array]) -> Array:
    """Return `total` plus `image` times factors, in `total`."""
    return backend.elementwise(_PLUS_FACTORS[len(factors)], total, total, image, *factors)


def _times(xp: Any, spectrum: Array, otf: Array) -> Array:
    return spectrum * otf


def _times_conjugate(xp: Any, spectrum: Array, otf: Array) -> Array:
    return spectrum * xp.conj(otf)


def _plus(xp: Any, a: Array, b: Array) -> Array:
    return a + b


def _times_one(xp: Any, image: Array, a: Array) -> Array:
    return image * a


def _times_two(xp: Any, image: Array, a: Array, b: Array) -> Array:
    return image * (a * b)


def _times_three(xp: Any, image: Array, a: Array, b: Array, c: Array) -> Array:
    return image * (a * b * c)


def _plus_one(xp: Any, total: Array, image: Array, a: Array) -> Array:
    return total + image * a


def _plus_two(xp: Any, total: Array, image: Array, a: Array, b: Array) -> Array:
    return total + image * (a * b)


def _plus_three(xp: Any, total: Array, image: Array, a: Array, b: Array, c: Array) -> Array:
    return total + image * (a * b * c)


_TIMES_FACTORS: dict[int, Callable[..., Array]] = {1: _times_one, 2: _times_two, 3: _times_three}
_PLUS_FACTORS: dict[int, Callable[..., Array]] = {1: _plus_one, 2: _plus_two, 3: _plus_three}


def _wrapped_runs(length: int, lattice: int) -> Iterator[tuple[slice, slice]]:
    """Yield runs of voxels of a centred profile and where they lie on a periodic axis, centre at 0."""
    done = 0
    while done < length:
        position = (done - length // 2) % lattice
        run = min(lattice - position, length - done)
        yield slice(done, done + run), slice(position, position + run)
        done += run

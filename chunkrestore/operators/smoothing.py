"""Filters of a bounded window: smoothing and removal of background, with the numbers of `scipy.ndimage`.

Every output voxel is a fixed sequence of float operations on the voxels of its window: SciPy convolves directly, tap by
tap in one order wherever the window lies, and ranks have no rounding at all. So a block that reads the window's radius
around its core gives the bits of the whole volume, for every block grid. (A filter by running sums or by Fourier
transforms would not: its rounding depends on where a line begins.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.gaussian import gaussian, gaussian_radius
from chunkrestore.operators.base import Array, check_image

Lengths: TypeAlias = float | tuple[float, ...]
"""One number for all axes, or one per axis."""


def per_axis(
    name: str, lengths: Lengths, ndim: int, voxel_size: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Return `lengths` in voxels of every axis.

    Parameters
    ----------
    name
        What they are called in errors.
    lengths
        In voxels; in micrometres if `voxel_size` is given.
    ndim
        Spatial axes of the image.
    voxel_size
        Micrometres.

    Raises
    ------
    ValueError
        If there is not one number per axis.
    """
    each = lengths if isinstance(lengths, tuple) else (lengths,) * ndim
    for given, value in ((name, each), ("voxel_size", voxel_size)):
        if value is not None and len(value) != ndim:
            raise ValueError(f"`{given}` {value} must have one number per axis of an image of {ndim} axes")
    return tuple(n / s for n, s in zip(each, voxel_size or (1.0,) * ndim, strict=True))


def checked_lengths(name: str, lengths: Any, *, least: float = 0.0) -> Lengths:
    """Return one number, or one per axis, as floats; raise `ValueError` unless all are finite and above `least`."""
    several = isinstance(lengths, Sequence | np.ndarray)
    numbers = tuple(float(n) for n in (lengths if several else (lengths,)))
    if not numbers or not all(math.isfinite(n) and n > least for n in numbers):
        raise ValueError(
            f"`{name}` must be a finite number above {least:g}, or one per spatial axis; got {lengths}"
        )
    return numbers if several else numbers[0]


class _Filter:
    """What filters have in common: they need no number of the whole volume, and keep shape."""

    needs: frozenset[float | str] = frozenset()
    name: str
    _n_images = 3
    """float32 images at the peak: input, result, and one between."""

    def resolve(self, statistics: Mapping[float | str, Any]) -> Self:
        """Return this operator: nothing is left open."""
        return self

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        check_image(shape, dtype)
        self._radius(len(shape))

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return how far the window reaches."""
        return Halo(self._radius(len(shape)))

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak bytes of a call."""
        return 4 * self._n_images * math.prod(read_shape)

    def __call__(self, image: Array, block: Block | None = None) -> np.ndarray:
        """Return the filtered image: float32, same shape, valid on the core."""
        return self._filter(to_numpy(image).astype(np.float32, copy=False))

    def _radius(self, ndim: int) -> tuple[int, ...]:
        raise NotImplementedError

    def _filter(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class Gaussian(_Filter):
    """Smooth with a Gaussian: ``scipy.ndimage.gaussian_filter(image, sigma, mode="reflect")`` in float32.

    Preserves shape and mean; beyond the volume's border it continues as its mirror image.

    Parameters
    ----------
    sigma
        Standard deviation, one number or one per axis: in voxels, or in micrometres with `voxel_size`. The kernel ends
        at 4 standard deviations.
    voxel_size
        Micrometres per axis.

    Raises
    ------
    ValueError
        If a length is not finite and above 0.

    Examples
    --------
    >>> import numpy as np
    >>> Gaussian(1.0)(np.eye(3, dtype=np.float32)).round(2)
    array([[0.5 , 0.33, 0.17],
           [0.33, 0.34, 0.33],
           [0.17, 0.33, 0.5 ]], dtype=float32)
    """

    sigma: Lengths
    voxel_size: tuple[float, ...] | None = None

    name = "gaussian"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", checked_lengths("sigma", self.sigma))
        if self.voxel_size is not None:
            object.__setattr__(self, "voxel_size", checked_lengths("voxel_size", tuple(self.voxel_size)))

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {"operator": self.name, "sigma": self.sigma, "voxel_size": self.voxel_size}

    def _radius(self, ndim: int) -> tuple[int, ...]:
        return gaussian_radius(self._sigmas(ndim))

    def _sigmas(self, ndim: int) -> tuple[float, ...]:
        return per_axis("sigma", self.sigma, ndim, self.voxel_size)

    def _filter(self, image: np.ndarray) -> np.ndarray:
        return gaussian(image, self._sigmas(image.ndim))


@dataclass(frozen=True)
class DifferenceOfGaussians(_Filter):
    """Remove background and noise: a fine Gaussian less a coarse one, in float32.

    ``gaussian(image, low) - gaussian(image, high)``: structures between both widths stay, with negative values around
    them; a slope of the background goes.

    Parameters
    ----------
    low, high
        Standard deviations as those of `Gaussian`, low < high on every axis.
    voxel_size
        Micrometres per axis, if lengths are in micrometres.

    Raises
    ------
    ValueError
        If a length is not finite and above 0, or `low` is not below `high`.
    """

    low: Lengths
    high: Lengths
    voxel_size: tuple[float, ...] | None = None

    name = "difference-of-gaussians"
    _n_images = 4

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, checked_lengths(name, getattr(self, name)))
        if len({np.size(v) for v in (self.low, self.high)} - {1}) > 1:
            raise ValueError(f"`low` {self.low} must have as many numbers as `high` {self.high}")
        if not np.all(np.less(self.low, self.high)):
            raise ValueError(f"`low` {self.low} must be below `high` {self.high} on every axis")
        if self.voxel_size is not None:
            object.__setattr__(self, "voxel_size", checked_lengths("voxel_size", tuple(self.voxel_size)))

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {
            "operator": self.name,
            "low": self.low,
            "high": self.high,
            "voxel_size": self.voxel_size,
        }

    def _radius(self, ndim: int) -> tuple[int, ...]:
        return gaussian_radius(per_axis("high", self.high, ndim, self.voxel_size))

    def _filter(self, image: np.ndarray) -> np.ndarray:
        fine = gaussian(image, per_axis("low", self.low, image.ndim, self.voxel_size))
        fine -= gaussian(image, per_axis("high", self.high, image.ndim, self.voxel_size))
        return fine


class _Window(_Filter):
    """A filter of a box of voxels, odd on every axis."""

    window: int | tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", checked_window(self.window))

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {"operator": self.name, "window": self.window}

    def _sides(self, ndim: int) -> tuple[int, ...]:
        return window_sides(self.window, ndim)


def checked_window(window: Any, *, least: int = 1) -> int | tuple[int, ...]:
    """Return a window as integers; raise `ValueError` unless they are odd, so that it has a centre, and not all 1."""
    several = isinstance(window, Sequence | np.ndarray)
    sides = tuple(window) if several else (window,)
    odd = all(isinstance(n, int | np.integer) and n >= least and n % 2 for n in sides)
    if not odd or max(sides, default=1) < 3:
        raise ValueError(f"`window` must be an odd number of voxels from 3 on, or one per axis; got {window}")
    return tuple(int(n) for n in sides) if several else int(sides[0])


def window_sides(window: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Return the voxels per axis of a window; raise `ValueError` unless there is one number per axis."""
    sides = window if isinstance(window, tuple) else (window,) * ndim
    if len(sides) != ndim:
        raise ValueError(f"`window` {window} must have one number per axis of an image of {ndim} axes")
    return sides


@dataclass(frozen=True)
class Median(_Window):
    """Remove noise and keep edges: the median of a window, ``scipy.ndimage.median_filter(image, window)``.

    Time grows with the window: for a few voxels per axis.

    Parameters
    ----------
    window
        Voxels, odd; one number or one per axis.

    Raises
    ------
    ValueError
        If `window` is not odd and at least 3.
    """

    window: int | tuple[int, ...] = 3

    name = "median"

    def _radius(self, ndim: int) -> tuple[int, ...]:
        return tuple(n // 2 for n in self._sides(ndim))

    def _filter(self, image: np.ndarray) -> np.ndarray:
        from scipy import ndimage

        result: np.ndarray = ndimage.median_filter(image, self._sides(image.ndim), mode="reflect")
        return result


@dataclass(frozen=True)
class TopHat(_Window):
    """Remove background: the image less its opening, ``scipy.ndimage.white_tophat(image, window)``.

    What is narrower than the window on some axis stays, with its height above its surroundings.

    Parameters
    ----------
    window
        Voxels, odd, wider than the objects; one number or one per axis.

    Raises
    ------
    ValueError
        If `window` is not odd and at least 3.
    """

    window: int | tuple[int, ...]

    name = "top-hat"
    _n_images = 4

    def _radius(self, ndim: int) -> tuple[int, ...]:
        # The least of a window, then the largest of a window of those.
        return tuple(2 * (n // 2) for n in self._sides(ndim))

    def _filter(self, image: np.ndarray) -> np.ndarray:
        from scipy import ndimage

        result: np.ndarray = ndimage.white_tophat(image, self._sides(image.ndim), mode="reflect")
        return result

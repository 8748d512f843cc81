"""Correlation of two images shell by shell of spatial frequency: of a whole image, or added up over windows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import fft

from chunkrestore.metrics.exact import Rows, totals


@dataclass(frozen=True)
class ShellCorrelation:
    """Correlation of two images per shell (3-D) or ring (2-D) of spatial frequency."""

    frequency: npt.NDArray[np.float64]
    """Mean frequency of each shell in cycles per micrometre; rises."""
    correlation: npt.NDArray[np.float64]
    """Real part of the normalised cross-correlation of each shell, -1 to 1."""

    def resolution_um(self, threshold: float = 1 / 7) -> float:
        """Return the period, in micrometres, at which the correlation first falls below `threshold`.

        Linear between shells. When it never does, the period of the highest shell: the images resolve
        whatever the sampling can carry. When it does so at once, infinity.

        Two noisy images are compared at 1/7, an image with a truth free of noise at 1/2, which is the same
        signal-to-noise ratio: ``sqrt(2 * fsc / (1 + fsc))`` (Rosenthal and Henderson 2003,
        doi 10.1016/j.jmb.2003.07.013, eq. 14).
        """
        below = np.flatnonzero(self.correlation < threshold)
        if len(below) == 0:
            return float(1 / self.frequency[-1])
        i = int(below[0])
        if i == 0:
            return math.inf
        (f0, f1), (c0, c1) = self.frequency[i - 1 : i + 1], self.correlation[i - 1 : i + 1]
        return float(1 / (f0 + (f1 - f0) * (c0 - threshold) / (c0 - c1)))


@dataclass(frozen=True, eq=False)
class Shells:
    """The shells of images of one shape."""

    shape: tuple[int, ...]
    """Of the images."""
    frequency: npt.NDArray[np.float64]
    """Mean frequency of each shell in cycles per micrometre."""
    shell: npt.NDArray[np.intp]
    """Shell of every entry of a real transform, flat; 0 is frequency zero."""
    weight: npt.NDArray[np.float64]
    """How many entries of the whole spectrum each stands for, flat."""

    @classmethod
    def of(cls, shape: Sequence[int], voxel_size: Sequence[float]) -> Self:
        """Return the shells of images of `shape`: spheres in physical frequency, as far as the coarsest axis reaches.

        Raises
        ------
        ValueError
            If an axis is shorter than 8 voxels, or a voxel size is not positive or not given per axis.
        """
        if len(voxel_size) != len(shape) or min(voxel_size) <= 0:
            raise ValueError(
                f"`voxel_size` {tuple(voxel_size)} must be one positive number per axis of {tuple(shape)}"
            )
        if min(shape) < 8:
            raise ValueError(f"`first` of shape {tuple(shape)} must have at least 8 voxels on every axis")
        frequency, weight = _half_spectrum_frequency(shape, voxel_size)
        step = max(1 / (n * d) for n, d in zip(shape, voxel_size, strict=True))
        n_shells = int(min(0.5 / d for d in voxel_size) / step + 1e-9)
        shell = np.minimum(np.rint(frequency / step), n_shells + 1).astype(np.intp).ravel()
        count, summed = (np.bincount(shell, values.ravel()) for values in (weight, frequency * weight))
        mean = summed[1 : n_shells + 1] / count[1 : n_shells + 1]
        return cls(tuple(shape), mean, shell, weight.ravel())

    def sums(
        self, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Return, one after the other, the cross spectrum and both power spectra of two images, summed per shell."""
        a, b = (_windowed_spectrum(image) for image in (first, second))
        spectra = (a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2
        return np.concatenate([self._per_shell(spectrum) for spectrum in spectra])

    def curve(self, sums: Rows) -> ShellCorrelation:
        """Return the correlation from the sums of one pair of images or, a row each, of several.

        Raises
        ------
        ValueError
            If an image is constant.
        """
        cross, first, second = np.split(totals(np.atleast_2d(sums)), 3)
        power = first * second
        if not (power > 0).all():
            raise ValueError("`first` and `second` must not be constant: a shell holds no signal at all")
        return ShellCorrelation(self.frequency, cross / np.sqrt(power))

    def _per_shell(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        sums = np.bincount(self.shell, values.ravel() * self.weight)
        return np.asarray(sums[1 : len(self.frequency) + 1], np.float64)


@lru_cache(maxsize=4)
def shells_of(shape: tuple[int, ...], voxel_size: tuple[float, ...]) -> Shells:
    """Return `Shells.of`, made once per process."""
    return Shells.of(shape, voxel_size)


def fsc(first: npt.ArrayLike, second: npt.ArrayLike, *, voxel_size: Sequence[float]) -> ShellCorrelation:
    """Return the Fourier shell correlation of two images of one object with independent noise.

    For 2-D images it is the Fourier ring correlation.

    Parameters
    ----------
    first, second
        Images of the same shape, 2-D or 3-D. Their means are removed and a Hann window applied.
    voxel_size
        Micrometres per voxel and axis. Shells are spheres in physical frequency, as far as the coarsest
        axis reaches.

    Returns
    -------
    ShellCorrelation
        Without the shell at frequency zero.

    Raises
    ------
    ValueError
        If the shapes differ, an axis is shorter than 8 voxels, an image is constant, or a voxel size is not
        positive or not given per axis.

    References
    ----------
    Nieuwenhuizen et al. 2013, doi 10.1038/nmeth.2448 (the threshold 1/7).
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"`first` {first.shape} and `second` {second.shape} must have one shape")
    shells = Shells.of(first.shape, voxel_size)
    return shells.curve(shells.sums(first, second))


def _windowed_spectrum(image: npt.NDArray[np.float64]) -> npt.NDArray[np.complex128]:
    windowed = image - image.mean()
    for axis, n in enumerate(image.shape):
        window = 0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(n) + 0.5) / n)
        windowed = windowed * window.reshape([-1 if a == axis else 1 for a in range(image.ndim)])
    return np.asarray(fft.rfftn(windowed))


def _half_spectrum_frequency(
    shape: Sequence[int], voxel_size: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """Return the physical frequency of each entry of a real transform, and how many entries it stands for."""
    axes = [fft.fftfreq(n, d) for n, d in zip(shape[:-1], voxel_size[:-1], strict=True)]
    axes.append(fft.rfftfreq(shape[-1], voxel_size[-1]))
    frequency = np.sqrt(sum(np.square(f) for f in np.meshgrid(*axes, indexing="ij", sparse=True)))
    weight = np.full(shape[-1] // 2 + 1, 2.0)
    weight[0] = 1.0
    if shape[-1] % 2 == 0:
        weight[-1] = 1.0
    return np.asarray(frequency, dtype=np.float64), np.broadcast_to(weight, frequency.shape)

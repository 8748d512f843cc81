"""Metrics of images in memory: noise ratio, structure, and what tiling changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import BlockGrid


def psnr(
    truth: npt.ArrayLike,
    image: npt.ArrayLike,
    *,
    data_range: float | None = None,
    scale_invariant: bool = False,
) -> float:
    r"""Return the peak signal-to-noise ratio in decibels.

    .. math:: 20 \log_{10} R - 10 \log_{10} \langle (t - i)^2 \rangle

    Parameters
    ----------
    truth, image
        Arrays of the same shape.
    data_range
        The peak :math:`R`; largest minus smallest value of `truth` by default.
    scale_invariant
        Replace `image` by the :math:`a i + b` that is closest to `truth` first: compares structure where
        the units differ.

    Returns
    -------
    float
        Decibels; infinity where the arrays are equal.

    Raises
    ------
    ValueError
        If the shapes differ, the arrays are empty, or the range is not positive.
    """
    truth, image = _same_shape(truth, image, "truth", "image")
    if scale_invariant:
        image = _closest_affine(image, truth)
    error = float(np.mean(np.square(truth - image)))
    peak = _data_range(truth, data_range)
    return math.inf if error == 0 else 20 * math.log10(peak) - 10 * math.log10(error)


def ssim(truth: npt.ArrayLike, image: npt.ArrayLike, *, data_range: float | None = None) -> float:
    """Return the mean structural similarity (Wang et al. 2004; windows of 7 voxels, as in scikit-image).

    Parameters
    ----------
    truth, image
        Arrays of the same shape, at least 7 voxels long on every axis.
    data_range
        Largest minus smallest possible value; that of `truth` by default.

    Returns
    -------
    float
        1 for equal arrays.

    Raises
    ------
    ValueError
        If the shapes differ, an axis is shorter than 7, or the range is not positive.
    """
    truth, image = _same_shape(truth, image, "truth", "image")
    if min(truth.shape) < 7:
        raise ValueError(
            f"`truth` of shape {truth.shape} is shorter than the window of 7 voxels on some axis"
        )
    from skimage.metrics import structural_similarity

    return float(structural_similarity(truth, image, data_range=_data_range(truth, data_range)))


@dataclass(frozen=True)
class SeamError:
    """How far a tiled result is from the untiled one, near the borders between cores and everywhere."""

    rms: float
    """Root mean square difference within the band around the seams."""
    max: float
    """Largest absolute difference in the whole volume."""
    rms_everywhere: float
    """Root mean square difference in the whole volume."""
    dynamic_range: float
    """Largest minus smallest value of the untiled result."""
    n_voxels: int
    """Voxels of the band."""

    @property
    def relative_rms(self) -> float:
        """`rms` in units of the dynamic range; what a tolerance refers to."""
        return self.rms / self.dynamic_range if self.dynamic_range else (0.0 if self.rms == 0 else math.inf)

    @property
    def relative_max(self) -> float:
        """`max` in units of the dynamic range."""
        return self.max / self.dynamic_range if self.dynamic_range else (0.0 if self.max == 0 else math.inf)


def seam_error(
    tiled: npt.ArrayLike, untiled: npt.ArrayLike, grid: BlockGrid | Sequence[Sequence[int]], *, width: int = 4
) -> SeamError:
    """Measure a tiled result against the untiled one, where blocks meet.

    Parameters
    ----------
    tiled, untiled
        Results of the same shape.
    grid
        The block grid, or its core borders per axis (as `BlockGrid.edges`).
    width
        Voxels on each side of a seam that belong to the band, at least 1.

    Returns
    -------
    SeamError
        Zero throughout for equal results. With a single block there is no seam, and the band is empty.

    Raises
    ------
    ValueError
        If the shapes differ, the grid is of another shape, or `width` is below 1.
    """
    tiled, untiled = _same_shape(tiled, untiled, "tiled", "untiled")
    edges = grid.edges if isinstance(grid, BlockGrid) else tuple(tuple(e) for e in grid)
    if tuple(e[-1] for e in edges) != tiled.shape:
        raise ValueError(
            f"`grid` covers a volume of {tuple(e[-1] for e in edges)}, but the results have {tiled.shape}"
        )
    if width < 1:
        raise ValueError(f"`width` must be at least 1 voxel, got {width}")
    squares = np.square(tiled - untiled)
    band = np.zeros(tiled.shape, dtype=np.bool_)
    for axis, borders in enumerate(edges):
        for border in borders[1:-1]:
            band[(slice(None),) * axis + (slice(max(border - width, 0), border + width),)] = True
    in_band = squares[band]
    return SeamError(
        rms=math.sqrt(in_band.mean()) if in_band.size else 0.0,
        max=math.sqrt(squares.max()),
        rms_everywhere=math.sqrt(squares.mean()),
        dynamic_range=float(untiled.max() - untiled.min()),
        n_voxels=int(in_band.size),
    )


def _same_shape(
    first: npt.ArrayLike, second: npt.ArrayLike, name_first: str, name_second: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"`{name_first}` {first.shape} and `{name_second}` {second.shape} must have one shape"
        )
    if first.size == 0:
        raise ValueError(f"`{name_first}` is empty")
    return first, second


def _data_range(truth: npt.NDArray[np.float64], data_range: float | None) -> float:
    peak = float(truth.max() - truth.min()) if data_range is None else float(data_range)
    if not peak > 0:
        raise ValueError(f"`data_range` must be positive, got {peak} (is `truth` constant?)")
    return peak


def _closest_affine(
    image: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    centred = image - image.mean()
    variance = float(np.mean(np.square(centred)))
    slope = float(np.mean(centred * (truth - truth.mean()))) / variance if variance else 0.0
    return np.asarray(slope * centred + truth.mean(), dtype=np.float64)

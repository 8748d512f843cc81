"""Numbers that are decided once per volume and channel: percentiles, mean, Otsu's threshold.

Blocks are summarised independently and the summaries are added, so the result is the same for every block
grid, to the last bit. Integer images need one pass: their histogram is exact. Float images need two when
a percentile or Otsu's threshold is asked for: the first pass counts the upper 16 bits of each value in an
order-preserving code, the second the lower 16 bits within the few bins that hold the wanted ranks (a radix
selection), so percentiles are those of the sorted voxels, not of a binned approximation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.backend import to_numpy

ACCEPTED_DTYPES = ("uint8", "uint16", "int16", "float32")
"""Dtypes of input images."""

_OTSU_BINS = 256
"""Bins of Otsu's histogram for float images, as in scikit-image."""


class NonFiniteError(ValueError):
    """An image holds NaN or infinite voxels."""


@dataclass(frozen=True)
class Summary:
    """What one pass over some voxels tells: a histogram of codes, and the extremes."""

    dtype: np.dtype[Any]
    """Dtype of the voxels."""
    first: int
    """Code of the first histogram bin."""
    counts: npt.NDArray[np.int64]
    """Number of voxels per code; codes are values (integers) or the upper 16 bits of ordered floats."""
    minimum: float
    """Smallest voxel."""
    maximum: float
    """Largest voxel."""


@dataclass(frozen=True)
class Refinement:
    """What a second pass over a float image must count."""

    bins: tuple[int, ...]
    """Upper codes whose lower 16 bits are counted."""
    otsu_range: tuple[float, float] | None
    """Range of Otsu's histogram, if it is wanted."""


def summarize(image: Any) -> Summary:
    """Count the voxels of one block.

    Parameters
    ----------
    image
        Array of any shape; dtype uint8, uint16, int16 or float32.

    Raises
    ------
    NonFiniteError
        If a voxel is NaN or infinite.
    ValueError
        If the dtype is not accepted or the block is empty.
    """
    image = np.ascontiguousarray(to_numpy(image))
    if image.dtype.name not in ACCEPTED_DTYPES:
        raise ValueError(f"`image` has dtype {image.dtype}; accepted are {', '.join(ACCEPTED_DTYPES)}")
    if image.size == 0:
        raise ValueError("`image` is empty; statistics need at least one voxel")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        n_bad = int(image.size - np.count_nonzero(np.isfinite(image)))
        raise NonFiniteError(f"image holds {n_bad} voxels that are NaN or infinite; replace them first")
    codes = _upper_codes(image).ravel()
    first = int(codes.min())
    counts = np.bincount(codes - first).astype(np.int64)
    return Summary(image.dtype, first, counts, float(image.min()), float(image.max()))


def merge(summaries: Iterable[Summary]) -> Summary:
    """Add summaries of disjoint parts of one image."""
    parts = list(summaries)
    first = min(p.first for p in parts)
    stop = max(p.first + len(p.counts) for p in parts)
    counts = np.zeros(stop - first, np.int64)
    for p in parts:
        counts[p.first - first : p.first - first + len(p.counts)] += p.counts
    return Summary(
        parts[0].dtype, first, counts, min(p.minimum for p in parts), max(p.maximum for p in parts)
    )


def refinement(summary: Summary, needs: Iterable[float | str]) -> Refinement | None:
    """Return what a second pass must count to know `needs`; None when the first pass suffices."""
    if summary.dtype.kind != "f":
        return None
    bins: set[int] = set()
    otsu = False
    cumulative = np.cumsum(summary.counts)
    for need in needs:
        if need == "otsu":
            otsu = True
        elif not isinstance(need, str):
            for rank in _ranks(need, int(cumulative[-1]))[:2]:
                bins.add(summary.first + int(np.searchsorted(cumulative, rank, side="right")))
    if not bins and not otsu:
        return None
    return Refinement(tuple(sorted(bins)), (summary.minimum, summary.maximum) if otsu else None)


def refine(image: Any, wanted: Refinement) -> npt.NDArray[np.int64]:
    """Count one block of a float image for the second pass; the counts of blocks add up."""
    image = np.ascontiguousarray(to_numpy(image)).ravel()
    codes = _ordered(image)
    rows = [np.bincount(codes[(codes >> 16) == b] & 0xFFFF, minlength=1 << 16) for b in wanted.bins]
    if wanted.otsu_range is not None:
        rows.append(np.histogram(image, bins=_OTSU_BINS, range=wanted.otsu_range)[0])
    return np.concatenate(rows).astype(np.int64)


def values(
    summary: Summary,
    needs: Iterable[float | str],
    wanted: Refinement | None = None,
    refined: npt.NDArray[np.int64] | None = None,
) -> dict[float | str, float]:
    """Return the wanted numbers from the counts of the whole image.

    Parameters
    ----------
    summary
        Merged summary of all voxels.
    needs
        Percentiles (numbers from 0 to 100, linear interpolation between ranks as in `numpy.percentile`),
        ``"mean"`` (for float images to 0.4 %, from the first pass alone), ``"otsu"``, ``"minimum"`` and
        ``"maximum"``.
    wanted, refined
        The second pass, for float images.
    """
    result: dict[float | str, float] = {}
    for need in needs:
        if need == "mean":
            result[need] = _mean(summary)
        elif need == "minimum":
            result[need] = summary.minimum
        elif need == "maximum":
            result[need] = summary.maximum
        elif need == "otsu":
            result[need] = _otsu(summary, wanted, refined)
        elif isinstance(need, str):
            raise ValueError(f"unknown statistic {need!r}; known are a percentile, 'mean' and 'otsu'")
        else:
            lower, upper, weight = _ranks(need, int(summary.counts.sum()))
            a, b = (_order_statistic(summary, rank, wanted, refined) for rank in (lower, upper))
            result[need] = a + (b - a) * weight
    return result


def of_blocks(read: Any, n_blocks: int, needs: Iterable[float | str]) -> dict[float | str, float]:
    """Return the numbers `needs` of an image given as ``read(0) ... read(n_blocks - 1)``, read one by one."""
    needs = tuple(needs)
    summary = merge(summarize(read(i)) for i in range(n_blocks))
    wanted = refinement(summary, needs)
    if wanted is None:
        return values(summary, needs)
    refined = np.sum([refine(read(i), wanted) for i in range(n_blocks)], axis=0)
    return values(summary, needs, wanted, refined)


def of_array(image: Any, needs: Iterable[float | str]) -> dict[float | str, float]:
    """Return the numbers `needs` of one array in memory."""
    return of_blocks(lambda _: image, 1, needs)


def as_percentiles(
    statistics: Mapping[float | str, float], percentiles: tuple[float, float]
) -> tuple[float, float]:
    """Return (low, high) for two percentiles, checking that they enclose a range.

    Raises
    ------
    ValueError
        If both are the same intensity: a constant volume cannot be normalised.
    """
    low, high = (statistics[p] for p in percentiles)
    if not low < high:
        raise ValueError(
            f"percentiles {percentiles} of the image are both {low:g}: a constant volume cannot be normalised; "
            "give `normalization=(low, high)`"
        )
    return low, high


def _ordered(image: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Map float32 to uint32 such that integers compare as the floats do (-0.0 just below 0.0)."""
    bits = image.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _from_ordered(code: int) -> float:
    """Invert `_ordered` for one code."""
    bits = code ^ (1 << 31) if code >> 31 else ~code & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def _upper_codes(image: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    codes = _ordered(image) >> 16 if image.dtype.kind == "f" else image
    return codes.astype(np.int64)


def _ranks(percentile: float, n: int) -> tuple[int, int, float]:
    """Return the two ranks (0-based) between which a percentile lies, and the weight of the upper one."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentiles` must lie between 0 and 100, got {percentile}")
    position = percentile / 100 * (n - 1)
    lower = min(int(position), n - 1)
    return lower, min(lower + 1, n - 1), position - lower


def _order_statistic(
    summary: Summary, rank: int, wanted: Refinement | None, refined: npt.NDArray[np.int64] | None
) -> float:
    cumulative = np.cumsum(summary.counts)
    position = int(np.searchsorted(cumulative, rank, side="right"))
    code = summary.first + position
    if summary.dtype.kind != "f":
        return float(code)
    if wanted is None or refined is None:
        raise ValueError("percentiles of a float image need the second pass")
    row = wanted.bins.index(code)
    below = int(cumulative[position - 1]) if position else 0
    within = np.cumsum(refined[row << 16 : (row + 1) << 16])
    return _from_ordered(code << 16 | int(np.searchsorted(within, rank - below, side="right")))


def _mean(summary: Summary) -> float:
    codes = range(summary.first, summary.first + len(summary.counts))
    if summary.dtype.kind == "f":
        centres = np.array(
            [
                _from_ordered(code << 16 | 0x8000) if n else 0.0
                for code, n in zip(codes, summary.counts, strict=True)
            ]
        )
    else:
        centres = np.array(codes, np.float64)
    # A range of one value has no bin width to be uncertain about.
    mean = float(centres @ summary.counts / summary.counts.sum())
    return min(max(mean, summary.minimum), summary.maximum)


def _otsu(summary: Summary, wanted: Refinement | None, refined: npt.NDArray[np.int64] | None) -> float:
    """Threshold of Otsu (1979), by scikit-image, from the histogram of the whole image."""
    from skimage.filters import threshold_otsu

    if summary.minimum == summary.maximum:
        return summary.maximum
    if summary.dtype.kind != "f":
        centres = np.arange(summary.first, summary.first + len(summary.counts))
        return float(threshold_otsu(hist=(summary.counts, centres)))
    if wanted is None or refined is None:
        raise ValueError("Otsu's threshold of a float image needs the second pass")
    edges = np.histogram_bin_edges(np.empty(0), bins=_OTSU_BINS, range=wanted.otsu_range)
    return float(threshold_otsu(hist=(refined[-_OTSU_BINS:], (edges[:-1] + edges[1:]) / 2)))

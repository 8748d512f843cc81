"""Intensities as a network or a labelling function sees them: two of the whole volume become 0 and 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from chunkrestore.operators.base import Array, Statistic
from chunkrestore.statistics import as_percentiles, of_array

Limits: TypeAlias = tuple[float, float] | tuple[tuple[float, float], ...]
"""Input intensities (low, high) that are seen as 0 and 1: of all channels, or a pair for each."""

_EPS = np.float32(1e-20)
# CSBDeep's guard against division by zero in `normalize_mi_ma`; kept so that results are the same.


def checked_percentiles(percentiles: Sequence[float]) -> tuple[float, float]:
    """Return two percentiles as floats; raise `ValueError` unless they rise within 0 to 100."""
    low, high = (float(p) for p in percentiles)
    if not 0 <= low < high <= 100:
        raise ValueError(f"`percentiles` must rise within 0 to 100, got {percentiles}")
    return low, high


def checked_limits(limits: Any, n_channels: int) -> Limits:
    """Return `limits` as floats; raise `ValueError` unless they are one rising pair, or one per channel."""
    pairs = np.array(limits, np.float64)
    shapes = [(2,), (n_channels, 2)]
    if pairs.shape not in shapes or not np.isfinite(pairs).all() or not (pairs[..., 0] < pairs[..., 1]).all():
        of_each = f", or two for each of {n_channels} channels" if n_channels > 1 else ""
        raise ValueError(f"`normalization` must be two finite numbers low < high{of_each}, got {limits}")
    if pairs.size == 2:
        low, high = pairs.ravel().tolist()
        return low, high
    return tuple((low, high) for low, high in pairs.tolist())


def limits_from(
    statistics: Mapping[Statistic, Any], percentiles: tuple[float, float], n_channels: int
) -> Limits:
    """Return the percentiles of a volume as limits.

    A statistic is a number, or, with several channels, a sequence of one per channel.
    """
    if n_channels == 1:
        return as_percentiles(statistics, percentiles)
    return tuple(
        as_percentiles({need: of_each[k] for need, of_each in statistics.items()}, percentiles)
        for k in range(n_channels)
    )


def of_channels(image: Array, needs: Iterable[Statistic], n_channels: int) -> dict[Statistic, Any]:
    """Return the numbers `needs` of an array in memory: one each, or a tuple of one per channel of its last axis."""
    needs = tuple(needs)
    if n_channels == 1:
        return of_array(image, needs)
    channels = [of_array(image[..., k], needs) for k in range(n_channels)]
    return {need: tuple(numbers[need] for numbers in channels) for need in needs}


def scaled(image: np.ndarray, limits: Limits) -> np.ndarray:
    """Return intensities with `limits` at 0 and 1, float32, not clipped; channels are the last axis."""
    # One number each, or one for each of the channels.
    low, high = np.array(limits, np.float32).T
    result = image.astype(np.float32)
    result -= low
    result /= high - low + _EPS
    return result

"""The classical baseline: a threshold, global or of each voxel's surroundings, then connected components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels import local_threshold as kernels
from chunkrestore.kernels.components import label_mask, surface_table
from chunkrestore.kernels.gaussian import gaussian_radius
from chunkrestore.operators.base import Array, Table, check_image, labels_dtype
from chunkrestore.operators.rules import JoinedByRule, Touching
from chunkrestore.operators.smoothing import checked_window, window_sides
from chunkrestore.statistics import of_array

_EXTREMES = (0.1, 99.9)
"""Percentiles of the whole volume whose half distance is Sauvola's dynamic range, unless it is given."""


@dataclass(frozen=True)
class LocalThreshold:
    """A threshold of each voxel's surroundings, against background and brightness that change with position.

    With mean m and standard deviation s of the window around a voxel, its threshold is ``t * factor + offset`` where
    t is

    - ``"gaussian"``: the mean weighted by a Gaussian of standard deviation ``(window - 1) / 6``;
    - ``"mean"``: m;
    - ``"niblack"``: m - k s (Niblack, An Introduction to Digital Image Processing, 1986);
    - ``"sauvola"``: m (1 + k (s / r - 1)) (Sauvola and Pietikainen, Pattern Recognit. 33:225, 2000, equation 5).

    To float64 rounding those of scikit-image's `threshold_local`, `threshold_niblack` and `threshold_sauvola`, also in
    what lies beyond the border: the mirror image, for niblack and sauvola without the outermost voxel twice.

    Parameters
    ----------
    method
        One of the above.
    window
        Voxels, odd, wider than the objects; one number or one per axis.
    factor, offset
        What the threshold is multiplied with, and what is added in input intensities.
    k
        Weight of the standard deviation.
    dynamic_range
        Sauvola's r, in input intensities; None for half the distance of the 0.1th and the 99.9th percentile of the
        whole volume and channel.

    Raises
    ------
    ValueError
        If the method is unknown, the window not odd, or a number not finite.
    """

    method: str = "gaussian"
    window: int | tuple[int, ...] = 31
    _: KW_ONLY
    factor: float = 1.0
    offset: float = 0.0
    k: float = 0.2
    dynamic_range: float | None = None

    def __post_init__(self) -> None:
        if self.method not in kernels.METHODS:
            raise ValueError(
                f"`method` must be one of {', '.join(map(repr, kernels.METHODS))}, got {self.method!r}"
            )
        object.__setattr__(self, "window", checked_window(self.window))
        for name in ("factor", "offset", "k"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be finite, got {getattr(self, name)}")
        if self.dynamic_range is not None and not 0 < self.dynamic_range < math.inf:
            raise ValueError(f"`dynamic_range` must be finite and above 0, got {self.dynamic_range}")

    @property
    def needs(self) -> frozenset[float | str]:
        """The extremes, for Sauvola's dynamic range."""
        undecided = self.method == "sauvola" and self.dynamic_range is None
        return frozenset(_EXTREMES) if undecided else frozenset()

    def resolve(self, statistics: Mapping[float | str, float]) -> LocalThreshold:
        """Return this threshold with its dynamic range decided; 1 for a constant volume, where it has no effect."""
        if not self.needs:
            return self
        low, high = (statistics[q] for q in _EXTREMES)
        return replace(self, dynamic_range=(high - low) / 2 or 1.0)

    def radius(self, ndim: int) -> tuple[int, ...]:
        """Return how many voxels away the surroundings end."""
        sides = window_sides(self.window, ndim)
        if self.method == "gaussian":
            return gaussian_radius(kernels.window_sigma(sides))
        return tuple(n // 2 for n in sides)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the threshold of every voxel, float64."""
        window = window_sides(self.window, image.ndim)
        if self.method == "gaussian":
            result = kernels.weighted_mean(image, window)
        elif self.method == "mean":
            result = kernels.mean(image, window)
        elif self.method == "niblack":
            result = kernels.niblack(*kernels.mean_and_deviation(image, window), self.k)
        else:
            if self.dynamic_range is None:
                raise ValueError(
                    "`dynamic_range` is not decided; call `resolve` with the whole volume's percentiles"
                )
            result = kernels.sauvola(*kernels.mean_and_deviation(image, window), self.k, self.dynamic_range)
        result *= self.factor
        result += self.offset
        return result


class Foreground(JoinedByRule):
    """Base of label operators that tell foreground by a threshold: their part up to a mask."""

    value: float | None
    percentile: float | None
    local: LocalThreshold | None

    def _check_foreground(self) -> None:
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"`value` must be finite, got {self.value}")
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise ValueError(f"`percentile` must lie between 0 and 100, got {self.percentile}")
        if self.value is not None and self.percentile is not None:
            # A resolved operator has a value and knows no percentile.
            raise ValueError(f"give `value` ({self.value}) or `percentile` ({self.percentile}), not both")

    @property
    def needs(self) -> frozenset[float | str]:
        """Otsu's threshold or the percentile unless there is a value, and what the local threshold needs."""
        own: frozenset[float | str] = frozenset()
        if self.percentile is not None:
            own = frozenset({self.percentile})
        elif self.value is None and self.local is None:
            own = frozenset({"otsu"})
        return own | (self.local.needs if self.local else frozenset())

    def resolve(self, statistics: Mapping[float | str, float]) -> Self:
        """Return this operator with its thresholds decided."""
        decided: dict[str, Any] = {}
        if self.percentile is not None:
            decided = {"value": statistics[self.percentile], "percentile": None}
        elif self.value is None and self.local is None:
            decided = {"value": statistics["otsu"]}
        if self.local is not None:
            decided["local"] = self.local.resolve(statistics)
        return replace(self, **decided) if self.needs else self  # type: ignore[type-var]

    def _mask(self, image: np.ndarray) -> np.ndarray:
        """Return which voxels are foreground; with a local threshold, those too near the border of a block may err."""
        if self.needs:
            raise ValueError("`value` is not decided; call `resolve` with the statistics of the whole volume")
        above = np.ones(image.shape, bool) if self.value is None else image > self.value
        if self.local is not None:
            above &= image > self.local(image)
        return above

    def _window_radius(self, ndim: int) -> tuple[int, ...]:
        return self.local.radius(ndim) if self.local else (0,) * ndim

    @property
    def _mask_nbytes(self) -> int:
        """Peak bytes per voxel of `_mask`: means, squares and what lies between two axes, all in float64."""
        return 40 if self.local else 2

    def _described_foreground(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "percentile": self.percentile,
            "local": None if self.local is None else asdict(self.local),
        }


@dataclass(frozen=True)
class Threshold(Foreground):
    """Segment the connected components above a threshold.

    ``labels = label(image > threshold)``: exactly `scipy.ndimage.label` of the whole volume, ids included,
    for every block grid.

    Parameters
    ----------
    value
        Threshold in input intensities; None for `percentile`, or for Otsu's threshold of the whole volume and channel
        (Otsu, IEEE Trans. Syst. Man Cybern. 9:62, 1979) if there is no `local` one.
    connectivity
        Voxels are neighbours if they differ in at most this many axes: 1 (faces), 2 (and edges) or
        3 (and corners).
    percentile
        Of the whole volume and channel, whose intensity is the threshold.
    local
        A threshold of each voxel's surroundings. If there is a `value` or a `percentile` as well, foreground is
        above both: what is only noise in empty surroundings is left out so.

    Raises
    ------
    ValueError
        If `value` is not finite, `percentile` not one or given with a value, or `connectivity` is not 1, 2 or 3.
    """

    value: float | None = None
    connectivity: int = 1
    _: KW_ONLY
    percentile: float | None = None
    local: LocalThreshold | None = None

    name = "threshold"

    def __post_init__(self) -> None:
        self._check_foreground()
        if self.connectivity not in (1, 2, 3):
            raise ValueError(f"`connectivity` must be 1, 2 or 3, got {self.connectivity}")

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        check_image(shape, dtype)
        self._window_radius(len(shape))
        if self.connectivity > len(shape):
            raise ValueError(f"`connectivity` {self.connectivity} is more than the image's {len(shape)} axes")

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return the window of the local threshold; without one, nothing is read around a core."""
        return Halo(self._window_radius(len(shape)))

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect` on noise, where every voxel is a run: labels, runs, their packed form."""
        return max(4 * 12, self._mask_nbytes) * math.prod(read_shape)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        told = {"operator": self.name, "value": self.value, "connectivity": self.connectivity}
        # What is not used is not told, so that jobs begun before there was a choice can go on.
        return told | {key: v for key, v in self._described_foreground().items() if v is not None}

    def detect(self, image: Array, block: Block) -> Table:
        """Label the core; return its components and their surface."""
        return surface_table(self._label(image, block), block)

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece."""
        self.check(image.shape, image.dtype)
        operator = self.resolve(of_array(image, self.needs)) if self.needs else self
        labels = operator._label(image, Block.whole(image.shape))
        return labels.astype(labels_dtype(labels), copy=False)

    @property
    def _rule(self) -> Touching:
        return Touching(self.connectivity)

    def _label(self, image: Array, block: Block) -> np.ndarray:
        """Return labels of the core."""
        return label_mask(self._mask(to_numpy(image))[block.trim], self.connectivity)[0]

"""The classical baseline: a global threshold, then connected components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.components import label_mask
from chunkrestore.operators.base import Array, Table, check_image, labels_dtype
from chunkrestore.operators.rules import JoinedByRule, Touching
from chunkrestore.statistics import of_array


@dataclass(frozen=True)
class Threshold(JoinedByRule):
    """Segment the connected components above a global threshold.

    ``labels = label(image > value)``: exactly `scipy.ndimage.label` of the whole volume, ids included,
    for every block grid.

    Parameters
    ----------
    value
        Threshold in input intensities; None for Otsu's threshold of the whole volume and channel
        (Otsu, IEEE Trans. Syst. Man Cybern. 9:62, 1979).
    connectivity
        Voxels are neighbours if they differ in at most this many axes: 1 (faces), 2 (and edges) or
        3 (and corners).

    Raises
    ------
    ValueError
        If `value` is not finite or `connectivity` is not 1, 2 or 3.
    """

    value: float | None = None
    connectivity: int = 1

    name = "threshold"

    def __post_init__(self) -> None:
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"`value` must be finite, got {self.value}")
        if self.connectivity not in (1, 2, 3):
            raise ValueError(f"`connectivity` must be 1, 2 or 3, got {self.connectivity}")

    @property
    def needs(self) -> frozenset[float | str]:
        """Otsu's threshold, unless a value was given."""
        return frozenset() if self.value is not None else frozenset({"otsu"})

    def resolve(self, statistics: Mapping[float | str, float]) -> Self:
        """Return this operator with its threshold decided."""
        return self if self.value is not None else replace(self, value=statistics["otsu"])

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        check_image(shape, dtype)
        if self.connectivity > len(shape):
            raise ValueError(f"`connectivity` {self.connectivity} is more than the image's {len(shape)} axes")

    def halo(self, shape: Sequence[int]) -> Halo:
        """Nothing is read around a core."""
        return Halo((0,) * len(shape))

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect` on noise, where every voxel is a run: labels, runs, their packed form."""
        return 4 * 12 * math.prod(read_shape)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {"operator": self.name, "value": self.value, "connectivity": self.connectivity}

    def detect(self, image: Array, block: Block) -> Table:
        """Label the core; return its components and their surface."""
        return self._rule.table(self._label(image, block), block, self.halo(block.volume_shape).depth)

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
        if self.value is None:
            raise ValueError("`value` is not decided; call `resolve` with the statistics of the whole volume")
        return label_mask(to_numpy(image)[block.trim] > self.value, self.connectivity)[0]

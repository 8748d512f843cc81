"""Which objects of two label volumes share voxels: counted block by block, added exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
"""(n, 3): label of the first volume, label of the second, voxels that have both; every pair of labels once."""


def count_overlaps(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Counts:
    """Count the voxels of every pair of labels, background (0) included.

    Parameters
    ----------
    first, second
        Integers, of one shape: whole volumes, or the same block of both. Labels beyond int64 are renamed.

    Raises
    ------
    TypeError
        If an array does not hold integers.
    ValueError
        If the shapes differ.
    """
    for array, name in ((first, "first"), (second, "second")):
        if array.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must hold integer label ids, got dtype {array.dtype}")
    if first.shape != second.shape:
        raise ValueError(f"`first` {first.shape} and `second` {second.shape} must have one shape")
    a, b = np.ascontiguousarray(first).ravel(), np.ascontiguousarray(second).ravel()
    if not a.size:
        return np.empty((0, 3), np.int64)
    # Labels come in runs along the last axis: what is sorted are runs, not voxels.
    starts = np.flatnonzero(np.concatenate([[True], (a[1:] != a[:-1]) | (b[1:] != b[:-1])]))
    length = np.diff(starts, append=a.size)
    # Ids of uint64 that exceed int64 become negative ones: other names for the same objects.
    return _summed(np.stack([a[starts].astype(np.int64), b[starts].astype(np.int64), length], axis=-1))


def merged_counts(parts: Iterable[Counts]) -> Counts:
    """Add the counts of disjoint blocks."""
    return _summed(np.concatenate([np.empty((0, 3), np.int64), *parts]))


@dataclass(frozen=True)
class Contingency:
    """Objects of two label volumes and the overlaps between them."""

    first: Counts
    second: Counts
    """Ids, ascending, without background."""
    size_first: Counts
    size_second: Counts
    """Voxels of each object."""
    row: npt.NDArray[np.intp]
    column: npt.NDArray[np.intp]
    """Per overlapping pair: positions in `first` and `second`."""
    shared: Counts
    """Per overlapping pair: voxels in common."""
    n_voxels: int
    """Voxels of the volume, background included."""

    @classmethod
    def of(cls, counts: Counts) -> Contingency:
        """Return the table of the counts of a whole volume."""
        a, b, n = counts.T
        first, size_first = _sizes(a, n)
        second, size_second = _sizes(b, n)
        both = (a != 0) & (b != 0)
        row, column = np.searchsorted(first, a[both]), np.searchsorted(second, b[both])
        return cls(first, second, size_first, size_second, row, column, n[both], int(n.sum()))

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """Per overlapping pair: intersection over union."""
        union = self.size_first[self.row] + self.size_second[self.column] - self.shared
        return np.asarray(self.shared / union, dtype=np.float64)

    @property
    def n_split(self) -> int:
        """Objects of the first volume that hold more than half of each of two or more objects of the second."""
        within = 2 * self.shared > self.size_second[self.column]
        return int((np.bincount(self.row[within], minlength=1) > 1).sum())

    @property
    def n_merged(self) -> int:
        """Objects of the second volume that hold more than half of each of two or more objects of the first."""
        within = 2 * self.shared > self.size_first[self.row]
        return int((np.bincount(self.column[within], minlength=1) > 1).sum())


def _summed(counts: Counts) -> Counts:
    """Return one row per pair of labels, in ascending order."""
    if not len(counts):
        return counts
    counts = counts[np.lexsort((counts[:, 1], counts[:, 0]))]
    new = np.concatenate([[True], (counts[1:, :2] != counts[:-1, :2]).any(axis=1)])
    starts = np.flatnonzero(new)
    return np.column_stack([counts[starts, :2], np.add.reduceat(counts[:, 2], starts)])


def _sizes(labels: Counts, n: Counts) -> tuple[Counts, Counts]:
    """Return the labels but background, and the voxels of each."""
    ids, place = np.unique(labels, return_inverse=True)
    sizes = np.zeros(len(ids), np.int64)
    np.add.at(sizes, place, n)
    return ids[ids != 0], sizes[ids != 0]

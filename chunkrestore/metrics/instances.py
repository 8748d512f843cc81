"""Metrics of instance labels: matching against a truth, and equality up to renaming."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse


@dataclass(frozen=True)
class InstanceScore:
    """How well predicted instances match true ones at an overlap threshold."""

    n_true: int
    """Number of true instances."""
    n_pred: int
    """Number of predicted instances."""
    tp: int
    """Predicted instances that match a true one."""
    mean_matched_iou: float
    """Mean intersection over union of the matched pairs; 0 when there are none."""

    @property
    def fp(self) -> int:
        """Predicted instances that match none."""
        return self.n_pred - self.tp

    @property
    def fn(self) -> int:
        """True instances that match none."""
        return self.n_true - self.tp

    @property
    def precision(self) -> float:
        """Share of predicted instances that match; 1 when nothing is predicted."""
        return self.tp / self.n_pred if self.n_pred else 1.0

    @property
    def recall(self) -> float:
        """Share of true instances that are matched; 1 when there are none."""
        return self.tp / self.n_true if self.n_true else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 when there is nothing to find and nothing is found."""
        total = self.n_true + self.n_pred
        return 2 * self.tp / total if total else 1.0


def match_instances(truth: npt.ArrayLike, labels: npt.ArrayLike, *, iou: float = 0.5) -> InstanceScore:
    """Match instances one to one: as many pairs as possible with an overlap of at least `iou`.

    Among the largest sets of pairs the one with the largest total overlap counts.

    Parameters
    ----------
    truth, labels
        Integer arrays of the same shape; 0 is background. Ids need not be consecutive.
    iou
        Least intersection over union of a pair, above 0 and at most 1.

    Returns
    -------
    InstanceScore
        Counts, precision, recall, F1 and the mean overlap of the pairs.

    Raises
    ------
    ValueError
        If the shapes differ or `iou` lies outside (0, 1].
    TypeError
        If an array does not hold integers.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"`iou` must lie in (0, 1], got {iou}")
    table = _Overlaps.of(truth, labels, "truth", "labels")
    scores = table.iou[_best_pairs(table, iou)]
    return InstanceScore(
        len(table.first), len(table.second), len(scores), float(scores.mean()) if len(scores) else 0.0
    )


@dataclass(frozen=True)
class InstanceDifference:
    """How two label volumes differ, ids aside."""

    n_first: int
    """Number of instances of the first volume."""
    n_second: int
    """Number of instances of the second volume."""
    n_identical: int
    """Instances with exactly the same voxels in both."""
    n_voxels: int
    """Voxels that lie in different instances, instances being paired where they overlap by more than half."""

    @property
    def same(self) -> bool:
        """Whether a one-to-one renaming of ids turns one volume into the other."""
        return self.n_first == self.n_second == self.n_identical and self.n_voxels == 0


def same_instances(first: npt.ArrayLike, second: npt.ArrayLike) -> InstanceDifference:
    """Compare two label volumes voxel by voxel, up to a one-to-one renaming of ids.

    Parameters
    ----------
    first, second
        Integer arrays of the same shape; 0 is background in both.

    Returns
    -------
    InstanceDifference
        Its ``same`` says whether they are equal.

    Raises
    ------
    ValueError
        If the shapes differ.
    TypeError
        If an array does not hold integers.
    """
    table = _Overlaps.of(first, second, "first", "second")
    # More than half of the union: then no instance can have two partners.
    paired = table.iou > 0.5
    background = table.n_voxels - int(table.size_first.sum() + table.size_second.sum() - table.shared.sum())
    agreeing = background + int(table.shared[paired].sum())
    return InstanceDifference(
        len(table.first), len(table.second), int((table.iou == 1).sum()), table.n_voxels - agreeing
    )


@dataclass(frozen=True)
class _Overlaps:
    """Which instances of two label volumes share voxels: a sparse contingency table."""

    first: npt.NDArray[Any]
    second: npt.NDArray[Any]
    """Ids, ascending, without background."""
    size_first: npt.NDArray[np.int64]
    size_second: npt.NDArray[np.int64]
    """Voxels of each instance."""
    row: npt.NDArray[np.intp]
    column: npt.NDArray[np.intp]
    """Per overlapping pair: positions in `first` and `second`."""
    shared: npt.NDArray[np.int64]
    """Per overlapping pair: voxels in common."""
    n_voxels: int

    @classmethod
    def of(cls, first: npt.ArrayLike, second: npt.ArrayLike, name_first: str, name_second: str) -> _Overlaps:
        first, second = np.asarray(first), np.asarray(second)
        for array, name in ((first, name_first), (second, name_second)):
            if array.dtype.kind not in "iu":
                raise TypeError(f"`{name}` must hold integer label ids, got dtype {array.dtype}")
        if first.shape != second.shape:
            raise ValueError(
                f"`{name_first}` {first.shape} and `{name_second}` {second.shape} must have one shape"
            )
        ids_first, size_first = _instances(first)
        ids_second, size_second = _instances(second)
        both = (first != 0) & (second != 0)
        row, column = np.searchsorted(ids_first, first[both]), np.searchsorted(ids_second, second[both])
        pairs, shared = np.unique(row * np.int64(max(len(ids_second), 1)) + column, return_counts=True)
        row, column = np.divmod(pairs, max(len(ids_second), 1))
        return cls(ids_first, ids_second, size_first, size_second, row, column, shared, first.size)

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """Per overlapping pair: intersection over union."""
        union = self.size_first[self.row] + self.size_second[self.column] - self.shared
        return np.asarray(self.shared / union, dtype=np.float64)


def _instances(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    ids, sizes = np.unique(labels[labels != 0], return_counts=True)
    return ids, sizes.astype(np.int64)


def _best_pairs(table: _Overlaps, threshold: float) -> npt.NDArray[np.intp]:
    """Return the pairs of the best one-to-one matching among those that reach `threshold`."""
    iou = table.iou
    pairs = np.flatnonzero(iou >= threshold)
    n_first, n_second = len(table.first), len(table.second)
    row, column = table.row[pairs], table.column[pairs]
    graph = sparse.coo_array((np.ones(len(pairs)), (row, column + n_first)), shape=(n_first + n_second,) * 2)
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    # A component is solved on its own; nearly all of them are a single pair.
    by_component = np.argsort(component[row], kind="stable")
    borders = np.flatnonzero(np.diff(component[row][by_component])) + 1
    groups: Iterable[npt.NDArray[np.intp]] = np.split(pairs[by_component], borders)
    return np.concatenate(
        [_assign(table.row[group], table.column[group], iou[group], group) for group in groups]
    )


def _assign(
    row: npt.NDArray[np.intp],
    column: npt.NDArray[np.intp],
    iou: npt.NDArray[np.float64],
    pairs: npt.NDArray[np.intp],
) -> npt.NDArray[np.intp]:
    """Return those of `pairs` that make most matches, and among these the largest sum of overlaps."""
    if len(pairs) < 2:
        return pairs
    rows, r = np.unique(row, return_inverse=True)
    columns, c = np.unique(column, return_inverse=True)
    gain = np.zeros((len(rows), len(columns)))
    # One more match outweighs any gain in overlap, which is below 1 per match.
    gain[r, c] = min(gain.shape) + iou
    chosen = np.zeros(gain.shape, dtype=np.bool_)
    chosen[optimize.linear_sum_assignment(gain, maximize=True)] = True
    return pairs[chosen[r, c]]

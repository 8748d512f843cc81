"""Metrics of instance labels: matching against a truth, and equality up to renaming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from chunkrestore.metrics.contingency import Contingency, count_overlaps

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Overlaps at which instances are matched by default."""
_DENSE = 200
"""Rows up to which a matrix of all pairs is faster than a sparse one."""
_VOLUMES_AT = 0.5
"""Overlap of the pairs whose volumes are compared."""


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
    iou: float = 0.5
    """Least overlap of a pair."""

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

    @property
    def accuracy(self) -> float:
        """``tp / (tp + fp + fn)``; 1 when there is nothing to find and nothing is found."""
        total = self.n_true + self.n_pred - self.tp
        return self.tp / total if total else 1.0

    @property
    def panoptic_quality(self) -> float:
        """F1 times the mean overlap of the pairs (Kirillov et al. 2019); 1 as for `f1`."""
        return self.f1 * self.mean_matched_iou if self.n_true + self.n_pred else 1.0

    @property
    def mean_true_iou(self) -> float:
        """Overlap of the true instances with their partners, 0 for those without, averaged; 1 when there are none."""
        return self.tp * self.mean_matched_iou / self.n_true if self.n_true else 1.0

    def describe(self) -> dict[str, float]:
        """Return all numbers."""
        derived = ("fp", "fn", "precision", "recall", "f1", "accuracy", "panoptic_quality", "mean_true_iou")
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class LabelScore:
    """How well a segmentation matches the true one."""

    at: tuple[InstanceScore, ...]
    """One per overlap threshold, rising."""
    n_split: int
    """True instances that hold more than half of each of two or more predicted ones."""
    n_merged: int
    """Predicted instances that hold more than half of each of two or more true ones."""
    volume_error: float
    """Median of predicted over true volume, minus 1, of the pairs matched at 0.5; NaN if there are none."""
    absolute_volume_error: float
    """Median of its absolute value."""

    @property
    def n_true(self) -> int:
        """Number of true instances."""
        return self.at[0].n_true

    @property
    def n_pred(self) -> int:
        """Number of predicted instances."""
        return self.at[0].n_pred

    @property
    def mean_f1(self) -> float:
        """F1, averaged over the thresholds."""
        return sum(score.f1 for score in self.at) / len(self.at)

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        numbers = {name: getattr(self, name) for name in ("n_true", "n_pred", "mean_f1")}
        return {**vars(self), "at": [score.describe() for score in self.at], **numbers}


def described_labels(values: Mapping[str, Any]) -> LabelScore:
    """Return the score that `LabelScore.describe` has described."""
    own = ("n_true", "n_pred", "tp", "mean_matched_iou", "iou")
    at = tuple(InstanceScore(**{name: score[name] for name in own}) for score in values["at"])
    rest = ("n_split", "n_merged", "volume_error", "absolute_volume_error")
    return LabelScore(at, **{name: values[name] for name in rest})


def score_contingency(table: Contingency, iou: Sequence[float] = THRESHOLDS) -> LabelScore:
    """Return how well the second volume of a contingency table matches the first, which is the truth.

    Raises
    ------
    ValueError
        If there is no threshold, or one lies outside (0, 1].
    """
    if not iou or not all(0 < threshold <= 1 for threshold in iou):
        raise ValueError(f"`iou` must lie in (0, 1], got {iou if len(iou) != 1 else iou[0]}")
    pairs = best_pairs(table, _VOLUMES_AT)
    error = table.size_second[table.column[pairs]] / table.size_first[table.row[pairs]] - 1
    return LabelScore(
        tuple(_matched(table, threshold) for threshold in sorted(iou)),
        table.n_split,
        table.n_merged,
        float(np.median(error)) if len(error) else np.nan,
        float(np.median(np.abs(error))) if len(error) else np.nan,
    )


def match_instances(truth: npt.ArrayLike, labels: npt.ArrayLike, *, iou: float = 0.5) -> InstanceScore:
    """Match instances one to one: as many pairs as possible with an overlap of at least `iou`.

    Among the largest sets of pairs the one with the largest total overlap counts, for which objects that are left
    over may be paired below `iou`: `stardist.matching` decides in the same way.

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
    return _matched(_contingency(truth, labels), iou)


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
    table = _contingency(first, second)
    # More than half of the union: then no instance can have two partners.
    paired = table.iou > 0.5
    background = table.n_voxels - int(table.size_first.sum() + table.size_second.sum() - table.shared.sum())
    agreeing = background + int(table.shared[paired].sum())
    return InstanceDifference(
        len(table.first), len(table.second), int((table.iou == 1).sum()), table.n_voxels - agreeing
    )


def best_pairs(table: Contingency, threshold: float) -> npt.NDArray[np.intp]:
    """Return the pairs (positions in ``table.row``) of the best one-to-one matching that reach `threshold`.

    Best is: most pairs that reach it; then, the largest sum of overlaps, pairs of what is left over included.

    Notes
    -----
    A pair that reaches the threshold and shares no object with another such pair is in every largest matching.
    What remains without these falls into small groups, each of which is an assignment problem of its own.
    """
    iou = table.iou
    strong = iou >= threshold
    of_row = np.bincount(table.row[strong], minlength=len(table.first))
    of_column = np.bincount(table.column[strong], minlength=len(table.second))
    alone = strong & (of_row[table.row] == 1) & (of_column[table.column] == 1)
    taken_row, taken_column = np.zeros(len(table.first), bool), np.zeros(len(table.second), bool)
    taken_row[table.row[alone]] = True
    taken_column[table.column[alone]] = True
    left = np.flatnonzero(~taken_row[table.row] & ~taken_column[table.column])
    groups = _connected(table, left, strong) if strong[left].any() else []
    chosen = [_assign(table.row[g], table.column[g], iou[g], strong[g], g) for g in groups]
    return np.sort(np.concatenate([np.flatnonzero(alone), *chosen]))


def _contingency(first: npt.ArrayLike, second: npt.ArrayLike) -> Contingency:
    return Contingency.of(count_overlaps(np.asarray(first), np.asarray(second)))


def _matched(table: Contingency, threshold: float) -> InstanceScore:
    scores = table.iou[best_pairs(table, threshold)]
    mean = float(scores.mean()) if len(scores) else 0.0
    return InstanceScore(len(table.first), len(table.second), len(scores), mean, float(threshold))


def _connected(
    table: Contingency, pairs: npt.NDArray[np.intp], strong: npt.NDArray[np.bool_]
) -> Iterable[npt.NDArray[np.intp]]:
    """Return those groups of `pairs` connected by shared objects that have a strong one."""
    n_first, n_second = len(table.first), len(table.second)
    row, column = table.row[pairs], table.column[pairs]
    graph = sparse.coo_array((np.ones(len(pairs)), (row, column + n_first)), shape=(n_first + n_second,) * 2)
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    of_pair = component[row]
    wanted = np.isin(of_pair, of_pair[strong[pairs]])
    pairs, of_pair = pairs[wanted], of_pair[wanted]
    order = np.argsort(of_pair, kind="stable")
    borders = np.flatnonzero(np.diff(of_pair[order])) + 1
    return np.split(pairs[order], borders)


def _assign(
    row: npt.NDArray[np.intp],
    column: npt.NDArray[np.intp],
    iou: npt.NDArray[np.float64],
    strong: npt.NDArray[np.bool_],
    pairs: npt.NDArray[np.intp],
) -> npt.NDArray[np.intp]:
    """Return those of `pairs` that are strong and in the best matching."""
    rows, r = np.unique(row, return_inverse=True)
    columns, c = np.unique(column, return_inverse=True)
    # One more strong pair outweighs any gain in overlap, which is at most 1 per pair.
    gain = strong * (min(len(rows), len(columns)) + 1.0) + iou
    solve = _assign_dense if len(rows) <= _DENSE else _assign_sparse
    chosen = solve(r, c, gain, (len(rows), len(columns)))
    return pairs[chosen & strong]


def _assign_dense(
    r: npt.NDArray[np.intp], c: npt.NDArray[np.intp], gain: npt.NDArray[np.float64], shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Return which of the pairs are in the assignment of largest gain."""
    gains = np.zeros(shape)
    gains[r, c] = gain
    chosen = np.zeros(shape, dtype=np.bool_)
    chosen[optimize.linear_sum_assignment(gains, maximize=True)] = True
    return chosen[r, c]


def _assign_sparse(
    r: npt.NDArray[np.intp], c: npt.NDArray[np.intp], gain: npt.NDArray[np.float64], shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Do the same where a matrix of all pairs would be large: every row may stay alone, with a column of its own."""
    n = shape[0]
    own = np.arange(n)
    # Every row is assigned once, so that 1 more everywhere changes nothing but that no weight is 0.
    weights = sparse.csr_array(
        (
            np.concatenate([gain + 1, np.ones(n)]),
            (np.concatenate([r, own]), np.concatenate([c, own + shape[1]])),
        ),
        shape=(n, shape[1] + n),
    )
    partner = np.full(n, -1)
    rows, columns = sparse.csgraph.min_weight_full_bipartite_matching(weights, maximize=True)
    partner[rows] = columns
    return np.asarray(partner[r] == c)

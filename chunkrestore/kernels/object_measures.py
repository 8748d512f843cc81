"""Measures of whole objects from the sums of their parts in blocks: exact up to one rounding at the end.

Sums are Python integers in arrays of objects from here on: no length of an object, and no order of blocks, changes a
bit of a result. With n voxels, S the sum of indices and P that of their products,

    centroid      = S / n
    covariance_ij = (n P_ij - S_i S_j) / n**2

and with T, Q and W the sums of intensities, of their squares, and of intensities times indices,

    mean = T / n        variance = (n Q - T**2) / n**2        weighted centroid = W / T

each numerator and denominator an exact integer, and each division rounded once, to the nearest float64. Differences
of large numbers lose nothing that way, as they would in floats: an intensity of 60000 that varies by 1, say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Sums: TypeAlias = Mapping[str, np.ndarray]
"""Of the parts of objects in one block, as `chunkrestore.kernels.object_sums` returns them."""
Exact: TypeAlias = npt.NDArray[np.object_]
"""Python integers."""

INTENSITY_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32")
"""Intensities that can be summed exactly."""

_FLOAT_UNIT = 149
"""Floats are counted in 2**-149, which is the smallest float32."""


def trimmed(limbs: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Return limbs without those that are 0 everywhere at both ends, and how many are gone at the low end."""
    used = np.flatnonzero(limbs.any(axis=tuple(range(limbs.ndim - 1))))
    if not len(used):
        return limbs[..., :1], 0
    return limbs[..., used[0] : used[-1] + 1], int(used[0])


def merge_objects(parts: Sequence[tuple[Sums, Sequence[int]]]) -> tuple[dict[str, np.ndarray], Grouping]:
    """Merge parts of objects.

    Parameters
    ----------
    parts
        Results of `object_sums` with the first voxel of their blocks.

    Returns
    -------
    measured : dict
        One row per object, by ascending label: ``ids``, ``volume``, ``sum``, ``first``, ``last`` as for
        `chunkrestore.jobs.object_columns.ObjectColumns.empty`; ``covariance``: float64 (n, ndim * (ndim + 1) / 2), of
        the indices, for ``i <= j``.
    grouping
        For `merge_intensities` of the same parts.

    Raises
    ------
    OverflowError
        If indices add up to more than int64 holds.
    """
    grouping = Grouping(parts)
    exact = grouping.shifted_sums()
    n, sums, products = exact["volume"], exact["sum"], exact["products"]
    ndim = sums.shape[1]
    pairs = [(i, j) for i in range(ndim) for j in range(i, ndim)]
    spread = [n * products[:, k] - sums[:, i] * sums[:, j] for k, (i, j) in enumerate(pairs)]
    covariance = np.stack([_ratio(s, n * n) for s in spread], axis=-1)
    placed = sums + grouping.reference.astype(object) * n[:, np.newaxis]
    return {
        "ids": grouping.ids,
        "volume": n.astype(np.int64),
        "sum": placed.astype(np.int64),
        "first": np.minimum.reduceat(grouping.joined("first"), grouping.starts),
        "last": np.maximum.reduceat(grouping.joined("last"), grouping.starts),
        "covariance": covariance,
    }, grouping


def merge_intensities(
    parts: Sequence[tuple[Mapping[str, tuple[npt.NDArray[np.int64], int]], np.ndarray, np.ndarray]],
    grouping: Grouping,
) -> dict[str, np.ndarray]:
    """Merge one channel's intensities of the same parts.

    Parameters
    ----------
    parts
        Per block ``total``, ``square`` and ``weighted`` as from `trimmed`, ``least`` and ``most``.
    grouping
        From `merge_objects`.

    Returns
    -------
    dict
        One row per object: ``mean``, ``std``, float64; ``min``, ``max`` in the image's type; ``sum``: int64, of
        floats float64; ``weighted_centroid``: float64 (n, ndim), NaN where intensities add up to 0.

    Raises
    ------
    OverflowError
        If integers add up to more than int64 holds.
    """
    least = np.concatenate([part[1] for part in parts])[grouping.order]
    most = np.concatenate([part[2] for part in parts])[grouping.order]
    bits = _FLOAT_UNIT if least.dtype.kind == "f" else 0
    total, square, weighted = (
        np.concatenate([_integers(*part[0][name]) for part in parts])[grouping.order]
        for name in ("total", "square", "weighted")
    )
    weighted = weighted + grouping.offset * total[:, np.newaxis]
    total, square, weighted = (
        np.add.reduceat(column, grouping.starts, axis=0) for column in (total, square, weighted)
    )
    n = grouping.n_voxels
    variance = _ratio(n * square - total * total, (n * n) << (2 * bits))
    weighted = weighted + grouping.reference.astype(object) * total[:, np.newaxis]
    weightless = total == 0
    of_one = np.where(weightless, 1, total)
    centroid = np.stack([_ratio(column, of_one) for column in weighted.T], axis=-1)
    centroid[weightless.astype(bool)] = np.nan
    return {
        "mean": _ratio(total, n << bits),
        "std": np.sqrt(variance),
        "min": np.minimum.reduceat(least, grouping.starts),
        "max": np.maximum.reduceat(most, grouping.starts),
        "sum": _ratio(total, np.full(len(total), 1 << bits, object)) if bits else total.astype(np.int64),
        "weighted_centroid": centroid,
    }


def principal_axes(
    covariance: npt.NDArray[np.float64], voxel_size: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return lengths and directions of the axes of the ellipsoids (ellipses) that have the objects' second moments.

    A solid ellipsoid varies by ``semi_axis**2 / 5`` along each axis, an ellipse by ``semi_axis**2 / 4``, so
    lengths are ``2 * sqrt(5 * variance)`` and ``4 * sqrt(variance)``: what scikit-image calls ``axis_major_length``
    and so on. A voxel counts as a point at its centre.

    Parameters
    ----------
    covariance
        Of indices, (n, 6) or (n, 3), as from `merge_objects`.
    voxel_size
        Length per axis.

    Returns
    -------
    lengths : numpy.ndarray
        (n, ndim), longest first; exactly 0 where an object is flat.
    directions : numpy.ndarray
        (n, ndim, ndim): unit vectors, one per length, their largest component above 0.
    """
    ndim = len(voxel_size)
    size = np.asarray(voxel_size, np.float64)
    matrix = np.empty((len(covariance), ndim, ndim))
    upper = np.triu_indices(ndim)
    matrix[:, upper[0], upper[1]] = matrix[:, upper[1], upper[0]] = (
        covariance * size[upper[0]] * size[upper[1]]
    )
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[:, ::-1], np.swapaxes(vectors, 1, 2)[:, ::-1]
    # Rounding leaves some 1e-16 of the largest where there is none; a voxel more would be 1e-11 at the least, in an
    # object of 10**5 voxels' length.
    values = np.where(values > 1e-13 * values[:, :1], values, 0.0)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=-1)[..., np.newaxis], axis=-1)
    return np.sqrt({2: 16.0, 3: 20.0}[ndim] * values), vectors * np.where(largest < 0, -1.0, 1.0)


class Grouping:
    """Rows of several blocks, sorted by label: which of them are one object, and where their coordinates begin."""

    def __init__(self, parts: Sequence[tuple[Sums, Sequence[int]]]) -> None:
        self._tables = [table for table, _ in parts]
        ids = np.concatenate([table["ids"] for table in self._tables])
        self.order = np.argsort(ids, kind="stable")
        """Of rows, as they come in `parts`."""
        self.ids, self.starts = np.unique(ids[self.order], return_index=True)
        """Labels, and the first row of each."""
        origin = np.concatenate(
            [np.broadcast_to(np.asarray(o, np.int64), (len(table["ids"]), len(o))) for table, o in parts]
        )[self.order]
        self.reference = np.minimum.reduceat(origin, self.starts) if len(ids) else origin
        """Voxel that an object's coordinates count from: the first corner of its blocks."""
        n_rows = np.diff(self.starts, append=len(ids))
        self.offset: Exact = (origin - np.repeat(self.reference, n_rows, axis=0)).astype(object)
        """Of a row's coordinates from there."""
        self.n_voxels: Exact = self.added(self.joined("volume").astype(object))
        """Of every object."""

    def joined(self, name: str) -> np.ndarray:
        """Return a column of all rows."""
        return np.concatenate([table[name] for table in self._tables])[self.order]

    def added(self, column: Exact) -> Exact:
        """Return what the rows of every object add up to."""
        return np.add.reduceat(column, self.starts, axis=0)

    def shifted_sums(self) -> dict[str, Exact]:
        """Return exact sums of every object, from its own reference."""
        n, sums, products = (self.joined(name).astype(object) for name in ("volume", "sum", "products"))
        ndim, d = sums.shape[1], self.offset
        moved = [
            products[:, k] + d[:, i] * sums[:, j] + d[:, j] * sums[:, i] + d[:, i] * d[:, j] * n
            for k, (i, j) in enumerate((i, j) for i in range(ndim) for j in range(i, ndim))
        ]
        return {
            "volume": self.n_voxels,
            "sum": self.added(sums + d * n[:, np.newaxis]),
            "products": self.added(np.stack(moved, axis=-1)),
        }


def _integers(limbs: npt.NDArray[np.int64], first: int) -> Exact:
    """Return what limbs stand for; `first` are gone at the low end."""
    value: Exact = limbs[..., -1].astype(object)
    for k in reversed(range(limbs.shape[-1] - 1)):
        value = value * 2**32 + limbs[..., k].astype(object)
    return value * 2 ** (32 * first)


def _ratio(numerator: Exact, denominator: Exact) -> npt.NDArray[np.float64]:
    """Divide exact integers; Python rounds the quotient to the nearest float64."""
    quotient: npt.NDArray[np.float64] = (numerator / denominator).astype(np.float64)
    return quotient + 0.0  # Python's 0 / -1 is -0.0

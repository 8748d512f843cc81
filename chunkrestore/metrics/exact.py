"""Sums that are the same whatever the order in which they are added.

A sum of float64 is kept as a short list of float64 that add up to it without any error (Shewchuk 1997, "expansions"),
and rounded once, at the end. So sums of parts, of parts of parts, in any order, give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float64]
"""(k, m): m sums, each the exact sum of a column."""


def added(rows: npt.ArrayLike) -> Rows:
    """Return fewer rows, usually two or three, whose columns have exactly the sums that those of `rows` have.

    Parameters
    ----------
    rows
        Finite float64, (n, m): a row per part, or what this function has returned for several, one below the other.

    Returns
    -------
    numpy.ndarray
        float64 (k, m).

    References
    ----------
    Shewchuk 1997, doi 10.1007/PL00009321, theorem 10 (grow expansion, zeros left out).
    """
    rows = np.asarray(rows, np.float64)
    columns = [_expansion(column) for column in rows.T.tolist()]
    exact = np.zeros((max(map(len, columns), default=0), len(columns)))
    for k, column in enumerate(columns):
        exact[: len(column), k] = column
    return exact


def totals(rows: Rows) -> npt.NDArray[np.float64]:
    """Return the sum of every column, rounded once."""
    return np.array([math.fsum(column) for column in rows.T.tolist()])


def _expansion(values: Iterable[float]) -> Sequence[float]:
    """Return floats that do not overlap and have exactly the sum of `values`."""
    parts: list[float] = []
    for value in values:
        kept = 0
        for part in parts:
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            value = large + small
            error = small - (value - large)
            if error:
                parts[kept] = error
                kept += 1
        parts[kept:] = [value] if value else []
    return parts

"""Which boxes of a table can meet: a grid of cells for each class of sizes, in flat arrays.

Boxes are sorted by size into classes of powers of two, each with a grid of cells of its own, so one giant among
millions of small boxes makes its own search long and no other. A search reads runs of sorted cell numbers: it takes
some microseconds, plus a few nanoseconds per box nearby. Memory is 24 bytes per box, whatever the sizes.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part

_SMALLEST_CELL = 4
"""Voxels: smaller cells would hold less than one candidate of a usual prediction grid."""

Integers = npt.NDArray[np.int64]


class Neighbourhood(NamedTuple):
    """Boxes in cells, made by `neighbourhood`."""

    points: Integers
    """(n, 3): a point of each box."""
    boxes: Integers
    """(n, 2, 3): first and last voxel."""
    reaches: Integers
    """(n,): voxels from the point to the farthest side of its box."""
    rows: Integers
    """(n,): row numbers by class and cell."""
    keys: Integers
    """(n,): cell numbers in that order."""
    classes: Integers
    """(n_classes, 3): first place in `rows`, length of a cell, largest reach; and a last row with n."""
    lowest: Integers
    """(3,): smallest point."""
    shape: Integers
    """(3,): cells per axis that cell numbers are counted with."""


def neighbourhood(points: Integers, boxes: Integers) -> Neighbourhood:
    """Sort boxes into cells.

    Parameters
    ----------
    points
        (n, ndim): a point of each box, n >= 1.
    boxes
        (n, 2, ndim): first and last voxel.
    """
    missing = 3 - points.shape[1]
    points = np.pad(points, ((0, 0), (missing, 0)))
    boxes = np.pad(boxes, ((0, 0), (0, 0), (missing, 0)))
    reaches = np.abs(boxes - points[:, np.newaxis]).max(axis=(1, 2))
    exponents = np.ceil(np.log2(np.maximum(reaches, _SMALLEST_CELL))).astype(np.int64)
    lowest = points.min(axis=0)
    shape = (points.max(axis=0) - lowest) // _SMALLEST_CELL + 1
    cells = (points - lowest) >> exponents[:, np.newaxis]
    keys = (cells[:, 0] * shape[1] + cells[:, 1]) * shape[2] + cells[:, 2]
    rows = np.lexsort((keys, exponents))
    present, first = np.unique(exponents[rows], return_index=True)
    largest = np.maximum.reduceat(reaches[rows], first)
    classes = np.stack([first, 2**present, largest], axis=-1)
    classes = np.concatenate([classes, [[len(rows), 0, 0]]])
    return Neighbourhood(points, boxes, reaches, rows, keys[rows], classes, lowest, shape)


@compiled
def meeting(row: int, boxes: Neighbourhood, after: Integers, found: Integers) -> int:
    """Find the rows whose boxes have a voxel in common with that of `row`.

    Parameters
    ----------
    row
        Row number.
    boxes
        What to look in.
    after
        (n,): only rows with ``after > 0`` are found.
    found
        (n,): the row numbers are written here, in no meaningful order.

    Returns
    -------
    int
        How many.
    """
    n = int(np.int64(0))
    for k in range(len(boxes.classes) - 1):
        begin, end = boxes.classes[k, 0], boxes.classes[k + 1, 0]
        cell, far = boxes.classes[k, 1], boxes.classes[k, 2] + boxes.reaches[row]
        z0, z1 = _cells(boxes.points[row, 0] - boxes.lowest[0], boxes.shape[0], far, cell)
        y0, y1 = _cells(boxes.points[row, 1] - boxes.lowest[1], boxes.shape[1], far, cell)
        x0, x1 = _cells(boxes.points[row, 2] - boxes.lowest[2], boxes.shape[2], far, cell)
        if (z1 - z0 + 1) * (y1 - y0 + 1) > end - begin:
            n = _among(row, boxes, begin, end, after, found, n)
            continue
        for z in range(z0, z1 + 1):
            for y in range(y0, y1 + 1):
                line = (z * boxes.shape[1] + y) * boxes.shape[2]
                first, last = begin, end
                while first < last:
                    middle = (first + last) // 2
                    if boxes.keys[middle] < line + x0:
                        first = middle + 1
                    else:
                        last = middle
                while last < end and boxes.keys[last] <= line + x1:
                    last += 1
                n = _among(row, boxes, first, last, after, found, n)
    return n


@part
def _cells(at: int, n_cells: int, far: int, cell: int) -> tuple[int, int]:
    """Return the first and the last cell along an axis that hold points no farther than `far`."""
    return max(at - far, 0) // cell, min(at + far, n_cells * _SMALLEST_CELL - 1) // cell


@part
def _among(
    row: int, boxes: Neighbourhood, first: int, last: int, after: Integers, found: Integers, n: int
) -> int:
    own = boxes.boxes[row]
    for k in range(first, last):
        other = boxes.rows[k]
        if after[other] > 0:
            box = boxes.boxes[other]
            if (
                box[0, 0] <= own[1, 0]
                and own[0, 0] <= box[1, 0]
                and box[0, 1] <= own[1, 1]
                and own[0, 1] <= box[1, 1]
                and box[0, 2] <= own[1, 2]
                and own[0, 2] <= box[1, 2]
            ):
                found[n] = other
                n += 1
    return n

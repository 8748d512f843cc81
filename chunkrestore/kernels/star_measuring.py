"""Measures of star-convex objects as painting shows them, without painting.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.star_convex import Rays, Rows, canonical_order
from chunkrestore.kernels.star_inside import Shapes, boxes_of, shapes_of, take, work_space
from chunkrestore.kernels.star_marking import MARKED, OPEN, PIECE, Hulls, Piece, mark, piece_of, with_hulls
from chunkrestore.kernels.star_neighbours import Neighbourhood, meeting, neighbourhood

Integers = npt.NDArray[np.int64]


class _Measures(NamedTuple):
    volume: Integers
    sum: Integers
    first: Integers
    last: Integers


def measure(
    rows: Rows,
    own: npt.NDArray[np.bool_],
    rays: Rays,
    shape: Sequence[int],
    rescale: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Measure some objects as they show in the whole volume: inside their shape and inside no better one.

    Parameters
    ----------
    rows
        A block's survivors, and all those around it whose shapes may meet theirs.
    own
        bool (n,): which rows are measured.
    rays
        Rays of the distances.
    shape
        Shape of the volume.
    rescale
        As for `paint`.

    Returns
    -------
    dict
        One row per own row: ``volume``, int64 (n_own,), voxels that show it; ``sum``, int64 (n_own, ndim), the sum
        of their coordinates; ``first``, ``last``, int64 (n_own, ndim), the first and last voxel of the
        box around them: 0 and -1 if there are none.

    Notes
    -----
    One thread, without the interpreter lock. Memory: about 250 bytes per row, and some MiB.
    """
    places = np.cumsum(own) - 1
    n_own, ndim = int(np.count_nonzero(own)), len(shape)
    result = _Measures(*(np.zeros((n_own, *more), np.int64) for more in ((), (3,), (3,), (3,))))
    result.last[:] = -1
    if n_own:
        volume = np.array([1] * (3 - ndim) + list(shape), np.int64)
        shapes = shapes_of(rows, rays, rescale)
        boxes = boxes_of(shapes, work_space(shapes))
        lower, last = np.maximum(boxes[:, 0], 0), np.minimum(boxes[:, 1], volume) - 1
        order = canonical_order(rows)
        visible = np.logical_and.reduce(lower <= last, axis=-1)
        order = order[visible[order]]
        ours = np.flatnonzero(own[order])
        if len(ours):
            boxes = np.stack([lower[order], last[order]], axis=1)
            crowd = neighbourhood(boxes.sum(axis=1) // 2, boxes)
            todo = np.stack([ours, places[order][ours]], axis=-1)
            with_hulls(shapes, lambda at, hulls: _measure(at, todo, (crowd, order), shapes, hulls, result))
    return {
        key: column if key == "volume" else column[:, 3 - ndim :] for key, column in result._asdict().items()
    }


@compiled
def _measure(
    at: int,
    todo: Integers,
    crowd: tuple[Neighbourhood, Integers],
    shapes: Shapes,
    hulls: Hulls,
    result: _Measures,
) -> tuple[int, int]:
    """Measure ``todo[at:]``: positions in the order, and rows of the result."""
    near, order = crowd
    star, window = work_space(shapes), np.empty((2, 3), np.int64)
    everyone, found = np.ones(len(order), np.int64), np.empty(len(order), np.int64)
    room = np.empty(PIECE, np.uint8)
    for k in range(at, len(todo)):
        place, out = todo[k, 0], todo[k, 1]
        for axis in range(3):
            window[0, axis], window[1, axis] = near.boxes[place, 0, axis], near.boxes[place, 1, axis] + 1
        n_found = meeting(place, near, everyone, found)
        nz, ny, nx = window[1, 0] - window[0, 0], window[1, 1] - window[0, 1], window[1, 2] - window[0, 2]
        if nx > len(room):
            room = np.empty(nx, np.uint8)
        _begin(result, out)
        first = int(np.int64(0))
        while first < nz * ny:
            piece = piece_of(window, first, room)
            _fill(piece.mask, OPEN)
            for n in range(-1, n_found):
                # First the shape itself, then the better ones: the table is in canonical order.
                other = found[n] if n >= 0 else place
                if n < 0 or other < place:
                    take(shapes, order[other], star)
                    if not mark(shapes, order[other], star, piece, hulls):
                        return k, order[other]
                    _turn(piece.mask, n < 0)
            _add(result, out, piece)
            first += len(piece.mask)
        if result.volume[out] == 0:
            for axis in range(3):
                result.first[out, axis] = 0
    return len(todo), -1


@part
def _turn(mask: npt.NDArray[np.uint8], is_inside: bool) -> None:
    """Leave those open voxels open that are marked, or, unless `is_inside`, that are not."""
    marked, unmarked = (OPEN, np.uint8(0)) if is_inside else (np.uint8(0), OPEN)
    for r in range(mask.shape[0]):
        for k in range(mask.shape[1]):
            if mask[r, k] == MARKED:
                mask[r, k] = marked
            elif mask[r, k] == OPEN:
                mask[r, k] = unmarked


@part
def _fill(mask: npt.NDArray[np.uint8], value: np.uint8) -> None:
    for r in range(mask.shape[0]):
        for k in range(mask.shape[1]):
            mask[r, k] = value


@part
def _begin(result: _Measures, out: int) -> None:
    result.volume[out] = 0
    for axis in range(3):
        result.sum[out, axis] = 0
        result.first[out, axis], result.last[out, axis] = np.iinfo(np.int64).max, -1


@part
def _add(result: _Measures, out: int, piece: Piece) -> None:
    """Add the open voxels of a piece."""
    z0, y0, x0 = piece.window[0, 0], piece.window[0, 1], piece.window[0, 2]
    ny = piece.window[1, 1] - y0
    for r in range(len(piece.mask)):
        n, sum_x, least, most = 0, 0, 0, -1
        for k in range(piece.mask.shape[1]):
            if piece.mask[r, k] == OPEN:
                least = k if n == 0 else least
                n, sum_x, most = n + 1, sum_x + k, k
        if n:
            z, y = z0 + (piece.first + r) // ny, y0 + (piece.first + r) % ny
            result.volume[out] += n
            sums, firsts, lasts = (n * z, n * y, n * x0 + sum_x), (z, y, x0 + least), (z, y, x0 + most)
            for axis in range(3):
                result.sum[out, axis] += sums[axis]
                result.first[out, axis] = min(result.first[out, axis], firsts[axis])
                result.last[out, axis] = max(result.last[out, axis], lasts[axis])

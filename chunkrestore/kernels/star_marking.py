"""Mark the voxels of a window that lie inside a star-convex shape: what painting and measuring share.

A window (a shape's box, cut to a region) is worked off in pieces of whole rows along x, so that the memory does
not depend on the size of shapes. Loops stop where only Qhull can tell whether a voxel counts; the caller
asks it for the hull of that one shape and goes on (`with_hulls`).

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.star_doubts import ASK_HULL, INSIDE, OUTSIDE, look_again
from chunkrestore.kernels.star_inside import (
    BENEATH,
    BEYOND,
    Shapes,
    Star,
    beneath,
    erect,
    point_of,
    run_length,
    take,
    walk,
    work_space,
)

OPEN, MARKED = np.uint8(1), np.uint8(2)

_RIGHT, _LEFT, _CORNER = np.uint8(4), np.uint8(8), np.uint8(16)
"""Pixels of a row from which on, leftwards or rightwards, an edge of a polygon is to the other side."""

PIECE = 2**20
"""Voxels of a piece, if a row has no more."""

_ON_CORNER = 1e-12
"""Distance in pixels at which a pixel is a polygon's corner, for scikit-image."""


class Piece(NamedTuple):
    """Rows of a window."""

    window: npt.NDArray[np.int64]
    """(2, 3): first voxel, and the one past the last."""
    first: int
    """Row of the window, counted over z and y, that is the first of `mask`."""
    mask: npt.NDArray[np.uint8]
    """(n_rows, nx): OPEN where it is asked whether a voxel is inside; MARKED where it is."""


class Hulls(NamedTuple):
    """Convex hulls of single shapes, by Qhull."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    planes: npt.NDArray[np.float64]
    """(n_planes, 4): inside where the normal times the voxel plus the offset is not positive."""


def with_hulls(shapes: Shapes, work: Callable[[int, Hulls], tuple[int, int]]) -> None:
    """Do `work` to its end, with the hulls that it asks for.

    Parameters
    ----------
    shapes
        The table.
    work
        Called with where to begin and with the hulls known so far; returns where it stopped, and the row whose
        hull it needs to go on from there (-1: it is finished).
    """
    none = Hulls(np.empty(0, np.int64), np.zeros(1, np.int64), np.empty((0, 4)))
    at, hulls = 0, none
    while True:
        stopped, row = work(at, hulls)
        if row < 0:
            return
        planes = _hull(shapes, row)
        if stopped > at:
            at, hulls = stopped, none
        hulls = Hulls(
            np.append(hulls.rows, row),
            np.append(hulls.starts, hulls.starts[-1] + len(planes)),
            np.concatenate([hulls.planes, planes]),
        )


def _hull(shapes: Shapes, row: int) -> npt.NDArray[np.float64]:
    """Return the planes of a shape's convex hull; none, so that faces count as inside, if it is flat."""
    from scipy.spatial import ConvexHull, QhullError

    star = work_space(shapes)
    take(shapes, row, star)
    try:
        return np.ascontiguousarray(ConvexHull(star.corners[:-1].astype(np.float64)).equations)
    except QhullError:
        return np.empty((0, 4))


@part
def cut(box: npt.NDArray[np.int64], region: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the part of `box` in `region`; all int64 (2, 3), first voxel and the one past the last."""
    window = np.empty((2, 3), np.int64)
    for axis in range(3):
        window[0, axis] = max(box[0, axis], region[0, axis])
        window[1, axis] = max(min(box[1, axis], region[1, axis]), window[0, axis])
    return window


@compiled
def piece_of(window: npt.NDArray[np.int64], first: int, room: npt.NDArray[np.uint8]) -> Piece:
    """Return the piece of a window that begins at row `first`, with a mask in `room`."""
    n_rows, nx = (window[1, 0] - window[0, 0]) * (window[1, 1] - window[0, 1]), window[1, 2] - window[0, 2]
    n = min(n_rows - first, max(1, len(room) // max(nx, 1)))
    return Piece(window, first, room[: n * nx].reshape((n, nx)))


@compiled
def mark(shapes: Shapes, row: int, star: Star, piece: Piece, hulls: Hulls) -> bool:
    """Mark the open voxels that lie inside a shape.

    Parameters
    ----------
    shapes, row
        Which shape.
    star
        Work space in which the shape was taken.
    piece
        Where; its mask is changed.
    hulls
        Those known.

    Returns
    -------
    bool
        False if the shape's hull must be known; the mask is then of no use.
    """
    if len(shapes.faces) == 0:
        _mark_polygon(star, piece)
        return True
    return _mark_polyhedron(shapes, row, star, piece, hulls)


@part
def _mark_polyhedron(shapes: Shapes, row: int, star: Star, piece: Piece, hulls: Hulls) -> bool:
    mask, box, planes, neighbours = piece.mask, cut(star.box, piece.window), star.planes, shapes.neighbours
    z0, y0, x0 = piece.window[0, 0], piece.window[0, 1], piece.window[0, 2]
    ny = piece.window[1, 1] - y0
    x_first, x_stop = box[0, 2], box[1, 2]
    if not _any_open(piece, box):
        return True
    has_planes, clear, line_face = erect(shapes, star), star.limits[0], int(np.int64(0))
    pz, py, px = point_of(star)
    for r in range(len(mask)):
        z, y = z0 + (piece.first + r) // ny, y0 + (piece.first + r) % ny
        beyond = (z - pz) ** 2 + (y - py) ** 2
        if z < box[0, 0] or z >= box[1, 0] or y < box[0, 1] or y >= box[1, 1] or beyond > star.limits[3]:
            continue
        half = np.sqrt(star.limits[3] - beyond)
        x = max(x_first, np.int64(np.ceil(px - half)))
        stop = min(x_stop, np.int64(np.floor(px + half)) + 1)
        face, begun = line_face, False
        while x < stop:
            if mask[r, x - x0] != OPEN:
                x += 1
                continue
            here = walk(planes, neighbours, clear, face, z - pz, y - py, x - px) if has_planes else -1
            if here >= 0:
                face = here
                if not begun:
                    begun, line_face = True, here
                # All voxels of the row in this cone, until the first that a plane alone does not decide.
                end = x + run_length(planes, face, clear, z - pz, y - py, x - px, stop - x)
                while x < end:
                    depth = beneath(planes, face, z - pz, y - py, x - px)
                    if depth > planes[face, BENEATH]:
                        if mask[r, x - x0] == OPEN:
                            mask[r, x - x0] = MARKED
                    elif not depth < -planes[face, BEYOND]:
                        break
                    x += 1
                if x == end or mask[r, x - x0] != OPEN:
                    continue
            verdict = look_again(shapes, star, z, y, x, here, has_planes)
            if verdict == ASK_HULL:
                verdict = _in_hull(hulls, row, z, y, x)
                if verdict == ASK_HULL:
                    return False
            if verdict == INSIDE:
                mask[r, x - x0] = MARKED
            x += 1
    return True


@part
def _any_open(piece: Piece, box: npt.NDArray[np.int64]) -> bool:
    """Return whether a voxel of `box` is open."""
    mask = piece.mask
    z0, y0, x0 = piece.window[0, 0], piece.window[0, 1], piece.window[0, 2]
    ny = piece.window[1, 1] - y0
    for r in range(len(mask)):
        z, y = z0 + (piece.first + r) // ny, y0 + (piece.first + r) % ny
        if box[0, 0] <= z < box[1, 0] and box[0, 1] <= y < box[1, 1]:
            for x in range(box[0, 2], box[1, 2]):
                if mask[r, x - x0] == OPEN:
                    return True
    return False


@part
def _in_hull(hulls: Hulls, row: int, z: int, y: int, x: int) -> int:
    for n in range(len(hulls.rows)):
        if hulls.rows[n] == row:
            for k in range(hulls.starts[n], hulls.starts[n + 1]):
                along = hulls.planes[k, 0] * z + hulls.planes[k, 1] * y + hulls.planes[k, 2] * x
                if along + hulls.planes[k, 3] > 0:
                    return OUTSIDE
            return INSIDE
    return ASK_HULL


@part
def _mark_polygon(star: Star, piece: Piece) -> None:
    """Mark pixels inside a polygon or on its border, by the rule of ``skimage.draw.polygon``.

    A pixel is inside if the ray from it to the right crosses an odd number of edges, or the ray to the left
    does, or if it is a corner [1]_. The crossings of a row are found once for all of its pixels.

    References
    ----------
    .. [1] O'Rourke, Computational Geometry in C, 2nd ed. (1998), chapter 7.
    """
    corners, mask = star.corners, piece.mask
    n = len(corners) - 1
    x_first, x_stop = piece.window[0, 2], piece.window[1, 2]
    for r in range(len(mask)):
        marks, y = mask[r], np.float64(piece.window[0, 1] + piece.first + r)
        if y < star.box[0, 1] or y >= star.box[1, 1]:
            continue
        for i in range(n):
            xi, yi = np.float64(corners[i, 2]), np.float64(corners[i, 1]) - y
            xj, yj = (
                np.float64(corners[i - 1 if i else n - 1, 2]),
                np.float64(corners[i - 1 if i else n - 1, 1]) - y,
            )
            if (
                abs(yi) < _ON_CORNER
                and abs(xi - np.rint(xi)) < _ON_CORNER
                and x_first <= np.rint(xi) < x_stop
            ):
                marks[np.int64(np.rint(xi)) - x_first] |= _CORNER
            if (yi > 0) == (yj > 0) and (yi < 0) == (yj < 0):
                continue
            at = (xi * yj - xj * yi) / (yj - yi)
            slack = 1 + 2.0**-48 * max(abs(xi), abs(xj))
            if (yi > 0) != (yj > 0):
                x = np.int64(min(np.ceil(at + slack), x_stop - 1.0)) if at + slack > x_first else x_first - 1
                while x >= x_first and not ((xi - x) * yj - (xj - x) * yi) / (yj - yi) > 0:
                    x -= 1
                if x >= x_first:
                    marks[x - x_first] ^= _RIGHT
            if (yi < 0) != (yj < 0):
                x = (
                    np.int64(max(np.floor(at - slack), np.float64(x_first)))
                    if at - slack < x_stop
                    else x_stop
                )
                while x < x_stop and not ((xi - x) * yj - (xj - x) * yi) / (yj - yi) < 0:
                    x += 1
                if x < x_stop:
                    marks[x - x_first] ^= _LEFT
        _settle_row(marks)


@part
def _settle_row(marks: npt.NDArray[np.uint8]) -> None:
    """Turn the marks of a row of pixels into answers."""
    parity = np.uint8(0)
    for k in range(len(marks) - 1, -1, -1):
        parity ^= marks[k] & _RIGHT
        marks[k] = (marks[k] & ~_RIGHT) | parity
    parity = np.uint8(0)
    for k in range(len(marks)):
        parity ^= marks[k] & _LEFT
        inside = parity or marks[k] & (_RIGHT | _CORNER)
        is_open = marks[k] & OPEN
        marks[k] = MARKED if is_open and inside else marks[k] & (OPEN | MARKED)

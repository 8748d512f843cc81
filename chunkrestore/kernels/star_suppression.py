"""Greedy suppression of star-convex candidates, in compiled loops that hold no interpreter lock.

Candidates take their turn in canonical order; who is still standing survives and suppresses what stands behind it
and overlaps it too much. Two modes say what "too much" means:

``exact``
    What StarDist's C++ routine says about the pair, called with these two candidates alone. Our own arithmetic
    answers (`star_verdict`, `star_polygons`), and the few pairs that lie within rounding of the threshold are put to
    the routine itself.
``fast``
    Our own measure throughout: common voxel centres over the smaller volume (3-D), common area over the smaller one
    (2-D), more than the threshold.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.star_convex import Rays, Rows, canonical_order, library
from chunkrestore.kernels.star_neighbours import Neighbourhood, meeting, neighbourhood
from chunkrestore.kernels.star_overlap import Surface, boxes_and_volumes, fill, place
from chunkrestore.kernels.star_polygons import Polygons, common_area, polygons, uncertainty
from chunkrestore.kernels.star_verdict import (
    KEEP,
    SUPPRESS,
    UNDECIDED,
    Pair,
    as_stardist,
    by_voxels,
    empty_pair,
)

Mode = Literal["exact", "fast"]
MODES: tuple[Mode, ...] = ("exact", "fast")

_ROUNDING = 1e-6
"""Share of a bound by which StarDist's sums in float32 may err."""


class Queue(NamedTuple):
    """Candidates in canonical order, and how far their suppression has come."""

    where: Neighbourhood
    waiting: npt.NDArray[np.int64]
    """(n,): 1 for candidates that stand and whose turn has not come."""
    survives: npt.NDArray[np.bool_]
    found: npt.NDArray[np.int64]
    """(n,): neighbours of the candidate whose turn it is; the first ones are undecided at the end of a turn."""

    @classmethod
    def of(cls, points: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]) -> Queue:
        """Return the queue of candidates with these boxes (n, 2, ndim), nobody decided yet."""
        n = len(points)
        return cls(
            neighbourhood(points, boxes), np.ones(n, np.int64), np.zeros(n, bool), np.empty(n, np.int64)
        )


class Solids(NamedTuple):
    """Polyhedra of candidates in canonical order."""

    surface: Surface
    dist: npt.NDArray[np.float32]
    volumes: npt.NDArray[np.float32]
    pair: Pair


def suppress(rows: Rows, rays: Rays, nms_thresh: float, mode: Mode = "exact") -> npt.NDArray[np.bool_]:
    """Return which rows survive greedy suppression among themselves.

    Parameters
    ----------
    rows
        Candidate table; no two rows at the same point.
    rays
        Rays of the distances.
    nms_thresh
        Largest share of the smaller shape that two survivors may have in common.
    mode
        ``exact`` or ``fast``, see above.

    Returns
    -------
    numpy.ndarray
        bool (n,).

    Notes
    -----
    Pairs are looked for in a grid of cells. Memory is a sorted copy of the table, some 300 bytes per candidate, and
    one byte per voxel of the largest box that survives: 0.2 GB for a radius of 300 voxels, whose pairs take seconds.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}; it is one of {', '.join(MODES)}")
    n = len(rows["prob"])
    if n < 2:
        return np.ones(n, bool)
    order = canonical_order(rows)
    points = np.ascontiguousarray(rows["points"][order], np.int64)
    dist = np.ascontiguousarray(rows["dist"][order], np.float32)
    candidates = (dist, points, rays)
    turn: Callable[[int], tuple[int, int]]
    thresh, exact = float(np.float32(nms_thresh)), mode == "exact"
    if len(rays.faces):
        queue, solids = _solids(points, dist, rays)
        turn = lambda row: _turn_of_solids(row, queue, solids, thresh, exact)  # noqa: E731
    else:
        table = polygons(points, dist, rays)
        queue = Queue.of(points, np.stack([table.vertices.min(axis=1), table.vertices.max(axis=1)], axis=1))
        turn = lambda row: _turn_of_polygons(row, queue, table, thresh, exact)  # noqa: E731
    row, n_undecided = turn(0)
    while row < n:
        queue.waiting[_ask_stardist(row, np.sort(queue.found[:n_undecided]), candidates, nms_thresh)] = 0
        row, n_undecided = turn(row + 1)
    survives = np.empty(n, bool)
    survives[order] = queue.survives
    return survives


def extents(
    rows: Rows, rays: Rays
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return what bounds the decisions about pairs of rows.

    Returns
    -------
    boxes
        (n, 2, ndim): first and last voxel of each shape, as StarDist rounds them. No shape suppresses another whose
        box has no voxel in common with its own, and common voxels times the threshold bound what it may have in
        common, but for the last column.
    contents
        (n,): volumes or areas.
    doubts
        (n,): by how much a common area of StarDist's may exceed the common box of a shape, by rounding.
    """
    points = np.ascontiguousarray(rows["points"], np.int64)
    dist = np.ascontiguousarray(rows["dist"], np.float32)
    if len(rays.faces):
        boxes, volumes = _measured(points, dist, Surface.of(rays))
        return boxes, volumes.astype(np.float64), np.zeros(len(points))
    table = polygons(points, dist, rays)
    boxes = np.stack([table.vertices.min(axis=1), table.vertices.max(axis=1)], axis=1)
    return boxes, table.areas.astype(np.float64), 2 * table.outlines[:, 0] + 2 * table.noise


def _measured(
    points: npt.NDArray[np.int64], dist: npt.NDArray[np.float32], surface: Surface
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    boxes, volumes = np.empty((len(points), 2, 3), np.int64), np.empty(len(points), np.float32)
    boxes_and_volumes(points, dist, surface, boxes, volumes)
    return boxes, volumes


def _solids(points: npt.NDArray[np.int64], dist: npt.NDArray[np.float32], rays: Rays) -> tuple[Queue, Solids]:
    surface = Surface.of(rays)
    boxes, volumes = _measured(points, dist, surface)
    return Queue.of(points, boxes), Solids(surface, dist, volumes, empty_pair(surface))


def _ask_stardist(
    row: int,
    others: npt.NDArray[np.int64],
    candidates: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], Rays],
    nms_thresh: float,
) -> npt.NDArray[np.int64]:
    """Return which of `others`, worse rows in canonical order, StarDist's routine says that `row` suppresses.

    Polyhedra are put to it in pairs, because its bounds depend on what else is in a table. Polygons are put to it
    together: those that it keeps, `row` does not suppress, and the first that it drops, `row` does. What it drops
    behind one that it keeps is put to it again, without that one.
    """
    dist, points, rays = candidates
    if len(rays.faces):
        return others[[_dropped([row, other], dist, points, rays, nms_thresh)[1] for other in others]]
    suppressed = []
    while len(others):
        dropped = _dropped([row, *others], dist, points, rays, nms_thresh)[1:]
        first_kept = len(others) if dropped.all() else int(dropped.argmin())
        suppressed.append(others[:first_kept])
        others = others[first_kept:][dropped[first_kept:]]
    return np.concatenate(suppressed)


def _dropped(
    rows: list[int],
    dist: npt.NDArray[np.float32],
    points: npt.NDArray[np.int64],
    rays: Rays,
    nms_thresh: float,
) -> npt.NDArray[np.bool_]:
    """Return which of `rows`, in canonical order, StarDist's routine drops if these are all there are."""
    where, scores = points[rows].astype(np.float32), np.arange(len(rows), 0, -1, dtype=np.float32)
    nms = library().nms
    if len(rays.faces):
        kept = nms.non_maximum_suppression_3d_inds(
            dist[rows], where, rays, scores, thresh=nms_thresh, use_kdtree=False, verbose=0
        )
    else:
        kept = nms.non_maximum_suppression_inds(
            dist[rows], where, scores, thresh=nms_thresh, use_kdtree=False, verbose=0
        )
    return np.asarray(~kept)


@compiled
def _turn_of_solids(begin: int, queue: Queue, solids: Solids, thresh: float, exact: bool) -> tuple[int, int]:
    """Let candidates from `begin` on take their turn, up to one that has undecided pairs.

    Returns
    -------
    row, n_undecided
        That candidate, and how many of `queue.found` are undecided; or the number of candidates, and 0.
    """
    mask = np.empty(0, np.bool_)
    both = np.empty((2, 2, 3), np.int64)
    pair, surface = solids.pair, solids.surface
    for i in range(begin, len(queue.waiting)):
        if queue.waiting[i] == 0:
            continue
        queue.waiting[i] = 0
        queue.survives[i] = True
        n_undecided, placed = 0, False
        _copy_box(queue.where.boxes[i], both[0])
        for k in range(meeting(i, queue.where, queue.waiting, queue.found)):
            j = queue.found[k]
            _copy_box(queue.where.boxes[j], both[1])
            smaller = np.float64(min(solids.volumes[i], solids.volumes[j])) + 1e-10
            limit = thresh * smaller
            verdict = _by_boxes(limit, both, pair.window, exact) if thresh < 1 or not exact else KEEP
            if verdict == SUPPRESS:
                if not placed:
                    place(pair.first, surface, queue.where.points[i], solids.dist[i])
                    mask = _rendered(mask, both[0], pair, surface)
                    placed = True
                place(pair.second, surface, queue.where.points[j], solids.dist[j])
                if exact:
                    verdict = as_stardist(limit, smaller, mask, both, pair, surface)
                else:
                    verdict = by_voxels(limit, mask, both[0], pair, surface)
            if verdict == SUPPRESS:
                queue.waiting[j] = 0
            elif verdict == UNDECIDED:
                queue.found[n_undecided] = j
                n_undecided += 1
        if n_undecided:
            return i, n_undecided
    return len(queue.waiting), 0


@part
def _copy_box(box: npt.NDArray[np.int64], copy: npt.NDArray[np.int64]) -> None:
    """Do ``copy[:] = box``, which takes a second to compile."""
    for axis in range(3):
        copy[0, axis], copy[1, axis] = box[0, axis], box[1, axis]


@part
def _by_boxes(limit: float, boxes: npt.NDArray[np.int64], window: npt.NDArray[np.int64], exact: bool) -> int:
    """Return `SUPPRESS` if two polyhedra may suppress each other by their boxes, whose common part is the `window`.

    StarDist multiplies differences of rounded corners. Common voxels are one more along each axis.
    """
    product = 1.0
    for axis in range(3):
        window[0, axis] = max(boxes[0, 0, axis], boxes[1, 0, axis])
        window[1, axis] = min(boxes[0, 1, axis], boxes[1, 1, axis])
        product *= window[1, axis] - window[0, axis] + (0 if exact else 1)
    if product == 0 or product < limit * (1 - _ROUNDING):
        return KEEP
    return UNDECIDED if exact and product <= limit * (1 + _ROUNDING) else SUPPRESS


@part
def _rendered(
    mask: npt.NDArray[np.bool_], box: npt.NDArray[np.int64], pair: Pair, surface: Surface
) -> npt.NDArray[np.bool_]:
    """Return the voxels of the pair's first polyhedron, in `mask` if it is large enough."""
    size = (box[1, 0] - box[0, 0] + 1) * (box[1, 1] - box[0, 1] + 1) * (box[1, 2] - box[0, 2] + 1)
    if size > len(mask):
        mask = np.empty(size, np.bool_)
    fill(mask, box, pair.first, surface)
    pair.n_first_hull[0] = -1
    return mask


@compiled
def _turn_of_polygons(
    begin: int, queue: Queue, table: Polygons, thresh: float, exact: bool
) -> tuple[int, int]:
    """As `_turn_of_solids`."""
    boxes = queue.where.boxes
    for i in range(begin, len(queue.waiting)):
        if queue.waiting[i] == 0:
            continue
        queue.waiting[i] = 0
        queue.survives[i] = True
        n_undecided = 0
        for k in range(meeting(i, queue.where, queue.waiting, queue.found)):
            j = queue.found[k]
            first, last = max(boxes[i, 0, 1], boxes[j, 0, 1]), min(boxes[i, 1, 1], boxes[j, 1, 1])
            width = min(boxes[i, 1, 2], boxes[j, 1, 2]) - max(boxes[i, 0, 2], boxes[j, 0, 2])
            limit = thresh * (np.float64(min(table.areas[i], table.areas[j])) + 1e-10)
            doubt = uncertainty(i, j, table, boxes) if exact else 0.0
            if width == 0 or first == last or width * (last - first) < limit - doubt:
                continue
            area = common_area(i, j, table, first, last)
            if exact and abs(area - limit) <= doubt:
                queue.found[n_undecided] = j
                n_undecided += 1
            elif area > limit:
                queue.waiting[j] = 0
        if n_undecided:
            return i, n_undecided
    return len(queue.waiting), 0

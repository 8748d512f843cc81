"""Star-convex objects: candidates from a network's output, and which of them survive.

A *candidate* is a point of the network's prediction grid with a score and one distance per ray. Candidates
live in tables, mappings of arrays with one row per candidate:

``prob``
    float32 (n,): score.
``dist``
    float32 (n, n_rays): distances along the rays, in units of the rays' direction vectors.
``points``
    int64 (n, ndim): centre in voxels of the volume.

Of two candidates that overlap by more than a threshold, the one with the better score survives. Taken in a
total order (score descending, then position), greedy suppression has one result, whatever the order of the
rows::

    survives(j)  =  no surviving i before j in the order has  overlap(i, j) > nms_thresh

The overlap is StarDist's, computed by its own C++ routine, in the coordinates of the volume: translated
coordinates round differently in float32, so only these give every block the same answer about a pair, and
the answer of StarDist on the whole volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from chunkrestore.grid import Slices

Rows = Mapping[str, np.ndarray]
"""A candidate table (see above)."""

BORDER = 2
"""Points of the prediction grid that StarDist ignores at each face of the (padded) volume."""

SMALLEST_DIST = np.float32(1e-3)
"""StarDist's lower limit for distances; flatter shapes are degenerate for Qhull."""

_STEP_ELEMENTS = 2**18
"""Shapes times faces whose bounds are computed together: temporaries of some 20 MiB."""

SLACK = 3
"""Voxels by which StarDist's rounding of vertices to integers may bring two shapes closer together."""


@dataclass(frozen=True, eq=False)
class Rays:
    """Directions in which a network measures distances, and the surface that they span."""

    vertices: np.ndarray
    """(n_rays, ndim): direction vectors; float64 in 2-D and float32 in 3-D, as StarDist computes with them."""
    faces: np.ndarray
    """int32 (n_faces, 3): triangles of ray indices that span a polyhedron; empty for polygons."""

    @classmethod
    def of(cls, config: Any) -> Rays:
        """Return the rays of a StarDist model.

        Parameters
        ----------
        config
            Attributes as in StarDist's ``Config2D`` and ``Config3D``: ``n_dim``, ``n_rays``, ``rays_json``.

        Raises
        ------
        ValueError
            If StarDist has no rays of that name.
        """
        if config.n_dim == 2:
            angles = np.linspace(0, 2 * np.pi, config.n_rays, endpoint=False)
            return cls(np.stack([np.sin(angles), np.cos(angles)], axis=-1), np.empty((0, 3), np.int32))
        from stardist import rays3d

        name, parameters = config.rays_json["name"], config.rays_json["kwargs"]
        kind = getattr(rays3d, name, None)
        if not (isinstance(kind, type) and issubclass(kind, rays3d.Rays_Base)):
            raise ValueError(f"`rays_json` names {name!r}, which is not one of StarDist's rays")
        rays = kind(**parameters)
        return cls(rays.vertices.astype(np.float32), rays.faces.astype(np.int32))

    def __len__(self) -> int:
        return len(self.vertices)

    def radii(self, dist: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return for each row of `dist` (n, n_rays) the radius around its point that encloses its shape."""
        lengths = np.linalg.norm(self.vertices.astype(np.float64), axis=-1)
        return (dist * lengths).max(axis=-1, initial=0.0)

    def outlines(
        self, dist: npt.NDArray[np.float32], points: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the vertices of each row's shape in the volume, float32 (n, n_rays, ndim), as StarDist's."""
        relative = (dist[..., np.newaxis] * self.vertices).astype(np.float32)
        return relative + points[:, np.newaxis].astype(np.float32)


def candidates(
    prob: npt.NDArray[np.float32],
    dist: npt.NDArray[np.float32],
    prob_thresh: float,
    *,
    grid: Sequence[int],
    origin: Sequence[int],
    core: Slices,
    padded_shape: Sequence[int],
) -> dict[str, np.ndarray]:
    """Return the candidates whose points lie in `core`, exactly as StarDist finds them in the volume.

    Parameters
    ----------
    prob
        Scores of a read region on the prediction grid.
    dist
        Distances, same shape with a trailing axis of rays.
    prob_thresh
        Candidates score more than this.
    grid
        Voxels per point of the prediction grid.
    origin
        First voxel of the read region; a multiple of `grid`.
    core
        Region whose candidates are wanted; any borders.
    padded_shape
        Shape of the volume as StarDist pads it (multiples of `grid`).

    Returns
    -------
    dict
        Candidate table, in raster order.
    """
    first = [max(-(-c.start // g), BORDER) for c, g in zip(core, grid, strict=True)]
    stop = [
        min(-(-c.stop // g), n // g - BORDER) for c, g, n in zip(core, grid, padded_shape, strict=True)
    ]
    shift = [o // g for o, g in zip(origin, grid, strict=True)]
    window = tuple(slice(a - s, max(a, b) - s) for a, b, s in zip(first, stop, shift, strict=True))
    found = np.nonzero(prob[window] > prob_thresh)
    return {
        "prob": prob[window][found],
        "dist": np.maximum(SMALLEST_DIST, dist[window][found]),
        "points": (np.stack(found, axis=-1) + first) * np.asarray(grid, np.int64),
    }


def canonical_order(rows: Rows) -> npt.NDArray[np.intp]:
    """Return the row numbers by score descending, then by position: no two rows are equal."""
    return np.lexsort((*rows["points"].T[::-1], -rows["prob"]))


def ranks(rows: Rows) -> npt.NDArray[np.int64]:
    """Return the position of each row in the canonical order."""
    rank = np.empty(len(rows["prob"]), np.int64)
    rank[canonical_order(rows)] = np.arange(len(rank))
    return rank


def suppress(rows: Rows, rays: Rays, nms_thresh: float) -> npt.NDArray[np.bool_]:
    """Return which rows survive greedy suppression among themselves, by StarDist's C++ routine.

    Parameters
    ----------
    rows
        Candidate table.
    rays
        Rays of the distances.
    nms_thresh
        Largest share of the smaller shape that two survivors may have in common.

    Returns
    -------
    numpy.ndarray
        bool (n,).

    Notes
    -----
    In 3-D the routine's first, cheap bounds on an overlap use the mean proportions of all shapes in the
    table. They bound the true overlap for any proportions, so what else is in a table does not matter, but
    for rounding where a bound lies within it of `nms_thresh`.
    """
    from stardist.nms import non_maximum_suppression_3d_inds, non_maximum_suppression_inds

    n = len(rows["prob"])
    if n < 2:
        return np.ones(n, bool)
    order = canonical_order(rows)
    # The routines know scores by their order only; ranks are free of ties (and exact up to 2**24 rows).
    scores = np.arange(n, 0, -1, dtype=np.float32)
    dist, points = rows["dist"][order], rows["points"][order].astype(np.float32)
    if len(rays.faces):
        survives = non_maximum_suppression_3d_inds(dist, points, rays, scores, thresh=nms_thresh, verbose=0)
    else:
        # Its tree leaves out pairs beyond a distance that depends on the largest polygon in the table.
        survives = non_maximum_suppression_inds(
            dist, points, scores, thresh=nms_thresh, use_kdtree=False, verbose=0
        )
    result = np.empty(n, bool)
    result[order] = survives
    return result


def settle(own: Rows, others: Rows, rays: Rays, nms_thresh: float) -> npt.NDArray[np.bool_]:
    """Decide a block's candidates again in the light of what survives around it.

    Parameters
    ----------
    own
        The block's candidates, with ``kept0``: which of them survive among themselves.
    others
        Present survivors of other blocks; those out of touch are ignored.
    rays, nms_thresh
        As for `suppress`.

    Returns
    -------
    numpy.ndarray
        bool (n_own,): every own row survives if and only if no better surviving row, own or other,
        suppresses it.

    Notes
    -----
    Call a row *consistent* if it stands when no better standing row suppresses it, and has fallen when one
    does. At first only others that are better than a standing own row which they touch can upset an own
    row; they count as not there yet, and as *open*. One pass decides together the open rows and all standing
    rows that touch them. After it all those rows are consistent:

    - an open row, because every standing row that can suppress it took part;
    - a row that stood, because those standing rows that took no part did not suppress it before either.

    Rows that took no part can become inconsistent in one way: their suppressor stood, and fell. Fallen
    rows that are touched by, and worse than, one that fell now are open for the next pass. A row falls
    because of a better open row, so the best open row gets worse with every pass, and the loop ends.

    Rounds over all blocks: if all rows better than ``j`` are decided as on the whole volume, so is ``j`` in
    the next round and in all that follow. By induction over the order, rounds reach the one result of greedy
    suppression on the whole volume, and a round without changes is that result.
    """
    kept0 = own["kept0"]
    if not len(kept0) or not len(others.get("prob", ())):
        return kept0.copy()
    n_own = len(kept0)
    rows = _join(own, _in_touch(own, others, rays))
    rank, shapes = ranks(rows), _Shapes.of(rows, rays, nms_thresh)
    stands = np.concatenate([kept0, np.ones(len(rank) - n_own, bool)])
    is_own = np.arange(len(rank)) < n_own
    open_rows, threatened = shapes.pairs(np.flatnonzero(~is_own), np.flatnonzero(stands & is_own))
    open_rows = np.unique(open_rows[rank[open_rows] < rank[threatened]])
    while len(open_rows):
        stands[open_rows] = False
        near = np.unique(shapes.pairs(open_rows, np.flatnonzero(stands))[1])
        part = np.concatenate([open_rows, near])
        survives = suppress({key: column[part] for key, column in rows.items()}, rays, nms_thresh)
        # No open row can make a better one fall; said explicitly, the loop ends even if rounding errs.
        survives |= rank[part] < rank[open_rows].min()
        stands[part] = survives
        fell = near[~survives[len(open_rows) :]]
        took_part = np.zeros(len(rank), bool)
        took_part[part] = True
        cause, freed = shapes.pairs(fell, np.flatnonzero(~stands & ~took_part))
        open_rows = np.unique(freed[rank[freed] > rank[cause]])
    return stands[:n_own]


def _join(own: Rows, others: Rows) -> dict[str, np.ndarray]:
    return {key: np.concatenate([own[key], others[key]]) for key in ("prob", "dist", "points")}


def _in_touch(own: Rows, others: Rows, rays: Rays) -> dict[str, np.ndarray]:
    """Return those of `others` that come near the box around all own points."""
    points = own["points"]
    outside = np.maximum(points.min(axis=0) - others["points"], others["points"] - points.max(axis=0))
    distance = np.linalg.norm(np.maximum(outside, 0), axis=-1)
    near = distance <= rays.radii(others["dist"]) + rays.radii(own["dist"]).max() + SLACK
    return {key: column[near] for key, column in others.items()}


@dataclass(frozen=True, eq=False)
class _Shapes:
    """Bounds on the shapes of a table, and which pairs of shapes they allow to suppress each other."""

    points: npt.NDArray[np.int64]
    radii: npt.NDArray[np.float64]
    boxes: npt.NDArray[np.float64]
    """(n, 2, ndim): first and last corner, rounded as StarDist rounds them."""
    contents: npt.NDArray[np.float64]
    """Volumes or areas."""
    nms_thresh: float

    @classmethod
    def of(cls, rows: Rows, rays: Rays, nms_thresh: float) -> _Shapes:
        step = max(1, _STEP_ELEMENTS // max(len(rays.faces), len(rays)))
        bounds = [
            _bounds(rays, rows["dist"][i : i + step], rows["points"][i : i + step])
            for i in range(0, len(rows["dist"]), step)
        ]
        boxes, contents = (np.concatenate(parts) for parts in zip(*bounds, strict=True))
        return cls(rows["points"], rays.radii(rows["dist"]), boxes, contents, nms_thresh)

    def pairs(
        self, rows: npt.NDArray[np.intp], among: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return all pairs of one of `rows` and one of `among` that may overlap by more than the threshold."""
        if not len(rows) or not len(among):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        tree = cKDTree(self.points[among])
        limits = self.radii[rows] + self.radii[among].max() + SLACK
        found = tree.query_ball_point(self.points[rows], limits, return_sorted=False)
        a = np.repeat(rows, [len(near) for near in found])
        b = among[np.concatenate([np.asarray(near, np.intp) for near in found])]
        common = np.minimum(self.boxes[a, 1], self.boxes[b, 1]) - np.maximum(self.boxes[a, 0], self.boxes[b, 0])
        largest = np.maximum(common, 0).prod(axis=-1)
        possible = largest >= 0.999 * self.nms_thresh * np.minimum(self.contents[a], self.contents[b])
        return a[possible], b[possible]


def _bounds(
    rays: Rays, dist: npt.NDArray[np.float32], points: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return boxes and contents of shapes, as far as StarDist's decisions depend on them.

    In 3-D it never suppresses a pair whose boxes, with corners rounded to integers, have no more than the
    threshold in common. In 2-D it cuts vertices to integers and computes the overlap of what results.
    """
    outlines = rays.outlines(dist, points)
    if len(rays.faces):
        boxes = np.stack([np.rint(outlines.min(axis=1)), np.rint(outlines.max(axis=1))], axis=1)
        a, b, c = np.moveaxis((dist[..., np.newaxis] * rays.vertices)[:, rays.faces].astype(np.float64), 2, 0)
        return boxes.astype(np.float64), np.abs((np.cross(b, c) * a).sum(axis=(1, 2))) / 6
    vertices = np.trunc(outlines.astype(np.float64))
    boxes = np.stack([vertices.min(axis=1), vertices.max(axis=1) + 1], axis=1)
    (y, x), (y1, x1) = np.moveaxis(vertices, 2, 0), np.moveaxis(np.roll(vertices, -1, axis=1), 2, 0)
    return boxes, np.abs((x * y1 - y * x1).sum(axis=-1)) / 2

"""Which star-convex candidates survive when some of their rivals belong to other blocks.

A block decides about its own candidates, knowing only which candidates of its neighbours survive at present.
Repeated over all blocks until nothing changes, that is greedy suppression on the whole volume; repeated work
is confined to candidates that a changed decision can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from chunkrestore.kernels.star_convex import Rays, Rows, ranks, suppress

_STEP_ELEMENTS = 2**18
"""Shapes times faces whose bounds are computed together: temporaries of some 20 MiB."""

SLACK = 3
"""Voxels by which StarDist's rounding of vertices to integers may bring two shapes closer together."""


def settle(own: Rows, others: Rows, rays: Rays, nms_thresh: float) -> npt.NDArray[np.bool_]:
    """Decide a block's candidates again in the light of what survives around it.

    Parameters
    ----------
    own
        The block's candidates, with ``kept0``: which of them survive among themselves.
    others
        Present survivors of other blocks; those out of reach are ignored.
    rays, nms_thresh
        As for `suppress`.

    Returns
    -------
    numpy.ndarray
        bool (n_own,): every own row survives if and only if no better surviving row, own or other,
        suppresses it.

    Notes
    -----
    Call a row *consistent* if it stands and no better standing row suppresses it, or has fallen and one
    does. At first only others that are better than a standing own row and may suppress it can upset an own
    row; they count as not there yet, and as *open*. One pass decides together the open rows and all
    standing rows that may overlap them. After it all those rows are consistent:

    - an open row, because every standing row that can suppress it took part;
    - a row that stood, because the standing rows that took no part did not suppress it before either.

    A row that took no part becomes inconsistent in one way only: its suppressor stood, and fell. Fallen rows
    that are worse than one that fell now, and that it may have suppressed, are open for the next pass. Only
    a better open row makes a row fall, so the best open row gets worse with every pass, and the loop ends.

    Rounds over all blocks: once all rows better than ``j`` are decided as on the whole volume, so is ``j``,
    in the next round and in all that follow. By induction over the order, rounds reach the one result of
    greedy suppression on the whole volume, and a round without changes is that result.

    The work is about one call of the overlap routine per candidate of an object that falls: a share of the
    first decision that shrinks as blocks grow.
    """
    kept0 = own["kept0"]
    if not len(kept0) or not len(others.get("prob", ())):
        return kept0.copy()
    rows = _join(own, _in_reach(own, others, rays))
    rank, shapes = ranks(rows), _Shapes.of(rows, rays, nms_thresh)
    is_own = np.arange(len(rank)) < len(kept0)
    stands = ~is_own
    stands[is_own] = kept0
    arriving, threatened = shapes.pairs(np.flatnonzero(~is_own), np.flatnonzero(stands & is_own))
    open_rows = np.unique(arriving[rank[arriving] < rank[threatened]])
    stands[open_rows] = False
    while len(open_rows):
        near = np.unique(shapes.pairs(open_rows, np.flatnonzero(stands))[1])
        part = np.concatenate([open_rows, near])
        survives = suppress({key: column[part] for key, column in rows.items()}, rays, nms_thresh)
        # Only a better open row makes a row fall: said explicitly, the loop ends even if rounding errs.
        survives |= rank[part] < rank[open_rows].min()
        stands[part] = survives
        fell = near[~survives[len(open_rows) :]]
        bystander = ~stands
        bystander[part] = False
        cause, freed = shapes.pairs(fell, np.flatnonzero(bystander))
        open_rows = np.unique(freed[rank[freed] > rank[cause]])
    return stands[is_own]


def _join(own: Rows, others: Rows) -> dict[str, np.ndarray]:
    return {key: np.concatenate([own[key], others[key]]) for key in ("prob", "dist", "points")}


def _in_reach(own: Rows, others: Rows, rays: Rays) -> dict[str, np.ndarray]:
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
        common = np.minimum(self.boxes[a, 1], self.boxes[b, 1]) - np.maximum(
            self.boxes[a, 0], self.boxes[b, 0]
        )
        largest = np.maximum(common, 0).prod(axis=-1)
        # 2 % for StarDist's sums in float32.
        possible = largest >= 0.98 * self.nms_thresh * np.minimum(self.contents[a], self.contents[b])
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

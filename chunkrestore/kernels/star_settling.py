"""Which star-convex candidates survive when some of their rivals belong to other blocks.

A block decides about its own candidates, knowing only which candidates of its neighbours survive at present.
Repeated over all blocks until nothing changes, that is greedy suppression on the whole volume; repeated work
is confined to candidates that a changed decision can reach.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled
from chunkrestore.kernels.star_convex import Rays, Rows, ranks
from chunkrestore.kernels.star_neighbours import Neighbourhood, meeting, neighbourhood
from chunkrestore.kernels.star_suppression import Mode, extents, suppress

SLACK = 3
"""Voxels by which StarDist's rounding of vertices to integers may bring two shapes closer together."""


def settle(
    own: Rows, others: Rows, rays: Rays, nms_thresh: float, mode: Mode = "exact"
) -> npt.NDArray[np.bool_]:
    """Decide a block's candidates again in the light of what survives around it.

    Parameters
    ----------
    own
        The block's candidates, with ``kept0``: which of them survive among themselves.
    others
        Present survivors of other blocks; those out of reach are ignored.
    rays, nms_thresh, mode
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
        survives = suppress({key: column[part] for key, column in rows.items()}, rays, nms_thresh, mode)
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

    where: Neighbourhood
    contents: npt.NDArray[np.float64]
    """(n,): volumes or areas."""
    doubts: npt.NDArray[np.float64]
    """(n,): by how much more than its box in common with another one StarDist may find."""
    nms_thresh: float

    @classmethod
    def of(cls, rows: Rows, rays: Rays, nms_thresh: float) -> _Shapes:
        boxes, contents, doubts = extents(rows, rays)
        return cls(neighbourhood(rows["points"], boxes), contents, doubts, nms_thresh)

    def pairs(
        self, rows: npt.NDArray[np.intp], among: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return all pairs of one of `rows` and one of `among` that may overlap by more than the threshold."""
        if not len(rows) or not len(among):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        wanted = np.zeros(len(self.contents), np.int64)
        wanted[among] = 1
        found = _possible(rows, wanted, self.where, self.contents, self.doubts, self.nms_thresh)
        return found[:, 0], found[:, 1]


@compiled
def _possible(
    rows: npt.NDArray[np.intp],
    wanted: npt.NDArray[np.int64],
    where: Neighbourhood,
    contents: npt.NDArray[np.float64],
    doubts: npt.NDArray[np.float64],
    nms_thresh: float,
) -> npt.NDArray[np.intp]:
    """Return the pairs (m, 2) of one of `rows` and one of the `wanted` whose boxes leave room for suppression."""
    pairs, n = np.empty((4 * len(rows) + 64, 2), np.intp), 0
    near = np.empty(len(wanted), np.int64)
    for row in rows:
        n_near = meeting(row, where, wanted, near)
        if n + n_near > len(pairs):
            larger = np.empty((2 * (n + n_near), 2), np.intp)
            for k in range(n):
                larger[k, 0], larger[k, 1] = pairs[k, 0], pairs[k, 1]
            pairs = larger
        for other in near[:n_near]:
            room = 1.0
            for axis in range(3):
                first = max(where.boxes[row, 0, axis], where.boxes[other, 0, axis])
                last = min(where.boxes[row, 1, axis], where.boxes[other, 1, axis])
                # Voxels, which are one more than the steps between them that StarDist counts.
                room *= last - first + 1
            # 2 % for sums in float32.
            least = 0.98 * nms_thresh * min(contents[row], contents[other])
            if room + max(doubts[row], doubts[other]) >= least:
                pairs[n, 0], pairs[n, 1] = row, other
                n += 1
    return pairs[:n]

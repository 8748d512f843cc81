"""Star-convex objects: candidates from a network's output, and which of them survive.

A *candidate* is a point of the network's prediction grid with a score and one distance per ray. Candidates
live in tables, mappings of arrays with one row per candidate:

``prob``
    float32 (n,): score.
``dist``
    float32 (n, n_rays): distances along the rays, in units of the rays' direction vectors.
``points``
    int64 (n, ndim): centre in voxels of the volume.
``class_prob``
    float32 (n, n_classes + 1): probabilities of background and of each class, of networks that know classes.

Of two candidates that overlap by more than a threshold, the one with the better score survives. Taken in a
total order (score descending, then position), greedy suppression has one result, whatever the order of the
rows::

    survives(j)  =  no surviving i before j in the order has  overlap(i, j) > nms_thresh

The overlap is StarDist's (`chunkrestore.kernels.star_verdict`), in the coordinates of the volume: translated
coordinates round differently in float32, so only these give every block the same answer about a pair, and
the answer of StarDist on the whole volume.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block

Rows = Mapping[str, np.ndarray]
"""A candidate table (see above)."""

BORDER = 2
"""Points of the prediction grid that StarDist ignores at each face of the (padded) volume."""

SMALLEST_DIST = np.float32(1e-3)
"""StarDist's lower limit for distances; flatter shapes are degenerate for Qhull."""


def library() -> Any:
    """Import StarDist and return it; everything here that needs it comes through this function.

    StarDist's routines enter an OpenMP region per surviving candidate. By default the threads spin between
    regions, which on busy cores (other tasks of a worker, other workers) made suppression 20 times slower;
    ``OMP_WAIT_POLICY=passive`` lets them sleep. It has an effect if set before StarDist is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import stardist

    return stardist


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
        rays3d = library().rays3d
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


def own_points(block: Block, grid: Sequence[int], padded_shape: Sequence[int]) -> tuple[range, ...]:
    """Return, per axis, the voxels of the prediction grid's points that lie in a block's core.

    Parameters
    ----------
    block
        Any core; the read region begins on multiples of `grid`.
    grid
        Voxels per point of the prediction grid.
    padded_shape
        Shape of the volume as StarDist pads it (multiples of `grid`): near its faces it ignores points.
    """
    points = []
    for core, g, n in zip(block.core, grid, padded_shape, strict=True):
        first, stop = max(-(-core.start // g), BORDER), min(-(-core.stop // g), n // g - BORDER)
        points.append(range(first * g, max(first, stop) * g, g))
    return tuple(points)


def at_points(output: np.ndarray, points: Sequence[range], origin: Sequence[int]) -> np.ndarray:
    """Return a network's output at some points of its grid.

    Parameters
    ----------
    output
        Output for a read region, spatial axes first.
    points
        Voxels per axis, as of `own_points`.
    origin
        First voxel of the read region.
    """
    starts = [(p.start - o) // p.step for p, o in zip(points, origin, strict=True)]
    return output[tuple(slice(a, a + len(p)) for a, p in zip(starts, points, strict=True))]


def candidate_table(
    mask: npt.NDArray[np.bool_],
    points: Sequence[range],
    prob: npt.NDArray[np.float32],
    dist: npt.NDArray[np.float32],
    class_prob: npt.NDArray[np.float32] | None = None,
) -> dict[str, np.ndarray]:
    """Return the candidates among a block's points, with the values that StarDist gives them.

    Parameters
    ----------
    mask
        Which of the points are candidates.
    points
        Where they are, as of `own_points`.
    prob
        Scores, shape of `mask`.
    dist
        Distances, with a trailing axis of rays.
    class_prob
        Probabilities of background and classes, with a trailing axis; None for a network without classes.

    Returns
    -------
    dict
        Candidate table, in raster order; with ``class_prob`` if given.
    """
    found = np.nonzero(mask)
    first, step = np.array([[p.start, p.step] for p in points], np.int64).T
    table = {
        "prob": prob[found],
        "dist": np.maximum(SMALLEST_DIST, dist[found]),
        "points": np.stack(found, axis=-1) * step + first,
    }
    return table if class_prob is None else table | {"class_prob": class_prob[found]}


def canonical_order(rows: Rows) -> npt.NDArray[np.intp]:
    """Return the row numbers by score descending, then by position: no two rows are equal."""
    return np.lexsort((*rows["points"].T[::-1], -rows["prob"]))


def ranks(rows: Rows) -> npt.NDArray[np.int64]:
    """Return the position of each row in the canonical order."""
    rank = np.empty(len(rows["prob"]), np.int64)
    rank[canonical_order(rows)] = np.arange(len(rank))
    return rank

"""Directions from a star-convex object's point, sorted into cells, and the faces that each cell can meet.

Whether a voxel lies in a polyhedron then takes a look at two or three faces instead of all. Imported inside
functions only: this module loads numba.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled
from chunkrestore.kernels.star_convex import Rays

TURN = 0.01
"""Angle by which rounding to float32 in the volume may turn a ray (2**-8 voxels at coordinates near 10**5)."""

CELLS = 24
"""Directions are sorted into 6 * CELLS**2 cells, of 4 degrees: smaller than the faces of usual rays."""


@compiled
def cell_of(dz: float, dy: float, dx: float) -> int:
    """Return the cell that a direction points to, on the surface of a cube around the origin."""
    az, ay, ax = abs(dz), abs(dy), abs(dx)
    if az >= ay and az >= ax:
        axis, along, second, third = 0, dz, dy, dx
    elif ay >= ax:
        axis, along, second, third = 1, dy, dx, dz
    else:
        axis, along, second, third = 2, dx, dz, dy
    scale = (CELLS / 2) / max(abs(along), 1e-9)
    u = min(int(second * scale + CELLS / 2), CELLS - 1)
    v = min(int(third * scale + CELLS / 2), CELLS - 1)
    return ((2 * axis + (along < 0)) * CELLS + u) * CELLS + v


@lru_cache(maxsize=16)
def faces_by_direction(rays: Rays) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the faces that each cell of directions can meet, for any distances.

    The planes through the point and two corners of a face depend on directions alone. A cell misses a face
    if all its corners lie outside one of these planes.

    Returns
    -------
    starts, faces
        Faces of cell ``i``: ``faces[starts[i] : starts[i + 1]]``.
    """
    a, b, c = (rays.vertices[rays.faces[:, k]].astype(np.float64) for k in range(3))
    normals = [np.cross(one, other) for one, other in ((b, a), (c, b), (a, c))]
    normals = [n / np.linalg.norm(n, axis=-1, keepdims=True) for n in normals]
    edges = np.linspace(-1, 1, CELLS + 1)
    meets = []
    for axis in range(3):
        for sign in (1, -1):
            u, v = np.meshgrid(edges, edges, indexing="ij")
            corners = np.empty((*u.shape, 3))
            corners[..., axis], corners[..., (axis + 1) % 3], corners[..., (axis + 2) % 3] = sign, u, v
            can = np.ones((CELLS, CELLS, len(a)), bool)
            for normal in normals:
                inner = corners @ normal.T >= -TURN
                can &= inner[:-1, :-1] | inner[1:, :-1] | inner[:-1, 1:] | inner[1:, 1:]
            meets.append(can.reshape(-1, len(a)))
    cells, faces = np.nonzero(np.concatenate(meets))
    return np.searchsorted(cells, np.arange(6 * CELLS**2 + 1)), faces

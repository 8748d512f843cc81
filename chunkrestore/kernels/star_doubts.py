"""Voxels of a polyhedron that planes in float64 do not decide: StarDist's own operations, and the convex hull.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import part
from chunkrestore.kernels.star_directions import cell_of
from chunkrestore.kernels.star_inside import FACE, Shapes, Star, beneath, in_cone, offset_of, point_of

OUTSIDE, INSIDE, ASK_HULL = 0, 1, 2


@part
def look_again(shapes: Shapes, star: Star, z: int, y: int, x: int, face: int, has_planes: bool) -> int:
    """Return OUTSIDE, INSIDE or ASK_HULL for a voxel that a face alone does not decide (-1: no face is found)."""
    pz, py, px = point_of(star)
    dz, dy, dx = z - pz, y - py, x - px
    verdict = _look_closely(shapes, star, z, y, x, cell_of(dz, dy, dx) if has_planes else -1)
    if verdict == ASK_HULL and face >= 0:
        verdict = _guess_hull(star, face, dz, dy, dx)
    return verdict


@part
def _look_closely(shapes: Shapes, star: Star, z: int, y: int, x: int, cell: int) -> int:
    """Return what `look_again` returns, by StarDist's float32 operations on the faces of a cell (-1: all)."""
    corners, faces = star.corners, shapes.faces
    point = len(corners) - 1
    vz, vy, vx = np.float32(z), np.float32(y), np.float32(x)
    first, stop = (0, len(faces)) if cell < 0 else (shapes.starts[cell], shapes.starts[cell + 1])
    on_a_face = False
    for n in range(first, stop):
        face = n if cell < 0 else shapes.listed[n]
        i, j, k = faces[face, 0], faces[face, 1], faces[face, 2]
        side, a, b, c = 0, i, j, k
        while side < 4 and _in_half_space(corners, vz, vy, vx, a, b, c):
            # The face, then the sides through the point: (point, j, i), (point, k, j), (point, i, k).
            a, b, c = point, (j, k, i)[min(side, 2)], (i, j, k)[min(side, 2)]
            side += 1
        if side == 4:
            if _depth(corners, z, y, x, i, j, k) > star.limits[1]:
                return INSIDE
            on_a_face = True
    for n in range(len(faces)):
        if not _behind(corners, vz, vy, vx, faces[n, 0], faces[n, 1], faces[n, 2]):
            return ASK_HULL if on_a_face else OUTSIDE
    return INSIDE


@part
def _in_half_space(
    corners: npt.NDArray[np.float32], z: np.float32, y: np.float32, x: np.float32, i: int, j: int, k: int
) -> bool:
    """Return whether a voxel is on the inner side of the plane through three corners; float32 as StarDist."""
    az, ay, ax = corners[i, 0], corners[i, 1], corners[i, 2]
    m00, m01, m02 = corners[j, 0] - az, corners[j, 1] - ay, corners[j, 2] - ax
    m10, m11, m12 = corners[k, 0] - az, corners[k, 1] - ay, corners[k, 2] - ax
    m20, m21, m22 = z - az, y - ay, x - ax
    determinant = (
        m00 * (m11 * m22 - m21 * m12) - m01 * (m10 * m22 - m12 * m20) + m02 * (m10 * m21 - m11 * m20)
    )
    return bool(determinant >= 0)


@part
def _behind(
    corners: npt.NDArray[np.float32], z: np.float32, y: np.float32, x: np.float32, i: int, j: int, k: int
) -> bool:
    """Return whether a voxel is behind the plane of a face; plane in float32 and sums in float64."""
    az, ay, ax = corners[i, 0], corners[i, 1], corners[i, 2]
    pz, py, px = corners[j, 0] - az, corners[j, 1] - ay, corners[j, 2] - ax
    qz, qy, qx = corners[k, 0] - az, corners[k, 1] - ay, corners[k, 2] - ax
    nz, ny, nx = -(py * qx - px * qy), -(px * qz - pz * qx), -(pz * qy - py * qz)
    offset = -(az * nz + ay * ny + ax * nx)
    total = np.float64(nz) * np.float64(z) + np.float64(ny) * np.float64(y)
    return bool(total + np.float64(nx) * np.float64(x) + np.float64(offset) <= 0)


@part
def _depth(corners: npt.NDArray[np.float32], z: int, y: int, x: int, i: int, j: int, k: int) -> float:
    """Return how far a voxel is beneath a face, times twice the face's area, in float64."""
    az, ay, ax = np.float64(corners[i, 0]), np.float64(corners[i, 1]), np.float64(corners[i, 2])
    pz, py, px = corners[j, 0] - az, corners[j, 1] - ay, corners[j, 2] - ax
    qz, qy, qx = corners[k, 0] - az, corners[k, 1] - ay, corners[k, 2] - ax
    return (py * qx - px * qy) * (z - az) + (px * qz - pz * qx) * (y - ay) + (pz * qy - py * qz) * (x - ax)


@part
def _guess_hull(star: Star, face: int, z: float, y: float, x: float) -> int:
    """Say for a voxel on a face whether it is in the convex hull, or ASK_HULL where Qhull's rounding decides.

    If a corner lies above the face's plane, by a thousandth of a voxel, then the hull has the face, and what
    is just above it, in its interior. If none does, the face is one of the hull's own, and its plane decides.
    """
    planes, corners = star.planes, star.corners
    nz, ny, nx = planes[face, FACE], planes[face, FACE + 1], planes[face, FACE + 2]
    unit = np.sqrt(nz * nz + ny * ny + nx * nx)
    edge = 2.0**-10 * star.limits[2]
    if in_cone(planes, face, z, y, x) < edge:
        return ASK_HULL
    top, height, n_level = int(np.int64(0)), -np.inf, 0
    for k in range(len(corners) - 1):
        oz, oy, ox = offset_of(corners, k)
        above = -beneath(planes, face, oz, oy, ox)
        n_level += abs(above) < 1e-3 * unit
        if above > height:
            top, height = k, above
    depth = beneath(planes, face, z, y, x)
    if height > 1e-3 * unit:
        # The voxel is on the line from that corner to a point of the face.
        share = max(-depth, 0.0) / height
        oz, oy, ox = offset_of(corners, top)
        inner = in_cone(planes, face, z - share * oz, y - share * oy, x - share * ox)
        return INSIDE if inner > edge else ASK_HULL
    if n_level > 3 or abs(depth) < 1e-6 * unit:
        return ASK_HULL
    return INSIDE if depth > 0 else OUTSIDE

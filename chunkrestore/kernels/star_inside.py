"""Which voxels lie inside a star-convex polyhedron: StarDist's answer, in a few operations per voxel.

StarDist's rule for a voxel: it is in the convex hull and in one of the tetrahedra that the faces span with
the point, or in the kernel (behind the planes of all faces); tetrahedra and planes in float32. Here planes in
float64, with bounds on what float32 can make of them, decide all voxels but those within a bound of a plane;
only those take StarDist's own operations (`star_doubts`). The bounds are rigorous, so that the answer is StarDist's.

Everything is computed in the coordinates of the volume, one voxel at a time: a region shows what the whole
volume shows there. Two dimensions are three with one plane, and no faces.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.star_convex import Rays, Rows
from chunkrestore.kernels.star_directions import TURN, faces_by_direction

_STEPS = 16
"""Faces to walk over before the table of directions is asked; a voxel farther takes one, mostly."""

_FAR = 2.0**40
"""Boxes end here: more than any volume, less than any integer's limit."""

_EPS = 2.0**-24
"""Relative error of one float32 operation."""

# Columns of `Star.planes`: three sides, the face, and how far beneath or beyond it no rounding matters.
FACE, _OFFSET, BENEATH, BEYOND, _N_COLUMNS = 9, 12, 13, 14, 15


class Shapes(NamedTuple):
    """A table's shapes, and the surface that all of them share."""

    dist: npt.NDArray[np.float32]
    """(n, n_rays)"""
    points: npt.NDArray[np.float64]
    """(n, 3): where StarDist draws them."""
    vertices: npt.NDArray[np.float64]
    """(n_rays, 3)"""
    stretch: npt.NDArray[np.float64]
    """(3,): factor on polygons; StarDist stretches polyhedra by their rays."""
    faces: npt.NDArray[np.int64]
    """(n_faces, 3); none for polygons."""
    neighbours: npt.NDArray[np.int64]
    """(n_faces, 3): faces across a face's three sides."""
    starts: npt.NDArray[np.int64]
    listed: npt.NDArray[np.int64]
    """Faces per cell of directions (`faces_by_direction`)."""


class Star(NamedTuple):
    """Work space: the one shape that is being looked at."""

    corners: npt.NDArray[np.float32]
    """(n_rays + 1, 3): vertices in the volume, and the point."""
    box: npt.NDArray[np.int64]
    """(2, 3): first voxel of the box around it, and the one past the last; rounded as StarDist does."""
    planes: npt.NDArray[np.float64]
    """(n_faces, 15): as functions of a voxel's offset from the point, positive inside."""
    limits: npt.NDArray[np.float64]
    """(4,): rounding of sides; what counts as on a face; largest offset along an axis; squared radius."""


def shapes_of(rows: Rows, rays: Rays, rescale: Sequence[float] | None = None) -> Shapes:
    """Return the shapes of a table.

    Parameters
    ----------
    rows
        Candidate table.
    rays
        Rays of the distances.
    rescale
        Voxels of the volume per voxel of the lattice that the table's points and distances count in, one per
        axis. Rounded step by step as StarDist does for its option ``scale``.
    """
    ndim = rows["points"].shape[1]
    dist = np.ascontiguousarray(rows["dist"], np.float32)
    points = rows["points"] * np.asarray(rescale if rescale is not None else (1.0,) * ndim, np.float64)
    stretch = np.ones(3)
    if not len(rays.faces):
        stretch[1:] = 1.0 if rescale is None else rescale
        points, vertices = (np.pad(array, ((0, 0), (1, 0))) for array in (points, rays.vertices))
        none, no_faces = np.empty(0, np.int64), np.empty((0, 3), np.int64)
        return Shapes(dist, points, vertices, stretch, no_faces, no_faces, none, none)
    if rescale is not None:
        rays = _rescaled(rays, tuple(rescale))
    points = points.astype(np.float32).astype(np.float64)
    return Shapes(dist, points, rays.vertices.astype(np.float64), stretch, *_surface(rays))


@lru_cache(maxsize=16)
def _rescaled(rays: Rays, rescale: tuple[float, ...]) -> Rays:
    return Rays((rays.vertices * np.asarray(rescale, np.float64)).astype(np.float32), rays.faces)


@lru_cache(maxsize=16)
def _surface(rays: Rays) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the last four fields of `Shapes`."""
    faces = rays.faces.astype(np.int64)
    beside: dict[frozenset[int], list[int]] = {}
    for face, (a, b, c) in enumerate(faces.tolist()):
        for edge in ((a, b), (b, c), (c, a)):
            beside.setdefault(frozenset(edge), []).append(face)
    neighbours = [
        [(set(beside[frozenset(edge)]) - {face} or {face}).pop() for edge in ((a, b), (b, c), (c, a))]
        for face, (a, b, c) in enumerate(faces.tolist())
    ]
    starts, listed = faces_by_direction(rays)
    return faces, np.array(neighbours, np.int64), starts.astype(np.int64), listed.astype(np.int64)


@compiled
def work_space(shapes: Shapes) -> Star:
    """Return room for one shape."""
    return Star(
        np.empty((len(shapes.vertices) + 1, 3), np.float32),
        np.empty((2, 3), np.int64),
        np.empty((len(shapes.faces), _N_COLUMNS), np.float64),
        np.empty(4, np.float64),
    )


@compiled
def take(shapes: Shapes, row: int, star: Star) -> None:
    """Look at shape `row`: its corners in the volume, as StarDist rounds them, and the box around it."""
    corners, n_rays = star.corners, len(shapes.vertices)
    for axis in range(3):
        point = shapes.points[row, axis]
        lower, upper = np.float32(np.inf), np.float32(-np.inf)
        for k in range(n_rays):
            # Rounding a float64 result to float32 is the same as computing in float32.
            relative = np.float32(np.float64(shapes.dist[row, k]) * shapes.vertices[k, axis])
            relative = np.float32(np.float64(relative) * shapes.stretch[axis])
            corner = np.float32(np.float64(relative) + point)
            corners[k, axis] = corner
            lower, upper = min(lower, corner), max(upper, corner)
        corners[n_rays, axis] = point
        star.box[0, axis] = np.int64(min(max(np.rint(np.float64(lower)), -_FAR), _FAR))
        star.box[1, axis] = np.int64(min(max(np.rint(np.float64(upper)), -_FAR), _FAR)) + 1


@compiled
def boxes_of(shapes: Shapes, star: Star) -> npt.NDArray[np.int64]:
    """Return the box of each shape, int64 (n, 2, 3)."""
    boxes = np.empty((len(shapes.dist), 2, 3), np.int64)
    for row in range(len(boxes)):
        take(shapes, row, star)
        for axis in range(3):
            boxes[row, 0, axis], boxes[row, 1, axis] = star.box[0, axis], star.box[1, axis]
    return boxes


@part
def erect(shapes: Shapes, star: Star) -> bool:
    """Set up the planes of the polyhedron that was taken; return whether they may be used.

    They may not if rounding turns rays by more than cells of directions allow for: shapes of a voxel's size
    or less at coordinates of 10**5. There, every face is looked at.
    """
    corners, planes = star.corners, star.planes
    n_rays = len(corners) - 1
    reach, shortest, longest, farthest = 0.0, np.inf, 0.0, 0.0
    for k in range(n_rays):
        length = 0.0
        for axis in range(3):
            offset = np.float64(corners[k, axis]) - np.float64(corners[n_rays, axis])
            reach, length = max(reach, abs(offset)), length + offset * offset
            farthest = max(farthest, abs(np.float64(corners[k, axis])))
        shortest, longest = min(shortest, length), max(longest, length)
    star.limits[0] = 128 * _EPS * (reach + 1)
    star.limits[1] = 64 * _EPS * max(1.0, reach) ** 3
    star.limits[2] = reach + 1
    star.limits[3] = (np.sqrt(longest) + 1) ** 2
    if not 4 * _EPS * farthest <= TURN * np.sqrt(shortest):
        return False
    for face in range(len(shapes.faces)):
        i, j, k = shapes.faces[face, 0], shapes.faces[face, 1], shapes.faces[face, 2]
        az, ay, ax = offset_of(corners, i)
        bz, by, bx = offset_of(corners, j)
        cz, cy, cx = offset_of(corners, k)
        for side in range(3):
            one, other = shapes.faces[face, side], shapes.faces[face, (side + 1) % 3]
            _side(planes, face, 3 * side, offset_of(corners, other), offset_of(corners, one))
        pz, py, px, qz, qy, qx = bz - az, by - ay, bx - ax, cz - az, cy - ay, cx - ax
        nz, ny, nx = py * qx - px * qy, px * qz - pz * qx, pz * qy - py * qz
        planes[face, FACE], planes[face, FACE + 1], planes[face, FACE + 2] = nz, ny, nx
        planes[face, _OFFSET] = nz * az + ny * ay + nx * ax
        # A determinant: six products of three differences. A plane of the kernel: its offset, too.
        edges = max(abs(pz), abs(py), abs(px)) * max(abs(qz), abs(qy), abs(qx))
        rounding = 128 * _EPS * edges * 2 * (reach + 1)
        planes[face, BENEATH] = star.limits[1] + rounding
        planes[face, BEYOND] = rounding + 8 * _EPS * farthest * (abs(nz) + abs(ny) + abs(nx))
    return True


@part
def offset_of(corners: npt.NDArray[np.float32], k: int) -> tuple[float, float, float]:
    """Return corner `k` relative to the point."""
    point = len(corners) - 1
    return (
        np.float64(corners[k, 0]) - np.float64(corners[point, 0]),
        np.float64(corners[k, 1]) - np.float64(corners[point, 1]),
        np.float64(corners[k, 2]) - np.float64(corners[point, 2]),
    )


@part
def _side(
    planes: npt.NDArray[np.float64],
    face: int,
    column: int,
    b: tuple[float, float, float],
    a: tuple[float, float, float],
) -> None:
    """Set the plane through the point and two corners, in units of the corners' distances."""
    (bz, by, bx), (az, ay, ax) = b, a
    unit = 1 / (max(abs(az), abs(ay), abs(ax)) * max(abs(bz), abs(by), abs(bx)))
    planes[face, column] = (by * ax - bx * ay) * unit
    planes[face, column + 1] = (bx * az - bz * ax) * unit
    planes[face, column + 2] = (bz * ay - by * az) * unit


@part
def in_cone(planes: npt.NDArray[np.float64], face: int, z: float, y: float, x: float) -> float:
    """Return how far an offset from the point is within the cone of a face: the least of its three sides."""
    return min(
        planes[face, 0] * z + planes[face, 1] * y + planes[face, 2] * x,
        planes[face, 3] * z + planes[face, 4] * y + planes[face, 5] * x,
        planes[face, 6] * z + planes[face, 7] * y + planes[face, 8] * x,
    )


@part
def run_length(
    planes: npt.NDArray[np.float64], face: int, clear: float, z: float, y: float, x: float, most: int
) -> int:
    """Return how many voxels along x stay clearly within the cone of a face, the first included; at most `most`."""
    run = np.float64(most - 1)
    for k in range(2, 9, 3):
        slope = planes[face, k]
        if slope < 0:
            value = planes[face, k - 2] * z + planes[face, k - 1] * y + slope * x
            run = min(run, (clear - value) / slope)
    return 1 + int(run)


@part
def beneath(planes: npt.NDArray[np.float64], face: int, z: float, y: float, x: float) -> float:
    """Return how far an offset from the point is beneath a face."""
    along = planes[face, FACE] * z + planes[face, FACE + 1] * y + planes[face, FACE + 2] * x
    return along - planes[face, _OFFSET]


@part
def point_of(star: Star) -> tuple[float, float, float]:
    """Return the point."""
    point = len(star.corners) - 1
    return (
        np.float64(star.corners[point, 0]),
        np.float64(star.corners[point, 1]),
        np.float64(star.corners[point, 2]),
    )


@part
def walk(
    planes: npt.NDArray[np.float64],
    neighbours: npt.NDArray[np.int64],
    clear: float,
    face: int,
    z: float,
    y: float,
    x: float,
) -> int:
    """Return the face whose cone an offset from the point is in, or -1 if that is not found or not clear.

    Beginning at a face nearby, every step goes across the side that the offset is farthest beyond. (Arrays one
    by one: handing over whole tuples of arrays costs more than the steps.)
    """
    for _ in range(_STEPS):
        least, side = planes[face, 0] * z + planes[face, 1] * y + planes[face, 2] * x, 0
        inner = planes[face, 3] * z + planes[face, 4] * y + planes[face, 5] * x
        if inner < least:
            least, side = inner, 1
        inner = planes[face, 6] * z + planes[face, 7] * y + planes[face, 8] * x
        if inner < least:
            least, side = inner, 2
        if least > clear:
            return face
        if least > -clear:
            return -1
        face = neighbours[face, side]
    return -1

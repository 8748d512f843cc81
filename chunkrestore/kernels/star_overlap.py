"""Which voxels lie in a star-convex polyhedron, and how many in two of them, voxel by voxel in compiled loops.

A voxel lies in a polyhedron if it lies in one of the tetrahedra that the faces span with the point. A table of
directions (`star_directions`) leaves one to three faces to look at. In StarDist's sense each tetrahedron is four
determinants in float32; here they are computed in float64, and again in StarDist's operations where one is too
close to zero to be sure of its sign in float32. So the answer is StarDist's for every voxel, mostly after a look
at one face.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.kernels.star_directions import CELLS, TURN, cell_of, faces_by_direction

_OF_DETERMINANT = 8e-6
"""Error of a determinant of three float32 vectors, as a share of the product of their lengths: some 12 roundings of
2**-24, of sums of up to six such products."""

_OF_COORDINATE = 2.0**-23
"""Error of a vertex in the volume as a share of its largest coordinate: rounded to float32, on three axes."""

_SIDES = np.array([[2, 3, 4], [1, 3, 2], [1, 4, 3], [1, 2, 4]])
"""Sides of a tetrahedron of points 1 (the centre) to 4, the face first."""


class Surface(NamedTuple):
    """What all polyhedra of a table have in common."""

    vertices: npt.NDArray[np.float32]
    """(n_rays, 3): directions."""
    faces: npt.NDArray[np.int32]
    """(n_faces, 3): corners of the triangles."""
    sides: npt.NDArray[np.float64]
    """(n_faces, 3, 3): unit normals, inwards, of the planes through the point and two corners of a face."""
    starts: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]
    """Faces that the directions of cell ``i`` can meet: ``members[starts[i] : starts[i + 1]]``."""
    is_regular: bool
    """Whether every face spans a solid angle; at the poles of Cartesian rays, faces do not."""

    @classmethod
    def of(cls, rays: Rays) -> Surface:
        """Return the common tables of polyhedra with these rays."""
        corners = rays.vertices[rays.faces].astype(np.float64)
        a, b, c = np.moveaxis(corners, 1, 0)
        sides = np.stack([np.cross(one, other) for one, other in ((b, a), (c, b), (a, c))], axis=1)
        lengths = np.linalg.norm(sides, axis=-1, keepdims=True)
        is_regular = bool((np.abs((np.cross(b, c) * a).sum(axis=-1)) > 1e-4).all() and (lengths > 1e-4).all())
        starts, members = (
            faces_by_direction(rays) if is_regular else (np.zeros(6 * CELLS**2 + 1), np.zeros(0))
        )
        return cls(
            np.ascontiguousarray(rays.vertices, np.float32),
            np.ascontiguousarray(rays.faces, np.int32),
            sides / np.maximum(lengths, 1e-30),
            starts.astype(np.int64),
            members.astype(np.int64),
            is_regular,
        )


class Body(NamedTuple):
    """One polyhedron, laid out for questions about voxels; filled again and again by `place`."""

    point: npt.NDArray[np.int64]
    """(3,): centre in voxels."""
    corners: npt.NDArray[np.float64]
    """(n_rays, 3): vertices seen from the centre."""
    planes: npt.NDArray[np.float64]
    """(n_faces, 4): normal of each face and its product with a corner, which is six times a volume."""
    margins: npt.NDArray[np.float64]
    """(3,): how small a determinant may not be trusted, which angle beside a side plane, and 1 if no angle may be."""


def empty_body(surface: Surface) -> Body:
    """Return room for one polyhedron."""
    return Body(
        np.zeros(3, np.int64),
        np.zeros((len(surface.vertices), 3)),
        np.zeros((len(surface.faces), 4)),
        np.zeros(3),
    )


@compiled
def place(body: Body, surface: Surface, point: npt.NDArray[np.int64], dist: npt.NDArray[np.float32]) -> None:
    """Put the polyhedron with distances `dist` at `point` into `body`, with StarDist's float32 vertices."""
    for axis in range(3):
        body.point[axis] = point[axis]
    farthest, shortest, outermost = 0.0, np.inf, 0.0
    for k in range(len(dist)):
        length = 0.0
        for axis in range(3):
            absolute = np.float32(point[axis]) + dist[k] * surface.vertices[k, axis]
            relative = np.float64(absolute) - point[axis]
            body.corners[k, axis] = relative
            length += relative * relative
            outermost = max(outermost, abs(np.float64(absolute)))
        farthest, shortest = max(farthest, length), min(shortest, length)
    for f in range(len(surface.faces)):
        a, b, c = surface.faces[f, 0], surface.faces[f, 1], surface.faces[f, 2]
        az, ay, ax = body.corners[a, 0], body.corners[a, 1], body.corners[a, 2]
        pz, py, px = body.corners[b, 0] - az, body.corners[b, 1] - ay, body.corners[b, 2] - ax
        qz, qy, qx = body.corners[c, 0] - az, body.corners[c, 1] - ay, body.corners[c, 2] - ax
        nz, ny, nx = px * qy - py * qx, pz * qx - px * qz, py * qz - pz * qy
        body.planes[f, 0], body.planes[f, 1], body.planes[f, 2] = nz, ny, nx
        body.planes[f, 3] = nz * az + ny * ay + nx * ax
    farthest = np.sqrt(farthest)
    turn = 8 * (_OF_DETERMINANT + outermost * _OF_COORDINATE / max(np.sqrt(shortest), 1e-30))
    body.margins[0] = _OF_DETERMINANT * (2 * farthest + 2) ** 3
    body.margins[1] = turn
    body.margins[2] = turn > TURN / 2 or not surface.is_regular


@part
def decide(dz: int, dy: int, dx: int, body: Body, surface: Surface) -> int:
    """Return 1 if a voxel seen from the point lies in a polyhedron, 0 if not, -1 if rounding decides.

    The answer is that of float32, whatever the order of the operations in it.
    """
    cell = cell_of(float(dz), float(dy), float(dx))
    first, last = surface.starts[cell], surface.starts[cell + 1]
    sides, planes = surface.sides, body.planes
    near = body.margins[1] * (abs(dz) + abs(dy) + abs(dx)) if last - first > 1 else -np.inf
    for k in range(first, last):
        f = surface.members[k]
        if last - first == 1 or (
            sides[f, 0, 0] * dz + sides[f, 0, 1] * dy + sides[f, 0, 2] * dx > near
            and sides[f, 1, 0] * dz + sides[f, 1, 1] * dy + sides[f, 1, 2] * dx > near
            and sides[f, 2, 0] * dz + sides[f, 2, 1] * dy + sides[f, 2, 2] * dx > near
        ):
            beneath = planes[f, 3] - (planes[f, 0] * dz + planes[f, 1] * dy + planes[f, 2] * dx)
            if abs(beneath) <= body.margins[0]:
                return -1
            return 1 if beneath > 0 else 0
    return -1


@part
def inside_float32(z: int, y: int, x: int, body: Body, surface: Surface) -> bool:
    """Return whether a voxel lies in the tetrahedron of a face, in StarDist's operations."""
    voxel = np.empty((5, 3), np.float32)
    voxel[0, 0], voxel[0, 1], voxel[0, 2] = z, y, x
    for axis in range(3):
        voxel[1, axis] = body.point[axis]
    flat = body.margins[2] > 0
    cell = cell_of(float(z - body.point[0]), float(y - body.point[1]), float(x - body.point[2]))
    first, last = (0, len(surface.faces)) if flat else (surface.starts[cell], surface.starts[cell + 1])
    for place_ in range(first, last):
        f = place_ if flat else surface.members[place_]
        for k in range(3):
            for axis in range(3):
                voxel[2 + k, axis] = body.corners[surface.faces[f, k], axis] + body.point[axis]
        n = 0
        while n < 4 and _beneath(voxel, _SIDES[n, 0], _SIDES[n, 1], _SIDES[n, 2]):
            n += 1
        if n == 4:
            return True
    return False


@part
def _beneath(p: npt.NDArray[np.float32], a: int, b: int, c: int) -> bool:
    """Return whether point 0 lies on the inner side of the plane through points a, b and c."""
    m00, m01, m02 = p[b, 0] - p[a, 0], p[b, 1] - p[a, 1], p[b, 2] - p[a, 2]
    m10, m11, m12 = p[c, 0] - p[a, 0], p[c, 1] - p[a, 1], p[c, 2] - p[a, 2]
    m20, m21, m22 = p[0, 0] - p[a, 0], p[0, 1] - p[a, 1], p[0, 2] - p[a, 2]
    determinant = (
        m00 * (m11 * m22 - m21 * m12) - m01 * (m10 * m22 - m12 * m20) + m02 * (m10 * m21 - m11 * m20)
    )
    return bool(determinant >= 0)


@compiled
def boxes_and_volumes(
    points: npt.NDArray[np.int64],
    dist: npt.NDArray[np.float32],
    surface: Surface,
    boxes: npt.NDArray[np.int64],
    volumes: npt.NDArray[np.float32],
) -> None:
    """Write the boxes (n, 2, 3), rounded to voxels, and the volumes (n,) of polyhedra, in StarDist's operations."""
    vertices = surface.vertices
    m = np.empty((3, 3), np.float32)
    for i in range(len(points)):
        for axis in range(3):
            lower, upper = np.inf, -1.0
            for k in range(len(vertices)):
                at = np.rint(np.float32(points[i, axis]) + dist[i, k] * vertices[k, axis])
                lower, upper = min(lower, at), max(upper, at)
            boxes[i, 0, axis], boxes[i, 1, axis] = np.int64(lower), np.int64(upper)
        total = np.float32(0)
        for f in range(len(surface.faces)):
            a, b, c = surface.faces[f, 0], surface.faces[f, 1], surface.faces[f, 2]
            for axis in range(3):
                corner = dist[i, a] * vertices[a, axis]
                m[0, axis] = dist[i, b] * vertices[b, axis] - corner
                m[1, axis] = dist[i, c] * vertices[c, axis] - corner
                m[2, axis] = np.float32(0) - corner
            total += (
                m[0, 0] * (m[1, 1] * m[2, 2] - m[2, 1] * m[1, 2])
                - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
                + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
            ) / np.float32(6)
        volumes[i] = total


@part
def from_the_middle(k: int, first: int, last: int) -> int:
    """Return the k-th of the numbers `first` to `last`, in the order of their distance from the middle."""
    middle = (first + last) // 2
    return middle + (k + 1) // 2 if k % 2 else middle - k // 2


@compiled
def scan(
    mask: npt.NDArray[np.bool_],
    box: npt.NDArray[np.int64],
    window: npt.NDArray[np.int64],
    body: Body,
    surface: Surface,
    bounds: tuple[float, float],
) -> int:
    """Count the voxels of `mask` that lie in a polyhedron.

    Parameters
    ----------
    mask, box
        Voxels of the box, flat, in raster order.
    window
        The part of `box` to look at.
    body, surface
        The polyhedron.
    bounds
        Counting ends once the number is certainly no more than the first, or more than the second.

    Returns
    -------
    int
        The number, or any number beyond one of `bounds` if the whole number is.
    """
    n_y, n_x = box[1, 1] - box[0, 1] + 1, box[1, 2] - box[0, 2] + 1
    p_z, p_y, p_x = body.point[0], body.point[1], body.point[2]
    in_slice = max(window[1, 1] - window[0, 1] + 1, 0) * max(window[1, 2] - window[0, 2] + 1, 0)
    flat = body.margins[2] > 0
    n, left = 0, (window[1, 0] - window[0, 0] + 1) * in_slice
    for k_z in range(window[1, 0] - window[0, 0] + 1):
        if n + left <= bounds[0]:
            break
        left -= in_slice
        z = from_the_middle(k_z, window[0, 0], window[1, 0])
        for k_y in range(window[1, 1] - window[0, 1] + 1):
            y = from_the_middle(k_y, window[0, 1], window[1, 1])
            line = ((z - box[0, 0]) * n_y + y - box[0, 1]) * n_x - box[0, 2]
            for x in range(window[0, 2], window[1, 2] + 1):
                if mask[line + x]:
                    answer = -1 if flat else decide(z - p_z, y - p_y, x - p_x, body, surface)
                    if answer < 0:
                        answer = inside_float32(z, y, x, body, surface)
                    n += answer
            if n > bounds[1]:
                return n
    return n


@part
def fill(mask: npt.NDArray[np.bool_], box: npt.NDArray[np.int64], body: Body, surface: Surface) -> None:
    """Write into the flat array `mask`, in raster order, which voxels of `box` lie in a polyhedron."""
    p_z, p_y, p_x = body.point[0], body.point[1], body.point[2]
    flat = body.margins[2] > 0
    k = 0
    for z in range(box[0, 0], box[1, 0] + 1):
        for y in range(box[0, 1], box[1, 1] + 1):
            for x in range(box[0, 2], box[1, 2] + 1):
                answer = -1 if flat else decide(z - p_z, y - p_y, x - p_x, body, surface)
                if answer < 0:
                    answer = inside_float32(z, y, x, body, surface)
                mask[k] = answer
                k += 1

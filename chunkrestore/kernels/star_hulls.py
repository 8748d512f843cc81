"""Convex hulls of a few hundred points, and volumes of intersections of half-spaces, in compiled loops.

What StarDist asks Qhull for, about every pair of candidates: points are added one by one,
the facets that see a point give way to the cone from the point to their border. Half-spaces that all hold a given
point strictly are points of the dual space, and the facets of their hull are the corners of the intersection.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part

_FLAT = 1e-12
"""Points this close to a facet lie on it, as a share of the largest coordinate: rounding in float64, tenfold."""

Floats = npt.NDArray[np.float64]


class Hull(NamedTuple):
    """Room for a convex hull of up to n points, made by `room`; the first facets are filled by `convex_hull`."""

    facets: npt.NDArray[np.int64]
    """(2 n, 3): corners, anticlockwise seen from outside."""
    planes: Floats
    """(2 n, 4): outward unit normal, and distance from the origin."""
    edges: npt.NDArray[np.int64]
    """(6 n, 2): border of the facets that see a new point."""
    used: npt.NDArray[np.int64]
    """(n,): scratch."""


def room(n: int) -> Hull:
    """Return room for a hull of `n` points."""
    return Hull(
        np.empty((2 * n + 8, 3), np.int64),
        np.empty((2 * n + 8, 4)),
        np.empty((6 * n + 24, 2), np.int64),
        np.empty(n, np.int64),
    )


@compiled
def convex_hull(points: Floats, n: int, hull: Hull) -> int:
    """Find the convex hull of the first `n` of `points`.

    Returns
    -------
    int
        Number of facets, all triangles; 0 if the points lie in a plane or rounding gave no closed surface.
    """
    corners = _simplex(points, n)
    if corners[0] == corners[1]:
        return 0
    centre = np.zeros(3)
    largest = 0.0
    for axis in range(3):
        for k in range(4):
            centre[axis] += points[corners[k], axis] / 4
        for k in range(n):
            largest = max(largest, abs(points[k, axis]))
    for k in range(4):
        a, b, c = corners[(k + 1) % 4], corners[(k + 2) % 4], corners[(k + 3) % 4]
        for _ in range(2):
            if _add(a, b, c, points, centre, hull, k):
                break
            b, c = c, b
    count = len(corners)
    for p in range(n):
        if p != corners[0] and p != corners[1] and p != corners[2] and p != corners[3]:
            count = _extend(p, points, centre, hull, count, _FLAT * largest)
            if count == 0:
                return 0
    return count if _is_closed(hull, count, n) else 0


@part
def _simplex(points: Floats, n: int) -> npt.NDArray[np.int64]:
    """Return four points far from a common plane; four zeros if there are none."""
    found = np.zeros(4, np.int64)
    for k in range(n):
        if points[k, 0] < points[found[0], 0]:
            found[0] = k
    normal, along = np.zeros(3), np.zeros(3)
    farthest = 0.0
    for step in range(1, 4):
        farthest = 0.0
        base = points[found[0]]
        for k in range(n):
            z, y, x = points[k, 0] - base[0], points[k, 1] - base[1], points[k, 2] - base[2]
            if step == 1:
                distance = z * z + y * y + x * x
            elif step == 2:
                cz, cy, cx = (
                    y * along[2] - x * along[1],
                    x * along[0] - z * along[2],
                    z * along[1] - y * along[0],
                )
                distance = cz * cz + cy * cy + cx * cx
            else:
                distance = abs(z * normal[0] + y * normal[1] + x * normal[2])
            if distance > farthest:
                farthest, found[step] = distance, k
        if farthest == 0:
            for k in range(4):
                found[k] = 0
            break
        far = points[found[step]]
        z, y, x = far[0] - base[0], far[1] - base[1], far[2] - base[2]
        if step == 1:
            along[0], along[1], along[2] = z, y, x
        elif step == 2:
            normal[0] = along[1] * x - along[2] * y
            normal[1] = along[2] * z - along[0] * x
            normal[2] = along[0] * y - along[1] * z
    return found


@part
def _add(a: int, b: int, c: int, points: Floats, centre: Floats, hull: Hull, count: int) -> bool:
    """Write facet number `count`; return whether it faces away from `centre`."""
    pz, py, px = points[b, 0] - points[a, 0], points[b, 1] - points[a, 1], points[b, 2] - points[a, 2]
    qz, qy, qx = points[c, 0] - points[a, 0], points[c, 1] - points[a, 1], points[c, 2] - points[a, 2]
    nz, ny, nx = py * qx - px * qy, px * qz - pz * qx, pz * qy - py * qz
    length = np.sqrt(nz * nz + ny * ny + nx * nx)
    if length == 0:
        return False
    nz, ny, nx = nz / length, ny / length, nx / length
    offset = nz * points[a, 0] + ny * points[a, 1] + nx * points[a, 2]
    hull.facets[count, 0], hull.facets[count, 1], hull.facets[count, 2] = a, b, c
    hull.planes[count, 0], hull.planes[count, 1], hull.planes[count, 2] = nz, ny, nx
    hull.planes[count, 3] = offset
    return bool(nz * centre[0] + ny * centre[1] + nx * centre[2] < offset)


@part
def _extend(p: int, points: Floats, centre: Floats, hull: Hull, count: int, flat: float) -> int:
    """Take one more point into a hull of `count` facets; return how many there are then, 0 on failure."""
    facets, planes, edges = hull.facets, hull.planes, hull.edges
    z, y, x = points[p, 0], points[p, 1], points[p, 2]
    n_edges, k = 0, 0
    while k < count:
        if planes[k, 0] * z + planes[k, 1] * y + planes[k, 2] * x - planes[k, 3] <= flat:
            k += 1
            continue
        for side in range(3):
            a, b = facets[k, side], facets[k, (side + 1) % 3]
            twin = 0
            while twin < n_edges and (edges[twin, 0] != b or edges[twin, 1] != a):
                twin += 1
            if twin < n_edges:
                n_edges -= 1
                edges[twin, 0], edges[twin, 1] = edges[n_edges, 0], edges[n_edges, 1]
            else:
                edges[n_edges, 0], edges[n_edges, 1] = a, b
                n_edges += 1
        count -= 1
        for column in range(3):
            facets[k, column] = facets[count, column]
        for column in range(4):
            planes[k, column] = planes[count, column]
    if count + n_edges > len(facets):
        return 0
    for k in range(n_edges):
        if not _add(edges[k, 0], edges[k, 1], p, points, centre, hull, count):
            return 0
        count += 1
    return count


@part
def _is_closed(hull: Hull, count: int, n: int) -> bool:
    """Return whether facets and corners obey Euler's formula for triangles."""
    for k in range(n):
        hull.used[k] = 0
    corners = 0
    for k in range(count):
        for side in range(3):
            if hull.used[hull.facets[k, side]] == 0:
                hull.used[hull.facets[k, side]] = 1
                corners += 1
    return count == 2 * corners - 4


@compiled
def volume_of_intersection(planes: Floats, n: int, hull: Hull, duals: Floats) -> float:
    """Return the volume of an intersection of half-spaces that all hold the origin strictly.

    Parameters
    ----------
    planes
        (n, 4): outward normals of any length, and their products with a point of the plane, all positive.
    n
        How many.
    hull, duals
        Room for `n` points, and their coordinates.

    Returns
    -------
    float
        The volume, to about 1e-8 of it; a negative number if there is none or rounding forbids it.
    """
    for k in range(n):
        for axis in range(3):
            duals[k, axis] = planes[k, axis] / planes[k, 3]
    count = convex_hull(duals, n, hull)
    if count == 0:
        return -1.0
    total = 0.0
    for k in range(count):
        offset = hull.planes[k, 3]
        if offset <= 0:
            return -1.0
        z, y, x = hull.planes[k, 0] / offset, hull.planes[k, 1] / offset, hull.planes[k, 2] / offset
        for side in range(3):
            total += _corner(duals, hull.facets[k, side], hull.facets[k, (side + 1) % 3], z, y, x)
    return abs(total) / 6


@part
def _corner(duals: Floats, a: int, b: int, z: float, y: float, x: float) -> float:
    """Return six times the volume that belongs to a corner of the intersection and to an edge at it.

    The edge lies on the planes `a` and `b`. The volume is that of two tetrahedra, with signs: of the origin, the
    corner, the point of the edge's line that is nearest to the origin, and that of either plane. The latter two
    points are the same for both corners of the edge, so what the tetrahedra have too much cancels.
    """
    first, second = min(a, b), max(a, b)
    aa = bb = ab = 0.0
    for axis in range(3):
        aa += duals[first, axis] * duals[first, axis]
        bb += duals[second, axis] * duals[second, axis]
        ab += duals[first, axis] * duals[second, axis]
    determinant = aa * bb - ab * ab
    if determinant <= 0:
        return 0.0
    u, v = (bb - ab) / determinant, (aa - ab) / determinant
    ez = u * duals[first, 0] + v * duals[second, 0]
    ey = u * duals[first, 1] + v * duals[second, 1]
    ex = u * duals[first, 2] + v * duals[second, 2]
    cz, cy, cx = ey * x - ex * y, ex * z - ez * x, ez * y - ey * z
    of_first = (duals[first, 0] * cz + duals[first, 1] * cy + duals[first, 2] * cx) / aa
    of_second = (duals[second, 0] * cz + duals[second, 1] * cy + duals[second, 2] * cx) / bb
    return float(of_first - of_second if a == first else of_second - of_first)

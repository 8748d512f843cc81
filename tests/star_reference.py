"""Suppression by StarDist's routine, and painting in NumPy: slow, plain, independent of what the package does."""

from __future__ import annotations

import numpy as np
from scipy.spatial import ConvexHull
from skimage.draw import polygon

from chunkrestore.kernels.star_convex import canonical_order, library
from chunkrestore.kernels.star_directions import cell_of, faces_by_direction

_STEP_ELEMENTS = 2**19


def suppress(rows, rays, nms_thresh):
    """Return which rows survive greedy suppression among themselves."""
    n = len(rows["prob"])
    order = canonical_order(rows)
    # The routines know scores by their order only; these are free of ties (and exact up to 2**24 rows).
    scores = np.arange(n, 0, -1, dtype=np.float32)
    dist, points = rows["dist"][order], rows["points"][order].astype(np.float32)
    options = {"thresh": nms_thresh, "verbose": 0}
    if len(rays.faces):
        survives = library().nms.non_maximum_suppression_3d_inds(dist, points, rays, scores, **options)
    else:
        # Its tree leaves out pairs beyond a distance that depends on the largest polygon in the table.
        survives = library().nms.non_maximum_suppression_inds(
            dist, points, scores, use_kdtree=False, **options
        )
    result = np.empty(n, bool)
    result[order] = survives
    return result


def paint(core, rows, rays):
    """Return the labels of `core`, worst row first: better ones paint over them."""
    labels = np.zeros(tuple(c.stop - c.start for c in core), rows["ids"].dtype)
    inside = _inside_polyhedron if len(rays.faces) else _inside_polygon
    for row in canonical_order(rows)[::-1]:
        outline = rays.outlines(rows["dist"][row : row + 1], rows["points"][row : row + 1])[0]
        box = _box(outline, core)
        if all(b.start < b.stop for b in box):
            window = tuple(slice(b.start - c.start, b.stop - c.start) for b, c in zip(box, core, strict=True))
            labels[window][inside(box, outline, rows["points"][row], rays)] = rows["ids"][row]
    return labels


def _box(outline, core):
    """Return the part of `core` in the box around a shape, rounded to voxels as StarDist does."""
    lower, upper = np.rint([outline.min(axis=0), outline.max(axis=0)]).astype(np.int64)
    return tuple(
        slice(max(c.start, int(a)), min(c.stop, int(b) + 1))
        for c, a, b in zip(core, lower, upper, strict=True)
    )


def _inside_polygon(box, outline, point, rays):
    """Return which pixels of `box` lie in a polygon, by the routine that StarDist paints with."""
    shape = tuple(b.stop - b.start for b in box)
    # That routine subtracts the pixel first, which is exact in float64: any origin gives the same answer.
    rows, columns = (outline.astype(np.float64) - [b.start for b in box]).T
    inside = np.zeros(shape, bool)
    inside[polygon(rows, columns, shape)] = True
    return inside


def _inside_polyhedron(box, outline, point, rays):
    """Return which voxels of `box` lie in a polyhedron.

    StarDist's rule: in one of the tetrahedra that the faces span with the point and in the convex hull, or
    in the kernel (behind the planes of all faces).
    """
    axes = (np.arange(b.start, b.stop) for b in box)
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = np.zeros(len(voxels), bool)
    corners = outline[rays.faces]
    radius = np.linalg.norm(outline - point, axis=-1).max() + 1
    within = np.flatnonzero(((voxels - point) ** 2).sum(axis=-1) <= radius**2)
    step = max(1, _STEP_ELEMENTS // len(corners))
    for part in np.split(within, range(step, len(within), step)):
        inside[part] = _in_tetrahedra(voxels[part], corners, point, outline, rays)
        rest = part[~inside[part]]
        inside[rest] = _in_kernel(voxels[rest], corners)
    return inside.reshape(tuple(b.stop - b.start for b in box))


def _in_kernel(voxels, corners):
    """Return which voxels lie behind all faces; planes in StarDist's float32 operations."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    pz, py, px = (b - a).T
    qz, qy, qx = (c - a).T
    normals = np.stack([-(py * qx - px * qy), -(px * qz - pz * qx), -(pz * qy - py * qz)])
    nz, ny, nx = normals
    offsets = -(a[:, 0] * nz + a[:, 1] * ny + a[:, 2] * nx)
    # Products of a float32 and a small integer are exact in float64, and so are their sums.
    return np.asarray((voxels @ normals.astype(np.float64) + offsets <= 0).all(axis=-1))


def _in_tetrahedra(voxels, corners, point, outline, rays):
    """Return which voxels lie in a tetrahedron of the point and a face, and in the convex hull."""
    starts, faces = faces_by_direction(rays)
    cells = np.array([cell_of(*d) for d in (voxels - point).astype(float)], int)
    counts = starts[cells + 1] - starts[cells]
    v = np.repeat(np.arange(len(voxels)), counts)
    f = faces[np.arange(len(v)) - np.repeat(np.cumsum(counts) - counts, counts) + starts[cells][v]]
    found = _in_tetrahedron(voxels[v], point, corners[f])
    v, f = v[found], f[found]
    result = np.zeros(len(voxels), bool)
    result[v] = True
    # On a face, to rounding (of products of three lengths), StarDist relies on Qhull.
    a, b, c = np.moveaxis(corners[f].astype(np.float64), 1, 0)
    beneath = (np.cross(b - a, c - a) * (voxels[v] - a)).sum(axis=-1)
    tolerance = 2.0**-18 * max(1.0, float(np.abs(outline - point).max())) ** 3
    doubtful = np.setdiff1d(v, v[beneath > tolerance])
    if len(doubtful):
        result[doubtful] = _in_convex_hull(voxels[doubtful], outline)
    return result


def _in_tetrahedron(voxels, point, corners):
    """Return for each voxel whether it lies in the tetrahedron of the point and its own face."""
    voxel, r = voxels.astype(np.float32), point.astype(np.float32)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    return (
        _in_half_space(voxel, a, b, c)
        & _in_half_space(voxel, r, b, a)
        & _in_half_space(voxel, r, c, b)
        & _in_half_space(voxel, r, a, c)
    )


def _in_half_space(voxel, a, b, c):
    """Return whether voxels lie on the inner side of the planes through a, b, c, as StarDist computes it."""
    m00, m01, m02 = (b - a).T
    m10, m11, m12 = (c - a).T
    m20, m21, m22 = (voxel - a).T
    determinant = (
        m00 * (m11 * m22 - m21 * m12) - m01 * (m10 * m22 - m12 * m20) + m02 * (m10 * m21 - m11 * m20)
    )
    return np.asarray(determinant >= 0)


def _in_convex_hull(voxels, outline):
    planes = ConvexHull(outline.astype(np.float64)).equations
    return np.asarray((voxels @ planes[:, :3].T + planes[:, 3] <= 0).all(axis=-1))

"""Star-convex objects as labels: which voxels of a region lie inside which shape.

A voxel belongs to the best-ranked shape that contains it, as in StarDist. "Contains" is decided here with
StarDist's own floating-point operations, in the coordinates of the volume, one voxel at a time, so that a
region shows exactly the voxels that a rendering of the whole volume would show there. Rendering a region by
StarDist's routine, in the region's coordinates, rounds differently: about one surface voxel per thousand
objects at coordinates near 100, one per ten objects near 1000. (That routine also does not return for a
polyhedron that lies wholly at negative coordinates.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Slices
from chunkrestore.kernels.star_convex import Rays, Rows

_STEP_ELEMENTS = 2**19
"""Voxel and face pairs that are looked at together: temporaries of a few MiB, whatever the object's size."""

Floats = npt.NDArray[np.float32]


def paint(core: Slices, rows: Rows, rays: Rays) -> np.ndarray:
    """Return the labels of `core`.

    Parameters
    ----------
    core
        Region of the volume.
    rows
        Survivors, with ``ids`` (labels) and ``rank`` (order, smallest first; distinct). Rows that do not
        touch `core` are ignored.
    rays
        Rays of the distances.

    Returns
    -------
    numpy.ndarray
        Labels of the shape of `core` and the dtype of ``ids``; 0 is background.
    """
    labels = np.zeros(tuple(c.stop - c.start for c in core), rows["ids"].dtype)
    near = np.flatnonzero(_may_touch(core, rows, rays))
    # Worst first: better shapes paint over them.
    near = near[np.argsort(rows["rank"][near])[::-1]]
    outlines = rays.outlines(rows["dist"][near], rows["points"][near])
    inside = _inside_polyhedron if len(rays.faces) else _inside_polygon
    for row, outline in zip(near, outlines, strict=True):
        box = _box(outline, core)
        if all(b.start < b.stop for b in box):
            window = tuple(slice(b.start - c.start, b.stop - c.start) for b, c in zip(box, core, strict=True))
            labels[window][inside(box, outline, rows["points"][row], rays)] = rows["ids"][row]
    return labels


def _may_touch(core: Slices, rows: Rows, rays: Rays) -> npt.NDArray[np.bool_]:
    first, last = np.array([[c.start, c.stop - 1] for c in core]).T
    outside = np.maximum(np.maximum(first - rows["points"], rows["points"] - last), 0)
    return np.asarray((outside <= rays.radii(rows["dist"])[:, np.newaxis] + 1).all(axis=-1))


def _box(outline: Floats, core: Slices) -> Slices:
    """Return the part of `core` in the box around a shape, rounded to voxels as StarDist does."""
    lower, upper = np.rint([outline.min(axis=0), outline.max(axis=0)]).astype(np.int64)
    return tuple(
        slice(max(c.start, int(a)), min(c.stop, int(b) + 1)) for c, a, b in zip(core, lower, upper, strict=True)
    )


def _inside_polygon(box: Slices, outline: Floats, point: np.ndarray, rays: Rays) -> npt.NDArray[np.bool_]:
    """Return which pixels of `box` lie in a polygon, by the routine that StarDist paints with."""
    from skimage.draw import polygon

    shape = tuple(b.stop - b.start for b in box)
    # That routine subtracts the pixel first, which is exact in float64: any origin gives the same answer.
    rows, columns = (outline.astype(np.float64) - [b.start for b in box]).T
    inside = np.zeros(shape, bool)
    inside[polygon(rows, columns, shape)] = True
    return inside


def _inside_polyhedron(box: Slices, outline: Floats, point: np.ndarray, rays: Rays) -> npt.NDArray[np.bool_]:
    """Return which voxels of `box` lie in a polyhedron.

    StarDist's rule: in the kernel (behind the planes of all faces), or in the convex hull and in one of the
    tetrahedra that the faces span with the point.
    """
    corners = tuple(outline[rays.faces[:, k]] for k in range(3))
    planes = _kernel_planes(corners)
    shape = tuple(b.stop - b.start for b in box)
    voxels = np.stack(np.meshgrid(*(np.arange(b.start, b.stop) for b in box), indexing="ij"), axis=-1)
    voxels = voxels.reshape(-1, 3)
    inside = np.empty(len(voxels), bool)
    step = max(1, _STEP_ELEMENTS // len(planes))
    for first in range(0, len(voxels), step):
        part = voxels[first : first + step]
        # Products of a float32 and a small integer are exact in float64.
        in_kernel = (part @ planes[:, :3].T + planes[:, 3] <= 0).all(axis=-1)
        rest = np.flatnonzero(~in_kernel)
        in_kernel[rest] = _in_tetrahedra(part[rest], corners, point, outline)
        inside[first : first + step] = in_kernel
    return inside.reshape(shape)


def _kernel_planes(corners: tuple[Floats, Floats, Floats]) -> npt.NDArray[np.float64]:
    """Return (n_faces, 4): outward normal and offset of each face, in StarDist's float32 operations."""
    a, b, c = corners
    pz, py, px = (b - a).T
    qz, qy, qx = (c - a).T
    nz, ny, nx = -(py * qx - px * qy), -(px * qz - pz * qx), -(pz * qy - py * qz)
    offset = -(a[:, 0] * nz + a[:, 1] * ny + a[:, 2] * nx)
    return np.stack([nz, ny, nx, offset], axis=-1).astype(np.float64)


def _in_tetrahedra(
    voxels: npt.NDArray[np.int64], corners: tuple[Floats, Floats, Floats], point: np.ndarray, outline: Floats
) -> npt.NDArray[np.bool_]:
    """Return which voxels lie in a tetrahedron of the point and a face, and in the convex hull.

    float64 finds the few faces that a voxel can belong to; StarDist's float32 operations decide.
    """
    a, b, c = (corner.astype(np.float64) - point for corner in corners)
    relative = (voxels - point).astype(np.float64)
    extent = 2 * max(np.abs(outline - point).max(), 1)
    # A determinant of float32 differences below `extent` errs by less than 20 roundings of its products.
    tolerance = 20 * 2.0**-24 * extent**3
    reachable = np.ones((len(voxels), len(a)), bool)
    for one, other in ((b, a), (c, b), (a, c)):
        reachable &= relative @ np.cross(one, other).T >= -tolerance
    normals = np.cross(b - a, c - a)
    beneath = relative @ normals.T - (a * normals).sum(axis=-1)
    v, f = np.nonzero(reachable & (beneath >= -tolerance))
    accepted = _in_tetrahedron(voxels[v], point.astype(np.float32), *(corner[f] for corner in corners))
    v, f = v[accepted], f[accepted]
    result = np.zeros(len(voxels), bool)
    result[v] = True
    # On a face, to rounding: StarDist asks Qhull too.
    doubtful = np.setdiff1d(v, v[beneath[v, f] > tolerance])
    if len(doubtful):
        result[doubtful] = _in_convex_hull(voxels[doubtful], outline)
    return result


def _in_tetrahedron(voxel: np.ndarray, r: Floats, a: Floats, b: Floats, c: Floats) -> npt.NDArray[np.bool_]:
    voxel = voxel.astype(np.float32)
    return (
        _in_half_space(voxel, a, b, c)
        & _in_half_space(voxel, r, b, a)
        & _in_half_space(voxel, r, c, b)
        & _in_half_space(voxel, r, a, c)
    )


def _in_half_space(voxel: Floats, a: Floats, b: Floats, c: Floats) -> npt.NDArray[np.bool_]:
    """Return whether voxels lie on the inner side of the planes through a, b, c (rows of z, y, x)."""
    m00, m01, m02 = (b - a).T
    m10, m11, m12 = (c - a).T
    m20, m21, m22 = (voxel - a).T
    determinant = (
        m00 * (m11 * m22 - m21 * m12) - m01 * (m10 * m22 - m12 * m20) + m02 * (m10 * m21 - m11 * m20)
    )
    return np.asarray(determinant >= 0)


def _in_convex_hull(voxels: npt.NDArray[np.int64], outline: Floats) -> npt.NDArray[np.bool_]:
    from scipy.spatial import ConvexHull

    planes = ConvexHull(outline.astype(np.float64)).equations
    return np.asarray((voxels @ planes[:, :3].T + planes[:, 3] <= 0).all(axis=-1))

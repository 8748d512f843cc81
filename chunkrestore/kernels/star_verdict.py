"""Whether one star-convex polyhedron suppresses another: StarDist's answer, and a simpler one of our own.

With ``m`` the smaller volume and ``limit = nms_thresh * m``, StarDist suppresses a pair if

    U > limit  and  (L > limit  or  K > limit  or  (H > limit  and  C > limit))

where U is the smaller of two bounds from above (common box of the boxes, common part of outer balls), L the common
part of inner balls, K the volume of the intersection of the kernels (the half-spaces behind all faces), H that of the
convex hulls, C the number of common voxels. K counts as 0, and H as endless, if the midpoint between the two points
does not lie in all half-spaces. Here each is computed to rounding, in float64 but where StarDist's float32 is felt
(vertices, kernels' planes, volumes, voxels), the dear ones only if the others leave a choice:

- Any convex body has a volume V < C + S / 2, with C its lattice points and S its surface [1]_. K lies in the common
  box of size a x b x c, whose surface is larger, and its lattice points are common voxels. So
  ``C + ab + bc + ca <= limit`` keeps the pair.
- The hulls' intersection is convex and holds all common voxels, which bounds its volume from below
  (`chunkrestore.kernels.star_sections`): if that and C are more than `limit`, so is H.
- Otherwise C decides which of H and K matters, and that one is computed.

A pair is *undecided* where a number that matters lies within rounding of `limit`, the midpoint within rounding of a
plane, or a hull cannot be computed; such pairs are StarDist's to decide.

Imported inside functions only: this module loads numba.

References
----------
.. [1] J. Bokowski, H. Hadwiger, J. M. Wills, "Eine Ungleichung zwischen Volumen, Oberflaeche und Gitterpunktanzahl
   konvexer Koerper im n-dimensionalen euklidischen Raum", Mathematische Zeitschrift 127 (1972).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import part
from chunkrestore.kernels.star_hulls import Hull, convex_hull, room, volume_of_intersection
from chunkrestore.kernels.star_overlap import Body, Surface, empty_body, scan
from chunkrestore.kernels.star_sections import sections

KEEP, SUPPRESS, UNDECIDED = 0, 1, 2

_BAND = 1e-5
"""Share of the smaller volume by which bounds from balls may err: StarDist's sums and roots in float32."""

_SLACK = 1e-4
"""Voxels within which a midpoint may lie on either side of a plane."""

Floats = npt.NDArray[np.float64]


class Pair(NamedTuple):
    """Room for two polyhedra and what is computed of them; made by `empty_pair`."""

    first: Body
    second: Body
    window: npt.NDArray[np.int64]
    """(2, 3): first and last voxel of the common box."""
    planes: Floats
    """(n, 4): half-spaces of both."""
    duals: Floats
    hull: Hull
    first_hull: Floats
    """(n, 4): half-spaces of the first polyhedron's convex hull; their number is in `n_first_hull`."""
    n_first_hull: npt.NDArray[np.int64]
    """(1,): -1 if it was not computed yet, 0 if it cannot be."""


def empty_pair(surface: Surface) -> Pair:
    """Return room for a pair."""
    n = 2 * max(len(surface.faces), 2 * len(surface.vertices)) + 8
    return Pair(
        empty_body(surface),
        empty_body(surface),
        np.empty((2, 3), np.int64),
        np.empty((n, 4)),
        np.empty((n, 3)),
        room(n),
        np.empty((n, 4)),
        np.full(1, -1, np.int64),
    )


@part
def by_voxels(
    limit: float, mask: npt.NDArray[np.bool_], box: npt.NDArray[np.int64], pair: Pair, surface: Surface
) -> int:
    """Return whether two polyhedra have more than `limit` voxels in common."""
    window = pair.window
    return SUPPRESS if scan(mask, box, window, pair.second, surface, (limit, limit)) > limit else KEEP


@part
def as_stardist(
    limit: float,
    smaller: float,
    mask: npt.NDArray[np.bool_],
    boxes: npt.NDArray[np.int64],
    pair: Pair,
    surface: Surface,
) -> int:
    """Return whether StarDist lets the first polyhedron suppress the second, once U exceeds the limit by boxes.

    Parameters
    ----------
    limit
        Volume that the two may have in common.
    smaller
        Volume of the smaller one.
    mask
        Voxels of the first polyhedron.
    boxes
        int64 (2, 2, 3): both boxes.
    pair, surface
        The polyhedra.
    """
    band = _BAND * smaller
    window = pair.window
    flat = pair.second.margins[2] > 0 or pair.first.margins[2] > 0
    if pair.second.margins[2] > 0:
        # Rounding may put voxels of such a polyhedron anywhere.
        window = boxes[0]
    a, b, c = _extents(pair)
    margin = band + 1e-2
    enough = np.inf if flat else limit + margin
    bounds = limit - a * b - b * c - c * a - margin, enough
    n, least = sections(mask, boxes[0], window, pair.second, surface, bounds)
    if n > enough and least > enough:
        # Balls around both hold the hulls' intersection, too.
        return SUPPRESS
    lowest, highest = _balls(pair, boxes)
    if highest <= limit - band:
        return KEEP
    if not (highest > limit + band) or abs(lowest - limit) <= band:
        return UNDECIDED
    if lowest > limit:
        return SUPPRESS
    if n + a * b + b * c + c * a <= limit - margin:
        return KEEP
    if abs(n - limit) <= 1e-6 * limit:
        return UNDECIDED
    m = _hulls(pair) if n > limit else _kernels(pair, surface)
    volume = _common(pair, m)
    if volume == -2:
        return SUPPRESS if n > limit else KEEP
    if volume < 0 or abs(volume - limit) <= band:
        return UNDECIDED
    return SUPPRESS if volume > limit else KEEP


@part
def _extents(pair: Pair) -> tuple[float, float, float]:
    """Return the size of the common box of two polyhedra, not rounded."""
    size = np.empty(3)
    for axis in range(3):
        a_low, a_high = np.inf, -np.inf
        b_low, b_high = np.inf, -np.inf
        for k in range(len(pair.first.corners)):
            a, b = pair.first.corners[k, axis], pair.second.corners[k, axis]
            a_low, a_high, b_low, b_high = min(a_low, a), max(a_high, a), min(b_low, b), max(b_high, b)
        shift = pair.second.point[axis] - pair.first.point[axis]
        size[axis] = max(0.0, min(a_high, b_high + shift) - max(a_low, b_low + shift))
    return size[0], size[1], size[2]


@part
def _balls(pair: Pair, boxes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return StarDist's bounds on the common volume from inner and outer balls.

    Balls where axes are scaled to the proportions of the boxes. Of balls of which one holds the other, StarDist
    takes the volume there, not that in voxels; we say so too.
    """
    scale = np.empty(3)
    for axis in range(3):
        scale[axis] = boxes[0, 1, axis] - boxes[0, 0, axis] + boxes[1, 1, axis] - boxes[1, 0, axis]
    largest = max(scale[0], scale[1], scale[2])
    radii = np.empty((2, 2))
    for axis in range(3):
        scale[axis] = largest / scale[axis]
    for k in range(2):
        radii[0, k], radii[1, k] = _radii(pair.first if k == 0 else pair.second, scale)
    distance = 0.0
    for axis in range(3):
        distance += (scale[axis] * (pair.first.point[axis] - pair.second.point[axis])) ** 2
    distance = np.sqrt(distance)
    product = scale[0] * scale[1] * scale[2]
    for k in range(2):
        radii[k, 0] = _lens(radii[k, 0], radii[k, 1], distance, product)
    return radii[0, 0], radii[1, 0]


@part
def _radii(body: Body, scale: Floats) -> tuple[float, float]:
    """Return the radii of the inner and the outer ball of a polyhedron whose axes are scaled."""
    outer = 0.0
    for k in range(len(body.corners)):
        squared = 0.0
        for axis in range(3):
            squared += (scale[axis] * body.corners[k, axis]) ** 2
        outer = max(outer, squared)
    inner = np.inf
    for f in range(len(body.planes)):
        squared = 0.0
        for axis in range(3):
            squared += (body.planes[f, axis] / scale[axis]) ** 2
        inner = min(inner, body.planes[f, 3] / np.sqrt(max(squared, 1e-300)))
    return inner, np.sqrt(outer)


@part
def _lens(r: float, s: float, distance: float, product: float) -> float:
    """Return StarDist's common volume of two balls; NaN where rounding decides if one holds the other."""
    if distance > r + s:
        return 0.0
    small, large = min(r, s), max(r, s)
    beyond = large - distance - small
    if abs(beyond) <= 1e-5 * large and abs(product - 1) > 1e-6:
        return np.nan
    if beyond >= 0:
        return np.pi * 4 / 3 * small**3
    t = (r + s - distance) / 2 / distance
    h, k = (s - r + distance) * t, (r - s + distance) * t
    return np.pi / 3 * (h * h * (3 * r - h) + k * k * (3 * s - k)) / product


@part
def _hulls(pair: Pair) -> int:
    """Write the planes of the convex hulls, seen from the midpoint; return how many, 0 if there is no hull."""
    if pair.n_first_hull[0] < 0:
        pair.n_first_hull[0] = convex_hull(pair.first.corners, len(pair.first.corners), pair.hull)
        for k in range(pair.n_first_hull[0]):
            for column in range(4):
                pair.first_hull[k, column] = pair.hull.planes[k, column]
    m = pair.n_first_hull[0]
    n = convex_hull(pair.second.corners, len(pair.second.corners), pair.hull)
    if m == 0 or n == 0:
        return 0
    for k in range(m + n):
        sign = 0.5 if k < m else -0.5
        for column in range(4):
            pair.planes[k, column] = pair.first_hull[k, column] if k < m else pair.hull.planes[k - m, column]
        for axis in range(3):
            shift = pair.second.point[axis] - pair.first.point[axis]
            pair.planes[k, 3] -= sign * pair.planes[k, axis] * shift
    return m + n


@part
def _kernels(pair: Pair, surface: Surface) -> int:
    """Write the planes of the kernels, seen from the midpoint of the points; return how many."""
    corner, edge = np.empty(3, np.float32), np.empty((2, 3), np.float32)
    n_faces = len(surface.faces)
    for which in range(2):
        body = pair.first if which == 0 else pair.second
        for f in range(n_faces):
            n = which * n_faces + f
            for axis in range(3):
                at = body.point[axis]
                corner[axis] = body.corners[surface.faces[f, 0], axis] + at
                for k in range(2):
                    edge[k, axis] = (
                        np.float32(body.corners[surface.faces[f, k + 1], axis] + at) - corner[axis]
                    )
            pz, py, px = edge[0, 0], edge[0, 1], edge[0, 2]
            qz, qy, qx = edge[1, 0], edge[1, 1], edge[1, 2]
            nz, ny, nx = -(py * qx - px * qy), -(px * qz - pz * qx), -(pz * qy - py * qz)
            offset = corner[0] * nz + corner[1] * ny + corner[2] * nx
            pair.planes[n, 0], pair.planes[n, 1], pair.planes[n, 2] = nz, ny, nx
            product = np.float64(offset)
            for axis in range(3):
                middle = (pair.first.point[axis] + pair.second.point[axis]) / 2
                product -= pair.planes[n, axis] * middle
            pair.planes[n, 3] = product
    return 2 * n_faces


@part
def _common(pair: Pair, n: int) -> float:
    """Return the volume of the intersection of `n` half-spaces; -2 if the origin is outside, -1 if unsure."""
    unsure = n == 0
    for k in range(n):
        length = 0.0
        for axis in range(3):
            length += pair.planes[k, axis] ** 2
        slack = pair.planes[k, 3] / np.sqrt(max(length, 1e-300))
        if slack < -_SLACK:
            return -2.0
        unsure = unsure or slack < _SLACK or length < 1e-20
    if unsure:
        return -1.0
    return volume_of_intersection(pair.planes, n, pair.hull, pair.duals)

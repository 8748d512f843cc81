"""How large a convex body must be that holds some voxels: counted in one go with them.

In a plane of voxels, a convex body holds the segments between its first and last voxel of every line, and what lies
between the segments of neighbouring lines. So its section has an area of at least the trapezoids between them. The
square roots of the areas of parallel sections are concave (Brunn and Minkowski), so between two neighbouring planes
with sections of at least a and b, it has a volume of at least ``(a + sqrt(a b) + b) / 3``. For a ball with a radius of
7 voxels all of that is four fifths of its volume.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import part
from chunkrestore.kernels.star_overlap import Body, Surface, decide, from_the_middle, inside_float32


@part
def sections(
    mask: npt.NDArray[np.bool_],
    box: npt.NDArray[np.int64],
    window: npt.NDArray[np.int64],
    body: Body,
    surface: Surface,
    bounds: tuple[float, float],
) -> tuple[int, float]:
    """Count the voxels of `mask` that lie in a polyhedron, and bound the volume of a convex body that holds them.

    Parameters
    ----------
    mask, box, window, body, surface
        As for `chunkrestore.kernels.star_overlap.scan`.
    bounds
        Counting ends once the number is certainly no more than the first, or number and volume are more than the
        second.

    Returns
    -------
    int
        The number, or less if it is certainly no more than the first bound, or any number beyond the second.
    float
        The least volume, of the voxels counted.
    """
    n_y, n_x = box[1, 1] - box[0, 1] + 1, box[1, 2] - box[0, 2] + 1
    p_z, p_y, p_x = body.point[0], body.point[1], body.point[2]
    flat = body.margins[2] > 0
    lines = max(window[1, 1] - window[0, 1] + 1, 0)
    in_slice = lines * max(window[1, 2] - window[0, 2] + 1, 0)
    n, left = 0, (window[1, 0] - window[0, 0] + 1) * in_slice
    volume, below, above = 0.0, -1.0, -1.0
    for k_z in range(window[1, 0] - window[0, 0] + 1):
        if n + left <= bounds[0]:
            break
        left -= in_slice
        z = from_the_middle(k_z, window[0, 0], window[1, 0])
        area, before = -1.0, int(np.int64(-1))
        for y in range(window[0, 1], window[1, 1] + 1):
            line = ((z - box[0, 0]) * n_y + y - box[0, 1]) * n_x - box[0, 2]
            first, last = int(np.int64(-1)), int(np.int64(-1))
            for x in range(window[0, 2], window[1, 2] + 1):
                if mask[line + x]:
                    answer = -1 if flat else decide(z - p_z, y - p_y, x - p_x, body, surface)
                    if answer < 0:
                        answer = inside_float32(z, y, x, body, surface)
                    n += answer
                    if answer > 0:
                        last = x
                        if first < 0:
                            first = x
            length = last - first if first >= 0 else -1
            if length >= 0:
                area = max(area, 0.0)
                if before >= 0:
                    area += (before + length) / 2
            before = length
        if k_z == 0:
            below, above = area, area
        elif k_z % 2:
            volume += _between(above, area)
            above = area
        else:
            volume += _between(below, area)
            below = area
        if n > bounds[1] and volume > bounds[1]:
            break
    return n, volume


@part
def _between(a: float, b: float) -> float:
    """Return the least volume between neighbouring sections of at least these areas; -1: there is none."""
    return (a + np.sqrt(a * b) + b) / 3 if a >= 0 and b >= 0 else 0.0

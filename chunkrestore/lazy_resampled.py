"""Dask arrays at another sampling, with the bits of the whole for any chunking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import dask.array as da
import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.kernels.resample import checked_resampling
from chunkrestore.kernels.resample import resample as resample_block
from chunkrestore.kernels.rescale import Rescaling


def resample(
    image: da.Array | np.ndarray, scale: float | Sequence[float], *, dtype: str | None = None
) -> Any:
    """Resample the last axes of an image linearly, as `scipy.ndimage.zoom` with ``order=1`` does with the whole.

    Parameters
    ----------
    image
        Dask or NumPy array: uint8, uint16, int16 or float32. Chunks may be uneven.
    scale
        Voxels per voxel, one per axis (of leading axes 1), or a shorter sequence for the last axes, or one number for
        all of them.
    dtype
        ``"float32"`` keeps what integers would round; by default that of `image`.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        ``round(n * scale)`` voxels per axis; chunks are scaled, and none is longer than its own chunk times the scale.

    Raises
    ------
    ValueError
        If `scale` does not suit the shape.
    """
    n_lead = max(image.ndim - 3, 0)
    if not isinstance(scale, int | float):
        per_axis = (1.0,) * (image.ndim - len(scale)) + tuple(scale)
        if any(s != 1 for s in per_axis[:n_lead]):
            raise ValueError(f"`scale` {per_axis} must be 1 on all axes but the last three")
        scale = per_axis[n_lead:]
    lattice = checked_resampling(image.shape[n_lead:], scale)
    if not hasattr(image, "dask"):
        planes = image.reshape(-1, *lattice.shape)
        whole, points = _whole(lattice.shape), _whole(lattice.zoomed_shape)
        results = [resample_block(plane, lattice, whole, points, dtype) for plane in planes]
        return np.stack(results).reshape(*image.shape[:n_lead], *lattice.zoomed_shape)
    return _lazily(image, lattice, dtype)


def _lazily(image: da.Array, lattice: Rescaling, dtype: str | None) -> da.Array:
    if image.ndim > len(lattice.shape):
        return da.stack([_lazily(part, lattice, dtype) for part in image])
    edges = [_edges(chunks, m) for chunks, m in zip(image.chunks, lattice.zoomed_shape, strict=True)]
    cells = [[slice(a, b) for a, b in itertools.pairwise(along)] for along in edges]
    meta = np.empty((0,) * image.ndim, image.dtype if dtype is None else dtype)

    def part(points: Slices) -> da.Array:
        read = lattice.source(points)
        # One chunk: what it is made of comes from the chunks that the region meets, whatever they are.
        stored = image[read].rechunk(-1)
        shape = tuple((p.stop - p.start,) for p in points)
        # Bound, because dask takes an argument called `dtype` for its own.
        function = partial(resample_block, lattice=lattice, read=read, points=points, dtype=dtype)
        return stored.map_blocks(function, chunks=shape, meta=meta)

    def nested(points: Slices) -> Any:
        if len(points) == len(cells):
            return part(points)
        return [nested((*points, cell)) for cell in cells[len(points)]]

    return da.block(nested(()))


def _edges(chunks: Sequence[int], n_points: int) -> list[int]:
    """Return borders of chunks of the new lattice, in proportion to those of the old one; none is empty."""
    n = sum(chunks)
    return sorted({edge * n_points // n for edge in itertools.accumulate(chunks, initial=0)})


def _whole(shape: Sequence[int]) -> Slices:
    return tuple(slice(0, n) for n in shape)

"""Write a whole array into a store, however it is chunked, without two tasks sharing a chunk or shard."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.ome_zarr.layout import aligned_chunks, region_shape
from chunkrestore.ome_zarr.pyramid import in_threads
from chunkrestore.ome_zarr.target import RegionWriter

Starts = tuple[tuple[int, ...], ...]


def fill(target: RegionWriter, data: Any) -> None:
    """Write `data` to `target`, of the same shape.

    A dask array is computed on the current scheduler, one task per chunk; chunks that do not lie on the
    borders of chunks or shards of the store are rechunked to the next borders. Anything else that can be
    sliced (NumPy, memory map, zarr) is written region by region in threads.

    Raises
    ------
    ValueError
        If the shape differs.
    """
    if tuple(data.shape) != target.shape:
        raise ValueError(f"`data` has shape {tuple(data.shape)} but {target.name} has {target.shape}")
    if hasattr(data, "__dask_graph__"):
        _fill_from_dask(target, data)
    else:
        _fill_from_array(target, data)


def _fill_from_array(target: RegionWriter, data: Any) -> None:
    unit = target.spatial_write_unit
    grid = BlockGrid.regular(target.spatial_shape, region_shape(target.spatial_shape, unit), write_unit=unit)
    places = itertools.product(range(target.n_t), range(target.n_c), grid)

    def work(place: tuple[int, int, Any]) -> None:
        t, c, block = place
        lead = tuple(i for axis, i in (("t", t), ("c", c)) if axis in target.axes)
        target.write(t, c, block.core, np.asarray(data[(*lead, *block.core)]))

    in_threads(work, places)


def _fill_from_dask(target: RegionWriter, data: Any) -> None:
    import dask

    chunks = tuple(
        aligned_chunks(lengths, unit, n)
        for lengths, unit, n in zip(data.chunks, target.write_unit, target.shape, strict=True)
    )
    if chunks != data.chunks:
        data = data.rechunk(chunks, method="tasks")
    starts = tuple((0, *itertools.accumulate(lengths[:-1])) for lengths in chunks)
    done = data.map_blocks(
        _write_chunk,
        target=target,
        starts=starts,
        chunks=tuple((1,) * len(lengths) for lengths in chunks),
        meta=np.empty((0,) * data.ndim, bool),
        dtype=bool,
    )
    dask.compute(done)


def _write_chunk(block: Any, target: RegionWriter, starts: Starts, block_id: tuple[int, ...]) -> np.ndarray:
    """Write one chunk of a dask array, and return one voxel as a sign that it is done."""
    block = np.asarray(block)
    first = tuple(s[i] for s, i in zip(starts, block_id, strict=True))
    n_spatial = len(target.spatial_axes)
    slices = tuple(slice(a, a + n) for a, n in zip(first[-n_spatial:], block.shape[-n_spatial:], strict=True))
    lead_axes = target.axes[:-n_spatial]
    for lead in np.ndindex(block.shape[:-n_spatial]):
        at = {axis: a + i for axis, a, i in zip(lead_axes, first, lead, strict=False)}
        target.write(at.get("t", 0), at.get("c", 0), slices, block[lead])
    return np.ones((1,) * block.ndim, bool)

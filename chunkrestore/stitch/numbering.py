"""Ids by position: 1 to the number of objects, in the order of their keys, whatever the block grid.

The *key* of an object is the raster index in the volume of the voxel that stands for it (the point that it was
predicted from, or its first voxel); no two objects share one. Blocks with the same index along the first axis form a
*slab*. Keys of a slab are smaller than those of the slabs after it, so an id is the number of objects in the slabs
before, which is a sum of counts, plus the rank within the slab. No process ever holds the keys of more than one slab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import BlockGrid

Keys = npt.NDArray[np.int64]


def rank(keys: Sequence[Keys]) -> list[Keys]:
    """Return for every key its place among all given ones, from 1, in arrays like those given.

    Parameters
    ----------
    keys
        int64 (n,) each; all different.
    """
    whole = np.concatenate([np.empty(0, np.int64), *keys])
    ranks = np.empty(len(whole), np.int64)
    ranks[np.argsort(whole)] = np.arange(1, len(whole) + 1)
    return np.split(ranks, np.cumsum([len(part) for part in keys]))[: len(keys)]


def slab_starts(counts: Mapping[tuple[int, ...], int], n_slabs: int) -> list[int]:
    """Return for each slab how many objects lie in the slabs before it.

    Parameters
    ----------
    counts
        Objects per block.
    n_slabs
        Blocks along the first axis.
    """
    totals = [0] * n_slabs
    for index, n in counts.items():
        totals[index[0]] += n
    # Python's integers: no number of objects overflows.
    return [sum(totals[:slab]) for slab in range(n_slabs)]


def owners(grid: BlockGrid, keys: Keys) -> npt.NDArray[np.int64]:
    """Return the index of the block whose core holds the voxel of each key, int64 (n, ndim)."""
    voxels = np.unravel_index(keys, grid.shape)
    return np.stack(
        [np.searchsorted(edges, v, side="right") - 1 for edges, v in zip(grid.edges, voxels, strict=True)],
        axis=-1,
    ).astype(np.int64)

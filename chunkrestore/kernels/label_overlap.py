"""Which labels of two blocks are one object because they cover the same voxels of the region that both have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block, Slices
from chunkrestore.kernels.components import Labels, Links, Table, along, core_table, side, step_between
from chunkrestore.kernels.label_runs import find_runs, pack, rows_among, unpack


def overlap_table(labels: Labels, block: Block, depth: Sequence[int]) -> dict[str, np.ndarray]:
    """Describe the labels of a block, as far as blocks that have seen a part of it must know.

    Parameters
    ----------
    labels
        Labels of what the block reads: any integers of at least 0, gaps allowed.
    block
        Where it lies.
    depth
        Voxels per axis that all blocks read around their cores, where the volume has them.

    Returns
    -------
    dict
        ``key`` and ``runs`` of the core, as from `core_table`; besides, ``low0``, ``high0``, ``low1``, ...: what the
        block and its neighbours along each axis have both read, as rows counted from 1, packed; none where the
        volume ends. Labels without a voxel in the core are background there too: they belong to other blocks.

    Raises
    ------
    ValueError
        If a label is negative.
    """
    if labels.min(initial=0) < 0:
        raise ValueError(f"labels must be at least 0, found {labels.min()}")
    table, label = core_table(labels[block.trim], block)
    for axis, (core, read, d) in enumerate(zip(block.core, block.read, depth, strict=True)):
        for name, goes_on, part in (
            ("low", core.start > 0, slice(0, core.start + d - read.start)),
            ("high", core.stop < block.volume_shape[axis], slice(max(core.stop - d - read.start, 0), None)),
        ):
            if goes_on:
                shared = labels[along(axis, part)]
                values, starts = find_runs(shared)
                table[f"{name}{axis}"] = pack(rows_among(values, label), starts, shared.size)
    return table


def overlap_links(own: Table, other: Table, block: Block, other_block: Block, threshold: float) -> Links:
    """Return which labels of two blocks are one object, by intersection over union.

    Voxels are counted in the region that both blocks have read. Two labels are linked if the voxels that both
    cover there are more than `threshold` times the voxels that either covers there.

    Parameters
    ----------
    own, other
        Their results of `overlap_table`.
    block, other_block
        Two blocks of one grid.
    threshold
        At least 0 and below 1. From 0.5 on no label is linked to two of the other block: both would have to cover
        more than half of it. Below, it may be, and all of them become one object.

    Returns
    -------
    numpy.ndarray
        int64 (n, 2): key of the own label, key of the other one; every pair once.
    """
    step = step_between(block, other_block)
    axis = next(axis for axis, s in enumerate(step) if s)
    both = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop))
        for a, b in zip(block.read, other_block.read, strict=True)
    )
    if any(part.start >= part.stop for part in both):
        return np.empty((0, 2), np.int64)
    a = _shared(own, block, side(axis, step), axis, both)
    b = _shared(other, other_block, side(axis, tuple(-s for s in step)), axis, both)
    rows = matching(a, b, (len(own["key"]), len(other["key"])), threshold)
    return np.column_stack([own["key"][rows[0] - 1], other["key"][rows[1] - 1]])


def matching(
    a: Labels, b: Labels, n: tuple[int, int], threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pairs of labels of two images of one region whose intersection over union exceeds `threshold`.

    Parameters
    ----------
    a, b
        Labels 0 to ``n[0]`` and 0 to ``n[1]``, of the same shape.
    n
        Largest label of each.
    threshold
        See `overlap_links`.
    """
    from scipy.sparse import coo_array

    a, b = a.ravel(), b.ravel()
    sizes = np.bincount(a, minlength=n[0] + 1), np.bincount(b, minlength=n[1] + 1)
    common = (a > 0) & (b > 0)
    counts = coo_array(
        (np.ones(np.count_nonzero(common), np.int64), (a[common], b[common])), shape=(n[0] + 1, n[1] + 1)
    ).tocsr()
    shared = counts.tocoo()
    row, column = (place.astype(np.int64) for place in shared.coords)
    union = sizes[0][row] + sizes[1][column] - shared.data
    one = shared.data > threshold * union
    return row[one], column[one]


def _shared(table: Table, block: Block, name: str, axis: int, both: Slices) -> Labels:
    """Return the part `both` of what a block shares with its neighbours along `axis`."""
    shape = list(block.read_shape)
    # As many layers as the number of voxels tells, on one side of what the block has read.
    shape[axis] = int(table[name][1].sum()) // math.prod(n for k, n in enumerate(shape) if k != axis)
    first = [part.start for part in block.read]
    if name.startswith("high"):
        first[axis] = block.read[axis].stop - shape[axis]
    rows = unpack(table[name], shape)
    return rows[tuple(slice(b.start - f, b.stop - f) for b, f in zip(both, first, strict=True))]

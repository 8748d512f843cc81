"""Which block an object belongs to by its centroid, and which voxels it shows in other cores.

Every block sees the same objects in the region that it shares with its neighbours, or nearly. The one whose core holds
an object's centroid keeps the whole object; the others drop it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block
from chunkrestore.kernels.components import Labels, Links, Table, core_table
from chunkrestore.kernels.label_runs import find_runs, pack, rows_of, unpack, volume_indices

_HIDDEN = np.iinfo(np.int64).max


def claim_table(labels: Labels, block: Block) -> dict[str, np.ndarray]:
    """Claim the objects whose centroid lies in the core.

    Parameters
    ----------
    labels
        Labels of what the block reads: any integers of at least 0, gaps allowed.
    block
        Where it lies.

    Returns
    -------
    dict
        One row per claimed object. ``first``: int64, raster index in the volume of the first voxel that the block
        saw of it; ``object``: int64, a number that no object of another block has; ``runs``: the core with rows,
        counted from 1, packed; ``spill_voxel``, ``spill_row``: raster indices in the volume (int64) and rows (int32) of
        claimed voxels outside the core.

    Raises
    ------
    ValueError
        If a label is negative, or the core holds more centroids than it has voxels.

    Notes
    -----
    The centroid is the mean position of the voxels that the block saw, compared in integers: a core holds it if
    ``start * n <= sum < stop * n`` on every axis, so it lies in exactly one core.

    An object that all blocks label alike and that is on no axis longer than the depth is claimed exactly once. The core
    that holds its centroid has read all of it. A block that has read a part of it only misses a voxel more than the
    depth away from its core on some axis; the object then lies wholly beyond the core on that axis, and so does the
    centroid of every part.
    """
    if labels.min(initial=0) < 0:
        raise ValueError(f"labels must be at least 0, found {labels.min()}")
    values, starts = find_runs(labels)
    label, row = rows_of(values)
    inside = np.concatenate([[False], _centroids_inside(labels, label, block)])
    row = (np.cumsum(inside) * inside)[row]
    n_claimed, n_voxels = int(inside.sum()), math.prod(block.core_shape)
    if n_claimed > n_voxels:
        raise ValueError(
            f"{n_claimed} objects have their centroid in a core of {n_voxels} voxels; use larger chunks or blocks"
        )
    first = np.empty(n_claimed + 1, np.int64)
    # Assigned backwards, so that the first run of each object is what remains.
    first[row[::-1]] = starts[::-1]
    rows = unpack(pack(row, starts, labels.size), labels.shape)
    core_values, core_starts = find_runs(rows[block.trim])
    outside = rows.copy()
    outside[block.trim] = 0
    spill = np.flatnonzero(outside)
    origin = [s.start for s in block.read]
    corner = [s.start for s in block.core]
    return {
        "first": volume_indices(first[1:], origin, labels.shape, block.volume_shape),
        # Named after voxels of the core, one each, as no other block can.
        "object": volume_indices(np.arange(n_claimed), corner, block.core_shape, block.volume_shape),
        "runs": pack(core_values, core_starts, rows[block.trim].size),
        "spill_voxel": volume_indices(spill, origin, labels.shape, block.volume_shape),
        "spill_row": outside.ravel()[spill],
    }


def shown_table(own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
    """Show what is claimed in a core; where several objects claim a voxel, the one that begins first has it.

    Parameters
    ----------
    own
        The block's result of `claim_table`.
    others
        Those of the blocks around it.
    block
        Where it lies.

    Returns
    -------
    dict
        One row per object that shows in the core: ``key`` and ``runs`` as from `components.core_table`, and
        ``object`` as from `claim_table`.
    """
    tables = [own, *others]
    objects = np.concatenate([t["object"] for t in tables])
    order = np.lexsort((objects, np.concatenate([t["first"] for t in tables])))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    ranks = np.split(rank, np.cumsum([len(t["first"]) for t in tables])[:-1])
    shown = unpack(own["runs"], block.core_shape, ranks[0])
    flat = np.where(shown > 0, shown, _HIDDEN).ravel()
    for table, rank_there in zip(others, ranks[1:], strict=True):
        place, claimed = _in_core(table["spill_voxel"], block)
        np.minimum.at(flat, place, rank_there[table["spill_row"][claimed] - 1])
    flat[flat == _HIDDEN] = 0
    result, label = core_table(flat.reshape(block.core_shape), block)
    return result | {"object": objects[order][label - 1]}


def shown_links(own: Table, other: Table) -> Links:
    """Return which rows of two results of `shown_table` are one object: int64 (n, 2), own key and other's key."""
    _, a, b = np.intersect1d(own["object"], other["object"], assume_unique=True, return_indices=True)
    return np.column_stack([own["key"][a], other["key"][b]])


def _centroids_inside(labels: Labels, label: Labels, block: Block) -> npt.NDArray[np.bool_]:
    """Return for each of `label` whether the core holds the centroid of its voxels."""
    n_columns = labels.shape[-1]
    # Runs end with their row here, so that all voxels of a run but for its last axis lie at one position.
    marked = labels.reshape(-1, n_columns)
    begins = np.ones(marked.shape, bool)
    begins[:, 1:] = marked[:, 1:] != marked[:, :-1]
    starts = np.flatnonzero(begins)
    length = np.diff(starts, append=labels.size)
    values = labels.ravel()[starts]
    kept = values > 0
    starts, length = starts[kept], length[kept]
    row = np.searchsorted(label, values[kept])
    count = np.bincount(row, length, len(label))
    inside = np.ones(len(label), bool)
    for axis, (position, core) in enumerate(
        zip(np.unravel_index(starts, labels.shape), block.trim, strict=True)
    ):
        total = position * length
        if axis == labels.ndim - 1:
            total += length * (length - 1) // 2
        # Sums of integers far below 2**53: exact as float64.
        moment = np.bincount(row, total, len(label))
        inside &= (moment >= core.start * count) & (moment < core.stop * count)
    return inside


def _in_core(
    voxels: npt.NDArray[np.int64], block: Block
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return where in the core those of `voxels` lie that lie in it, and which do."""
    position = np.stack(np.unravel_index(voxels, block.volume_shape))
    start = np.array([s.start for s in block.core])[:, None]
    stop = np.array([s.stop for s in block.core])[:, None]
    inside: npt.NDArray[np.bool_] = np.all((position >= start) & (position < stop), axis=0)
    return np.ravel_multi_index(tuple((position - start)[:, inside]), block.core_shape), inside

"""Pointers that cross the border of a core, as both blocks see them: links between labels of two blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block
from chunkrestore.kernels.components import Labels, Links, core_table, keys_of_pairs
from chunkrestore.kernels.label_runs import rows_among, volume_indices

Table = Mapping[str, np.ndarray]

REACHED = 1 + 1e-9
"""Squared lengths up to this much longer count as within a reach: three voxels of 0.4 are within 1.2."""


def steps(spacing: Sequence[float], reach: float) -> tuple[int, ...]:
    """Return how many voxels away, per axis, what a voxel points to can be: at least a neighbour."""
    return tuple(max(1, int(reach * REACHED / s)) for s in spacing)


def crossing_table(labels: Labels, pointer: npt.NDArray[np.int32], block: Block) -> dict[str, np.ndarray]:
    """Describe the labels of a core, and the pointers that lead out of it and into it.

    Parameters
    ----------
    labels
        Labels of the core, at least 0; voxels that point to each other have the same one.
    pointer
        Where the voxels of ``block.read`` point to, as raster indices in it; negative: nowhere, or not known. Known
        for all voxels whose pointers can cross the core's border.
    block
        Where it lies.

    Returns
    -------
    dict
        ``key`` and ``runs`` as from `components.core_table`. ``out_voxel``: int64, ascending, raster indices in the
        volume of voxels of the core that point out of it, and ``out_row``: int32, their labels, rows counted from 1.
        ``in_voxel``, ``in_row``: voxels outside that point into the core, and the labels that they point to.
    """
    table, label = core_table(labels, block)
    inside = np.zeros(pointer.shape, bool)
    inside[block.trim] = True
    source = np.flatnonzero(pointer >= 0)
    target = pointer.ravel()[source]
    begins, ends = inside.ravel()[source], inside.ravel()[target]
    for name, crossing, own in (("out", begins & ~ends, source), ("in", ends & ~begins, target)):
        in_core = np.unravel_index(own[crossing], pointer.shape)
        shifted = tuple(p - s.start for p, s in zip(in_core, block.trim, strict=True))
        table[f"{name}_voxel"] = volume_indices(
            source[crossing], [s.start for s in block.read], pointer.shape, block.volume_shape
        )
        table[f"{name}_row"] = rows_among(labels[shifted], label).astype(np.int32)
    return table


def crossing_links(own: Table, other: Table) -> Links:
    """Return which labels of two blocks pointers tie together: int64 (n, 2), own and other's key, every pair once."""
    pairs = []
    for here, there in (("out", "in"), ("in", "out")):
        _, a, b = np.intersect1d(
            own[f"{here}_voxel"], other[f"{there}_voxel"], assume_unique=True, return_indices=True
        )
        pairs.append(np.stack([own[f"{here}_row"][a], other[f"{there}_row"][b]]))
    rows, rows_there = np.concatenate(pairs, axis=1)
    return keys_of_pairs(rows, rows_there, own["key"], other["key"])

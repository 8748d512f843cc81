"""Labels of a block's core as other blocks must know them, and which of them touch across the border.

With connected components in every core this is connected components of the whole volume, exactly: voxels that are
neighbours belong to one component, whatever the grid. `chunkrestore.stitch.joining` makes objects of the links.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Block, Slices
from chunkrestore.kernels.label_runs import find_runs, pack, rows_among, rows_of, volume_indices

Labels = npt.NDArray[np.integer]
Links = npt.NDArray[np.int64]
Table = Mapping[str, np.ndarray]


def label_mask(mask: npt.NDArray[np.bool_], connectivity: int) -> tuple[Labels, int]:
    """Label the connected components of `mask`; neighbours differ in at most `connectivity` axes."""
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
    labels, n_objects = ndimage.label(mask, structure=structure)
    return labels, int(n_objects)


def core_table(labels: Labels, block: Block) -> tuple[dict[str, np.ndarray], Labels]:
    """Describe the labels of a core.

    Parameters
    ----------
    labels
        Labels of the core: any integers of at least 0, gaps allowed.
    block
        Where it lies.

    Returns
    -------
    table : dict
        One row per label, ascending. ``key``: int64, raster index in the volume of its first voxel in the core;
        ``runs``: the core with rows, counted from 1, in place of labels (see `label_runs.pack`). Painting is
        ``unpack(table["runs"], block.core_shape, ids)``.
    label : numpy.ndarray
        The label of each row.

    Raises
    ------
    ValueError
        If a label is negative.
    """
    values, starts = find_runs(labels)
    if values.min(initial=0) < 0:
        raise ValueError(f"labels must be at least 0, found {values.min()}")
    label, row = rows_of(values)
    first = np.empty(len(label) + 1, np.int64)
    # Assigned backwards, so that the first run of each label is what remains.
    first[row[::-1]] = starts[::-1]
    origin = [s.start for s in block.core]
    key = volume_indices(first[1:], origin, labels.shape, block.volume_shape)
    return {"key": key, "runs": pack(row, starts, labels.size)}, label


def surface_table(labels: Labels, block: Block) -> dict[str, np.ndarray]:
    """Describe the labels of a core, as far as blocks that touch it must know.

    Parameters, ``key``, ``runs`` and errors are those of `core_table`; besides, ``low0``, ``high0``, ``low1``, ...:
    first and last layer of the core along each axis, int32, rows counted from 1; none where the volume ends.
    """
    table, label = core_table(labels, block)
    for axis, (part, n) in enumerate(zip(block.core, block.volume_shape, strict=True)):
        for name, layer, goes_on in (
            ("low", slice(0, 1), part.start > 0),
            ("high", slice(-1, None), part.stop < n),
        ):
            if goes_on:
                face = labels[along(axis, layer)]
                rows = rows_among(face.ravel(), label).astype(np.int32)
                table[f"{name}{axis}"] = rows.reshape(face.shape)
    return table


def touching_links(own: Table, other: Table, block: Block, other_block: Block, connectivity: int) -> Links:
    """Return which labels of two blocks have voxels that are neighbours.

    Parameters
    ----------
    own, other
        Their results of `surface_table`.
    block, other_block
        Two blocks of one grid whose indices differ by at most 1 per axis.
    connectivity
        Voxels are neighbours if they differ in at most this many axes, by 1.

    Returns
    -------
    numpy.ndarray
        int64 (n, 2): key of the own label, key of the other one; every pair once.
    """
    step = step_between(block, other_block)
    across = [axis for axis, s in enumerate(step) if s]
    if len(across) > connectivity:
        return np.empty((0, 2), np.int64)
    here = own[side(across[0], step)]
    there = other[side(across[0], [-s for s in step])]
    for axis in across[1:]:
        here = here[along(axis, slice(-1, None) if step[axis] > 0 else slice(0, 1))]
        there = there[along(axis, slice(0, 1) if step[axis] > 0 else slice(-1, None))]
    pairs = []
    for shift in itertools.product(*((0,) if s else (-1, 0, 1) for s in step)):
        if np.count_nonzero(shift) + len(across) <= connectivity:
            near = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(shift, here.shape, strict=True))
            far = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(shift, here.shape, strict=True))
            pairs.append(np.stack([here[near].ravel(), there[far].ravel()]))
    a, b = np.concatenate(pairs, axis=1)
    foreground = (a > 0) & (b > 0)
    return keys_of_pairs(a[foreground], b[foreground], own["key"], other["key"])


def keys_of_pairs(a: Labels, b: Labels, own_key: np.ndarray, other_key: np.ndarray) -> Links:
    """Return pairs of rows (counted from 1) as pairs of keys, int64 (n, 2), every pair once."""
    pairs = np.unique(a.astype(np.int64) * (len(other_key) + 1) + b)
    a, b = np.divmod(pairs, len(other_key) + 1)
    return np.column_stack([own_key[a - 1], other_key[b - 1]])


def step_between(block: Block, other: Block) -> tuple[int, ...]:
    """Return how many steps of the index lie between two blocks, per axis; for neighbours -1, 0 or 1."""
    return tuple(b - a for a, b in zip(block.index, other.index, strict=True))


def side(axis: int, step: tuple[int, ...] | list[int]) -> str:
    """Return the column that holds what a block shares with a neighbour in the direction `step` along `axis`."""
    return f"{'high' if step[axis] > 0 else 'low'}{axis}"


def along(axis: int, part: slice) -> Slices:
    """Return slices that cut `part` out of an axis and leave those before it whole."""
    return (*(slice(None),) * axis, part)

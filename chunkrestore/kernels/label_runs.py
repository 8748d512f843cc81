"""Label images as runs of equal voxels: what is kept of a block while others are waited for.

Objects are many voxels wide, so runs take a small part of the memory of the image, cost one pass to find, and
writing new ids into them is faster than looking every voxel up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.integer]
Runs = npt.NDArray[np.int32]


def find_runs(labels: Labels) -> tuple[Labels, npt.NDArray[np.int64]]:
    """Return value and start of every run of equal voxels, in raster order; runs go on from row to row."""
    flat = labels.ravel()
    starts = np.concatenate(
        [np.zeros(min(flat.size, 1), np.int64), np.flatnonzero(flat[1:] != flat[:-1]) + 1]
    )
    return flat[starts], starts


def pack(values: Labels, starts: npt.NDArray[np.int64], size: int) -> Runs:
    """Return the runs of an image of `size` voxels as int32 (2, n_runs): value and length of each.

    Raises
    ------
    OverflowError
        If a value or the number of voxels exceeds int32.
    """
    if max(size, int(values.max(initial=0))) > np.iinfo(np.int32).max:
        raise OverflowError(f"a block of {size} voxels is too large for int32; use smaller chunks or blocks")
    return np.stack([values, np.diff(starts, append=size)]).astype(np.int32)


def unpack(runs: Runs, shape: Sequence[int], ids: npt.NDArray[np.integer] | None = None) -> Labels:
    """Return the image of `shape` that `pack` was given.

    Parameters
    ----------
    runs
        Result of `pack`.
    shape
        Shape of the image.
    ids
        What to write for each value from 1 on, in the dtype of the result; None writes the values, as int32.
    """
    values = runs[0] if ids is None else np.concatenate([np.zeros(1, ids.dtype), ids])[runs[0]]
    return np.repeat(values, runs[1]).reshape(tuple(shape))


def rows_of(values: Labels) -> tuple[Labels, npt.NDArray[np.int64]]:
    """Number the labels that occur.

    Parameters
    ----------
    values
        Labels of at least 0, in any order; 0 is background.

    Returns
    -------
    label : numpy.ndarray
        The different labels above 0, ascending.
    row : numpy.ndarray
        int64, one per value: place of its label in `label`, counted from 1; 0 for background.
    """
    largest = int(values.max(initial=0))
    if largest > 4 * len(values):
        label = np.unique(values[values > 0])
        return label, rows_among(values, label)
    present = np.zeros(largest + 1, bool)
    present[values] = True
    present[0] = False
    return np.flatnonzero(present).astype(values.dtype), (np.cumsum(present) * present)[values]


def rows_among(values: Labels, label: Labels) -> npt.NDArray[np.int64]:
    """Return the place of every value in `label` (ascending), counted from 1; 0 where it is not there."""
    if not len(label):
        return np.zeros(len(values), np.int64)
    place = np.minimum(np.searchsorted(label, values), len(label) - 1)
    return np.where(label[place] == values, place + 1, 0)


def volume_indices(
    flat: npt.NDArray[np.integer], origin: Sequence[int], shape: Sequence[int], volume_shape: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return raster indices in the volume for raster indices in a region of `shape` that begins at `origin`."""
    result = np.zeros(len(flat), np.int64)
    for axis, position in enumerate(np.unravel_index(flat, tuple(shape))):
        result += (position + origin[axis]) * math.prod(volume_shape[axis + 1 :])
    return result

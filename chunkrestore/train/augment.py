"""Augmentation: pure functions of a patch and a generator of random numbers.

Flips of all axes and the exchange of rows and columns make all eight symmetries of the square of a plane, rotations by
right angles among them; z stays z, since no microscope resolves it as it does y and x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.train.patches import FloatArray

Array: TypeAlias = npt.NDArray[Any]

OBJECT_SHARE = 0.8
"""Share of random crops of labels that are laid around a voxel of an object."""
_EVERY = 4
"""Voxels per axis of which one is asked whether it lies in an object."""


def augment_care(
    x: FloatArray, y: FloatArray, rng: np.random.Generator, shape: Sequence[int] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Turn a pair of images and change their intensities together.

    Input and target are scaled by one common factor (0.6 to 1.6) and shifted by one common offset (up to
    0.05): the network learns to keep intensities in the units of its input, whatever the percentiles of a
    new volume are.

    Parameters
    ----------
    x
        float32 (z, y, x) or (y, x), channels last if there are any.
    y
        float32 (z, y, x) or (y, x).
    rng
        Random numbers; the same state gives the same result.
    shape
        Voxels per axis of a random crop; the whole patch by default.

    Returns
    -------
    tuple of ndarray
        New arrays, float32.
    """
    x, y = turn(crop((x, y), _random_start(y.shape, shape, rng), shape or y.shape), rng)
    scale, shift = np.float32(rng.uniform(0.6, 1.6)), np.float32(rng.uniform(-0.05, 0.05))
    return x * scale + shift, y * scale + shift


def augment_stardist(
    x: FloatArray,
    labels: Array,
    rng: np.random.Generator,
    shape: Sequence[int] | None = None,
    *others: Array,
) -> tuple[Array, ...]:
    """Turn an image with its labels, and change the image's intensities.

    The image is scaled (0.5 to 2), shifted (up to 0.1) and given faint noise (standard deviation up to 0.05).

    Parameters
    ----------
    x
        float32 (z, y, x) or (y, x), channels last if there are any.
    labels
        Integers (z, y, x) or (y, x); 0 is background.
    rng
        Random numbers; the same state gives the same result.
    shape
        Voxels per axis of a random crop, four in five of which are laid around a voxel of an object; the whole
        patch by default.
    others
        What else belongs to the voxels and is turned with them, such as their classes.

    Returns
    -------
    tuple of ndarray
        New arrays: the image as float32, the labels, and `others`.
    """
    start = _object_start(labels, shape, rng)
    x, *turned = turn(crop((x, labels, *others), start, shape or labels.shape), rng)
    changed = x * rng.uniform(0.5, 2.0) + rng.uniform(-0.1, 0.1)
    changed += rng.normal(0, rng.uniform(0, 0.05), x.shape)
    return (changed.astype(np.float32), *turned)


def crop(arrays: Sequence[Array], start: Sequence[int], shape: Sequence[int]) -> list[Array]:
    """Return the same part of every array: `shape` voxels per spatial axis from `start`."""
    part = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    return [array[part] for array in arrays]


def turn(arrays: Sequence[Array], rng: np.random.Generator) -> list[Array]:
    """Return the arrays flipped along a random choice of axes, rows and columns exchanged in half of the cases.

    The spatial axes are those of the array with the fewest; rows and columns of different lengths stay what they are.
    """
    n_axes = min(array.ndim for array in arrays)
    flips = tuple(slice(None, None, int(rng.choice((1, -1)))) for _ in range(n_axes))
    rows, columns = arrays[0].shape[n_axes - 2 : n_axes]
    exchanged = rows == columns and rng.uniform() < 0.5
    turned = [array[flips] for array in arrays]
    if exchanged:
        turned = [np.swapaxes(array, n_axes - 2, n_axes - 1) for array in turned]
    return [np.array(array, order="C") for array in turned]


def _random_start(
    length: Sequence[int], shape: Sequence[int] | None, rng: np.random.Generator
) -> tuple[int, ...]:
    room = _room(length, shape)
    return tuple(int(rng.integers(n + 1)) for n in room)


def _object_start(labels: Array, shape: Sequence[int] | None, rng: np.random.Generator) -> tuple[int, ...]:
    """Return a random start, four in five times such that a random voxel of an object is inside."""
    start, room = _random_start(labels.shape, shape, rng), _room(labels.shape, shape)
    if shape is None or not any(room) or rng.uniform() >= OBJECT_SHARE:
        return start
    voxels = np.flatnonzero(labels[(slice(None, None, _EVERY),) * labels.ndim] > 0)
    if not len(voxels):
        return start
    lattice = [-(-n // _EVERY) for n in labels.shape]
    voxel = np.unravel_index(int(voxels[rng.integers(len(voxels))]), lattice)
    return tuple(
        int(np.clip(int(v) * _EVERY - rng.integers(p), 0, n))
        for v, p, n in zip(voxel, shape, room, strict=True)
    )


def _room(length: Sequence[int], shape: Sequence[int] | None) -> list[int]:
    """Return by how many voxels per axis a crop can move."""
    room = [n - p for n, p in zip(length, shape or length, strict=True)]
    if min(room) < 0:
        raise ValueError(f"a crop of {tuple(shape or ())} does not fit into patches of {tuple(length)}")
    return room

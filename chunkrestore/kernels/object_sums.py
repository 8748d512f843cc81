"""Sums over the voxels of every object of a block: what is added across blocks to measure whole objects.

All sums are exact integers, so their totals are the same whatever the blocks and their order. Coordinates count from
the block's own corner and are moved when blocks are merged (`chunkrestore.kernels.object_measures`), which keeps
sums of products within 64 bits.

A voxel's intensity counts as the integer ``value / unit``, with ``unit = 1`` for integers and ``2**-149``, the smallest
float32, for floats; squares count in ``unit**2``. Such sums need up to 600 bits, so they are kept as *limbs*::

    sum = 2**32 * first * (limbs[0] + 2**32 * limbs[1] + 2**64 * limbs[2] + ...)

in int64, each of which has room for 2**30 additions before it would have to be carried on. Voxels of a row are added in
64 bits up to 128 at a time, as long as their exponents are within 24 of each other, and only what comes out is
spread over limbs: exactness then costs little more than float64.

Imported inside functions only: this module loads numba.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.compiled import compiled, part
from chunkrestore.kernels.label_runs import find_runs, rows_among, rows_of
from chunkrestore.kernels.object_measures import INTENSITY_DTYPES

Integers = npt.NDArray[np.int64]

_PIECE = 128
"""Voxels that are added at once: 2**7 values below 2**48, times their places, stay below 2**62."""
_EXPONENTS = 24
"""Exponents among them: significands of 24 bits become integers below 2**48."""
_LOW = 2**32 - 1
_LIMBS = {"i": (4, 4), "f": (12, 21)}
"""Of sums and of sums of squares, by kind of intensity: integers below 2**32, and float32 from 2**-149 to 2**128."""


class Pieces(NamedTuple):
    """Where the objects of a block are: runs of voxels in raster order, which go on from row to row."""

    row: Integers
    """Row of the object in the block's table."""
    start: Integers
    """Raster index of the first voxel."""
    length: Integers
    """Voxels."""
    shape: Integers
    """Of the block: z, y, x; 1 for an axis that it lacks."""


def object_sums(
    labels: npt.NDArray[np.integer], origin: Sequence[int]
) -> tuple[dict[str, np.ndarray], Pieces]:
    """Count the voxels of every object, and add up their coordinates.

    Parameters
    ----------
    labels
        Of a block, two or three axes: any integers that fit into int64, 0 is background.
    origin
        First voxel of the block in the volume.

    Returns
    -------
    table : dict
        One row per object, by ascending label. ``ids``: int64 (n,); ``volume``: int64 (n,), voxels; ``sum``: int64
        (n, ndim), indices added up, from the block's first voxel; ``products``: int64 (n, ndim * (ndim + 1) / 2), the
        same of ``index_i * index_j`` for ``i <= j``; ``first`` and ``last``: int64 (n, ndim), corners of the box around
        the voxels, in the volume.
    pieces : Pieces
        For `intensity_sums`.

    Raises
    ------
    TypeError
        If labels are no integers.
    ValueError
        If a label exceeds int64, or the block is so large that a sum of products could exceed it.

    Notes
    -----
    Memory: 24 bytes per run of equal labels, and about 150 bytes per object.
    """
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels are integers, got {labels.dtype}")
    shape = np.array([1] * (3 - labels.ndim) + list(labels.shape), np.int64)
    # No voxel adds more than the square of the longest side.
    if math.prod(labels.shape) * max(labels.shape) ** 2 >= 2**63:
        raise ValueError(
            f"a block of {labels.shape} voxels is too large for sums in 64 bits; use a smaller `block_shape`"
        )
    values, starts = find_runs(labels)
    if labels.dtype == np.uint64 and values.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"label {values.max()} exceeds int64, which tables of objects have")
    ids, rows = _numbered(values)
    shown = np.flatnonzero(rows)
    pieces = Pieces(rows[shown] - 1, starts[shown], np.diff(starts, append=labels.size)[shown], shape)
    volume, sums, products = (np.zeros((len(ids), *k), np.int64) for k in ((), (3,), (6,)))
    first = np.tile(shape, (len(ids), 1))
    last = np.full((len(ids), 3), -1, np.int64)
    if len(ids):
        _add_places(pieces, volume, sums, products, first, last)
    ndim = labels.ndim
    own = slice(3 - ndim, None)
    return {
        "ids": ids.astype(np.int64),
        "volume": volume,
        "sum": sums[:, own],
        "products": products[:, -(ndim * (ndim + 1) // 2) :],
        "first": first[:, own] + np.asarray(origin, np.int64),
        "last": last[:, own] + np.asarray(origin, np.int64),
    }, pieces


def intensity_sums(image: np.ndarray, pieces: Pieces, n_objects: int) -> dict[str, np.ndarray]:
    """Add up the intensities of every object.

    Parameters
    ----------
    image
        The same block of an image, one of `INTENSITY_DTYPES`.
    pieces
        Where the objects are.
    n_objects
        How many they are.

    Returns
    -------
    dict
        One row per object. ``least`` and ``most``: (n,), in the image's dtype; ``total``, (n, n_limbs), ``square``, (n,
        n_limbs), and ``weighted``, (n, ndim, n_limbs): limbs, from the lowest possible one, of intensities, their
        squares, and their products with indices that count from the block's first voxel.

    Raises
    ------
    ValueError
        If the image is of another type, or an intensity within an object is NaN or infinite; the message names the
        voxel of the block.
    """
    if image.dtype.name not in INTENSITY_DTYPES:
        raise ValueError(
            f"intensities of {image.dtype} cannot be summed exactly; use {', '.join(INTENSITY_DTYPES)}"
        )
    is_float = image.dtype.kind == "f"
    flat = np.ascontiguousarray(image, np.float32 if is_float else image.dtype).ravel()
    n_limbs, n_squared = _LIMBS["f" if is_float else "i"]
    total = np.zeros((n_objects, n_limbs), np.int64)
    square = np.zeros((n_objects, n_squared), np.int64)
    weighted = np.zeros((n_objects, 3, n_limbs), np.int64)
    limits = np.finfo(np.float32) if is_float else np.iinfo(flat.dtype)
    least, most = np.full(n_objects, limits.max, flat.dtype), np.full(n_objects, limits.min, flat.dtype)
    if n_objects:
        sums = total, square, weighted, least, most
        wrong = -1
        if is_float:
            wrong = _add_floats(flat, flat.view(np.int32), pieces, *sums)
        else:
            _add_integers(flat, pieces, *sums)
        if wrong >= 0:
            where = tuple(int(i) for i in np.unravel_index(wrong, image.shape))
            raise ValueError(f"the intensity at {where} of the block, within an object, is {flat[wrong]}")
    found = {"total": total, "square": square, "weighted": weighted[:, 3 - image.ndim :]}
    return found | {"least": least.astype(image.dtype), "most": most.astype(image.dtype)}


def _numbered(values: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.integer], Integers]:
    """Return the labels that occur, ascending, and the place of every value among them from 1; 0 is background."""
    if values.min(initial=0) >= 0:
        return rows_of(values)
    ids = np.unique(values[values != 0])
    return ids, rows_among(values, ids)


@compiled
def _add_places(
    pieces: Pieces, volume: Integers, sums: Integers, products: Integers, first: Integers, last: Integers
) -> None:
    _, n_y, n_x = pieces.shape
    for k in range(len(pieces.row)):
        r, at, stop = pieces.row[k], pieces.start[k], pieces.start[k] + pieces.length[k]
        while at < stop:
            plane, x = at // n_x, at % n_x
            z, y = plane // n_y, plane % n_y
            n = min(stop - at, n_x - x)
            # Of x, x + 1, ..., x + n - 1
            of_x = n * x + n * (n - 1) // 2
            of_squares = n * x * x + x * n * (n - 1) + (n - 1) * n * (2 * n - 1) // 6
            volume[r] += n
            sums[r, 0] += n * z
            sums[r, 1] += n * y
            sums[r, 2] += of_x
            products[r, 0] += n * z * z
            products[r, 1] += n * z * y
            products[r, 2] += z * of_x
            products[r, 3] += n * y * y
            products[r, 4] += y * of_x
            products[r, 5] += of_squares
            first[r, 0], last[r, 0] = min(first[r, 0], z), max(last[r, 0], z)
            first[r, 1], last[r, 1] = min(first[r, 1], y), max(last[r, 1], y)
            first[r, 2], last[r, 2] = min(first[r, 2], x), max(last[r, 2], x + n - 1)
            at += n


@compiled
def _add_integers(
    flat: np.ndarray,
    pieces: Pieces,
    total: Integers,
    square: Integers,
    weighted: Integers,
    least: np.ndarray,
    most: np.ndarray,
) -> None:
    """Add pieces of at most `_PIECE` voxels of one row."""
    _, n_y, n_x = pieces.shape
    w = np.empty(_PIECE, np.int64)
    for k in range(len(pieces.row)):
        r, at, stop = pieces.row[k], pieces.start[k], pieces.start[k] + pieces.length[k]
        lo, hi = least[r], most[r]
        while at < stop:
            x = at % n_x
            n = min(stop - at, n_x - x, _PIECE)
            for i in range(n):
                value = flat[at + i]
                lo, hi = min(lo, value), max(hi, value)
                w[i] = value
            _add_piece(w, n, 0, at // n_x // n_y, at // n_x % n_y, x, total[r], square[r], weighted[r])
            at += n
        least[r], most[r] = lo, hi


@compiled
def _add_floats(
    flat: np.ndarray,
    bits: np.ndarray,
    pieces: Pieces,
    total: Integers,
    square: Integers,
    weighted: Integers,
    least: np.ndarray,
    most: np.ndarray,
) -> int:
    """The same for float32 and their `bits`; return the index of a voxel that is not finite, or -1."""
    _, n_y, n_x = pieces.shape
    w = np.empty(_PIECE, np.int64)
    for k in range(len(pieces.row)):
        r, at, stop = pieces.row[k], pieces.start[k], pieces.start[k] + pieces.length[k]
        lo, hi = least[r], most[r]
        while at < stop:
            x = at % n_x
            longest = min(stop - at, n_x - x, _PIECE)
            n, low, high = 0, 255, 1
            while n < longest:
                size = int(bits[at + n]) & 0x7FFFFFFF
                exponent = int(
                    max(size >> 23, 1)
                )  # of subnormal numbers it is that of the smallest normal ones
                if exponent == 255:
                    return int(at + n)
                if size:
                    if n and max(high, exponent) - min(low, exponent) > _EXPONENTS and low <= high:
                        break
                    low, high = min(low, exponent), max(high, exponent)
                lo, hi = min(lo, flat[at + n]), max(hi, flat[at + n])
                n += 1
            for i in range(n):
                size = int(bits[at + i]) & 0x7FFFFFFF
                exponent = int(max(size >> 23, 1))
                significand = (size & 0x7FFFFF) | (0x800000 if size >> 23 else 0)
                shifted = significand << max(exponent - low, 0)
                w[i] = -shifted if bits[at + i] < 0 else shifted
            if low <= high:
                place = at // n_x // n_y, at // n_x % n_y
                _add_piece(w, n, low - 1, place[0], place[1], x, total[r], square[r], weighted[r])
            at += n
        least[r], most[r] = lo, hi
    return -1


@part
def _add_piece(
    w: Integers,
    n: int,
    base: int,
    z: int,
    y: int,
    x: int,
    total: Integers,
    square: Integers,
    weighted: Integers,
) -> None:
    """Add ``w[i] * 2**base``, of the voxels x + i of a row, to the sums of an object."""
    of_all, of_places, high, mixed, low = 0, 0, 0, 0, 0
    for i in range(n):
        value = w[i]
        of_all += value
        of_places += i * value
        # In two halves of 24 bits, since squares have up to 96.
        upper, lower = value >> 24, value & 0xFFFFFF
        high += upper * upper
        mixed += upper * lower
        low += lower * lower
    _spread(total, base, of_all)
    _spread(square, 2 * base, low)
    if high or mixed:
        _spread(square, 2 * base + 25, mixed)
        _spread(square, 2 * base + 48, high)
    # Times a place it has up to 86 bits.
    upper, lower = of_all >> 32, of_all & _LOW
    _spread(weighted[2], base, of_places)
    for axis, place in enumerate((z, y, x)):
        _spread(weighted[axis], base, place * lower)
        if upper:
            _spread(weighted[axis], base + 32, place * upper)


@part
def _spread(limbs: Integers, bit: int, value: int) -> None:
    """Add ``value * 2**bit``."""
    k, shift = bit >> 5, bit & 31
    lower, upper = (value & _LOW) << shift, (value >> 32) << shift
    limbs[k] += lower & _LOW
    limbs[k + 1] += (lower >> 32) + (upper & _LOW)
    if upper:
        limbs[k + 2] += upper >> 32

"""The fixed lattice on which simulated values are drawn: cells of 64 voxels that begin at the volume's origin.

A value that is random, or whose last bit depends on the arrays that it is computed in, belongs to the cell and
not to the block that asks: every block computes whole cells and cuts its part out of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Region: TypeAlias = tuple[slice, ...]
Cell: TypeAlias = tuple[int, ...]
Array: TypeAlias = npt.NDArray[Any]

CELL = 64
"""Edge of a cell in voxels: large enough that a random generator per cell costs nothing."""


def checked_region(region: Sequence[slice], shape: Sequence[int]) -> Region:
    """Return `region` with its bounds written out.

    Raises
    ------
    ValueError
        If it has another number of axes than `shape`, is empty, steps, or reaches beyond the volume.
    """
    if len(region) != len(shape):
        raise ValueError(f"`region` has {len(region)} axes but the volume has {len(shape)}")
    bounds = []
    for part, n in zip(region, shape, strict=True):
        start, stop = 0 if part.start is None else part.start, n if part.stop is None else part.stop
        if not 0 <= start < stop <= n or part.step not in (None, 1):
            raise ValueError(f"`region` must lie in the volume of shape {tuple(shape)}, got {tuple(region)}")
        bounds.append(slice(int(start), int(stop)))
    return tuple(bounds)


def cells_of(region: Region, shape: Sequence[int], edge: int = CELL) -> Iterator[tuple[Cell, Region]]:
    """Yield the cells that meet `region`, in raster order, each with its own region, cut at the volume's end."""
    ranges = [range(part.start // edge, -(-part.stop // edge)) for part in region]
    for cell in itertools.product(*ranges):
        yield cell, tuple(slice(c * edge, min((c + 1) * edge, n)) for c, n in zip(cell, shape, strict=True))


def common(one: Region, other: Region) -> Region:
    """Return what two regions that meet share."""
    return tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def within(part: Region, whole: Region) -> Region:
    """Return `part` in the coordinates of `whole`."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def cell_rng(seed: int, purpose: int, cell: Cell) -> np.random.Generator:
    """Return the random generator of a cell; other purposes and cells have streams independent of it."""
    return np.random.default_rng([seed, purpose, *cell])


def assemble(
    region: Sequence[slice],
    shape: Sequence[int],
    cell_function: Callable[[Cell, Region], Array | tuple[Array, ...]],
) -> Any:
    r"""Cut `region` out of the cells that it meets.

    .. math:: assemble(A \cup B) = assemble(A) \cup assemble(B)

    bit by bit, since a cell is computed whole whatever region meets it.

    Parameters
    ----------
    region
        Part of the volume, one slice per axis.
    shape
        Voxels of the volume per axis.
    cell_function
        Called with a cell's index and its region; returns an array of that region's shape, or a tuple of them.

    Returns
    -------
    ndarray or tuple of ndarray
        Of the shape of `region`, as many as `cell_function` returns.

    Raises
    ------
    ValueError
        If `region` does not lie in the volume.
    """
    region = checked_region(region, shape)
    whole: list[Array] = []
    single = True
    for cell, own in cells_of(region, shape):
        found = cell_function(cell, own)
        single = not isinstance(found, tuple)
        arrays = found if isinstance(found, tuple) else (found,)
        if not whole:
            whole = [np.empty([part.stop - part.start for part in region], a.dtype) for a in arrays]
        part = common(region, own)
        here, there = within(part, region), within(part, own)
        for target, array in zip(whole, arrays, strict=True):
            target[here] = array[there]
    return whole[0] if single else tuple(whole)

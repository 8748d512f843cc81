"""Where patches are cut: around random spots that show something.

Spots are voxels of objects, or bins of some voxels that are brighter than background. The position of each is hashed,
and those with the smallest hashes are a random sample of them all, which blocks of any grid add to. A place is the
first voxel of a patch that has a spot in its central half.

A volume is divided into *cells* one to two patches long, some of which are held back for validation. Validation
patches lie inside these, training patches meet none of them: no voxel is on both sides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import BlockGrid, Halo
from chunkrestore.hashing import mixed

IntArray: TypeAlias = npt.NDArray[np.int64]

_SURPLUS = 16
"""Spots that are kept per patch that is wanted."""
_TRIES = 16
"""Patches that are tried around one spot."""
_BIN = 4
"""Voxels per axis over which intensities are averaged, since a single voxel shows noise."""


class Spots:
    """A random sample of what shows in one volume: at most `most` positions, kept by their hashes.

    Parameters
    ----------
    lattice
        Length per axis of the lattice that spots lie on.
    n_patches
        Patches that will be wanted.
    key
        Whole numbers, other ones of which sample other spots.
    """

    def __init__(self, lattice: Sequence[int], n_patches: int, key: Sequence[int]) -> None:
        self.lattice = tuple(lattice)
        self.n = 0
        """Spots that were shown, kept or not."""
        self.hashes = np.empty(0, np.uint64)
        """Ascending."""
        self.raster = np.empty(0, np.uint64)
        """Raster index of each spot in the lattice."""
        self._most = _SURPLUS * n_patches
        self._key = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)

    def add(self, first: Sequence[int], shows: npt.NDArray[np.bool_]) -> None:
        """Add the spots of a part of the lattice that begins at `first`."""
        raster = np.zeros((1,) * shows.ndim, np.uint64)
        for axis, (a, n, length) in enumerate(zip(first, shows.shape, self.lattice, strict=True)):
            along = np.arange(a, a + n, dtype=np.uint64)
            raster = raster * np.uint64(length) + along.reshape(
                [-1 if k == axis else 1 for k in range(shows.ndim)]
            )
        found = np.broadcast_to(raster, shows.shape)[shows]
        self.n += len(found)
        hashes = mixed(found + self._key)
        if len(self.hashes) == self._most:
            below = hashes < self.hashes[-1]
            found, hashes = found[below], hashes[below]
        found, hashes = np.concatenate([self.raster, found]), np.concatenate([self.hashes, hashes])
        # Ties cannot be: the hash is a permutation of 64-bit numbers.
        order = np.argsort(hashes)[: self._most]
        self.raster, self.hashes = found[order], hashes[order]

    def positions(self) -> IntArray:
        """Return (n, n_axes): where the spots lie in the lattice, in the order of their hashes."""
        index = np.unravel_index(self.raster.astype(np.int64), self.lattice)
        return np.stack(index, axis=1).astype(np.int64)


def bin_shape(patch_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the voxels of a bin: 4 per axis, less for thin patches."""
    return tuple(max(1, min(_BIN, p // 4)) for p in patch_shape)


def bin_means(image: npt.NDArray[Any], size: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return means over bins, added in one order whatever the shape; an incomplete bin at the end is dropped."""
    means = image
    for axis, b in enumerate(size):
        whole, lead = means.shape[axis] // b * b, (slice(None),) * axis
        parts = [means[(*lead, slice(k, whole, b))] for k in range(b)]
        means = functools.reduce(lambda total, part: np.add(total, part, dtype=np.float64), parts)
    return means / np.float64(math.prod(size))


@dataclass(frozen=True)
class Ground:
    """A volume that patches are cut from."""

    cells: BlockGrid
    """Its cells, as blocks without halo."""
    offset: int
    """Number of its first cell; volumes of one sample have the same."""
    patch_shape: tuple[int, ...]
    """Voxels per axis."""

    @classmethod
    def of(cls, shape: Sequence[int], patch_shape: Sequence[int], offset: int) -> Ground:
        """Divide a volume into cells at least as long as a patch and less than twice as long."""
        counts = [n // p for n, p in zip(shape, patch_shape, strict=True)]
        edges = tuple(tuple(i * n // c for i in range(c + 1)) for n, c in zip(shape, counts, strict=True))
        return cls(BlockGrid(edges, Halo((0,) * len(edges))), offset, tuple(patch_shape))

    def cell(self, voxels: IntArray) -> IntArray:
        """Return the number of the cell that each voxel lies in."""
        index = tuple(
            np.searchsorted(edges, voxels[:, axis], side="right") - 1
            for axis, edges in enumerate(self.cells.edges)
        )
        return np.ravel_multi_index(index, self.cells.n_blocks).astype(np.int64) + self.offset

    def met(self, start: IntArray) -> IntArray:
        """Return (n, 2 ** n_axes): the cells that patches meet, those of their corners."""
        corners = itertools.product(*((0, p - 1) for p in self.patch_shape))
        return np.stack([self.cell(start + np.array(corner)) for corner in corners], axis=1)

    def bounds(self, cell: IntArray) -> tuple[IntArray, IntArray]:
        """Return the first and the last place of patches inside each cell."""
        index = np.unravel_index(cell - self.offset, self.cells.n_blocks)
        both = zip(self.cells.edges, index, self.patch_shape, strict=True)
        ends = [(np.array(edges)[i], np.array(edges)[i + 1] - p) for edges, i, p in both]
        return np.stack([a for a, _ in ends], axis=1), np.stack([b for _, b in ends], axis=1)

    def last(self) -> IntArray:
        """Return the last place of a patch in the volume."""
        return np.array(self.cells.shape, np.int64) - np.array(self.patch_shape)


@dataclass(frozen=True)
class Wanted:
    """What is chosen."""

    n_training: int
    """Training patches."""
    n_validation: int
    """Validation patches, at most: cells held back may not have as many places."""
    share: float
    """Share of either that must have a spot in their central half; the others come from anywhere."""
    validation: float
    """Share of the cells that are held back."""


def choose(
    grounds: Sequence[Ground], spots: Sequence[Spots], scale: Sequence[int], wanted: Wanted, seed: int
) -> tuple[IntArray, IntArray]:
    """Choose places at random, without repetition, for training and for validation.

    Parameters
    ----------
    grounds, spots
        The volumes and what shows in them.
    scale
        Voxels per axis from one point of the spots' lattice to the next.
    wanted
        How many.
    seed
        Seed of the choice.

    Returns
    -------
    training, validation : ndarray
        (n, 1 + n_axes) each: volume and first voxel, ascending.

    Raises
    ------
    ValueError
        If there are not enough places; the message says how many there are.
    """
    rng = np.random.default_rng([seed, 4])
    step = np.array(scale)
    voxels = [each.positions() * step + step // 2 for each in spots]
    cells = [ground.cell(own) for ground, own in zip(grounds, voxels, strict=True)]
    held = _held_cells(grounds, np.unique(np.concatenate(cells)), wanted.validation, rng)
    is_held = [np.isin(own, held) for own in cells]
    n_shown = math.ceil(wanted.share * wanted.n_training)
    rows = _around(grounds, spots, voxels, [~h for h in is_held], held, rng)[:n_shown]
    if len(rows) < n_shown:
        raise ValueError(
            f"{n_shown} of {wanted.n_training} training patches must have content, but only {len(rows)} places with "
            f"content were found ({sum(each.n for each in spots)} voxels or bins show any); lower `n_patches` or "
            "`content`, or give more volumes"
        )
    training = _first(wanted.n_training, rows, _anywhere(grounds, wanted.n_training - n_shown, held, rng))
    if len(training) < wanted.n_training:
        raise ValueError(
            f"only {len(training)} places for {wanted.n_training} training patches were found; lower `n_patches`, or "
            "give more volumes"
        )
    n_shown = math.ceil(wanted.share * wanted.n_validation)
    rows = _around(grounds, spots, voxels, is_held, None, rng)[:n_shown]
    others = _inside(grounds, held, rng)[: wanted.n_validation - n_shown]
    return training, _first(wanted.n_validation, rows, others)


def _first(n: int, *rows: IntArray) -> IntArray:
    """Return the first `n` rows that differ, ascending."""
    every = np.concatenate(rows)
    _, index = np.unique(every, axis=0, return_index=True)
    return np.unique(every[np.sort(index)[:n]], axis=0)


def _held_cells(
    grounds: Sequence[Ground], with_content: IntArray, share: float, rng: np.random.Generator
) -> IntArray:
    """Return the cells for validation: the same share of those with content and of those without."""
    n_cells = max(ground.offset + len(ground.cells) for ground in grounds)
    if share and len(with_content) < 2:
        raise ValueError(
            f"content lies in {len(with_content)} of {n_cells} cells of the volumes, and training and validation need "
            "one each; give more volumes, a smaller `patch_shape`, less `content`, or `validation=0`"
        )
    without = np.setdiff1d(np.arange(n_cells), with_content)
    n = max(int(share > 0), round(share * len(with_content)))
    chosen = [rng.permutation(with_content)[:n], rng.permutation(without)[: round(share * len(without))]]
    return np.concatenate(chosen)


def _around(
    grounds: Sequence[Ground],
    spots: Sequence[Spots],
    voxels: Sequence[IntArray],
    used: Sequence[npt.NDArray[np.bool_]],
    held: IntArray | None,
    rng: np.random.Generator,
) -> IntArray:
    """Return patches around spots, in random order: a first one for every spot, then a second one, ...

    With `held`, patches that meet those cells are left out; without, they lie inside the cell of their spot.
    """
    rows, ranks = [], []
    for i, (ground, own, at, use) in enumerate(zip(grounds, spots, voxels, used, strict=True)):
        patch = np.array(ground.patch_shape)
        around = np.tile(at[use], (_TRIES, 1))
        start = around - rng.integers(patch // 4, patch - patch // 4, around.shape)
        low, high = (
            (np.zeros_like(patch), ground.last()) if held is not None else ground.bounds(ground.cell(around))
        )
        start = np.clip(start, low, high)
        rank = np.stack(
            [np.repeat(np.arange(_TRIES, dtype=np.uint64), use.sum()), np.tile(own.hashes[use], _TRIES)]
        )
        free = np.ones(len(start), bool) if held is None else ~np.isin(ground.met(start), held).any(axis=1)
        rows.append(np.column_stack([np.full(free.sum(), i), start[free]]))
        ranks.append(rank[:, free])
    both, rank = np.concatenate(rows), np.concatenate(ranks, axis=1)
    both = both[np.lexsort((rank[1], rank[0]))]
    _, index = np.unique(both, axis=0, return_index=True)
    return both[np.sort(index)]


def _anywhere(grounds: Sequence[Ground], n: int, held: IntArray, rng: np.random.Generator) -> IntArray:
    """Return some more than `n` patches from anywhere that meet no cell of `held`; large volumes give more."""
    size = np.array([len(ground.cells) for ground in grounds])
    volume = rng.choice(len(grounds), _TRIES * n, p=size / size.sum())
    rows = [np.empty((0, 1 + len(grounds[0].patch_shape)), np.int64)]
    for i, ground in enumerate(grounds):
        start = rng.integers(0, ground.last() + 1, (np.count_nonzero(volume == i), len(ground.patch_shape)))
        free = ~np.isin(ground.met(start), held).any(axis=1)
        rows.append(np.column_stack([np.full(free.sum(), i), start[free]]))
    return rng.permutation(np.concatenate(rows))


def _inside(grounds: Sequence[Ground], held: IntArray, rng: np.random.Generator) -> IntArray:
    """Return a patch inside every cell of `held` and every volume that has it, in random order."""
    rows = [np.empty((0, 1 + len(grounds[0].patch_shape)), np.int64)]
    for i, ground in enumerate(grounds):
        own = held[(held >= ground.offset) & (held < ground.offset + len(ground.cells))]
        low, high = ground.bounds(own)
        rows.append(np.column_stack([np.full(len(own), i), rng.integers(low, high + 1)]))
    return rng.permutation(np.concatenate(rows))

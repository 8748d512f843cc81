r"""Where the objects of a phantom are: decided locally, and the same whatever region asks.

Space is divided into placement cells. Every cell has the same number of candidates, whose random numbers are
hashed from the seed and the candidate's number, so that any of them is drawn without the others. `scattered`
keeps a candidate by chance alone. `packed` keeps it if it also fits, by random sequential packing in an order in
which dependencies end soon:

- cells are at least as wide as two objects can be in each other's way, so only neighbouring cells matter;
- cells of equal parity along z, y and x have one of eight colours, and two of one colour are no neighbours.
  Cells are filled colour by colour. What lies in a cell thus depends on a chain of neighbours of ever earlier
  colours, and since colours follow a Gray code, a chain leads at most 1, 2 and 4 cells away along z, y and x.

So a region computes its own cells and few around them, and finds what every other region finds.

References
----------
.. [1] Feder, Random sequential adsorption, J. Theor. Biol. 87, 1980.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.simulate.hashing import Floats, Keys, Purpose, uniform
from chunkrestore.simulate.lattice import Region

Bools: TypeAlias = npt.NDArray[np.bool_]

COLOURS = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (1, 0, 0))
"""Parities (z, y, x) of the cells in the order in which they are filled: neighbours in a Gray code."""

_DRAWS = 4
"""Random numbers that place a candidate: z, y, x and its chance."""


class Density(Protocol):
    """How likely candidates are tried, by position."""

    def chance(self, points: Floats) -> Floats:
        """Return the probability at each of `points` (n, 3), in voxels."""

    def possible(self, low: Floats, high: Floats) -> Bools:
        """Return whether the chance can differ from 0 in each of the boxes from `low` to `high` (n, 3)."""


@dataclass(frozen=True)
class Everywhere:
    """The same chance at every position."""

    value: float = 1.0
    """Probability that a candidate is tried."""

    def chance(self, points: Floats) -> Floats:
        """Return `value` for each of `points`."""
        return np.full(len(points), self.value)

    def possible(self, low: Floats, high: Floats) -> Bools:
        """Return whether there is any chance."""
        return np.full(len(low), self.value > 0)


@dataclass(frozen=True)
class Placement:
    """Objects by rising key: one row each."""

    keys: Keys
    """Number of the candidate; the object's id is one more."""
    centres: Floats
    """(z, y, x) in voxels, (n, 3)."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Ids of the objects in label volumes, from 1."""
        return (self.keys + 1).astype(np.int32)


@dataclass(frozen=True)
class Candidates:
    """Candidates for the objects of a volume: `per_cell` in each placement cell."""

    shape: tuple[int, ...]
    """Voxels of the volume per axis (z, y, x)."""
    edge: tuple[float, ...]
    """Edge of a placement cell in voxels."""
    per_cell: int
    """Candidates of each cell; those beyond the volume's end never become objects."""
    density: Density
    """The chance of each candidate."""
    seed: int
    """Seed of the volume."""

    def __post_init__(self) -> None:
        n_ids = math.prod(self.grid) * self.per_cell
        if n_ids > np.iinfo(np.int32).max:
            raise ValueError(
                f"`shape` {self.shape} has room for {n_ids} candidates, but ids are positive int32 numbers, at most "
                f"{np.iinfo(np.int32).max}; simulate a smaller volume or larger, sparser objects"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of placement cells per axis."""
        return tuple(math.ceil(n / e) for n, e in zip(self.shape, self.edge, strict=True))

    def box(self, region: Region, reach: float) -> CellBox:
        """Return the cells in which the centres of objects lie that `region`, grown by `reach` voxels, holds."""
        bounds = zip(region, self.edge, self.grid, strict=True)
        low, high = [], []
        for part, edge, n in bounds:
            # Voxel 0 extends from -0.5 to 0.5: the lattice begins at -0.5.
            low.append(min(max(math.floor((part.start - reach) / edge), 0), n))
            high.append(min(max(math.ceil((part.stop + reach) / edge), 0), n))
        return CellBox(tuple(low), tuple(high))

    def tried(self, cells: Keys) -> tuple[Keys, Floats]:
        """Return keys and centres, by rising key, of the candidates of `cells` (n, 3) that chance lets try."""
        corner = cells * np.array(self.edge) - 0.5
        cells = cells[self.density.possible(corner, corner + self.edge)]
        keys = (self._raster(cells)[:, None] * self.per_cell + np.arange(self.per_cell)).ravel()
        draws = uniform(self.seed, Purpose.PLACES, keys, _DRAWS)
        centres = (np.repeat(cells, self.per_cell, axis=0) + draws[:, :3]) * np.array(self.edge) - 0.5
        wanted = (centres < np.array(self.shape) - 0.5).all(axis=1)
        wanted[wanted] = draws[wanted, 3] < self.density.chance(centres[wanted])
        return keys[wanted], centres[wanted]

    def _raster(self, cells: Keys) -> Keys:
        _, ny, nx = self.grid
        return np.asarray((cells[:, 0] * ny + cells[:, 1]) * nx + cells[:, 2], dtype=np.int64)

    def cells_of(self, keys: Keys) -> Keys:
        """Return the cells (n, 3) of candidates."""
        return np.stack(np.unravel_index(keys // self.per_cell, self.grid), axis=-1).astype(np.int64)


@dataclass(frozen=True)
class CellBox:
    """A box of placement cells."""

    low: tuple[int, ...]
    """First cell per axis."""
    high: tuple[int, ...]
    """The cell after the last, per axis."""

    def grown(self, by: tuple[int, ...], grid: tuple[int, ...]) -> CellBox:
        """Return the box with `by` more cells per axis on each side, cut at the grid's end."""
        low = tuple(max(a - g, 0) for a, g in zip(self.low, by, strict=True))
        return CellBox(low, tuple(min(b + g, n) for b, g, n in zip(self.high, by, grid, strict=True)))

    def cells(self, parity: tuple[int, ...] | None = None) -> Keys:
        """Return the cells (n, 3), or those of one parity, in raster order."""
        steps = 1 if parity is None else 2
        starts = (
            self.low if parity is None else [a + (a + p) % 2 for a, p in zip(self.low, parity, strict=True)]
        )
        axes = [np.arange(a, b, steps) for a, b in zip(starts, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int64)


def scattered(candidates: Candidates, region: Region, reach: float) -> Placement:
    """Return the objects whose centres may lie within `reach` voxels of `region`: all that chance lets try."""
    return Placement(*candidates.tried(candidates.box(region, reach).cells()))


@dataclass(frozen=True)
class Spacing:
    """Which two objects are too close."""

    radii: Callable[[Keys], Floats]
    """Radius of each candidate in voxels."""
    factor: float
    """Least distance in sums of the radii."""
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Extent of the mean object along each axis relative to its radius: distances are taken where it is round."""

    @staticmethod
    def edge(radius: float, factor: float, scale: tuple[float, float, float]) -> tuple[float, ...]:
        """Return the edge of placement cells wide enough that only objects of neighbouring ones can be too close."""
        # A little more, so that rounding never makes two conflict that are two cells apart.
        return tuple(2 * factor * radius * s * (1 + 1e-9) for s in scale)


def packed(candidates: Candidates, region: Region, reach: float, spacing: Spacing) -> Placement:
    """Return the objects whose centres may lie within `reach` voxels of `region`: those that fit.

    A candidate becomes an object unless an object of an earlier colour, or an earlier candidate of its own cell
    that became one, is closer than `spacing` allows. Returns every such object of the cells that the grown region
    meets; memory is proportional to them.
    """
    target = candidates.box(region, reach)
    crowd = _Crowd(target.grown((1, 2, 4), candidates.grid), spacing)
    for order, parity in enumerate(COLOURS):
        cells = target.grown(_chain(order), candidates.grid).cells(parity)
        crowd.fill(order, candidates, *candidates.tried(cells))
    keys, centres = np.concatenate(crowd.keys), np.concatenate(crowd.centres)
    cells = candidates.cells_of(keys)
    asked = np.flatnonzero(((cells >= target.low) & (cells < target.high)).all(axis=1))
    asked = asked[np.argsort(keys[asked])]
    return Placement(keys[asked], centres[asked])


def _chain(order: int) -> tuple[int, ...]:
    """Return how far a chain of colours leads that begins at the last and ends at this one: cells per axis."""
    steps = itertools.pairwise(COLOURS[order:])
    changes = [[a != b for a, b in zip(one, other, strict=True)] for one, other in steps]
    return tuple(sum(change[axis] for change in changes) for axis in range(3))


class _Crowd:
    """The objects found so far, by cell."""

    def __init__(self, box: CellBox, spacing: Spacing) -> None:
        # One more cell around, always empty, so that every cell has 26 neighbours.
        self.low = np.array(box.low) - 1
        self.extent = np.array(box.high) - box.low + 2
        self.spacing = spacing
        self.counts = np.zeros(int(self.extent.prod()), dtype=np.intp)
        self.slots = np.full((len(self.counts), 2, 4), np.inf)
        self.keys: list[Keys] = [np.empty(0, np.int64)]
        self.centres: list[Floats] = [np.empty((0, 3))]

    def fill(self, order: int, candidates: Candidates, keys: Keys, centres: Floats) -> None:
        """Add those of the candidates of one colour, by rising key, that fit."""
        bodies = np.column_stack([centres / np.array(self.spacing.scale), self.spacing.radii(keys)])
        places = self._places(candidates.cells_of(keys) - self.low)
        rows = self._fitting(order, bodies, places)
        while len(rows):
            first = np.flatnonzero(np.diff(places[rows], prepend=-1))
            found = rows[first]
            self._add(places[found], bodies[found])
            self.keys.append(keys[found])
            self.centres.append(centres[found])
            # The others of a cell stay if they fit beside the one just found in it.
            newest = np.repeat(found, np.diff(first, append=len(rows)))
            rows = rows[(rows != newest) & ~self._too_close(bodies[newest], bodies[rows])]

    def _fitting(self, order: int, bodies: Floats, places: Keys) -> Keys:
        """Return the rows that no object of a neighbouring cell is too close to."""
        rows = np.arange(len(bodies))
        for step in _earlier_neighbours(order):
            neighbours = places[rows] + int(self._places(np.array([step]))[0])
            blocked = np.zeros(len(rows), dtype=np.bool_)
            for slot in range(int(self.counts[neighbours].max(initial=0))):
                filled = np.flatnonzero(self.counts[neighbours] > slot)
                others = self.slots[neighbours[filled], slot]
                blocked[filled] |= self._too_close(others, bodies[rows[filled]])
            rows = rows[~blocked]
        return rows

    def _too_close(self, some: Floats, others: Floats) -> Bools:
        dz, dy, dx, _ = (some - others).T
        least = self.spacing.factor * (some[:, 3] + others[:, 3])
        return np.asarray(dz * dz + dy * dy + dx * dx < least * least)

    def _add(self, places: Keys, bodies: Floats) -> None:
        slots = self.counts[places]
        if slots.max(initial=0) >= self.slots.shape[1]:
            self.slots = np.concatenate([self.slots, np.full_like(self.slots, np.inf)], axis=1)
        self.slots[places, slots] = bodies
        self.counts[places] += 1

    def _places(self, cells: Keys) -> Keys:
        _, ny, nx = self.extent
        return np.asarray((cells[:, 0] * ny + cells[:, 1]) * nx + cells[:, 2], dtype=np.int64)


@lru_cache(maxsize=8)
def _earlier_neighbours(order: int) -> tuple[tuple[int, ...], ...]:
    """Return the steps to the neighbours that are filled before a cell of this colour, the nearest first."""

    def earlier(step: tuple[int, ...]) -> bool:
        parity = tuple((p + s) % 2 for p, s in zip(COLOURS[order], step, strict=True))
        return COLOURS.index(parity) < order  # type: ignore[arg-type]

    steps: Iterator[tuple[int, ...]] = itertools.product((-1, 0, 1), repeat=3)
    return tuple(sorted(filter(earlier, steps), key=lambda step: sum(map(abs, step))))

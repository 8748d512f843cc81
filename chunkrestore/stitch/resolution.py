"""Rounds of decisions across blocks: every block decides again until none changes.

A label operator whose objects compete decides per block; what it decides may depend on what survives around the
block. `resolve` repeats those decisions until nothing changes: every block sees its neighbours' survivors of the
round before (a Jacobi iteration), and only blocks whose neighbours changed decide again. The last round changes
nothing, which is the certificate that all decisions agree.

The functions that do the deciding are handed in, so the same loop serves tables in memory
(`chunkrestore.stitch.objects`) and tables on disk, decided by tasks on a cluster (`chunkrestore.jobs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from chunkrestore.grid import BlockGrid

Index = tuple[int, ...]
Key = TypeVar("Key", bound=Hashable)
Survivors = TypeVar("Survivors")

_MAX_ROUNDS = 10_000
"""More rounds than any chain of decisions can need; reaching it is a defect, not bad luck."""


def neighbours(grid: BlockGrid, index: Index, reach: int) -> list[Index]:
    """Return the other blocks whose cores come within `reach` voxels of the core at `index`."""
    core = grid.block(index).core
    region = tuple(slice(s.start - reach, s.stop + reach) for s in core)
    return [other for other in grid.indices_meeting(region) if other != tuple(index)]


class Reaches:
    """How far the objects of every block reach, and so which blocks' objects can meet.

    Parameters
    ----------
    grid
        The blocks.
    radii
        For every block that has objects, how far any of them reaches around its point, in voxels. Blocks without
        objects are left out, and near none.

    Notes
    -----
    Radii are kept per block: one giant makes its own surroundings large, not those of every block.
    """

    def __init__(self, grid: BlockGrid, radii: Mapping[Index, float]) -> None:
        self._grid = grid
        self._radii = radii
        self._largest = max(radii.values(), default=0.0)

    def rivals(self, index: Index) -> list[Index]:
        """Return the other blocks with an object that can meet one of this block's."""
        return self._near(index, self._radii[index]) if index in self._radii else []

    def between(self, index: Index, other: Index) -> float:
        """Return how far a point of one block's objects can be from the other's core if the objects meet."""
        return self._radii[index] + self._radii[other]

    def visitors(self, index: Index) -> list[Index]:
        """Return the other blocks with an object that can show in this block's core."""
        return self._near(index, 0.0)

    def _near(self, index: Index, own_reach: float) -> list[Index]:
        core = self._grid.block(index).core
        found = []
        for other in neighbours(self._grid, index, math.ceil(own_reach + self._largest)):
            there = self._grid.block(other).core
            gap = max(max(a.start - b.stop, b.start - a.stop) for a, b in zip(core, there, strict=True))
            if other in self._radii and gap < own_reach + self._radii[other]:
                found.append(other)
        return found


def resolve(
    near: Callable[[Key], Sequence[Key]],
    survivors: Mapping[Key, Survivors],
    settle: Callable[[Sequence[Key], Mapping[Key, Survivors]], Mapping[Key, Survivors]],
) -> tuple[dict[Key, Survivors], int]:
    """Repeat block decisions until none changes.

    Parameters
    ----------
    near
        Gives the other blocks that a block's decisions can depend on; symmetric.
    survivors
        For every block, something that stands for its present decisions; compared with ``==``.
    settle
        Decides the given blocks against the given survivors of all blocks; returns their new survivors.

    Returns
    -------
    survivors : dict
        The final decisions.
    n_rounds : int
        Rounds done; the last one changed nothing.
    """
    current = dict(survivors)
    undecided = [key for key in current if near(key)]
    n_rounds = 0
    while undecided:
        if n_rounds == _MAX_ROUNDS:
            raise RuntimeError(f"block decisions did not settle in {_MAX_ROUNDS} rounds")
        decided = settle(undecided, current)
        changed = {key for key in undecided if decided[key] != current[key]}
        current.update(decided)
        affected = {other for key in changed for other in near(key)}
        # In the order of the blocks, so that neighbours' tables are read while they are in memory.
        undecided = [key for key in current if key in affected]
        n_rounds += 1
    return current, n_rounds

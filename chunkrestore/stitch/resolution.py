"""From tables of blocks to globally numbered objects, for any label operator.

A label operator decides per block; what it decides may depend on the neighbours' decisions. `resolve`
repeats those decisions until nothing changes: every block sees its neighbours' survivors of the round
before (a Jacobi iteration), and only blocks whose neighbours changed decide again. The last round changes
nothing, which is the certificate that all decisions agree.

The functions that do the deciding are handed in, so the same loop serves tables in memory (here) and
tables on disk, decided by tasks on a cluster (`chunkrestore.jobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.operators.base import LabelOperator, Table

Index = tuple[int, ...]
Survivors = TypeVar("Survivors")

_MAX_ROUNDS = 10_000
"""More rounds than any chain of decisions can need; reaching it is a defect, not bad luck."""


def neighbours(grid: BlockGrid, index: Index, reach: int) -> list[Index]:
    """Return the other blocks whose cores come within `reach` voxels of the core at `index`."""
    core = grid.block(index).core
    region = tuple(slice(s.start - reach, s.stop + reach) for s in core)
    return [other for other in grid.indices_meeting(region) if other != tuple(index)]


def concatenate(tables: Iterable[Table]) -> Table:
    """Join tables row by row; an empty mapping if there are none."""
    parts = list(tables)
    return {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}


def resolve(
    grid: BlockGrid,
    reach: int,
    survivors: Mapping[Index, Survivors],
    settle: Callable[[Sequence[Index], Mapping[Index, Survivors]], Mapping[Index, Survivors]],
) -> tuple[dict[Index, Survivors], int]:
    """Repeat block decisions until none changes.

    Parameters
    ----------
    grid
        The blocks.
    reach
        Distance in voxels over which a decision can depend on another block.
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
    near = {index: neighbours(grid, index, reach) for index in current}
    undecided = [index for index in current if near[index]]
    n_rounds = 0
    while undecided:
        if n_rounds == _MAX_ROUNDS:
            raise RuntimeError(f"block decisions did not settle in {_MAX_ROUNDS} rounds")
        decided = settle(undecided, current)
        changed = [index for index in undecided if decided[index] != current[index]]
        current.update(decided)
        undecided = sorted({other for index in changed for other in near[index]})
        n_rounds += 1
    return current, n_rounds


def resolve_tables(
    operator: LabelOperator, grid: BlockGrid, tables: Mapping[Index, Table]
) -> dict[Index, Table]:
    """Settle and number tables that are all in memory; return one numbered table per block."""
    settled = dict(tables)
    reach = operator.reach(list(tables.values()))
    if reach is not None:

        def settle(indices: Sequence[Index], current: Mapping[Index, _Rows]) -> dict[Index, _Rows]:
            decided = {}
            for index in indices:
                others = concatenate(current[other].table for other in neighbours(grid, index, reach))
                settled[index] = operator.settle(tables[index], others, grid.block(index))
                decided[index] = _Rows(operator.survivors(settled[index]))
            return decided

        resolve(grid, reach, {i: _Rows(operator.survivors(t)) for i, t in tables.items()}, settle)
    return operator.number({index: operator.survivors(table) for index, table in settled.items()})


def within_reach(grid: BlockGrid, index: Index, reach: int | None, numbered: Mapping[Index, Table]) -> Table:
    """Return the numbered objects that may touch the core at `index`: its own and those within reach."""
    others = [] if reach is None else neighbours(grid, index, reach)
    return concatenate(numbered[i] for i in (tuple(index), *others))


class _Rows:
    """A table that compares by content."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and all(
            np.array_equal(rows, other.table[key]) for key, rows in self.table.items()
        )

    __hash__ = None  # type: ignore[assignment]

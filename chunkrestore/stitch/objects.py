"""From the tables of blocks to numbered objects, with all tables in memory.

The same steps as in a job (`chunkrestore.jobs.labelling`), where tables lie on disk and blocks on a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.operators.base import (
    JoiningOperator,
    ObjectOperator,
    SettlingOperator,
    Table,
    concatenate,
)
from chunkrestore.stitch.joining import final_roots, join, leaf
from chunkrestore.stitch.numbering import rank
from chunkrestore.stitch.resolution import Index, Reaches, resolve


@dataclass(frozen=True)
class Objects:
    """The numbered objects of a volume."""

    tables: Mapping[Index, Table]
    """Per block; with ``ids``."""
    visitors: Mapping[Index, Sequence[Index]]
    """Per block, the other blocks whose objects can show in it."""
    n_rounds: int | None
    """Rounds until decisions had settled; None if nothing competes."""

    @property
    def n_objects(self) -> int:
        """How many there are."""
        return max((int(table["ids"].max(initial=0)) for table in self.tables.values()), default=0)

    def at(self, index: Index) -> list[Table]:
        """Return what `paint` needs to know for a block."""
        near = (index, *self.visitors[index])
        return [self.tables[i] for i in near if i in self.tables and len(self.tables[i]["ids"])]


def number_objects(operator: ObjectOperator, grid: BlockGrid, detected: Mapping[Index, Table]) -> Objects:
    """Settle or join what was detected in the blocks of a volume, and number it by position.

    Parameters
    ----------
    operator
        Resolved.
    grid
        The blocks.
    detected
        Result of `operator.detect`; blocks that are left out count as empty.
    """
    if isinstance(operator, SettlingOperator):
        return _settled(operator, grid, detected)
    assert isinstance(operator, JoiningOperator)
    return _joined(operator, grid, detected)


def _settled(operator: SettlingOperator, grid: BlockGrid, detected: Mapping[Index, Table]) -> Objects:
    tables = {index: operator.decide(table) for index, table in detected.items()}
    reaches = Reaches(grid, _radii(operator, tables))

    def settle(indices: Sequence[Index], current: Mapping[Index, _Rows]) -> dict[Index, _Rows]:
        return {
            index: _Rows(
                operator.survivors(operator.settle(tables[index], around(index, current), grid.block(index)))
            )
            for index in indices
        }

    def around(index: Index, current: Mapping[Index, _Rows]) -> Table:
        return concatenate(
            operator.within(current[other].table, grid.block(index), reaches.between(index, other))
            for other in reaches.rivals(index)
        )

    alone = {index: _Rows(operator.survivors(table)) for index, table in tables.items()}
    present, n_rounds = resolve(reaches.rivals, alone, settle)
    measured = {
        index: operator.measure(rows.table, around(index, present), grid.block(index))
        for index, rows in present.items()
    }
    visiting = Reaches(grid, _radii(operator, measured))
    ids = rank([table["key"] for table in measured.values()])
    return Objects(
        {index: table | {"ids": own} for (index, table), own in zip(measured.items(), ids, strict=True)},
        {index: visiting.visitors(index) for index in measured},
        n_rounds,
    )


def _radii(operator: SettlingOperator, tables: Mapping[Index, Table]) -> dict[Index, float]:
    radii = {index: operator.radius(table) for index, table in tables.items()}
    return {index: radius for index, radius in radii.items() if radius is not None}


class _Rows:
    """A table that compares by content."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and all(
            np.array_equal(rows, other.table[key]) for key, rows in self.table.items()
        )

    __hash__ = None  # type: ignore[assignment]


def _joined(operator: JoiningOperator, grid: BlockGrid, detected: Mapping[Index, Table]) -> Objects:
    if reach := operator.show_reach(grid):
        detected = {
            index: operator.show(
                table,
                [detected[other] for other in grid.around(index, reach) if other in detected],
                grid.block(index),
            )
            for index, table in detected.items()
        }
    reach = operator.link_reach(grid)
    rows = {}
    for index, table in detected.items():
        pairs = [
            operator.links(table, detected[other], grid.block(index), grid.block(other))
            for other in grid.around(index, reach)
            if other in detected
        ]
        rows[index] = leaf(np.concatenate([np.empty((0, 2), np.int64), *pairs]))
    # One node that holds everything: all of it is in memory anyway.
    assigned, _ = join(list(rows.values()), tuple(slice(0, n) for n in grid.shape), grid.shape)
    roots = {index: final_roots(table["key"], [assigned]) for index, table in detected.items()}
    present = np.unique(np.concatenate(list(roots.values())))
    tables = {
        index: detected[index] | {"ids": np.searchsorted(present, of_block) + 1}
        for index, of_block in roots.items()
    }
    return Objects(tables, dict.fromkeys(tables, ()), None)

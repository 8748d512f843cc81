"""The label pass of a job: objects are detected, settled or joined across blocks, numbered and painted.

The steps are those of `chunkrestore.stitch.objects`, with tables on disk and blocks on a cluster. The driver holds a
few numbers per block; candidates, survivors and links go from task to task through the job's folder. What a step
needs no more is removed when the next one is done.
"""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import label_tasks
from chunkrestore.jobs.label_classes import class_attributes, object_properties
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.stages import Items, Plane, Stages
from chunkrestore.ome_zarr.label_attributes import MAX_ENTRIES
from chunkrestore.operators.base import JoiningOperator, ObjectOperator, SettlingOperator
from chunkrestore.stitch.numbering import slab_starts
from chunkrestore.stitch.resolution import Reaches, resolve

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import ImageWriter, RegionReader


@dataclass(frozen=True)
class Survivors:
    """What stands for one block's decisions on disk; equal if the decisions are."""

    n_round: int = field(compare=False)
    """Round whose file holds them."""
    digest: str
    """SHA-256 of the surviving rows."""


@dataclass
class Labelling:
    """The label pass of a job on all of its planes."""

    stages: Stages
    """Runs tasks and remembers what is done."""
    grid: BlockGrid
    """The blocks."""
    operators: Mapping[Plane, ObjectOperator]
    """Of every plane, resolved."""
    source: RegionReader
    """What is segmented."""
    _shown: Callable[[Item], Sequence[Item]] = field(init=False, repr=False)
    """Gives the blocks whose tables a block is painted from."""
    _counts: dict[Item, int] = field(init=False, repr=False)
    """Objects by the block that holds what stands for them, for blocks that have any."""

    @property
    def folder(self) -> Path:
        """Folder of the tables."""
        return self.stages.ledger.folder / "tables"

    @property
    def settles(self) -> bool:
        """Whether objects compete across blocks; otherwise labels are joined."""
        return isinstance(next(iter(self.operators.values())), SettlingOperator)

    def find_objects(self) -> None:
        """Detect, settle or join, and number the objects of all planes."""
        detected = self.stages.run(
            "detect",
            Items(self.grid, tuple(self.operators)),
            label_tasks.detect,
            lambda item: (self.source, self.grid, self._operator(item), self.folder),
        )
        (self._settle if self.settles else self._join)(detected)
        self._number()
        self.stages.report.n_objects = sum(self._counts.values())

    def labels_dtype(self) -> np.dtype[Any]:
        """Return int32, or int64 where the number of objects of a plane needs it; of classes what they need."""
        operator = next(iter(self.operators.values()))
        if hasattr(operator, "result_dtype"):
            return np.dtype(operator.result_dtype(self.source.dtype))
        totals: dict[Plane, int] = defaultdict(int)
        for item, n in self._counts.items():
            totals[item[0], item[1]] += n
        largest = max(totals.values(), default=0)
        return np.dtype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)

    def attributes(self) -> dict[str, Any]:
        """Return what labels say of classes: what they are themselves, or that of every object if it is not too much.

        With several planes an id is an object in each of them; then, and where there are many, the table tells.
        """
        operator: Any = next(iter(self.operators.values()))
        if hasattr(operator, "classes"):
            return class_attributes(operator.classes)
        n_objects = sum(self._counts.values())
        if (
            not getattr(operator, "n_classes", 0)
            or len(self.operators) > 1
            or not 0 < n_objects <= MAX_ENTRIES
        ):
            return {}
        return {"properties": object_properties(self.folder, self._counts, operator.class_names)}

    def paint(self, writer: ImageWriter) -> int:
        """Paint the labels of every block; return the coarsest level that this has completed."""
        levels = self.stages.fused("paint", writer, self.grid)
        self.stages.run(
            "paint",
            Items(self.grid, tuple(self.operators)),
            label_tasks.paint,
            lambda item: (self.grid, self._operator(item), self.folder, self._shown(item), levels),
        )
        return levels.last

    def write_table(self, path: str, columns: ObjectColumns, provenance: Mapping[str, Any]) -> None:
        """Write the table of all objects, by one task: parts come in the order of ids, one slab in memory at a time.

        Parameters
        ----------
        path
            Of the file.
        columns
            What it tells.
        provenance
            How the labels came about, besides the operators.
        """
        slabs = [(slab[:2], blocks) for slab, blocks in sorted(self._slabs().items())]
        operators = [
            {"t": t, "c": c} | dict(operator.describe()) for (t, c), operator in self.operators.items()
        ]
        told = self.stages.run(
            "table",
            [(0, 0)],
            label_tasks.write_table,
            lambda _: (self.folder, slabs, path, columns, {**provenance, "operators": operators}),
        )
        # Ids of a plane ascend without gaps, which the writer checks: then all of them are there, from 1.
        assert told[0, 0] == sum(self._counts.values()), f"{path} lacks objects"

    def _operator(self, item: Item) -> Any:
        return self.operators[item[0], item[1]]

    def _settle(self, detected: Mapping[Item, Any]) -> None:
        """Let candidates compete across blocks until nothing changes, and keep the objects that show."""
        reaches = self._reaches(detected)
        rounds = itertools.count(1)

        def rivals(item: Item) -> list[Item]:
            return [(*item[:2], *index) for index in reaches[item[0], item[1]].rivals(item[2:])]

        def present_around(item: Item, current: Mapping[Item, Survivors]) -> list[label_tasks.Rival]:
            between = reaches[item[0], item[1]].between
            return [
                label_tasks.Rival(other, current[other].n_round, between(item[2:], other[2:]))
                for other in rivals(item)
            ]

        def settle(items: Sequence[Item], current: Mapping[Item, Survivors]) -> dict[Item, Survivors]:
            n_round = next(rounds)
            results = self.stages.run(
                f"settle-{n_round}",
                items,
                label_tasks.settle,
                lambda item: (
                    self.grid.block(item[2:]),
                    self._operator(item),
                    self.folder,
                    present_around(item, current),
                    n_round,
                ),
            )
            return {item: Survivors(**payload) for item, payload in results.items()}

        alone = {i: Survivors(**payload["survivors"]) for i, payload in detected.items() if payload["n_rows"]}
        present, self.stages.report.n_rounds = resolve(rivals, alone, settle)
        measured = self.stages.run(
            "measure",
            list(present),
            label_tasks.measure,
            lambda item: (
                self.grid.block(item[2:]),
                self._operator(item),
                self.folder,
                present[item].n_round,
                present_around(item, present),
            ),
        )
        self._drop("detected", "survivors-*")
        self._counts = {item: told["n_objects"] for item, told in measured.items() if told["n_objects"]}
        visiting = self._reaches(measured)

        def shown(item: Item) -> list[Item]:
            visitors = visiting[item[0], item[1]].visitors(item[2:])
            near = (item, *((*item[:2], *index) for index in visitors))
            return [other for other in near if other in self._counts]

        self._shown = shown

    def _reaches(self, told: Mapping[Item, Any]) -> dict[Plane, Reaches]:
        """Return how far the objects of every block reach, as tasks have told."""
        radii: dict[Plane, dict[tuple[int, ...], float]] = {plane: {} for plane in self.operators}
        for item, payload in told.items():
            if payload["radius"] is not None:
                radii[item[0], item[1]][item[2:]] = payload["radius"]
        return {plane: Reaches(self.grid, of_plane) for plane, of_plane in radii.items()}

    def _join(self, detected: Mapping[Item, Any]) -> None:
        """Find which labels of neighbouring blocks are one object, and join them group by group."""
        operator = next(iter(self.operators.values()))
        assert isinstance(operator, JoiningOperator)
        if reach := operator.show_reach(self.grid):
            detected = self._show(detected, reach)
        labelled = {item for item, payload in detected.items() if payload["n_rows"]}
        reach = operator.link_reach(self.grid)
        told: Mapping[Item, Any] = self.stages.run(
            "links",
            [item for item in detected if item in labelled],
            label_tasks.links,
            lambda item: (
                self.grid,
                self._operator(item),
                self.folder,
                self._around(item, reach, labelled),
            ),
        )
        assigned: set[tuple[int, Item]] = set()
        level = 0
        while any(payload["n_open"] for payload in told.values()):
            level += 1
            told = self._join_level(level, [item for item, payload in told.items() if payload["n_open"]])
            assigned |= {(level, item) for item, payload in told.items() if payload["n_assigned"]}

        def ancestors(item: Item) -> Iterator[tuple[int, Item]]:
            for above in range(1, level + 1):
                group = above, (*item[:2], *(i >> above for i in item[2:]))
                if group in assigned:
                    yield group

        found = self.stages.run(
            "roots",
            [item for item in detected if item in labelled],
            label_tasks.find_roots,
            lambda item: (self.folder, list(ancestors(item))),
        )
        self._drop("open-*", "assigned-*")
        self._counts = {item: told["n_objects"] for item, told in found.items() if told["n_objects"]}
        self._shown = lambda item: [item] if item in labelled else []

    def _show(self, detected: Mapping[Item, Any], reach: int) -> Mapping[Item, Any]:
        """Find what cores show of the objects that blocks have claimed, also of those that lie around them."""
        claiming = {item for item, payload in detected.items() if payload["n_rows"]}
        shown = self.stages.run(
            "show",
            [item for item in detected if item in claiming or self._around(item, reach, claiming)],
            label_tasks.show,
            lambda item: (
                self.grid.block(item[2:]),
                self._operator(item),
                self.folder,
                self._around(item, reach, claiming),
            ),
        )
        self._drop("claims")
        return shown

    def _around(self, item: Item, reach: int, among: Collection[Item]) -> list[Item]:
        """Return which blocks of the same plane that are at most `reach` blocks away are `among` some."""
        found = ((*item[:2], *index) for index in self.grid.around(item[2:], reach))
        return [other for other in found if other in among]

    def _join_level(self, level: int, open_groups: Sequence[Item]) -> Mapping[Item, Any]:
        children: dict[Item, list[Item]] = defaultdict(list)
        for item in open_groups:
            children[*item[:2], *(i >> 1 for i in item[2:])].append(item)
        return self.stages.run(
            f"join-{level}",
            list(children),
            label_tasks.join_blocks,
            lambda item: (self.grid, self.folder, children[item], level),
        )

    def _number(self) -> None:
        """Give every object its id."""
        blocks = self._slabs()
        counts: dict[Plane, dict[tuple[int, ...], int]] = defaultdict(dict)
        for item, n in self._counts.items():
            counts[item[0], item[1]][item[2:]] = n
        starts = {plane: slab_starts(of_plane, self.grid.n_blocks[0]) for plane, of_plane in counts.items()}
        self.stages.run(
            "number",
            list(blocks),
            label_tasks.number,
            lambda slab: (self.folder, blocks[slab], starts[slab[0], slab[1]][slab[2]]),
        )

    def _slabs(self) -> dict[Item, list[Item]]:
        """Return the blocks with objects of every slab: time point, channel and first index."""
        slabs: dict[Item, list[Item]] = defaultdict(list)
        for item in self._counts:
            slabs[item[:3]].append(item)
        return slabs

    def _drop(self, *kinds: str) -> None:
        """Remove tables that no later step reads."""
        # That they are not needed must be known for sure before they go.
        self.stages.ledger.sync()
        for kind in kinds:
            for folder in self.folder.glob(kind):
                shutil.rmtree(folder, ignore_errors=True)

"""The stages of a job: what is done for all blocks before the next stage begins."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore import statistics
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import tasks
from chunkrestore.jobs.ledger import Item, Ledger
from chunkrestore.jobs.plan import Pass
from chunkrestore.jobs.report import Progress, Report, Seam
from chunkrestore.jobs.runner import Runner
from chunkrestore.operators.base import LabelOperator, Operator
from chunkrestore.ome_zarr.pyramid import pyramid_blocks
from chunkrestore.stitch.resolution import neighbours, resolve

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import ImageWriter, RegionReader, RegionWriter

Index = tuple[int, ...]
Plane = tuple[int, int]
"""Time point and channel."""

RANGE = (0.1, 99.9)
"""Percentiles that bound the dynamic range to which seam errors are relative."""

_PROBE_HALF_WIDTH = 8
"""Voxels on each side of a probed block border; errors of a cut decay within a few voxels."""


@dataclass(frozen=True)
class Survivors:
    """What stands for one block's decisions on disk; equal if the decisions are."""

    n_round: int = field(compare=False)
    """Round whose file holds them."""
    digest: str
    """SHA-256 of the surviving rows."""


@dataclass
class Stages:
    """Runs stages on a cluster, remembers finished blocks in the ledger and times in the report."""

    runner: Runner
    """Where tasks run."""
    ledger: Ledger
    """What is done."""
    progress: Progress
    """What is shown."""
    report: Report
    """What will be told."""

    @property
    def tables(self) -> Path:
        """Folder of the tables that label operators exchange."""
        return self.ledger.folder / "tables"

    def run(
        self, name: str, items: Sequence[Item], function: Callable[..., Any], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> dict[Item, Any]:
        """Run `function` on the items that are not finished yet; return what every item reported."""
        started = time.monotonic()
        results = self.ledger.finished(name)
        todo = [item for item in items if item not in results]
        self.report.n_resumed += len(results)
        with self.progress.stage(name, len(items), len(results)) as advance:
            for item, payload in self.runner.map(function, todo, arguments):
                self.ledger.record(name, item, payload)
                results[item] = payload
                advance()
        self.report.n_done += len(todo)
        self._add_seconds(name, started)
        return results

    def image_pass(
        self, name: str, work: Pass, operators: Mapping[Plane, Sequence[Operator]], source: RegionReader, target: RegionWriter
    ) -> None:
        """Run the image operators of a pass on every block."""
        self.run(
            name,
            items_of(work.grid, list(operators)),
            tasks.process,
            lambda item: (source, work.grid, operators[item[0], item[1]], target),
        )

    def seams(
        self,
        name: str,
        work: Pass,
        operators: Mapping[Plane, Sequence[Operator]],
        numbers: Mapping[Plane, Mapping[float | str, float]],
        source: RegionReader,
        target: RegionWriter,
    ) -> None:
        """Measure what the block borders nearest to the volume's centre have changed, one per axis."""
        if not any(hasattr(operator, "tolerance") for operator in work.operators):
            return
        plane = next(iter(operators))
        centres = {(*plane, *centre): axis for axis, centre in _border_centres(work.grid)}
        found = self.run(
            name,
            list(centres),
            tasks.probe_seam,
            lambda item: (source, work.grid, operators[plane], target, _PROBE_HALF_WIDTH),
        )
        low, high = (numbers[plane][p] for p in RANGE)
        for item, error in found.items():
            scale = 1 / (high - low) if high > low else 1.0
            self.report.seams.append(Seam(centres[item], item[2:], error["rms"] * scale, error["max"] * scale))
        self.report.seams.sort(key=lambda seam: -seam.rms)

    def pyramid(self, name: str, writer: ImageWriter) -> None:
        """Compute the levels above the full resolution."""
        for level in range(1, writer.n_levels):
            regions = {(r.t, r.c, i): r for i, r in enumerate(pyramid_blocks(writer, level))}
            self.run(f"{name}-{level}", list(regions), tasks.downsample, lambda item, r=regions: (writer, r[item]))  # type: ignore[misc]

    def objects(
        self, work: Pass, operators: Mapping[Plane, LabelOperator], source: RegionReader
    ) -> dict[Plane, int | None]:
        """Detect, settle and number the objects of all planes; return the reach of each plane."""
        detected = self.run(
            "detect",
            items_of(work.grid, list(operators)),
            tasks.detect,
            lambda item: (source, work.grid, operators[item[0], item[1]], self.tables),
        )
        reaches: dict[Plane, int | None] = {}
        for plane, operator in operators.items():
            own = {item[2:]: payload for item, payload in detected.items() if item[:2] == plane}
            known = [payload["reach"] for payload in own.values() if payload["reach"] is not None]
            reaches[plane] = max(known) if known else None
            self._settle(plane, operator, work.grid, reaches[plane], own)
        return reaches

    def _settle(
        self, plane: Plane, operator: LabelOperator, grid: BlockGrid, reach: int | None, detected: Mapping[Index, Any]
    ) -> None:
        present = {index: Survivors(**payload["survivors"]) for index, payload in detected.items()}
        if reach is not None:
            rounds = itertools.count(1)

            def settle(indices: Sequence[Index], current: Mapping[Index, Survivors]) -> dict[Index, Survivors]:
                n_round = next(rounds)
                results = self.run(
                    f"settle-{plane[0]}.{plane[1]}-{n_round}",
                    [(*plane, *index) for index in indices],
                    tasks.settle,
                    lambda item: (
                        grid.block(item[2:]),
                        operator,
                        self.tables,
                        {other: current[other].n_round for other in neighbours(grid, item[2:], reach)},
                        n_round,
                    ),
                )
                return {item[2:]: Survivors(**payload) for item, payload in results.items()}

            present, n_rounds = resolve(grid, reach, present, settle)
            self.report.n_rounds = max(self.report.n_rounds or 0, n_rounds)
        self._number(plane, operator, present)

    def _number(self, plane: Plane, operator: LabelOperator, present: Mapping[Index, Survivors]) -> None:
        name = f"objects-{plane[0]}.{plane[1]}"
        if self.ledger.value(name) is None:
            started = time.monotonic()
            tables = {
                index: tasks.load_table(self.tables, f"survivors-{survivors.n_round}", (*plane, *index))
                for index, survivors in present.items()
            }
            numbered = operator.number(tables)
            for index, table in numbered.items():
                tasks.save_table(self.tables, "numbered", (*plane, *index), table)
            largest = max((int(table["ids"].max(initial=0)) for table in numbered.values()), default=0)
            self.ledger.decide(name, largest)
            self._add_seconds("number", started)
        self.report.n_objects = (self.report.n_objects or 0) + self.ledger.value(name)

    def labels_dtype(self, planes: Sequence[Plane]) -> np.dtype[Any]:
        """Return int32, or int64 where the numbers of objects need it."""
        largest = max(self.ledger.value(f"objects-{t}.{c}") for t, c in planes)
        return np.dtype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)

    def paint(
        self, work: Pass, operators: Mapping[Plane, LabelOperator], reaches: Mapping[Plane, int | None], source: RegionReader, target: RegionWriter
    ) -> None:
        """Paint the labels of every block."""
        self.run(
            "paint",
            items_of(work.grid, list(operators)),
            tasks.paint,
            lambda item: (source, work.grid, operators[item[0], item[1]], self.tables, reaches[item[0], item[1]], target),
        )

    def _add_seconds(self, name: str, started: float) -> None:
        stage = name.split("-")[0]
        self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.monotonic() - started


def volume_statistics(
    runner: Runner, progress: Progress, source: RegionReader, grid: BlockGrid, planes: Sequence[Plane], needs: frozenset[float | str]
) -> dict[Plane, dict[float | str, float]]:
    """Return the numbers `needs` of every plane, each computed over the whole volume.

    Every voxel is read, so NaN and infinite voxels are found here, before anything is written.
    """
    items = items_of(grid, planes)

    def collect(name: str, function: Callable[..., Any], arguments: Callable[[Item], tuple[Any, ...]]) -> dict[Plane, list[Any]]:
        parts: dict[Plane, list[Any]] = {plane: [] for plane in planes}
        with progress.stage(name, len(items)) as advance:
            for item, part in runner.map(function, items, arguments):
                own = parts[item[0], item[1]]
                # Merged as they come: the driver holds one summary per plane, not one per block.
                own[:] = [statistics.merge([*own, part]) if function is tasks.summarize else sum([*own, part])]
                advance()
        return parts

    summaries = collect("statistics", tasks.summarize, lambda item: (source, grid))
    wanted = {plane: statistics.refinement(summary, needs) for plane, (summary,) in summaries.items()}
    refined: dict[Plane, list[Any]] = {plane: [None] for plane in planes}
    if any(w is not None for w in wanted.values()):
        refined = collect("refinement", tasks.refine, lambda item: (source, grid, wanted[item[0], item[1]]))
    return {
        plane: statistics.values(summary, needs, wanted[plane], refined[plane][0])
        for plane, (summary,) in summaries.items()
    }


def items_of(grid: BlockGrid, planes: Sequence[Plane]) -> list[Item]:
    """Return one item per plane and block."""
    indices = list(itertools.product(*(range(n) for n in grid.n_blocks)))
    return [(*plane, *index) for plane in planes for index in indices]


def _border_centres(grid: BlockGrid) -> list[tuple[int, Index]]:
    """Return, for every axis with more than one block, the voxel on the border nearest to the volume's centre.

    On the other axes the probe lies in the middle of a block, away from other borders.
    """
    middle = [(edges[(len(edges) - 1) // 2] + edges[(len(edges) - 1) // 2 + 1]) // 2 for edges in grid.edges]
    found = []
    for axis, edges in enumerate(grid.edges):
        if len(edges) > 2:
            border = min(edges[1:-1], key=lambda edge: abs(2 * edge - edges[-1]))
            found.append((axis, tuple(border if a == axis else m for a, m in enumerate(middle))))
    return found

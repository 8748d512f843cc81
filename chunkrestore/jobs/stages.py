"""The stages of a job: what is done for all blocks before the next stage begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from chunkrestore import statistics
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import tasks
from chunkrestore.jobs.conductor import Conductor
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.passes import Pass
from chunkrestore.jobs.report import Seam
from chunkrestore.jobs.runner import Arguments, BlockError
from chunkrestore.ome_zarr.pyramid import Cascade, fused_with, steps_of
from chunkrestore.operators.base import ImageOperator

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import ImageWriter, RegionReader

Index: TypeAlias = tuple[int, ...]
Plane: TypeAlias = tuple[int, int]
"""Time point and channel."""
Numbers: TypeAlias = dict[float | str, Any]
"""Percentiles and other numbers of one volume, and what its pilots have decided."""

RANGE = (0.1, 99.9)
"""Percentiles that bound the dynamic range to which seam errors are relative."""

_PROBE_HALF_WIDTH = 8
"""Voxels on each side of a probed block border; errors of a cut decay within a few voxels."""


@dataclass
class Stages(Conductor):
    """The stages of a job, in terms of operators and stores."""

    device: str = "cpu"
    """Where deconvolution runs."""

    def statistics(
        self, source: RegionReader, grid: BlockGrid, planes: Sequence[Plane], needs: frozenset[float | str]
    ) -> dict[Plane, Numbers]:
        """Return the numbers `needs` of every plane, each computed over the whole volume.

        Every voxel is read, so what is not finite is found here. Nothing is noted in the ledger.

        Raises
        ------
        NonFiniteError
            If a voxel is NaN or infinite; the message names the block.
        """
        items = Items(grid, tuple(planes))

        def collect(
            name: str, function: Callable[..., Any], arguments: Arguments, add: Any
        ) -> dict[Plane, Any]:
            totals: dict[Plane, Any] = {}
            for item, part in self.each(name, items, function, arguments):
                # Added as they come: the driver holds one summary per plane, not one per block.
                plane = item[0], item[1]
                totals[plane] = add([totals[plane], part]) if plane in totals else part
            return totals

        try:
            summaries = collect("statistics", tasks.summarize, lambda _: (source, grid), statistics.merge)
        except BlockError as error:
            if isinstance(error.__cause__, statistics.NonFiniteError):
                raise error.__cause__ from None
            raise
        wanted = {plane: statistics.refinement(summary, needs) for plane, summary in summaries.items()}
        refined: dict[Plane, Any] = {}
        if any(w is not None for w in wanted.values()):
            refined = collect("refinement", tasks.refine, lambda i: (source, grid, wanted[i[0], i[1]]), sum)
        return {
            plane: statistics.values(summary, needs, wanted[plane], refined.get(plane))
            for plane, summary in summaries.items()
        }

    def pilots(
        self, source: RegionReader, work: Pass, numbers: Mapping[Plane, Numbers]
    ) -> dict[Plane, Numbers]:
        """Return `numbers` with what pilot regions of every plane decide for the first operator of a pass."""
        decided = {plane: dict(of_plane) for plane, of_plane in numbers.items()}
        for (t, c), decision in self.each(
            "pilots",
            list(decided),
            tasks.pilot,
            lambda plane: (source, work.operators[0], decided[plane[0], plane[1]], work.grid.shape),
        ):
            decided[t, c]["pilot"] = decision
        return decided

    def image_pass(
        self,
        name: str,
        work: Pass,
        operators: Mapping[Plane, Sequence[ImageOperator]],
        source: RegionReader,
        writer: ImageWriter,
    ) -> int:
        """Run the image operators of a pass on every block; return the coarsest level that this has completed."""
        levels = self.fused(name, writer, work.grid)
        done = self.run(
            name,
            Items(work.grid, tuple(operators)),
            tasks.process,
            lambda item: (source, work.grid, operators[item[0], item[1]], levels, self.device),
        )
        self.report.n_split += sum(payload["n_parts"] > 1 for payload in done.values())
        if any("n_clipped" in payload for payload in done.values()):
            self.report.n_clipped = sum(payload["n_clipped"] for payload in done.values())
        return levels.last

    def probe_seams(
        self,
        name: str,
        work: Pass,
        operators: Mapping[Plane, Sequence[ImageOperator]],
        source: RegionReader,
        target: RegionReader,
    ) -> None:
        """Measure, on the first plane, what the block borders nearest to the volume's centre have changed."""
        plane = next(iter(operators))
        self.run(
            name,
            [(*plane, *centre) for centre in _border_centres(work.grid)],
            tasks.probe_seam,
            lambda item: (source, work.grid, operators[plane], target, _PROBE_HALF_WIDTH, self.device),
        )

    def report_seams(self, name: str, work: Pass, numbers: Mapping[Plane, Numbers]) -> None:
        """Report the probed seams relative to the dynamic range of the pass's input."""
        axis_of = _border_centres(work.grid)
        for item, error in self.ledger.finished(name).items():
            plane, centre = (item[0], item[1]), item[2:]
            low, high = (numbers[plane][p] for p in RANGE)
            scale = 1 / (high - low) if high > low else 1.0
            self.report.seams.append(
                Seam(axis_of[centre], centre, error["rms"] * scale, error["max"] * scale)
            )
        self.report.seams.sort(key=lambda seam: -seam.rms)

    def pyramid(self, name: str, writer: ImageWriter, n_done: int = 0) -> None:
        """Compute the levels above `n_done`; each is read once at most."""
        planes = tuple(itertools.product(range(writer.targets[0].n_t), range(writer.targets[0].n_c)))
        for step in steps_of(writer.targets, writer.factors, n_done):
            levels = Cascade.of(writer, step.first, step.last)
            arguments = writer.target(step.first - 1), step.grid, levels
            self._pyramid_step(f"{name}-{step.name}", Items(step.grid, planes), arguments)

    def _pyramid_step(self, name: str, items: Items, arguments: tuple[Any, ...]) -> None:
        self.run(name, items, tasks.downsample, lambda _: arguments)

    def fused(self, stage: str, writer: ImageWriter, grid: BlockGrid) -> Cascade:
        """Return the levels that the tasks of a stage write: the full resolution, and what their cores hold above it.

        Decided once per job: blocks that are finished are not done again for levels that they were not asked for.
        """
        n_levels = self.ledger.value(f"fused-{stage}")
        if n_levels is None:
            n_levels = 0 if self.ledger.finished(stage) else fused_with(writer, grid)
            self.ledger.decide(f"fused-{stage}", n_levels)
        return Cascade.of(writer, 0, n_levels)


@dataclass(frozen=True)
class Items(Collection[Item]):
    """One item per plane and block, made as they are asked for: a million of them take no memory."""

    grid: BlockGrid
    planes: tuple[Plane, ...]

    @property
    def n_voxels(self) -> int:
        """Voxels in all cores together."""
        return len(self.planes) * math.prod(self.grid.shape)

    def __len__(self) -> int:
        return len(self.planes) * len(self.grid)

    def __iter__(self) -> Iterator[Item]:
        for plane in self.planes:
            for index in itertools.product(*(range(n) for n in self.grid.n_blocks)):
                yield (*plane, *index)

    def __contains__(self, item: object) -> bool:
        return (
            isinstance(item, tuple)
            and item[:2] in self.planes
            and len(item) == 2 + len(self.grid.n_blocks)
            and all(0 <= i < n for i, n in zip(item[2:], self.grid.n_blocks, strict=True))
        )


def _border_centres(grid: BlockGrid) -> dict[Index, int]:
    """Return, for every axis with more than one block, the voxel on the border nearest to the volume's centre.

    On the other axes it lies in the middle of a block, away from other borders.
    """
    middle = [(edges[(len(edges) - 1) // 2] + edges[(len(edges) - 1) // 2 + 1]) // 2 for edges in grid.edges]
    found = {}
    for axis, edges in enumerate(grid.edges):
        if len(edges) > 2:
            border = min(edges[1:-1], key=lambda edge: abs(2 * edge - edges[-1]))
            found[tuple(border if a == axis else m for a, m in enumerate(middle))] = axis
    return found

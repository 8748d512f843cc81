"""What workers do to score images and labels: blocks leave sums on disk, which are added exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.measuring import Measuring
from chunkrestore.jobs.object_columns import Plane
from chunkrestore.jobs.phases import computing, phase
from chunkrestore.jobs.stages import Items
from chunkrestore.jobs.tables import load_table, save_table
from chunkrestore.metrics.blocks import ImageComparison, Sums, merged
from chunkrestore.metrics.contingency import Contingency, count_overlaps, merged_counts
from chunkrestore.metrics.instances import score_contingency
from chunkrestore.metrics.intensities import score_intensities

if TYPE_CHECKING:
    from chunkrestore.jobs.conductor import Conductor
    from chunkrestore.ome_zarr import RegionReader

_AT_ONCE = 256
"""Blocks whose sums are read before they are added."""


@dataclass(frozen=True)
class Readers:
    """What is compared with what; every pair is whole or absent."""

    images: tuple[RegionReader, RegionReader] | None
    """Truth and image."""
    labels: tuple[RegionReader, RegionReader] | None
    """True and predicted labels."""
    objects: RegionReader | None
    """True labels whose intensities are compared."""


def errors_block(
    item: Item,
    images: tuple[RegionReader, RegionReader],
    grid: BlockGrid,
    compared: ImageComparison,
    folder: Path,
) -> int:
    """Add up the errors of a block; return the number of tables that this has left."""
    core = grid.block(item[2:]).core
    arrays = _read(item, images, compared.errors_region(core))
    if arrays is None:
        return 0
    with computing():
        save_table(folder, "errors", item, compared.errors(core, *arrays))
    return 1


def similarity_block(
    item: Item,
    images: tuple[RegionReader, RegionReader],
    grid: BlockGrid,
    compared: ImageComparison,
    folder: Path,
    data_range: float,
) -> int:
    """Add up the structural similarity of a block; return the number of tables that this has left."""
    core = grid.block(item[2:]).core
    arrays = _read(item, images, compared.similarity_region(core))
    if arrays is None:
        return 0
    with computing():
        save_table(folder, "similarity", item, compared.similarity(core, *arrays, data_range))
    return 1


def overlaps_block(
    item: Item, labels: tuple[RegionReader, RegionReader], grid: BlockGrid, folder: Path
) -> int:
    """Count which labels share voxels in a block; return 1."""
    arrays = _read(item, labels, grid.block(item[2:]).core)
    assert arrays is not None
    with computing():
        save_table(folder, "overlaps", item, {"counts": count_overlaps(*arrays)})
    return 1


def range_of_plane(
    item: Item, folder: Path, blocks: Sequence[Item], compared: ImageComparison, given: float | None
) -> float:
    """Add up the errors of a plane; return the range that they refer to."""
    sums = _added(folder, "errors", blocks)
    save_table(folder, "image", item, dict(sums))
    return compared.data_range(sums, given)


def score_plane(
    item: Item,
    folder: Path,
    blocks: dict[str, Sequence[Item]],
    compared: ImageComparison | None,
    data_range: float | None,
    iou: Sequence[float],
) -> dict[str, Any]:
    """Return all scores of a plane as JSON-compatible values."""
    found: dict[str, Any] = {"image": None, "labels": None, "intensities": None}
    if compared is not None and data_range is not None:
        sums = {**load_table(folder, "image", item), **_added(folder, "similarity", blocks["similarity"])}
        found["image"] = compared.score(sums, data_range).describe()
    if "overlaps" in blocks:
        counts = np.empty((0, 3), np.int64)
        for some in _in_parts(blocks["overlaps"]):
            counts = merged_counts([counts, *(load_table(folder, "overlaps", b)["counts"] for b in some)])
        found["labels"] = score_contingency(Contingency.of(counts), iou).describe()
    if "merged" in blocks and compared is not None:
        tables = [load_table(folder, "merged", b, ("mean-0", "mean-1")) for b in blocks["merged"]]
        means = [np.concatenate([np.empty(0), *(table[f"mean-{k}"] for table in tables)]) for k in (0, 1)]
        truth, image = means[0] - compared.truth_background, means[1] - compared.background
        found["intensities"] = score_intensities(truth, image).describe()
    return found


@dataclass(frozen=True)
class Scoring:
    """The stages that score."""

    stages: Conductor
    """Runs tasks and remembers what is done."""
    grid: BlockGrid
    """The blocks."""
    planes: tuple[Plane, ...]
    """Time points, each with channel 0."""
    readers: Readers
    """What is compared."""
    compared: ImageComparison
    """In which units."""
    data_range: float | None
    """Given, or that of the truth."""

    def score(self, iou: Sequence[float]) -> dict[Plane, dict[str, Any]]:
        """Run all stages; return the scores of every plane."""
        blocks: dict[str, dict[Plane, list[Item]]] = {}
        ranges: dict[Item, float] = {}
        if self.readers.images is not None:
            ranges = self._images(self.readers.images, blocks)
        if self.readers.labels is not None:
            labels = self.readers.labels
            arguments = labels, self.grid, self._folder
            blocks["overlaps"] = self._left("overlaps", overlaps_block, lambda _: arguments)
        if self.readers.objects is not None and self.readers.images is not None:
            sources = tuple((reader, 0) for reader in self.readers.images)
            measuring = Measuring(self.stages, self.grid, self.planes, self.readers.objects, sources)
            blocks["merged"] = self._by_plane(list(measuring.measure()))
        told = self.stages.run(
            "score",
            list(self.planes),
            score_plane,
            lambda item: (
                self._folder,
                {name: of_plane[item[0], item[1]] for name, of_plane in blocks.items()},
                self.compared if self.readers.images else None,
                ranges.get(item),
                iou,
            ),
        )
        return {(item[0], item[1]): told[item] for item in self.planes}

    @property
    def _folder(self) -> Path:
        return self.stages.ledger.folder / "tables"

    def _images(
        self, images: tuple[RegionReader, RegionReader], blocks: dict[str, dict[Plane, list[Item]]]
    ) -> dict[Item, float]:
        errors = self._left(
            "errors", errors_block, lambda _: (images, self.grid, self.compared, self._folder)
        )
        ranges = self.stages.run(
            "range",
            list(self.planes),
            range_of_plane,
            lambda item: (self._folder, errors[item[0], item[1]], self.compared, self.data_range),
        )
        blocks["similarity"] = {plane: [] for plane in self.planes}
        if self.compared.has_similarity:
            blocks["similarity"] = self._left(
                "similarity",
                similarity_block,
                lambda item: (images, self.grid, self.compared, self._folder, ranges[item[:2]]),
            )
        return dict(ranges)

    def _left(self, name: str, function: Any, arguments: Any) -> dict[Plane, list[Item]]:
        """Run a stage; return the blocks of every plane that have left a table, in order."""
        told = self.stages.run(name, Items(self.grid, self.planes), function, arguments)
        return self._by_plane(sorted(item for item, n in told.items() if n))

    def _by_plane(self, items: Sequence[Item]) -> dict[Plane, list[Item]]:
        return {plane: [item for item in items if item[:2] == plane] for plane in self.planes}


def _read(
    item: Item, readers: tuple[RegionReader, RegionReader], region: Slices | None
) -> tuple[np.ndarray, np.ndarray] | None:
    if region is None:
        return None
    with phase("read"):
        first, second = (reader.read(item[0], item[1], region) for reader in readers)
    return first, second


def _added(folder: Path, kind: str, blocks: Sequence[Item]) -> Sums:
    total: Sums = {}
    for some in _in_parts(blocks):
        total = merged([total, *(load_table(folder, kind, block) for block in some)])
    return total


def _in_parts(blocks: Sequence[Item]) -> list[Sequence[Item]]:
    return [blocks[k : k + _AT_ONCE] for k in range(0, len(blocks), _AT_ONCE)]

"""Measure labels block by block: sums of what every core shows, merged by ranges of labels.

An object may lie in any blocks, and labels may be any integers. So every block leaves a table of sums, sorted by
label, and tells the driver how many rows it has and a few of their labels. These cut all labels into ranges of about
as many rows; the blocks that have rows in a range are read and merged by one task. The last task writes what was
merged, range by range.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.object_columns import ObjectColumns, Plane
from chunkrestore.jobs.phases import computing, phase
from chunkrestore.jobs.predictions import earlier_predictions
from chunkrestore.jobs.stages import Items
from chunkrestore.jobs.table_formats import Target, clean_beside, write_objects_to
from chunkrestore.jobs.tables import load_table, n_rows, save_table
from chunkrestore.kernels.object_measures import merge_intensities, merge_objects, trimmed
from chunkrestore.operators.base import Table
from chunkrestore.statistics import NonFiniteError

if TYPE_CHECKING:
    from chunkrestore.jobs.conductor import Conductor
    from chunkrestore.ome_zarr import RegionReader

Image: TypeAlias = "tuple[RegionReader, int]"
"""What intensities are read from: an array and one of its channels."""

_N_KNOTS = 17
"""Labels of a block that the driver is told, evenly spaced by rows: ranges are balanced to a sixteenth of a block."""
_ROWS_PER_RANGE = 2**18
"""Rows that are merged by one task: some 100 MB of sums, and as much again of what they make."""
_ROWS_AT_ONCE = 2**15
"""Rows that are exact Python integers at the same time: some 100 MB."""
_LIMBS = ("total", "square", "weighted")


def sum_block(
    item: Item, labels: RegionReader, images: Sequence[Image], grid: BlockGrid, folder: Path
) -> dict[str, Any]:
    """Add up what one core shows of every object and keep it on disk; return how many rows, and some labels."""
    from chunkrestore.kernels.object_sums import intensity_sums, object_sums

    t, c, *index = item
    block = grid.block(index)
    with phase("read"):
        found = labels.read(t, c, block.core)
    with computing():
        table, pieces = object_sums(found, _corner(grid, item))
    del found
    n = n_rows(table)
    if not n:
        return {"n_rows": 0, "knots": []}
    for k, (reader, channel) in enumerate(images):
        with phase("read"):
            image = reader.read(t, channel, block.core)
        try:
            with computing():
                sums = intensity_sums(image, pieces, n)
        except ValueError as error:
            raise NonFiniteError(
                f"{reader.name}, time point {t}, channel {channel}, {block}: {error}"
            ) from None
        table |= {f"least-{k}": sums["least"], f"most-{k}": sums["most"]}
        for name in _LIMBS:
            limbs, first = trimmed(sums[name])
            table[f"{name}-{k}-{first}"] = limbs
    save_table(folder, "sums", item, table)
    rows = np.linspace(0, n - 1, min(n, _N_KNOTS)).round().astype(int)
    return {"n_rows": n, "knots": table["ids"][rows].tolist()}


def merge_range(
    item: Item, grid: BlockGrid, folder: Path, blocks: Sequence[Item], bounds: tuple[int, int], n_images: int
) -> dict[str, int]:
    """Merge what blocks have of the objects whose labels lie within `bounds`, both included."""
    parts = []
    for block in blocks:
        with phase("read"):
            table = load_table(folder, "sums", block)
        rows = _between(table, *bounds)
        if n_rows(rows):
            parts.append((rows, _corner(grid, block)))
        del table
    if not parts:
        return {"n_objects": 0}
    with computing():
        ids = np.unique(np.concatenate([table["ids"] for table, _ in parts]))
        per_step = max(_ROWS_AT_ONCE * len(ids) // sum(n_rows(table) for table, _ in parts), 1)
        merged = [
            _merged(parts, int(some[0]), int(some[-1]), n_images)
            for some in (ids[i : i + per_step] for i in range(0, len(ids), per_step))
        ]
    result = {name: np.concatenate([part[name] for part in merged]) for name in merged[0]}
    save_table(folder, "merged", item, result)
    return {"n_objects": len(ids)}


def write_measured(
    _: Item,
    folder: Path,
    merged: Sequence[Item],
    target: Target,
    columns: ObjectColumns,
    provenance: Mapping[str, Any],
    labels: str | None,
) -> int:
    """Write the table of all objects, range by range, with the predictions that the label group `labels` has."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = None if labels is None else earlier_predictions(labels, folder)
    if earlier is not None:
        kept = {k: v for k, v in earlier.description.get("provenance", {}).items() if k != "measured"}
        provenance = {**kept, **provenance}
    parts = (((item[0], item[1]), load_table(folder, "merged", item)) for item in merged)
    with phase("write"):
        return write_objects_to(
            target, parts, columns, provenance=provenance, scratch=folder, earlier=earlier
        )


@dataclass(frozen=True)
class Measuring:
    """The stages that measure labels."""

    stages: Conductor
    """Runs tasks and remembers what is done."""
    grid: BlockGrid
    """The blocks."""
    planes: tuple[Plane, ...]
    """Time points and channels of the labels."""
    labels: RegionReader
    """What is measured."""
    images: tuple[Image, ...]
    """One per channel of the table."""

    @property
    def folder(self) -> Path:
        """Folder of the tables."""
        return self.stages.ledger.folder / "tables"

    def measure(self) -> dict[Item, int]:
        """Measure all objects; return how many there are in each range of labels, in order."""
        summed = self.stages.run(
            "measure",
            Items(self.grid, self.planes),
            sum_block,
            lambda _: (self.labels, self.images, self.grid, self.folder),
        )
        blocks = _blocks_of(summed)
        ranges: dict[Item, tuple[int, int]] = {
            (*plane, k): bounds
            for plane, of_plane in blocks.items()
            for k, bounds in enumerate(label_ranges([summed[item] for item in of_plane.items]))
        }
        told = self.stages.run(
            "merge",
            list(ranges),
            merge_range,
            lambda item: (
                self.grid,
                self.folder,
                blocks[item[0], item[1]].meeting(*ranges[item]),
                ranges[item],
                len(self.images),
            ),
        )
        # That they are not needed must be known for sure before they go.
        self.stages.ledger.sync()
        shutil.rmtree(self.folder / "sums", ignore_errors=True)
        return {item: told[item]["n_objects"] for item in ranges if told[item]["n_objects"]}

    def write(
        self,
        counts: Mapping[Item, int],
        target: Target,
        columns: ObjectColumns,
        provenance: Mapping[str, Any],
        labels: str | None,
    ) -> None:
        """Write the table of what `measure` has counted; see `write_measured`."""
        told = self.stages.run(
            "table",
            [(0, 0)],
            write_measured,
            lambda _: (self.folder, list(counts), target, columns, provenance, labels),
        )
        assert told[0, 0] == sum(counts.values()), f"{target.path} lacks objects"
        clean_beside(target)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a plane that show objects."""

    items: list[Item]
    """Ascending."""
    first: npt.NDArray[np.int64]
    """Least label of each."""
    last: npt.NDArray[np.int64]
    """Largest label of each."""

    def meeting(self, first: int, last: int) -> list[Item]:
        """Return the blocks that may have labels from `first` to `last`."""
        return [self.items[k] for k in np.flatnonzero((self.first <= last) & (self.last >= first))]


def _blocks_of(summed: Mapping[Item, Any]) -> dict[Plane, _Blocks]:
    """Return the blocks that `sum_block` has found objects in, plane by plane."""
    planes: dict[Plane, list[Item]] = defaultdict(list)
    for item in sorted(item for item, told in summed.items() if told["n_rows"]):
        planes[item[0], item[1]].append(item)
    return {
        plane: _Blocks(
            items,
            np.array([summed[item]["knots"][0] for item in items], np.int64),
            np.array([summed[item]["knots"][-1] for item in items], np.int64),
        )
        for plane, items in planes.items()
    }


def label_ranges(blocks: Sequence[Mapping[str, Any]], most_rows: int | None = None) -> list[tuple[int, int]]:
    """Cut labels into ranges that take about as many rows each, first and last label of every range.

    Parameters
    ----------
    blocks
        What `sum_block` has told of them.
    most_rows
        Of a range, 2**18 by default.
    """
    most_rows = most_rows or _ROWS_PER_RANGE
    # Every known label stands for the rows up to the next one.
    knots = sorted((label, b["n_rows"] / len(b["knots"])) for b in blocks for label in b["knots"])
    first, last, n = knots[0][0], knots[-1][0], 0.0
    ranges = []
    for label, rows in knots:
        if n >= most_rows and label > first:
            ranges.append((first, label - 1))
            first, n = label, 0.0
        n += rows
    return [*ranges, (first, last)]


def _corner(grid: BlockGrid, item: Item) -> list[int]:
    """Return the first voxel of a block's core."""
    return [s.start for s in grid.block(item[2:]).core]


def _between(table: Table, first: int, last: int) -> dict[str, np.ndarray]:
    """Return the rows with labels from `first` to `last`, without holding on to the others."""
    ids = table["ids"]
    start, stop = np.searchsorted(ids, first), np.searchsorted(ids, last, side="right")
    return {name: column[start:stop].copy() for name, column in table.items()}


def _merged(
    parts: Sequence[tuple[Table, list[int]]], first: int, last: int, n_images: int
) -> dict[str, np.ndarray]:
    """Merge the rows with labels from `first` to `last`; return them as `ObjectColumns.empty` describes them."""
    some = [(rows, corner) for table, corner in parts if n_rows(rows := _between(table, first, last))]
    merged, grouping = merge_objects(some)
    for k in range(n_images):
        channel = [(_limbs(table, k), table[f"least-{k}"], table[f"most-{k}"]) for table, _ in some]
        merged |= {f"{name}-{k}": column for name, column in merge_intensities(channel, grouping).items()}
    return merged


def _limbs(table: Table, k: int) -> dict[str, tuple[np.ndarray, int]]:
    """Return the limbs of channel `k`, each with the number of those that are gone at the low end."""
    found = {}
    for key, column in table.items():
        name, _, rest = key.partition("-")
        channel, _, first = rest.partition("-")
        if name in _LIMBS and channel == str(k):
            found[name] = column, int(first)
    return found

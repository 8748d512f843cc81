"""Classes in a job: the label pass of an operator that labels voxel by voxel, and what labels say of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import label_tasks
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.stages import Items, Plane, Stages
from chunkrestore.jobs.tables import load_table
from chunkrestore.ome_zarr.label_attributes import distinct_colors
from chunkrestore.operators.base import VoxelOperator

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import ImageWriter, RegionReader


@dataclass
class VoxelLabelling:
    """The label pass of a job whose blocks are labelled once and for all: nothing is joined, no tables are kept."""

    stages: Stages
    """Runs tasks and remembers what is done."""
    grid: BlockGrid
    """The blocks."""
    operators: Mapping[Plane, VoxelOperator]
    """Of every plane, resolved."""
    source: RegionReader
    """What is segmented."""

    def find_objects(self) -> None:
        """Do nothing: there are none."""

    def labels_dtype(self) -> np.dtype[Any]:
        """Return the dtype that the operators tell."""
        return self._operator.result_dtype(self.source.dtype)

    def attributes(self) -> dict[str, Any]:
        """Return colours and names of the classes."""
        return class_attributes(self._operator.classes)

    def paint(self, writer: ImageWriter) -> int:
        """Label every block; return the coarsest level that this has completed."""
        levels = self.stages.fused("paint", writer, self.grid)
        done = self.stages.run(
            "paint",
            Items(self.grid, tuple(self.operators)),
            label_tasks.label,
            lambda item: (self.source, self.grid, self.operators[item[0], item[1]], levels),
        )
        self.stages.report.n_split += sum(payload["n_parts"] > 1 for payload in done.values())
        return levels.last

    @property
    def _operator(self) -> VoxelOperator:
        return next(iter(self.operators.values()))


def class_attributes(classes: Mapping[int, str | None]) -> dict[str, Any]:
    """Return ``colors`` and ``properties`` of labels that are classes, as `create_labels` takes them."""
    properties = {label: {} if name is None else {"class": name} for label, name in classes.items()}
    return {
        "colors": distinct_colors(classes),
        "properties": properties if any(properties.values()) else None,
    }


def object_properties(
    folder: Path, blocks: Iterable[Item], names: Iterable[str] | None
) -> dict[int, dict[str, Any]]:
    """Return ``class_id`` and, where classes have names, ``class`` by label.

    Parameters
    ----------
    folder
        Of the tables of a label pass.
    blocks
        Those that hold objects, of one plane.
    names
        Of the classes, from 1 on.
    """
    named = ["background", *names] if names is not None else None
    found: dict[int, dict[str, Any]] = {}
    for block in blocks:
        classes = load_table(folder, "objects", block, ["class_prob"])["class_prob"].argmax(axis=-1)
        ids = load_table(folder, "ids", block)["ids"]
        for label, class_id in zip(ids.tolist(), classes.tolist(), strict=True):
            found[label] = {"class_id": class_id} | ({} if named is None else {"class": named[class_id]})
    return dict(sorted(found.items()))

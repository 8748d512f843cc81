"""When labels that blocks made each for itself are one object.

A rule says what is kept of a labelled block, what its core shows, and which labels of two blocks are linked;
`chunkrestore.stitch.joining` makes objects of the links. What a core shows has ``key`` (int64, see there) and ``runs``
(the core, packed, with rows counted from 1), and one row per label: every such label ends up in exactly one object.
Reaches are in blocks: steps of the index, the largest of all axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from chunkrestore.grid import Block, BlockGrid
from chunkrestore.kernels.components import Labels, Links, Table, surface_table, touching_links
from chunkrestore.kernels.label_overlap import overlap_links, overlap_table
from chunkrestore.kernels.label_ownership import claim_table, shown_links, shown_table
from chunkrestore.kernels.label_runs import unpack
from chunkrestore.operators.base import labels_dtype


class Rule(Protocol):
    """What decides that labels of different blocks are one object."""

    needs_halo: ClassVar[bool]
    """Whether blocks must have read a part of their neighbours' cores."""

    def table(self, labels: Labels, block: Block, depth: Sequence[int]) -> dict[str, np.ndarray]:
        """Return what is kept of a block; `labels` covers ``block.read``, the core and `depth` around it."""

    def show_reach(self, grid: BlockGrid) -> int:
        """How far away blocks are whose tables `show` needs; 0 if a core shows what its own table says."""

    def show(self, own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
        """Return what a core shows, given the tables of the blocks around it."""

    def link_reach(self, grid: BlockGrid) -> int:
        """How far apart blocks can be whose labels are linked."""

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> Links:
        """Return the keys of labels that are one object: int64 (n, 2), own and other, every pair once."""


@dataclass(frozen=True)
class Touching:
    """Labels that own neighbouring voxels across the border of two cores are one object.

    Raises
    ------
    ValueError
        If `connectivity` is not 1, 2 or 3.
    """

    connectivity: int = 1
    """Voxels are neighbours if they differ in at most this many axes, by 1."""

    needs_halo: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.connectivity not in (1, 2, 3):
            raise ValueError(f"`connectivity` must be 1, 2 or 3, got {self.connectivity}")

    def table(self, labels: Labels, block: Block, depth: Sequence[int]) -> dict[str, np.ndarray]:
        """Keep the core's outermost layers."""
        return surface_table(labels[block.trim], block)

    def show_reach(self, grid: BlockGrid) -> int:
        """Return 0: a core shows its own labels."""
        return 0

    def show(self, own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
        """Return `own`."""
        return dict(own)

    def link_reach(self, grid: BlockGrid) -> int:
        """Return 1: cores that touch."""
        return 1

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> Links:
        """Link labels with neighbouring voxels."""
        return touching_links(own, other, block, other_block, self.connectivity)


@dataclass(frozen=True)
class Overlap:
    """Labels whose intersection over union, in the region that both blocks have read, is large are one object.

    Raises
    ------
    ValueError
        If `threshold` does not lie in [0, 1).
    """

    threshold: float = 0.5
    """Linked if intersection / union is larger than this; from 0.5 on matches of two blocks are one to one."""

    needs_halo: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be at least 0 and below 1, got {self.threshold}")

    def table(self, labels: Labels, block: Block, depth: Sequence[int]) -> dict[str, np.ndarray]:
        """Keep what both the block and a neighbour have read."""
        return overlap_table(labels, block, depth)

    def show_reach(self, grid: BlockGrid) -> int:
        """Return 0: a core shows its own labels."""
        return 0

    def show(self, own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
        """Return `own`."""
        return dict(own)

    def link_reach(self, grid: BlockGrid) -> int:
        """Return how far blocks read into the cores of others."""
        return grid.reach

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> Links:
        """Link labels that overlap."""
        return overlap_links(own, other, block, other_block, self.threshold)


@dataclass(frozen=True)
class Centroid:
    """An object belongs to the block whose core holds its centroid; the others drop it."""

    needs_halo: ClassVar[bool] = True

    def table(self, labels: Labels, block: Block, depth: Sequence[int]) -> dict[str, np.ndarray]:
        """Keep the objects that the block owns, also where they reach into other cores."""
        return claim_table(labels, block)

    def show_reach(self, grid: BlockGrid) -> int:
        """Return how far blocks read into the cores of others, which is where their objects can show."""
        return max(grid.reach, 1)

    def show(self, own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
        """Return what a core shows of its own objects and of those of the blocks around it."""
        return shown_table(own, others, block)

    def link_reach(self, grid: BlockGrid) -> int:
        """Return twice how far objects show: in a block on either side of their owner."""
        return 2 * self.show_reach(grid)

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> Links:
        """Link what two cores show of one object."""
        return shown_links(own, other)


class JoinedByRule:
    """Base of label operators that keep of every block what a rule says: their part between `detect` and the end."""

    @property
    def _rule(self) -> Rule:
        """When labels of different blocks are one object."""
        raise NotImplementedError

    def show_reach(self, grid: BlockGrid) -> int:
        """How far away blocks are whose tables `show` needs; 0 if a core shows its own labels."""
        return self._rule.show_reach(grid)

    def show(self, own: Table, others: Sequence[Table], block: Block) -> dict[str, np.ndarray]:
        """Return what the core shows of objects of this block and of `others`."""
        return self._rule.show(own, others, block)

    def link_reach(self, grid: BlockGrid) -> int:
        """How far away blocks can be whose labels are of the same object."""
        return self._rule.link_reach(grid)

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> Links:
        """Return which labels of two blocks are one object."""
        return self._rule.links(own, other, block, other_block)

    def paint(self, block: Block, numbered: Sequence[Table]) -> np.ndarray:
        """Return the core with the id of its object in every voxel."""
        if not numbered:
            return np.zeros(block.core_shape, np.int32)
        (own,) = numbered
        return unpack(own["runs"], block.core_shape, own["ids"].astype(labels_dtype(own["ids"])))


def rule(by: str, *, threshold: float = 0.5, connectivity: int = 1) -> Touching | Overlap | Centroid:
    """Return the rule of that name: ``"touching"``, ``"iou"`` or ``"centroid"``.

    Raises
    ------
    ValueError
        If there is no such rule, or a parameter is out of range, whether or not the rule uses it.
    """
    rules: dict[str, Touching | Overlap | Centroid] = {
        "touching": Touching(connectivity),
        "iou": Overlap(threshold),
        "centroid": Centroid(),
    }
    if by not in rules:
        raise ValueError(f"`by` must be one of {', '.join(map(repr, rules))}, got {by!r}")
    return rules[by]

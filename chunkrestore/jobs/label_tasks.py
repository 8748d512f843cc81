"""What workers do in a label pass: one function per kind of task, each complete in itself and safe to repeat.

Tables lie in a folder that all workers see. A block without rows leaves no table; whoever reads tables is told which
blocks have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.grid import Block, BlockGrid, Slices
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import write_objects
from chunkrestore.jobs.phases import computing, phase
from chunkrestore.jobs.tables import digest_of, drop_table, load_table, n_rows, save_table
from chunkrestore.jobs.tasks import apply_within_memory, write_levels
from chunkrestore.ome_zarr.pyramid import Cascade
from chunkrestore.operators.base import (
    JoiningOperator,
    LabelOperator,
    ObjectOperator,
    SettlingOperator,
    Table,
    VoxelOperator,
    channels_of,
    concatenate,
)
from chunkrestore.stitch.joining import final_roots, join, leaf, region
from chunkrestore.stitch.numbering import owners, rank

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import RegionReader


@dataclass(frozen=True)
class Rival:
    """Another block whose survivors can meet those of a block."""

    item: Item
    n_round: int
    """Round of its present survivors."""
    distance: float
    """Voxels from the core, beyond which a point of its survivors does not matter."""


def detect(
    item: Item, source: RegionReader, grid: BlockGrid, operator: ObjectOperator, folder: Path
) -> dict[str, Any]:
    """Find what one core holds and keep its table on disk; return what the driver must know of it."""
    t, c, *index = item
    block = grid.block(index)
    with phase("read"):
        image = read_channels(source, operator, t, c, block.read)
    with computing():
        table = operator.detect(image, block)
    del image
    if not isinstance(operator, SettlingOperator):
        if isinstance(operator, JoiningOperator) and operator.show_reach(grid):
            # Of a block without objects too: others may show in its core.
            save_table(folder, "claims", item, table)
        elif n_rows(table):
            save_table(folder, "detected", item, table)
        return {"n_rows": n_rows(table)}
    # Not within `computing`: the next block's network runs meanwhile.
    with phase("decide"):
        table = operator.decide(table)
    told: dict[str, Any] = {"n_rows": n_rows(table), "radius": operator.radius(table)}
    if n_rows(table):
        save_table(folder, "detected", item, table)
        told["survivors"] = _save_survivors(folder, item, operator.survivors(table), 0)
    return told


def label(
    item: Item, source: RegionReader, grid: BlockGrid, operator: VoxelOperator, levels: Cascade
) -> dict[str, Any]:
    """Label the voxels of one core and write them at several levels, as `chunkrestore.jobs.tasks.process` does."""
    t, c, *index = item
    core = grid.block(index).core
    labels, n_parts = apply_within_memory(
        (operator,),
        core,
        grid.shape,
        tuple(index),
        lambda region: read_channels(source, operator, t, c, region),
    )
    return write_levels(item, levels, core, labels) | {"n_parts": n_parts}


def read_channels(
    source: RegionReader, operator: LabelOperator, t: int, c: int, region: Slices
) -> np.ndarray:
    """Return a region of one channel, or of all of them as the last axis if the operator takes several."""
    if channels_of(operator) == 1:
        return source.read(t, c, region)
    return np.stack([source.read(t, k, region) for k in range(channels_of(operator))], axis=-1)


def settle(
    item: Item,
    block: Block,
    operator: SettlingOperator,
    folder: Path,
    present: Sequence[Rival],
    n_round: int,
) -> dict[str, Any]:
    """Decide one block's objects against its neighbours' present survivors."""
    with phase("read"):
        own = load_table(folder, "detected", item)
        others = _survivors(block, operator, folder, present)
    with phase("decide"):
        settled = operator.settle(own, others, block)
    return _save_survivors(folder, item, operator.survivors(settled), n_round)


def measure(
    item: Item,
    block: Block,
    operator: SettlingOperator,
    folder: Path,
    n_round: int,
    present: Sequence[Rival],
) -> dict[str, Any]:
    """Keep those of a block's survivors that show, with what is known of them; its candidates are dropped.

    `n_round` is that of this block's survivors, `present` tells of those around it.
    """
    with phase("read"):
        own = load_table(folder, f"survivors-{n_round}", item)
        others = _survivors(block, operator, folder, present)
    with phase("measure"):
        objects = operator.measure(own, others, block)
    if n_rows(objects):
        save_table(folder, "objects", item, objects)
    # Everything is settled: nobody decides about candidates again, and they are most of what lies on the disk.
    drop_table(folder, "detected", item)
    return {"n_objects": n_rows(objects), "radius": operator.radius(objects)}


def show(
    item: Item, block: Block, operator: JoiningOperator, folder: Path, others: Sequence[Item]
) -> dict[str, int]:
    """Find what a core shows of the objects that its own block and `others` have claimed."""
    with phase("read"):
        own = load_table(folder, "claims", item)
        around = [load_table(folder, "claims", other, without=["runs"]) for other in others]
    with phase("show"):
        table = operator.show(own, around, block)
    if n_rows(table):
        save_table(folder, "detected", item, table)
    return {"n_rows": n_rows(table)}


def links(
    item: Item, grid: BlockGrid, operator: JoiningOperator, folder: Path, others: Sequence[Item]
) -> dict[str, int]:
    """Find which labels of a block are parts of objects that its neighbours have labelled as well."""
    block = grid.block(item[2:])
    with phase("read"):
        own = load_table(folder, "detected", item, without=["runs"])
    found = [np.empty((0, 2), np.int64)]
    for other in others:
        with phase("read"):
            table = load_table(folder, "detected", other, without=["runs"])
        with phase("link"):
            found.append(operator.links(own, table, block, grid.block(other[2:])))
    pairs = np.concatenate(found)
    if len(pairs):
        save_table(folder, "open-0", item, {"rows": leaf(pairs)})
    return {"n_open": len(pairs)}


def join_blocks(
    item: Item, grid: BlockGrid, folder: Path, children: Sequence[Item], level: int
) -> dict[str, int]:
    """Join what is linked within a group of blocks, `2 ** level` per axis; what leads out of it stays open."""
    with phase("read"):
        rows = [load_table(folder, f"open-{level - 1}", child)["rows"] for child in children]
    with phase("link"):
        assigned, remaining = join(rows, region(grid, level, item[2:]), grid.shape)
    if len(assigned):
        save_table(folder, f"assigned-{level}", item, {"assigned": assigned})
    if len(remaining):
        save_table(folder, f"open-{level}", item, {"rows": remaining})
    return {"n_open": len(remaining), "n_assigned": len(assigned)}


def find_roots(item: Item, folder: Path, ancestors: Sequence[tuple[int, Item]]) -> dict[str, int]:
    """Tell for each label of a block which label stands for its object; `ancestors` are levels and groups."""
    with phase("read"):
        keys = load_table(folder, "detected", item, ["key"])["key"]
        assigned = [load_table(folder, f"assigned-{level}", group)["assigned"] for level, group in ancestors]
    roots = final_roots(keys, assigned)
    save_table(folder, "roots", item, {"root": roots})
    own = keys[roots == keys]
    if len(own):
        save_table(folder, "objects", item, {"key": own})
    return {"n_objects": len(own)}


def number(item: Item, folder: Path, blocks: Sequence[Item], start: int) -> int:
    """Give the objects of a slab's blocks their ids, the first of them `start` + 1; return how many there are."""
    with phase("read"):
        keys = [load_table(folder, "objects", block, ["key"])["key"] for block in blocks]
    for block, ranks in zip(blocks, rank(keys), strict=True):
        save_table(folder, "ids", block, {"ids": start + ranks})
    return sum(map(len, keys))


def paint(
    item: Item,
    grid: BlockGrid,
    operator: ObjectOperator,
    folder: Path,
    numbered: Sequence[Item],
    levels: Cascade,
) -> dict[str, Any]:
    """Paint the labels of one core and write them at several levels; return the checksums of what was written.

    `numbered` are the blocks whose objects can show in this one.
    """
    block = grid.block(item[2:])
    with phase("read"):
        load = _settled if isinstance(operator, SettlingOperator) else _joined
        tables = [load(folder, other, grid) for other in numbered]
    with computing():
        labels = operator.paint(block, tables)
    dtype = levels.targets[0].dtype
    return write_levels(item, levels, block.core, labels.astype(dtype, casting="safe", copy=False))


def write_table(
    _: Item,
    folder: Path,
    slabs: Sequence[tuple[tuple[int, int], Sequence[Item]]],
    path: str,
    columns: ObjectColumns,
    provenance: Mapping[str, Any],
) -> int:
    """Write the table of all objects, slab by slab; return how many there are."""
    wanted = set(columns.empty()) - {"ids"}

    def parts() -> Iterator[tuple[tuple[int, int], Table]]:
        for plane, blocks in slabs:
            slab = concatenate(
                load_table(folder, "objects", block, wanted) | load_table(folder, "ids", block)
                for block in blocks
            )
            order = np.argsort(slab["ids"])
            yield plane, {name: column[order] for name, column in slab.items()}

    with phase("write"):
        return write_objects(path, parts(), columns, provenance=provenance, scratch=folder)


def _settled(folder: Path, item: Item, grid: BlockGrid) -> Table:
    """Return the objects of a block with their ids."""
    return load_table(folder, "objects", item) | load_table(folder, "ids", item)


def _joined(folder: Path, item: Item, grid: BlockGrid) -> Table:
    """Return the local labels of a block, each with the id of its root, which another block may own."""
    roots = load_table(folder, "roots", item)["root"]
    ids = np.empty(len(roots), np.int64)
    blocks, of_block = np.unique(owners(grid, roots), axis=0, return_inverse=True)
    for number, block in enumerate(blocks.tolist()):
        here = of_block.reshape(-1) == number
        owner = (*item[:2], *block)
        keys, its_ids = load_table(folder, "objects", owner)["key"], load_table(folder, "ids", owner)["ids"]
        order = np.argsort(keys)
        ids[here] = its_ids[order][np.searchsorted(keys[order], roots[here])]
    return load_table(folder, "detected", item) | {"ids": ids}


def _survivors(block: Block, operator: SettlingOperator, folder: Path, present: Sequence[Rival]) -> Table:
    """Return the survivors of other blocks that can meet those of a block; of one block at a time all are read."""
    return concatenate(
        operator.within(load_table(folder, f"survivors-{rival.n_round}", rival.item), block, rival.distance)
        for rival in present
    )


def _save_survivors(folder: Path, item: Item, table: Table, n_round: int) -> dict[str, Any]:
    save_table(folder, f"survivors-{n_round}", item, table)
    return {"n_round": n_round, "digest": digest_of(table)}

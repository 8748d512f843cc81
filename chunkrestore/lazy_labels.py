"""Labels of the chunks of a dask array, made one label image of the whole: a lazy array in, a lazy array out.

The graph is a tree: a table per chunk, links per chunk and its neighbours, nodes that join links from the bottom up
and hand roots down again (`chunkrestore.stitch.joining`), sorted roots per slab of chunks, and the labels of every
chunk written from what its table kept of it. Chunks are computed once, and dropped as soon as their table is made.
"""

from __future__ import annotations

import itertools
import operator as op
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.components import Table
from chunkrestore.kernels.label_runs import unpack
from chunkrestore.lazy import _map_planes
from chunkrestore.operators.rules import Rule, Touching
from chunkrestore.stitch import joining


def merge_planes(labels: da.Array, rule: Rule, depth: int | Sequence[int], axes: str) -> da.Array:
    """Return the lazy labels of every time point and channel, each a volume of its own; see `merge`."""
    n_lead = sum(axis in "tc" for axis in axes)
    n_spatial = labels.ndim - n_lead
    depths = tuple(depth) if isinstance(depth, Sequence) else (depth,) * n_spatial
    if len(depths) != n_spatial or any(not isinstance(d, (int, np.integer)) or d < 0 for d in depths):
        raise ValueError(
            f"`depth` must be a number of voxels of at least 0, or one per spatial axis ({n_spatial}), got {depth}"
        )
    if isinstance(rule, Touching) and rule.connectivity > n_spatial:
        raise ValueError(f"`connectivity` {rule.connectivity} is more than the {n_spatial} spatial axes")
    if any(np.isnan(n) for n in labels.shape):
        raise ValueError("the labels have unknown chunk sizes; call `compute_chunk_sizes()` on them first")
    return _map_planes(lambda plane: merge(plane, rule, depths), labels, n_lead)


def merge(labels: da.Array, rule: Rule, depth: Sequence[int]) -> da.Array:
    """Return the lazy labels of a volume whose chunks were labelled each for itself.

    Parameters
    ----------
    labels
        Integer labels; every chunk is a core with `depth` voxels around it, where the volume goes on. Spatial axes
        only.
    rule
        When labels of different chunks are one object.
    depth
        Voxels per axis.

    Returns
    -------
    dask.array.Array
        int32, chunked like the cores. Ids run from 1, in the order of the objects' first voxels.

    Raises
    ------
    ValueError
        If the chunks cannot be cores with that halo; nothing was computed then.
    """
    cores = core_chunks(labels.chunks, depth, rule)
    grid = BlockGrid.from_chunks(cores, Halo(tuple(depth)))
    name = f"merge-labels-{tokenize(labels.name, rule, tuple(depth))}"
    layer = _tables(labels, rule, grid, name) | _links(rule, grid, name) | _tree(grid, name)
    for block in grid:
        slabs = [(f"slab-{name}", i) for i in range(block.index[0] + 1)]
        at = block.index
        layer[(name, *at)] = (_write, block, (f"runs-{name}", *at), (f"roots-{name}", *at), slabs)
    graph = HighLevelGraph.from_collections(name, layer, dependencies=[labels])
    return da.Array(graph, name, cores, meta=np.empty((0,) * labels.ndim, np.int32))


def core_chunks(
    chunks: Sequence[Sequence[int]], depth: Sequence[int], rule: Rule
) -> tuple[tuple[int, ...], ...]:
    """Return the lengths of the cores in chunks that have `depth` voxels of their neighbours on each side.

    Raises
    ------
    ValueError
        If a chunk is empty, a core is thinner than the depth, or the rule needs a halo and there is none.
    """
    cores = []
    for axis, (lengths, d) in enumerate(zip(chunks, depth, strict=True)):
        if min(lengths) < 1:
            raise ValueError(
                f"`labels` has chunks without voxels on axis {axis}: {lengths}; rechunk it first"
            )
        last = len(lengths) - 1
        core = [n - d * (i > 0) - d * (i < last) for i, n in enumerate(lengths)]
        if last and min(core) < d:
            raise ValueError(
                f"`depth` {d} on axis {axis} is larger than a chunk: without the halo it has {min(core)} voxels; use "
                "larger chunks, or less depth"
            )
        if last and not d and rule.needs_halo:
            raise ValueError(
                f"`depth` is 0 on axis {axis}, which has {last + 1} chunks; this rule compares what chunks have both "
                "seen: label overlapping chunks (dask.array.overlap.overlap), or use by='touching'"
            )
        cores.append(tuple(core))
    return tuple(cores)


def _tables(labels: da.Array, rule: Rule, grid: BlockGrid, name: str) -> dict[Any, Any]:
    """Tasks that keep of each chunk what is needed later, in parts that are dropped at different times."""
    layer: dict[Any, Any] = {}
    reach = rule.show_reach(grid)
    for block in grid:
        kept = "claim" if reach else "table"
        layer[(f"{kept}-{name}", *block.index)] = (
            _table,
            rule,
            grid.halo.depth,
            block,
            (labels.name, *block.index),
        )
    for block in grid:
        at = block.index
        if reach:
            around = [(f"claim-{name}", *other) for other in grid.around(at, reach)]
            layer[(f"table-{name}", *at)] = (_show, rule, block, (f"claim-{name}", *at), around)
        layer[(f"runs-{name}", *at)] = (op.getitem, (f"table-{name}", *at), "runs")
        layer[(f"key-{name}", *at)] = (op.getitem, (f"table-{name}", *at), "key")
        layer[(f"rim-{name}", *at)] = (_rim, (f"table-{name}", *at))
    return layer


def _links(rule: Rule, grid: BlockGrid, name: str) -> dict[Any, Any]:
    """Tasks that link each block's labels with those of the blocks around it."""
    layer = {}
    blocks, reach = {block.index: block for block in grid}, rule.link_reach(grid)
    for at, block in blocks.items():
        others = grid.around(at, reach)
        around = [(f"rim-{name}", *other) for other in others]
        place = [blocks[other] for other in others]
        layer[(f"open-{name}", 0, *at)] = (_link, rule, block, (f"rim-{name}", *at), place, around)
    return layer


def _tree(grid: BlockGrid, name: str) -> dict[Any, Any]:
    """Tasks that join links upwards, hand roots downwards, and sort the roots of every slab."""
    layer: dict[Any, Any] = {}
    top = joining.n_levels(grid)
    nothing = np.empty((0, 2), np.int64)
    for level in range(1, top + 1):
        for at in joining.nodes(grid, level):
            region = joining.region(grid, level, at)
            below = [(f"open-{name}", level - 1, *child) for child in joining.children(grid, level, at)]
            above = (f"down-{name}", level + 1, *(i // 2 for i in at)) if level < top else nothing
            joined, assigned = (f"join-{name}", level, *at), (f"assigned-{name}", level, *at)
            layer[joined] = (joining.join, below, region, grid.shape)
            layer[assigned] = (op.getitem, joined, 0)
            layer[(f"open-{name}", level, *at)] = (op.getitem, joined, 1)
            layer[(f"down-{name}", level, *at)] = (joining.hand_down, assigned, above, region, grid.shape)
    for at in joining.nodes(grid, 0):
        down = [(f"down-{name}", 1, *(i // 2 for i in at))] if top else []
        layer[(f"roots-{name}", *at)] = (joining.final_roots, (f"key-{name}", *at), down)
    for slab in range(grid.n_blocks[0]):
        members = [(slab, *rest) for rest in itertools.product(*map(range, grid.n_blocks[1:]))]
        keys = [(f"key-{name}", *at) for at in members]
        layer[(f"slab-{name}", slab)] = (_slab, keys, [(f"roots-{name}", *at) for at in members])
    return layer


def _table(rule: Rule, depth: Sequence[int], block: Block, labels: Any) -> Table:
    try:
        if labels.shape != block.read_shape:
            raise ValueError(f"the chunk has shape {labels.shape}, but its metadata say {block.read_shape}")
        return rule.table(to_numpy(labels), block, depth)
    except (ValueError, OverflowError) as error:
        raise type(error)(f"chunk {block.index}: {error}") from None


def _show(rule: Rule, block: Block, own: Table, others: Sequence[Table]) -> Table:
    return rule.show(own, others, block)


def _rim(table: Table) -> Table:
    return {name: column for name, column in table.items() if name != "runs"}


def _link(
    rule: Rule, block: Block, own: Table, others: Sequence[Block], tables: Sequence[Table]
) -> np.ndarray:
    found = [rule.links(own, table, block, other) for other, table in zip(others, tables, strict=True)]
    return joining.leaf(np.concatenate([np.empty((0, 2), np.int64), *found]))


def _slab(keys: Sequence[np.ndarray], roots: Sequence[np.ndarray]) -> np.ndarray:
    """Return the objects that begin in a slab: labels that are their own root, ascending."""
    return np.sort(np.concatenate([r[r == k] for k, r in zip(keys, roots, strict=True)]))


def _write(block: Block, runs: np.ndarray, roots: np.ndarray, slabs: Sequence[np.ndarray]) -> np.ndarray:
    # Keys of a slab are smaller than those of the next: an id is how many objects begin no later, slab by slab.
    ids = np.zeros(len(roots), np.int64)
    for slab in slabs:
        ids += np.searchsorted(slab, roots, side="right")
    if ids.max(initial=0) > np.iinfo(np.int32).max:
        raise OverflowError(
            f"{block}: more objects than int32 ids; merge parts of the volume each for itself"
        )
    return unpack(runs, block.core_shape, ids.astype(np.int32))

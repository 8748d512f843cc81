"""Dask arrays computed from regions that reach beyond their chunks: the one place that cuts halos out of chunks.

Every block gathers its own halo from the chunks it meets, however many they are, so chunks may be uneven or
thinner than the halo.
"""

from __future__ import annotations

import operator as op
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dask
import dask.array as da
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from chunkrestore.grid import BlockGrid, Slices


def map_blocks(
    function: Callable[..., Any],
    grid: BlockGrid,
    image: da.Array,
    *arguments: Any,
    name: str,
    dtype: Any,
) -> da.Array:
    """Return the lazy array of ``function(block, what the block reads, *arguments)``, the core of each block.

    Parameters
    ----------
    function
        Returns an array of the shape of the block's core; pure.
    grid
        Blocks whose cores are the chunks of `image`, with what they read.
    image
        Dask array.
    *arguments
        Held once in the graph; the same for all blocks.
    name, dtype
        Of the result.
    """
    held = [dask.delayed(argument, pure=True, traverse=False) for argument in arguments]
    name = f"{name}-{tokenize(function, grid, image.name, *arguments)}"
    layer = dict(gather(image, grid, f"halo-{name}"))
    keys = [argument.key for argument in held]
    layer |= {(name, *b.index): (function, b, (f"halo-{name}", *b.index), *keys) for b in grid}
    return from_layer(name, layer, [image, *held], image.chunks, image._meta.astype(dtype))


def gather(image: da.Array, grid: BlockGrid, name: str) -> Iterable[tuple[Any, Any]]:
    """Yield tasks that cut every block's read region out of the chunks it meets.

    Slices are tasks of their own, so that a chunk's neighbours receive its rim and not the whole chunk.
    """
    for block in grid:
        pieces: list[tuple[Slices, Any]] = []
        for index in grid.indices_meeting(block.read):
            core = tuple(slice(e[i], e[i + 1]) for e, i in zip(grid.edges, index, strict=True))
            part = tuple(
                slice(max(c.start, r.start), min(c.stop, r.stop))
                for c, r in zip(core, block.read, strict=True)
            )
            key = (f"piece-{name}", *block.index, *index)
            chunk = (image.name, *index, *(0,) * (image.ndim - len(index)))
            yield key, (op.getitem, chunk, _shift(part, core))
            pieces.append((_shift(part, block.read), key))
        yield (
            (name, *block.index),
            (_assemble, block.read_shape, [p for p, _ in pieces], [k for _, k in pieces]),
        )


def from_layer(
    name: str, layer: dict[Any, Any], dependencies: Sequence[Any], chunks: Any, meta: Any
) -> da.Array:
    """Return the dask array of a layer of tasks."""
    graph = HighLevelGraph.from_collections(name, layer, dependencies=dependencies)
    return da.Array(graph, name, chunks, meta=meta)


def _shift(region: Slices, origin: Slices) -> Slices:
    """Return `region` in coordinates that start where `origin` starts."""
    return tuple(slice(r.start - o.start, r.stop - o.start) for r, o in zip(region, origin, strict=True))


def _assemble(shape: tuple[int, ...], places: Sequence[Slices], pieces: Sequence[Any]) -> Any:
    from chunkrestore.backend import namespace

    if len(pieces) == 1:
        return pieces[0]
    channels = pieces[0].shape[len(shape) :]
    result = namespace(pieces[0]).empty((*shape, *channels), dtype=pieces[0].dtype)
    for place, piece in zip(places, pieces, strict=True):
        result[place] = piece
    return result

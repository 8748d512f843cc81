"""What workers do: one function per kind of task, each complete in itself and safe to repeat.

Every task reads from a store or from tables on disk, computes, writes whole write units, and returns a
few numbers. Nothing stays in a worker's memory between tasks but loaded models and transformed PSFs.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore import statistics
from chunkrestore.backend import is_out_of_memory, release_memory, to_device, to_numpy
from chunkrestore.grid import Block, BlockGrid, Slices
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import computing, phase
from chunkrestore.ome_zarr.pyramid import PyramidBlock, reduce_block, source_of
from chunkrestore.operators.base import ImageOperator, LabelOperator, Operator, PilotOperator, Table
from chunkrestore.operators.deconvolution import Deconvolution
from chunkrestore.stitch.resolution import concatenate, neighbours

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import ImageWriter, RegionReader, RegionWriter

Index = tuple[int, ...]

_LEAST_PART = 16
"""Voxels per axis below which a block is not cut any further when memory runs out."""


def chain(
    operators: Sequence[Operator], core: Slices, shape: Sequence[int], index: Index = ()
) -> list[Block]:
    """Return the block of each operator in a chain that ends on `core`.

    The last operator's core is `core`; each operator before it must be valid on all that the next one reads.
    """
    blocks: list[Block] = []
    for operator in reversed(operators):
        blocks.insert(0, Block.around(core, shape, operator.halo(shape), index))
        core = blocks[0].read
    return blocks


def apply_chain(
    operators: Sequence[ImageOperator], blocks: Sequence[Block], image: Any, device: str = "cpu"
) -> np.ndarray:
    """Run a chain on what its first block reads; return the result on the last block's core.

    Deconvolution runs on `device`, networks where TensorFlow puts them: what CuPy's pool holds is given back
    before, since TensorFlow cannot take it from there.
    """
    for operator, block in zip(operators, blocks, strict=True):
        if isinstance(operator, Deconvolution):
            here = to_device(image, device)
        else:
            here = to_numpy(image)
            release_memory()
        image = operator(here, block)[block.trim]
        del here
    return to_numpy(image)


def apply_within_memory(
    operators: Sequence[ImageOperator],
    core: Slices,
    shape: Sequence[int],
    index: Index,
    read: Callable[[Slices], np.ndarray],
    device: str = "cpu",
) -> tuple[np.ndarray, int]:
    """Run a chain on one core; where memory runs out, on its halves, and so on.

    Each part reads its own halo, so parts meet as blocks do. Returns the result on the core, and in how many
    parts it was done.

    Raises
    ------
    MemoryError
        If not even a part of `_LEAST_PART` voxels per axis fits.
    """
    blocks = chain(operators, core, shape, index)
    try:
        return _apply(operators, blocks, read, device), 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = str(error) or type(error).__name__
    # Outside the handler: the error's traceback holds the arrays that did not fit.
    release_memory()
    lengths = [s.stop - s.start for s in core]
    axis = int(np.argmax(lengths))
    if lengths[axis] < 2 * _LEAST_PART:
        raise MemoryError(
            f"{blocks[-1]} does not fit into memory, not even in parts of {lengths} voxels ({why}); use fewer "
            "workers, a smaller `depth`, or a machine with more memory"
        )
    align = max(operator.halo(shape).align[axis] for operator in operators)
    middle = core[axis].start + max(lengths[axis] // 2 // align, 1) * align
    ends = slice(core[axis].start, middle), slice(middle, core[axis].stop)
    halves = [
        apply_within_memory(operators, (*core[:axis], end, *core[axis + 1 :]), shape, index, read, device)
        for end in ends
    ]
    return np.concatenate([result for result, _ in halves], axis=axis), sum(n for _, n in halves)


def _apply(
    operators: Sequence[ImageOperator],
    blocks: Sequence[Block],
    read: Callable[[Slices], np.ndarray],
    device: str,
) -> np.ndarray:
    with phase("read"):
        image = read(blocks[0].read)
    with computing():
        return apply_chain(operators, blocks, image, device)


def summarize(item: Item, source: RegionReader, grid: BlockGrid) -> statistics.Summary:
    """Count the voxels of one core; a voxel that is not finite is an error that names the block."""
    t, c, *index = item
    block = grid.block(index)
    with phase("read"):
        image = source.read(t, c, block.core)
    try:
        with computing():
            return statistics.summarize(image)
    except statistics.NonFiniteError as error:
        stored = dict(zip(source.axes, source.picks, strict=True))
        place = f"time point {stored.get('t', (0,))[t]}, channel {stored.get('c', (0,))[c]}"
        raise statistics.NonFiniteError(f"{source.name}, {place}, {block}: {error}") from None


def refine(item: Item, source: RegionReader, grid: BlockGrid, wanted: statistics.Refinement) -> np.ndarray:
    """Count the voxels of one core for the second pass."""
    t, c, *index = item
    with phase("read"):
        image = source.read(t, c, grid.block(index).core)
    with computing():
        return statistics.refine(image, wanted)


def pilot(
    item: Item,
    source: RegionReader,
    operator: PilotOperator,
    numbers: Mapping[float | str, Any],
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Let an operator decide for a whole plane, on its pilot regions."""
    t, c = item
    with computing():
        return operator.pilot(numbers, lambda region: source.read(t, c, region), shape)


def process(
    item: Item,
    source: RegionReader,
    grid: BlockGrid,
    operators: Sequence[ImageOperator],
    target: RegionWriter,
    device: str,
) -> dict[str, int]:
    """Run a chain of image operators on one block and write its core.

    Returns the checksum of what was written, and in how many parts it was computed.
    """
    t, c, *index = item
    block = grid.block(index)
    result, n_parts = apply_within_memory(
        operators, block.core, grid.shape, tuple(index), lambda region: source.read(t, c, region), device
    )
    if not np.isfinite(result).all():
        raise FloatingPointError(f"{block}: the result holds NaN or infinite voxels")
    return _write(item, target, block.core, result) | {"n_parts": n_parts}


def probe_seam(
    item: Item,
    source: RegionReader,
    grid: BlockGrid,
    operators: Sequence[ImageOperator],
    written: RegionReader,
    half_width: int,
    device: str,
) -> dict[str, float]:
    """Compare what was written on both sides of a block border with a result that has no border there.

    `item` is the time point, the channel and, per axis, the voxel at the centre of the probe. The
    reference is computed with twice the depth, on a region centred on the border.
    """
    t, c, *centre = item
    core = tuple(
        slice(max(0, x - half_width), min(n, x + half_width)) for x, n in zip(centre, grid.shape, strict=True)
    )
    deeper = [_deepened(operator, grid.shape) for operator in operators]
    blocks = chain(deeper, core, grid.shape)
    reference = _apply(deeper, blocks, lambda region: source.read(t, c, region), device)
    error = written.read(t, c, core).astype(np.float64) - reference
    return {"rms": float(np.sqrt(np.mean(error**2))), "max": float(np.abs(error).max())}


def _deepened(operator: Any, shape: Sequence[int]) -> Any:
    if not hasattr(operator, "tolerance"):
        return operator
    return replace(operator, depth=tuple(2 * d for d in operator.halo(shape).depth))


def detect(
    item: Item, source: RegionReader, grid: BlockGrid, operator: LabelOperator, folder: Path
) -> dict[str, Any]:
    """Find the objects of one core and keep their table on disk."""
    t, c, *index = item
    block = grid.block(index)
    with phase("read"):
        image = source.read(t, c, block.read)
    with computing():
        table = operator.detect(image, block)
    save_table(folder, "detected", item, table)
    return {
        "reach": operator.reach([table]),
        "survivors": _save_survivors(folder, item, operator.survivors(table), 0),
    }


def settle(
    item: Item,
    block: Block,
    operator: LabelOperator,
    folder: Path,
    present: Mapping[Index, int],
    n_round: int,
) -> dict[str, Any]:
    """Decide one block's objects against its neighbours' survivors; `present` tells of which round those are."""
    t, c, *_ = item
    with phase("read"):
        own = load_table(folder, "detected", item)
        others = concatenate(
            load_table(folder, f"survivors-{r}", (t, c, *index)) for index, r in present.items()
        )
    with computing():
        settled = operator.settle(own, others, block)
    return _save_survivors(folder, item, operator.survivors(settled), n_round)


def paint(
    item: Item,
    source: RegionReader,
    grid: BlockGrid,
    operator: LabelOperator,
    folder: Path,
    reach: int | None,
    target: RegionWriter,
) -> dict[str, int]:
    """Paint the labels of one core and write them; return the checksum of what was written."""
    t, c, *index = item
    block = grid.block(index)
    near = [tuple(index)] if reach is None else [tuple(index), *neighbours(grid, tuple(index), reach)]
    with phase("read"):
        numbered = concatenate(load_table(folder, "numbered", (t, c, *i)) for i in near)
        image = source.read(t, c, block.read) if operator.paint_reads_image else None
    with computing():
        labels = operator.paint(image, block, numbered)
    return _write(item, target, block.core, labels.astype(target.dtype, casting="safe", copy=False))


def downsample(item: Item, writer: ImageWriter, region: PyramidBlock) -> dict[str, int]:
    """Compute one region of a pyramid level from the level below; return the checksum of what was written."""
    with phase("read"):
        below = writer.target(region.level - 1).read(region.t, region.c, source_of(writer, region))
    with computing():
        reduced = reduce_block(writer, region, below)
    return _write(item, writer.target(region.level), region.slices, reduced)


def checksum(item: Item, written: RegionReader, region: Slices) -> int:
    """Return the checksum of what is stored in a region."""
    t, c, *_ = item
    return _checksum(written.read(t, c, region))


def _write(item: Item, target: RegionWriter, region: Slices, array: np.ndarray) -> dict[str, int]:
    t, c, *_ = item
    with phase("write"):
        target.write(t, c, region, array)
    return {"crc32": _checksum(array)}


def _checksum(array: np.ndarray) -> int:
    """Return the CRC-32 of an array's values, independent of its layout and of the machine's byte order."""
    return zlib.crc32(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def save_table(folder: Path, kind: str, item: Item, table: Table) -> None:
    """Write a table whole or not at all."""
    path = _table_path(folder, kind, item)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **table)
    os.replace(partial, path)


def load_table(folder: Path, kind: str, item: Item) -> Table:
    """Read a table."""
    with np.load(_table_path(folder, kind, item), allow_pickle=False) as stored:
        return dict(stored)


def _save_survivors(folder: Path, item: Item, table: Table, n_round: int) -> dict[str, Any]:
    save_table(folder, f"survivors-{n_round}", item, table)
    content = hashlib.sha256()
    for key in sorted(table):
        content.update(key.encode() + np.ascontiguousarray(table[key]).tobytes())
    return {"n_round": n_round, "digest": content.hexdigest()}


def _table_path(folder: Path, kind: str, item: Item) -> Path:
    return folder / kind / f"{'.'.join(map(str, item))}.npz"

"""What workers do: one function per kind of task, each complete in itself and safe to repeat.

Those of a label pass are in `chunkrestore.jobs.label_tasks`. Every task reads from a store, computes, writes whole
write units, and returns a few numbers. Nothing stays in a worker's memory between tasks but loaded models and
transformed PSFs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore import statistics
from chunkrestore.backend import is_out_of_memory, release_memory, to_device, to_numpy
from chunkrestore.grid import Block, BlockGrid, Slices
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import computing, phase
from chunkrestore.ome_zarr.pyramid import Cascade
from chunkrestore.operators.base import ImageOperator, Operator, PilotOperator
from chunkrestore.operators.deconvolution import Deconvolution
from chunkrestore.operators.storing import AsType, only_copies

try:
    from isal.isal_zlib import crc32  # the same number, seven times as fast as Python's own
except ImportError:
    from zlib import crc32

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import RegionReader, RegionWriter

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
    levels: Cascade,
    device: str,
) -> dict[str, Any]:
    """Run a chain of image operators on one block and write its core, and what follows from it of other levels.

    Returns the checksums of what was written, in how many parts it was computed, and where a dtype was chosen how many
    voxels lay beyond its range.
    """
    t, c, *index = item
    block = grid.block(index)
    image_operators, as_type = _split_type(operators)
    result, n_parts = apply_within_memory(
        image_operators,
        block.core,
        grid.shape,
        tuple(index),
        lambda region: source.read(t, c, region),
        device,
    )
    told: dict[str, Any] = {"n_parts": n_parts}
    if result.dtype.kind == "f" and not only_copies(operators) and not np.isfinite(result).all():
        raise FloatingPointError(f"{block}: the result holds NaN or infinite voxels")
    if as_type is not None:
        with computing():
            result, told["n_clipped"] = as_type.convert(result)
    return write_levels(item, levels, block.core, result) | told


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
    image_operators, as_type = _split_type(operators)
    deeper = [_deepened(operator, grid.shape) for operator in image_operators]
    blocks = chain(deeper, core, grid.shape)
    reference = _apply(deeper, blocks, lambda region: source.read(t, c, region), device)
    stored = written.read(t, c, core)
    if as_type is not None:
        # What rounding changes is no seam: it is done to both, and both are intensities again.
        stored, reference = (as_type.intensities(a) for a in (stored, as_type(reference)))
    error = stored.astype(np.float64) - reference
    return {"rms": float(np.sqrt(np.mean(error**2))), "max": float(np.abs(error).max())}


def _split_type(
    operators: Sequence[ImageOperator],
) -> tuple[Sequence[ImageOperator], AsType | None]:
    """Return what makes the voxels, and the choice of their dtype if there is one."""
    *others, last = operators
    return (others, last) if isinstance(last, AsType) else (operators, None)


def _deepened(operator: Any, shape: Sequence[int]) -> Any:
    if not hasattr(operator, "tolerance"):
        return operator
    return replace(operator, depth=tuple(2 * d for d in operator.halo(shape).depth))


def downsample(item: Item, source: RegionReader, grid: BlockGrid, levels: Cascade) -> dict[str, Any]:
    """Compute what one region of a pyramid level holds of several levels, and write it.

    Parameters
    ----------
    item
        Time point, channel, and index of the region.
    source
        The level below.
    grid
        Regions of the first of the levels.
    levels
        What is written.

    Returns
    -------
    dict
        As `write_levels` returns it.
    """
    t, c, *index = item
    region, parts = grid.block(index).core, []
    for part, made in levels.sources(source, region):
        with phase("read"):
            below = source.read(t, c, part)
        with computing():
            parts.append(levels.reduce(below, 0, made))
        del below
    return write_levels(item, levels, region, np.concatenate(parts))


def checksums(item: Item, written: Sequence[tuple[RegionReader, Slices]]) -> list[int]:
    """Return the checksums of what is stored in regions of arrays."""
    t, c, *_ = item
    return [_checksum(array.read(t, c, region)) for array, region in written]


def write_levels(item: Item, levels: Cascade, region: Slices, array: np.ndarray) -> dict[str, Any]:
    """Write a region of the first of several levels, and what follows from it of the others.

    Returns the checksum of what was written as ``crc32``, and those of the other levels, if any, as ``crc32s``.
    """
    written = []
    for position, (target, part) in enumerate(zip(levels.targets, levels.regions(region), strict=False)):
        if position:
            with computing():
                array = levels.reduce(array, position, part)
        written.append(write(item, target, part, array)["crc32"])
    first, *others = written
    return {"crc32": first, "crc32s": others} if others else {"crc32": first}


def write(item: Item, target: RegionWriter, region: Slices, array: np.ndarray) -> dict[str, int]:
    """Write a region; return the checksum of what was written."""
    t, c, *_ = item
    with phase("write"):
        target.write(t, c, region, array)
    return {"crc32": _checksum(array)}


def _checksum(array: np.ndarray) -> int:
    """Return the CRC-32 of an array's values, independent of its layout and of the machine's byte order."""
    return crc32(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)

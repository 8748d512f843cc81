"""Operators on dask arrays: any graph and any chunking in, a lazy array out.

Chunks become cores. Every block gathers its own halo from the chunks it meets, however many they are, so
chunks may be uneven, smaller than the halo, or off a network's grid: blocks are the same objects as in a
job, and so are the numbers. `dask.array.map_overlap` is not used because it merges chunks that are thinner
than the depth, cannot align reads to a network's grid, and tells a block neither where it lies nor whether
it touches the volume's border.

Numbers of the whole volume that an operator needs become one more node of the graph. They are computed
from the same chunks, which dask then keeps until the operator has used them: for volumes far beyond memory
give the numbers (``normalization=...``) or use `chunkrestore.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize

from chunkrestore import statistics
from chunkrestore.gathering import from_layer, gather
from chunkrestore.grid import Block, BlockGrid, Slices
from chunkrestore.lazy_resampled import resample
from chunkrestore.operators.base import (
    ImageOperator,
    LabelOperator,
    ObjectOperator,
    Operator,
    PilotOperator,
    Table,
    VoxelOperator,
    channels_of,
)
from chunkrestore.operators.pilot import pilot_candidates
from chunkrestore.operators.sampling import Sampling, sampling_of
from chunkrestore.operators.storing import result_dtype
from chunkrestore.stitch.objects import Objects, number_objects

_MERGE_WIDTH = 32
"""Summaries merged by one task."""


def apply_image(operator: ImageOperator, image: da.Array, axes: str) -> da.Array:
    """Return the lazy result of an image operator: float32, same shape and chunks.

    One that sees the volume at another sampling (`chunkrestore.operators.sampling`) gives as many planes.

    Parameters
    ----------
    operator
        What to apply to every time point and channel.
    image
        Dask array with one dimension per letter of `axes`.
    axes
        Subset of ``"tczyx"`` in that order, ending in ``"yx"``.

    Raises
    ------
    ValueError
        If axes, dtype or shape do not suit the operator, before anything is computed.
    """
    n_lead = _check(operator, image, axes)
    sampling = sampling_of(operator)
    if sampling is None:
        return _map_planes(lambda plane: _image_plane(operator, plane, plane), image, n_lead)

    def plane_at(sampling: Sampling, plane: da.Array) -> da.Array:
        seen = resample(plane, sampling.scale, dtype=sampling.dtype)
        return _image_plane(operator, seen, plane if sampling.measures_original else seen)

    return _map_planes(partial(plane_at, sampling), image, n_lead)


def apply_labels(operator: LabelOperator, image: da.Array, axes: str) -> da.Array:
    """Return the lazy labels of a label operator, same shape and chunks: of objects int32, of classes uint8.

    Parameters are those of `apply_image`. The channels of an operator that takes several together are not among
    the axes of its labels. Decisions across blocks are made by one task that holds the tables of all blocks; a
    job distributes them.
    """
    n_lead = _check(operator, image, axes)
    if channels_of(operator) > 1:
        image = da.moveaxis(image, channel_axis(operator, image.shape, axes), -1).rechunk({-1: -1})
        n_lead -= 1
    of_plane = _labels_plane if isinstance(operator, ObjectOperator) else _voxel_labels_plane
    return _map_planes(lambda plane: of_plane(operator, plane), image, n_lead)  # type: ignore[arg-type]


def lazy_statistics(image: da.Array, needs: Iterable[float | str]) -> Any:
    """Return a delayed mapping of the numbers `needs` of a whole dask array, exact for any chunking."""
    needs = tuple(needs)
    chunks = image.to_delayed()
    blocks = list(chunks.ravel())
    summaries = [
        dask.delayed(_summarize)(b, i) for b, i in zip(blocks, np.ndindex(chunks.shape), strict=True)
    ]
    summary = _tree(dask.delayed(statistics.merge), summaries)
    if np.dtype(image.dtype).kind != "f" or not (set(needs) - {"mean", "minimum", "maximum"}):
        return dask.delayed(statistics.values)(summary, needs)
    wanted = dask.delayed(statistics.refinement)(summary, needs)
    refined = _tree(dask.delayed(sum), [dask.delayed(statistics.refine)(b, wanted) for b in blocks])
    return dask.delayed(statistics.values)(summary, needs, wanted, refined)


def channel_axis(operator: Operator, shape: Sequence[int], axes: str) -> int:
    """Return which axis of an image an operator that takes several channels together consumes.

    Raises
    ------
    ValueError
        If the image has not as many channels.
    """
    n_channels = dict(zip(axes, shape, strict=True)).get("c", 1)
    if n_channels != channels_of(operator):
        raise ValueError(
            f"{operator.name} takes {channels_of(operator)} channels together, but an image of shape "
            f"{tuple(shape)} with `axes` {axes!r} has {n_channels}; choose them before"
        )
    return axes.index("c")


def _check(operator: Operator, image: da.Array, axes: str) -> int:
    if len(axes) != image.ndim:
        raise ValueError(f"`axes` {axes!r} names {len(axes)} axes but the image has {image.ndim}")
    n_spatial = sum(axis in "zyx" for axis in axes)
    if any(np.isnan(n) for n in image.shape):
        raise ValueError("the image has unknown chunk sizes; call `compute_chunk_sizes()` on it first")
    operator.check(image.shape[image.ndim - n_spatial :], image.dtype)
    return image.ndim - n_spatial


def _map_planes(function: Callable[[da.Array], da.Array], image: da.Array, n_lead: int) -> da.Array:
    """Apply `function` to every time point and channel, which are the first `n_lead` axes."""
    if n_lead == 0:
        return function(image)
    planes = [_map_planes(function, image[i], n_lead - 1) for i in range(image.shape[0])]
    return da.stack(planes).rechunk({0: image.chunks[0]})


def _image_plane(operator: ImageOperator, image: da.Array, measured: da.Array) -> da.Array:
    """Return the result for one volume; the numbers that the operator needs are those of `measured`."""
    grid = BlockGrid.from_chunks(image.chunks, operator.halo(image.shape))
    ready, dependencies = _ready(operator, measured)
    name = f"{operator.name}-{tokenize(operator, image.name)}"
    layer = dict(gather(image, grid, f"halo-{name}"))
    layer |= {(name, *b.index): (_run_image, ready, b, (f"halo-{name}", *b.index)) for b in grid}
    return from_layer(name, layer, [image, *dependencies], image.chunks, image._meta.astype(np.float32))


def _voxel_labels_plane(operator: VoxelOperator, image: da.Array) -> da.Array:
    """Label one volume voxel by voxel; channels that the operator takes together are the last axis of `image`."""
    chunks = image.chunks[:-1] if channels_of(operator) > 1 else image.chunks
    grid = BlockGrid.from_chunks(chunks, operator.halo(tuple(map(sum, chunks))))
    ready, dependencies = _ready(operator, image)
    name = f"{operator.name}-{tokenize(operator, image.name)}"
    layer = dict(gather(image, grid, f"halo-{name}"))
    layer |= {(name, *b.index): (_run_image, ready, b, (f"halo-{name}", *b.index)) for b in grid}
    meta = np.empty((0,) * len(chunks), operator.result_dtype(image.dtype))
    return from_layer(name, layer, [image, *dependencies], chunks, meta)


def _labels_plane(operator: ObjectOperator, image: da.Array) -> da.Array:
    """Label one volume; channels that the operator takes together are the last axis of `image`."""
    chunks = image.chunks[:-1] if channels_of(operator) > 1 else image.chunks
    grid = BlockGrid.from_chunks(chunks, operator.halo(tuple(map(sum, chunks))))
    ready, dependencies = _ready(operator, image)
    name = f"{operator.name}-{tokenize(operator, image.name)}"
    halo, detect, numbered = f"halo-{name}", f"detect-{name}", f"objects-{name}"
    layer = dict(gather(image, grid, halo))
    layer |= {(detect, *b.index): (_run_detect, ready, b, (halo, *b.index)) for b in grid}
    layer[numbered] = (_run_number, ready, grid, [(detect, *b.index) for b in grid])
    layer |= {(name, *b.index): (_run_paint, ready, b, numbered) for b in grid}
    meta = np.empty((0,) * len(chunks), result_dtype(operator, image.dtype))
    return from_layer(name, layer, [image, *dependencies], chunks, meta)


def _ready(operator: Operator, image: da.Array) -> tuple[Any, list[Any]]:
    """Return a graph node (key or literal) of the operator with its numbers, and what the graph needs for it."""
    held = dask.delayed(operator, pure=True, traverse=False)
    if operator.needs:
        wanted = operator.needs - {"pilot"}
        numbers = _numbers(operator, image, wanted) if wanted else {}
        if "pilot" in operator.needs:
            candidates = pilot_candidates(image.shape)
            pieces = [image[region].rechunk(-1).to_delayed().item() for region in candidates]
            numbers = dask.delayed(_with_pilot)(held, numbers, candidates, pieces, image.shape)
        held = dask.delayed(_resolve)(held, numbers)
    return held.key, [held]


def _numbers(operator: Operator, image: da.Array, wanted: Iterable[float | str]) -> Any:
    """Return a delayed mapping of numbers, or of tuples of one number per channel."""
    if channels_of(operator) == 1:
        return lazy_statistics(image, wanted)
    channels = [lazy_statistics(image[..., k], wanted) for k in range(image.shape[-1])]
    return dask.delayed(_per_channel)(channels)


def _tree(function: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [function(parts[i : i + _MERGE_WIDTH]) for i in range(0, len(parts), _MERGE_WIDTH)]
    return parts[0]


def _resolve(operator: Operator, numbers: Mapping[float | str, Any]) -> Operator:
    return operator.resolve(numbers)


def _per_channel(numbers: Sequence[Mapping[float | str, float]]) -> dict[float | str, Any]:
    return {need: tuple(of_channel[need] for of_channel in numbers) for need in numbers[0]}


def _with_pilot(
    operator: PilotOperator,
    numbers: Mapping[float | str, float],
    candidates: Sequence[Slices],
    pieces: Sequence[Any],
    shape: tuple[int, ...],
) -> dict[float | str, Any]:
    def read(region: Slices) -> Any:
        return pieces[candidates.index(region)]

    return {**numbers, "pilot": operator.pilot(numbers, read, shape)}


def _summarize(image: Any, index: tuple[int, ...]) -> statistics.Summary:
    try:
        return statistics.summarize(image)
    except statistics.NonFiniteError as error:
        raise statistics.NonFiniteError(f"chunk {index}: {error}") from None


def _run_image(operator: ImageOperator, block: Block, image: Any) -> Any:
    result = operator(image, block)
    # A view of the core would keep the halo in memory as well.
    return result if result.shape == block.core_shape else result[block.trim].copy()


def _run_detect(operator: ObjectOperator, block: Block, image: Any) -> Table:
    return operator.detect(image, block)


def _run_number(operator: ObjectOperator, grid: BlockGrid, tables: Sequence[Table]) -> Objects:
    return number_objects(
        operator, grid, {block.index: table for block, table in zip(grid, tables, strict=True)}
    )


def _run_paint(operator: ObjectOperator, block: Block, objects: Objects) -> np.ndarray:
    labels = operator.paint(block, objects.at(block.index))
    if labels.dtype == np.int64:
        raise OverflowError(
            f"{block}: more objects than int32 ids; use `chunkrestore.run`, which writes int64"
        )
    return labels

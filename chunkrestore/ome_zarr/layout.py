"""Chunk, shard and pyramid shapes: pure integers.

All shapes cover the spatial axes only; on the time and channel axes a chunk is always one long, so that
tasks on different channels or time points never share one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

CHUNK_LENGTH = {2: 512, 3: 64}
"""Default chunk length by number of spatial axes; also the size that a pyramid's last level fits into."""

MANY_FILES = 4096
"""Chunks of an image beyond which several of them are stored as one file: a gigavoxel in three dimensions."""

SHARD_NBYTES = 2**26
"""Of a default shard before compression. A task holds whole shards, and a viewer reads the index of one, 16 bytes per
chunk, before its first chunk."""

_ANISOTROPY = 1.5
_REGION_VOXELS = 2**21


@dataclass(frozen=True)
class LevelPlan:
    """Shape of a pyramid level and how it derives from the level below."""

    shape: Shape
    """Voxels per spatial axis."""
    factors: Shape
    """Voxels of the level below per voxel, per spatial axis; all 1 at level 0."""


def default_pyramid(
    shape: Sequence[int], voxel_size: Sequence[float], n_levels: int | None = None
) -> list[LevelPlan]:
    """Return the levels of a pyramid over a volume.

    An axis is halved (an odd length rounds up) where its voxels are at most 1.5 times as long as the
    shortest, so levels approach isotropic voxels.

    Parameters
    ----------
    shape, voxel_size
        Of level 0.
    n_levels
        By default, until a level fits into 64 voxels per axis (512 in two dimensions).

    Raises
    ------
    ValueError
        If `n_levels` is less than 1.
    """
    if n_levels is not None and n_levels < 1:
        raise ValueError(f"`levels` {n_levels} must be at least 1, the full resolution")
    limit = CHUNK_LENGTH.get(len(shape), 64)
    plans = [LevelPlan(tuple(int(n) for n in shape), (1,) * len(shape))]
    sizes = tuple(float(v) for v in voxel_size)
    while len(plans) < n_levels if n_levels is not None else max(plans[-1].shape) > limit:
        current = plans[-1].shape
        shortest = min((s for s, n in zip(sizes, current, strict=True) if n > 1), default=0.0)
        factors = tuple(
            2 if n > 1 and s <= _ANISOTROPY * shortest else 1 for s, n in zip(sizes, current, strict=True)
        )
        sizes = tuple(s * f for s, f in zip(sizes, factors, strict=True))
        plans.append(LevelPlan(reduced(current, factors), factors))
    return plans


def pyramid_like(shapes: Sequence[Sequence[int]], voxel_size: Sequence[float]) -> list[LevelPlan]:
    """Return a pyramid with the given level shapes.

    Where a shape is not that of the level below divided by an integer (rounded up or down), all levels
    follow `default_pyramid` instead; their number is the same.
    """
    plans = [LevelPlan(tuple(shapes[0]), (1,) * len(shapes[0]))]
    for shape in shapes[1:]:
        below = plans[-1].shape
        factors = factors_between(below, shape)
        fits = all(n in (b // f, -(-b // f)) for b, f, n in zip(below, factors, shape, strict=True))
        if not fits:
            return default_pyramid(shapes[0], voxel_size, len(shapes))
        plans.append(LevelPlan(tuple(shape), factors))
    return plans


def factors_between(below: Sequence[int], shape: Sequence[int]) -> Shape:
    """Return the factors of a level of `shape`, given the shape of the level below."""
    return tuple(max(1, round(b / n)) for b, n in zip(below, shape, strict=True))


def reduced(shape: Sequence[int], factors: Sequence[int]) -> Shape:
    """Return ``ceil(shape / factors)``."""
    return tuple(-(-n // f) for n, f in zip(shape, factors, strict=True))


def level_chunks(
    shape: Sequence[int], chunks: Sequence[int] | None, shards: Sequence[int] | None
) -> tuple[Shape, Shape | None]:
    """Return the chunk and shard shape of a level of `shape`, clipped to it.

    Raises
    ------
    ValueError
        If lengths disagree with `shape`, are less than 1, or shards are not whole chunks.
    """
    wanted = tuple(chunks) if chunks is not None else default_chunks(len(shape))
    for name, lengths in (("chunks", wanted), ("shards", shards)):
        if lengths is not None and (len(lengths) != len(shape) or min(lengths) < 1):
            raise ValueError(
                f"`{name}` {tuple(lengths)} must hold {len(shape)} lengths above 0, one per spatial axis"
            )
    clipped = tuple(min(c, n) for c, n in zip(wanted, shape, strict=True))
    if shards is None:
        return clipped, None
    if any(shard % chunk for shard, chunk in zip(shards, wanted, strict=True)):
        raise ValueError(
            f"`shards` {tuple(shards)} must be multiples of `chunks` {wanted}; "
            f"use {tuple(max(1, s // c) * c for s, c in zip(shards, wanted, strict=True))}"
        )
    per_shard = (
        min(s // w, math.ceil(n / c)) for s, w, c, n in zip(shards, wanted, clipped, shape, strict=True)
    )
    return clipped, tuple(k * c for k, c in zip(per_shard, clipped, strict=True))


def default_shards(
    shape: Sequence[int],
    itemsize: int,
    *,
    n_planes: int = 1,
    chunks: Sequence[int] | None = None,
    block_shape: Sequence[int] | None = None,
) -> Shape | None:
    """Return the shard shape of a new image, or None if it has so few chunks that each can be a file.

    A power of two of chunks per axis, as many as `SHARD_NBYTES` hold: 256 voxels per axis for 16 and 32 bits in
    three dimensions, 4096 in two. So a terabyte of 16 bits is 30 thousand files and not 1.9 million.

    Parameters
    ----------
    shape
        Of the spatial axes.
    itemsize
        Bytes per voxel.
    n_planes
        Time points times channels; a shard never holds more than one.
    chunks
        Voxels per spatial axis; the default ones if None.
    block_shape
        Of the regions that tasks write, whole chunks: shards divide them, so on an axis they can be any number
        of chunks up to the power of two. An axis that one block spans is not restricted.

    Returns
    -------
    tuple of int or None
        Multiples of the chunks, no longer than what covers an axis. None as well where tasks write such blocks that
        a shard would be a single chunk.
    """
    wanted = tuple(chunks) if chunks is not None else default_chunks(len(shape))
    length = [min(c, n) for c, n in zip(wanted, shape, strict=True)]
    counts = [-(-n // c) for n, c in zip(shape, length, strict=True)]
    if n_planes * math.prod(counts) <= MANY_FILES:
        return None
    most = max(1, SHARD_NBYTES // (itemsize * math.prod(length)))
    longest = 2 ** int(math.log2(most) / len(shape) + 1e-9)
    per_shard = [min(longest, count) for count in counts]
    for axis, n in enumerate(shape):
        block = n if block_shape is None else block_shape[axis]
        if block < n:
            n_chunks = block // length[axis] if block % length[axis] == 0 else 1
            per_shard[axis] = max(k for k in range(1, per_shard[axis] + 1) if n_chunks % k == 0)
    if math.prod(per_shard) == 1:
        return None
    return tuple(k * c for k, c in zip(per_shard, wanted, strict=True))


def shards_above(shards: Sequence[int], chunks: Sequence[int], factors: Sequence[int]) -> Shape:
    """Return the shards of a level, given those of the level below: what covers the same voxels, in whole chunks.

    Whoever has computed a shard then holds whole shards of the levels above as well, down to the chunk.
    """
    return tuple(-(-s // (f * c)) * c for s, c, f in zip(shards, chunks, factors, strict=True))


def default_chunks(ndim: int) -> Shape:
    """Return the default chunk shape for `ndim` spatial axes."""
    return (CHUNK_LENGTH.get(ndim, 64),) * ndim


def region_shape(shape: Sequence[int], unit: Sequence[int]) -> Shape:
    """Return the shape of the regions that a pass over a volume works on.

    Whole write units, doubled on the shortest axis while they hold less than 2 million voxels.
    """
    region = list(unit)
    while True:
        growable = [i for i in range(len(region)) if region[i] < shape[i]]
        if not growable or math.prod(region) * 2 > _REGION_VOXELS:
            return tuple(min(r, n) if r >= n else r for r, n in zip(region, shape, strict=True))
        region[min(growable, key=region.__getitem__)] *= 2


def aligned_chunks(chunks: Sequence[int], unit: int, length: int) -> tuple[int, ...]:
    """Return chunk lengths close to `chunks` whose borders are multiples of `unit`, covering `length`.

    Borders that are already aligned stay where they are.
    """
    borders: list[int] = []
    position = 0
    for n in chunks[:-1]:
        position += n
        aligned = position // unit * unit
        if (borders[-1] if borders else 0) < aligned < length:
            borders.append(aligned)
    edges = [0, *borders, length]
    return tuple(b - a for a, b in itertools.pairwise(edges))

"""How a volume is cut: default blocks, chunks within shards, and what is too much to plan. Pure integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from chunkrestore.jobs.passes import peak_nbytes
from chunkrestore.ome_zarr.layout import CHUNK_LENGTH
from chunkrestore.operators.base import Operator

Shape = tuple[int, ...]

LONGEST_BLOCK = {2: 4096, 3: 512}
"""Longest default block by number of spatial axes: larger ones read little less halo, and are lost whole."""

_LONGEST_WITHOUT_HALO = {2: 4096, 3: 256}
"""The same for operators that read no halo: nothing is saved by larger blocks, and moving them through memory costs a
fifth of a copy."""

_MOST_VOXELS = 2**62
"""Voxels of a volume: kernels count positions in 64 bits. No disk holds so many."""
_MOST_BLOCKS = 10_000_000
"""Blocks of a job. A journal line each makes a gigabyte."""
_MOST_BLOCKS_PER_AXIS = 100_000
"""Blocks along one axis; an axis that needs more is longer than anything that was ever imaged."""
_LARGEST_CHUNK_NBYTES = 2**31 - 1
"""What the codecs compress at once."""
_ITEMSIZE = 4
"""Bytes per voxel of what is written."""


def chunks_of_blocks(block_shape: Sequence[int], shape: Sequence[int]) -> Shape:
    """Return chunk lengths that divide `block_shape`; on an axis that one block spans, the preferred length.

    Raises
    ------
    ValueError
        If lengths without divisors leave chunks that are too large to be stored.
    """
    preferred = CHUNK_LENGTH[len(shape)]
    chunks = tuple(
        min(preferred, n) if b >= n else _divisor(b, preferred)
        for b, n in zip(block_shape, shape, strict=True)
    )
    return _checked_chunks(chunks, "block_shape", block_shape)


def chunks_of_shards(shards: Sequence[int]) -> Shape:
    """Return chunk lengths that divide `shards`.

    Raises
    ------
    ValueError
        If lengths without divisors leave chunks that are too large to be stored.
    """
    preferred = CHUNK_LENGTH[len(shards)]
    return _checked_chunks(tuple(_divisor(s, preferred) for s in shards), "shards", shards)


def largest_block(
    operators: Sequence[Operator], shape: Shape, unit: Shape, memory_nbytes: int, *, longest: int | None
) -> Shape:
    """Return the largest block of whole `unit` whose task fits into `memory_nbytes`; one unit at least.

    Parameters
    ----------
    operators
        Of one pass.
    shape
        Of the volume.
    unit
        Shape of what is stored as one file.
    memory_nbytes
        Largest peak of a task.
    longest
        Length that no block exceeds unless its unit does; None: no limit.
    """
    step = CHUNK_LENGTH[len(shape)]
    most = -(-min(longest or max(shape), max(shape)) // step)

    def block(n_steps: int) -> Shape:
        return tuple(min(max(n_steps * step // u, 1) * u, n) for u, n in zip(unit, shape, strict=True))

    def fits(n_steps: int) -> bool:
        return peak_nbytes(operators, shape, block(n_steps)) <= memory_nbytes

    # Doubled until it does not fit and halved from there: an axis may be a trillion voxels long.
    good, bad = 1, 2
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    # Five or seven chunks cannot be shared out among files of several, nor halved for the level above.
    return block(good - 1 if good > 4 and good % 2 else good)


def suited_unit(
    operators: Sequence[Operator], shape: Shape, unit: Shape, source_chunks: Shape, memory_nbytes: int
) -> Shape:
    """Return a block of whole `unit` that covers whole chunks of what it reads, as far as memory allows.

    A page of a TIFF that is compressed in one strip is decoded whole for every block that touches it: for operators
    that read no more than they write, blocks as wide as pages decode each once. Halos need chunks more than once
    anyway, and read least around cubes; for them `unit` is returned as it is.

    Parameters
    ----------
    operators, shape, unit, memory_nbytes
        As for `largest_block`.
    source_chunks
        Voxels per axis that are decoded at once of what is read.
    """
    if _reads_halo(operators, shape):
        return unit
    times = [-(-min(c, n) // u) for c, n, u in zip(source_chunks, shape, unit, strict=True)]

    def block() -> Shape:
        return tuple(min(k * u, n) for k, u, n in zip(times, unit, shape, strict=True))

    while max(times) > 1 and peak_nbytes(operators, shape, block()) > memory_nbytes:
        widest = times.index(max(times))
        times[widest] = -(-times[widest] // 2)
    return block()


def longest_block(operators: Sequence[Operator], shape: Shape) -> int:
    """Return the length that no default block of these operators exceeds."""
    return (LONGEST_BLOCK if _reads_halo(operators, shape) else _LONGEST_WITHOUT_HALO)[len(shape)]


def check_shape(shape: Sequence[int]) -> None:
    """Raise `ValueError` if a volume has no voxels, or more than can be counted."""
    if min(shape) < 1:
        raise ValueError(f"`shape` {tuple(shape)} must be at least 1 on every axis")
    if math.prod(shape) > _MOST_VOXELS:
        raise ValueError(
            f"`shape` {tuple(shape)} has {math.prod(shape)} voxels, the limit is {_MOST_VOXELS}; use a region"
        )


def check_count(shape: Sequence[int], block_shape: Sequence[int], n_planes: int) -> None:
    """Raise `ValueError` if there are more blocks than a job can keep count of; nothing is listed to find out."""
    n_blocks = [-(-n // b) for n, b in zip(shape, block_shape, strict=True)]
    for axis, n in enumerate(n_blocks):
        if n > _MOST_BLOCKS_PER_AXIS:
            raise ValueError(
                f"`block_shape` {block_shape[axis]} on axis {axis} cuts its {shape[axis]} voxels into {n} blocks, "
                f"the limit is {_MOST_BLOCKS_PER_AXIS} per axis; use longer blocks or a region"
            )
    total = n_planes * math.prod(n_blocks)
    if total > _MOST_BLOCKS:
        several = f" of {n_planes} time points and channels" if n_planes > 1 else ""
        raise ValueError(
            f"`block_shape` {tuple(block_shape)} cuts the volume {tuple(shape)}{several} into {total} blocks, the "
            f"limit is {_MOST_BLOCKS}; use larger blocks, a region, or fewer time points and channels"
        )


def _reads_halo(operators: Sequence[Operator], shape: Shape) -> bool:
    return any(any(operator.halo(shape).depth) for operator in operators)


def _divisor(length: int, preferred: int) -> int:
    """Return the largest divisor of `length` up to `preferred`, or `length` if that is tiny (a prime)."""
    divisor = max(d for d in range(1, min(length, preferred) + 1) if length % d == 0)
    return divisor if 2 * divisor >= min(length, preferred) else length


def _checked_chunks(chunks: Shape, name: str, lengths: Sequence[int]) -> Shape:
    nbytes = _ITEMSIZE * math.prod(chunks)
    if nbytes > _LARGEST_CHUNK_NBYTES:
        raise ValueError(
            f"`{name}` {tuple(lengths)} can only be stored in chunks of {chunks}, which hold {nbytes} bytes; the "
            f"limit is {_LARGEST_CHUNK_NBYTES}. Use lengths with a divisor up to {CHUNK_LENGTH[len(lengths)]}"
        )
    return chunks

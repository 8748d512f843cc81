import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore.grid import Block, BlockGrid, Halo, fast_length


@st.composite
def grids(draw, max_ndim=3):
    ndim = draw(st.integers(1, max_ndim))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    align = per_axis(1, 8)
    halo = Halo(
        depth=per_axis(0, 12),
        align=align,
        offset=tuple(draw(st.integers(0, a - 1)) for a in align),
        fast=draw(st.booleans()),
    )
    return BlockGrid.regular(per_axis(1, 40), per_axis(1, 40), halo)


@given(grids())
def test_every_voxel_is_in_exactly_one_core(grid):
    owners = np.zeros(grid.shape, int)
    for block in grid:
        owners[block.core] += 1
    assert (owners == 1).all()
    assert len(grid) == len(list(grid))


@given(grids())
def test_trimming_a_read_block_gives_its_core(grid):
    image = np.arange(math.prod(grid.shape)).reshape(grid.shape)
    for block in grid:
        assert image[block.read].shape == block.read_shape
        np.testing.assert_array_equal(image[block.read][block.trim], image[block.core])


@given(grids())
def test_reads_hold_the_depth_and_lie_on_the_alignment_grid(grid):
    halo = grid.halo
    for block in grid:
        for axis, (core, read, n) in enumerate(zip(block.core, block.read, grid.shape, strict=True)):
            assert read.start <= max(0, core.start - halo.depth[axis])
            assert read.stop >= min(n, core.stop + halo.depth[axis])
            assert read.start == 0 or (read.start + halo.offset[axis]) % halo.align[axis] == 0
            if not halo.fast:
                assert read.stop == n or (read.stop + halo.offset[axis]) % halo.align[axis] == 0
            assert block.at_border[axis] == (read.start == 0, read.stop == n)


@given(grids())
def test_halo_overhead_counts_the_voxels_that_blocks_read(grid):
    read = sum(math.prod(block.read_shape) for block in grid)
    assert grid.halo_overhead == pytest.approx(read / math.prod(grid.shape))


@given(grids(), st.data())
def test_blocks_meeting_a_region_are_those_that_share_a_voxel(grid, data):
    region = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(-5, 45), st.integers(-5, 45))))) for _ in grid.shape
    )

    def overlaps(block):
        return all(
            max(c.start, r.start) < min(c.stop, r.stop) for c, r in zip(block.core, region, strict=True)
        )

    assert list(grid.indices_meeting(region)) == [block.index for block in grid if overlaps(block)]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_chunks_become_cores(chunks):
    grid = BlockGrid.from_chunks(chunks)
    assert grid.shape == tuple(map(sum, chunks))
    assert [b.core_shape for b in grid] == list(itertools.product(*chunks))


@given(st.integers(1, 5000))
def test_fast_lengths_are_even_seven_smooth_and_minimal(n):
    def smooth(k):
        for prime in (2, 3, 5, 7):
            while k % prime == 0:
                k //= prime
        return k == 1

    length = fast_length(n)
    assert length >= n
    assert length == 1 or (length % 2 == 0 and smooth(length))
    assert n == 1 or not any(k % 2 == 0 and smooth(k) for k in range(n, length))


def test_interior_reads_of_a_fast_halo_have_one_fft_friendly_length():
    grid = BlockGrid.regular((640, 640), (64, 64), Halo((21, 21), fast=True))
    interior = [b.read_shape for b in grid if not any(any(sides) for sides in b.at_border)]
    assert interior
    assert set(interior) == {(108, 108)}


def test_the_whole_volume_is_a_block_without_halo():
    block = Block.whole((5, 7))
    assert block.core == block.read == (slice(0, 5), slice(0, 7))
    assert block.at_border == ((True, True), (True, True))


@pytest.mark.parametrize("unit", [(48, 64), (64, 24)])
def test_cores_that_share_a_write_unit_are_refused(unit):
    with pytest.raises(ValueError, match="multiple of the output chunk"):
        BlockGrid.regular((256, 256), (64, 64), write_unit=unit)


def test_a_block_that_spans_the_volume_may_overhang_its_write_unit():
    assert len(BlockGrid.regular((50, 50), (50, 50), write_unit=(32, 32))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((10, 10), (4,)), "one length per axis"),
        (((10, 10), (4, 0)), "at least 1"),
        (((0, 10), (4, 4)), "at least 1"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockGrid.regular(*arguments)


def test_a_million_blocks_are_counted_without_being_made():
    grid = BlockGrid.regular((12800, 12800, 12800), (128, 128, 128), Halo((24, 24, 24)))
    assert len(grid) == 1_000_000
    assert grid.halo_overhead == pytest.approx(((100 * 176 - 48) / 12800) ** 3)


@given(grids())
def test_the_reach_is_how_far_away_the_furthest_block_is_that_is_read_from(grid):
    steps = [
        abs(i - j)
        for block in grid
        for index in grid.indices_meeting(block.read)
        for i, j in zip(index, block.index, strict=True)
    ]
    assert grid.reach == max(steps)


def test_blocks_around_a_block_are_counted_in_steps_of_the_index():
    grid = BlockGrid.from_chunks([(5, 1, 9), (2, 2, 2, 7)])
    assert grid.around((0, 1), 1) == [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert set(grid.around((1, 3), 2)) == set(itertools.product(range(3), range(1, 4))) - {(1, 3)}
    assert grid.around((1, 1), 0) == []

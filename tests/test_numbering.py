"""Ids by position, and which blocks' objects can meet."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore.grid import BlockGrid
from chunkrestore.stitch.numbering import owners, rank, slab_starts
from chunkrestore.stitch.resolution import Reaches


@st.composite
def grids(draw, longest=12):
    """A block grid of two or three axes with borders anywhere."""
    shape = draw(st.lists(st.integers(1, longest), min_size=2, max_size=3))
    edges = [(0, *sorted(draw(st.sets(st.integers(1, n - 1)))), n) if n > 1 else (0, 1) for n in shape]
    return BlockGrid.from_chunks([np.diff(e).tolist() for e in edges])


@given(grids(), st.randoms(use_true_random=False))
def test_slab_by_slab_keys_get_the_places_that_they_have_in_the_volume(grid, random):
    n = int(np.prod(grid.shape))
    keys = np.array(random.sample(range(n), random.randint(0, n)), np.int64)
    index_of = [tuple(index) for index in owners(grid, keys).tolist()]
    for key, index in zip(keys, index_of, strict=True):
        voxel = np.unravel_index(key, grid.shape)
        assert all(c.start <= v < c.stop for c, v in zip(grid.block(index).core, voxel, strict=True))
    of_block = {b.index: keys[[i == b.index for i in index_of]] for b in grid}
    starts = slab_starts({index: len(own) for index, own in of_block.items()}, grid.n_blocks[0])
    ids = {}
    for slab in range(grid.n_blocks[0]):
        blocks = [index for index in of_block if index[0] == slab]
        for index, ranks in zip(blocks, rank([of_block[i] for i in blocks]), strict=True):
            ids |= dict(zip(of_block[index].tolist(), (starts[slab] + ranks).tolist(), strict=True))
    assert [ids[key] for key in sorted(ids)] == list(range(1, len(keys) + 1))


def test_no_keys_have_no_ranks():
    assert rank([]) == []
    assert [part.tolist() for part in rank([np.empty(0, np.int64), np.array([7])])] == [[], [1]]


def test_counts_beyond_int64_do_not_overflow():
    assert slab_starts({(0, 0): 2**62, (0, 1): 2**62, (1, 0): 2**62, (2, 0): 1}, 3)[-1] == 3 * 2**62


@given(grids(), st.randoms(use_true_random=False))
def test_all_objects_that_can_meet_are_of_blocks_that_know_of_each_other(grid, random):
    radii = {b.index: random.uniform(0, 6) for b in grid if random.random() < 0.7}
    reaches = Reaches(grid, radii)
    for a, b in itertools.permutations(radii, 2):
        p, q = ([random.uniform(c.start, c.stop - 1e-9) for c in grid.block(index).core] for index in (a, b))
        if max(abs(x - y) for x, y in zip(p, q, strict=True)) < radii[a] + radii[b]:
            assert b in reaches.rivals(a)
            assert a in reaches.rivals(b)
    for block in grid:
        for index in set(radii) - {block.index}:
            q = [random.uniform(c.start, c.stop - 1e-9) for c in grid.block(index).core]
            voxel = [random.randint(c.start, c.stop - 1) for c in block.core]
            if max(abs(x - y) for x, y in zip(q, voxel, strict=True)) < radii[index]:
                assert index in reaches.visitors(block.index)


def test_a_giant_makes_its_own_surroundings_large_and_no_others():
    grid = BlockGrid.regular((10, 1000), (10, 10))
    radii = dict.fromkeys(((0, i) for i in range(100)), 3.0) | {(0, 50): 200.0}
    reaches = Reaches(grid, radii)
    assert reaches.rivals((0, 10)) == [(0, 9), (0, 11)]
    assert len(reaches.rivals((0, 50))) == 42
    assert (0, 50) in reaches.rivals((0, 30))
    assert reaches.visitors((0, 35)) == [(0, 34), (0, 36), (0, 50)]


def test_blocks_without_objects_are_near_none():
    grid = BlockGrid.regular((20, 20), (10, 10))
    reaches = Reaches(grid, {(0, 0): 5.0, (1, 1): 5.0})
    assert reaches.rivals((0, 1)) == []
    assert reaches.rivals((0, 0)) == [(1, 1)]
    assert reaches.visitors((0, 1)) == [(0, 0), (1, 1)]

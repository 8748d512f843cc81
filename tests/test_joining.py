"""The tree of unions gives every label the smallest key of its component, whatever the grid and the links."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.grid import BlockGrid
from chunkrestore.stitch import joining


@st.composite
def linked_grids(draw):
    """Draw a grid, keys in its blocks, and links between any of them that belong to different blocks."""
    ndim = draw(st.integers(2, 3))
    lengths = [draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)) for _ in range(ndim)]
    grid = BlockGrid.from_chunks(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    size = int(np.prod(grid.shape))
    keys = np.sort(rng.choice(size, size=rng.integers(1, size + 1), replace=False))
    pairs = rng.choice(keys, size=(draw(st.integers(0, 60)), 2))
    return grid, keys, pairs


def block_of(grid, key):
    voxel = np.unravel_index(key, grid.shape)
    return tuple(int(np.searchsorted(e, v, side="right")) - 1 for e, v in zip(grid.edges, voxel, strict=True))


def climb(grid, links):
    """Run the tree upwards; return open rows and assignments of every node."""
    rows = {(0, index): joining.leaf(links[index]) for index in joining.nodes(grid, 0)}
    assigned = {}
    for level in range(1, joining.n_levels(grid) + 1):
        for index in joining.nodes(grid, level):
            below = [rows[level - 1, child] for child in joining.children(grid, level, index)]
            region = joining.region(grid, level, index)
            assigned[level, index], rows[level, index] = joining.join(below, region, grid.shape)
    return assigned, rows


def descend(grid, assigned):
    down = {}
    for level in range(joining.n_levels(grid), 0, -1):
        for index in joining.nodes(grid, level):
            parent = (level + 1, tuple(i // 2 for i in index))
            above = down.get(parent, np.empty((0, 2), np.int64))
            region = joining.region(grid, level, index)
            down[level, index] = joining.hand_down(assigned[level, index], above, region, grid.shape)
    return down


def smallest_of_component(keys, pairs):
    root = {int(key): int(key) for key in keys}
    changed = True
    while changed:
        changed = False
        for a, b in pairs.tolist():
            smallest = min(root[a], root[b])
            changed |= root[a] != smallest or root[b] != smallest
            root[a] = root[b] = smallest
    return root


def per_block(grid, keys, pairs):
    home = {int(key): block_of(grid, key) for key in keys}
    own = {index: [] for index in joining.nodes(grid, 0)}
    links = {index: set() for index in own}
    for key in keys.tolist():
        own[home[key]].append(key)
    for a, b in pairs.tolist():
        if home[a] != home[b]:
            links[home[a]].add((a, b))
            links[home[b]].add((b, a))
    arrays = {index: np.array(sorted(found), np.int64).reshape(-1, 2) for index, found in links.items()}
    return {index: np.array(k, np.int64) for index, k in own.items()}, arrays


@settings(deadline=None)
@given(linked_grids())
def test_every_label_gets_the_smallest_key_of_its_component(drawn):
    grid, keys, pairs = drawn
    own, links = per_block(grid, keys, pairs)
    across = np.concatenate(list(links.values()))
    expected = smallest_of_component(keys, across)
    assigned, _ = climb(grid, links)
    down = descend(grid, assigned)
    levels = range(1, joining.n_levels(grid) + 1)
    for index, wanted in own.items():
        ancestors = [assigned[level, tuple(i >> level for i in index)] for level in levels]
        found = joining.final_roots(wanted, ancestors)
        assert found.tolist() == [expected[key] for key in wanted.tolist()]
        nearest = [down[1, tuple(i >> 1 for i in index)]] if levels else []
        np.testing.assert_array_equal(joining.final_roots(wanted, nearest), found)


@settings(deadline=None)
@given(linked_grids())
def test_only_rows_that_leave_a_node_climb_on_and_tables_stay_sorted(drawn):
    grid, keys, pairs = drawn
    _, links = per_block(grid, keys, pairs)
    assigned, rows = climb(grid, links)
    for (level, index), left in rows.items():
        region = joining.region(grid, level, index)
        assert joining.lies_in(left[:, 0], region, grid.shape).all()
        if level:
            assert not joining.lies_in(left[:, 1], region, grid.shape).any()
    assert not len(rows[joining.n_levels(grid), (0,) * len(grid.shape)]) or joining.n_levels(grid) == 0
    for (level, index), table in (assigned | descend(grid, assigned)).items():
        assert (np.diff(table[:, 0]) > 0).all()
        assert (table[:, 1] < table[:, 0]).all()
        assert joining.lies_in(table[:, 0], joining.region(grid, level, index), grid.shape).all()


@settings(deadline=None)
@given(linked_grids())
def test_nodes_partition_the_volume_on_every_level(drawn):
    grid, *_ = drawn
    top = joining.n_levels(grid)
    assert list(joining.nodes(grid, top)) == [(0,) * len(grid.shape)]
    for level in range(top + 1):
        covered = np.zeros(grid.shape, int)
        for index in joining.nodes(grid, level):
            covered[joining.region(grid, level, index)] += 1
        assert (covered == 1).all()
        if level:
            below = itertools.chain(*(joining.children(grid, level, i) for i in joining.nodes(grid, level)))
            assert sorted(below) == sorted(joining.nodes(grid, level - 1))


def test_keys_beyond_32_bits_join():
    grid = BlockGrid.regular((4000, 4000, 4000), (2000, 4000, 4000))
    a, b = 4000**3 // 2 - 1, 4000**3 // 2
    rows = [np.array([[a, b, a]]), np.array([[b, a, b]])]
    assigned, left = joining.join(rows, joining.region(grid, 1, (0, 0, 0)), grid.shape)
    assert assigned.tolist() == [[b, a]]
    assert left.shape == (0, 3)


def test_a_link_that_was_found_from_one_side_only_is_refused():
    with pytest.raises(ValueError, match=r"from both sides; none begins with key 5"):
        joining.join([np.array([[1, 5, 1]])], (slice(0, 3), slice(0, 4)), (3, 4))

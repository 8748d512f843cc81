"""What is kept of a labelled block: runs, keys, surfaces, overlaps and claims, against plain definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels import components, label_overlap, label_ownership, label_runs


@st.composite
def label_images(draw, largest=6):
    shape = draw(st.sampled_from([(1, 1), (5, 7), (1, 9), (3, 4, 5), (4, 1, 6)]))
    labels = np.random.default_rng(draw(st.integers(0, 2**31))).integers(0, largest + 1, shape)
    return np.where(labels % 2, 0, labels) if draw(st.booleans()) else labels


@given(label_images())
def test_runs_give_back_the_image_and_take_new_ids(labels):
    values, starts = label_runs.find_runs(labels)
    assert (values[1:] != values[:-1]).all()
    runs = label_runs.pack(values, starts, labels.size)
    assert runs.dtype == np.int32
    np.testing.assert_array_equal(label_runs.unpack(runs, labels.shape), labels)
    ids = np.array([70, 10, 30, 2**40, 50, 60])
    expected = np.concatenate([[0], ids])[labels]
    np.testing.assert_array_equal(label_runs.unpack(runs, labels.shape, ids), expected)


@pytest.mark.parametrize("gap", [1, 2**40])
def test_rows_number_labels_whether_dense_or_far_apart(gap):
    values = np.array([5, 0, 2, 5, 3, 2, 0]) * gap
    label, row = label_runs.rows_of(values)
    assert label.tolist() == [2 * gap, 3 * gap, 5 * gap]
    assert row.tolist() == [3, 0, 1, 3, 2, 1, 0]
    assert label_runs.rows_among(np.array([4, 5, 0]) * gap, label).tolist() == [0, 3, 0]


def test_a_block_of_more_voxels_than_int32_holds_is_refused():
    with pytest.raises(OverflowError, match="use smaller chunks or blocks"):
        label_runs.pack(np.array([1]), np.array([0]), 2**31)


def test_keys_are_raster_indices_in_a_volume_of_any_size():
    shape = (3000, 4000, 5000)
    block = Block.around((slice(2990, 2993), slice(7, 11), slice(4998, 5000)), shape, Halo((0, 0, 0)))
    labels = np.zeros((3, 4, 2), int)
    labels[1, 2, 1] = labels[2, 0, 0] = 9
    labels[2, 3, 1] = 4
    table, label = components.core_table(labels, block)
    assert label.tolist() == [4, 9]
    expected = [np.ravel_multi_index(voxel, shape) for voxel in ((2992, 10, 4999), (2991, 9, 4999))]
    assert table["key"].tolist() == expected


def neighbouring_pairs(volume, own, other, connectivity):
    """Return pairs of values of neighbouring voxels in two regions, one voxel after the other."""
    found = set()
    ours, theirs = (np.argwhere(region) for region in (own, other))
    for a in ours:
        for b in theirs[np.abs(theirs - a).max(axis=1) == 1]:
            values = volume[tuple(a)], volume[tuple(b)]
            if np.count_nonzero(a - b) <= connectivity and min(values) > 0:
                found.add(values)
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([(4, 5), (3, 4, 4)]), st.data())
def test_touching_links_are_the_pairs_of_neighbouring_voxels(seed, shape, data):
    volume = np.random.default_rng(seed).integers(0, 4, shape)
    connectivity = data.draw(st.integers(1, len(shape)))
    grid = BlockGrid.regular(shape, [data.draw(st.integers(1, n)) for n in shape])
    tables = {b.index: components.surface_table(volume[b.core], b) for b in grid}
    named = np.zeros(shape, np.int64)
    for block in grid:
        named[block.core] = label_runs.unpack(
            tables[block.index]["runs"], block.core_shape, tables[block.index]["key"] + 1
        )
    for block in grid:
        for other in grid:
            if other != block and max(np.abs(components.step_between(block, other))) == 1:
                own_part, other_part = (np.zeros(shape, bool) for _ in range(2))
                own_part[block.core] = other_part[other.core] = True
                links = components.touching_links(
                    tables[block.index], tables[other.index], block, other, connectivity
                )
                expected = neighbouring_pairs(named, own_part, other_part, connectivity)
                assert len(links) == len(expected)
                assert {(a + 1, b + 1) for a, b in links.tolist()} == expected


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.2, 0.5]))
def test_matches_are_those_of_intersection_over_union(seed, threshold):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 5, (6, 7))
    b = np.where(rng.random(a.shape) < 0.7, a, rng.integers(0, 4, a.shape))
    expected = {
        (i, j)
        for i in range(1, 5)
        for j in range(1, 5)
        if ((a == i) & (b == j)).sum() > threshold * ((a == i) | (b == j)).sum()
    }
    found = list(
        zip(*(rows.tolist() for rows in label_overlap.matching(a, b, (4, 4), threshold)), strict=True)
    )
    assert len(found) == len(set(found))
    assert set(found) == expected
    if threshold >= 0.5:
        assert all(len({pair[side] for pair in found}) == len(found) for side in (0, 1))


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_every_label_that_all_blocks_see_alike_is_claimed_once_by_the_core_of_its_centroid(seed):
    shape = (9, 11)
    labels = np.random.default_rng(seed).integers(0, 5, shape)
    grid = BlockGrid.regular(shape, (4, 5), Halo(shape))
    centroids = ndimage.center_of_mass(np.ones(shape), labels, range(1, 5))
    claims = {block.index: label_ownership.claim_table(labels, block) for block in grid}
    for value, centroid in zip(range(1, 5), centroids, strict=True):
        if not (labels == value).any():
            continue
        first = np.flatnonzero(labels == value)[0]
        owners = [index for index, table in claims.items() if first in table["first"]]
        # Sums of integers decide, so a centroid on a border belongs to the core that begins there.
        home = tuple(int((np.floor(c + 1e-9)) // n) for c, n in zip(centroid, (4, 5), strict=True))
        assert owners == [home]
    numbers = np.concatenate([table["object"] for table in claims.values()])
    assert len(np.unique(numbers)) == len(numbers) == len(np.unique(labels[labels > 0]))

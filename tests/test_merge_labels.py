"""Labels of chunks made one label image: what each rule promises, for every chunking."""

import weakref
from functools import lru_cache

import dask
import dask.array as da
import numpy as np
import pytest
from dask.array.overlap import overlap
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.metrics import match_instances


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


def raise_if_computed(*args, **kwargs):
    raise AssertionError("the graph was computed")


def cut(image, chunks, depth=0):
    """Cut an image into chunks with a halo, as dask does."""
    lazy = da.from_array(image, chunks=chunks)
    return overlap(lazy, depth, boundary="none", allow_rechunk=False) if depth else lazy


def each_chunk(function, image, dtype=np.int32):
    return image.map_blocks(lambda chunk: function(chunk).astype(dtype), dtype=dtype)


def components(connectivity=1):
    def label(mask):
        return ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))[0]

    return label


def scrambled(labels, seed, dtype):
    """Rename labels at random, with gaps; other names in every chunk."""
    largest = min(np.iinfo(dtype).max, 2**62)
    rng = np.random.default_rng(seed + labels.size)
    names = np.unique(rng.integers(1, largest, 3 * labels.max() + 3))[: labels.max()]
    if len(names) < labels.max():
        names = np.arange(1, labels.max() + 1)
    rng.shuffle(names)
    return np.concatenate([[0], names]).astype(dtype)[labels]


@st.composite
def chunked_masks(draw):
    shape = draw(st.sampled_from([(9, 8, 7), (1, 12, 11), (5, 3, 14), (16, 15), (30, 2)]))
    mask = np.random.default_rng(draw(st.integers(0, 2**31))).random(shape) < draw(
        st.sampled_from([0.2, 0.4, 0.6])
    )
    return mask, tuple(draw(partition(n)) for n in shape)


@st.composite
def partition(draw, n):
    borders = sorted(draw(st.sets(st.integers(1, n - 1), max_size=min(n - 1, 4)))) if n > 1 else []
    return tuple(int(length) for length in np.diff([0, *borders, n]))


@settings(deadline=None, max_examples=25)
@given(chunked_masks(), st.sampled_from(["uint8", "int16", "uint32", "int64", "uint64"]), st.data())
def test_touching_components_are_those_of_scipy_ids_included(drawn, dtype, data):
    mask, chunks = drawn
    connectivity = data.draw(st.integers(1, mask.ndim))
    seed = data.draw(st.integers(0, 100))
    expected, n_objects = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))
    labels = each_chunk(
        lambda m: scrambled(components(connectivity)(m), seed, dtype), cut(mask, chunks), np.dtype(dtype)
    )
    merged = cr.merge_labels(labels, connectivity=connectivity)
    assert merged.dtype == np.int32
    assert merged.chunks == chunks
    found = merged.compute(scheduler="sync")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert found.max(initial=0) == n_objects


def noise(shape=(40, 44, 36), sigma=1.5, seed=7):
    image = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return image / image.std()


@pytest.mark.parametrize("chunks", [(13, 16, 16), (40, 44, 7), ((1, 25, 14), (20, 7, 17), (36,))])
def test_the_halo_does_not_count_for_touching(chunks):
    mask = noise() > 0.8
    labels = each_chunk(components(), cut(mask, chunks))
    depth = tuple(min(3, *lengths) if len(lengths) > 1 else 0 for lengths in labels.chunks)
    expected = cr.merge_labels(labels)
    np.testing.assert_array_equal(expected, ndimage.label(mask)[0])
    # The halos hold what neighbours call their labels: other objects, by the names of this chunk.
    with_halo = overlap(labels, depth, boundary="none", allow_rechunk=False)
    merged = cr.merge_labels(with_halo, depth=depth)
    assert merged.chunks == labels.chunks
    np.testing.assert_array_equal(merged, expected)


@lru_cache
def nuclei(shape=(48, 60, 60), n=60, radius=(4.0, 6.0), seed=3):
    """Paint balls, each voxel to the nearest: objects that touch, with straight borders between them."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, shape, size=(n, len(shape)))
    radii = rng.uniform(*radius, size=n)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.stack([np.linalg.norm(grid - c, axis=-1) - r for c, r in zip(centres, radii, strict=True)])
    labels = np.where(distance.min(axis=0) < 0, distance.argmin(axis=0) + 1, 0)
    return by_first_voxel(labels)


def by_first_voxel(labels):
    values, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    first = np.where(values > 0, first, -1)
    return np.argsort(np.argsort(first))[inverse].reshape(labels.shape) + (0 if (values == 0).any() else 1)


def renamed(truth, seed=11):
    """What a perfect labeller gives: the truth that a chunk sees, under names of its own."""
    return lambda chunk: scrambled(
        np.unique(chunk, return_inverse=True)[1].reshape(chunk.shape), seed, "uint16"
    )


@pytest.mark.parametrize("by", ["iou", "centroid"])
@pytest.mark.parametrize("chunks", [(16, 20, 20), (48, 15, 60), ((13, 20, 15), (60,), (19, 17, 24))])
def test_the_same_objects_in_overlaps_become_the_objects_of_the_whole(by, chunks):
    truth = nuclei()
    depth = 13
    grid = da.empty(truth.shape, chunks=chunks).chunks
    depths = tuple(depth if len(lengths) > 1 else 0 for lengths in grid)
    labels = each_chunk(renamed(truth), cut(truth, chunks, depths), np.uint16)
    merged = cr.merge_labels(labels, depth=depths, by=by)
    assert merged.shape == truth.shape
    assert merged.chunks == grid
    np.testing.assert_array_equal(merged.compute(), truth)


@pytest.mark.parametrize("by", ["iou", "centroid"])
def test_two_dimensional_images_are_merged_too(by):
    truth = nuclei((70, 80), n=40)
    labels = each_chunk(renamed(truth), cut(truth, (35, 27), 13), np.uint16)
    np.testing.assert_array_equal(cr.merge_labels(labels, depth=13, by=by).compute(), truth)


def test_touching_objects_stay_apart_by_iou_where_touching_merges_them():
    truth = nuclei()
    labels = each_chunk(renamed(truth), cut(truth, (16, 20, 20), 13), np.uint16)
    touching = cr.merge_labels(labels, depth=13).compute()
    assert touching.max() < truth.max()
    assert match_instances(truth, cr.merge_labels(labels, depth=13, by="iou").compute()).f1 == 1


def two_chunks(left, right, depth, core):
    """Put two chunks side by side along x, given as rows that reach `depth` into one another."""
    assert len(left) == core[0] + depth
    assert len(right) == core[1] + depth
    return da.concatenate([da.from_array(np.array([row])) for row in (left, right)], axis=1)


def test_iou_counts_only_what_both_chunks_have_seen_and_must_exceed_the_threshold():
    # Both see columns 4 to 7. Chunk 0: label 5 covers 4, 5, 6 of them; chunk 1: label 9 covers 4 to 7: 3 of 4.
    labels = two_chunks([5, 5, 5, 5, 5, 5, 5, 0], [9, 9, 9, 9, 9, 0, 0, 0], 2, (6, 6))
    one = [[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]]
    two = [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]]
    for threshold, expected in ((0.5, one), (0.74, one), (0.75, two), (0.9, two)):
        merged = cr.merge_labels(labels, depth=2, by="iou", threshold=threshold)
        np.testing.assert_array_equal(merged.compute(), expected)


def test_a_label_shows_by_iou_where_its_core_is_and_nowhere_else():
    # Label 3 of chunk 0 lies in its halo alone: chunk 1, whose core it is, saw nothing there.
    labels = two_chunks([0, 4, 0, 0, 0, 2, 3, 3], [0, 0, 0, 0, 8, 8, 0, 8], 2, (6, 6))
    merged = cr.merge_labels(labels, depth=2, by="iou").compute()
    np.testing.assert_array_equal(merged, [[0, 1, 0, 0, 0, 2, 0, 0, 3, 3, 0, 3]])


def test_by_centroid_the_owner_paints_the_object_whole_and_the_other_drops_its_part():
    # The object at 3 to 6 has its centroid, 4.5, in chunk 0; chunk 1 sees 4 to 6 of it, centroid 5, in chunk 0 as well.
    labels = two_chunks([0, 0, 0, 7, 7, 7, 7, 0], [2, 2, 2, 0, 0, 1, 0, 0], 2, (6, 6))
    merged = cr.merge_labels(labels, depth=2, by="centroid").compute()
    np.testing.assert_array_equal(merged, [[0, 0, 0, 1, 1, 1, 1, 0, 0, 2, 0, 0]])


def test_where_two_owners_claim_a_voxel_the_object_that_begins_first_has_it():
    # Chunk 0 claims 4 to 7 (centroid 5.5), chunk 1 claims 5 to 8 (centroid 6.5): they disagree.
    labels = two_chunks([0, 0, 0, 0, 6, 6, 6, 6], [0, 5, 5, 5, 5, 0, 0, 0], 2, (6, 6))
    merged = cr.merge_labels(labels, depth=2, by="centroid").compute()
    np.testing.assert_array_equal(merged, [[0, 0, 0, 0, 1, 1, 1, 1, 2, 0, 0, 0]])


def test_of_two_objects_that_begin_alike_the_one_of_the_first_chunk_has_the_voxels():
    labels = two_chunks([0, 0, 0, 0, 6, 6, 6, 6], [5, 5, 5, 5, 5, 5, 0, 0], 2, (6, 6))
    merged = cr.merge_labels(labels, depth=2, by="centroid").compute()
    np.testing.assert_array_equal(merged, [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 0]])


def test_an_object_that_others_cover_wholly_leaves_no_gap_in_the_ids():
    labels = two_chunks([0, 0, 0, 6, 6, 6, 6, 6], [0, 0, 5, 5, 0, 0, 4, 4], 2, (6, 6))
    # Chunk 0 owns 3 to 7 (centroid 5); chunk 1 owns 6 to 7, which is covered, and 10 to 11.
    merged = cr.merge_labels(labels, depth=2, by="centroid").compute()
    np.testing.assert_array_equal(merged, [[0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2]])


def test_parts_of_an_object_in_cores_on_both_sides_of_its_owner_keep_one_id():
    # The middle chunk owns 3 to 8, but in its own core an object of chunk 0 covers all of it.
    chunks = [[5, 5, 5, 0, 5, 5, 5, 5], [0, 0, 0, 6, 6, 6, 6, 6, 6, 0, 0, 0], [0] * 8]
    labels = da.concatenate([da.from_array(np.array([row])) for row in chunks], axis=1)
    merged = cr.merge_labels(labels, depth=(0, 4), by="centroid").compute()
    np.testing.assert_array_equal(merged, [[1, 1, 1, 2, 1, 1, 1, 1, 2, 0, 0, 0]])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(["touching", "iou", "centroid"]), st.data())
def test_ids_of_any_labels_have_no_gaps_and_follow_the_first_voxel(seed, by, data):
    # Labels that disagree wildly between chunks.
    shape = data.draw(st.sampled_from([(12, 14), (6, 9, 8)]))
    depth = data.draw(st.integers(1, 3))
    chunks = tuple(
        data.draw(
            st.sampled_from([(n,), (n // 2, n - n // 2), (3,) * (n // 3 - 1) + (n - 3 * (n // 3 - 1),)])
        )
        for n in shape
    )
    depths = tuple(depth if len(lengths) > 1 else 0 for lengths in chunks)
    places = cut(np.arange(np.prod(shape)).reshape(shape), chunks, depths)

    def anything(chunk):
        rng = np.random.default_rng([seed, *chunk.shape, int(chunk.flat[0])])
        return rng.integers(0, 4, chunk.shape)

    labels = each_chunk(anything, places)
    merged = cr.merge_labels(labels, depth=depths, by=by, threshold=0.1).compute(scheduler="sync")
    assert merged.shape == shape
    np.testing.assert_array_equal(merged, by_first_voxel(merged))
    if by != "centroid":
        cores = da.overlap.trim_overlap(labels, depths, boundary="none").compute(scheduler="sync")
        np.testing.assert_array_equal(merged > 0, cores > 0)


def test_every_time_point_and_channel_is_merged_alone():
    masks = np.stack([[noise((12, 20, 20), seed=4 * t + c) > 0.6 for c in range(2)] for t in range(3)])
    labels = da.from_array(masks, chunks=(2, 1, 5, 8, 20)).map_blocks(
        lambda m: np.stack([[ndimage.label(v)[0] for v in channel] for channel in m]), dtype=np.int32
    )
    merged = cr.merge_labels(labels)
    assert merged.chunks == labels.chunks
    expected = [[ndimage.label(volume)[0] for volume in channel] for channel in masks]
    np.testing.assert_array_equal(merged.compute(), expected)
    planes = cr.merge_labels(labels[:, 0, :, :, :], axes="tzyx").compute()
    np.testing.assert_array_equal(planes, np.array(expected)[:, 0])


def test_labels_without_objects_and_full_ones_are_merged():
    empty = da.zeros((9, 9), dtype=np.int16, chunks=4)
    assert not cr.merge_labels(empty).compute().any()
    np.testing.assert_array_equal(cr.merge_labels(empty + 3).compute(), np.ones((9, 9), int))


def test_nothing_is_computed_before_its_time_and_every_chunk_once():
    calls = []

    def label(chunk):
        calls.append(chunk.shape)
        return ndimage.label(chunk)[0].astype(np.int32)

    mask = da.from_array(noise() > 0.8, chunks=(20, 22, 18))
    with dask.config.set(scheduler=raise_if_computed):
        merged = cr.merge_labels(mask.map_blocks(label, dtype=np.int32, meta=np.empty((0,) * 3, np.int32)))
    calls.clear()
    merged.compute()
    assert len(calls) == 8


class Chunk(np.ndarray):
    """An array whose life can be watched."""


def test_chunks_are_dropped_as_soon_as_their_tables_are_made():
    made, most = [], []

    def label(chunk):
        labels = ndimage.label(chunk)[0].astype(np.int32).view(Chunk)
        made.append(weakref.ref(labels))
        most.append(sum(ref() is not None for ref in made))
        return labels

    mask = da.from_array(noise((60, 60, 60)) > 0.8, chunks=15)
    cr.merge_labels(mask.map_blocks(label, meta=np.empty((0,) * 3, np.int32))).compute(num_workers=2)
    assert len(made) == 64
    assert max(most) <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "face"}, "`by` must be one of 'touching', 'iou', 'centroid', got 'face'"),
        ({"connectivity": 4}, "`connectivity` must be 1, 2 or 3, got 4"),
        ({"connectivity": 3}, "`connectivity` 3 is more than the 2 spatial axes"),
        (
            {"by": "iou", "depth": 2, "threshold": 1.0},
            r"`threshold` must be at least 0 and below 1, got 1\.0",
        ),
        ({"by": "iou", "depth": 2, "threshold": float("nan")}, "`threshold` must be at least 0"),
        ({"by": "iou"}, "`depth` is 0 on axis 0, which has 2 chunks"),
        ({"by": "centroid", "depth": (2, 0)}, "`depth` is 0 on axis 1"),
        ({"depth": 7}, "`depth` 7 on axis 0 is larger than a chunk: without the halo it has 5 voxels"),
        (
            {"depth": -1},
            r"`depth` must be a number of voxels of at least 0, or one per spatial axis \(2\), got -1",
        ),
        ({"depth": (1, 1, 1)}, "or one per spatial axis"),
        ({"depth": 1.5}, "`depth` must be a number of voxels"),
        ({"axes": "zyx"}, "`axes` 'zyx' must be a subset of 'tczyx'"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_computed(arguments, message):
    labels = da.ones((24, 24), dtype=np.int32, chunks=12)
    with dask.config.set(scheduler=raise_if_computed), pytest.raises(ValueError, match=message):
        cr.merge_labels(labels, **arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (da.ones((4, 4), chunks=2), "must be a dask array of integers, got Array of float64"),
        (da.ones((4, 4), dtype=bool, chunks=2), "got Array of bool"),
        (np.ones((4, 4), int), "got ndarray of int64"),
    ],
)
def test_what_is_no_dask_array_of_integers_is_refused(labels, message):
    with pytest.raises(TypeError, match=message):
        cr.merge_labels(labels)


def test_chunks_without_voxels_are_refused():
    labels = da.from_array(np.ones((4, 4), int), chunks=((2, 2), (2, 0, 2)))
    with pytest.raises(ValueError, match=r"chunks without voxels on axis 1: \(2, 0, 2\)"):
        cr.merge_labels(labels)


def test_unknown_chunks_are_refused():
    labels = da.ones((4, 4), dtype=int, chunks=2)
    with pytest.raises(ValueError, match="unknown chunk sizes"):
        cr.merge_labels(labels[labels[:, 0] > 0])


@pytest.mark.parametrize("by", ["touching", "iou", "centroid"])
def test_negative_labels_are_refused_with_the_chunks_index(by):
    labels = np.ones((12, 12), int)
    labels[1, 11] = -3
    with pytest.raises(ValueError, match=r"chunk \(0, 1\): labels must be at least 0, found -3"):
        cr.merge_labels(cut(labels, 6, 2), depth=2, by=by).compute()


def test_a_chunk_of_another_shape_than_announced_is_refused():
    labels = da.ones((8, 8), dtype=int, chunks=4).map_blocks(lambda b: b[1:], dtype=int)
    with pytest.raises(
        ValueError, match=r"chunk \(\d, \d\): the chunk has shape \(3, 4\), but its metadata say \(4, 4\)"
    ):
        cr.merge_labels(labels).compute(scheduler="sync")


def test_equal_calls_share_their_graph_and_others_do_not():
    labels = da.ones((8, 8), dtype=int, chunks=4)
    assert cr.merge_labels(labels).name == cr.merge_labels(labels).name
    assert cr.merge_labels(labels).name != cr.merge_labels(labels, connectivity=2).name

"""Training patches: where they are cut, what they hold, and that nothing depends on how a store is read."""

import json
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import block_reduce

import chunkrestore as cr
from chunkrestore.statistics import NonFiniteError
from chunkrestore.train import patches as module
from chunkrestore.train.augment import augment_care, augment_stardist, turn
from chunkrestore.train.blind_spots import blind_pair, blind_spots
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.pairs import Pair
from chunkrestore.train.patches import Patches, normalize, patches_of

SHAPE = (24, 60, 70)
PATCH = (8, 16, 16)


def volume(seed=0, dtype=np.uint16, shape=SHAPE):
    """Return an image with dark and bright regions, its sharper target, and labels of what is bright."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.random([-(-n // 10) for n in shape]) > 0.6, np.ones((10,) * len(shape)))
    objects = coarse[tuple(slice(n) for n in shape)]
    target = (100 + 900 * objects + rng.normal(0, 5, shape)).astype(dtype)
    image = np.clip(100 + 90 * objects + rng.normal(0, 20, shape), 0, None).astype(dtype)
    labels = (objects * (1 + np.arange(objects.size).reshape(shape) // 999)).astype(np.int32)
    return image, target, labels


def stored(folder, image, target=None, labels=None, chunks=None, axes="zyx"):
    lead = (1,) * (image.ndim - len(chunks or ()))
    options = {"levels": 1, "axes": axes, "voxel_size": (0.5,) * axes.count("z") + (0.2, 0.2)}
    whole = {} if chunks is None else {"chunks": lead + chunks}
    paths = [str(folder / "image.zarr"), str(folder / "target.zarr")]
    cr.write_image(image, paths[0], **options, **whole)
    if target is not None:
        cr.write_image(target, paths[1], **options, **whole)
    if labels is not None:
        cr.write_labels(labels, paths[0], "nuclei", axes=axes, **whole)
    return paths


def at(array, place, shape=PATCH):
    return array[tuple(slice(a, a + n) for a, n in zip(place, shape, strict=True))]


def assert_same(a, b):
    for name in ("x", "y", "x_validation", "y_validation", "places", "places_validation"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def meet(a, b, shape):
    return all(abs(int(k) - int(m)) < n for k, m, n in zip(a, b, shape, strict=True))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("own_numbers", [False, True])
def test_patches_are_parts_of_the_whole_volume_normalised_by_its_percentiles(tmp_path, dtype, own_numbers):
    image, target, _ = volume(dtype=dtype)
    pair = Pair(*stored(tmp_path, image, target, chunks=(10, 32, 17)), own_numbers=own_numbers)
    patches = draw_patches([pair], PATCH, 30, seed=1, percentiles=(3, 99))
    numbers = np.percentile(image, (3, 99)), np.percentile(target if own_numbers else image, (3, 99))
    whole = [normalize(array, *n) for array, n in zip((image, target), numbers, strict=True)]
    assert len(patches) == 27
    assert 1 <= len(patches.x_validation) <= 3
    for part in ("", "_validation"):
        for k, (i, *place) in enumerate(getattr(patches, f"places{part}").tolist()):
            assert i == 0
            np.testing.assert_array_equal(getattr(patches, f"x{part}")[k], at(whole[0], place))
            np.testing.assert_array_equal(getattr(patches, f"y{part}")[k], at(whole[1], place))
    said = patches.described["volumes"][0]
    np.testing.assert_allclose(said["normalization"], [numbers[0]], rtol=1e-12)
    np.testing.assert_allclose(said["target_normalization"], numbers[1], rtol=1e-12)
    json.dumps(patches.described)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return arrays, and patches drawn from stores with default chunks."""
    result = {}
    for dtype in (np.uint16, np.float32):
        arrays = volume(3, dtype)
        paths = stored(tmp_path_factory.mktemp("drawn"), *arrays)
        of_images = draw_patches([Pair(*paths)], PATCH, 20, seed=5)
        result[dtype] = arrays, of_images, draw_patches([Pair(paths[0], labels="nuclei")], PATCH, 20, seed=5)
    return result


@settings(max_examples=8)
@given(
    chunks=st.tuples(*(st.integers(n // 4, n) for n in SHAPE)),
    block=st.tuples(*(st.integers(n // 4, n) for n in SHAPE)) | st.none(),
    dtype=st.sampled_from([np.uint16, np.float32]),
)
def test_the_same_patches_come_out_of_every_chunking_and_block_grid(
    drawn, tmp_path_factory, chunks, block, dtype
):
    arrays, images, labels = drawn[dtype]
    paths = stored(tmp_path_factory.mktemp("chunks"), *arrays, chunks=chunks)
    assert_same(draw_patches([Pair(*paths)], PATCH, 20, seed=5, block_shape=block), images)
    again = draw_patches([Pair(paths[0], labels="nuclei")], PATCH, 20, seed=5, block_shape=block)
    assert_same(again, labels)


def test_another_seed_draws_other_patches(tmp_path):
    pair = Pair(*stored(tmp_path, *volume()[:2]))
    first, second = (draw_patches([pair], PATCH, 20, seed=seed).places for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_patches_of_images_show_more_than_background(tmp_path):
    """A pedestal of 1000 is no content, and neither is a bright voxel alone."""
    rng = np.random.default_rng(0)
    target = rng.normal(1000, 10, (32, 96, 96)).astype(np.float32)
    target[8:20, 10:34, 60:90] += 200
    target[tuple(rng.integers(0, n, 40) for n in target.shape)] += 2000
    paths = stored(tmp_path, target, target)
    patches = draw_patches([Pair(*paths)], PATCH, 10, seed=2, validation=0, content=0.4)
    low, high = np.percentile(target, (2, 99.8))
    means = block_reduce(target.astype(np.float64), (2, 4, 4), np.mean)  # bins of a patch of 8 x 16 x 16
    bright = means > low + 0.4 * (high - low)
    for _, z, y, x in patches.places.tolist():
        centre = [
            slice(-(-(a + p // 4) // b), (a + p - p // 4) // b)
            for a, p, b in zip((z, y, x), PATCH, (2, 4, 4), strict=True)
        ]
        assert bright[tuple(centre)].any()
    with pytest.raises(
        ValueError, match=r"900 of 900 training patches must have content, but only \d+ places"
    ):
        draw_patches([Pair(*paths)], PATCH, 900, seed=2, validation=0, content=1)
    anywhere = draw_patches([Pair(*paths)], PATCH, 100, seed=2, validation=0, content=0)
    assert anywhere.places[:, 1:].max(axis=0).tolist() > [20, 70, 70]


def test_four_in_five_patches_of_sparse_labels_hold_objects(tmp_path):
    labels = np.zeros((32, 160, 160), np.uint16)
    rng = np.random.default_rng(4)
    for k in range(8):
        z, y, x = (int(rng.integers(4, n - 12)) for n in labels.shape)
        labels[z : z + 8, y : y + 8, x : x + 8] = k + 1
    assert (labels > 0).mean() < 0.006
    (path, _) = stored(tmp_path, rng.normal(100, 5, labels.shape).astype(np.float32), labels=labels)
    patches = draw_patches([Pair(path, labels="nuclei")], PATCH, 50, seed=1)
    assert patches.y.dtype == np.int32
    assert (patches.y > 0).any(axis=(1, 2, 3)).sum() >= 0.8 * 45
    assert (patches.y[:, 2:6, 4:12, 4:12] > 0).any(axis=(1, 2, 3)).sum() >= 0.8 * 45
    assert (patches.y_validation > 0).any()
    for y, (_, *place) in zip(patches.y, patches.places.tolist(), strict=True):
        np.testing.assert_array_equal(y, at(labels, place))
    all_of_them = draw_patches([Pair(path, labels="nuclei")], PATCH, 50, seed=1, content=1)
    assert (all_of_them.y > 0).any(axis=(1, 2, 3)).all()


def test_places_with_more_of_objects_are_drawn_more_often(tmp_path):
    labels = np.zeros((8, 64, 512), np.int32)
    labels[:, :, :256] = 1
    labels[::4, ::4, 256::4] = 2  # a 64th of the voxels
    (path, _) = stored(
        tmp_path, np.arange(labels.size, dtype=np.float32).reshape(labels.shape), labels=labels
    )
    places = draw_patches(
        [Pair(path, labels="nuclei")], (8, 16, 16), 60, seed=1, validation=0, content=1
    ).places
    assert (places[:, 3] < 256).mean() > 0.85


def test_no_voxel_is_in_training_and_validation_patches(tmp_path):
    image, target, labels = volume(1)
    paths = stored(tmp_path, image, target, labels)
    restored = str(tmp_path / "other.zarr")
    cr.write_image(image // 2, restored, axes="zyx", voxel_size=(1, 1, 1))
    # Two images of one sample: the labels are the same.
    pairs = [Pair(paths[0], labels="nuclei"), Pair(restored, paths[0], labels="nuclei")]
    patches = draw_patches(pairs, PATCH, 120, seed=3, validation=0.25)
    assert {0, 1} == set(patches.places[:, 0]) == set(patches.places_validation[:, 0])
    assert len(patches.x_validation) >= 5
    for a, b in product(patches.places[:, 1:], patches.places_validation[:, 1:]):
        assert not meet(a, b, PATCH)
    apart = [
        Pair(paths[0], labels="nuclei", sample="a"),
        Pair(restored, paths[0], labels="nuclei", sample="b"),
    ]
    other = draw_patches(apart, PATCH, 120, seed=3, validation=0.25)
    assert any(meet(a, b, PATCH) for a, b in product(other.places[:, 1:], other.places_validation[:, 1:]))
    for i in (0, 1):
        of_volume = [p[p[:, 0] == i, 1:] for p in (other.places, other.places_validation)]
        assert not any(meet(a, b, PATCH) for a, b in product(*of_volume))


def test_volumes_give_patches_in_proportion_to_their_content(tmp_path):
    pairs = []
    for name, n in (("small", 32), ("large", 128)):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(n)
        image = np.kron(rng.random((2, n // 4, 16)), np.ones((4, 4, 4))).astype(np.float32)
        pairs.append(Pair(*stored(tmp_path / name, image, image)))
    patches = draw_patches(pairs, (8, 16, 16), 100, seed=1, validation=0)
    assert 60 < np.count_nonzero(patches.places[:, 0]) < 95
    assert [v["n_training"] for v in patches.described["volumes"]] == np.bincount(
        patches.places[:, 0]
    ).tolist()


def test_planes_channels_times_and_levels_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 200, (3, 2, 16, 16)), np.ones((1, 1, 8, 8))).astype(np.uint8)
    path = str(tmp_path / "image.zarr")
    cr.write_image(image, path, axes="tcyx", voxel_size=(1, 1), levels=2)
    both = draw_patches(
        [Pair(path, path, channel=(1, 0), target_channel=0, timepoint=2)], (16, 32), 12, seed=1
    )
    assert both.x.shape[1:] == (16, 32, 2)
    assert both.n_channels == 2
    assert both.patch_shape == (16, 32)
    for k, (_, *place) in enumerate(both.places.tolist()):
        for c in (1, 0):
            whole = normalize(image[2, c], *np.percentile(image[2, c], (2, 99.8)))
            np.testing.assert_array_equal(both.x[k, ..., 1 - c], at(whole, place, (16, 32)))
    level = draw_patches([Pair(path, channel=0, timepoint=0, level=1)], (8, 8), 12, seed=1)
    assert level.described["strategy"] == "noise-only"
    assert level.described["volumes"][0]["shape"] == [64, 64]
    np.testing.assert_array_equal(level.x, level.y)
    with pytest.raises(ValueError, match=r"pair 0: .* has 3 of them; say which in `timepoint`"):
        draw_patches([Pair(path, channel=0)], (8, 8), 12, seed=1)
    with pytest.raises(ValueError, match=r"pair 0: .* has 2 of them; say which in `channel`"):
        draw_patches([Pair(path, timepoint=0)], (8, 8), 12, seed=1)


def test_objects_keep_their_classes(tmp_path):
    image, _, labels = volume(2)
    (path, _) = stored(tmp_path, image, labels=labels)
    ids = np.unique(labels[labels > 0])
    known = {int(i): 1 + int(i) % 2 for i in ids[:-3]}
    of_id = np.full(labels.max() + 1, -1)
    of_id[0] = 0
    of_id[list(known)] = list(known.values())
    cr.write_labels(np.maximum(of_id[labels], 0).astype(np.int32), path, "kinds", axes="zyx")
    options = {"patch_shape": PATCH, "n_patches": 40, "seed": 1}
    by_table = draw_patches([Pair(path, labels="nuclei", classes=known)], **options)
    np.testing.assert_array_equal(by_table.classes, of_id[by_table.y])
    np.testing.assert_array_equal(by_table.classes_validation, of_id[by_table.y_validation])
    by_name = draw_patches([Pair(path, labels="nuclei", classes="kinds")], **options)
    np.testing.assert_array_equal(by_name.classes, np.maximum(by_table.classes, 0))
    with pytest.raises(ValueError, match="pair 0: `classes` must map label ids to classes from 1 on"):
        draw_patches([Pair(path, labels="nuclei", classes={1: 0})], **options)


def test_pairs_that_do_not_fit_are_refused_before_voxels_are_read(tmp_path):
    image, target, labels = volume()
    paths = stored(tmp_path, image, target[:20], labels)

    def refuses(message, *pairs, shape=PATCH, n=10, **options):
        with pytest.raises(ValueError, match=message):
            draw_patches(pairs, shape, n, seed=1, **options)

    own = Pair(paths[0])
    refuses(r"image.zarr has shape \(24, 60, 70\) and target .*target.zarr \(20, 60, 70\)", Pair(*paths))
    refuses(r"`patch_shape` \(8, 64, 16\) does not fit into pair 0, .*image.zarr", own, shape=(8, 64, 16))
    refuses("`patch_shape` .* must have one length per axis 'zyx'", own, shape=(16, 16))
    refuses("label 'cells' does not exist in .*it has 'nuclei'", Pair(paths[0], labels="cells"))
    refuses(
        "`pairs` must all be labels, or all images", Pair(paths[0], labels="nuclei"), Pair(*[paths[0]] * 2)
    )
    refuses("`pairs` must all be learnt from their own noise", own, Pair(*[paths[0]] * 2))
    refuses("`pairs` are empty")
    refuses("`n_patches` 1 leave none", own, n=1)
    refuses("`validation` 1.0 must be", own, validation=1.0)
    refuses("`content` 2 must be", own, content=2)
    refuses(r"`percentiles` \(99, 1\) must rise", own, percentiles=(99, 1))
    refuses(r"`block_shape` \(8, 8\) must have one length per axis", own, block_shape=(8, 8))
    refuses("content lies in 1 of 1 cells", own, shape=(20, 40, 40))
    refuses("channel 5 does not exist", Pair(paths[0], channel=5))
    refuses("`timepoint` 1 does not exist", Pair(paths[0], timepoint=1))
    with pytest.raises(FileNotFoundError, match=r"nothing.zarr does not exist"):
        draw_patches([Pair(str(tmp_path / "nothing.zarr"))], PATCH, 10, seed=1)


def test_a_nan_is_found_and_a_constant_volume_refused(tmp_path):
    image = volume(dtype=np.float32)[0]
    image[17, 33, 65] = np.nan
    (path, _) = stored(tmp_path, image, chunks=(10, 30, 30))
    with pytest.raises(
        NonFiniteError, match=r"image.zarr/0 \(time point 0, channel 0\): voxel \[17, 33, 65\] is NaN"
    ):
        draw_patches([Pair(path)], PATCH, 10, seed=1)
    (tmp_path / "flat").mkdir()
    (flat, _) = stored(tmp_path / "flat", np.full(SHAPE, 7, np.uint8))
    with pytest.raises(ValueError, match=r"percentiles \(2.0, 99.8\) of .* are both 7"):
        draw_patches([Pair(flat)], PATCH, 10, seed=1)


def test_many_patches_lie_in_a_mapped_file_and_are_saved_and_loaded(tmp_path, monkeypatch):
    paths = stored(tmp_path, *volume()[:2])
    in_memory = draw_patches([Pair(*paths)], PATCH, 20, seed=1)
    monkeypatch.setattr(module, "_MOST_IN_MEMORY", 1000)
    mapped = draw_patches([Pair(*paths)], PATCH, 20, seed=1)
    assert isinstance(mapped.y, np.memmap)
    assert not isinstance(in_memory.y, np.memmap)
    assert_same(mapped, in_memory)
    again = Patches.load(mapped.save(tmp_path / "patches"))
    assert_same(again, in_memory)
    assert again.described == in_memory.described
    with pytest.raises(FileExistsError):
        mapped.save(tmp_path / "patches")


def test_volumes_in_memory_are_patches_or_are_cut_without_overlap():
    volumes = [normalize(volume(seed)[0], 0, 300) for seed in range(5)]
    targets = [volume(seed)[2] for seed in range(5)]
    whole = patches_of(volumes, targets, validation=0.2)
    assert (len(whole), len(whole.x_validation), whole.patch_shape) == (4, 1, SHAPE)
    assert whole.is_labels
    cut = patches_of(volumes, targets, (10, 20, 30), validation=0.25, seed=3)
    assert len(cut) + len(cut.x_validation) == 5 * 2 * 3 * 2
    everything = np.concatenate([cut.places, cut.places_validation]).tolist()
    for (i, *a), (k, *b) in product(everything, everything):
        assert i != k or a == b or not meet(a, b, (10, 20, 30))
    for x, y, (i, *place) in zip(cut.x, cut.y, cut.places.tolist(), strict=True):
        np.testing.assert_array_equal(x, at(volumes[i], place, (10, 20, 30)))
        np.testing.assert_array_equal(y, at(targets[i], place, (10, 20, 30)))
    noisy = patches_of(volumes, validation=(volumes[:1], None))
    assert noisy.described["strategy"] == "noise-only"
    np.testing.assert_array_equal(noisy.x_validation, noisy.y_validation)


def test_images_of_one_sample_in_memory_stay_on_one_side():
    volumes, targets = zip(*(volume(seed, np.float32)[:2] for seed in range(4)), strict=True)
    chain = patches_of([*volumes, *(v + 1 for v in volumes)], [*targets, *targets], validation=0.25)
    held = chain.places_validation[:, 0]
    assert sorted(held % 4) == [held[0] % 4] * 2


def test_volumes_in_memory_that_cannot_be_patches_are_refused():
    good = np.zeros((8, 16, 16), np.float32)

    def refuses(message, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            patches_of(*arguments, **options)

    refuses("`inputs` are empty", [], [])
    refuses("as many `targets` as `inputs`; got 2 for 1", [good], [good, good])
    refuses("pair 0: input .* and target .* must have one shape", [good], [good[:4]])
    refuses("pair 1: volumes must be finite", [good, good + np.nan], [good, good])
    refuses("give a `patch_shape`", [good, good[:4]], [good, good[:4]])
    refuses(r"pair 1: volume \(4, 16, 16\) does not hold", [good, good[:4]], None, (8, 8, 8))
    refuses("leaves none to train on", [good], [good])
    refuses("must all be images .* or all be labels", [good] * 2, [good, good.astype(int)], validation=0)


def test_augmentation_turns_input_and_target_alike_and_depends_on_nothing_but_the_generator():
    image = np.arange(6 * 8 * 8, dtype=np.float32).reshape(6, 8, 8)
    image.setflags(write=False)
    labels = image.astype(np.int32)
    orientations = set()
    for seed in range(300):
        x, y = augment_care(image, 3 * image, np.random.default_rng(seed))
        again, _ = augment_care(image, 3 * image, np.random.default_rng(seed))
        np.testing.assert_array_equal(x, again)
        scale, shift = np.polyfit(np.sort(x.ravel()), np.arange(image.size), 1)  # undone
        np.testing.assert_allclose(
            (y * scale + shift * 1) - 3 * (x * scale + shift),
            y[0, 0, 0] * scale + shift - 3 * (x[0, 0, 0] * scale + shift),
            atol=0.2,
        )
        where = np.rint(x * scale + shift).astype(int)
        orientations.add((where[0, 0, 0], where[0, 0, 1], where[1, 0, 0]))
        turned, ids, twice = augment_stardist(
            image[..., None], labels, np.random.default_rng(seed), None, 2 * labels
        )
        assert turned.dtype == np.float32
        np.testing.assert_array_equal(2 * ids, twice)
        order = np.corrcoef(turned.ravel(), ids.ravel())[0, 1]
        assert order > 0.999
    assert len(orientations) == 16  # eight of the plane, with and without z upside down


def test_planes_that_are_not_square_keep_rows_and_columns():
    for seed in range(20):
        (turned,) = turn([np.zeros((4, 6, 8))], np.random.default_rng(seed))
        assert turned.shape == (4, 6, 8)


def test_random_crops_of_labels_hold_objects_in_four_of_five_cases():
    labels = np.zeros((20, 80, 80), np.int32)
    labels[8:14, 60:68, 4:12] = 1
    image = labels.astype(np.float32)
    crops = [augment_stardist(image, labels, np.random.default_rng(k), (8, 16, 16))[1] for k in range(200)]
    assert {crop.shape for crop in crops} == {(8, 16, 16)}
    assert 0.78 <= np.mean([crop.any() for crop in crops]) < 0.95
    with pytest.raises(ValueError, match="does not fit into patches"):
        augment_stardist(image, labels, np.random.default_rng(0), (24, 16, 16))


@pytest.mark.parametrize("shape", [(64, 64), (16, 32, 48), (1, 64, 64), (5, 33, 70)])
def test_blind_spots_are_spread_evenly_and_hold_the_value_of_a_neighbour(shape):
    x = np.random.default_rng(1).permutation(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    place_of = np.argsort(x.ravel())
    x.setflags(write=False)
    counts = np.zeros(shape)
    for seed in range(60):
        masked, mask = blind_spots(x, np.random.default_rng(seed))
        assert 0.6 / 64 < mask.mean() < 1.6 / 64
        np.testing.assert_array_equal(masked[~mask], x[~mask])
        assert (masked[mask] != x[mask]).all()  # all values differ: never the voxel itself
        spots = np.argwhere(mask)
        neighbours = np.stack(np.unravel_index(place_of[masked[mask].astype(int)], shape), axis=1)
        assert np.abs(spots - neighbours).max() <= 5
        counts += mask
    assert counts.max() <= 12  # no favourite voxel: of 60, one in 64 is expected
    seen, learnt = blind_pair(x, np.random.default_rng(0))
    masked, mask = blind_spots(x, np.random.default_rng(0))
    np.testing.assert_array_equal(seen[..., 0], masked)
    np.testing.assert_array_equal(learnt[..., 0], x)
    np.testing.assert_array_equal(learnt[..., 1], mask)


def test_impossible_blind_spots_are_refused():
    rng = np.random.default_rng(0)
    for options in ({"fraction": 0}, {"fraction": 0.6}, {"radius": 0}):
        with pytest.raises(ValueError, match=r"`fraction` .* and `radius`"):
            blind_spots(np.zeros((4, 4), np.float32), rng, **options)
    with pytest.raises(ValueError, match="no neighbours"):
        blind_spots(np.zeros((1, 1), np.float32), rng)


PEAK = """
import resource, sys
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.pairs import Pair
from chunkrestore.ome_zarr import open_image
import numpy, numcodecs, zarr
small, large = sys.argv[1:]
draw_patches([Pair(small, labels="truth")], (16, 32, 32), 10, seed=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
draw_patches([Pair(large, labels="truth")], (32, 64, 64), 100, seed=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_blocks_and_not_by_the_volume(tmp_path):
    """512 MB of image and 1 GB of labels are read in blocks of 8 and 16 MB."""
    import dask.array as da

    paths = []
    for name, shape in (("small", (32, 64, 64)), ("large", (256, 1024, 1024))):
        chunks = tuple(min(128, n) for n in shape)
        z = da.arange(shape[0], chunks=chunks[0])[:, None, None]
        y = da.arange(shape[1], chunks=chunks[1])[None, :, None]
        x = da.arange(shape[2], chunks=chunks[2])[None, None, :]
        inside = (z % 20 < 9) & (y % 20 < 9) & (x % 20 < 9)
        paths.append(str(tmp_path / f"{name}.zarr"))
        image = (100 + 400 * inside + (z * 7 + y * 3 + x) % 11).astype(np.uint16)
        cr.write_image(image, paths[-1], axes="zyx", voxel_size=(1, 1, 1), chunks=chunks)
        labels = (inside * (1 + z // 20 * 4096 + y // 20 * 64 + x // 20)).astype(np.int32)
        cr.write_labels(labels, paths[-1], "truth", axes="zyx", chunks=chunks)
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True)
    # Patches take 110 MB; statistics of a block of 4 million voxels some 100 MB.
    assert float(done.stdout) < 300

"""StarDist's options, tiled, against StarDist's own prediction of the whole volume."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
from scipy.ndimage import zoom
from star_networks import NORMALIZATION, image_of, normalized, save_network

from chunkrestore import models, segment
from chunkrestore.grid import Block, BlockGrid
from chunkrestore.operators.base import concatenate
from chunkrestore.operators.stardist import StarDist
from chunkrestore.statistics import NonFiniteError
from chunkrestore.stitch.objects import number_objects

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
pytest.importorskip("stardist", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIGS = {
    # Name: dimensions, parameters, mean radius of objects in voxels of what the network sees.
    "2d": (2, {"n_rays": 16, "grid": (2, 2), "unet_n_depth": 1}, 7),
    "3d": (3, {"n_rays": 32, "grid": (1, 2, 2), "unet_n_depth": 1, "anisotropy": (2, 1, 1)}, 6),
    "classes": (2, {"n_rays": 16, "grid": (1, 1), "unet_n_depth": 1, "n_classes": 2}, 6),
    "channels": (2, {"n_rays": 16, "grid": (2, 1), "unet_n_depth": 1, "n_channel_in": 2}, 6),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    basedir = tmp_path_factory.mktemp("networks")
    for name, config in CONFIGS.items():
        save_network(basedir, name, *config)
    return basedir


def detected(operator, image, edges):
    """Return the tables of all blocks, joined, in order of position."""
    shape = tuple(ends[-1] for ends in edges)
    operator.check(shape, image.dtype)
    grid = BlockGrid(edges, operator.halo(shape))
    table = concatenate(operator.detect(image[block.read], block) for block in grid)
    order = np.lexsort(table["points"].T[::-1])
    return {key: rows[order] for key, rows in table.items()}


def prepared(operator, image):
    """Normalise as StarDist's users do, every channel for itself."""
    limits = np.array(operator.normalization)
    return normalized(image, limits[..., 0], limits[..., 1])


def scale_of(operator, image):
    """Return one number per axis, channels included, as StarDist wants it."""
    return operator.scale and (*operator.scale, *(1,) * (image.ndim - len(operator.scale)))


def untiled_candidates(operator, image):
    """Return the table of StarDist's own candidates, in order of position."""
    image = prepared(operator, image)
    if operator.scale is not None:
        image = zoom(image, scale_of(operator, image), order=1)
    prob, dist, *classes, points = models.load(operator.model).predict_sparse(
        image, prob_thresh=operator.prob_thresh, n_tiles=None
    )
    order = np.lexsort(points.T[::-1])
    table = {"prob": prob, "dist": dist, "points": points, **dict(zip(["class_prob"], classes, strict=False))}
    return {key: rows[order] for key, rows in table.items()}


def assert_same_candidates(table, expected):
    assert len(expected["prob"]) > 30
    assert table.keys() == expected.keys()
    np.testing.assert_array_equal(table["points"], expected["points"])
    for key in expected.keys() - {"points"}:
        # Different lengths make the network's libraries sum in another order.
        np.testing.assert_allclose(table[key], expected[key], rtol=1e-4, atol=1e-5)


def operator_for(folder, image, n_candidates, **parameters):
    """Return an operator whose threshold leaves so many candidates of the whole image."""
    every = StarDist(folder, prob_thresh=0, **{"normalization": NORMALIZATION} | parameters)
    prob = np.sort(untiled_candidates(every, image)["prob"])
    return replace(every, prob_thresh=float(prob[-n_candidates - 1]))


def instances(operator, image, edges):
    """Return labels, block by block, and the table of all objects, one row per id."""
    shape = tuple(ends[-1] for ends in edges)
    operator.check(shape, image.dtype)
    grid = BlockGrid(edges, operator.halo(shape))
    objects = number_objects(
        operator, grid, {block.index: operator.detect(image[block.read], block) for block in grid}
    )
    labels = np.full(shape, -1)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    table = concatenate(objects.tables.values())
    order = np.argsort(table["ids"])
    return labels, {key: rows[order] for key, rows in table.items()}


def untiled(operator, image):
    """Return labels and details of StarDist's own prediction."""
    return models.load(operator.model).predict_instances(
        prepared(operator, image),
        prob_thresh=operator.prob_thresh,
        nms_thresh=operator.nms_thresh,
        scale=scale_of(operator, image),
        n_tiles=None,
    )


def assert_same_instances(labels, expected):
    """Every voxel agrees, up to one one-to-one map of ids."""
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs[:, 0].tolist() == [0, 0]
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert pairs.shape[1] > 8


@pytest.mark.parametrize(
    ("name", "shape", "scale", "n_candidates", "grids"),
    [
        ("2d", (150, 121), 0.5, 500, [((0, 40, 150), (0, 73, 121)), ((0, 5, 6, 101, 150), (0, 121))]),
        ("2d", (60, 51), (1.7, 0.8), 400, [((0, 21, 60), (0, 33, 51)), ((0, 60), (0, 1, 2, 30, 51))]),
        ("classes", (40, 41), 2, 1500, [((0, 7, 20, 40), (0, 10, 20, 41))]),
        ("3d", (11, 32, 40), (2, 0.7, 0.7), 120, [((0, 4, 11), (0, 15, 32), (0, 40))]),
        ("3d", (30, 45, 50), 0.8, 120, [((0, 8, 30), (0, 45), (0, 25, 50))]),
        ("3d", (9, 20, 21), 1.5, 120, [((0, 9), (0, 4, 20), (0, 12, 21))]),
    ],
)
def test_instances_at_another_scale_are_those_of_the_whole(folders, name, shape, scale, n_candidates, grids):
    image = image_of(shape, seed=1)
    operator = operator_for(folders / name, image, n_candidates, scale=scale)
    candidates = untiled_candidates(operator, image)
    expected, details = untiled(operator, image)
    whole = operator(image)
    assert_same_instances(whole, expected)
    for edges in grids:
        assert_same_candidates(detected(operator, image, edges), candidates)
        labels, objects = instances(operator, image, edges)
        np.testing.assert_array_equal(labels, whole)
        points = objects["points"] * (1 / np.array(operator.scale))
        assert set(map(tuple, points)) <= set(map(tuple, details["points"]))
        shown = np.unique(labels[labels > 0], return_counts=True)
        np.testing.assert_array_equal((objects["ids"], objects["volume"]), shown)


def test_chunks_at_another_scale_are_those_of_the_whole(folders):
    image = image_of((60, 51), seed=1)
    operator = operator_for(folders / "2d", image, 400, scale=(1.7, 0.8))
    parameters = {"prob_thresh": operator.prob_thresh, "normalization": NORMALIZATION, "scale": (1.7, 0.8)}
    lazy = segment(da.from_array(image, chunks=(25, 20)), operator.model, **parameters)
    assert (lazy.shape, lazy.dtype) == (image.shape, np.int32)
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), operator(image))


def test_a_scale_that_changes_nothing_is_none(folders):
    assert StarDist(folders / "2d", scale=(1, 1.0)) == StarDist(folders / "2d")


def test_a_scale_that_leaves_nothing_is_refused(folders):
    operator = StarDist(folders / "2d", scale=0.1)
    operator.check((30, 30), np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"`scale` \(0.1, 0.1\) leaves \(3, 0\) points"):
        operator.check((30, 4), np.dtype(np.uint16))
    with pytest.raises(ValueError, match="accurate up to 262144"):
        StarDist(folders / "2d", scale=3).check((30, 100_000), np.dtype(np.uint16))


# Classes


def test_objects_have_the_class_that_stardist_gives_them(folders):
    image = image_of((70, 66), seed=3)
    operator = operator_for(folders / "classes", image, 1500)
    _, details = untiled(operator, image)
    expected = {
        tuple(point): (probabilities, class_id)
        for point, probabilities, class_id in zip(
            details["points"], details["class_prob"], details["class_id"], strict=True
        )
    }
    assert set(details["class_id"]) > {0}
    _, objects = instances(operator, image, ((0, 30, 70), (0, 7, 40, 66)))
    assert objects["class_prob"].dtype == np.float32
    assert len(objects["ids"]) > 20
    for point, probabilities in zip(objects["points"], objects["class_prob"], strict=True):
        of_stardist, class_id = expected[tuple(point)]
        np.testing.assert_allclose(probabilities, of_stardist, rtol=1e-4)
        assert probabilities.argmax() == class_id


# Channels

LIMITS = ((100.0, 900.0), (50.0, 2000.0))


def two_channels(shape):
    """Channels last; the second is brighter and has other objects."""
    return np.stack([image_of(shape, seed=4), 2 * image_of(shape, seed=5)], axis=-1)


@pytest.mark.parametrize("scale", [None, (0.8, 1.3)])
@pytest.mark.parametrize("limits", [LIMITS, NORMALIZATION])
def test_channels_are_seen_together_as_by_stardist(folders, limits, scale):
    image = two_channels((64, 51))
    operator = operator_for(folders / "channels", image, 600, normalization=limits, scale=scale)
    assert operator.n_channels == 2
    expected, _ = untiled(operator, image)
    whole = operator(image)
    assert_same_instances(whole, expected)
    labels, _ = instances(operator, image, ((0, 21, 64), (0, 7, 30, 51)))
    np.testing.assert_array_equal(labels, whole)


def test_every_channel_has_its_own_percentiles(folders):
    image = two_channels((40, 45))
    operator = StarDist(folders / "channels", prob_thresh=0.6, percentiles=(2, 98))
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    resolved = operator.resolve({2.0: tuple(low), 98.0: tuple(high)})
    assert resolved.normalization == ((low[0], high[0]), (low[1], high[1]))
    np.testing.assert_array_equal(operator(image), resolved(image))
    assert operator(image).shape == (40, 45)
    assert json.loads(json.dumps(resolved.describe()))["normalization"] == [
        [low[0], high[0]],
        [low[1], high[1]],
    ]


def test_a_candidate_is_bright_in_any_channel(folders):
    image = two_channels((40, 45))
    image[:, :20, 0] = image[:, 20:, 1] = 100
    operator = operator_for(folders / "channels", image, 300, normalization=LIMITS)
    every = detected(operator, image, ((0, 40), (0, 45)))
    first, second = (image[tuple(every["points"].T)] > 550).T
    bright = first | second
    assert min((first & ~second).sum(), (second & ~first).sum(), (~bright).sum()) > 3
    found = detected(replace(operator, skip_below=550), image, ((0, 14, 40), (0, 45)))
    np.testing.assert_array_equal(found["points"], every["points"][bright])


@pytest.mark.parametrize("limits", [(5, 1), ((1, 2), (3, 3)), ((1, 2), (3, 4), (5, 6)), (1, float("inf"))])
def test_limits_that_are_none_are_refused(folders, limits):
    with pytest.raises(ValueError, match="two finite numbers low < high, or two for each of 2 channels"):
        StarDist(folders / "channels", normalization=limits)


def test_an_image_with_other_channels_is_refused(folders):
    operator = StarDist(folders / "channels", normalization=LIMITS)
    for shape in [(32, 32), (32, 32, 3)]:
        with pytest.raises(ValueError, match=r"block \(0, 0\) .* reads \(32, 32, 2\)"):
            operator.detect(np.zeros(shape, np.uint16), Block.whole((32, 32)))


def test_axes_tell_which_channels_are_consumed(folders):
    """Arrays in memory and in chunks, channels first or last, one volume or several."""
    frames = np.stack([two_channels((40, 45)), two_channels((40, 45))[::-1]])
    operator = operator_for(folders / "channels", frames[0], 500, normalization=LIMITS)
    expected = np.stack([operator(frame) for frame in frames])
    assert expected.max() > 5
    parameters = {"prob_thresh": operator.prob_thresh, "normalization": LIMITS}
    for image, axes, labels in [
        (frames, "tyxc", expected),
        (np.moveaxis(frames, -1, 1), "tcyx", expected),
        (frames[0], "yxc", expected[0]),
        (np.moveaxis(frames[0], -1, 0), "cyx", expected[0]),
    ]:
        whole = segment(image, operator.model, axes=axes, **parameters)
        assert whole.dtype == np.int32
        np.testing.assert_array_equal(whole, labels)
        chunks = {axes.index(axis): n for axis, n in {"c": 1, "y": 17, "x": 30}.items()}
        lazy = segment(da.from_array(image).rechunk(chunks), operator.model, axes=axes, **parameters)
        assert (lazy.shape, lazy.dtype, lazy.chunks[-2:]) == (
            labels.shape,
            np.int32,
            ((17, 17, 6), (30, 15)),
        )
        np.testing.assert_array_equal(lazy.compute(scheduler="sync"), labels)


def test_lazy_percentiles_are_those_of_every_channel(folders):
    image = two_channels((40, 45))
    expected = segment(image, folders / "channels", axes="yxc", prob_thresh=0.6)
    chunked = da.from_array(image, chunks=(17, 30, 1))
    lazy = segment(chunked, folders / "channels", axes="yxc", prob_thresh=0.6)
    assert expected.max() > 5
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)


@pytest.mark.parametrize(("shape", "axes"), [((3, 40, 45), "cyx"), ((40, 45), "yx"), ((2, 40, 45), "tyx")])
def test_an_image_without_the_channels_of_the_network_is_refused(folders, shape, axes):
    for image in (np.zeros(shape, np.uint16), da.zeros(shape, dtype=np.uint16)):
        with pytest.raises(ValueError, match=f"takes 2 channels together, but .* `axes` '{axes}' has"):
            segment(image, folders / "channels", axes=axes)


# Background


class Recording(StarDist):
    """Notes the shapes of what the network is given."""

    def _run(self, image):
        self.__dict__.setdefault("seen", []).append(image.shape)
        return super()._run(image)


def half_dark(shape):
    """Objects in the upper half, background of 110 in the lower one."""
    image = image_of(shape, seed=2)
    image[shape[0] // 2 :] = 110
    return image


@pytest.mark.parametrize("scale", [None, 1.6, (0.5, 0.9)])
def test_candidates_lie_on_voxels_above_the_limit_whatever_the_grid(folders, scale):
    image = half_dark((80, 60))
    parameters = {"prob_thresh": 0.5, "normalization": NORMALIZATION, "scale": scale}
    expected = untiled_candidates(StarDist(folders / "classes", **parameters), image)
    voxels = np.rint(expected["points"] / np.array(scale or 1.0)).astype(int)
    bright = image[tuple(voxels.T)] > 500
    assert 30 < bright.sum() < len(bright) / 2
    operator = StarDist(folders / "classes", **parameters, skip_below=500)
    for edges in [((0, 80), (0, 60)), ((0, 11, 45, 80), (0, 30, 60)), (range(0, 81, 8), range(0, 61, 10))]:
        table = detected(operator, image, tuple(map(tuple, edges)))
        assert_same_candidates(table, {key: rows[bright] for key, rows in expected.items()})


def test_the_network_is_not_run_where_a_core_is_dark(folders):
    image = half_dark((80, 60))
    operator = Recording(folders / "2d", prob_thresh=0.5, normalization=NORMALIZATION, skip_below=200.5)
    grid = BlockGrid(((0, 40, 80), (0, 60)), operator.halo(image.shape))
    bright, dark = (operator.detect(image[block.read], block) for block in grid)
    assert len(operator.seen) == 1
    assert len(bright["prob"]) > 30
    assert {key: (rows.dtype, rows[:0].shape) for key, rows in bright.items()} == {
        key: (rows.dtype, rows.shape) for key, rows in dark.items()
    }


def test_nothing_is_skipped_by_default(folders):
    operator = Recording(folders / "2d", normalization=NORMALIZATION)
    image = np.zeros((32, 32), np.uint16)
    operator.detect(image, Block.whole(image.shape))
    assert len(operator.seen) == 1


def test_a_core_between_two_points_of_the_prediction_needs_no_network(folders):
    operator = Recording(folders / "2d", prob_thresh=0, normalization=NORMALIZATION)
    image = image_of((32, 32))
    block = Block.around((slice(7, 8), slice(0, 32)), image.shape, operator.halo(image.shape))
    assert not len(operator.detect(image[block.read], block)["prob"])
    assert not hasattr(operator, "seen")


def test_a_dark_block_is_still_checked(folders):
    image = np.zeros((32, 32), np.float32)
    image[3, 4] = np.nan
    operator = StarDist(folders / "2d", normalization=NORMALIZATION, skip_below=100)
    with pytest.raises(NonFiniteError):
        operator.detect(image, Block.whole(image.shape))


@pytest.mark.parametrize("skip_below", [float("nan"), float("inf")])
def test_a_limit_that_is_no_intensity_is_refused(folders, skip_below):
    with pytest.raises(ValueError, match="`skip_below` must be a finite intensity"):
        StarDist(folders / "2d", skip_below=skip_below)


# Too many candidates


def test_a_block_of_noise_is_refused_before_memory_is_taken(folders):
    operator = StarDist(folders / "classes", prob_thresh=0, normalization=(0, 400))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (1100, 1100)).astype(np.uint16)
    block = Block.whole(image.shape)
    operator.detect(image[:32, :32], Block.whole((32, 32)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="candidate_share") as error:
            operator.detect(image, block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    n = 1096**2
    assert str(error.value).startswith(
        f"block (0, 0) (core 0:1100, 0:1100): {n} of {n} points (100%) score more than `prob_thresh` 0, "
        f"at most {n // 4} may"
    )
    for fix in ("check `normalization` (0.0, 400.0)", "raise `prob_thresh`"):
        assert fix in str(error.value)
    # One table of them would take 4 bytes per ray (16), and there would be three copies.
    assert peak < n * 4 * 16


def test_small_blocks_are_never_refused(folders):
    operator = StarDist(folders / "classes", prob_thresh=0, normalization=(0, 400), candidate_share=0.001)
    image = np.random.default_rng(0).integers(0, 200, (200, 150)).astype(np.uint16)
    assert len(operator.detect(image, Block.whole(image.shape))["prob"]) == 196 * 146


def test_memory_is_planned_for_the_share_of_candidates_that_is_accepted(folders):
    some, all_points = (StarDist(folders / "classes", candidate_share=share) for share in (0.75, 1))
    more = all_points.memory_nbytes((4096, 4096)) - some.memory_nbytes((4096, 4096))
    # 16 distances, score and three class probabilities of a candidate, in three copies.
    assert more == 4096**2 // 4 * 3 * 4 * 20


@pytest.mark.parametrize("share", [0, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(folders, share):
    with pytest.raises(ValueError, match="`candidate_share` must be above 0 and at most 1"):
        StarDist(folders / "2d", candidate_share=share)

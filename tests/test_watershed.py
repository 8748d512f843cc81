"""The watershed: the definition by a plain implementation, every block grid, jobs, and objects of other programs."""

import heapq
import itertools

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.segmentation import watershed as flooding

import chunkrestore as cr
from chunkrestore.api import apply
from chunkrestore.cli import main
from chunkrestore.grid import BlockGrid
from chunkrestore.kernels.distance import clipped_distance
from chunkrestore.metrics import match_instances
from chunkrestore.operators.base import JoiningOperator
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.operators.smoothing import Gaussian
from chunkrestore.operators.threshold import LocalThreshold, Threshold
from chunkrestore.operators.watershed import Watershed
from chunkrestore.statistics import NonFiniteError
from chunkrestore.stitch.objects import number_objects

SERIAL = {"cluster": "serial", "quiet": True}


def in_blocks(operator, image, grid):
    tables = {block.index: operator.detect(image[block.read], block) for block in grid}
    objects = number_objects(operator, grid, tables)
    labels = np.full(image.shape, -1)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


def plain(operator, image, spacing):
    """Segment a whole volume by the definition, voxel by voxel."""
    mask = image > operator.value
    height = np.asarray(image, np.float32)
    if operator.landscape == "distance":
        height = np.sqrt(plain_squares(mask, spacing, operator.max_distance))
    if operator.smoothing:
        sigma = [operator.smoothing / s for s in spacing]
        height = ndimage.gaussian_filter(height, sigma, output=np.float32)
    order = {v: (height[v], v) for v in map(tuple, np.argwhere(mask).tolist())}
    steps = [s for s in itertools.product((-1, 0, 1), repeat=mask.ndim) if any(s)]

    def neighbours(voxel):
        near = (tuple(a + s for a, s in zip(voxel, step, strict=True)) for step in steps)
        return [v for v in near if v in order]

    def apart(a, b):
        return sum(((p - q) * s) ** 2 for p, q, s in zip(a, b, spacing, strict=True))

    def uphill(voxel):
        def slope(there):
            return (float(height[there]) - float(height[voxel])) * (1 / apart(there, voxel) ** 0.5)

        higher = [v for v in neighbours(voxel) if order[v] > order[voxel]]
        return max(higher, key=lambda v: (slope(v), order[v])) if higher else flood(voxel)

    def flood(summit):
        heap, seen = [(-height[summit], tuple(-i for i in summit))], {summit}
        while heap:
            voxel = tuple(-i for i in heapq.heappop(heap)[1])
            if order[voxel] > order[summit]:
                return voxel
            for v in neighbours(voxel):
                if v not in seen and apart(v, summit) <= operator.min_distance**2 * (1 + 1e-9):
                    seen.add(v)
                    heapq.heappush(heap, (-height[v], tuple(-i for i in v)))
        return summit

    pointer = {v: uphill(v) for v in order}
    labels, ids = np.zeros(mask.shape, int), {}
    for voxel in sorted(order):
        root = voxel
        while pointer[root] != root:
            root = pointer[root]
        labels[voxel] = ids.setdefault(root, len(ids) + 1)
    return labels


def plain_squares(mask, spacing, limit):
    """Return squared distances to the background, float32: of all background voxels, x added first."""
    result = np.where(mask, np.float32(limit) ** 2, np.float32(0))
    places = np.indices(mask.shape)
    for voxel in np.argwhere(~mask):
        squares = [((p - v) * s).astype(float) ** 2 for p, v, s in zip(places, voxel, spacing, strict=True)]
        total = squares[-1].astype(np.float32)
        for square in squares[-2::-1]:
            total = square.astype(np.float32) + total
        result = np.minimum(result, total)
    return result


@st.composite
def scenes(draw, shapes):
    """Draw an image in which blobs touch, with plateaus and equal values, and the length of a voxel's edges."""
    shape, spacing = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    sigma = [draw(st.sampled_from([0.8, 1.6])) / s for s in spacing]
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    levels = draw(st.sampled_from([4, 40, 4000]))
    return np.round((noise - noise.min()) / np.ptp(noise) * levels).astype(np.uint16), spacing


def drawn_operator(draw, image, spacing):
    limit = draw(st.sampled_from([1.7, 3.0]))
    return Watershed(
        float(np.percentile(image, draw(st.sampled_from([20, 50, 70])))),
        min_distance=draw(st.sampled_from([1.0, 2.0, 2.9])),
        max_distance=limit,
        landscape=draw(st.sampled_from(["distance", "intensity"])),
        smoothing=draw(st.sampled_from([0.0, 0.5])),
        voxel_size=spacing,
    )


SMALL = [
    ((6, 7, 8), (1.0, 1.0, 1.0)),
    ((4, 9, 8), (2.0, 0.7, 0.9)),
    ((15, 14), (1.0, 1.0)),
    ((1, 13, 12), (3.0, 1.0, 1.0)),
]
LONG = [
    ((44, 7, 8), (1.0, 1.0, 1.0)),
    ((5, 40, 9), (2.3, 0.7, 0.9)),
    ((46, 45), (1.0, 0.6)),
    ((1, 41, 12), (3.0, 1.0, 1.0)),
]
"""Longer than two halos and a core, so that blocks do not read the whole volume."""


@settings(deadline=None, max_examples=25)
@given(scenes(SMALL), st.data())
def test_labels_are_those_of_a_plain_implementation(scene, data):
    image, spacing = scene
    operator = drawn_operator(data.draw, image, spacing)
    np.testing.assert_array_equal(operator(image), plain(operator, image, spacing))


@settings(deadline=None, max_examples=60)
@given(scenes(LONG), st.data())
def test_labels_of_blocks_are_those_of_the_whole_for_every_grid(scene, data):
    image, spacing = scene
    operator = drawn_operator(data.draw, image, spacing)
    if data.draw(st.booleans()):
        local = LocalThreshold(data.draw(st.sampled_from(["sauvola", "mean"])), 5, dynamic_range=40.0)
        operator = Watershed(
            local=local,
            **{key: getattr(operator, key) for key in ("min_distance", "max_distance", "voxel_size")},
        )
    edges = tuple(
        (0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=5))), n) if n > 1 else (0, 1)
        for n in image.shape
    )
    grid = BlockGrid(edges, operator.halo(image.shape))
    np.testing.assert_array_equal(in_blocks(operator, image, grid), operator(image))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.6, 0.4)])
def test_distances_are_those_of_scipy_up_to_the_clip(spacing):
    mask = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=(20, 30, 40)), 2) > 0
    expected = np.minimum(ndimage.distance_transform_edt(mask, sampling=spacing), 3.3)
    assert (expected == 3.3).any()
    found = clipped_distance(mask, spacing, 3.3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7)


def nuclei(shape=(40, 72, 72), n=70, seed=1, squash=1.0):
    """Paint ellipsoids that touch, lit alike and noisy; return image (float32) and truth."""
    rng = np.random.default_rng(seed)
    zyx = np.stack(np.indices(shape), axis=-1) * (squash, 1, 1)
    centres, distance = [], np.full(shape, np.inf)
    truth = np.zeros(shape, np.int32)
    for _ in range(40 * n):
        centre = rng.uniform(0, 1, 3) * (shape[0] * squash, *shape[1:])
        if len(centres) == n or any(np.linalg.norm(centre - c) < 9.5 for c in centres):
            continue
        centres.append(centre)
        near = np.sqrt((((zyx - centre) / rng.uniform(5, 7, 3)) ** 2).sum(axis=-1))
        truth[near < np.minimum(distance, 1)] = len(centres)
        distance = np.minimum(distance, near)
    image = ndimage.gaussian_filter((truth > 0) * 100.0, [1 / squash, 1, 1])
    return (image + rng.normal(0, 8, shape)).astype(np.float32), truth


def flooded(mask, min_distance, max_distance, smoothing):
    """Segment with scikit-image: the same landscape, seeds by its own rule, flooded in one order."""
    height = np.minimum(ndimage.distance_transform_edt(mask), max_distance)
    height = ndimage.gaussian_filter(height, smoothing)
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    peaks = peak_local_max(height, min_distance=min_distance, labels=parts, exclude_border=False)
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return flooding(-height, markers, mask=mask)


def test_touching_nuclei_are_split_as_by_scikit_image_and_as_they_are():
    image, truth = nuclei()
    smooth = Gaussian(1.0)(image)
    labels = Watershed(50.0, min_distance=4)(smooth)
    peer = flooded(smooth > 50, 4, 12, 4 / 3).astype(np.int32)
    assert match_instances(peer, labels).f1 > 0.95
    assert match_instances(truth, labels).f1 > 0.98
    assert match_instances(truth, Threshold(50.0)(smooth)).f1 < 0.4
    np.testing.assert_array_equal(labels > 0, smooth > 50)


def test_planes_far_apart_are_told_by_their_distance():
    image, truth = nuclei((20, 72, 72), squash=2.0)
    smooth = Gaussian(0.7, (2.0, 1.0, 1.0))(image)
    assert match_instances(truth, Watershed(50.0, min_distance=5, voxel_size=(2, 1, 1))(smooth)).f1 > 0.98
    # As if voxels were cubes, nuclei above each other are nearer than they are.
    assert match_instances(truth, Watershed(50.0, min_distance=5)(smooth)).f1 < 0.92


@pytest.mark.parametrize("landscape", ["distance", "intensity"])
def test_constant_volumes_have_no_object_or_one(landscape):
    image = np.full((12, 40, 33), 7, np.uint8)
    operator = Watershed(7.0, landscape=landscape)
    assert not operator(image).any()
    grid = BlockGrid.regular(image.shape, (5, 9, 12), operator.halo(image.shape))
    assert not in_blocks(operator, image, grid).any()
    one = Watershed(6.0, landscape=landscape)
    np.testing.assert_array_equal(in_blocks(one, image, grid), 1)
    np.testing.assert_array_equal(one(image), 1)


def test_a_ball_with_twice_the_largest_radius_stays_in_one_piece():
    z, y, x = np.ogrid[-13:14, -13:14, -13:14]
    ball = (z**2 + y**2 + x**2 < 12.5**2).astype(np.uint8)
    labels = Watershed(0.5, min_distance=3, max_distance=6)(ball)
    np.testing.assert_array_equal(labels, ball)


def test_objects_across_background_stay_apart_however_near():
    image = np.zeros((1, 9, 19), np.uint8)
    image[0, 1:8, 1:9] = image[0, 1:8, 10:18] = 1
    labels = Watershed(0.5, min_distance=30)(image)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, image)


def test_lazy_labels_with_otsus_threshold_equal_eager_ones():
    image, _ = nuclei((24, 40, 40), 20)
    expected = Watershed(min_distance=3)(image)
    np.testing.assert_array_equal(apply(Watershed(min_distance=3), image), expected)
    lazy = apply(Watershed(min_distance=3), da.from_array(image[None], chunks=(1, 10, 17, 40)), axes="czyx")
    assert lazy.dtype == np.int32
    np.testing.assert_array_equal(lazy[0].compute(scheduler="threads"), expected)


def test_a_job_of_smoothing_and_watershed_equals_eager(tmp_path, capsys):
    image = np.round(nuclei((24, 60, 64), 40)[0] + 100).astype(np.uint16)
    store = tmp_path / "in.zarr"
    cr.write_image(image, store, axes="zyx", voxel_size=(0.4, 0.4, 0.4), chunks=(8, 16, 16))
    local = LocalThreshold("mean", 21, offset=-30.0)
    steps = [
        Gaussian(0.5, (0.4, 0.4, 0.4)),
        Watershed(percentile=60.0, local=local, min_distance=1.2, voxel_size=(0.4, 0.4, 0.4)),
    ]
    expected = steps[1](steps[0](image))
    assert 25 < expected.max() < 60
    cr.run(steps, store, tmp_path / "out.zarr", block_shape=(16, 32, 48), **SERIAL)
    found = cr.open_image(tmp_path / "out.zarr").label("labels").data.compute()
    np.testing.assert_array_equal(found, expected)
    options = (
        "--method watershed --smooth 0.5 --percentile 60 --local-threshold mean --window 21 --offset -30"
    )
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "segment",
                str(store),
                str(tmp_path / "cli.zarr"),
                *options.split(),
                "--min-distance",
                "1.2",
                "--micrometres",
                "--block",
                "24,32,32",
                "--cluster",
                "serial",
                "-q",
            ]
        )
    assert stopped.value.code == 0, capsys.readouterr().err
    np.testing.assert_array_equal(
        cr.open_image(tmp_path / "cli.zarr").label("labels").data.compute(), expected
    )


def test_a_saved_watershed_describes_itself_as_before(tmp_path):
    operator = Watershed(3.0, local=LocalThreshold("sauvola", (3, 5, 5), k=0.3), voxel_size=[2, 1, 1])
    save_operators([operator], tmp_path)
    assert load_operators(tmp_path) == [operator]
    assert isinstance(operator, JoiningOperator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": float("inf")}, "`value` must be finite"),
        ({"value": 3.0, "percentile": 5.0}, "not both"),
        ({"percentile": 101.0}, "`percentile` must lie between 0 and 100"),
        ({"min_distance": 0.0}, "`min_distance` must be finite and above 0"),
        ({"max_distance": float("nan")}, "`max_distance` must be finite and above 0"),
        ({"smoothing": -1.0}, "`smoothing` must be finite and at least 0"),
        ({"landscape": "height"}, "`landscape` must be 'distance' or 'intensity'"),
        ({"voxel_size": (1.0, 0.0)}, "`voxel_size` must be a finite number above 0"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Watershed(**arguments)


def test_what_does_not_suit_the_image_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match=r"`voxel_size` .* one number per axis"):
        Watershed(1.0, voxel_size=(1.0, 1.0)).check((5, 6, 7), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="spatial axes"):
        Watershed(1.0).check((5,), np.dtype(np.uint8))
    with pytest.raises(NonFiniteError, match="NaN"):
        Watershed(1.0)(np.full((4, 4), np.nan, np.float32))


def test_options_of_another_method_are_refused(tmp_path, capsys):
    for options, message in [
        (["threshold", "--min-distance", "3"], "`--min-distance` means nothing to --method threshold"),
        (["threshold", "--window", "5"], "`--window` belongs to a local threshold"),
        (["stardist", "--value", "5"], "`--value` means nothing to --method stardist"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["segment", str(tmp_path / "in.zarr"), "--method", *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

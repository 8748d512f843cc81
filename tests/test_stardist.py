"""StarDist block by block against StarDist's own prediction of the whole volume."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops
from star_networks import NORMALIZATION, image_of, normalized, save_network

from chunkrestore import models
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.operators.base import JoiningOperator, SettlingOperator, concatenate
from chunkrestore.operators.stardist import StarDist
from chunkrestore.simulate import embryo
from chunkrestore.statistics import NonFiniteError, of_array
from chunkrestore.stitch.objects import number_objects

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
pytest.importorskip("stardist", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIGS = {
    # Name: dimensions, parameters, mean radius of objects in voxels.
    "3d-grid1": (3, {"n_rays": 32, "grid": (1, 1, 1), "unet_n_depth": 1, "anisotropy": (1.5, 1, 1)}, 4),
    "3d-grid2": (3, {"n_rays": 32, "grid": (1, 2, 2), "unet_n_depth": 2}, 7),
    "3d-resnet": (3, {"n_rays": 32, "grid": (1, 2, 2), "backbone": "resnet", "resnet_n_blocks": 2}, 6),
    "2d": (2, {"n_rays": 32, "grid": (2, 2), "unet_n_depth": 2}, 9),
    "classes": (2, {"n_rays": 16, "grid": (1, 1), "unet_n_depth": 1, "n_classes": 2}, 6),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    basedir = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        save_network(basedir, name, *config)
    return basedir


def range_edges(n, step=5):
    return (*range(0, n, step), n)


def threshold_for(folder, image, n_candidates):
    """Return a probability threshold with about so many candidates in the untiled prediction.

    StarDist takes none in a border of two points.
    """
    model = models.load(folder)
    prob = model.predict(normalized(image), n_tiles=None, show_tile_progress=False)[0]
    inner = prob[(slice(2, -2),) * prob.ndim]
    return float(np.sort(inner, axis=None)[-n_candidates - 1])


def untiled(operator, image):
    """Return labels and points of StarDist's own prediction."""
    labels, details = models.load(operator.model).predict_instances(
        normalized(image, *operator.normalization),
        prob_thresh=operator.prob_thresh,
        nms_thresh=operator.nms_thresh,
        n_tiles=None,
    )
    return labels, details["points"]


def settled(operator, image, grid):
    """Detect in every block and settle against all other blocks until nothing changes.

    Returns the tables, and the rounds that changed something. Nothing here knows how far objects reach.
    """
    decided = {b.index: operator.decide(operator.detect(image[b.read], b)) for b in grid}
    tables = dict(decided)
    n_rounds = 0
    while True:
        new = {b.index: operator.settle(decided[b.index], others(operator, tables, b), b) for b in grid}
        changed = any((new[i]["kept"] != tables[i]["kept"]).any() for i in new)
        tables = new
        if not changed:
            return tables, n_rounds
        n_rounds += 1


def others(operator, tables, block):
    """Return the survivors of all other blocks."""
    return concatenate(operator.survivors(table) for index, table in tables.items() if index != block.index)


def tiled(operator, image, edges):
    """Return labels and points, block by block; images and tables are all that passes between steps."""
    operator.check(image.shape, image.dtype)
    grid = BlockGrid(edges, operator.halo(image.shape))
    tables, n_rounds = settled(operator, image, grid)
    objects = concatenate(
        operator.measure(operator.survivors(tables[b.index]), others(operator, tables, b), b) for b in grid
    )
    objects["ids"] = np.argsort(np.argsort(objects["key"])) + 1
    labels = np.full(image.shape, -1, np.int64)
    for block in grid:
        labels[block.core] = operator.paint(block, [objects])
    assert_measured(objects, labels)
    return labels, np.concatenate([operator.survivors(t)["points"] for t in tables.values()]), n_rounds


def assert_measured(objects, labels):
    """What is known of the objects is what the labels show; ids have no gaps."""
    found = {region.label: region for region in regionprops(labels)}
    assert sorted(found) == sorted(objects["ids"]) == list(range(1, len(found) + 1))
    for row, label in enumerate(objects["ids"]):
        assert objects["volume"][row] == found[label].area
        assert (*objects["first"][row], *(objects["last"][row] + 1)) == found[label].bbox
        np.testing.assert_array_equal(objects["sum"][row], found[label].coords.sum(axis=0))


def assert_same_instances(labels, expected):
    """Every voxel agrees, up to one one-to-one map of ids."""
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs[:, 0].tolist() == [0, 0]
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def assert_same_points(points, expected):
    assert sorted(map(tuple, points.tolist())) == sorted(map(tuple, np.asarray(expected).tolist()))


def operator_for(folders, name, image, n_candidates, **kwargs):
    folder = folders / name
    prob = threshold_for(folder, image, n_candidates)
    return StarDist(folder, prob_thresh=prob, normalization=NORMALIZATION, **kwargs)


# Tiled equals untiled


@pytest.fixture(scope="session")
def case_3d(folders):
    """A volume no length of which is a multiple of the pooling grid, 2, and its untiled instances."""
    image = image_of((23, 37, 35))
    operator = operator_for(folders, "3d-grid1", image, 150)
    labels, points = untiled(operator, image)
    assert len(points) > 30
    return operator, image, labels, points


@pytest.fixture(scope="session")
def whole_3d(case_3d):
    operator, image, *_ = case_3d
    return operator(image)


@pytest.mark.parametrize(
    "edges",
    [
        ((0, 23), (0, 20, 37), (0, 20, 35)),
        ((0, 9, 13, 23), (0, 17, 37), (0, 1, 30, 35)),
        (range_edges(23, 8), (0, 19, 37), range_edges(35, 12)),
    ],
    ids=["even", "uneven", "smaller than objects"],
)
def test_tiled_3d_instances_are_those_of_the_whole(case_3d, whole_3d, edges):
    operator, image, expected, expected_points = case_3d
    labels, points, n_rounds = tiled(operator, image, edges)
    assert n_rounds > 0
    assert_same_points(points, expected_points)
    assert_same_instances(labels, expected)
    # Ids are the same for every grid.
    np.testing.assert_array_equal(labels, whole_3d)


@settings(max_examples=12)
@given(st.data())
def test_instances_do_not_depend_on_the_grid(case_3d, whole_3d, data):
    operator, image, *_ = case_3d
    edges = tuple((0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3))), n) for n in image.shape)
    grid = BlockGrid(edges, operator.halo(image.shape))
    objects = number_objects(operator, grid, {b.index: operator.detect(image[b.read], b) for b in grid})
    for block in grid:
        np.testing.assert_array_equal(operator.paint(block, objects.at(block.index)), whole_3d[block.core])


@pytest.fixture(scope="session")
def demo_case():
    """Crowded simulated nuclei and the trained network that ships with the package."""
    image = embryo((30, 60, 66), seed=12, arrangement="tissue").image
    operator = StarDist("stardist3d-demo")
    operator = operator.resolve(of_array(image, operator.needs))
    labels, points = untiled(operator, image)
    assert len(points) > 25
    return operator, image, labels, points


@pytest.mark.parametrize(
    "edges",
    [
        ((0, 30), (0, 32, 60), (0, 32, 66)),
        ((0, 13, 30), (0, 60), (0, 9, 27, 66)),
        ((0, 8, 16, 24, 30), (0, 15, 30, 45, 60), (0, 33, 66)),
    ],
    ids=["even", "uneven", "smaller than nuclei"],
)
def test_a_trained_network_finds_the_nuclei_of_the_whole(demo_case, edges):
    operator, image, expected, expected_points = demo_case
    labels, points, _ = tiled(operator, image, edges)
    assert_same_points(points, expected_points)
    assert_same_instances(labels, expected)


@pytest.mark.parametrize(
    ("name", "shape", "n_candidates", "grids"),
    [
        (
            "3d-grid2",
            (22, 50, 61),
            120,
            [((0, 22), (0, 25, 50), (0, 33, 61)), ((0, 7, 22), (0, 50), (0, 13, 14, 61))],
        ),
        ("3d-resnet", (20, 44, 40), 120, [((0, 11, 20), (0, 22, 44), (0, 19, 40))]),
        (
            "2d",
            (150, 133),
            1500,
            [
                ((0, 64, 128, 150), (0, 64, 128, 133)),
                ((0, 5, 99, 150), (0, 66, 133)),
                (range_edges(150, 15), (0, 7, 21, 133)),
            ],
        ),
        ("classes", (90, 71), 2000, [((0, 40, 90), (0, 33, 71)), ((0, 90), (0, 7, 14, 40, 71))]),
    ],
)
def test_other_networks_also_find_the_instances_of_the_whole(folders, name, shape, n_candidates, grids):
    image = image_of(shape, seed=4)
    operator = operator_for(folders, name, image, n_candidates)
    expected, expected_points = untiled(operator, image)
    assert len(expected_points) > 10
    for edges in grids:
        labels, points, _ = tiled(operator, image, edges)
        assert_same_points(points, expected_points)
        assert_same_instances(labels, expected)
    assert_same_instances(operator(image), expected)


def test_real_nuclei_of_stardist_are_the_same_tiled(folders):
    """The volume that StarDist ships, cropped; the network is random, the image is not."""
    from stardist.data import test_image_nuclei_3d

    image = test_image_nuclei_3d()[:, :40].astype(np.uint16)
    operator = operator_for(folders, "3d-grid1", image, 250)
    expected, expected_points = untiled(operator, image)
    for edges in [((0, 15, 31), (0, 40), (0, 29, 57)), ((0, 31), (0, 10, 20, 30, 40), (0, 57))]:
        labels, points, _ = tiled(operator, image, edges)
        assert_same_points(points, expected_points)
        assert_same_instances(labels, expected)


def test_one_object_may_span_any_number_of_blocks(folders):
    """A single candidate, radius 7, in cores of 5 voxels."""
    image = image_of((24, 32, 32), seed=2)
    operator = operator_for(folders, "3d-grid2", image, 1)
    expected, expected_points = untiled(operator, image)
    assert len(expected_points) == 1
    labels, points, _ = tiled(operator, image, tuple(range_edges(n) for n in image.shape))
    assert_same_points(points, expected_points)
    np.testing.assert_array_equal(labels, expected)
    blocks = {tuple(v // 5) for v in np.argwhere(labels)}
    assert len(blocks) >= 12


@pytest.mark.parametrize("shape", [(9, 7, 30), (3, 3, 30)])
def test_thin_volumes_are_padded_as_by_stardist(folders, shape):
    """Of an axis shorter than five points StarDist takes no candidate."""
    image = image_of(shape, seed=3)
    operator = StarDist(folders / "3d-grid1", prob_thresh=0.5, normalization=NORMALIZATION)
    expected, expected_points = untiled(operator, image)
    assert (len(expected_points) > 0) == (min(shape) > 4)
    labels, points, _ = tiled(operator, image, ((0, 2, shape[0]), (0, 2, shape[1]), (0, 16, 30)))
    assert_same_points(points, expected_points)
    assert_same_instances(labels, expected)


def test_no_objects_is_no_error(folders):
    image = image_of((20, 24, 24))
    operator = StarDist(folders / "3d-grid1", prob_thresh=0.9999, normalization=NORMALIZATION)
    labels, points, n_rounds = tiled(operator, image, ((0, 20), (0, 12, 24), (0, 24)))
    assert (labels == 0).all()
    assert (points.shape, n_rounds) == ((0, 3), 0)
    whole = operator(image)
    assert whole.dtype == np.int32
    assert not whole.any()


def test_the_driver_of_the_product_gives_the_same_labels(case_3d, whole_3d):
    operator, image, *_ = case_3d
    grid = BlockGrid(((0, 12, 23), (0, 37), (0, 20, 35)), operator.halo(image.shape))
    tables = {block.index: operator.detect(image[block.read], block) for block in grid}
    objects = number_objects(operator, grid, tables)
    assert objects.n_objects == whole_3d.max()
    assert objects.n_rounds > 1
    for block in grid:
        labels = operator.paint(block, objects.at(block.index))
        np.testing.assert_array_equal(labels, whole_3d[block.core])


# Statistics, tables, parameters


def test_percentiles_of_the_whole_volume_normalise_every_block(folders):
    image = image_of((60, 64), seed=5)
    image[:30] //= 2
    operator = StarDist(folders / "classes", prob_thresh=0.6, percentiles=(2, 98))
    assert operator.needs == {2.0, 98.0}
    resolved = operator.resolve(of_array(image, operator.needs))
    assert resolved.normalization == tuple(np.percentile(image, (2, 98)))
    assert not resolved.needs
    labels, points, _ = tiled(resolved, image, ((0, 30, 60), (0, 64)))
    assert len(points) > 5
    np.testing.assert_array_equal(labels, operator(image))


def test_tables_are_what_the_contract_says(case_3d):
    operator, image, *_ = case_3d
    assert isinstance(operator, SettlingOperator)
    assert not isinstance(operator, JoiningOperator)
    block = Block.whole(image.shape)
    before = image.copy()
    detected = operator.detect(image, block)
    np.testing.assert_array_equal(image, before)
    n = len(detected["prob"])
    columns = {"prob": ("float32", (n,)), "dist": ("float32", (n, 32)), "points": ("int64", (n, 3))}
    assert described(detected) == columns
    decided = operator.decide(detected)
    assert described(decided) == columns | {"kept0": ("bool", (n,)), "kept": ("bool", (n,))}
    survivors = operator.survivors(decided)
    assert list(survivors) == list(columns)
    assert len(survivors["prob"]) == decided["kept"].sum() < n
    objects = operator.measure(survivors, {}, block)
    m = len(objects["prob"])
    whole = {"key": ("int64", (m,)), "volume": ("int64", (m,))}
    assert described(objects) == {
        k: (d, (m, *s[1:])) for k, (d, s) in columns.items()
    } | whole | dict.fromkeys(("sum", "first", "last"), ("int64", (m, 3)))
    assert operator.radius(detected) == pytest.approx(detected["dist"].max() + 1.5, abs=1e-5)
    assert operator.radius({key: column[:0] for key, column in detected.items()}) is None


def described(table):
    return {key: (column.dtype.name, column.shape) for key, column in table.items()}


def test_ids_beyond_int32_are_painted_as_int64(case_3d):
    operator, image, *_ = case_3d
    block = Block.whole(image.shape)
    objects = number_objects(
        operator, BlockGrid.regular(image.shape, image.shape), {block.index: operator.detect(image, block)}
    ).at(block.index)
    small = operator.paint(block, objects)
    (own,) = objects
    large = operator.paint(block, [own | {"ids": own["ids"] + 2**31}])
    assert (small.dtype, large.dtype) == (np.int32, np.int64)
    np.testing.assert_array_equal(np.where(large, large - 2**31, 0), small)


def test_thresholds_are_the_models_own_unless_given(folders):
    operator = StarDist(folders / "2d")
    assert (operator.prob_thresh, operator.nms_thresh) == (0.5, 0.3)
    operator = StarDist(folders / "2d", prob_thresh=0, nms_thresh=0.75)
    assert (operator.prob_thresh, operator.nms_thresh) == (0, 0.75)


def test_the_halo_is_the_receptive_field_on_the_pooling_grid(folders):
    assert StarDist(folders / "2d").halo((100, 100)).align == (8, 8)
    # Depth 1 and kernels of 3: ceil((1 + 2) / 2) + 2 = 4 below, 2 * 4 + 2 = 10 above.
    assert StarDist(folders / "3d-grid1").halo((9, 9, 9)) == Halo((10, 10, 10), (2, 2, 2))
    assert StarDist(folders / "3d-grid1", depth=17).halo((9, 9, 9)).depth == (17, 17, 17)


def test_a_larger_depth_changes_nothing(case_3d, whole_3d):
    operator, image, *_ = case_3d
    labels, _, _ = tiled(replace(operator, depth=(10, 14, 12)), image, ((0, 23), (0, 21, 37), (0, 35)))
    np.testing.assert_array_equal(labels, whole_3d)


def test_the_description_identifies_the_result(folders):
    operator = StarDist(folders / "2d", normalization=(0, 10), depth=96)
    description = json.loads(json.dumps(operator.describe()))
    assert description == {
        "operator": "stardist",
        "model": "2d",
        "model_digest": models.digest(folders / "2d"),
        "prob_thresh": 0.5,
        "nms_thresh": 0.3,
        "scale": None,
        "skip_below": None,
        "suppression": "exact",
        "normalization": [0.0, 10.0],
        "percentiles": [1.0, 99.8],
        "depth": [96, 96],
        "precision": "float32",
        "class_names": None,
    }


def test_an_operator_travels_to_other_processes(folders):
    operator = StarDist(folders / "2d", normalization=(0, 10))
    copy = pickle.loads(pickle.dumps(operator))
    assert copy == operator
    assert copy.describe() == operator.describe()


def test_blocks_may_be_detected_in_threads(case_3d):
    operator, image, *_ = case_3d
    grid = BlockGrid(((0, 23), (0, 20, 37), (0, 20, 35)), operator.halo(image.shape))
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda b: operator.detect(image[b.read], b), grid))
    for block, table in zip(grid, threaded, strict=True):
        alone = operator.detect(image[block.read], block)
        for key, column in alone.items():
            np.testing.assert_array_equal(table[key], column)


def test_nothing_is_printed(case_3d, capfd):
    operator, image, *_ = case_3d
    replace(operator, prob_thresh=0.97)(image[:12])
    assert capfd.readouterr().out == ""


MEASURE = """
import numpy as np
from chunkrestore.operators.stardist import StarDist
from chunkrestore.grid import Block
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
operator = StarDist("stardist3d-demo", normalization=(100, 300))
image = np.random.default_rng(0).integers(100, 200, (64, 160, 158)).astype(np.uint16)
operator.detect(image[:32, :32, :32], Block.whole((32, 32, 32)))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
operator.detect(image, Block.whole(image.shape))
print((status("VmHWM") - before) / operator.memory_nbytes(image.shape))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_memory_formula_is_the_measured_peak_within_a_third():
    output = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    ).stdout
    assert 0.66 < float(output) <= 1.0


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prob_thresh": 1.0}, "`prob_thresh` must be at least 0 and less than 1, got 1.0"),
        ({"prob_thresh": float("nan")}, "`prob_thresh` must be"),
        ({"nms_thresh": -0.1}, "`nms_thresh` must be at least 0"),
        ({"percentiles": (99, 1)}, "`percentiles` must rise"),
        ({"normalization": (5, 5)}, "`normalization` must be two finite numbers"),
        ({"depth": 8}, "`depth` 8 is less than what the network looks at"),
        ({"digest": "0" * 64}, "is not the expected one"),
    ],
)
def test_parameters_out_of_range_are_refused(folders, kwargs, message):
    with pytest.raises(ValueError, match=message):
        StarDist(folders / "2d", **kwargs)


def test_other_models_and_missing_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        StarDist(tmp_path / "none")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((10, 10, 10), "uint16", "works on axes yx but the image has 3"),
        ((10, 10), "int32", "dtype int32; accepted are"),
        ((10, 2**18 + 1), "uint8", "accurate up to 262144"),
    ],
)
def test_volumes_that_cannot_be_processed_are_refused(folders, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        StarDist(folders / "2d").check(shape, np.dtype(dtype))


def test_blocks_that_would_not_give_the_untiled_result_are_refused(folders):
    operator = StarDist(folders / "3d-grid1", normalization=NORMALIZATION)
    image = image_of((40, 40, 40))
    core = (slice(0, 40), slice(0, 40), slice(16, 24))
    off_grid = Block(core, (slice(0, 40), slice(0, 40), slice(5, 36)), image.shape)
    with pytest.raises(
        ValueError,
        match=r"reads 5:36 on axis 2, off the network's pooling grid: borders must be multiples of 2",
    ):
        operator.detect(image[off_grid.read], off_grid)
    too_small = Block.around(core, image.shape, Halo((8, 8, 8), (2, 2, 2)))
    with pytest.raises(ValueError, match="reads 8:32 on axis 2, but its core needs 6:34"):
        operator.detect(image[too_small.read], too_small)
    with pytest.raises(ValueError, match="`image` has shape"):
        operator.detect(image, too_small)
    with pytest.raises(ValueError, match="`normalization` is not decided"):
        replace(operator, normalization=None).detect(image, Block.whole(image.shape))


def test_voxels_that_are_not_finite_are_refused_with_the_block(folders):
    image = np.ones((24, 24), np.float32)
    image[3, 4] = np.nan
    operator = StarDist(folders / "classes", normalization=(0, 1))
    with pytest.raises(NonFiniteError, match=r"block \(0, 0\) .* NaN or infinite"):
        operator(image)


def test_the_benchmark_runs_and_finds_the_same_objects():
    path = Path(__file__).parents[1] / "benchmarks" / "stardist_tiling.py"
    spec = importlib.util.spec_from_file_location("stardist_tiling", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = json.loads(json.dumps(benchmark.measure((32, 48, 56), (32, 24, 32)), default=float))
    figures = result["contenders"]["chunkrestore"]
    assert result["n_blocks"] == 4
    assert figures["identical_objects"] == figures["objects"] > 10
    assert figures["voxels_that_differ"] == 0
    assert set(figures["steps_cpu_s"]) == {"detect", "settle and number", "paint"}

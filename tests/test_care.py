"""CARE block by block against CSBDeep's own prediction of the whole volume."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

from chunkrestore import models
from chunkrestore.backend import missing_device
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.care import Care
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.statistics import NonFiniteError, of_array

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
pytest.importorskip("csbdeep", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 2e-6
# Of the normalised range: float32 (6e-8) over sums of up to 27 x 32 products of order 1 in ten layers, whose
# order the library chooses by shape; 4e-7 was measured. Wrong tiling is off by 7e-3 (halo 20) and more.

SHAPE = (75, 61, 58)
# No length is a multiple of the pooling grid, 4, and they are padded by 0 + 1, 1 + 2 and 1 + 1.


@pytest.fixture(scope="session")
def care_folders(tmp_path_factory):
    """Random networks (He initialisation) whose output visibly differs from their input."""
    from csbdeep.models import CARE, Config

    basedir = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(7)
    parameters = {
        "3d": {"axes": "ZYX"},
        "2d": {"axes": "YX"},
        "probabilistic": {"axes": "YX", "probabilistic": True, "unet_n_depth": 1},
        "channels": {"axes": "YXC", "n_channel_in": 2, "n_channel_out": 2},
        "time": {"axes": "TYX"},
    }
    for name, kwargs in parameters.items():
        config = Config(**{"unet_n_first": 8, "unet_n_depth": 2, "unet_kern_size": 3} | kwargs)
        model = CARE(config, name, basedir=str(basedir))
        weights = [
            rng.normal(0, np.sqrt(2 / np.prod(w.shape[:-1])) if w.ndim > 1 else 0.1, w.shape)
            for w in model.keras_model.get_weights()
        ]
        model.keras_model.set_weights(weights)
        model.keras_model.save_weights(str(model.logdir / "weights_best.h5"))
    return {name: basedir / name for name in parameters}


def volume(shape, dtype=np.uint16, seed=11):
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.normal(size=shape), axis=-1)
    image = 100 + 20 * (smooth - smooth.min()) + rng.normal(0, 30, shape)
    if dtype == np.uint8:
        image = image * (255 / image.max())
    return np.clip(image, 0, np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else None).astype(dtype)


def csbdeep_predict(folder, image):
    from csbdeep.data import PadAndCropResizer, PercentileNormalizer

    # A fresh normalizer and resizer per call: the stock default arguments are shared and not thread-safe.
    return models.load(folder).predict(
        image, "ZYX"[-image.ndim :], PercentileNormalizer(2, 99.8), PadAndCropResizer()
    )


def tiled(operator, image, grid):
    result = np.full(image.shape, np.nan, np.float32)
    for block in grid:
        result[block.core] = operator(image[block.read], block)[block.trim]
    return result


def resolved(operator, image):
    return operator.resolve(of_array(image, operator.needs))


def assert_equal(result, expected, image):
    low, high = np.percentile(image, (2, 99.8))
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= TOLERANCE * (high - low)


@pytest.fixture(scope="session")
def case(care_folders):
    image = volume(SHAPE)
    return image, resolved(Care(care_folders["3d"]), image), csbdeep_predict(care_folders["3d"], image)


def test_untiled_equals_csbdeep(case, care_folders):
    image, _, expected = case
    low, high = np.percentile(image, (2, 99.8))
    assert (expected - image).std() > 0.1 * (high - low), "the network must do something visible"
    assert_equal(Care(care_folders["3d"])(image), expected, image)


@pytest.mark.parametrize("block_shape", [(25, 31, 29), (11, 61, 58), (75, 7, 58)])
def test_tiled_equals_untiled_on_a_volume_off_the_pooling_grid(case, block_shape):
    image, operator, expected = case
    grid = BlockGrid.regular(image.shape, block_shape, operator.halo(image.shape))
    assert any(np.prod(block.read_shape) < image.size for block in grid)
    assert_equal(tiled(operator, image, grid), expected, image)


def test_tiled_equals_untiled_on_uneven_chunks_with_a_larger_depth(case, care_folders):
    image, operator, expected = case
    deeper = replace(operator, depth=25)
    grid = BlockGrid.from_chunks([(1, 70, 4), (30, 31), (58,)], deeper.halo(image.shape))
    assert_equal(tiled(deeper, image, grid), expected, image)


@pytest.mark.parametrize("shape", [(150, 131), (148, 133), (149, 130)])
def test_tiled_equals_untiled_in_two_dimensions(care_folders, shape):
    image = volume(shape, np.float32)
    operator = resolved(Care(care_folders["2d"]), image)
    grid = BlockGrid.regular(shape, (37, 50), operator.halo(shape))
    assert_equal(tiled(operator, image, grid), csbdeep_predict(care_folders["2d"], image), image)


def test_mean_of_a_probabilistic_model_equals_csbdeep(care_folders):
    image = volume((41, 55))
    expected = csbdeep_predict(care_folders["probabilistic"], image)
    assert_equal(Care(care_folders["probabilistic"])(image), expected, image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_dtype_equals_csbdeep_and_is_not_modified(care_folders, dtype):
    image = volume((30, 45), dtype)
    before = image.copy()
    image.flags.writeable = False
    assert_equal(Care(care_folders["2d"])(image), csbdeep_predict(care_folders["2d"], before), before)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 6, 9), (2, 3, 5), (3, 1, 2)])
def test_volumes_smaller_than_the_pooling_grid_equal_csbdeep(care_folders, shape):
    image = volume(shape, np.float32)
    assert_equal(Care(care_folders["3d"])(image), csbdeep_predict(care_folders["3d"], image), image)


def test_four_threads_equal_serial(case):
    image, operator, _ = case
    grid = BlockGrid.regular(image.shape, (25, 31, 29), operator.halo(image.shape))
    blocks = list(grid)[::2]
    serial = [operator(image[block.read], block) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda block: operator(image[block.read], block), blocks))
    low, high = operator.normalization
    for a, b in zip(threaded, serial, strict=True):
        assert np.abs(a - b).max() <= TOLERANCE * (high - low)


def test_percentiles_are_needed_until_they_are_known(care_folders):
    image = volume((30, 45))
    operator = Care(care_folders["2d"], percentiles=(1, 99))
    assert operator.needs == {1.0, 99.0}
    with pytest.raises(ValueError, match="`normalization` is not decided"):
        operator(image, Block.whole(image.shape))
    ready = resolved(operator, image)
    assert ready.needs == frozenset()
    np.testing.assert_allclose(ready.normalization, np.percentile(image, (1, 99)), rtol=1e-12)
    assert ready.resolve({}) is ready
    np.testing.assert_array_equal(operator(image), ready(image))
    assert Care(care_folders["2d"], normalization=(0, 5)).needs == frozenset()


def test_constant_volume_is_refused_when_percentiles_are_needed(care_folders):
    image = np.full((30, 45), 100, np.uint16)
    with pytest.raises(ValueError, match=r"constant volume.*`normalization=\(low, high\)`"):
        Care(care_folders["2d"])(image)
    assert np.isfinite(Care(care_folders["2d"], normalization=(0, 200))(image)).all()


def test_blocks_off_the_pooling_grid_or_with_too_little_halo_are_refused(case):
    image, operator, _ = case
    core = (slice(30, 40), slice(0, 61), slice(0, 58))
    # The whole volume is padded by 0 voxels before its first plane, 1 before its first row and column.
    assert operator.halo(image.shape).offset == (0, 1, 1)
    for halo, message in [
        (
            Halo((24, 24, 24)),
            r"reads 6:64 on axis 0, off the network's pooling grid: .* multiples of 4, less 0",
        ),
        (Halo((24, 24, 24), (4, 4, 4), (1, 1, 1)), "off the network's pooling grid"),
        (Halo((20, 24, 24), (4, 4, 4)), r"reads 8:60 on axis 0, but its core needs 4:64"),
    ]:
        block = Block.around(core, image.shape, halo)
        with pytest.raises(ValueError, match=message):
            operator(image[block.read], block)
    block = Block.around(core, image.shape, operator.halo(image.shape))
    with pytest.raises(ValueError, match=r"`image` has shape \(75, 61, 58\) but block"):
        operator(image, block)


def test_non_finite_voxels_are_refused_with_the_block_named(care_folders):
    image = volume((30, 45), np.float32)
    operator = Care(care_folders["2d"], normalization=(100, 500))
    image[3, 4] = np.nan
    with pytest.raises(NonFiniteError, match=r"block \(0, 0\) \(core 0:30, 0:45\) holds voxels that are NaN"):
        operator(image)


def test_parameters_out_of_range_are_refused(care_folders):
    folder = care_folders["2d"]
    for wrong in ((5, 5), (7, 2), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(ValueError, match="`normalization` must be two finite numbers low < high"):
            Care(folder, normalization=wrong)
    for wrong in ((99.8, 2), (-1, 50), (0, 101)):
        with pytest.raises(ValueError, match="`percentiles` must rise within 0 to 100"):
            Care(folder, percentiles=wrong)
    for wrong in (23, (24, 20), (24, 24, 24)):
        with pytest.raises(ValueError, match=r"`depth` .* at least \(24, 24\) is needed"):
            Care(folder, depth=wrong)
    assert Care(folder, depth=24).halo((30, 45)) == Care(folder).halo((30, 45))


def test_models_that_do_not_fit_the_image_are_refused(care_folders, tmp_path):
    with pytest.raises(ValueError, match=r"works on axes zyx but the image has 2 spatial axes"):
        Care(care_folders["3d"]).check((30, 45), np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"works on axes yx but the image has 3 spatial axes"):
        Care(care_folders["2d"])(volume((5, 30, 45)))
    with pytest.raises(ValueError, match=r"maps 2 to 2 channels; only models with one channel"):
        Care(care_folders["channels"]).check((30, 45), np.dtype(np.uint16))
    with pytest.raises(ValueError, match="has axes TYX; only YX and ZYX"):
        Care(care_folders["time"]).check((5, 30, 45), np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"dtype float64; accepted are uint8, uint16, int16, float32"):
        Care(care_folders["2d"]).check((30, 45), np.dtype(np.float64))
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        Care(tmp_path / "nowhere")


def test_a_model_that_changed_after_the_operator_was_made_is_refused(care_folders, tmp_path):
    folder = shutil.copytree(care_folders["2d"], tmp_path / "model")
    operator = pickle.loads(pickle.dumps(Care(folder, normalization=(100, 500))))
    image = volume((30, 45))
    np.testing.assert_array_equal(operator(image), Care(care_folders["2d"], normalization=(100, 500))(image))
    shutil.copy(care_folders["channels"] / "weights_best.h5", folder / "weights_best.h5")
    with pytest.raises(ValueError, match="is not the expected one"):
        operator(image)


def test_operator_holds_a_name_and_describes_itself(care_folders):
    operator = Care(models.load(care_folders["2d"]), normalization=(1, 2), depth=28)
    assert operator.model == str(care_folders["2d"].resolve())
    assert isinstance(operator, ImageOperator)
    assert json.loads(json.dumps(operator.describe())) == {
        "operator": "care",
        "model": "2d",
        "model_digest": models.digest(care_folders["2d"]),
        "normalization": [1.0, 2.0],
        "percentiles": [2.0, 99.8],
        "depth": [28, 28],
        "precision": "float32",
        "output": "mean",
    }
    assert pickle.loads(pickle.dumps(operator)) == operator
    assert hash(operator) == hash(replace(operator))


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_tiled_equals_untiled_in_reduced_precision(care_folders, precision):
    image = volume((150, 131), np.float32)
    operator = resolved(Care(care_folders["2d"]), image)
    reduced = replace(operator, precision=precision)
    low, high = operator.normalization
    exact, whole = operator(image), reduced(image)
    grid = BlockGrid.regular(image.shape, (37, 50), operator.halo(image.shape))
    rounding = np.sqrt(np.mean((whole - exact) ** 2))
    assert 1e-5 < rounding / (high - low) < 0.05
    # Sums in another order are rounded the other way in a few places; a wrong tiling is off everywhere.
    assert np.sqrt(np.mean((tiled(reduced, image, grid) - whole) ** 2)) < 0.1 * rounding


def test_precision_is_checked_described_and_survives_saving(care_folders, tmp_path):
    with pytest.raises(ValueError, match="`precision` must be one of"):
        Care(care_folders["2d"], precision="half")
    operator = Care(care_folders["2d"], precision="mixed_bfloat16")
    assert operator.describe()["precision"] == "mixed_bfloat16"
    save_operators([operator], tmp_path)
    assert load_operators(tmp_path) == [operator]


@pytest.mark.skipif(missing_device() is not None, reason=str(missing_device()))
def test_cupy_blocks_stay_on_their_device(care_folders):
    import cupy

    image = volume((30, 45))
    operator = Care(care_folders["2d"], normalization=(100, 500))
    result = operator(cupy.asarray(image))
    assert isinstance(result, cupy.ndarray)
    assert np.abs(result.get() - operator(image)).max() <= TOLERANCE * 400


MEASURE = """
import sys, numpy as np
from chunkrestore.operators.care import Care
from chunkrestore.grid import Block
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
operator = Care(sys.argv[1], normalization=(0, 1000))
image = np.random.default_rng(0).integers(0, 1000, (96, 96, 94)).astype(np.uint16)
operator(image[:16, :16, :16])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
operator(image)
print((status("VmHWM") - before) / operator.memory_nbytes(image.shape))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_memory_formula_is_the_measured_peak_within_a_third(care_folders):
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(care_folders["3d"])], check=True, capture_output=True, text=True
    ).stdout
    assert 0.66 < float(output) <= 1.0

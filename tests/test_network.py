"""Geometry of networks against what Keras networks really look at, and the runner."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

from chunkrestore.grid import Block, Halo
from chunkrestore.kernels import network
from chunkrestore.kernels.network import (
    NetworkGeometry,
    care_geometry,
    run_network,
    stardist_geometry,
)

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
pytest.importorskip("csbdeep", reason="needs the deep-learning extra")
pytest.importorskip("stardist", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def care(axes, **parameters):
    from csbdeep.models import CARE, Config

    return CARE(Config(axes, 1, 1, unet_n_first=4, **parameters), "care", basedir=None)


def stardist(n_dim, **parameters):
    from stardist.models import Config2D, Config3D, StarDist2D, StarDist3D

    if n_dim == 2:
        config = Config2D(n_rays=4, unet_n_filter_base=2, **parameters)
        return StarDist2D(config, "stardist", basedir=None)
    if parameters.get("backbone") != "resnet":
        parameters["unet_n_filter_base"] = 2
    else:
        parameters["resnet_n_filter_base"] = 2
    return StarDist3D(Config3D(rays=4, **parameters), "stardist", basedir=None)


def average_everywhere(keras_model):
    """Make all kernels positive and all biases 0: the output is 0 exactly where it sees only 0."""
    for weights in keras_model.weights:
        shape = tuple(weights.shape)
        weights.assign(np.full(shape, 1 / np.prod(shape[:-1]) if len(shape) > 1 else 0, np.float32))


def measured_reach(keras_model, axis, align, n_dim, guess):
    """Return how far beyond an aligned region its output depends on the input, at every phase."""
    reach = 0
    middle = (guess // align[axis] + 3) * align[axis]
    shape = [align[i] if i != axis else 2 * middle for i in range(n_dim)]
    for flip in (False, True):
        for step in range(middle, middle + align[axis]):
            image = np.zeros((*shape, 1), np.float32)
            line = np.moveaxis(image, axis, 0)
            line[step:] = 1
            if flip:
                line[:] = line[::-1].copy()
            output = run_network(keras_model, image)[-1][..., 0]
            seen = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1).any(axis=1)
            seen = seen[::-1] if flip else seen
            grid = shape[axis] // len(seen)
            first = int(np.argmax(seen)) * grid
            end_of_cell = (first // align[axis] + 1) * align[axis]
            reach = max(reach, step - end_of_cell + 1)
    return reach


@pytest.mark.parametrize(
    ("kernel", "n_depth", "depth"),
    [(3, 1, 8), (3, 2, 24), (3, 3, 48), (3, 4, 96), (5, 2, 40)],
)
def test_care_depth_is_the_receptive_field_rounded_up_to_the_pooling_grid(kernel, n_depth, depth):
    config = SimpleNamespace(n_dim=3, unet_n_depth=n_depth, unet_kern_size=kernel)
    assert care_geometry(config) == NetworkGeometry((depth,) * 3, (2**n_depth,) * 3)


@pytest.mark.parametrize(
    ("axes", "kernel", "n_depth"), [("YX", 3, 1), ("YX", 3, 2), ("YX", 5, 2), ("YX", 3, 3), ("ZYX", 3, 2)]
)
def test_care_depth_is_what_the_network_looks_at(axes, kernel, n_depth):
    model = care(axes, unet_kern_size=kernel, unet_n_depth=n_depth)
    geometry = care_geometry(model.config)
    average_everywhere(model.keras_model)
    reach = measured_reach(model.keras_model, 0, geometry.align, len(axes), geometry.depth[0])
    assert 0 < reach <= geometry.depth[0] < reach + geometry.align[0]


@pytest.mark.parametrize(
    ("n_dim", "parameters"),
    [
        (2, {"unet_n_depth": 1}),
        (2, {"unet_n_depth": 2, "grid": (2, 2)}),
        (2, {"unet_n_depth": 2, "grid": (1, 4), "unet_n_conv_per_depth": 3}),
        (2, {"unet_n_depth": 2, "net_conv_after_unet": 0, "unet_kernel_size": (5, 3), "unet_pool": (4, 2)}),
        (2, {"unet_n_depth": 2, "unet_kernel_size": (2, 4)}),
        (3, {"unet_n_depth": 2, "grid": (1, 2, 2)}),
        (3, {"unet_n_depth": 1, "grid": (1, 4, 2), "unet_pool": (1, 2, 2)}),
        (3, {"backbone": "resnet", "grid": (1, 2, 2), "resnet_n_blocks": 3}),
        (3, {"backbone": "resnet", "grid": (1, 4, 2), "resnet_n_blocks": 2, "resnet_kernel_size": (3, 5, 5)}),
    ],
)
def test_stardist_depth_is_what_the_network_looks_at(n_dim, parameters):
    model = stardist(n_dim, **parameters)
    geometry = stardist_geometry(model.config)
    assert geometry.align == tuple(model._axes_div_by("ZYX"[-n_dim:]))
    average_everywhere(model.keras_model)
    for axis in range(n_dim):
        reach = measured_reach(model.keras_model, axis, geometry.align, n_dim, geometry.depth[axis])
        assert 0 < reach <= geometry.depth[axis] < reach + geometry.align[axis]


def test_core_does_not_depend_on_voxels_outside_its_read_region_at_any_phase():
    model = stardist(3, unet_n_depth=1, grid=(1, 2, 2))
    geometry = stardist_geometry(model.config)
    halo = Halo(geometry.depth, geometry.align)
    shape = (48, 64, 64)
    rng = np.random.default_rng(20)
    image = rng.normal(size=(*shape, 1)).astype(np.float32)
    whole = run_network(model.keras_model, image)
    for phase in range(4):
        core = (slice(20 + phase, 23 + phase), slice(24 + phase, 30), slice(32 - phase, 33 + phase))
        read = Block.around(core, shape, halo).read
        other = rng.normal(size=image.shape).astype(np.float32)
        other[read] = image[read]
        # Core voxels sit on grid cells; the last cell may stick out of the core.
        cells = tuple(
            slice(-(-c.start // g), -(-c.stop // g)) for c, g in zip(core, model.config.grid, strict=True)
        )
        for a, b in zip(run_network(model.keras_model, other), whole, strict=True):
            assert a[cells].std() > 0
            np.testing.assert_array_equal(a[cells], b[cells])


def test_unknown_backbone_and_too_few_resnet_blocks_are_refused():
    with pytest.raises(ValueError, match="`backbone` 'vit' is not one of unet, resnet"):
        stardist_geometry(SimpleNamespace(n_dim=2, backbone="vit"))
    config = SimpleNamespace(
        n_dim=3, backbone="resnet", grid=(1, 4, 4), resnet_n_blocks=1, resnet_kernel_size=(3, 3, 3)
    )
    with pytest.raises(ValueError, match=r"`resnet_n_blocks` 1 is too few for `grid`.*at least 2"):
        stardist_geometry(config)


@pytest.fixture(scope="module")
def small_care():
    return care("YX", unet_n_depth=1, unet_kern_size=3)


def test_run_network_equals_keras_predict_for_any_shape(small_care):
    rng = np.random.default_rng(3)
    for shape in ((16, 24), (32, 8), (2, 2)):
        image = rng.normal(size=(*shape, 1)).astype(np.float32)
        (output,) = run_network(small_care.keras_model, image)
        expected = small_care.keras_model.predict(image[np.newaxis], verbose=0)[0]
        assert isinstance(output, np.ndarray)
        assert output.dtype == np.float32
        assert output.shape == (*shape, 1)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


def test_27_shapes_share_one_trace_and_equal_keras_predict():
    keras_model = care("ZYX", unet_n_depth=1, unet_kern_size=3).keras_model
    rng = np.random.default_rng(5)
    shapes = list(itertools.product((4, 6, 8), (6, 10, 12), (8, 10, 14)))
    images = [rng.normal(size=(*shape, 1)).astype(np.float32) for shape in shapes]
    outputs = [run_network(keras_model, image)[0] for image in images]
    assert network._function(keras_model).experimental_get_tracing_count() == 1
    for image, output in list(zip(images, outputs, strict=True))[::4]:
        expected = keras_model.predict(image[np.newaxis], verbose=0)[0]
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)


def test_outputs_are_not_copied(small_care):
    function = network._function(small_care.keras_model)
    (tensor,) = function(np.zeros((1, 8, 8, 1), np.float32))
    assert np.shares_memory(np.asarray(tensor), np.asarray(tensor))


def test_run_network_returns_every_output_of_stardist():
    model = stardist(2, unet_n_depth=1, grid=(2, 2))
    prob, dist = run_network(model.keras_model, np.ones((16, 32, 1), np.float32))
    assert prob.shape == (8, 16, 1)
    assert dist.shape == (8, 16, 4)


def test_run_network_is_the_same_from_four_threads(small_care):
    rng = np.random.default_rng(4)
    images = [rng.normal(size=(2 * n, 32, 1)).astype(np.float32) for n in range(8, 24)]
    serial = [run_network(small_care.keras_model, image)[0] for image in images]
    fresh = care("YX", unet_n_depth=1, unet_kern_size=3)
    fresh.keras_model.set_weights(small_care.keras_model.get_weights())
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda image: run_network(fresh.keras_model, image)[0], images))
    for a, b in zip(threaded, serial, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_run_network_refuses_other_dtypes_axes_and_channels(small_care):
    with pytest.raises(TypeError, match="`image` must be float32, got float64"):
        run_network(small_care.keras_model, np.zeros((8, 8, 1)))
    for shape in ((8, 8), (8, 8, 8, 1), (8, 8, 2)):
        with pytest.raises(ValueError, match=r"does not fit a network with 2 spatial axes and 1 channel"):
            run_network(small_care.keras_model, np.zeros(shape, np.float32))


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_model_that_was_run_can_be_freed(precision):
    model = care("YX", unet_n_depth=1, unet_kern_size=3)
    run_network(model.keras_model, np.zeros((8, 8, 1), np.float32), precision=precision)
    reference = weakref.ref(model.keras_model)
    del model
    gc.collect()
    assert reference() is None


REDUCED = {"mixed_float16": 2.0**-11, "mixed_bfloat16": 2.0**-8}
"""Relative error of one rounding."""


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize(
    ("n_dim", "parameters"),
    [
        (2, {"unet_n_depth": 1, "grid": (2, 2)}),
        (3, {"unet_n_depth": 1, "grid": (1, 2, 2)}),
        (3, {"backbone": "resnet", "grid": (1, 2, 2), "resnet_n_blocks": 2}),
    ],
)
def test_reduced_precision_differs_from_float32_by_its_rounding(n_dim, parameters, precision):
    keras_model = stardist(n_dim, **parameters).keras_model
    rng = np.random.default_rng(6)
    for weights in keras_model.weights:
        shape = tuple(weights.shape)
        # Nothing cancels, so that a sum's relative error is at most that of its terms.
        positive = rng.uniform(0.5, 1.5, shape) / np.prod(shape[:-1]) if len(shape) > 1 else np.zeros(shape)
        weights.assign(positive.astype(np.float32))
    image = rng.random((*(16, 24, 20)[:n_dim], 1), np.float32)
    before = run_network(keras_model, image)
    reduced = run_network(keras_model, image, precision=precision)
    n_layers = sum(bool(layer.weights) for layer in keras_model.layers)
    for a, b in zip(reduced, before, strict=True):
        assert a.dtype == np.float32
        # Each layer rounds what goes in, its kernel, and what comes out.
        assert 0 < (np.abs(a - b) / b).max() < 3 * n_layers * REDUCED[precision]
    for a, b in zip(run_network(keras_model, image), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("probabilistic", [False, True])
def test_reduced_precision_does_not_round_the_image_that_care_corrects(precision, probabilistic):
    keras_model = care("YX", unet_n_depth=1, unet_kern_size=3, probabilistic=probabilistic).keras_model
    correction = next(layer for layer in keras_model.layers if layer.name.startswith("conv2d"))
    correction.set_weights([np.zeros_like(w) for w in correction.get_weights()])
    image = np.random.default_rng(7).normal(size=(16, 24, 1)).astype(np.float32)
    (output,) = run_network(keras_model, image, precision=precision)
    np.testing.assert_array_equal(output[..., 0], image[..., 0])


def test_values_beyond_float16_are_an_error_and_fit_bfloat16():
    keras_model = care("YX", unet_n_depth=1, unet_kern_size=3).keras_model
    average_everywhere(keras_model)
    image = np.full((16, 16, 1), 1e6, np.float32)
    assert np.isfinite(run_network(keras_model, image, precision="mixed_bfloat16")[0]).all()
    with pytest.raises(OverflowError, match=r"`precision` 'mixed_float16'.*use .mixed_bfloat16"):
        run_network(keras_model, image, precision="mixed_float16")


def test_unknown_precision_is_refused(small_care):
    with pytest.raises(ValueError, match=r"`precision` must be one of float32, .*, got 'float16'"):
        run_network(small_care.keras_model, np.zeros((8, 8, 1), np.float32), precision="float16")

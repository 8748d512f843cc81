import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.filters import threshold_otsu

from chunkrestore.grid import BlockGrid
from chunkrestore.lazy import apply_labels
from chunkrestore.operators.threshold import Threshold
from chunkrestore.stitch.objects import number_objects


def label_in_blocks(operator, image, grid):
    tables = {block.index: operator.detect(image[block.read], block) for block in grid}
    objects = number_objects(operator, grid, tables)
    labels = np.zeros(image.shape, int)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


@st.composite
def masks(draw):
    shape = draw(st.sampled_from([(9, 8, 7), (1, 12, 11), (16, 15), (30, 2)]))
    density = draw(st.sampled_from([0.2, 0.4, 0.6]))
    seed = draw(st.integers(0, 2**31))
    return (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)


@settings(deadline=None)
@given(masks(), st.data())
def test_labels_are_those_of_scipy_for_every_grid_and_connectivity(mask, data):
    connectivity = data.draw(st.integers(1, mask.ndim))
    block_shape = tuple(data.draw(st.integers(1, n)) for n in mask.shape)
    expected, _ = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))
    operator = Threshold(0.5, connectivity=connectivity)
    labels = label_in_blocks(operator, mask, BlockGrid.regular(mask.shape, block_shape))
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("chunks", [(13, 16, 16), (5, 40, 9), ((1, 25, 14), (20, 7, 13), (36, 4))])
def test_lazy_labels_with_otsus_threshold_equal_untiled(chunks):
    noise = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(40, 40, 40)), 1.5)
    image = np.exp(noise / noise.std()).astype(np.float32)
    expected, n_objects = ndimage.label(image > threshold_otsu(image))
    assert n_objects > 10
    lazy = apply_labels(Threshold(), da.from_array(image, chunks=chunks), "zyx")
    assert lazy.dtype == np.int32
    assert lazy.chunks == da.empty(image.shape, chunks=chunks).chunks
    with dask.config.set(scheduler="threads"):
        np.testing.assert_array_equal(lazy.compute(), expected)
    np.testing.assert_array_equal(Threshold()(image), expected)


def test_an_image_without_foreground_has_no_labels():
    image = np.zeros((6, 6), np.uint8)
    assert not label_in_blocks(Threshold(10), image, BlockGrid.regular((6, 6), (4, 4))).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": float("nan")}, "`value` must be finite"),
        ({"connectivity": 4}, "`connectivity` must be 1, 2 or 3"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Threshold(**arguments)

import dask
import dask.array as da
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.filters import threshold_local, threshold_niblack, threshold_otsu, threshold_sauvola

from chunkrestore.grid import BlockGrid
from chunkrestore.lazy import apply_labels
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.operators.threshold import LocalThreshold, Threshold
from chunkrestore.pipeline import read_pipeline
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
        ({"percentile": -1.0}, "`percentile` must lie between 0 and 100"),
        ({"value": 1.0, "percentile": 5.0}, "not both"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Threshold(**arguments)


LOCAL = [
    (LocalThreshold("gaussian", 7, factor=1.1), lambda x: 1.1 * threshold_local(x, 7)),
    (LocalThreshold("gaussian", (3, 5, 9), offset=-2.5), lambda x: threshold_local(x, (3, 5, 9), offset=2.5)),
    (LocalThreshold("mean", (5, 3, 7)), lambda x: threshold_local(x, (5, 3, 7), method="mean")),
    (LocalThreshold("niblack", 5, k=-0.3), lambda x: threshold_niblack(x, 5, k=-0.3)),
    (LocalThreshold("sauvola", (3, 7, 5), dynamic_range=60), lambda x: threshold_sauvola(x, (3, 7, 5), r=60)),
]


@pytest.mark.parametrize(("local", "expected"), LOCAL)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_local_thresholds_are_those_of_scikit_image_to_rounding(local, expected, dtype):
    image = (np.random.default_rng(3).random((12, 15, 20)) * 200 + 30).astype(dtype)
    found = local(image)
    assert found.dtype == np.float64
    # In float64: scikit-image computes in float32 what it is given so.
    np.testing.assert_allclose(found, expected(image.astype(np.float64)), rtol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(LOCAL), st.sampled_from([(30, 8, 9), (6, 41, 7), (1, 12, 33)]), st.data())
def test_a_local_threshold_gives_the_same_labels_in_every_grid(case, shape, data):
    local, _ = case
    # Small integers times a fraction: voxels that lie on their threshold, where one bit decides.
    image = np.random.default_rng(data.draw(st.integers(0, 2**31))).integers(0, 4, shape).astype(np.float32)
    image *= np.float32(0.1)
    operator = Threshold(data.draw(st.sampled_from([None, 0.15])), local=local, connectivity=2)
    edges = tuple(
        (0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4))), n) if n > 1 else (0, 1)
        for n in shape
    )
    expected = operator(image)
    above = image > local(image)
    mask = above if operator.value is None else above & (image > operator.value)
    structure = ndimage.generate_binary_structure(3, 2)
    np.testing.assert_array_equal(expected, ndimage.label(mask, structure)[0])
    labels = label_in_blocks(operator, image, BlockGrid(edges, operator.halo(shape)))
    np.testing.assert_array_equal(labels, expected)


def test_numbers_of_the_whole_volume_are_taken_from_it():
    image = np.random.default_rng(8).gamma(2.0, 50.0, (9, 40, 30)).astype(np.float32)
    low, high, wanted = np.percentile(image, (0.1, 99.9, 20))
    operator = Threshold(percentile=20.0, local=LocalThreshold("sauvola", 9))
    mask = (image > wanted) & (image > threshold_sauvola(image.astype(float), 9, r=(high - low) / 2))
    expected, _ = ndimage.label(mask)
    assert 0.2 < mask.mean() < min((image > wanted).mean(), 0.75)
    np.testing.assert_array_equal(operator(image), expected)
    lazy = apply_labels(operator, da.from_array(image, chunks=(4, 40, 11)), "zyx")
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)
    with pytest.raises(ValueError, match="not decided"):
        label_in_blocks(operator, image, BlockGrid.regular(image.shape, image.shape))


def test_an_image_of_one_intensity_has_no_foreground():
    image = np.full((5, 20, 20), 9, np.uint16)
    for operator in (Threshold(percentile=50.0), Threshold(local=LocalThreshold("gaussian", 5, offset=0.1))):
        assert not operator(image).any()


def test_a_pipeline_file_and_a_saved_job_keep_the_local_threshold(tmp_path):
    local = {"method": "sauvola", "window": [3, 9, 9], "k": 0.4}
    steps = [{"operator": "threshold", "percentile": 60, "connectivity": 3, "local": local}]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"input": "a", "output": "b", "steps": steps}))
    operators = read_pipeline(tmp_path / "job.yaml")[0]
    expected = LocalThreshold("sauvola", (3, 9, 9), k=0.4)
    assert operators == [Threshold(percentile=60.0, connectivity=3, local=expected)]
    save_operators(operators, tmp_path)
    assert load_operators(tmp_path) == operators


def test_a_threshold_tells_of_itself_what_it_told_before_there_was_a_choice():
    assert Threshold(3.0).describe() == {"operator": "threshold", "value": 3.0, "connectivity": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "otsu"}, "`method` must be one of 'gaussian', 'mean', 'niblack', 'sauvola'"),
        ({"window": 8}, "`window` must be an odd number"),
        ({"k": float("inf")}, "`k` must be finite"),
        ({"dynamic_range": 0.0}, "`dynamic_range` must be finite and above 0"),
    ],
)
def test_bad_local_thresholds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalThreshold(**arguments)

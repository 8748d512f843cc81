import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.filters import threshold_otsu

from chunkrestore import statistics
from chunkrestore.statistics import NonFiniteError, of_array, of_blocks, summarize

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)
IMAGES = st.one_of(
    hnp.arrays(np.uint8, st.integers(1, 300)),
    hnp.arrays(np.uint16, st.integers(1, 300)),
    hnp.arrays(np.int16, st.integers(1, 300)),
    hnp.arrays(np.float32, st.integers(1, 300), elements=FLOATS),
)


@given(IMAGES, st.floats(0, 100))
def test_percentiles_are_those_of_the_sorted_voxels(image, q):
    expected = np.percentile(image.astype(np.float64), q)
    assert of_array(image, (q,))[q] == pytest.approx(
        expected, rel=1e-12, abs=1e-12 * float(np.abs(image).max())
    )


@given(IMAGES, st.integers(1, 7))
def test_statistics_do_not_depend_on_the_blocks(image, n_blocks):
    parts = [p for p in np.array_split(image, n_blocks) if p.size]
    needs = (0.0, 2.0, 50.0, 99.8, "mean", "minimum", "maximum")
    assert of_blocks(lambda i: parts[i], len(parts), needs) == of_array(image, needs)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_otsu_is_that_of_scikit_image(dtype):
    rng = np.random.default_rng(3)
    image = np.concatenate([rng.normal(40, 8, 3000), rng.normal(90, 10, 1000)]).astype(dtype)
    parts = np.array_split(image, 5)
    assert of_blocks(lambda i: parts[i], 5, ("otsu",))["otsu"] == pytest.approx(float(threshold_otsu(image)))


def test_mean_is_exact_for_integers_and_close_for_floats():
    rng = np.random.default_rng(4)
    image = rng.integers(0, 60000, 5000).astype(np.uint16)
    assert of_array(image, ("mean",))["mean"] == pytest.approx(image.mean(), rel=1e-14)
    floats = rng.gamma(2.0, 100.0, 5000).astype(np.float32)
    assert of_array(floats, ("mean",))["mean"] == pytest.approx(floats.mean(), rel=4e-3)


def test_a_constant_image_has_its_value_everywhere():
    image = np.full(10, 7.3, np.float32)
    numbers = of_array(image, (1.0, 99.8, "mean", "otsu"))
    assert set(numbers.values()) == {float(np.float32(7.3))}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(value):
    image = np.zeros((4, 4), np.float32)
    image[1, 2] = value
    with pytest.raises(NonFiniteError, match="1 voxels that are NaN or infinite"):
        summarize(image)


def test_other_dtypes_are_refused_by_name():
    with pytest.raises(ValueError, match="float64; accepted are uint8, uint16, int16, float32"):
        summarize(np.zeros(3))


def test_a_constant_volume_cannot_be_normalised():
    with pytest.raises(ValueError, match="constant volume cannot be normalised"):
        statistics.as_percentiles({1.0: 5.0, 99.8: 5.0}, (1.0, 99.8))


@pytest.mark.parametrize("q", [-1.0, 100.5])
def test_percentiles_outside_their_range_are_refused(q):
    with pytest.raises(ValueError, match="between 0 and 100"):
        of_array(np.arange(5, dtype=np.uint8), (q,))

"""Filters: SciPy's numbers on the whole volume, the same bits in every block grid, and in jobs."""

import dask.array as da
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import assemble
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.grid import BlockGrid
from chunkrestore.lazy import apply_image
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.operators.smoothing import DifferenceOfGaussians, Gaussian, Median, TopHat
from chunkrestore.pipeline import read_pipeline


def scipy_gaussian(image, sigma):
    return ndimage.gaussian_filter(image.astype(np.float32), sigma, mode="reflect")


FILTERS = [
    (Gaussian(0.7), lambda image: scipy_gaussian(image, 0.7)),
    (Gaussian((1.2, 0.4, 2.0)), lambda image: scipy_gaussian(image, (1.2, 0.4, 2.0))),
    (Gaussian(0.6, (1.2, 0.3, 0.4)), lambda image: scipy_gaussian(image, (0.6 / 1.2, 0.6 / 0.3, 0.6 / 0.4))),
    (DifferenceOfGaussians(0.5, 1.5), lambda image: scipy_gaussian(image, 0.5) - scipy_gaussian(image, 1.5)),
    (Median(3), lambda image: ndimage.median_filter(image, 3)),
    (Median((1, 5, 3)), lambda image: ndimage.median_filter(image, (1, 5, 3))),
    (TopHat((3, 5, 7)), lambda image: ndimage.white_tophat(image, (3, 5, 7))),
]
SHAPES = [(31, 9, 6), (2, 40, 11), (7, 1, 38)]


def volume(shape, dtype, seed):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 0.7)
    return ((noise - noise.min()) * 90).astype(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(FILTERS),
    st.sampled_from(SHAPES),
    st.sampled_from(["uint8", "int16", "float32"]),
    st.data(),
)
def test_every_block_grid_gives_the_bits_of_scipy_on_the_whole(case, shape, dtype, data):
    operator, expected = case
    image = volume(shape, dtype, data.draw(st.integers(0, 2**31)))
    edges = tuple(
        (0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4))), n) if n > 1 else (0, 1)
        for n in shape
    )
    whole = operator(image)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, expected(image))
    np.testing.assert_array_equal(assemble(operator, image, BlockGrid(edges, operator.halo(shape))), whole)


def test_images_without_z_are_filtered_alike():
    image = volume((33, 29), "uint16", 4)
    for operator, expected in [
        (Gaussian(1.5), scipy_gaussian(image, 1.5)),
        (Median((3, 5)), ndimage.median_filter(image, (3, 5))),
    ]:
        np.testing.assert_array_equal(operator(image), expected)
        grid = BlockGrid.regular(image.shape, (7, 12), operator.halo(image.shape))
        np.testing.assert_array_equal(assemble(operator, image, grid), expected)


def test_halos_are_no_deeper_than_needed():
    image = volume((40, 5, 5), "float32", 6)
    for operator in (Gaussian(1.1), DifferenceOfGaussians(0.5, 1.4), Median(5)):
        assert isinstance(operator, ImageOperator)
        (depth, *_) = operator.halo(image.shape).depth
        changed = image.copy()
        changed[20 + depth] -= 1000
        assert (operator(changed) != operator(image)).any(axis=(1, 2)).nonzero()[0][0] == 20
        changed[20 + depth], changed[21 + depth] = image[20 + depth], -1000
        assert (operator(changed)[20] == operator(image)[20]).all()


def test_a_job_and_a_lazy_array_equal_eager(tmp_path):
    image = volume((20, 40, 44), "uint16", 7)
    cr.write_image(image, tmp_path / "in.zarr", axes="zyx", voxel_size=(0.8, 0.4, 0.4), chunks=(8, 16, 16))
    steps = [
        {"operator": "gaussian", "sigma": 0.4, "micrometres": True},
        {"operator": "median", "window": [1, 3, 3]},
        {"operator": "difference-of-gaussians", "low": 0.5, "high": 2.0},
        {"operator": "top-hat", "window": 3},
    ]
    document = {"input": "in.zarr", "output": "out.zarr", "steps": steps, "block": [8, 16, 32]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    operators, source, output, options = read_pipeline(tmp_path / "job.yaml")
    assert operators[0] == Gaussian(0.4, (0.8, 0.4, 0.4))
    expected, lazy = image, da.from_array(image, chunks=(9, 13, 44))
    for operator in operators:
        expected, lazy = operator(expected), apply_image(operator, lazy, "zyx")
    cr.run(operators, source, output, cluster="serial", quiet=True, **options)
    np.testing.assert_array_equal(cr.open_image(output).data.compute(), expected)
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)


def test_saved_filters_describe_themselves_as_before(tmp_path):
    operators = [operator for operator, _ in FILTERS]
    save_operators(operators, tmp_path)
    assert load_operators(tmp_path) == operators


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0), "`sigma` must be a finite number above 0"),
        (lambda: Gaussian((1.0, float("nan"))), "`sigma` must be a finite number above 0"),
        (lambda: Gaussian(1.0, (1.0, -1.0)), "`voxel_size` must be a finite number above 0"),
        (lambda: DifferenceOfGaussians(2.0, 1.0), "`low` 2.0 must be below `high`"),
        (lambda: DifferenceOfGaussians((1.0, 2.0), (2.0, 3.0, 4.0)), "`low` .* must have as many numbers"),
        (lambda: Median(4), "`window` must be an odd number"),
        (lambda: Median(1), "`window` must be an odd number"),
        (lambda: TopHat((3, 3.0)), "`window` must be an odd number"),
        (lambda: Gaussian((1.0, 2.0)).check((3, 4, 5), np.dtype(np.uint8)), "one number per axis"),
        (lambda: Median((3, 3)).check((3, 4, 5), np.dtype(np.uint8)), "one number per axis"),
        (lambda: Gaussian(1.0).check((3, 4, 5), np.dtype(np.float64)), "dtype float64"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

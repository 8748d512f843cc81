"""Photon splitting: binomial halves that are independent, and the same for whatever block holds a voxel."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore.kernels.photon_splitting import split_photons

COUNTS = [1, 2, 7, 63, 64, 65, 200, 255, 256, 257, 1000, 40000]


def standard_errors(observed, expected, spread, n):
    """Return how many standard errors a mean of `n` values lies from what is expected."""
    return abs(observed - expected) / (spread / np.sqrt(n))


@pytest.mark.parametrize("count", COUNTS)
def test_every_photon_falls_to_either_half_with_even_odds(count):
    shape = (40, 50, 50)
    first, second = split_photons(np.full(shape, count, np.uint16), (3, 1000, 70))
    n = first.size
    np.testing.assert_array_equal(first + second, count)
    np.testing.assert_array_equal(first, np.rint(first))
    assert 0 <= first.min() <= first.max() <= count
    # Mean and variance of Bin(count, 1/2), and the spread of both for n samples: 5 standard errors.
    assert standard_errors(first.mean(dtype=np.float64), count / 2, np.sqrt(count / 4), n) < 5
    fourth = 3 * (count / 4) ** 2 - count / 8
    spread = np.sqrt(fourth - (count / 4) ** 2)
    squares = np.square(first.astype(np.float64) - count / 2)
    assert abs(squares.mean() - count / 4) <= 5 * spread / np.sqrt(n) + 1e-9


@pytest.mark.parametrize("count", [5, 64, 100, 300])
def test_halves_are_distributed_binomially(count):
    from scipy import stats

    first, _ = split_photons(np.full((100, 100, 20), count, np.uint16), (0, 0, 0), seed=4)
    values = np.arange(count + 1)
    expected = stats.binom.pmf(values, count, 0.5) * first.size
    observed = np.bincount(first.astype(int).ravel(), minlength=count + 1)
    common = expected >= 10
    chi_square = np.sum((observed - expected)[common] ** 2 / expected[common])
    # The normal approximation of more than 256 photons is rounded and has no skew: its share of the statistic
    # is about 1 here.
    assert stats.chi2.sf(chi_square, common.sum()) > 1e-4


@pytest.mark.parametrize("mean", [3.0, 40.0, 500.0])
def test_halves_of_a_poisson_image_are_independent_and_poisson(mean):
    image = np.random.default_rng(1).poisson(mean, (60, 60, 60)).astype(np.uint16)
    first, second = (half.astype(np.float64).ravel() for half in split_photons(image, (0, 0, 0)))
    n = first.size
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n)
    for half in (first, second):
        assert standard_errors(half.mean(), mean / 2, np.sqrt(mean / 2), n) < 5
        assert half.var() / half.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / n + 2 / (mean * n)))


def test_neighbours_throw_independent_coins():
    first, _ = split_photons(np.full((64, 64, 64), 60, np.uint16), (0, 0, 0))
    noise = first.astype(np.float64) - 30
    for axis in range(3):
        for distance in (1, 2, 16):
            a = np.moveaxis(noise, axis, 0)
            product = (a[distance:] * a[:-distance]).mean() / noise.var()
            assert abs(product) < 5 / np.sqrt(noise.size)


@given(data=st.data(), ndim=st.integers(1, 3))
def test_a_voxel_gets_the_same_halves_from_every_block(data, ndim):
    rng = np.random.default_rng(2)
    shape = (30, 26, 22)[:ndim]
    image = rng.choice(np.array([0, 3, 70, 250, 600, 5000], np.uint16), shape)
    corner = tuple(data.draw(st.integers(0, 2**20)) for _ in shape)
    begin = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    end = tuple(data.draw(st.integers(b + 1, n)) for b, n in zip(begin, shape, strict=True))
    part = tuple(slice(b, e) for b, e in zip(begin, end, strict=True))
    origin = tuple(c + b for c, b in zip(corner, begin, strict=True))
    whole = split_photons(image, corner, background=2.0, gain=1.5, seed=9)
    block = split_photons(image[part], origin, background=2.0, gain=1.5, seed=9)
    for a, b in zip(whole, block, strict=True):
        np.testing.assert_array_equal(a[part], b)


def test_large_volumes_in_many_slabs_are_split_as_small_ones():
    image = np.random.default_rng(3).poisson(300, (40, 200, 210)).astype(np.uint16)
    whole = split_photons(image, (5, 6, 7))
    rows = [split_photons(image[i : i + 1], (5 + i, 6, 7)) for i in (0, 17, 39)]
    for i, row in zip((0, 17, 39), rows, strict=True):
        np.testing.assert_array_equal(whole[0][i], row[0][0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_dtype_does_not_matter_and_the_image_is_not_modified(dtype):
    image = np.random.default_rng(4).integers(0, 120, (10, 11, 12)).astype(dtype)
    image.setflags(write=False)
    first, second = split_photons(image, (0, 0, 0))
    expected = split_photons(image.astype(np.float32), (0, 0, 0))
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first, expected[0])
    np.testing.assert_array_equal(first + second, image)


def test_what_is_not_photons_is_halved():
    image = np.array([[-7.0, 0.0, 4.0, 10.0, 10.4, 9.0]], np.float32)
    first, second = split_photons(image, (0, 0), background=10.0, gain=2.0)
    np.testing.assert_allclose(first, image / 2, atol=1e-6)
    np.testing.assert_allclose(second, image / 2, atol=1e-6)


@pytest.mark.parametrize(("background", "gain"), [(100.0, 4.0), (0.0, 0.25), (3.5, 1.0)])
def test_gain_and_background_count_photons(background, gain):
    photons = np.random.default_rng(5).poisson(30, (40, 40, 40))
    image = (photons * gain + background).astype(np.float32)
    first, second = split_photons(image, (0, 0, 0), background=background, gain=gain)
    np.testing.assert_allclose(first + second, image, rtol=1e-6)
    heads = (first - background / 2) / gain
    np.testing.assert_allclose(heads, np.rint(heads), atol=1e-4)
    tails = photons - heads
    assert abs(np.corrcoef(heads.ravel(), tails.ravel())[0, 1]) < 5 / np.sqrt(heads.size)


def test_a_gain_that_is_too_small_leaves_common_noise_in_both_halves():
    image = (np.random.default_rng(6).poisson(30, (40, 40, 40)) * 4.0).astype(np.float32)
    correlation = {
        gain: np.corrcoef(*(h.ravel() for h in split_photons(image, (0, 0, 0), gain=gain)))[0, 1]
        for gain in (1.0, 4.0, 16.0)
    }
    # Var(y) = gain_true * y, and a split with gain g adds g * y / 4 to each half's noise with opposite sign:
    # covariance (4 - g) y / 4, variance (4 + g) y / 4.
    for gain, expected in [(1.0, 3 / 5), (4.0, 0.0), (16.0, -12 / 20)]:
        assert correlation[gain] == pytest.approx(expected, abs=0.03)


def test_seeds_throw_other_coins():
    image = np.full((30, 30, 30), 50, np.uint16)
    a, b = (split_photons(image, (0, 0, 0), seed=seed)[0].astype(np.float64) for seed in (0, 1))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    np.testing.assert_array_equal(a, split_photons(image, (0, 0, 0), seed=0)[0])


@pytest.mark.parametrize("count", [0, 50, 1000])
def test_memory_is_that_of_the_halves_and_of_a_few_slabs(count):
    image = np.full((64, 200, 200), count, np.uint16)
    tracemalloc.start()
    split_photons(image, (0, 0, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * image.size + 24 * 2**20

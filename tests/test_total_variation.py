"""Total variation: the factor against an independent implementation, and the operator on blocks."""

import itertools
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, seam_rms

from chunkrestore import backend
from chunkrestore.grid import BlockGrid
from chunkrestore.kernels.richardson_lucy import richardson_lucy
from chunkrestore.kernels.total_variation import FLAT, LARGEST, STEEP, smoothed
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian
from chunkrestore.simulate import Camera, Nuclei, embryo

EVERYWHERE = ((True, True),) * 3


def total_variation_factor(estimate, *args):
    """Return the factor alone."""
    return smoothed(np.ones_like(estimate), estimate, *args)


def dey(x, strength, scale, sides, shape):
    """Return the factor in double precision, gradient and divergence as sparse-free matrix-like loops."""
    x = np.asarray(x, dtype=np.float64)
    distance = [side / min(sides) for side in sides]
    # Position of every lattice voxel relative to the image's first; neighbours are one voxel apart.
    places = [
        np.array([i if i < n + (length - n + 1) // 2 else i - length for i in range(length)])
        for n, length in zip(shape, x.shape, strict=True)
    ]
    gradient = np.zeros((x.ndim, *x.shape))
    for axis, place in enumerate(places):
        order = {p: i for i, p in enumerate(place)}
        for i, p in enumerate(place):
            if p + 1 in order:
                here, following = (np.take(x, j, axis) for j in (i, order[p + 1]))
                gradient[(axis, *(slice(None),) * axis, i)] = (following - here) / distance[axis]
    flat = np.hypot(FLAT * scale, STEEP * strength * x)
    field = gradient / np.sqrt((gradient**2).sum(axis=0) + flat**2)
    divergence = np.zeros(x.shape)
    for axis, place in enumerate(places):
        order = {p: i for i, p in enumerate(place)}
        for i, p in enumerate(place):
            index = (*(slice(None),) * axis, i)
            divergence[index] += field[(axis, *index)] / distance[axis]
            if p - 1 in order:
                before = (*(slice(None),) * axis, order[p - 1])
                divergence[index] -= field[(axis, *before)] / distance[axis]
    return 1 / (1 - strength * divergence)


def simulated(photons, shape=(32, 40, 40), seed=7):
    return embryo(shape, seed=seed, nuclei=Nuclei(photons=(0.4 * photons, photons)), camera=Camera())


def psnr(result, truth):
    inner = (slice(6, -6),) * truth.ndim
    error = np.square(result[inner].astype(np.float64) - truth[inner]).mean()
    return 10 * np.log10(np.percentile(truth, 99.9) ** 2 / error)


# --- the factor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lattice", "shape", "sides"),
    [
        ((40, 70, 60), (30, 64, 60), (3.0, 1.0, 1.0)),  # more than one tile along both axes
        ((1, 30, 31), (1, 28, 31), (1.0, 1.0, 1.0)),  # a single plane
        ((20, 600, 12), (17, 590, 9), (1.0, 2.0, 0.5)),
        ((700, 110), (690, 100), (1.0, 1.5)),
        ((3, 2, 5), (3, 1, 4), (1.0, 1.0, 1.0)),
    ],
)
def test_factor_is_that_of_the_equation_in_double_precision(lattice, shape, sides):
    x = np.random.default_rng(1).gamma(1, 10, lattice).astype(np.float32)
    factor = total_variation_factor(x, 0.1, 10.0, sides, shape)
    assert factor.dtype == np.float32
    # Of numbers near 1, after some tens of float32 operations.
    np.testing.assert_allclose(factor, dey(x, 0.1, 10.0, sides, shape), rtol=2e-6)


def test_divergence_is_minus_the_adjoint_of_the_gradient():
    x, y = np.random.default_rng(2).gamma(1, 10, (2, 12, 14, 16)).astype(np.float32)
    sides, scale, strength = (2.0, 1.0, 1.0), 10.0, 1e-3
    divergence = (1 - 1 / total_variation_factor(x, strength, scale, sides).astype(np.float64)) / strength
    length = np.hypot(FLAT * scale, STEEP * strength * x.astype(np.float64)) ** 2
    slopes = []
    for axis, side in enumerate(sides):
        following = np.concatenate([np.delete(x, 0, axis), np.take(x, [-1], axis)], axis)
        slopes.append((following.astype(np.float64) - x) / side)
        length = length + slopes[-1] ** 2
    product = 0.0
    for axis, side in enumerate(sides):
        following = np.concatenate([np.delete(y, 0, axis), np.take(y, [-1], axis)], axis)
        product += (slopes[axis] / np.sqrt(length) * (following.astype(np.float64) - y) / side).sum()
    # 1 - 1 / factor loses the digits that strength is below 1.
    assert -(divergence * y).sum() == pytest.approx(product, rel=1e-4)


def test_factor_stays_positive_at_the_largest_strength():
    rng = np.random.default_rng(3)
    worst = np.full((12, 12, 12), 100.0, np.float32)
    worst[6, 6, 6] = 0.0  # one dark voxel: the largest divergence there is
    for x in (
        worst,
        rng.choice(np.float32([0, 1e-4, 1, 1e5]), (12, 12, 12)),
        np.zeros((4, 4, 4), np.float32),
    ):
        factor = total_variation_factor(x, LARGEST, 1.0)
        assert np.isfinite(factor).all()
        assert 0 < factor.min() <= factor.max() < 1 / (1 - LARGEST * (3 + np.sqrt(3)))


def test_coarse_planes_are_no_edges():
    ramp = np.broadcast_to(np.arange(24.0).reshape(-1, 1, 1) % 2 * 100 + 50, (24, 8, 8)).astype(np.float32)
    change = [np.abs(total_variation_factor(ramp, 0.05, 50.0, (z, 1.0, 1.0)) - 1).max() for z in (1, 2, 4, 8)]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(change))
    assert change[-1] > 0


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("shape", [(130, 40, 44), (6, 300, 210), (900, 350)])
def test_factor_does_not_depend_on_tiles_or_threads(monkeypatch, shape, threads):
    x = np.random.default_rng(4).gamma(1, 10, shape).astype(np.float32)
    monkeypatch.setattr(backend, "_HOST_SLAB", 2**30)
    expected = total_variation_factor(x, 0.02, 10.0)
    for voxels in (2**9, 2**13):
        monkeypatch.setattr(backend, "_HOST_SLAB", voxels)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        np.testing.assert_array_equal(total_variation_factor(x, 0.02, 10.0), expected)


def test_strict_array_namespace_gives_the_same_numbers():
    image = np.random.default_rng(5).poisson(40, (12, 14, 15)).astype(np.uint16)
    options = {"iterations": 6, "start": 40.0, "total_variation": 0.02, "voxel_size": (2.0, 1.0, 1.0)}
    psf = gaussian((1.0, 0.8, 0.8))
    result = richardson_lucy(array_api_strict.asarray(image), psf, **options)
    assert result.dtype == array_api_strict.float32
    expected = richardson_lucy(image, psf, **options)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


# --- in the iterations -------------------------------------------------------------------------------------


def test_iterations_are_those_without_times_the_factor_of_the_estimate_before():
    psf, strength, start = gaussian((1.2, 1.0, 1.0)), 0.02, 30.0
    image = np.random.default_rng(6).poisson(30, (16, 18, 20)).astype(np.uint16)
    inside = ((False, False),) * 3
    options = {"start": start, "acceleration": None, "at_border": inside}
    one = richardson_lucy(image, psf, iterations=1, **options)
    # From a flat start the first factor is 1.
    np.testing.assert_array_equal(
        richardson_lucy(image, psf, iterations=1, total_variation=strength, **options), one
    )
    two = richardson_lucy(image, psf, iterations=2, **options)
    expected = two * dey(one, strength, start, (1.0,) * 3, one.shape)
    result = richardson_lucy(image, psf, iterations=2, total_variation=strength, **options)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * expected.max())


@pytest.mark.parametrize("exponent", [-10, 10])
def test_result_scales_with_the_image(exponent):
    image = simulated(60).image[:24].astype(np.float32)
    operator = RichardsonLucy(gaussian((1.5, 1.0, 1.0)), 15, background=100.0, total_variation=0.01)
    scaled = RichardsonLucy(operator.psf, 15, background=100 * 2.0**exponent, total_variation=0.01)
    # Powers of two leave the digits of every number as they are.
    np.testing.assert_array_equal(scaled(image * np.float32(2**exponent)), operator(image) * 2.0**exponent)


@pytest.mark.parametrize("strength", [0.005, LARGEST])
def test_constant_stays_constant_to_the_corners(strength):
    operator = RichardsonLucy(gaussian((1.5, 1.0, 1.0)), 20, background=10.0, total_variation=strength)
    np.testing.assert_allclose(operator(np.full((18, 20, 22), 60, np.uint16)), 50.0, rtol=1e-5)


@pytest.mark.parametrize("photons", [20, 200])
def test_noise_is_lower_and_the_truth_nearer(photons):
    volume = simulated(photons)
    truth = volume.truth * volume.camera.gain
    without, with_it = (
        RichardsonLucy(volume.psf, 40, background=volume.camera.pedestal, total_variation=strength)(
            volume.image
        )
        for strength in (0.0, 0.01)
    )
    # Measured 4.9 and 4.2 dB (20 and 200 photons) on a volume of 40 x 72 x 72 voxels.
    assert psnr(with_it, truth) > psnr(without, truth) + 2.5
    assert with_it.sum(dtype=np.float64) == pytest.approx(without.sum(dtype=np.float64), rel=0.03)


def test_coarse_planes_are_not_flattened():
    # A lamella that is one plane of 4 micrometres thick, and as thick along x (4 planes of 1 micrometre).
    psf, truth = gaussian((0.5, 1.0, 1.0)), np.full((17, 40, 40), 20.0)
    truth[8] = 200.0
    image = np.random.default_rng(8).poisson(truth).astype(np.uint16)
    options = {"start": 30.0, "total_variation": 0.02}
    equal, scaled = (
        RichardsonLucy(psf, 20, voxel_size=side, **options)(image) for side in (None, (4.0, 1.0, 1.0))
    )
    without = RichardsonLucy(psf, 20, start=30.0)(image)
    kept = [(x[8].mean() - x[5].mean()) / (without[8].mean() - without[5].mean()) for x in (equal, scaled)]
    assert kept[0] < kept[1] - 0.02
    assert kept[1] > 0.97


def test_single_planes_equal_images():
    image = np.random.default_rng(9).poisson(50, (40, 44)).astype(np.uint16)
    options = {"start": 50.0, "total_variation": 0.01}
    plane = RichardsonLucy(gaussian((0.0, 1.2, 1.2)), 10, **options)(image[None])
    np.testing.assert_allclose(
        plane[0], RichardsonLucy(gaussian((1.2, 1.2)), 10, **options)(image), rtol=0, atol=1e-4 * plane.max()
    )


def test_first_and_last_plane_are_no_neighbours():
    image = np.full((10, 24, 24), 10.0, np.float32)
    image[-1, 8:16, 8:16] = 1000.0
    operator = RichardsonLucy(gaussian((0.0, 1.0, 1.0)), 20, start=20.0, total_variation=0.05)
    np.testing.assert_allclose(operator(image)[0, 8:16, 8:16], 10.0, rtol=0.01)


# --- tiled against untiled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.01, LARGEST])
def test_tiled_equals_untiled_at_default_depth(strength):
    volume = simulated(60, shape=(52, 40, 40))
    operator = RichardsonLucy(
        volume.psf,
        20,
        background=volume.camera.pedestal,
        start=40.0,
        total_variation=strength,
        voxel_size=(2.0, 1.0, 1.0),
    )
    whole = operator(volume.image)
    for edges in (((0, 25, 52), (0, 40), (0, 17, 40)), ((0, 52), (0, 14, 25, 40), (0, 40))):
        grid = BlockGrid(edges, operator.halo(volume.image.shape))
        assert seam_rms(assemble(operator, volume.image, grid), whole, grid) <= 1e-3


def test_tiled_equals_untiled_along_an_axis_that_is_not_blurred():
    image = simulated(60, shape=(48, 40, 40)).image
    operator = RichardsonLucy(
        gaussian((0.0, 1.2, 1.2)), 20, start=200.0, background=100.0, total_variation=0.02
    )
    grid = BlockGrid(((0, 9, 24, 48), (0, 40), (0, 40)), operator.halo(image.shape))
    assert 0 < grid.halo.depth[0] < 16
    assert seam_rms(assemble(operator, image, grid), operator(image), grid) <= 1e-3


def test_exact_depth_leaves_rounding_only():
    psf, iterations = gaussian((0.7, 0.7), truncate=2.0), 3
    exact = tuple(2 * iterations * (p // 2) + 2 * iterations for p in psf.shape)
    image = np.random.default_rng(14).poisson(30, (120, 90)).astype(np.uint16)
    operator = RichardsonLucy(psf, iterations, depth=exact, start=30.0, total_variation=0.05)
    grid = BlockGrid.regular(image.shape, (30, 45), operator.halo(image.shape))
    whole = operator(image)
    # Ripples that total variation damps enlarge rounding before it does.
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=2e-5 * whole.max())


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize("shape", [(40, 90, 100), (6, 300, 320), (700, 610)])
def test_memory_formula_bounds_the_measured_peak(monkeypatch, shape, acceleration):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    psf = gaussian((2.0, 1.5, 1.5)[-len(shape) :])
    operator = RichardsonLucy(psf, 3, acceleration=acceleration, start=10.0, total_variation=0.01)
    image = np.random.default_rng(15).poisson(10, shape).astype(np.uint16)
    operator(image)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= operator.memory_nbytes(shape) <= 1.15 * peak + 4 * 2**20


# --- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_variation": -0.1}, "`total_variation` must lie between 0 and"),
        ({"total_variation": 2 * LARGEST}, "`total_variation` must lie between 0 and"),
        ({"total_variation": np.nan}, "`total_variation` must be finite"),
        ({"voxel_size": (1.0, 1.0)}, "`voxel_size` .* per axis of the 3-dimensional `psf`"),
        ({"voxel_size": (1.0, 0.0, 1.0)}, "`voxel_size`"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RichardsonLucy(gaussian((1.0, 1.0, 1.0)), **arguments)


def test_operators_with_another_strength_differ():
    psf = gaussian((1.0, 1.0))
    one, other = (RichardsonLucy(psf, total_variation=strength) for strength in (0.0, 0.01))
    assert one != other
    assert other.describe()["total_variation"] == 0.01

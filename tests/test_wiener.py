"""Inverse filters: the kernel against independent solutions, and the operator on blocks."""

import itertools
import json
import math
import pickle
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, blurred, nuclei, seam_rms, skewed
from scipy import ndimage

from chunkrestore import backend
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.wiener import (
    PRIORS,
    inverse_filter,
    inverse_filtered,
    inverse_reach,
    mirror_padded,
    mirrored_lattice,
)
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.pilot import pilot_regions
from chunkrestore.operators.signal_to_noise import signal_to_noise
from chunkrestore.operators.wiener import Wiener, regularization_for
from chunkrestore.psf import gaussian, prepare
from chunkrestore.psf.varying import PsfField
from chunkrestore.statistics import NonFiniteError

EVERYWHERE = ((True, True),) * 3
MISSING = backend.missing_device()


def circulant(psf, shape):
    """Return the matrix of periodic convolution with a centred `psf`, built from shifted unit images."""
    columns = []
    for position in np.ndindex(shape):
        column = np.zeros(shape)
        for index in np.ndindex(psf.shape):
            at = tuple(
                (a + i - p // 2) % n for a, i, p, n in zip(position, index, psf.shape, shape, strict=True)
            )
            column[at] += psf[index]
        columns.append(column.ravel())
    return np.array(columns).T


# --- the filter against independent solutions --------------------------------------------------------------


@pytest.mark.parametrize("regularization", [0.001, 0.05, 2.0])
@pytest.mark.parametrize("voxel_size", [None, (0.3, 0.1)])
@pytest.mark.parametrize("prior", PRIORS)
def test_solves_the_regularized_least_squares_problem(prior, voxel_size, regularization):
    shape, psf = (6, 10), skewed((4, 5))
    image = np.random.default_rng(1).normal(5, 2, shape).astype(np.float32)
    blur, scale = circulant(psf.astype(np.float64), shape), 1 + regularization
    penalty = np.eye(60)
    if prior == "laplacian":
        weights, scale = ((1 / 9, 1) if voxel_size else (1, 1)), 1.0
        second = np.zeros((3, 3))
        second[:, 1] += np.array([-1, 2, -1]) * weights[0]
        second[1] += np.array([-1, 2, -1]) * weights[1]
        penalty = circulant(second, shape)
    normal = blur.T @ blur + regularization * penalty.T @ penalty
    expected = scale * np.linalg.solve(normal, blur.T @ image.ravel().astype(np.float64))
    inverse = inverse_filter(
        psf, shape, image, regularization=regularization, prior=prior, voxel_size=voxel_size
    )
    result = inverse_filtered(image, inverse, before=(0, 0))
    # Rounding of float32 transforms, amplified by at most 1 / (2 sqrt(alpha)).
    np.testing.assert_allclose(result.ravel(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("size", "psf_size"), [(140, 9), (141, 8)])
@pytest.mark.parametrize("prior", PRIORS)
def test_agrees_with_scikit_image_on_the_interior(prior, size, psf_size):
    from skimage.restoration import wiener as reference

    psf, alpha = skewed((psf_size, psf_size)), 0.05
    image = np.random.default_rng(2).poisson(20, (size, size)).astype(np.float64)
    flat = np.ones((size, size // 2 + 1), complex) if prior == "constant" else None
    expected = reference(image, psf.astype(np.float64), alpha, reg=flat, clip=False)
    if prior == "constant":
        expected *= 1 + alpha  # scikit-image does not keep the mean
    operator = Wiener(psf, regularization=alpha, prior=prior, tolerance=1e-5)
    reach = operator.halo(image.shape).depth[0]
    interior = (slice(reach, size - reach),) * 2
    assert expected[interior].size >= 300
    result = operator(image.astype(np.float32))
    # What lies beyond the border differs; `tolerance` of the result's range is felt at `reach`.
    np.testing.assert_allclose(result[interior], expected[interior], rtol=0, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize(("before", "after"), [(0, 5), (4, 0), (3, 4), (23, 17)])
def test_padding_is_the_mirror_image(before, after):
    image = np.random.default_rng(3).integers(0, 99, (7, 5)).astype(np.uint8)
    padded = mirror_padded(image, (7 + before + after, 5), (before, 0), (0,), 10.0)
    expected = np.pad(image.astype(np.float32) - 10, ((before, after), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(padded, np.roll(expected, -before, axis=0))


def test_lattice_has_room_at_borders_only():
    at_border = ((True, False), (False, False), (True, True))
    assert mirrored_lattice((50, 64, 50), (7, 7, 1), (10, 9, 8), at_border) == (60, 64, 50)
    assert mirrored_lattice((53, 61, 1), (7, 7, 7), (10, 9, 8), EVERYWHERE) == (80, 80, 18)


# --- what is preserved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("psf_shape", list(itertools.product((8, 9), (10, 11))))
@pytest.mark.parametrize("prior", PRIORS)
def test_nothing_moves_for_even_and_odd_sizes(prior, psf_shape):
    psf = skewed(psf_shape)
    for shape in [(60, 64), (61, 65)]:
        grid = np.indices(shape)
        truth = np.exp(-((grid[0] - 29.3) ** 2 + (grid[1] - 32.6) ** 2) / 8)
        result = Wiener(psf, regularization=0.02, prior=prior)(blurred(truth, psf).astype(np.float32))
        for axis in (0, 1):
            shift = (grid[axis] * result).sum() / result.sum() - (grid[axis] * truth).sum() / truth.sum()
            assert abs(shift) < 0.02


def test_nothing_moves_in_3d_with_an_even_asymmetric_psf():
    psf, truth = skewed((6, 8, 7)), np.zeros((44, 47, 46))
    truth[21, 23, 22], truth[23, 24, 25] = 900, 400
    image = blurred(ndimage.gaussian_filter(truth, 1.5), psf).astype(np.float32)
    result = Wiener(psf, regularization=0.001)(image)
    wanted = ndimage.center_of_mass(truth)
    assert np.abs(np.subtract(ndimage.center_of_mass(result), wanted)).max() < 0.02


@pytest.mark.parametrize("prior", PRIORS)
def test_total_light_is_kept(prior):
    psf = gaussian((2.0, 1.2, 1.2), tail=0.1)
    truth = np.zeros((64, 56, 56))
    truth[28:36, 24:32, 22:34] = np.random.default_rng(4).uniform(50, 150, (8, 8, 12))
    image = (np.random.default_rng(5).poisson(blurred(truth, psf).clip(0)) + 7).astype(np.uint16)
    result = Wiener(psf, regularization=0.01, prior=prior, background=7)(image)
    # The filter sums to 1; of what it spreads, a share of `tolerance` is beyond the border.
    assert result.sum(dtype=np.float64) == pytest.approx(image.sum() - 7 * image.size, rel=1e-3)


@pytest.mark.parametrize("shape", [(18, 20, 22), (1, 3, 40)])
@pytest.mark.parametrize("prior", PRIORS)
def test_constant_stays_constant_to_the_corners(prior, shape):
    operator = Wiener(skewed((7, 9, 6)), regularization=0.02, prior=prior, background=10.0)
    np.testing.assert_allclose(operator(np.full(shape, 60, np.uint16)), 50.0, rtol=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_zeros_stay_zero_even_without_regularization(prior):
    result = Wiener(skewed((5, 5, 5)), prior=prior)(np.zeros((12, 13, 14), np.uint8))
    np.testing.assert_array_equal(result, 0)


def test_nothing_of_the_opposite_border_is_seen():
    image = np.zeros((60, 64), np.float32)
    image[:3] = 1000
    result = Wiener(gaussian((2.0, 2.0)), regularization=0.01)(image)
    # A step seen through zero padding or wrap-around rings by tens of percent at the far border.
    assert np.abs(result[-20:]).max() < 1e-3 * result.max()


def test_nothing_rings_at_a_border_that_cuts_an_object():
    psf = gaussian((2.0, 2.0))
    whole = np.zeros((160, 160))
    whole[:, 60:110] = 100.0
    image = ndimage.gaussian_filter(whole, 2.0)[50:110].astype(np.float32)
    result = Wiener(psf, regularization=0.01)(image)
    np.testing.assert_allclose(result, np.broadcast_to(result[30], result.shape), atol=1e-3)


def test_an_axis_of_length_one_is_left_alone():
    psf, image = skewed((1, 7, 4)), np.random.default_rng(6).poisson(30, (5, 40, 41)).astype(np.uint16)
    for prior in PRIORS:
        result = Wiener(psf, regularization=0.02, prior=prior)(image)
        for plane in range(5):
            alone = Wiener(psf[0], regularization=0.02, prior=prior)(image[plane])
            np.testing.assert_allclose(result[plane], alone, rtol=0, atol=2e-5 * alone.max())


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 7)])
def test_psf_of_one_voxel_changes_nothing(shape):
    image = np.random.default_rng(7).poisson(30, shape).astype(np.uint16)
    result = Wiener(np.ones((1, 1, 1)), regularization=0.1, background=4)(image)
    np.testing.assert_allclose(result, image.astype(np.float32) - 4, atol=1e-4)


def test_negative_values_stay_unless_asked_otherwise():
    image = nuclei((20, 30, 30), PSF)[1]
    kept = Wiener(PSF, regularization=0.01)(image)
    assert kept.min() < 0
    clipped = Wiener(PSF, regularization=0.01, non_negative=True)(image)
    np.testing.assert_array_equal(clipped, np.maximum(kept, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_dtype_of_the_image_does_not_matter(dtype):
    image = np.random.default_rng(8).integers(0, 100, (12, 14, 16)).astype(dtype)
    image.setflags(write=False)
    before = image.copy()
    operator = Wiener(skewed((3, 4, 5)), regularization=0.05)
    result = operator(image)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, operator(image.astype(np.float32)))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("decided", [True, False])
def test_strict_array_namespace_gives_the_same_numbers(decided, prior):
    image = np.random.default_rng(9).poisson(40, (12, 14, 15)).astype(np.uint16)
    operator = Wiener(
        skewed((3, 6, 5)),
        regularization=0.05 if decided else None,
        prior=prior,
        voxel_size=(3, 1, 1),
        non_negative=decided,
        background=3,
    )
    result = operator(array_api_strict.asarray(image))
    assert type(result) is type(array_api_strict.asarray(image))
    assert result.dtype == array_api_strict.float32
    expected = operator(image)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


def test_torch_gives_the_same_numbers():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    image = np.random.default_rng(10).poisson(40, (12, 14, 15)).astype(np.float32)
    operator = Wiener(skewed((3, 6, 5)), regularization=0.05)
    expected = operator(image)
    result = np.asarray(operator(torch.asarray(image)))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("prior", PRIORS)
def test_device_result_is_that_of_the_host_and_stays_on_the_device(prior):
    image = nuclei((20, 30, 30), PSF)[1]
    on_device = backend.to_device(image, "cuda")
    operator = Wiener(PSF, prior=prior, voxel_size=(0.3, 0.1, 0.1), non_negative=True)
    result, expected = operator(on_device), operator(image)
    assert type(result) is type(on_device)
    assert result.dtype == np.float32
    np.testing.assert_allclose(backend.to_numpy(result), expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("photons", [10, 100, 1000])
def test_measured_regularization_is_near_the_best_and_better_than_the_raw_image(photons, prior):
    psf = gaussian((2.0, 1.2, 1.2), tail=0.1)
    truth, image = nuclei((32, 60, 60), psf, photons=photons)

    def psnr(result):
        return 10 * math.log10(float(truth.max()) ** 2 / np.square(result - truth).mean())

    alphas = np.geomspace(1e-4, 1, 9)
    best = max(psnr(Wiener(psf, regularization=a, prior=prior, depth=30)(image)) for a in alphas)
    measured = psnr(Wiener(psf, prior=prior)(image))
    assert measured >= best - 1
    assert measured >= psnr(image) + 1


# --- tiled against untiled ---------------------------------------------------------------------------------

SKEWED = prepare(gaussian((1.4, 0.9, 0.9)) * np.linspace(0.5, 1.5, 9))
GRIDS = {
    "cubes": lambda shape, halo: BlockGrid.regular(shape, (32, 32, 32), halo),
    "slabs": lambda shape, halo: BlockGrid.regular(shape, (17, 64, 50), halo),
    "uneven": lambda shape, halo: BlockGrid(((0, 9, 40, 64), (0, 31, 72), (0, 20, 27, 72)), halo),
}


@pytest.fixture(scope="module")
def volume():
    return nuclei((64, 72, 72), SKEWED)[1]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", GRIDS)
def test_tiled_equals_untiled_at_default_depth(volume, name, prior, tolerance):
    operator = Wiener(SKEWED, regularization=0.05, prior=prior, tolerance=tolerance)
    grid = GRIDS[name](volume.shape, operator.halo(volume.shape))
    assert len(grid) > 3
    assert seam_rms(assemble(operator, volume, grid), operator(volume), grid) <= tolerance


def test_tiled_equals_untiled_at_the_depth_planned_before_the_measurement(volume):
    planned = Wiener(SKEWED, background=1.0)
    grid = GRIDS["uneven"](volume.shape, planned.halo(volume.shape))
    resolved = planned.resolve({"pilot": planned.pilot({}, lambda region: volume[region], volume.shape)})
    assert resolved.halo(volume.shape) == planned.halo(volume.shape)
    whole = planned(volume)
    np.testing.assert_array_equal(whole, resolved(volume))
    assert seam_rms(assemble(resolved, volume, grid), whole, grid) <= 1e-3


@pytest.mark.parametrize("prior", PRIORS)
def test_seams_fall_as_depth_grows_down_to_rounding(volume, prior):
    image = volume[:, :48, :48]
    whole = Wiener(SKEWED, regularization=0.05, prior=prior, depth=64)(image)
    errors = []
    for depth in (0, 6, 12, 18, 36):
        operator = Wiener(SKEWED, regularization=0.05, prior=prior, depth=depth)
        # Without fast lengths, so that `depth` alone decides what is read.
        grid = BlockGrid.regular(image.shape, (21, 48, 48), Halo(operator.halo(image.shape).depth))
        errors.append(seam_rms(assemble(operator, image, grid), whole, grid))
    assert errors[0] > 0.01
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-6


@pytest.mark.parametrize(
    "psf", [gaussian((2.0, 1.2, 1.2), tail=0.1), skewed((7, 9, 6)), gaussian((0.5, 0.5))]
)
@pytest.mark.parametrize("prior", PRIORS)
def test_undecided_depth_and_memory_bound_the_decided_ones(psf, prior):
    shape = (80,) * psf.ndim
    undecided = Wiener(psf, prior=prior)
    for ratio in (0.0, 1.0, 3.0, 8.0, 20.0, 60.0, math.inf):
        alpha = regularization_for(ratio, prior)
        decided = Wiener(psf, prior=prior, regularization=alpha)
        most = undecided.halo(shape).depth
        assert all(a <= b for a, b in zip(decided.halo(shape).depth, most, strict=True))
        assert decided.memory_nbytes(shape) <= undecided.memory_nbytes(shape)


def test_reach_is_what_the_kernel_says():
    # With blur along one axis the planes are single voxels and the bound is a sum over the kernel itself.
    psf, alpha, n = skewed((9, 1)), 0.02, 4096
    inverse = inverse_filter(psf, (n, 1), np.zeros(1, np.float32), regularization=alpha)
    kernel = np.roll(inverse.synthesise(inverse.otf)[:, 0], n // 2).astype(np.float64)
    energy = np.square(kernel)
    reach, _ = inverse_reach(psf, 1e-3, regularization=alpha)
    beyond = [
        math.sqrt(2 * (1 - energy[n // 2 - d : n // 2 + d + 1].sum() / energy.sum()))
        for d in (reach - 1, reach)
    ]
    assert beyond[0] > 1e-3 >= beyond[1]


def test_reach_is_zero_along_axes_that_are_left_alone_and_grows_with_what_is_asked():
    wide = gaussian((4.0, 2.0, 0.0))
    reach = inverse_reach(wide, 1e-3, regularization=0.01)
    assert reach[0] > reach[1] > reach[2] == 0
    finer = inverse_reach(wide, 1e-4, regularization=0.01)
    assert all(a > b for a, b in zip(finer[:2], reach[:2], strict=True))
    assert inverse_reach(wide, 1e-9, regularization=0.01) == inverse_reach(wide, 1e-6, regularization=0.01)


# --- the operator ------------------------------------------------------------------------------------------

PSF = gaussian((1.5, 1.0, 1.0))


def test_operator_keeps_to_the_protocol():
    assert isinstance(Wiener(PSF), ImageOperator)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"psf": -PSF}, ValueError, "`psf` holds .* negative"),
        ({"psf": np.zeros((3, 3))}, ValueError, "`psf` is zero"),
        ({"regularization": 0}, ValueError, "`regularization` must lie between 1e-06 and 10, got 0"),
        ({"regularization": -0.1}, ValueError, "`regularization`"),
        ({"regularization": 11}, ValueError, "`regularization`"),
        ({"regularization": np.nan}, ValueError, "`regularization` must be finite"),
        ({"regularization": "auto"}, TypeError, "`regularization` must be a number"),
        ({"prior": "tikhonov"}, ValueError, '`prior` must be "constant" or "laplacian", got'),
        ({"voxel_size": (1, 1)}, ValueError, "`voxel_size`.*3-dimensional"),
        ({"voxel_size": (1, 0, 1)}, ValueError, "`voxel_size`.*positive"),
        ({"non_negative": 1}, TypeError, "`non_negative` must be True or False, got 1"),
        ({"background": -1}, ValueError, "`background` must be at least 0"),
        ({"tolerance": 0}, ValueError, "`tolerance`"),
        ({"depth": (4, 4)}, ValueError, "`depth`.*3-dimensional"),
    ],
)
def test_bad_parameters_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Wiener(**{"psf": PSF, **arguments})


def test_psf_that_varies_is_refused():
    field = PsfField([PSF, PSF], [(0, 0, 0), (40, 0, 0)])
    with pytest.raises(ValueError, match=r"`psf` varies with position.*RichardsonLucy"):
        Wiener(field, regularization=0.1)


def test_check_names_what_does_not_fit():
    operator = Wiener(PSF)
    operator.check((64, 64, 64), np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"`psf` has 3 dimensions .* 2 spatial axes"):
        operator.check((64, 64), np.dtype(np.uint16))


def test_block_needs_a_decision_and_what_it_reads_and_finite_voxels():
    image, block = np.ones((8, 8, 8), np.float32), Block.whole((8, 8, 8))
    with pytest.raises(ValueError, match="`regularization` is not decided"):
        Wiener(PSF)(image, block)
    operator = Wiener(PSF, regularization=0.1)
    with pytest.raises(ValueError, match=r"`image` has shape \(8, 8, 7\) but .* reads \(8, 8, 8\)"):
        operator(image[:, :, :7], block)
    image[3, 4, 5] = np.nan
    with pytest.raises(NonFiniteError, match=r"block \(0, 0, 0\)"):
        operator(image, block)


@pytest.mark.parametrize("prior", PRIORS)
def test_pilot_measures_and_the_decision_is_described(prior):
    image = nuclei((40, 60, 60), PSF, photons=100, background=50)[1]
    operator = Wiener(PSF, prior=prior, background=50)
    assert operator.needs == {"pilot", "maximum"}
    pilot = json.loads(json.dumps(operator.pilot({}, lambda region: image[region], image.shape)))
    assert pilot["signal_to_noise"] == pytest.approx(signal_to_noise([image], background=50), rel=1e-3)
    assert 6 < pilot["signal_to_noise"] < 12
    resolved = operator.resolve({"pilot": pilot})
    assert resolved.needs == frozenset()
    assert resolved.regularization == pytest.approx(
        regularization_for(pilot["signal_to_noise"], prior), rel=1e-3
    )
    described = json.loads(json.dumps(resolved.describe()))
    assert described["decision"] == pilot
    assert len(pilot["regions"]) == len(pilot_regions(lambda region: image[region], image.shape))


def test_a_background_above_everything_is_refused():
    with pytest.raises(ValueError, match="`background` 50 is not below the image, whose maximum is 9"):
        Wiener(PSF, background=50)(np.full((20, 30, 30), 9, np.uint8))


def test_noise_free_and_dark_volumes_get_the_limits():
    bright, dark = np.full((20, 30, 30), 9, np.uint8), np.zeros((20, 30, 30), np.uint8)
    pilots = [Wiener(PSF).pilot({}, lambda region, v=v: v[region], v.shape) for v in (bright, dark)]
    assert [p["signal_to_noise"] for p in pilots] == [None, 0.0]
    assert [p["regularization"] for p in pilots] == [0.004, 0.4]


def test_a_number_is_not_measured_again():
    operator = Wiener(PSF, regularization=0.02)
    assert operator.needs == frozenset()
    assert operator.resolve({}) == operator


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("shape", [(64, 120, 130), (900, 910)])
def test_memory_formula_bounds_the_measured_peak(shape, prior):
    psf = gaussian((2.0, 1.5, 1.5)[-len(shape) :])
    operator = Wiener(psf, regularization=0.02, prior=prior, non_negative=True)
    image = np.random.default_rng(11).poisson(10, shape).astype(np.uint16)
    operator(image)
    predicted = operator.memory_nbytes(shape)
    for clear in (False, True):
        if clear:
            LAST_BLUR.get(None, lambda: None)
        tracemalloc.start()
        operator(image)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= predicted
    # The formula counts 4 MiB for temporaries whatever the block, beside the lattice.
    assert predicted <= 1.1 * peak + 4 * 2**20


def test_operators_compare_hash_and_pickle_by_what_they_compute():
    operator = Wiener(PSF, regularization=0.02, prior="laplacian", voxel_size=(0.3, 0.1, 0.1))
    operator(np.ones((40, 40, 40), np.float32))
    same = pickle.loads(pickle.dumps(operator))
    assert len(pickle.dumps(operator)) < PSF.nbytes + 2000
    assert same == operator
    assert hash(same) == hash(operator)
    assert len({operator, same, Wiener(PSF, regularization=0.02), Wiener(PSF)}) == 3


def test_one_filter_serves_blocks_of_one_shape_and_another_alpha_makes_its_own():
    image = np.random.default_rng(12).poisson(20, (30, 24, 24)).astype(np.uint16)
    first, second = Wiener(PSF, regularization=0.02), Wiener(PSF, regularization=0.3)
    expected = first(image)
    assert np.abs(second(image) - expected).max() > 1
    np.testing.assert_array_equal(first(image), expected)


def test_describe_identifies_the_result():
    operator = Wiener(PSF, regularization=0.02, background=2.0, depth=5, voxel_size=(0.3, 0.1, 0.1))
    described = json.loads(json.dumps(operator.describe()))
    assert described["operator"] == "wiener"
    assert (described["regularization"], described["prior"], described["depth"]) == (
        0.02,
        "constant",
        [5, 5, 5],
    )
    assert (described["voxel_size"], described["non_negative"]) == ([0.3, 0.1, 0.1], False)
    assert len(described["psf_sha256"]) == 64

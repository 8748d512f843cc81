"""Gradient consensus: the kernel against direct space, and the operator on blocks."""

import itertools
import json
import pickle
import tracemalloc
from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, blurred, skewed
from scipy import ndimage

from chunkrestore import backend
from chunkrestore.grid import Block, BlockGrid
from chunkrestore.kernels.blur import Blur, lattice_shape
from chunkrestore.kernels.gradient_consensus import consensus_estimates
from chunkrestore.kernels.photon_splitting import split_photons
from chunkrestore.kernels.richardson_lucy import last_estimate
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.gradient_consensus import GradientConsensus
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian, prepare
from chunkrestore.psf.varying import PsfField

PSF = gaussian((1.5, 1.0, 1.0))
ACCELERATIONS = ["heavy-ball", None]
MISSING = backend.missing_device()


def nuclei(shape, psf, *, photons, seed=1):
    """Return balls that run across the field of view, and their noisy image."""
    rng, reach = np.random.default_rng(seed), 5
    margin = max(psf.shape)
    truth = np.full(tuple(n + 2 * margin for n in shape), 0.02)
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * len(shape)])
    for _ in range(truth.size // 2000):
        centre = [int(rng.integers(reach, n - reach)) for n in truth.shape]
        around = tuple(slice(c - reach, c + reach + 1) for c in centre)
        truth[around][ball < rng.uniform(2.5, reach) ** 2] += rng.uniform(0.3, 1)
    image = blurred(truth, psf)
    scale = photons / np.percentile(image, 99.9)
    field = tuple(slice(margin, margin + n) for n in shape)
    noisy = rng.poisson(np.maximum(image, 0) * scale)
    return (truth * scale)[field].astype(np.float32), noisy[field].astype(np.uint16)


def _blur(psf, shape, reference):
    return Blur.from_psf(psf, lattice_shape(shape, psf.shape, ((True, True),) * len(shape)), reference)


def consensus(image, psf, *, iterations, start, **options):
    """Return the last estimate of the kernel."""
    origin, background = (0,) * image.ndim, options.get("background", 0.0)
    first, _ = split_photons(np.asarray(image), origin, background=background)
    first = backend.asarray_like(first, image)
    noise = float(np.square(psf, dtype=np.float64).sum())
    estimates = consensus_estimates(
        image,
        first,
        _blur(psf, image.shape, image),
        iterations=iterations,
        start=start,
        noise=noise,
        **options,
    )
    *_, last = estimates
    return last[tuple(slice(n) for n in image.shape)]


def direct(image, first, psf, *, iterations, start, background=0.0, stray=0.0, accelerated=False, mask=None):
    """Return the same iterations in direct space and double precision, on a canvas that nothing leaves."""
    psf, margin = psf.astype(np.float64), [(p, p) for p in psf.shape]
    inside = tuple(slice(a, -b) for a, b in margin)
    noise = np.square(psf).sum()
    seen = np.pad(np.ones(image.shape) if mask is None else mask.astype(np.float64), margin)
    halves = [np.pad(half.astype(np.float64), margin) for half in (first, image - first.astype(np.float64))]

    def blur(x):
        return ndimage.convolve(x, psf, mode="constant")

    def back(x):
        return ndimage.correlate(x, psf, mode="constant")

    share = np.maximum(back(seen), 0.01)
    now = np.full(seen.shape, float(start))
    before = now
    for k in range(1, iterations + 1):
        factor = (k - 1) / (k + 2) if accelerated else 0.0
        ahead = np.maximum(now + factor * (now - before), now / 2)
        expected = (blur(ahead) + background) / 2
        one, other = (back(seen * (half / expected - 1)) / share for half in halves)
        votes = np.zeros(seen.shape)
        votes[inside] = np.clip(one * other, -1, 1)[inside]
        agreement = np.ones(seen.shape)
        precision = (ahead + background) ** 2 / (noise * (ahead + stray + noise)) + 10
        agreement[inside] = np.clip(back(blur(votes)) * precision, 0, 1)[inside]
        before, now = now, ahead * (1 + agreement * (one + other) / 2)
    return now[inside]


def seams(tiled, whole, grid):
    """Return the worst rms and the largest difference next to core borders, relative to a robust range."""
    difference = np.abs(tiled.astype(np.float64) - whole)
    planes = [
        np.take(difference, border + side, axis=axis)
        for axis, edges in enumerate(grid.edges)
        for border in edges[1:-1]
        for side in (-1, 0)
    ]
    scale = np.percentile(whole, 99.9) - np.percentile(whole, 0.1)
    return max(np.sqrt(np.square(p).mean()) for p in planes) / scale, max(p.max() for p in planes) / scale


def psnr(result, truth):
    return 10 * np.log10(np.ptp(truth) ** 2 / np.mean((result - truth) ** 2))


# --- the kernel against direct space -----------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("shape", "psf_shape"), [((14, 15, 17), (5, 7, 3)), ((21, 26), (7, 6)), ((1, 20, 21), (1, 4, 5))]
)
def test_agrees_with_direct_space_up_to_the_border(shape, psf_shape, accelerated):
    psf = skewed(psf_shape)
    image = np.random.default_rng(6).poisson(
        ndimage.gaussian_filter(np.random.default_rng(7).random(shape), 1) * 90
    )
    image = image.astype(np.uint16)
    options = {"iterations": 8, "start": 25.0, "background": 3.5, "stray": 2.0}
    how = "heavy-ball" if accelerated else None
    result = consensus(image, psf, acceleration=how, **options)
    first, _ = split_photons(image, (0,) * image.ndim, background=3.5)
    expected = direct(image, first, psf, accelerated=accelerated, **options)
    plain = last_estimate(
        image, _blur(psf, shape, image), acceleration=how, iterations=8, start=25.0, background=3.5
    )
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * expected.max())
    # Consensus did decide something: far from plain Richardson-Lucy.
    assert np.abs(plain - expected).max() > 0.05 * expected.max()


def test_agrees_with_direct_space_where_voxels_were_not_observed():
    psf, shape = skewed((5, 4, 3)), (13, 14, 12)
    image = np.random.default_rng(8).poisson(40, shape).astype(np.uint16)
    mask = np.random.default_rng(9).random(shape) > 0.1
    first, _ = split_photons(image, (0, 0, 0))
    result = consensus(image, psf, iterations=6, start=40.0, mask=mask, acceleration=None)
    expected = direct(image, first, psf, iterations=6, start=40.0, mask=mask)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * expected.max())


def test_one_psf_given_twice_is_one_psf():
    image = nuclei((20, 26, 24), PSF, photons=40)[1]
    field = PsfField([PSF, PSF], [(2, 0, 0), (16, 0, 0)])
    one, two = (GradientConsensus(psf, 8, stop=None)(image) for psf in (PSF, field))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-4 * one.max())


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_strict_array_namespace_gives_the_same_numbers(acceleration):
    image = np.random.default_rng(12).poisson(40, (12, 14, 15)).astype(np.uint16)
    mask = image < 55
    options = {"iterations": 8, "start": 40.0, "acceleration": acceleration}
    psf = skewed((3, 6, 5))
    result = consensus(array_api_strict.asarray(image), psf, mask=array_api_strict.asarray(mask), **options)
    assert type(result) is type(array_api_strict.asarray(image))
    assert result.dtype == array_api_strict.float32
    expected = consensus(image, psf, mask=mask, **options)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_device_result_is_that_of_the_host():
    image = nuclei((24, 30, 32), PSF, photons=50)[1]
    operator = GradientConsensus(PSF, 15, start=10.0, saturation=1e4, stop=None)
    on_device = backend.to_device(image, "cuda")
    result = operator(on_device)
    assert type(result) is type(on_device)
    expected = operator(image)
    np.testing.assert_allclose(backend.to_numpy(result), expected, rtol=0, atol=1e-3 * expected.max())


# --- what is preserved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_light_is_kept_and_not_doubled(acceleration):
    psf = gaussian((1.5, 1.2, 1.2), tail=0.1)
    truth = np.zeros((44, 40, 40))
    truth[18:26, 16:24, 15:25] = np.random.default_rng(8).uniform(50, 150, (8, 8, 10))
    image = np.random.default_rng(17).poisson(blurred(truth, psf).clip(0)).astype(np.uint16)
    result = consensus(image, psf, iterations=30, start=1.0, acceleration=acceleration)
    assert result.sum(dtype=np.float64) == pytest.approx(image.sum(), rel=0.01)


def test_without_noise_the_blurred_estimate_approaches_the_image():
    psf = gaussian((1.5, 1.5))
    truth = ndimage.gaussian_filter(np.random.default_rng(3).random((40, 44)), 2) * 1e6
    image = blurred(np.pad(truth, 12, mode="edge"), psf)[12:-12, 12:-12].astype(np.float32)
    result = consensus(image, psf, iterations=30, start=float(image.mean()))
    again = blurred(result, psf)[12:-12, 12:-12]
    np.testing.assert_allclose(again, image[12:-12, 12:-12], rtol=0.005)


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_constant_stays_constant_to_the_corners(acceleration):
    operator = GradientConsensus(skewed((7, 9, 6)), 20, background=10.0, acceleration=acceleration, stop=None)
    np.testing.assert_allclose(operator(np.full((18, 20, 22), 60, np.uint16)), 50.0, rtol=2e-5)


@pytest.mark.parametrize("stop", [None, "i-divergence"])
def test_zeros_become_dark_everywhere(stop):
    result = GradientConsensus(skewed((5, 5, 5)), 10, start=1e-3, stop=stop)(np.zeros((12, 13, 14), np.uint8))
    assert 0 <= result.min() <= result.max() < 1e-3


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_empty_regions_stay_finite_and_become_dark(acceleration):
    image = np.zeros((40, 32, 32), np.uint16)
    image[:8] = np.random.default_rng(9).poisson(200, (8, 32, 32))
    result = consensus(
        image, gaussian((1.5, 1.5, 1.5)), iterations=100, start=40.0, acceleration=acceleration
    )
    assert np.isfinite(result).all()
    assert result.min() >= 0
    # Below the light of one photon that is spread by the point spread function, nobody can tell.
    assert result[20:].max() < 0.05


def test_one_hot_voxel_in_the_dark_keeps_its_light():
    image = np.zeros((20, 24, 24), np.uint16)
    image[10, 12, 12], image[0, 0, 0] = 60000, 1
    result = consensus(image, gaussian((2.0, 1.5, 1.5)), iterations=50, start=float(image.mean()))
    assert result[4:17, 6:19, 6:19].sum() == pytest.approx(60000, rel=0.02)


def test_a_hot_voxel_does_not_change_what_is_far_from_it():
    psf = gaussian((1.0, 1.0))
    image = nuclei((90, 60), psf, photons=30)[1]
    hot = image.copy()
    hot[80, 30] = 65535
    one, other = (consensus(i, psf, iterations=10, start=10.0) for i in (image, hot))
    np.testing.assert_allclose(other[:25], one[:25], rtol=0, atol=1e-3 * one.max())


def test_negative_voxels_are_taken_as_they_are():
    image = np.random.default_rng(10).normal(5, 4, (16, 16, 16)).astype(np.float32)
    result = consensus(image, gaussian((1.0, 1.0, 1.0)), iterations=20, start=5.0)
    assert np.isfinite(result).all()
    assert result.min() >= 0


@pytest.mark.parametrize("psf_shape", list(itertools.product((8, 9), (10, 11))))
def test_nothing_moves_for_even_and_odd_sizes(psf_shape):
    psf, shape = skewed(psf_shape), (41, 44)
    grid = np.indices(shape)
    truth = 1e5 * np.exp(-((grid[0] - 19.3) ** 2 + (grid[1] - 22.6) ** 2) / 8)
    image = np.random.default_rng(2).poisson(blurred(truth, psf).clip(0)).astype(np.float32)
    result = consensus(image, psf, iterations=30, start=float(image.mean()))
    for axis in (0, 1):
        shift = (grid[axis] * result).sum() / result.sum() - (grid[axis] * truth).sum() / truth.sum()
        assert abs(shift) < 0.02


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_dtype_of_the_image_does_not_matter(dtype):
    image = np.random.default_rng(11).integers(0, 100, (12, 14, 16)).astype(dtype)
    image.setflags(write=False)
    operator = GradientConsensus(skewed((3, 4, 5)), 5, start=50.0, stop=None)
    result = operator(image)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, operator(image.astype(np.float32)))


@pytest.mark.parametrize("how", ["mask", "missing", "saturation"])
def test_what_was_not_observed_does_not_matter(how):
    truth, image = nuclei((20, 26, 28), PSF, photons=60)
    image = np.maximum(image, 1)
    hidden = np.random.default_rng(13).random(image.shape) < 0.05
    bad = {"mask": 999, "missing": 0, "saturation": 60000}[how]
    given = {"mask": {"mask": ~hidden}, "missing": {"missing": 0}, "saturation": {"saturation": 50000}}[how]
    spoilt = np.where(hidden, bad, image).astype(np.uint16)
    options = {"iterations": 10, "start": 20.0, "stop": None}
    result = GradientConsensus(PSF, **options, **given)(spoilt)
    reference = GradientConsensus(PSF, **options, mask=~hidden)(image)
    np.testing.assert_allclose(result, reference, rtol=0, atol=1e-5 * reference.max())
    assert psnr(result, truth) > psnr(GradientConsensus(PSF, **options)(image), truth) - 0.3


# --- noise -------------------------------------------------------------------------------------------------


def quality(operator, image, truth):
    """Return the PSNR after every iteration."""
    operator = replace(operator.resolve({"mean": float(image.mean())}), stop=None)
    origin, inside = (0,) * image.ndim, tuple(slice(n) for n in image.shape)
    blur = operator._blur(image, origin, ((True, True),) * image.ndim)
    return [psnr(e[inside], truth) for e in operator._estimates(image, blur, None, origin)]


@pytest.mark.parametrize(("photons", "loss"), [(20, 0.6), (100, 0.4)])
def test_does_not_overfit(photons, loss):
    psf = gaussian((1.3, 1.0, 1.0))
    truth, image = nuclei((16, 28, 28), psf, photons=photons)
    ours, plain = (quality(c(psf, 200), image, truth) for c in (GradientConsensus, RichardsonLucy))
    # What caution costs, and what it saves (measured: 0.36 and 0.25 dB lost against 15 and 13 dB).
    assert max(ours) > max(plain) - 0.5
    assert ours[-1] > max(ours) - loss
    assert plain[-1] < max(plain) - 10


def test_flat_noise_is_not_sharpened():
    psf = gaussian((1.5, 1.5))
    image = np.random.default_rng(14).poisson(30, (80, 80)).astype(np.uint16)
    ours, plain = (
        operator(psf, 50, **options)(image)[10:-10, 10:-10].std()
        for operator, options in [(GradientConsensus, {"stop": None}), (RichardsonLucy, {})]
    )
    assert ours < 0.1 * plain
    assert ours < image.std()


def test_gain_that_is_too_small_lets_noise_through():
    psf = gaussian((1.5, 1.2, 1.2))
    truth, counted = nuclei((20, 32, 32), psf, photons=20)
    image = (4 * counted).astype(np.uint16)
    error = {
        gain: quality(GradientConsensus(psf, 60, gain=gain), image, 4 * truth)[-1]
        for gain in (1.0, 4.0, 16.0)
    }
    assert error[1.0] < error[4.0] - 1
    assert error[16.0] > error[4.0] - 0.5


def test_offset_tells_stray_light_from_the_camera():
    psf = gaussian((1.5, 1.2, 1.2))
    truth, image = nuclei((20, 32, 32), psf, photons=20)
    stray = np.random.default_rng(15).poisson(10, image.shape)
    image = (image + stray + 100).astype(np.uint16)
    known, unknown = (
        quality(GradientConsensus(psf, 60, background=110.0, offset=offset), image, truth)[-1]
        for offset in (100.0, None)
    )
    assert known > unknown + 0.3


# --- tiled against untiled ---------------------------------------------------------------------------------

SKEWED = prepare(gaussian((1.4, 0.9, 0.9)) * np.linspace(0.5, 1.5, 9))
GRIDS = {
    "cubes": lambda shape, halo: BlockGrid.regular(shape, (32, 32, 32), halo),
    "slabs": lambda shape, halo: BlockGrid.regular(shape, (13, 64, 64), halo),
    "uneven": lambda shape, halo: BlockGrid(((0, 9, 42), (0, 31, 50), (0, 22, 27, 50)), halo),
}


@pytest.fixture(scope="module")
def volume():
    return nuclei((42, 50, 50), SKEWED, photons=60)[1]


@pytest.mark.parametrize("name", GRIDS)
def test_tiled_equals_untiled_at_default_depth(volume, name):
    operator = GradientConsensus(SKEWED, 20, start=float(volume.mean()), stop=None)
    grid = GRIDS[name](volume.shape, operator.halo(volume.shape))
    assert len(grid) > 3
    rms, largest = seams(assemble(operator, volume, grid), operator(volume), grid)
    assert rms <= 1e-3
    # Single voxels whose halves agree a little more or less: measured up to 0.01.
    assert largest <= 0.03


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_exact_depth_leaves_rounding_only(acceleration):
    psf, iterations = skewed((3, 5)), 3
    exact = tuple(4 * iterations * (p // 2) for p in psf.shape)
    image = np.random.default_rng(14).poisson(30, (70, 120)).astype(np.uint16)
    options = {"acceleration": acceleration, "start": 30.0, "stop": None}
    operator = GradientConsensus(psf, iterations, depth=exact, **options)
    grid = BlockGrid.regular(image.shape, (14, 17), operator.halo(image.shape))
    assert any(not any(side for axis in block.at_border for side in axis) for block in grid)
    whole = operator(image)
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=5e-5 * whole.max())
    shallow = replace(operator, depth=tuple(d // 4 for d in exact))
    grid = BlockGrid.regular(image.shape, (14, 17), replace(shallow.halo(image.shape), fast=False))
    assert np.abs(assemble(shallow, image, grid) - whole).max() > 1e-3 * whole.max()


# --- the operator ------------------------------------------------------------------------------------------


def test_operator_keeps_to_the_protocol():
    assert isinstance(GradientConsensus(PSF), ImageOperator)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gain": 0}, ValueError, "`gain` must be above 0"),
        ({"gain": -1.5}, ValueError, "`gain` must be above 0"),
        ({"gain": np.nan}, ValueError, "`gain` must be finite"),
        ({"gain": "low"}, TypeError, "`gain` must be a number"),
        ({"offset": 11.0, "background": 10.0}, ValueError, "`offset` 11 must not lie above `background` 10"),
        ({"offset": np.inf}, ValueError, "`offset` must be finite"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number of at least 0"),
        ({"seed": 0.5}, TypeError, "`seed`"),
        ({"seed": 2**64}, ValueError, "`seed` must be at most"),
        ({"acceleration": "biggs"}, ValueError, "`acceleration`"),
        ({"stop": "never"}, ValueError, "`stop` must be"),
        ({"iterations": 0}, ValueError, "`iterations`"),
    ],
)
def test_bad_parameters_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        GradientConsensus(PSF, **arguments)


def test_undecided_operator_refuses_a_block():
    image = np.ones((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="`iterations` are not decided"):
        GradientConsensus(PSF, start=1.0)(image, Block.whole(image.shape))


def test_seeds_split_otherwise_and_one_seed_gives_one_result():
    image = nuclei((16, 20, 22), PSF, photons=30)[1]
    a, b, c = (GradientConsensus(PSF, 8, seed=seed, stop=None)(image) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert 0 < np.sqrt(np.mean((a - c) ** 2)) < 0.2 * a.std()


def test_describe_identifies_the_result():
    described = json.loads(json.dumps(GradientConsensus(PSF, 7, gain=2.0, offset=-1.0, seed=3).describe()))
    assert described["operator"] == "gradient-consensus"
    wanted = {
        "iterations": 7,
        "gain": 2.0,
        "offset": -1.0,
        "seed": 3,
        "stop": "i-divergence",
        "decision": None,
    }
    assert {key: described[key] for key in wanted} == wanted
    assert len({GradientConsensus(PSF), GradientConsensus(PSF), GradientConsensus(PSF, seed=1)}) == 2


def test_pickle_is_equal():
    operator = GradientConsensus(PSF, start=3.0, stop=None)
    operator(np.ones((12, 12, 12), np.float32))
    assert pickle.loads(pickle.dumps(operator)) == operator


def test_depth_follows_the_psf_and_never_exceeds_the_exact_depth():
    wide = gaussian((4.0, 2.0, 0.0))
    few, many = (GradientConsensus(wide, n).halo((999,) * 3).depth for n in (5, 50))
    assert few[0] > few[1] > few[2] == 0
    assert all(b >= a for a, b in zip(few, many, strict=True))
    assert GradientConsensus(wide, 1, tolerance=1e-6).halo((999,) * 3).depth <= (64, 32, 0)
    assert GradientConsensus(wide, 10, tolerance=1e-2).halo((999,) * 3).depth < many


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
@pytest.mark.parametrize("extra", ["nothing", "mask", "varying"])
@pytest.mark.parametrize("shape", [(64, 120, 130), (900, 910)])
def test_memory_formula_bounds_the_measured_peak(shape, acceleration, extra):
    psf = gaussian((2.0, 1.5, 1.5)[-len(shape) :])
    if extra == "varying":
        psf = PsfField([psf, psf], [(5,) * len(shape), (50, *(5,) * (len(shape) - 1))])
    options = {"acceleration": acceleration, "saturation": 1000.0 if extra == "mask" else None}
    operator = GradientConsensus(psf, 3, start=10.0, stop=None, **options)
    image = np.random.default_rng(15).poisson(10, shape).astype(np.uint16)
    operator(image)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The formula counts 4 MiB for temporaries whatever the block, beside the lattice.
    predicted = operator.memory_nbytes(shape)
    assert peak <= predicted <= 1.1 * peak + 4 * 2**20

"""Unmatched back projectors: kernels against plain formulas, iterations, and the operator on blocks."""

import itertools
import json
import math
import pickle
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, blurred, nuclei, seam_rms, skewed
from scipy import signal

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels import back_projectors
from chunkrestore.kernels.back_projectors import BACK_PROJECTORS, masked_wiener, wiener_butterworth
from chunkrestore.kernels.blur import Blur, lattice_shape
from chunkrestore.kernels.richardson_lucy import estimates
from chunkrestore.kernels.unmatched import unmatched_estimates
from chunkrestore.metrics import psnr
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.unmatched import (
    LAST_BACK_PROJECTOR,
    LAST_KERNEL,
    UnmatchedRichardsonLucy,
    chosen_regularization,
    guarded,
)
from chunkrestore.psf import effective_sigma, gaussian, prepare
from chunkrestore.psf.varying import PsfField

BOTH = pytest.mark.parametrize("projector", BACK_PROJECTORS)
PSF = gaussian((1.5, 1.0, 1.0))
SKEWED = prepare(gaussian((1.4, 0.9, 0.9)) * np.linspace(0.5, 1.5, 9))


def transfer(kernel, lattice):
    """Return the discrete Fourier transform of a kernel centred on voxel ``n // 2``, term by term."""
    result = np.asarray(kernel, dtype=np.complex128)
    for axis, n in enumerate(lattice):
        position = np.arange(kernel.shape[axis]) - kernel.shape[axis] // 2
        waves = np.exp(-2j * np.pi * np.outer(np.fft.fftfreq(n), position))
        result = np.moveaxis(np.tensordot(waves, result, axes=(1, axis)), 0, axis)
    return result


def fixed(psf, iterations, projector, alpha=0.1, **options):
    """Return an operator that decides nothing from data."""
    given = {"start": 10.0, "stop": None, **options}
    return UnmatchedRichardsonLucy(psf, iterations, back_projector=projector, regularization=alpha, **given)


# --- the kernels -------------------------------------------------------------------------------------------


@pytest.fixture
def uncut(monkeypatch):
    """Kernels on a lattice of odd lengths, and whole."""
    monkeypatch.setattr(back_projectors, "LEFT_OUT", 0.0)
    monkeypatch.setattr(back_projectors, "reference_lattice", lambda psf: LATTICE[: psf.ndim])


LATTICE = (61, 53, 45)


@pytest.mark.usefixtures("uncut")
@pytest.mark.parametrize(("psf_shape", "alpha"), [((7, 9), 0.02), ((6, 8), 0.3), ((5, 4, 7), 0.05)])
def test_wiener_butterworth_is_the_published_formula(psf_shape, alpha):
    psf, lattice = skewed(psf_shape), LATTICE[: len(psf_shape)]
    otf = transfer(psf, lattice)
    k = np.meshgrid(*(np.fft.fftfreq(n) for n in lattice), indexing="ij")
    cutoffs = [min(1 / (2 * math.sqrt(2 * math.log(2)) * s), 0.5) for s in effective_sigma(psf)]
    at_cutoffs = []
    for axis, cutoff in enumerate(cutoffs):
        wave = np.exp(-2j * np.pi * cutoff * np.arange(psf_shape[axis]))
        at_cutoffs.append(abs(np.tensordot(psf.astype(np.float64), wave, axes=(axis, 0)).sum()))
    gain = np.mean([h / (h * h + alpha) for h in at_cutoffs])
    strength = gain / np.mean(at_cutoffs) ** 2 - 1
    window = (1 + strength * sum((f / c) ** 2 for f, c in zip(k, cutoffs, strict=True)) ** 10) ** -0.5
    expected = window * np.conj(otf) / (abs(otf) ** 2 + alpha)
    expected /= expected.flat[0]
    result = np.conj(transfer(wiener_butterworth(psf, alpha), lattice))
    # A float32 kernel of some ten thousand voxels.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * abs(expected).max())
    assert abs(expected).max() > 1.1


@pytest.mark.usefixtures("uncut")
def test_masked_wiener_is_wiener_within_the_support_and_nothing_outside():
    psf, alpha, lattice = gaussian((2.0, 1.6)), 0.05, LATTICE[:2]
    otf = transfer(psf, lattice)
    magnitude = np.sort(abs(otf).ravel())[::-1]
    threshold = magnitude[np.searchsorted(np.cumsum(magnitude), 0.9 * magnitude.sum())]
    # For a Gaussian the support is an ellipse whose half axes are known.
    half_axes = [math.sqrt(-math.log(threshold) / 2) / (math.pi * s) for s in (2.0, 1.6)]
    k = np.meshgrid(*(np.fft.fftfreq(n) for n in lattice), indexing="ij")
    way = np.sqrt(sum((f / a) ** 2 for f, a in zip(k, half_axes, strict=True)))
    wiener = np.conj(otf) / (abs(otf) ** 2 + alpha) * (1 + alpha)
    result = np.conj(transfer(masked_wiener(psf, alpha), lattice))
    # The hull has its corners on the lattice: its edge lies up to one frequency, about a tenth, further in.
    inside, outside = way < 0.7, way > 1.05
    np.testing.assert_allclose(result[inside], wiener[inside], rtol=0, atol=1e-5 * abs(wiener).max())
    assert abs(result[outside]).max() < 1e-5 * abs(wiener).max()
    edge = (way > 0.87) & (way < 0.93)
    ratio = (result / wiener).real[edge]
    assert ratio.min() > 0.05
    assert ratio.max() < 0.9


def test_support_is_filled_by_its_convex_hull():
    ring = np.zeros((40, 40))
    ring[12:29, 12:29] = 1
    ring[16:25, 20] = 0.2  # as the missing cone of a widefield microscope
    points = back_projectors._support(np.fft.ifftshift(ring)[:, :21], (40, 40))
    way = back_projectors._way_to_edge(points, (40, 40))
    first, second = abs(np.fft.fftfreq(40))[:, None] * 40, np.fft.rfftfreq(40)[None] * 40
    # The opening takes the four corners of the square.
    expected = np.maximum(np.maximum(first, second) / 8, (first + second) / 15)
    near = expected < 1 + 1e-9
    np.testing.assert_allclose(way[near], expected[near], atol=1e-6)
    assert way[~near].min() > 1


@BOTH
@pytest.mark.parametrize("psf_shape", [(9, 11), (8, 10), (6, 8, 7), (1, 9, 8), (7, 1, 1), (1, 1)])
def test_kernels_pass_constants_and_have_odd_lengths(projector, psf_shape):
    kernel = BACK_PROJECTORS[projector](skewed(psf_shape), 0.1)
    assert kernel.dtype == np.float32
    assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    for n, p in zip(kernel.shape, psf_shape, strict=True):
        assert n % 2 == 1
        assert (n == 1) == (p == 1)


@BOTH
def test_less_regularisation_reaches_further_and_restores_more(projector):
    weak, strong = (BACK_PROJECTORS[projector](gaussian((3.0, 1.5)), alpha) for alpha in (0.01, 0.5))
    assert all(a > b for a, b in zip(weak.shape, strong.shape, strict=True))
    assert weak.max() > 1.5 * strong.max()


@BOTH
def test_kernel_does_not_depend_on_empty_margins_of_the_psf(projector):
    psf = skewed((7, 9))
    kernel = BACK_PROJECTORS[projector](psf, 0.1)
    wide = BACK_PROJECTORS[projector](np.pad(psf, ((6, 6), (8, 8))), 0.1)
    # Another reference lattice: the same numbers to the share that is cut off, or less.
    shape = tuple(max(pair) for pair in zip(kernel.shape, wide.shape, strict=True))
    a, b = (
        np.pad(x, [((n - m) // 2,) * 2 for n, m in zip(shape, x.shape, strict=True)]) for x in (kernel, wide)
    )
    assert abs(a - b).sum() < (0.02 if projector == "wiener-butterworth" else 0.1) * abs(a).sum()


# --- the iterations ----------------------------------------------------------------------------------------


def reference(image, psf, kernel, *, iterations, start, background=0.0, mask=None):
    """Return the same iterations by linear convolution in double precision, with room for everything."""
    margin = [(p + k, p + k) for p, k in zip(psf.shape, kernel.shape, strict=True)]
    seen = np.ones(image.shape) if mask is None else mask.astype(np.float64)
    observed, y = np.pad(seen, margin), np.pad(image.astype(np.float64), margin)

    def back(x, h):
        turned = h[(slice(None, None, -1),) * h.ndim].astype(np.float64)
        full = signal.fftconvolve(x, turned)
        return full[
            tuple(slice((p - 1) // 2, (p - 1) // 2 + n) for p, n in zip(h.shape, x.shape, strict=True))
        ]

    share = back(observed, psf)
    light = back(observed * (y - background), psf)
    now = (np.maximum(light, 0) + 0.01 * start) / (share + 0.01)
    for _ in range(iterations):
        expected = np.maximum(blurred(now, psf) + background, 1e-6 * start)
        correction = back(observed * (y / expected - 1), kernel)
        now = now * np.clip(1 + correction / np.maximum(share, 0.5), 1 / 1.5, 1.5)
    if mask is not None:
        now = np.where(share > 0.01, now, 0)
    return now[tuple(slice(a, -b) for a, b in margin)]


@BOTH
@pytest.mark.parametrize(
    ("shape", "psf_shape"),
    [((21, 26), (7, 5)), ((20, 23), (4, 6)), ((1, 20, 21), (1, 5, 6)), ((9, 8, 10), (3, 4, 3))],
)
def test_agrees_with_linear_convolution_up_to_the_border(projector, shape, psf_shape):
    psf = skewed(psf_shape)
    image = np.random.default_rng(6).poisson(30, shape).astype(np.uint16)
    operator = fixed(psf, 4, projector, start=25.0, background=3.5)
    kernel = BACK_PROJECTORS[projector](psf, 0.1)
    expected = reference(image, psf, kernel, iterations=4, start=25.0, background=3.5)
    # Rounding of float32 transforms, 1e-7 of the largest value, grows with the iterations.
    np.testing.assert_allclose(operator(image), expected, rtol=0, atol=5e-5 * expected.max())


@BOTH
def test_saturated_voxels_are_left_to_their_neighbours(projector):
    psf, image = skewed((5, 6)), np.random.default_rng(7).poisson(30, (24, 27)).astype(np.uint16)
    image[8:11, 9:12], image[16:, 18:] = 255, 255
    mask = image < 255
    kernel = BACK_PROJECTORS[projector](psf, 0.1)
    expected = reference(image, psf, kernel, iterations=3, start=25.0, mask=mask)
    result = fixed(psf, 3, projector, start=25.0, saturation=255)(image)
    # Beside float32 rounding, whether a share of 0.01 is reached may be decided otherwise: nowhere here.
    np.testing.assert_allclose(result, expected, rtol=0, atol=5e-5 * expected.max())
    assert result[23, 26] == 0
    assert 10 < result[9, 10] < 60


@BOTH
@pytest.mark.parametrize("lattice", [(80, 90), (81, 105), (120, 96)])
def test_result_does_not_depend_on_the_lattice(projector, lattice):
    psf, image = skewed((5, 6)), np.random.default_rng(8).poisson(30, (24, 27)).astype(np.uint16)
    kernel = BACK_PROJECTORS[projector](psf, 0.1)

    def last(lengths):
        blurs = (Blur.from_psf(h, lengths, image) for h in (psf, kernel))
        *_, estimate = unmatched_estimates(image, *blurs, iterations=5, start=25.0)
        return estimate[:24, :27]

    least = lattice_shape(
        image.shape,
        [p // 2 + k // 2 + 1 for p, k in zip(psf.shape, kernel.shape, strict=True)],
        ((True, True),) * 2,
    )
    assert all(a <= b for a, b in zip(least, lattice, strict=True))
    expected = last(least)
    np.testing.assert_allclose(last(lattice), expected, rtol=0, atol=5e-5 * expected.max())


@BOTH
@pytest.mark.parametrize("psf_shape", list(itertools.product((8, 9), (10, 11))))
def test_nothing_moves_for_even_and_odd_sizes(projector, psf_shape):
    psf, shape = skewed(psf_shape), (41, 44)
    grid = np.indices(shape)
    truth = 100 * np.exp(-((grid[0] - 19.3) ** 2 + (grid[1] - 22.6) ** 2) / 8)
    result = fixed(psf, 8, projector, start=5.0)(blurred(truth, psf).clip(0).astype(np.float32))
    for axis in (0, 1):
        shift = (grid[axis] * result).sum() / result.sum() - (grid[axis] * truth).sum() / truth.sum()
        assert abs(shift) < 0.03


@BOTH
def test_constant_stays_constant_to_the_corners(projector):
    operator = fixed(skewed((7, 6, 5)), 10, projector, background=10.0, start=None)
    result = operator(np.full((18, 20, 22), 60, np.uint16))
    np.testing.assert_allclose(result, 50.0, rtol=1e-4)


@BOTH
def test_empty_regions_stay_finite_and_grow_darker(projector):
    image = np.zeros((40, 32, 32), np.uint16)
    image[:8] = np.random.default_rng(9).poisson(200, (8, 32, 32))
    few, many = (fixed(gaussian((1.5, 1.5, 1.5)), n, projector, start=40.0)(image) for n in (2, 10))
    for result in (few, many):
        assert np.isfinite(result).all()
        assert result.min() >= 0
    assert few[32:].max() < 1
    assert many[32:].max() < 0.1 * few[32:].max()


@BOTH
def test_light_is_kept_within_a_tenth(projector):
    truth, image = nuclei((32, 40, 40), PSF, photons=100)
    result = UnmatchedRichardsonLucy(PSF, back_projector=projector)(image)
    assert result.sum(dtype=np.float64) == pytest.approx(image.sum(), rel=0.1)
    assert psnr(truth, result) > psnr(truth, image.astype(np.float32)) + 1


@BOTH
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_dtype_of_the_image_does_not_matter(projector, dtype):
    image = np.random.default_rng(11).integers(0, 100, (12, 14, 16)).astype(dtype)
    image.setflags(write=False)
    before = image.copy()
    operator = fixed(skewed((3, 4, 5)), 4, projector, saturation=95)
    result = operator(image)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, operator(image.astype(np.float32)))
    np.testing.assert_array_equal(image, before)


@BOTH
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("saturation", [None, 60])
def test_strict_array_namespace_gives_the_same_numbers(projector, inside, saturation):
    image = np.random.default_rng(12).poisson(40, (12, 14, 15)).astype(np.uint16)
    operator = fixed(skewed((3, 4, 3)), 4, projector, saturation=saturation, background=2.0)
    block = Block.whole(image.shape)
    if inside:
        block = Block.around(tuple(slice(40, 40 + n) for n in image.shape), (99, 99, 99), Halo((0, 0, 0)))
    result = operator(array_api_strict.asarray(image), block)
    assert type(result) is type(array_api_strict.asarray(image))
    expected = operator(image, block)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=2e-5 * expected.max())


# --- what it is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("photons", [30, 500])
@BOTH
def test_few_iterations_beat_twenty_plain_ones(projector, photons):
    psf = gaussian((2.5, 1.4, 1.4))
    truth, image = nuclei((24, 64, 64), psf, photons=photons)
    operator = UnmatchedRichardsonLucy(psf, back_projector=projector)._resolved_on(image)
    assert operator.decision["iterations"] <= 7
    lattice = lattice_shape(image.shape, psf.shape, ((True, True),) * 3)
    plain = [
        estimate[tuple(slice(n) for n in image.shape)].copy()
        for estimate in estimates(
            image, Blur.from_psf(psf, lattice, image), iterations=20, start=operator.start, acceleration=None
        )
    ]
    assert psnr(truth, operator(image, Block.whole(image.shape))) > psnr(truth, plain[19]) + 0.2


@pytest.mark.parametrize("photons", [20, 100, 1000])
@BOTH
def test_chosen_regularisation_is_near_the_best(projector, photons):
    psf = gaussian((3.5, 1.8))
    truth, image = nuclei((160, 160), psf, photons=photons)

    def quality(alpha):
        operator = UnmatchedRichardsonLucy(psf, back_projector=projector, regularization=alpha)
        return psnr(truth, operator(image))

    chosen = quality(None)
    assert chosen > max(map(quality, (0.02, 0.05, 0.1, 0.2, 0.4, 0.8))) - 0.25


# --- tiled against untiled ---------------------------------------------------------------------------------

GRIDS = {
    "cubes": lambda shape, halo: BlockGrid.regular(shape, (24, 28, 32), halo),
    "uneven": lambda shape, halo: BlockGrid(((0, 9, 32, 48), (0, 31, 56), (0, 20, 27, 60)), halo),
}


@pytest.fixture(scope="module")
def volume():
    return nuclei((48, 56, 60), SKEWED, photons=60)[1]


@BOTH
@pytest.mark.parametrize("name", GRIDS)
def test_tiled_equals_untiled_at_default_depth(volume, projector, name):
    operator = UnmatchedRichardsonLucy(SKEWED, back_projector=projector)._resolved_on(volume)
    grid = GRIDS[name](volume.shape, operator.halo(volume.shape))
    assert seam_rms(assemble(operator, volume, grid), operator(volume), grid) <= 1e-3


@BOTH
@pytest.mark.parametrize(
    ("iterations", "alpha", "tolerance"), [(2, 0.02, 1e-3), (10, 0.3, 1e-3), (4, 0.1, 1e-4)]
)
def test_seams_stay_within_tolerance_inside_a_volume(projector, iterations, alpha, tolerance):
    psf = gaussian((2.4, 1.5))
    image = nuclei((330, 260), psf, photons=60, seed=3)[1]
    operator = fixed(psf, iterations, projector, alpha, tolerance=tolerance, start=float(image.mean()))
    halo = Halo(operator.halo(image.shape).depth)
    whole = operator(image).astype(np.float64)
    block = Block.around((slice(140, 190), slice(105, 155)), image.shape, halo)
    assert not any(itertools.chain(*block.at_border))
    error = np.square(operator(image[block.read], block)[block.trim] - whole[block.core])
    rim = max(np.take(error, [0, -1], axis=axis).mean() for axis in (0, 1))
    assert math.sqrt(rim) <= tolerance * (np.percentile(whole, 99.9) - np.percentile(whole, 0.1))


@BOTH
def test_exact_depth_leaves_rounding_only(projector):
    psf, iterations = skewed((3, 3)), 2
    kernel = BACK_PROJECTORS[projector](psf, 0.2)
    exact = tuple(iterations * (1 + k // 2) + 1 for k in kernel.shape)
    image = np.random.default_rng(14).poisson(30, (150, 190)).astype(np.uint16)
    operator = fixed(psf, iterations, projector, 0.2, depth=exact, start=30.0)
    grid = BlockGrid.regular(image.shape, (50, 60), Halo(exact))
    whole = operator(image)
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=5e-5 * whole.max())
    tightest = fixed(psf, iterations, projector, 0.2, tolerance=1e-30).halo((999, 999)).depth
    assert tightest == exact


def test_depth_follows_the_back_projector():
    def depth(projector="wiener-butterworth", alpha=0.1, iterations=5, **options):
        return (
            fixed(gaussian((4.0, 2.0, 0.0)), iterations, projector, alpha, **options).halo((999,) * 3).depth
        )

    assert depth()[0] > depth()[1] > depth()[2] == 0
    assert depth("masked-wiener")[0] > depth()[0]
    assert depth(alpha=0.01)[0] > depth(alpha=0.5)[0]
    assert depth(iterations=10)[0] > depth(iterations=1)[0]
    assert depth(tolerance=1e-4)[0] > depth()[0] > depth(tolerance=1e-2)[0]
    assert depth(depth=(3, 2, 1)) == (3, 2, 1)


def test_depth_does_not_change_when_decided(volume):
    operator = UnmatchedRichardsonLucy(SKEWED)
    planned = operator.halo(volume.shape)
    assert operator._resolved_on(volume).halo(volume.shape) == planned


# --- what is decided ---------------------------------------------------------------------------------------


def test_regularisation_follows_the_noise():
    ratios = [0.0, 1.0, 5.0, 10.0, 100.0, math.inf]
    chosen = [chosen_regularization(ratio) for ratio in ratios]
    assert chosen == pytest.approx([1.0, 1.0, 0.4, 0.2, 0.1, 0.1])


def test_guard_stops_before_a_rise_and_says_so():
    assert guarded([9.0, 5.0, 6.0, 1.0], 0.05)[0] == 2
    assert "iteration 3 makes the I-divergence rise" in guarded([9.0, 5.0, 6.0, 1.0], 0.05)[1]
    assert guarded([9.0, 5.0, 4.9, 1.0], 0.05)[0] == 2
    assert "less than 5%" in guarded([9.0, 5.0, 4.9, 1.0], 0.05)[1]
    assert guarded([9.0, 5.0, 4.9, 1.0], 0.0)[0] == 4
    assert "all 3" in guarded([9.0, 5.0, 3.0], 0.05)[1]
    assert guarded([4.0, 5.0], 0.05)[0] == guarded([4.0], 0.05)[0] == 1


def test_guard_stops_a_diverging_setting_and_reports_it():
    psf = gaussian((2.5, 1.4, 1.4))
    truth, image = nuclei((24, 64, 64), psf, photons=100)
    operator = UnmatchedRichardsonLucy(psf, 15, back_projector="masked-wiener", regularization=1e-4)
    resolved = operator._resolved_on(image)
    decision = resolved.decision
    assert resolved.iterations == decision["iterations"] < 15
    assert "makes the I-divergence rise" in decision["stopped"]
    assert decision["curve"][decision["iterations"]] > decision["curve"][decision["iterations"] - 1]
    unguarded = fixed(psf, 15, "masked-wiener", 1e-4, start=resolved.start)(image)
    assert psnr(truth, resolved(image, Block.whole(image.shape))) > psnr(truth, unguarded) + 1


@BOTH
@pytest.mark.parametrize("stop", ["i-divergence", "split-data", None])
def test_decision_is_recorded_and_survives_json(projector, stop):
    psf = gaussian((2.0, 1.2))
    image = nuclei((120, 130), psf, photons=80)[1]
    operator = UnmatchedRichardsonLucy(psf, 8, back_projector=projector, stop=stop)
    assert operator.needs == {"mean", "pilot"}
    statistics = {"mean": float(image.mean())}
    pilot = json.loads(json.dumps(operator.pilot(statistics, lambda region: image[region], image.shape)))
    resolved = operator.resolve({**statistics, "pilot": pilot})
    assert resolved.needs == frozenset()
    described = json.loads(json.dumps(resolved.describe()))
    assert described["operator"] == described["back_projector"] == projector
    assert described["regularization"] == pytest.approx(2 / pilot["signal_to_noise"], rel=1e-3)
    assert described["decision"] == pilot
    assert len(pilot["curve"]) == (0 if stop is None else 8)
    assert described["iterations"] == pilot["iterations"] <= 8
    if stop is None:
        assert pilot["iterations"] == 8
        assert "unguarded" in pilot["stopped"]
    np.testing.assert_array_equal(operator(image), resolved(image, Block.whole(image.shape)))


def test_noiseless_images_give_a_decision_that_json_knows():
    psf = gaussian((1.5, 1.0))
    image = blurred(np.eye(64) * 100, psf).clip(0).astype(np.float32)
    decision = UnmatchedRichardsonLucy(psf)._resolved_on(image).decision
    assert decision["regularization"] == 0.1
    json.dumps(decision, allow_nan=False)


def test_nothing_is_decided_from_data_where_everything_is_given():
    assert fixed(PSF, 5, "masked-wiener").needs == frozenset()
    assert fixed(PSF, 5, "masked-wiener", start=None).needs == {"mean"}
    assert fixed(PSF, 5, "masked-wiener", stop="i-divergence").needs == {"pilot"}


def test_unresolved_operator_refuses_a_block():
    image = np.ones((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="not decided; call `resolve` first"):
        UnmatchedRichardsonLucy(PSF, start=1.0)(image, Block.whole(image.shape))


# --- the operator ------------------------------------------------------------------------------------------


def test_operator_keeps_to_the_protocol():
    assert isinstance(UnmatchedRichardsonLucy(PSF), ImageOperator)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"regularization": 0}, ValueError, "`regularization` must lie between 1e-05 and 1, got 0"),
        ({"regularization": -0.1}, ValueError, "`regularization`"),
        ({"regularization": 2}, ValueError, "`regularization`"),
        ({"regularization": math.nan}, ValueError, "`regularization` must be finite"),
        ({"regularization": "low"}, TypeError, "`regularization` must be a number"),
        ({"back_projector": "gaussian"}, ValueError, '`back_projector` must be "wiener-butterworth" or'),
        ({"stop": "never"}, ValueError, "`stop`"),
        ({"iterations": 0}, ValueError, "`iterations`"),
        ({"psf": PsfField([PSF, PSF], [(0, 9, 9), (50, 9, 9)])}, TypeError, "`psf`.*PsfField"),
    ],
)
def test_bad_parameters_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        UnmatchedRichardsonLucy(**{"psf": PSF, **arguments})


@BOTH
@pytest.mark.parametrize(
    ("shape", "saturation"), [((64, 90, 100), None), ((900, 910), None), ((900, 910), 30)]
)
def test_memory_formula_bounds_the_measured_peak(projector, shape, saturation):
    operator = fixed(gaussian((2.0, 1.5, 1.5)[-len(shape) :]), 3, projector, saturation=saturation)
    image = np.random.default_rng(15).poisson(10, shape).astype(np.uint16)
    operator(image)
    for last in (LAST_BLUR, LAST_BACK_PROJECTOR):
        last.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The formula counts 4 MiB for temporaries whatever the block, beside the lattice.
    assert peak <= operator.memory_nbytes(shape) <= 1.1 * peak + 4 * 2**20


@BOTH
def test_memory_formula_counts_the_making_of_the_kernel(projector):
    operator = fixed(gaussian((2.0, 1.5, 1.5), tail=0.1), 1, projector)
    image = np.ones((4, 4, 4), np.float32)
    operator(image)
    LAST_KERNEL.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= operator.memory_nbytes(image.shape) <= 1.5 * peak + 4 * 2**20


def test_operators_compare_by_what_they_compute():
    same = UnmatchedRichardsonLucy(PSF.copy())
    assert UnmatchedRichardsonLucy(PSF) == same
    assert hash(UnmatchedRichardsonLucy(PSF)) == hash(same)
    others = [{"back_projector": "masked-wiener"}, {"regularization": 0.1}, {"stop": None}]
    assert all(UnmatchedRichardsonLucy(PSF, **other) != same for other in others)


def test_pickle_is_small_and_equal():
    operator = fixed(PSF, 3, "masked-wiener")
    operator(np.ones((20, 20, 20), np.float32))
    operator.halo((99, 99, 99))
    assert len(pickle.dumps(operator)) < PSF.nbytes + 2000
    assert pickle.loads(pickle.dumps(operator)) == operator

"""When to stop: decided once per volume on pilot regions, the same for every chunking, and near the optimum."""

import functools
import itertools
import json
from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal

from chunkrestore.grid import Block
from chunkrestore.operators.gradient_consensus import GradientConsensus
from chunkrestore.operators.pilot import (
    LEAST_CHANGE,
    N_PILOTS,
    PILOT_LENGTHS,
    best_iteration,
    i_divergence,
    pilot_regions,
)
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian

PSF = gaussian((1.5, 1.2, 1.2))


@functools.cache
def nuclei(photons, *, background=0.0, shape=(24, 36, 36), seed=1):
    """Return balls that run across the field of view, and their noisy image."""
    rng, reach, margin = np.random.default_rng(seed), 5, 13
    truth = np.full(tuple(n + 2 * margin for n in shape), 0.02)
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * 3])
    for _ in range(truth.size // 2000):
        centre = [int(rng.integers(reach, n - reach)) for n in truth.shape]
        around = tuple(slice(c - reach, c + reach + 1) for c in centre)
        truth[around][ball < rng.uniform(2.5, reach) ** 2] += rng.uniform(0.3, 1)
    image = signal.fftconvolve(truth, PSF.astype(np.float64), mode="same")
    scale = photons / np.percentile(image, 99.9)
    noisy = rng.poisson(np.maximum(image, 0) * scale + background)
    field = tuple(slice(margin, margin + n) for n in shape)
    return (truth * scale)[field].astype(np.float32), noisy[field].astype(np.uint16)


def psnr(result, truth):
    return 10 * np.log10(np.ptp(truth) ** 2 / np.mean((result - truth) ** 2))


def quality(operator, image, truth):
    """Return the PSNR after every iteration."""
    operator = operator.resolve({"mean": float(image.mean())})
    origin, inside = (0,) * image.ndim, tuple(slice(n) for n in image.shape)
    blur = operator._blur(image, origin, ((True, True),) * image.ndim)
    return [psnr(e[inside], truth) for e in operator._estimates(image, blur, None, origin)]


def decided(operator, image):
    """Return after how many iterations the pilots of `image` stop."""
    numbers = {"mean": float(image.mean())}
    return operator.pilot(numbers, lambda region: image[region], image.shape)["iterations"]


# --- the figures -------------------------------------------------------------------------------------------


def test_i_divergence_is_that_of_numbers_worked_out_by_hand():
    image, expected = np.array([2.0, 0.0, 3.0]), np.array([1.0, 0.5, 3.0])
    wanted = 2 * np.log(2) - 2 + 1 + 0.5
    assert i_divergence(image, expected) == pytest.approx(wanted, rel=1e-12)
    assert i_divergence(image, expected, np.array([False, True, True])) == pytest.approx(0.5)
    assert i_divergence(image, image) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e-3, 1e6)), min_size=1))
def test_i_divergence_is_never_negative(pairs):
    image, expected = np.array(pairs).T
    assert i_divergence(image, expected) >= -1e-9 * np.abs(image).sum() - 1e-9


@pytest.mark.parametrize("best", [1, 2, 7, 30])
def test_stops_at_the_least_value_of_a_curve_that_rises_again(best):
    k = np.arange(1, 31)
    assert best_iteration(list((k - best) ** 2 + 5.0), least_change=0.0) == best


@pytest.mark.parametrize("least_change", [0.1, 0.01, 0.001])
def test_stops_where_a_falling_curve_flattens(least_change):
    # f(k) = 1 + 2**-k falls by 2**-(k + 1) / f(k) of itself from k to k + 1.
    curve = [1 + 2.0**-k for k in range(1, 40)]
    wanted = next(k for k in range(1, 40) if 2.0 ** -(k + 1) / (1 + 2.0**-k) < least_change)
    assert best_iteration(curve, least_change=least_change) == wanted


def test_a_curve_that_keeps_falling_uses_all_iterations():
    assert best_iteration([0.5**k for k in range(20)], least_change=0.005) == 20
    assert best_iteration([3.0], least_change=0.005) == 1


@pytest.mark.parametrize("photons", [3, 300])
def test_plain_iterations_never_fit_worse(photons):
    image = nuclei(photons)[1]
    operator = RichardsonLucy(PSF, 60, acceleration=None, stop="i-divergence", start=float(image.mean()))
    curve = operator._stopping_curve([((slice(0, 24), slice(0, 36), slice(0, 36)), image)], "i-divergence")
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(curve))


# --- how good the decisions are ----------------------------------------------------------------------------


@pytest.mark.parametrize("photons", [2, 10, 100, 1000])
def test_split_data_stops_near_the_best_psnr_where_fixed_iterations_overfit(photons):
    truth, image = nuclei(photons)
    operator = RichardsonLucy(PSF, 50, stop="split-data")
    curve = quality(operator, image, truth)
    assert curve[decided(operator, image) - 1] > max(curve) - 0.3
    if photons <= 100:
        assert curve[-1] < max(curve) - 3


@pytest.mark.parametrize("photons", [2, 10, 100, 1000])
def test_gradient_consensus_stops_near_its_best_psnr(photons):
    truth, image = nuclei(photons)
    operator = GradientConsensus(PSF, 30)
    curve = quality(operator, image, truth)
    assert curve[decided(operator, image) - 1] > max(curve) - 0.2


def test_more_photons_are_worth_more_iterations():
    for operator in (RichardsonLucy(PSF, 25, stop="split-data"), GradientConsensus(PSF, 25)):
        decisions = [decided(operator, nuclei(photons)[1]) for photons in (2, 30, 1000)]
        assert decisions[0] < decisions[1] < decisions[2]


def test_stray_light_is_split_too_where_the_offset_is_known():
    truth, image = nuclei(40, background=10.0)
    image = image + np.uint16(100)
    curve = quality(RichardsonLucy(PSF, 40, background=110.0), image, truth)
    known, unknown = (
        decided(RichardsonLucy(PSF, 40, background=110.0, stop="split-data", offset=offset), image)
        for offset in (100.0, None)
    )
    assert curve[known - 1] > max(curve) - 0.3
    # What is below `background` would be the same noise in both halves, and is then fitted.
    assert unknown > known
    assert curve[unknown - 1] < curve[known - 1]


def test_intensity_per_photon_does_not_change_the_decision():
    image = nuclei(30)[1]
    for cls in (RichardsonLucy, GradientConsensus):
        for stop in ("split-data", "i-divergence"):
            operator = cls(PSF, 25, stop=stop)
            assert decided(replace(operator, gain=4.0), 4 * image) == decided(operator, image) < 25


# --- once per volume ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def volume():
    # Two fields of one scene, the second of them dimmer, on a volume that has more than one pilot place.
    image = nuclei(60, shape=(24, 36, 200))[1].copy()
    image[..., 110:] //= 3
    return image


@pytest.mark.parametrize("operator", [RichardsonLucy(PSF, 12, stop="split-data"), GradientConsensus(PSF, 12)])
def test_decision_is_the_same_for_every_chunking(volume, operator):
    numbers = {"mean": float(volume.mean())}
    readers = [lambda region: volume[region]]
    for chunks in [(24, 36, 200), (5, 11, 13)]:
        chunked = da.from_array(volume, chunks=chunks)
        readers.append(lambda region, chunked=chunked: chunked[region].compute())
    decisions = [operator.pilot(numbers, read, volume.shape) for read in readers]
    assert all(decision == decisions[0] for decision in decisions)
    assert len(decisions[0]["regions"]) > 1


@pytest.mark.parametrize("operator", [RichardsonLucy(PSF, 12, stop="split-data"), GradientConsensus(PSF, 12)])
def test_eager_call_takes_the_decision_of_the_pilots(volume, operator):
    numbers = {"mean": float(volume.mean())}
    decision = operator.pilot(numbers, lambda region: volume[region], volume.shape)
    assert 1 < decision["iterations"] < 12
    resolved = operator.resolve({**numbers, "pilot": decision})
    assert resolved.needs == frozenset()
    fixed = replace(operator, stop=None, iterations=decision["iterations"])
    eager = operator(volume)
    np.testing.assert_array_equal(eager, resolved(volume, Block.whole(volume.shape)))
    np.testing.assert_array_equal(eager, fixed(volume))


def test_decision_is_recorded_and_is_json(volume):
    operator = RichardsonLucy(PSF, 8, stop="i-divergence")
    numbers = {"mean": float(volume.mean())}
    decision = operator.pilot(numbers, lambda region: volume[region], volume.shape)
    resolved = operator.resolve({**numbers, "pilot": decision})
    described = json.loads(json.dumps(resolved.describe()))
    assert described["decision"] == decision
    assert described["iterations"] == decision["iterations"] == resolved.iterations
    assert len(decision["curve"]) == 8
    assert operator.describe()["decision"] is None


def test_depth_stays_the_one_that_blocks_were_planned_with(volume):
    for operator in (RichardsonLucy(PSF, 30, stop="split-data"), GradientConsensus(PSF, 30)):
        resolved = operator.resolve({"mean": 5.0, "pilot": {"iterations": 3, "curve": [], "regions": []}})
        assert resolved.iterations == 3
        assert resolved.halo(volume.shape) == operator.halo(volume.shape)
        assert resolved.halo(volume.shape) != replace(operator, iterations=3, stop=None).halo(volume.shape)
        given_depth = replace(operator, depth=5)
        pinned = given_depth.resolve({"mean": 5.0, "pilot": {"iterations": 3, "curve": [], "regions": []}})
        assert pinned.halo(volume.shape).depth == (5, 5, 5)


def test_pilots_are_needed_until_they_have_decided():
    operator = RichardsonLucy(PSF, 8, stop="split-data")
    assert operator.needs == {"mean", "pilot"}
    assert operator.resolve({"mean": 3.0}).needs == {"pilot"}
    assert RichardsonLucy(PSF, 8, start=1.0).needs == frozenset()
    assert GradientConsensus(PSF, stop=None).needs == {"mean"}
    assert GradientConsensus(PSF).needs == {"mean", "pilot"}
    with pytest.raises(ValueError, match="`iterations` are not decided"):
        operator.resolve({"mean": 3.0})(np.ones((8, 8, 8), np.float32), Block.whole((8, 8, 8)))


@pytest.mark.parametrize("shape", [(30, 40, 50), (100, 200, 300), (48, 97, 700), (300, 900)])
def test_pilot_regions_lie_in_the_volume_and_are_bounded(shape):
    read = []

    def reader(region):
        read.append(region)
        return np.zeros([s.stop - s.start for s in region], np.uint8)

    regions = pilot_regions(reader, shape)
    assert 1 <= len(regions) <= N_PILOTS
    for region in read:
        for s, n, most in zip(region, shape, PILOT_LENGTHS[len(shape)], strict=True):
            assert 0 <= s.start < s.stop <= n
            assert s.stop - s.start == min(most, n)
    assert len({str(region) for region in read}) == len(read)


def test_pilots_are_where_structure_is_and_not_where_noise_is():
    rng, shape = np.random.default_rng(3), (48, 96, 600)
    image = rng.poisson(100, shape).astype(np.uint16)
    image[10:40, 20:80, 500:560] += nuclei(60, shape=(30, 60, 60))[1]
    best, *_ = pilot_regions(lambda region: image[region], shape)
    assert best[2].start <= 500
    assert best[2].stop > 500


def test_masked_voxels_do_not_decide(volume):
    image = volume[..., :40].copy()
    hidden = np.zeros(image.shape, bool)
    hidden[4:8, 10:14, 10:14] = True
    spoilt = np.where(hidden, 60000, image).astype(np.uint16)
    numbers = {"mean": float(image.mean())}
    operator = RichardsonLucy(PSF, 15, stop="split-data", mask=~hidden)
    curves = [operator.pilot(numbers, lambda r, i=i: i[r], image.shape)["curve"] for i in (image, spoilt)]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert LEAST_CHANGE < 0.05

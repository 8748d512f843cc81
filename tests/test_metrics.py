"""Metrics against closed forms and independent implementations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from chunkrestore.grid import BlockGrid
from chunkrestore.metrics import fsc, match_instances, psnr, same_instances, seam_error, ssim

LABELS = hnp.arrays(np.int32, (3, 5, 6), elements=st.integers(0, 5))


def balls(shape: tuple[int, ...], n: int, seed: int) -> np.ndarray:
    """Disjoint labelled pieces: a random Voronoi tessellation with gaps."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 1, (n, len(shape))) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - centres, axis=-1)
    return np.where(distance.min(-1) < 5, distance.argmin(-1) + 1, 0).astype(np.int32)


# Images ---------------------------------------------------------------------------------------------------


def test_psnr_is_20_log10_of_range_over_rms_error():
    truth = np.array([[0.0, 10.0], [4.0, 6.0]])
    assert psnr(truth, truth + 0.1) == pytest.approx(40.0, abs=1e-9)
    assert psnr(truth, truth + 0.1, data_range=1.0) == pytest.approx(20.0, abs=1e-9)
    assert psnr(truth, truth) == math.inf


def test_psnr_does_not_overflow_for_unsigned_images():
    truth = np.array([[0, 100]], dtype=np.uint16)
    assert psnr(truth, np.array([[1, 99]], dtype=np.uint16)) == pytest.approx(40.0, abs=1e-9)


def test_scale_invariant_psnr_ignores_gain_and_offset_but_not_structure():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(8, 9, 10))
    noisy = truth + rng.normal(0, 0.1, truth.shape)
    rescaled = psnr(truth, -3 * noisy + 7, scale_invariant=True)
    assert rescaled == pytest.approx(psnr(truth, noisy, scale_invariant=True), abs=1e-9)
    assert psnr(truth, noisy, scale_invariant=True) >= psnr(truth, noisy)
    assert rescaled < 60


def test_psnr_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(2)
    truth, image = rng.uniform(size=(2, 6, 7, 8))
    expected = metrics.peak_signal_noise_ratio(truth, image, data_range=np.ptp(truth))
    assert psnr(truth, image) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    rng = np.random.default_rng(3)
    truth = ndimage.gaussian_filter(rng.normal(size=(12, 14, 16)), 1.5)
    weak, strong = (truth + s * truth.std() * rng.normal(size=truth.shape) for s in (0.1, 1.0))
    assert ssim(truth, truth) == pytest.approx(1, abs=1e-12)
    assert 1 > ssim(truth, weak) > ssim(truth, strong) > 0


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_image_metrics_refuse_other_shapes_and_constant_truth(metric):
    with pytest.raises(ValueError, match="one shape"):
        metric(np.zeros((8, 8)), np.zeros((8, 9)))
    with pytest.raises(ValueError, match="`data_range` must be positive"):
        metric(np.ones((8, 8)), np.zeros((8, 8)))


def test_ssim_refuses_axes_shorter_than_its_window():
    with pytest.raises(ValueError, match="window of 7"):
        ssim(np.zeros((5, 8, 8)), np.ones((5, 8, 8)))


@pytest.mark.parametrize("shape", [(32, 48), (16, 24, 32)])
def test_fsc_of_an_image_with_itself_is_one_up_to_nyquist(shape):
    image = np.random.default_rng(4).normal(size=shape)
    curve = fsc(image, 2 * image + 3, voxel_size=(0.5,) * len(shape))
    np.testing.assert_allclose(curve.correlation, 1, atol=1e-12)
    assert curve.frequency[-1] == pytest.approx(1.0, rel=0.05)
    assert curve.resolution_um() == pytest.approx(1 / curve.frequency[-1])


def test_fsc_of_independent_noise_scatters_around_zero_within_its_standard_error():
    first, second = np.random.default_rng(5).normal(size=(2, 32, 32, 32))
    curve = fsc(first, second, voxel_size=(1, 1, 1))
    # A shell of radius k holds about 4 pi k^2 / 2 independent pairs, a Hann window leaves (2/3)^3 of them.
    radius = curve.frequency * 32
    error = 1 / np.sqrt(2 * np.pi * radius**2 * (2 / 3) ** 3)
    assert (np.abs(curve.correlation[2:]) < 4.5 * error[2:]).all()


def test_fsc_finds_the_period_at_which_a_common_band_ends():
    """White signal below 0.25 cycles/um in two images, independent noise above: resolution 4 um."""
    rng = np.random.default_rng(6)
    shape, voxel_size = (48, 64, 64), (1.0, 0.8, 0.8)
    axes = [np.fft.fftfreq(n, d) for n, d in zip(shape, voxel_size, strict=True)]
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij")))

    def band(image, keep):
        return np.fft.ifftn(np.fft.fftn(image) * keep).real

    signal = band(rng.normal(size=shape), frequency < 0.25)
    images = [signal + band(rng.normal(size=shape), frequency >= 0.25) for _ in range(2)]
    curve = fsc(*images, voxel_size=voxel_size)
    # One shell is 1 / 48 cycles/um wide, and the window mixes neighbouring shells.
    assert 1 / curve.resolution_um() == pytest.approx(0.25, abs=1.5 / 48)


def test_fsc_resolution_is_infinite_where_nothing_agrees():
    image = np.random.default_rng(7).normal(size=(16, 16))
    assert fsc(image, -image, voxel_size=(1, 1)).resolution_um() == math.inf


@pytest.mark.parametrize(
    ("shape", "voxel_size", "message"),
    [
        ((16, 16), (1,), "one positive number per axis"),
        ((16, 16), (1, 0), "positive"),
        ((4, 16), (1, 1), "at least 8"),
    ],
)
def test_fsc_refuses_bad_sampling(shape, voxel_size, message):
    image = np.random.default_rng(8).normal(size=shape)
    with pytest.raises(ValueError, match=message):
        fsc(image, image, voxel_size=voxel_size)


def test_fsc_refuses_constant_images():
    with pytest.raises(ValueError, match="constant"):
        fsc(np.ones((16, 16)), np.ones((16, 16)), voxel_size=(1, 1))


# Instances ------------------------------------------------------------------------------------------------


def test_scores_of_a_worked_example():
    truth = np.array([[1, 1, 1, 1, 0, 2, 2, 0, 3]])
    labels = np.array([[7, 7, 7, 0, 0, 9, 9, 9, 0]])
    score = match_instances(truth, labels, iou=0.5)
    assert (score.n_true, score.n_pred, score.tp, score.fp, score.fn) == (3, 2, 2, 0, 1)
    assert score.precision == 1
    assert score.recall == pytest.approx(2 / 3)
    assert score.f1 == pytest.approx(0.8)
    assert score.mean_matched_iou == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert match_instances(truth, labels, iou=0.7).tp == 1


def test_more_matches_beat_more_overlap():
    """Pairing 1 with 5 alone overlaps most, but leaves 2 and 6 without a partner: two matches are possible."""
    truth = np.array([1] * 10 + [2] * 4)
    labels = np.array([6] * 4 + [5] * 6 + [5] * 4)
    assert match_instances(truth, labels, iou=0.3).tp == 2
    assert match_instances(truth, labels, iou=0.41).tp == 1


def test_empty_volumes_score_one_and_missed_volumes_zero():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    assert match_instances(empty, empty).f1 == 1
    assert match_instances(full, empty).f1 == 0
    assert match_instances(empty, full).f1 == 0
    assert match_instances(full, full).mean_matched_iou == 1


@settings(max_examples=60, deadline=None)
@given(truth=LABELS, labels=LABELS, iou=st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]))
def test_matching_agrees_with_stardist_on_random_labels(truth, labels, iou):
    matching = pytest.importorskip("stardist.matching").matching
    expected = matching(truth, labels, thresh=iou)
    score = match_instances(truth, labels, iou=iou)
    assert (score.tp, score.fp, score.fn) == (expected.tp, expected.fp, expected.fn)
    if expected.tp:
        assert score.mean_matched_iou == pytest.approx(expected.mean_matched_score, abs=1e-6)
        assert score.f1 == pytest.approx(expected.f1)


def test_matching_agrees_with_stardist_on_shifted_objects():
    matching = pytest.importorskip("stardist.matching").matching
    truth = balls((20, 40, 40), 60, seed=9)
    labels = np.roll(truth, (1, 2, 1), axis=(0, 1, 2))
    for iou in (0.2, 0.4, 0.6, 0.8):
        expected, score = matching(truth, labels, thresh=iou), match_instances(truth, labels, iou=iou)
        assert (score.tp, score.fp, score.fn) == (expected.tp, expected.fp, expected.fn)
        assert score.mean_matched_iou == pytest.approx(expected.mean_matched_score, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 99))
def test_renamed_instances_are_the_same(labels, seed):
    ids = np.random.default_rng(seed).permutation(np.arange(1, 6)) * 2**40
    renamed = np.concatenate([[0], ids])[labels]
    difference = same_instances(labels, renamed)
    assert difference.same
    assert difference.n_identical == difference.n_first == len(np.unique(labels[labels > 0]))


@settings(max_examples=100, deadline=None)
@given(first=LABELS, second=LABELS)
def test_same_means_a_one_to_one_mapping_of_ids(first, second):
    pairs = set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True)) | {(0, 0)}
    one_to_one = len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert same_instances(first, second).same == one_to_one


def test_difference_counts_voxels_splits_and_merges():
    first = balls((12, 24, 24), 12, seed=10)
    moved = first.copy()
    moved[tuple(np.argwhere(first == 3)[0])] = 0
    one_voxel = same_instances(first, moved)
    assert (one_voxel.same, one_voxel.n_voxels) == (False, 1)
    assert one_voxel.n_identical == one_voxel.n_first - 1
    merged = np.where(first == 4, 5, first)
    assert not same_instances(first, merged).same
    assert not same_instances(merged, first).same
    assert same_instances(first, merged).n_second == same_instances(first, first).n_second - 1


@pytest.mark.parametrize("compare", [match_instances, same_instances])
def test_instance_metrics_refuse_other_shapes_and_floats(compare):
    with pytest.raises(ValueError, match="one shape"):
        compare(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(TypeError, match="integer label ids"):
        compare(np.zeros((2, 2)), np.zeros((2, 2), int))


@pytest.mark.parametrize("iou", [0, -0.5, 1.5, math.nan])
def test_matching_refuses_impossible_thresholds(iou):
    with pytest.raises(ValueError, match="`iou`"):
        match_instances(np.ones(3, int), np.ones(3, int), iou=iou)


# Seams ----------------------------------------------------------------------------------------------------


def test_seam_error_measures_the_band_around_interior_borders_only():
    grid = BlockGrid.regular((8, 20), (8, 10))
    untiled = np.zeros((8, 20))
    untiled[0, 0] = 4.0
    tiled = untiled.copy()
    tiled[:, 9:11] += 0.2  # at the seam: columns 8 to 11 are within 2 voxels of it
    tiled[3, 0] += 1.0  # far from it
    error = seam_error(tiled, untiled, grid, width=2)
    assert error.n_voxels == 8 * 4
    assert error.rms == pytest.approx(0.2 / math.sqrt(2))
    assert error.max == pytest.approx(1.0)
    assert error.rms_everywhere == pytest.approx(math.sqrt((16 * 0.04 + 1) / 160))
    assert error.relative_rms == pytest.approx(error.rms / 4)
    assert error.relative_max == pytest.approx(0.25)


def test_seam_error_takes_borders_and_equals_that_of_their_grid():
    rng = np.random.default_rng(11)
    tiled, untiled = rng.normal(size=(2, 9, 10, 11))
    grid = BlockGrid.regular((9, 10, 11), (4, 5, 6))
    assert seam_error(tiled, untiled, grid) == seam_error(tiled, untiled, grid.edges)


def test_a_single_block_has_no_seam():
    image = np.arange(12.0).reshape(3, 4)
    error = seam_error(image, image, [(0, 3), (0, 4)])
    assert (error.rms, error.max, error.n_voxels, error.relative_rms) == (0, 0, 0, 0)


def test_seam_error_refuses_a_grid_of_another_shape():
    with pytest.raises(ValueError, match=r"`grid` covers a volume of \(4, 4\)"):
        seam_error(np.zeros((4, 5)), np.zeros((4, 5)), BlockGrid.regular((4, 4), (2, 2)))

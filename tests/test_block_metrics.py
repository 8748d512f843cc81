"""Metrics computed block by block against whole arrays and independent implementations."""

import math

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from chunkrestore.metrics import fsc, match_instances, psnr, score_image, score_labels, ssim
from chunkrestore.metrics.cells import Cells
from chunkrestore.metrics.contingency import count_overlaps, merged_counts
from chunkrestore.metrics.exact import added, totals
from chunkrestore.statistics import NonFiniteError

LABELS = hnp.arrays(np.int32, (3, 5, 6), elements=st.integers(0, 5))
VOXEL = (0.8, 0.4, 0.4)


def pair(shape, seed, dtype="float32"):
    """A smooth truth and the same with noise, gain and offset."""
    rng = np.random.default_rng(seed)
    truth = 1000 + 200 * ndimage.gaussian_filter(rng.normal(size=shape), 1.2)
    image = 1.1 * truth - 60 + rng.normal(0, 20, shape)
    return truth.astype(dtype), image.astype(dtype)


def blobs(shape, seed, threshold=0.1):
    """Two segmentations of one noisy scene, ids with gaps."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    other = smooth + ndimage.gaussian_filter(rng.normal(size=shape), 1.0) * 0.2
    first, second = (ndimage.label(s > threshold * 0.5)[0] for s in (smooth, other))
    return first.astype(np.int32), (second * 7).astype(np.int64)


@given(values=st.lists(st.floats(-1e200, 1e200), max_size=30), seed=st.integers(0, 99))
def test_exact_sums_do_not_depend_on_order_or_grouping(values, seed):
    rows = np.array(values, float).reshape(-1, 1)
    shuffled = np.random.default_rng(seed).permutation(rows)
    cut = len(rows) // 3
    grouped = added(np.concatenate([added(shuffled[:cut]), added(shuffled[cut:])]))
    assert totals(grouped).tolist() == totals(rows).tolist() == [math.fsum(values)]


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(20, 150)] * 2),
    block=st.tuples(*[st.integers(9, 200)] * 2),
)
def test_cells_partition_the_volume_and_each_belongs_to_one_block(shape, block):
    from chunkrestore.grid import BlockGrid

    shape3, block3 = (*shape, 70), (*block, 33)
    cells = Cells.partition(shape3)
    seen = np.zeros(shape3, np.int8)
    for b in BlockGrid.regular(shape3, block3):
        for cell in cells.beginning_in(b.core):
            seen[cell] += 1
    assert (seen == 1).all()


@settings(max_examples=12)
@given(
    block=st.tuples(st.integers(5, 90), st.integers(5, 90), st.integers(30, 140)),
    dtype=st.sampled_from(["uint16", "float32"]),
)
def test_image_scores_have_the_same_bits_for_every_block_grid(block, dtype):
    truth, image = pair((20, 70, 133), 1, dtype)
    known = {"voxel_size": VOXEL, "background": 99.5, "truth_background": 100.25}
    assert repr(score_image(truth, image, block_shape=block, **known).describe()) == repr(
        score_image(truth, image, **known).describe()
    )


@pytest.mark.parametrize("shape", [(20, 70, 75), (30, 140), (9, 8, 130)])
def test_image_scores_equal_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    truth, image = (array.astype(float) for array in pair(shape, 2))
    found = score_image(truth, image, block_shape=(25,) * len(shape), voxel_size=VOXEL[-len(shape) :])
    peak = np.ptp(truth)
    assert found.psnr == pytest.approx(
        metrics.peak_signal_noise_ratio(truth, image, data_range=peak), abs=1e-9
    )
    assert found.nrmse == pytest.approx(metrics.normalized_root_mse(truth, image), rel=1e-10)
    assert found.rmse**2 == pytest.approx(metrics.mean_squared_error(truth, image), rel=1e-10)
    assert found.correlation == pytest.approx(np.corrcoef(truth.ravel(), image.ravel())[0, 1], rel=1e-9)
    expected = metrics.structural_similarity(truth, image, data_range=peak)
    assert found.ssim == pytest.approx(expected, abs=1e-9)
    assert found.psnr_scaled == pytest.approx(psnr(truth, image, scale_invariant=True), abs=1e-6)
    assert found.bias == pytest.approx((image - truth).mean(), rel=1e-9)
    assert found.mae == pytest.approx(np.abs(image - truth).mean(), rel=1e-9)
    assert found.ssim == pytest.approx(ssim(truth, image), abs=1e-9)


def test_shell_correlation_is_that_of_the_whole_volume_where_it_is_one_window():
    truth, image = pair((40, 90, 128), 3)
    found = score_image(truth, image, voxel_size=VOXEL, block_shape=(16, 50, 50)).fsc
    expected = fsc(truth, image, voxel_size=VOXEL)
    np.testing.assert_array_equal(found.frequency, expected.frequency)
    np.testing.assert_allclose(found.correlation, expected.correlation, atol=1e-12)


def test_shell_correlation_of_a_long_volume_finds_the_same_resolution_as_the_whole_spectrum():
    """White signal below 0.4 cycles/um in both, independent noise above."""
    rng = np.random.default_rng(4)
    shape, voxel_size = (32, 96, 300), (0.8, 0.8, 0.8)
    axes = [np.fft.fftfreq(n, d) for n, d in zip(shape, voxel_size, strict=True)]
    low = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij"))) < 0.4

    def band(image, keep):
        return np.fft.ifftn(np.fft.fftn(image) * keep).real

    signal = band(rng.normal(size=shape), low)
    truth, image = (signal + band(rng.normal(size=shape), ~low) for _ in range(2))
    found = score_image(truth, image, voxel_size=voxel_size)
    whole = fsc(truth, image, voxel_size=voxel_size).resolution_um(0.5)
    # One shell is 1 / (32 * 0.8) cycles/um wide.
    assert 1 / found.resolution_um == pytest.approx(1 / whole, abs=1 / (32 * 0.8))
    assert 1 / found.resolution_um == pytest.approx(0.4, abs=1.5 / (32 * 0.8))


def test_dask_arrays_are_scored_without_being_loaded_whole():
    truth, image = pair((20, 70, 75), 5)
    first, second = blobs((20, 70, 75), 6)
    lazy = [da.from_array(array, chunks=chunks) for array, chunks in ((truth, (7, 30, 75)), (image, 33))]
    assert repr(score_image(*lazy, block_shape=(20, 40, 40))) == repr(score_image(truth, image))
    labels = [da.from_array(array, chunks=31) for array in (first, second)]
    assert score_labels(*labels) == score_labels(first, second)


def test_image_scores_refuse_what_cannot_be_compared():
    truth, image = pair((8, 9, 10), 7)
    with pytest.raises(ValueError, match="one shape"):
        score_image(truth, image[1:])
    with pytest.raises(ValueError, match="`data_range` must be positive"):
        score_image(np.ones_like(truth), image)
    with pytest.raises(ValueError, match="zyx or yx"):
        score_image(truth[None], image[None])
    image[3, 4, 5] = np.nan
    with pytest.raises(NonFiniteError, match="`image` holds"):
        score_image(truth, image)


def test_thin_volumes_have_neither_similarity_nor_shells():
    truth, image = pair((5, 30, 30), 8)
    found = score_image(truth, image, voxel_size=VOXEL)
    assert (found.ssim, found.fsc, found.resolution_um) == (None, None, None)
    assert found.psnr == pytest.approx(psnr(truth, image), abs=1e-9)


# Instances ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(truth=LABELS, labels=LABELS)
def test_all_thresholds_agree_with_stardist_on_random_labels(truth, labels):
    agrees(truth, labels)


def test_all_thresholds_agree_with_stardist_on_dense_objects():
    agrees(*blobs((16, 40, 40), 9))


def agrees(truth, labels):
    matching = pytest.importorskip("stardist.matching").matching
    found = score_labels(truth, labels, block_shape=(2, 4, 4))
    for score in found.at:
        expected = matching(truth, labels, thresh=score.iou)
        assert (score.tp, score.fp, score.fn) == (expected.tp, expected.fp, expected.fn)
        assert (score.n_true, score.n_pred) == (expected.n_true, expected.n_pred)
        if score.n_true and score.n_pred:
            for ours, theirs in (
                ("precision", "precision"),
                ("recall", "recall"),
                ("f1", "f1"),
                ("accuracy", "accuracy"),
                ("panoptic_quality", "panoptic_quality"),
                ("mean_matched_iou", "mean_matched_score"),
                ("mean_true_iou", "mean_true_score"),
            ):
                # StarDist's overlaps are float32.
                assert getattr(score, ours) == pytest.approx(getattr(expected, theirs), abs=1e-6), ours


def test_pairs_left_over_decide_between_equal_matchings_as_in_stardist():
    """Object 1 may go to 5 or 6 at the threshold; where 5 goes decides what is left for object 2."""
    truth = np.array([1] * 8 + [2] * 3 + [0] * 4)
    labels = np.array([5] * 4 + [6] * 4 + [6] * 1 + [0] * 2 + [0] * 4)
    agrees(truth.reshape(1, 1, -1), labels.reshape(1, 1, -1))


@settings(max_examples=20)
@given(
    first=hnp.arrays(np.uint64, (4, 9), elements=st.sampled_from([0, 1, 2**40, 2**63 + 5, 2**64 - 1])),
    second=hnp.arrays(np.int16, (4, 9), elements=st.integers(-3, 3)),
    cut=st.integers(1, 8),
)
def test_counts_of_blocks_add_up_whatever_the_ids(first, second, cut):
    parts = [count_overlaps(first[:, s], second[:, s]) for s in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(merged_counts(parts), count_overlaps(first, second))
    expected = {(int(np.int64(np.uint64(a))), int(b)) for a, b in zip(first.flat, second.flat, strict=True)}
    assert {(a, b) for a, b, _ in merged_counts(parts).tolist()} == expected


def test_splits_merges_and_volume_errors_of_a_worked_example():
    truth = np.array([[1] * 10 + [2] * 10 + [3] * 4 + [4] * 4 + [0] * 4])
    labels = np.array([[1] * 5 + [2] * 5 + [3] * 12 + [4] * 6 + [0] * 4])
    found = score_labels(truth, labels)
    # 1 is cut into 1 and 2; 4 holds all of 4 and half of 3, which is not more than half.
    assert (found.n_split, found.n_merged) == (1, 0)
    merged = np.where(labels == 2, 3, labels)
    assert score_labels(truth, np.where(truth > 2, 9, merged)).n_merged == 1
    # Pairs at 0.5: 1 with 1 or 2 (half), 2 with 3 (10 of 12), 4 with 4 (4 of 6).
    errors = [-0.5, 0.2, 0.5]
    assert found.volume_error == pytest.approx(np.median(errors))
    assert found.absolute_volume_error == pytest.approx(np.median(np.abs(errors)))


def test_empty_label_volumes():
    empty, full = np.zeros((3, 4, 5), np.int32), np.ones((3, 4, 5), np.int32)
    assert score_labels(empty, empty).mean_f1 == 1
    assert score_labels(full, empty).mean_f1 == score_labels(empty, full).mean_f1 == 0
    assert math.isnan(score_labels(full, empty).volume_error)


@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_large_groups_are_matched_as_small_ones_are(seed):
    """A chain of 300 objects, each overlapping two of the other volume by chance."""
    from chunkrestore.metrics import instances

    rng = np.random.default_rng(seed)
    truth, labels = (np.repeat(np.arange(1, 301), rng.integers(3, 9, 300)) for _ in range(2))
    n = min(len(truth), len(labels))
    table = instances.Contingency.of(count_overlaps(truth[:n], labels[:n]))
    iou, gain = table.iou, 301 * (table.iou >= 0.2) + table.iou
    found = [
        solve(table.row, table.column, gain, (len(table.first), len(table.second)))
        for solve in (instances._assign_dense, instances._assign_sparse)
    ]
    assert gain[found[0]].sum() == pytest.approx(gain[found[1]].sum(), abs=1e-6)
    assert (iou[found[1]] >= 0.2).sum() == len(instances.best_pairs(table, 0.2))


def test_a_million_objects_are_matched_in_seconds():
    """All are shifted by three voxels of eight, so that they form chains, which holes cut."""
    rng = np.random.default_rng(11)
    truth = np.repeat(np.arange(1, 1_000_001), 8)
    labels = np.roll(truth, 3) * 3
    labels[rng.integers(0, truth.size, truth.size // 10)] = 0
    assert match_instances(truth, labels, iou=0.2).n_true == 1_000_000


@pytest.mark.parametrize("iou", [[], [0.0], [0.5, 1.5]])
def test_scores_of_labels_refuse_impossible_thresholds(iou):
    with pytest.raises(ValueError, match="`iou` must lie in"):
        score_labels(np.ones((2, 2), int), np.ones((2, 2), int), iou=iou)

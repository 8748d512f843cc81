"""Preparation of point spread functions against closed forms: known widths, known shifts, known light."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chunkrestore.psf import (
    centre,
    check_psf,
    crop_to_energy,
    energy_radius,
    gaussian,
    keep_largest_component,
    pad_or_crop,
    prepare,
    prepare_psf,
    read_psf,
    read_psf_voxel_size,
    resample,
    subtract_background,
    write_psf,
)
from chunkrestore.psf.files import read_raw_psf
from chunkrestore.psf.sampling import offset
from chunkrestore.psf.shape import edge_level

RESAMPLED = [(2.0, 1.0), (1.0, 2.0), (0.37, 0.5), (0.5, 0.37), (0.1, 0.13), (0.2, 0.0625), (1.0, 1.0)]


def sampled(shape, sigma, centre):
    """Unit peak."""
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return np.exp(-0.5 * sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, sigma, strict=True)))


def skewed(shape=(25, 22, 19)):
    """A core with one tail per axis, each of another length and strength; no axis or direction like another."""
    middle = [n // 2 for n in shape]
    psf = sampled(shape, (2.0, 1.6, 1.5), middle)
    for axis, (distance, strength) in enumerate([(4, 0.3), (-3, 0.2), (2.5, 0.15)]):
        at = [m + distance * (a == axis) for a, m in enumerate(middle)]
        psf += strength * sampled(shape, (1.6, 1.8, 1.5), at)
    return psf


def light(array):
    return array.sum(dtype=np.float64)


# --- voxel size


@pytest.mark.parametrize(("old", "new"), RESAMPLED)
def test_resampled_gaussian_is_the_gaussian_of_the_scaled_width(old, new):
    # At least 1.4 of the coarser voxels wide: less than 7e-5 of the spectrum lies beyond what it can hold.
    sigma_um = 1.4 * max(old, new)
    n = 2 * int(np.ceil(6 * sigma_um / old)) + 1
    psf = sampled((n, n), (sigma_um / old,) * 2, (n // 2,) * 2)
    result = resample(psf, (old, old), (new, new))
    assert result.dtype == np.float32
    expected = sampled(result.shape, (sigma_um / new,) * 2, [m // 2 for m in result.shape])
    np.testing.assert_allclose(
        result / light(result),
        expected / light(expected),
        atol=1e-4 * float(expected.max() / light(expected)),
    )
    assert light(result) == pytest.approx(light(psf), rel=1e-6)


def test_axes_are_resampled_each_by_its_own_ratio():
    psf = sampled((61, 51, 41), (6.0, 4.0, 3.0), (30, 25, 20))
    result = resample(psf, (0.1, 0.1, 0.2), (0.25, 0.08, 0.2))
    sigma = (6 * 0.1 / 0.25, 4 * 0.1 / 0.08, 3.0)
    expected = sampled(result.shape, sigma, [n // 2 for n in result.shape])
    np.testing.assert_allclose(result / result.max(), expected, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.77, 1.0, 1.6, 2.0])
def test_resampling_keeps_light_centroid_and_orientation(ratio):
    psf = np.pad(skewed(), 12)
    size = (0.2, 0.1, 0.11)
    result = resample(psf, size, [s * ratio for s in size])
    assert all(n % 2 for n in result.shape)
    assert light(result) == pytest.approx(light(psf), rel=1e-6)
    before, after = np.array(offset(psf, "centroid")), np.array(offset(result, "centroid"))
    assert np.abs(before).min() > 0.2
    # Ratios above 1.5 leave less than a voxel per standard deviation; cutting off negative lobes then moves
    # the centroid by hundredths of a voxel.
    np.testing.assert_allclose(after * ratio, before, atol=0.03 if ratio > 1.5 else 1e-3)


def test_resampling_there_and_back_gives_the_psf():
    psf = sampled((33, 33), (3.0, 2.5), (16, 16)) + 0.4 * sampled((33, 33), (2.5, 3.0), (19, 14))
    back = resample(resample(psf, (0.1, 0.1), (0.07, 0.06)), (0.07, 0.06), (0.1, 0.1))
    np.testing.assert_allclose(pad_or_crop(back, psf.shape), psf, atol=2e-4)


def test_coarse_resampling_does_not_alias():
    # A fine pattern that new voxels of 4 cannot hold must vanish; taking every fourth voxel makes a slope of it.
    n = 129
    envelope = sampled((n, n), (16.0, 16.0), (64, 64))
    pattern = envelope * (1 + 0.9 * np.cos(2 * np.pi * np.arange(n) / 3.7))
    result = resample(pattern, (1, 1), (4, 4))
    smooth = resample(envelope, (1, 1), (4, 4))
    np.testing.assert_allclose(
        result / light(result), smooth / light(smooth), atol=2e-3 * smooth.max() / light(smooth)
    )


def test_resampling_to_the_same_size_changes_nothing():
    psf = skewed((25, 21, 19)).astype(np.float32)
    np.testing.assert_allclose(resample(psf, (3, 2, 1), (3, 2, 1)), psf, rtol=1e-6)


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_even_and_odd_psfs_are_resampled_about_voxel_n_half(n, ratio):
    psf = sampled((n, n), (1.6, 1.6), (n // 2, n // 2))
    result = resample(psf, (1, 1), (ratio, ratio))
    assert all(m % 2 for m in result.shape)
    # The array ends 3.1 standard deviations from the centre on one side, where 0.8 % of the peak is left.
    np.testing.assert_allclose(offset(result), 0, atol=5e-3)


def test_light_cut_off_at_the_edges_does_not_ring():
    # Extended by zeros, a constant rings by 9 % of its height beside each edge.
    result = resample(np.ones((31, 31)), (1, 1), (0.6, 0.6))
    assert np.ptp(result) < 0.01 * result.mean()


def test_one_plane_is_not_resampled_along_z():
    psf = sampled((1, 21, 21), (1, 2, 2), (0, 10, 10))
    assert resample(psf, (5.0, 0.1, 0.1), (0.1, 0.2, 0.2)).shape == (1, 11, 11)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ((1, 1), (1, 1, 1), r"`from_voxel_size`.*each of the 3 axes \(z, y, x\)"),
        ((1, 1, 1), (1, 0, 1), "`to_voxel_size`.*positive"),
        ((1, 1, 1), (1, -1, 1), "`to_voxel_size`.*positive"),
        ((1, np.nan, 1), (1, 1, 1), "`from_voxel_size`.*positive"),
        ((200, 0.1, 0.1), (0.2, 0.1, 0.1), "along z differ by more than a factor of 32.*nanometres"),
        ((0.1, 0.1, 0.1), (0.1, 0.1, 0.9), "along x is as large as the whole `psf` \\(9 voxels"),
    ],
)
def test_voxel_sizes_that_make_no_sense_are_named(old, new, message):
    with pytest.raises(ValueError, match=message):
        resample(gaussian((1, 1, 1)), old, new)


# --- centre


@pytest.mark.parametrize("by", ["peak", "centroid"])
@pytest.mark.parametrize("shift", [(0.3, -0.45, 0.5), (3.0, -2.0, 1.0), (-2.71, 1.13, 0.0)])
@pytest.mark.parametrize("shape", [(35, 29, 31), (36, 30, 28)])
def test_shifted_gaussian_is_moved_back(by, shift, shape):
    sigma, middle = (2.4, 1.5, 1.8), [n // 2 for n in shape]
    psf = sampled(shape, sigma, [m + s for m, s in zip(middle, shift, strict=True)])
    result = centre(psf, by=by)
    assert result.shape == shape
    assert result.dtype == np.float32
    assert result.min() >= 0
    # A Gaussian 1.5 voxels wide has 1e-5 of its spectrum's peak at the highest frequency.
    np.testing.assert_allclose(result, sampled(shape, sigma, middle), atol=1e-3)
    assert light(result) == pytest.approx(light(psf), rel=1e-3)


@pytest.mark.parametrize("by", ["peak", "centroid"])
def test_centring_twice_is_centring_once(by):
    psf = np.pad(skewed(), 6)
    once = centre(psf, by=by)
    np.testing.assert_allclose(offset(once, by), 0, atol=1e-3)
    np.testing.assert_allclose(centre(once, by=by), once, atol=2e-3)


def test_centring_the_peak_leaves_a_skewed_psf_skewed_the_same_way():
    psf = np.pad(skewed(), 8)
    peak, centroid = np.array(offset(psf)), np.array(offset(psf, "centroid"))
    result = centre(psf)
    # The peak itself is refined by thousandths of a voxel once it lies on one.
    np.testing.assert_allclose(offset(result, "centroid"), centroid - peak, atol=5e-3)


def test_whole_voxel_centring_moves_values_unchanged():
    psf = np.zeros((9, 10), np.float32)
    psf[2:5, 6:9] = [[1, 4, 2], [3, 9, 6], [5, 7, 3]]
    result = centre(psf, subvoxel=False)
    assert result[4, 5] == 9
    np.testing.assert_array_equal(result[3:6, 4:7], psf[2:5, 6:9])
    assert light(result) == 40


def test_centred_psf_is_returned_as_it_is():
    psf = gaussian((2.0, 1.0, 1.5))
    np.testing.assert_array_equal(centre(psf), psf)
    assert centre(psf) is not psf


def test_nothing_wraps_around():
    psf = sampled((31, 31), (1.5, 1.5), (5.4, 26.3))
    result = centre(psf)
    far = np.hypot(*np.meshgrid(np.arange(31) - 15, np.arange(31) - 15)) > 9
    # Cut off at 5 % of its peak; that light would come in again at the other side.
    assert result[far].max() < 1e-3


@pytest.mark.parametrize("shape", [(20, 21), (21, 20), (20, 20)])
def test_peak_between_voxels_is_found(shape):
    psf = sampled(shape, (2.0, 2.0), [(n - 1) / 2 for n in shape])
    np.testing.assert_allclose(offset(psf), [0.0 if n % 2 else -0.5 for n in shape], atol=1e-6)
    np.testing.assert_allclose(centre(psf), sampled(shape, (2.0, 2.0), [n // 2 for n in shape]), atol=2e-3)


def test_plateau_is_centred_by_its_middle():
    psf = np.minimum(sampled((31, 31), (4.0, 3.0), (17, 12)), 0.6)
    np.testing.assert_allclose(offset(psf), (2, -3), atol=1e-6)
    np.testing.assert_allclose(offset(centre(psf), "centroid"), 0, atol=0.02)


def test_unknown_landmark_is_named():
    with pytest.raises(ValueError, match='`by` must be "peak" or "centroid", got \'middle\''):
        centre(gaussian((1, 1)), by="middle")


# --- background, components


def test_edge_median_is_subtracted_and_the_rest_clipped():
    psf = sampled((21, 21, 21), (2, 2, 2), (10, 10, 10)) * 500
    noisy = psf + np.random.default_rng(5).normal(100, 3, psf.shape)
    result = subtract_background(noisy)
    # The median of 2402 voxels of deviation 3 errs by 1.25 * 3 / sqrt(2402) = 0.08.
    assert edge_level(noisy) == pytest.approx(100, abs=4 * 0.08)
    np.testing.assert_allclose(result, np.maximum(noisy - edge_level(noisy), 0), rtol=1e-5)
    assert result.min() == 0


def test_given_level_is_subtracted_and_types_do_not_wrap():
    psf = np.array([[3, 10], [200, 7]], np.uint8)
    np.testing.assert_array_equal(subtract_background(psf, 9), [[0, 1], [191, 0]])
    np.testing.assert_array_equal(psf, np.array([[3, 10], [200, 7]], np.uint8))


def test_subtracting_an_edge_that_is_zero_changes_nothing():
    psf = gaussian((1, 1), truncate=6)
    np.testing.assert_allclose(subtract_background(psf), psf, atol=1e-8)


@pytest.mark.parametrize(
    ("level", "message"), [(1000, "no value above the background"), (np.nan, "`level` must be")]
)
def test_background_above_everything_is_an_error(level, message):
    with pytest.raises(ValueError, match=message):
        subtract_background(sampled((5, 5), (1, 1), (2, 2)), level)


def test_constant_array_has_nothing_above_its_background():
    with pytest.raises(ValueError, match="no value above the background 7"):
        subtract_background(np.full((5, 5), 7.0))


def test_largest_component_is_kept_and_hot_pixels_and_neighbours_go():
    bead = sampled((21, 41), (2, 2), (10, 12))
    psf = bead + 0.5 * sampled((21, 41), (1.5, 1.5), (10, 32))
    psf[2, 2] = 5.0  # brighter than the bead, and yet a pixel
    result = keep_largest_component(psf, 0.01)
    assert result[2, 2] == 0
    assert result[:, 24:].max() == 0
    np.testing.assert_allclose(result[10, 8:17], bead[10, 8:17], rtol=1e-5)


def test_diagonal_neighbours_belong_together():
    np.testing.assert_array_equal(keep_largest_component(np.eye(4)), np.eye(4))


@pytest.mark.parametrize("threshold", [0, 1, -0.1, np.nan])
def test_threshold_out_of_range_is_named(threshold):
    with pytest.raises(ValueError, match="`threshold` must be above 0 and below 1"):
        keep_largest_component(gaussian((1, 1)), threshold)


# --- size


@given(
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6).flatmap(
        lambda shape: st.tuples(st.just(shape), st.tuples(*[st.integers(1, 8)] * len(shape)))
    )
)
def test_padding_and_cropping_keep_voxels_at_their_distance_from_the_centre(shapes):
    shape, wanted = shapes
    psf = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    result = pad_or_crop(psf, wanted)
    assert result.shape == wanted
    for at in np.ndindex(wanted):
        source = [i - m // 2 + n // 2 for i, m, n in zip(at, wanted, shape, strict=True)]
        inside = all(0 <= i < n for i, n in zip(source, shape, strict=True))
        assert result[at] == (psf[tuple(source)] if inside else 0)


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, -1), (3, 2.5), (3, 3, 3)])
def test_bad_shape_is_named(shape):
    with pytest.raises(ValueError, match="`shape` must have one positive length for each of the 2 axes"):
        pad_or_crop(gaussian((1, 1)), shape)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(25, 22, 19), (24, 21, 20)])
def test_crop_keeps_the_fraction_of_light_and_no_smaller_one_does(fraction, shape):
    psf = skewed(shape)
    result = crop_to_energy(psf, fraction)
    assert all(n % 2 for n in result.shape)
    assert result.shape == tuple(2 * r + 1 for r in energy_radius(psf, fraction))
    for axis, n in enumerate(result.shape):
        others = tuple(a for a in range(3) if a != axis)
        profile, middle = psf.sum(axis=others), shape[axis] // 2
        low, high = max(0, middle - n // 2), middle + n // 2 + 1
        assert profile[low:high].sum() >= fraction * psf.sum() * (1 - 1e-9)
        assert n == 1 or profile[low + 1 : high - 1].sum() < fraction * psf.sum()


def test_cropping_all_the_light_keeps_it():
    psf = skewed((24, 21, 20))
    assert light(crop_to_energy(psf, 1.0)) == pytest.approx(light(psf), rel=1e-6)


def test_crop_twice_is_crop_once_where_nothing_is_left_to_cut():
    psf = np.pad(skewed(), 9)
    once = crop_to_energy(psf, 1.0)
    np.testing.assert_array_equal(crop_to_energy(once, 1.0), once)


@pytest.mark.parametrize("fraction", [0, 1.1, -1])
def test_fraction_out_of_range_is_named(fraction):
    with pytest.raises(ValueError, match="`fraction` must be above 0"):
        crop_to_energy(gaussian((1, 1)), fraction)


# --- the chain


STEPS = [
    subtract_background,
    keep_largest_component,
    centre,
    crop_to_energy,
    lambda psf: resample(psf, (1, 1), (1, 1.5)),
    lambda psf: pad_or_crop(psf, (9, 9)),
    lambda psf: prepare_psf(psf)[0],
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_steps_return_new_float32_and_leave_their_input(step, dtype):
    psf = np.round(200 * sampled((11, 12), (1.8, 1.5), (5.3, 5.6))).astype(dtype)
    psf.setflags(write=False)
    before = psf.copy()
    result = step(psf)
    assert result.dtype == np.float32
    assert not np.shares_memory(result, psf)
    np.testing.assert_array_equal(psf, before)


@pytest.mark.parametrize("step", STEPS)
def test_steps_refuse_nan_text_and_wrong_dimensions(step):
    for bad in (np.full((5, 5), np.nan), np.ones(5), np.zeros((0, 4))):
        with pytest.raises(ValueError, match="`psf`"):
            step(bad)
    with pytest.raises(TypeError, match="`psf` must be an array of real numbers"):
        step(np.array([["a"]]))


@pytest.mark.parametrize("step", [keep_largest_component, centre, crop_to_energy])
def test_steps_refuse_negative_values(step):
    with pytest.raises(ValueError, match="negative values"):
        step(np.array([[1.0, -1.0]]))


def test_measured_bead_becomes_the_psf_it_was_made_from():
    shape, at, sigma = (41, 45, 43), (19.3, 24.4, 20.8), (5.0, 2.5, 2.5)
    raw = np.random.default_rng(6).poisson(100 + 20000 * sampled(shape, sigma, at)).astype(np.uint16)
    psf, steps = prepare_psf(
        raw, component=0.005, voxel_size=(0.1, 0.1, 0.1), image_voxel_size=(0.25, 0.1, 0.1), energy=0.995
    )
    check_psf(psf, 3)
    assert all(n % 2 for n in psf.shape)
    assert light(psf) == pytest.approx(1, abs=1e-6)
    expected = prepare(sampled(psf.shape, (2.0, 2.5, 2.5), [n // 2 for n in psf.shape]))
    # The threshold takes what lies beyond 3.3 standard deviations, 1.2 % of the light; photon noise is 0.7 %
    # of the peak (one standard deviation).
    np.testing.assert_allclose(psf, expected, atol=0.035 * expected.max())
    assert [line.split()[0] for line in steps] == [
        "background",
        "component",
        "centre",
        "voxel",
        "crop",
        "sum",
    ]
    assert steps[0].startswith("background subtracted 100 (median of the faces)")
    moved = [float(v) for v in steps[2].split("from ")[1].split(" voxels")[0].split(",")]
    np.testing.assert_allclose(moved, [a - n // 2 for n, a in zip(shape, at, strict=True)], atol=0.05)
    assert "from 0.1, 0.1, 0.1 to 0.25, 0.1, 0.1 um" in steps[3]


def test_light_that_centring_moves_beyond_the_array_is_kept():
    # The peak moves by 6 voxels, and light at voxel 27 of 31 with it.
    psf = sampled((31, 31), (2.0, 2.0), (9, 15)) + 0.2 * sampled((31, 31), (1.5, 1.5), (26, 15))
    result, _ = prepare_psf(psf, background=None, energy=1.0)
    middle = [n // 2 for n in result.shape]
    expected = sampled(result.shape, (2.0, 2.0), middle)
    expected += 0.2 * sampled(result.shape, (1.5, 1.5), (middle[0] + 17, middle[1]))
    np.testing.assert_allclose(result * light(psf), expected, atol=2e-3)


def test_computed_psf_passes_unchanged_but_for_the_crop():
    psf = gaussian((2.0, 1.5, 1.5))
    result, steps = prepare_psf(psf, background=None)
    np.testing.assert_allclose(result, prepare(crop_to_energy(psf)), rtol=1e-6)
    assert steps[0] == "centre     the peak is at the centre"
    whole, _ = prepare_psf(psf, background=None, centre_by=None, energy=None)
    np.testing.assert_array_equal(whole, psf)


def test_preparing_twice_is_preparing_once():
    once, _ = prepare_psf(np.pad(skewed(), 5), energy=1.0)
    np.testing.assert_allclose(prepare_psf(once, background=None, energy=1.0)[0], once, atol=1e-5)


def test_one_voxel_size_without_the_other_is_an_error():
    with pytest.raises(ValueError, match="`image_voxel_size` is missing"):
        prepare_psf(gaussian((1, 1)), voxel_size=(0.1, 0.1))
    with pytest.raises(ValueError, match="`voxel_size` is missing"):
        prepare_psf(gaussian((1, 1)), image_voxel_size=(0.1, 0.1))


def test_unknown_background_is_named():
    with pytest.raises(ValueError, match="`background` must be an intensity"):
        prepare_psf(gaussian((1, 1)), background="corner")


# --- files


@pytest.mark.parametrize("size", [(0.2, 0.1, 0.11), (1.0, 0.0647, 0.0647), (0.3333333, 0.25, 0.125), None])
def test_written_psf_is_read_back_with_its_voxel_size(tmp_path, size):
    psf = skewed((9, 8, 7)).astype(np.float32)
    write_psf(tmp_path / "psf.tif", psf, size)
    np.testing.assert_array_equal(read_raw_psf(tmp_path / "psf.tif"), psf)
    np.testing.assert_allclose(read_psf(tmp_path / "psf.tif"), prepare(psf), rtol=1e-6)
    found = read_psf_voxel_size(tmp_path / "psf.tif")
    assert found is None if size is None else found == pytest.approx(size, rel=1e-6)


def test_written_plane_is_read_back_with_its_voxel_size(tmp_path):
    psf = gaussian((2, 1))
    write_psf(tmp_path / "psf.tiff", psf, (0.2, 0.1))
    np.testing.assert_array_equal(read_psf(tmp_path / "psf.tiff"), psf)
    assert read_psf_voxel_size(tmp_path / "psf.tiff") == pytest.approx((0.2, 0.1), rel=1e-6)


def test_numpy_file_holds_no_voxel_size(tmp_path):
    write_psf(tmp_path / "psf.npy", gaussian((2, 1)))
    np.testing.assert_array_equal(read_psf(tmp_path / "psf.npy"), gaussian((2, 1)))
    assert read_psf_voxel_size(tmp_path / "psf.npy") is None
    with pytest.raises(ValueError, match="cannot hold `voxel_size`"):
        write_psf(tmp_path / "psf.npy", gaussian((2, 1)), (1, 1))


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("um", 1), ("\\u00B5m", 1), ("micron", 1), ("nm", 1e-3), ("mm", 1000), ("pixel", None)],
)
def test_voxel_size_comes_from_imagej_metadata_in_its_unit(tmp_path, unit, factor):
    options = {"metadata": {"axes": "ZYX", "spacing": 300.0, "unit": unit}, "resolution": (1 / 100, 1 / 110)}
    tifffile.imwrite(tmp_path / "psf.tif", np.ones((3, 4, 5), np.float32), imagej=True, **options)
    found = read_psf_voxel_size(tmp_path / "psf.tif")
    assert found is None if factor is None else found == pytest.approx([factor * v for v in (300, 110, 100)])


@pytest.mark.parametrize(("unit", "expected"), [(None, (0.5, 0.2, 0.1)), ("nm", (0.5, 2e-4, 0.1))])
def test_voxel_size_comes_from_ome_metadata(tmp_path, unit, expected):
    facts = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 0.5}
    facts |= {"PhysicalSizeYUnit": unit} if unit else {}
    tifffile.imwrite(tmp_path / "psf.ome.tif", np.ones((3, 4, 5), np.float32), ome=True, metadata=facts)
    assert read_psf_voxel_size(tmp_path / "psf.ome.tif") == pytest.approx(expected)


def test_voxel_size_of_a_plane_comes_from_resolution_tags(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.ones((4, 5), np.float32), resolution=(1e5, 5e4), resolutionunit="CENTIMETER"
    )
    assert read_psf_voxel_size(tmp_path / "a.tif") == pytest.approx((0.2, 0.1))
    tifffile.imwrite(
        tmp_path / "b.tif", np.ones((5, 4, 5), np.float32), resolution=(1e5, 5e4), resolutionunit="CENTIMETER"
    )
    assert read_psf_voxel_size(tmp_path / "b.tif") is None
    tifffile.imwrite(tmp_path / "c.tif", np.ones((4, 5), np.float32))
    assert read_psf_voxel_size(tmp_path / "c.tif") is None


def test_files_that_cannot_be_written_or_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"psf\.h5.*one of \.npy, \.tif, \.tiff"):
        write_psf(tmp_path / "psf.h5", gaussian((1, 1)))
    with pytest.raises(ValueError, match=r"folder .* does not exist"):
        write_psf(tmp_path / "absent" / "psf.tif", gaussian((1, 1)))
    with pytest.raises(ValueError, match="`voxel_size` must have one positive length"):
        write_psf(tmp_path / "psf.tif", gaussian((1, 1)), (1, 1, 1))
    with pytest.raises(FileNotFoundError, match=r"absent\.tif"):
        read_psf_voxel_size(tmp_path / "absent.tif")
    (tmp_path / "broken.tif").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.tif.*cannot be read"):
        read_psf_voxel_size(tmp_path / "broken.tif")
    assert not (tmp_path / "psf.tif").exists()

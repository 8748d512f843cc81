"""Point spread functions: formula, checks, files, widths."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chunkrestore.psf import check_psf, effective_sigma, energy_radius, gaussian, prepare, read_psf


def moments(psf, axis):
    position = np.arange(psf.shape[axis]) - psf.shape[axis] // 2
    profile = psf.sum(axis=tuple(a for a in range(psf.ndim) if a != axis), dtype=np.float64)
    mean = (profile * position).sum()
    return mean, (profile * position**2).sum() - mean**2


def test_gaussian_is_centred_normalised_and_as_wide_as_asked():
    psf = gaussian((3.0, 1.5, 2.0))
    assert psf.dtype == np.float32
    assert all(n % 2 for n in psf.shape)
    assert psf.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    for axis, sigma in enumerate((3.0, 1.5, 2.0)):
        mean, variance = moments(psf, axis)
        assert mean == pytest.approx(0, abs=1e-6)
        # Cutting at 4 standard deviations takes 0.11 % of the variance.
        assert variance == pytest.approx(sigma**2, rel=2e-3)


def test_gaussian_with_a_tail_adds_the_variances_by_light():
    psf = gaussian((2.0, 1.0), truncate=5, tail=0.25, tail_sigma=(5.0, 4.0))
    for axis, (core, broad) in enumerate([(2.0, 5.0), (1.0, 4.0)]):
        assert moments(psf, axis)[1] == pytest.approx(0.75 * core**2 + 0.25 * broad**2, rel=1e-3)


def test_gaussian_of_width_zero_does_not_blur():
    np.testing.assert_array_equal(gaussian((0.0, 0.0)), [[1.0]])
    assert gaussian((0.0, 1.0, 1.0)).shape == (1, 9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": ()}, "`sigma`"),
        ({"sigma": (1.0, -1.0)}, "`sigma`"),
        ({"sigma": (1.0, np.nan)}, "`sigma`"),
        ({"sigma": (1.0, 1.0), "tail": 1.0}, "`tail`"),
        ({"sigma": (1.0, 1.0), "tail": -0.1}, "`tail`"),
        ({"sigma": (1.0, 1.0), "truncate": 0}, "`truncate`"),
        ({"sigma": (1.0, 1.0), "tail": 0.1, "tail_sigma": (3.0,)}, "`tail_sigma`"),
    ],
)
def test_gaussian_names_a_bad_parameter(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian(arguments.pop("sigma"), **arguments)


BAD = [
    (np.zeros((0, 3)), "is empty"),
    (np.zeros((3, 3)), "zero everywhere"),
    (np.array([[1.0, -0.1]]), "1 negative values"),
    (np.array([[1.0, np.nan]]), "1 NaN or infinite"),
    (np.array([[1.0, np.inf]]), "1 NaN or infinite"),
    (np.ones(3), "2 or 3 dimensions"),
    (np.ones((2, 2, 2, 2)), "2 or 3 dimensions"),
]


@pytest.mark.parametrize(("psf", "message"), BAD)
def test_unusable_psf_is_an_error_that_names_it(psf, message):
    with pytest.raises(ValueError, match=f"`psf`.*{message}"):
        check_psf(psf)


@pytest.mark.parametrize("psf", [np.ones((2, 2), complex), np.array([["a"]]), np.array([[None]]), "psf.tif"])
def test_psf_without_real_numbers_is_a_type_error(psf):
    with pytest.raises(TypeError, match="`psf` must be an array of real numbers"):
        check_psf(psf)


def test_negative_values_name_the_fix():
    with pytest.raises(ValueError, match="subtract its background and clip"):
        prepare(np.array([[1.0, -1.0]]))


def test_psf_of_the_wrong_dimension_names_both():
    with pytest.raises(ValueError, match=r"2 dimensions .* 3 spatial axes"):
        check_psf(np.ones((3, 3)), ndim=3)


def test_prepare_sums_in_double_precision_and_does_not_modify_its_input():
    psf = np.ones((128, 128, 64), np.float32)
    before = psf.copy()
    assert prepare(psf).sum(dtype=np.float64) == pytest.approx(1, abs=1e-7)
    np.testing.assert_array_equal(psf, before)


@pytest.mark.parametrize("value", [1e-200, 1e-38, 1e300])
def test_prepare_does_not_lose_very_small_or_large_values(value):
    np.testing.assert_allclose(prepare(np.full((2, 3), value)), 1 / 6, rtol=1e-6)


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=st.floats(0, 1, width=32)
    )
)
def test_prepare_twice_is_prepare_once(psf):
    if not psf.any():
        return
    once = prepare(psf)
    np.testing.assert_array_equal(prepare(once), once)
    assert once.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_psf_files_give_what_was_written(tmp_path, dtype):
    psf = np.random.default_rng(3).integers(0, 100, (5, 6, 7)).astype(dtype)
    tifffile.imwrite(tmp_path / "psf.tif", psf)
    np.save(tmp_path / "psf.npy", psf)
    expected = psf / psf.sum(dtype=np.float64)
    for name in ("psf.tif", "psf.npy"):
        np.testing.assert_allclose(read_psf(tmp_path / name), expected, rtol=1e-6, atol=1e-9)


def test_missing_psf_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'`psf` file ".*absent\.tif" does not exist'):
        read_psf(tmp_path / "absent.tif")


def test_unsupported_psf_file_lists_what_is_supported(tmp_path):
    with pytest.raises(ValueError, match=r"psf\.h5.*\.npy, \.tif, \.tiff"):
        read_psf(tmp_path / "psf.h5")


@pytest.mark.parametrize("name", ["broken.tif", "broken.npy"])
def test_broken_psf_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf'"[^"]*{name}" cannot be read'):
        read_psf(tmp_path / name)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "psf.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"psf\.npy.*cannot be read"):
        read_psf(tmp_path / "psf.npy")


def test_bad_values_in_a_file_name_the_file(tmp_path):
    np.save(tmp_path / "psf.npy", np.array([[1.0, -1.0]]))
    with pytest.raises(ValueError, match=r"psf\.npy.*negative"):
        read_psf(tmp_path / "psf.npy")


@pytest.mark.parametrize("sigma", [1.2, 2.0, 3.7])
def test_effective_sigma_is_the_sigma_of_a_gaussian(sigma):
    # Linear interpolation misplaces the half maximum by at most max|f''| / (8 |f'|), where |f'| = 0.59 / sigma
    # and |f''| < 0.45 / sigma^2, of a half width of 1.18 sigma.
    for width, wanted in zip(effective_sigma(gaussian((sigma, 2 * sigma))), (sigma, 2 * sigma), strict=True):
        assert width == pytest.approx(wanted, rel=0.45 / (8 * 0.59 * 1.18) / wanted**2)


def test_effective_sigma_sees_the_core_and_energy_radius_the_skirt():
    core, skirted = gaussian((2.0, 1.5)), gaussian((2.0, 1.5), tail=0.1)
    assert effective_sigma(skirted) == pytest.approx(effective_sigma(core), rel=0.03)
    assert all(a > 1.5 * b for a, b in zip(energy_radius(skirted), energy_radius(core), strict=True))


def test_effective_sigma_of_a_single_plane_is_zero():
    assert effective_sigma(gaussian((0.0, 1.5)))[0] == 0.0


@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.floats(0, 1, width=16)
    ),
    st.sampled_from([0.5, 0.9, 0.999, 1.0]),
)
def test_energy_radius_is_the_least_that_holds_the_light(psf, fraction):
    if not psf.any():
        return
    for axis, radius in enumerate(energy_radius(psf, fraction)):
        centre = psf.shape[axis] // 2
        profile = psf.sum(axis=tuple(a for a in range(psf.ndim) if a != axis), dtype=np.float64)
        distance = np.abs(np.arange(len(profile)) - centre)
        total = profile.sum()
        assert profile[distance <= radius].sum() >= fraction * total * (1 - 1e-12)
        assert radius == 0 or profile[distance <= radius - 1].sum() < fraction * total * (1 + 1e-12)


def test_energy_radius_refuses_a_share_outside_0_to_1():
    with pytest.raises(ValueError, match="`fraction`"):
        energy_radius(gaussian((1.0, 1.0)), 1.5)

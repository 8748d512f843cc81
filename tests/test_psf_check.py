"""Diagnosis of point spread functions: every fault is found, named and alone; a good one is left in peace."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from chunkrestore.psf import (
    diagnose,
    gaussian,
    keep_largest_component,
    pad_or_crop,
    prepare_psf,
    read_psf_voxel_size,
    resample,
    write_psf,
)
from chunkrestore.psf.check import describe

SIZE = (0.2, 0.1, 0.1)
SIGMA = (2.5, 1.5, 1.5)


def clean():
    """Peak 1000 on 21 x 13 x 13 voxels."""
    psf = gaussian(SIGMA)
    return (1000 * psf / psf.max()).astype(np.float32)


def sampled(shape, sigma, centre):
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return np.exp(-0.5 * sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, sigma, strict=True)))


def only(findings):
    assert len(findings) == 1, [str(f) for f in findings]
    return findings[0]


@pytest.mark.parametrize(
    "sigma", [(1.0, 1.0), (2.0, 1.0, 1.0), (3.5, 1.8, 1.8), (5.0, 5.0, 5.0), (0.0, 2.0, 2.0)]
)
@pytest.mark.parametrize("tail", [0.0, 0.15])
def test_good_psf_has_no_finding(sigma, tail):
    psf = gaussian(sigma, tail=tail)
    size = (0.2, 0.1, 0.1)[-psf.ndim :]
    assert diagnose(psf) == []
    assert (
        diagnose(
            psf, psf_voxel_size=size, image_shape=(128,) * psf.ndim, image_voxel_size=[1.04 * s for s in size]
        )
        == []
    )


def test_clean_fixture_has_no_finding():
    assert diagnose(clean(), psf_voxel_size=SIZE, image_voxel_size=SIZE, image_shape=(64, 64, 64)) == []


@pytest.mark.parametrize(
    ("psf", "subject", "measured"),
    [
        (clean()[None], "dimensions", "(1, 21, 13, 13)"),
        (np.ones(5), "dimensions", "(5,)"),
        (np.ones((0, 3)), "dimensions", "(0, 3)"),
        (clean().astype(complex), "type", "complex"),
        (np.array([["a"]]), "type", "<U1"),
        (np.where(clean() == 1000, np.nan, clean()), "NaN", "1 values are NaN"),
        (np.zeros((3, 3, 3)), "light", "no value above 0"),
        (np.full((3, 3), -1.0), "light", "largest -1"),
    ],
)
def test_unusable_psf_is_one_error(psf, subject, measured):
    found = only(diagnose(psf, image_voxel_size=SIZE))
    assert (found.severity, found.subject) == ("error", subject)
    assert measured in found.measured
    with pytest.raises(ValueError, match=subject):
        describe(psf)


def test_psf_of_another_dimension_than_the_image_is_an_error():
    found = only(diagnose(gaussian((2, 2)), image_shape=(64, 64, 64)))
    assert (found.severity, found.subject, found.limit) == ("error", "dimensions", "3, as the image")


def test_negative_values_are_an_error():
    psf = clean()
    psf[2, 6, 6] = -3
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("error", "negative values")
    assert found.measured == "1 values, least -3"


def test_voxel_size_that_differs_from_the_images_is_an_error_and_resampling_its_fix():
    sizes = {"psf_voxel_size": (0.13, 0.1, 0.1), "image_voxel_size": SIZE}
    found = only(diagnose(clean(), **sizes))
    assert (found.severity, found.subject) == ("error", "voxel size")
    assert "0.13, 0.1, 0.1" in found.measured
    assert "0.2, 0.1, 0.1" in found.limit
    assert "resample" in found.fix
    assert (
        diagnose(resample(clean(), (0.13, 0.1, 0.1), SIZE), psf_voxel_size=SIZE, image_voxel_size=SIZE) == []
    )


def test_unknown_voxel_size_is_a_note_where_the_image_has_one():
    found = only(diagnose(clean(), image_voxel_size=SIZE))
    assert (found.severity, found.subject) == ("note", "voxel size")


@pytest.mark.parametrize("level", [2.0, 100.0])
def test_pedestal_is_measured_and_its_fix_removes_it(level):
    psf = clean() + np.float32(level)
    share = level * psf.size / psf.sum(dtype=np.float64)
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("warning", "background")
    assert f"{share:.0%} of the light" in found.measured
    assert f"corners at {level:.4g}" in found.measured
    assert diagnose(prepare_psf(psf)[0]) == []


def test_one_corner_neither_makes_nor_hides_a_pedestal():
    psf = clean()
    psf[:3, :2, :2] = 60
    assert "background" not in {f.subject for f in diagnose(psf)}
    psf = clean() + 60
    psf[:3, :2, :2] = 0
    assert "background" in {f.subject for f in diagnose(psf)}


def test_scattered_noise_is_a_background_that_the_component_removes():
    noise = np.random.default_rng(2).poisson(1.0, (41, 33, 33)) - 1
    psf = np.maximum(pad_or_crop(clean(), (41, 33, 33)) + noise, 0)
    found = next(f for f in diagnose(psf) if f.subject == "background")
    assert "keep_largest_component" in found.fix
    assert "background" not in {f.subject for f in diagnose(keep_largest_component(psf))}


@pytest.mark.parametrize("shift", [(0.4, 0, 0), (0, 2, -1), (1.5, -0.6, 0.3)])
def test_peak_off_the_centre_is_measured_in_voxels(shift):
    shape = (25, 17, 17)
    psf = sampled(shape, SIGMA, [n // 2 + s for n, s in zip(shape, shift, strict=True)])
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("warning", "centre")
    values = [float(v) for v in found.measured.removeprefix("the peak lies ").split(" voxels")[0].split(",")]
    np.testing.assert_allclose(values, shift, atol=0.01)
    assert found.measured.endswith("from voxel 12, 8, 8")


def test_centroid_beside_the_peak_is_a_note():
    shape = (21, 13, 21)
    psf = sampled(shape, SIGMA, (10, 6, 10)) + 0.3 * sampled(shape, (2.5, 1.5, 3.0), (10, 6, 13))
    found = only(diagnose(prepare_psf(psf, background=None)[0]))
    assert (found.severity, found.subject) == ("note", "asymmetry")


def test_light_cut_off_at_the_ends_is_estimated():
    # 1.5 standard deviations to either side; the tails beyond hold 2 * (1 - Phi(16.5 / 10)) = 9.9 % of it.
    psf = sampled((33, 21, 21), (10.0, 2.5, 2.5), (16, 10, 10))
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("warning", "truncation")
    assert "along z" in found.measured
    loss = float(found.measured.split("about ")[1].split("%")[0])
    # A Gaussian falls off faster than the geometric series.
    assert 9.9 / 0.9 < loss < 3 * 9.9


def test_light_cut_off_at_one_end_only_is_found():
    psf = pad_or_crop(clean(), (33, 13, 13))[12:]
    assert [f.subject for f in diagnose(psf)] == ["centre", "truncation"]


def test_light_that_does_not_fall_off_is_endless_along_z_and_cut_off_across():
    height = 1 - 0.002 * np.abs(np.arange(-7, 8))
    psf = gaussian((2.0, 2.0)) * height[:, None, None]
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("note", "endless blur")
    assert "along z hold" in found.measured
    assert "hardly falls off" in found.measured
    across = only(diagnose(np.moveaxis(psf, 0, 1)))
    assert (across.severity, across.subject) == ("warning", "truncation")
    assert "along y hold" in across.measured


def test_undersampled_axis_is_named():
    found = only(diagnose(gaussian((2.0, 0.6, 1.0))))
    assert (found.severity, found.subject) == ("warning", "sampling")
    assert "along y" in found.measured
    assert "along x" not in found.measured


def test_sampling_is_judged_in_voxels_of_the_image():
    findings = diagnose(clean(), psf_voxel_size=SIZE, image_voxel_size=(0.2, 0.25, 0.25))
    assert [f.subject for f in findings] == ["voxel size", "sampling"]
    assert "voxels of the image along y" in findings[1].measured


def test_much_too_fine_sampling_is_a_note():
    found = only(diagnose(gaussian((6.0, 5.5, 5.5))))
    assert (found.severity, found.subject) == ("note", "sampling")


def test_empty_margin_is_a_note_that_says_what_cropping_saves():
    psf = pad_or_crop(clean(), (41, 41, 41))
    found = only(diagnose(psf, image_shape=(64, 64, 64)))
    assert (found.severity, found.subject) == ("note", "empty margin")
    cropped = prepare_psf(psf, background=None)[0].shape
    assert " x ".join(map(str, cropped)) in found.measured
    saved = 1 - np.prod([63 + n for n in cropped]) / 104**3
    assert f"saves {saved:.0%}" in found.fix


def test_even_sizes_are_a_note_that_names_the_centre():
    psf = pad_or_crop(clean(), (22, 14, 13))
    found = only(diagnose(psf))
    assert (found.severity, found.subject) == ("note", "even size")
    assert found.measured == "22 x 14 x 13, centre at voxel 11, 7, 6"


def test_integers_are_a_note():
    found = only(diagnose(np.round(clean()).astype(np.uint16)))
    assert (found.severity, found.subject) == ("note", "integers")
    assert found.measured == "uint16, largest value 1000"


@pytest.mark.parametrize(("at", "height"), [((20, 16, 31), 0.4), ((20, 16, 22), 0.9)])
def test_neighbouring_bead_is_a_second_maximum(at, height):
    shape = (41, 33, 41)
    psf = sampled(shape, (2.5, 1.5, 1.5), (20, 16, 20)) + height * sampled(shape, (2.0, 1.2, 1.2), at)
    findings = diagnose(psf)
    if at[2] == 22:  # merged into one: no valley, but the centroid moves
        assert "second maximum" not in {f.subject for f in findings}
        return
    found = next(f for f in findings if f.subject == "second maximum")
    assert found.severity == "warning"
    assert found.measured == f"{height:.0%} of the peak at voxel 20, 16, 31"
    assert {f.subject for f in findings} == {"second maximum", "empty margin"}
    # A cut at 1 % of the peak also takes the dim part of the lone bead, 3.03 standard deviations away.
    lone = keep_largest_component(psf, 0.01)
    assert diagnose(pad_or_crop(lone, (21, 13, 13))) == []


def test_hot_pixel_is_a_second_maximum():
    psf = clean()
    psf[10, 6, 11] += 300
    assert only(diagnose(psf)).subject == "second maximum"


def test_rings_and_photon_noise_are_no_second_maximum():
    axis = np.arange(-20, 21)
    r = np.hypot(*np.meshgrid(axis, axis)) / 2.0
    ring = np.exp(-0.5 * r**2) + 0.05 * np.exp(-0.5 * ((r - 5) / 0.6) ** 2)
    noisy = np.random.default_rng(2).poisson(150 * ring)
    assert "second maximum" not in {f.subject for f in diagnose(ring) + diagnose(noisy)}


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_plateau_at_the_peak_is_saturation(dtype):
    psf = np.minimum(clean(), 700).astype(dtype)
    found = next(f for f in diagnose(psf) if f.subject == "saturation")
    assert found.severity == "warning"
    assert f"{(psf == 700).sum()} voxels" in found.measured
    assert {f.subject for f in diagnose(psf)} <= {"saturation", "integers"}


def test_two_voxels_at_the_cameras_largest_value_are_saturation():
    psf = np.round(clean()).astype(np.uint16)
    psf[10, 6, 6:8] = 4095
    assert "saturation" in {f.subject for f in diagnose(psf)}
    psf[10, 6, 6:8] = 4000
    assert "saturation" not in {f.subject for f in diagnose(psf)}


@pytest.mark.parametrize("shape", list(itertools.product((20, 21), repeat=2)))
def test_symmetric_even_psf_is_not_called_saturated(shape):
    psf = sampled(shape, (2.0, 2.0), [(n - 1) / 2 for n in shape])
    assert "saturation" not in {f.subject for f in diagnose(psf)}


def test_psf_longer_than_the_image_is_a_warning():
    found = only(diagnose(clean(), image_shape=(16, 64, 64)))
    assert (found.severity, found.subject) == ("warning", "size")
    assert found.limit == "the image's 16 x 64 x 64"


def test_axis_order_is_doubted_where_z_is_the_narrowest():
    psf = np.moveaxis(clean(), 0, 2)
    found = only(diagnose(psf, psf_voxel_size=(0.1, 0.1, 0.1)))
    assert (found.severity, found.subject) == ("warning", "axis order")
    assert "along z" in found.measured


def test_axis_order_is_judged_in_micrometres():
    # Half as wide as y and x in voxels, yet twice as wide in micrometres.
    assert diagnose(gaussian((1.0, 2.0, 2.0)), psf_voxel_size=(0.4, 0.1, 0.1)) == []


def test_image_with_full_voxels_and_an_offset_is_reported():
    sample = np.random.default_rng(1).poisson(100, (16, 16, 16)).astype(np.uint8)
    assert only(diagnose(clean(), image_sample=sample)).subject == "image background"
    sample[0, 0, :10] = 255
    warning, note = diagnose(clean(), image_sample=sample)
    assert (warning.severity, warning.subject) == ("warning", "image saturation")
    assert (note.severity, note.subject) == ("note", "image background")
    dark = np.zeros((8, 8), np.float32)
    dark[0, 0] = 5
    assert diagnose(clean(), image_sample=dark) == []


def test_findings_come_gravest_first_and_read_as_sentences():
    psf = np.maximum(pad_or_crop(clean(), (60, 50, 50)), 1)
    psf[0, 0, 0] = -1
    severities = [f.severity for f in diagnose(psf, image_voxel_size=SIZE)]
    assert severities == sorted(severities, key=("error", "warning", "note").index)
    assert set(severities) == {"error", "warning", "note"}
    found = diagnose(psf)[0]
    assert str(found) == (
        "negative values: 1 values, least -1 (limit: none); subtract_background(psf) clips at 0"
    )


def test_one_plane_and_tiny_arrays_are_looked_at_without_failing():
    for shape in [(1, 1), (1, 1, 1), (2, 2, 2), (1, 5, 5), (3, 1)]:
        diagnose(np.ones(shape), psf_voxel_size=(0.1,) * len(shape), image_shape=(9,) * len(shape))


def test_voxel_size_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match="`psf_voxel_size` must have one positive length"):
        diagnose(clean(), psf_voxel_size=(0.1, 0.1))


def test_description_gives_widths_in_voxels_and_micrometres():
    lines = describe(clean(), SIZE).splitlines()
    fwhm = 2 * np.sqrt(2 * np.log(2)) * np.array(SIGMA)
    voxels = [float(v) for v in lines[1].split("FWHM")[1].split(" voxels")[0].split(",")]
    lengths = [float(v) for v in lines[1].split("(z, y, x),")[1].removesuffix(" um").split(",")]
    # Half maxima are interpolated linearly between samples.
    np.testing.assert_allclose(voxels, fwhm, rtol=0.02)
    np.testing.assert_allclose(lengths, fwhm * SIZE, rtol=0.02)
    assert lines[0] == "shape      21 x 13 x 13, float32, voxel size 0.2, 0.1, 0.1 um"
    assert "um" not in describe(clean())


def test_blurred_bead_after_preparation_is_clean():
    rng = np.random.default_rng(11)
    bead = sampled((45, 39, 37), SIGMA, (20.3, 21.6, 17.2))
    image = rng.poisson(ndimage.gaussian_filter(bead, 0.3) * 3000 + 100).astype(np.uint16)
    assert {"background", "centre"} <= {f.subject for f in diagnose(image)}
    psf, steps = prepare_psf(image, component=0.02)
    assert diagnose(psf) == []
    assert len(steps) == 5


# --- commands


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Run ``chunkrestore psf ...`` in an empty folder; returns its status and output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        from chunkrestore.cli_psf import psf

        status = psf.main([str(a) for a in arguments], prog_name="psf", standalone_mode=False)
        return int(status or 0), capsys.readouterr().out

    return run


def write_image_file(size=SIZE, shape=(32, 40, 40)):
    from chunkrestore.ome_zarr import write_image

    values = np.random.default_rng(0).poisson(3, shape).astype(np.uint16)
    values[shape[0] // 2, :, ::4] = 300
    write_image(values, "image.ome.zarr", axes="zyx", voxel_size=size)


def test_check_of_a_good_psf_says_so_and_exits_0(command):
    write_psf("psf.tif", clean(), SIZE)
    write_image_file()
    status, out = command("check", "psf.tif", "image.ome.zarr")
    assert status == 0
    assert out.splitlines()[0] == "psf        psf.tif"
    assert out.splitlines()[1] == "image      image.ome.zarr: 32 x 40 x 40, voxel size 0.2, 0.1, 0.1 um"
    assert "FWHM" in out
    assert out.endswith("ok         nothing is wrong\n")


def test_check_prints_warnings_and_exits_0(command):
    write_psf("psf.tif", clean() + 50, SIZE)
    status, out = command("check", "psf.tif")
    assert status == 0
    assert "\nwarning    background: corners at 50" in out


def test_check_prints_errors_and_exits_2(command):
    write_psf("psf.tif", clean(), SIZE)
    write_image_file(size=(0.5, 0.1, 0.1))
    status, out = command("check", "psf.tif", "image.ome.zarr")
    assert status == 2
    assert (
        "\nerror      voxel size: 0.2, 0.1, 0.1 um (limit: within 5% of the image's 0.5, 0.1, 0.1 um)" in out
    )
    assert command("check", "psf.tif", "image.ome.zarr", "--voxel-size", "0.5,0.1,0.1")[0] == 0


def test_check_of_an_unusable_psf_still_says_why(command):
    np.save("psf.npy", np.full((5, 5, 5), np.nan))
    status, out = command("check", "psf.npy")
    assert status == 2
    assert "error      NaN: 125 values are NaN or infinite" in out


def test_prepare_makes_a_psf_that_check_finds_nothing_wrong_with(command):
    raw = sampled((51, 31, 33), (5, 1.5, 1.5), (23.3, 16.2, 14.7)) * 1000 + 100
    write_psf("raw.tif", raw, (0.1, 0.1, 0.1))
    write_image_file()
    status, out = command("prepare", "raw.tif", "psf.tif", "image.ome.zarr")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("background subtracted 100 (median of the faces)")
    assert any(
        line.startswith("voxel size resampled from 0.1, 0.1, 0.1 to 0.2, 0.1, 0.1 um") for line in lines
    )
    assert lines[-1] == "wrote      psf.tif"
    assert read_psf_voxel_size("psf.tif") == pytest.approx(SIZE, rel=1e-6)
    assert "nothing is wrong" in command("check", "psf.tif", "image.ome.zarr")[1]


def test_prepare_refuses_to_replace_and_to_guess(command):
    write_psf("raw.npy", clean())
    write_image_file()
    with pytest.raises(ValueError, match="give it by --voxel-size"):
        command("prepare", "raw.npy", "psf.tif", "image.ome.zarr")
    with pytest.raises(ValueError, match="`--background` must be a number, edge or none"):
        command("prepare", "raw.npy", "psf.tif", "--background", "corner")
    command("prepare", "raw.npy", "psf.npy", "--background", "none", "--component", "0.001")
    with pytest.raises(FileExistsError, match=r"psf\.npy exists"):
        command("prepare", "raw.npy", "psf.npy")
    assert command("prepare", "raw.npy", "psf.npy", "--background", "2", "--overwrite")[0] == 0

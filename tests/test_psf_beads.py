"""Point spread functions from simulated images of beads whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from chunkrestore.psf import (
    average_beads,
    distill_psf,
    draw_bead_report,
    effective_sigma,
    find_beads,
    read_psf,
    read_psf_voxel_size,
)
from chunkrestore.psf.average import trimmed_mean
from chunkrestore.psf.bead_size import frequencies, sphere_otf
from chunkrestore.psf.beads import BORDER, BRIGHT, DIM, NEIGHBOUR, SATURATED, UNLIKE, WIDE, clipped_mean
from chunkrestore.psf.sampling import offset

VOXEL_SIZE = (0.2, 0.1, 0.1)
BACKGROUND = 20.0
SHAPE = (41, 134, 134)
METHODS = {"average": average_beads, "distill": distill_psf}
REAL = Path(__file__).parents[2] / "shared/data/beads_confocal_41x150x150.tif"


def profile(z, y, x, tilt=0.3):
    """A core that is tilted in z and x, with a skirt on one side of every axis; no axis is symmetric."""
    core = np.exp(-0.5 * ((z / 2.4) ** 2 + (y / 1.5) ** 2 + ((x - tilt * z) / 1.3) ** 2))
    skirt = np.exp(-0.5 * (((z - 2) / 3.2) ** 2 + ((y + 1.2) / 2.4) ** 2 + ((x - 1) / 2.2) ** 2))
    return core + 0.15 * skirt


def sampled(shape, shift=(0.0, 0.0, 0.0)):
    grid = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    image = profile(*(u + s for u, s in zip(grid, shift, strict=True)))
    return image / image.sum()


def true_psf(shape):
    """The profile with its peak on the centre, as the package defines it."""
    shift = np.zeros(3)
    for _ in range(3):
        shift += offset(sampled(shape, shift))
    return sampled(shape, shift), shift


def add_bead(image, position, peak, diameter_um=0.0, **kwargs):
    nearest, reach = np.rint(position).astype(int), np.array((14, 11, 11))
    low, high = np.maximum(nearest - reach, 0), np.minimum(nearest + reach + 1, image.shape)
    grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    inside = np.zeros((1, 3))
    if diameter_um:
        # 123 points of a ball, each with its mirror image: its transform to 1 % below the first zero.
        cube = np.stack(np.meshgrid(*[np.linspace(-1, 1, 7)] * 3, indexing="ij"), -1).reshape(-1, 3)
        ball = cube[(cube**2).sum(axis=1) <= 1.0]
        ball = ball / np.sqrt(5 * (ball**2).mean())
        inside = ball * diameter_um / 2 / np.array(VOXEL_SIZE)
    region = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    for q in inside:
        region += (
            peak
            / len(inside)
            * profile(*(u - p - d for u, p, d in zip(grid, position, q, strict=True)), **kwargs)
        )


def grid_of_positions(seed, step=25):
    centres = np.arange(17, SHAPE[1] - 10, step)
    places = np.stack(np.meshgrid([20.0], centres, centres, indexing="ij"), -1).reshape(-1, 3)
    return places + np.random.default_rng(seed).uniform(-1.5, 1.5, places.shape)


def photographed(image, seed=0, full_well=65535):
    return np.minimum(np.random.default_rng(seed).poisson(image), full_well).astype(np.uint16)


@pytest.fixture(scope="module")
def field():
    """25 beads of about 600 photons at the peak, and where they are."""
    positions = grid_of_positions(1)
    peaks = np.random.default_rng(2).uniform(480, 720, len(positions))
    image = np.full(SHAPE, BACKGROUND)
    for position, peak in zip(positions, peaks, strict=True):
        add_bead(image, position, peak)
    return photographed(image), positions


@pytest.fixture(scope="module")
def corner(field):
    """Nine beads of the field, and the voxels between them and the next ones."""
    return field[0][:, :80, :80]


@pytest.fixture(scope="module", params=METHODS)
def measured(request, field):
    image, _ = field
    return METHODS[request.param](image, find_beads(image, voxel_size=VOXEL_SIZE))


def noise_limit(shape, n_beads, peak):
    """Relative rms error of the mean of `n_beads` images under photon noise: sum(A h + b) / (n A^2 sum h^2)."""
    h = sampled(shape)
    h = h / h.max()
    return np.sqrt((peak * h + BACKGROUND).sum() / (n_beads * peak**2 * (h**2).sum()))


def test_psf_is_recovered_to_the_photon_noise_of_all_beads(measured):
    psf = measured.psf
    truth, _ = true_psf(psf.shape)
    assert (psf.dtype, psf.sum(dtype=np.float64)) == (np.float32, pytest.approx(1, abs=1e-6))
    assert measured.n_beads == 25
    error = np.sqrt(((psf - truth) ** 2).sum() / (truth**2).sum())
    # Trimming and noise cut away act in opposite directions; the limit also counts noise outside the support.
    assert error < noise_limit(psf.shape, 25, 600)
    assert np.corrcoef(psf.reshape(-1), truth.reshape(-1))[0, 1] > 1 - noise_limit(psf.shape, 25, 600) ** 2


def test_psf_is_centred(measured):
    truth, _ = true_psf(measured.psf.shape)
    # Where it correlates best with the truth, by finite differences of the truth.
    slopes = np.array([(np.roll(truth, -1, a) - np.roll(truth, 1, a)).reshape(-1) / 2 for a in range(3)])
    shift = np.linalg.lstsq(slopes.T, (truth - measured.psf).reshape(-1), rcond=None)[0]
    assert np.abs(shift).max() < 0.05


def test_psf_is_not_mirrored_on_any_axis(measured):
    truth, _ = true_psf(measured.psf.shape)
    right = ((measured.psf - truth) ** 2).sum()
    for axis in range(3):
        assert ((measured.psf - np.flip(truth, axis)) ** 2).sum() > 4 * right


def test_positions_are_those_of_the_beads(measured, field):
    _, shift = true_psf(measured.psf.shape)
    # The peak of the profile lies `shift` away from the bead; only differences between beads are seen, the
    # rest is a matter of definition.
    nearest = [
        np.abs(field[1] + shift - p).sum(axis=1).argmin()
        for p in measured.beads.positions[measured.beads.used]
    ]
    error = measured.beads.positions[measured.beads.used] - field[1][nearest] - shift
    assert sorted(nearest) == list(range(25))
    # Cramer and Rao: about sigma / sqrt(photons) = 2.1 / sqrt(15000) voxels in z.
    assert error.std(axis=0).max() < 0.04
    assert np.abs(error.mean(axis=0)).max() < 0.05


def spoiled():
    """A field with each kind of bad bead, at known places."""
    positions = grid_of_positions(3)
    image = np.full(SHAPE, BACKGROUND)
    bad = {6: SATURATED, 8: DIM, 12: NEIGHBOUR, 16: WIDE, 18: BRIGHT, 22: UNLIKE}
    for i, position in enumerate(positions):
        if i == 22:
            add_bead(image, position, 600, tilt=-0.3)  # the same widths along the axes, leaning the other way
        else:
            add_bead(image, position, {6: 2000, 8: 14, 18: 1300}.get(i, 600))
    add_bead(image, positions[12] + np.array((0, 5, 5)), 600)
    add_bead(image, positions[16] + np.array((0, 2.5, 0)), 300)
    border = np.array([(20.0, 3.0, 54.5), (4.0, 29.5, 104.5)])
    for position in border:
        add_bead(image, position, 600)
    return photographed(image, 4, full_well=1700), positions, bad, border


def reason_at(beads, position):
    return beads.reasons[np.abs(beads.positions - position).sum(axis=1).argmin()]


def test_each_kind_of_bad_bead_is_rejected_with_its_reason():
    image, positions, bad, border = spoiled()
    found = find_beads(image, saturation=1700)
    averaged = average_beads(image, found)
    for i, position in enumerate(positions):
        assert reason_at(averaged.beads, position) == bad.get(i, ""), i
    assert [reason_at(found, position) for position in border] == [BORDER, BORDER]
    assert found.reasons.count(NEIGHBOUR) == 2
    assert f"{averaged.n_beads} used" in str(averaged.beads)
    assert averaged.n_beads == 25 - len(bad)


def test_bad_beads_do_not_change_the_psf():
    image, *_ = spoiled()
    psf = average_beads(image, find_beads(image)).psf
    truth, _ = true_psf(psf.shape)
    error = np.sqrt(((psf - truth) ** 2).sum() / (truth**2).sum())
    assert error < noise_limit(psf.shape, 19, 600)


def test_saturation_is_seen_without_being_told():
    image, positions, *_ = spoiled()
    assert reason_at(find_beads(image), positions[6]) == SATURATED
    eight_bit = np.minimum(image // 4, 255).astype(np.uint8)
    assert reason_at(find_beads(eight_bit), positions[6]) == SATURATED


def test_distillation_uses_neighbours_that_the_average_must_leave_out():
    positions = grid_of_positions(5, step=32)[:9]
    image = np.full(SHAPE, BACKGROUND)
    for position in positions:
        add_bead(image, position, 600)
        add_bead(image, position + np.array((0, 6, 5)), 500)
    photo = photographed(image, 6)
    found = find_beads(photo)
    assert set(found.reasons) - {DIM} == {NEIGHBOUR}
    with pytest.raises(ValueError, match="another bead too near"):
        average_beads(photo, found)
    psf = distill_psf(photo, found)
    truth, _ = true_psf(psf.psf.shape)
    error = np.sqrt(((psf.psf - truth) ** 2).sum() / (truth**2).sum())
    assert psf.n_beads == 2 * len(positions)
    assert error < noise_limit(psf.psf.shape, psf.n_beads, 550)


@pytest.mark.parametrize("method", METHODS.values())
def test_bead_size_is_taken_out_of_the_widths(method):
    image = np.full(SHAPE, BACKGROUND)
    for position in grid_of_positions(7)[::3]:
        add_bead(image, position, 3000, diameter_um=0.3)
    photo = photographed(image, 8)
    beads = find_beads(photo, voxel_size=VOXEL_SIZE)
    uncorrected = average_beads(photo, beads).psf
    wide = np.array(effective_sigma(uncorrected))
    corrected = np.array(effective_sigma(method(photo, beads, bead_diameter_um=0.3).psf))
    truth = np.array(effective_sigma(true_psf(uncorrected.shape)[0]))
    assert (wide[1:] > 1.08 * truth[1:]).all()
    # The widths of the photographed beads are known to 1 %, and the ball makes a tenth of them.
    np.testing.assert_allclose(corrected, truth, rtol=0.03)


def test_sphere_transform_is_that_of_a_ball_of_points():
    rng = np.random.default_rng(9)
    points = rng.uniform(-0.5, 0.5, (200_000, 3))
    points = points[(points**2).sum(axis=1) < 0.25] * 0.4
    waves = frequencies((5, 5, 5))
    expected = sphere_otf(0.4, waves, VOXEL_SIZE)
    for index in [(0, 0, 0), (1, 0, 0), (0, 1, 2), (2, 1, 1)]:
        k = [waves[a].reshape(-1)[index[a]] / VOXEL_SIZE[a] for a in range(3)]
        # 1e5 points: standard error at most 1 / sqrt(2e5).
        assert expected[index] == pytest.approx(np.cos(2 * np.pi * points @ k).mean(), abs=4 / np.sqrt(2e5))


def test_two_dimensional_beads():
    rng = np.random.default_rng(10)
    image = np.full((160, 160), 50.0)
    yy, xx = np.mgrid[:160, :160]
    for y in range(20, 150, 24):
        for x in range(20, 150, 24):
            dy, dx = rng.uniform(-1, 1, 2)
            image += 800 * np.exp(-0.5 * (((yy - y - dy) / 2) ** 2 + ((xx - x - dx) / 1.5) ** 2))
    photo = rng.poisson(image)
    for method in METHODS.values():
        result = method(photo, find_beads(photo))
        assert result.n_beads == 36
        np.testing.assert_allclose(effective_sigma(result.psf), (2, 1.5), rtol=0.02)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda i: i * np.nan, ValueError, "`image` holds .* NaN"),
        (lambda i: i[0, 0], ValueError, "`image` must have 2 or 3 axes"),
        (lambda i: i[:2], ValueError, "single plane"),
        (lambda i: i.astype(complex), TypeError, "`image` must be an array of real numbers"),
        (lambda i: np.zeros_like(i), ValueError, "no bead"),
        (lambda i: np.random.default_rng(0).poisson(20, i.shape), ValueError, "no bead"),
    ],
)
def test_bad_images_are_named(field, spoil, error, message):
    with pytest.raises(error, match=message):
        find_beads(spoil(field[0].astype(np.float32)))


def test_bad_parameters_are_named(corner):
    image = corner
    with pytest.raises(ValueError, match="`voxel_size`"):
        find_beads(image, voxel_size=(0.2, 0.1))
    with pytest.raises(ValueError, match=r"`psf_shape`.*odd"):
        find_beads(image, psf_shape=(20, 17, 17))
    with pytest.raises(ValueError, match=r"`psf_shape`.*larger"):
        find_beads(image, psf_shape=(43, 17, 17))
    found = find_beads(image, voxel_size=VOXEL_SIZE)
    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"`bead_diameter_um` 0\.9 cannot be corrected"):
            method(image, found, bead_diameter_um=0.9)
        with pytest.raises(ValueError, match=r"`bead_diameter_um`.*above 0"):
            method(image, found, bead_diameter_um=-1)
        with pytest.raises(ValueError, match="needs a voxel size"):
            method(image, find_beads(image), bead_diameter_um=0.1)
        with pytest.raises(ValueError, match="not the one"):
            method(image[0], found)
    with pytest.raises(ValueError, match=r"none that can be used.*too dim"):
        average_beads(image, find_beads(image, min_snr=1e6))


def test_clipped_mean_ignores_beads_and_is_not_quantised():
    values = np.random.default_rng(11).poisson(1.3, 100_000)
    spotted = values.copy()
    spotted[:1000] = 500
    mean, spread = clipped_mean(spotted)
    # Clipping at 3 deviations takes the 0.3 % of a Poisson distribution at 5 and more, 0.016 of its mean.
    assert mean == pytest.approx(values[values < 5].mean(), abs=0.02)
    assert spread == pytest.approx(values[values < 5].std(), rel=0.02)


def test_trimmed_mean_leaves_out_a_tenth_at_each_end_and_nan():
    values = np.arange(1.0, 13.0).reshape(-1, 1)
    values[11] = 1e9
    assert trimmed_mean(values)[0] == np.arange(2, 12).mean()
    values[11] = np.nan
    assert trimmed_mean(values)[0] == np.arange(2, 11).mean()
    assert trimmed_mean(np.full((3, 1), np.nan))[0] == 0


def run_cli(*arguments):
    from chunkrestore.cli_psf import psf

    return CliRunner().invoke(psf, ["beads", *map(str, arguments)], catch_exceptions=False)


def test_command_writes_psf_and_picture_and_says_what_it_did(tmp_path, corner):
    source, output, picture = (tmp_path / name for name in ("beads.tif", "psf.tif", "report.png"))
    tifffile.imwrite(source, corner)
    with pytest.raises(ValueError, match="--voxel-size"):
        run_cli(source, output)
    said = run_cli(
        source, output, "--voxel-size", "0.2,0.1,0.1", "--method", "average", "--report", picture
    ).output
    assert "9 used" in said
    assert "FWHM       z 0.9" in said or "FWHM       z 1.0" in said
    psf = read_psf(output, 3)
    assert psf.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert read_psf_voxel_size(output) == pytest.approx(VOXEL_SIZE, rel=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_cli(source, output, "--voxel-size", "0.2,0.1,0.1")


def test_picture_needs_its_folder(tmp_path, corner):
    result = average_beads(corner, find_beads(corner))
    with pytest.raises(ValueError, match="does not exist"):
        draw_bead_report(corner, result, tmp_path / "missing" / "report.png")
    assert not (tmp_path / "missing").exists()


@pytest.mark.skipif(not REAL.is_file(), reason="the shared image of beads is not here")
def test_real_beads(tmp_path):
    output = tmp_path / "psf.tif"
    said = run_cli(REAL, output, "--method", "average").output
    assert "4 found, 4 used" in said
    z, y, x = read_psf_voxel_size(output)
    widths = np.array(effective_sigma(read_psf(output))) * 2.355 * (z, y, x)
    # Read off the single beads by eye: 4.3 to 4.6, 10 and 7.4 voxels.
    np.testing.assert_allclose(widths, (0.55, 0.23, 0.165), rtol=0.1)

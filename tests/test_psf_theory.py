import dataclasses
import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import integrate, special

from chunkrestore.cli_psf import psf as cli
from chunkrestore.psf import (
    LightSheet,
    Optics,
    acquisition,
    confocal,
    light_sheet,
    light_sheet_field,
    read_psf,
    read_psf_voxel_size,
    widefield,
)
from chunkrestore.psf import diffraction as d
from chunkrestore.psf.radial import LIGHT, SHARP_RADIUS, render
from chunkrestore.psf.theory import detection, fwhm_um

AIR = Optics(numerical_aperture=0.3, emission_um=0.52, immersion_index=1.0)
WATER = Optics(
    numerical_aperture=0.8, emission_um=0.52, immersion_index=1.333, excitation_um=0.488, pinhole_airy=1.0
)
OIL = Optics(numerical_aperture=1.4, emission_um=0.52, immersion_index=1.515)
DEEP = Optics(
    numerical_aperture=1.2, emission_um=0.52, immersion_index=1.515, sample_index=1.33, depth_um=5.0
)
"""Oil objective focused 5 um into water."""


def axis_of(psf):
    return psf[:, psf.shape[1] // 2, psf.shape[2] // 2].astype(float)


# --- against theory in closed form -------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["scalar", "vectorial"])
def test_lateral_width_at_low_aperture_is_that_of_the_airy_pattern(model):
    size = (1.0, 0.05, 0.05)
    psf = widefield(AIR, size, (1, 81, 81), model=model)
    _, y, x = fwhm_um(psf, size)
    # (2 J1(v) / v)^2 = 1/2 at v = 1.6163, so the width is 0.5145 wavelength / NA. At NA 0.3 the vectorial
    # pattern is wider by about (NA / n)^2 / 8 = 1 %; voxels of 0.05 um add (0.05 / 0.38)^2 / 12 / 2 < 0.1 %.
    assert x == pytest.approx(0.5145 * 0.52 / 0.3, rel=0.012)
    assert y == x


@pytest.mark.parametrize("model", ["scalar", "vectorial"])
def test_axial_width_at_low_aperture_is_the_paraxial_one(model):
    size = (0.4, 0.2, 0.2)
    psf = widefield(AIR, size, (101, 5, 5), model=model)
    # sinc^2 falls to half at 0.886 of its first zero; next order is (NA / n)^2 = 9 %, of which the exact
    # n - sqrt(n^2 - NA^2) takes all but a tenth. Linear interpolation and the voxel add 0.1 %.
    expected = 0.886 * 0.52 / (1 - math.sqrt(1 - 0.3**2))
    assert fwhm_um(psf, size)[0] == pytest.approx(expected, rel=0.01)


def test_scalar_integral_equals_adaptive_quadrature_of_gibson_and_lanni():
    k = 2 * math.pi / 0.52
    layers = ((5.0, 1.33), (165.0, 1.52), (-170.0, 1.515), (-150.0, 1.50))
    optics = dataclasses.replace(
        DEEP, coverslip_um=165.0, coverslip_index=1.52, coverslip_design_um=170.0,
        coverslip_design_index=1.515, immersion_design_index=1.50, working_distance_um=150.0,
    )  # fmt: skip

    def path(rho, z):
        s = 1.2 * rho
        # The immersion layer as Aguet et al. write it, before any term is cancelled.
        immersion = -z + 1.515 * (-5.0 / 1.33 - 165.0 / 1.52 + 170.0 / 1.515 + 150.0 / 1.50)
        return sum(t * math.sqrt(n**2 - s**2) for t, n in layers) + immersion * math.sqrt(1.515**2 - s**2)

    def intensity(z, r):
        def part(wave):
            radial = lambda q: wave(k * path(q, z)) * special.j0(k * 1.2 * r * q) * q  # noqa: E731
            return integrate.quad(radial, 0, 1, limit=800)[0]

        return part(math.cos) ** 2 + part(math.sin) ** 2

    z, r = np.array([-1.0, 0.0, 2.5]), np.array([0.0, 0.2, 0.7])
    expected = np.array([[intensity(a, b) for b in r] for a in z])
    found = d.radial_intensity(optics, 0.52, z, r, vectorial=False)
    # quad is right to 1e-8; the prefactor is s ds = NA^2 rho d(rho).
    np.testing.assert_allclose(found, 1.2**4 * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optics", [WATER, OIL, DEEP, dataclasses.replace(DEEP, numerical_aperture=1.4)])
@pytest.mark.parametrize("vectorial", [False, True])
def test_quadrature_is_converged(optics, vectorial, monkeypatch):
    z, r = np.linspace(-3, 3, 7), np.linspace(0, 4, 9)
    found = d.radial_intensity(optics, 0.52, z, r, vectorial=vectorial)
    monkeypatch.setattr(d, "_SPARE_NODES", 800)
    finer = d.radial_intensity(optics, 0.52, z, r, vectorial=vectorial)
    # Beyond the critical angle a square root limits the convergence.
    limit = 1e-10 if optics.numerical_aperture < optics.sample_index else 1e-4
    assert np.abs(found - finer).max() < limit * finer.max()


# psfmodels 0.3.3 (GPL, F. Aguet's code), scalar_psf and vectorial_psf for DEEP: nx=21, dxy=0.02, ng=ng0=1.515,
# planes z - pz = Z_REFERENCE, radii 0, 0.1, 0.2 um, normalised to the brightest. It averages over its pixels,
# which changes the numbers by up to 1.1e-3.
Z_REFERENCE = np.array([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])
REFERENCE = {
    False: [
        [0.0270, 0.0305, 0.0355],
        [0.1468, 0.1177, 0.0653],
        [0.3696, 0.2862, 0.1291],
        [0.7042, 0.4716, 0.1253],
        [1.0000, 0.6055, 0.0915],
        [0.4970, 0.2531, 0.0652],
        [0.0976, 0.0479, 0.0079],
    ],
    True: [
        [0.0255, 0.0298, 0.0357],
        [0.1451, 0.1179, 0.0683],
        [0.3580, 0.2857, 0.1432],
        [0.6945, 0.4890, 0.1614],
        [1.0000, 0.6502, 0.1520],
        [0.5055, 0.3082, 0.1211],
        [0.1015, 0.0609, 0.0165],
    ],
}


@pytest.mark.parametrize("vectorial", [False, True])
def test_aberrated_intensity_equals_that_of_psfmodels(vectorial):
    found = d.radial_intensity(DEEP, 0.52, Z_REFERENCE, np.array([0.0, 0.1, 0.2]), vectorial=vectorial)
    np.testing.assert_allclose(found / found.max(), REFERENCE[vectorial], atol=1.3e-3)


@pytest.mark.parametrize("vectorial", [False, True])
@pytest.mark.parametrize("optics", [WATER, OIL, DEEP])
def test_light_of_a_plane_is_what_parseval_says(optics, vectorial):
    r = 0.005 * np.arange(4_000)
    light = (
        2
        * math.pi
        * (r * d.radial_intensity(optics, 0.52, np.zeros(1), r, vectorial=vectorial)[0]).sum()
        * 0.005
    )
    energy = d.plane_energy(optics, 0.52, vectorial=vectorial)
    # What lies beyond 20 um: 2 / (pi k NA r) of an Airy pattern is 0.3 %, more behind an aberrating layer.
    assert 0.985 * energy < light < 1.0001 * energy


# --- scalar and vectorial ----------------------------------------------------------------------------------


def test_scalar_and_vectorial_agree_at_low_aperture():
    size, shape = (2.0, 0.3, 0.3), (15, 31, 31)
    optics = dataclasses.replace(AIR, numerical_aperture=0.15)
    scalar, vectorial = (widefield(optics, size, shape, model=m) for m in ("scalar", "vectorial"))
    # The integrals differ by the order of (NA / n)^2 / 4 = 0.6 % of the peak.
    assert np.abs(scalar - vectorial).max() < 0.006 * scalar.max()


def test_vectorial_is_wider_across_the_axis_at_high_aperture():
    size, shape = (0.1, 0.03, 0.03), (21, 41, 41)
    scalar, vectorial = (fwhm_um(widefield(OIL, size, shape, model=m), size) for m in ("scalar", "vectorial"))
    assert vectorial[1] > 1.05 * scalar[1]


# --- arrays ------------------------------------------------------------------------------------------------

MAKERS = {
    "scalar": lambda size, shape: widefield(WATER, size, shape, model="scalar"),
    "vectorial": lambda size, shape: widefield(WATER, size, shape),
    "confocal": lambda size, shape: confocal(WATER, size, shape),
    "light sheet": lambda size, shape: light_sheet(WATER, size, LightSheet(waist_um=2.0), shape=shape),
}


@pytest.mark.parametrize("shape", [(9, 21, 21), (8, 20, 15), (1, 21, 21)])
@pytest.mark.parametrize("name", MAKERS)
def test_arrays_are_float32_with_sum_one_and_centred(name, shape):
    psf = MAKERS[name]((0.4, 0.2, 0.2), shape)
    assert psf.dtype == np.float32
    assert psf.shape == shape
    assert psf.min() >= 0
    assert psf.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert np.unravel_index(psf.argmax(), shape) == tuple(n // 2 for n in shape)


@pytest.mark.parametrize("name", MAKERS)
def test_lateral_symmetry(name):
    psf = MAKERS[name]((0.4, 0.2, 0.2), (9, 21, 21))
    # Mirrored voxels share one value; x and y differ by the order of the sums.
    np.testing.assert_array_equal(psf, psf[:, ::-1])
    np.testing.assert_array_equal(psf, psf[:, :, ::-1])
    np.testing.assert_allclose(psf, psf.transpose(0, 2, 1), rtol=1e-5, atol=1e-12)


def test_axial_symmetry_without_aberration():
    psf = widefield(WATER, (0.4, 0.2, 0.2), (9, 21, 21))
    np.testing.assert_allclose(psf, psf[::-1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_default_shape_is_odd_and_holds_the_light_of_each_plane(name):
    size = (0.5, 0.25, 0.25)
    psf = MAKERS[name](size, None)
    assert all(n % 2 for n in psf.shape)
    # The same planes in an array of three times the width hold at most 1 % more light.
    wide = MAKERS[name](size, (psf.shape[0], 3 * psf.shape[1], 3 * psf.shape[2]))
    inner = wide[:, psf.shape[1] : 2 * psf.shape[1], psf.shape[2] : 2 * psf.shape[2]].sum(axis=(1, 2))
    assert (inner >= LIGHT * wide.sum(axis=(1, 2))).all()
    axis = axis_of(psf)
    assert axis[0] < 0.015 * axis.max()


def test_default_shape_in_focus_holds_99_percent_of_all_light():
    size = (0.5, 0.1, 0.1)
    psf = widefield(WATER, size, model="scalar")
    r = 0.1 * (psf.shape[2] // 2 + 0.5)
    # Airy: 1 - J0(v)^2 - J1(v)^2 lies within the radius v / (k NA); the array holds its inscribed circle.
    v = 2 * math.pi / 0.52 * 0.8 * r
    assert 1 - special.j0(v) ** 2 - special.j1(v) ** 2 >= LIGHT


def test_default_shape_under_aberration_is_at_most_that_of_the_sharp_cone():
    radial = detection(DEEP)
    size = (1.0, 0.4, 0.4)
    psf = widefield(DEEP, size)
    limit = SHARP_RADIUS / radial.lateral_cutoff + radial.slope * (psf.shape[0] // 2) * size[0]
    assert psf.shape[1] == psf.shape[2]
    # Rounded up to a whole voxel on either side.
    assert 0.4 * (psf.shape[2] // 2) <= limit + 0.4


def test_voxels_are_averages_of_finer_voxels():
    coarse = widefield(WATER, (0.6, 0.3, 0.3), (5, 7, 7)).astype(float)
    fine = widefield(WATER, (0.2, 0.1, 0.1), (15, 21, 21)).astype(float)
    binned = fine.reshape(5, 3, 7, 3, 7, 3).sum(axis=(1, 3, 5))
    # Linear interpolation along the radius errs by up to 0.12 % of a frequency's amplitude.
    np.testing.assert_allclose(coarse, binned / binned.sum(), atol=5e-4 * coarse.max())


def test_averaging_over_voxels_matters_at_critical_sampling():
    nyquist = 0.52 / (4 * 0.8)
    size = (0.2, nyquist, nyquist)
    psf = widefield(WATER, size, (1, 15, 15))
    points = d.radial_intensity(WATER, 0.52, np.zeros(1), nyquist * np.arange(2))[0]
    centre = psf[0, 7, 7], psf[0, 7, 8]
    # Second order of the average over a voxel, d^2 / 24 per axis, lifts the neighbour against the peak.
    assert centre[1] / centre[0] > 1.03 * points[1] / points[0]


# --- aberration --------------------------------------------------------------------------------------------


def test_mismatched_indices_make_the_psf_asymmetric_in_z():
    size, shape = (0.2, 0.1, 0.1), (31, 15, 15)
    matched = axis_of(widefield(dataclasses.replace(DEEP, sample_index=1.515), size, shape))
    deep = axis_of(widefield(DEEP, size, shape))
    assert np.abs(matched - matched[::-1]).max() < 1e-3 * matched.max()
    assert np.abs(deep - deep[::-1]).max() > 0.1 * deep.max()


def test_aberration_grows_with_depth_and_is_nothing_at_the_coverslip():
    size, shape = (0.2, 0.1, 0.1), (31, 15, 15)
    widths = [
        fwhm_um(widefield(dataclasses.replace(DEEP, depth_um=x), size, shape, model="scalar"), size)[0]
        for x in (0.0, 5.0, 15.0)
    ]
    assert widths == sorted(widths)
    matched = fwhm_um(
        widefield(dataclasses.replace(DEEP, sample_index=1.515), size, shape, model="scalar"), size
    )[0]
    assert widths[0] == pytest.approx(matched, rel=1e-6)


def test_wrong_coverslip_aberrates_and_design_values_cancel():
    size, shape = (0.2, 0.1, 0.1), (31, 15, 15)
    dry = Optics(numerical_aperture=0.8, emission_um=0.52, immersion_index=1.0)
    bare = dataclasses.replace(dry, coverslip_um=0.0, coverslip_design_um=0.0)
    thick = dataclasses.replace(dry, coverslip_um=200.0, coverslip_design_um=170.0)
    scalar = [axis_of(widefield(o, size, shape, model="scalar")) for o in (dry, bare, thick)]
    np.testing.assert_allclose(scalar[0], scalar[1], rtol=1e-5)
    assert np.abs(scalar[2] - scalar[2][::-1]).max() > 0.1 * scalar[2].max()


# --- confocal ----------------------------------------------------------------------------------------------


def test_small_pinhole_approaches_the_product_of_excitation_and_emission():
    size, shape = (0.3, 0.1, 0.1), (11, 15, 15)
    small = confocal(dataclasses.replace(WATER, pinhole_airy=0.01), size, shape)
    emitted = detection(WATER)
    product = dataclasses.replace(
        emitted,
        intensity=lambda z, r: d.radial_intensity(WATER, 0.488, z, r) * d.radial_intensity(WATER, 0.52, z, r),
        lateral_cutoff=2 * emitted.lateral_cutoff,
        axial_cutoff=2 * emitted.axial_cutoff,
    )
    np.testing.assert_allclose(small, render(product, size, shape), atol=1e-3 * small.max())


def test_large_pinhole_approaches_the_excitation_alone():
    size, shape = (0.3, 0.1, 0.1), (7, 15, 15)
    open_ = confocal(dataclasses.replace(WATER, pinhole_airy=10.0), size, shape)
    alone = widefield(dataclasses.replace(WATER, emission_um=0.488, excitation_um=None), size, shape)
    # 10 Airy units hold all but 2 / (pi v) = 1.7 % of the light in focus; off axis and out of focus twice that.
    np.testing.assert_allclose(open_, alone, atol=0.035 * alone.max())


def test_closing_the_pinhole_narrows_the_psf():
    size, shape = (0.2, 0.08, 0.08), (21, 15, 15)
    widths = [
        fwhm_um(confocal(dataclasses.replace(WATER, pinhole_airy=p), size, shape), size)
        for p in (0.2, 1.0, 3.0)
    ]
    assert widths[0][0] < widths[1][0] < widths[2][0]
    assert widths[0][2] < widths[1][2] < widths[2][2]


def test_pinhole_in_micrometres_is_projected_back_into_the_sample():
    airy = 1.22 * 0.52 / 0.8
    optics = dataclasses.replace(WATER, pinhole_airy=None, pinhole_um=40 * airy, magnification=40.0)
    assert optics.pinhole_radius_um == pytest.approx(WATER.pinhole_radius_um)


# --- light sheet -------------------------------------------------------------------------------------------


def test_wide_sheet_is_widefield():
    size, shape = (0.4, 0.2, 0.2), (15, 15, 15)
    found = light_sheet(WATER, size, LightSheet(waist_um=1000.0), shape=shape)
    np.testing.assert_allclose(found, widefield(WATER, size, shape), rtol=1e-4, atol=1e-9)


def test_thin_sheet_has_the_axial_width_of_a_product_of_gaussians():
    optics = dataclasses.replace(AIR, excitation_um=0.488)
    size = (0.1, 0.4, 0.4)
    psf = light_sheet(optics, size, LightSheet(waist_um=2.0), shape=(101, 5, 5))
    detected = 0.886 * 0.52 / (1 - math.sqrt(1 - 0.3**2))
    sheet = 2.0 * math.sqrt(2 * math.log(2))
    # Near its middle sinc^2 is a Gaussian; over the sheet (a quarter of its width) they differ by 1 %.
    assert fwhm_um(psf, size)[0] == pytest.approx(1 / math.hypot(1 / detected, 1 / sheet), rel=0.01)


def test_sheet_width_follows_the_gaussian_beam():
    sheet = LightSheet(waist_um=2.0)
    rayleigh = math.pi * 2.0**2 * 1.333 / 0.488
    assert sheet.width_um(0, WATER) == 2.0
    assert sheet.width_um(rayleigh, WATER) == pytest.approx(2.0 * math.sqrt(2))
    assert sheet.width_um(-rayleigh, WATER) == pytest.approx(2.0 * math.sqrt(2))
    by_aperture = LightSheet(numerical_aperture=0.488 / (math.pi * 2.0))
    assert by_aperture.width_um(30, WATER) == pytest.approx(sheet.width_um(30, WATER))
    # Far away the edge of the beam lies at the angle that the aperture states: w / x = NA / n.
    assert by_aperture.width_um(1e6, WATER) / 1e6 == pytest.approx(0.488 / (math.pi * 2.0) / 1.333, rel=1e-6)


def test_sheet_is_thicker_away_from_the_waist():
    size, shape = (0.4, 0.3, 0.3), (21, 9, 9)
    widths = [
        fwhm_um(light_sheet(WATER, size, LightSheet(waist_um=1.0), x_um=x, shape=shape), size)[0]
        for x in (0.0, 10.0, 30.0)
    ]
    assert widths == sorted(widths)
    assert widths[-1] > 1.2 * widths[0]


def test_sheet_beside_the_focus_makes_the_psf_asymmetric():
    psf = axis_of(
        light_sheet(WATER, (0.2, 0.3, 0.3), LightSheet(waist_um=1.0, offset_um=2.0), shape=(31, 5, 5))
    )
    assert np.abs(psf - psf[::-1]).max() > 0.1 * psf.max()


def test_field_samples_a_sheet_so_that_neighbours_differ_little():
    size, volume = (0.5, 0.3, 0.3), (40, 60, 400)
    field = light_sheet_field(
        WATER, size, volume, LightSheet(waist_um=1.5), shape=(41, 5, 5), max_change=0.05
    )
    places = np.array(field.positions)
    assert (places[:, 0] == 19.5).all()
    assert (places[:, 1] == 29.5).all()
    assert places[0, 2] == 0
    assert places[-1, 2] == pytest.approx(399)
    assert (np.diff(places[:, 2]) > 0).all()
    widths = np.array([fwhm_um(psf, size)[0] for psf in field.psfs])
    assert widths.max() > 1.15 * widths.min()
    # Linear interpolation between voxels of 0.5 um moves a width of 1.5 um by up to 1 %.
    assert np.abs(np.diff(np.log(widths))).max() < math.log(1.05) + 0.01
    fewer = light_sheet_field(WATER, size, volume, LightSheet(waist_um=1.5), shape=(41, 5, 5), max_change=0.2)
    assert 2 <= len(fewer.psfs) < len(field.psfs)


def test_field_of_a_sheet_that_does_not_change_is_one_psf():
    field = light_sheet_field(
        WATER, (0.5, 0.3, 0.3), (40, 60, 101), LightSheet(waist_um=1000.0), shape=(21, 5, 5)
    )
    assert field.positions == ((19.5, 29.5, 50.0),)


def test_field_can_have_its_waist_anywhere():
    field = light_sheet_field(
        WATER, (0.5, 0.3, 0.3), (40, 60, 400), LightSheet(waist_um=1.5, focus_x_um=0.0), shape=(41, 5, 5)
    )
    widths = [fwhm_um(psf, (0.5, 0.3, 0.3))[0] for psf in field.psfs]
    assert widths == sorted(widths)


# --- metadata ----------------------------------------------------------------------------------------------

OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
  <Instrument ID="Instrument:0">
    <Objective ID="Objective:0" LensNA="0.5" Immersion="Air"/>
    <Objective ID="Objective:1" LensNA="1.2" Immersion="Water" WorkingDistance="0.28" WorkingDistanceUnit="mm"/>
  </Instrument>
  <Image ID="Image:0">
    <ObjectiveSettings ID="Objective:1" RefractiveIndex="1.338"/>
    <Pixels ID="Pixels:0" PhysicalSizeX="100" PhysicalSizeXUnit="nm" PhysicalSizeY="0.1" PhysicalSizeZ="0.4">
      <Channel ID="Channel:0:0" EmissionWavelength="461.0"/>
      <Channel ID="Channel:0:1" EmissionWavelength="0.52" EmissionWavelengthUnit="µm" ExcitationWavelength="488"
               PinholeSize="60"/>
    </Pixels>
  </Image>
</OME>"""


def test_ome_xml_gives_the_microscope():
    found = acquisition(OME, channel=1)
    assert found.pop("voxel_size") == pytest.approx((0.4, 0.1, 0.1))
    assert found == pytest.approx(
        {
            "numerical_aperture": 1.2,
            "immersion_index": 1.338,
            "working_distance_um": 280.0,
            "emission_um": 0.52,
            "excitation_um": 0.488,
            "pinhole_um": 60.0,
        }
    )
    optics = Optics.from_metadata(OME, channel=1, depth_um=3.0)
    assert (optics.numerical_aperture, optics.emission_um, optics.depth_um) == (1.2, 0.52, 3.0)
    assert optics.pinhole_um is None
    assert Optics.from_metadata(OME, channel=1, magnification=60.0).pinhole_um == 60.0


def test_medium_stands_for_its_index_and_what_is_given_prevails():
    text = OME.replace(' RefractiveIndex="1.338"', "")
    assert Optics.from_metadata(text).immersion_index == 1.333
    assert Optics.from_metadata(text, immersion_index=1.34).immersion_index == 1.34


def test_missing_metadata_is_named():
    text = OME.replace(' EmissionWavelength="461.0"', "").replace('LensNA="1.2" Immersion="Water"', "")
    text = text.replace(' RefractiveIndex="1.338"', "")
    with pytest.raises(
        ValueError, match=r"`numerical_aperture`, `emission_um`, `immersion_index` are neither"
    ):
        Optics.from_metadata(text)


def test_omero_channels_may_state_wavelengths():
    channel = {"label": "GFP", "emission_wavelength": 520, "excitation_wavelength": 0.488}
    attributes = {"ome": {"omero": {"channels": [{"label": "DAPI"}, channel]}}}
    assert acquisition(attributes, channel=1) == {"emission_um": 0.52, "excitation_um": 0.488}
    assert acquisition(attributes) == {}
    assert acquisition({}) == {}


def test_ome_tiff_and_xml_files_are_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "a.ome.xml").write_text(OME, encoding="utf-8")
    assert acquisition(tmp_path / "a.ome.xml")["emission_um"] == 0.461
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        np.zeros((3, 8, 8), np.uint8),
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": 0.1,
            "PhysicalSizeY": 0.1,
            "PhysicalSizeZ": 0.3,
            "Channel": {"EmissionWavelength": 520, "EmissionWavelengthUnit": "nm"},
        },
    )
    found = acquisition(str(tmp_path / "a.ome.tif"))
    assert found["voxel_size"] == (0.3, 0.1, 0.1)
    assert found["emission_um"] == pytest.approx(0.52)


@pytest.mark.parametrize(
    ("source", "channel", "message"),
    [
        ("<OME", 0, "cannot be read"),
        ("<OME/>", 0, "holds no image"),
        (OME, 2, r"`channel` 2 does not exist; the metadata describes 2"),
    ],
)
def test_unreadable_metadata_is_an_error(source, channel, message):
    with pytest.raises(ValueError, match=message):
        acquisition(source, channel=channel)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"numerical_aperture": 1.4},
            r"`numerical_aperture` \(1.4\) must be below `immersion_index` \(1.333\)",
        ),
        ({"numerical_aperture": 0.0}, "`numerical_aperture` must be above 0"),
        ({"numerical_aperture": math.nan}, "`numerical_aperture` must be a finite number"),
        ({"numerical_aperture": 1.3, "coverslip_index": 1.2}, "must be below `coverslip_index`"),
        ({"emission_um": 520}, "`emission_um` 520 looks like nanometres; give micrometres, here 0.52"),
        ({"excitation_um": 488}, "`excitation_um` 488 looks like nanometres"),
        ({"excitation_um": 0.6}, r"`excitation_um` \(0.6\) must not be above `emission_um`"),
        ({"sample_index": 0.9}, "`sample_index` must be a refractive index"),
        ({"depth_um": -1.0}, "`depth_um` must be at least 0"),
        ({"pinhole_um": 50.0}, "are both given"),
        ({"pinhole_um": 50.0, "pinhole_airy": None}, "needs `magnification`"),
    ],
)
def test_impossible_optics_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WATER, **changes)


def test_what_a_model_needs_is_asked_for():
    size = (0.4, 0.2, 0.2)
    with pytest.raises(ValueError, match="needs `excitation_um`"):
        confocal(AIR, size)
    with pytest.raises(ValueError, match="give `pinhole_airy`"):
        confocal(dataclasses.replace(WATER, pinhole_airy=None), size)
    with pytest.raises(ValueError, match="a light sheet needs `excitation_um`"):
        light_sheet(AIR, size, LightSheet(waist_um=2.0))
    with pytest.raises(ValueError, match='`model` must be "scalar" or "vectorial"'):
        widefield(AIR, size, model="gaussian")
    with pytest.raises(ValueError, match="`voxel_size` must have one positive length"):
        widefield(AIR, (0.2, 0.2))
    with pytest.raises(ValueError, match="`shape` must be three positive numbers"):
        widefield(AIR, size, (3, 0, 3))
    with pytest.raises(ValueError, match="give `shape`, or correct the voxel size"):
        widefield(AIR, (0.001, 0.001, 0.001))
    with pytest.raises(ValueError, match="`x_um` must be a finite distance"):
        light_sheet(WATER, size, LightSheet(waist_um=2.0), x_um=math.inf)
    with pytest.raises(ValueError, match="`max_change` must be above 0 and below 1"):
        light_sheet_field(WATER, size, (9, 9, 9), LightSheet(waist_um=2.0), max_change=5)
    with pytest.raises(ValueError, match="`volume_shape` must be three"):
        light_sheet_field(WATER, size, (9, 9), LightSheet(waist_um=2.0))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"waist_um": 1.0, "numerical_aperture": 0.1},
        {"waist_um": 0.0},
        {"numerical_aperture": 1.0},
        {"waist_um": 1.0, "offset_um": math.nan},
    ],
)
def test_impossible_sheets_are_refused(values):
    with pytest.raises(ValueError, match=r"light sheet|must be finite"):
        LightSheet(**values)


# --- command -----------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, ["theory", *map(str, arguments)])


def test_command_writes_a_psf_with_its_voxel_size(tmp_path):
    out = tmp_path / "psf.tif"
    result = run(out, "--na", 0.8, "--emission-um", 0.52, "--immersion", "water", "--voxel-size", "0.4,0.2,0.2", "--shape", "9,15,15")  # fmt: skip # noqa: E501
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(read_psf(out), widefield(WATER, (0.4, 0.2, 0.2), (9, 15, 15)))
    assert read_psf_voxel_size(out) == pytest.approx((0.4, 0.2, 0.2), rel=1e-5)
    assert "NA 0.8, emission 0.52 um" in result.output
    assert "immersion 1.333" in result.output
    assert "FWHM" in result.output
    again = run(out, "--na", 0.8, "--emission-um", 0.52, "--immersion", "water", "--voxel-size", "1,1,1")
    assert isinstance(again.exception, FileExistsError)


def test_command_takes_the_microscope_from_an_image(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    image = tmp_path / "image.ome.tif"
    tifffile.imwrite(
        image,
        np.zeros((3, 8, 8), np.uint8),
        metadata={"axes": "ZYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 0.4,
                  "Channel": {"EmissionWavelength": 520}},
    )  # fmt: skip
    out = tmp_path / "psf.tif"
    result = run(out, "--like", image, "--na", 0.8, "--immersion", 1.333, "--excitation-um", 0.488,
                 "--model", "light-sheet", "--sheet-waist-um", 2, "--shape", "9,15,15")  # fmt: skip
    assert result.exit_code == 0, result.output
    expected = light_sheet(WATER, (0.4, 0.2, 0.2), LightSheet(waist_um=2.0), shape=(9, 15, 15))
    np.testing.assert_array_equal(read_psf(out), expected)


def test_command_reads_the_microscope_beside_an_ome_zarr_image(tmp_path):
    ome_zarr = pytest.importorskip("chunkrestore.ome_zarr")
    store = tmp_path / "converted.zarr"
    ome_zarr.write_image(
        np.zeros((2, 4, 16, 16), np.uint8), store / "0", axes="czyx", voxel_size=(0.5, 0.2, 0.2)
    )
    (store / "OME").mkdir()
    (store / "OME" / "METADATA.ome.xml").write_text(OME, encoding="utf-8")
    out = tmp_path / "psf.tif"
    result = run(out, "--like", store / "0", "--channel", 1, "--shape", "5,9,9")
    assert result.exit_code == 0, result.output
    assert "NA 1.2, emission 0.52 um" in result.output
    # The store's own voxel size prevails over that of the file that it was made from.
    assert read_psf_voxel_size(out) == pytest.approx((0.5, 0.2, 0.2), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--emission-um", 0.52, "--voxel-size", "1,1,1"),
            "`numerical_aperture`, `immersion_index` are neither",
        ),
        (("--na", 0.8, "--emission-um", 0.52, "--immersion", "air"), "give it by --voxel-size"),
        (
            (
                "--na",
                0.8,
                "--emission-um",
                0.52,
                "--immersion",
                "air",
                "--voxel-size",
                "1,1,1",
                "--sheet-na",
                0.1,
            ),
            "need --model light-sheet",
        ),
    ],
)
def test_command_says_what_is_missing(tmp_path, arguments, message):
    result = run(tmp_path / "psf.tif", *arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (tmp_path / "psf.tif").exists()

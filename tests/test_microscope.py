"""The forward model: the same bits for every cutting, and what an independent computation says."""

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, signal

import chunkrestore as cr
from chunkrestore.psf import gaussian
from chunkrestore.psf.varying import PsfField
from chunkrestore.simulate import (
    Attenuation,
    Camera,
    Ellipsoid,
    LabelledPhantom,
    Microscope,
    blur,
    forward,
    light_sheet_psf,
)
from chunkrestore.simulate.lattice import CELL

SHAPE = (70, 90, 66)
"""Two cells along every axis, the second of them cut."""
NOISELESS = Camera(background=0, gain=1, offset=0, read_noise=0)
PSF = gaussian((1.5, 1.0, 0.7), truncate=3)
FIELD = PsfField(
    [gaussian((1.0, 1.0, 1.0), truncate=2), gaussian((2.0, 1.5, 1.0), truncate=2), PSF],
    [(0, 0, 0), (30, 80, 40), (69, 10, 60)],
)
DEPTHS = PsfField([gaussian((1.0, 1.0, 1.0)), gaussian((3.0, 1.0, 1.0))], [(10, 0, 0), (60, 0, 0)])
BODY = Ellipsoid.filling(SHAPE)
MICROSCOPES = {
    "plain": Microscope(PSF),
    "field": Microscope(FIELD),
    "attenuated": Microscope(DEPTHS, Camera(), Attenuation(30, 60, "both", body=BODY)),
}


def photons(shape=SHAPE, seed=3, high=30):
    return (np.random.default_rng(seed).random(shape) * high).astype(np.float32)


def whole(shape):
    return tuple(slice(0, n) for n in shape)


@pytest.fixture(scope="module")
def images():
    truth = photons()
    return {
        name: forward(truth, m.psf, seed=9, camera=m.camera, attenuation=m.attenuation)
        for name, m in MICROSCOPES.items()
    }


@st.composite
def chunkings(draw, shape):
    chunks = []
    for n in shape:
        cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=2)))
        chunks.append(tuple(np.diff([0, *cuts, n]).tolist()))
    return tuple(chunks)


@st.composite
def regions(draw, shape):
    ends = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape]
    return tuple(slice(a, b) for a, b in ends)


# The same for every cutting -------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(MICROSCOPES)))
def test_a_lazy_image_has_the_bits_and_chunks_that_it_should(images, data, name):
    chunks, m = data.draw(chunkings(SHAPE)), MICROSCOPES[name]
    lazy = forward(
        da.from_array(photons(), chunks=chunks), m.psf, seed=9, camera=m.camera, attenuation=m.attenuation
    )
    assert (lazy.chunks, lazy.dtype) == (chunks, np.uint16)
    np.testing.assert_array_equal(lazy.compute(), images[name])


@settings(max_examples=15, deadline=None)
@given(region=regions(SHAPE), name=st.sampled_from(sorted(MICROSCOPES)))
def test_a_region_is_that_part_of_the_whole(images, region, name):
    microscope = MICROSCOPES[name]
    known = microscope.halo.read(region, SHAPE)
    image = microscope.record(photons()[known], known, region, SHAPE, 9)
    np.testing.assert_array_equal(image, images[name][region])


@settings(max_examples=10, deadline=None)
@given(chunks=chunkings((70, 33)))
def test_two_dimensions_and_a_psf_larger_than_the_volume(chunks):
    truth, psf = photons((70, 33)), gaussian((3.0, 12.0))
    assert psf.shape[1] > 2 * 33
    lazy = forward(da.from_array(truth, chunks=chunks), psf, seed=2, attenuation=Attenuation(20, axis="y"))
    np.testing.assert_array_equal(
        lazy.compute(), forward(truth, psf, seed=2, attenuation=Attenuation(20, axis="y"))
    )


def test_a_lazy_image_computes_nothing_before_it_is_asked():
    def refuse(block):
        raise AssertionError("computed")

    truth = da.from_array(photons(), chunks=40).map_blocks(refuse, meta=np.empty((0, 0, 0), np.float32))
    lazy = forward(truth, PSF, seed=1)
    with pytest.raises(AssertionError, match="computed"), dask.config.set(scheduler="sync"):
        lazy.compute()


def test_equal_images_share_their_tasks_and_others_do_not():
    truth = da.from_array(photons(), chunks=40)
    assert forward(truth, PSF, seed=1).name == forward(truth, PSF.copy(), seed=1).name
    others = {forward(truth, PSF, seed=s, camera=c).name for s in (1, 2) for c in (None, NOISELESS)}
    assert len(others) == 4


# The blur -------------------------------------------------------------------------------------------------


def mirrored_convolution(truth, psf):
    padded = np.pad(truth.astype(np.float64), [(n // 2, n // 2) for n in psf.shape], mode="symmetric")
    return signal.fftconvolve(padded, psf.astype(np.float64), mode="valid")


@pytest.mark.parametrize(
    ("shape", "psf"),
    [
        (SHAPE, light_sheet_psf()),
        ((20, 130, 9), gaussian((4.0, 1.0, 3.0))),
        ((CELL, CELL, 1), PSF),
        ((200, 70), np.ones((31, 1), np.float32) / 31),
    ],
)
def test_blur_is_the_convolution_of_the_mirrored_volume(shape, psf):
    truth = photons(shape)
    expected = mirrored_convolution(truth, psf)
    np.testing.assert_allclose(blur(truth, psf), expected, atol=1e-5 * expected.max())


def test_an_asymmetric_psf_is_not_mirrored():
    psf = np.zeros((3, 5, 1), np.float32)
    psf[0, 4, 0] = 1
    truth = np.zeros((70, 70, 4), np.float32)
    truth[65, 62, 2] = 8
    spread = blur(truth, psf)
    assert spread[64, 64, 2] == pytest.approx(8, rel=1e-5)
    assert spread.sum() == pytest.approx(8, rel=1e-5)


def test_a_field_weights_the_object_and_not_the_image():
    """H x = sum of h_k * (w_k x), here with weights by scipy's interpolation along the one axis that has two."""
    truth = photons()
    z = np.clip((np.arange(-40, SHAPE[0] + 40) - 10) / 50, 0, 1)
    padded = np.pad(truth.astype(np.float64), 40, mode="symmetric")
    expected = sum(
        signal.fftconvolve(padded * w[:, None, None], psf.astype(np.float64), mode="same")[
            40:-40, 40:-40, 40:-40
        ]
        for w, psf in zip((1 - z, z), DEPTHS.psfs, strict=True)
    )
    np.testing.assert_allclose(blur(truth, DEPTHS), expected, atol=1e-5 * expected.max())


def test_light_is_conserved_and_zero_stays_zero():
    truth = np.zeros((140, 140, 140), np.float32)
    truth[60:70, 62:66, 30:35] = 700
    spread = blur(truth, light_sheet_psf())
    assert spread.sum(dtype=np.float64) == pytest.approx(truth.sum(dtype=np.float64), rel=1e-5)
    assert not spread[:, :, 80:].any()
    assert spread.min() >= 0


# Attenuation ----------------------------------------------------------------------------------------------


def length_of_ray(inside, end, direction, step=0.01):
    """Return the length of the way through a body to `end`, from far outside, by adding up steps."""
    along = np.arange(step / 2, 300, step)
    points = np.asarray(end, float)[:, None] - np.asarray(direction, float)[:, None] * along
    return inside(points).sum() * step


@pytest.mark.parametrize("sides", ["low", "high", "both"])
@pytest.mark.parametrize("axis", ["y", "x"])
def test_attenuation_is_that_of_rays_through_the_body(sides, axis):
    shape = (40, 60, 50)
    body = Ellipsoid((18.3, 31.0, 24.0), (15.0, 25.5, 20.2))
    attenuation = Attenuation(17.0, 23.0, sides, axis, body)
    left = attenuation.transmission(np.ix_(*(np.arange(n, dtype=float) for n in shape)), shape)

    def inside(points):
        scaled = (points - np.array(body.centre)[:, None]) / np.array(body.semi_axes)[:, None]
        return (scaled**2).sum(axis=0) < 1

    forwards = np.array([0, 1, 0] if axis == "y" else [0, 0, 1])
    directions = {"low": [forwards], "high": [-forwards], "both": [forwards, -forwards]}[sides]
    for voxel in np.random.default_rng(4).integers(0, shape, (60, 3)):
        sheet = np.mean([np.exp(-length_of_ray(inside, voxel, d) / 17.0) for d in directions])
        expected = sheet * np.exp(-length_of_ray(inside, voxel, (1, 0, 0)) / 23.0)
        # Two ends of a ray, each off by half a step, over the shorter length.
        assert left[tuple(voxel)] == pytest.approx(expected, rel=3 * 0.01 / 17.0)


def test_the_whole_volume_attenuates_by_default():
    grid = np.ix_(*(np.arange(n, dtype=float) for n in (3, 4, 5)))
    left = Attenuation(10.0, 20.0).transmission(grid, (3, 4, 5))
    z, _, x = np.indices((3, 4, 5)) + 0.5
    np.testing.assert_allclose(np.broadcast_to(left, (3, 4, 5)), np.exp(-x / 10 - z / 20), rtol=1e-6)
    high = Attenuation(10.0, sides="high").transmission(grid, (3, 4, 5))
    np.testing.assert_allclose(np.broadcast_to(high, (3, 4, 5)), np.exp(-(5 - x) / 10), rtol=1e-6)


def test_attenuation_comes_before_the_blur_and_leaves_the_background():
    truth = photons()
    attenuation = Attenuation(25.0, 40.0, "both", body=BODY)
    grid = np.ix_(*(np.arange(n, dtype=float) for n in SHAPE))
    light = Microscope(PSF, attenuation=attenuation).light(truth, whole(SHAPE), whole(SHAPE), SHAPE)
    expected = mirrored_convolution(truth * attenuation.transmission(grid, SHAPE), PSF)
    np.testing.assert_allclose(light, expected, atol=1e-5 * expected.max())
    dark = forward(np.zeros(SHAPE), PSF, seed=1, attenuation=Attenuation(1e-3))
    assert dark.mean() == pytest.approx(Camera().pedestal, rel=1e-3)


def test_lengths_in_micrometres_follow_their_axes():
    made = Attenuation.in_micrometres(100, 50, voxel_size=(2.0, 0.5, 0.4), axis="y")
    assert (made.illumination, made.detection, made.axis) == (200, 25, "y")


# The camera -----------------------------------------------------------------------------------------------


def test_noise_has_the_mean_and_the_variance_of_the_model_at_every_brightness():
    camera = Camera(background=3, gain=2.5, offset=120, read_noise=6)
    steps = np.repeat([0.0, 5.0, 40.0, 900.0], CELL)
    image = forward(
        np.broadcast_to(steps[:, None, None], (4 * CELL, 70, 70)), np.ones((1, 1, 1)), seed=6, camera=camera
    )
    for part, step in zip(np.split(image.astype(float), 4), steps[::CELL], strict=True):
        mean, variance = 2.5 * (step + 3) + 120, 2.5**2 * (step + 3) + 36 + 1 / 12
        assert part.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / part.size))
        # Of a Poisson number's variance: 2 + 1 / mean, more than a normal number's.
        spread = np.sqrt((2 + 1 / (step + 3)) / part.size)
        assert part.var() == pytest.approx(variance, rel=5 * spread)


def test_noise_differs_between_cells_seeds_and_neighbouring_voxels():
    image = forward(np.full((2 * CELL, CELL, CELL), 20.0), np.ones((1, 1, 1)), seed=1).astype(float)
    first, second = np.split(image - image.mean(), 2)
    limit = 5 / np.sqrt(first.size)
    scale = image.var()
    other = forward(np.full((CELL, CELL, CELL), 20.0), np.ones((1, 1, 1)), seed=2).astype(float)
    assert abs((first * second).mean()) < limit * scale
    assert abs((first * (other - other.mean())).mean()) < limit * scale
    assert abs((first[1:] * first[:-1]).mean()) < limit * scale


def test_read_noise_does_not_depend_on_the_light():
    def image(level, read_noise):
        camera = Camera(offset=500, read_noise=read_noise)
        return forward(np.full((30, 30, 30), level), np.ones((1, 1, 1)), seed=3, camera=camera).astype(int)

    dim, bright = (image(level, 40) - image(level, 0) for level in (5.0, 50.0))
    np.testing.assert_array_equal(dim, bright)
    assert dim.std() == pytest.approx(40, rel=0.03)


def test_counts_are_clipped_to_sixteen_bits():
    image = forward(np.full((4, 4, 4), 1e6), np.ones((1, 1, 1)), seed=1)
    assert (image == 65535).all()
    image = forward(np.zeros((4, 4, 4)), np.ones((1, 1, 1)), seed=1, camera=Camera(0, 1, 0, 9))
    assert image.min() == 0


# Labels ---------------------------------------------------------------------------------------------------


def balls():
    """Return labels of balls with gaps in their ids, some touching, one cut by the border."""
    labels = np.zeros((40, 66, 50), np.int32)
    grid = np.indices(labels.shape)
    for label, centre, radius in [
        (3, (0, 10, 10), 8),
        (7, (20, 30, 20), 9),
        (8, (20, 46, 20), 9),
        (900, (30, 50, 40), 6),
    ]:
        inside = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2
        labels[inside & (labels == 0)] = label
    return labels


@settings(max_examples=20, deadline=None)
@given(region=regions((40, 66, 50)))
def test_a_region_of_labels_emits_what_that_part_of_the_whole_does(region):
    phantom = LabelledPhantom(balls(), seed=5, outside=0.25)
    _, light = phantom.render(whole(phantom.shape))
    own_labels, own_light = phantom.render(region)
    np.testing.assert_array_equal(own_labels, balls()[region])
    np.testing.assert_array_equal(own_light, light[region])
    assert (own_labels.dtype, own_light.dtype) == (np.int32, np.float32)


def test_objects_have_brightness_rim_and_texture_of_their_own():
    labels = balls()
    phantom = LabelledPhantom(labels, seed=5, photons=(10, 20), texture=0)
    light = phantom.render(whole(labels.shape))[1]
    levels = []
    for label in (3, 7, 8, 900):
        mask = labels == label
        values = np.unique(light[mask])
        np.testing.assert_allclose(values / values[1], [0.6, 1, 1.15], rtol=1e-6)
        levels.append(values[1])
        # The deepest voxels are the interior, those beside another label the surface. What the border cuts is none.
        outside = ndimage.distance_transform_edt(np.pad(mask, 12, mode="edge"))[12:-12, 12:-12, 12:-12]
        assert (light[mask & (outside > 6)] == values[1]).all()
        assert (light[mask & (outside == 1)] == values[0]).all()
        assert (light[mask & (outside >= 2) & (outside < 3)] == values[2]).all()
    assert len(set(levels)) == 4
    assert all(10 <= level <= 20 for level in levels)
    assert not light[labels == 0].any()
    textured = LabelledPhantom(labels, seed=5, photons=(10, 20), texture=0.2).render(whole(labels.shape))[1]
    ratio = textured[labels == 7] / light[labels == 7]
    assert ratio.std() == pytest.approx(0.2, rel=0.2)
    assert ratio.mean() == pytest.approx(1, abs=0.05)


def test_an_object_does_not_depend_on_the_others():
    alone = np.where(balls() == 900, 900, 0)
    together = LabelledPhantom(balls(), seed=5).render(whole(alone.shape))[1]
    np.testing.assert_array_equal(
        LabelledPhantom(alone, seed=5).render(whole(alone.shape))[1], np.where(alone > 0, together, 0)
    )
    other = LabelledPhantom(balls(), seed=6).render(whole(alone.shape))[1]
    assert not np.array_equal(other[alone > 0], together[alone > 0])


def test_labels_may_be_an_array_lazy_or_stored(tmp_path):
    labels = balls()
    cr.write_labels(labels, tmp_path / "a.zarr", "cells", axes="zyx", voxel_size=(1, 1, 1))
    stored = cr.open_source(tmp_path / "a.zarr" / "labels" / "cells")
    region = np.s_[3:37, 20:60, 5:50]
    expected = LabelledPhantom(labels, seed=1).render(region)
    for held in (labels.astype(np.int64), da.from_array(labels, chunks=(7, 66, 13)), stored):
        phantom = LabelledPhantom(held, seed=1)
        assert phantom.shape == labels.shape
        for found, wanted in zip(phantom.render(region), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_two_dimensional_labels():
    labels = balls()[20]
    found, light = LabelledPhantom(labels, seed=1).render(whole(labels.shape))
    np.testing.assert_array_equal(found, labels)
    assert light[labels > 0].min() > 0


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attenuation(0), "`illumination`"),
        (lambda: Attenuation(1, -2), "`detection`"),
        (lambda: Attenuation(sides="left"), "`sides`"),
        (lambda: Attenuation(axis="z"), "`axis`"),
        (lambda: Ellipsoid((1, 2), (3,)), "`semi_axes`"),
        (lambda: Microscope(np.ones((3, 3)) / 9, attenuation=Attenuation(detection=5)), "`detection`"),
        (lambda: Microscope(PSF, attenuation=Attenuation(body=Ellipsoid((1, 1), (2, 2)))), "`body`"),
        (lambda: Microscope(np.ones(3)), "`psf`"),
        (lambda: Microscope(np.ones((3, 4, 3))), "odd lengths"),
        (lambda: forward(np.ones((4, 4, 4)), PSF, seed=-1), "`seed`"),
        (lambda: forward(da.ones((4, 4)), PSF, seed=1), "`psf` has 3 axes but `truth` has 2"),
        (lambda: forward(-da.ones((4, 4, 4)), PSF, seed=1).compute(scheduler="sync"), "counts photons"),
        (lambda: forward(np.full((4, 4, 4), np.nan), PSF, seed=1), "counts photons"),
        (lambda: LabelledPhantom(np.ones((4, 4, 4)), seed=1), "`labels` must hold integer"),
        (lambda: LabelledPhantom(balls(), seed=-1), "`seed`"),
        (lambda: LabelledPhantom(balls(), seed=1, photons=(5, 2)), "`photons`"),
        (lambda: LabelledPhantom(balls(), seed=1, texture=-1), "`texture`"),
        (lambda: LabelledPhantom(balls()[0, 0], seed=1), "`labels` must have 2 or 3 axes"),
        (lambda: LabelledPhantom(np.full((4, 4), 2**40), seed=1).render(whole((4, 4))), "ids from"),
        (lambda: LabelledPhantom(balls(), seed=1).render(np.s_[0:41, 0:5, 0:5]), "`region`"),
    ],
)
def test_what_cannot_be_simulated_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_chunks_are_refused():
    truth = da.from_array(photons((8, 8, 8)), chunks=4)
    unknown = truth[da.from_array(np.ones(8, bool), chunks=4)]
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        forward(unknown, PSF, seed=1)

"""Simulated volumes: reproducible, physically scaled, and as crowded as they claim."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from chunkrestore.simulate import Camera, Nuclei, embryo, forward, light_sheet_psf

SHAPE = (40, 64, 56)


@pytest.fixture(scope="module")
def volume():
    return embryo(SHAPE, seed=5)


def test_types_shapes_and_ranges(volume):
    assert (volume.labels.dtype, volume.truth.dtype, volume.image.dtype) == (np.int32, np.float32, np.uint16)
    assert volume.labels.shape == volume.truth.shape == volume.image.shape == SHAPE
    assert volume.truth.min() >= 0
    assert volume.psf.dtype == np.float32
    assert volume.psf.sum() == pytest.approx(1, abs=1e-6)
    assert all(n % 2 for n in volume.psf.shape)


def test_the_seed_decides_everything(volume):
    again = embryo(SHAPE, seed=5)
    for name in ("labels", "truth", "image"):
        np.testing.assert_array_equal(getattr(again, name), getattr(volume, name))
    assert not np.array_equal(embryo(SHAPE, seed=6).labels, volume.labels)


def test_noise_is_independent_of_the_truth_and_camera_of_the_nuclei(volume):
    brighter = embryo(SHAPE, seed=5, camera=Camera(offset=300.0))
    np.testing.assert_array_equal(brighter.truth, volume.truth)
    np.testing.assert_array_equal(brighter.image.astype(int) - volume.image, 200)


def test_every_nucleus_is_one_piece(volume):
    assert volume.n_nuclei == len(np.unique(volume.labels)) - 1 > 20
    boxes = ndimage.find_objects(volume.labels)
    for label, box in ((label, box) for label, box in enumerate(boxes, start=1) if box):
        assert ndimage.label(volume.labels[box] == label, np.ones((3, 3, 3)))[1] == 1


def test_radii_lie_in_the_given_range():
    nuclei = Nuclei(radius=(5, 6), elongation=(1, 1.2), flattening=(1, 1), spacing=1.4, mitotic=0)
    labels = embryo((48, 64, 64), seed=2, nuclei=nuclei, arrangement="tissue").labels
    inside = np.unique(labels[12:-12, 12:-12, 12:-12])
    volumes = np.bincount(labels.ravel())[inside[inside > 0]]
    radii = (volumes * 3 / (4 * np.pi)) ** (1 / 3)
    # The dented surface moves a radius by 10 % at most; a whole nucleus, by less.
    assert len(radii) > 3
    assert 5 * 0.9 < radii.min() < radii.max() < 6 * 1.1


def test_nuclei_touch_and_fill_an_embryo_with_an_empty_outside(volume):
    mask = volume.labels > 0
    touching = 0
    for axis in range(3):
        a, b = (np.moveaxis(volume.labels, axis, 0)[s] for s in (slice(1, None), slice(None, -1)))
        touching += np.count_nonzero((a != b) & (a > 0) & (b > 0))
    assert touching > 5 * volume.n_nuclei
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"), -1)
    rho = np.linalg.norm(grid, axis=-1) / 0.9
    assert mask[rho < 1].mean() > 0.15
    # A centre on the surface, and half the largest, longest nucleus beyond: 13 of 18 voxels.
    assert not mask[rho > 1.73].any()
    assert volume.truth[rho > 1.73].max() < 0.1


def test_tissue_is_crowded_in_the_corners_too():
    labels = embryo(SHAPE, seed=3, arrangement="tissue").labels
    corners = [
        labels[z, y, x]
        for z in (np.s_[:15], np.s_[-15:])
        for y in (np.s_[:15], np.s_[-15:])
        for x in (np.s_[:15], np.s_[-15:])
    ]
    assert all((corner > 0).mean() > 0.05 for corner in corners)


def test_condensed_nuclei_are_small_and_bright():
    interphase = embryo(SHAPE, seed=4, nuclei=Nuclei(mitotic=0.0))
    mitotic = embryo(SHAPE, seed=4, nuclei=Nuclei(mitotic=1.0))

    def brightness(v):
        return v.truth[v.labels > 0].mean()

    assert brightness(mitotic) > 1.8 * brightness(interphase)


# The forward model ----------------------------------------------------------------------------------------


def test_forward_conserves_photons_and_adds_the_pedestal():
    truth = np.zeros((40, 40, 40), np.float32)
    truth[18:22, 18:22, 18:22] = 5000
    camera = Camera(background=4, gain=2.5, offset=50, read_noise=2)
    image = forward(truth, light_sheet_psf(), seed=1, camera=camera)
    light = image.astype(float).sum() - camera.pedestal * truth.size
    # Shot noise of source and background, and read noise, each times its gain.
    error = np.sqrt((truth.sum() + 4 * truth.size) * 2.5**2 + 4 * truth.size)
    assert abs(light - 2.5 * truth.sum()) < 4 * error


def test_forward_noise_has_the_variance_of_the_model():
    camera = Camera(background=9, gain=2, offset=100, read_noise=5)
    image = forward(np.full((64, 64, 64), 16.0), light_sheet_psf(), seed=2, camera=camera).astype(float)
    mean, variance = 2 * (16 + 9) + 100, 4 * (16 + 9) + 25 + 1 / 12
    assert image.mean() == pytest.approx(mean, abs=5 * np.sqrt(variance / image.size))
    assert image.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / image.size) + 0.01)


def test_forward_does_not_shift_and_blurs_to_the_width_of_the_psf():
    psf = light_sheet_psf()
    truth = np.zeros((41, 41, 41), np.float32)
    truth[20, 20, 20] = 2e6
    image = forward(truth, psf, seed=3, camera=Camera(background=0, gain=1, offset=0, read_noise=0)).astype(
        float
    )
    assert image.max() < 65535
    axis = np.arange(41.0)
    for i in range(3):
        others = tuple(j for j in range(3) if j != i)
        profile, expected = image.sum(others) / image.sum(), psf.sum(others)
        centre = profile @ axis
        # The mean of two million photons wanders by the width over 1400.
        assert abs(centre - 20) < 5 * 2.4 / 1400
        width = profile @ (axis - centre) ** 2
        assert width == pytest.approx(
            expected @ (np.arange(len(expected)) - len(expected) // 2) ** 2, rel=0.01
        )


def test_a_single_voxel_psf_leaves_only_noise():
    truth = np.random.default_rng(4).uniform(0, 100, (16, 16, 16)).astype(np.float32)
    bright = Camera(background=0, gain=1, offset=0, read_noise=0)
    image = forward(truth, np.ones((1, 1, 1), np.float32), seed=4, camera=bright)
    residual = (image - truth) / np.sqrt(np.maximum(truth, 1))
    assert abs(residual.mean()) < 5 / np.sqrt(truth.size)


def test_reference_is_the_image_without_blur_and_noise(volume):
    np.testing.assert_allclose(volume.reference, 4.0 * volume.truth + 108.0, rtol=1e-6)
    dark = volume.image[:, :3, :3].mean()
    assert dark == pytest.approx(volume.camera.pedestal, rel=0.02)


def test_forward_works_in_two_dimensions():
    image = forward(np.full((20, 30), 10.0), np.full((3, 3), 1 / 9, np.float32), seed=1)
    assert (image.shape, image.dtype) == ((20, 30), np.uint16)


# Refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (4, 32, 32), (32, 32, 32, 32)])
def test_embryo_refuses_shapes_without_room(shape):
    with pytest.raises(ValueError, match="`shape`"):
        embryo(shape, seed=1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"radius": (9, 4)}, "radius"),
        ({"radius": (0.5, 4)}, "radius"),
        ({"elongation": (0.5, 1)}, "elongation"),
        ({"spacing": 0.1}, "spacing"),
        ({"photons": (0, 1)}, "photons"),
        ({"mitotic": 1.5}, "mitotic"),
    ],
)
def test_nuclei_refuse_impossible_parameters(change, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        replace(Nuclei(), **change)


@pytest.mark.parametrize("change", [{"gain": 0}, {"read_noise": -1}, {"background": np.inf}, {"offset": -1}])
def test_camera_refuses_impossible_parameters(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}`"):
        Camera(**change)


def test_bad_arguments_are_named():
    flat = np.ones((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="`seed`"):
        embryo((16, 16, 16), seed=-1)
    with pytest.raises(ValueError, match="`arrangement`"):
        embryo((16, 16, 16), seed=1, arrangement="organoid")
    with pytest.raises(ValueError, match="odd lengths"):
        forward(flat, np.ones((2, 3, 3), np.float32), seed=1)
    with pytest.raises(ValueError, match="`psf` must be finite and not negative"):
        forward(flat, -np.ones((3, 3, 3), np.float32), seed=1)
    with pytest.raises(ValueError, match="`psf` has 2 axes but `truth` has 3"):
        forward(flat, np.ones((3, 3), np.float32), seed=1)
    with pytest.raises(ValueError, match="counts photons"):
        forward(-flat, np.ones((3, 3, 3), np.float32), seed=1)

"""Where training pairs come from: simulated, deconvolved, twice exposed, and noise alone."""

import json
import math

import numpy as np
import pytest
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.jobs.simulating import simulate
from chunkrestore.ome_zarr import open_image
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf.model import gaussian
from chunkrestore.simulate import Embryo, Microscope, embryo
from chunkrestore.train.registration import shift_between
from chunkrestore.train.strategies import deconvolved, noise_only, simulated, two_exposures, two_noisy

SHAPE = (32, 80, 80)
PATCH = (8, 16, 16)


@pytest.fixture(scope="module")
def sharp():
    """Return photons of nuclei without noise."""
    volume = embryo(SHAPE, seed=11)
    return np.maximum(volume.reference - volume.camera.pedestal, 0.0)


def exposed(sharp, folder, name, *, light, seed, moved=(0, 0, 0)):
    """Store what a camera records with some light of the sample, displaced by some voxels."""
    photons = ndimage.shift(sharp, moved, order=1, mode="nearest") * light
    image = (100 + np.random.default_rng(seed).poisson(photons)).astype(np.uint16)
    path = str(folder / f"{name}.zarr")
    cr.write_image(image, path, axes="zyx", voxel_size=(0.4, 0.4, 0.4), levels=1)
    return path


def test_simulated_stores_give_pairs_for_restoration_and_for_segmentation(tmp_path):
    image, truth = str(tmp_path / "image.zarr"), str(tmp_path / "truth.zarr")
    simulate(
        Embryo(SHAPE, seed=3), image, seed=3, microscope=Microscope(gaussian((1.5, 1, 1))), truth=truth,
        cluster="serial", quiet=True,
    )  # fmt: skip
    voxels, counts = (open_image(path).data.compute() for path in (image, truth))
    labels = open_image(image).label("truth").data.compute()
    for_care = simulated(image, truth).draw(PATCH, 16, seed=1)
    low, high = np.percentile(voxels, (2, 99.8))
    (_, *place) = for_care.places[0].tolist()
    region = tuple(slice(a, a + n) for a, n in zip(place, PATCH, strict=True))
    np.testing.assert_allclose(for_care.y[0], (counts[region] - low) / (high - low), rtol=1e-5, atol=1e-5)
    for_stardist = simulated([image]).draw(PATCH, 16, seed=1)
    (_, *place) = for_stardist.places[0].tolist()
    region = tuple(slice(a, a + n) for a, n in zip(place, PATCH, strict=True))
    np.testing.assert_array_equal(for_stardist.y[0], labels[region])
    for patches in (for_care, for_stardist):
        assert patches.described["strategy"] == "simulated"
        assert "seed" in json.dumps(patches.described["simulations"])
    with pytest.raises(ValueError, match="one of `truths` for each image; got 1 for 2"):
        simulated([image, image], truth)


def test_the_deconvolved_image_is_the_target(sharp, tmp_path):
    image = exposed(sharp, tmp_path, "image", light=1, seed=1)
    operator = RichardsonLucy(gaussian((1, 1, 1)), iterations=3, background=100)
    output = str(tmp_path / "deconvolved.zarr")
    strategy = deconvolved(image, output, operator, cluster="serial", quiet=True)
    voxels = open_image(image).data.compute()
    whole = operator(voxels)
    low, high = np.percentile(whole, (2, 99.8))
    patches = strategy.draw(PATCH, 16, seed=1)
    for y, (_, *place) in zip(patches.y, patches.places.tolist(), strict=True):
        region = tuple(slice(a, a + n) for a, n in zip(place, PATCH, strict=True))
        np.testing.assert_allclose(
            y, (whole[region] - low) / (high - low), atol=1e-3 * np.ptp(whole) / (high - low)
        )
    assert patches.described["operators"][0]["iterations"] == 3
    again = deconvolved(image, output).draw(PATCH, 16, seed=1)
    np.testing.assert_array_equal(again.y, patches.y)
    with pytest.raises(FileExistsError):
        deconvolved(image, output, operator, cluster="serial", quiet=True)


def test_two_exposures_are_normalised_each_by_its_own_numbers(sharp, tmp_path):
    low = exposed(sharp, tmp_path, "low", light=0.2, seed=1)
    high = exposed(sharp, tmp_path, "high", light=5, seed=2)
    patches = two_exposures(low, high).draw(PATCH, 16, seed=1)
    said = patches.described["volumes"][0]
    np.testing.assert_allclose(
        said["target_normalization"], np.percentile(open_image(high).data.compute(), (2, 99.8))
    )
    np.testing.assert_allclose(
        said["normalization"][0], np.percentile(open_image(low).data.compute(), (2, 99.8))
    )
    assert np.abs(patches.described["shifts_voxels"]).max() < 0.2
    assert patches.described["strategy"] == "two-exposures"
    other = two_noisy(low, high).draw(PATCH, 16, seed=1).described
    assert other["volumes"][0]["target_normalization"] == said["normalization"][0]
    assert other["strategy"] == "noise2noise"


def test_exposures_that_are_not_in_place_are_refused(sharp, tmp_path):
    low = exposed(sharp, tmp_path, "low", light=0.2, seed=1)
    moved = exposed(sharp, tmp_path, "moved", light=5, seed=2, moved=(0, 3, -1))
    with pytest.raises(
        ValueError, match=r"lies \([+-]0.0, \+3.0, -1.0\) voxels beside .*low.zarr.*register them first"
    ):
        two_exposures(low, moved)
    assert np.round(two_noisy(low, moved, most_shift=4).described["shifts_voxels"]).tolist() == [[0, 3, -1]]
    assert two_exposures(low, moved, most_shift=math.inf).described == {}
    with pytest.raises(ValueError, match="`most_shift` nan"):
        two_exposures(low, moved, most_shift=math.nan)
    other = exposed(embryo(SHAPE, seed=12).truth, tmp_path, "other", light=1, seed=3)
    with pytest.raises(ValueError, match=r"show nothing in common|register them first"):
        two_exposures(low, other)
    short = exposed(sharp[:30], tmp_path, "short", light=1, seed=3)
    with pytest.raises(ValueError, match=r"has shape \(32, 80, 80\) and target .* \(30, 80, 80\)"):
        two_exposures(low, short, most_shift=math.inf)


@pytest.mark.parametrize("light", [1, 0.05])
def test_shifts_are_measured_to_a_tenth_of_a_voxel_in_noise(sharp, light):
    rng = np.random.default_rng(5)
    for moved in ((0, 0, 0), (0.5, 0, -0.5), (1.3, -6, 9)):
        image = rng.poisson(sharp * light)
        target = rng.poisson(ndimage.shift(sharp, moved, order=3, mode="nearest").clip(0) * 4)
        np.testing.assert_allclose(shift_between([image], [target]), moved, atol=0.15)
    plane = sharp[16]
    np.testing.assert_allclose(shift_between([plane], [np.roll(plane, (2, -1), (0, 1))]), (2, -1), atol=0.1)
    assert shift_between([rng.poisson(5, SHAPE)], [rng.poisson(5, SHAPE)]) is None


def test_noise_alone_is_learnt_from_the_image_itself(sharp, tmp_path):
    image = exposed(sharp, tmp_path, "image", light=1, seed=1)
    patches = noise_only(image).draw(PATCH, 20, seed=1)
    assert patches.described["strategy"] == "noise-only"
    np.testing.assert_array_equal(patches.x, patches.y)
    np.testing.assert_array_equal(patches.x_validation, patches.y_validation)
    assert patches.described["volumes"][0]["target"] is None

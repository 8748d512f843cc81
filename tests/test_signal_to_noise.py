"""The measured signal-to-noise ratio against images whose photons are known."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from chunkrestore.operators.signal_to_noise import signal_to_noise


def scene(shape, blur, seed):
    """Return blurred balls whose 99.9th percentile is 1, cut out of a larger scene."""
    rng, reach, margin = np.random.default_rng(seed), 6, 10
    scene = np.zeros([n + 2 * margin for n in shape])
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * len(shape)])
    for _ in range(scene.size // (3000 if len(shape) == 3 else 500)):
        centre = [int(rng.integers(reach, n - reach)) for n in scene.shape]
        around = tuple(slice(c - reach, c + reach + 1) for c in centre)
        scene[around][ball < rng.uniform(2.5, reach) ** 2] += rng.uniform(0.3, 1)
    cut = ndimage.gaussian_filter(scene, blur)[tuple(slice(margin, margin + n) for n in shape)]
    return cut / np.percentile(cut, 99.9)


SCENES = {
    "3-D": scene((40, 80, 80), (2.0, 1.2, 1.2), 0),
    "sharp 3-D": scene((40, 80, 80), (1.0, 1.0, 1.0), 1),
    "2-D": scene((256, 256), (1.5, 1.5), 2),
    "single plane": scene((3, 160, 160), (0.0, 1.5, 1.5), 3)[:1],
}


@pytest.mark.parametrize(("read_noise", "gain", "offset"), [(0.0, 1.0, 0.0), (3.0, 2.5, 100.0)])
@pytest.mark.parametrize("photons", [10, 50, 300, 2000])
@pytest.mark.parametrize("name", SCENES)
def test_is_the_square_root_of_the_photons(name, photons, read_noise, gain, offset):
    rng = np.random.default_rng(photons)
    image = rng.poisson(photons * SCENES[name]) + rng.normal(0, read_noise, SCENES[name].shape)
    expected = photons / math.hypot(math.sqrt(photons), read_noise)
    measured = signal_to_noise([(gain * image + offset).astype(np.float32)], background=offset)
    assert measured == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("photons", [10, 100, 1000])
def test_choosing_bright_voxels_does_not_choose_lucky_noise(photons):
    image = np.random.default_rng(4).poisson(photons, (40, 60, 60)).astype(np.uint16)
    # 1.4826 MAD of at least ten thousand residuals, a tenth of them independent: 4 % is three deviations.
    assert signal_to_noise([image], background=0) == pytest.approx(math.sqrt(photons), rel=0.04)


def test_has_no_unit():
    image = np.random.default_rng(5).poisson(80 * SCENES["2-D"]).astype(np.float64)
    expected = signal_to_noise([image], background=0)
    for scale, offset in itertools.product((1e-4, 1.0, 700.0), (0.0, 0.5)):
        measured = signal_to_noise([scale * (image + offset)], background=scale * offset)
        assert measured == pytest.approx(expected, rel=1e-6)


def test_regions_are_measured_together():
    image = np.random.default_rng(6).poisson(200 * SCENES["3-D"]).astype(np.uint16)
    dark = np.random.default_rng(7).poisson(0.01, image.shape).astype(np.uint16)
    alone = signal_to_noise([image], background=0)
    assert signal_to_noise([image, dark], background=0) == pytest.approx(alone, rel=0.15)
    assert signal_to_noise([dark, image], background=0) == signal_to_noise([image, dark], background=0)


def test_background_counts():
    image = np.random.default_rng(8).poisson(100 * SCENES["2-D"] + 300)
    expected = 100 / math.sqrt(400)  # the background's photons are noise, not signal
    assert signal_to_noise([image], background=300) == pytest.approx(expected, rel=0.2)
    assert signal_to_noise([image], background=0) > 2 * expected


def test_hot_voxels_hardly_count():
    rng = np.random.default_rng(9)
    image = rng.poisson(100 * SCENES["2-D"])
    expected = signal_to_noise([image], background=0)
    hot = tuple(rng.integers(0, 256, (2, 20)))
    image[hot] += 1000
    assert signal_to_noise([image], background=0) == pytest.approx(expected, rel=0.35)


def test_nothing_above_background_is_zero_and_no_noise_is_infinite():
    assert signal_to_noise([np.zeros((9, 9, 9), np.uint8)], background=0) == 0
    assert signal_to_noise([np.full((20, 20), 7, np.uint8)], background=10) == 0
    assert signal_to_noise([np.full((20, 20), 7, np.uint8)], background=2) == math.inf


def test_small_axes_are_allowed_and_regions_without_neighbours_named():
    image = np.random.default_rng(10).poisson(50, (2, 3, 300))
    assert signal_to_noise([image], background=0) == pytest.approx(math.sqrt(50), rel=0.3)
    with pytest.raises(ValueError, match=r"`images` holds a region of shape \(2, 1, 2\)"):
        signal_to_noise([np.ones((2, 1, 2))], background=0)
    with pytest.raises(ValueError, match="`images` must hold at least one region"):
        signal_to_noise([], background=0)

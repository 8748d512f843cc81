"""Training data for axial resolution: as CSBDeep makes it, and without the axis being mixed up."""

import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from chunkrestore import train
from chunkrestore.train.axial import axial_patches, degrade


def volume(shape, seed=1):
    image = gaussian_filter(np.random.default_rng(seed).random(shape), 1.5)
    return np.float32((image - image.min()) / (image.max() - image.min()))


@pytest.mark.parametrize(("factor", "axis", "axes"), [(4, -1, "YX"), (2, 0, "ZYX"), (3, 0, "ZYX")])
def test_degrading_is_that_of_csbdeep(factor, axis, axes):
    csbdeep = pytest.importorskip("csbdeep.data")
    image = volume((24, 30, 48))[(0,) * (3 - len(axes))]
    psf = np.ones((3,) * len(axes), np.float32) / 3 ** len(axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform = csbdeep.anisotropic_distortions(
            subsample=float(factor), psf=psf, subsample_axis=axes[axis], yield_target="source"
        )
        theirs, target, _, _ = next(transform.generator([(image, image, axes, None)]))
    np.testing.assert_allclose(target, image, atol=1e-6)
    ours = degrade(image, factor, axis, psf=psf)
    inner = (slice(2 * factor, -2 * factor),) * image.ndim  # CSBDeep continues the image with zeros
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-5)


def test_isotropic_patches_are_planes_degraded_along_x():
    planes = volume((20, 64, 96))
    patches = axial_patches([planes], 4, (32, 48), validation=0.2)
    assert (len(patches), len(patches.x_validation), patches.patch_shape) == (16 * 4, 4 * 4, (32, 48))
    assert (patches.described["strategy"], patches.described["factor"]) == ("isotropic", 4.0)
    kept = planes[:16].reshape(16, 2, 32, 2, 48)[:, 0, :, 0]
    np.testing.assert_array_equal(patches.y[::4], kept)
    rough = [np.abs(np.diff(a, 2, axis=axis)).mean() for a in (patches.x, patches.y) for axis in (1, 2)]
    assert rough[1] < 0.5 * rough[3]  # along x nearly piecewise linear,
    assert rough[0] == pytest.approx(rough[2], rel=0.3)  # along y as it was


def test_upsampling_patches_are_volumes_degraded_along_z():
    patches = axial_patches([volume((32, 40, 40))], 2, (16, 20, 20), noise=0.01, validation=0.2, seed=3)
    assert (patches.patch_shape, patches.described["strategy"]) == ((16, 20, 20), "upsampling")
    again = axial_patches([volume((32, 40, 40))], 2, (16, 20, 20), noise=0.01, validation=0.2, seed=3)
    np.testing.assert_array_equal(patches.x, again.x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 1}, "`factor` 1 must be above 1"),
        ({"patch_shape": (32, 32)}, "rows and columns must differ"),
        ({"patch_shape": (32,)}, "`patch_shape` .* must be y,x"),
        ({"psf": np.ones((3, 3))}, "`psf` .* sum 1"),
        ({"volumes": [np.zeros((8, 8))]}, "`volumes` must have axes zyx"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"volumes": [np.zeros((8, 64, 64))], "factor": 2, "patch_shape": (16, 32)} | change
    with pytest.raises(ValueError, match=message):
        axial_patches(**arguments)


@pytest.mark.slow
def test_a_network_learns_to_undo_it(tmp_path):
    pytest.importorskip("csbdeep")
    psf = np.float32([[0.1, 0.2, 0.4, 0.2, 0.1]])
    patches = axial_patches([volume((48, 64, 96))], 2, (32, 96), psf=psf, validation=0.1)
    trained = train.train_care(
        patches,
        tmp_path / "isotropic",
        seed=1,
        schedule=train.Schedule(steps=300, learning_rate=1e-3, batch_size=8),
        network=train.CareNetwork(n_first=8),
    )
    assert train.validate(trained.folder, patches).scores["gain_db"] > 1.5

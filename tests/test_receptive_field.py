"""How far networks look: measured, against the arithmetic of their layers and against kernels that are known."""

import numpy as np
import pytest

from chunkrestore import models
from chunkrestore.train import receptive_field

pytest.importorskip("tensorflow")

# Keras 3.15 converts variables without NumPy 2's `copy` keyword when it saves them.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")

STARDIST = [
    (2, {"grid": (2, 2), "n_rays": 8, "unet_n_depth": 1}),
    (2, {"grid": (4, 2), "n_rays": 8, "unet_n_depth": 1}),
    (2, {"grid": (1, 1), "n_rays": 8, "unet_n_depth": 2}),
    (3, {"grid": (1, 2, 2), "n_rays": 8, "unet_n_depth": 1}),
]


def test_a_single_convolution_is_measured_exactly():
    models.tensorflow()
    import keras

    network = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(1, (5, 3), padding="same")])
    kernel = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    kernel[0, 1] = kernel[1, 2] = 0
    network.layers[0].set_weights([kernel[..., None, None], np.zeros(1)])
    field = receptive_field(network, voxel_size=(0.5, 0.25))
    assert field.reach == ((2, 2), (1, 1))
    assert field.theoretical == field.measured_halo == field.effective == (2, 1)
    expected = np.abs(kernel) / np.abs(kernel).sum()
    middle = tuple(n // 2 for n in field.influence.shape)
    found = field.influence[middle[0] - 2 : middle[0] + 3, middle[1] - 1 : middle[1] + 2]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        field.profile(0)[middle[0] - 2 : middle[0] + 3], expected.sum(axis=1), atol=1e-6
    )
    assert field.describe()["effective_radius_um"] == [1.0, 0.25]


def test_a_one_sided_kernel_is_seen_on_its_side():
    """What lies after a voxel has a positive offset."""
    models.tensorflow()
    import keras

    network = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(1, (1, 7), padding="same")])
    kernel = np.zeros((1, 7, 1, 1), np.float32)
    kernel[0, 3:, 0, 0] = (4, 3, 2, 1)
    network.layers[0].set_weights([kernel, np.zeros(1)])
    assert receptive_field(network).reach == ((0, 0), (0, 3))


@pytest.mark.parametrize(("n_dim", "parameters"), STARDIST)
def test_random_weights_look_as_far_as_stardists_layers_allow(n_dim, parameters, tmp_path):
    pytest.importorskip("stardist")
    from star_networks import save_network

    save_network(tmp_path, "net", n_dim, parameters, 5)
    field = receptive_field(tmp_path / "net")
    assert field.measured_halo == field.theoretical
    assert all(
        max(ends) <= d + a
        for ends, d, a in zip(field.reach, field.needs.depth, field.needs.align, strict=True)
    )
    assert field.profile(-1).sum() == pytest.approx(1)
    assert all(0 < e <= max(r) for e, r in zip(field.effective, field.reach, strict=True))


@pytest.mark.parametrize(("depth", "reach", "halo"), [(1, 9, 8), (2, 23, 24)])
def test_random_weights_look_as_far_as_cares_layers_allow(depth, reach, halo, tmp_path):
    pytest.importorskip("csbdeep")
    from csbdeep.models import CARE, Config

    config = Config("YX", unet_n_depth=depth, unet_n_first=4, unet_kern_size=3, train_tensorboard=False)
    model = CARE(config, "care", str(tmp_path))
    rng = np.random.default_rng(2)
    weights = [
        rng.normal(0, 1 / np.sqrt(w.size / w.shape[-1]), w.shape) for w in model.keras_model.get_weights()
    ]
    model.keras_model.set_weights(weights)
    model.keras_model.save_weights(str(tmp_path / "care" / "weights_best.h5"))
    field = receptive_field(model)
    assert [max(ends) for ends in field.reach] == [reach, reach]
    assert field.measured_halo == field.theoretical == (halo, halo)


def test_a_trained_network_stays_within_its_halo_and_is_drawn(tmp_path):
    pytest.importorskip("csbdeep")
    rng = np.random.default_rng(3)
    field = receptive_field("care3d-demo", voxel_size=(0.4, 0.4, 0.4), image=rng.random((20, 90, 33)))
    assert all(m <= t for m, t in zip(field.measured_halo, field.theoretical, strict=True))
    assert all(e < t for e, t in zip(field.effective, field.theoretical, strict=True))
    field.draw(tmp_path / "field.png")
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")
    again = receptive_field("care3d-demo", image=np.random.default_rng(3).random((20, 90, 33)))
    np.testing.assert_array_equal(field.influence, again.influence)
    with pytest.raises(ValueError, match=r"`image` .* must have 3 spatial axes"):
        receptive_field("care3d-demo", image=np.zeros((20, 20)))

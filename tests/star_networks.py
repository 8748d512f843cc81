"""Random StarDist networks that find objects of a given size everywhere: dense, ambiguous, much suppression."""

from __future__ import annotations

import json

import numpy as np
from scipy.ndimage import gaussian_filter

NORMALIZATION = (100.0, 1000.0)


def image_of(shape, seed=0):
    """Blobs of a few voxels and noise, from 100 to 1000."""
    rng = np.random.default_rng(seed)
    blobs = gaussian_filter(rng.random(shape), 1.5)
    return (np.interp(blobs, (blobs.min(), blobs.max()), (100, 850)) + rng.uniform(0, 150, shape)).astype(
        np.uint16
    )


def normalized(image, low=NORMALIZATION[0], high=NORMALIZATION[1]):
    from csbdeep.utils import normalize_mi_ma

    return normalize_mi_ma(image, low, high)


def save_network(basedir, name, n_dim, parameters, radius):
    """Save a small random network in ``basedir / name``; `radius` is the mean of its objects, in voxels."""
    from stardist import Rays_GoldenSpiral
    from stardist.models import Config2D, Config3D, StarDist2D, StarDist3D

    parameters = dict(parameters)
    if n_dim == 3:
        parameters["rays"] = Rays_GoldenSpiral(
            parameters.pop("n_rays"), anisotropy=parameters.get("anisotropy")
        )
    backbone = parameters.get("backbone", "unet")
    sizes = {f"{backbone}_n_filter_base": 4, f"net_conv_after_{backbone}": 8}
    config = (Config3D if n_dim == 3 else Config2D)(**parameters | sizes)
    model = (StarDist3D if n_dim == 3 else StarDist2D)(config, name, basedir=str(basedir))
    _randomize(model.keras_model, image_of((48,) * n_dim), radius)
    model.keras_model.save_weights(str(basedir / name / "weights_best.h5"))
    (basedir / name / "thresholds.json").write_text(json.dumps({"prob": 0.5, "nms": 0.3}))


def _randomize(network, image, radius):
    """Give random weights such that scores spread around 0.5 and distances 20 % around `radius`."""
    import keras

    rng = np.random.default_rng(11)
    for layer in network.layers:
        kernel, *rest = layer.get_weights() or [None]
        if kernel is not None:
            kernel = rng.normal(0, np.sqrt(2 / np.prod(kernel.shape[:-1])), kernel.shape)
            layer.set_weights([kernel, *(np.zeros(w.shape) for w in rest)])
    features = keras.Model(network.inputs, network.get_layer("prob").input)
    n_channels = network.inputs[0].shape[-1]
    batch = np.repeat(normalized(image)[np.newaxis, ..., np.newaxis], n_channels, axis=-1)
    seen = features.predict_on_batch(batch)[0].reshape(-1, 8)
    for name, centre, spread in (("prob", 0, 1), ("dist", radius, 0.2 * radius)):
        layer = network.get_layer(name)
        kernel, bias = layer.get_weights()
        kernel *= spread / (seen @ kernel.reshape(8, -1)).std(axis=0)
        layer.set_weights([kernel, bias + centre - (seen @ kernel.reshape(8, -1)).mean(axis=0)])

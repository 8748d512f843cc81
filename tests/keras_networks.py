"""Small Keras networks with random weights and an output per voxel, of every kind of layer that can be tiled."""

from __future__ import annotations

import numpy as np


def unet(ndim=2, n_in=1, final="softmax", n_out=3, size=None):
    """Pooling of uneven factors, overlapping average pooling, transposed convolution, nearest upsampling, a skip."""
    from keras import layers as of

    one = keras_input((size,) * ndim, n_in)
    layer = layers_of(ndim)
    pool = (2, 3) if ndim == 2 else (1, 2, 2)
    first = layer.Conv(4, 3, padding="same", activation="relu")(one)
    x = of.BatchNormalization()(layer.MaxPooling(pool)(first))
    x = of.ReLU()(layer.Conv(5, 3, padding="same", use_bias=True)(x))
    x = layer.AveragePooling(3, 2, padding="same")(x)
    x = layer.ConvTranspose(4, 3, strides=2, padding="same")(x)
    x = of.Concatenate()([first, layer.UpSampling(pool)(x)])
    return model([one], layer.Conv(n_out, 1, activation=final)(of.Dropout(0.5)(x)))


def dilated(final="sigmoid"):
    """Dilated, depthwise and separable convolutions without any pooling, one probability."""
    from keras import layers as of

    one = keras_input((None, None), 2)
    x = of.Conv2D(4, 3, padding="same", dilation_rate=(2, 3))(one)
    x = of.LeakyReLU()(of.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x))
    x = of.SeparableConv2D(4, (5, 3), padding="same")(x)
    x = of.Add()([x, of.Dense(4)(x)])
    return model(one, of.Conv2D(1, 1, activation=final)(of.LayerNormalization()(x)))


def strided(final="softmax"):
    """Strided convolutions, an even kernel, transposed ones longer and shorter than their stride, zeros put around."""
    import keras
    from keras import layers as of

    one = keras_input((None, None), 1)
    x = of.Conv2D(4, 5, strides=(3, 2), padding="same", activation="relu")(one)
    inner = keras.Sequential([of.Conv2D(4, (2, 4), padding="same"), of.Activation("elu")], name="inner")
    x = inner(of.ZeroPadding2D(((1, 2), (3, 0)))(x))
    x = of.Cropping2D(((2, 1), (1, 2)))(x)
    x = of.Conv2D(4, 3, padding="valid")(of.ZeroPadding2D(1)(x))
    x = of.Conv2DTranspose(4, (2, 5), strides=(3, 2), padding="same")(x)
    x = of.Conv2D(4, 3, strides=2, padding="same")(x)
    x = of.UpSampling2D(2, interpolation="bilinear")(x)
    return model(one, of.Conv2D(4, 1, activation=final)(x))


NETWORKS = {"unet": unet, "unet3": lambda **of: unet(3, **of), "dilated": dilated, "strided": strided}


def keras_input(lengths, n_channels):
    import keras

    return keras.Input((*lengths, n_channels))


def layers_of(ndim):
    """Return the layers of a dimension, under names without it."""
    from keras import layers

    class Of:
        def __getattr__(self, name):
            base = name.removesuffix("Transpose")
            return getattr(layers, f"{base}{ndim}D{name.removeprefix(base)}")

    return Of()


def model(one, output, seed=5):
    """Return the network with random weights, such that all classes are about as frequent."""
    import keras

    network = keras.Model(one, output)
    rng = np.random.default_rng(seed)
    network.set_weights(
        [
            rng.normal(0, 2 / np.sqrt(np.prod(w.shape[:-1])), w.shape)
            if w.ndim > 1
            else rng.uniform(0.1, 0.5, w.shape)
            for w in network.get_weights()
        ]
    )
    one = network.inputs[0]
    last = network.layers[-1]
    shape = [n or 48 for n in one.shape[1:-1]] if len(one.shape) == 4 else [4, 24, 24]
    seen = keras.Model(one, last.input)(rng.random((1, *shape, one.shape[-1])).astype(np.float32)).numpy()
    kernel = last.get_weights()[0]
    scores = seen.reshape(-1, kernel.shape[-2]) @ kernel.reshape(kernel.shape[-2:])
    last.set_weights([kernel / scores.std(axis=0), -scores.mean(axis=0) / scores.std(axis=0)])
    return network


def positive(network):
    """Give a network weights above 0, so that nothing that it looks at cancels out."""
    network.set_weights([np.abs(w) + 0.1 for w in network.get_weights()])
    return network


def padded(image, align):
    """Reflect an image with channels last at its end to whole cells of a grid."""
    missing = [(0, -n % a) for n, a in zip(image.shape, align, strict=False)]
    return np.pad(image, [*missing, *[(0, 0)] * (image.ndim - len(missing))], mode="reflect")


def labels_of(scores):
    """Return classes of scores, and how far each is from being another one."""
    if scores.shape[-1] == 1:
        return (scores[..., 0] > 0.5).astype(np.uint8), np.abs(scores[..., 0] - 0.5)
    ranked = np.sort(scores, axis=-1)
    return scores.argmax(axis=-1).astype(np.uint8), ranked[..., -1] - ranked[..., -2]

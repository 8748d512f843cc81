"""Networks in reduced precision, as Keras' mixed policies mean it: narrow activations, float32 weights."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["float32", "mixed_float16", "mixed_bfloat16"]
"""Keras' names: everything in float32, or activations in float16 (10 bits of mantissa) or bfloat16 (7)."""


def check_precision(precision: Precision) -> None:
    """Raise `ValueError` unless `precision` is one of `Precision`."""
    if precision not in get_args(Precision):
        raise ValueError(f"`precision` must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def in_precision(keras_model: Any, precision: Precision) -> Any:
    """Return a copy of a Keras model that computes in `precision`, with copies of its weights.

    The last convolutions and what follows them stay float32: so CARE adds its correction to the image as it
    was given, and StarDist's distances are not rounded (bfloat16 holds a distance of 40 voxels to 0.25).

    Parameters
    ----------
    keras_model
        A functional Keras model, as CSBDeep and StarDist build them. Not modified.
    precision
        What its other layers compute in.

    Notes
    -----
    TensorFlow cannot pool float16 volumes on a CPU. The largest of some float16 numbers is the same in
    float32, so without a GPU those layers take and give float32.
    """
    import keras
    import tensorflow as tf

    exact = _final_layers(keras_model)
    if precision == "mixed_float16" and not tf.config.list_physical_devices("GPU"):
        pooling = (keras.layers.MaxPooling2D, keras.layers.MaxPooling3D)
        exact |= {layer.name for layer in keras_model.layers if isinstance(layer, pooling)}

    def copied(layer: Any) -> Any:
        dtype = "float32" if layer.name in exact else precision
        if isinstance(layer, keras.layers.Lambda):
            # Keras cannot make one from its configuration: it holds a Python function.
            return keras.layers.Lambda(
                layer.function, arguments=layer.arguments, name=layer.name, dtype=dtype
            )
        return type(layer).from_config(layer.get_config() | {"dtype": dtype})

    copy = keras.models.clone_model(keras_model, clone_function=copied)
    copy.set_weights(keras_model.get_weights())
    return copy


def _final_layers(keras_model: Any) -> set[str]:
    """Return the names of the layers from the outputs back to the last that have weights, these included."""
    import tensorflow as tf

    origin = {id(out): layer for layer in keras_model.layers for out in tf.nest.flatten(layer.output)}
    names: set[str] = set()
    pending = list(keras_model.outputs)
    while pending:
        layer = origin[id(pending.pop())]
        names.add(layer.name)
        if not layer.weights:
            pending += tf.nest.flatten(layer.input)
    return names

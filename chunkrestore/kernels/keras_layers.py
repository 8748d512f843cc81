"""The layers of a Keras network as its file describes them, in the order in which they are computed.

Read from JSON alone, so that a file is known before anything of it is run: what is not on the lists below is refused
with its name. Files of Keras 3 and of Keras 2 are understood; models inside models are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Tensor: TypeAlias = tuple[str, int]
"""Name of a layer (with those of the models around it), and which of its calls."""

POINTWISE = frozenset(
    {
        *(
            "Activation",
            "ReLU",
            "LeakyReLU",
            "PReLU",
            "ELU",
            "Softmax",
            "ThresholdedReLU",
            "Identity",
            "Rescaling",
        ),
        *(
            "Dropout",
            "SpatialDropout",
            "AlphaDropout",
            "GaussianDropout",
            "GaussianNoise",
            "ActivityRegularization",
        ),
        *("BatchNormalization", "LayerNormalization", "UnitNormalization", "Normalization", "Dense"),
        *("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate"),
    }
)
"""Layers that look at nothing but one voxel; some only with parameters that `_check` demands."""

_OPERATIONS = {
    *(
        "Add",
        "Subtract",
        "Multiply",
        "TrueDivide",
        "Maximum",
        "Minimum",
        "Negative",
        "Abs",
        "Square",
        "Sqrt",
        "Exp",
    ),
    *("Relu", "Relu6", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "Gelu", "Silu", "Softplus", "Clip"),
}
"""Functions of ``keras.ops`` that become part of a network and look at one voxel each."""

_CONVOLUTIONS = {
    *("Conv", "SeparableConv", "DepthwiseConv", "ConvTranspose"),
    *("MaxPooling", "AveragePooling", "UpSampling", "ZeroPadding", "Cropping"),
}
_MODELS = {"Functional", "Model", "Sequential"}
_OVER_SPACE = {
    *("GlobalAveragePooling", "GlobalMaxPooling", "AdaptiveAveragePooling", "AdaptiveMaxPooling", "Flatten"),
    *("Attention", "MultiHeadAttention", "GroupNormalization"),
}


@dataclass(frozen=True)
class Layer:
    """One call of a layer."""

    name: str
    """In the file."""
    kind: str
    """Its class, without ``2D`` or ``3D``."""
    config: Mapping[str, Any] = field(repr=False)
    """Its parameters."""
    inputs: tuple[Tensor, ...]
    output: Tensor

    @property
    def refusal(self) -> str:
        """Why a layer whose reach is not known cannot be used."""
        why = (
            "looks at the whole volume" if self.kind in _OVER_SPACE else "is not known to look at a part only"
        )
        return (
            f"layer {self.name!r} ({self.kind}) {why}, so no block can be computed for itself; use a network without "
            "it, or give `depth` and `align` yourself if you know that it does no harm"
        )

    def n_channels(self, taken: Sequence[int]) -> int:
        """Return how many channels the layer makes of those of its inputs."""
        if self.kind == "Concatenate":
            return sum(taken)
        if self.kind == "DepthwiseConv":
            return taken[0] * int(self.config.get("depth_multiplier", 1))
        made = self.config.get("units" if self.kind == "Dense" else "filters")
        return max(taken) if made is None else int(made)


def layers_of(description: Mapping[str, Any], ndim: int) -> tuple[list[Layer], list[Tensor], Tensor]:
    """Return the calls of layers in an order in which they can be computed, the inputs, and the output.

    Parameters
    ----------
    description
        ``{"class_name": ..., "config": ...}`` of a model.
    ndim
        Spatial axes of its input.

    Raises
    ------
    ValueError
        If there are several inputs or outputs, or a layer is one that cannot be used.
    """
    source: Tensor = ("", 0)
    layers: list[Layer] = []
    outputs = _taken_apart(description, "", [source], layers)
    for layer in layers:
        _check(layer, ndim)
    if len(outputs) != 1:
        raise ValueError(
            f"the network has {len(outputs)} outputs; save one that ends in the classes alone: "
            "keras.Model(model.input, model.outputs[i])"
        )
    return layers, [source], outputs[0]


def lengths_of(
    layer: Layer, key: str, ndim: int, *, default: Any = None, pairs: bool = False
) -> tuple[Any, ...]:
    """Return a parameter with one value per spatial axis: integers, or `pairs` of them.

    Raises
    ------
    ValueError
        If it is nothing of the kind.
    """
    value = layer.config.get(key)
    value = default if value is None else value
    of_axes: list[Any] = [value] * ndim if isinstance(value, int) else list(value or ())
    if pairs:
        of_axes = [(v, v) if isinstance(v, int) else tuple(v) for v in of_axes]
    flat = [n for v in of_axes for n in (v if pairs else [v])]
    least = 0 if pairs else 1
    if len(of_axes) != ndim or any(not isinstance(n, int) or not least <= n < 2**16 for n in flat):
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) has `{key}` {value!r}, not one number for each of {ndim} axes"
        )
    return tuple(of_axes)


def _taken_apart(
    description: Mapping[str, Any], prefix: str, inputs: Sequence[Tensor], layers: list[Layer]
) -> list[Tensor]:
    """Append the layers of a model that is called on `inputs`; return its outputs."""
    config = description["config"]
    if description["class_name"] == "Sequential":
        (at,) = inputs
        for entry in config["layers"]:
            if entry["class_name"] != "InputLayer":
                (at,) = _called(entry, _name(entry), prefix, 0, [at], layers)
        return [at]
    made: dict[tuple[str, int, int], Tensor] = {}
    sources = _references(config["input_layers"])
    if len(sources) != len(inputs):
        raise ValueError(
            f"the network has {len(sources)} inputs; only networks with one image as input can be used"
        )
    made.update(zip(sources, inputs, strict=True))
    pending = [
        (entry, number, _references(call))
        for entry in config["layers"]
        for number, call in enumerate(entry["inbound_nodes"])
        if entry["class_name"] != "InputLayer"
    ]
    while pending:
        waiting = []
        for entry, number, needed in pending:
            if not all(reference in made for reference in needed):
                waiting.append((entry, number, needed))
                continue
            taken = [made[reference] for reference in needed]
            results = _called(entry, _name(entry), prefix, number, taken, layers)
            made |= {(_name(entry), number, k): result for k, result in enumerate(results)}
        if len(waiting) == len(pending):
            raise ValueError(f"layer {_name(pending[0][0])!r} depends on a tensor that no layer makes")
        pending = waiting
    return [made[reference] for reference in _references(config["output_layers"])]


def _called(
    entry: Mapping[str, Any],
    name: str,
    prefix: str,
    number: int,
    taken: Sequence[Tensor],
    layers: list[Layer],
) -> list[Tensor]:
    """Append one call of a layer, or those of the layers of a model; return what it makes."""
    if entry["class_name"] in _MODELS:
        return _taken_apart(entry, f"{prefix}{name}#{number}/", taken, layers)
    kind = re.sub(r"([23])D(?=$|Transpose)", "", str(entry["class_name"]))
    output: Tensor = (f"{prefix}{name}", number)
    layer = Layer(name, kind, entry.get("config", {}), tuple(taken), output)
    if str(entry.get("module", "")).startswith(("keras.src.ops", "keras.ops")):
        if kind not in _OPERATIONS:
            raise ValueError(layer.refusal)
        layer = Layer(name, "Identity" if len(taken) == 1 else "Add", {}, tuple(taken), output)
    elif kind not in POINTWISE | _CONVOLUTIONS:
        raise ValueError(layer.refusal)
    layers.append(layer)
    return [output]


def _check(layer: Layer, ndim: int) -> None:
    """Raise `ValueError` if a layer of a known kind has parameters with which it looks further, or cannot be used."""
    config = layer.config
    if not layer.inputs:
        raise ValueError(f"layer {layer.name!r} ({layer.kind}) has no input")
    if config.get("data_format") == "channels_first":
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) has channels first; only channels last can be used"
        )
    if config.get("padding") not in (None, "same", "valid") and layer.kind != "ZeroPadding":
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) has `padding` {config['padding']!r}, not 'same' or 'valid'"
        )
    axis = config.get("axis")
    if axis not in (None, -1, [-1], ndim + 1, [ndim + 1]):
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) works along axis {axis}; only -1, the channels, can be tiled"
        )
    if layer.kind == "PReLU" and not config.get("shared_axes"):
        raise ValueError(
            f"layer {layer.name!r} (PReLU) has a slope per voxel; share it along the spatial axes"
        )


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["config"]["name"])


def _references(value: Any) -> list[tuple[str, int, int]]:
    """Return the tensors (layer, call, which) that a part of the description names, in order."""
    return list(_found(value))


def _found(value: Any) -> Iterator[tuple[str, int, int]]:
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            value = value["config"]["keras_history"]
        else:
            for part in value.values():
                yield from _found(part)
            return
    if isinstance(value, list | tuple):
        if len(value) in (3, 4) and isinstance(value[0], str) and all(type(n) is int for n in value[1:3]):
            yield value[0], value[1], value[2]
            if len(value) == 4:
                yield from _found(value[3])
            return
        for part in value:
            yield from _found(part)

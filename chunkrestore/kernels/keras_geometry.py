"""How far a Keras network looks, and on which grid it works, from the description of its layers alone.

Pure integers: nothing here imports Keras. Every tensor between two layers has, per spatial axis, elements whose
distance in input voxels is a fraction (2 behind a pooling by 2, 1/2 behind an upsampling of the input); element ``j``
depends on no input voxel outside ``first[j]`` to ``last[j]``. Both repeat themselves from cell to cell of the
network's grid, so that one cell is all that is kept, and every layer is arithmetic on its indices::

    convolution, pooling    j  <-  j * stride - before  to  j * stride - before + length - 1
    transposed convolution  j  <-  ceil((j + before - length + 1) / stride)  to  floor((j + before) / stride)
    upsampling              j  <-  floor(j / factor)

``before`` is how many zeros "same" puts before an axis: TensorFlow's rule, which depends on the axis' length and the
stride. On whole cells of the grid that split is the same for every length, hence for every block. An element whose
voxels all lie in what a block reads is then computed from the same numbers as in the untiled call (by induction over
the layers), which is why tiled equals untiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.kernels.keras_layers import POINTWISE, Layer, Tensor, layers_of, lengths_of
from chunkrestore.kernels.network import NetworkGeometry

Indices: TypeAlias = npt.NDArray[np.int64]

_LARGEST_GRID = 4096
"""Voxels: pooling by 2 twelve times. A description that asks for more is no segmentation network."""


@dataclass(frozen=True)
class KerasGeometry:
    """What a network needs around a core, and what it makes of it."""

    needs: NetworkGeometry
    """Depth and grid of blocks."""
    spans: tuple[tuple[Indices, Indices], ...]
    """Per axis, for the output voxels of the grid's first cell: first and last input voxel that they look at."""
    n_channels: int
    """Channels of the output."""
    voxel_nbytes: int
    """Peak bytes per input voxel of all tensors that are held at once."""


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of a tensor."""

    step: Fraction
    """Input voxels from one element to the next."""
    extra: int
    """Elements beyond one per `step` of the input: of padding that is not "same"."""
    first: Indices
    """Per element of the grid's first cell: first input voxel that it depends on."""
    last: Indices
    """The last one."""

    def at(self, bounds: Indices, elements: Indices) -> Indices:
        """Return `bounds` (`first` or `last`) of any elements."""
        cell, place = np.divmod(elements, len(bounds))
        return bounds[place] + cell * int(self.step * len(bounds))

    def gathered(self, step: Fraction, extra: int, first: Indices, last: Indices) -> _Axis:
        """Return an axis whose elements depend on those from `first` to `last` of this one."""
        return _Axis(step, extra, self.at(self.first, first), self.at(self.last, last))


@dataclass(frozen=True)
class _Spatial:
    """What is known of a tensor."""

    axes: tuple[_Axis, ...]
    n_channels: int

    @property
    def nbytes(self) -> Fraction:
        """Bytes in float32 per input voxel."""
        return 4 * self.n_channels / math.prod((axis.step for axis in self.axes), start=Fraction(1))


class _FinerError(Exception):
    """The grid must be coarser on one axis for a layer to take whole cells of it."""

    def __init__(self, axis: int, factor: int) -> None:
        super().__init__(axis, factor)
        self.axis, self.factor = axis, factor


def keras_geometry(description: Mapping[str, Any], ndim: int, n_channels: int) -> KerasGeometry:
    """Return what a network of Keras needs around a core for a tiled result to equal the untiled one.

    Parameters
    ----------
    description
        ``{"class_name": ..., "config": ...}`` of a functional or sequential model, as Keras stores it in its files.
    ndim
        Spatial axes of the input.
    n_channels
        Channels of the input.

    Raises
    ------
    ValueError
        If a layer looks at the whole volume (global pooling, normalisation over space) or is not known, or the
        output has not one element per voxel of the input; the message names it.
    """
    layers, inputs, output = layers_of(description, ndim)
    grid = [1] * ndim
    while True:
        try:
            return _walk(layers, inputs, output, grid, n_channels)
        except _FinerError as error:
            grid[error.axis] *= error.factor
            if grid[error.axis] > _LARGEST_GRID:
                raise ValueError(
                    f"the network's strides need a grid of {grid[error.axis]} voxels on axis {error.axis}, "
                    f"the limit is {_LARGEST_GRID}"
                ) from None


def _walk(
    layers: Sequence[Layer], inputs: Sequence[Tensor], output: Tensor, grid: Sequence[int], n_channels: int
) -> KerasGeometry:
    """Follow a network from its input to its output on a grid that is given."""
    whole = _Spatial(tuple(_Axis(Fraction(1), 0, np.arange(g), np.arange(g)) for g in grid), n_channels)
    tensors: dict[Tensor, _Spatial] = dict.fromkeys(inputs, whole)
    last_use = {name: i for i, layer in enumerate(layers) for name in layer.inputs} | {output: len(layers)}
    peak = Fraction(0)
    for i, layer in enumerate(layers):
        taken = [tensors[name] for name in layer.inputs]
        tensors[layer.output] = made = _result(layer, taken)
        held = sum((t.nbytes for name, t in tensors.items() if last_use.get(name, -1) >= i), Fraction(0))
        # A convolution copies what goes in and what comes out into the layout of the processor's kernels.
        copies = Fraction(0)
        if "Conv" in layer.kind:
            copies = made.nbytes + sum((t.nbytes for t in taken), Fraction(0))
        peak = max(peak, held + made.nbytes * (layer.output not in last_use) + copies)
    result = tensors[output]
    for axis, (along, g) in enumerate(zip(result.axes, grid, strict=True)):
        if along.step != 1 or along.extra:
            what = f"one element per {along.step} voxels" + (
                f" and {along.extra} more" if along.extra else ""
            )
            raise ValueError(
                f"the network's output has {what} on axis {axis} of {g}; only networks with one element per voxel "
                "of the input can be used (padding 'same', as much upsampling as pooling)"
            )
    spans = tuple((axis.first, axis.last) for axis in result.axes)
    depth = tuple(_depth(first, last, g) for (first, last), g in zip(spans, grid, strict=True))
    return KerasGeometry(NetworkGeometry(depth, tuple(grid)), spans, result.n_channels, math.ceil(peak))


def _depth(first: Indices, last: Indices, grid: int) -> int:
    """Return how far a cell of the grid looks, in whole cells; at least one, which reflected voxels come from."""
    reach = max(0, -int(first.min()), int(last.max()) - (grid - 1))
    return reach if grid == 1 else max(-(-reach // grid), 1) * grid


def _result(layer: Layer, taken: Sequence[_Spatial]) -> _Spatial:
    """Return what a layer makes of tensors."""
    merged = taken[0]
    for other in taken[1:]:
        merged = _merged(layer, merged, other)
    n_channels = layer.n_channels([t.n_channels for t in taken])
    if layer.kind in POINTWISE:
        return _Spatial(merged.axes, n_channels)
    along = _ALONG.get(layer.kind)
    if along is None:
        raise ValueError(layer.refusal)
    ndim = len(merged.axes)
    axes = []
    for k, axis in enumerate(merged.axes):
        try:
            axes.append(along(axis, layer, k, ndim))
        except _FinerError as error:
            raise _FinerError(k, error.factor) from None
    return _Spatial(tuple(axes), n_channels)


def _merged(layer: Layer, one: _Spatial, other: _Spatial) -> _Spatial:
    """Return a tensor whose elements depend on what those of both depend on."""
    axes = []
    for k, (a, b) in enumerate(zip(one.axes, other.axes, strict=True)):
        if (a.step, a.extra) != (b.step, b.extra):
            raise ValueError(
                f"layer {layer.name!r} ({layer.kind}) joins tensors of different lengths on axis {k}: one element per "
                f"{a.step} and per {b.step} voxels, {a.extra} and {b.extra} more"
            )
        axes.append(_Axis(a.step, a.extra, np.minimum(a.first, b.first), np.maximum(a.last, b.last)))
    return _Spatial(tuple(axes), one.n_channels)


def _window(axis: _Axis, layer: Layer, k: int, ndim: int) -> _Axis:
    """Return the axis behind a convolution or a pooling."""
    size = "pool_size" if "Pooling" in layer.kind else "kernel_size"
    length = lengths_of(layer, size, ndim)[k]
    strides = lengths_of(
        layer, "strides", ndim, default=lengths_of(layer, size, ndim) if "Pool" in size else 1
    )
    stride, dilation = strides[k], lengths_of(layer, "dilation_rate", ndim, default=1)[k]
    length = (length - 1) * dilation + 1
    n = len(axis.first)
    if n % stride:
        raise _FinerError(k, stride // math.gcd(n, stride))
    before, extra = 0, (axis.extra - length) // stride + 1
    if layer.config.get("padding", "valid") == "same":
        # TensorFlow: as many as the last window lacks, the smaller half before. Lengths are whole cells and `extra`.
        lacking = max(length - (axis.extra % stride or stride), 0)
        before, extra = lacking // 2, -(-axis.extra // stride)
    start = np.arange(n // stride) * stride - before
    return axis.gathered(axis.step * stride, extra, start, start + length - 1)


def _transposed(axis: _Axis, layer: Layer, k: int, ndim: int) -> _Axis:
    """Return the axis behind a transposed convolution."""
    length, stride = (
        lengths_of(layer, "kernel_size", ndim)[k],
        lengths_of(layer, "strides", ndim, default=1)[k],
    )
    dilation = lengths_of(layer, "dilation_rate", ndim, default=1)[k]
    if dilation != 1 or layer.config.get("output_padding") is not None:
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) has a dilation or `output_padding`, whose reach is not known here; "
            "give `depth` and `align` yourself"
        )
    same = layer.config.get("padding", "valid") == "same"
    lacking = max(length - stride, 0)
    before = lacking // 2 if same else 0
    extra = axis.extra * stride + (0 if same else lacking)
    at = np.arange(len(axis.first) * stride) + before
    return axis.gathered(axis.step / stride, extra, -((length - 1 - at) // stride), at // stride)


def _upsampled(axis: _Axis, layer: Layer, k: int, ndim: int) -> _Axis:
    """Return the axis behind an upsampling."""
    factor = lengths_of(layer, "size", ndim)[k]
    interpolation = layer.config.get("interpolation", "nearest")
    at = np.arange(len(axis.first) * factor)
    if interpolation == "nearest":
        first = last = at // factor
    elif interpolation == "bilinear":
        # Between the centres of elements: (at + 1/2) / factor - 1/2.
        first = (2 * at + 1 - factor) // (2 * factor)
        last = first + 1
    else:
        raise ValueError(
            f"layer {layer.name!r} ({layer.kind}) has `interpolation` {interpolation!r}; known are 'nearest' and "
            "'bilinear'"
        )
    return axis.gathered(axis.step / factor, axis.extra * factor, first, last)


def _shifted(axis: _Axis, layer: Layer, k: int, ndim: int) -> _Axis:
    """Return the axis behind zeros put around it, or elements cut off."""
    crops = layer.kind.startswith("Cropping")
    before, after = lengths_of(layer, "cropping" if crops else "padding", ndim, pairs=True)[k]
    sign = -1 if crops else 1
    at = np.arange(len(axis.first)) - sign * before
    return axis.gathered(axis.step, axis.extra + sign * (before + after), at, at)


_ALONG: dict[str, Callable[[_Axis, Layer, int, int], _Axis]] = {
    **dict.fromkeys(("Conv", "SeparableConv", "DepthwiseConv", "MaxPooling", "AveragePooling"), _window),
    "ConvTranspose": _transposed,
    "UpSampling": _upsampled,
    **dict.fromkeys(("ZeroPadding", "Cropping"), _shifted),
}
"""What layers do along one spatial axis."""

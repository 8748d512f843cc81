"""Convolutional networks on blocks: what they must read, and how they are run.

Geometry is integers, derived from a model's configuration alone. Running takes a Keras model and one block.

Why a tiled network can equal the untiled one: a U-Net is invariant to shifts by its pooling grid. If a
block's read region begins and ends on that grid (in the coordinates of the padded volume) and reaches at
least as far around the core as the network looks, then every activation that the core depends on is computed
from the same numbers as in the untiled call.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkrestore.kernels.precision import Precision, check_precision, in_precision

Layer = tuple[str, int, int]
"""Kind (``"conv"``, ``"pool"`` or ``"up"``), kernel length and stride of a layer along one axis."""


@dataclass(frozen=True)
class NetworkGeometry:
    """What a network needs around a core for a tiled result to equal the untiled one."""

    depth: tuple[int, ...]
    """Voxels per spatial axis on each side: the receptive field, rounded up to `align` and at least that.

    A block at the volume's border then holds all voxels that are reflected to pad the volume to the grid.
    """
    align: tuple[int, ...]
    """Pooling grid per spatial axis: read regions begin and end on its multiples."""


def care_geometry(config: Any) -> NetworkGeometry:
    """Return depth and alignment of a CSBDeep CARE network.

    Parameters
    ----------
    config
        Attributes as in CSBDeep's ``Config``: ``n_dim``, ``unet_n_depth``, ``unet_kern_size``.

    Notes
    -----
    CSBDeep builds CARE from two convolutions per level and pools by 2 on every axis.
    """
    path = _unet_path(config.unet_kern_size, 2, config.unet_n_depth, 2)
    return _geometry([_reach(path)] * config.n_dim, [2**config.unet_n_depth] * config.n_dim)


def stardist_geometry(config: Any) -> NetworkGeometry:
    """Return depth and alignment, in voxels of the image, of a StarDist network (2-D or 3-D).

    Parameters
    ----------
    config
        Attributes as in StarDist's ``Config2D`` and ``Config3D``: ``n_dim``, ``grid``, ``backbone`` and the
        parameters of that backbone (``unet_*`` or ``resnet_*``).

    Raises
    ------
    ValueError
        If the backbone is unknown, or a ResNet has too few blocks to reach its grid.
    """
    paths = {"unet": _stardist_unet_path, "resnet": _stardist_resnet_path}
    if config.backbone not in paths:
        raise ValueError(f"`backbone` {config.backbone!r} is not one of {', '.join(paths)}")
    path = paths[config.backbone]
    reach = [_reach(path(config, axis)) for axis in range(config.n_dim)]
    if config.backbone == "resnet":
        return _geometry(reach, config.grid)
    pools = (pool**config.unet_n_depth for pool in config.unet_pool)
    return _geometry(reach, [pool * grid for pool, grid in zip(pools, config.grid, strict=True)])


def _geometry(reach: Sequence[int], align: Sequence[int]) -> NetworkGeometry:
    """Round the reach up to whole cells of the pooling grid."""
    depth = tuple(-(-max(r, 1) // a) * a for r, a in zip(reach, align, strict=True))
    return NetworkGeometry(depth, tuple(align))


def network_nbytes(config: Any, shape: Sequence[int]) -> int:
    """Return the peak number of bytes that `run_network` allocates for an image of spatial `shape`.

    Parameters
    ----------
    config
        As for `care_geometry` or `stardist_geometry`, with the numbers of filters.
    shape
        Voxels per spatial axis.

    Notes
    -----
    The largest of a few moments, in float32 feature maps per voxel: a convolution at full resolution (what
    goes in and comes out, and copies in the layout of the CPU's kernels), the last level of the U-Net (skip
    connection, upsampled maps, their concatenation and its copy: 6 times the first level's filters), and
    StarDist's head (features, distances, and a copy of the wider one). Measured peaks on a CPU are 0.8 to 1
    times this for networks of 8 to 32 filters (0.55 times in reduced precision); GPU libraries take workspace
    beyond it.
    """
    n_voxels = math.prod(shape)
    if hasattr(config, "unet_n_first"):
        n_maps: float = 6 * config.unet_n_first
    else:
        n_first = getattr(config, f"{config.backbone}_n_filter_base")
        n_features = getattr(config, f"net_conv_after_{config.backbone}") or n_first
        n_steps = max(config.grid).bit_length() - 1
        n_inner = n_first * (2**n_steps if config.backbone == "resnet" else 1)
        n_heads = 1 if config.n_classes is None else 2
        on_grid = max(6 * n_inner, n_heads * n_features + config.n_rays + max(n_features, config.n_rays))
        n_maps = max(2.5 * n_first, on_grid / math.prod(config.grid))
    return int(4 * n_voxels * (n_maps + 2 * config.n_channel_in))


def _unet_path(kernel: int, pool: int, n_depth: int, n_conv: int) -> list[Layer]:
    """Return the layers from input to output along the deepest path, which looks furthest."""
    convs: list[Layer] = [("conv", kernel, 1)] * n_conv
    down: list[Layer] = [*convs, ("pool", pool, pool)]
    up: list[Layer] = [("up", pool, pool), *convs]
    return down * n_depth + convs + up * n_depth


def _stardist_unet_path(config: Any, axis: int) -> list[Layer]:
    """Return the layers along one axis: pooling to the grid, the U-Net, and the features' convolution."""
    kernel, n_conv = config.unet_kernel_size[axis], config.unet_n_conv_per_depth
    path: list[Layer] = []
    for pool in _grid_steps(config.grid, axis):
        path += [("conv", kernel, 1)] * n_conv + [("pool", pool, pool)]
    path += _unet_path(kernel, config.unet_pool[axis], config.unet_n_depth, n_conv)
    return path + [("conv", kernel, 1)] * (config.net_conv_after_unet > 0)


def _stardist_resnet_path(config: Any, axis: int) -> list[Layer]:
    """Return the layers along one axis; the first convolution of a block is strided while the grid grows."""
    kernel = config.resnet_kernel_size[axis]
    steps = _grid_steps(config.grid, axis)
    if len(steps) > config.resnet_n_blocks:
        raise ValueError(
            f"`resnet_n_blocks` {config.resnet_n_blocks} is too few for `grid` {tuple(config.grid)}: "
            f"at least {len(steps)} are needed"
        )
    path: list[Layer] = [("conv", 7, 1), ("conv", 3, 1)]
    for stride in [*steps, *[1] * (config.resnet_n_blocks - len(steps))]:
        path += [("conv", kernel, stride)] + [("conv", kernel, 1)] * (config.resnet_n_conv_per_block - 1)
    return path + [("conv", kernel, 1)] * (config.net_conv_after_resnet > 0)


def _grid_steps(grid: Sequence[int], axis: int) -> list[int]:
    """Return the factors (1 or 2) by which StarDist subsamples `axis` until every axis is at its grid."""
    n_steps = max(grid).bit_length() - 1
    return [2 if 2**step < grid[axis] else 1 for step in range(n_steps)]


def _reach(path: Iterable[Layer]) -> int:
    """Return how many input voxels an aligned output region depends on beyond each of its faces.

    From the output back to the input, with ``e`` the reach so far: a convolution of kernel ``k`` adds
    ``k // 2``; one of stride ``s`` first multiplies and then adds only what sticks out of its cell,
    ``s * e + ceil((k - s) / 2)``; pooling multiplies; upsampling divides and rounds up.
    """
    reach = 0
    for kind, kernel, stride in reversed(list(path)):
        if kind == "up":
            reach = -(-reach // stride)
        elif kind == "pool":
            reach *= stride
        else:
            reach = reach * stride + max(0, kernel - stride + 1) // 2
    return reach


_functions: weakref.WeakKeyDictionary[Any, dict[Precision, Any]] = weakref.WeakKeyDictionary()
_functions_lock = threading.Lock()
_gpu_lock = threading.Lock()


def run_network(
    keras_model: Any, image: np.ndarray, *, precision: Precision = "float32"
) -> tuple[np.ndarray, ...]:
    """Run a network once on one block.

    Parameters
    ----------
    keras_model
        A Keras model with channels last (``model.keras_model`` of a CSBDeep or StarDist model).
    image
        float32, spatial axes and a trailing channel axis, no batch axis. Lengths must be multiples of the
        network's pooling grid (`NetworkGeometry.align`).
    precision
        What the network computes in. Weights are copied at the first call that is not in float32; changes
        that are made to the model later are not seen.

    Returns
    -------
    tuple of numpy.ndarray
        The network's outputs, float32, without batch axis. Arrays may be read-only.

    Raises
    ------
    TypeError
        If `image` is not float32.
    ValueError
        If `image` has not the axes or channels that the network takes, or `precision` is unknown.
    OverflowError
        If the outputs are not finite in reduced precision.

    Notes
    -----
    One graph per model, precision and process, traced once for all shapes. Keras' own ``predict`` costs 0.05
    to 0.08 s of CPU time more per call: up to 11 times as much on 16 x 32 x 32 voxels, 1.06 to 1.4 times on
    the largest blocks timed. On a GPU it also compiles with XLA for every shape. Blocks are not batched: eight
    of 32 x 64 x 64 in a batch save 2 to 12 %, and one larger block saves more, because less of it is halo
    (``benchmarks/network_calls.py``). cuDNN tunes itself anew for each of a grid's shapes of
    blocks, three or four lengths per axis; what that costs was not measured.

    Safe to call from several threads; on a GPU, calls take turns, so that device memory is needed for one
    block at a time. TensorFloat-32, which keeps 10 bits of the mantissa, is switched off for the process.
    Nothing in reduced precision was run on a GPU yet.
    """
    return tuple(output[0] for output in run_batch(keras_model, image[np.newaxis], precision=precision))


def run_batch(
    keras_model: Any, images: np.ndarray, *, precision: Precision = "float32"
) -> tuple[np.ndarray, ...]:
    """Run a network once on several images of one shape.

    Parameters
    ----------
    keras_model, precision
        As for `run_network`.
    images
        float32; the first axis counts images, the others are as for `run_network`.

    Returns
    -------
    tuple of numpy.ndarray
        The network's outputs, float32, one per image along the first axis. Arrays may be read-only.

    Raises
    ------
    TypeError, ValueError, OverflowError
        As for `run_network`.
    """
    shape = images.shape[1:]
    if images.dtype != np.float32:
        raise TypeError(f"`image` must be float32, got {images.dtype}")
    expected = tuple(keras_model.inputs[0].shape)[1:]
    if len(shape) != len(expected) or shape[-1] != expected[-1]:
        raise ValueError(
            f"`image` of shape {shape} does not fit a network with {len(expected) - 1} spatial axes "
            f"and {expected[-1]} channel(s), channels last"
        )
    check_precision(precision)
    function = _function(keras_model, precision)
    with _turn():
        outputs = tuple(np.asarray(output) for output in function(images))
    if precision != "float32" and not all(np.isfinite(output).all() for output in outputs):
        raise OverflowError(
            f"the network's outputs are not finite with `precision` {precision!r}: float16 ends at 65504; "
            'use "mixed_bfloat16" or "float32"'
        )
    return outputs


def _function(keras_model: Any, precision: Precision = "float32") -> Any:
    """Return the ``tf.function`` of `keras_model`; it is built once and lives as long as the model."""
    import tensorflow as tf

    with _functions_lock:
        graphs = _functions.setdefault(keras_model, {})
        if precision not in graphs:
            tf.config.experimental.enable_tensor_float_32_execution(False)
            model = _held(keras_model, precision)
            shape = tuple(keras_model.inputs[0].shape)
            any_shape = [tf.TensorSpec((None,) * (len(shape) - 1) + (shape[-1],), tf.float32)]
            signature = None if _interpolates(keras_model) else any_shape

            @tf.function(input_signature=signature, jit_compile=False, autograph=False)  # type: ignore[untyped-decorator]
            def function(batch: Any) -> Any:
                return tf.nest.flatten(model()(batch, training=False))

            graphs[precision] = function
        return graphs[precision]


def _interpolates(layer: Any) -> bool:
    """Return whether upsampling in a model interpolates: Keras must know shapes then, and traces a graph for each."""
    if getattr(layer, "interpolation", "nearest") != "nearest":
        return True
    return any(_interpolates(inner) for inner in getattr(layer, "layers", ()))


def _held(keras_model: Any, precision: Precision) -> Callable[[], Any]:
    """Return what gives the model to run: itself, which must not be kept alive, or a copy, which must."""
    if precision == "float32":
        return weakref.ref(keras_model)
    copy = in_precision(keras_model, precision)
    return lambda: copy


def _turn() -> AbstractContextManager[Any]:
    """Return what serialises calls on a GPU, and nothing on a CPU."""
    import tensorflow as tf

    return _gpu_lock if tf.config.list_physical_devices("GPU") else nullcontext()

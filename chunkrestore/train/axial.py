"""Training data for axial resolution, from a volume itself: what lies in its planes is made to look as along z.

A microscope resolves y and x better than z, and samples them more finely. Two networks of CSBDeep learn from that,
without any other image: planes, blurred and subsampled along x, teach a network of two dimensions to undo it in slices
along z (isotropic reconstruction); volumes of which every n-th plane is kept teach one of three dimensions to fill
in the others (upsampling)::

    input = up(down(psf * target))        down: nearest of every n-th voxel; up: linear, to the former size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.train.patches import FloatArray, Patches, patches_of


def axial_patches(
    volumes: Sequence[npt.ArrayLike],
    factor: float,
    patch_shape: Sequence[int],
    *,
    psf: npt.ArrayLike | None = None,
    noise: float = 0.0,
    validation: float = 0.1,
    seed: int = 0,
) -> Patches:
    """Return patches that teach a network to restore what is blurred and subsampled along one axis.

    Parameters
    ----------
    volumes
        Normalised volumes (z, y, x). For isotropic reconstruction, only their planes are used.
    factor
        How many times coarser z is sampled than y and x; above 1. It must be the one that the network is later
        applied with.
    patch_shape
        (y, x), of unlike lengths: isotropic reconstruction, degraded along x. Were they alike, augmentation would
        exchange rows and columns. (z, y, x): upsampling, degraded along z.
    psf
        Blur before subsampling, of sum 1: (y, x), with x in the place of the axial direction, or (z, y, x). CSBDeep's
        authors advise against leaving it out. It is what the axial resolution has in excess of the lateral one.
    noise
        Standard deviation of Gaussian noise that is added between blur and subsampling.
    validation
        Share that is held back: the last planes of every volume, or patches of (z, y, x).
    seed
        Of the noise and of that choice.

    Returns
    -------
    Patches
        Inputs and targets of one shape, to be given to `train_care`.

    Raises
    ------
    ValueError
        If `factor`, `patch_shape` or `psf` do not fit the volumes, or too little is left for one side.

    References
    ----------
    Weigert, Royer, Jug, Myers, "Isotropic reconstruction of 3D fluorescence microscopy images using
    convolutional neural networks", MICCAI (2017); Weigert et al., Nature Methods 15, 1090 (2018), on upsampling.
    """
    shape = tuple(int(n) for n in patch_shape)
    arrays = [np.asarray(volume, dtype=np.float32) for volume in volumes]
    _check(arrays, factor, shape)
    kernel = None if psf is None else _checked_psf(psf, len(shape))
    rng = np.random.default_rng([seed, 5])
    said: dict[str, Any] = {
        "strategy": "isotropic" if len(shape) == 2 else "upsampling",
        "factor": float(factor),
    }
    said |= {"noise": noise, "psf_shape": None if kernel is None else list(kernel.shape)}

    def degraded(image: FloatArray) -> FloatArray:
        return degrade(image, factor, -1 if image.ndim == 2 else 0, psf=kernel, noise=noise, rng=rng)

    if len(shape) == 3:
        inputs = [degraded(array) for array in arrays]
        return patches_of(inputs, arrays, shape, validation=validation, seed=seed, described=said)
    training: list[FloatArray] = []
    held: list[FloatArray] = []
    for array in arrays:
        n_held = math.ceil(validation * len(array))
        training += list(array[: len(array) - n_held])
        held += list(array[len(array) - n_held :])
    if not training:
        raise ValueError(f"`validation` {validation} leaves no plane to train on")
    return patches_of(
        [degraded(plane) for plane in training],
        training,
        shape,
        validation=([degraded(plane) for plane in held], held) if held else 0,
        seed=seed,
        described=said,
    )


def degrade(
    image: FloatArray,
    factor: float,
    axis: int,
    *,
    psf: FloatArray | None = None,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> FloatArray:
    """Blur, add noise, keep the nearest of every `factor` voxels along `axis`, and interpolate to the former size.

    The mirror image continues the image at its borders. First and last voxels stay where they are, as with CSBDeep.

    Parameters
    ----------
    image
        float32.
    factor, psf, noise
        As for `axial_patches`.
    axis
        Which is degraded.
    rng
        Of the noise.

    Returns
    -------
    ndarray
        float32, of the shape of `image`.
    """
    from scipy.ndimage import convolve, zoom

    if psf is not None:
        image = convolve(image, psf, mode="reflect")
    if noise and rng is not None:
        image = image + rng.normal(0, noise, image.shape).astype(np.float32)
    n = image.shape[axis]
    n_kept = max(2, round(n / factor))
    down, up = np.ones(image.ndim), np.ones(image.ndim)
    down[axis], up[axis] = n_kept / n, n / n_kept
    result: FloatArray = zoom(zoom(image, down, order=0), up, order=1).astype(np.float32)
    assert result.shape == image.shape
    return result


def _check(arrays: Sequence[FloatArray], factor: float, shape: tuple[int, ...]) -> None:
    if not arrays or any(array.ndim != 3 for array in arrays):
        raise ValueError(f"`volumes` must have axes zyx; got shapes {[array.shape for array in arrays]}")
    if not 1 < factor < math.inf:
        raise ValueError(f"`factor` {factor} must be above 1")
    if len(shape) not in (2, 3):
        raise ValueError(f"`patch_shape` {shape} must be y,x (isotropic) or z,y,x (upsampling)")
    if len(shape) == 2 and shape[0] == shape[1]:
        raise ValueError(
            f"`patch_shape` {shape}: rows and columns must differ in number, such as (64, 128), so that augmentation "
            "does not exchange the axis that is degraded"
        )


def _checked_psf(psf: npt.ArrayLike, n_dim: int) -> FloatArray:
    kernel = np.asarray(psf, dtype=np.float32)
    if kernel.ndim != n_dim or not np.isclose(kernel.sum(), 1, atol=1e-3):
        raise ValueError(
            f"`psf` of shape {kernel.shape} and sum {kernel.sum():.3g} must have {n_dim} axes and sum 1"
        )
    return kernel

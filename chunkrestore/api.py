"""The functions of an analysis script: arrays in, arrays out.

Dask arrays give lazy dask arrays; NumPy (or CuPy) arrays are processed at once, in one piece. Stores are
processed by `chunkrestore.run`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.operators.base import ImageOperator, LabelOperator

if TYPE_CHECKING:
    import dask.array as da

_DEFAULT_AXES = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}


def deconvolve(
    image: da.Array | np.ndarray,
    psf: np.ndarray,
    *,
    method: str = "richardson-lucy",
    iterations: int | None = None,
    depth: int | Sequence[int] | None = None,
    background: float = 0.0,
    axes: str | None = None,
    **parameters: Any,
) -> Any:
    """Deconvolve an image with its point spread function.

    Parameters
    ----------
    image
        Dask or NumPy array; uint8, uint16, int16 or float32; trailing axes ``zyx`` or ``yx``.
    psf
        Point spread function on the image's voxel grid, with as many axes as the image has spatial ones; a
        `chunkrestore.psf.varying.PsfField` if it changes with position (iterative methods).
    method
        ``"richardson-lucy"``, ``"gradient-consensus"``, ``"wiener-butterworth"``, ``"masked-wiener"``,
        ``"wiener"`` or ``"regularized-inverse"``; `chunkrestore.operators.methods` names their operators.
    iterations
        Number of iterations, or the most that are done where the method stops by itself; None: the
        method's default, 20 for Richardson-Lucy.
    depth
        Halo in voxels, one number or one per spatial axis; None derives it from PSF and iterations for a
        seam of at most 1e-3 of the dynamic range.
    background
        Camera offset and diffuse light, in input intensities; part of the model, not subtracted.
    axes
        Subset of ``"tczyx"``, one letter per dimension; by default ``yx``, ``zyx``, ``czyx`` or ``tczyx``.
    parameters
        Further parameters of the method's operator, such as ``acceleration``, ``total_variation``,
        ``saturation``, ``stop`` or ``regularization``.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        float32, same shape (and chunks), in input intensities above `background`.

    Raises
    ------
    ValueError
        If a parameter does not suit the image; nothing was computed then.
    """
    from chunkrestore.operators.methods import deconvolution

    operator = deconvolution(
        method, psf, iterations=iterations, background=background, depth=depth, **parameters
    )
    return _apply(operator, image, axes)


def restore(
    image: da.Array | np.ndarray,
    model: Any,
    *,
    normalization: tuple[float, float] | None = None,
    axes: str | None = None,
) -> Any:
    """Restore an image with a trained CARE network.

    Parameters
    ----------
    image
        As for `deconvolve`.
    model
        Folder of a trained CSBDeep CARE model, name of a shipped model (``"care3d-demo"``), or a model object.
    normalization
        Input intensities that the network sees as 0 and 1; None takes the 2nd and the 99.8th percentile of
        each whole volume, CSBDeep's own default.
    axes
        As for `deconvolve`.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        float32, same shape (and chunks), in input intensities.
    """
    from chunkrestore.operators.care import Care

    return _apply(Care(model, normalization=normalization), image, axes)


def segment(
    image: da.Array | np.ndarray,
    model: Any,
    *,
    prob_thresh: float | None = None,
    nms_thresh: float | None = None,
    normalization: tuple[float, float] | None = None,
    axes: str | None = None,
) -> Any:
    """Segment objects with a trained StarDist network.

    Parameters
    ----------
    image
        As for `deconvolve`.
    model
        Folder of a trained StarDist2D or StarDist3D model, name of a shipped model
        (``"stardist3d-demo"``), or a model object.
    prob_thresh, nms_thresh
        Object probability and overlap thresholds; None takes the model's own.
    normalization
        Input intensities that the network sees as 0 and 1; None takes the 1st and the 99.8th percentile
        of each whole volume.
    axes
        As for `deconvolve`.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        int32 instance labels, same shape (and chunks); 0 is background. The same objects, voxel by voxel,
        as one ``predict_instances`` call on the whole volume, numbered by position.
    """
    from chunkrestore.operators.stardist import StarDist

    operator = StarDist(model, prob_thresh=prob_thresh, nms_thresh=nms_thresh, normalization=normalization)
    return _apply(operator, image, axes)


def percentiles(image: da.Array | np.ndarray, q: Sequence[float] = (1.0, 99.8)) -> tuple[float, ...]:
    """Compute exact percentiles of a whole image, block by block.

    Parameters
    ----------
    image
        Dask or NumPy array; uint8, uint16, int16 or float32.
    q
        Percentiles, 0 to 100.

    Returns
    -------
    tuple of float
        As `numpy.percentile` of the array in memory; the same for every chunking.
    """
    from chunkrestore import statistics

    if hasattr(image, "dask"):
        from chunkrestore.lazy import lazy_statistics

        numbers = lazy_statistics(image, q).compute()
    else:
        numbers = statistics.of_array(image, q)
    return tuple(numbers[p] for p in q)


def _apply(operator: ImageOperator | LabelOperator, image: Any, axes: str | None) -> Any:
    axes = axes or _DEFAULT_AXES.get(image.ndim, "")
    if len(axes) != image.ndim or not re.fullmatch("t?c?z?yx", axes):
        raise ValueError(
            f"`axes` {axes!r} must be a subset of 'tczyx' in that order, ending in 'yx', with one letter per "
            f"axis of an image of shape {image.shape}"
        )
    if hasattr(image, "dask"):
        from chunkrestore.lazy import apply_image, apply_labels

        if isinstance(operator, LabelOperator):
            return apply_labels(operator, image, axes)
        return apply_image(operator, image, axes)
    from chunkrestore.backend import namespace

    n_lead = sum(axis in "tc" for axis in axes)
    planes = image.reshape((-1, *image.shape[n_lead:]))
    operator.check(planes.shape[1:], image.dtype)
    results = [operator(planes[i]) for i in range(planes.shape[0])]
    return namespace(results[0]).stack(results).reshape(image.shape)

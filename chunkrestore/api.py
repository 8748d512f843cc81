"""The functions of an analysis script: arrays in, arrays out.

Dask arrays give lazy dask arrays; NumPy (or CuPy) arrays are processed at once, in one piece. Stores are
processed by `chunkrestore.run`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from chunkrestore.operators.base import ImageOperator, LabelOperator, channels_of

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
    output: Literal["mean", "scale"] = "mean",
    upsample: float | None = None,
    isotropic: float | None = None,
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
    output
        ``"scale"`` returns the scale of the distribution that a probabilistic model predicts for every voxel, and not
        its mean.
    upsample
        Planes per plane that are interpolated before a 3-D network restores the volume, as CSBDeep's UpsamplingCARE
        does.
    isotropic
        Planes per plane that are interpolated before a 2-D network restores all sections along z, as CSBDeep's
        IsotropicCARE does.
    axes
        As for `deconvolve`.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        float32, in input intensities; same shape and chunks, but ``round(n * factor)`` planes with `upsample` or
        `isotropic`.
    """
    from chunkrestore.operators.axial import care_of

    return _apply(
        care_of(model, upsample=upsample, isotropic=isotropic, normalization=normalization, output=output),
        image,
        axes,
    )


def segment(
    image: da.Array | np.ndarray,
    model: Any,
    *,
    prob_thresh: float | None = None,
    nms_thresh: float | None = None,
    normalization: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    axes: str | None = None,
    **parameters: Any,
) -> Any:
    """Segment objects with a trained StarDist network.

    Parameters
    ----------
    image
        As for `deconvolve`. A network that takes several channels, such as those of an RGB image, takes all that
        the image has.
    model
        Folder of a trained StarDist2D or StarDist3D model, name of a shipped model
        (``"stardist3d-demo"``), or a model object.
    prob_thresh, nms_thresh
        Object probability and overlap thresholds; None takes the model's own.
    normalization
        Input intensities that the network sees as 0 and 1, or one such pair per channel that it takes; None
        takes the 1st and the 99.8th percentile of each whole volume and channel.
    axes
        As for `deconvolve`; channels may also come last (``"yxc"``).
    parameters
        Further parameters of `chunkrestore.operators.stardist.StarDist`, such as ``scale`` or ``skip_below``.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        int32 instance labels, same shape (and chunks) but for channels that the network takes together; 0 is
        background. The same objects, voxel by voxel, as one ``predict_instances`` call on the whole volume,
        numbered by position.
    """
    from chunkrestore.operators.stardist import StarDist

    operator = StarDist(
        model, prob_thresh=prob_thresh, nms_thresh=nms_thresh, normalization=normalization, **parameters
    )
    if axes is not None and axes.endswith("c") and len(axes) == image.ndim:
        axes, image = _channels_first(axes, image)
    return _apply(operator, image, axes)


def classify(
    image: da.Array | np.ndarray,
    model: Any,
    *,
    by: Literal["objects", "voxels"] | None = None,
    normalization: tuple[float, float] | tuple[tuple[float, float], ...] | None = None,
    axes: str | None = None,
    **parameters: Any,
) -> Any:
    """Tell the class of every voxel.

    Parameters
    ----------
    image
        As for `segment`.
    model
        A Keras model that predicts probabilities of classes per voxel, in a file (``.keras``, ``.h5``), or a StarDist
        model that knows classes.
    by
        For StarDist models: ``"objects"``, the default, gives every voxel of an object the object's class;
        ``"voxels"`` takes the probabilities that the network predicts for each voxel.
    normalization
        As for `segment`.
    axes
        As for `segment`.
    parameters
        Further parameters of `chunkrestore.operators.semantic.Semantic` or
        `chunkrestore.operators.semantic.StarDistClasses`, such as ``threshold``, ``depth`` or ``prob_thresh``.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        uint8 classes, same shape (and chunks) but for channels that the network takes together; 0 is background. The
        same, voxel by voxel, as the network's prediction of the whole volume.
    """
    from chunkrestore.operators.semantic import classifier

    operator = classifier(model, by=by, normalization=normalization, **parameters)
    if axes is not None and axes.endswith("c") and len(axes) == image.ndim:
        axes, image = _channels_first(axes, image)
    return _apply(operator, image, axes)


def apply(
    operator: ImageOperator | LabelOperator, image: da.Array | np.ndarray, *, axes: str | None = None
) -> Any:
    """Apply an operator, such as a filter or a watershed, to an array.

    Parameters
    ----------
    operator
        Such as ``chunkrestore.Gaussian(1.5)`` or ``chunkrestore.Watershed()``.
    image
        As for `deconvolve`.
    axes
        As for `deconvolve`; every time point and channel is a volume of its own.

    Returns
    -------
    dask.array.Array or numpy.ndarray
        Float32 of an image operator, int32 of a label operator, same shape (and chunks) unless the operator says
        otherwise.

    Raises
    ------
    ValueError
        If the operator cannot process such an image; nothing was computed then.
    """
    return _apply(operator, image, axes)


def merge_labels(
    labels: da.Array,
    *,
    depth: int | Sequence[int] = 0,
    by: str = "touching",
    threshold: float = 0.5,
    connectivity: int = 1,
    axes: str | None = None,
) -> da.Array:
    """Make one label image of chunks that were labelled each for itself, by whatever method.

    Parameters
    ----------
    labels
        Dask array of integers; 0 is background. Ids may repeat in other chunks and have gaps. A chunk is what its
        core and `depth` voxels around it were labelled as, the volume's border aside:
        ``overlap(image, depth, boundary="none").map_blocks(label)`` with `dask.array.overlap.overlap`.
    depth
        Voxels that neighbouring chunks share on each side of their border, one number or one per spatial axis.
    by
        When labels of two chunks are one object:

        - ``"touching"``: they own neighbouring voxels across the border of their cores. With connected components in
          every chunk that is `scipy.ndimage.label` of the whole, ids included. Objects that touch become one.
        - ``"iou"``: in the region that both chunks have seen, their intersection over union is larger than
          `threshold`. Every label shows in the core of its chunk, and nowhere else: what a chunk labelled in its halo
          alone is left to the neighbour whose core it is. Where chunks disagree, each keeps its labels in its core.
        - ``"centroid"``: the chunk whose core holds the centroid of what it saw of an object keeps it whole, also where
          it reaches into other cores, and all other chunks drop it. Where two kept objects claim a voxel, the one that
          begins first in raster order has it. Objects must on no axis be longer than `depth`: chunks see different
          parts of a longer one, and, as with one that they label differently, several may keep theirs, or none.
    threshold
        For ``"iou"``: at least 0 and below 1. From 0.5 on, matches of two chunks are one to one; below, a label may
        match several, and all of them become one object.
    connectivity
        For ``"touching"``: voxels are neighbours if they differ in at most this many axes.
    axes
        As for `deconvolve`; every time point and channel is a volume of its own.

    Returns
    -------
    dask.array.Array
        int32, of the shape and chunks of the cores. Ids run from 1 without gaps, in raster order of the objects' first
        voxels, in every volume.

    Raises
    ------
    TypeError
        If `labels` is no dask array of integers.
    ValueError
        If a parameter is out of range or the chunks are thinner than `depth`; nothing was computed then. While
        computing: if a chunk has negative labels, or another shape than its metadata say.

    Notes
    -----
    Every chunk is computed once. Until all objects are joined, its labels are kept as runs of equal voxels: a tenth
    of their memory in int32 where objects are some five voxels wide, less where they are larger.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from scipy import ndimage
    >>> mask = da.from_array(np.array([[1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1]]) > 0, chunks=(2, 3))
    >>> labels = mask.map_blocks(lambda m: ndimage.label(m)[0], dtype=np.int32)
    >>> merge_labels(labels).compute()
    array([[1, 1, 1, 0, 2, 0],
           [0, 0, 1, 1, 0, 3]], dtype=int32)
    """
    from chunkrestore.lazy_labels import merge_planes
    from chunkrestore.operators.rules import rule

    if not hasattr(labels, "dask") or labels.dtype.kind not in "iu":
        found = f"{type(labels).__name__} of {getattr(labels, 'dtype', 'no dtype')}"
        raise TypeError(f"`labels` must be a dask array of integers, got {found}")
    axes = _checked_axes(labels, axes)
    return merge_planes(labels, rule(by, threshold=threshold, connectivity=connectivity), depth, axes)


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
    axes = _checked_axes(image, axes)
    if hasattr(image, "dask"):
        from chunkrestore.lazy import apply_image, apply_labels

        if isinstance(operator, LabelOperator):
            return apply_labels(operator, image, axes)
        return apply_image(operator, image, axes)
    from chunkrestore.backend import namespace

    n_lead = sum(axis in "tc" for axis in axes)
    lead, spatial = image.shape[:n_lead], image.shape[n_lead:]
    operator.check(spatial, image.dtype)
    if channels_of(operator) > 1:
        from chunkrestore.lazy import channel_axis

        axis = channel_axis(operator, image.shape, axes)
        image, lead = namespace(image).moveaxis(image, axis, -1), lead[:axis]
    planes = image.reshape((-1, *image.shape[len(lead) :]))
    results = [operator(planes[i]) for i in range(planes.shape[0])]
    return namespace(results[0]).stack(results).reshape((*lead, *results[0].shape))


def _channels_first(axes: str, image: Any) -> tuple[str, Any]:
    """Return axes and image with the channels, which are last, before the spatial axes."""
    place = int(axes.startswith("t"))
    order = [*range(place), image.ndim - 1, *range(place, image.ndim - 1)]
    return "".join(axes[i] for i in order), image.transpose(order)


def _checked_axes(image: Any, axes: str | None) -> str:
    axes = axes or _DEFAULT_AXES.get(image.ndim, "")
    if len(axes) != image.ndim or not re.fullmatch("t?c?z?yx", axes):
        raise ValueError(
            f"`axes` {axes!r} must be a subset of 'tczyx' in that order, ending in 'yx', with one letter per "
            f"axis of an image of shape {image.shape}"
        )
    return axes

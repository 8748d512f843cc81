"""What StarDist networks learn from labels: object probability, ray lengths and classes; proportions of objects."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from chunkrestore.train.patches import Patches

Labels = npt.NDArray[np.int32]


def targets(
    config: Any, labels: Labels, classes: Labels | None = None
) -> tuple[npt.NDArray[np.float32], ...]:
    """Return what a StarDist network should make of one patch.

    Parameters
    ----------
    config
        StarDist's ``Config2D`` or ``Config3D``.
    labels
        int32, one patch.
    classes
        Class of every voxel (-1: not known), if the network has classes.

    Returns
    -------
    tuple of numpy.ndarray
        float32 on the grid, channels last: object probability (1); ray lengths in voxels with the probability as
        their weight (``n_rays + 1``); classes with background first, if the network has them (``n_classes + 1``).
    """
    from stardist.geometry import star_dist, star_dist3D
    from stardist.rays3d import rays_from_json
    from stardist.utils import edt_prob

    labels = np.ascontiguousarray(_small_ids(labels))
    on_grid = tuple(slice(None, None, g) for g in config.grid)
    with warnings.catch_warnings():
        # A patch inside one object: StarDist then takes the patch's faces for the object's.
        warnings.filterwarnings("ignore", message="EDT of constant label image")
        if config.n_dim == 2:
            probability = edt_prob(labels)
            distance = star_dist(labels, config.n_rays, grid=config.grid, mode="cpp")
        else:
            probability = edt_prob(labels, anisotropy=config.anisotropy)
            distance = star_dist3D(labels, rays_from_json(config.rays_json), grid=config.grid, mode="cpp")
    probability = probability[on_grid][..., np.newaxis].astype(np.float32)
    outputs = (probability, np.concatenate([distance, probability], axis=-1).astype(np.float32))
    if classes is None:
        return outputs
    return (*outputs, _one_hot(labels[on_grid], classes[on_grid], config.n_classes))


def _one_hot(labels: Labels, classes: Labels, n_classes: int) -> npt.NDArray[np.float32]:
    """Return 1 in the channel of a voxel's class; -1 in those of all classes where it is not known."""
    inside = labels > 0
    result = np.zeros((*labels.shape, n_classes + 1), np.float32)
    result[..., 0] = ~inside
    for number in range(1, n_classes + 1):
        result[..., number] = inside & (classes == number)
    result[inside & (classes < 1), 1:] = -1
    return result


def _small_ids(labels: npt.NDArray[Any]) -> Labels:
    """Return labels with ids that are not much larger than their number: lists are as long as the largest."""
    if labels.size and labels.max() > labels.size:
        ids, positions = np.unique(labels, return_inverse=True)
        first = 1 - int(ids[0] == 0)
        return (positions.reshape(labels.shape) + first).astype(np.int32)
    return labels.astype(np.int32, copy=False)


def measured_anisotropy(patches: Patches) -> tuple[float, ...]:
    """Return how many times shorter the objects of patches are per axis than along their longest one.

    The median extents of objects that no face of a patch cuts (all objects, if every one is cut).

    Raises
    ------
    ValueError
        If there is no object.
    """
    from scipy.ndimage import find_objects

    whole: list[list[int]] = []
    cut: list[list[int]] = []
    for labels in patches.y:
        for box in find_objects(_small_ids(labels)):
            if box is not None:
                is_whole = all(s.start > 0 and s.stop < n for s, n in zip(box, labels.shape, strict=True))
                (whole if is_whole else cut).append([s.stop - s.start for s in box])
    if not whole and not cut:
        raise ValueError(
            'the patches hold no object to measure; give `anisotropy` as numbers instead of "extents"'
        )
    extents = np.median(whole or cut, axis=0)
    return tuple(round(float(extents.max() / extent), 3) for extent in extents)

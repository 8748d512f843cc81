"""Functions from image to labels, as users have them, in a module that workers can import."""

import numpy as np
from scipy import ndimage

CALLS = []
"""Shapes that `counted` was called with in this process."""


def bright(image):
    """Label connected components of bright voxels."""
    return ndimage.label(image > 100)[0]


def cells(image):
    """Split what is bright by a watershed from its peaks; ids are as good as random."""
    from skimage.segmentation import watershed

    peaks = (ndimage.maximum_filter(image, 5) == image) & (image > 100)
    markers, n_markers = ndimage.label(peaks, np.ones((3,) * image.ndim))
    names = np.concatenate([[0], 7 * np.arange(n_markers, 0, -1) + image.size % 5])
    return names[watershed(255 - image.astype(np.int32), markers, mask=image > 40)]


def counted(image):
    """Do as `cells` does, and count."""
    CALLS.append(image.shape)
    return cells(image)


def told(image):
    """Label as the image says: every block under names of its own."""
    values, inverse = np.unique(image, return_inverse=True)
    names = (
        np.random.default_rng([*image.shape, len(values)]).permutation(3 * len(values) + 1)[: len(values)] + 1
    )
    return np.where(values > 0, names, 0)[inverse].reshape(image.shape).astype(np.uint16)


def in_place(image):
    """Threshold within the image that was given, and label that."""
    image[image < 100] = 0
    return ndimage.label(image)[0]


def first_channel_within_second(image):
    """Label the first channel where the second is bright."""
    return ndimage.label((image[..., 0] > 0.5) & (image[..., 1] > 0.5))[0]


def cropped(image):
    return bright(image)[1:]


def floats(image):
    return bright(image).astype(np.float32)


def mask(image):
    return image > 100


def negative(image):
    return -bright(image)


def with_details(image):
    return bright(image), {"prob": []}


def broken(image):
    raise ZeroDivisionError("no such luck")


broken_by_type = 3

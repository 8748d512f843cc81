"""What a job reads where its first operator sees the volume at another sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.passes import Pass
from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.ome_zarr.resampled import ResampledReader
from chunkrestore.operators.base import Operator
from chunkrestore.operators.sampling import first_sampling, sampling_of

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import RegionReader


def as_seen(operators: Sequence[Operator], image: OmeZarrImage) -> OmeZarrImage:
    """Return the image as a chain of operators sees it: as it is, or resampled.

    Raises
    ------
    ValueError
        If an operator other than the first one changes the sampling, or the first one does not suit the image.
    """
    sampling = first_sampling(operators)
    if sampling is None:
        return image
    operators[0].check(image.spatial_shape, np.dtype(image.dtype))
    return image.resampled(sampling.scale, dtype=sampling.dtype)


def measured(work: Pass, source: RegionReader) -> tuple[RegionReader, BlockGrid]:
    """Return what the numbers of a pass are taken of, and blocks of that: its source, or that before resampling."""
    sampling = sampling_of(work.operators[0])
    if sampling is None or not sampling.measures_original or not isinstance(source, ResampledReader):
        return source, work.grid
    shape = source.original.spatial_shape
    blocks = (min(b, n) for b, n in zip(work.block_shape, shape, strict=True))
    return source.original, BlockGrid.regular(shape, tuple(blocks))

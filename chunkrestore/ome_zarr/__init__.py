"""Read and write OME-Zarr: the only place that opens stores. It knows no operator.

Reading: `open_image` gives an `OmeZarrImage` (lazy data, metadata, parts), `OmeZarrImage.source` a
`RegionReader` for tasks. Writing block by block: `create_image` or `create_labels`, `RegionWriter.write`,
the `pyramid_blocks`, and `publish` last. Writing whole arrays: `write_image`, `write_labels`.
"""

from chunkrestore.ome_zarr.arrays import IMAGE_DTYPES, CorruptChunkError, RegionReader, check_dtype
from chunkrestore.ome_zarr.convert import convert_tiff
from chunkrestore.ome_zarr.image import Level, OmeZarrImage, select_channel
from chunkrestore.ome_zarr.info import facts, info
from chunkrestore.ome_zarr.labels import LabelsWriter, create_labels, open_writer, write_labels
from chunkrestore.ome_zarr.pyramid import (
    PyramidBlock,
    build_block,
    build_pyramid,
    downsample_labels,
    downsample_mean,
    pyramid_blocks,
)
from chunkrestore.ome_zarr.read import open_image
from chunkrestore.ome_zarr.store import clean_partial
from chunkrestore.ome_zarr.target import RegionWriter
from chunkrestore.ome_zarr.write import create_image, write_image
from chunkrestore.ome_zarr.writer import ImageWriter

__all__ = [
    "IMAGE_DTYPES",
    "CorruptChunkError",
    "ImageWriter",
    "LabelsWriter",
    "Level",
    "OmeZarrImage",
    "PyramidBlock",
    "RegionReader",
    "RegionWriter",
    "build_block",
    "build_pyramid",
    "check_dtype",
    "clean_partial",
    "convert_tiff",
    "create_image",
    "create_labels",
    "downsample_labels",
    "downsample_mean",
    "facts",
    "info",
    "open_image",
    "open_writer",
    "pyramid_blocks",
    "select_channel",
    "write_image",
    "write_labels",
]

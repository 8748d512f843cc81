"""Read and write OME-Zarr: the only place that opens stores. It knows no operator.

Reading: `open_image` gives an `OmeZarrImage` (lazy data, metadata, parts), `open_source` one of a TIFF file or a
folder of planes as well, `OmeZarrImage.source` a `RegionReader` for tasks. Writing block by block: `create_image` or
`create_labels`, `RegionWriter.write`, the `pyramid_blocks`, and `publish` last. Writing whole arrays:
`write_image`, `write_labels`, and `export_tiff` for an OME-TIFF.
"""

from chunkrestore.ome_zarr.arrays import IMAGE_DTYPES, RegionReader, check_dtype
from chunkrestore.ome_zarr.collection import Collection, open_collection
from chunkrestore.ome_zarr.damage import CorruptChunkError
from chunkrestore.ome_zarr.downsampling import downsample_labels, downsample_mean
from chunkrestore.ome_zarr.image import Level, OmeZarrImage, select_channel
from chunkrestore.ome_zarr.info import describe, facts, facts_of, info
from chunkrestore.ome_zarr.label_attributes import class_colors, distinct_colors
from chunkrestore.ome_zarr.labels import LabelsWriter, create_labels, open_writer, write_labels
from chunkrestore.ome_zarr.members import Field
from chunkrestore.ome_zarr.pyramid import (
    PyramidBlock,
    build_block,
    build_pyramid,
    pyramid_blocks,
)
from chunkrestore.ome_zarr.read import open_image
from chunkrestore.ome_zarr.source import open_source
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.store import clean_partial
from chunkrestore.ome_zarr.target import RegionWriter
from chunkrestore.ome_zarr.tiff.export import export_tiff
from chunkrestore.ome_zarr.write import create_image, write_image
from chunkrestore.ome_zarr.writer import ImageWriter

__all__ = [
    "IMAGE_DTYPES",
    "Collection",
    "CorruptChunkError",
    "Field",
    "ImageWriter",
    "LabelsWriter",
    "Level",
    "OmeZarrImage",
    "PyramidBlock",
    "RegionReader",
    "RegionWriter",
    "Storage",
    "build_block",
    "build_pyramid",
    "check_dtype",
    "class_colors",
    "clean_partial",
    "create_image",
    "create_labels",
    "describe",
    "distinct_colors",
    "downsample_labels",
    "downsample_mean",
    "export_tiff",
    "facts",
    "facts_of",
    "info",
    "open_collection",
    "open_image",
    "open_source",
    "open_writer",
    "pyramid_blocks",
    "select_channel",
    "write_image",
    "write_labels",
]

"""What an array's metadata says of its bytes, where that is simple enough to be done chunk by chunk.

Pure JSON in, no zarr: the document has passed `chunkrestore.ome_zarr.limits.check_array`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chunkrestore.ome_zarr.limits import COMPRESSORS
from chunkrestore.ome_zarr.shards import Index, ShardIndex, per_shard

Json = dict[str, Any]

_BLOSC_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


@dataclass(frozen=True)
class Encoding:
    """How voxels become bytes: C order, at most one compressor, at most one checksum after it."""

    chunk: Index
    """Shape of what is encoded at once."""
    unit: Index
    """Shape of what is one file."""
    dtype: np.dtype[Any]
    """In the byte order of the store."""
    compressor: Json | None
    """Configuration of a numcodecs codec."""
    typesize: int | None
    """Bytes that Blosc shuffles together, if the metadata says so; otherwise an item's."""
    has_checksum: bool
    """Whether a CRC-32C follows every chunk."""
    index: ShardIndex | None
    """Of shards; None if every chunk is a file."""

    @property
    def chunk_nbytes(self) -> int:
        """Of a decoded chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize


def encoding_of(document: Json, zarr_format: int) -> Encoding | None:
    """Return how an array is encoded, or None if it takes more than `Encoding` can say.

    Parameters
    ----------
    document
        ``zarr.json`` or ``.zarray``.
    zarr_format
        2 or 3.
    """
    return _v2(document) if zarr_format == 2 else _v3(document)


def _v2(document: Json) -> Encoding | None:
    if document.get("filters") or document.get("order", "C") != "C":
        return None
    chunk, dtype = tuple(document["chunks"]), np.dtype(document["dtype"])
    return Encoding(chunk, chunk, dtype, document.get("compressor"), None, has_checksum=False, index=None)


def _v3(document: Json) -> Encoding | None:
    unit = chunk = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = [_named(codec) for codec in document["codecs"]]
    index = None
    if codecs[0][0] == "sharding_indexed":
        settings = codecs[0][1]
        chunk = tuple(settings["chunk_shape"])
        codecs = [_named(codec) for codec in settings["codecs"]]
        index = _shard_index(settings, per_shard(unit, chunk))
        if index is None:
            return None
    dtype = _dtype(document["data_type"], codecs)
    last = [name for name, _ in codecs[-1:]]
    compressors = codecs[1 : len(codecs) - (last == ["crc32c"])]
    if dtype is None or len(compressors) > 1:
        return None
    compressor, typesize = None, None
    if compressors:
        name, settings = compressors[0]
        name = name.removeprefix("numcodecs.")
        if name not in COMPRESSORS:
            return None
        compressor, typesize = _numcodec(name, settings)
    return Encoding(chunk, unit, dtype, compressor, typesize, last == ["crc32c"], index)


def _dtype(name: str, codecs: Sequence[tuple[str, Json]]) -> np.dtype[Any] | None:
    """Return the dtype in the byte order that the first codec gives it, or None if that is another one."""
    if not codecs or codecs[0][0] not in ("bytes", "endian"):
        return None
    return np.dtype(name).newbyteorder(">" if codecs[0][1].get("endian") == "big" else "<")


def _shard_index(settings: Json, lengths: Index) -> ShardIndex | None:
    codecs = [_named(codec) for codec in settings.get("index_codecs", ["bytes", "crc32c"])]
    names = [name for name, _ in codecs]
    if names not in (["bytes"], ["bytes", "crc32c"]) or codecs[0][1].get("endian") == "big":
        return None
    at_end = settings.get("index_location", "end") == "end"
    return ShardIndex(lengths, at_end=at_end, has_checksum="crc32c" in names)


def _numcodec(name: str, settings: Json) -> tuple[Json, int | None]:
    """Return a compressor as numcodecs configures it, and the size of what Blosc shuffles."""
    config: Json = {**settings, "id": name}  # whatever the settings call themselves
    typesize = config.pop("typesize", None)
    if name == "blosc":
        shuffle = config.get("shuffle")
        config["shuffle"] = _BLOSC_SHUFFLES.get(str(shuffle), shuffle)
    return config, typesize


def _named(codec: Any) -> tuple[str, Json]:
    """Return name and settings of a codec."""
    return (codec, {}) if isinstance(codec, str) else (codec["name"], codec.get("configuration") or {})

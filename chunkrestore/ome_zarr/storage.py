"""How arrays are stored: version, chunks, shards and codecs, checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.layout import default_chunks, default_shards, level_chunks, shards_above
from chunkrestore.ome_zarr.limits import check_array
from chunkrestore.ome_zarr.store import Json

COMPRESSIONS = {"zstd": 3, "lz4": 5, "gzip": 5, "none": 0}
"""Codecs and their default levels. The first two are Blosc's with bitshuffle, smaller and faster than plain zstd."""

_BLOSC = ("zstd", "lz4")
_HIGHEST = 9
_LARGEST_CHUNK_NBYTES = 2**31 - 17
"""Blosc's largest buffer."""


@dataclass(frozen=True)
class Storage:
    """How the arrays of an image are stored."""

    version: str = "0.5"
    """OME-Zarr version: ``"0.5"`` (zarr v3) or ``"0.4"`` (zarr v2, without shards and checksums)."""
    chunks: Sequence[int] | None = None
    """Voxels per spatial axis; 64 each (512 in two dimensions) by default, 1 on the other axes."""
    shards: Sequence[int] | Literal["auto"] | None = None
    """Voxels per spatial axis of what is stored as one file; None: every chunk is a file; ``"auto"``: as
    `chunkrestore.ome_zarr.layout.default_shards` says, and none where `chunks` are given or for 0.4."""
    compression: str = "zstd"
    """``"zstd"``, ``"lz4"`` (faster and about a tenth larger), ``"gzip"`` or ``"none"`` (for readers without
    Blosc), with a level from 1 to 9 after a colon if wanted: ``"zstd:9"``."""
    checksums: bool = False
    """Whether every chunk carries a CRC-32C, so that a flipped bit is an error and not another value."""

    def __post_init__(self) -> None:
        if self.version not in metadata.VERSIONS:
            known = ", ".join(metadata.VERSIONS)
            raise ValueError(f"`version` {self.version!r} cannot be written; use one of {known}")
        if isinstance(self.shards, str) and self.shards != "auto":
            raise ValueError(f"`shards` {self.shards!r} must be lengths per spatial axis, 'auto' or None")
        has_shards = self.shards is not None and self.shards != "auto"
        for name, value in (("shards", has_shards), ("checksums", self.checksums)):
            if value and self.zarr_format == 2:
                raise ValueError(f"`{name}` need OME-Zarr 0.5; leave them out or write version '0.5'")
        self.codec  # noqa: B018  # raises

    @property
    def zarr_format(self) -> int:
        """2 or 3."""
        return metadata.VERSIONS[self.version]

    @property
    def codec(self) -> tuple[str, int]:
        """Name and level of `compression`."""
        name, _, level = str(self.compression).partition(":")
        if name not in COMPRESSIONS:
            known = ", ".join(COMPRESSIONS)
            raise ValueError(f"`compression` {self.compression!r} is unknown; use one of {known}")
        if not level and str(self.compression) == name:
            return name, COMPRESSIONS[name]
        if name == "none" or not (level.isdecimal() and 1 <= int(level) <= _HIGHEST):
            raise ValueError(
                f"`compression` {self.compression!r} has no such level; use 1 to {_HIGHEST}, as in 'zstd:9'"
            )
        return name, int(level)

    def settled(
        self, lengths: Sequence[int], shape: Sequence[int], dtype: np.dtype[Any], where: str
    ) -> Storage:
        """Return the same with the shards decided.

        Parameters
        ----------
        lengths, shape
            Of level 0: on all axes, and on the spatial ones, which are the last.
        dtype
            Of the voxels.
        where
            Of the image, for messages.

        Raises
        ------
        ValueError
            If lengths do not fit the shape, or chunks or shards are too large or too many to be read again.
        """
        shards = self.shards
        if isinstance(shards, str):
            is_default = self.zarr_format == 3 and self.chunks is None
            n_planes = math.prod(lengths) // math.prod(shape)
            shards = default_shards(shape, dtype.itemsize, n_planes=n_planes) if is_default else None
        chunks, unit = level_chunks(shape, self.chunks, shards)
        _check(shape, chunks, unit, dtype, where)
        return replace(self, shards=shards)

    def above(self, factors: Sequence[int]) -> Storage:
        """Return how a level is stored whose voxels cover `factors` voxels of one that is stored like this.

        Chunks stay; shards cover the same part of the volume, so that they are written with it.
        """
        if self.shards is None or isinstance(self.shards, str):
            return self
        chunks = self.chunks if self.chunks is not None else default_chunks(len(factors))
        return replace(self, shards=shards_above(self.shards, chunks, factors))

    def numcodec(self) -> Any:
        """Return the compressor as one of numcodecs, whose bytes are those of either zarr format; None: none."""
        from numcodecs import Blosc, GZip

        name, level = self.codec
        if name in _BLOSC:
            return Blosc(name, level, Blosc.BITSHUFFLE)
        return GZip(level) if name == "gzip" else None

    def create_array(
        self,
        path: str,
        lead: Sequence[int],
        shape: Sequence[int],
        dtype: np.dtype[Any],
        names: list[str],
        attributes: Json,
    ) -> None:
        """Create one level, empty.

        Parameters
        ----------
        path
            Of the array.
        lead, shape
            Lengths on the time and channel axes, and in space.
        dtype
            Of the voxels.
        names
            Of all axes.
        attributes
            Of the array.
        """
        import zarr

        ones = (1,) * len(lead)
        shards = None if isinstance(self.shards, str) else self.shards
        chunks, unit = level_chunks(shape, self.chunks, shards)
        options: dict[str, Any]
        if self.zarr_format == 2:
            options = {
                "compressors": self.numcodec(),
                "chunk_key_encoding": {"name": "v2", "separator": "/"},
                "attributes": {**attributes, "_ARRAY_DIMENSIONS": names},
            }
        else:
            options = {
                "compressors": self._v3_codecs(dtype.itemsize),
                "dimension_names": names,
                "shards": None if unit is None else (*ones, *unit),
                "attributes": attributes,
            }
        zarr.create_array(
            stores.array_store(path),
            shape=(*lead, *shape),
            chunks=(*ones, *chunks),
            dtype=dtype.newbyteorder("<"),
            fill_value=0,
            zarr_format=self.zarr_format,
            **options,
        )

    def _v3_codecs(self, itemsize: int) -> list[Any]:
        """Return what turns the bytes of a chunk into what is stored."""
        from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

        name, level = self.codec
        codecs: list[Any] = []
        if name in _BLOSC:
            codecs.append(BloscCodec(cname=name, clevel=level, shuffle="bitshuffle", typesize=itemsize))
        elif name == "gzip":
            codecs.append(GzipCodec(level=level))
        # After the compressor: damage is found before anything is decompressed.
        return [*codecs, Crc32cCodec()] if self.checksums else codecs


def _check(
    shape: Sequence[int], chunks: Sequence[int], unit: Sequence[int] | None, dtype: np.dtype[Any], where: str
) -> None:
    """Raise if an array of these lengths could not be stored, or not be read again."""
    inner, whole = list(map(int, chunks)), list(map(int, unit or chunks))
    nbytes = math.prod(inner) * dtype.itemsize
    if nbytes > _LARGEST_CHUNK_NBYTES:
        raise ValueError(
            f"`chunks` {inner} take {nbytes} bytes each, the limit of codecs is {_LARGEST_CHUNK_NBYTES}; use smaller "
            "ones"
        )
    sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": inner, "codecs": []}}
    document = {
        "shape": list(map(int, shape)),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "codecs": [sharding] if unit is not None else [],
        "fill_value": 0,
    }
    try:
        check_array(document, 3, where)
    except ValueError as error:
        raise ValueError(str(error).replace("cannot be opened", "could not be opened again")) from None

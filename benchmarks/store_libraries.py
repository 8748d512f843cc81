"""Arrays as several libraries open them, for `store_throughput`: how to write a region, and how to read one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore.grid import Slices

LEVELS = {"lz4": 5, "zstd": 3}
OURS = "chunkrestore"


@dataclass(frozen=True)
class Layout:
    """How the arrays of all contenders are stored."""

    codec: str
    chunk: int
    shard: int | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.codec}, chunk {self.chunk}, shard {self.shard}"


@dataclass(frozen=True)
class Opened:
    """An array of one library."""

    write: Callable[[Slices, np.ndarray], Any]
    read: Callable[[Slices], np.ndarray]


def with_ours(path: Path, writable: bool) -> Opened:
    """Open an array by this package."""
    from chunkrestore.ome_zarr import RegionReader, RegionWriter

    handle = (RegionWriter if writable else RegionReader).at(str(path), "", "zyx")
    write = getattr(handle, "write", None)
    return Opened(lambda region, data: write(0, 0, region, data), lambda region: handle.read(0, 0, region))


def with_zarr(path: Path, writable: bool, pipeline: str | None = None) -> Opened:
    """Open an array by zarr-python, perhaps with another codec pipeline."""
    import zarr

    with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
        array = zarr.open_array(str(path), mode="r+" if writable else "r")
    return Opened(array.__setitem__, array.__getitem__)


def with_zarrs(path: Path, writable: bool) -> Opened:
    """Open an array by zarr-python over its Rust codec pipeline."""
    import zarrs  # noqa: F401

    return with_zarr(path, writable, "zarrs.ZarrsCodecPipeline")


def with_fused(path: Path, writable: bool) -> Opened:
    """Open an array by the synchronous pipeline of newer zarr-python."""
    from zarr.core.codec_pipeline import FusedCodecPipeline  # noqa: F401

    return with_zarr(path, writable, "zarr.core.codec_pipeline.FusedCodecPipeline")


def with_tensorstore(path: Path, writable: bool) -> Opened:
    """Open an array by tensorstore."""
    import tensorstore

    kvstore = {"driver": "file", "path": str(path)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, write=writable, read=True).result()
    return Opened(
        lambda region, data: array[region].write(data).result(), lambda region: array[region].read().result()
    )


OPENERS: dict[str, Callable[[Path, bool], Opened]] = {
    OURS: with_ours,
    "zarr-python": with_zarr,
    "zarr-python, fused": with_fused,
    "zarrs": with_zarrs,
    "tensorstore": with_tensorstore,
}


def create(path: Path, layout: Layout) -> None:
    """Create an array that all contenders can write."""
    import zarr
    from zarr.codecs import BloscCodec

    codec = BloscCodec(cname=layout.codec, clevel=LEVELS[layout.codec], shuffle="bitshuffle", typesize=2)
    zarr.create_array(
        str(path),
        shape=layout.shape,
        dtype="uint16",
        chunks=(layout.chunk,) * 3,
        shards=(layout.shard,) * 3 if layout.shard else None,
        compressors=codec,
        fill_value=0,
    )


def available(folder: Path) -> list[str]:
    """Return the contenders that are installed."""
    create(folder / "trial", Layout("lz4", 64, None, (64, 64, 64)))
    found = []
    for name, opener in OPENERS.items():
        try:
            opener(folder / "trial", True)
        except ImportError:
            continue
        found.append(name)
    shutil.rmtree(folder / "trial")
    return found

"""What a store holds, for people and for scripts."""

from __future__ import annotations

import math
from typing import Any

from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.metadata import OWN_KEY


def facts(image: OmeZarrImage) -> dict[str, Any]:
    """Return what `image` holds as JSON-compatible values, from its metadata alone."""
    return {
        "path": image.path,
        "version": image.version or None,
        "kind": "labels" if image.is_labels else "image",
        "axes": image.axes,
        "shape": list(image.shape),
        "dtype": image.dtype.name,
        "nbytes": math.prod(image.shape) * image.dtype.itemsize,
        "voxel_size_um": list(image.voxel_size),
        "calibrated": image.calibrated,
        "translation_um": list(image.translation),
        "channels": list(image.channels) if not image.is_labels else [],
        "labels": list(image.labels),
        "levels": [
            {
                "path": level.path,
                "shape": list(level.shape),
                "voxel_size_um": list(level.voxel_size),
                "chunks": list(level.reader.chunks),
                "write_unit": list(level.reader.write_unit),
            }
            for level in image.levels
        ],
        "provenance": image.others.get(OWN_KEY),
    }


def info(image: OmeZarrImage) -> str:
    """Return what `image` holds as a few lines of text."""
    known = facts(image)
    size = " x ".join(f"{v:g}" for v in image.voxel_size)
    unit = "um" if image.calibrated else "um (assumed: the store names no unit)"
    version = f"OME-Zarr {known['version']}" if known["version"] else "plain zarr array"
    lines = [
        f"{image.path}: {version}, {known['kind']}",
        f"  axes        {image.axes}",
        f"  shape       {_times(image.shape)} {image.dtype.name}, {_bytes(known['nbytes'])}",
        f"  voxel size  {size} {unit}",
    ]
    if known["channels"]:
        lines.append(f"  channels    {', '.join(known['channels'])}")
    lines.append(f"  labels      {', '.join(known['labels']) or 'none'}")
    for k, level in enumerate(known["levels"]):
        is_sharded = level["write_unit"] != level["chunks"]
        shards = f", shards {_times(level['write_unit'])}" if is_sharded else ""
        lines.append(f"  level {k}     {_times(level['shape'])}, chunks {_times(level['chunks'])}{shards}")
    return "\n".join(lines)


def _times(lengths: Any) -> str:
    return " x ".join(str(n) for n in lengths)


def _bytes(n: int) -> str:
    """Return a number of bytes with a binary prefix."""
    power = min(max(n.bit_length() - 1, 0) // 10, 5)
    return f"{n / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"

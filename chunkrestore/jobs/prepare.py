"""From the arguments of `run` to a plan: which part of which image, how much memory, how deep halos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dask.utils import parse_bytes

from chunkrestore.backend import free_memory_nbytes
from chunkrestore.cluster import Cluster, usable_cores
from chunkrestore.jobs.estimate import Estimate
from chunkrestore.jobs.estimate import estimate as probe
from chunkrestore.jobs.plan import Plan, make_plan
from chunkrestore.jobs.sampling import as_seen
from chunkrestore.ome_zarr import OmeZarrImage, check_dtype, open_source
from chunkrestore.ome_zarr.metadata import VERSIONS
from chunkrestore.ome_zarr.store import free_nbytes, location, read_node
from chunkrestore.operators.base import ImageOperator, LabelOperator, Operator
from chunkrestore.operators.calibration import calibrate
from chunkrestore.operators.storing import completed, only_copies

Store: TypeAlias = str | os.PathLike[str]
Region: TypeAlias = Sequence[tuple[int, int] | slice]

_SHARE_OF_FREE = {"cpu": 0.8, "device": 0.5}
"""Of the free memory that blocks may take. Reading, writing and Python need the rest; on a device also what the
formulas, which are those of the host, do not count: unswept iterations and the FFT library's work area."""


@dataclass(frozen=True)
class Options:
    """Arguments of `chunkrestore.run` that decide what a job makes, beside operators and images."""

    block_shape: Sequence[int] | None
    depth: int | Sequence[int] | None
    calibrate: bool
    memory: int | str | None
    device: str
    label_name: str
    version: str
    shards: Sequence[int] | None
    compression: str = "zstd"
    checksums: bool = False
    objects: str | None = None


def plan(
    operators: Operator | Sequence[Operator],
    source: Store | OmeZarrImage,
    output: Store | None = None,
    *,
    block_shape: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    memory: int | str | None = None,
    level: int = 0,
    timepoint: int | Sequence[int] | None = None,
    channel: str | int | Sequence[str | int] | None = None,
    region: Region | None = None,
    shards: Sequence[int] | None = None,
    version: str = "0.5",
) -> Plan:
    """Return what `run` would do with the same arguments, from metadata alone.

    Parameters are those of `run`; with `output` the plan tells how much space is free there. Nothing is computed
    and nothing is written.
    """
    image = select(source, level, timepoint, channel, region)
    several = completed(operators if isinstance(operators, Sequence) else [operators])
    if output is not None:
        version = written_version(several, image, location(output), version)
    seen = as_seen(several, image)
    made = planned(several, seen, block_shape, depth, budget(memory, "cpu", None), shards, version)
    return made if output is None else replace(made, free_nbytes=free_nbytes(location(output)))


def estimate(
    operators: Operator | Sequence[Operator],
    source: Store | OmeZarrImage,
    *,
    n_probes: int = 3,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    device: str = "cpu",
    level: int = 0,
    timepoint: int | Sequence[int] | None = None,
    channel: str | int | Sequence[str | int] | None = None,
    region: Region | None = None,
    **cutting: Any,
) -> Estimate:
    """Return how long `run` would take with the same arguments, from a few blocks that are computed and dropped.

    Parameters
    ----------
    operators, source, cluster, n_workers, device, level, timepoint, channel, region
        As for `run`.
    n_probes
        Blocks of every pass that each worker computes.
    **cutting
        `block_shape`, `depth`, `memory` and `shards`, as for `run`.
    """
    image = select(source, level, timepoint, channel, region)
    made = plan(operators, image, **cutting)
    seen = as_seen(completed(operators if isinstance(operators, Sequence) else [operators]), image)
    return probe(made, seen, n_probes=n_probes, cluster=cluster, n_workers=n_workers, device=device)


def budget(memory: int | str | None, device: str, n_workers: int | None) -> int | None:
    """Return the peak bytes of one block that `memory` stands for; None: the default.

    Raises
    ------
    ValueError
        If it is no amount of memory.
    """
    if memory is None:
        return None
    if memory == "free":
        share = _SHARE_OF_FREE["cpu" if device == "cpu" else "device"]
        return int(share * free_memory_nbytes(device) / (n_workers or usable_cores()))
    try:
        nbytes = parse_bytes(memory)
    except ValueError:
        nbytes = 0
    if nbytes <= 0:
        raise ValueError(f"`memory` must be bytes, text such as '8 GB', or 'free'; got {memory!r}")
    return nbytes


def calibrated(operators: Sequence[Operator], image: OmeZarrImage) -> dict[str, Any]:
    """Return the record of a calibration of the first operator, on the first time point and channel."""
    first = operators[0]
    first.check(image.spatial_shape, check_dtype(image.dtype, image.path))
    if not isinstance(first, ImageOperator) or isinstance(first, LabelOperator):
        raise ValueError(f"`calibrate` has nothing to do: {first.name} is exact with its own halo")
    source = image.source(0)
    return calibrate(first, lambda region: source.read(0, 0, region), image.spatial_shape).describe()


def planned(
    operators: Sequence[Operator],
    image: OmeZarrImage,
    block_shape: Sequence[int] | None,
    depth: int | Sequence[int] | None,
    memory_nbytes: int | None,
    shards: Sequence[int] | None,
    version: str = "0.5",
) -> Plan:
    """Return the plan of operators for an image, from metadata alone; `version` is what is written."""
    return make_plan(
        operators,
        image.spatial_shape,
        image.dtype if copies_labels(operators, image) else check_dtype(image.dtype, image.path),
        n_timepoints=image.n_t,
        n_channels=image.n_c,
        block_shape=block_shape,
        depth=depth,
        memory_nbytes=memory_nbytes,
        shards=shards,
        voxel_size=image.voxel_size,
        source=image.source(0),
        version=version,
    )


def written_version(operators: Sequence[Operator], image: OmeZarrImage, output: str, wanted: str) -> str:
    """Return the OME-Zarr version of what a job writes: labels take that of the image that they are added to."""
    makes_image = any(not isinstance(operator, LabelOperator) for operator in operators)
    node = None if makes_image and not copies_labels(operators, image) else read_node(output)
    return wanted if node is None else next(v for v, f in VERSIONS.items() if f == node.zarr_format)


def copies_labels(operators: Sequence[Operator], image: OmeZarrImage) -> bool:
    """Return whether operators make labels out of labels, by copying them."""
    return image.is_labels and only_copies(operators)


def select(
    source: Store | OmeZarrImage, level: int, timepoint: Any, channel: Any, region: Region | None
) -> OmeZarrImage:
    """Return the part of a stored image that is to be processed."""
    slices = None if region is None else tuple(r if isinstance(r, slice) else slice(*r) for r in region)
    return open_source(source).select(level=level, t=timepoint, c=channel, region=slices)

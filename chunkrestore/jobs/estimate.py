"""How long a job will take and how much it will store, from a few of its blocks; nothing is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.jobs.passes import format_nbytes
from chunkrestore.jobs.plan import Plan
from chunkrestore.jobs.probe import PassProbe, StageProbe, probe_plan
from chunkrestore.jobs.progress import format_seconds
from chunkrestore.jobs.runner import message_of
from chunkrestore.ome_zarr import OmeZarrImage

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will take."""

    name: str
    """As in the journal of a job."""
    n_items: int
    """Blocks, of all time points and channels."""
    seconds: float
    """Mean work per block."""
    low: float
    """The same, if all blocks are like the fastest one that was probed."""
    high: float
    """The same for the slowest one."""

    def wall_seconds(self, n_workers: int, per_item: float | None = None) -> float:
        """Return how long `n_workers` take for all blocks."""
        return math.ceil(self.n_items / n_workers) * (self.seconds if per_item is None else per_item)


@dataclass(frozen=True)
class Estimate:
    """What a job is expected to take; ``str(estimate)`` is a table for people."""

    stages: tuple[StageEstimate, ...]
    """In order. Settling and numbering of labels is not among them."""
    n_workers: int
    """Workers that probed, all at the same time."""
    n_probes: int
    """Blocks that each of them probed in every pass."""
    warm_up_seconds: float
    """What the first block took more than the same block again: models loaded, transforms planned."""
    disk_nbytes: int
    """Most bytes on disk at once, compressed as the probed blocks are, tables included."""
    compression: tuple[float, ...]
    """Per pass: compressed bytes of the full resolution divided by those of its voxels."""

    @property
    def seconds(self) -> float:
        """Expected wall time of the job on the workers that probed."""
        return self.seconds_on(self.n_workers)

    @property
    def spread(self) -> tuple[float, float]:
        """Wall times if all blocks are like the fastest, and like the slowest, that were probed."""
        low = sum(stage.wall_seconds(self.n_workers, stage.low) for stage in self.stages)
        high = sum(stage.wall_seconds(self.n_workers, stage.high) for stage in self.stages)
        return self.warm_up_seconds + low, self.warm_up_seconds + high

    def seconds_on(self, n_workers: int) -> float:
        """Return the expected wall time on another number of workers that share nothing more than these do."""
        return self.warm_up_seconds + sum(stage.wall_seconds(n_workers) for stage in self.stages)

    def describe(self) -> dict[str, Any]:
        """Return the estimate as JSON-compatible values, times in seconds."""
        return {
            "seconds": self.seconds,
            "spread_seconds": list(self.spread),
            "n_workers": self.n_workers,
            "n_probes": self.n_probes,
            "warm_up_seconds": self.warm_up_seconds,
            "disk_nbytes": self.disk_nbytes,
            "compression": list(self.compression),
            "stages": [vars(stage) for stage in self.stages],
        }

    def __str__(self) -> str:
        low, high = map(format_seconds, self.spread)
        workers = f"{self.n_workers} worker" + "s" * (self.n_workers != 1)
        lines = [f"time       {format_seconds(self.seconds)} on {workers} ({low} to {high})"]
        lines += [
            f"  {stage.name:<14} {format_seconds(stage.wall_seconds(self.n_workers)):>8}, "
            f"{stage.n_items} blocks of {stage.seconds:.3g} s ({stage.low:.3g} to {stage.high:.3g})"
            for stage in self.stages
        ]
        ratios = ", ".join(f"{ratio:.0%}" for ratio in self.compression)
        lines += [
            f"  {'start':<14} {format_seconds(self.warm_up_seconds):>8}",
            f"disk       {format_nbytes(self.disk_nbytes)} expected, compressed to {ratios}",
            f"probed     {self.n_probes} blocks per worker; percentiles and means are those of the probed blocks, "
            "the job takes them of the whole volume",
        ]
        return "\n".join(lines)


def estimate(
    plan: Plan,
    image: OmeZarrImage,
    *,
    n_probes: int = 3,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """Read and compute a few blocks of every pass, and tell what the whole job will take.

    Each worker of the cluster probes the same blocks at the same time, so that what workers take from each other
    (memory bandwidth, storage) is in the figures. Results are compressed as they would be stored, and dropped.

    Parameters
    ----------
    plan
        What to do.
    image
        The input, cut to what is processed: that of which `plan` was made. Its first time point and channel are
        probed.
    n_probes
        Blocks to probe in every pass: one in the middle of the volume, one in its corner, others spread in between.
    cluster, n_workers
        As for `chunkrestore.cluster.connect`.
    device
        Where deconvolution runs.

    Returns
    -------
    Estimate
        For as many workers as have probed.

    Raises
    ------
    ValueError
        If `n_probes` is less than 1, `plan` is not one of `image`, or the probed blocks hold no structure that
        operators could be scaled by.
    RuntimeError
        If a worker died, most likely for want of memory.

    Notes
    -----
    Percentiles, means and what pilots decide are taken from the probed blocks, for this purpose only. What passes
    after the first read does not exist yet: they get the probed results, mirrored to the shape of their blocks.
    Phases are added up, although a worker reads and writes while it computes: on cores that are all busy this gains
    nothing, with a device it does. Writing to the disk itself is not in the figures.
    """
    if n_probes < 1:
        raise ValueError(f"`n_probes` {n_probes} must be at least 1")
    if (plan.shape, plan.dtype) != (image.spatial_shape, image.dtype):
        raise ValueError(
            f"`plan` is for {plan.shape} {plan.dtype}, but `image` {image.path} is {image.spatial_shape} "
            f"{image.dtype}; plan for the same part of it"
        )
    with connect(cluster, n_workers=n_workers) as client:
        return _estimate(plan, _probed(client, plan, image.source(0), n_probes, device))


def _probed(client: Client | None, *arguments: Any) -> list[list[PassProbe]]:
    """Probe on every worker at the same time."""
    if client is None:
        return [probe_plan(*arguments)]
    futures = [
        client.submit(probe_plan, *arguments, workers=[worker], pure=False)
        for worker in client.scheduler_info(n_workers=-1)["workers"]
    ]
    try:
        of_workers: list[list[PassProbe]] = client.gather(futures)
    except Exception as error:
        if type(error).__name__ == "KilledWorker":
            raise RuntimeError(f"a block could not be probed: {message_of(error)}") from error
        raise
    return of_workers


def _estimate(plan: Plan, of_workers: Sequence[Sequence[PassProbe]]) -> Estimate:
    """Add up what workers have probed."""
    stages, sizes, ratios = [], [], []
    table_nbytes = 0.0
    for work, *probes in zip(plan.passes, *of_workers, strict=True):
        stages += [_stage(same) for same in zip(*(probe.stages for probe in probes), strict=True)]
        # All workers have made the same results.
        full, reduced = _ratio(probes[0].stored), _ratio(probes[0].stored_reduced)
        nbytes = [
            work.stored_dtype.itemsize * plan.n_volumes(work) * math.prod(shape) for shape in work.levels
        ]
        sizes.append(round(nbytes[0] * full + sum(nbytes[1:]) * reduced))
        ratios.append(full)
        if probes[0].table_nbytes:
            table_nbytes += fmean(probes[0].table_nbytes) * plan.n_volumes(work) * len(work.grid)
    return Estimate(
        stages=tuple(stages),
        n_workers=len(of_workers),
        n_probes=max(len(probe.stored) for probe in of_workers[0]),
        warm_up_seconds=max(sum(probe.warm_up_seconds for probe in probes) for probes in of_workers),
        disk_nbytes=plan.largest_on_disk(sizes) + round(table_nbytes),
        compression=tuple(ratios),
    )


def _stage(probes: Sequence[StageProbe]) -> StageEstimate:
    """Scale what workers took for the blocks of one stage to all of its voxels."""
    seconds = [s for probe in probes for s in probe.seconds]
    voxels = [v for probe in probes for v in probe.voxels]
    rates = [s / v for s, v in zip(seconds, voxels, strict=True)]
    first = probes[0]
    low, mean, high = (
        rate * first.n_voxels / first.n_items for rate in (min(rates), sum(seconds) / sum(voxels), max(rates))
    )
    return StageEstimate(first.name, first.n_items, mean, low, high)


def _ratio(stored: Sequence[tuple[int, int]]) -> float:
    """Return the compressed share of some bytes."""
    return sum(packed for packed, _ in stored) / max(sum(whole for _, whole in stored), 1)

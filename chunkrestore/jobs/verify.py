"""Read everything a job has written again, and compare it with the checksums in its journal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.jobs import tasks
from chunkrestore.jobs.ledger import (
    Item,
    Journal,
    Ledger,
    StageRecord,
    job_folders,
    read_journal,
    work_folder_of,
)
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.runner import Failed, Finished, Runner, place_of
from chunkrestore.ome_zarr import RegionReader, open_image, open_writer
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.pyramid import level_blocks
from chunkrestore.ome_zarr.store import location

_MOST_NAMED = 10


@dataclass
class Verification:
    """What was found when a job's output was read again."""

    job: str
    """Name of the job."""
    n_blocks: int = 0
    """Blocks whose voxels were read."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, one sentence each."""

    @property
    def ok(self) -> bool:
        """Whether all that the journal calls finished is there, as it was written."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.job}: {self.n_blocks} blocks read, {len(self.problems)} problems"]
        lines += [f"  {problem}" for problem in self.problems[:_MOST_NAMED]]
        if len(self.problems) > _MOST_NAMED:
            lines.append(f"  and {len(self.problems) - _MOST_NAMED} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Part:
    """What one stage has written."""

    stage: str
    array: RegionReader
    record: StageRecord
    region: Callable[[Item], Slices]

    def arguments(self, item: Item) -> tuple[Any, ...]:
        """Return the arguments of the task that reads a block again."""
        return self.array, self.region(item)


def verify(
    output: str | os.PathLike[str],
    *,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> list[Verification]:
    """Check every voxel that the jobs of an output have written against the checksums in their journals.

    Reads all levels, changes nothing, and works from any machine that sees the store and the journals. Blocks
    of an unfinished job are checked as far as they are finished.

    Parameters
    ----------
    output
        Store that the jobs wrote into.
    cluster, n_workers, profile, work_folder, quiet
        As for `chunkrestore.run`.

    Returns
    -------
    list of Verification
        One per job.

    Raises
    ------
    ValueError
        If no job has written into the store.
    """
    target = location(output)
    work = work_folder_of(target, work_folder)
    folders = job_folders(work)
    if not folders:
        raise ValueError(f"{work} holds no job; give the store that a job wrote into, or its `work_folder`")
    progress = Progress(quiet=quiet)
    with connect(cluster, n_workers=n_workers, profile=profile) as client:
        return [_verify(target, folder, Runner(client), progress) for folder in folders]


def _verify(output: str, folder: Path, runner: Runner, progress: Progress) -> Verification:
    found, ledger, journal = Verification(folder.name), Ledger(folder), read_journal(folder / "journal.jsonl")
    if ledger.complete:
        found.problems += [
            f"stage {name} has {len(record.finished)} of {record.n_items} blocks in the journal of a finished job"
            for name, record in journal.stages.items()
            if not record.done
        ]
    try:
        parts = list(_parts(output, ledger.manifest(), journal))
    except (ValueError, FileNotFoundError) as error:
        found.problems.append(f"what was written cannot be opened: {error}")
        return found
    for part in parts:
        with progress.stage(f"verify {part.stage}", len(part.record.finished)) as advance:
            for happening in runner.map(tasks.checksum, part.record.finished, part.arguments):
                if isinstance(happening, Failed):
                    advance.note("failed")
                    found.problems.append(f"{part.stage}, {place_of(happening.item)}: {happening.message}")
                elif isinstance(happening, Finished):
                    advance()
                    found.n_blocks += 1
                    if happening.outcome.result != part.record.finished[happening.item]["crc32"]:
                        found.problems.append(
                            f"{part.stage}, {place_of(happening.item)}: the stored voxels of {part.array.name} are not "
                            "those that were written"
                        )
    return found


def _parts(output: str, manifest: dict[str, Any], journal: Journal) -> Iterator[_Part]:
    """Yield what a job has written and kept: images and labels, every level of each."""
    passes = manifest["passes"]
    label_name = manifest["output"]["labels"]
    last_image = len(passes) - 1 - (label_name is not None)
    kept = {}
    if last_image >= 0:
        path = stores.join(output, manifest["output"].get("group", ""))
        kept[f"blocks-{last_image}"] = path, f"pyramid-{last_image}", passes[last_image]
    if label_name is not None:
        kept["paint"] = stores.join(output, "labels", label_name), "labels_pyramid", passes[-1]
    for stage, (path, pyramid, work) in kept.items():
        if stage not in journal.stages or not journal.stages[stage].finished:
            continue
        levels = _levels(path)
        grid = BlockGrid.regular(levels[0].spatial_shape, work["block_shape"])
        yield _Part(stage, levels[0], journal.stages[stage], _cores(grid))
        for k, level in enumerate(levels[1:], 1):
            above = f"{pyramid}-{k}"
            if above in journal.stages:
                yield _Part(above, level, journal.stages[above], _regions(level, k))


def _levels(path: str) -> list[RegionReader]:
    """Return the levels of an image or of labels, published or not."""
    try:
        image = open_image(path)
    except ValueError:
        return list(open_writer(path).targets)
    return [level.reader for level in image.levels]


def _cores(grid: BlockGrid) -> Callable[[Item], Slices]:
    return lambda item: grid.block(item[2:]).core


def _regions(level: RegionReader, k: int) -> Callable[[Item], Slices]:
    regions: dict[Item, Slices] = {(r.t, r.c, i): r.slices for i, r in enumerate(level_blocks(level, k))}
    return regions.__getitem__

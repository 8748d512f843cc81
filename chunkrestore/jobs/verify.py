"""Read everything a job has written again, and compare it with the checksums in its journal."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.grid import BlockGrid, Slices
from chunkrestore.jobs import tasks
from chunkrestore.jobs.fields_record import begun_jobs
from chunkrestore.jobs.ledger import (
    Item,
    Journal,
    Ledger,
    StageRecord,
    read_journal,
    work_folder_of,
)
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.runner import Failed, Finished, Runner, place_of
from chunkrestore.ome_zarr import RegionReader, open_image, open_writer
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.layout import Shape, factors_between
from chunkrestore.ome_zarr.new_levels import NewLevels
from chunkrestore.ome_zarr.pyramid import level_blocks, regions_above, steps_of
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
    levels: Sequence[RegionReader]
    record: StageRecord
    regions: Callable[[Item], Sequence[Slices]]

    def expected(self, item: Item) -> list[int]:
        """Return the checksums of a block, one per level that was written with it."""
        payload = self.record.finished[item]
        return [payload["crc32"], *payload.get("crc32s", ())]

    def arguments(self, item: Item) -> tuple[Any, ...]:
        """Return the arguments of the task that reads a block again."""
        written = zip(self.levels, self.regions(item), self.expected(item), strict=False)
        return ([(array, region) for array, region, _ in written],)


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
    jobs = begun_jobs(work, target)
    if not jobs:
        raise ValueError(f"{work} holds no job; give the store that a job wrote into, or its `work_folder`")
    progress = Progress(quiet=quiet)
    n_own = _replaced(folder for _, folder in jobs.values())
    with connect(cluster, n_workers=n_workers, profile=profile) as client:
        return [
            _verify(Verification(name), store, Ledger(folder), n_own, Runner(client), progress)
            for name, (store, folder) in jobs.items()
        ]


def _verify(
    found: Verification,
    output: str,
    ledger: Ledger,
    n_own: Mapping[str, int],
    runner: Runner,
    progress: Progress,
) -> Verification:
    journal = read_journal(ledger.folder / "journal.jsonl")
    if ledger.complete:
        found.problems += [
            f"stage {name} has {len(record.finished)} of {record.n_items} blocks in the journal of a finished job"
            for name, record in journal.stages.items()
            if not record.done
        ]
    try:
        parts = list(_parts(output, ledger.manifest(), journal, n_own))
    except (ValueError, FileNotFoundError) as error:
        found.problems.append(f"what was written cannot be opened: {error}")
        return found
    for part in parts:
        with progress.stage(f"verify {part.stage}", len(part.record.finished)) as advance:
            for happening in runner.map(tasks.checksums, part.record.finished, part.arguments):
                if isinstance(happening, Failed):
                    advance.note("failed")
                    found.problems.append(f"{part.stage}, {place_of(happening.item)}: {happening.message}")
                elif isinstance(happening, Finished):
                    advance()
                    found.n_blocks += 1
                    found.problems += _changed(part, happening.item, happening.outcome.result)
    return found


def _changed(part: _Part, item: Item, stored: Sequence[int]) -> Iterator[str]:
    """Yield what differs from what was written, one sentence per level."""
    for array, checksum, wanted in zip(part.levels, stored, part.expected(item), strict=False):
        if checksum != wanted:
            yield (
                f"{part.stage}, {place_of(item)}: the stored voxels of {array.name} are not those that were written"
            )


def _parts(
    output: str, manifest: dict[str, Any], journal: Journal, n_own: Mapping[str, int]
) -> Iterator[_Part]:
    """Yield what a job has written and kept: images and labels, every level of each.

    Of the levels of an image, `n_own` may say how many are not another job's.
    """
    if manifest.get("kind") == "pyramid":
        yield from _parts_of_pyramids(manifest, journal)
    if manifest.get("kind") == "simulate":
        yield from _parts_of_simulation(manifest, journal)
    if not manifest.get("passes"):
        return
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
        levels = _levels(path)[: n_own.get(path)]
        grid = BlockGrid.regular(levels[0].spatial_shape, work["block_shape"])
        yield _Part(stage, levels, journal.stages[stage], _regions(grid, levels, _factors(levels)))
        yield from _pyramid_parts(pyramid, levels, journal, int(journal.values.get(f"fused-{stage}", 0)))


def _parts_of_pyramids(manifest: dict[str, Any], journal: Journal) -> Iterator[_Part]:
    """Yield what a job has written that builds pyramids of images that exist."""
    for position, group in enumerate(map(NewLevels.read, manifest["groups"])):
        name = f"pyramid-{position}"
        is_listed = group.is_listed
        if journal.values.get(f"created-{name}") and (
            is_listed or not journal.values.get(f"published-{name}")
        ):
            yield from _pyramid_parts(name, group.readers(), journal, group.n_done)


def _parts_of_simulation(manifest: dict[str, Any], journal: Journal) -> Iterator[_Part]:
    """Yield what a simulation has written: every block gives a part of several images."""
    blocks = journal.stage("blocks")
    for name, path in manifest["output"]["outputs"].items() if blocks.finished else ():
        levels = _levels(path)
        grid = BlockGrid.regular(levels[0].spatial_shape, manifest["block_shape"])
        own = replace(blocks, finished={item: told[name] for item, told in blocks.finished.items()})
        yield _Part("blocks", levels, own, _regions(grid, levels, _factors(levels)))
        n_fused = int(journal.values[f"fused-blocks-{name}"])
        yield from _pyramid_parts(f"pyramid-{name}", levels, journal, n_fused)


def _replaced(folders: Iterable[Path]) -> dict[str, int]:
    """Return, by path of the image, how many levels are left of those that it had before its pyramid was built anew."""
    manifests = [Ledger(folder).manifest() for folder in folders]
    groups = [NewLevels.read(g) for m in manifests if m.get("kind") == "pyramid" for g in m["groups"]]
    return {group.path: len(group.kept) for group in groups if group.is_listed}


def _pyramid_parts(
    name: str, levels: Sequence[RegionReader], journal: Journal, n_done: int
) -> Iterator[_Part]:
    """Yield what the stages of a pyramid have written above level `n_done`."""
    factors = _factors(levels)
    for step in steps_of(levels, factors, n_done):
        if (stage := f"{name}-{step.name}") in journal.stages:
            written = slice(step.first, step.last + 1)
            regions = _regions(step.grid, levels[written], factors[written])
            yield _Part(stage, levels[written], journal.stages[stage], regions)
    for k, level in enumerate(levels[1:], 1):  # of jobs that wrote level by level
        if (stage := f"{name}-{k}") in journal.stages:
            yield _Part(stage, [level], journal.stages[stage], _regions_of_level(level, k))


def _levels(path: str) -> list[RegionReader]:
    """Return the levels of an image or of labels, published or not."""
    try:
        image = open_image(path)
    except ValueError:
        return list(open_writer(path).targets)
    return [level.reader for level in image.levels]


def _factors(levels: Sequence[RegionReader]) -> list[Shape]:
    """Return the factors between levels, from their shapes."""
    shapes = [level.spatial_shape for level in levels]
    return [(1,) * len(shapes[0]), *itertools.starmap(factors_between, itertools.pairwise(shapes))]


def _regions(
    grid: BlockGrid, levels: Sequence[RegionReader], factors: Sequence[Shape]
) -> Callable[[Item], list[Slices]]:
    return lambda item: regions_above(grid.block(item[2:]).core, levels, factors)


def _regions_of_level(level: RegionReader, k: int) -> Callable[[Item], list[Slices]]:
    regions: dict[Item, Slices] = {(r.t, r.c, i): r.slices for i, r in enumerate(level_blocks(level, k))}
    return lambda item: [regions[item]]

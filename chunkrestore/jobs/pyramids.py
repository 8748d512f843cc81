"""Build the pyramid of an image that exists, in place, with its labels: a resumable job like any other."""

from __future__ import annotations

import itertools
import math
import os
import uuid
from collections.abc import Sequence
from typing import Any

from chunkrestore.cluster import Cluster
from chunkrestore.jobs.begin import begun
from chunkrestore.jobs.job import is_image, versions
from chunkrestore.jobs.ledger import Ledger, work_folder_of
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.stages import Stages
from chunkrestore.ome_zarr import OmeZarrImage, RegionReader, open_image
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.layout import LevelPlan, Shape, default_pyramid, factors_between, pyramid_like
from chunkrestore.ome_zarr.metadata import VERSIONS
from chunkrestore.ome_zarr.new_levels import NewLevels
from chunkrestore.ome_zarr.read import label_names, open_label

_LABEL_METHODS = ("nearest", "mode")


def build_pyramid(
    store: str | os.PathLike[str],
    *,
    levels: int | None = None,
    method: str | None = None,
    overwrite: bool = False,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> Report:
    """Add the levels that an OME-Zarr image lacks, in place, and those of its labels.

    Every level is computed from the one below and read once at most; memory is bounded by a region of 16 million voxels
    per task. A job that was interrupted goes on where it stopped when this is called again with the same arguments.
    Readers see the image as it was until all new levels are complete. Levels are stored as level 0 is: the same
    chunks, codecs and fill value, shards that shrink with the level. Attributes are kept, but for the list of levels.

    Parameters
    ----------
    store
        OME-Zarr image of version 0.4 or 0.5 by whatever tool, or a label group, at a path or an ``s3://`` URL. Images
        are averaged; labels get as many levels as their image, as the specification demands.
    levels
        Number of levels, the full resolution included; by default until one fits into 64 voxels per axis (512 in two
        dimensions). That of the image, for a label group.
    method
        How labels are reduced: ``"nearest"`` by default, which keeps small objects, or ``"mode"``.
    overwrite
        Replace all levels above the full resolution, which are removed once the new ones are listed; also start
        anew if there is an unfinished job with other arguments.
    cluster, n_workers, profile, work_folder, quiet
        As for `chunkrestore.run`.

    Returns
    -------
    Report
        What was done, and how fast.

    Raises
    ------
    FileExistsError
        If there is no level to add and `overwrite` is not set.
    ValueError
        If `store` is no such image, or parameters do not suit it. Nothing is touched then.
    chunkrestore.jobs.lock.LockedError
        If another driver works on the same store.
    """
    path = stores.writable(stores.location(store))
    root, name = _place(path)
    folder = work_folder_of(root, work_folder) / name
    request = {"store": path, "levels": levels, "method": method, "overwrite": overwrite}
    ledger = Ledger(folder)
    earlier = ledger.manifest() if ledger.unfinished else {}
    resuming = earlier.get("request") == request
    # What is listed already is not planned again: the job was killed between an image and its labels.
    groups = (
        [NewLevels.read(g) for g in earlier["groups"]]
        if resuming
        else _planned(path, levels, method, overwrite)
    )

    def check() -> None:
        if _planned(path, levels, method, overwrite) != groups:
            raise ValueError(f"{path} has changed meanwhile; look what it is now, and begin again")

    image, *labels = (_base(group).identity() for group in groups)
    report = Report([], _figures(groups), [group.path for group in groups], versions=versions())
    manifest = {
        "schema": 1,
        "kind": "pyramid",
        "input": image,
        "labels": labels,
        "request": request,
        "groups": [group.describe() for group in groups],
        "versions": report.versions,
    }
    begin = begun(
        folder,
        manifest,
        report,
        check,
        cluster=cluster,
        n_workers=n_workers,
        profile=profile,
        overwrite=overwrite and not resuming,
        quiet=quiet,
    )
    with begin as stages:
        for position, group in enumerate(groups):
            _build(stages, position, group)
    return report


def _place(path: str) -> tuple[str, str]:
    """Return the store whose jobs are kept together, and the name of the job."""
    around = stores.parent(path)
    if stores.name_of(around) == "labels":
        return stores.parent(around), f"pyramid-{stores.name_of(path)}"
    return path, "pyramid"


def _planned(path: str, levels: int | None, method: str | None, overwrite: bool) -> list[NewLevels]:
    """Return what is to be made: the levels of the image, then those of its labels.

    Raises
    ------
    FileExistsError
        If that is nothing.
    ValueError
        If parameters do not suit the store.
    """
    image = _opened(path)
    several = [image] if image.is_labels else [open_label(path, name) for name in label_names(path)]
    if method is not None and (method not in _LABEL_METHODS or not several):
        raise ValueError(
            f"`method` {method!r} must be 'nearest' or 'mode', and is for labels; images are averaged"
        )
    new: list[NewLevels] = []
    if image.is_labels:
        like = _levels_around(path, levels)
        levels = len(like) or levels
    else:
        n_kept, plans = _plans(image, levels, overwrite)
        like, levels = [plan.shape for plan in plans], len(plans)
        new += _new(image, n_kept, plans, "mean")
    for labels in several:
        wanted = levels if overwrite or levels is None else max(levels, len(labels.levels))
        n_kept, plans = _plans(_opened(labels.path), wanted, overwrite, like)
        new += _new(labels, n_kept, plans, method or _LABEL_METHODS[0])
    if not new:
        raise FileExistsError(
            f"{path} has {len(image.levels)} levels, and labels as many; ask for more `levels` (--levels), or pass "
            "overwrite=True (--overwrite) to build them anew"
        )
    return new


def _new(image: OmeZarrImage, n_kept: int, plans: Sequence[LevelPlan], method: str) -> list[NewLevels]:
    is_same = n_kept == len(plans) == len(image.levels)
    return [] if is_same else [NewLevels.of(image, n_kept, plans, method)]


def _opened(path: str) -> OmeZarrImage:
    """Open an image or labels that levels can be added to.

    Raises
    ------
    ValueError
        If its version or dtype does not allow it.
    """
    image = open_image(path)
    if image.version not in VERSIONS:
        known = " and ".join(VERSIONS)
        raise ValueError(
            f"{path} is OME-Zarr {image.version}, and levels are added to {known} only; write it anew with "
            "`chunkrestore convert`"
        )
    kind, nbytes = image.dtype.kind, image.dtype.itemsize
    if not (kind in "iu" and (image.is_labels or nbytes <= 4)) and not (kind == "f" and nbytes >= 4):
        raise ValueError(
            f"`dtype` {image.dtype} of {path} cannot be averaged, only integers up to 32 bits and floats of 32 and 64"
        )
    return image


def _levels_around(path: str, levels: int | None) -> list[Shape]:
    """Return the shapes of the levels of the image that labels belong to, if they do."""
    around, _ = _place(path)
    if around == path or not is_image(around):
        return []
    shapes = [level.reader.spatial_shape for level in open_image(around).levels]
    if levels not in (None, len(shapes)):
        raise ValueError(
            f"`levels` {levels} must be {len(shapes)}, as many as {around} has, whose labels these are"
        )
    return shapes


def _plans(
    image: OmeZarrImage, n_levels: int | None, overwrite: bool, like: Sequence[Shape] = ()
) -> tuple[int, list[LevelPlan]]:
    """Return how many levels of an image are kept, and all that it will have; new ones follow `like` where they can."""
    n_kept = 1 if overwrite else len(image.levels)
    if n_levels is not None and n_levels < n_kept:
        raise ValueError(
            f"`levels` {n_levels} is less than the {n_kept} of {image.path}; pass overwrite=True (--overwrite) to "
            "replace them"
        )
    kept = [level.reader.spatial_shape for level in image.levels[:n_kept]]
    voxel_size = image.levels[n_kept - 1].voxel_size
    if kept == list(like[:n_kept]):
        above = pyramid_like([kept[-1], *like[n_kept:n_levels]], voxel_size)
    else:
        above = default_pyramid(kept[-1], voxel_size, None if n_levels is None else n_levels - n_kept + 1)
    below = [LevelPlan(kept[0], (1,) * len(kept[0]))]
    below += [LevelPlan(b, factors_between(a, b)) for a, b in itertools.pairwise(kept)]
    return n_kept, [*below, *above[1:]]


def _build(stages: Stages, position: int, group: NewLevels) -> None:
    """Make the levels of one group and list them, unless that is done."""
    ledger, number = stages.ledger, f"pyramid-{position}"
    if ledger.value(f"published-{number}"):
        return
    for name in group.names:
        stores.clean_partial(stores.join(group.path, name))
    token = ledger.value(f"created-{number}")
    if token is None:
        token = uuid.uuid4().hex
        group.create(token)
        ledger.decide(f"created-{number}", token)
    if not ledger.value(f"complete-{number}"):
        stages.pyramid(number, group.writer(token), group.n_done)
        ledger.decide(f"complete-{number}", True)
    # What is published must never be ahead of the journal, whatever fails.
    ledger.sync()
    group.publish()
    ledger.decide(f"published-{number}", True)


def _figures(groups: Sequence[NewLevels]) -> dict[str, Any]:
    """Return the plan of a job for its report."""
    readers = [_base(group) for group in groups]
    read = written = n_regions = 0
    for group, base in zip(groups, readers, strict=True):
        steps = group.steps()
        n_planes, nbytes = base.n_t * base.n_c, base.dtype.itemsize
        read += nbytes * n_planes * sum(math.prod(group.shapes[step.first - 1]) for step in steps)
        written += nbytes * n_planes * sum(map(math.prod, group.shapes[len(group.kept) :]))
        n_regions += n_planes * sum(len(step.grid) for step in steps)
    return {
        "shape": list(groups[0].shapes[0]),
        "dtype": readers[0].dtype.name,
        "n_timepoints": readers[0].n_t,
        "n_channels": readers[0].n_c,
        "passes": [],
        "n_blocks": n_regions,
        "read_nbytes": read,
        "written_nbytes": written,
        "disk_nbytes": written,
        "free_nbytes": stores.free_nbytes(groups[0].path),
        "memory_nbytes": 0,
    }


def _base(group: NewLevels) -> RegionReader:
    """Return a handle on the full resolution of a group."""
    return RegionReader.at(group.path, group.kept[0], group.letters)

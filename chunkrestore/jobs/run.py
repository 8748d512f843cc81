"""Run store-to-store jobs, and go on with those that have stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from chunkrestore.backend import to_device
from chunkrestore.cluster import Cluster, connect
from chunkrestore.cluster.allocation import in_allocation
from chunkrestore.jobs.begin import locked, told
from chunkrestore.jobs.events import Events
from chunkrestore.jobs.html import write_html
from chunkrestore.jobs.job import Job, job_name, note_numbers, versions
from chunkrestore.jobs.ledger import Ledger, only_unfinished, read_journal, work_folder_of
from chunkrestore.jobs.plan import with_depth
from chunkrestore.jobs.prepare import (
    Options,
    Region,
    Store,
    budget,
    calibrated,
    planned,
    select,
    written_version,
)
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.request import load_request, save_request
from chunkrestore.jobs.runner import Runner, message_of
from chunkrestore.jobs.sampling import as_seen
from chunkrestore.jobs.stages import Stages
from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.ome_zarr.store import location, writable
from chunkrestore.operators.base import Operator
from chunkrestore.operators.network import NetworkOperator
from chunkrestore.operators.storing import completed

_log = logging.getLogger(__name__)


def run(
    operators: Operator | Sequence[Operator],
    source: Store | OmeZarrImage,
    output: Store,
    *,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    block_shape: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    calibrate: bool = False,
    memory: int | str | None = None,
    device: str = "cpu",
    level: int = 0,
    timepoint: int | Sequence[int] | None = None,
    channel: str | int | Sequence[str | int] | None = None,
    region: Region | None = None,
    label_name: str = "labels",
    overwrite: bool = False,
    version: str = "0.5",
    shards: Sequence[int] | None = None,
    compression: str = "zstd",
    checksums: bool = False,
    objects: str | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    page: bool = False,
    quiet: bool = False,
) -> Report:
    """Apply operators to a stored image, block by block, and write OME-Zarr.

    A job that was interrupted goes on where it stopped when `run` is called again with the same arguments
    (without `overwrite`), or by `resume`: only blocks that were in flight are done again, and the result is the
    same, byte for byte. A block that fails is tried again where that may help, and given up otherwise; the
    others go on, and the job ends with an error that lists the blocks, its result unpublished.

    Parameters
    ----------
    operators
        Image operators in order of application, optionally followed by one label operator. One that makes planes
        between those of the image (`chunkrestore.IsotropicCare`) comes first. Without any, the image
        (or the label group) is copied, to store it in another way; `chunkrestore.operators.storing.AsType` as the last
        image operator chooses the dtype, which is float32 otherwise. Operators run
        together on a block, without intermediate stores, unless one needs a number of the whole result
        before it (a percentile): then that result is stored for the time of the job.
    source
        OME-Zarr image.
    output
        OME-Zarr to write. With image operators a new image, which labels are added to; with a label
        operator alone an existing image of the same shape, such as `source` itself, or a new store that
        holds labels only. Like `source`, it must be visible to all workers under the same path.
    cluster
        A `distributed.Client`, the address of a scheduler, ``"local"``, ``"cuda"``, ``"slurm"``, ``"serial"`` or
        ``"auto"``, or a profile file; see `chunkrestore.cluster.connect`.
    n_workers
        Worker processes of a local cluster, one per core by default, or of a batch system.
    block_shape
        Core of a block, voxels per spatial axis; derived from the operators' memory by default.
    depth
        Halo of every operator that takes one, instead of the derived one.
    calibrate
        Find the least sufficient depth of the first operator on a pilot region of the image, first of all
        (`chunkrestore.operators.calibration`). The figures go into the report and into the output.
    memory
        Peak memory of one block that block shapes are derived for: bytes, text such as ``"8 GB"``, or
        ``"free"`` for what is free on `device`, shared by the workers. By default 2 GiB, and blocks no longer
        than 512 voxels. A block that does not fit after all is done in parts.
    device
        Where deconvolution runs: ``"cpu"``, or ``"cuda"`` with CuPy.
    level, timepoint, channel, region
        Part of `source` to process; everything at full resolution by default. Channels by name or index,
        the region as one (start, stop) per spatial axis in voxels of the level. The region is processed as
        if it were the whole volume.
    label_name
        Name of the labels.
    overwrite
        Replace an existing output, or start an unfinished job anew. Until the input has been checked,
        nothing is removed.
    version
        OME-Zarr version of a new store, ``"0.5"`` or ``"0.4"``.
    shards
        Voxels per spatial axis that are stored as one file; chunks by default. Blocks are cut on shards.
    compression, checksums
        As for `chunkrestore.ome_zarr.create_image`.
    objects
        ``"table"`` writes a row per object beside its labels, ``labels/NAME/objects.parquet``: centroid, volume,
        probability, class, bounding box (`chunkrestore.jobs.object_columns`). ``"shapes"`` adds the polyhedra
        or polygons themselves. For objects that StarDist finds; needs pyarrow.
    profile
        File that describes a cluster (`chunkrestore.cluster.read_profile`).
    work_folder
        Where the journal and scratch data are kept; ``OUTPUT.chunkrestore`` by default, for a URL in the current
        folder. Workers must see it as well.
    page
        Write ``report.html`` when the job is done or has failed (`chunkrestore report` does so at any time).
    quiet
        Show no progress.

    Returns
    -------
    Report
        What was done, how fast, and the measured seam error.

    Raises
    ------
    FileExistsError
        If the output exists and `overwrite` is not set.
    ValueError
        If operators, image and parameters do not fit together, an unfinished job was started with others,
        or a voxel is NaN or infinite; nothing was written then.
    chunkrestore.jobs.lock.LockedError
        If another driver writes into the same output.
    ConnectionError
        If there is no scheduler at the address, or it goes away (`chunkrestore.jobs.runner.ClusterLostError`).
    chunkrestore.jobs.runner.BlockError
        If blocks failed; the message names them. What is finished is kept.
    """
    image = select(source, level, timepoint, channel, region)
    several = completed(operators if isinstance(operators, Sequence) else [operators])
    target = writable(location(output))
    work = work_folder_of(target, work_folder)
    folder = work / job_name(several, label_name, image)
    options = Options(
        block_shape,
        depth,
        calibrate,
        memory,
        device,
        label_name,
        version,
        shards,
        compression,
        checksums,
        objects,
    )
    prepare = partial(_prepared, several, image, target, Ledger(folder), options, n_workers, overwrite)
    # All ranks of an allocation come here and one goes on: the others must not stumble over what that one writes.
    early = None if cluster == "auto" and in_allocation() else prepare()
    with (
        connect(
            cluster, n_workers=n_workers, profile=profile, wants_devices=wants_devices(several, device)
        ) as client,
        locked(work, folder.name, in_process=client is None) as lock,
        closing(Ledger(folder, lock.check)) as ledger,
    ):
        job = early or prepare()
        _check(job, ledger, overwrite)  # again: another driver may have had the lock in between
        report = Report(
            operators=[],
            plan=job.plan.describe(),
            outputs=[],
            versions=versions(),
            calibration=job.calibration,
        )
        stages = Stages(Runner(client), ledger, Progress(quiet=quiet), Events(None), report, device)
        kept = asdict(replace(options, memory=job.memory_nbytes))
        save = partial(save_request, folder, several, image, kept)
        _execute(job, stages, save, overwrite, _pictured(job, ledger) if page else nullcontext())
    return report


def resume(
    output: Store,
    *,
    job: str | None = None,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    page: bool = False,
    quiet: bool = False,
) -> Report:
    """Go on with the unfinished job of an output, wherever and however it was begun.

    Parameters
    ----------
    output
        Store that the job writes into.
    job
        Its name, such as ``"image"`` or ``"labels-NAME"``; needed if several are unfinished.
    cluster, n_workers, profile, work_folder, page, quiet
        As for `run`; they may differ from what the job was begun with.

    Raises
    ------
    ValueError
        If there is no unfinished job, or several; or it cannot be begun again without its script.
    """
    work = work_folder_of(location(output), work_folder)
    folder = only_unfinished(work, job)
    manifest = Ledger(folder).manifest()
    where: dict[str, Any] = {
        "cluster": cluster,
        "n_workers": n_workers,
        "profile": profile,
        "work_folder": work,
    }
    if manifest.get("kind") == "pyramid":
        from chunkrestore.jobs.pyramids import build_pyramid

        return build_pyramid(**manifest["request"], **where, quiet=quiet)
    if manifest.get("kind") == "measure":
        from chunkrestore.jobs.intensities import images_at
        from chunkrestore.jobs.measure import measure

        request = manifest["request"] | {"images": images_at(manifest["request"]["images"])}
        return measure(**request, **where, quiet=quiet)
    if manifest.get("kind") == "simulate":
        from chunkrestore.jobs.simulating import resume_simulation

        return resume_simulation(folder, location(output), **where, quiet=quiet)
    operators, image, options = load_request(folder)
    return run(operators, image, output, **where, page=page, quiet=quiet, **options)


def retry_failed(
    output: Store, *, job: str | None = None, work_folder: Store | None = None, **where: Any
) -> Report:
    """Try the blocks again that were given up, before all others, and go on if they succeed.

    Parameters
    ----------
    output, job, work_folder
        As for `resume`.
    **where
        Its other arguments.

    Raises
    ------
    ValueError
        If no block of the job has failed.
    """
    work = work_folder_of(location(output), work_folder)
    folder = only_unfinished(work, job)
    if not any(record.failed for record in read_journal(folder / "journal.jsonl").stages.values()):
        raise ValueError(f"no block of the job in {folder} has failed; `chunkrestore resume` goes on with it")
    return resume(output, job=job, work_folder=work, **where)


def _prepared(
    operators: list[Operator],
    image: OmeZarrImage,
    output: str,
    ledger: Ledger,
    options: Options,
    n_workers: int | None,
    overwrite: bool,
) -> Job:
    """Return the job, or raise if it cannot be done; nothing is touched."""
    # What was measured when the job began is not measured again: a resumed job has the same blocks.
    earlier = ledger.manifest() if ledger.unfinished and not overwrite else {}
    job = job_of(operators, image, output, options, n_workers, earlier)
    _check(job, ledger, overwrite)
    to_device(np.zeros(0, np.float32), options.device)  # raises if there is no such device
    return job


def job_of(
    operators: Sequence[Operator],
    image: OmeZarrImage,
    output: str,
    options: Options,
    n_workers: int | None,
    earlier: Mapping[str, Any],
) -> Job:
    """Return the job that arguments of `run` mean; `earlier` is its manifest, if it was begun before, or empty.

    Raises
    ------
    ValueError
        If operators, image and options do not fit together.
    """
    image = as_seen(operators, image)
    nbytes = earlier.get("memory_nbytes") if options.memory == "free" else None
    nbytes = nbytes or budget(options.memory, options.device, n_workers)
    chain, calibration = list(operators), None
    if options.calibrate:
        if options.depth is not None:
            raise ValueError("`depth` and `calibrate` exclude each other; give one of them")
        calibration = earlier.get("calibration") or calibrated(chain, image)
        chain[0] = with_depth(chain[0], calibration["depth"], len(image.spatial_shape))
    version = written_version(chain, image, output, options.version)
    made = planned(chain, image, options.block_shape, options.depth, nbytes, options.shards, version)
    return Job(
        made,
        image,
        output,
        label_name=options.label_name,
        version=options.version,
        calibration=calibration,
        memory_nbytes=nbytes,
        compression=options.compression,
        checksums=options.checksums,
        objects=options.objects,
    )


def wants_devices(operators: Sequence[Operator], device: str) -> bool:
    """Return whether an operator would use a device that a worker sees."""
    return device != "cpu" or any(isinstance(operator, NetworkOperator) for operator in operators)


def _check(job: Job, ledger: Ledger, overwrite: bool) -> None:
    """Raise unless the job can begin, or is the one that was left unfinished."""
    if ledger.unfinished and not overwrite:
        ledger.check(job.manifest())
    else:
        job.check_output(overwrite=overwrite)


def _execute(
    job: Job,
    stages: Stages,
    save: Callable[[], None],
    overwrite: bool,
    pictured: AbstractContextManager[None],
) -> None:
    """Begin a job or go on with it, to its end."""
    ledger, manifest = stages.ledger, job.manifest()
    resuming = ledger.unfinished and not overwrite
    if resuming:
        ledger.begin(manifest)
    else:
        numbers = job.numbers(stages, 0, job.image.source(0))
        job.operators(0, numbers)  # raises for a constant volume, which cannot be normalised
        ledger.forget()
        save()
        ledger.begin(manifest)
        note_numbers(stages, 0, numbers)
    with (
        closing(Events(ledger.folder / "events.jsonl")) as events,
        pictured,
        told(events, stages.report, resuming=resuming),
    ):
        stages.events = events
        job.execute(stages, overwrite=overwrite or resuming)
        ledger.finish(stages.report.content())


@contextmanager
def _pictured(job: Job, ledger: Ledger) -> Iterator[None]:
    """Write the page of a job that comes to its end or fails; nobody waits for it when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        _picture(job, ledger)
        raise
    _picture(job, ledger)


def _picture(job: Job, ledger: Ledger) -> None:
    try:
        write_html(ledger.folder, job.output, image=job.image)
    except Exception as error:  # a page is no reason to call a job failed
        _log.warning("%s has no page: %s", ledger.folder, message_of(error))

"""Simulate an image of any size with its labels and its truth: a resumable job like any other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chunkrestore.cluster import Cluster
from chunkrestore.jobs.begin import begun
from chunkrestore.jobs.job import list_labels, versions, writer_of
from chunkrestore.jobs.ledger import work_folder_of
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.saved_simulation import load_simulation, save_simulation
from chunkrestore.jobs.simulation import IMAGE, LABELS, TRUTH, Source, simulate_block
from chunkrestore.jobs.simulation_plan import NAME, SimulationPlan, plan_simulation
from chunkrestore.jobs.stages import Items, Stages
from chunkrestore.ome_zarr import ImageWriter, clean_partial
from chunkrestore.ome_zarr.read import label_names
from chunkrestore.psf.fields import write_psf_field
from chunkrestore.psf.files import write_psf
from chunkrestore.psf.varying import PsfField
from chunkrestore.simulate.microscope import Microscope

Store = str | os.PathLike[str]

_PLANES = ((0, 0),)


def simulate(
    source: Source,
    output: Store,
    *,
    seed: int,
    microscope: Microscope | None = None,
    truth: Store | None = None,
    voxel_size: Sequence[float] | None = None,
    channel: str = "nuclei",
    psf_file: Store | None = None,
    block_shape: Sequence[int] | None = None,
    levels: int | None = None,
    version: str = "0.5",
    shards: Sequence[int] | None = None,
    compression: str = "zstd",
    checksums: bool = False,
    overwrite: bool = False,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    quiet: bool = False,
) -> Report:
    """Write what a microscope records of a phantom, with the phantom's objects as labels ``truth``.

    The result has the same bits for every block shape, cluster and interruption. A job that was interrupted goes on
    when this is called again with the same arguments, or by `chunkrestore.resume`. Nothing is visible to a reader
    until all of it is written.

    Parameters
    ----------
    source
        What is there: a phantom of `chunkrestore.simulate`, or anything with ``shape``, ``describe()`` and
        ``render(region)``, the last independent of how the volume is cut.
    output
        OME-Zarr to write: uint16 image, int32 labels, both with their pyramids.
    seed
        Seed of the noise, not negative.
    microscope
        Point spread function, camera and attenuation; by default that of `light_sheet_psf` and the default camera.
    truth
        Another OME-Zarr, for the image without blur and noise in counts (float32): what networks are trained
        towards and restorations are compared with.
    voxel_size
        Micrometres per axis; `chunkrestore.simulate.VOXEL_SIZE` by default, in two dimensions that of y and x.
    channel
        Name of the channel.
    psf_file
        File that the point spread function is written to, ``.tif``; ``.yaml`` for one that changes with position.
    block_shape
        Voxels per axis that one task simulates: whole shards, or chunks; 256 (4096 in two dimensions) by default.
    levels, version, compression, checksums
        As for `chunkrestore.ome_zarr.create_image`.
    shards
        As for `chunkrestore.run`.
    overwrite, cluster, n_workers, profile, work_folder, quiet
        As for `chunkrestore.run`.

    Returns
    -------
    Report
        What was written, and how fast.

    Raises
    ------
    FileExistsError
        If an output exists and `overwrite` is not set.
    ValueError
        If parameters do not fit together, or an unfinished job was started with others; nothing was written then.
    chunkrestore.jobs.runner.BlockError
        If blocks failed; the message names them.
    """
    plan = plan_simulation(
        source,
        output,
        seed=seed,
        microscope=microscope,
        truth=truth,
        voxel_size=voxel_size,
        channel=channel,
        psf_file=psf_file,
        block_shape=block_shape,
        levels=levels,
        version=version,
        shards=shards,
        compression=compression,
        checksums=checksums,
    )
    return _run(
        plan, overwrite, work_folder, cluster=cluster, n_workers=n_workers, profile=profile, quiet=quiet
    )


def resume_simulation(folder: Path, output: str, **where: Any) -> Report:
    """Go on with the unfinished simulation in `folder`; `where` as for `chunkrestore.jobs.run.resume`."""
    simulation, request = load_simulation(folder)
    phantom, microscope = simulation.phantom, simulation.microscope
    return simulate(phantom, output, microscope=microscope, **request, **where)


def _run(plan: SimulationPlan, overwrite: bool, work_folder: Store | None, **where: Any) -> Report:
    """Begin a simulation or go on with it, to its end."""
    report = Report([], plan.describe(), [], versions=versions())
    begin = begun(
        work_folder_of(plan.paths[IMAGE], work_folder) / "simulate",
        plan.manifest(),
        report,
        lambda: plan.check_outputs(overwrite=overwrite),
        overwrite=overwrite,
        **where,
    )
    with begin as stages:
        save_simulation(stages.ledger.folder, plan.simulation, plan.request())
        # What exists is our own, or was checked to be what may be replaced: every output is created anew.
        writers = {
            name: writer_of(stages, name, path, partial(plan.create, name))
            for name, path in plan.outputs.items()
        }
        filling = {name: writer for name, writer in writers.items() if writer is not None}
        if len(filling) == len(writers):  # otherwise one is published, and so all are complete
            _fill(stages, plan, filling)
        _publish(stages, plan, filling)
        report.operators.append(plan.describe()["passes"][0]["operators"][0])
        report.outputs += plan.outputs.values()
        if plan.psf_file is not None:
            report.outputs.append(plan.psf_file)
    return report


def _fill(stages: Stages, plan: SimulationPlan, writers: Mapping[str, ImageWriter]) -> None:
    """Write all levels of all outputs."""
    levels = {name: stages.fused(f"blocks-{name}", writer, plan.grid) for name, writer in writers.items()}
    arguments = (plan.simulation, plan.grid, levels)
    stages.run("blocks", Items(plan.grid, _PLANES), simulate_block, lambda _: arguments)
    for name, writer in writers.items():
        stages.pyramid(f"pyramid-{name}", writer, levels[name].last)


def _publish(stages: Stages, plan: SimulationPlan, writers: Mapping[str, ImageWriter]) -> None:
    """Make the outputs visible that are not yet, the image last of all."""
    provenance = {"simulated": plan.simulation.describe(), "versions": versions()}
    if LABELS not in writers and NAME not in label_names(plan.paths[IMAGE]):
        list_labels(plan.labels_path)  # the job was killed between its last two acts on them
    if plan.psf_file is not None:
        _write_psf(Path(plan.psf_file), plan.simulation.microscope, plan.voxel_size)
    for name in sorted(writers, key=[LABELS, TRUTH, IMAGE].index):
        clean_partial(writers[name].path)
        # What is published must never be ahead of the journal, whatever fails.
        stages.ledger.sync()
        writers[name].publish(provenance)
        stages.ledger.decide(f"published-{name}", True)


def _write_psf(path: Path, microscope: Microscope, voxel_size: tuple[float, ...]) -> None:
    psf = microscope.psf
    if isinstance(psf, PsfField):
        write_psf_field(path, psf, voxel_size, overwrite=True)
    else:
        write_psf(path, psf, voxel_size)

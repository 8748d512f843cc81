"""Plan and run store-to-store jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore.cluster import Cluster, connect
from chunkrestore.jobs.ledger import Ledger, job_folder
from chunkrestore.jobs.plan import Pass, Plan, make_plan
from chunkrestore.jobs.report import Progress, Report
from chunkrestore.jobs.runner import Runner
from chunkrestore.jobs.stages import RANGE, Plane, Stages, volume_statistics
from chunkrestore.ome_zarr import (
    ImageWriter,
    OmeZarrImage,
    RegionReader,
    check_dtype,
    create_image,
    create_labels,
    open_image,
    open_writer,
)
from chunkrestore.operators.base import Operator

Store = str | os.PathLike[str]
Region = Sequence[tuple[int, int] | slice]

_LIBRARIES = ("chunkrestore", "numpy", "scipy", "tensorflow", "csbdeep", "stardist")
"""Libraries whose version can change the numbers."""


def plan(
    operators: Operator | Sequence[Operator],
    source: Store | OmeZarrImage,
    *,
    block_shape: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    level: int = 0,
    timepoint: int | Sequence[int] | None = None,
    channel: str | int | Sequence[str | int] | None = None,
    region: Region | None = None,
) -> Plan:
    """Return what `run` would do with the same arguments, from metadata alone.

    Parameters are those of `run`. Nothing is computed and nothing is written.
    """
    image = _select(source, level, timepoint, channel, region)
    return _plan(operators, image, block_shape, depth)


def run(
    operators: Operator | Sequence[Operator],
    source: Store | OmeZarrImage,
    output: Store,
    *,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    block_shape: Sequence[int] | None = None,
    depth: int | Sequence[int] | None = None,
    level: int = 0,
    timepoint: int | Sequence[int] | None = None,
    channel: str | int | Sequence[str | int] | None = None,
    region: Region | None = None,
    label_name: str = "labels",
    overwrite: bool = False,
    version: str = "0.5",
    quiet: bool = False,
) -> Report:
    """Apply operators to a stored image, block by block, and write OME-Zarr.

    A job that was interrupted goes on where it stopped when `run` is called again with the same arguments:
    only blocks that were in flight are done again, and the result is the same, byte for byte.

    Parameters
    ----------
    operators
        Image operators in order of application, optionally followed by one label operator. Operators run
        together on a block, without intermediate stores, unless one needs a number of the whole result
        before it (a percentile): then that result is stored for the time of the job.
    source
        OME-Zarr image.
    output
        OME-Zarr to write. With image operators a new image, which labels are added to; with a label
        operator alone an existing image of the same shape, such as `source` itself.
    cluster
        A `distributed.Client`, the address of a scheduler, ``"local"``, ``"serial"`` or ``"auto"``; see
        `chunkrestore.cluster.connect`.
    n_workers
        Worker processes of a local cluster; one per core by default.
    block_shape
        Core of a block, voxels per spatial axis; derived from the operators' memory by default.
    depth
        Halo of every operator that takes one, instead of the derived one.
    level, timepoint, channel, region
        Part of `source` to process; everything at full resolution by default. Channels by name or index,
        the region as one (start, stop) per spatial axis in voxels of the level. The region is processed as
        if it were the whole volume.
    label_name
        Name of the labels.
    overwrite
        Replace an existing output, or an unfinished job. Until the input has been checked, nothing is
        removed.
    version
        OME-Zarr version of a new image, ``"0.5"`` or ``"0.4"``.
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
        If operators, image and parameters do not fit together; nothing was written then.
    chunkrestore.jobs.runner.BlockError
        If a block fails; the message names it. What is finished is kept.
    """
    image = _select(source, level, timepoint, channel, region)
    job = _Job(_plan(operators, image, block_shape, depth), image, Path(output), label_name, version)
    ledger = Ledger(job_folder(output, job.name))
    resuming = job.prepare(ledger, overwrite)
    progress = Progress(quiet=quiet)
    with connect(cluster, n_workers=n_workers) as client:
        runner = Runner(client)
        numbers = None if resuming else job.statistics(runner, progress, 0, image.source(0))
        if not resuming:
            ledger.delete()
        ledger.begin(job.manifest())
        try:
            if numbers is not None:
                ledger.decide("numbers-0", _to_json(numbers))
            report = Report(operators=[], plan=job.plan.describe(), outputs=[], versions=_versions())
            job.execute(Stages(runner, ledger, progress, report), overwrite=overwrite or resuming)
            ledger.finish(report.content())
        finally:
            ledger.close()
    return report


@dataclass(frozen=True)
class _Job:
    """One call of `run`, checked."""

    plan: Plan
    image: OmeZarrImage
    output: Path
    label_name: str
    version: str

    @property
    def image_passes(self) -> tuple[Pass, ...]:
        return tuple(p for p in self.plan.passes if not p.makes_labels)

    @property
    def label_pass(self) -> Pass | None:
        return self.plan.passes[-1] if self.plan.passes[-1].makes_labels else None

    @property
    def name(self) -> str:
        parts = ["image"] if self.image_passes else []
        return "+".join(parts + ([f"labels-{self.label_name}"] if self.label_pass else []))

    @property
    def planes(self) -> list[Plane]:
        return [(t, c) for t in range(self.plan.n_timepoints) for c in range(self.plan.n_channels)]

    def manifest(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "input": self.image.source(0).identity(),
            "output": {"name": self.name, "version": self.version},
            "passes": [p.describe() for p in self.plan.passes],
            "versions": _versions(),
        }

    def prepare(self, ledger: Ledger, overwrite: bool) -> bool:
        """Check the output; return whether an unfinished job goes on."""
        if ledger.exists and not ledger.complete and not overwrite:
            return True
        if self.image_passes:
            if _same(self.output, self.image.path):
                raise ValueError(f"`output` {self.output} is the input; give another store")
            if self.output.exists() and not overwrite:
                raise FileExistsError(f"`output` {self.output} exists; choose another name or pass `overwrite`")
            return False
        if not self.output.exists():
            return False
        target = self.image if _same(self.output, self.image.path) else open_image(self.output)
        if target is not self.image and target.spatial_shape != self.plan.shape:
            raise ValueError(
                f"`output` {self.output} has shape {target.spatial_shape} but the labels have {self.plan.shape}; "
                "labels belong to an image of their own shape"
            )
        if self.label_name in target.labels and not overwrite:
            raise FileExistsError(
                f"labels {self.label_name!r} exist in {self.output}; choose another name or pass `overwrite`"
            )
        return False

    def statistics(self, runner: Runner, progress: Progress, position: int, source: RegionReader) -> Any:
        """Return the numbers that a pass needs of its input, per plane; None if it needs none."""
        work = self.plan.passes[position]
        needs = work.needs
        if any(hasattr(operator, "tolerance") for operator in work.operators):
            needs = needs | set(RANGE)
        # Float images are always read once before anything is written: they may hold NaN.
        if not needs and source.dtype.kind != "f":
            return None
        return volume_statistics(runner, progress, source, work.grid, self.planes, needs)

    def execute(self, stages: Stages, *, overwrite: bool) -> None:
        """Do all stages that are not done yet."""
        source = self.image.source(0)
        for position, work in enumerate(self.image_passes):
            is_last = position == len(self.image_passes) - 1
            source = self._image(stages, position, work, source, is_last=is_last, overwrite=overwrite)
        if self.label_pass is not None:
            self._labels(stages, self.label_pass, source, overwrite=overwrite)

    def _image(
        self, stages: Stages, position: int, work: Pass, source: RegionReader, *, is_last: bool, overwrite: bool
    ) -> RegionReader:
        """Do one pass of image operators; return a handle on its result."""
        path = self.output if is_last else stages.ledger.folder / "scratch" / f"pass-{position}.ome.zarr"
        numbers = self._numbers(stages, position, source)
        operators = _resolved(work, numbers)
        stages.report.operators += _describe(operators)
        writer = self._writer(
            stages,
            f"image-{position}",
            path,
            lambda: create_image(
                path,
                shape=self.image.shape,
                dtype=np.float32,
                like=self.image,
                chunks=work.chunks,
                levels=None if is_last else 1,
                version=self.version,
                overwrite=overwrite,
            ),
        )
        target = writer.target(0) if writer is not None else open_image(path).source(0)
        stages.image_pass(f"blocks-{position}", work, operators, source, target)
        stages.seams(f"seams-{position}", work, operators, numbers, source, target)
        if writer is not None:
            stages.pyramid(f"pyramid-{position}", writer)
            self._publish(stages, f"image-{position}", writer)
        if is_last:
            stages.report.outputs.append(str(self.output))
        return open_image(path).source(0)

    def _labels(self, stages: Stages, work: Pass, source: RegionReader, *, overwrite: bool) -> None:
        numbers = self._numbers(stages, len(self.plan.passes) - 1, source)
        operators = {plane: group[0] for plane, group in _resolved(work, numbers).items()}
        stages.report.operators += _describe({plane: (operator,) for plane, operator in operators.items()})
        reaches = stages.objects(work, operators, source)
        writer = self._writer(
            stages,
            "labels",
            self.output / "labels" / self.label_name,
            lambda: create_labels(
                self.output,
                self.label_name,
                dtype=stages.labels_dtype(self.planes),
                like=self.image,
                # One channel's objects are not objects of a channel: the axis goes, unless it is needed.
                axes=self.image.axes if self.plan.n_channels > 1 else None,
                chunks=work.chunks,
                overwrite=overwrite,
            ),
        )
        if writer is not None:
            stages.paint(work, operators, reaches, source, writer.target(0))
            stages.pyramid("labels_pyramid", writer)
            self._publish(stages, "labels", writer)
        stages.report.outputs.append(f"{self.output}/labels/{self.label_name}")

    def _writer(
        self,
        stages: Stages,
        name: str,
        path: Path,
        create: Callable[[], ImageWriter],
    ) -> ImageWriter | None:
        """Return the writer of an output, made or opened again; None if the output is published already."""
        if stages.ledger.value(f"publishing-{name}") and _is_image(path):
            return None
        if stages.ledger.value(f"created-{name}"):
            return open_writer(path)
        writer = create()
        stages.ledger.decide(f"created-{name}", True)
        return writer

    def _publish(self, stages: Stages, name: str, writer: ImageWriter) -> None:
        content = stages.report.content()
        stages.ledger.decide(f"publishing-{name}", True)
        writer.publish(
            {key: content[key] for key in ("operators", "seams", "versions")}
            | {"input": self.image.source(0).identity()}
        )
    def _numbers(self, stages: Stages, position: int, source: RegionReader) -> dict[Plane, dict[float | str, float]]:
        """Return the numbers of a pass, computed once per job."""
        name = f"numbers-{position}"
        if stages.ledger.value(name) is None:
            numbers = self.statistics(stages.runner, stages.progress, position, source)
            stages.ledger.decide(name, _to_json(numbers or {}))
        return _from_json(stages.ledger.value(name), self.planes)


def _plan(
    operators: Operator | Sequence[Operator],
    image: OmeZarrImage,
    block_shape: Sequence[int] | None,
    depth: int | Sequence[int] | None,
) -> Plan:
    several = operators if isinstance(operators, Sequence) else [operators]
    return make_plan(
        several,
        image.spatial_shape,
        check_dtype(image.dtype, image.path),
        n_timepoints=image.n_t,
        n_channels=image.n_c,
        block_shape=block_shape,
        depth=depth,
    )


def _select(source: Store | OmeZarrImage, level: int, timepoint: Any, channel: Any, region: Region | None) -> OmeZarrImage:
    slices = None if region is None else tuple(r if isinstance(r, slice) else slice(*r) for r in region)
    return open_image(source).select(level=level, t=timepoint, c=channel, region=slices)


def _resolved(work: Pass, numbers: Mapping[Plane, Mapping[float | str, float]]) -> dict[Plane, tuple[Any, ...]]:
    """Return the operators of a pass for every plane, with the numbers of its volume filled in."""
    first, *others = work.operators
    return {
        plane: (first.resolve(of_plane) if first.needs else first, *others) for plane, of_plane in numbers.items()
    }


def _describe(operators: Mapping[Plane, Sequence[Operator]]) -> list[dict[str, Any]]:
    return [
        {"timepoint": t, "channel": c} | dict(operator.describe())
        for (t, c), group in operators.items()
        for operator in group
    ]


def _to_json(numbers: Mapping[Plane, Mapping[float | str, float]]) -> list[Any]:
    """Return numbers as lists: JSON has no keys that are not strings."""
    return [[*plane, list(of_plane.items())] for plane, of_plane in numbers.items()]


def _from_json(content: Sequence[Any], planes: Sequence[Plane]) -> dict[Plane, dict[float | str, float]]:
    numbers: dict[Plane, dict[float | str, float]] = {plane: {} for plane in planes}
    for t, c, items in content:
        numbers[t, c] = {key: value for key, value in items}
    return numbers


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _is_image(path: Path) -> bool:
    """Return whether the store at `path` was published before the job was interrupted."""
    try:
        open_image(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def _same(a: Path, b: Store) -> bool:
    return a.resolve() == Path(b).resolve()

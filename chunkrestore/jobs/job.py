"""One call of `chunkrestore.run`, checked: what its outputs are, and the order of its stages."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import chunkrestore
from chunkrestore.jobs.label_classes import VoxelLabelling
from chunkrestore.jobs.labelling import Labelling
from chunkrestore.jobs.ledger import Ledger, digest
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import check_available, table_path
from chunkrestore.jobs.passes import Pass
from chunkrestore.jobs.plan import Plan
from chunkrestore.jobs.prepare import copies_labels
from chunkrestore.jobs.sampling import measured
from chunkrestore.jobs.stages import RANGE, Numbers, Plane, Stages
from chunkrestore.ome_zarr import (
    ImageWriter,
    LabelsWriter,
    OmeZarrImage,
    RegionReader,
    clean_partial,
    create_image,
    create_labels,
    open_image,
    open_writer,
)
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.read import label_names
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.writer import unfinished_state
from chunkrestore.operators.base import LabelOperator, ObjectOperator, Operator
from chunkrestore.operators.stardist import StarDist

_LIBRARIES = ("numpy", "scipy", "tensorflow", "csbdeep", "stardist")
"""Libraries whose version can change the numbers."""


@dataclass(frozen=True)
class Job:
    """What to do with which image, and where the results go."""

    plan: Plan
    """Passes and blocks."""
    image: OmeZarrImage
    """Input, cut to what is processed."""
    output: str
    """Store to write, an absolute path or a URL: workers may run in other folders."""
    label_name: str
    """Name of the labels, if there is a label pass."""
    version: str
    """OME-Zarr version of a new store."""
    calibration: dict[str, Any] | None = None
    """How the depth was found, if it was calibrated."""
    memory_nbytes: int | None = None
    """Peak of a task that blocks were sized for, if it was given."""
    checksums: bool = False
    """Whether every chunk carries a checksum of its own."""
    compression: str = "zstd"
    """Codec of what is stored for good."""
    objects: str | None = None
    """Whether a table of the objects is written, and with their shapes: ``"table"``, ``"shapes"`` or None."""

    @property
    def image_passes(self) -> tuple[Pass, ...]:
        """The passes that write images."""
        return tuple(p for p in self.plan.passes if not p.makes_labels)

    @property
    def label_pass(self) -> Pass | None:
        """The pass that writes labels, which is the last one."""
        return self.plan.passes[-1] if self.plan.passes[-1].makes_labels else None

    @property
    def name(self) -> str:
        """Name of the job among those that write to the same store: what it makes there."""
        return job_name([p.operators[-1] for p in self.plan.passes], self.label_name, self.image)

    @property
    def copies_labels(self) -> bool:
        """Whether the job stores labels that exist already: it treats them as an image that is a group of labels."""
        return copies_labels(self.plan.passes[0].operators, self.image)

    @property
    def label_path(self) -> str:
        """Group of the labels."""
        return stores.join(self.output, "labels", self.label_name)

    @property
    def planes(self) -> list[Plane]:
        """Time points and channels."""
        return [(t, c) for t in range(self.plan.n_timepoints) for c in range(self.plan.n_channels)]

    def volumes(self, work: Pass) -> list[Plane]:
        """What a pass goes through: `planes`, or time points if it takes their channels together."""
        return self.planes if work.n_channels == 1 else [(t, 0) for t in range(self.plan.n_timepoints)]

    @property
    def _codecs(self) -> dict[str, Any]:
        return {"compression": self.compression, "checksums": self.checksums}

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the result."""
        source = input_identity(self.image)
        return {
            "schema": 1,
            "input": source,
            "output": {
                "labels": self.label_name if self.label_pass else None,
                "group": f"labels/{self.label_name}" if self.copies_labels else "",
                "version": self.version,
                "compression": self.compression,
                "checksums": self.checksums,
            },
            "objects": self.objects,
            "passes": [p.describe() for p in self.plan.passes],
            "calibration": self.calibration,
            "memory_nbytes": self.memory_nbytes,
            "versions": versions(),
        }

    def check_output(self, *, overwrite: bool) -> None:
        """Raise if the results cannot be written where they should go; nothing is touched.

        Raises
        ------
        FileExistsError
            If something exists that would have to be replaced, and `overwrite` is not set.
        ValueError
            If what exists is not for this job to replace, or to add labels to.
        """
        if stores.is_file(self.output):
            raise ValueError(f"`output` {self.output} is a file; give the path of an OME-Zarr")
        makes_labels = self.label_pass is not None or self.copies_labels
        if makes_labels and not re.fullmatch(r"(?!__)[\w-][\w. -]*", self.label_name, re.ASCII):
            raise ValueError(
                f"`label_name` {self.label_name!r} must be made of letters, digits, '_', '-', '.' and spaces"
            )
        Storage(self.version, compression=self.compression, checksums=self.checksums)  # raises
        self._check_objects()
        if self.image_passes and not self.copies_labels:
            self._check_image_output(overwrite)
        else:
            self._check_labels_output(overwrite)

    def _check_objects(self) -> None:
        if self.objects is None:
            return
        if self.objects not in ("table", "shapes"):
            raise ValueError(f"`objects` must be 'table', 'shapes' or None, got {self.objects!r}")
        operator = self.plan.passes[-1].operators[-1]
        if not isinstance(operator, StarDist) or hasattr(operator, "classes"):
            raise ValueError(
                f"`objects` {self.objects!r} is for labels of objects that StarDist finds; {operator.name} makes none, "
                "leave it out"
            )
        check_available()

    def _check_image_output(self, overwrite: bool) -> None:
        if stores.same(self.output, self.image.path):
            raise ValueError(f"`output` {self.output} is the input; give another store")
        check_image_place(self.output, overwrite=overwrite)

    def _check_labels_output(self, overwrite: bool) -> None:
        if not (
            stores.is_free(self.output)
            or stores.same(self.output, self.image.path)
            or label_names(self.output)
        ):
            target = open_image(self.output)
            if target.spatial_shape != self.plan.shape:
                raise ValueError(
                    f"`output` {self.output} has shape {target.spatial_shape} but the labels have "
                    f"{self.plan.shape}; labels belong to an image of their own shape"
                )
        if stores.exists(self.label_path) and not overwrite:
            raise FileExistsError(
                f"labels {self.label_name!r} exist in {self.output}; give another `label_name` or pass "
                "overwrite=True (--overwrite)"
            )

    def numbers(self, stages: Stages, position: int, source: RegionReader) -> dict[Plane, Numbers]:
        """Compute what a pass needs to know of its whole input."""
        work = self.plan.passes[position]
        needs = (work.needs - {"pilot"}) | (set(RANGE) if work.has_seams else set())
        # A float image is read once before anything is written, since it may hold NaN; our own results do not.
        if needs or (position == 0 and source.dtype.kind == "f" and not work.only_copies):
            numbers = stages.statistics(*measured(work, source), self.planes, needs)
        else:
            numbers = {plane: {} for plane in self.planes}
        return stages.pilots(source, work, numbers) if "pilot" in work.needs else numbers

    def operators(self, position: int, numbers: Mapping[Plane, Numbers]) -> dict[Plane, tuple[Any, ...]]:
        """Return the operators of a pass for every plane, with the numbers of its volume filled in."""
        work = self.plan.passes[position]
        first, *others = work.operators
        resolved = {}
        for t, c in self.volumes(work):
            of_volume: Mapping[Any, Any] = numbers[t, c]
            if work.n_channels > 1:
                of_volume = {k: tuple(numbers[t, i][k] for i in range(work.n_channels)) for k in of_volume}
            resolved[t, c] = (first.resolve(of_volume) if first.needs else first, *others)
        return resolved

    def execute(self, stages: Stages, *, overwrite: bool) -> None:
        """Do all stages that are not done yet."""
        for position in range(len(self.image_passes)):
            self._image(stages, position, overwrite=overwrite)
        if self.label_pass is not None:
            self._labels(stages, self.label_pass, overwrite=overwrite)

    def _image(self, stages: Stages, position: int, *, overwrite: bool) -> None:
        """Do one pass of image operators."""
        work, path = self.plan.passes[position], self.image_path(stages.ledger, position)
        numbers = self._decided_numbers(stages, position)
        operators = self.operators(position, numbers)
        _report_operators(stages, operators)
        is_last = position == len(self.image_passes) - 1
        writer = writer_of(
            stages,
            f"image-{position}",
            path,
            lambda: self._create(work, path, None if is_last else 1, overwrite=overwrite),
        )
        if writer is not None:
            source, target = self._source(stages, position), writer.target(0)
            n_done = stages.image_pass(f"blocks-{position}", work, operators, source, writer)
            if work.has_seams:
                stages.probe_seams(f"seams-{position}", work, operators, source, target)
            stages.pyramid(f"pyramid-{position}", writer, n_done)
        stages.report_seams(f"seams-{position}", work, numbers)
        if writer is not None:
            self._publish(stages, f"image-{position}", writer)
        elif self.copies_labels and self.label_name not in label_names(self.output):
            list_labels(path)
        if is_last:
            stages.report.outputs.append(path)
        if position > 0:
            shutil.rmtree(self.image_path(stages.ledger, position - 1), ignore_errors=True)

    def _create(self, work: Pass, path: str, levels: int | None, *, overwrite: bool) -> ImageWriter:
        """Create what an image pass fills: an image, or the labels that the job copies."""
        storage = {"chunks": work.chunks, "shards": work.shards} | self._codecs
        common: dict[str, Any] = {
            "like": self.image,
            "dtype": work.stored_dtype,
            "overwrite": overwrite,
        } | storage
        if self.copies_labels:
            version = self.version if stores.is_free(self.output) else None
            return create_labels(
                self.output,
                self.label_name,
                shape=self.image.shape,
                axes=self.image.axes,
                version=version,
                **common,
            )
        return create_image(path, shape=self.image.shape, levels=levels, version=self.version, **common)

    def _labels(self, stages: Stages, work: Pass, *, overwrite: bool) -> None:
        """Do the label pass."""
        position = len(self.plan.passes) - 1
        operators = {
            plane: group[0]
            for plane, group in self.operators(position, self._decided_numbers(stages, position)).items()
        }
        _report_operators(stages, {plane: (operator,) for plane, operator in operators.items()})
        source = self._source(stages, position)
        kind = Labelling if isinstance(work.operators[-1], ObjectOperator) else VoxelLabelling
        labelling = kind(stages, work.grid, operators, source)
        labelling.find_objects()
        if overwrite:
            # Of a killed attempt to list the labels; nobody else writes to the store while we hold its lock.
            clean_partial(stores.join(self.output, "labels"))
        writer = writer_of(
            stages,
            "labels",
            self.label_path,
            lambda: create_labels(
                self.output,
                self.label_name,
                dtype=labelling.labels_dtype(),
                like=None if self.image_passes else self.image,
                # One channel's objects are not objects of a channel: the axis goes, unless it is needed.
                axes=self.image.axes if len(self.volumes(work)) > self.plan.n_timepoints else None,
                chunks=work.chunks,
                shards=work.shards,
                **self._codecs,
                version=self.version if stores.is_free(self.output) else None,
                overwrite=overwrite,
                **labelling.attributes(),
            ),
        )
        if writer is not None:
            n_done = labelling.paint(writer)
            if self.objects is not None:
                assert isinstance(labelling, Labelling)  # `_check_objects`
                labelling.write_table(table_path(self.label_path), self._columns(operators), versions())
            stages.pyramid("labels_pyramid", writer, n_done)
            self._publish(stages, "labels", writer)
        elif self.label_name not in label_names(self.output):
            list_labels(self.label_path)
        stages.report.outputs.append(self.label_path)
        if self.objects is not None:
            stages.report.outputs.append(table_path(self.label_path))

    def _columns(self, operators: Mapping[Plane, StarDist]) -> ObjectColumns:
        """Return what the table of the objects tells."""
        operator = next(iter(operators.values()))
        return ObjectColumns(
            self.image.spatial_shape,
            self.image.voxel_size if self.image.calibrated else None,
            self.image.translation,
            predicted=True,
            n_classes=operator.n_classes,
            rays=operator.rays if self.objects == "shapes" else None,
            lattice=operator.rescale,
        )

    def image_path(self, ledger: Ledger, position: int) -> str:
        """Return the store that an image pass writes: the output, or scratch in the job's folder."""
        if position == len(self.image_passes) - 1:
            return self.label_path if self.copies_labels else self.output
        return str(ledger.folder / "scratch" / f"pass-{position}.ome.zarr")

    def _source(self, stages: Stages, position: int) -> RegionReader:
        """Return a handle on what a pass reads."""
        if position == 0:
            return self.image.source(0)
        return open_image(self.image_path(stages.ledger, position - 1)).source(0)

    def _decided_numbers(self, stages: Stages, position: int) -> dict[Plane, Numbers]:
        """Return the numbers of a pass, computed once per job."""
        name = f"numbers-{position}"
        if stages.ledger.value(name) is None:
            note_numbers(stages, position, self.numbers(stages, position, self._source(stages, position)))
        # JSON has no keys that are not strings, so they are kept as lists.
        return {(t, c): dict(items) for t, c, items in stages.ledger.value(name)}

    def _publish(self, stages: Stages, name: str, writer: ImageWriter) -> None:
        """Make an output visible, as the last act."""
        content = stages.report.content()
        # What workers left that were killed while they wrote. A scheduler that we did not start tells us of none.
        clean_partial(writer.path)
        # An output that is published must never be ahead of the journal, whatever fails.
        stages.ledger.sync()
        writer.publish(
            {key: content[key] for key in ("operators", "seams", "calibration", "n_clipped", "versions")}
            | {
                "blocks": [
                    {key: work[key] for key in ("block_shape", "depth")} for work in content["plan"]["passes"]
                ],
                "input": self.manifest()["input"],
            }
        )
        stages.ledger.decide(f"published-{name}", True)


def check_image_place(path: str, *, overwrite: bool) -> None:
    """Raise unless a new image may be written to `path`; nothing is touched.

    Raises
    ------
    FileExistsError
        If there is an image, finished or not, and `overwrite` is not set.
    ValueError
        If there is something else.
    """
    if stores.is_file(path):
        raise ValueError(f"`output` {path} is a file; give the path of an OME-Zarr")
    if stores.is_free(path):
        return
    if not (is_image(path) or unfinished_state(path)):
        raise ValueError(f"`output` {path} exists and is no OME-Zarr image; give another store")
    if not overwrite:
        raise FileExistsError(
            f"`output` {path} exists; give another store or pass overwrite=True (--overwrite)"
        )


def input_identity(image: OmeZarrImage) -> dict[str, Any]:
    """Return what identifies an input: its array and selection, its attributes, and what was said of it by hand."""
    told = {"attributes_sha256": digest(image.attributes), "opened_with": image.opened_with}
    return image.source(0).identity() | told


def job_name(operators: Sequence[Operator], label_name: str, image: OmeZarrImage) -> str:
    """Return the name of the job that these operators make of an image."""
    makes_image = any(not isinstance(operator, LabelOperator) for operator in operators)
    makes_image &= not copies_labels(operators, image)
    return "image" if makes_image else f"labels-{label_name}"


def note_numbers(stages: Stages, position: int, numbers: Mapping[Plane, Numbers]) -> None:
    """Note the numbers of a pass in the ledger."""
    stages.ledger.decide(
        f"numbers-{position}", [[*plane, list(of_plane.items())] for plane, of_plane in numbers.items()]
    )


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that make the numbers."""
    found = {"python": ".".join(map(str, sys.version_info[:2])), "chunkrestore": chunkrestore.__version__}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def is_image(path: str) -> bool:
    """Return whether a finished OME-Zarr image lies at `path`."""
    try:
        open_image(path)
    except (ValueError, FileNotFoundError):
        return False
    return True


def writer_of(stages: Stages, name: str, path: str, create: Callable[[], ImageWriter]) -> ImageWriter | None:
    """Return the writer of an output, made or opened again; None if the output is published already."""
    ledger = stages.ledger
    if ledger.value(f"published-{name}"):
        return None
    clean_partial(path)
    if not ledger.value(f"created-{name}"):
        writer = create()
        ledger.decide(f"created-{name}", True)
        return writer
    if not is_image(path):
        return open_writer(path)
    # The job was killed after it had published, before it could note so. Noted now: scratch images go later.
    ledger.decide(f"published-{name}", True)
    return None


def list_labels(path: str) -> None:
    """List labels that the job had published, but not listed yet, when it was killed."""
    labels = open_image(path)
    LabelsWriter(
        path=labels.path,
        version=labels.version,
        targets=(),
        factors=(),
        method="",
        document=labels.attributes,
    ).publish()


def _report_operators(stages: Stages, operators: Mapping[Plane, Sequence[Operator]]) -> None:
    stages.report.operators += [
        {"timepoint": t, "channel": c} | dict(operator.describe())
        for (t, c), group in operators.items()
        for operator in group
    ]

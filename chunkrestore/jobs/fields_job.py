"""What one call of `chunkrestore.jobs.fields.run_fields` does with which fields, checked."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkrestore.jobs.fields_record import FieldsRecord, keep_record, read_record, record_folder
from chunkrestore.jobs.job import Job, is_image, job_name, versions
from chunkrestore.jobs.ledger import Ledger, ManifestMismatchError, differences, work_folder_of
from chunkrestore.jobs.prepare import Options, Store, select
from chunkrestore.jobs.report import Report, Seam
from chunkrestore.jobs.run import job_of, run
from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.collecting import CollectionWriter
from chunkrestore.ome_zarr.collection import Collection, open_collection
from chunkrestore.ome_zarr.members import Field
from chunkrestore.ome_zarr.read import label_names
from chunkrestore.operators.base import Operator
from chunkrestore.operators.saved import NotSavableError, load_operators, save_operators

if TYPE_CHECKING:
    from distributed import Client

_WHERE = ("cluster", "n_workers", "profile", "work_folder", "overwrite", "quiet")
"""Arguments of `run` that say where a job runs and not what it makes."""


@dataclass(frozen=True)
class FieldsJob:
    """What to do with which fields of which collection."""

    operators: list[Operator]
    """In order of application."""
    source: Collection
    """All of the input."""
    fields: tuple[Field, ...]
    """What is processed of it."""
    target: str
    """Path or URL of the output."""
    work: Path
    """Where the files of the jobs are kept."""
    options: dict[str, Any]
    """Arguments of `run`, all but those that say where it runs."""
    n_workers: int | None = None
    """For the share of memory that a block may take."""

    @classmethod
    def of(
        cls,
        operators: list[Operator],
        collection: str,
        fields: tuple[Field, ...],
        output: Store,
        work_folder: Store | None,
        n_workers: int | None,
        options: Mapping[str, Any],
    ) -> FieldsJob:
        """Return the job that arguments of `run_fields` mean.

        Raises
        ------
        TypeError
            If `run` has no such argument.
        """
        known = {
            name: parameter.default
            for name, parameter in inspect.signature(run).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in _WHERE
        }
        if unknown := set(options) - set(known):
            raise TypeError(f"`run` has no argument {', '.join(sorted(unknown))}; it has {', '.join(known)}")
        target = stores.writable(stores.location(output))
        work = work_folder_of(target, work_folder)
        return cls(
            operators, open_collection(collection), fields, target, work, known | dict(options), n_workers
        )

    @cached_property
    def name(self) -> str:
        """Name of the job of every field."""
        return job_name(self.operators, self.options["label_name"], self._image(self.fields[0]))

    @property
    def writer(self) -> CollectionWriter | None:
        """Who writes the metadata of the output; None if labels go into a collection that exists."""
        if self.name != "image":
            return None
        return CollectionWriter(self.target, self.options["version"], self.source)

    @property
    def folder(self) -> Path:
        """Where it is kept what was asked for."""
        return record_folder(self.work, self.name)

    @property
    def record(self) -> FieldsRecord:
        """What is asked for in this call."""
        options = {key: value for key, value in self.options.items() if key != "page"}
        content = {
            "input": self.source.path,
            "operators": [dict(operator.describe()) for operator in self.operators],
            "options": options,
            "members": [field.member for field in self.fields],
        }
        return FieldsRecord(**json.loads(json.dumps(content, default=_plain)))

    def check(self, *, overwrite: bool) -> None:
        """Raise if the job cannot begin; nothing is touched.

        Raises
        ------
        FileExistsError, ManifestMismatchError, ValueError
            As for `run_fields`.
        """
        first = self._job(self.fields[0], {}, calibrate=False)
        earlier = read_record(self.folder)
        changes = [] if earlier is None else earlier.differences(self.record)
        if changes and not overwrite:
            raise ManifestMismatchError(
                f"fields of {self.target} were made with something else: {'; '.join(changes)}. Repeat it as it was, or "
                "start anew with overwrite=True (--overwrite)"
            )
        if self.writer is None:
            self._check_images()
            # Labels that an earlier call has made are no obstacle; those of others show when their field's turn comes.
            first.check_output(overwrite=True)
            return
        if stores.same(self.target, self.source.path):
            raise ValueError(f"`output` {self.target} is the input; give another store")
        published = self.writer.existing()
        begun = stores.read_node(self.target) is not None
        if begun and earlier is None and not overwrite:
            raise FileExistsError(
                f"`output` {self.target} exists; give another store or pass overwrite=True (--overwrite)"
            )
        there = {field.member for field in published.fields} if published is not None else set()
        if overwrite and (changes or earlier is None) and there - {field.member for field in self.fields}:
            raise ValueError(
                f"`output` {self.target} holds fields beside the chosen ones that were made with something else; "
                "overwrite all of them, or give another store"
            )
        first.check_output(overwrite=True)

    def begin(self, *, overwrite: bool) -> FieldsRecord:
        """Keep what is asked for, and make the output ready; what is to be made anew is withdrawn first."""
        earlier, asked = read_record(self.folder), self.record
        if earlier is not None and not earlier.differences(asked):
            asked = replace(earlier, options=asked.options).merged(asked.members, [])
        if overwrite:
            asked = asked.merged([], [field.member for field in self.fields])
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_operators(self.operators, self.folder)
        except NotSavableError as error:
            asked = replace(asked, unsavable=str(error))
        keep_record(self.folder, asked)
        writer = self.writer
        if writer is not None:
            writer.begin()
        if overwrite:
            if writer is not None:
                writer.withdraw(self.fields)
            for field in self.fields:
                shutil.rmtree(self._folder(field), ignore_errors=True)
        return asked

    def finished(self, field: Field) -> Report | None:
        """Return the report of a field that an earlier call has finished, or None if it is still to do.

        Raises
        ------
        ManifestMismatchError
            If it was made with something else.
        """
        ledger = Ledger(self._folder(field))
        if not ledger.complete:
            return None
        manifest = ledger.manifest()
        now = json.loads(json.dumps(self._job(field, manifest).manifest()))
        if changes := differences(manifest, now):
            raise ManifestMismatchError(
                f"field {field.member} was made with something else: {'; '.join(changes)}. Repeat it as it was, or "
                "start anew with overwrite=True (--overwrite)"
            )
        place = stores.join(self.target, field.member)
        there = is_image(place) if self.name == "image" else self.options["label_name"] in label_names(place)
        return _report(self._folder(field)) if there else None

    def run(self, field: Field, client: Client | None, *, overwrite: bool, quiet: bool) -> Report:
        """Do one field, or go on with it."""
        unfinished = Ledger(self._folder(field)).unfinished
        return run(
            self.operators,
            field.path,
            stores.join(self.target, field.member),
            cluster="serial" if client is None else client,
            n_workers=self.n_workers,
            work_folder=self.work / field.member,
            overwrite=overwrite and not unfinished,
            quiet=quiet,
            **self.options,
        )

    @cached_property
    def n_blocks(self) -> int:
        """Blocks of the first field, all passes."""
        return self._job(self.fields[0], {}, calibrate=False).plan.n_blocks

    def list(self, field: Field) -> None:
        """Tell readers of a field that is finished."""
        if self.writer is not None:
            self.writer.add(field)

    def publish(self) -> None:
        """Make the output a collection."""
        if self.writer is not None:
            asked = self.record
            provenance = {
                "operators": asked.operators,
                "input": {"store": asked.input},
                "versions": versions(),
            }
            self.writer.publish(self.fields, provenance)

    def _check_images(self) -> None:
        """Raise unless the output has the images that labels are to be made for."""
        if stores.same(self.target, self.source.path):
            return
        there = {field.member for field in open_collection(self.target).fields}
        absent = [field.member for field in self.fields if field.member not in there]
        if absent:
            raise ValueError(
                f"`output` {self.target} has no field {absent[0]}, nor {len(absent) - 1} others, to write labels into; "
                "write into the input itself, or make images first"
            )

    def _folder(self, field: Field) -> Path:
        return self.work / field.member / self.name

    def _image(self, field: Field) -> OmeZarrImage:
        level, t, c, region = (self.options[key] for key in ("level", "timepoint", "channel", "region"))
        return select(field.path, level, t, c, region)

    def _job(self, field: Field, earlier: Mapping[str, Any], **changed: Any) -> Job:
        names = {f.name for f in fields_of(Options)}
        options = Options(**{key: value for key, value in (self.options | changed).items() if key in names})
        place = stores.join(self.target, field.member)
        return job_of(self.operators, self._image(field), place, options, self.n_workers, earlier)


def load_request(folder: Path) -> tuple[list[Operator], FieldsRecord]:
    """Return the operators and the record that a job has kept in `folder`.

    Raises
    ------
    ValueError
        If operators were not, or could not be, kept.
    """
    record = read_record(folder)
    if record is None or record.unsavable:
        why = record.unsavable if record is not None else f"{folder} holds no record"
        raise ValueError(
            f"{why}; repeat the command or script that began the job; it goes on where it stopped"
        )
    return load_operators(folder), record


def _report(folder: Path) -> Report:
    """Return the report of a finished job."""
    content = json.loads((folder / "report.json").read_text())
    seams = [Seam(**seam | {"position": tuple(seam["position"])}) for seam in content["seams"]]
    return Report(**content | {"seams": seams})


def _plain(value: Any) -> Any:
    """Return what stands for an argument of `run` in JSON."""
    if isinstance(value, slice):
        return [value.start, value.stop]
    return value.item() if hasattr(value, "item") else str(value)

"""What was asked of a collection, kept in its work folder: ``OUTPUT.chunkrestore/fields-JOB/fields.json``.

The jobs of the fields themselves lie beside it, each in ``OUTPUT.chunkrestore/FIELD/JOB``. Nothing here loads a
library: telling the status of jobs needs none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chunkrestore.jobs.ledger import Ledger, differences, job_folders, write_atomically

_FILE = "fields.json"


@dataclass(frozen=True)
class FieldsRecord:
    """What is to be made of which fields."""

    input: str
    """Path of the collection that is read."""
    operators: list[dict[str, Any]]
    """What the operators say of themselves."""
    options: dict[str, Any]
    """Arguments of `run` that decide what is made."""
    members: list[str]
    """Fields that were asked for so far."""
    replacing: list[str] = field(default_factory=list)
    """Those whose earlier results are to be replaced and have not been yet."""
    unsavable: str | None = None
    """Why the operators could not be kept, if they could not."""

    def differences(self, other: FieldsRecord) -> list[str]:
        """Return in words what `other` would make in another way."""

        def deciding(record: FieldsRecord) -> dict[str, Any]:
            options = {key: value for key, value in record.options.items() if key != "device"}
            return {"input": record.input, "operators": record.operators, "options": options}

        return differences(deciding(self), deciding(other))

    def merged(self, members: Sequence[str], replaced: Sequence[str]) -> FieldsRecord:
        """Return this record with more fields asked for, some of which are to be replaced."""
        return replace(
            self,
            members=list(dict.fromkeys([*self.members, *members])),
            replacing=list(dict.fromkeys([*self.replacing, *replaced])),
        )

    def without(self, replaced: str) -> FieldsRecord:
        """Return this record when a field has been replaced."""
        return replace(self, replacing=[member for member in self.replacing if member != replaced])


def record_folder(work: Path, job: str) -> Path:
    """Return where the record of the jobs called `job` lies in the work folder of a collection."""
    return work / f"fields-{job}"


def keep_record(folder: Path, record: FieldsRecord) -> FieldsRecord:
    """Keep a record in `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FILE, json.dumps(asdict(record), indent=1))
    return record


def read_record(folder: Path) -> FieldsRecord | None:
    """Return what is kept in `folder`, or None if there is nothing.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    path = folder / _FILE
    try:
        return FieldsRecord(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); start anew with overwrite=True (--overwrite)"
        ) from None


def records(work: Path) -> dict[str, FieldsRecord]:
    """Return what was asked of a collection, by name of the job; nothing for a single image."""
    found = {}
    for path in sorted(work.glob(f"fields-*/{_FILE}")):
        record = read_record(path.parent)
        if record is not None:
            found[path.parent.name.removeprefix("fields-")] = record
    return found


def field_folders(work: Path) -> dict[str, Path]:
    """Return the folders of the jobs of all fields that were asked for, by ``FIELD/JOB``; some may not exist yet."""
    return {
        f"{member}/{job}": work / member / job
        for job, record in records(work).items()
        for member in record.members
    }


def begun_jobs(work: Path, output: str) -> dict[str, tuple[str, Path]]:
    """Return what was begun in a work folder: by name of the job, the store that it writes and its own folder.

    Jobs on the fields of a collection are called ``FIELD/JOB``.
    """
    found = {folder.name: (output, folder) for folder in job_folders(work)}
    for name, folder in field_folders(work).items():
        if (folder / "manifest.json").is_file():
            found[name] = f"{output}/{name.rpartition('/')[0]}", folder
    return found


def is_done(work: Path, job: str, record: FieldsRecord) -> bool:
    """Return whether all fields that were asked for are finished."""
    return not record.replacing and all(Ledger(work / member / job).complete for member in record.members)

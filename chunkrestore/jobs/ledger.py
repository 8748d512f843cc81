"""What a job has done, on disk beside its output, so that a killed job goes on where it stopped.

``OUT.chunkrestore/JOB/`` holds ``manifest.json`` (what the job is: input, operators, grid, versions),
``journal.jsonl`` (one line per finished block, written by the driver after the block's data is complete),
``report.json`` once it is done, and tables and scratch images while it runs. Only the driver writes the
manifest and the journal, and a lock keeps a second driver away. Every beginning of a journal is a truthful
journal: what a crash cut off is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

Item = tuple[int, ...]
"""One unit of work: time point, channel, block index."""

_DEEPEST_FIELD = 3
"""Groups between a plate and the end of the path of a field: row, column, field."""

_FSYNC_SECONDS = 2.0
"""Longest time that finished blocks may be lost to a power failure."""


class ManifestMismatchError(ValueError):
    """An unfinished job at the same output was started with something else."""


class Ledger:
    """Manifest and journal of one job.

    Parameters
    ----------
    folder
        The job's own folder.
    guard
        Called before anything is written; raises if the job has lost its output to another driver.
    """

    def __init__(self, folder: str | os.PathLike[str], guard: Callable[[], None] = lambda: None) -> None:
        self.folder = Path(folder)
        self._guard = guard
        self._file: TextIO | None = None
        self._synced = 0.0
        self._journal = Journal()

    @property
    def complete(self) -> bool:
        """Whether a job came to its end here."""
        return (self.folder / "report.json").is_file()

    @property
    def unfinished(self) -> bool:
        """Whether a job was started here and has not come to its end."""
        return (self.folder / "manifest.json").is_file() and not self.complete

    def manifest(self) -> dict[str, Any]:
        """Return what the job at this folder is."""
        content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return content

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise unless the unfinished job is the one of `manifest`.

        Raises
        ------
        ManifestMismatchError
            Saying in what they differ.
        """
        changes = differences(self.manifest(), json.loads(json.dumps(manifest)))
        if changes:
            raise ManifestMismatchError(
                f"the unfinished job in {self.folder} was started with something else: "
                f"{'; '.join(changes)}. Repeat it as it was, or start anew with overwrite=True (--overwrite)"
            )

    def forget(self) -> None:
        """Forget the job that was here, finished or not, and make its folder anew."""
        self.close()
        self._guard()
        # First what makes it a job, so that half a removal is not taken for one.
        (self.folder / "manifest.json").unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Start a job, or go on with the unfinished one of the same manifest.

        Parameters
        ----------
        manifest
            JSON-compatible values that identify the job.

        Raises
        ------
        ManifestMismatchError
            If the unfinished job differs, or its journal belongs to another one; the message says in what.
        """
        self.close()
        self._guard()
        if self.unfinished:
            self.check(manifest)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        path = self.folder / "journal.jsonl"
        self._journal = read_journal(path)
        if path.exists() and self._journal.n_bytes < path.stat().st_size:
            os.truncate(path, self._journal.n_bytes)
        self._file = path.open("a", encoding="utf-8")
        content = digest(json.loads(json.dumps(manifest)))
        if self._journal.manifest is None:
            self._append({"manifest": content})
        elif self._journal.manifest != content:
            raise ManifestMismatchError(
                f"journal and manifest in {self.folder} belong to different jobs; one of them was edited or copied. "
                "Start anew with overwrite=True (--overwrite)"
            )

    def begin_stage(self, stage: str, n_items: int) -> StageRecord:
        """Return what is known of a stage, noting that it has begun unless that is noted."""
        record = self._journal.stage(stage)
        if record.n_items != n_items:
            self._append({"stage": stage, "n_items": n_items})
        return record

    def end_stage(self, stage: str) -> None:
        """Note that all items of a stage are finished."""
        if not self._journal.stage(stage).done:
            self._append({"stage": stage, "done": True})

    def finished(self, stage: str) -> Mapping[Item, Any]:
        """Return the finished items of a stage, with what each of them reported."""
        return MappingProxyType(self._journal.stage(stage).finished)

    def record(self, stage: str, item: Item, payload: Any) -> None:
        """Note that an item is finished; its data must be complete."""
        self._append({"stage": stage, "item": list(item), "payload": payload})

    def fail(self, stage: str, item: Item, cause: str, message: str) -> None:
        """Note that an item was given up."""
        self._append({"stage": stage, "failed": list(item), "cause": cause, "message": message})

    def value(self, name: str) -> Any:
        """Return what was decided once for the job, or None if it is not decided yet."""
        return self._journal.values.get(name)

    def decide(self, name: str, value: Any) -> Any:
        """Note what is decided once for the job."""
        self._append({"value": name, "payload": value})
        return value

    def sync(self) -> None:
        """Bring the journal to the disk, before something happens that presumes it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Close the journal, drop scratch data and keep the report, which makes the job a finished one."""
        self.close()
        self._guard()
        for scratch in ("tables", "scratch"):
            shutil.rmtree(self.folder / scratch, ignore_errors=True)
        write_atomically(self.folder / "report.json", json.dumps(report, indent=1))

    def close(self) -> None:
        """Close the journal."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"the ledger in {self.folder} is closed; call `begin` first")
        self._guard()
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > _FSYNC_SECONDS:
            self.sync()
        self._journal.add(entry)


@dataclass
class StageRecord:
    """What the journal tells of one stage."""

    n_items: int | None = None
    """Items of the stage; None if it has not begun."""
    finished: dict[Item, Any] = field(default_factory=dict)
    """Finished items, with what each of them reported."""
    failed: dict[Item, dict[str, str]] = field(default_factory=dict)
    """Items that were given up and not finished since, with cause and message."""
    done: bool = False
    """Whether the stage came to its end."""


@dataclass
class Journal:
    """What the lines of a journal add up to."""

    manifest: str | None = None
    """SHA-256 of the manifest that the journal belongs to."""
    stages: dict[str, StageRecord] = field(default_factory=dict)
    """In the order in which they began."""
    values: dict[str, Any] = field(default_factory=dict)
    """What was decided once for the job."""
    n_bytes: int = 0
    """Length of the whole lines; what follows was cut off by a crash."""

    def stage(self, name: str) -> StageRecord:
        """Return the record of a stage."""
        return self.stages.setdefault(name, StageRecord())

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take one line into account."""
        if "stage" in entry:
            record = self.stage(entry["stage"])
            if "item" in entry:
                item = tuple(entry["item"])
                record.finished[item] = entry["payload"]
                record.failed.pop(item, None)
            elif "failed" in entry:
                record.failed[tuple(entry["failed"])] = {key: entry[key] for key in ("cause", "message")}
            elif "n_items" in entry:
                record.n_items = entry["n_items"]
            else:
                record.done = True
        elif "value" in entry:
            self.values[entry["value"]] = entry["payload"]
        else:
            self.manifest = entry["manifest"]


def read_journal(path: Path) -> Journal:
    """Return what a journal tells, up to the first line that a crash has spoilt; nothing if there is none."""
    journal = Journal()
    for entry, n_bytes in journal_entries(path):
        journal.add(entry)
        journal.n_bytes += n_bytes
    return journal


def journal_entries(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the entries of a journal with the length of their lines, up to the first that a crash has spoilt."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                return
            yield entry, len(line)


def work_folder_of(output: str, given: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that keeps the ledgers of the jobs that write into the store `output`.

    Beside the store; for a URL, which has no place for an append-only journal, in the current folder, under the
    whole URL's name: stores of different buckets may be called the same. Of a field of a collection, the folder
    that it has among those of the collection, if there is one.
    """
    if given is not None:
        return Path(given).expanduser().absolute()
    parts = output.rstrip("/").split("/")
    for depth in range(1, min(_DEEPEST_FIELD + 1, len(parts))):
        within = _work_folder_named("/".join(parts[:-depth])).joinpath(*parts[-depth:])
        if ".." not in parts and within.is_dir():
            return within
    return _work_folder_named(output)


def _work_folder_named(output: str) -> Path:
    _, is_url, rest = output.partition("://")
    beside = rest.strip("/").replace("/", "-") if is_url else output.rstrip("/")
    return Path(f"{beside}.chunkrestore").absolute()


def job_folders(work: Path) -> list[Path]:
    """Return the folders of the jobs that were begun in `work`, by name."""
    return sorted(path.parent for path in work.glob("*/manifest.json"))


def only_unfinished(work: Path, name: str | None) -> Path:
    """Return the folder of the unfinished job in `work`: the one called `name`, or the only one.

    Raises
    ------
    ValueError
        If there is none, or several to choose from.
    """
    unfinished = [folder.name for folder in job_folders(work) if Ledger(folder).unfinished]
    if name is None and len(unfinished) == 1:
        return work / unfinished[0]
    if name in unfinished:
        return work / str(name)
    if name is None and unfinished:
        raise ValueError(
            f"{work} holds several unfinished jobs; choose one as `job`: {', '.join(unfinished)}"
        )
    known = f"; unfinished are {', '.join(unfinished)}" if unfinished else ""
    what = "unfinished job" if name is None else f"unfinished job {name!r}"
    raise ValueError(f"{work} holds no {what}{known}")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return in words what differs between two JSON-like values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    if _is_list(old) and _is_list(new) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, and bring it to the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

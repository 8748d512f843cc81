"""What a job has done, on disk beside its output, so that a killed job goes on where it stopped.

``OUT.chunkrestore/JOB/`` holds ``manifest.json`` (what the job is: input, operators, grid, versions),
``journal.jsonl`` (one line per finished block, written by the driver after the block's data is complete),
``report.json`` once it is done, and tables and scratch images while it runs. Only the driver writes the
manifest and the journal. Every beginning of a journal is a truthful journal: what a crash cut off is done
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Item = tuple[int, ...]
"""One unit of work: time point, channel, block index."""

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
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._journal: TextIO | None = None
        self._synced = 0.0
        self._finished: dict[str, dict[Item, Any]] = {}
        self._values: dict[str, Any] = {}

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

    def begin(self, manifest: Mapping[str, Any], *, anew: bool = False) -> None:
        """Start a job, or go on with the unfinished one of the same manifest.

        Parameters
        ----------
        manifest
            JSON-compatible values that identify the job.
        anew
            Forget the job that was here, finished or not.

        Raises
        ------
        ManifestMismatchError
            If the unfinished job differs; the message says in what.
        """
        self.close()
        if anew:
            # First what makes it a job, so that half a removal is not taken for one.
            (self.folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.unfinished:
            self.check(manifest)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        self._finished, self._values = {}, {}
        path = self.folder / "journal.jsonl"
        if path.exists():
            self._read_journal(path)
        self._journal = path.open("a", encoding="utf-8")

    def finished(self, stage: str) -> dict[Item, Any]:
        """Return the finished items of a stage, with what each of them reported."""
        return dict(self._finished.get(stage, {}))

    def record(self, stage: str, item: Item, payload: Any) -> None:
        """Note that an item is finished; its data must be complete."""
        self._append({"stage": stage, "item": list(item), "payload": payload})
        self._finished.setdefault(stage, {})[tuple(item)] = payload

    def value(self, name: str) -> Any:
        """Return what was decided once for the job, or None if it is not decided yet."""
        return self._values.get(name)

    def decide(self, name: str, value: Any) -> Any:
        """Note what is decided once for the job."""
        self._append({"value": name, "payload": value})
        self._values[name] = value
        return value

    def sync(self) -> None:
        """Bring the journal to the disk, before something happens that presumes it."""
        if self._journal is not None:
            self._journal.flush()
            os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Close the journal, keep the report and drop scratch data."""
        self.close()
        _write_atomically(self.folder / "report.json", json.dumps(report, indent=1))
        self.drop_scratch()

    def drop_scratch(self) -> None:
        """Remove tables and intermediate images, if any are left."""
        for scratch in ("tables", "scratch"):
            shutil.rmtree(self.folder / scratch, ignore_errors=True)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self.sync()
            self._journal.close()
            self._journal = None

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._journal is None:
            raise RuntimeError(f"the ledger in {self.folder} is closed; call `begin` first")
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        if time.monotonic() - self._synced > _FSYNC_SECONDS:
            self.sync()

    def _read_journal(self, path: Path) -> None:
        """Take over the whole lines of a journal, and cut it off at the first that a crash has spoilt."""
        content = path.read_bytes()
        n_good = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                break
            n_good += len(line)
            if "stage" in entry:
                self._finished.setdefault(entry["stage"], {})[tuple(entry["item"])] = entry["payload"]
            else:
                self._values[entry["value"]] = entry["payload"]
        if n_good < len(content):
            os.truncate(path, n_good)


def job_folder(store: str | os.PathLike[str], name: str) -> Path:
    """Return the folder of the job called `name` that writes into `store`."""
    return Path(f"{os.fspath(store).rstrip('/')}.chunkrestore") / name


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


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

"""What a job has done, on disk beside its output, so that a killed job goes on where it stopped.

``OUT.chunkrestore/JOB/`` holds ``manifest.json`` (what the job is: input, operators, grid, versions),
``journal.jsonl`` (one line per finished block, written by the driver after the block's data is complete),
``report.json`` once it is done, and scratch data while it runs. Only the driver writes the manifest and
the journal; a last line cut off by a crash is ignored, and its block is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        self._journal: Any = None
        self._synced = 0.0
        self._finished: dict[str, dict[Item, Any]] = {}
        self._values: dict[str, Any] = {}

    @property
    def exists(self) -> bool:
        """Whether a job was started here."""
        return (self.folder / "manifest.json").is_file()

    @property
    def complete(self) -> bool:
        """Whether the job came to its end."""
        return (self.folder / "report.json").is_file()

    def manifest(self) -> dict[str, Any]:
        """Return what the job at this folder is."""
        content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return content

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Start a new job, or go on with the unfinished one if its manifest is the same.

        Raises
        ------
        ManifestMismatchError
            If the unfinished job differs; the message says in what.
        """
        manifest = json.loads(json.dumps(manifest))
        if self.exists:
            changes = differences(self.manifest(), manifest)
            if changes:
                raise ManifestMismatchError(
                    f"the unfinished job in {self.folder} was started with something else: "
                    f"{'; '.join(changes)}. Repeat it as it was, or start anew with `overwrite`"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1))
        self._read_journal()
        self._journal = open(self.folder / "journal.jsonl", "a", encoding="utf-8")

    def finished(self, stage: str) -> dict[Item, Any]:
        """Return the finished items of a stage, with what each of them reported."""
        return dict(self._finished.get(stage, {}))

    def record(self, stage: str, item: Item, payload: Any) -> None:
        """Note that an item is finished; its data must be complete."""
        self._append({"stage": stage, "item": list(item), "payload": payload})
        self._finished.setdefault(stage, {})[tuple(item)] = payload

    def value(self, name: str) -> Any:
        """Return a number decided once for the job, or None if it is not decided yet."""
        return self._values.get(name)

    def decide(self, name: str, value: Any) -> Any:
        """Note a number decided once for the job."""
        self._append({"value": name, "payload": value})
        self._values[name] = value
        return value

    def finish(self, report: Mapping[str, Any]) -> None:
        """Close the journal, drop scratch data and keep the report."""
        self._sync()
        self.close()
        _write_atomically(self.folder / "report.json", json.dumps(report, indent=1))
        for scratch in ("tables", "scratch"):
            shutil.rmtree(self.folder / scratch, ignore_errors=True)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._sync()
            self._journal.close()
            self._journal = None

    def delete(self) -> None:
        """Forget the job."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        if time.monotonic() - self._synced > _FSYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._synced = time.monotonic()

    def _read_journal(self) -> None:
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # A line that the crash cut off; appending to it would spoil the next one as well.
            with open(path, "r+b") as journal:
                journal.truncate(len(whole))
        for line in whole.splitlines():
            entry = json.loads(line)
            if "stage" in entry:
                self._finished.setdefault(entry["stage"], {})[tuple(entry["item"])] = entry["payload"]
            else:
                self._values[entry["value"]] = entry["payload"]


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
    if isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


def digest(content: Any) -> str:
    """Return the SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

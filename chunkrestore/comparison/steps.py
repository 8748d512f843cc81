"""Steps that are done once: a record of each says what it was and what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkrestore.jobs.events import read_events
from chunkrestore.jobs.ledger import Ledger, differences, write_atomically


@dataclass(frozen=True)
class Steps:
    """The steps of a comparison in a folder."""

    folder: Path
    """Holds a file per step."""
    overwrite: bool
    """Do everything anew."""

    def do(self, name: str, what: Mapping[str, Any], action: Callable[[bool], Any]) -> Any:
        """Return what a step gives, from its record if it was done.

        Parameters
        ----------
        name
            Of the step.
        what
            JSON-compatible values that identify it.
        action
            Does it, told whether it was begun before; returns JSON-compatible values.

        Raises
        ------
        ValueError
            If the step was begun as something else; the message says in what they differ.
        """
        record = self.record(name, what)
        if record is not None and "found" in record:
            return record["found"]
        path = self._path(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"what": what}, indent=1))
        found = json.loads(json.dumps(action(record is not None)))
        write_atomically(path, json.dumps({"what": what, "found": found}, indent=1))
        return found

    def record(self, name: str, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record of a step, or None if it was not begun or is done anew; raise as `do` does."""
        path = self._path(name)
        if self.overwrite or not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        changes = differences(record["what"], json.loads(json.dumps(what)))
        if changes:
            raise ValueError(
                f"{name!r} in {self.folder.parent} was made with something else: {'; '.join(changes)}. Repeat it as it "
                "was, choose another folder, or start anew with overwrite=True (--overwrite)"
            )
        return record

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def complete(job: Path) -> bool:
    """Return whether the job in a folder came to its end."""
    return Ledger(job).complete


def processor_seconds(cluster: Any) -> dict[str, float]:
    """Return the processor time that this process and the workers of a cluster have spent, by process.

    Parameters
    ----------
    cluster
        A `distributed.Client`, or ``"serial"``.
    """
    own = {"driver": time.process_time()}
    return own if isinstance(cluster, str) else own | cluster.run(time.process_time)


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the processor seconds between two answers of `processor_seconds`; workers that came count from 0."""
    return sum(seconds - before.get(name, 0.0) for name, seconds in after.items())


def told_by(job: Path) -> dict[str, Any]:
    """Return what a finished job tells: operators as decided, blocks, seams, and the seconds that it took.

    ``wall`` adds up its stages, of all sittings; ``compute`` the time that tasks have computed, all workers together.
    """
    report = json.loads((job / "report.json").read_text())
    wall = compute = 0.0
    for event in read_events(job / "events.jsonl"):
        if event["event"] == "stage_end":
            wall += event["seconds"]
        elif event["event"] == "block":
            compute += event["seconds"].get("compute", 0.0)
    kept = ("operators", "seams", "n_objects", "n_resumed", "versions")
    return {
        **{name: report.get(name) for name in kept},
        "passes": [
            {name: one[name] for name in ("block_shape", "depth", "n_blocks")}
            for one in report["plan"]["passes"]
        ],
        "seconds": {"wall": round(wall, 3), "compute": round(compute, 3)},
    }

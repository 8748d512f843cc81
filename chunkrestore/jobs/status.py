"""What jobs have done and are doing, told from their files alone, on any machine that sees them.

Neither the output nor the input is opened, and no driver is asked: the journal says what is finished, the lock
who works on it, the events how fast.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from chunkrestore.jobs import ledger
from chunkrestore.jobs.events import event_lines, is_block, parse_event
from chunkrestore.jobs.fields_record import field_folders
from chunkrestore.jobs.lock import holder
from chunkrestore.jobs.lock_file import Holder
from chunkrestore.jobs.progress import RECENT, format_seconds, pace

State: TypeAlias = Literal["never begun", "running", "interrupted", "failed", "done"]

_MOST_JOBS = 8
"""Jobs that are told of one by one, however they stand."""

_MOST_SHOWN = 20
"""Stages and failed blocks that the text for people lists; JSON has them all."""


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is."""

    name: str
    """As in the journal."""
    n_items: int
    """Blocks, or other items, of the stage; 0 if that is not known."""
    n_done: int
    """Those that are finished."""
    n_failed: int
    """Those that were given up and not finished since."""
    done: bool
    """Whether the stage came to its end."""


@dataclass(frozen=True)
class FailedBlock:
    """A block that was given up."""

    stage: str
    """Where."""
    item: tuple[int, ...]
    """Time point, channel and block index."""
    cause: str
    """``transient``, ``memory``, ``worker``, ``full`` or ``data``."""
    message: str
    """The error."""


@dataclass(frozen=True)
class JobStatus:
    """One job; ``str(status)`` is for people."""

    name: str
    """``image`` or ``labels-NAME``; of a field of a collection ``FIELD/image``, such as ``B/03/0/image``."""
    folder: str
    """Where its files are."""
    state: State
    """``interrupted`` can be resumed; so can ``failed``, which tries the failed blocks again."""
    host: str | None = None
    """Machine of the driver that works on it, or did last."""
    pid: int | None = None
    """Process of that driver."""
    stages: tuple[StageStatus, ...] = ()
    """In the order in which they began."""
    failed: tuple[FailedBlock, ...] = ()
    """Blocks that were given up."""
    n_retried: int = 0
    """Failed tries of blocks that were tried again, in all runs."""
    blocks_per_second: float | None = None
    """Of the running stage."""
    seconds_left: float | None = None
    """Until the end of the running stage; later stages are not foreseen."""
    last_event: float | None = None
    """When anything was last heard of, in unix seconds by the driver's clock."""
    message: str | None = None
    """What the last run said at its end, if it said anything."""

    def describe(self) -> dict[str, Any]:
        """Return the status as JSON-compatible values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def status(
    output: str | os.PathLike[str], *, work_folder: str | os.PathLike[str] | None = None
) -> list[JobStatus]:
    """Return what is known of the jobs that write into `output`, by name; nothing if there is none.

    Parameters
    ----------
    output
        Store that the jobs write.
    work_folder
        Where they keep their files, if not beside the output.
    """
    folder = ledger.work_folder_of(os.fspath(output), work_folder)
    if not folder.is_dir():
        return []
    holds = holder(folder)
    fields = field_folders(folder)
    if fields:
        return [_job(place, holder(place.parent), name) for name, place in fields.items()]
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    if holds is not None and _lives(holds) and holds.job:
        # A driver reads the whole input once before it begins a job.
        names.add(holds.job)
    return [_job(folder / name, holds, name) for name in sorted(names)]


def summary(jobs: Sequence[JobStatus]) -> str:
    """Return the status of jobs for people; of many, such as those on the fields of a plate, what is under way.

    Finished jobs and those that were not begun are counted then.
    """
    if len(jobs) <= _MOST_JOBS:
        return "\n\n".join(map(str, jobs))
    counts = Counter(job.state for job in jobs)
    counted = ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])
    shown = [job for job in jobs if job.state not in ("done", "never begun")]
    more = [f"and {len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
    return "\n\n".join([f"{len(jobs)} jobs: {counted}", *map(str, shown[:_MOST_SHOWN]), *more])


def _job(folder: Path, holds: Holder | None, name: str) -> JobStatus:
    told, marks = _telemetry(folder / "events.jsonl"), _marks(folder / "journal.jsonl")
    working = holds if holds is not None and holds.job in ("", folder.name) else None
    state = _state(folder, working, told, any(mark.failed for mark in marks.values()))
    stages = [mark.status(name) for name, mark in marks.items()]
    if state == "running" and told.stage is not None and told.stage not in marks:
        # Statistics and pilots are not journalled.
        stages.append(StageStatus(told.stage, told.n_items, told.n_blocks, 0, False))
    each = told.seconds_per_block if state == "running" and told.stage is not None else None
    current = next((stage for stage in stages if stage.name == told.stage), None)
    n_left = current.n_items - current.n_done - current.n_failed if current is not None else 0
    return JobStatus(
        name=name,
        folder=str(folder),
        state=state,
        host=working.host if working is not None and state == "running" else told.host,
        pid=working.pid if working is not None and state == "running" else told.pid,
        stages=tuple(stages),
        failed=tuple(block for name, mark in marks.items() for block in mark.failed_blocks(name)),
        n_retried=told.n_retried,
        blocks_per_second=None if each is None else 1 / each,
        seconds_left=None if each is None else max(0, n_left) * each,
        last_event=told.last_event,
        message=told.message,
    )


def _state(folder: Path, working: Holder | None, told: _Telemetry, failed: bool) -> State:
    try:
        finished: float | None = (folder / "report.json").stat().st_mtime
    except FileNotFoundError:
        finished = None
    # Who took the lock after a job was done begins it anew.
    if working is not None and _lives(working) and (finished is None or working.started > finished):
        return "running"
    if finished is not None:
        return "done"
    if not (folder / "manifest.json").is_file():
        return "never begun"
    if told.end in ("failed", "error"):
        return "failed"
    # Without events, a list of failed blocks is how a run ends; one that was killed says nothing.
    return "failed" if failed and told.end is None and told.last_event is None else "interrupted"


def _lives(holds: Holder) -> bool:
    """Whether a driver is alive; where only its heartbeat can be seen, that decides."""
    return holds.age_s <= holds.stale_s if holds.alive is None else holds.alive


@dataclass
class _Mark:
    """What a journal says of a stage, counted."""

    n_items: int = 0
    n_done: int = 0
    done: bool = False
    failed: dict[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)

    def add(self, entry: dict[str, Any]) -> None:
        if "item" in entry:
            self.n_done += 1
            if self.failed:
                self.failed.pop(tuple(entry["item"]), None)
        elif "failed" in entry:
            self.failed[tuple(entry["failed"])] = entry["cause"], entry["message"]
        elif "n_items" in entry:
            self.n_items = entry["n_items"]
        else:
            self.done = True

    def status(self, name: str) -> StageStatus:
        return StageStatus(name, self.n_items, self.n_done, len(self.failed), self.done)

    def failed_blocks(self, name: str) -> Iterator[FailedBlock]:
        return (FailedBlock(name, item, *why) for item, why in self.failed.items())


def _marks(path: Path) -> dict[str, _Mark]:
    """Return the stages of a journal: counts, where `chunkrestore.jobs.ledger.read_journal` keeps every item."""
    marks: dict[str, _Mark] = {}
    for entry, _ in ledger.journal_entries(path):
        if "stage" in entry:
            marks.setdefault(entry["stage"], _Mark()).add(entry)
    return marks


@dataclass
class _Telemetry:
    """What the events say of a job, most of it of its last run."""

    host: str | None = None
    pid: int | None = None
    stage: str | None = None
    n_items: int = 0
    n_blocks: int = 0
    n_retried: int = 0
    last_event: float | None = None
    end: str | None = None
    message: str | None = None
    stage_began: float = 0.0
    recent: deque[bytes] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self.last_event = event["time"]
        if kind == "begin":
            self.host, self.pid = event.get("host"), event.get("pid")
            self.end = self.message = self.stage = None
        elif kind == "stage":
            self.stage, self.stage_began = event.get("stage"), event["time"]
            self.n_items, self.n_blocks = event.get("n_items", 0), event.get("n_done", 0)
            self.recent.clear()
        elif kind == "stage_end":
            self.stage = None
        elif kind == "retry":
            self.n_retried += 1
        elif kind == "end":
            self.end, self.message = event.get("state"), event.get("message")

    @property
    def seconds_per_block(self) -> float | None:
        blocks = [event for line in self.recent if (event := parse_event(line)) is not None]
        times = [event["time"] for event in blocks]
        before = [self.stage_began] if len(blocks) < RECENT else []
        return pace(before + times, [event.get("total", 0.0) for event in blocks])


def _telemetry(path: Path) -> _Telemetry:
    told = _Telemetry()
    for line in event_lines(path):
        if is_block(line):
            told.recent.append(line)
            told.n_blocks += 1
        elif (event := parse_event(line)) is not None:
            told.add(event)
    last = parse_event(told.recent[-1]) if told.recent else None
    if last is not None:
        told.last_event = max(last["time"], told.last_event or 0.0)
    return told


def _lines(job: JobStatus) -> Iterator[str]:
    headlines = {
        "running": f"running on host {job.host}, process {job.pid}",
        "interrupted": "interrupted; the same command goes on where it stopped",
        "failed": f"failed: {len(job.failed)} blocks; the same command tries them again"
        if job.failed
        else "failed",
    }
    yield f"{job.name}: {headlines.get(job.state, job.state)}"
    if len(job.stages) > _MOST_SHOWN:
        yield f"  {len(job.stages) - _MOST_SHOWN} stages before"
    for stage in job.stages[-_MOST_SHOWN:]:
        failed = f", {stage.n_failed} failed" if stage.n_failed else ""
        yield f"  {stage.name:<18} {stage.n_done} of {stage.n_items} blocks{failed}{', done' * stage.done}"
    if job.blocks_per_second:
        left = f", {format_seconds(job.seconds_left)} left in this stage" if job.seconds_left else ""
        yield f"  speed              {job.blocks_per_second:.3g} blocks/s{left}"
    if job.n_retried:
        yield f"  retries            {job.n_retried}"
    if job.last_event is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.last_event))
        yield f"  last event         {at}, {format_seconds(max(0.0, time.time() - job.last_event))} ago"
    if job.message:
        yield f"  message            {' '.join(job.message.split())}"
    for block in job.failed[:_MOST_SHOWN]:
        message = " ".join(block.message.split())
        yield f"  failed             {block.stage} {list(block.item)}, {block.cause}: {message}"
    if len(job.failed) > _MOST_SHOWN:
        yield f"  and {len(job.failed) - _MOST_SHOWN} more failed blocks"

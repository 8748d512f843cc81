"""What the events of a job add up to, in memory that does not grow with their number."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chunkrestore.jobs.report_page.histograms import N_MOMENTS, Durations, Moments

PHASES = ("read", "compute", "write")
"""What a task spends its time on."""

_N_SLOWEST = 20
_N_RETRIES = 100
_N_FAILED = 1000
_LONGEST_MESSAGE = 1000
_N_WORKERS = 10_000
_N_RUNS = 50


@dataclass
class StageSummary:
    """All stages of one kind: rounds of settling and levels of a pyramid count as one."""

    n_items: int = 0
    """Items, rounds and levels added."""
    n_done: int = 0
    """Finished ones, those of earlier runs included."""
    seconds: float = 0.0
    """Wall time."""
    n_split: int = 0
    """Blocks that were done in parts."""
    durations: dict[str, Durations] = field(
        default_factory=lambda: {p: Durations() for p in (*PHASES, "total")}
    )
    """Per phase, and of whole tasks."""
    moments: Moments = field(default_factory=Moments)
    """When blocks ended."""


@dataclass
class Run:
    """One driver's work on the job."""

    began: float
    """Unix seconds."""
    host: str
    """Machine of the driver."""
    pid: int | None
    """Its process."""
    resumed: bool
    """Whether there was work of an earlier run."""
    last: float
    """Time of its last event."""
    n_blocks: int = 0
    """Blocks that it finished."""
    state: str = "no end told"
    """How it ended."""
    message: str = ""
    """What it said then."""


@dataclass(order=True)
class SlowBlock:
    """One of the slowest blocks."""

    total: float
    """Seconds of its task."""
    number: int
    """Position among all blocks."""
    stage: str = field(compare=False)
    item: tuple[int, ...] = field(compare=False)
    worker: str = field(compare=False)
    seconds: Mapping[str, float] = field(compare=False)


class Summary:
    """Adds up events, read one by one.

    Attributes
    ----------
    begin
        The event that the last run began with.
    runs, n_runs
        The last runs, and how many there were.
    stages
        By kind, in the order in which they began.
    slowest
        A heap of the slowest blocks.
    failed
        Cause and message of blocks that were given up and not finished since.
    retries, causes
        The last retries, and how many there were for each cause.
    workers
        Number of blocks and seconds of work per worker.
    n_blocks, n_spoilt
        Finished blocks, and events that could not be understood.
    now, restarts, seconds_per_moment
        Seconds that the job took, without the time between runs; when runs were resumed; width of the intervals
        in which ends of blocks are counted.
    """

    def __init__(self, events: Iterable[dict[str, Any]] = ()) -> None:
        self.begin: dict[str, Any] = {}
        self.runs: deque[Run] = deque(maxlen=_N_RUNS)
        self.n_runs = 0
        self.stages: dict[str, StageSummary] = {}
        self.slowest: list[SlowBlock] = []
        self.failed: dict[tuple[str, tuple[int, ...]], tuple[str, str]] = {}
        self.retries: deque[dict[str, Any]] = deque(maxlen=_N_RETRIES)
        self.causes: Counter[str] = Counter()
        self.workers: dict[str, list[float]] = {}
        self.n_blocks = 0
        self.n_spoilt = 0
        self.seconds_per_moment = 1 / 16
        self.restarts: list[float] = []
        self.now = 0.0
        self._zero: float | None = None
        self._last = 0.0
        self._open: dict[str, float] = {}
        self._of_stage: dict[str, tuple[int, int]] = {}
        for event in events:
            self.add(event)
        self._close_stages()

    @property
    def n_retried(self) -> int:
        """Failed tries of blocks that were tried again."""
        return self.causes.total()

    @property
    def n_failed(self) -> str:
        """Blocks that were given up and not finished since, in words: not all of very many are kept."""
        return f"{len(self.failed):,}" if len(self.failed) < _N_FAILED else f"at least {_N_FAILED:,}"

    @property
    def hosts(self) -> list[str]:
        """Machines that drivers and workers ran on."""
        hosts = {run.host for run in self.runs} | {worker.rpartition(":")[0] for worker in self.workers}
        return sorted(hosts - {""})

    def add(self, event: dict[str, Any]) -> None:
        """Take one event into account."""
        at, kind = float(event["time"]), event["event"]
        if self._zero is None:
            self._zero = self._last = at
        if kind == "begin":
            # The time between two runs is nobody's: it is left out of the time that the job took.
            self._zero += max(0.0, at - self._last)
        self.now, self._last = max(self.now, at - self._zero), at
        try:
            self._take(kind, event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            # Of another version, or spoilt: what the rest adds up to is still worth showing.
            self.n_spoilt += 1
        if self.runs:
            self.runs[-1].last = at

    def _take(self, kind: str, event: dict[str, Any]) -> None:
        match kind:
            case "block":
                self._on_block(event)
            case "begin":
                self._on_begin(event)
            case "stage":
                self._on_stage(event)
            case "stage_end":
                self._on_stage_end(event)
            case "retry":
                self._on_retry(event)
            case "failed":
                self._on_failed(event)
            case "drain":
                self._on_drain(event)
            case "end":
                self._on_end(event)

    def _on_begin(self, event: dict[str, Any]) -> None:
        self._close_stages()
        if self.n_runs:
            self.restarts.append(self.now)
            del self.restarts[:-_N_RUNS]
        self.n_runs += 1
        self.begin = event
        at = float(event["time"])
        host, resumed = str(event.get("host", "")), bool(event.get("resumed"))
        self.runs.append(Run(at, host, event.get("pid"), resumed, at))

    def _on_stage(self, event: dict[str, Any]) -> None:
        name = str(event["stage"])
        self._open[name] = self.now
        before = self._of_stage.get(name, (0, 0))
        current = int(event.get("n_items", 0)), int(event.get("n_done", 0))
        self._of_stage[name] = current
        kind = self._stage(name)
        kind.n_items += current[0] - before[0]
        kind.n_done += current[1] - before[1]

    def _on_stage_end(self, event: dict[str, Any]) -> None:
        name = str(event["stage"])
        began = self._open.pop(name, self.now)
        # A stage that begins again after its end is another one of the same name, not the same one resumed.
        self._of_stage.pop(name, None)
        self._stage(name).seconds += float(event.get("seconds", self.now - began))

    def _on_block(self, event: dict[str, Any]) -> None:
        name, item = str(event["stage"]), tuple(event["item"])
        kind, seconds = self._stage(name), event.get("seconds") or {}
        kind.n_done += 1
        n_items, n_done = self._of_stage.get(name, (0, 0))
        self._of_stage[name] = n_items, n_done + 1
        total = float(event.get("total", sum(seconds.values())))
        for phase in PHASES:
            if phase in seconds:
                kind.durations[phase].add(float(seconds[phase]))
        kind.durations["total"].add(total)
        kind.n_split += event.get("n_parts", 1) > 1
        kind.moments.add(self._moment())
        worker = str(event.get("worker", ""))
        if worker in self.workers or len(self.workers) < _N_WORKERS:
            of_worker = self.workers.setdefault(worker, [0, 0.0])
            of_worker[0] += 1
            of_worker[1] += total
        if self.failed:
            self.failed.pop((name, item), None)
        self.n_blocks += 1
        if self.runs:
            self.runs[-1].n_blocks += 1
        if len(self.slowest) < _N_SLOWEST or total > self.slowest[0].total:
            keep = heapq.heappush if len(self.slowest) < _N_SLOWEST else heapq.heapreplace
            keep(self.slowest, SlowBlock(total, self.n_blocks, name, item, worker, seconds))

    def _on_retry(self, event: dict[str, Any]) -> None:
        self.causes[str(event.get("cause"))] += 1
        self.retries.append(event)

    def _on_failed(self, event: dict[str, Any]) -> None:
        key = str(event["stage"]), tuple(event["item"])
        if key in self.failed or len(self.failed) < _N_FAILED:
            self.failed[key] = str(event.get("cause")), str(event.get("message"))[:_LONGEST_MESSAGE]

    def _on_drain(self, event: dict[str, Any]) -> None:
        if self.runs:
            self.runs[-1].message = str(event.get("reason", ""))

    def _on_end(self, event: dict[str, Any]) -> None:
        if self.runs:
            self.runs[-1].state = str(event.get("state"))
            self.runs[-1].message = str(event.get("message") or self.runs[-1].message)

    def _stage(self, name: str) -> StageSummary:
        kind = kind_of(name)
        if kind not in self.stages:
            self.stages[kind] = StageSummary()
        return self.stages[kind]

    def _moment(self) -> int:
        while self.now >= N_MOMENTS * self.seconds_per_moment:
            self.seconds_per_moment *= 2
            for kind in self.stages.values():
                kind.moments.widen()
        return int(self.now / self.seconds_per_moment)

    def _close_stages(self) -> None:
        """Count the time of stages that were cut off, up to the last event."""
        for name, began in self._open.items():
            self._stage(name).seconds += self.now - began
        self._open.clear()


def kind_of(stage: str) -> str:
    """Return the kind of a stage: there are as many as passes, however many rounds, levels and time points."""
    name, _, number = stage.partition("-")
    if name in ("settle", "join", "labels_pyramid"):
        return name
    return f"{name}-{number.partition('-')[0]}" if number else name

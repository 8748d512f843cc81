"""Do jobs survive kills at random moments, and what does a kill cost?

A small job with every kind of stage (an image by way of a scratch image, each step needing a number of its whole
input; labels; pyramids) is run again and again, each time with another schedule of SIGKILLs: one to four of them,
at a named point of the code (`tests/faults.py`) or whenever the work has come so far. Whatever is killed is started
again at once, until the job is done. A schedule is one of three kinds:

- ``serial``: the driver, which does all the work in its process.
- ``processes``: a driver, a Dask scheduler and two workers, each a process of its own, started as by a batch system;
  any of them is killed.
- ``local``: a driver with the cluster that ``--cluster local`` starts: nannies and the scheduler in its process.

Of every schedule it is checked that the output is, byte for byte, that of one undisturbed process; that no driver
began a block that the journal listed; that in the end it lists every block once; that blocks were done again only if
they can have been in flight when something was killed. Reported besides: how many these were; for how many Dask
computed a result again, within one driver, whose worker had died before its result was let go, but after the driver
had journalled it; and the time from a kill until computing goes on. Driver processes are forked from one that has its
imports done; ``cold_start`` says what ``chunkrestore resume`` takes from a shell.

Run: ``python benchmarks/kill_schedules.py [--n 200] [--first 0]``.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from environment import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults import DRIVER_POINTS, POINTS, TASK_POINTS, Fault, Session, drive, redirect, start

import chunkrestore as cr
from chunkrestore.psf import gaussian

RESULTS = Path(__file__).parent / "results" / "kill_schedules.json"
SHARES = {"serial": 0.45, "processes": 0.5, "local": 0.05}
VICTIMS = {
    "serial": ("driver",),
    "processes": ("driver", "worker", "worker", "scheduler"),
    "local": ("driver", "worker", "worker"),
}
N_WORKERS, N_THREADS = 2, 2
WINDOW = 2 * N_WORKERS * N_THREADS
"""Most tasks in flight: the runner's window per thread, times threads."""
UNRECORDED = ("statistics", "refinement")
"""Stages that only read, and are done again as a whole if they are interrupted."""
MOST_DRIVERS = 12
DEADLINE = 300.0
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Kill:
    """A SIGKILL once the work has come so far."""

    victim: str
    """``driver``, ``worker`` or ``scheduler``."""
    moment: float
    """Share of the lines that an undisturbed run logs."""


@dataclass(frozen=True)
class Schedule:
    """What is killed, and when."""

    seed: int
    kind: str
    """Key of `SHARES`."""
    kills: tuple[Kill, ...]
    """From outside."""
    faults: tuple[Fault, ...]
    """At points of the code."""


def schedule(seed, n_arrivals):
    """Return the schedule of a seed; `n_arrivals` says how often an undisturbed run reaches each point."""
    rng = random.Random(seed)
    (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
    kills, faults = [], []
    for _ in range(rng.randint(1, 4)):
        victim = rng.choice(VICTIMS[kind])
        points = {"worker": TASK_POINTS, "driver": DRIVER_POINTS, "scheduler": ()}[victim]
        points = POINTS if kind == "serial" else points
        if points and rng.random() < 0.5:
            point = rng.choice(points)
            faults.append(Fault(point, "kill", nth=rng.randint(1, n_arrivals[point])))
        else:
            kills.append(Kill(victim, rng.random()))
    return Schedule(seed, kind, tuple(sorted(kills, key=lambda kill: kill.moment)), tuple(faults))


class Job:
    """One input and its undisturbed result."""

    def __init__(self, folder):
        self.folder = folder
        data = np.random.default_rng(8).integers(0, 200, (8, 24, 80)).astype(np.uint16)
        self.source = cr.write_image(data, folder / "in.zarr", axes="zyx", voxel_size=(1, 1, 1)).path
        lucy = cr.RichardsonLucy(gaussian((1.0, 1.0, 1.0), truncate=2), iterations=1, depth=4)
        self.operators = [lucy, lucy, cr.Threshold()]
        self.options = {"block_shape": (8, 12, 16)}
        session = Session.create(
            folder / "undisturbed", *(Fault(point, "none", nth=10**6) for point in POINTS)
        )
        with session.installed():
            cr.run(
                self.operators, self.source, folder / "out.zarr", cluster="serial", quiet=True, **self.options
            )
        self.expected = tree(folder / "out.zarr")
        self.tasks = session.n_executions()
        self.n_lines = len(session.events())
        self.n_arrivals = {
            point: sum(1 for _ in session.folder.glob(f"{number}.*")) for number, point in enumerate(POINTS)
        }

    @property
    def recorded(self):
        """Every (stage, item) that the journal must list."""
        return {key for key in self.tasks if key[0] not in UNRECORDED}


def tree(path):
    """Return the content of every file below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --- the processes of a cluster ----------------------------------------------------------------------------


def serve_scheduler(log, address_file):
    """Be a scheduler; says where in a file."""
    from distributed import Scheduler

    async def serve():
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            partial = Path(f"{address_file}.partial")
            partial.write_text(scheduler.address)
            partial.replace(address_file)
            await scheduler.finished()

    _serve(serve, log)


def serve_worker(log, address, folder):
    """Be a worker of a scheduler."""
    from distributed import Worker

    async def serve():
        options = {"nthreads": N_THREADS, "local_directory": folder, "memory_limit": 0, "dashboard": False}
        async with Worker(address, host="127.0.0.1", **options) as worker:
            await worker.finished()

    _serve(serve, log)


def _serve(serve, log):
    redirect(log)
    asyncio.run(serve())


class Hosts:
    """The processes of one schedule, and those that take the place of killed ones."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.driver = self.scheduler = None
        self.workers = []
        self._all = []
        self._n_schedulers = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._all:
            process.kill()
        for process in self._all:
            process.join()

    def start_driver(self, *arguments, **options):
        """Start a driver on the cluster of this kind."""
        cluster = self._address() if self.kind == "processes" else self.kind
        n_workers = {"n_workers": N_WORKERS} if self.kind == "local" else {}
        self.driver = self._start(drive, *arguments, cluster=cluster, **n_workers, **options)

    def tend(self):
        """Start what a cluster of processes lacks. Workers of a dead scheduler end by themselves."""
        if self.kind != "processes":
            return
        if self.scheduler is None or not self.scheduler.is_alive():
            self._n_schedulers += 1
            self.scheduler = self._start(serve_scheduler, self.folder / "log", self._address_file)
            self.workers = []
        self.workers = [worker for worker in self.workers if worker.is_alive()]
        while len(self.workers) < N_WORKERS:
            self.workers.append(
                self._start(serve_worker, self.folder / "log", self._address(), str(self.folder))
            )

    def pid_of(self, victim, session):
        """Return the process number of a victim, or None if there is none at the moment."""
        if victim == "driver":
            return self.driver.pid
        if victim == "scheduler":
            return self.scheduler.pid
        alive = {worker.pid for worker in self.workers}
        at_work = [event["pid"] for event in session.events("task")[-WINDOW:]]
        if self.kind == "local":
            alive = {pid for pid in at_work if psutil.pid_exists(pid)} - {os.getpid()}
        busy = [pid for pid in reversed(at_work) if pid in alive]
        return next(iter([*busy, *alive]), None)

    def _start(self, function, *arguments, **options):
        process = start(function, *arguments, **options)
        self._all.append(process)
        return process

    @property
    def _address_file(self):
        return self.folder / f"scheduler-{self._n_schedulers}"

    def _address(self):
        wait_for(self._address_file.exists, "the scheduler")
        return self._address_file.read_text()


def wait_for(condition, what):
    """Poll until a condition holds."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {DEADLINE:g} s for {what}")
        time.sleep(POLL_SECONDS)


# --- one schedule ------------------------------------------------------------------------------------------


class LostError(AssertionError):
    """A schedule after which something is not as it must be."""


def survive(job, plan, folder):
    """Run a job under a schedule of kills until it is done; return what happened, or raise `LostError`."""
    folder.mkdir(parents=True)
    session = Session.create(folder / "session", *plan.faults)
    output = folder / "out.zarr"
    done_before, statuses, kills = {}, [], list(plan.kills)
    began = time.monotonic()
    with Hosts(plan.kind, folder) as hosts:
        while not statuses or statuses[-1] != 0:
            if len(statuses) >= MOST_DRIVERS or time.monotonic() > began + DEADLINE:
                raise LostError(f"not done after drivers with the exit statuses {statuses}; see {folder}")
            hosts.tend()
            before = journalled(output)
            hosts.start_driver(
                session.folder, job.operators, job.source, output, log=folder / "log", **job.options
            )
            done_before[hosts.driver.pid] = set(before)
            while hosts.driver.is_alive():
                hosts.tend()
                if kills and n_lines(session) >= kills[0].moment * job.n_lines:
                    kill_from_outside(hosts, kills.pop(0).victim, session)
                if time.monotonic() > began + DEADLINE:
                    raise LostError(f"a driver hangs; see {folder}")
                time.sleep(POLL_SECONDS)
            hosts.driver.join()
            statuses.append(hosts.driver.exitcode)
            if statuses[-1] not in (0, 1, 69, 75, -signal.SIGKILL):
                raise LostError(f"a driver ended with {statuses[-1]}; see {folder / 'log'}")
    seconds = time.monotonic() - began
    check(job, session, output, done_before)
    outcome = outcome_of(job, plan, session, statuses, seconds)
    most = sum(kill["n_in_flight"] for kill in outcome["kills"]) + WINDOW * len(outcome["kills"])
    if outcome["n_redone"] > most:
        raise LostError(f"{outcome['n_redone']} blocks were redone, of {most} that can have been in flight")
    return outcome


def kill_from_outside(hosts, victim, session):
    """Kill a process of a cluster, whatever it does."""
    pid = hosts.pid_of(victim, session)
    if pid is None:
        return
    session.log("kill", victim=victim, victim_pid=pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def n_lines(session):
    """Return how much was logged so far."""
    path = session.folder / "log.jsonl"
    return path.read_bytes().count(b"\n")


def journalled(output):
    """Return every (stage, item) that the journal lists, in order."""
    path = output.with_name(f"{output.name}.chunkrestore") / "image" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [(entry["stage"], tuple(entry["item"])) for entry in entries if "item" in entry]


def check(job, session, output, done_before):
    """Raise `LostError` unless the output is right and nothing that was journalled was begun again."""
    now = tree(output)
    if now != job.expected:
        wrong = sorted(k for k in {*now, *job.expected} if now.get(k) != job.expected.get(k))
        raise LostError(f"{len(wrong)} files of {output} differ from the undisturbed ones: {wrong[:5]}")
    listed = Counter(journalled(output))
    if set(listed) != job.recorded or max(listed.values()) > 1:
        raise LostError(
            f"the journal of {output} lists {len(listed)} of {len(job.recorded)} blocks, {listed.most_common(1)}"
        )
    again = [
        event
        for event in session.events("task")
        if (event["stage"], tuple(event["item"])) in done_before.get(event["driver"], ())
    ]
    if again:
        raise LostError(f"blocks that an earlier driver had journalled were begun again: {again[:3]}")
    left = sorted(p.name for p in (output.with_name(f"{output.name}.chunkrestore") / "image").iterdir())
    if {"scratch", "tables"} & set(left):
        raise LostError(f"scratch data was left behind: {left}")


def outcome_of(job, plan, session, statuses, seconds):
    """Return what is reported of a schedule."""
    events = session.events()
    kills = [event for event in events if event["event"] in ("kill", "fault")]
    again = session.n_executions() - job.tasks
    return {
        "seed": plan.seed,
        "kind": plan.kind,
        "kills": [
            {
                "victim": victim_of(event, plan),
                "point": event.get("point"),
                "n_in_flight": sum(stage not in UNRECORDED for stage, _ in session.in_flight(event["time"])),
                "seconds_until_going_on": seconds_to_go_on(event, events, plan),
            }
            for event in kills
        ],
        "exit_statuses": statuses,
        "n_begun_again_by_dask": len(session.redone()),
        "n_redone": sum(n for (stage, _), n in again.items() if stage not in UNRECORDED),
        "n_read_again_for_statistics": sum(n for (stage, _), n in again.items() if stage in UNRECORDED),
        "seconds": round(seconds, 2),
        "load": round(os.getloadavg()[0], 1),
    }


def victim_of(event, plan):
    """Return what kind of process a kill has hit."""
    if event["event"] == "kill":
        return event["victim"]
    return "worker" if event["point"] in TASK_POINTS and plan.kind != "serial" else "driver"


def seconds_to_go_on(kill, events, plan):
    """Return the seconds from a kill until a task begins that would not run without what came after it.

    After the end of a worker: the block that it ran. Else: any block of the next driver.
    """
    later = [event for event in events if event["time"] > kill["time"]]
    if victim_of(kill, plan) == "worker":
        pid = kill.get("victim_pid", kill["pid"])
        mine = [e for e in events if e["event"] == "task" and e["pid"] == pid and e["time"] <= kill["time"]]
        if not mine:
            return None
        lost = mine[-1]["stage"], mine[-1]["item"]
        tasks = [e for e in later if e["event"] == "task" and (e["stage"], e["item"]) == lost]
    else:
        drivers = [e["pid"] for e in later if e["event"] == "driver"]
        tasks = [e for e in later if e["event"] == "task" and e["driver"] in drivers[:1]]
    return round(tasks[0]["time"] - kill["time"], 3) if tasks else None


# --- all of them -------------------------------------------------------------------------------------------


def cold_start(job, folder, cluster, n_repeats=5):
    """Return the seconds from a driver's SIGKILL until ``chunkrestore resume`` has finished its first block."""
    command = [sys.executable, "-m", "chunkrestore", "resume", "-q", "--cluster", cluster]
    found = []
    for repeat in range(n_repeats):
        output = folder / f"{cluster}-{repeat}" / "out.zarr"
        session = Session.create(output.parent / "session", Fault("before-journal", "kill", nth=20))
        driver = start(
            drive, session.folder, job.operators, job.source, output, cluster="serial", **job.options
        )
        driver.join()
        killed = time.time()
        subprocess.run([*command, output], check=True, timeout=DEADLINE)
        events = output.with_name(f"{output.name}.chunkrestore") / "image" / "events.jsonl"
        blocks = [
            e["time"] for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "block"
        ]
        found.append(round(min(t for t in blocks if t > killed) - killed, 2))
        if tree(output) != job.expected:
            raise LostError(f"{output} differs from the undisturbed one")
    return found


def summary(outcomes):
    """Return figures over all schedules."""
    kills = [(outcome["kind"], kill) for outcome in outcomes for kill in outcome["kills"]]
    waits = {}
    for kind, kill in kills:
        if kill["seconds_until_going_on"] is not None:
            waits.setdefault(f"{kind}: {kill['victim']}", []).append(kill["seconds_until_going_on"])
    statuses = Counter(status for outcome in outcomes for status in outcome["exit_statuses"])
    return {
        "n_schedules": len(outcomes),
        "schedules_of": dict(Counter(outcome["kind"] for outcome in outcomes)),
        "n_kills": len(kills),
        "kills_of": dict(Counter(kill["victim"] for _, kill in kills)),
        "exit_statuses": {str(status): n for status, n in sorted(statuses.items())},
        "n_journalled_blocks_begun_again_by_a_later_driver": 0,
        "n_journalled_blocks_begun_again_by_dask": sum(o["n_begun_again_by_dask"] for o in outcomes),
        "n_blocks_redone": sum(outcome["n_redone"] for outcome in outcomes),
        "n_blocks_in_flight_at_kills": sum(kill["n_in_flight"] for _, kill in kills),
        "most_blocks_in_flight": max(kill["n_in_flight"] for _, kill in kills),
        "n_read_again_for_statistics": sum(outcome["n_read_again_for_statistics"] for outcome in outcomes),
        "seconds_from_kill_until_going_on": {
            name: {"n": len(found), "median": round(statistics.median(found), 3), "max": max(found)}
            for name, found in sorted(waits.items())
        },
        "seconds": round(sum(outcome["seconds"] for outcome in outcomes), 1),
    }


def main():
    """Run all schedules and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="Number of schedules.")
    parser.add_argument("--first", type=int, default=0, help="First seed.")
    parser.add_argument("--folder", type=Path, help="Where to work; kept. Default: a temporary folder.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    job, outcomes, lost = Job(folder / "job"), [], []
    for seed in range(options.first, options.first + options.n):
        plan = schedule(seed, job.n_arrivals)
        place = folder / str(seed)
        try:
            outcomes.append(survive(job, plan, place))
        except (LostError, TimeoutError) as error:
            lost.append({"seed": seed, "schedule": asdict(plan), "error": str(error)})
            print(f"{seed}: {error}", flush=True)
            continue
        shutil.rmtree(place)
        print(json.dumps(outcomes[-1]), flush=True)
    content = {
        "environment": describe(),
        "job": {"n_tasks": sum(job.tasks.values()), "n_journalled": len(job.recorded)},
        "summary": summary(outcomes),
        "schedules_that_failed": lost,
        "cold_start_seconds": {c: cold_start(job, folder / "cold", c) for c in ("serial", "local")},
        "schedules": outcomes,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(
        json.dumps(
            {k: content[k] for k in ("summary", "schedules_that_failed", "cold_start_seconds")}, indent=1
        )
    )
    if options.folder is None:
        shutil.rmtree(folder)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()

"""Faults at named points of a job: what is retried, what is given up, and that going on ends in the same bytes."""

import functools
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from faults import ALWAYS, DRIVER_POINTS, POINTS, TASK_POINTS, Fault, Session, drive, processes, start

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.cluster import connect
from chunkrestore.jobs import causes, runner
from chunkrestore.jobs.runner import BlockError
from chunkrestore.ome_zarr import RegionWriter
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.0, 1.0), truncate=2)
BLOCKS = {"block_shape": (8, 12, 20)}
WRITING_STAGES = ("blocks-0", "pyramid-1-1to1", "paint")
UNRECORDED = {"statistics", "refinement"}
DEADLINE = 60.0


def chain():
    """An image by way of a scratch image, since each step needs a number of its whole input, then labels."""
    lucy = cr.RichardsonLucy(PSF, iterations=1, depth=4)
    return [lucy, lucy, cr.Threshold()]


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Job:
    """One input, and what an undisturbed run in one process makes of it."""

    def __init__(self, folder):
        data = np.random.default_rng(8).integers(0, 200, (8, 24, 80)).astype(np.uint16)
        self.image = cr.write_image(data, folder / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
        with Session.create(folder / "undisturbed").installed() as session:
            self.run(folder / "out.zarr")
        self.expected = tree(folder / "out.zarr")
        self.tasks = session.n_executions()

    def run(self, output, cluster="serial"):
        return cr.run(chain(), self.image, output, cluster=cluster, quiet=True, **BLOCKS)

    def forked(self, session, output):
        """Run the job in a process of its own; return its exit status."""
        process = start(drive, session.folder, chain(), self.image.path, output, cluster="serial", **BLOCKS)
        process.join(DEADLINE)
        return process.exitcode


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("job"))
    stages = {stage for stage, _ in job.tasks}
    assert {
        "blocks-0",
        "blocks-1",
        "seams-1",
        "pyramid-1-1to1",
        "detect",
        "paint",
        "labels_pyramid-1to1",
    } <= stages
    return job


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Do not wait for file systems to recover."""
    policy = functools.partial(causes.RetryPolicy, first_delay=0.01)
    monkeypatch.setattr(runner, "RetryPolicy", policy)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.zarr"


def published(output):
    try:
        return cr.open_image(output).labels == ("labels",)
    except (ValueError, FileNotFoundError):
        return False


def entries(output):
    path = output.with_name(f"{output.name}.chunkrestore") / "image/journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def journalled(output):
    return [(e["stage"], tuple(e["item"])) for e in entries(output) if "item" in e]


def given_up(output):
    """Return what the journal names as given up, and for what cause."""
    return {(e["stage"], tuple(e["failed"])): e["cause"] for e in entries(output) if "failed" in e}


def hit(session):
    """Return the tasks that were hit by a fault, in order."""
    return [(e["stage"], tuple(e["item"])) for e in session.events("fault")]


def check_complete(job, session, output):
    """The result is the undisturbed one, nothing is missing, and nothing was done again once it was journalled."""
    assert tree(output) == job.expected
    assert session.redone() == []
    assert Counter(journalled(output)) == {key: 1 for key in job.tasks if key[0] not in UNRECORDED}


# --- faults of a block's task ------------------------------------------------------------------------------


def sample(firsts, seconds, quick):
    """Return all pairs as parameters; those that `quick` does not name run with the slow tests."""
    pairs = itertools.product(firsts, seconds)
    return [pytest.param(*pair, marks=[] if pair in quick else pytest.mark.slow) for pair in pairs]


_PASSING = ("io", "reset", "memory")


@pytest.mark.parametrize(
    ("point", "action"),
    sample(TASK_POINTS, _PASSING, {*zip(TASK_POINTS, _PASSING, strict=True), ("before-write", "io")}),
)
def test_what_may_pass_is_tried_again(job, tmp_path, output, point, action):
    # Labels are painted from tables alone: of that pass, only what detects them reads the image.
    stages = (*WRITING_STAGES[:2], "detect" if point.endswith("read") else "paint")
    faults = [Fault(point, action, nth=2 + n % 2, stage=stage) for n, stage in enumerate(stages)]
    faults[1] = Fault(point, action, stage=WRITING_STAGES[1])  # of one block only
    with Session.create(tmp_path / "session", *faults).installed() as session:
        report = job.run(output)
    check_complete(job, session, output)
    assert report.n_retried == len(hit(session)) == len(faults)
    assert session.n_executions() == job.tasks + Counter(hit(session))
    assert given_up(output) == {}


@pytest.mark.parametrize(("action", "cause", "n_tries"), [("io", "transient", 6), ("memory", "memory", 3)])
def test_what_does_not_pass_is_given_up_and_the_others_go_on(job, tmp_path, output, action, cause, n_tries):
    key = "blocks-0", (0, 0, 0, 1, 2)
    fault = Fault("before-write", action, stage=key[0], item=key[1], times=ALWAYS)
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises(BlockError, match=r"block \(0, 1, 2\) of time point 0, channel 0 failed: \w+Error: "),
    ):
        job.run(output)
    check_one_given_up(job, session, output, key, cause, n_tries)


@pytest.mark.parametrize("stage", ["blocks-0", "blocks-1", "detect", "paint"])
def test_an_error_of_a_block_is_not_tried_again_and_the_others_go_on(job, tmp_path, output, stage):
    key = stage, (0, 0, 0, 0, 1)
    fault = Fault("before-write" if stage == "paint" else "before-read", "error", stage=stage, item=key[1])
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises(BlockError, match=r"block \(0, 0, 1\) .* failed: ValueError: injected"),
    ):
        job.run(output)
    check_one_given_up(job, session, output, key, "data", 1)


def check_one_given_up(job, session, output, key, cause, n_tries):
    """One block was given up and named, its stage is done but for it, nothing is published; going on finishes."""
    stage, _ = key
    assert given_up(output) == {key: cause}
    assert session.n_executions()[key] == n_tries
    assert {k for k in job.tasks if k[0] == stage} - set(journalled(output)) == {key}
    order = [name for name, _ in job.tasks]
    assert {name for name, _ in session.n_executions()} <= set(order[: order.index(stage) + 1])
    assert not published(output)
    with Session.create(session.folder.with_name("again")).installed() as again:
        job.run(output)
    check_complete(job, again, output)
    # Begun with what had failed; what was journalled is left alone.
    assert next(k for k in map(_key, again.events("task")) if k[0] == stage) == key
    assert set(again.n_executions()) & set(map(_key, session.events("recorded"))) == set()


def _key(event):
    return event["stage"], tuple(event["item"])


def test_commands_end_with_1_and_the_blocks_until_retry_failed_succeeds(job, tmp_path, output, capsys):
    fault = Fault("before-read", "error", stage="blocks-1", item=(0, 0, 0, 1, 3), times=2)
    with Session.create(tmp_path / "session", fault).installed() as session:
        with pytest.raises(BlockError):
            job.run(output)
        with pytest.raises(SystemExit, match="1"):
            main(["resume", str(output), "--cluster", "serial", "-q"])
        assert "block (0, 1, 3) of time point 0, channel 0 failed: ValueError" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="0"):
            main(["retry-failed", str(output), "--cluster", "serial", "-q"])
    check_complete(job, session, output)
    assert session.n_executions()[fault.stage, fault.item] == 3
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(output), "--cluster", "serial", "-q"])


@pytest.mark.parametrize("point", TASK_POINTS)
def test_a_full_disk_ends_the_job_at_once(job, tmp_path, output, point):
    fault = Fault(point, "full", stage="blocks-1", nth=3, times=ALWAYS)
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises(BlockError, match="No space left on device"),
    ):
        job.run(output)
    (key,) = hit(session)
    assert given_up(output) == {key: "full"}
    assert sum(stage == "blocks-1" for stage, _ in session.n_executions()) == 3
    assert not published(output)
    with Session.create(tmp_path / "again").installed() as again:
        job.run(output)
    check_complete(job, again, output)
    assert set(again.n_executions()) & set(map(_key, session.events("recorded"))) == set()


def test_what_a_killed_worker_left_half_written_is_removed(job, tmp_path, output, monkeypatch):
    original, n_left = RegionWriter.write, itertools.count()

    def write(self, *arguments):
        original(self, *arguments)
        Path(self.name, f"{next(n_left)}.{'0' * 32}.partial").write_bytes(b"half a chunk")

    monkeypatch.setattr(RegionWriter, "write", write)
    job.run(output)
    assert next(n_left) > 10
    assert tree(output) == job.expected


# --- faults of the driver ----------------------------------------------------------------------------------


_ERRORS = ("error", "memory", "full", "io", "reset")


@pytest.mark.parametrize(
    ("point", "action"),
    sample(DRIVER_POINTS, _ERRORS, {*zip(DRIVER_POINTS, _ERRORS, strict=False), ("before-publish", "reset")}),
)
def test_an_error_of_the_driver_ends_the_job_and_it_can_be_resumed(job, tmp_path, output, point, action):
    # The second publication is that of the labels.
    fault = Fault(point, action, nth=2 if "publish" in point else 11)
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises((ValueError, MemoryError, OSError)),
    ):
        job.run(output)
    check_resumed(job, session, output)


_QUICK_POINTS = {"after-write", "before-journal", "after-journal", "before-publish"}


@pytest.mark.parametrize(("point", "action"), sample(POINTS, ["kill"], {(p, "kill") for p in _QUICK_POINTS}))
def test_a_killed_driver_is_resumed(job, tmp_path, output, point, action):
    nth = {"before-publish": 3, "after-publish": 1}.get(point, 23)
    session = Session.create(tmp_path / "session", Fault(point, action, nth=nth))
    assert job.forked(session, output) == -9
    check_resumed(job, session, output)


def test_a_scratch_image_whose_publication_was_not_noted_may_be_gone_later(job, tmp_path, output):
    """Stopped twice: between publishing the scratch image and noting it, and after that image was removed."""
    for number, fault in enumerate(
        (Fault("after-publish", "error"), Fault("after-journal", "error", stage="paint"))
    ):
        with (
            Session.create(tmp_path / str(number), fault).installed() as session,
            pytest.raises(ValueError, match="injected"),
        ):
            job.run(output)
    check_resumed(job, session, output)


def check_resumed(job, session, output):
    """Going on finishes, and nothing that was journalled is done again."""
    assert len(session.events("fault")) == 1
    before = journalled(output)
    with Session.create(session.folder.with_name("again")).installed() as again:
        report = job.run(output)
    check_complete(job, again, output)
    assert report.n_done + len(before) == len(journalled(output))
    assert set(again.n_executions()) & set(before) == set()


# --- faults of worker processes ----------------------------------------------------------------------------

N_IN_FLIGHT = 8
"""Tasks in flight: two for each of two threads of two workers. A kill can hit those that run on a worker, those
that wait there, and those whose results it holds."""


@pytest.fixture(scope="module")
def client():
    """A local cluster; its workers are forked from a process that has its imports done."""
    import dask
    import distributed  # noqa: F401  declares what is set here; imported inside, its declarations would be lost

    processes()
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        connect("local", n_workers=2) as client,
    ):
        yield client


def retries(output):
    """Return (stage, item, cause) of every retry that was logged."""
    path = output.with_name(f"{output.name}.chunkrestore") / "image/events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [(e["stage"], tuple(e["item"]), e["cause"]) for e in found if e["event"] == "retry"]


def test_what_dead_workers_had_in_flight_is_done_by_others(job, tmp_path, output, client):
    faults = [
        Fault(point, "kill", nth=2, stage=stage)
        for point, stage in zip(TASK_POINTS, ("blocks-0", "blocks-1", "paint"), strict=True)
    ]
    with Session.create(tmp_path / "session", *faults).installed() as session:
        job.run(output, client)
    check_complete(job, session, output)
    again = session.n_executions() - job.tasks
    assert set(hit(session)) <= set(again)
    assert len(faults) <= again.total() <= N_IN_FLIGHT * len(faults)
    assert {cause for _, _, cause in retries(output)} == {"worker"}
    assert {(stage, item) for stage, item, _ in retries(output)} >= set(hit(session))


def test_a_block_that_kills_two_workers_is_done_alone(job, tmp_path, output, client):
    key = "blocks-0", (0, 0, 0, 0, 1)
    fault = Fault("before-write", "kill", stage=key[0], item=key[1], times=2)
    with Session.create(tmp_path / "session", fault).installed() as session:
        job.run(output, client)
    check_complete(job, session, output)
    assert session.n_executions()[key] == 3
    assert retries(output).count((*key, "worker")) == 2
    # The last time, nothing else began or ended before it did.
    events = [_key(e) for e in session.events("task", "recorded") if e["stage"] == key[0]]
    last = len(events) - 1 - events[::-1].index(key)
    assert events[last - 1 : last + 1] == [key, key]


def test_a_block_that_kills_every_worker_is_given_up_and_the_others_go_on(job, tmp_path, output, client):
    key = "detect", (0, 0, 0, 1, 2)
    fault = Fault("before-read", "kill", stage=key[0], item=key[1], times=ALWAYS)
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises(
            BlockError, match=r"block \(0, 1, 2\) .* failed: its worker process was killed each time"
        ),
    ):
        job.run(output, client)
    check_one_given_up(job, session, output, key, "worker", 3)


def test_errors_of_tasks_on_workers_have_the_same_consequences(job, tmp_path, output, client):
    key = "paint", (0, 0, 0, 1, 1)
    faults = [
        Fault("before-read", "reset", stage="statistics", nth=4),
        Fault("before-read", "io", stage="blocks-0", nth=2, times=2),
        Fault("after-write", "memory", stage="blocks-1", nth=3),
        Fault("before-write", "error", stage=key[0], item=key[1]),
    ]
    with (
        Session.create(tmp_path / "session", *faults).installed() as session,
        pytest.raises(BlockError, match=r"block \(0, 1, 1\) .* failed: ValueError: injected"),
    ):
        job.run(output, client)
    assert sorted(cause for _, _, cause in retries(output)) == ["memory", "transient", "transient"]
    check_one_given_up(job, session, output, key, "data", 1)


def test_a_full_disk_of_a_worker_ends_the_job(job, tmp_path, output, client):
    fault = Fault("before-write", "full", stage="blocks-0", nth=2, times=ALWAYS)
    with (
        Session.create(tmp_path / "session", fault).installed() as session,
        pytest.raises(BlockError, match="No space left on device"),
    ):
        job.run(output, client)
    assert set(given_up(output).values()) == {"full"}
    assert not published(output)
    with Session.create(tmp_path / "again").installed() as again:
        job.run(output)
    check_complete(job, again, output)
    assert set(again.n_executions()) & set(map(_key, session.events("recorded"))) == set()

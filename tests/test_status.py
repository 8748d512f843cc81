"""The status of jobs, from their files alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import chunkrestore as cr
from chunkrestore.jobs.ledger import Ledger
from chunkrestore.jobs.lock import Lock
from chunkrestore.jobs.status import FailedBlock, StageStatus, status

MANIFEST = {"schema": 1, "passes": []}


@pytest.fixture
def output(tmp_path):
    """A store that does not exist: only the files beside it do."""
    return tmp_path / "out.ome.zarr"


@pytest.fixture
def folder(output):
    return output.with_name("out.ome.zarr.chunkrestore") / "image"


@pytest.fixture
def begin():
    """Begin a job in a folder; returns its ledger."""
    begun = []

    def begin_in(folder):
        begun.append(Ledger(folder))
        begun[-1].begin(MANIFEST)
        return begun[-1]

    yield begin_in
    for ledger in begun:
        ledger.close()


def write_events(folder, events):
    """Write events whose times are given."""
    with (folder / "events.jsonl").open("a") as file:
        for at, event, fields in events:
            file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")


def block(at, i, total=1.0, stage="blocks-0"):
    seconds = {"read": 0.1, "compute": 0.8, "write": 0.1}
    return at, "block", {"stage": stage, "item": [0, 0, 0, 0, i], "seconds": seconds, "total": total}


def work(ledger, n_items, n_done, stage="blocks-0"):
    ledger.begin_stage(stage, n_items)
    for i in range(n_done):
        ledger.record(stage, (0, 0, 0, 0, i), {"crc32": i, "n_parts": 1})


def test_there_is_no_status_without_jobs(output):
    assert status(output) == []
    output.with_name("out.ome.zarr.chunkrestore").mkdir()
    assert status(output) == []


def test_a_living_driver_makes_a_running_job(output, folder, begin):
    ledger = begin(folder)
    with Lock(folder.parent, "image"):
        work(ledger, 27, 12)
        (found,) = status(output)
        assert (found.state, found.host, found.pid) == ("running", socket.gethostname(), os.getpid())
        assert found.stages == (StageStatus("blocks-0", 27, 12, 0, False),)
        assert f"image: running on host {socket.gethostname()}, process {os.getpid()}" in str(found)
        assert "blocks-0           12 of 27 blocks" in str(found)
    (found,) = status(output)
    assert found.state == "interrupted"


DIES = """
import os, signal, sys
from chunkrestore.jobs.lock import Lock
Lock(sys.argv[1], "image").acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_leaves_an_interrupted_job(output, folder, begin):
    work(begin(folder), 27, 12)
    write_events(folder, [(1000.0, "begin", {"host": "node7", "pid": 41}), block(1001.5, 0)])
    done = subprocess.run([sys.executable, "-c", DIES, folder.parent], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (folder.parent / "lock.json").exists()
    (found,) = status(output)
    assert (found.state, found.host, found.pid, found.last_event) == ("interrupted", "node7", 41, 1001.5)
    assert (found.blocks_per_second, found.seconds_left) == (None, None)
    assert "interrupted; the same command goes on" in str(found)


def test_another_job_of_the_same_output_is_not_taken_for_running(output, folder, begin):
    begin(folder)
    begin(folder.with_name("labels-nuclei"))
    with Lock(folder.parent, "labels-nuclei"):
        assert {job.name: job.state for job in status(output)} == {
            "image": "interrupted",
            "labels-nuclei": "running",
        }


def test_a_driver_that_still_reads_the_input_is_seen(output, folder):
    with Lock(folder.parent, "image"):
        assert [(job.name, job.state) for job in status(output)] == [("image", "running")]
    assert status(output) == []


def test_a_finished_job_is_done_until_it_is_begun_anew(output, folder, begin):
    ledger = begin(folder)
    work(ledger, 3, 3)
    ledger.end_stage("blocks-0")
    ledger.finish({})
    os.utime(folder / "report.json", (time.time() - 60,) * 2)
    (found,) = status(output)
    assert (found.state, found.stages) == ("done", (StageStatus("blocks-0", 3, 3, 0, True),))
    with Lock(folder.parent, "image"):
        assert status(output)[0].state == "running"


def test_a_driver_that_releases_its_lock_last_has_a_finished_job(output, folder, begin):
    with Lock(folder.parent, "image"):
        begin(folder).finish({})
        assert status(output)[0].state == "done"


def test_failed_blocks_are_told_with_cause_and_message(output, folder, begin):
    ledger = begin(folder)
    work(ledger, 27, 20)
    ledger.fail("blocks-0", (0, 0, 1, 2, 2), "memory", "MemoryError: 8 GB\nneeded")
    ledger.fail("blocks-0", (0, 0, 2, 2, 2), "data", "corrupt chunk")
    (found,) = status(output)
    assert found.state == "failed"
    assert found.failed == (
        FailedBlock("blocks-0", (0, 0, 1, 2, 2), "memory", "MemoryError: 8 GB\nneeded"),
        FailedBlock("blocks-0", (0, 0, 2, 2, 2), "data", "corrupt chunk"),
    )
    assert found.stages[0].n_failed == 2
    assert "image: failed: 2 blocks" in str(found)
    assert "blocks-0 [0, 0, 1, 2, 2], memory: MemoryError: 8 GB needed" in str(found)
    ledger.record("blocks-0", (0, 0, 1, 2, 2), {})
    (found,) = status(output)
    assert [b.item for b in found.failed] == [(0, 0, 2, 2, 2)]


def test_a_run_that_was_killed_after_a_failed_one_is_interrupted(output, folder, begin):
    ledger = begin(folder)
    ledger.fail("blocks-0", (0, 0, 0, 0, 0), "data", "corrupt chunk")
    write_events(folder, [(1.0, "begin", {}), (2.0, "end", {"state": "failed", "message": "1 block failed"})])
    assert (status(output)[0].state, status(output)[0].message) == ("failed", "1 block failed")
    write_events(folder, [(3.0, "begin", {})])
    assert (status(output)[0].state, status(output)[0].message) == ("interrupted", None)


def test_an_error_that_ended_a_run_is_told(output, folder, begin):
    begin(folder)
    write_events(folder, [(1.0, "begin", {}), (2.0, "end", {"state": "error", "message": "no such\nmodel"})])
    (found,) = status(output)
    assert (found.state, found.message) == ("failed", "no such\nmodel")
    assert "message            no such model" in str(found)


def test_speed_and_time_left_are_those_of_this_run(output, folder, begin):
    """Two workers, two seconds per block; ten of thirty blocks are of an earlier run."""
    ledger = begin(folder)
    work(ledger, 30, 18)
    ledger.fail("blocks-0", (0, 0, 0, 0, 29), "data", "corrupt")
    events = [
        (100.0, "begin", {"host": "a", "pid": 1}),
        (100.0, "stage", {"stage": "blocks-0", "n_items": 30, "n_done": 0}),
        *(block(101.0 + i / 100, i) for i in range(10)),
        (110.0, "retry", {"stage": "blocks-0", "item": [0, 0, 0, 0, 10], "cause": "transient", "attempt": 1}),
        (900.0, "begin", {"host": "b", "pid": 2}),
        (900.0, "stage", {"stage": "blocks-0", "n_items": 30, "n_done": 10}),
        *(block(902.0 + 2 * (i // 2), 10 + i, total=2.0) for i in range(8)),
        (908.5, "retry", {"stage": "blocks-0", "item": [0, 0, 0, 0, 20], "cause": "worker", "attempt": 1}),
    ]
    write_events(folder, events)
    with Lock(folder.parent, "image"):
        (found,) = status(output)
    assert found.blocks_per_second == pytest.approx(1.0)
    assert found.seconds_left == pytest.approx(11.0)
    assert (found.n_retried, found.last_event) == (2, 908.5)
    assert "1 blocks/s, 0:11 left in this stage" in str(found)


def test_between_two_stages_no_speed_is_made_up(output, folder, begin):
    work(begin(folder), 2, 2)
    write_events(
        folder,
        [
            (1.0, "stage", {"stage": "blocks-0", "n_items": 2, "n_done": 0}),
            block(2.0, 0),
            block(3.0, 1),
            (3.0, "stage_end", {"stage": "blocks-0", "seconds": 2.0}),
        ],
    )
    with Lock(folder.parent, "image"):
        assert status(output)[0].blocks_per_second is None


def test_a_stage_that_is_not_journalled_is_seen_while_it_runs(output, folder, begin):
    begin(folder)
    events = [(1.0, "stage", {"stage": "statistics", "n_items": 8, "n_done": 0})]
    write_events(folder, events + [block(2.0 + i, i, stage="statistics") for i in range(3)])
    with Lock(folder.parent, "image"):
        (found,) = status(output)
    assert found.stages == (StageStatus("statistics", 8, 3, 0, False),)
    assert found.seconds_left == pytest.approx(5.0)
    assert status(output)[0].stages == ()


def test_a_line_that_is_being_written_is_not_counted(output, folder, begin):
    work(begin(folder), 5, 3)
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"stage": "blocks-0", "item": [0, 0, 0,')
    assert status(output)[0].stages[0].n_done == 3


def test_a_folder_without_manifest_holds_a_job_that_never_began(output, folder):
    folder.mkdir(parents=True)
    assert [job.state for job in status(output)] == ["never begun"]


def test_the_folder_may_lie_elsewhere(tmp_path, begin):
    work(begin(tmp_path / "elsewhere" / "image"), 4, 1)
    (found,) = status("s3://bucket/out.zarr", work_folder=tmp_path / "elsewhere")
    assert found.stages[0].n_done == 1


def test_the_description_is_json(output, folder, begin):
    ledger = begin(folder)
    ledger.fail("blocks-0", (0, 0, 0, 0, 0), "data", "corrupt chunk")
    described = json.loads(json.dumps(status(output)[0].describe()))
    assert described["failed"] == [
        {"stage": "blocks-0", "item": [0, 0, 0, 0, 0], "cause": "data", "message": "corrupt chunk"}
    ]
    assert (described["name"], described["state"]) == ("image", "failed")


def test_the_text_stays_short_however_long_the_lists(output, folder, begin):
    ledger = begin(folder)
    for i in range(300):
        ledger.fail(f"settle-0.0-{i}", (0, 0, 0, 0, i), "data", "corrupt chunk")
    (found,) = status(output)
    assert len(found.failed) == 300
    assert len(str(found).splitlines()) < 50
    assert "and 280 more failed blocks" in str(found)


def test_thirty_thousand_blocks_are_scanned_in_less_than_a_second(output, folder, begin):
    n = 30_000
    begin(folder)
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "blocks-0", "n_items": n}) + "\n")
        for i in range(n):
            entry = {"stage": "blocks-0", "item": [0, 0, 0, 0, i], "payload": {"crc32": 2**31, "n_parts": 1}}
            file.write(json.dumps(entry) + "\n")
    write_events(folder, [(0.0, "stage", {"stage": "blocks-0", "n_items": n, "n_done": 0})])
    write_events(folder, [block(float(i), i) for i in range(n)])
    # Of the processor: other tests may keep the machine busy.
    started = time.process_time()
    (found,) = status(output)
    seconds = time.process_time() - started
    assert found.stages[0].n_done == n
    assert seconds < 1


def test_asking_for_the_status_loads_no_library():
    code = (
        "import sys, chunkrestore.jobs.status as s; s.status('nowhere.zarr');"
        "print([m for m in ('numpy', 'zarr', 'dask', 'distributed', 'rich', 'PIL') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_a_real_job_is_done_with_all_its_stages(output):
    data = np.random.default_rng(2).integers(0, 200, (8, 24, 24)).astype(np.uint16)
    image = cr.write_image(data, output.with_name("in.zarr"), axes="zyx", voxel_size=(1, 1, 1))
    cr.run(cr.Threshold(), image, output, block_shape=(8, 12, 12), cluster="serial", quiet=True)
    (found,) = status(output)
    assert (found.name, found.state, found.host) == ("labels-labels", "done", socket.gethostname())
    stages = {stage.name: (stage.n_done, stage.n_items, stage.done) for stage in found.stages}
    assert stages["detect"] == stages["paint"] == (4, 4, True)
    assert all(stage.done for stage in found.stages)
    assert found.failed == ()
    assert time.time() - 60 < found.last_event <= time.time()

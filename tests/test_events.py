"""Events are whole lines whatever happens to the writer, and never the end of a job."""

import json
import logging
import math
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from chunkrestore.jobs.events import Events, is_block, read_events


def test_events_come_back_in_order_with_their_time(tmp_path):
    before = time.time()
    with Events(tmp_path / "events.jsonl") as events:
        events.emit("begin", host="node7", pid=4, plan={"shape": [8, 8, 8]})
        events.emit("block", stage="blocks-0", item=(0, 0, 1, 2, 3), seconds={"read": 0.25}, total=1.5)
    first, second = read_events(tmp_path / "events.jsonl")
    assert before - 0.01 <= first.pop("time") <= second.pop("time") <= time.time() + 0.01
    assert first == {"event": "begin", "host": "node7", "pid": 4, "plan": {"shape": [8, 8, 8]}}
    assert second["item"] == [0, 0, 1, 2, 3]
    assert [is_block(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()] == [False, True]


def test_a_resumed_job_appends(tmp_path):
    for host in ("a", "b"):
        with Events(tmp_path / "events.jsonl") as events:
            events.emit("begin", host=host)
    assert [event["host"] for event in read_events(tmp_path / "events.jsonl")] == ["a", "b"]


def test_without_a_path_events_go_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Events(None) as events:
        events.emit("begin")
    assert list(tmp_path.iterdir()) == []


def test_no_file_holds_no_events(tmp_path):
    assert list(read_events(tmp_path / "events.jsonl")) == []


@pytest.mark.parametrize("end", [0, 1, 20, -2])
def test_a_line_cut_off_by_a_crash_hides_no_other_event(tmp_path, end):
    path = tmp_path / "events.jsonl"
    with Events(path) as events:
        events.emit("begin", host="a")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:end])
    assert [event["host"] for event in read_events(path)] == ["a"]
    with Events(path) as events:
        events.emit("begin", host="b")
    assert [event["host"] for event in read_events(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "spoilt",
    [b"\0" * 40, b"\xff\xfe{", b"[1, 2]", b'{"event": "block"}', b'{"time": Infinity, "event": "x"}', b"7"],
)
def test_spoilt_lines_are_left_out(tmp_path, spoilt):
    path = tmp_path / "events.jsonl"
    for name in ("first", "second"):
        with Events(path) as events:
            events.emit(name)
        with path.open("ab") as file:
            file.write(spoilt + b"\n")
    assert [event["event"] for event in read_events(path)] == ["first", "second"]


def test_what_json_does_not_know_is_written_so_that_any_reader_takes_it(tmp_path):
    with Events(tmp_path / "events.jsonl") as events:
        events.emit(
            "begin",
            n=np.int64(3),
            share=np.float32(0.5),
            path=Path("/a"),
            worst=math.nan,
            parts=[math.inf],
            two={1: 2},
        )

    def refuse(constant):
        raise AssertionError(constant)

    event = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    del event["time"]
    assert event == {
        "event": "begin", "n": 3, "share": 0.5, "path": "/a", "worst": "nan", "parts": ["inf"], "two": {"1": 2}
    }  # fmt: skip


def test_a_full_disk_costs_events_but_not_the_job(caplog):
    with caplog.at_level(logging.WARNING), Events("/dev/full") as events:
        for _ in range(3):
            events.emit("block")
    assert [record.getMessage() for record in caplog.records] == [
        "events cannot be written to /dev/full ([Errno 28] No space left on device); the job goes on without"
    ]


def test_a_folder_that_is_gone_costs_events_but_not_the_job(tmp_path, caplog):
    with Events(tmp_path / "gone" / "events.jsonl") as events:
        events.emit("begin")
        assert "cannot be written" in caplog.text
        (tmp_path / "gone").mkdir()
        events.emit("end")
    assert [event["event"] for event in read_events(tmp_path / "gone" / "events.jsonl")] == ["end"]


FILLS_UP = """
import resource, signal, sys
from chunkrestore.jobs.events import Events
events = Events(sys.argv[1])
events.emit("begin", text="x" * 50)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
for _ in range(3):
    events.emit("block", text="y" * 50)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
events.emit("end")
"""


def test_events_go_on_after_a_disk_that_filled_up_within_a_line(tmp_path):
    """The kernel takes a part of a line, then none, then all again."""
    path = tmp_path / "events.jsonl"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", FILLS_UP, path], check=True, stderr=subprocess.PIPE)
    content = path.read_bytes()
    assert len(content.splitlines()[1]) == 150 - len(content.splitlines()[0]) - 1
    assert [event["event"] for event in read_events(path)] == ["begin", "end"]


def test_reading_takes_no_memory_for_what_was_read(tmp_path):
    with Events(tmp_path / "events.jsonl") as events:
        for i in range(5_000):
            events.emit("block", stage="blocks-0", item=[0, 0, 0, 0, i], seconds={"read": 0.1}, total=1.0)
    assert (tmp_path / "events.jsonl").stat().st_size > 500_000
    tracemalloc.start()
    n_read = sum(1 for _ in read_events(tmp_path / "events.jsonl"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_read == 5_000
    assert peak < 100_000

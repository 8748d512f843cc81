"""What is shown while a job runs: figures of this run, on a terminal a bar, elsewhere a line a minute."""

import io
import os
import pty
import re
import threading

import pytest

from chunkrestore.jobs.progress import Progress, format_seconds, pace


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return io.StringIO()


def work(stage, clock, n, seconds):
    for _ in range(n):
        clock.now += seconds
        stage(seconds)


def test_one_line_a_minute_and_one_at_the_end(clock, log):
    with Progress(stream=log, clock=clock).stage("blocks-0", 100) as stage:
        work(stage, clock, 100, 2.0)
    assert log.getvalue().splitlines() == [
        "blocks-0: 30 of 100 blocks, 0.5 blocks/s, 2:20 left, 1:00 since the job began",
        "blocks-0: 60 of 100 blocks, 0.5 blocks/s, 1:20 left, 2:00 since the job began",
        "blocks-0: 90 of 100 blocks, 0.5 blocks/s, 0:20 left, 3:00 since the job began",
        "blocks-0: 100 of 100 blocks, 0.5 blocks/s, 3:20 since the job began",
    ]


def test_blocks_of_earlier_runs_do_not_count_as_speed(clock, log):
    with Progress(stream=log, clock=clock).stage("blocks-0", 1000, 940) as stage:
        work(stage, clock, 12, 5.0)
        assert stage.seconds_left == pytest.approx((1000 - 952) * 5)
    assert log.getvalue().splitlines()[0].startswith("blocks-0: 952 of 1000 blocks, 0.2 blocks/s, 4:00 left")


def test_a_stage_that_was_finished_before_says_nothing(log):
    with Progress(stream=log).stage("detect", 27, 27):
        pass
    assert log.getvalue() == ""


def test_the_minute_runs_on_from_stage_to_stage(clock, log):
    progress = Progress(stream=log, clock=clock)
    with progress.stage("detect", 4) as stage:
        work(stage, clock, 4, 10.0)
    with progress.stage("paint", 9) as stage:
        work(stage, clock, 7, 10.0)
        # 40 seconds of the first stage, but a line was printed at its end.
        assert [line.split(":")[0] for line in log.getvalue().splitlines()] == ["detect", "paint"]


def test_a_tick_shows_that_a_job_lives_although_no_block_ends(clock, log):
    with Progress(stream=log, clock=clock).stage("blocks-0", 3) as stage:
        for _ in range(130):
            clock.now += 1
            stage.tick()
        assert log.getvalue().splitlines() == [
            "blocks-0: 0 of 3 blocks, 1:00 since the job began",
            "blocks-0: 0 of 3 blocks, 2:00 since the job began",
        ]


def test_failed_and_retried_blocks_are_counted_and_failed_ones_are_not_waited_for(clock, log):
    with Progress(stream=log, clock=clock).stage("blocks-0", 10) as stage:
        stage.note("retry")
        stage.note("retry")
        stage.note("failed")
        work(stage, clock, 6, 30.0)
        assert stage.seconds_left == pytest.approx(3 * 30.0)
    last = log.getvalue().splitlines()[-1]
    assert last.startswith("blocks-0: 6 of 10 blocks, 0.0333 blocks/s, 1:30 left, 1 failed, 2 retried")


def test_an_error_leaves_a_line_that_says_how_far_it_came(clock, log):
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        Progress(stream=log, clock=clock).stage("blocks-0", 10) as stage,
    ):
        work(stage, clock, 3, 1.0)
        raise KeyboardInterrupt
    assert log.getvalue().startswith("blocks-0: 3 of 10 blocks")


def test_voxels_are_told_for_the_stage_and_for_the_whole_job(clock, log):
    progress = Progress(stream=log, clock=clock)
    with progress.stage("blocks-0", 8, n_voxels=8 * 10**6) as stage:
        work(stage, clock, 8, 0.5)
    with progress.stage("pyramid-0-1", 2) as stage:
        work(stage, clock, 2, 2.0)
    first, second = log.getvalue().splitlines()
    assert first.endswith("2 megavoxels/s, 0:04 since the job began, 2 megavoxels/s since then")
    assert second.endswith("0.5 blocks/s, 0:08 since the job began, 1 megavoxels/s since then")


def test_the_time_left_runs_down_between_blocks(clock):
    with Progress(quiet=True, clock=clock).stage("blocks-0", 3) as stage:
        work(stage, clock, 1, 100.0)
        assert stage.seconds_left == 200.0
        clock.now += 60
        assert stage.seconds_left == 140.0
        clock.now += 600
        assert stage.seconds_left == 0.0


def test_quiet_shows_nothing(clock, log, capsys):
    with Progress(quiet=True, stream=log, clock=clock).stage("blocks-0", 3) as stage:
        work(stage, clock, 3, 100.0)
        stage.note("failed")
    assert (log.getvalue(), *capsys.readouterr()) == ("", "", "")


def test_a_stage_without_items_shows_nothing(log):
    with Progress(stream=log).stage("settle-0.0-2", 0):
        pass
    assert log.getvalue() == ""


@pytest.mark.parametrize("n_workers", [1, 7, 64])
def test_the_pace_counts_workers_that_finish_in_bursts(n_workers):
    ends = [0.0] + [10.0 * (burst + 1) + 1e-3 * i for burst in range(6) for i in range(n_workers)]
    assert pace(ends, [10.0] * (6 * n_workers)) == pytest.approx(10.0 / n_workers, rel=0.01)


def test_the_pace_is_that_of_the_median_block():
    seconds = [1.0] * 40 + [200.0] + [1.0] * 40
    ends = [0.0]
    for one in seconds:
        ends.append(ends[-1] + one)
    assert pace(ends, seconds) == pytest.approx(1.0)
    assert pace(ends) == pytest.approx(280 / 81)


@pytest.mark.parametrize(("times", "seconds"), [([], []), ([3.0], []), ([3.0, 3.0], [0.0])])
def test_no_pace_is_made_up(times, seconds):
    assert pace(times, seconds) is None


def test_blocks_that_took_no_time_have_a_pace_all_the_same():
    assert pace([0.0, 1.0, 2.0], [0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0:00"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (86_399, "23:59:59"),
        (190_000, "2 d 4 h"),
    ],
)
def test_lengths_of_time_are_written_for_people(seconds, text):
    assert format_seconds(seconds) == text


def test_a_terminal_gets_a_bar_with_the_figures(clock, monkeypatch):
    """A real pseudo-terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    shown = []

    def listen():
        # A terminal whose other end was closed answers with an error.
        try:
            while data := os.read(leader, 4096):
                shown.append(data)
        except OSError:
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    with (
        os.fdopen(follower, "w") as terminal,
        Progress(stream=terminal, clock=clock).stage("blocks-0", 27, 10, n_voxels=27 * 10**6) as stage,
    ):
        stage.note("retry")
        work(stage, clock, 7, 0.5)
    listener.join()
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(shown).decode())
    assert "blocks-0" in text
    assert "17/27 2 megavoxels/s, 0:05 left, 1 retried" in text
    assert "since the job" not in text

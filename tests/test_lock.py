"""Two drivers on one output: the second is refused, a dead one's lock is taken over, and never are there two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observing import DEADLINE, wait_for

from chunkrestore.jobs import lock as lock_module
from chunkrestore.jobs import lock_file
from chunkrestore.jobs.lock import Lock, LockedError, LockLostError, holder
from chunkrestore.jobs.lock_file import STALE_SECONDS, myself, runs

HOLD = """
import sys
from chunkrestore.jobs.lock import Lock
Lock(sys.argv[1], "image").acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(folder, *, before=()):
    """Yield another process that holds the lock, and end it."""
    with subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if process.stdout.readline() != "held\n":
                pytest.fail("the other process did not get the lock")
            yield process
        finally:
            process.kill()


def leave(folder, *, age_s=0.0, **changed):
    """Leave the lock of another driver, which last gave a sign of life `age_s` ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock.json"
    other = replace(myself("image", STALE_SECONDS), **changed)
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (time.time() - age_s,) * 2)
    return other


ELSEWHERE = {"host": "node17", "realm": "another boot", "pid": 4321}


def test_a_second_driver_is_refused_and_told_by_whom(tmp_path):
    with holding(tmp_path / "out.zarr.chunkrestore") as process:
        with pytest.raises(LockedError) as refusal:
            Lock(tmp_path / "out.zarr.chunkrestore").acquire()
        message = str(refusal.value)
        assert f"process {process.pid} of " in message
        assert f" on {os.uname().nodename} for job image, since 20" in message
        assert "last heartbeat 0 s ago" in message
        assert f"(kill {process.pid})" in message
        seen = holder(tmp_path / "out.zarr.chunkrestore")
        assert (seen.pid, seen.job, seen.alive) == (process.pid, "image", True)


def test_a_lock_can_be_had_again_once_it_is_released(tmp_path):
    for _ in range(3):
        with Lock(tmp_path, "image") as lock:
            assert not lock.took_over
            lock.check()
            assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
            with pytest.raises(LockedError, match="end this very process"):
                Lock(tmp_path).acquire()
            with pytest.raises(RuntimeError, match="through this object already"):
                lock.acquire()
        assert list(tmp_path.iterdir()) == []
        assert holder(tmp_path) is None


def test_a_lock_is_released_when_the_job_fails(tmp_path):
    with pytest.raises(KeyError), Lock(tmp_path):
        raise KeyError("block")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_lock_is_taken_leaves_none(tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lock_module, "sweep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Lock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_driver_is_succeeded_at_once(tmp_path):
    with holding(tmp_path) as process:
        process.kill()
        # Not waited for yet: its exit status still lies in the table of processes.
        wait_for(lambda: holder(tmp_path).alive is False, "the process to die")
        with Lock(tmp_path) as lock:
            assert lock.took_over
            assert lock.earlier.pid == process.pid
            assert holder(tmp_path).pid == os.getpid()


def test_a_stopped_driver_keeps_its_lock_however_old_its_heartbeat(tmp_path):
    with holding(tmp_path) as process:
        os.kill(process.pid, signal.SIGSTOP)
        state = Path(f"/proc/{process.pid}/stat")
        wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the process to stop")
        os.utime(tmp_path / "lock.json", (0, 0))
        with pytest.raises(LockedError, match=f"process {process.pid} "):
            Lock(tmp_path).acquire()


def test_a_later_process_with_the_same_number_is_another(tmp_path):
    leave(tmp_path, birth="1")
    with Lock(tmp_path) as lock:
        assert lock.took_over


def test_a_driver_elsewhere_lives_while_its_heart_beats(tmp_path):
    leave(tmp_path, age_s=STALE_SECONDS - 60, slurm_job="77", **ELSEWHERE)
    with pytest.raises(LockedError, match=r"\(scancel 77\)\. .* try again in (59|60) s: after 120 s"):
        Lock(tmp_path).acquire()
    assert holder(tmp_path).alive


def test_a_driver_elsewhere_is_succeeded_when_its_heart_stops(tmp_path):
    other = leave(tmp_path, age_s=STALE_SECONDS + 2, **ELSEWHERE)
    assert holder(tmp_path).alive is False
    with Lock(tmp_path) as lock:
        assert lock.earlier.token == other.token


def test_a_driver_can_ask_for_more_patience(tmp_path):
    leave(tmp_path, age_s=STALE_SECONDS + 2, **ELSEWHERE | {"stale_s": 1800.0})
    with pytest.raises(LockedError, match="after 1800 s without a heartbeat"):
        Lock(tmp_path).acquire()


@pytest.mark.parametrize("hours", [-5, 5])
def test_clocks_of_machines_do_not_matter(tmp_path, monkeypatch, hours):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + hours * 3600)
    leave(tmp_path, age_s=hours * 3600, **ELSEWHERE)
    assert abs(now() - (tmp_path / "lock.json").stat().st_mtime) < 60
    with pytest.raises(LockedError):
        Lock(tmp_path).acquire()
    os.utime(tmp_path / "lock.json", (now() - STALE_SECONDS - 2,) * 2)
    with Lock(tmp_path) as lock:
        assert lock.took_over


def test_waiting_for_a_lock_ends_when_it_is_free(tmp_path):
    with holding(tmp_path) as process:
        threading.Timer(0.1, process.kill).start()
        with Lock(tmp_path, beat_s=0.01).acquire(wait_s=DEADLINE) as lock:
            assert lock.took_over


def test_the_same_host_name_in_another_process_namespace_is_elsewhere(tmp_path):
    unshare = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("process namespaces cannot be made here")
    with holding(tmp_path, before=unshare) as process:
        seen = holder(tmp_path)
        # Its number there is that of another process here, and says nothing.
        assert seen.host == os.uname().nodename
        assert seen.pid < 10
        assert runs(seen) is None
        assert seen.alive
        process.kill()
        process.wait()
        os.utime(tmp_path / "lock.json", (0, 0))
        assert holder(tmp_path).alive is False


def test_a_process_that_proc_hides_is_not_taken_for_dead(tmp_path, monkeypatch):
    other = leave(tmp_path)

    def hidden(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(lock_file.Path, "read_bytes", hidden)
    assert runs(other) is None
    assert runs(replace(other, pid=2**31 - 2)) is False


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1]", b"{}", b"[" * 50_000, b"null", b'{"pid": 1}'],
    ids=["empty", "half", "no text", "a list", "no keys", "deep", "null", "a key"],
)
def test_a_file_that_is_no_lock_is_believed_while_it_is_fresh(tmp_path, content):
    path = tmp_path / "lock.json"
    began = time.time()
    path.write_bytes(content)
    with pytest.raises(LockedError) as told:
        Lock(tmp_path).acquire()
    found = re.search(
        r"no whole lock, changed (\d+) s ago\. .*delete that file if no driver", str(told.value)
    )
    assert found is not None
    assert int(found[1]) <= round(time.time() - began)
    assert path.read_bytes() == content
    os.utime(path, (0, 0))
    with Lock(tmp_path) as lock:
        assert lock.took_over
    assert not path.exists()


@pytest.mark.parametrize(
    "wrong",
    [{"pid": -1}, {"pid": 2**40}, {"pid": "1"}, {"token": "../../x"}, {"stale_s": None}, {"host": 3}],
    ids=str,
)
def test_values_that_no_lock_has_are_not_acted_upon(tmp_path, wrong):
    leave(tmp_path, age_s=STALE_SECONDS + 2, **wrong)
    assert holder(tmp_path).pid == 0
    with Lock(tmp_path / "."):
        assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_a_lock_that_another_driver_took_over_is_lost(tmp_path):
    with Lock(tmp_path, beat_s=0.01) as lock:
        other = leave(tmp_path, **ELSEWHERE)
        wait_for(lock.lost.is_set, "the loss to be noticed")
        with pytest.raises(LockLostError, match="another one took it over"):
            lock.check()
    assert holder(tmp_path).token == other.token


def test_a_lock_that_was_deleted_is_lost(tmp_path):
    with Lock(tmp_path / "folder", beat_s=0.01) as lock:
        shutil.rmtree(tmp_path / "folder")
        wait_for(lock.lost.is_set, "the loss to be noticed")


def test_a_driver_that_slept_too_long_looks_before_it_writes(tmp_path, monkeypatch):
    with Lock(tmp_path) as lock:
        leave(tmp_path, **ELSEWHERE)
        lock.check()
        up = lock_module._uptime()
        monkeypatch.setattr(lock_module, "_uptime", lambda: up + STALE_SECONDS)
        with pytest.raises(LockLostError):
            lock.check()


def test_looking_again_costs_nothing_while_heartbeats_get_through(tmp_path, monkeypatch):
    with Lock(tmp_path) as lock:
        up = lock_module._uptime()
        monkeypatch.setattr(lock_module, "_uptime", lambda: up + STALE_SECONDS)
        lock.beat()
        with monkeypatch.context() as patched:
            patched.setattr(lock_module, "read", None)
            lock.check()


def test_heartbeats_are_seen_by_others(tmp_path):
    with Lock(tmp_path, beat_s=0.01):
        for _ in range(2):
            os.utime(tmp_path / "lock.json", (0, 0))
            wait_for(lambda: (tmp_path / "lock.json").stat().st_mtime > 1e9, "a heartbeat")


def test_a_file_server_that_does_not_answer_takes_no_lock(tmp_path, monkeypatch):
    with Lock(tmp_path, beat_s=0.001) as lock:
        with monkeypatch.context() as patched:
            tried = threading.Semaphore(0)

            def refuse(_path):
                tried.release()
                raise OSError(5, "Input/output error")

            patched.setattr(lock_module, "read", refuse)
            assert all(tried.acquire(timeout=DEADLINE) for _ in range(3))
            assert not lock.lost.is_set()
        lock.beat()
        lock.check()


def test_a_forked_child_does_not_release_the_lock_of_its_parent(tmp_path, monkeypatch):
    with Lock(tmp_path) as lock:
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: 1)
            lock.release()
        assert (tmp_path / "lock.json").exists()


def test_what_killed_drivers_left_behind_is_swept(tmp_path):
    for name in ("lock-aa.draft", "lock-bb.claim"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    for name in ("lock-cc.draft", "lock-dd.claim", "notes.txt"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "notes.txt", (0, 0))
    with Lock(tmp_path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["lock-cc.draft", "lock-dd.claim", "lock.json", "notes.txt"]


def test_without_hard_links_the_lock_is_as_exclusive(tmp_path, monkeypatch):
    def refuse(_source, _name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(tmp_path), pytest.raises(LockedError):
        Lock(tmp_path).acquire()
    leave(tmp_path, birth="1")
    with Lock(tmp_path) as lock:
        assert lock.took_over
    assert list(tmp_path.iterdir()) == []


def in_private_mount(tmp_path, options, code):
    """Run code in a namespace where `tmp_path` is a file system of its own; return its output."""
    command = f"mount -t tmpfs -o {options} none {tmp_path} && exec {sys.executable} -c '{code}' {tmp_path}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("file systems cannot be mounted here")
    return done.stdout + done.stderr


REFUSED = """
import os, sys
from chunkrestore.jobs.lock import Lock, holder
%s
try:
    Lock(os.path.join(sys.argv[1], "out.chunkrestore")).acquire()
except OSError as error:
    print(type(error).__name__, error.errno, error)
    print(os.listdir(sys.argv[1]))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_read_only_file_system_is_named(tmp_path):
    said = in_private_mount(tmp_path, "ro", REFUSED % "")
    assert f"OSError 30 [Errno 30] the lock in {tmp_path}/out.chunkrestore cannot be written" in said
    assert "(Read-only file system); choose an output where you may write" in said


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_full_disk_is_named_and_nothing_half_is_left(tmp_path):
    fill = 'os.mkdir(sys.argv[1] + "/out.chunkrestore")\ntry:\n    open(sys.argv[1] + "/x", "wb").write(bytes(10**6))\n'
    said = in_private_mount(tmp_path, "size=64k", REFUSED % (fill + "except OSError:\n    pass"))
    assert "OSError 28" in said
    assert "(No space left on device); free some space" in said


def test_a_full_disk_does_not_keep_a_lock_from_being_released(tmp_path, monkeypatch):
    lock = Lock(tmp_path).acquire()

    @contextmanager
    def full(_folder, _content):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(lock_module, "draft", full)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_only_be_read_still_tells_its_holder(tmp_path, monkeypatch):
    @contextmanager
    def refuse(_folder, _content):
        raise OSError(30, "Read-only file system")
        yield

    monkeypatch.setattr(lock_module, "draft", refuse)
    leave(tmp_path, age_s=1000.0, **ELSEWHERE)
    seen = holder(tmp_path)
    assert seen.alive is None
    assert 1000 <= seen.age_s < 1060
    leave(tmp_path, birth="1")
    assert holder(tmp_path).alive is False


DIE = """
import os, signal, sys
from chunkrestore.jobs import lock_file
from chunkrestore.jobs.lock import Lock
name, left = sys.argv[2], int(sys.argv[3])
real = getattr(os, name)
def call(*args):
    global left
    left -= 1
    if left == 0 and sys.argv[4] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        real(*args)
    finally:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, call)
Lock(sys.argv[1]).acquire().release()
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("step", "number"), [("link", 1), ("link", 2), ("replace", 1), ("unlink", 1), ("unlink", 2)]
)
def test_a_driver_killed_in_the_middle_of_a_change_leaves_no_dead_end(tmp_path, step, number, when):
    leave(tmp_path, birth="1")
    for _ in range(3):
        # Each is killed while it succeeds the one before it, and may leave a claim on a claim.
        script = [sys.executable, "-c", DIE, str(tmp_path), step, str(number), when]
        assert subprocess.run(script).returncode == -signal.SIGKILL
    with Lock(tmp_path):
        pass
    left = [path.name for path in tmp_path.iterdir()]
    assert all(name.endswith((".draft", ".claim")) for name in left)


RACE = """
import fcntl, os, random, signal, sys, time
from pathlib import Path
from chunkrestore.jobs.lock import Lock, LockedError
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
luck = random.Random(seed)
witness = os.open(folder / "witness", os.O_RDWR)
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
until = time.monotonic() + 300
for turn in range(12):
    lock = Lock(folder / "out.chunkrestore")
    while True:
        try:
            lock.acquire()
            break
        except LockedError:
            if time.monotonic() > until:
                sys.exit("starved")
            time.sleep(luck.random() * 0.01)
    try:
        fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.write(log, b"overlap\\n")
        sys.exit("overlap")
    os.write(log, f"{os.getpid()} {lock.took_over}\\n".encode())
    time.sleep(luck.random() * 0.002)
    if luck.random() < 0.2:
        os.kill(os.getpid(), signal.SIGKILL)
    lock.check()
    fcntl.flock(witness, fcntl.LOCK_UN)
    lock.release()
    try:
        lock.path.parent.rmdir()
    except OSError:
        pass
"""


def race(folder, seed, n_processes):
    """Let processes race for one lock, most of them killed sooner or later while they hold it.

    Returns what each holder wrote, in the order in which they held it, and how many were killed.
    """
    for name in ("witness", "log"):
        (folder / name).touch()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(folder), str(seed * 1000 + i)], stderr=subprocess.PIPE, text=True
        )
        for i in range(n_processes)
    ]
    failures = [process.communicate()[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert set(statuses) <= {0, -signal.SIGKILL}, failures
    return [line.split() for line in (folder / "log").read_text().splitlines()], statuses.count(
        -signal.SIGKILL
    )


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_many_processes_one_at_a_time_holds_the_lock(tmp_path, seed):
    held, n_killed = race(tmp_path, seed, 8 if seed == 1 else 24)
    assert n_killed >= 2
    with Lock(tmp_path / "out.chunkrestore") as last:
        n_taken_over = sum(took_over == "True" for _, took_over in held) + last.took_over
    # Whoever was killed held it and was succeeded; whoever released it was not taken for killed.
    assert n_taken_over == n_killed


class Killed(BaseException):
    """The end of an actor."""


class Stage:
    """Actors in threads, of which one at a time makes one step of the file system, in a given order.

    Each step is before a call of `os` that other actors can see the effect of. An actor can be killed there.
    """

    STEPS = ("link", "open", "replace", "unlink", "utime")

    def __init__(self, folder, schedule):
        self.folder, self.schedule = folder, list(schedule)
        self.dead, self.inside, self.n_held = set(), set(), 0
        self.failures = []
        self.local = threading.local()
        self.moved = threading.Semaphore(0)
        self.turns, self.pids = {}, []

    def step(self):
        pid = self.local.pid
        self.moved.release()
        self.turns[pid].acquire()
        if pid in self.dead:
            raise Killed

    def act(self, pid):
        self.local.pid = pid
        self.turns[pid].acquire()
        try:
            for _ in range(2):
                lock = Lock(self.folder)
                try:
                    lock.acquire()
                except LockedError:
                    continue
                # A killed actor has left, whether or not it could say so.
                if self.inside - self.dead:
                    self.failures.append(f"{pid} beside {self.inside - self.dead}")
                self.inside.add(pid)
                self.n_held += 1
                self.step()
                if not lock.lost.is_set():
                    lock.beat()
                if lock.lost.is_set():
                    self.failures.append(f"{pid} lost it")
                self.inside.discard(pid)
                lock.release()
        except Killed:
            pass
        except Exception as error:
            self.failures.append(repr(error))
        self.turns.pop(pid)
        self.moved.release()

    def run(self, n_actors):
        """Let actors take, hold and release the lock twice each; one at least survives."""
        threads = []
        self.n_held = 0
        for pid in range(len(self.pids) + 1, len(self.pids) + 1 + n_actors):
            self.pids.append(pid)
            self.turns[pid] = threading.Semaphore(0)
            threads.append(threading.Thread(target=self.act, args=(pid,), daemon=True))
            threads[-1].start()
        while self.turns:
            choice, kill = self.schedule.pop(0) if self.schedule else (0, False)
            pid = sorted(self.turns)[choice % len(self.turns)]
            if kill and len(self.turns) > 1:
                self.dead.add(pid)
            self.turns[pid].release()
            assert self.moved.acquire(timeout=DEADLINE)
        for thread in threads:
            thread.join()

    def patch(self, patched):
        """Let actors be what the lock takes for processes."""
        calls = {name: getattr(os, name) for name in self.STEPS}

        stage = self

        class Steps:
            def __getattr__(self, name):
                if name not in calls:
                    return (lambda: stage.local.pid) if name == "getpid" else getattr(os, name)

                def call(*args):
                    stage.step()
                    return calls[name](*args)

                return call

        real = myself("image", STALE_SECONDS)
        for module in (lock_file, lock_module):
            patched.setattr(module, "os", Steps())
            patched.setattr(module, "runs", lambda found: found.pid not in self.dead)
        tokens = iter(range(10**6))
        patched.setattr(
            lock_module,
            "myself",
            lambda _job, _s: replace(real, pid=self.local.pid, token=f"t{next(tokens)}"),
        )
        patched.setattr(lock_module, "_N_TRIES", 20)
        patched.setattr(lock_module, "_TRY_SECONDS", 0.0)
        patched.setattr(Lock, "_keep_alive", lambda _lock, _released: None)


STRETCH = st.tuples(st.integers(0, 2), st.integers(1, 12), st.sampled_from([False, False, False, True]))
"""An actor, the steps that it makes before the next one has its turn, and whether it is killed at the last."""


@given(st.lists(STRETCH, min_size=3, max_size=12), st.booleans())
def test_in_no_order_of_steps_do_two_drivers_hold_the_lock(tmp_path_factory, stretches, begin_dead):
    folder = tmp_path_factory.mktemp("out")
    stage = Stage(folder, [(a, kill and i == n - 1) for a, n, kill in stretches for i in range(n)])
    if begin_dead:
        stage.dead.add(999)
        leave(folder, token="first", pid=999)
    with pytest.MonkeyPatch.context() as patched:
        stage.patch(patched)
        stage.run(3)
        assert not stage.failures
        # Whoever died wherever, the next driver gets the lock.
        stage.run(1)
        assert stage.n_held > 0
    assert not stage.failures

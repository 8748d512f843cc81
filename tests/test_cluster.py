"""Clusters: what they listen on, how tasks are handed out, and what a lost worker costs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import dask.array as da
import numpy as np
import psutil
import pytest
from observing import DEADLINE, tree, wait_for

import chunkrestore as cr
from chunkrestore.cluster import THREADS_PER_WORKER, connect, usable_cores, worker_environment
from chunkrestore.jobs import phases
from chunkrestore.jobs.causes import RetryPolicy
from chunkrestore.jobs.places import ClusterLostError
from chunkrestore.jobs.runner import Failed, Finished, Retried, Runner
from chunkrestore.psf import gaussian

ITEMS = [(0, 0, i) for i in range(12)]
PSF = gaussian((1.0, 1.0, 1.0), truncate=2)


@pytest.fixture(scope="module")
def client():
    with connect("local", n_workers=2) as client:
        yield client


def worker_pids(client):
    return sorted(client.run(os.getpid).values())


def mark(item, folder, *, deadly=None):
    """Leave one letter per try in a file of the item; end the process on the deadly one."""
    with open(folder / str(item[2]), "a") as file:
        file.write("x")
    if item[2] == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return item[2]


def mark_and_die_at_five(item, folder):
    return mark(item, folder, deadly=5)


def refuse(item):
    raise ValueError(f"voxel {item[2]} is bad")


def test_nothing_listens_beyond_loopback(client):
    driver = psutil.Process()
    processes = [driver, *driver.children(recursive=True)]
    assert set(worker_pids(client)) <= {process.pid for process in processes}
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3
    assert set(listening) == {"127.0.0.1"}


def test_workers_have_the_environment_that_libraries_read_when_they_are_imported(client):
    for environment in client.run(lambda: dict(os.environ)).values():
        assert environment.items() >= worker_environment(max(1, usable_cores() // 2)).items()
        # What Dask sets by itself is still there.
        assert {"OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_"} <= environment.keys()
    assert worker_environment(3)["OMP_NUM_THREADS"] == "3"


def results_of(happenings):
    return {h.item: h.outcome.result for h in happenings if isinstance(h, Finished)}


def compute_together(item, folder):
    """Leave a file while computing, and return how many others did the same in this process."""
    with phases.computing():
        mine = folder / f"{os.getpid()}-{item[2]}"
        mine.touch()
        n_computing = len(list(folder.glob(f"{os.getpid()}-*")))
        time.sleep(0.01)
        mine.unlink()
    return n_computing


def test_workers_compute_one_block_at_a_time_and_read_and_write_others_meanwhile(client, tmp_path):
    assert sorted(client.nthreads().values()) == [THREADS_PER_WORKER] * 2
    happenings = list(Runner(client).map(compute_together, ITEMS, lambda _: (tmp_path,)))
    assert set(results_of(happenings).values()) == {1}
    assert all(set(h.outcome.seconds) == {"compute"} for h in happenings)
    assert any(h.outcome.total > h.outcome.seconds["compute"] + 0.005 for h in happenings)


def test_every_item_is_run_once_on_the_cluster(client, tmp_path):
    happenings = list(Runner(client).map(mark, ITEMS, lambda _: (tmp_path,)))
    assert results_of(happenings) == {item: item[2] for item in ITEMS}
    assert {path.read_text() for path in tmp_path.iterdir()} == {"x"}
    assert len(list(tmp_path.iterdir())) == len(ITEMS)


def test_tasks_in_flight_are_bounded_and_results_are_not_held(client):
    asked = []

    def arguments(item):
        asked.append(item)
        return (1,)

    items = [(0, 0, i) for i in range(60)]
    n_done = 0
    for _ in Runner(client).map(pow_item, items, arguments):
        n_done += 1
        assert len(asked) <= n_done + 2 * THREADS_PER_WORKER * 2
        assert len(client.futures) <= 2 * THREADS_PER_WORKER * 2 + 1
    assert n_done == len(items)
    wait_for(lambda: not client.futures, "futures to be released")


def pow_item(item, power):
    return item[2] ** power


def test_failing_blocks_are_given_up_and_nothing_is_left_behind(client):
    happenings = list(Runner(client).map(refuse, ITEMS, lambda _: ()))
    assert {h.item: h.message for h in happenings} == {
        item: f"ValueError: voxel {item[2]} is bad" for item in ITEMS
    }
    assert {type(h) for h in happenings} == {Failed}
    wait_for(lambda: not client.futures, "futures to be released")


def test_what_is_not_asked_for_any_more_is_cancelled(client):
    happenings = Runner(client).map(pow_item, [(0, 0, i) for i in range(1000)], lambda _: (1,))
    next(happenings)
    happenings.close()
    wait_for(lambda: not client.futures, "futures to be cancelled")


def reset(item, folder):
    """Fail twice as a network file system does."""
    n_tries = len(mark_and_read(item, folder))
    if item[2] in (2, 7) and n_tries <= 2:
        raise ConnectionResetError("file server has gone away")
    return n_tries


def mark_and_read(item, folder):
    mark(item, folder)
    return (folder / str(item[2])).read_text()


def test_failed_input_is_tried_again_on_the_cluster(client, tmp_path):
    happenings = list(Runner(client, RetryPolicy(first_delay=0.01)).map(reset, ITEMS, lambda _: (tmp_path,)))
    assert results_of(happenings) == {item: 3 if item[2] in (2, 7) else 1 for item in ITEMS}
    assert [h.cause for h in happenings if isinstance(h, Retried)] == ["transient"] * 4


def test_a_block_that_kills_its_workers_is_done_alone_and_then_given_up(client, tmp_path):
    happenings = list(Runner(client).map(mark_and_die_at_five, ITEMS, lambda _: (tmp_path,)))
    (failure,) = (h for h in happenings if isinstance(h, Failed))
    assert (failure.item, failure.cause) == ((0, 0, 5), "worker")
    assert failure.message == (
        "its worker process was killed each time it was tried, most likely for want of memory; use a smaller "
        "`block_shape`, or fewer workers"
    )
    # Whatever was on the worker that died with it is done nevertheless.
    assert results_of(happenings) == {item: item[2] for item in ITEMS if item[2] != 5}
    assert (tmp_path / "5").read_text() == "xxx"
    client.wait_for_workers(2, timeout=DEADLINE)


def test_pilots_decide_on_the_cluster_as_in_process(client, tmp_path):
    image = np.random.default_rng(1).poisson(40, (16, 40, 40)).astype(np.uint16)
    source = cr.write_image(image, tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    operator = cr.RichardsonLucy(PSF, iterations=9, stop="i-divergence")
    decided = []
    for name, cluster in (("a", client), ("b", "serial")):
        output = tmp_path / f"{name}.zarr"
        report = cr.run(operator, source, output, cluster=cluster, block_shape=(16, 20, 20), quiet=True)
        decided.append((report.operators[0]["decision"], cr.open_image(output).data.compute()))
    assert decided[0][0] == decided[1][0]
    np.testing.assert_array_equal(decided[0][1], decided[1][1])


def test_lazy_arrays_are_computed_on_the_cluster(client):
    image = np.random.default_rng(1).integers(0, 99, (20, 24, 24)).astype(np.uint16)
    lazy = cr.deconvolve(da.from_array(image, chunks=(10, 12, 24)), PSF, iterations=2)
    np.testing.assert_array_equal(lazy.compute(), lazy.compute(scheduler="threads"))


def test_a_job_survives_the_kill_of_workers(client, tmp_path):
    """One worker is killed while blocks are deconvolved, one while labels are painted."""
    image = np.random.default_rng(1).integers(0, 99, (24, 48, 48)).astype(np.uint16)
    source = cr.write_image(image, tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    operators = [cr.RichardsonLucy(PSF, iterations=5), cr.Threshold()]
    options = {"block_shape": (6, 16, 16), "quiet": True}
    cr.run(operators, source, tmp_path / "reference" / "out.zarr", cluster="serial", **options)
    output = tmp_path / "killed" / "out.zarr"
    journal = tmp_path / "killed" / "out.zarr.chunkrestore" / "image" / "journal.jsonl"

    def n_recorded(stage):
        return journal.read_text().count(f'"{stage}"') if journal.exists() else 0

    def kill():
        for stage, victim in zip(("blocks-0", "paint"), victims, strict=True):
            wait_for(lambda stage=stage: n_recorded(stage) >= 3, "three finished blocks")
            os.kill(victim, signal.SIGKILL)
            seen.append(n_recorded(stage))

    client.wait_for_workers(2, timeout=DEADLINE)
    victims, seen = worker_pids(client), []
    killer = threading.Thread(target=kill)
    killer.start()
    report = cr.run(operators, source, output, cluster=client, **options)
    killer.join()
    assert all(3 <= n < 36 for n in seen)
    assert not set(victims) & set(worker_pids(client))
    assert tree(output) == tree(tmp_path / "reference" / "out.zarr")
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    done = [(entry["stage"], *entry["item"]) for entry in entries if "item" in entry]
    assert len(done) == len(set(done)) == report.n_done
    client.wait_for_workers(2, timeout=DEADLINE)


def test_serial_needs_no_client():
    for name in ("serial", None):
        with connect(name) as nothing:
            assert nothing is None


def test_a_client_is_used_and_left_open(client):
    with connect(client) as same:
        assert same is client
    assert client.status == "running"


def test_auto_uses_the_client_that_is_open_in_this_process(client):
    from distributed import Client

    with Client(client.scheduler.address) as users:
        with connect("auto") as same:
            assert same is users
        assert users.status == "running"


def test_a_cluster_of_a_job_is_not_made_the_default_of_other_dask_work(client):
    import dask

    assert dask.config.get("scheduler", None) is None


def test_an_address_or_a_scheduler_file_is_connected_to(client, tmp_path):
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": client.scheduler.address}))
    for address in (client.scheduler.address, str(tmp_path / "scheduler.json")):
        with connect(address) as other:
            assert other is not client
            assert other.submit(abs, -3).result() == 3
        assert other.status == "closed"


@pytest.mark.parametrize("name", ["nonsense", "foo://host:1", "tcp://host", "host:port", "127.0.0.1:99999"])
def test_an_unknown_cluster_is_refused(name):
    with (
        pytest.raises(ValueError, match=f"`cluster` '{name}' is no address of a Dask scheduler"),
        connect(name),
    ):
        pass


def test_a_file_that_no_scheduler_wrote_is_refused(tmp_path):
    path = tmp_path / "scheduler.json"
    for content in ("", "[]", "{}"):
        path.write_text(content)
        with (
            pytest.raises(ValueError, match="is not the file that a Dask scheduler writes"),
            connect(str(path)),
        ):
            pass


def test_a_scheduler_that_does_not_answer_is_named():
    with (
        pytest.raises(
            ConnectionError, match=r"no Dask scheduler answers at `cluster` 'tcp://127\.0\.0\.1:1'"
        ),
        connect("tcp://127.0.0.1:1"),
    ):
        pass


def test_a_lost_scheduler_is_an_interruption(tmp_path):
    """The scheduler runs in a process of its own, as on a batch system, and is killed in the middle."""
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen([*command, "--no-dashboard", "--scheduler-file", str(file)], **quietly)
    worker = None
    try:
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        command = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", "--no-dashboard"]
        worker = subprocess.Popen([*command, "--scheduler-file", str(file)], **quietly)
        with connect(str(file)) as remote:
            remote.wait_for_workers(1, timeout=DEADLINE)
            done = Runner(remote).map(len, ((0, 0, i) for i in range(10**6)), lambda _: ())
            for _ in range(3):
                next(done)
            scheduler.kill()
            with pytest.raises(
                ClusterLostError, match="the Dask scheduler is gone; what is finished is kept"
            ):
                list(done)
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait()


def test_the_environment_of_workers_does_not_stay_in_this_process(monkeypatch):
    names = {*worker_environment(1), "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def here():
        return {name: os.environ.get(name) for name in names}

    before = here()
    with connect("local", n_workers=1) as client:
        assert here() == before
        found = client.run(lambda: os.environ["OMP_NUM_THREADS"])
        assert set(found.values()) == {str(usable_cores())}
    assert here() == before

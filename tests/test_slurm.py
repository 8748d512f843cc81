"""A real SLURM of one node runs the script that ran locally, and jobs survive what SLURM does to them."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from slurm.single_node import DAEMONS, missing

import chunkrestore as cr
from chunkrestore.psf import gaussian, write_psf
from chunkrestore.simulate import embryo

TESTS = Path(__file__).parent
NODE = TESTS / "slurm" / "single_node.py"
ANALYSIS = TESTS / "slurm" / "analysis.py"
EXAMPLES = TESTS.parent / "examples"

PROFILE = {
    "kind": "slurm",
    "jobs": 2,
    "cores": 1,
    "memory": "2GB",
    "walltime": "00:20:00",
    "interface": "lo",
}
"""Two small jobs that talk over loopback."""

PSF, ITERATIONS, BACKGROUND, BLOCK = gaussian((1.5, 1.0, 1.0)), 10, 100.0, (16, 32, 32)
"""Those of the script."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
DEADLINE = 240.0

for package in ("dask_jobqueue", "cryptography"):
    pytest.importorskip(package)
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no SLURM: {', '.join(missing())} not installed")


def node(action, folder):
    """Start or stop the daemons as a user would; return what was printed."""
    command = [sys.executable, NODE, action, folder]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a user of SLURM, whose PATH begins with this environment's programs."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        name, value = node("start", folder).removeprefix("export ").strip().split("=", 1)
        programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        yield {**os.environ, "PATH": programs, name: shlex.split(value)[0]}
    finally:
        node("stop", folder)


@pytest.fixture
def started(environment, tmp_path):
    """A function that starts a command in the test's folder; its output goes into ``log.txt``."""

    @contextmanager
    def started(*command):
        with (
            open(tmp_path / "log.txt", "ab") as log,
            subprocess.Popen(
                [str(part) for part in command], env=environment, cwd=tmp_path, stdout=log, stderr=log
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    return started


@pytest.fixture
def ask(started, tmp_path):
    """A function that runs a command that must succeed, and returns what it wrote."""

    def ask(*command, timeout=DEADLINE):
        (tmp_path / "log.txt").unlink(missing_ok=True)
        with started(*command) as process:
            status = process.wait(timeout)
        written = (tmp_path / "log.txt").read_text().strip()
        assert status == 0, f"{command} ended with {status} and wrote:\n{written}"
        return written

    return ask


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with an image, what the script makes of it on this machine, and a profile of the site."""
    folder = tmp_path_factory.mktemp("site")
    volume = embryo((48, 96, 96), seed=5)
    cr.write_image(volume.image, folder / "in.zarr", axes="zyx", voxel_size=volume.voxel_size)
    (folder / "site.yaml").write_text(yaml.safe_dump(PROFILE))
    command = [sys.executable, ANALYSIS, folder / "in.zarr", folder / "local.zarr", "--cluster", "serial"]
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)
    return folder


def tree(path):
    """Return the content of every file below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def lines(output, name):
    """Return the complete lines of a file of the job that writes `output`."""
    file = output.with_name(f"{output.name}.chunkrestore") / "image" / name
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finished(output):
    """Return how often each block of each stage was finished according to the journal."""
    return Counter(
        (line["stage"], *line["item"]) for line in lines(output, "journal.jsonl") if "item" in line
    )


def workers(output):
    """Return the processes that blocks were done in."""
    return {line["worker"] for line in lines(output, "events.jsonl") if line["event"] == "block"}


def wait_for(condition, what):
    """Poll until `condition` holds; a wait that fails is an error and not a hang."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {DEADLINE} s for {what}")
        time.sleep(0.05)


def write_pipeline(path, source, output):
    """Write a pipeline that does what the script does, and its PSF beside it."""
    write_psf(path.with_suffix(".tif"), PSF, cr.open_image(source).voxel_size)
    lucy = {"operator": "richardson-lucy", "psf": path.with_suffix(".tif").name}
    lucy |= {"iterations": ITERATIONS, "background": BACKGROUND}
    steps = [lucy, {"operator": "threshold"}]
    stores = {"input": str(source), "output": str(output)}
    path.write_text(
        json.dumps({**stores, "steps": steps, "block": BLOCK, "label_name": "nuclei"})
    )  # JSON is YAML


def test_a_job_runs(ask, tmp_path):
    ask("sbatch", "--wait", "--output=out.txt", "--wrap", "echo $SLURM_JOB_NUM_NODES")
    assert (tmp_path / "out.txt").read_text() == "1\n"


def test_a_second_slurm_runs_beside_the_first_and_leaves_no_process(ask, tmp_path):
    node("start", tmp_path / "other")
    pids = [int((tmp_path / "other" / f"{name}.pid").read_text()) for name in DAEMONS]
    assert [psutil.Process(pid).name() for pid in pids] == list(DAEMONS)
    node("stop", tmp_path / "other")
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)
    assert ask("sinfo", "--noheader", "--format=%T") in ("idle", "mixed")


def test_the_script_that_ran_locally_runs_through_jobs(ask, site, tmp_path):
    output = tmp_path / "out.zarr"
    ask(
        sys.executable,
        ANALYSIS,
        site / "in.zarr",
        output,
        "--cluster",
        "slurm",
        "--profile",
        site / "site.yaml",
    )
    assert tree(output) == tree(site / "local.zarr")
    assert len(workers(output)) == 2
    # Its jobs ended with it.
    assert ask("squeue", "--noheader", "--states=PENDING,RUNNING") == ""


def test_the_script_that_ran_locally_runs_inside_an_allocation(ask, site, tmp_path):
    output = tmp_path / "out.zarr"
    ask("srun", "--ntasks=4", "--mem-per-cpu=1G", sys.executable, ANALYSIS, site / "in.zarr", output)
    assert tree(output) == tree(site / "local.zarr")
    assert len(workers(output)) == 2


@pytest.mark.slow
def test_a_mistake_ends_all_tasks_of_an_allocation(started, site, tmp_path):
    with started(
        "srun", "--ntasks=4", sys.executable, ANALYSIS, site / "none.zarr", tmp_path / "out"
    ) as step:
        assert step.wait(DEADLINE) == 1
    assert "none.zarr" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_job_goes_on_when_the_job_of_a_worker_is_cancelled(ask, started, site, tmp_path):
    output = tmp_path / "out.zarr"
    options = ("--cluster", "slurm", "--profile", site / "site.yaml")
    with started(sys.executable, ANALYSIS, site / "in.zarr", output, *options) as driver:
        wait_for(lambda: len(workers(output)) == 2 or driver.poll() is not None, "blocks of both workers")
        job = ask("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()[0]
        ask("scancel", job)
        n_done = len(finished(output))
        assert driver.wait(DEADLINE) == 0, (tmp_path / "log.txt").read_text()
    assert n_done < len(finished(output))
    assert set(finished(output).values()) == {1}
    assert tree(output) == tree(site / "local.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["jobs", "allocation"])
def test_a_job_that_runs_out_of_time_is_requeued_and_goes_on(ask, site, tmp_path, where):
    """What SLURM does five minutes before the end of a job, at once: it sends USR1, as the script asked for."""
    output = tmp_path / "out.zarr"
    write_pipeline(tmp_path / "pipeline.yaml", site / "in.zarr", output)
    script, *arguments = {
        "jobs": ("slurm.sbatch", "pipeline.yaml", "--cluster", "slurm", "--profile", site / "site.yaml"),
        "allocation": ("slurm-allocation.sbatch", "pipeline.yaml"),
    }[where]
    receiver = {"jobs": ["--batch"], "allocation": []}[where]
    size = {"jobs": ["--mem=1G"], "allocation": ["--ntasks=4", "--cpus-per-task=1", "--mem-per-cpu=1G"]}[
        where
    ]
    job = ask("sbatch", "--parsable", "--output=driver.txt", *size, EXAMPLES / script, *arguments)

    def state():
        return dict(re.findall(r"(JobState|Restarts)=(\w+)", ask("scontrol", "show", "job", job)))

    wait_for(lambda: workers(output) or state()["JobState"] in ENDED, "the first blocks")
    assert state()["JobState"] == "RUNNING", (tmp_path / "driver.txt").read_text()
    ask("scancel", "--signal=USR1", *receiver, job)
    wait_for(lambda: state()["JobState"] in ENDED, "the second try")
    written = (tmp_path / "driver.txt").read_text()
    assert state() == {"JobState": "COMPLETED", "Restarts": "1"}, written
    assert "interrupted" in written
    assert set(finished(output).values()) == {1}
    assert tree(output) == tree(site / "local.zarr")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_leave_before_their_job_ends_and_others_follow(ask, site, tmp_path):
    reference, output = tmp_path / "reference.zarr", tmp_path / "out.zarr"
    # One job at a time. SLURM counts whole minutes, so that a worker has forty seconds for its last block.
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(PROFILE | {"jobs": 1, "walltime": "00:00:20"}))
    where = ("--cluster", "slurm", "--profile", tmp_path / "short.yaml")
    for store, options in ((reference, ("--cluster", "serial")), (output, where)):
        ask(sys.executable, ANALYSIS, site / "in.zarr", store, "--iterations=60", *options, timeout=900.0)
    assert len(workers(output)) > 1
    assert not [line for line in lines(output, "events.jsonl") if line["event"] in ("retry", "failed")]
    assert "TIMEOUT" not in ask("squeue", "--noheader", "--states=all", "--format=%T")
    assert tree(output) == tree(reference)


@pytest.mark.slow
def test_the_networks_give_the_same_objects_through_jobs(ask, site, tmp_path):
    """The demonstration's pipeline: Richardson-Lucy, CARE, StarDist."""
    pytest.importorskip("stardist")
    local, output = tmp_path / "local.zarr", tmp_path / "out.zarr"
    where = ("--cluster", "slurm", "--profile", site / "site.yaml")
    for store, options in ((local, ("--cluster", "local")), (output, where)):
        ask(sys.executable, ANALYSIS, site / "in.zarr", store, "--networks", *options, timeout=400.0)
    assert tree(output) == tree(local)
    assert cr.open_image(output).label("nuclei").data.max().compute() > 20


@pytest.mark.slow
def test_tasks_that_come_late_to_an_allocation_end_with_it(ask):
    """The driver has nothing to do and is gone before all workers have met."""
    script = "from chunkrestore.cluster import connect\nwith connect(): pass"
    ask("srun", "--ntasks=6", "--mem-per-cpu=300M", sys.executable, "-c", script)

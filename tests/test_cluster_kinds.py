"""Kinds of clusters: profiles, what they make of a job, pins of devices, keys, signals, and what listens where."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import dask
import psutil
import pytest
from observing import DEADLINE, wait_for
from slurm.single_node import missing, start, stop

from chunkrestore.cluster import connect, read_profile, worker_environment
from chunkrestore.cluster.environment import CONFIGURATION, exported_configuration
from chunkrestore.cluster.gpu import devices_in, has_devices, visible_devices

needs_jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask-jobqueue is not installed"
)
"""Not `importorskip`: to import it changes what Ctrl-C does."""
EXAMPLES = Path(__file__).parents[1] / "examples"
MINIMAL = "kind: slurm\ncores: 4\nmemory: 16 GiB\nwalltime: '1:00:00'\npython: /opt/venv/bin/python\n"


def listening(pids):
    """Return the addresses on which processes listen."""
    connections = (c for pid in pids for c in psutil.Process(pid).net_connections("inet"))
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def environment_of(client, name):
    return client.run(os.getenv, name)


@pytest.fixture
def profile(tmp_path):
    def write(text, name="site.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return tmp_path / name

    return write


# Profiles


def test_the_example_is_a_profile():
    site = read_profile(EXAMPLES / "slurm-profile.yaml")
    assert (site.kind, site.jobs, site.n_workers_per_job) == ("slurm", 8, 2)
    assert site.log_directory == str(EXAMPLES / "slurm-logs")


def test_paths_in_a_profile_are_relative_to_its_folder(profile, tmp_path):
    assert read_profile(profile(MINIMAL)).log_directory == str(tmp_path / "slurm-logs")
    (tmp_path / "scheduler.json").write_text("{}")
    found = read_profile(
        profile("kind: scheduler\naddress: scheduler.json\nca_file: keys/ca.pem\ncert: /a.pem\n")
    )
    assert found.address == str(tmp_path / "scheduler.json")
    assert (found.ca_file, found.cert) == (str(tmp_path / "keys" / "ca.pem"), "/a.pem")
    address = "tls://host:8786"
    assert read_profile(profile(f"kind: scheduler\naddress: {address}\n")).address == address


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("partitoin: gpu", "partitoin: Extra inputs are not permitted"),
        ("cores: true", "cores: Input should be a valid integer"),
        ("cores: 0", "cores: Input should be greater than or equal to 1"),
        ("jobs: '3'", "jobs: Input should be a valid integer"),
        ("walltime: 12:00:00", "walltime: 43200 is not of the form of '12:00:00'"),
        ("walltime: 2 hours", "walltime: '2 hours' is not of the form of '12:00:00'"),
        ("memory: lots", "memory: 'lots' is not of the form of '64 GiB'"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "partition: 'gpu"),
        ('partition: "gpu\\n"', "partition: 'gpu"),
        ("partition: a b", "partition: 'a b'"),
        ("partition: -gpu", "partition: '-gpu'"),
        ("account: $(id)", "account: '$(id)'"),
        ("qos: a;b", "qos: 'a;b'"),
        ("constraint: a`b`", "constraint: 'a`b`'"),
        ("gpu_type: 'a100 --uid=0'", "gpu_type: 'a100 --uid=0'"),
        ("job_name: ../x", "job_name: '../x'"),
        ("python: /bin/python -c x", "python: '/bin/python -c x'"),
        ("local_directory: $(id)", "local_directory: '$(id)'"),
        ("local_directory: --nworkers", "local_directory: '--nworkers'"),
        ("log_directory: 'my logs'", "log_directory: '"),
        ("interface: eth0;id", "interface: 'eth0;id'"),
        ("modules: ['cuda; id']", "modules.0: 'cuda; id'"),
        ("source: ['/etc/x && id']", "source.0: '/etc/x && id'"),
        ("environment: {'A;id': x}", "environment.A;id.[key]: 'A;id'"),
        ('environment: {A: "x\\nid"}', "environment.A: 'x"),
        ("environment: {A: 3}", "environment.A: 3 is not of the form of 'one line of text', in quotes"),
        ("directives: ['--exclusive\\n']", "directives.0: '--exclusive"),
        ("directives: [-N2]", "directives.0: '-N2'"),
        ("directives: ['--mem=3G']", "directives.0: --mem is decided by the key `memory`"),
        ("directives: ['--nodes=2']", "directives.0: --nodes cannot be changed"),
        ("tls: 'no'", "tls: Input should be a valid boolean"),
    ],
)
def test_a_wrong_key_is_named(profile, line, message):
    kept = [other for other in MINIMAL.splitlines() if other.partition(":")[0] != line.partition(":")[0]]
    with pytest.raises(ValueError, match=r"profile .*site\.yaml is not valid: ") as caught:
        read_profile(profile("\n".join([*kept, line])))
    assert message in str(caught.value)


def test_all_wrong_keys_are_named_at_once(profile):
    with pytest.raises(ValueError, match=r"cores: .*; memory: .*; walltime: .*; colour: "):
        read_profile(profile("kind: slurm\ncolour: red\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("kind: pbs", "kind: Input tag 'pbs'"), ("cores: 3", "kind: "), ("- a", "kind: "), ("{", "is not YAML")],
)
def test_what_is_no_profile_is_refused(profile, text, message):
    with pytest.raises(ValueError, match=message):
        read_profile(profile(text))
    with pytest.raises(FileNotFoundError, match=r"profile nowhere\.yaml does not exist"):
        read_profile("nowhere.yaml")


def test_a_profile_of_another_kind_is_refused(profile):
    path = profile("kind: local\n")
    for cluster in ("cuda", "slurm", "tcp://127.0.0.1:1"):
        with (
            pytest.raises(ValueError, match="but `profile` is of the kind 'local'"),
            connect(cluster, profile=path),
        ):
            pass
    with pytest.raises(ValueError, match="give no second `profile`"), connect(str(path), profile=path):
        pass
    with (
        pytest.raises(ValueError, match="`n_workers` must be at least 1, not 0"),
        connect("local", n_workers=0),
    ):
        pass
    with pytest.raises(ValueError, match="`cluster` 'slurm' needs a `profile`"), connect("slurm"):
        pass


def test_a_profile_is_a_cluster(profile):
    for cluster, given in (
        (profile("kind: local\nn_workers: 1\n"), None),
        ("auto", profile("kind: local\nn_workers: 1\n")),
    ):
        with connect(cluster, profile=given) as client:
            assert len(client.nthreads()) == 1


# Jobs of SLURM


HEADER = """\
#!/usr/bin/env bash

#SBATCH -J chunkrestore
#SBATCH -e {logs}/chunkrestore-%J.err
#SBATCH -o {logs}/chunkrestore-%J.out
"""

EXPORTS = """\
export OMP_NUM_THREADS={n}
export TF_NUM_INTRAOP_THREADS={n}
export TF_NUM_INTEROP_THREADS=1
export TF_ENABLE_ONEDNN_OPTS=1
export TF_CPP_MIN_LOG_LEVEL=2
export TF_FORCE_GPU_ALLOW_GROWTH=true
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export OMP_WAIT_POLICY=passive
export MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=268435456
export DASK_DISTRIBUTED__ADMIN__TICK__LIMIT='1 hour'
export DASK_DISTRIBUTED__WORKER__MEMORY__TARGET=False
export DASK_DISTRIBUTED__WORKER__MEMORY__SPILL=False
export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False
"""

PRELOADS = "--preload chunkrestore.cluster.preload --preload-nanny chunkrestore.cluster.preload"

CPU_SCRIPT = (
    HEADER
    + """\
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH -t 1:00:00
"""
    + EXPORTS.replace("{n}", "4")
    + "/opt/venv/bin/python -m distributed.cli.dask_worker tls://SCHEDULER:PORT --name NAME --nthreads 2 "
    "--memory-limit 16.00GiB --nanny --death-timeout 300 --lifetime 3240s --lifetime-stagger 180s --no-dashboard "
    f"--dashboard-address 127.0.0.1:0 {PRELOADS} --protocol tls://\n"
)

GPU_PROFILE = (
    MINIMAL.replace("cores: 4", "cores: 32").replace("1:00:00", "2-00:00:00")
    + """\
jobs: 3
gpus: 4
gpu_type: a100
partition: gpu-long
account: imaging
qos: high
constraint: a100|h100
directives: [--exclusive, --reservation=microscopy]
job_name: lightsheet
source: [/etc/profile.d/modules.sh]
modules: [cuda/12.4]
environment: {NOTE: "it's $(id)", OMP_NUM_THREADS: '3'}
interface: ib0
local_directory: $TMPDIR
"""
)

GPU_SCRIPT = (
    HEADER.replace("chunkrestore", "lightsheet")
    + """\
#SBATCH -p gpu-long
#SBATCH -A imaging
#SBATCH -n 1
#SBATCH --cpus-per-task=32
#SBATCH --mem=16G
#SBATCH -t 2-00:00:00
#SBATCH --gres=gpu:a100:4
#SBATCH --qos=high
#SBATCH --constraint=a100|h100
#SBATCH --exclusive
#SBATCH --reservation=microscopy
source /etc/profile.d/modules.sh
module load cuda/12.4
"""
    + EXPORTS.replace("{n}", "8").replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=3")
    + """\
export NOTE='it'"'"'s $(id)'
/opt/venv/bin/python -m distributed.cli.dask_worker tls://SCHEDULER:PORT --name NAME --nthreads 2 --memory-limit \
4.00GiB --nworkers 4 --nanny --death-timeout 300 --local-directory $TMPDIR --lifetime 171900s --lifetime-stagger 450s \
--no-dashboard --dashboard-address 127.0.0.1:0 """
    + PRELOADS
    + " --interface ib0 --protocol tls://\n"
)


@pytest.fixture
def plain_environment(monkeypatch):
    for name in worker_environment(1):
        monkeypatch.delenv(name, raising=False)


@needs_jobqueue
@pytest.mark.parametrize(("text", "script"), [(MINIMAL, CPU_SCRIPT), (GPU_PROFILE, GPU_SCRIPT)])
def test_a_job_is_what_the_profile_says(profile, plain_environment, tmp_path, text, script):
    from chunkrestore.cluster.slurm import job_script

    # What the user told dask-jobqueue in its own files does not count.
    with dask.config.set({"jobqueue.slurm.queue": "other", "jobqueue.slurm.job-script-prologue": ["id"]}):
        assert job_script(read_profile(profile(text))) == script.replace(
            "{logs}", str(tmp_path / "slurm-logs")
        )


@needs_jobqueue
def test_variables_reach_a_job_as_they_are(profile, tmp_path):
    from chunkrestore.cluster.slurm import job_options

    value = 'it\'s "$(touch injected)" `touch injected` \\ $HOME; é'
    site = read_profile(profile(MINIMAL + f"environment: {json.dumps({'NOTE': value})}\n"))
    lines = [line for line in job_options(site)["job_script_prologue"] if line.startswith("export ")]
    done = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf %s "$NOTE"'])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (value, "")
    assert not (tmp_path / "injected").exists()


def test_workers_of_jobs_have_the_configuration_of_those_started_here():
    code = (
        "import distributed, dask, json, sys\n"
        "print(json.dumps([dask.config.get(key) for key in json.loads(sys.argv[1])]))"
    )
    keys = [key for key in CONFIGURATION if ".memory." in key or ".admin." in key]
    assert len(keys) == len(exported_configuration()) == 4
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(keys)],
        env={**os.environ, **exported_configuration()},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == [CONFIGURATION[key] for key in keys]


def test_what_is_missing_for_slurm_is_said(profile, monkeypatch, tmp_path):
    path = profile(MINIMAL)
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "dask_jobqueue", None)
        with pytest.raises(ImportError, match=r"pip install 'chunkrestore\[slurm\]'"), connect(path):
            pass
    if importlib.util.find_spec("dask_jobqueue") is not None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="must be started where sbatch is"), connect(path):
            pass
    assert not (tmp_path / "slurm-logs").exists()


@needs_jobqueue
def test_jobs_leave_the_interrupt_to_the_driver():
    code = (
        "import signal\nfrom chunkrestore.cluster.slurm import slurm_cluster\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "slurm_cluster()\nassert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def note(item, folder):
    """Leave a letter when a task begins, and one when it ends."""
    with open(Path(folder) / str(item), "a") as file:
        file.write("b")
        file.flush()
        time.sleep(0.1)
        file.write("e")


@pytest.mark.slow
def test_a_worker_whose_lifetime_ends_finishes_its_tasks(tmp_path):
    """As in a job: Dask itself would close the worker in the middle of them, and they would be done again."""
    with connect("local", n_workers=1) as client:
        command = [
            sys.executable,
            "-m",
            "distributed.cli.dask_worker",
            client.scheduler.address,
            "--no-dashboard",
        ]
        options = [
            "--dashboard-address",
            "127.0.0.1:0",
            "--host",
            "127.0.0.1",
            "--nthreads",
            "2",
            "--name",
            "leaves",
        ]
        options += ["--lifetime", "20s", "--preload", "chunkrestore.cluster.preload"]
        environment = {**os.environ, **exported_configuration(), "PYTHONPATH": str(Path(__file__).parent)}
        quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        worker = subprocess.Popen([*command, *options], env=environment, **quietly)
        try:
            client.wait_for_workers(2, timeout=DEADLINE)
            count = 0
            while worker.poll() is None:
                tasks = [client.submit(note, count + i, tmp_path, pure=False) for i in range(8)]
                count += len(tasks)
                client.gather(tasks)
                for task in tasks:
                    task.release()
            assert worker.returncode == 0
        finally:
            worker.kill()
            worker.wait()
    assert count > 8
    assert {(tmp_path / str(item)).read_text() for item in range(count)} == {"be"}


def test_workers_leave_signals_to_the_driver():
    with connect("local", n_workers=1) as client:
        (pid,) = client.run(os.getpid).values()
        for number in (signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
        assert list(client.run(os.getpid).values()) == [pid]


@pytest.mark.filterwarnings("ignore:Port 8787 is already in use")
def test_the_dashboard_listens_on_loopback_unless_asked(profile):
    for asked, addresses in ((False, {"127.0.0.1"}), (True, {"127.0.0.1", "0.0.0.0"})):
        path = profile(f"kind: local\nn_workers: 1\ndashboard: {str(asked).lower()}\n")
        with connect("local", profile=path) as client:
            assert listening([os.getpid(), *client.run(os.getpid).values()]) == addresses


# CUDA devices. This file needs none: pins are environment variables.


def test_devices_are_listed_as_cuda_lists_them(monkeypatch):
    for listed, devices in (
        ("0,1,3", ["0", "1", "3"]),
        (" 2 , 0 ", ["2", "0"]),
        ("GPU-5d2a,MIG-7f1c", ["GPU-5d2a", "MIG-7f1c"]),
        ("MIG-GPU-5d2a/1/0", ["MIG-GPU-5d2a/1/0"]),
        ("1,-1,0", ["1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert visible_devices() == devices, listed


def test_a_divided_device_counts_as_its_parts():
    listing = (
        "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa-1)\n  MIG 3g.20gb     Device  0: (UUID: MIG-bb-1)\n"
        "  MIG 3g.20gb     Device  1: (UUID: MIG-bb-2)\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-aa-2)\n"
    )
    assert devices_in(listing) == ["MIG-bb-1", "MIG-bb-2", "GPU-aa-2"]
    assert devices_in("No devices found.\n") == []


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine whose driver lists two devices."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-aa-1)'\necho 'GPU 1: A (UUID: GPU-aa-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_a_driver_that_fails_lists_no_device(nvidia_smi):
    assert has_devices()
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-aa-1)'\nexit 9\n")
    assert not has_devices()


def test_an_exported_variable_makes_no_device(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_devices()


def test_without_a_device_cuda_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with (
        pytest.raises(ValueError, match="needs a CUDA device: CUDA_VISIBLE_DEVICES is '-1'"),
        connect("cuda"),
    ):
        pass
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match="needs a CUDA device: nvidia-smi lists none"), connect("cuda"):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with (
        pytest.raises(ValueError, match="`n_workers` is 3, but there are 2 CUDA devices"),
        connect("cuda", n_workers=3),
    ):
        pass


def test_auto_takes_the_devices_that_there_are(nvidia_smi):
    with connect("auto") as client:
        assert sorted(environment_of(client, "CUDA_VISIBLE_DEVICES").values()) == ["GPU-aa-1", "GPU-aa-2"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_worker_keeps_its_device_when_it_is_killed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d2a")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    with connect("cuda") as client:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,GPU-5d2a"
        pids = client.run(os.getpid)
        pins = environment_of(client, "CUDA_VISIBLE_DEVICES")
        assert sorted(pins.values()) == ["3", "GPU-5d2a"]
        assert set(environment_of(client, "CUDA_DEVICE_ORDER").values()) == {"PCI_BUS_ID"}
        assert set(environment_of(client, "TF_FORCE_GPU_ALLOW_GROWTH").values()) == {"true"}
        assert listening([os.getpid(), *pids.values()]) == {"127.0.0.1"}
        names = {address: info["name"] for address, info in client.scheduler_info()["workers"].items()}
        before = {names[address]: pin for address, pin in pins.items()}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)

        def again():
            now = client.run(os.getpid, on_error="ignore")
            return len(now) == 2 and not set(now.values()) & set(pids.values())

        wait_for(again, "new worker processes")
        client.wait_for_workers(2, timeout=DEADLINE)
        names = {a: info["name"] for a, info in client.scheduler_info()["workers"].items()}
        assert {names[a]: pin for a, pin in environment_of(client, "CUDA_VISIBLE_DEVICES").items()} == before


def test_dask_cuda_tells_the_cores_next_to_a_device(monkeypatch, tmp_path):
    """The names are those of dask-cuda; itself it fails where there is no driver."""
    package = tmp_path / "dask_cuda"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text("def get_cpu_affinity(device): return {5: [0]}[device]\n")
    (package / "plugins.py").write_text(
        "import os\nfrom distributed import WorkerPlugin\n"
        "class CPUAffinity(WorkerPlugin):\n    def __init__(self, cores): self.cores = cores\n"
        "    def setup(self, worker): os.sched_setaffinity(0, self.cores)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with connect("cuda") as client:
        assert list(client.run(os.sched_getaffinity, 0).values()) == [{0}]
        assert os.sched_getaffinity(0) != {0} or os.cpu_count() == 1
    for name in [name for name in sys.modules if name.partition(".")[0] == "dask_cuda"]:
        del sys.modules[name]


# Schedulers elsewhere


@pytest.fixture(scope="module")
def tls_scheduler(tmp_path_factory):
    """A scheduler that asks for certificates: its address, and the folder of the credentials."""
    pytest.importorskip("cryptography")
    from distributed import Security

    folder = tmp_path_factory.mktemp("keys")
    for name in ("right", "wrong"):
        made = Security.temporary()
        (folder / f"{name}-cert.pem").write_text(made.tls_client_cert)
        (folder / f"{name}-key.pem").write_text(made.tls_client_key)
    file = folder / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    command += ["--protocol", "tls://", "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    command += ["--tls-ca-file", folder / "right-cert.pem", "--tls-cert", folder / "right-cert.pem"]
    command += ["--tls-key", folder / "right-key.pem", "--scheduler-file", file]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        yield json.loads(file.read_text())["address"], folder
    finally:
        process.kill()
        process.wait()


def credentials(folder, name):
    return (
        f"ca_file: {folder}/{name}-cert.pem\ncert: {folder}/{name}-cert.pem\nkey: {folder}/{name}-key.pem\n"
    )


def test_a_scheduler_with_tls_is_reached_with_the_credentials_of_a_profile(tls_scheduler, profile):
    address, folder = tls_scheduler
    path = profile(f"kind: scheduler\naddress: {address}\n{credentials(folder, 'right')}")
    for cluster in (path, address, str(folder / "scheduler.json")):
        with connect(cluster, profile=None if cluster == path else path) as client:
            assert client.scheduler.address == address
            assert client.run_on_scheduler(lambda: 3) == 3


def test_a_scheduler_with_tls_is_reached_with_the_configuration_of_dask(tls_scheduler):
    address, folder = tls_scheduler
    cert, key = str(folder / "right-cert.pem"), str(folder / "right-key.pem")
    tls = {"ca-file": cert, "client.cert": cert, "client.key": key}
    tls = {f"distributed.comm.tls.{name}": path for name, path in tls.items()}
    with dask.config.set(tls), connect(address) as client:
        assert client.run_on_scheduler(lambda: 3) == 3


def test_who_has_no_credentials_for_tls_is_told_what_is_missing(tls_scheduler, profile):
    address, folder = tls_scheduler
    with pytest.raises(ValueError, match="needs `ca_file`, `cert`, `key` in a profile"), connect(address):
        pass
    path = profile(f"kind: scheduler\naddress: {address}\nca_file: {folder}/right-cert.pem\n")
    with pytest.raises(ValueError, match="needs `cert`, `key` in a profile"), connect(path):
        pass
    path = profile(f"kind: scheduler\naddress: {address}\nca_file: gone.pem\n")
    with (
        pytest.raises(FileNotFoundError, match=r"gone\.pem, which the profile names, does not exist"),
        connect(path),
    ):
        pass


def test_wrong_credentials_are_refused(tls_scheduler, profile):
    address, folder = tls_scheduler
    path = profile(f"kind: scheduler\naddress: {address}\n{credentials(folder, 'wrong')}")
    with (
        pytest.raises(ConnectionError, match=r"no connection .* TLS certificate does not match"),
        connect(path),
    ):
        pass


# Inside an allocation. `test_slurm.py` has it in a real one, which has a single node.


STEP = """\
import json, os, signal
from chunkrestore.cluster import connect

def ignored(): return [signal.getsignal(n) is signal.SIG_IGN for n in (signal.SIGINT, signal.SIGUSR1)]

if __name__ == "__main__":
    rank = os.environ["SLURM_PROCID"]
    print("before", rank)
    for _ in range(2):
        with connect() as client:
            client.wait_for_workers(2, timeout=60)
            pids = list(client.run(os.getpid).values())
            found = {
                "address": client.scheduler.address,
                "pins": list(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()),
                "threads": list(client.run(os.getenv, "OMP_NUM_THREADS").values()),
                "ignored": list(client.run(ignored).values()),
                "pids": pids,
                "file": [name for name in os.listdir() if name.endswith(".pem")],
            }
            print(json.dumps(found))
    print("after", rank)
"""


@needs_jobqueue
@pytest.mark.parametrize(
    ("n_nodes", "protocol"), [pytest.param(1, "tcp://127.0.0.1:", marks=pytest.mark.slow), (2, "tls://")]
)
def test_tasks_of_a_step_become_scheduler_driver_and_workers(tmp_path, n_nodes, protocol):
    """Four processes as ``srun`` would start them. Beyond one node, connections are encrypted."""
    (tmp_path / "script.py").write_text(STEP)
    step = {
        **os.environ,
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
        **{"SLURM_STEP_NUM_NODES": str(n_nodes), "SLURM_CPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "5,6"},
    }
    step.pop("OMP_NUM_THREADS", None)
    tasks = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (4 // n_nodes))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outputs = [task.communicate(timeout=2 * DEADLINE) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert [task.returncode for task in tasks] == [0, 0, 0, 0], outputs
    assert [output for i, (output, _) in enumerate(outputs) if i != 1] == [
        "before 0\n",
        "before 2\n",
        "before 3\n",
    ]
    assert "".join(errors for _, errors in outputs) == ""
    first, *found, last = outputs[1][0].splitlines()
    assert (first, last) == ("before 1", "after 1")
    once, again = map(json.loads, found)
    # A script that connects twice finds the same workers.
    assert sorted(once["pids"]) == sorted(again["pids"])
    assert once["address"].startswith(protocol)
    assert sorted(once["pins"]) == ["5", "6"]
    assert once["threads"] == ["1", "1"]
    assert once["ignored"] == [[True, True]] * 2
    assert once["file"] == ([] if n_nodes == 1 else [".chunkrestore-7-0-0.pem"])
    # Neither the address nor the key stays.
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"])
def test_a_batch_script_is_no_task_of_a_step(monkeypatch, missing):
    from chunkrestore.cluster.allocation import in_allocation

    for name, value in (("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "3"), ("SLURM_NTASKS", "3")):
        monkeypatch.setenv(name, value)
    assert in_allocation()
    monkeypatch.delenv(missing)
    assert not in_allocation()
    monkeypatch.setenv(missing, "1")
    assert in_allocation() == (missing == "SLURM_PROCID")


# Jobs that cannot run. `test_slurm.py` has those that can.


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real SLURM of one node."""
    if missing():
        pytest.skip(f"no SLURM: {', '.join(missing())} not installed")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with pytest.MonkeyPatch.context() as context:
            for name, value in start(folder).items():
                context.setenv(name, value)
            yield
    finally:
        stop(folder)


RUNS = "kind: slurm\ncores: 1\nmemory: 1 GiB\nwalltime: '0:05:00'\ninterface: lo\n"


@pytest.mark.slow
def test_a_job_that_slurm_refuses_is_an_error_at_once(slurm, profile):
    path = profile(RUNS + "partition: none\n")
    with pytest.raises(RuntimeError, match=r"SLURM refuses the job: .*invalid partition"), connect(path):
        pass


@pytest.mark.slow
def test_jobs_that_end_before_they_bring_a_worker_are_an_error_with_what_they_wrote(slurm, profile):
    path = profile(RUNS + "python: /opt/none/bin/python\n")
    with (
        pytest.raises(RuntimeError, match=r"1 SLURM jobs ended before .*/opt/none/bin/python: No such file"),
        connect(path),
    ):
        pass


@pytest.mark.slow
def test_while_jobs_wait_it_is_said_and_can_be_interrupted(slurm, profile, caplog):
    path = profile(RUNS + "directives: [--hold]\n")

    def interrupt():
        wait_for(lambda: "waiting for SLURM to start a worker: 1 jobs" in caplog.text, "a message")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), connect(path):
            pass
    finally:
        thread.join()
    queue = subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
    wait_for(lambda: not queue or "CG" in queue, "an empty queue")


@pytest.mark.slow
def test_jobs_talk_encrypted_and_show_nothing_else(slurm, profile):
    """On loopback, because this node is alone; what is told apart is 127.0.0.1 and all interfaces."""
    with connect(profile(RUNS + "workers_per_job: 2\n")) as client:
        client.wait_for_workers(2, timeout=DEADLINE)
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        pids = client.run(os.getpid).values()
        nannies = {psutil.Process(pid).ppid() for pid in pids}
        assert listening([os.getpid(), *pids, *nannies]) == {"127.0.0.1"}
        address = client.scheduler.address
        with pytest.raises(ValueError, match="needs `ca_file`"), connect(address):
            pass
        with (
            pytest.raises(ConnectionError, match="no connection"),
            connect(address.replace("tls://", "tcp://")),
        ):
            pass

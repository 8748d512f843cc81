"""The doctor: facts to findings, the questions it asks, and a look at this very machine."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chunkrestore import backend
from chunkrestore.doctor import Finding, cuda, examine, facts, healthy, libraries, machine, storage, table
from chunkrestore.doctor.facts import Driver, Facts, all_at_once, ask

A100 = Driver("550.54.15", "12.4", (("NVIDIA A100-SXM4-80GB", "8.0"),))
NETWORKS = {"tensorflow": "2.21.0", "keras": "3.15.1", "csbdeep": "0.8.2", "stardist": "0.9.2"}
CUDA_12 = {"nvidia-cublas-cu12": "12.9.1", "nvidia-cudnn-cu12": "9.10.2"}
BASE = {"chunkrestore": "0.1.0", "dask": "2026.8.0", "distributed": "2026.8.0"}
SEEN = {"build": {"cuda_version": "12.5.1"}, "devices": ["/physical_device:GPU:0"]}
WORKSTATION = Facts(
    python="3.12.3",
    versions={**BASE, **NETWORKS, **CUDA_12, "cupy-cuda12x": "14.2.0"},
    requires_python=">=3.11,<3.14",
    driver=A100,
    tensorflow=SEEN,
    cupy={"missing": None, "devices": [78 * 2**30]},
    n_cores=16,
    memory_nbytes=100 * 2**30,
    n_files=65536,
    shared_nbytes=2**33,
    host="ws1",
    address="10.0.0.7",
)
LAPTOP = replace(
    WORKSTATION, versions={**BASE, **NETWORKS}, driver=Driver(), tensorflow={**SEEN, "devices": []}, cupy=None
)


def judged(given):
    return [f for check in (*libraries.CHECKS, *cuda.CHECKS, *machine.CHECKS) for f in check(given)]


def wrong(given):
    return [f for f in judged(given) if f.state in ("problem", "warning")]


def only(given):
    """Return the one thing that is wrong."""
    (finding,) = wrong(given)
    assert finding.fix
    return finding


def with_versions(given, **versions):
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(given, versions={k: v for k, v in {**given.versions, **named}.items() if v})


def test_nothing_is_wrong_with_a_sound_machine():
    assert wrong(WORKSTATION) == []
    assert healthy(judged(WORKSTATION))
    assert table(judged(WORKSTATION)).endswith("nothing is wrong")


def test_without_a_gpu_nothing_about_gpus_is_wrong():
    assert wrong(LAPTOP) == []
    found = {f.name: f for f in judged(LAPTOP)}
    assert found["NVIDIA driver"].found == "no NVIDIA GPU here; everything runs on the CPU"
    assert {found[n].state for n in ("NVIDIA driver", "CUDA libraries", "TensorFlow GPU", "CuPy")} == {
        "not needed"
    }


PAIRINGS = {
    "cupy for CUDA 13 beside TensorFlow": (
        with_versions(WORKSTATION, cupy_cuda12x="", cupy_cuda13x="14.2.0"),
        ("CuPy", "problem", 'pip uninstall -y cupy-cuda13x && pip install "chunkrestore[cupy]"'),
    ),
    "two of CuPy": (
        with_versions(WORKSTATION, cupy="14.2.0"),
        ("CuPy", "problem", 'pip uninstall -y cupy cupy-cuda12x && pip install "chunkrestore[cupy]"'),
    ),
    "no CuPy on a machine with a GPU": (
        with_versions(replace(WORKSTATION, cupy=None), cupy_cuda12x=""),
        ("CuPy", "warning", 'pip install "chunkrestore[cupy]"'),
    ),
    "CuPy without its CUDA libraries": (
        replace(WORKSTATION, cupy={"error": "RuntimeError: CuPy failed to load libnvrtc.so.12"}),
        ("CuPy", "problem", 'pip install "cupy-cuda12x[ctk]"'),
    ),
    "CuPy sees nothing": (
        replace(WORKSTATION, cupy={"missing": "CuPy finds no CUDA device", "devices": []}),
        ("CuPy", "problem", "look at the driver, and at CUDA_VISIBLE_DEVICES"),
    ),
    "libraries of CUDA 13 beside TensorFlow": (
        with_versions(WORKSTATION, nvidia_cublas="13.0.2", nvidia_cudnn_cu13="9.14"),
        ("CUDA libraries", "problem", "pip uninstall nvidia-cublas nvidia-cudnn-cu13"),
    ),
    "other libraries of CUDA go first": (
        replace(WORKSTATION, environment={"LD_LIBRARY_PATH": "/usr/local/cuda-11.8/lib64"}),
        ("CUDA libraries", "warning", "unset LD_LIBRARY_PATH"),
    ),
    "TensorFlow sees no GPU": (
        replace(WORKSTATION, tensorflow={**SEEN, "devices": []}),
        ("TensorFlow GPU", "problem", 'pip install "chunkrestore[gpu]"'),
    ),
    "TensorFlow takes all memory": (
        replace(WORKSTATION, environment={"TF_FORCE_GPU_ALLOW_GROWTH": "False"}),
        ("TensorFlow GPU", "warning", "export TF_FORCE_GPU_ALLOW_GROWTH=true"),
    ),
    "TensorFlow cannot be imported": (
        replace(LAPTOP, tensorflow={"error": "ended with status -11"}),
        ("networks", "problem", 'pip install "chunkrestore[dl]" into a new environment'),
    ),
    "half of what networks need": (
        with_versions(LAPTOP, stardist=""),
        ("networks", "problem", 'pip install "chunkrestore[dl]"'),
    ),
    "oneDNN switched off": (
        replace(LAPTOP, environment={"TF_ENABLE_ONEDNN_OPTS": "0"}),
        ("oneDNN", "warning", "unset TF_ENABLE_ONEDNN_OPTS"),
    ),
    "a driver of CUDA 11": (
        replace(WORKSTATION, driver=replace(A100, version="470.82", cuda="11.4")),
        ("NVIDIA driver", "problem", "install driver 525.60.13 or newer: CUDA 12 needs it"),
    ),
    "a driver that does not answer": (
        replace(LAPTOP, driver=Driver(error="NVIDIA-SMI has failed")),
        ("NVIDIA driver", "problem", "install an NVIDIA driver, 525.60.13 or newer, and load it"),
    ),
    "a GPU older than TensorFlow's code": (
        replace(WORKSTATION, driver=replace(A100, devices=(("Tesla K80", "3.7"),))),
        ("GPU", "problem", "use --device cpu and hide them: CUDA_VISIBLE_DEVICES=''"),
    ),
    "a GPU newer than TensorFlow's code": (
        replace(WORKSTATION, driver=replace(A100, devices=(("NVIDIA B200", "10.0"),))),
        ("GPU", "warning", "export CUDA_CACHE_MAXSIZE=4294967296"),
    ),
    "a hole in the scheduler": (
        with_versions(LAPTOP, dask="2025.12.0", distributed="2025.12.0"),
        ("security", "problem", 'pip install "distributed>=2026.1"'),
    ),
    "a hole in Keras": (
        with_versions(LAPTOP, keras="3.12.0"),
        ("security", "problem", 'pip install "keras>=3.13.1"'),
    ),
    "Dask and its scheduler of two releases": (
        with_versions(LAPTOP, dask="2026.7.1"),
        ("Dask", "problem", 'pip install "dask==2026.8.0" "distributed==2026.8.0"'),
    ),
    "sbatch without its library": (
        replace(with_versions(LAPTOP, cryptography="50.0"), programs={"sbatch": "/usr/bin/sbatch"}),
        ("SLURM", "warning", 'pip install "chunkrestore[slurm]"'),
    ),
    "a cluster without encryption": (
        replace(with_versions(LAPTOP, dask_jobqueue="0.9.0"), programs={"sbatch": "/usr/bin/sbatch"}),
        ("TLS", "warning", "pip install cryptography"),
    ),
    "an interpreter that is too new": (
        replace(LAPTOP, python="3.14.0"),
        (
            "Python",
            "problem",
            "make an environment with Python >=3.11,<3.14, such as `conda create -n cr python=3.12`",
        ),
    ),
    "a limit below the cores": (replace(LAPTOP, quota=2.5), ("cores", "warning", "--workers 2")),
    "threads unlike cores": (
        replace(LAPTOP, environment={"OMP_NUM_THREADS": "1"}),
        ("threads", "warning", "unset OMP_NUM_THREADS"),
    ),
    "memory for some workers": (
        replace(LAPTOP, memory_nbytes=9 * 2**30),
        ("memory", "warning", "--workers 4, or --memory free"),
    ),
    "memory for none": (
        replace(LAPTOP, memory_nbytes=2**30),
        ("memory", "problem", "--memory free, or a smaller --block"),
    ),
    "few files": (replace(LAPTOP, n_files=256), ("open files", "warning", "ulimit -n 65536")),
    "no shared memory": (
        replace(LAPTOP, shared_nbytes=None),
        ("shared memory", "problem", "mount -t tmpfs tmpfs /dev/shm (docker: --shm-size 1g)"),
    ),
    "a host without an address": (
        replace(LAPTOP, address=""),
        (
            "host name",
            "warning",
            "add `127.0.0.1 ws1` to /etc/hosts, or name an interface in the cluster profile",
        ),
    ),
}


@pytest.mark.parametrize(("given", "expected"), PAIRINGS.values(), ids=PAIRINGS.keys())
def test_what_does_not_fit_is_found_with_what_to_do(given, expected):
    finding = only(given)
    assert (finding.name, finding.state, finding.fix) == expected
    assert healthy([finding]) == (finding.state == "warning")


def test_devices_that_are_hidden_on_purpose_are_no_problem():
    hidden = replace(
        WORKSTATION,
        environment={"CUDA_VISIBLE_DEVICES": ""},
        tensorflow={**SEEN, "devices": []},
        cupy={"missing": "CuPy finds no CUDA device", "devices": []},
    )
    assert only(hidden).found == "CUDA_VISIBLE_DEVICES='' hides all"
    assert wrong(replace(WORKSTATION, environment={"CUDA_VISIBLE_DEVICES": "1"})) == []


def test_cupy_alone_may_be_of_any_cuda_version():
    alone = with_versions(
        WORKSTATION, **dict.fromkeys((*NETWORKS, *CUDA_12, "cupy_cuda12x"), ""), cupy_cuda13x="14.2"
    )
    assert wrong(alone) == []


def test_a_loopback_address_matters_only_where_workers_run_elsewhere():
    at_home = replace(LAPTOP, address="127.0.1.1")
    assert wrong(at_home) == []
    slurm = with_versions(replace(at_home, programs={"sbatch": "x"}), dask_jobqueue="0.9", cryptography="50")
    assert "cannot reach" in only(slurm).found
    assert wrong(replace(slurm, address="fe80::1%eth0")) == []


REQUIRES = {
    "chunkrestore": ["numpy>=2.0", 'tensorflow[and-cuda]>=2.18; extra == "gpu"', "dask[array]>=2026.1"],
    "dask": ['pandas>=2; extra == "dataframe"', 'array-thing>=1; extra == "array"', "not a requirement !"],
    "dask-cuda": ["rapids-dask-dependency==26.10.*", 'winthing; sys_platform == "never"'],
    "rapids-dask-dependency": ["dask>=2026.7.1,<2026.7.2", "distributed>=2026.7.1,<2026.7.2"],
}


def test_requirements_are_followed_through_extras_and_no_further():
    versions = {"chunkrestore": "0.1.0", "numpy": "1.26.4", "dask": "2026.8.0"}
    assert libraries.conflicts(["chunkrestore"], versions, REQUIRES) == {
        "numpy>=2.0": "chunkrestore 0.1.0 needs numpy >=2.0, but 1.26.4 is there",
        "array-thing>=1": "dask needs array-thing, which is missing",
    }
    given = replace(
        LAPTOP, versions={**LAPTOP.versions, "numpy": "1.26.4", "array-thing": "1.0"}, requires=REQUIRES
    )
    assert only(given).fix == 'pip install "numpy>=2.0"'


def test_the_pin_of_dask_cuda_is_found():
    installed = {"dask-cuda": "26.10.0", "rapids-dask-dependency": "26.10.0"}
    given = replace(
        WORKSTATION, versions={**WORKSTATION.versions, **installed}, requires={**REQUIRES, "chunkrestore": []}
    )
    finding = only(given)
    assert finding.name == "dask-cuda"
    assert (
        "rapids-dask-dependency 26.10.0 needs dask <2026.7.2,>=2026.7.1, but 2026.8.0 is there"
        in finding.found
    )
    assert finding.fix.startswith('pip install "dask<2026.7.2,>=2026.7.1" "distributed<2026.7.2,>=2026.7.1"')
    assert wrong(with_versions(given, dask="2026.7.1", distributed="2026.7.1")) == []


def test_the_table_shows_every_fix_below_its_finding():
    findings = [
        Finding("GPU", "ok", "one"),
        Finding("memory", "warning", "little", "buy some"),
        Finding("disk", "problem", "full", "rm -r"),
        Finding("Dask", "problem", "old"),
    ]
    assert table(findings).splitlines() == [
        "ok          GPU     one",
        "warning     memory  little",
        "                    -> buy some",
        "problem     disk    full",
        "                    -> rm -r",
        "problem     Dask    old",
        "2 problems, 1 warning",
    ]
    assert not healthy(findings)
    assert table([]) == "nothing is wrong"


def test_this_machine_is_examined_in_seconds_and_told_the_truth(tmp_path):
    begun = time.monotonic()
    findings = {f.name: f for f in examine(tmp_path / "a" / "out.zarr", quick=True)}
    assert time.monotonic() - begun < 10
    assert findings["Python"].state == findings["chunkrestore"].state == "ok"
    assert findings["cores"].found.startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert f"at {tmp_path}" in findings["disk"].found
    assert findings["file system"].state == "ok"
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        assert findings["NVIDIA driver"].found.startswith("no NVIDIA GPU here")
        assert "chunkrestore[gpu]" in findings["NVIDIA driver"].fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorflow_is_loaded_in_another_process():
    code = (
        "import sys; from chunkrestore.doctor import *; print(table(examine())); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    (networks,) = [line for line in lines if " networks " in line]
    assert "tensorflow 2." in networks
    assert "not imported" not in networks
    assert any("TensorFlow GPU" in line and "built with" in line for line in lines)
    assert "'tensorflow'" not in modules


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def half(_facts):
        yield Finding("first", "ok", "fine")
        raise KeyError("second")

    monkeypatch.setattr(libraries, "CHECKS", (half,))
    findings = {f.name: f for f in examine(quick=True)}
    assert findings["first"].state == "ok"
    assert findings["half"] == Finding("half", "warning", "could not be judged: KeyError: 'second'")


def test_what_cannot_be_found_out_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no such table")

    monkeypatch.setattr(facts, "_n_files", broken)
    monkeypatch.setattr(facts, "_distributions", broken)
    findings = {f.name: f for f in examine(quick=True)}
    assert findings["n_files"].found == "could not be found out: OSError: no such table"
    assert findings["distributions"].state == "warning"


def test_a_question_without_an_answer_does_not_hold_up_the_others():
    released = threading.Event()
    try:
        answers, failures = all_at_once({"slow": released.wait, "fast": lambda: 3}, 0.05)
    finally:
        released.set()
    assert answers == {"fast": 3}
    assert failures == {"slow": "no answer within 0 s"}


def test_a_library_that_takes_its_process_down_is_a_fact():
    assert ask("import os; os.abort()") == {"error": "ended with status -6"}
    assert ask("print('noise'); raise ImportError('libcudnn.so.9: no such file')") == {
        "error": "ImportError: libcudnn.so.9: no such file"
    }
    assert ask("import threading; threading.Event().wait()", 0.2) == {"error": "no answer within 0 s"}
    assert ask("print('noise'); print('facts {\"a\": [1]}')") == {"a": [1]}


def test_cupy_is_asked_on_every_device(monkeypatch, capsys):
    """The program itself, on arrays of the host in place of two devices."""

    def to_device(array, device):
        if device == "cuda:2":
            raise ValueError("there are 2 CUDA devices")
        return np.asarray(array)

    monkeypatch.setattr(backend, "missing_device", lambda: None)
    monkeypatch.setattr(backend, "to_device", to_device)
    monkeypatch.setattr(backend, "free_memory_nbytes", lambda device: int(device[-1]) + 10)
    exec(facts._ASK_CUPY, {})
    assert capsys.readouterr().out == 'facts {"missing": null, "devices": [10, 11]}\n'


def test_cupy_that_is_missing_or_without_device_is_a_fact():
    missing = backend.missing_device()
    if missing is None:
        pytest.skip("there is a CUDA device")
    assert ask(facts._ASK_CUPY) == {"missing": missing, "devices": []}


SMI = """#!/bin/sh
case "$*" in
*--query-gpu*) printf '550.54.15, NVIDIA A100-SXM4-80GB, 8.0\\n550.54.15, NVIDIA A100-SXM4-80GB, 8.0\\n';;
*) echo '| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |';;
esac
"""
FAILING_SMI = """#!/bin/sh
echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
exit 9
"""


def put_on_path(monkeypatch, folder, script):
    program = folder / "nvidia-smi"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_driver_is_read_from_what_its_program_prints(tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path, SMI)
    assert facts._driver() == replace(A100, devices=A100.devices * 2)


def test_a_driver_that_is_not_loaded_is_named(tmp_path, monkeypatch):
    put_on_path(monkeypatch, tmp_path, FAILING_SMI)
    found = facts._driver()
    assert found.devices == ()
    assert found.error.startswith("NVIDIA-SMI has failed because")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "9 1"}, 1.5),
        ({}, None),
    ],
    ids=["version 2", "no limit", "version 1", "no limit 1", "of a parent", "none"],
)
def test_the_least_limit_of_a_container_counts(tmp_path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    own = tmp_path / "own"
    own.write_text("0::/a/b\n" if "a/b/cpu.max" in files else "4:cpu,cpuacct:/\n0::/\n")
    assert facts._quota(tmp_path, own) == quota
    assert facts._quota(tmp_path, tmp_path / "none") is None


GOOD = storage.Probe("/data", 2**40, 10**6, True, True, True, True, 0.0)


@pytest.mark.parametrize(
    ("tried", "name", "state"),
    [
        (replace(GOOD, free_nbytes=2**30), "disk", "warning"),
        (replace(GOOD, free_files=12), "disk", "warning"),
        (replace(GOOD, exclusive=False), "file system", "problem"),
        (replace(GOOD, replaces=False), "file system", "problem"),
        (replace(GOOD, skew_s=-95.0), "clock", "warning"),
    ],
)
def test_what_a_file_system_lacks_is_found(tried, name, state):
    (finding,) = [f for f in storage.judge(tried) if f.state in ("problem", "warning")]
    assert (finding.name, finding.state) == (name, state)
    assert finding.fix


def test_a_file_system_without_hard_links_or_flock_will_do():
    findings = {f.name: f for f in storage.judge(replace(GOOD, links=False, locks=False, free_files=None))}
    assert findings["file system"].found.endswith("; no hard links, no flock")
    assert {f.state for f in findings.values()} == {"ok"}


def test_a_real_file_system_is_tried_and_left_as_it_was(tmp_path):
    tried = storage.probe(tmp_path / "deep" / "out.zarr")
    assert tried.folder == str(tmp_path)
    assert (tried.exclusive, tried.replaces, tried.links, tried.locks) == (True, True, True, True)
    assert abs(tried.skew_s) < 5
    assert abs(tried.free_nbytes - shutil.disk_usage(tmp_path).free) < 2**30
    assert list(tmp_path.iterdir()) == []


def test_an_output_where_nothing_can_be_written_is_a_problem():
    (finding,) = [f for f in examine("/proc/out.zarr", quick=True) if f.name == "disk"]
    assert finding.state == "problem"
    assert finding.found.startswith("/proc/out.zarr: ")


def test_an_output_in_object_storage_has_no_disk():
    (finding,) = [f for f in examine("s3://bucket/out.zarr", quick=True) if f.name == "disk"]
    assert finding.state == "not needed"

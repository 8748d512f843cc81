"""Ask the machine and the environment; decide nothing.

What could break this process, or take it long, is asked in a process of its own, with a time limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

LIBRARY_SECONDS = 120.0
"""Importing TensorFlow takes 15 s from a local disk, and minutes from a busy network file system."""

_COMMAND_SECONDS = 60.0
# A driver that nobody used yet may take half a minute to answer.

_ASK_TENSORFLOW = """
import json, tensorflow
facts = {"build": dict(tensorflow.sysconfig.get_build_info())}
facts["devices"] = [device.name for device in tensorflow.config.list_physical_devices("GPU")]
import csbdeep.models, stardist.models
print("facts", json.dumps(facts, default=str))
"""

_ASK_CUPY = """
import json
import numpy as np
from chunkrestore import backend
def double(xp, a):
    return a + a
missing, devices = backend.missing_device(), []
while missing is None:
    try:
        ones = backend.to_device(np.ones((8, 8, 8), np.float32), f"cuda:{len(devices)}")
    except ValueError:
        break
    xp = backend.namespace(ones)
    # Compiles a kernel and makes a transform: the libraries that both need are separate packages.
    twice = backend.elementwise(double, ones, ones)
    spectrum = backend.fft(xp).rfftn(twice, twice.shape, (0, 1, 2))
    assert abs(float(spectrum[0, 0, 0].real) - 1024) < 1e-3
    devices.append(backend.free_memory_nbytes(f"cuda:{len(devices)}"))
print("facts", json.dumps({"missing": missing, "devices": devices}))
"""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver and what it drives."""

    version: str = ""
    """Of the driver; nothing if there is none."""
    cuda: str = ""
    """Newest CUDA version that it supports."""
    devices: tuple[tuple[str, str], ...] = ()
    """Name and compute capability of each device."""
    error: str = ""
    """What ``nvidia-smi`` complains about."""


@dataclass(frozen=True)
class Facts:
    """What is installed and how the process is set up."""

    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of every installed distribution, by its normalised name."""
    requires: Mapping[str, list[str]] = field(default_factory=dict)
    """What each distribution asks for."""
    requires_python: str = ""
    driver: Driver = field(default_factory=Driver)
    tensorflow: Mapping[str, Any] | None = None
    """``build`` and ``devices``, or ``error``; None if it was not asked."""
    cupy: Mapping[str, Any] | None = None
    """``missing`` and free bytes of ``devices``, or ``error``; None if it was not asked."""
    environment: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, str] = field(default_factory=dict)
    """Where the programs of a batch system lie."""
    n_cores: int = 1
    """That this process may run on."""
    quota: float | None = None
    """Cores' worth of time that a container's limit allows."""
    memory_nbytes: int = 0
    n_files: int = 0
    """That a process may open."""
    shared_nbytes: int | None = None
    """Free in ``/dev/shm``; None if it cannot be written."""
    host: str = ""
    address: str = ""
    """That `host` resolves to; nothing if it does not."""

    @property
    def has_device(self) -> bool:
        """Whether there is an NVIDIA device, or ought to be."""
        return bool(self.driver.devices or self.driver.version)

    @property
    def sees_device(self) -> bool:
        """Whether this process is allowed to see it."""
        return self.has_device and self.environment.get("CUDA_VISIBLE_DEVICES", "all").strip() not in (
            "",
            "-1",
        )


def gather(*, quick: bool = False) -> tuple[Facts, dict[str, str]]:
    """Return the facts, and by name what kept those that are missing from being found.

    Parameters
    ----------
    quick
        Do not load TensorFlow and CuPy.
    """
    from chunkrestore.backend import free_memory_nbytes
    from chunkrestore.cluster import usable_cores

    installed, unknown = all_at_once({"distributions": _distributions}, _COMMAND_SECONDS)
    versions, requires = installed.get("distributions", ({}, {}))
    questions: dict[str, Callable[[], Any]] = {
        "driver": _driver,
        "programs": lambda: {name: path for name in ("sbatch", "srun") if (path := shutil.which(name))},
        "n_cores": usable_cores,
        "quota": _quota,
        "memory_nbytes": free_memory_nbytes,
        "n_files": _n_files,
        "shared_nbytes": _shared_nbytes,
        "address": lambda: socket.getaddrinfo(socket.gethostname(), None)[0][4][0],
        "requires_python": lambda: metadata.metadata("chunkrestore")["Requires-Python"],
    }
    if not quick and "tensorflow" in versions:
        questions["tensorflow"] = lambda: ask(_ASK_TENSORFLOW)
    if not quick and cupy_distributions(versions):
        questions["cupy"] = lambda: ask(_ASK_CUPY)
    answers, failures = all_at_once(questions, 5 + (_COMMAND_SECONDS if quick else LIBRARY_SECONDS))
    return Facts(
        python=".".join(str(number) for number in sys.version_info[:3]),
        versions=versions,
        requires=requires,
        environment=dict(os.environ),
        host=socket.gethostname(),
        **answers,
    ), failures | unknown


def all_at_once(
    questions: Mapping[str, Callable[[], Any]], seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the calls return, and for those that fail or take longer than `seconds`, why."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}

    def answer(name: str) -> None:
        try:
            answers[name] = questions[name]()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"

    # Not a pool, which would wait at the end for a call that a dead file server keeps.
    threads = {name: Thread(target=answer, args=(name,), daemon=True) for name in questions}
    for thread in threads.values():
        thread.start()
    until = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, until - time.monotonic()))
    for name in questions.keys() - answers.keys() - failures.keys():
        failures[name] = f"no answer within {seconds:.0f} s"
    return dict(answers), dict(failures)


def ask(code: str, seconds: float = LIBRARY_SECONDS) -> dict[str, Any]:
    """Return the facts that a program prints, or its last words as ``error``."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **quiet},
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("facts "):
            facts: dict[str, Any] = json.loads(line.removeprefix("facts "))
            return facts
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"error": last[0].strip() if last else f"ended with status {done.returncode}"}


def cupy_distributions(versions: Mapping[str, str]) -> list[str]:
    """Return the installed distributions that hold CuPy."""
    return sorted(name for name in versions if name == "cupy" or re.match(r"cupy-(cuda|rocm)", name))


def normalised(name: str) -> str:
    """Return the one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions() -> tuple[dict[str, str], dict[str, list[str]]]:
    versions: dict[str, str] = {}
    requires: dict[str, list[str]] = {}
    for found in metadata.distributions():
        name = found.metadata["Name"]
        # The first on the path is the one that is imported.
        if name and normalised(name) not in versions:
            versions[normalised(name)] = found.version
            requires[normalised(name)] = list(found.requires or [])
    return versions, requires


def _driver() -> Driver:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        # A container may have the driver, but not its tools.
        try:
            text = Path("/proc/driver/nvidia/version").read_text()
        except OSError:
            return Driver()
        found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
        return Driver(version=found[1] if found else "of unknown version", error="nvidia-smi is missing")
    try:
        listed = _output([smi, "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"])
        summary = _output([smi])
    except subprocess.CalledProcessError as error:
        lines = (error.stdout or error.stderr or "").strip().splitlines()
        return Driver(error=lines[0] if lines else f"nvidia-smi ended with status {error.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(error=str(error))
    return driver_in(listed, summary)


def driver_in(listed: str, summary: str) -> Driver:
    """Return the driver that two outputs of ``nvidia-smi`` describe: the query's, and the plain one.

    >>> driver_in("550.54, NVIDIA A100, 8.0", "| CUDA Version: 12.4 |").cuda
    '12.4'
    """
    rows = [
        [cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") >= 2
    ]
    cuda = re.search(r"CUDA Version:\s*(\d+\.\d+)", summary)
    return Driver(
        version=rows[0][0] if rows else "",
        cuda=cuda[1] if cuda else "",
        devices=tuple((row[1], row[2]) for row in rows),
        error="" if rows else "nvidia-smi lists no device",
    )


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_COMMAND_SECONDS, errors="replace"
    ).stdout


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the least quota of this process's control groups (version 1 or 2), in cores."""
    try:
        paths = [line.split(":", 2)[2] for line in own.read_text().splitlines()]
    except OSError:
        return None
    own_groups = [base / path.lstrip("/") for base in (root, root / "cpu") for path in paths]
    quotas = []
    for folder in {folder for group in own_groups for folder in (group, *group.parents)}:
        try:
            if (folder / "cpu.max").is_file():
                used, period = (folder / "cpu.max").read_text().split()
            else:
                used, period = ((folder / f"cpu.cfs_{n}_us").read_text().strip() for n in ("quota", "period"))
        except OSError:
            continue
        if used not in ("max", "-1"):
            quotas.append(int(used) / int(period))
    return min(quotas, default=None)


def _n_files() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**30 if soft == resource.RLIM_INFINITY else soft


def _shared_nbytes() -> int | None:
    shared = Path("/dev/shm")
    return shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else None

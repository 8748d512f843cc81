"""Judge what GPUs need: driver, CUDA libraries, and TensorFlow and CuPy in one process."""

from __future__ import annotations

import re
from collections.abc import Iterator

from chunkrestore.doctor.facts import Facts, cupy_distributions
from chunkrestore.doctor.finding import Finding, State

_DRIVER_OF_CUDA_12 = "525.60.13 or newer"
# https://docs.nvidia.com/deploy/cuda-compatibility: the first that runs all of CUDA 12.

_CUDA_13 = {f"nvidia-{name}" for name in ("cublas", "cufft", "curand", "cusolver", "cusparse", "nvjitlink")}
_CUDA_13 |= {f"nvidia-cuda-{name}" for name in ("cupti", "nvcc", "nvrtc", "runtime")}


def driver(facts: Facts) -> Iterator[Finding]:
    """Judge the NVIDIA driver and its devices."""
    has = facts.driver
    if not facts.has_device:
        if has.error:
            fix = f"install an NVIDIA driver, {_DRIVER_OF_CUDA_12}, and load it"
            yield Finding("NVIDIA driver", "problem", has.error, fix)
        else:
            fix = 'pip install "chunkrestore[gpu]", on a machine that has one'
            yield Finding(
                "NVIDIA driver", "not needed", "no NVIDIA GPU here; everything runs on the CPU", fix
            )
        return
    names = ", ".join(name for name, _ in has.devices) or has.error
    found = f"{has.version}, CUDA up to {has.cuda or 'unknown'}: {names}"
    if has.cuda and _number(has.cuda) < (12, 0):
        yield Finding(
            "NVIDIA driver", "problem", found, f"install driver {_DRIVER_OF_CUDA_12}: CUDA 12 needs it"
        )
    elif not has.devices:
        yield Finding(
            "NVIDIA driver", "warning", found, "run the container with all NVIDIA driver capabilities"
        )
    else:
        yield Finding("NVIDIA driver", "ok", found)
    old = [f"{name} ({capability})" for name, capability in has.devices if _number(capability) < (6, 0)]
    if old:
        fix = "use --device cpu and hide them: CUDA_VISIBLE_DEVICES=''"
        yield Finding("GPU", "problem", f"too old for TensorFlow's code: {', '.join(old)}", fix)
    new = [f"{name} ({capability})" for name, capability in has.devices if _number(capability) >= (10, 0)]
    if new and "tensorflow" in facts.versions:
        found = f"newer than TensorFlow's code, which is compiled at first use, for minutes: {', '.join(new)}"
        yield Finding("GPU", "warning", found, "export CUDA_CACHE_MAXSIZE=4294967296")


def cuda_libraries(facts: Facts) -> Iterator[Finding]:
    """Judge the CUDA libraries that came as packages, and what hides devices or libraries."""
    cuda = sorted(name for name in facts.versions if cuda_version(name) is not None)
    wrong = [name for name in cuda if cuda_version(name) != 12]
    found = f"{len(cuda)} packages of CUDA libraries"
    if not cuda:
        state: State = "warning" if facts.has_device and "tensorflow" in facts.versions else "not needed"
        found = "no CUDA libraries are installed as packages"
        yield Finding(
            "CUDA libraries", state, found, 'pip install "chunkrestore[gpu]"' if state == "warning" else ""
        )
    elif wrong and "tensorflow" in facts.versions:
        found = f"{', '.join(wrong)} beside TensorFlow, which is built with CUDA 12"
        yield Finding("CUDA libraries", "problem", found, f"pip uninstall {' '.join(wrong)}")
    else:
        yield Finding("CUDA libraries", "ok", found)
    if facts.has_device and not facts.sees_device:
        found = f"CUDA_VISIBLE_DEVICES={facts.environment['CUDA_VISIBLE_DEVICES']!r} hides all"
        yield Finding("GPU", "warning", found, "unset CUDA_VISIBLE_DEVICES")
    path = facts.environment.get("LD_LIBRARY_PATH", "")
    if facts.has_device and "cuda" in path.lower():
        found = f"LD_LIBRARY_PATH={path} may put other CUDA libraries before those of TensorFlow and CuPy"
        yield Finding("CUDA libraries", "warning", found, "unset LD_LIBRARY_PATH")


def cuda_version(distribution: str) -> int | None:
    """Return for which CUDA version a distribution holds a library; None if it holds none.

    Since CUDA 13 the names of most have no ending.

    >>> cuda_version("nvidia-cublas-cu12"), cuda_version("nvidia-cublas"), cuda_version("nvidia-ml-py")
    (12, 13, None)
    """
    ending = re.fullmatch(r"nvidia-.+-cu(\d\d)", distribution)
    if ending:
        return int(ending[1])
    return 13 if distribution in _CUDA_13 else None


def tensorflow_devices(facts: Facts) -> Iterator[Finding]:
    """Judge what TensorFlow sees of the GPUs."""
    if not facts.tensorflow or "error" in facts.tensorflow:
        return
    devices, cuda = facts.tensorflow["devices"], facts.tensorflow["build"].get("cuda_version")
    built = f"built with CUDA {cuda}" if cuda else "built without CUDA"
    if devices or not facts.sees_device:
        state: State = "ok" if devices else "not needed"
        yield Finding("TensorFlow GPU", state, f"{built}, sees {len(devices)} GPUs")
    else:
        found = f"{built}, sees none of {len(facts.driver.devices)} GPUs"
        yield Finding("TensorFlow GPU", "problem", found, 'pip install "chunkrestore[gpu]"')
    growth = facts.environment.get("TF_FORCE_GPU_ALLOW_GROWTH", "")
    if devices and growth.lower() in ("false", "0"):
        found = "TF_FORCE_GPU_ALLOW_GROWTH=false: in this process TensorFlow leaves no memory to CuPy"
        yield Finding("TensorFlow GPU", "warning", found, "export TF_FORCE_GPU_ALLOW_GROWTH=true")


def cupy(facts: Facts) -> Iterator[Finding]:
    """Judge CuPy: one of it, for the CUDA version of TensorFlow, and working."""
    there = cupy_distributions(facts.versions)
    wheel = 'pip install "chunkrestore[cupy]"'
    if not there:
        found = "not installed; deconvolution runs on the CPU"
        yield Finding(
            "CuPy", "warning" if facts.has_device else "not needed", found, wheel if facts.has_device else ""
        )
        return
    found = ", ".join(f"{name} {facts.versions[name]}" for name in there)
    if len(there) > 1:
        found = f"{found}: they overwrite each other's files"
        yield Finding("CuPy", "problem", found, f"pip uninstall -y {' '.join(there)} && {wheel}")
    elif there != ["cupy-cuda12x"] and "tensorflow" in facts.versions:
        found = f"{found} beside TensorFlow, which is built with CUDA 12: two sets of CUDA libraries in one process"
        yield Finding("CuPy", "problem", found, f"pip uninstall -y {there[0]} && {wheel}")
    elif facts.cupy and "error" in facts.cupy:
        fix = 'pip install "cupy-cuda12x[ctk]"'
        yield Finding(
            "CuPy", "problem" if facts.sees_device else "warning", f"{found}: {facts.cupy['error']}", fix
        )
    elif facts.cupy and facts.cupy["missing"]:
        fix = "look at the driver, and at CUDA_VISIBLE_DEVICES" if facts.sees_device else ""
        state: State = "problem" if facts.sees_device else "not needed"
        yield Finding("CuPy", state, f"{found}: {facts.cupy['missing']}", fix)
    elif facts.cupy:
        free = ", ".join(f"{nbytes / 2**30:.1f} GiB free" for nbytes in facts.cupy["devices"])
        yield Finding("CuPy", "ok", f"{found}; a kernel and a transform run on each GPU ({free})")
    else:
        yield Finding("CuPy", "ok", f"{found}; not tried")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


CHECKS = (driver, cuda_libraries, tensorflow_devices, cupy)
"""Each takes the facts alone."""

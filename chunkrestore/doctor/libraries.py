"""Judge the libraries: versions, CUDA, and what must fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chunkrestore.doctor.facts import Facts, cupy_distributions, normalised
from chunkrestore.doctor.finding import Finding

_OPTIONAL = (
    "tensorflow",
    "keras",
    "csbdeep",
    "stardist",
    "dask-cuda",
    "dask-jobqueue",
    "obstore",
    "cryptography",
)
_NETWORKS = ("tensorflow", "keras", "csbdeep", "stardist")
_DRIVER_OF_CUDA_12 = "525.60.13 or newer"
# https://docs.nvidia.com/deploy/cuda-compatibility: the first that runs all of CUDA 12.

_LEAST = {
    "distributed": ("2026.1", "its dashboard can be made to run code (CVE-2026-23528)"),
    "keras": ("3.13.1", "a weights file can make it read other files (CVE-2026-1669)"),
}


def python(facts: Facts) -> Iterator[Finding]:
    """Judge the interpreter."""
    from packaging.specifiers import SpecifierSet

    if facts.python in SpecifierSet(facts.requires_python, prereleases=True):
        yield Finding("Python", "ok", facts.python)
    else:
        fix = f"make an environment with Python {facts.requires_python}, such as `conda create -n cr python=3.12`"
        yield Finding("Python", "problem", f"{facts.python}, but {facts.requires_python} is needed", fix)


def requirements(facts: Facts) -> Iterator[Finding]:
    """Judge whether what is installed has what it asks for, in the versions that it asks for."""
    roots = [
        "chunkrestore",
        *(n for n in _OPTIONAL if n in facts.versions),
        *cupy_distributions(facts.versions),
    ]
    wrong = conflicts(roots, facts.versions, facts.requires)
    own = facts.versions.get("chunkrestore", "not installed")
    if not wrong:
        yield Finding("chunkrestore", "ok", f"{own}, and all that it needs")
    for wanted, reason in wrong.items():
        yield Finding("chunkrestore", "problem", reason, f'pip install "{wanted}"')


def conflicts(
    roots: list[str], versions: Mapping[str, str], requires: Mapping[str, list[str]]
) -> dict[str, str]:
    """Return requirements of `roots`, and of what they require, that are not fulfilled, each with the reason."""
    from packaging.requirements import InvalidRequirement, Requirement

    wrong: dict[str, str] = {}
    todo, seen = [(root, frozenset[str]()) for root in roots], set()
    while todo:
        name, extras = todo.pop(0)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in requires.get(name, []):
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            if wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in extras | {""}):
                continue
            has = versions.get(normalised(wanted.name))
            if has is None:
                wrong[f"{wanted.name}{wanted.specifier}"] = f"{name} needs {wanted.name}, which is missing"
                continue
            if not wanted.specifier.contains(has, prereleases=True):
                reason = f"{name} {versions.get(name, '')} needs {wanted.name} {wanted.specifier}, but {has} is there"
                wrong[f"{wanted.name}{wanted.specifier}"] = reason
            todo.append((normalised(wanted.name), frozenset(wanted.extras)))
    return wrong


def dask(facts: Facts) -> Iterator[Finding]:
    """Judge Dask, its scheduler, and the packages that pin them."""
    dask, distributed = (facts.versions.get(name, "missing") for name in ("dask", "distributed"))
    if dask == distributed:
        yield Finding("Dask", "ok", f"dask and distributed {dask}")
    else:
        # They are released together, and each relies on the other's internals.
        fix = f'pip install "dask=={distributed}" "distributed=={distributed}"'
        yield Finding("Dask", "problem", f"dask {dask} beside distributed {distributed}", fix)
    if "dask-cuda" not in facts.versions:
        yield Finding("dask-cuda", "not needed", "not installed; one worker per GPU is started without it")
    else:
        pins = conflicts(["dask-cuda"], facts.versions, facts.requires)
        state = "problem" if pins else "ok"
        found = f"{facts.versions['dask-cuda']}{'; ' if pins else ''}{'; '.join(pins.values())}"
        fix = (
            f"pip install {' '.join(f'{chr(34)}{pin}{chr(34)}' for pin in pins)}, or pip uninstall dask-cuda"
        )
        yield Finding("dask-cuda", state, found, fix if pins else "")


def security(facts: Facts) -> Iterator[Finding]:
    """Judge known holes, and what transport encryption needs."""
    from packaging.version import Version

    holes = {
        name: (least, hole)
        for name, (least, hole) in _LEAST.items()
        if name in facts.versions and Version(facts.versions[name]) < Version(least)
    }
    for name, (least, hole) in holes.items():
        yield Finding(
            "security", "problem", f"{name} {facts.versions[name]}: {hole}", f'pip install "{name}>={least}"'
        )
    if not holes:
        yield Finding("security", "ok", "no version with a hole that is known here")
    if "cryptography" in facts.versions:
        yield Finding("TLS", "ok", f"cryptography {facts.versions['cryptography']}")
    else:
        found = "cryptography is missing; clusters of several machines are encrypted by default"
        yield Finding("TLS", "warning" if facts.programs else "not needed", found, "pip install cryptography")


def batch_system(facts: Facts) -> Iterator[Finding]:
    """Judge SLURM: its programs, and the library that submits jobs."""
    sbatch, jobqueue = facts.programs.get("sbatch"), facts.versions.get("dask-jobqueue")
    if sbatch and jobqueue:
        yield Finding("SLURM", "ok", f"{sbatch}, dask-jobqueue {jobqueue}")
    elif sbatch:
        yield Finding(
            "SLURM", "warning", f"{sbatch}, but no dask-jobqueue", 'pip install "chunkrestore[slurm]"'
        )
    else:
        yield Finding("SLURM", "not needed", "no sbatch here; local workers are used")


def object_storage(facts: Facts) -> Iterator[Finding]:
    """Judge whether stores in S3 can be opened."""
    if "obstore" in facts.versions:
        yield Finding("S3", "ok", f"obstore {facts.versions['obstore']}")
    else:
        yield Finding(
            "S3", "not needed", "obstore is missing; needed for s3://", 'pip install "chunkrestore[s3]"'
        )


def networks(facts: Facts) -> Iterator[Finding]:
    """Judge what CARE and StarDist need, and whether it can be imported."""
    extra = 'pip install "chunkrestore[gpu]"' if facts.has_device else 'pip install "chunkrestore[dl]"'
    missing = [name for name in _NETWORKS if name not in facts.versions]
    if missing:
        state = "not needed" if len(missing) == len(_NETWORKS) else "problem"
        yield Finding("networks", state, f"{', '.join(missing)} missing; needed for CARE and StarDist", extra)
    elif facts.tensorflow and "error" in facts.tensorflow:
        found = f"TensorFlow, csbdeep and stardist cannot be imported: {facts.tensorflow['error']}"
        yield Finding("networks", "problem", found, f"{extra} into a new environment")
    else:
        versions = ", ".join(f"{name} {facts.versions[name]}" for name in _NETWORKS)
        yield Finding("networks", "ok", versions + ("" if facts.tensorflow else "; not imported"))
    onednn = facts.environment.get("TF_ENABLE_ONEDNN_OPTS", "1")
    if onednn == "0" and not missing:
        found = "TF_ENABLE_ONEDNN_OPTS=0: networks run slower on the CPU, and differ in the last bits from runs without"
        yield Finding("oneDNN", "warning", found, "unset TF_ENABLE_ONEDNN_OPTS")


def driver(facts: Facts) -> Iterator[Finding]:
    """Judge the NVIDIA driver and its devices."""
    has = facts.driver
    if not facts.has_device:
        if has.error:
            fix = f"install an NVIDIA driver, {_DRIVER_OF_CUDA_12}, and load it"
            yield Finding("NVIDIA driver", "problem", has.error, fix)
        else:
            yield Finding("NVIDIA driver", "not needed", "no NVIDIA GPU here; everything runs on the CPU")
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
    cuda = {
        n: v
        for n, v in facts.versions.items()
        if n.startswith("nvidia-") and n.endswith(("-cu11", "-cu12", "-cu13"))
    }
    wrong = sorted(name for name in cuda if not name.endswith("-cu12"))
    found = f"{len(cuda)} packages of CUDA libraries"
    if not cuda:
        state = "warning" if facts.has_device and "tensorflow" in facts.versions else "not needed"
        found = "no CUDA libraries are installed as packages"
        yield Finding(
            "CUDA libraries", state, found, 'pip install "chunkrestore[gpu]"' if state == "warning" else ""
        )
    elif wrong and "tensorflow" in facts.versions:
        found = f"{', '.join(wrong)} beside TensorFlow, which is built with CUDA 12"
        yield Finding("CUDA libraries", "problem", found, f"pip uninstall {' '.join(wrong)}")
    else:
        yield Finding("CUDA libraries", "ok", found)
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if facts.has_device and hidden is not None and not hidden.strip("-1 "):
        yield Finding(
            "GPU", "warning", f"CUDA_VISIBLE_DEVICES={hidden!r} hides all", "unset CUDA_VISIBLE_DEVICES"
        )
    path = facts.environment.get("LD_LIBRARY_PATH", "")
    if facts.has_device and "cuda" in path.lower():
        found = f"LD_LIBRARY_PATH={path} may put other CUDA libraries before those of TensorFlow and CuPy"
        yield Finding("CUDA libraries", "warning", found, "unset LD_LIBRARY_PATH")


def tensorflow_devices(facts: Facts) -> Iterator[Finding]:
    """Judge what TensorFlow sees of the GPUs."""
    if not facts.tensorflow or "error" in facts.tensorflow:
        return
    devices, cuda = facts.tensorflow["devices"], facts.tensorflow["build"].get("cuda_version")
    built = f"built with CUDA {cuda}" if cuda else "built without CUDA"
    if devices or not facts.has_device:
        state = "ok" if devices else "not needed"
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
        fix = 'pip install "cupy-cuda12x[ctk]"' if facts.has_device else ""
        yield Finding(
            "CuPy", "problem" if facts.has_device else "warning", f"{found}: {facts.cupy['error']}", fix
        )
    elif facts.cupy and facts.cupy["missing"]:
        fix = "look at the driver, and at CUDA_VISIBLE_DEVICES" if facts.has_device else ""
        state = "problem" if facts.has_device else "not needed"
        yield Finding("CuPy", state, f"{found}: {facts.cupy['missing']}", fix)
    elif facts.cupy:
        free = ", ".join(f"{nbytes / 2**30:.1f} GiB free" for nbytes in facts.cupy["devices"])
        yield Finding("CuPy", "ok", f"{found}; a kernel and a transform run on each GPU ({free})")
    else:
        yield Finding("CuPy", "ok", f"{found}; not tried")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


CHECKS = (
    python,
    requirements,
    dask,
    security,
    networks,
    driver,
    cuda_libraries,
    tensorflow_devices,
    cupy,
    batch_system,
    object_storage,
)
"""Each takes the facts alone."""

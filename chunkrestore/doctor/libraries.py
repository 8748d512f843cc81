"""Judge the libraries: what is missing, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chunkrestore.doctor.facts import Facts, cupy_distributions, normalised
from chunkrestore.doctor.finding import Finding, State

_NETWORKS = ("tensorflow", "keras", "csbdeep", "stardist")
_OPTIONAL = (*_NETWORKS, "dask-jobqueue", "obstore", "cryptography")
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
    optional = [name for name in _OPTIONAL if name in facts.versions] + cupy_distributions(facts.versions)
    wrong = conflicts(["chunkrestore", *optional], facts.versions, facts.requires)
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
    both, scheduler = facts.versions.get("dask", ""), facts.versions.get("distributed", "")
    if both == scheduler:
        yield Finding("Dask", "ok", f"dask and distributed {both}")
    else:
        # They are released together, and each relies on the other's internals.
        fix = f'pip install "dask=={scheduler or both}" "distributed=={scheduler or both}"'
        yield Finding(
            "Dask", "problem", f"dask {both or 'missing'}, distributed {scheduler or 'missing'}", fix
        )
    if "dask-cuda" not in facts.versions:
        yield Finding("dask-cuda", "not needed", "not installed; one worker per GPU is started without it")
        return
    pins = conflicts(["dask-cuda"], facts.versions, facts.requires)
    if pins:
        wanted = " ".join(f'"{pin}"' for pin in pins)
        fix = f"pip install {wanted}, or pip uninstall dask-cuda"
        yield Finding("dask-cuda", "problem", "; ".join(pins.values()), fix)
    else:
        yield Finding("dask-cuda", "ok", facts.versions["dask-cuda"])


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
        state: State = "not needed" if len(missing) == len(_NETWORKS) else "problem"
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


CHECKS = (
    python,
    requirements,
    dask,
    security,
    networks,
    batch_system,
    object_storage,
)
"""Each takes the facts alone."""

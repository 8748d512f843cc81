"""Profiles: what a site asks of a cluster, as YAML files. They say where work runs, never what is computed.

Every file has ``kind: local``, ``cuda``, ``slurm`` or ``scheduler``, and the keys of that kind: the fields of
`LocalProfile`, `CudaProfile`, `SlurmProfile` and `SchedulerProfile`. Unknown keys are errors. Text that ends up in
a job script has a strict alphabet, so that a profile cannot hold a line of shell.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)


def _form(pattern: str, example: str) -> BeforeValidator:
    """Return a check that a value is text that matches `pattern` as a whole; the error shows `example`."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, flags=re.ASCII):
            raise ValueError(f"{value!r} is not of the form of {example}")
        return value

    return BeforeValidator(check)


Name: TypeAlias = Annotated[str, _form(r"[\w][\w.,:@-]*", "'gpu-long' (letters, digits and _.,:@-)")]
Constraint: TypeAlias = Annotated[
    str, _form(r"[\w.,:&|*!()\[\]-]+", "'a100|h100' (letters, digits and _.,:&|*!()[]-)")
]
Size: TypeAlias = Annotated[
    str,
    _form(r"[1-9]\d*(\.\d+)? ?([KMGT]i?B)", "'64 GiB' (a number and KB, MB, GB, TB, KiB, MiB, GiB or TiB)"),
]
Walltime: TypeAlias = Annotated[
    str, _form(r"(\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d", "'12:00:00' or '2-00:00:00', in quotes")
]
Module: TypeAlias = Annotated[str, _form(r"[\w][\w.+/-]*", "'cuda/12.4' (letters, digits and _.+/-)")]
Variable: TypeAlias = Annotated[str, _form(r"[A-Za-z_]\w*", "'HDF5_PLUGIN_PATH' (letters, digits and _)")]
Value: TypeAlias = Annotated[str, _form(r"[^\x00-\x1f\x7f]*", "'one line of text', in quotes")]
SitePath: TypeAlias = Annotated[
    str, _form(r"[\w$][\w./$+@=-]*|/[\w./$+@=-]*", "'/scratch/$USER' (no spaces, quotes or brackets)")
]
"""A path on the machine of a worker, which may hold variables that are known there."""

_OWN_DIRECTIVES = {
    "account": "account",
    "chdir": None,
    "constraint": "constraint",
    "cpus-per-task": "cores",
    "error": "log_directory",
    "job-name": "job_name",
    "mem": "memory",
    "array": None,
    "ntasks": None,
    "ntasks-per-node": None,
    "nodes": None,
    "output": "log_directory",
    "partition": "partition",
    "qos": "qos",
    "time": "walltime",
    "wrap": None,
}
"""Directives that a job has already, with the key that decides them; None: a job is one task, always."""


def _directive(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=[\w.,:/@%+*&|()\[\]-]+)?", value, flags=re.ASCII):
        raise ValueError(f"{value!r} is not of the form of '--exclusive' or '--reservation=microscopy'")
    name = value[2:].partition("=")[0]
    if name in _OWN_DIRECTIVES:
        key = _OWN_DIRECTIVES[name]
        raise ValueError(f"--{name} is decided by the key `{key}`" if key else f"--{name} cannot be changed")
    return value


Directive: TypeAlias = Annotated[str, AfterValidator(_directive)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    """A file in which unknown keys are errors and nothing is converted: ``true`` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LocalProfile(_Strict):
    """Worker processes on this machine."""

    kind: Literal["local"]
    n_workers: Count | None = None
    """Worker processes; one per usable core by default."""
    local_directory: SitePath | None = None
    """Folder for Dask's own files; a temporary one by default."""
    dashboard: bool = False
    """Whether Dask's dashboard, which asks nobody for a password, listens on all interfaces."""


class CudaProfile(_Strict):
    """One worker process per CUDA device of this machine."""

    kind: Literal["cuda"]
    n_workers: Count | None = None
    """Devices to use; all visible ones by default."""
    local_directory: SitePath | None = None
    """Folder for Dask's own files; a temporary one by default."""
    dashboard: bool = False
    """Whether Dask's dashboard, which asks nobody for a password, listens on all interfaces."""


class SlurmProfile(_Strict):
    """Worker processes in jobs that the driver submits to SLURM, asks for again when they end, and cancels."""

    kind: Literal["slurm"]
    cores: Count
    """Cores per job (``--cpus-per-task``)."""
    memory: Size
    """Host memory per job (``--mem``), shared by its workers."""
    walltime: Walltime
    """Limit of one job (``--time``). Workers leave before it, and new jobs are asked for as long as needed."""
    jobs: Count = 1
    """Jobs to keep running; `n_workers` of `connect` goes before it."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Devices per job (``--gres``)."""
    gpu_type: Name | None = None
    """Type of the devices, where a site has several."""
    workers_per_job: Count | None = None
    """Worker processes per job; one per device by default, or one."""
    partition: Name | None = None
    """``--partition``; the site's default."""
    account: Name | None = None
    """``--account``; the user's default."""
    qos: Name | None = None
    """``--qos``; the user's default."""
    constraint: Constraint | None = None
    """``--constraint``; none by default."""
    directives: list[Directive] = []
    """Other options of ``sbatch``, such as ``--exclusive``."""
    job_name: Name = "chunkrestore"
    """``--job-name``."""
    modules: list[Module] = []
    """Environment modules to load in a job."""
    source: list[SitePath] = []
    """Shell scripts to source in a job, before modules are loaded."""
    environment: dict[Variable, Value] = {}
    """Variables to export in a job; they go before those that chunkrestore sets itself."""
    python: SitePath = Field(default_factory=lambda: sys.executable, validate_default=True)
    """Interpreter of the workers; the driver's by default. Versions of all packages must be the driver's."""
    interface: Name | None = None
    """Network interface of scheduler and workers, such as ``ib0``; the one with the default route by default."""
    local_directory: SitePath | None = None
    """Folder for Dask's own files on a worker's machine, such as ``$TMPDIR``."""
    log_directory: SitePath = "slurm-logs"
    """Folder for output of jobs and, while they run, the key of their connections; seen by driver and workers
    under the same path. Relative to the profile's folder; made where missing."""
    tls: bool = True
    """Whether connections are encrypted and ask for a certificate. Without, everyone who reaches the scheduler's
    port over the network can run programs as the user."""
    dashboard: bool = False
    """Whether Dask's dashboard, which asks nobody for a password, listens on all interfaces."""

    @property
    def n_workers_per_job(self) -> int:
        """Worker processes per job."""
        return self.workers_per_job or max(1, self.gpus)


class SchedulerProfile(_Strict):
    """A Dask scheduler that runs already."""

    kind: Literal["scheduler"]
    address: str
    """``tls://host:8786``, ``tcp://host:8786``, or a scheduler file."""
    ca_file: str | None = None
    """Certificate of the authority that signed the scheduler's, PEM. The three paths are relative to the
    profile's folder, and needed for ``tls://`` unless Dask's own configuration has them."""
    cert: str | None = None
    """Certificate to show to the scheduler, PEM."""
    key: str | None = None
    """Private key of `cert`, PEM."""


Profile: TypeAlias = LocalProfile | CudaProfile | SlurmProfile | SchedulerProfile

_ADAPTER: TypeAdapter[Profile] = TypeAdapter(Annotated[Profile, Field(discriminator="kind")])


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Parameters
    ----------
    path
        YAML file; paths in it are relative to its folder.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a profile; the message names each wrong key.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"profile {path} does not exist")
    try:
        content = yaml.safe_load(file.read_text())
        return _ADAPTER.validate_python(_beside(file.absolute().parent, content))
    except yaml.YAMLError as error:
        raise ValueError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        # The first part of a place is the kind, which is no key.
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:])) or 'kind'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ValueError(f"profile {path} is not valid: {wrong}") from None


def _beside(folder: Path, content: Any) -> Any:
    """Return the content of a file with paths that are relative to `folder` made absolute."""
    if not isinstance(content, dict):
        return content
    if content.get("kind") == "slurm":
        content = {"log_directory": SlurmProfile.model_fields["log_directory"].default, **content}
    keys = [key for key in ("log_directory", "ca_file", "cert", "key") if isinstance(content.get(key), str)]
    if isinstance(content.get("address"), str) and (folder / content["address"]).is_file():
        keys.append("address")
    return {**content, **{key: str(folder / content[key]) for key in keys}}

"""Start a real SLURM of one node in a folder, without systemd and beside any other: munged, slurmctld, slurmd.

``python tests/slurm/single_node.py start FOLDER`` prints the variable that ``sbatch`` and its like then need;
``stop FOLDER`` ends the jobs and exactly these daemons. Needs Debian's packages ``slurm-wlm`` and ``munge``,
no configuration, no free port of a certain number, and no rights that the caller has not.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
"""In the order in which they start."""

SLOTS = 8
"""CPUs that the node claims to have, so that several jobs run at once on any machine."""

DEADLINE = 30.0
"""Seconds that a daemon may take to start or to end."""

_CONFIGURATION = """\
ClusterName=chunkrestore
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The lifetime of a credential is also how long a requeued job waits: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# Control groups belong to the machine's administrator; processes are followed through /proc instead.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
# The CPUs that the node claims need not exist.
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=5
BatchStartTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={slots} RealMemory={memory} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE DefMemPerCPU=512 State=UP
"""


class SlurmError(RuntimeError):
    """A daemon did not start or did not end; the message ends with what it logged."""


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in (*DAEMONS, "sbatch", "srun") if _program(name) is None]


def start(folder: Path) -> dict[str, str]:
    """Start the daemons in an empty folder and return what users need in their environment.

    Parameters
    ----------
    folder
        Receives key, configuration, logs, spool and state. The socket in it must be reached through a path
        of at most 107 characters.

    Returns
    -------
    dict
        ``SLURM_CONF``.

    Raises
    ------
    SlurmError
        If a daemon ends or does not answer before the deadline.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    _configure(folder)
    files = {"key-file": "munge.key", "socket": "munge.socket", "seed-file": "munge.seed"}
    files |= {"pid-file": "munged.pid", "log-file": "munged.log"}
    # Forced, because it would trust no folder that others may not enter.
    _launch("munged", folder, "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
    _await(lambda: _listens(folder / "munge.socket"), "munged", folder)
    _launch("slurmctld", folder, "-i", **environment)
    _await(lambda: "UP" in _ask("scontrol ping", environment), "slurmctld", folder)
    _launch("slurmd", folder, **environment)
    _await(lambda: _ask("sinfo --noheader --format=%T", environment) == "idle", "slurmd", folder)
    return environment


def stop(folder: Path) -> None:
    """End all jobs, then the daemons that were started in `folder`, the last one first."""
    folder = folder.resolve()
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    running = [name for name in DAEMONS if _process(name, folder) is not None]
    if running == list(DAEMONS):
        _ask(f"scancel --user={_user()}", environment)
        _await(lambda: _ask("squeue --noheader", environment) == "", "slurmd", folder)
    for name in reversed(running):
        _end(name, folder)


def _configure(folder: Path) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    controller_port, node_port = _free_ports(2)
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            user=_user(),
            controller_port=controller_port,
            node_port=node_port,
            slots=SLOTS,
            memory=psutil.virtual_memory().total // 2**20,
        )
    )


def _free_ports(n: int) -> list[int]:
    """Return ports that nothing listened on a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _launch(name: str, folder: Path, *options: str, **environment: str) -> None:
    """Start a daemon, which leaves its parent and writes its process id by itself."""
    with open(folder / f"{name}.out", "wb") as output:
        done = subprocess.run(
            [_program(name) or name, *options],
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE,
        )
    if done.returncode:
        raise SlurmError(f"{name} did not start{_tail(name, folder)}")


def _end(name: str, folder: Path) -> None:
    until = time.monotonic() + DEADLINE
    if process := _process(name, folder):
        process.terminate()
    # Not psutil's wait: where nobody collects orphans they stay as zombies.
    while process := _process(name, folder):
        if time.monotonic() > until:
            process.kill()
            raise SlurmError(f"{name} ignored SIGTERM{_tail(name, folder)}")
        time.sleep(0.02)


def _process(name: str, folder: Path) -> psutil.Process | None:
    """Return the daemon's process unless it ended; a process id alone may belong to another by now."""
    try:
        process = psutil.Process(int((folder / f"{name}.pid").read_text()))
        alive = process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def _await(condition: Callable[[], bool], name: str, folder: Path) -> None:
    """Poll until `condition` holds; raise with the daemon's log at the deadline."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > until:
            raise SlurmError(f"{name} did not answer in {DEADLINE:.0f} s{_tail(name, folder)}")
        time.sleep(0.05)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _ask(command: str, environment: Mapping[str, str]) -> str:
    """Return what a SLURM command prints, or nothing if it fails."""
    done = subprocess.run(
        shlex.split(command),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _tail(name: str, folder: Path) -> str:
    logs = [folder / f"{name}.log", folder / f"{name}.out"]
    lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()[-15:]]
    return ":\n" + "\n".join(lines)


def _program(name: str) -> str | None:
    """Return where a program lies; daemons are in folders that users seldom have in their PATH."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def main() -> None:
    """Start or stop as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "stop":
        stop(arguments.folder)
    else:
        for name, value in start(arguments.folder).items():
            print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()

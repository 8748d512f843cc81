"""A Dask scheduler that runs already, by its address or the file that it wrote."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client, Security

    from chunkrestore.cluster.profile import SchedulerProfile

_TIMEOUT_SECONDS = 10
"""How long a scheduler may take to answer."""


@contextmanager
def running_scheduler(cluster: str, profile: SchedulerProfile | None = None) -> Iterator[Client]:
    """Yield a client of the scheduler at an address, or in a scheduler file.

    Raises
    ------
    ValueError
        If it is no address, or one with TLS for which there are no credentials.
    FileNotFoundError
        If the profile names credentials that do not exist.
    ConnectionError
        If no scheduler answers.
    """
    from distributed import Client

    try:
        address = _address(cluster)
        _check_listens(address)
    except OSError as error:
        raise ConnectionError(
            f"no Dask scheduler answers at `cluster` {cluster!r}; check the address, or start one with "
            "`dask scheduler`"
        ) from error
    except ValueError as error:
        raise ValueError(f"`cluster` {cluster!r} is no address of a Dask scheduler: {error}") from error
    security = _security(address, profile)
    try:
        client = Client(address, timeout=_TIMEOUT_SECONDS, security=security, set_as_default=False)
    except OSError as error:
        raise ConnectionError(
            f"no connection to the Dask scheduler at `cluster` {cluster!r}: {error}"
        ) from error
    with client:
        yield client


def _address(cluster: str) -> str:
    """Return the address in a scheduler file, or `cluster` itself if it looks like one."""
    if os.path.isfile(cluster):
        try:
            return str(json.loads(Path(cluster).read_text())["address"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{cluster} is not the file that a Dask scheduler writes") from None
    if ":" not in cluster:
        raise ValueError(
            "known are 'auto', 'local', 'cuda', 'slurm' and 'serial', addresses (tcp://host:port), scheduler files "
            "and profiles (.yaml)"
        )
    return cluster


def _security(address: str, profile: SchedulerProfile | None) -> Security:
    """Return the credentials of a profile; Dask's own configuration has those that the profile has not."""
    from distributed import Security

    given: dict[str, str | None] = {
        "tls_ca_file": profile.ca_file if profile else None,
        "tls_client_cert": profile.cert if profile else None,
        "tls_client_key": profile.key if profile else None,
    }
    for path in filter(None, given.values()):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}, which the profile names, does not exist")
    security = Security(**{name: path for name, path in given.items() if path})
    if address.startswith("tls://"):
        missing = [name for name, path in given.items() if not (path or getattr(security, name))]
        if missing:
            keys = ", ".join(f"`{name.removeprefix('tls_').removeprefix('client_')}`" for name in missing)
            raise ValueError(
                f"{address} needs {keys} in a profile of kind scheduler, or in Dask's own configuration "
                "(distributed.comm.tls)"
            )
    return security


def _check_listens(address: str) -> None:
    """Raise `OSError` or `ValueError` unless something listens at `address`.

    Asked first because a client that fails to connect leaves its event loop behind, and what the garbage
    collector does with that can block the next client for ten seconds.
    """
    from distributed.comm import get_address_host_port

    if address.startswith("ucx"):
        return
    host, port = get_address_host_port(address)
    if not 0 < port < 2**16:
        raise ValueError(f"port {port} is not between 1 and {2**16 - 1}")
    with socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS):
        pass

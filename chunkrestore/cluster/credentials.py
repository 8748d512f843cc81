"""Keys for connections beyond one machine: made up for one run, passed on in a file that its owner alone can read."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Security

INSTALL = "dask-jobqueue and cryptography: pip install 'chunkrestore[slurm]'"


@contextmanager
def temporary_credentials(folder: Path) -> Iterator[Security]:
    """Yield credentials that all machines find in a file in `folder`, which is removed at the end."""
    path = folder / f".chunkrestore-{uuid.uuid4().hex}.pem"
    write_credentials(path)
    try:
        yield credentials_in(path)
    finally:
        path.unlink(missing_ok=True)


def write_credentials(path: Path) -> None:
    """Write a new key and its certificate, as a whole or not at all.

    Raises
    ------
    ImportError
        If cryptography is not installed.
    """
    from distributed import Security

    try:
        made = Security.temporary()
    except ImportError:
        raise ImportError(f"encryption between machines needs {INSTALL}") from None
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem)  # readable by its owner alone
    with open(descriptor, "w") as file:
        file.write(made.tls_scheduler_key + made.tls_scheduler_cert)
    os.replace(draft, path)


def credentials_in(path: Path) -> Security:
    """Return the credentials in a file of `write_credentials`: who has them is trusted in every role."""
    from distributed import Security

    roles = {
        f"tls_{role}_{part}": str(path)
        for role in ("client", "scheduler", "worker")
        for part in ("key", "cert")
    }
    return Security(require_encryption=True, tls_ca_file=str(path), **roles)

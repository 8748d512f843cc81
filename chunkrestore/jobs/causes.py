"""Why a block failed, and what is done about it: the policy of retries, one row per cause."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal, TypeAlias

from chunkrestore.backend import is_out_of_memory

Cause: TypeAlias = Literal["transient", "memory", "worker", "full", "data"]
"""Input or output that may work the next time; memory; a worker process that died; a full disk; all else."""

_FULL = {errno.ENOSPC, errno.EDQUOT}

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EBUSY", "EINTR", "ESTALE", "ENOLCK", "EPIPE", "EMFILE", "ENFILE", "EREMOTEIO"),
        *("ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNRESET", "ECONNREFUSED"),
        *("EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
}
"""What network file systems and networks report while they are unwell."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a block is tried again, by the cause of its failure."""

    transient: int = 5
    """Retries after failed input or output, each after twice the delay of the one before: 31 seconds in all."""
    memory: int = 1
    """Retries of a block that ran out of memory; image operators have been cut into parts before that."""
    worker: int = 1
    """Retries of a block whose worker died: one death may be bad luck, or another block's fault."""
    first_delay: float = 1.0
    """Seconds before the first retry of failed input or output."""

    def delay(self, cause: Cause, n_failures: int) -> float | None:
        """Return the seconds to wait after the `n_failures`-th failure for a cause; None: no other try."""
        retries = {"transient": self.transient, "memory": self.memory, "worker": self.worker}.get(cause, 0)
        if n_failures > retries:
            return None
        return self.first_delay * 2.0 ** (n_failures - 1) if cause == "transient" else 0.0

    def quarantines(self, cause: Cause) -> bool:
        """Whether a block that was given up is done once more with nothing beside it.

        It then has the machine's memory for itself, and cannot be blamed for a neighbour's doing.
        """
        return cause in ("memory", "worker")


def cause_of(error: BaseException) -> Cause:
    """Return why a task failed."""
    if type(error).__name__ == "KilledWorker":
        return "worker"
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "full"
    if isinstance(error, ConnectionError | TimeoutError):
        return "transient"
    return "transient" if isinstance(error, OSError) and error.errno in _TRANSIENT else "data"

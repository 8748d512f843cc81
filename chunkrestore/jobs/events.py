"""What happens in a job while it happens: one line of JSON per event, for people and tools, never for resuming.

Every line has ``time`` (seconds since 1970) and ``event``; the journal, not this file, says what is finished.
So a full disk or a lost file system must not end a job for the sake of its telemetry: an event that cannot be
written is lost, a warning says so once, and the next one is tried again.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_log = logging.getLogger(__name__)

_MODE = 0o666
"""Rights of a new file, less what the user's mask takes."""


class Events:
    """Appends events to a file, one line and one system call each, so that a reader sees whole lines.

    Parameters
    ----------
    path
        File in the job's folder, made with the first event; None: events go nowhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._file: int | None = None
        self._torn = False
        self._warned = False

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event; what JSON does not know is written as text.

        Never raises for what the file system does: the first failure is a warning in the log.
        """
        if self._path is None:
            return
        line = _line({"time": round(time.time(), 3), "event": event, **fields})
        try:
            self._append(self._path, line)
        except OSError as error:
            if not self._warned:
                _log.warning(
                    "events cannot be written to %s (%s); the job goes on without", self._path, error
                )
            self._warned = True

    def close(self) -> None:
        """Close the file; another event would open it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, path: Path, line: bytes) -> None:
        if self._file is None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _MODE)
            self._torn = self._torn or _ends_within_a_line(path)
        if self._torn:
            # What a crash or a full disk has left of a line must not swallow this one.
            line = b"\n" + line
        written = os.write(self._file, line)
        self._torn = written < len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_events(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a file in the order in which they were written, without those that were cut off.

    A file that does not exist holds none. The file is streamed: memory does not grow with its length.
    """
    for line in event_lines(path):
        if (event := parse_event(line)) is not None:
            yield event


def event_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the lines of a file of events as they are; none if there is no such file."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        yield from file


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line, or None if the line is spoilt."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if isinstance(event.get("time"), int | float) and math.isfinite(event["time"]) else None


def is_block(line: bytes) -> bool:
    """Return whether a line that `Events` wrote tells of a finished block, without parsing it.

    Of a million lines almost all do, and who counts retries has no need of them.
    """
    return b'"event": "block"' in line[:64]


def _line(content: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(content, default=_plain, allow_nan=False, skipkeys=True)
    except ValueError:
        # NaN is no JSON, and many readers of JSON lines refuse it.
        text = json.dumps(_finite(content), default=_plain, skipkeys=True)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """Return what JSON does not know as a number where it is one (NumPy's scalars), else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else str(value)


def _finite(value: Any) -> Any:
    """Return `value` with numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    value = _plain(value) if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _ends_within_a_line(path: Path) -> bool:
    """Return whether a file's last line lacks its end."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

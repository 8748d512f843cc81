"""The end of a process before any change that it makes to files, without ending it."""

import json
import os
import re
import sys
from contextlib import contextmanager, suppress


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Disk:
    """Sees every change that this process makes to files in a folder, and ends its life before one of them."""

    def __init__(self):
        self.folder = None
        self.changes = []
        self.n_allowed = 0
        # Such a hook cannot be removed; without a folder it does nothing.
        sys.addaudithook(self._hook)

    @contextmanager
    def dies_after(self, n_changes, folder):
        self.folder, self.n_allowed, self.changes = str(folder), n_changes, []
        try:
            yield
        finally:
            self.folder = None

    def _hook(self, event, arguments):
        if self.folder is None or not self._is_change(event, arguments):
            return
        if len(self.changes) >= self.n_allowed:
            raise Killed
        self.changes.append((event, str(arguments[0]).removeprefix(self.folder)))

    def _is_change(self, event, arguments):
        if event == "open":
            _, mode, flags = arguments
            if not (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)):
                return False
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return False
        return str(arguments[0]).startswith(self.folder)


def bury(output):
    """Make the lock of a driver that died in this process one of a process that is dead."""
    for path in output.with_name(f"{output.name}.chunkrestore").glob("lock*"):
        with suppress(ValueError):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"birth": "another"}))


def kind(change):
    """Return a change without what tells one block, table or temporary file from the next."""
    event, path = change
    return event, re.sub(r"[0-9a-f]{32}|\d+", "#", path)

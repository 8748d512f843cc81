"""What tests look at from outside: files in a folder, and things that take a while."""

import time

DEADLINE = 60.0


def tree(path):
    """Return the content of every file below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def wait_for(condition, what, seconds=DEADLINE):
    """Poll until `condition` holds, and return what it gave; a wait that fails is an error and not a hang."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.005)
    return found

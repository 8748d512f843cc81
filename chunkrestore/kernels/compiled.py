"""How loops are compiled. This module loads numba: import it, and what imports it, inside functions."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Return `function` as machine code that holds no interpreter lock and keeps the order of float operations.

    The machine code is kept in ``__pycache__`` beside the source, or, where that is read-only, in the user's
    cache folder. A process that can write neither compiles anew (numba itself would raise when the module is
    imported).

    Numba compiles again when a function's own file changes, and would go on using what it has when only a
    function that it calls, from another file, does. So names, by which machine code is found, end in a checksum
    of all those files.
    """
    sources = sorted(_sources(function.__module__, set()))
    checksum = zlib.crc32(b"".join(Path(source).read_bytes() for source in sources))
    function.__qualname__ += f"_{checksum:08x}"
    try:
        return njit(nogil=True, fastmath=False, cache=True)(function)  # type: ignore[return-value]
    except RuntimeError:
        return njit(nogil=True, fastmath=False)(function)  # type: ignore[return-value]


def _sources(name: str, seen: set[str]) -> set[str]:
    """Return the files of a module and of those of this package that it has something from."""
    module = sys.modules[name]
    if module.__file__ is None or module.__file__ in seen:
        return seen
    seen.add(module.__file__)
    for value in list(vars(module).values()):
        origin = getattr(value, "__module__", None)
        if isinstance(origin, str) and origin.startswith("chunkrestore.") and origin in sys.modules:
            _sources(origin, seen)
    return seen

"""How loops are compiled. This module loads numba: import it, and what imports it, inside functions."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llvmlite.binding import get_host_cpu_features, get_host_cpu_name  # type: ignore[import-untyped]
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Return `function` as machine code that holds no interpreter lock and keeps the order of float operations.

    The machine code is kept in ``__pycache__`` beside the source, or, where that is read-only, in the user's
    cache folder. A process that can write neither compiles anew (numba itself would raise when the module is
    imported).

    Numba compiles again when a function's own file changes, and would go on using what it has when only a
    function that it calls, from another file, does. And two processes that compile a function at the same
    time, for two kinds of processors that share the folder, could each end up with the code of the other. So
    names, by which machine code is found, end in a checksum of all those files and the processor.
    """
    return _machine_code(function)


def part(function: F) -> F:
    """Return `function` as machine code that only other compiled functions may call, in half the time to compile.

    Most of the time is not LLVM's: numba unpacks arguments, tuples of many arrays, for callers in Python. Without
    that, a call from Python crashes the process, so this is for what has no other callers. Parts are
    compiled once per type of their arguments, and a literal counts as a type of its own: ``n = 0`` handed to a part
    in a loop that counts makes two, ``n = int(np.int64(0))`` one.
    """
    return _machine_code(function, no_cpython_wrapper=True)


def _machine_code(function: F, **options: Any) -> F:
    function.__qualname__ += f"_{_checksum(function.__module__):08x}"
    options |= {"nogil": True, "fastmath": False, "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **options)(function)  # type: ignore[return-value]
    except RuntimeError:
        return njit(**options)(function)  # type: ignore[return-value]


def _checksum(module: str) -> int:
    processor = get_host_cpu_name() + get_host_cpu_features().flatten()
    sources = sorted(_sources(module, set()))
    return zlib.crc32(b"".join([processor.encode(), *(Path(source).read_bytes() for source in sources)]))


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

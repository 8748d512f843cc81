"""Functions by name, so that workers and later processes find the ones that a job was started with."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any


def function_of(name: str) -> Callable[..., Any]:
    """Import a function.

    Parameters
    ----------
    name
        ``"package.module:name"``; the part after the colon may have dots.

    Raises
    ------
    ValueError
        If `name` is not of that form, or the module holds no such callable.
    ImportError
        If there is no such module.
    """
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
        raise ValueError(f"`function` {name!r} must be of the form 'package.module:name'")
    module, _, qualname = name.partition(":")
    try:
        imported = import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`function` {name!r} cannot be imported: {error}; install what is missing, or add the folder of "
            "the module to PYTHONPATH, where workers look as well"
        ) from error
    try:
        found = attrgetter(qualname)(imported)
    except AttributeError:
        raise ValueError(f"`function` {name!r}: module {module} has no {qualname!r}") from None
    if not callable(found):
        raise ValueError(f"`function` {name!r} is of {type(found).__name__} and cannot be called")
    return found  # type: ignore[no-any-return]


def name_of(function: Callable[..., Any]) -> str | None:
    """Return the name by which `function_of` finds `function` in any process, or None if it has none.

    Functions of a script, lambdas, closures and methods of objects have none.
    """
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module in (None, "__main__") or not qualname:
        return None
    name = f"{module}:{qualname}"
    try:
        return name if function_of(name) is function else None
    except (ImportError, ValueError):
        return None


def called(function: Callable[..., Any] | str) -> str:
    """Return what to call a function in messages: its name, whether it is found by it or not."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def source_digest(function: Callable[..., Any] | str) -> str | None:
    """Return the SHA-256 of a function's source text, or None where there is none (compiled functions).

    What the function calls is not part of it.
    """
    found = function_of(function) if isinstance(function, str) else function
    while isinstance(found, functools.partial):
        found = found.func
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        found = type(found)
    try:
        return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()
    except (OSError, TypeError):
        return None

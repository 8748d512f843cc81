"""Look over an environment and a machine, and say what to install or to change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from chunkrestore.doctor import cuda, libraries, machine, storage
from chunkrestore.doctor.facts import all_at_once, gather
from chunkrestore.doctor.finding import Finding, State, healthy, table

__all__ = ["Finding", "State", "examine", "healthy", "table"]

_STORAGE_SECONDS = 30.0


def examine(store: str | os.PathLike[str] | None = None, *, quick: bool = False) -> list[Finding]:
    """Return what is right and wrong with this environment and this machine; never raises.

    Nothing is changed, and nothing is asked of any other machine but the file server of `store`. TensorFlow and
    CuPy are loaded in processes of their own, so that a broken one is a finding.

    Parameters
    ----------
    store
        Output whose disk is to be tried, with small files that are gone afterwards; it need not exist.
    quick
        Do not load TensorFlow and CuPy: a second instead of half a minute.
    """
    facts, failures = gather(quick=quick)
    findings = [
        Finding(name, "warning", f"could not be found out: {reason}")
        for name, reason in failures.items()
        if name != "address"  # an address that is missing is judged
    ]
    for check in (*libraries.CHECKS, *cuda.CHECKS, *machine.CHECKS):
        findings += _guarded(check.__name__, partial(check, facts))
    if store is not None:
        findings += _guarded("disk", partial(_at, store))
    return findings


def _at(store: str | os.PathLike[str]) -> Iterable[Finding]:
    name = os.fspath(store)
    if "://" in name:
        return [Finding("disk", "not needed", f"{name} is not on a disk of this machine")]
    answers, failures = all_at_once({"disk": partial(storage.probe, name)}, _STORAGE_SECONDS)
    if failures:
        fix = "choose an output where files can be made"
        return [Finding("disk", "problem", f"{Path(name)}: {failures['disk']}", fix)]
    return storage.judge(answers["disk"])


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings of a check; its failure is one."""
    findings: list[Finding] = []
    try:
        # One by one: those before a failure count.
        findings.extend(check())
    except Exception as error:
        findings.append(Finding(name, "warning", f"could not be judged: {type(error).__name__}: {error}"))
    return findings

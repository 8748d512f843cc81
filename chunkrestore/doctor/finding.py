"""What the doctor says about one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "warning", "problem", "not needed"]
"""A problem keeps jobs from running, or makes them wrong or slow beyond use; a warning costs something; what is not
needed may be missing."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What was looked at."""
    state: State
    """How it is."""
    found: str
    """What was found, in one line."""
    fix: str = ""
    """What to do, a command where there is one; nothing if nothing is to be done."""


def healthy(findings: Sequence[Finding]) -> bool:
    """Return whether there is no problem; warnings are none."""
    return all(finding.state != "problem" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Return findings as lines of text, each fix on a line of its own below."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:10}  {finding.name:{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':10}  {'':{width}}  -> {finding.fix}")
    counts = [
        f"{n} {state}{'s' if n > 1 else ''}"
        for state in ("problem", "warning")
        if (n := sum(finding.state == state for finding in findings))
    ]
    return "\n".join([*lines, ", ".join(counts) or "nothing is wrong"])

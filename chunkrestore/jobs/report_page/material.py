"""What is known of a job, gathered for the sections of its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chunkrestore.jobs.report_page.slices import View
from chunkrestore.jobs.report_page.summary import Summary


@dataclass(frozen=True)
class Material:
    """What is known of a job."""

    folder: Path
    """The job's own folder."""
    output: str
    """Store that it writes."""
    state: str
    """``done``, ``failed``, ``interrupted``, ``error`` or ``unfinished``."""
    summary: Summary
    """What its events add up to."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What the job is."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that it was begun with."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What it reported at its end; empty before."""
    decided: Mapping[str, Any] = field(default_factory=dict)
    """What the journal keeps as decided once."""
    views: Sequence[View] = ()
    """Slices."""
    no_views: str = ""
    """Why there are none."""

    @property
    def title(self) -> str:
        """Name of the store and of what the job makes of it."""
        return f"{self.output.rstrip('/').rpartition('/')[2]}, {self.folder.name}"

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, as far as it is told."""
        return (
            self.report.get("plan")
            or self.summary.begin.get("plan")
            or {"passes": self.manifest.get("passes", [])}
        )

    @property
    def n_objects(self) -> int | None:
        """Objects in the labels, as far as they are numbered."""
        found = [
            value.get("n_objects", 0) for name, value in self.decided.items() if name.startswith("objects-")
        ]
        n_objects = self.report.get("n_objects")
        return n_objects if n_objects is not None or not found else sum(found)

    @property
    def n_rounds(self) -> int | None:
        """Rounds until decisions across blocks had settled."""
        rounds = [v.get("n_rounds") for name, v in self.decided.items() if name.startswith("objects-")]
        return max((n for n in rounds if n is not None), default=self.report.get("n_rounds"))

    @property
    def voxels_per_second(self) -> float | None:
        """Voxels of the input by the time of all runs, once the job is done."""
        shape = self.plan.get("shape")
        if self.state != "done" or not shape or not self.summary.now:
            return None
        n_planes = self.plan.get("n_timepoints", 1) * self.plan.get("n_channels", 1)
        return float(n_planes * math.prod(shape) / self.summary.now)

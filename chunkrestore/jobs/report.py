"""Progress while a job runs, and its summary at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from chunkrestore.jobs.passes import format_nbytes

_LINE_SECONDS = 60.0
"""Interval of progress lines where there is no terminal: a bar would fill a cluster's log files."""


@dataclass(frozen=True)
class Seam:
    """What a block border changed, measured on one of them."""

    axis: int
    """Spatial axis across which the border lies."""
    position: tuple[int, ...]
    """Voxel at the centre of the probe."""
    rms: float
    """Root mean square difference to a result without the border, relative to the dynamic range."""
    max: float
    """Largest difference, relative to the dynamic range."""


@dataclass
class Report:
    """What a job did.

    ``str(report)`` is the summary for people, `asdict` the content of ``report.json``.
    """

    operators: list[dict[str, Any]]
    """Operators with their parameters and the numbers decided for the volume."""
    plan: dict[str, Any]
    """The plan."""
    outputs: list[str]
    """Stores and label groups that were written."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage, of this run alone."""
    n_done: int = 0
    """Blocks done in this run, all stages."""
    n_resumed: int = 0
    """Blocks found finished from earlier runs, all stages."""
    n_retried: int = 0
    """Failed tries of blocks that were tried again."""
    n_split: int = 0
    """Blocks that did not fit into memory and were done in parts."""
    n_clipped: int | None = None
    """Voxels beyond the range of the dtype that was chosen; None if none was."""
    calibration: dict[str, Any] | None = None
    """Halo found on a pilot region, and the seams measured with it."""
    n_objects: int | None = None
    """Objects in the labels."""
    n_rounds: int | None = None
    """Rounds until decisions across blocks had settled."""
    seams: list[Seam] = field(default_factory=list)
    """Measured seam errors, worst first."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, chunkrestore and the libraries that made the numbers."""

    @property
    def seam_rms(self) -> float | None:
        """Worst measured seam, relative to the dynamic range; None if nothing was measured."""
        return self.seams[0].rms if self.seams else None

    @property
    def voxels_per_second(self) -> float | None:
        """Voxels of the volume per second of this run; None if all was done before."""
        total = sum(self.seconds.values())
        n_voxels = self.plan["n_timepoints"] * self.plan["n_channels"]
        for n in self.plan["shape"]:
            n_voxels *= n
        return n_voxels / total if total and not self.n_resumed else None

    def content(self) -> dict[str, Any]:
        """Return the report as JSON-compatible values."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content

    def __str__(self) -> str:
        lines = [f"wrote      {output}" for output in self.outputs]
        resumed = f", {self.n_resumed} found finished" if self.n_resumed else ""
        retried = f", {self.n_retried} tries repeated" if self.n_retried else ""
        lines.append(f"blocks     {self.n_done} done{resumed}{retried}")
        if self.n_split:
            lines.append(
                f"memory     {self.n_split} blocks did not fit and were done in parts; smaller blocks or fewer workers "
                "would be faster"
            )
        if self.calibration:
            default, depth = (
                " x ".join(map(str, self.calibration[key])) for key in ("default_depth", "depth")
            )
            lines.append(f"depth      {depth} by calibration, {default} by default")
        stages = ", ".join(
            f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items() if seconds >= 0.05
        )
        parts = f" ({stages})" if stages else ""
        lines.append(f"time       {sum(self.seconds.values()):.1f} s{parts}")
        if self.voxels_per_second:
            lines.append(f"throughput {self.voxels_per_second / 1e6:.2f} megavoxels/s")
        overheads = ", ".join(f"{p['halo_overhead']:.2f}" for p in self.plan["passes"])
        if overheads:
            lines.append(f"halo       {overheads} voxels read per voxel written")
        decoded = [p["read_amplification"] for p in self.plan["passes"]]
        if decoded and None not in decoded:
            lines.append(f"decoded    {', '.join(f'{n:.2f}' for n in decoded)} voxels per voxel written")
        lines.append(f"read       {format_nbytes(self.plan['read_nbytes'])}")
        if self.n_clipped is not None:
            lines.append(f"clipped    {self.n_clipped} voxels beyond the range that is stored")
        if self.n_objects is not None:
            rounds = f", settled in {self.n_rounds} rounds" if self.n_rounds is not None else ""
            lines.append(f"objects    {self.n_objects}{rounds}")
        if self.seams:
            worst = self.seams[0]
            lines.append(
                f"seams      rms {worst.rms:.1e}, largest {worst.max:.1e} of the dynamic range "
                f"(worst of {len(self.seams)} probed block borders)"
            )
        return "\n".join(lines)

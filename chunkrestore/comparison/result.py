"""What a comparison has found, as numbers, tables and files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkrestore.jobs.ledger import write_atomically
from chunkrestore.jobs.score import Score
from chunkrestore.metrics.instances import InstanceScore, LabelScore

Cells = tuple[str, ...]

SECONDS = ("wall", "processor", "compute")
"""Of a job, start-up included; of all processors, NaN for a job that was interrupted; and the time that its tasks have
computed, all workers together."""


@dataclass(frozen=True)
class SegmentationResult:
    """One segmentation of one image."""

    key: str
    """``threshold``, ``watershed`` or ``stardist``."""
    labels: str
    """Where the labels are."""
    told: dict[str, Any]
    """What the job tells: operators as decided, blocks, versions."""
    seconds: dict[str, float]
    """`SECONDS` of the job."""
    score: LabelScore
    """Against the true labels."""

    @property
    def at_half(self) -> InstanceScore:
        """Matches at an overlap of 0.5."""
        return next(score for score in self.score.at if score.iou == 0.5)

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        own = {"segmentation": self.key, "labels": self.labels, "seconds": self.seconds}
        return {**own, "score": self.score.describe(), "job": self.told}


@dataclass(frozen=True)
class MethodResult:
    """One method's image and its segmentations."""

    key: str
    """Name in tables and of the store."""
    title: str
    """Name for people."""
    above_background: bool
    """Whether intensities are above the background."""
    store: str | None
    """Where the image is; None: it is the input."""
    told: dict[str, Any] | None
    """What the job tells; None for the input."""
    seconds: dict[str, float]
    """`SECONDS` of everything that leads to the image."""
    score: Score | None
    """Against the truth."""
    segmentations: tuple[SegmentationResult, ...]
    """In the order of the table."""

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return {
            "method": self.key,
            "title": self.title,
            "above_background": self.above_background,
            "store": self.store,
            "seconds": self.seconds,
            "score": self.score and self.score.describe(),
            "segmentations": [one.describe() for one in self.segmentations],
            "job": self.told,
        }


@dataclass(frozen=True)
class Comparison:
    """All numbers of a comparison; ``str`` of it is the tables for people."""

    folder: Path
    """Where files and stores are."""
    methods: tuple[MethodResult, ...]
    """In the order of the table."""
    compared: dict[str, Any]
    """Inputs, units, versions."""

    def __getitem__(self, key: str) -> MethodResult:
        """Return the result of a method by its key."""
        for one in self.methods:
            if one.key == key:
                return one
        raise KeyError(
            f"{key!r} was not compared; compared were {', '.join(one.key for one in self.methods)}"
        )

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values; what is infinite or undefined is null."""
        content = {**self.compared, "methods": [one.describe() for one in self.methods]}
        return {key: _finite(value) for key, value in content.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per method and segmentation."""
        megavoxels = self.compared["megavoxels"]
        found = []
        for one in self.methods:
            own = {"method": one.key} | _image_columns(one, megavoxels)
            found += [own | _label_columns(cut, megavoxels) for cut in one.segmentations] or [own]
        return [{key: _finite(value) for key, value in row.items()} for row in found]

    def tables(self) -> list[tuple[str, Cells, list[Cells]]]:
        """Return title, head and rows of the tables for people."""
        megavoxels = self.compared["megavoxels"]
        tables: list[tuple[str, Cells, list[Cells]]] = []
        if any(one.score is not None for one in self.methods):
            images: list[Cells] = [(one.title, *_image_cells(one, megavoxels)) for one in self.methods]
            tables.append(("Images", ("method", *_IMAGE_HEAD), images))
        objects: list[Cells] = [
            (one.title, cut.key, *_label_cells(cut, megavoxels))
            for one in self.methods
            for cut in one.segmentations
        ]
        if objects:
            tables.append(("Objects", ("method", "segmentation", *_LABEL_HEAD), objects))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n\n{_markdown(head, rows)}" for title, head, rows in self.tables())

    def write(self) -> None:
        """Write ``comparison.json``, ``comparison.csv`` and ``comparison.md``, each whole or not at all."""
        write_atomically(
            self.folder / "comparison.json", json.dumps(self.describe(), indent=1, allow_nan=False)
        )
        rows, text = self.rows(), io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder / "comparison.csv", text.getvalue())
        write_atomically(self.folder / "comparison.md", f"{self}\n")


_IMAGE_HEAD = (
    "PSNR (dB)",
    "PSNR, best gain and offset (dB)",
    "SSIM",
    "correlation",
    "resolution (um)",
    "bias",
    "object brightness",
    "wall (s/Mvoxel)",
    "processor (s/Mvoxel)",
)
_LABEL_HEAD = (
    "true",
    "found",
    "F1 at 0.5",
    "F1, 0.1 to 0.9",
    "precision",
    "recall",
    "split",
    "merged",
    "volume",
    "wall (s/Mvoxel)",
    "processor (s/Mvoxel)",
)


def _image_columns(one: MethodResult, megavoxels: float) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if one.score is not None and one.score.image is not None:
        described = one.score.image.describe()
        described.pop("fsc")
        columns |= described
    if one.score is not None and one.score.intensities is not None:
        columns |= {f"intensity_{k}": v for k, v in one.score.intensities.describe().items()}
    return columns | {f"{k}_seconds_per_megavoxel": v / megavoxels for k, v in one.seconds.items()}


def _label_columns(cut: SegmentationResult, megavoxels: float) -> dict[str, Any]:
    described = cut.score.describe()
    at = described.pop("at")
    half = {name: value for name, value in cut.at_half.describe().items() if name not in (*described, "iou")}
    curve = {f"f1_at_{score['iou']}": score["f1"] for score in at}
    seconds = {f"segmentation_{k}_seconds_per_megavoxel": v / megavoxels for k, v in cut.seconds.items()}
    return {"segmentation": cut.key} | described | half | curve | seconds


def _image_cells(one: MethodResult, megavoxels: float) -> Cells:
    seconds = [_number(one.seconds[name] / megavoxels, 2) if one.told else "" for name in SECONDS[:2]]
    if one.score is None or one.score.image is None:
        return ("",) * 7 + tuple(seconds)
    image, brightness = one.score.image, one.score.intensities
    return (
        _number(image.psnr, 2),
        _number(image.psnr_scaled, 2),
        _number(image.ssim, 3),
        _number(image.correlation, 3),
        _number(image.resolution_um, 2),
        _number(image.bias, 1),
        _percent(brightness.error if brightness else None),
        *seconds,
    )


def _label_cells(cut: SegmentationResult, megavoxels: float) -> Cells:
    score, half = cut.score, cut.at_half
    return (
        str(score.n_true),
        str(score.n_pred),
        _number(half.f1, 3),
        _number(score.mean_f1, 3),
        _number(half.precision, 3),
        _number(half.recall, 3),
        str(score.n_split),
        str(score.n_merged),
        _percent(score.volume_error),
        *(_number(cut.seconds[name] / megavoxels, 2) for name in SECONDS[:2]),
    )


def _markdown(head: Cells, rows: Sequence[Cells]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:+.1f} %"


def _finite(value: Any) -> Any:
    """Return what JSON can say."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The steps of a comparison: images, labels and scores, as jobs that go on where they stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkrestore.comparison.methods import Restoration, Segmentation
from chunkrestore.comparison.pictures import Row, Scene
from chunkrestore.comparison.result import SECONDS, MethodResult, SegmentationResult
from chunkrestore.comparison.steps import Steps, complete, processor_seconds, spent, told_by
from chunkrestore.jobs.job import input_identity, versions
from chunkrestore.jobs.ledger import work_folder_of
from chunkrestore.jobs.run import run
from chunkrestore.jobs.score import described, score
from chunkrestore.metrics.instances import THRESHOLDS
from chunkrestore.ome_zarr import OmeZarrImage, open_image


@dataclass(frozen=True)
class Work:
    """What is compared, how, and where."""

    folder: Path
    """Of stores, tables and pictures."""
    steps: Steps
    """What is done."""
    raw: OmeZarrImage
    """What was recorded."""
    truth: OmeZarrImage | None
    """What it should look like."""
    true_labels: OmeZarrImage | None
    """What is in it."""
    backgrounds: tuple[float, float]
    """Of image and truth."""
    ways: Sequence[Restoration]
    """How images are made."""
    cuts: Sequence[Segmentation]
    """How labels are."""
    where: dict[str, Any]
    """Options of every job."""

    def check(self) -> None:
        """Raise if a step was made with something else before."""
        for way in self.ways:
            if way.operators:
                self.steps.record(f"image-{way.key}", self._image_of(way))
            if self.truth is not None:
                self.steps.record(f"score-{way.key}", self._image_score_of(way))
            for cut in self.cuts:
                self.steps.record(f"labels-{way.key}-{cut.key}", self._labels_of(way, cut))

    def method(self, way: Restoration) -> MethodResult:
        """Make and score the image of a method, and its segmentations."""
        told = self._restored(way) if way.operators else None
        scored = self._scored_image(way)
        before = [self._restored(one)["seconds"] for one in self._earlier(way)]
        seconds = [*before, told["seconds"]] if told else []
        return MethodResult(
            key=way.key,
            title=way.title,
            above_background=way.above_background,
            store=self._place(way.key) if way.operators else None,
            told=told,
            seconds={name: sum(s[name] for s in seconds) for name in SECONDS},
            score=None if scored is None else described(scored),
            segmentations=tuple(self._segmented(way, cut) for cut in self.cuts),
        )

    def described(self) -> dict[str, Any]:
        """Return what was compared."""
        parts = {"image": self.raw, "truth": self.truth, "labels": self.true_labels}
        return {
            "inputs": {name: part and input_identity(part) for name, part in parts.items()},
            "provenance": self.raw.others.get("chunkrestore"),
            "shape": list(self.raw.spatial_shape),
            "voxel_size": list(self.raw.voxel_size) if self.raw.calibrated else None,
            "background": self.backgrounds[0],
            "truth_background": self.backgrounds[1],
            "megavoxels": math.prod(self.raw.spatial_shape) / 1e6,
            "versions": versions(),
        }

    def pictured(self, results: Sequence[MethodResult]) -> Scene:
        """Return what pictures are drawn from: handles on images and labels, with their backgrounds."""
        rows = []
        for result in results:
            image = self.raw if result.store is None else open_image(result.store)
            labels = {cut.key: open_image(cut.labels) for cut in result.segmentations}
            above = 0.0 if result.above_background else self.backgrounds[0]
            rows.append(Row(result.title, image, above, labels))
        truth = None if self.truth is None else Row("truth", self.truth, self.backgrounds[1])
        return Scene(tuple(rows), truth, self.true_labels)

    def _earlier(self, way: Restoration) -> list[Restoration]:
        """Return the method whose image this one takes, unless that is the raw one."""
        return [one for one in self.ways if one.key == way.source and one.operators]

    def _image_of(self, way: Restoration) -> dict[str, Any]:
        """Return what identifies the image of a method."""
        chain = [operator for one in (*self._earlier(way), way) for operator in one.operators]
        return {"input": input_identity(self.raw), "operators": [dict(o.describe()) for o in chain]}

    def _labels_of(self, way: Restoration, cut: Segmentation) -> dict[str, Any]:
        """Return what identifies a segmentation of it."""
        return {**self._image_of(way), "segmentation": [dict(o.describe()) for o in cut.operators]}

    def _units(self, way: Restoration) -> dict[str, float]:
        background = 0.0 if way.above_background else self.backgrounds[0]
        return {"background": background, "truth_background": self.backgrounds[1]}

    def _image_score_of(self, way: Restoration) -> dict[str, Any]:
        """Return what identifies the score of its image."""
        truth = {"truth": _identity(self.truth), "labels": _identity(self.true_labels)}
        return {**self._image_of(way), **truth, **self._units(way)}

    def _place(self, key: str) -> str:
        return str(self.folder.absolute() / "images" / f"{key}.ome.zarr")

    def _image(self, way: Restoration) -> OmeZarrImage:
        return open_image(self._place(way.key)) if way.operators else self.raw

    def _restored(self, way: Restoration) -> dict[str, Any]:
        place = self._place(way.key)
        job = work_folder_of(place) / "image"

        def make(begun: bool) -> dict[str, Any]:
            source = self.raw if way.source == "raw" else open_image(self._place(way.source))
            return self._run(job, begun, way.operators, source, place)

        found: dict[str, Any] = self.steps.do(f"image-{way.key}", self._image_of(way), make)
        return found

    def _run(
        self, job: Path, begun: bool, operators: Any, source: OmeZarrImage, place: str, **options: Any
    ) -> dict[str, Any]:
        """Run a job, unless it came to its end just before this process died; return what it tells."""
        processor = math.nan
        if not (begun and complete(job)):
            before = processor_seconds(self.where["cluster"])
            report = run(operators, source, place, overwrite=self.steps.overwrite, **options, **self.where)
            if not report.n_resumed:
                processor = round(spent(before, processor_seconds(self.where["cluster"])), 3)
        told = told_by(job)
        told["seconds"]["processor"] = processor
        return told

    def _segmented(self, way: Restoration, cut: Segmentation) -> SegmentationResult:
        place = self._place(f"{way.key}-{cut.key}" if cut.makes_image else way.key)
        job = work_folder_of(place) / ("image" if cut.makes_image else f"labels-{cut.key}")
        labels = f"{place}/labels/{cut.key}"

        def make(begun: bool) -> dict[str, Any]:
            return self._run(job, begun, cut.operators, self._image(way), place, label_name=cut.key)

        def scored(_: bool) -> Any:
            compared = {"true_labels": self.true_labels, "labels": open_image(labels)}
            return self._score(f"{way.key}-{cut.key}", **compared)

        what = self._labels_of(way, cut)
        told = self.steps.do(f"labels-{way.key}-{cut.key}", what, make)
        against = {"truth": _identity(self.true_labels), "iou": list(THRESHOLDS)}
        values = self.steps.do(f"score-{way.key}-{cut.key}", {**what, **against}, scored)
        found = described(values).labels
        assert found is not None
        return SegmentationResult(cut.key, labels, told, told["seconds"], found)

    def _scored_image(self, way: Restoration) -> Any:
        if self.truth is None:
            return None

        def scored(_: bool) -> Any:
            compared = {"truth": self.truth, "image": self._image(way), "true_labels": self.true_labels}
            return self._score(way.key, **compared, **self._units(way))

        return self.steps.do(f"score-{way.key}", self._image_score_of(way), scored)

    def _score(self, name: str, *, truth: Any = None, image: Any = None, **options: Any) -> dict[str, Any]:
        found = score(
            truth,
            image,
            name=name,
            work_folder=self.folder / "scores",
            overwrite=self.steps.overwrite,
            **options,
            **self.where,
        )
        return found[0].describe()


def _identity(image: OmeZarrImage | None) -> dict[str, Any] | None:
    return None if image is None else input_identity(image)

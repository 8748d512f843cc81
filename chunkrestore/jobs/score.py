"""Score stored images and labels against the truth, block by block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from chunkrestore.cluster import Cluster
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.begin import begun
from chunkrestore.jobs.cutting import check_count, check_shape
from chunkrestore.jobs.job import versions
from chunkrestore.jobs.ledger import work_folder_of
from chunkrestore.jobs.measure import default_block
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.scoring import Readers, Scoring
from chunkrestore.metrics.blocks import ImageComparison, ImageScore, described_score
from chunkrestore.metrics.instances import THRESHOLDS, LabelScore, described_labels
from chunkrestore.metrics.intensities import IntensityScore
from chunkrestore.ome_zarr import OmeZarrImage, open_source

Stored: TypeAlias = str | os.PathLike[str] | OmeZarrImage
"""An image or labels: opened (and maybe cut by `OmeZarrImage.select`), or where they lie."""


@dataclass(frozen=True)
class Score:
    """How good a result is at one time point."""

    timepoint: int
    """Index in what was compared."""
    image: ImageScore | None
    """Of the image, if truth and image were given."""
    labels: LabelScore | None
    """Of the labels, if true and predicted ones were given."""
    intensities: IntensityScore | None
    """Of the objects' brightness, if images and true labels were given."""

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        parts = {name: getattr(self, name) for name in ("image", "labels", "intensities")}
        return {name: part and part.describe() for name, part in parts.items()}


def score(
    truth: Stored | None,
    image: Stored | None,
    *,
    true_labels: Stored | None = None,
    labels: Stored | None = None,
    background: float = 0.0,
    truth_background: float = 0.0,
    data_range: float | None = None,
    iou: Sequence[float] = THRESHOLDS,
    block_shape: Sequence[int] | None = None,
    name: str = "score",
    overwrite: bool = False,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> tuple[Score, ...]:
    """Score a stored image, its labels, or both, against the truth.

    Every figure is defined over whole volumes (`chunkrestore.metrics.score_image`, `score_labels`), and no block shape,
    cluster or interruption changes a bit of it. Called again after an interruption, it goes on. For arrays there are
    the functions named.

    Parameters
    ----------
    truth, image
        Images of one channel, or both None. Every time point is scored by itself.
    true_labels, labels
        Labels of the same volumes: `OmeZarrImage.label`, or the path of the label group. Predicted labels are matched
        with the true ones; true labels are also where the intensities of objects are compared.
    background, truth_background
        Known intensities without light, subtracted from `image` and `truth`. Nothing is fitted.
    data_range
        What PSNR and SSIM refer to; by default largest minus smallest value of `truth` at the time point.
    iou
        Overlaps at which objects are matched.
    block_shape
        Voxels per spatial axis that one task compares; whole chunks of about 16 million voxels by default.
    name
        Of the job: several may be unfinished in one work folder.
    overwrite
        Start an unfinished job anew.
    cluster, n_workers, profile, work_folder, quiet
        As for `chunkrestore.run`; the work folder is by default the one of `image`, or `labels`.

    Returns
    -------
    tuple of Score
        One per time point.

    Raises
    ------
    ValueError
        If what should be compared is incomplete, of different shapes or of several channels.
    chunkrestore.jobs.runner.BlockError
        If blocks failed, for example because a voxel is NaN; the message names them.
    ImportError
        If intensities of objects are wanted and numba is not installed.

    Notes
    -----
    Memory of a task: two blocks, with 128 voxels more per axis for the shell correlation. The last task of a time point
    holds 24 bytes per pair of objects that overlap and 16 per true object.
    """
    opened = _opened(truth=truth, image=image, true_labels=true_labels, labels=labels)
    first = next(iter(opened.values()))
    readers = Readers(
        (opened["truth"].source(), opened["image"].source()) if image is not None else None,
        (opened["true_labels"].source(), opened["labels"].source()) if labels is not None else None,
        opened["true_labels"].source() if true_labels is not None and image is not None else None,
    )
    _check_library(readers)
    grid = _grid(opened, block_shape)
    size = _voxel_size(opened)
    compared = ImageComparison(first.spatial_shape, size, float(truth_background), float(background))
    planes = tuple((t, 0) for t in range(first.n_t))
    place = opened.get("image") or opened["labels"]
    manifest = {
        "schema": 1,
        "kind": "score",
        "input": {key: one.source().identity() for key, one in opened.items()},
        "output": {"labels": None, "score": name},
        "parameters": [
            list(size or ()),
            compared.background,
            compared.truth_background,
            data_range,
            list(iou),
        ],
        "block_shape": [edges[1] for edges in grid.edges],
        "passes": [],
        "versions": versions(),
    }
    begin = begun(
        work_folder_of(place.path, work_folder) / name,
        manifest,
        Report([], _plan(opened, grid), [], versions=versions()),
        lambda: None,
        cluster=cluster,
        n_workers=n_workers,
        profile=profile,
        overwrite=overwrite,
        quiet=quiet,
    )
    with begin as stages:
        found = Scoring(stages, grid, planes, readers, compared, data_range).score(tuple(iou))
    return tuple(described(values, t) for (t, _), values in found.items())


def described(values: Mapping[str, Any], timepoint: int = 0) -> Score:
    """Return the score that `Score.describe` has described."""
    image, labels, intensities = (values[name] for name in ("image", "labels", "intensities"))
    return Score(
        timepoint,
        image and described_score(image),
        labels and described_labels(labels),
        intensities and IntensityScore(**intensities),
    )


def _opened(**stored: Stored | None) -> dict[str, OmeZarrImage]:
    """Open what was given and see that it can be compared."""
    if (stored["truth"] is None) != (stored["image"] is None):
        raise ValueError("`truth` and `image` are compared with each other; give both, or None for both")
    if stored["labels"] is not None and stored["true_labels"] is None:
        raise ValueError("`labels` are compared with `true_labels`; give these as well")
    if stored["image"] is None and stored["labels"] is None:
        raise ValueError(
            "there is nothing to compare: give `truth` and `image`, or `true_labels` and `labels`"
        )
    opened = {name: open_source(one) for name, one in stored.items() if one is not None}
    first = next(iter(opened.values()))
    for name, one in opened.items():
        if (one.n_t, *one.spatial_shape) != (first.n_t, *first.spatial_shape):
            raise ValueError(
                f"`{name}` {one.path} has {one.n_t} time points of {one.spatial_shape} voxels, {first.path} has "
                f"{first.n_t} of {first.spatial_shape}; they must be the same"
            )
        if one.n_c != 1:
            raise ValueError(f"`{name}` {one.path} has {one.n_c} channels; choose one with `select(c=...)`")
        if "labels" in name and one.dtype.kind not in "iu":
            raise ValueError(f"`{name}` {one.path} are {one.dtype}, not integers; store them as integers")
    return opened


def _voxel_size(opened: Mapping[str, OmeZarrImage]) -> tuple[float, ...] | None:
    """Return the micrometres per axis of the truth, or of the image where only that one tells."""
    known = [opened[name] for name in ("truth", "image") if name in opened and opened[name].calibrated]
    return tuple(float(v) for v in known[0].voxel_size) if known else None


def _check_library(readers: Readers) -> None:
    if readers.objects is None:
        return
    try:
        import numba  # noqa: F401
    except ImportError:
        raise ImportError(
            'intensities of objects are added by numba: pip install "chunkrestore[tables]"'
        ) from None


def _grid(opened: Mapping[str, OmeZarrImage], block_shape: Sequence[int] | None) -> BlockGrid:
    shape = next(iter(opened.values())).spatial_shape
    check_shape(shape)
    if block_shape is None:
        units = zip(*(one.source().spatial_chunks for one in opened.values()), strict=True)
        block_shape = default_block(shape, tuple(map(max, units)))
    cut = tuple(min(int(b), n) for b, n in zip(block_shape, shape, strict=False))
    grid = BlockGrid.regular(shape, tuple(block_shape) if len(block_shape) != len(shape) else cut)
    check_count(shape, cut, next(iter(opened.values())).n_t)
    return grid


def _plan(opened: Mapping[str, OmeZarrImage], grid: BlockGrid) -> dict[str, Any]:
    """Return what the report and the events tell of what is to be done."""
    first = next(iter(opened.values()))
    n_voxels = first.n_t
    for n in first.spatial_shape:
        n_voxels *= n
    return {
        "shape": list(first.spatial_shape),
        "n_timepoints": first.n_t,
        "n_channels": 1,
        "read_nbytes": n_voxels * sum(one.dtype.itemsize for one in opened.values()),
        "passes": [
            {
                "operators": [{"operator": "score", "of": sorted(opened)}],
                "depth": [[0] * len(grid.edges)],
                "block_shape": [edges[1] for edges in grid.edges],
                "n_blocks": list(grid.n_blocks),
                "halo_overhead": 1.0,
                "read_amplification": None,
            }
        ],
    }

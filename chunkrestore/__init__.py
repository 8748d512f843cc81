"""Deconvolve, restore and segment microscopy volumes far larger than memory: tiled equals untiled.

Names are imported on first use, so that ``import chunkrestore`` loads neither zarr nor distributed nor any
deep-learning or GPU library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chunkrestore.api import apply, classify, deconvolve, merge_labels, percentiles, restore, segment
    from chunkrestore.comparison import compare
    from chunkrestore.jobs.convert import convert
    from chunkrestore.jobs.fields import resume_fields, run_fields
    from chunkrestore.jobs.measure import measure
    from chunkrestore.jobs.prepare import estimate, plan
    from chunkrestore.jobs.pyramids import build_pyramid
    from chunkrestore.jobs.run import resume, run
    from chunkrestore.jobs.score import score
    from chunkrestore.jobs.status import status
    from chunkrestore.jobs.verify import verify
    from chunkrestore.lazy_resampled import resample
    from chunkrestore.ome_zarr import (
        export_tiff,
        open_collection,
        open_image,
        open_source,
        write_image,
        write_labels,
    )
    from chunkrestore.operators.axial import IsotropicCare, UpsamplingCare
    from chunkrestore.operators.care import Care
    from chunkrestore.operators.gradient_consensus import GradientConsensus
    from chunkrestore.operators.labeller import Labeller
    from chunkrestore.operators.richardson_lucy import RichardsonLucy
    from chunkrestore.operators.semantic import ClassProbability, Semantic, StarDistClasses
    from chunkrestore.operators.smoothing import DifferenceOfGaussians, Gaussian, Median, TopHat
    from chunkrestore.operators.stardist import StarDist
    from chunkrestore.operators.storing import AsType
    from chunkrestore.operators.threshold import LocalThreshold, Threshold
    from chunkrestore.operators.unmatched import UnmatchedRichardsonLucy
    from chunkrestore.operators.watershed import Watershed
    from chunkrestore.operators.wiener import Wiener
    from chunkrestore.psf.varying import PsfField
    from chunkrestore.viewer import view

_HOME = {
    "apply": "chunkrestore.api",
    "classify": "chunkrestore.api",
    "deconvolve": "chunkrestore.api",
    "resample": "chunkrestore.lazy_resampled",
    "restore": "chunkrestore.api",
    "segment": "chunkrestore.api",
    "percentiles": "chunkrestore.api",
    "merge_labels": "chunkrestore.api",
    "run": "chunkrestore.jobs.run",
    "plan": "chunkrestore.jobs.prepare",
    "estimate": "chunkrestore.jobs.prepare",
    "resume": "chunkrestore.jobs.run",
    "run_fields": "chunkrestore.jobs.fields",
    "resume_fields": "chunkrestore.jobs.fields",
    "convert": "chunkrestore.jobs.convert",
    "build_pyramid": "chunkrestore.jobs.pyramids",
    "measure": "chunkrestore.jobs.measure",
    "score": "chunkrestore.jobs.score",
    "compare": "chunkrestore.comparison",
    "view": "chunkrestore.viewer",
    "status": "chunkrestore.jobs.status",
    "verify": "chunkrestore.jobs.verify",
    "open_image": "chunkrestore.ome_zarr",
    "open_source": "chunkrestore.ome_zarr",
    "open_collection": "chunkrestore.ome_zarr",
    "export_tiff": "chunkrestore.ome_zarr",
    "write_image": "chunkrestore.ome_zarr",
    "write_labels": "chunkrestore.ome_zarr",
    "AsType": "chunkrestore.operators.storing",
    "RichardsonLucy": "chunkrestore.operators.richardson_lucy",
    "GradientConsensus": "chunkrestore.operators.gradient_consensus",
    "UnmatchedRichardsonLucy": "chunkrestore.operators.unmatched",
    "Wiener": "chunkrestore.operators.wiener",
    "PsfField": "chunkrestore.psf.varying",
    "Care": "chunkrestore.operators.care",
    "IsotropicCare": "chunkrestore.operators.axial",
    "UpsamplingCare": "chunkrestore.operators.axial",
    "Gaussian": "chunkrestore.operators.smoothing",
    "DifferenceOfGaussians": "chunkrestore.operators.smoothing",
    "Median": "chunkrestore.operators.smoothing",
    "TopHat": "chunkrestore.operators.smoothing",
    "Labeller": "chunkrestore.operators.labeller",
    "Semantic": "chunkrestore.operators.semantic",
    "ClassProbability": "chunkrestore.operators.semantic",
    "StarDist": "chunkrestore.operators.stardist",
    "StarDistClasses": "chunkrestore.operators.semantic",
    "Threshold": "chunkrestore.operators.threshold",
    "LocalThreshold": "chunkrestore.operators.threshold",
    "Watershed": "chunkrestore.operators.watershed",
}

__all__ = [
    "AsType",
    "Care",
    "ClassProbability",
    "DifferenceOfGaussians",
    "Gaussian",
    "GradientConsensus",
    "IsotropicCare",
    "Labeller",
    "LocalThreshold",
    "Median",
    "PsfField",
    "RichardsonLucy",
    "Semantic",
    "StarDist",
    "StarDistClasses",
    "Threshold",
    "TopHat",
    "UnmatchedRichardsonLucy",
    "UpsamplingCare",
    "Watershed",
    "Wiener",
    "apply",
    "build_pyramid",
    "classify",
    "compare",
    "convert",
    "deconvolve",
    "estimate",
    "export_tiff",
    "measure",
    "merge_labels",
    "open_collection",
    "open_image",
    "open_source",
    "percentiles",
    "plan",
    "resample",
    "restore",
    "resume",
    "resume_fields",
    "run",
    "run_fields",
    "score",
    "segment",
    "status",
    "verify",
    "view",
    "write_image",
    "write_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkrestore' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

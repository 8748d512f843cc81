"""How good a result is: against a truth, against an independent repeat, against the untiled result.

Images are compared as they are: nothing is rescaled unless a function is told to. All sums are float64. `psnr`,
`ssim`, `fsc` and `match_instances` take arrays in memory; `score_image` and `score_labels` give all of their figures
for volumes of any size, block by block, and `chunkrestore.jobs.score` does so for stores, on a cluster.
"""

from chunkrestore.metrics.blocks import ImageScore
from chunkrestore.metrics.images import SeamError, psnr, seam_error, ssim
from chunkrestore.metrics.instances import (
    InstanceDifference,
    InstanceScore,
    LabelScore,
    match_instances,
    same_instances,
)
from chunkrestore.metrics.shells import ShellCorrelation, fsc
from chunkrestore.metrics.volumes import score_image, score_labels

__all__ = [
    "ImageScore",
    "InstanceDifference",
    "InstanceScore",
    "LabelScore",
    "SeamError",
    "ShellCorrelation",
    "fsc",
    "match_instances",
    "psnr",
    "same_instances",
    "score_image",
    "score_labels",
    "seam_error",
    "ssim",
]

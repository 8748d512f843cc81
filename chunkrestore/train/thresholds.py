"""The two thresholds of a StarDist model, chosen on data that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from chunkrestore import models


def optimize_thresholds(
    folder: str | Path,
    images: Sequence[npt.ArrayLike],
    labels: Sequence[npt.ArrayLike],
    *,
    nms_threshs: Sequence[float] = (0.3, 0.4),
    iou_threshs: Sequence[float] = (0.5, 0.7),
) -> dict[str, float]:
    """Choose the probability and overlap thresholds of a StarDist folder on images it was not trained on.

    StarDist's own search: for each overlap threshold, the probability threshold with the greatest accuracy
    (true positives over all found or missed), averaged over `iou_threshs`.

    Parameters
    ----------
    folder
        StarDist2D or StarDist3D model folder; its ``thresholds.json`` is written.
    images, labels
        Pairs of normalised images ``(*spatial[, channels])`` and instance labels, such as the validation patches.
        Objects that a face cuts count as well, so a few large images are better than many small ones.
    nms_threshs
        Overlap thresholds to try.
    iou_threshs
        Overlaps with a true object from which on an object counts as found.

    Returns
    -------
    dict
        ``{"prob": ..., "nms": ...}``, as written to ``thresholds.json``.

    Raises
    ------
    ValueError
        If the folder is no StarDist model, images and labels are not paired, or no label marks an object.
    """
    folder = Path(folder)
    models.kind(folder, "stardist2d", "stardist3d")
    truth = [np.asarray(label) for label in labels]
    if len(truth) != len(images) or not any(label.any() for label in truth):
        raise ValueError(
            f"thresholds need as many `labels` as `images` ({len(truth)}, {len(images)}), and objects in them"
        )
    model = models.load(folder)
    with models.quiet():
        model.optimize_thresholds(
            [np.asarray(image, dtype=np.float32) for image in images],
            truth,
            nms_threshs=list(nms_threshs),
            iou_threshs=list(iou_threshs),
            # In one piece: StarDist's own tiling would change predictions near the tiles' borders.
            predict_kwargs={"show_tile_progress": False, "n_tiles": None},
            optimize_kwargs={"verbose": 0},
        )
    return {key: float(value) for key, value in json.loads((folder / "thresholds.json").read_text()).items()}

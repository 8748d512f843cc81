"""What a trained network scores on patches that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkrestore import models
from chunkrestore.kernels.network import run_network
from chunkrestore.train.fit import with_channels

if TYPE_CHECKING:
    from chunkrestore.train.patches import Patches

Array = npt.NDArray[Any]

N_SHOWN = 4
"""Patches that are kept for pictures."""
_OVERLAPS = (0.5, 0.7)


@dataclass(frozen=True)
class Validation:
    """Scores on the validation patches, and a few of them with what the network made of them."""

    scores: dict[str, Any]
    """JSON; empty without validation patches."""
    shown: tuple[tuple[Array, Array, Array], ...]
    """Input, what the network made of it, target: spatial axes only."""


def validate(folder: str | Path, patches: Patches) -> Validation:
    """Score a CARE or StarDist folder on the validation patches.

    Parameters
    ----------
    folder
        Model folder.
    patches
        Those that it was trained on.

    Returns
    -------
    Validation
        CARE: peak signal-to-noise ratio (decibels, over all patches together, with the range of all targets) and
        structural similarity of inputs and predictions, in normalised intensities; of noise-only patches, whose
        truth nobody knows, nothing. StarDist: objects that match a true one by at least 0.5 and 0.7, counted over all
        patches, and the share of the matched ones with the right class.

    Raises
    ------
    ValueError
        If the folder is no CARE or StarDist model.
    """
    kind = models.kind(folder)
    if not len(patches.x_validation):
        return Validation({}, ())
    return (_restored if kind == "care" else _segmented)(folder, patches)


def _restored(folder: str | Path, patches: Patches) -> Validation:
    network = models.load(folder).keras_model
    truth, is_known = patches.y_validation, patches.described.get("strategy") != "noise-only"
    data_range = float(truth.max() - truth.min())
    squared, similar = np.zeros(2), np.zeros(2)
    shown: list[tuple[Array, Array, Array]] = []
    for x, y in zip(patches.x_validation, truth, strict=True):
        made = run_network(network, np.ascontiguousarray(x[..., np.newaxis]))[0][..., 0]
        if len(shown) < N_SHOWN:
            shown.append((x, made, y))
        if is_known:
            squared += [np.mean((image - y) ** 2, dtype=np.float64) for image in (x, made)]
            similar += [_ssim(y, image, data_range) for image in (x, made)]
    if not is_known or not data_range > 0:
        return Validation({"n_patches": len(truth)}, tuple(shown))
    before, after = 10 * np.log10(data_range**2 * len(truth) / np.maximum(squared, 1e-30))
    scores = {
        "n_patches": len(truth),
        "psnr_input_db": round(float(before), 2),
        "psnr_db": round(float(after), 2),
        "gain_db": round(float(after - before), 2),
    }
    if min(truth.shape[1:]) >= 7:
        scores |= zip(("ssim_input", "ssim"), (round(float(s) / len(truth), 4) for s in similar), strict=True)
    return Validation(scores, tuple(shown))


def _ssim(truth: Array, image: Array, data_range: float) -> float:
    from chunkrestore.metrics import ssim

    return ssim(truth, image, data_range=data_range) if min(truth.shape) >= 7 else 0.0


def _segmented(folder: str | Path, patches: Patches) -> Validation:
    from chunkrestore.metrics import match_instances

    counts, classes = np.zeros((len(_OVERLAPS), 3), int), np.zeros(2, int)
    shown: list[tuple[Array, Array, Array]] = []
    for k, (image, found, class_of) in enumerate(_found(folder, patches)):
        truth = patches.y_validation[k]
        for row, overlap in zip(counts, _OVERLAPS, strict=True):
            score = match_instances(truth, found, iou=overlap)
            row += (score.n_true, score.n_pred, score.tp)
        if class_of is not None and patches.classes_validation is not None:
            classes += _right_classes(truth, patches.classes_validation[k], found, class_of)
        if len(shown) < N_SHOWN:
            shown.append((image, found, truth))
    scores: dict[str, Any] = {
        "n_patches": len(patches.x_validation),
        "n_true": int(counts[0, 0]),
        "n_found": int(counts[0, 1]),
    }
    for (n_true, n_found, n_matched), overlap in zip(counts.tolist(), _OVERLAPS, strict=True):
        scores[f"f1_iou_{overlap}"] = round(2 * n_matched / max(1, n_true + n_found), 4)
    if patches.classes_validation is not None:
        scores["class_accuracy"] = round(int(classes[0]) / max(1, int(classes[1])), 4)
    return Validation(scores, tuple(shown))


def _found(folder: str | Path, patches: Patches) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yield the first channel, the found labels and the class of every label (index: label id) of each patch."""
    model, n_dim = models.load(folder), patches.y.ndim - 1
    for x in with_channels(patches.x_validation, n_dim):
        found, details = model.predict_instances(x, axes="ZYXC"[-n_dim - 1 :], show_tile_progress=False)
        class_of = None if "class_id" not in details else np.concatenate([[0], details["class_id"]])
        yield x[..., 0], found, class_of


def _right_classes(truth: Array, classes: Array, found: Array, class_of: Array) -> tuple[int, int]:
    """Return how many found objects have the class that most of their voxels have in truth, of how many.

    Asked of objects that lie in true ones of known class with more than half of their voxels.
    """
    n_right = n_asked = 0
    for label in np.unique(found[found > 0]):
        inside = classes[(found == label) & (truth > 0)]
        known = inside[inside > 0]
        if 2 * len(known) > np.count_nonzero(found == label):
            n_asked += 1
            n_right += int(np.bincount(known).argmax() == class_of[label])
    return n_right, n_asked

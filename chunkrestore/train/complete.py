"""What follows a training: thresholds, scores, receptive field, model card and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chunkrestore import models
from chunkrestore.train.card import model_card
from chunkrestore.train.receptive_field import receptive_field
from chunkrestore.train.report import training_report
from chunkrestore.train.thresholds import optimize_thresholds
from chunkrestore.train.validation import validate

if TYPE_CHECKING:
    from chunkrestore.train.fit import Trained
    from chunkrestore.train.patches import Patches


def complete(
    trained: Trained,
    patches: Patches,
    *,
    voxel_size: Sequence[float] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Choose thresholds (StarDist), score, measure the receptive field, and write card and report.

    All of it on the validation patches; without them, thresholds stay StarDist's defaults and there are no scores.
    So the thresholds and the scores of a StarDist model come from the same patches, and the scores are a little too
    good: the thresholds are two numbers, chosen for them.

    Parameters
    ----------
    trained, patches
        What `train_care` or `train_stardist` returned, and what it was given.
    voxel_size
        Micrometres per axis, to be noted and drawn.
    entries
        As for `model_card`.

    Returns
    -------
    dict
        The model card, as written to ``model_card.json``; ``training.html`` lies beside it.
    """
    held = patches.x_validation
    is_stardist = models.kind(trained.folder) != "care"
    if is_stardist and patches.y_validation.any():
        optimize_thresholds(trained.folder, list(held), list(patches.y_validation))
    validation = validate(trained.folder, patches)
    field = receptive_field(
        trained.folder,
        voxel_size=voxel_size,
        seed=trained.settings["seed"],
        image=held[0] if len(held) else None,
    )
    card = model_card(trained, patches, validation=validation, field=field, entries=entries)
    training_report(trained, card, validation=validation, field=field)
    return card

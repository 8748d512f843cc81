"""Model cards: what a network is, what it was trained on, how, and how well it does; for people and programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from chunkrestore import models
from chunkrestore.kernels.network import care_geometry, stardist_geometry
from chunkrestore.train.receptive_field import ReceptiveField
from chunkrestore.train.validation import Validation

if TYPE_CHECKING:
    from chunkrestore.train.fit import Trained
    from chunkrestore.train.patches import Patches

SCHEMA = "chunkrestore-model-card/1"
FILE = "model_card.json"
_PACKAGES = ("chunkrestore", "tensorflow", "keras", "csbdeep", "stardist", "numpy", "scipy")


def model_card(
    trained: Trained,
    patches: Patches,
    *,
    validation: Validation | None = None,
    field: ReceptiveField | None = None,
    entries: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``model_card.json`` beside the weights of a trained model.

    Parameters
    ----------
    trained
        What `train_care` or `train_stardist` returned; for StarDist after `optimize_thresholds`, since thresholds
        are part of the model that the digest names.
    patches
        What it was trained on: where they come from and by which percentiles they are normalised.
    validation
        Scores, from `validate`.
    field
        Receptive field, from `receptive_field`.
    entries
        What else the card is to say, such as ``task``, ``licence`` or ``scores`` on other data; takes precedence,
        but for ``scores``, which are added to those of `validation`.

    Returns
    -------
    dict
        The card.
    """
    folder, kind = trained.folder, models.kind(trained.folder)
    geometry = (care_geometry if kind == "care" else stardist_geometry)(models.config(folder))
    scores = {"validation": validation.scores} if validation and validation.scores else {}
    extra = dict(entries or {})
    scores |= extra.pop("scores", {})
    card: dict[str, Any] = {
        "schema": SCHEMA,
        "name": folder.name,
        "kind": kind,
        "digest": models.digest(folder),
        "parameters": int(models.load(folder).keras_model.count_params()),
        "data": patches.described,
        "normalization": normalization(patches),
        "training": _training(trained),
        "scores": scores,
        "halo_voxels": list(geometry.depth),
        "pooling_grid": list(geometry.align),
        "receptive_field": field.describe() if field else None,
        "versions": _versions(),
    }
    if kind != "care":
        card["thresholds"] = dict(zip(("prob", "nms"), models.thresholds(folder), strict=True))
    card |= extra
    text = json.dumps(card, indent=2, default=_plain)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
    written: dict[str, Any] = json.loads(text)
    return written


def read_card(model: Any) -> dict[str, Any]:
    """Return the card of a model folder or a shipped model, empty if it has none."""
    path = models.folder(model) / FILE
    if not path.is_file():
        return {}
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def origin(image: Any) -> dict[str, Any]:
    """Return what a stored image says of itself: path, voxel size, microscope or simulation, as JSON.

    Parameters
    ----------
    image
        Anything that `chunkrestore.open_source` opens.
    """
    from chunkrestore.ome_zarr import open_source
    from chunkrestore.psf.metadata import acquisition

    opened = open_source(image)
    made = opened.attributes.get("chunkrestore")
    try:
        optics = acquisition(opened.attributes)
    except (ValueError, KeyError, TypeError):
        optics = {}
    return {
        "image": opened.path,
        "voxel_size_um": list(opened.voxel_size) if opened.calibrated else None,
        "microscope": optics or None,
        "made_by": made,
    }


def normalization(patches: Patches) -> dict[str, Any]:
    """Return how images must be normalised for the network, as far as the patches know."""
    described = patches.described
    return {
        "percentiles": described.get("percentiles"),
        "of": "each whole volume and channel",
        "low_high": [volume["normalization"] for volume in described.get("volumes", [])],
    }


def _training(trained: Trained) -> dict[str, Any]:
    history = trained.history
    least = min((value for _, value in history.validation), default=None)
    return trained.settings | {
        "steps_done": len(history.loss),
        "best_step": history.best_step,
        "stopped_by": history.stopped,
        "seconds": round(history.seconds, 1),
        "last_loss": float(history.loss[-1]),
        "least_validation_loss": least,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """Return NumPy numbers and arrays, tuples and paths as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) else str(value)

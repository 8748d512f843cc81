"""Semantic segmentation: the class of every voxel, block by block as if in one piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from chunkrestore import models
from chunkrestore.grid import Block
from chunkrestore.kernels.precision import Precision
from chunkrestore.operators.base import Table, concatenate
from chunkrestore.operators.intensities import Limits
from chunkrestore.operators.stardist import StarDist
from chunkrestore.operators.voxel_network import VoxelNetwork, check_n_classes

By: TypeAlias = Literal["objects", "voxels"]
"""What has a class."""


@dataclass(frozen=True)
class Semantic(VoxelNetwork):
    """Tell the class of every voxel with a network that predicts probabilities of classes.

    The same labels, voxel by voxel, for every block grid: those of the network on the whole volume, normalised, and
    padded at its end by reflection to whole cells of the pooling grid::

        label = argmax over channels              several channels; channel 0 is the background, ties go to the lowest
        label = 1 where probability > threshold   one channel

    Preserves shape. Labels are 8-bit.

    Parameters
    ----------
    model
        A Keras model with one image as input and one output with an element per voxel, channels last, in one file
        (``.keras``, or ``.h5``); or a StarDist model that knows classes (folder or object), whose probabilities of
        classes are taken. StarDist predicts them on its grid: a voxel takes those of the nearest point.
    class_names
        Names of the classes, without background, in the order of the labels from 1 on.
    threshold
        What one channel must exceed.
    normalization
        Input intensities (low, high) that the network sees as 0 and 1, or one such pair per channel; None takes
        `percentiles` of each channel. For a network that was trained on intensities as they are: (0, 1).
    percentiles
        Percentiles of the whole volume and channel that give `normalization`.
    depth
        Halo in voxels, one number or one per axis; None takes the network's receptive field, which is also the
        smallest depth accepted.
    align
        Voxels per axis of the network's pooling grid, for networks with layers whose reach is not known; then `depth`
        is needed as well, and with layers that cannot be followed `class_names`. Whether tiled equals untiled is then
        yours to know: normalisation over space, say, never does. None derives both from the layers.
    digest
        Digest that the model must have (`chunkrestore.models.digest`); None takes the one it has now.
    precision
        What the network computes in, as for `chunkrestore.operators.care.Care`; classes of voxels between two
        classes may differ then.

    Raises
    ------
    ValueError
        If the model is missing, holds code, or cannot be tiled (the message names the layer), or another parameter
        is out of its range.

    Notes
    -----
    "Same" padding of a layer puts zeros (in the layer's own input) beyond the volume's border, as it does untiled, and
    nowhere else.
    """

    model: Any
    _: KW_ONLY
    class_names: Sequence[str] | None = None
    threshold: float = 0.5
    normalization: Limits | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    depth: int | Sequence[int] | None = None
    align: int | Sequence[int] | None = None
    digest: str | None = None
    precision: Precision = "float32"

    name = "semantic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.threshold):
            raise ValueError(f"`threshold` must be finite, got {self.threshold}")

    @property
    def classes(self) -> Mapping[int, str | None]:
        """Every label but 0 with its name, if it has one."""
        return _named(self.class_names, self.n_classes)

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return uint8."""
        return np.dtype(np.uint8)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {**super().describe(), "threshold": self.threshold}

    def _chosen(self, scores: np.ndarray) -> np.ndarray:
        if scores.shape[-1] == 1:
            return (scores[..., 0] > self.threshold).astype(np.uint8)
        return scores.argmax(axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class ClassProbability(VoxelNetwork):
    """Return the probability that a network predicts for one class, as an image: float32, of the same shape.

    Exact for every block grid, as `Semantic` is, whose parameters it has but for these:

    Parameters
    ----------
    label
        Which class, from 1 on, or 0 for the background (of networks with several channels).

    Raises
    ------
    ValueError
        If there is no such class, or as `Semantic`.
    """

    model: Any
    _: KW_ONLY
    label: int = 1
    class_names: Sequence[str] | None = None
    normalization: Limits | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    depth: int | Sequence[int] | None = None
    align: int | Sequence[int] | None = None
    digest: str | None = None
    precision: Precision = "float32"

    name = "class-probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label not in range(self.n_classes + 1):
            raise ValueError(f"`label` {self.label} is no class of {self.model}: 0 to {self.n_classes}")

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        super().check(shape, dtype)
        if self.n_channels > 1:
            raise ValueError(
                f"`model` {self.model} takes {self.n_channels} channels together; {self.name} makes an image of each "
                "channel, only networks with one can be used"
            )

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {**super().describe(), "label": self.label}

    def _chosen(self, scores: np.ndarray) -> np.ndarray:
        if scores.shape[-1] > 1:
            return scores[..., self.label]
        return scores[..., 0] if self.label else 1 - scores[..., 0]


@dataclass(frozen=True)
class StarDistClasses(StarDist):
    """Tell for every voxel the class of the object that lies there, with a StarDist network that knows classes.

    ``label = class_id[instance]``, of ``predict_instances`` on the whole volume: all voxels of an object have its one
    class, and outlines are those of the objects, at full resolution. Objects that the network takes for background
    (class 0) are background.

    Preserves shape. Labels are 8-bit.

    Parameters
    ----------
    model
        Folder of a trained StarDist2D or StarDist3D model with classes, or an object that is saved in a folder.
    class_names
        Names of the classes, without background, in the order of the labels from 1 on.
    **others
        As for `chunkrestore.operators.stardist.StarDist`.

    Raises
    ------
    ValueError
        If the model knows no classes, or as `StarDist`.
    """

    name = "stardist-classes"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_n_classes(self.n_classes, self.model)

    @property
    def classes(self) -> Mapping[int, str | None]:
        """Every label but 0 with its name, if it has one."""
        return _named(self.class_names, self.n_classes)

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return uint8."""
        return np.dtype(np.uint8)

    def paint(self, block: Block, numbered: Sequence[Table]) -> np.ndarray:
        """Return the classes of the core; where objects overlap, the better score shows."""
        if not numbered:
            return np.zeros(block.core_shape, np.uint8)
        rows = concatenate(numbered)
        places = super().paint(block, [rows | {"ids": np.arange(1, len(rows["ids"]) + 1)}])
        classes: np.ndarray = np.concatenate([[0], rows["class_prob"].argmax(axis=-1)]).astype(np.uint8)
        return classes[places]


def classifier(model: Any, *, by: By | None = None, **parameters: Any) -> Semantic | StarDistClasses:
    """Return the operator that tells classes of voxels with a model.

    Parameters
    ----------
    model
        As for `Semantic` or `StarDistClasses`.
    by
        ``"voxels"``: what the network predicts for each voxel; ``"objects"``: of a StarDist model, the class of the
        object that lies there. None: objects where the model finds any, since labels then agree with those of the
        objects, and no object is of two classes.
    **parameters
        Further parameters of the operator; those that are None are left out.

    Raises
    ------
    ValueError
        If the model cannot do that.
    """
    finds_objects = models.kind(model, *Semantic._kinds) != "keras"
    if by not in (None, "objects", "voxels") or (by == "objects" and not finds_objects):
        raise ValueError(f"`by` must be 'voxels' or, with a StarDist model, 'objects'; got {by!r}")
    kind = StarDistClasses if finds_objects and by != "voxels" else Semantic
    known = {field.name for field in fields(kind) if field.init}
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no parameter of {kind.name}; it takes {', '.join(sorted(known))}"
        )
    return kind(model, **given)


def _named(names: Sequence[str] | None, n_classes: int) -> dict[int, str | None]:
    return {k + 1: None if names is None else names[k] for k in range(n_classes)}

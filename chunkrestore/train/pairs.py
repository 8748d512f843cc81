"""Pairs of a stored image and what a network should make of it, opened and checked from metadata alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from chunkrestore.ome_zarr import OmeZarrImage, check_dtype, open_source, select_channel
from chunkrestore.train.walking import Plane

Source: TypeAlias = str | os.PathLike[str] | OmeZarrImage


@dataclass(frozen=True)
class Pair:
    """A stored image and what a network should make of it: another image, its objects, or itself."""

    image: Source
    """Anything that `chunkrestore.open_source` opens."""
    target: Source | None = None
    """The image to learn, or what holds the labels if it is not `image`. Without target and labels the image is
    learnt from its own noise."""
    labels: str | None = None
    """Name of the labels to learn, in `target` or else in `image`; not needed if `target` is a label image."""
    channel: str | int | Sequence[str | int] | None = None
    """Channel of the image, by name or index; several if the network takes them together. Needed if there are more
    than one."""
    target_channel: str | int | None = None
    """Channel of the target; that of the image by default if there are more than one."""
    timepoint: int | None = None
    """Needed if there are more than one."""
    level: int = 0
    """Resolution of both."""
    classes: str | Mapping[int, int] | None = None
    """Class of each object, from 1: a mapping from label ids, or the name of labels that hold the class of every voxel.
    An object that the mapping does not name counts as of no known class (-1)."""
    own_numbers: bool = False
    """Whether a target image is normalised by its own percentiles, and not by those of the input. The latter make a
    network return intensities in units of its input."""
    sample: str | None = None
    """Name of what was imaged. The same place of one sample is never in training and validation patches of different
    pairs; by default, pairs with the same target show the same sample."""


@dataclass(frozen=True)
class OpenedPair:
    """A pair, opened and checked."""

    pair: Pair
    """What was asked for."""
    image: tuple[Plane, ...]
    """The channels of the input."""
    target: Plane
    """Image or labels to learn."""
    classes: Plane | None
    """Class of every voxel, where labels hold it."""
    is_labels: bool
    """Whether `target` holds labels."""

    @property
    def is_own_target(self) -> bool:
        """Whether the image is learnt from its own noise."""
        return self.pair.target is None and not self.is_labels

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per spatial axis."""
        return self.target.shape

    @property
    def sample(self) -> str:
        """What was imaged; pairs of one sample share their cells."""
        return self.pair.sample or str(sorted(self.target.describe().items()))


def open_pair(pair: Pair, i: int) -> OpenedPair:
    """Open what pair number `i` names, and check that it fits together.

    Raises
    ------
    FileNotFoundError, ValueError
        As for `chunkrestore.train.drawing.draw_patches`.
    """
    image = open_source(pair.image)
    several = isinstance(pair.channel, Sequence) and not isinstance(pair.channel, str)
    channels: Sequence[Any] = pair.channel if several else [pair.channel]  # type: ignore[assignment]
    inputs = tuple(_plane(image, pair.timepoint, c, pair.level, i) for c in channels)
    check_dtype(image.dtype, f"pair {i}: image {image.path}")
    holder = image if pair.target is None else open_source(pair.target)
    target = holder if pair.labels is None else holder.label(pair.labels)
    is_labels = pair.labels is not None or (pair.target is not None and target.is_labels)
    if not is_labels:
        check_dtype(target.dtype, f"pair {i}: target {target.path}")
    channel = pair.target_channel
    if channel is None and target.n_c > 1 and len(channels) == 1:
        channel = channels[0]
    learnt = _plane(target, pair.timepoint if target.n_t > 1 else None, channel, pair.level, i)
    if inputs[0].shape != learnt.shape:
        raise ValueError(
            f"pair {i}: at level {pair.level}, image {image.path} has shape {inputs[0].shape} and target {target.path} "
            f"{learnt.shape}; a pair shows the same voxels"
        )
    return OpenedPair(pair, inputs, learnt, _class_labels(pair, holder, learnt, i), is_labels)


def _class_labels(pair: Pair, holder: OmeZarrImage, learnt: Plane, i: int) -> Plane | None:
    """Return the labels that hold classes, if there are any."""
    if pair.classes is None or not isinstance(pair.classes, str):
        if pair.classes is not None and min(pair.classes.values(), default=0) < 1:
            raise ValueError(f"pair {i}: `classes` must map label ids to classes from 1 on")
        return None
    named = holder.label(pair.classes)
    classes = _plane(named, pair.timepoint if named.n_t > 1 else None, None, pair.level, i)
    if classes.shape != learnt.shape:
        raise ValueError(
            f"pair {i}: `classes` {pair.classes!r} have shape {classes.shape}, labels {learnt.shape}"
        )
    return classes


def _plane(image: OmeZarrImage, timepoint: int | None, channel: Any, level: int, i: int) -> Plane:
    """Return one time point and channel, which need not be named where there is one only."""
    for what, given, n in (("timepoint", timepoint, image.n_t), ("channel", channel, image.n_c)):
        if given is None and n > 1:
            raise ValueError(f"pair {i}: {image.path} has {n} of them; say which in `{what}`")
    t = 0 if timepoint is None else int(timepoint)
    c = 0 if channel is None else select_channel(image, channel)
    if not 0 <= t < image.n_t:
        raise ValueError(f"pair {i}: `timepoint` {t} does not exist in {image.path}, which has {image.n_t}")
    return Plane(image.source(level), t, c)


def kind_of(opened: Sequence[OpenedPair]) -> str:
    """Return ``"labels"`` or ``"image"``, whatever is learnt, checking that all pairs agree.

    Raises
    ------
    ValueError
        If they do not.
    """
    if not opened:
        raise ValueError("`pairs` are empty; training needs at least one")
    for what, values in (
        ("labels, or all images", {one.is_labels for one in opened}),
        ("learnt from their own noise, or none", {one.is_own_target for one in opened}),
        ("of as many channels", {len(one.image) for one in opened}),
        ("with `classes`, or all without", {one.pair.classes is not None for one in opened}),
    ):
        if len(values) > 1:
            raise ValueError(f"`pairs` must all be {what}")
    if opened[0].is_own_target and len(opened[0].image) > 1:
        raise ValueError("a network that learns from noise alone takes one `channel`; train one for each")
    if opened[0].pair.classes is not None and not opened[0].is_labels:
        raise ValueError("`classes` are of objects; give `labels` as well")
    return "labels" if opened[0].is_labels else "image"


def check_patch_shape(opened: Sequence[OpenedPair], patch_shape: Sequence[int]) -> tuple[int, ...]:
    """Return `patch_shape` if every volume holds such a patch.

    Raises
    ------
    ValueError
        Otherwise.
    """
    shape = tuple(int(p) for p in patch_shape)
    for i, one in enumerate(opened):
        if len(one.shape) != len(shape):
            axes = one.target.reader.spatial_axes
            raise ValueError(
                f"`patch_shape` {shape} must have one length per axis {axes!r} of pair {i}, {one.shape}"
            )
        if min(shape) < 1 or any(n < p for n, p in zip(one.shape, shape, strict=True)):
            raise ValueError(
                f"`patch_shape` {shape} does not fit into pair {i}, {one.target.name} of {one.shape}; use a smaller one"
            )
    return shape

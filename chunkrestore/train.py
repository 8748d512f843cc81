"""Training of CARE and StarDist models on volumes in memory, into ordinary CSBDeep model folders.

The networks, losses and folder layout (``config.json``, ``weights_best.h5``, ``thresholds.json``) are those
of CSBDeep and StarDist, so every program that reads their models reads these. The loop is ours: one seed
fixes the initial weights, the patches and the augmentation.

Volumes come in normalised (`normalize`), by numbers that belong to the whole volume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore import models

FloatArray: TypeAlias = npt.NDArray[np.float32]
Batch: TypeAlias = tuple[Any, Any]
Progress: TypeAlias = Callable[[int, float], None]


@dataclass(frozen=True)
class Schedule:
    """How long and on what to train."""

    steps: int
    """Optimiser steps."""
    learning_rate: float
    """Peak learning rate of Adam; after a short warm-up it falls to 1 % along half a cosine."""
    batch_size: int = 1
    """Patches per step."""
    patch_shape: tuple[int, ...] = (32, 64, 64)
    """Voxels per axis of a patch; no longer than the smallest volume."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"`steps` {self.steps} and `batch_size` {self.batch_size} must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm_up = min(1.0, (step + 1) / max(1.0, 0.02 * self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warm_up * (0.01 + 0.99 * cosine)


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    folder: Path
    """The model folder."""
    loss: FloatArray
    """Training loss of every step."""


def normalize(image: npt.ArrayLike, low: float, high: float) -> FloatArray:
    """Return ``(image - low) / (high - low)`` as float32.

    Raises
    ------
    ValueError
        If `low` and `high` do not rise.
    """
    if not low < high:
        raise ValueError(f"`low` {low} must lie below `high` {high}: the image is constant between them")
    return (np.asarray(image, dtype=np.float32) - np.float32(low)) / np.float32(high - low)


def train_care(
    inputs: Sequence[npt.ArrayLike],
    targets: Sequence[npt.ArrayLike],
    folder: str | Path,
    *,
    seed: int,
    schedule: Schedule,
    n_first: int = 8,
    depth: int = 2,
    progress: Progress | None = None,
) -> Trained:
    """Train a CARE network to turn `inputs` into `targets`, by mean squared error.

    Each patch is flipped at random along every axis, its rows and columns are exchanged at random, and
    input and target are scaled by one common factor (0.6 to 1.6) and shifted by one common offset (up to
    0.05): the network learns to keep intensities in the units of its input, whatever the percentiles of a
    new volume are.

    Parameters
    ----------
    inputs, targets
        Pairs of normalised volumes of the same shape. Both volumes of a pair are normalised by the same two
        numbers, taken from the input; then a restored image comes out in input units.
    folder
        Model folder to write; must not exist.
    seed
        Seed of the weights, patches and augmentation. Keras keeps random state for the whole process, which
        is reset to this.
    schedule
        Steps, learning rate and patches.
    n_first, depth
        Filters of the first layer, and number of times the network halves the resolution.
    progress
        Called after every step with the number of steps done and the loss.

    Returns
    -------
    Trained
        The folder and the loss of every step.

    Raises
    ------
    ValueError
        If the volumes are missing, not paired, not finite or smaller than a patch, the patch is not a
        multiple of ``2**depth``, or `folder` exists.
    ImportError
        If TensorFlow or CSBDeep is not installed.
    """
    pairs = _checked_pairs(inputs, targets, schedule, 2**depth, second="targets")
    folder = _new_folder(folder)
    _seed_keras(seed)
    from csbdeep.models import CARE, Config

    config = Config(
        axes="ZYX"[-pairs[0][0].ndim :],
        unet_n_depth=depth,
        unet_n_first=n_first,
        unet_kern_size=3,
        train_loss="mse",
        train_learning_rate=schedule.learning_rate,
        train_batch_size=schedule.batch_size,
        train_epochs=1,
        train_steps_per_epoch=schedule.steps,
        train_tensorboard=False,
    )
    model = CARE(config, name=folder.name, basedir=str(folder.parent))
    rng = np.random.default_rng([seed, 1])

    def batch() -> Batch:
        chosen: list[int] = rng.integers(len(pairs), size=schedule.batch_size).tolist()
        patches = [_care_patch(*pairs[i], schedule.patch_shape, rng) for i in chosen]
        x, y = (np.stack(arrays)[..., None] for arrays in zip(*patches, strict=True))
        return x, y

    return Trained(folder, _fit(model, batch, schedule, progress))


def train_stardist(
    images: Sequence[npt.ArrayLike],
    labels: Sequence[npt.ArrayLike],
    folder: str | Path,
    *,
    seed: int,
    schedule: Schedule,
    n_rays: int = 32,
    grid: tuple[int, int, int] = (2, 2, 2),
    n_first: int = 4,
    n_features: int = 16,
    progress: Progress | None = None,
) -> Trained:
    """Train a StarDist3D network (U-Net of depth 2, Fibonacci rays) to find the objects of `labels`.

    Each patch is flipped at random along every axis, its rows and columns are exchanged at random, and the
    image is scaled (0.5 to 2), shifted (up to 0.1) and given faint noise. Four patches in five hold an object.

    Parameters
    ----------
    images, labels
        Pairs of normalised volumes and instance labels (0 = background) of the same shape.
    folder
        Model folder to write; must not exist. Its thresholds are StarDist's defaults until
        `optimize_thresholds` has run.
    seed
        Seed of the weights, patches and augmentation. Keras keeps random state for the whole process, which
        is reset to this.
    schedule
        Steps, learning rate and patches.
    n_rays
        Rays per object.
    grid
        Every how many voxels per axis the network predicts an object; powers of 2.
    n_first, n_features
        Filters of the first layer, and of the last one before the outputs.
    progress
        Called after every step with the number of steps done and the loss.

    Returns
    -------
    Trained
        The folder and the loss of every step.

    Raises
    ------
    ValueError
        If the volumes are missing, not paired, not finite or smaller than a patch, the patch is not a
        multiple of ``4 * grid``, or `folder` exists.
    ImportError
        If TensorFlow, CSBDeep or StarDist is not installed.
    """
    pairs = _checked_pairs(images, labels, schedule, 4 * max(grid), second="labels")
    folder = _new_folder(folder)
    _seed_keras(seed)
    from stardist.models import Config3D, StarDist3D
    from stardist.rays3d import Rays_GoldenSpiral

    rays = Rays_GoldenSpiral(n_rays)
    config = Config3D(
        rays=rays,
        grid=grid,
        unet_n_filter_base=n_first,
        net_conv_after_unet=n_features,
        train_patch_size=schedule.patch_shape,
        train_learning_rate=schedule.learning_rate,
        train_batch_size=schedule.batch_size,
        train_epochs=1,
        train_steps_per_epoch=schedule.steps,
        train_tensorboard=False,
    )
    model = StarDist3D(config, name=folder.name, basedir=str(folder.parent))
    rng = np.random.default_rng([seed, 1])
    foreground = [np.argwhere(_every(labels, 4)) * 4 for _, labels in pairs]

    def batch() -> Batch:
        chosen: list[int] = rng.integers(len(pairs), size=schedule.batch_size).tolist()
        samples = [_stardist_patch(*pairs[i], foreground[i], schedule.patch_shape, rng) for i in chosen]
        return _stardist_batch(samples, rays, grid)

    return Trained(folder, _fit(model, batch, schedule, progress))


def optimize_thresholds(
    folder: str | Path,
    images: Sequence[npt.ArrayLike],
    labels: Sequence[npt.ArrayLike],
    *,
    nms_threshs: Sequence[float] = (0.3, 0.4),
) -> dict[str, float]:
    """Choose the probability and overlap thresholds of a StarDist folder on volumes it was not trained on.

    Parameters
    ----------
    folder
        StarDist3D model folder; its ``thresholds.json`` is written.
    images, labels
        Pairs of normalised volumes and instance labels.
    nms_threshs
        Overlap thresholds to try. The probability threshold is optimised for each of them.

    Returns
    -------
    dict
        ``{"prob": ..., "nms": ...}``, as written to ``thresholds.json``.
    """
    folder = Path(folder)
    models.kind(folder, "stardist3d")
    models.load(folder).optimize_thresholds(
        [np.asarray(image, dtype=np.float32) for image in images],
        [np.asarray(label) for label in labels],
        nms_threshs=list(nms_threshs),
        iou_threshs=[0.5, 0.7],
        predict_kwargs={"show_tile_progress": False},
        optimize_kwargs={"verbose": 0},
    )
    return {key: float(value) for key, value in json.loads((folder / "thresholds.json").read_text()).items()}


def _fit(model: Any, batch: Callable[[], Batch], schedule: Schedule, progress: Progress | None) -> FloatArray:
    """Run the schedule and save the weights where CSBDeep looks for them."""
    model.prepare_for_training()
    network = model.keras_model
    loss = np.zeros(schedule.steps, dtype=np.float32)
    for step in range(schedule.steps):
        network.optimizer.learning_rate = schedule.rate(step)
        x, y = batch()
        # The loss that Keras returns is a running mean since the last reset.
        network.reset_metrics()
        loss[step] = network.train_on_batch(x, y, return_dict=True)["loss"]
        if not np.isfinite(loss[step]):
            raise ValueError(
                f"training diverged at step {step}; lower `learning_rate` {schedule.learning_rate}"
            )
        if progress:
            progress(step + 1, float(loss[step]))
    network.save_weights(str(model.logdir / "weights_best.h5"))
    return loss


def _every(array: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    return array[(slice(None, None, n),) * array.ndim]


def _care_patch(
    x: FloatArray, y: FloatArray, patch_shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    start = [rng.integers(n - p + 1) for n, p in zip(x.shape, patch_shape, strict=True)]
    x, y = _crop_and_turn((x, y), start, patch_shape, rng)
    scale, shift = np.float32(rng.uniform(0.6, 1.6)), np.float32(rng.uniform(-0.05, 0.05))
    return x * scale + shift, y * scale + shift


def _stardist_patch(
    image: FloatArray,
    labels: npt.NDArray[np.int32],
    foreground: npt.NDArray[np.intp],
    patch_shape: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    room = np.array([n - p for n, p in zip(image.shape, patch_shape, strict=True)], dtype=np.intp)
    start = rng.integers(room + 1)
    if len(foreground) and rng.uniform() < 0.8:
        inside = [rng.integers(p) for p in patch_shape]
        start = np.clip(foreground[rng.integers(len(foreground))] - inside, 0, room)
    image, labels = _crop_and_turn((image, labels), start, patch_shape, rng)
    image = image * rng.uniform(0.5, 2.0) + rng.uniform(-0.1, 0.1)
    return (image + rng.normal(0, rng.uniform(0, 0.05), image.shape)).astype(np.float32), labels


def _crop_and_turn(
    arrays: Sequence[npt.NDArray[Any]],
    start: Iterable[Any],
    patch_shape: tuple[int, ...],
    rng: np.random.Generator,
) -> list[npt.NDArray[Any]]:
    """Cut the same patch from every array and turn it in the same way."""
    crop = tuple(slice(a, a + p) for a, p in zip(start, patch_shape, strict=True))
    flips = tuple(slice(None, None, rng.choice((1, -1))) for _ in patch_shape)
    exchange = patch_shape[-1] == patch_shape[-2] and rng.uniform() < 0.5
    patches = [array[crop][flips] for array in arrays]
    return [np.swapaxes(patch, -1, -2) if exchange else patch for patch in patches]


def _stardist_batch(
    samples: Sequence[tuple[FloatArray, npt.NDArray[np.int32]]], rays: Any, grid: tuple[int, int, int]
) -> Batch:
    """Return network input and its two targets: object probability; ray lengths with their weights."""
    from stardist.geometry import star_dist3D
    from stardist.utils import edt_prob

    on_grid = tuple(slice(None, None, g) for g in grid)
    images, probabilities, distances = [], [], []
    for image, labels in samples:
        labels = np.ascontiguousarray(labels)
        probability = edt_prob(labels)[on_grid][..., None].astype(np.float32)
        distance = star_dist3D(labels, rays, grid=grid, mode="cpp")
        images.append(image[..., None])
        probabilities.append(probability)
        distances.append(np.concatenate([distance, probability], axis=-1))
    return np.stack(images), (np.stack(probabilities), np.stack(distances))


def _checked_pairs(
    first: Sequence[npt.ArrayLike],
    second_: Sequence[npt.ArrayLike],
    schedule: Schedule,
    unit: int,
    *,
    second: str,
) -> list[tuple[FloatArray, npt.NDArray[Any]]]:
    """Return the volumes as arrays (float32; int32 if they are labels), or say what is wrong with them."""
    if len(first) == 0 or len(first) != len(second_):
        raise ValueError(
            f"training needs at least one image and as many `{second}`; got {len(first)} and {len(second_)}"
        )
    if any(p % unit for p in schedule.patch_shape):
        raise ValueError(f"`patch_shape` {schedule.patch_shape} must be a multiple of {unit} on every axis")
    pairs = []
    for i, (x, y) in enumerate(zip(first, second_, strict=True)):
        x, y = (
            np.asarray(x, dtype=np.float32),
            np.asarray(y, dtype=np.int32 if second == "labels" else np.float32),
        )
        if x.shape != y.shape or x.ndim != len(schedule.patch_shape):
            raise ValueError(
                f"pair {i}: image {x.shape} and `{second}` {y.shape} must have one shape, with as many axes "
                f"as `patch_shape` {schedule.patch_shape}"
            )
        if any(n < p for n, p in zip(x.shape, schedule.patch_shape, strict=True)):
            raise ValueError(
                f"pair {i}: volume {x.shape} is smaller than `patch_shape` {schedule.patch_shape}"
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"pair {i}: volumes must be finite")
        pairs.append((x, y))
    return pairs


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"`folder` {folder} exists; choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _seed_keras(seed: int) -> None:
    """Check that everything needed is installed, and reset Keras' random state."""
    models.tensorflow()
    try:
        import csbdeep  # noqa: F401
        import keras
        import stardist  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'training needs CSBDeep and StarDist ({error}); pip install "chunkrestore[dl]"'
        ) from error
    keras.utils.set_random_seed(seed)

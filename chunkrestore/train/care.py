"""Training of CARE networks: from a degraded image to a better one, or from a noisy image alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from chunkrestore import models
from chunkrestore.train.fit import (
    Batch,
    FloatArray,
    Progress,
    Trained,
    check_patches,
    fit,
    new_model_folder,
    parts,
    rounds,
)
from chunkrestore.train.schedule import Schedule

if TYPE_CHECKING:
    from chunkrestore.train.patches import Patches


@dataclass(frozen=True)
class CareNetwork:
    """What a CARE network looks like, and what it minimises."""

    n_first: int = 16
    """Filters of the first layer, doubled at every level (32 in CSBDeep's default)."""
    depth: int = 2
    """How often the network halves the resolution."""
    kernel: int = 3
    """Voxels per axis of its convolutions."""
    loss: Literal["mse", "mae"] = "mse"
    """Mean squared or absolute error; not used by probabilistic and noise-only training."""
    probabilistic: bool = False
    """Predict a Laplace distribution per voxel (location and scale), by maximum likelihood."""

    def __post_init__(self) -> None:
        for name in ("n_first", "depth", "kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` {getattr(self, name)} must be at least 1")
        if self.loss not in ("mse", "mae"):
            raise ValueError(f"`loss` {self.loss!r} is not one of mse, mae")


def train_care(
    patches: Patches,
    folder: str | Path,
    *,
    seed: int,
    schedule: Schedule,
    network: CareNetwork | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a CARE network to turn the inputs of patches into their targets.

    Patches of the strategy ``"noise-only"`` hold the same noisy image twice. The network then learns to predict
    voxels that were hidden from it, from their neighbours alone, so that it cannot learn noise that is
    independent from voxel to voxel (Noise2Void). It is saved as an ordinary CARE network.

    Parameters
    ----------
    patches
        Inputs ``(n, *spatial)`` and targets of the same shape, normalised by the same two numbers: then a
        restored image comes out in input units. One channel.
    folder
        Model folder to write; must not exist. It appears when the training is finished.
    seed
        Seed of the weights, the order of patches and the augmentation. Keras keeps random state for the whole
        process, which is reset to this.
    schedule
        Steps or time, learning rate, batch size, early stopping.
    network
        Its size and loss; None: `CareNetwork`'s defaults.
    progress
        Called after every step with a `Moment`.

    Returns
    -------
    Trained
        The folder, with ``config.json``, ``weights_best.h5`` (least validation loss) and ``weights_last.h5``,
        and the losses.

    Raises
    ------
    ValueError
        If the patches do not fit the network, `folder` exists, `schedule` wants to stop early without
        validation patches, or the training diverges.
    ImportError
        If TensorFlow or CSBDeep is not installed.

    References
    ----------
    Weigert et al., Nature Methods 15, 1090 (2018); Krull, Buchholz, Jug, CVPR 2129 (2019), for noise alone.
    """
    network = network or CareNetwork()
    check_patches(patches, schedule, [2**network.depth] * (patches.y.ndim - 1))
    if patches.x.shape != patches.y.shape or patches.is_labels:
        raise ValueError(
            f"CARE learns images from images of one channel; got inputs {patches.x.shape} and targets "
            f"{patches.y.shape} of dtype {patches.y.dtype}"
        )
    hidden = patches.described.get("strategy") == "noise-only"
    if hidden and network.probabilistic:
        raise ValueError("`probabilistic` needs targets; noise-only training has none")
    with new_model_folder(folder, seed) as partial:
        model = _model(partial, network, schedule, patches.y.ndim - 1)
        model.prepare_for_training()
        if hidden:
            model.keras_model.compile(optimizer=model.keras_model.optimizer, loss=_blind_spot_loss)
        rng = np.random.default_rng([seed, 1])
        history = fit(
            model,
            _batches(patches, schedule, rng, hidden=hidden),
            _validation(patches, schedule.batch_size, np.random.default_rng([seed, 2]), hidden=hidden),
            schedule,
            progress,
        )
    settings = {"kind": "care", "seed": seed, "schedule": asdict(schedule), "network": asdict(network)}
    return Trained(Path(folder).expanduser(), history, settings)


def _model(folder: Path, network: CareNetwork, schedule: Schedule, n_dim: int) -> Any:
    from csbdeep.models import CARE, Config

    config = Config(
        axes="ZYX"[-n_dim:],
        probabilistic=network.probabilistic,
        unet_n_depth=network.depth,
        unet_n_first=network.n_first,
        unet_kern_size=network.kernel,
        train_loss="laplace" if network.probabilistic else network.loss,
        train_learning_rate=schedule.learning_rate,
        train_batch_size=schedule.batch_size,
        train_epochs=1,
        train_steps_per_epoch=schedule.steps or 1,
        train_tensorboard=False,
    )
    with models.quiet():
        return CARE(config, name=folder.name, basedir=str(folder.parent))


def _batches(
    patches: Patches, schedule: Schedule, rng: np.random.Generator, *, hidden: bool
) -> Iterator[Batch]:
    """Yield augmented batches without end."""
    from chunkrestore.train.augment import augment_care

    for chosen in rounds(len(patches.x), schedule.batch_size, rng):
        yield _batch(
            [augment_care(patches.x[i], patches.y[i], rng, schedule.patch_shape) for i in chosen],
            rng if hidden else None,
        )


def _validation(patches: Patches, batch_size: int, rng: np.random.Generator, *, hidden: bool) -> list[Batch]:
    pairs = list(zip(patches.x_validation, patches.y_validation, strict=True))
    return [_batch(pairs[part], rng if hidden else None) for part in parts(len(pairs), batch_size)]


def _batch(pairs: Sequence[tuple[FloatArray, FloatArray]], hide_by: np.random.Generator | None) -> Batch:
    """Return network input and target; with a generator, inputs with hidden voxels and what was there."""
    from chunkrestore.train.blind_spots import blind_pair

    if hide_by is not None:
        pairs = [blind_pair(x, hide_by) for x, _ in pairs]
    else:
        pairs = [(x[..., np.newaxis], y[..., np.newaxis]) for x, y in pairs]
    x, y = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return x, y


def _blind_spot_loss(y_true: Any, y_pred: Any) -> Any:
    """Return the mean squared error over hidden voxels alone."""
    import keras

    image, mask = y_true[..., :1], y_true[..., 1:]
    squared = keras.ops.square(y_pred - image) * mask
    return keras.ops.sum(squared) / keras.ops.maximum(keras.ops.sum(mask), 1.0)

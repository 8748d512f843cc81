"""Training of StarDist networks, in two and three dimensions, with channels and classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from chunkrestore import models
from chunkrestore.train.fit import (
    Batch,
    Progress,
    Trained,
    check_patches,
    fit,
    new_model_folder,
    parts,
    rounds,
    with_channels,
)
from chunkrestore.train.schedule import Schedule
from chunkrestore.train.targets import measured_anisotropy, targets

if TYPE_CHECKING:
    from chunkrestore.train.patches import Patches


@dataclass(frozen=True)
class StarDistNetwork:
    """What a StarDist network looks like."""

    n_rays: int = 32
    """Rays per object: at equal angles in 2-D, on a Fibonacci spiral in 3-D."""
    grid: tuple[int, ...] | int = 2
    """Every how many voxels (per axis) the network predicts an object; powers of 2."""
    anisotropy: tuple[float, ...] | Literal["extents"] | None = None
    """How many times shorter objects are, in voxels, per axis (3-D): such as (4, 1, 1) where planes are four
    times as far apart as voxels; ``"extents"`` measures it on the labels; None: objects are about round."""
    n_first: int = 16
    """Filters of the first layer, doubled at every level (32 in StarDist's default)."""
    n_features: int = 32
    """Filters of the last layer before the outputs (128 in StarDist's default)."""
    depth: int = 2
    """How often the U-Net halves the resolution, beyond the grid."""
    n_classes: int | None = None
    """Classes of objects, numbered from 1; None: as many as the patches have, which may be none."""
    class_weights: tuple[float, ...] | None = None
    """Weights of the background and of every class in the loss; None: all 1."""

    def __post_init__(self) -> None:
        for name in ("n_first", "n_features", "depth", "n_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` {value} must be at least 1")
        if self.n_rays < 3:
            raise ValueError(f"`n_rays` {self.n_rays} must be at least 3")
        grid = (self.grid,) if isinstance(self.grid, int) else self.grid
        if any(g < 1 or g & (g - 1) for g in grid):
            raise ValueError(f"`grid` {self.grid} must be powers of 2")
        if self.n_classes is not None:
            self.check_weights(self.n_classes)

    def check_weights(self, n_classes: int | None) -> None:
        """Raise `ValueError` if the class weights are not those of the background and of `n_classes` classes."""
        if self.class_weights is not None and len(self.class_weights) != (n_classes or 0) + 1:
            raise ValueError(
                f"`class_weights` {self.class_weights} must be one for the background and one for each of the "
                f"{n_classes or 0} classes"
            )

    def grid_of(self, n_dim: int) -> tuple[int, ...]:
        """Return the grid per axis.

        Raises
        ------
        ValueError
            If `grid` has another number of axes.
        """
        grid = (self.grid,) * n_dim if isinstance(self.grid, int) else tuple(self.grid)
        if len(grid) != n_dim:
            raise ValueError(f"`grid` {grid} must have {n_dim} axes, as the patches have")
        return grid


def train_stardist(
    patches: Patches,
    folder: str | Path,
    *,
    seed: int,
    schedule: Schedule,
    network: StarDistNetwork | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a StarDist network to find the objects of labelled patches.

    Parameters
    ----------
    patches
        Normalised images ``(n, *spatial[, channels])`` and int32 labels ``(n, *spatial)``, 0 = background; with
        the classes of voxels if objects have classes.
    folder
        Model folder to write; must not exist. It appears when the training is finished. Its thresholds are
        StarDist's defaults until `optimize_thresholds` has run.
    seed
        Seed of the weights, the order of patches and the augmentation. Keras keeps random state for the whole
        process, which is reset to this.
    schedule
        Steps or time, learning rate, batch size, early stopping.
    network
        Rays, grid, size and classes; None: `StarDistNetwork`'s defaults.
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
        If TensorFlow or StarDist is not installed.

    Notes
    -----
    Targets and losses are StarDist's: object probability from the distance to the object's edge, ray lengths
    weighted by it, classes by cross-entropy. Classes are read at the grid's own voxels.

    References
    ----------
    Schmidt et al., MICCAI 265 (2018); Weigert et al., WACV 3655 (2020); classes: Weigert and Schmidt, ISBIC
    (2022).
    """
    network = network or StarDistNetwork()
    n_dim = patches.y.ndim - 1
    check_patches(patches, schedule, [2**network.depth * g for g in network.grid_of(n_dim)])
    if not patches.is_labels:
        raise ValueError(f"StarDist learns from labels (integers); got targets of dtype {patches.y.dtype}")
    n_classes = _n_classes(patches, network)
    with new_model_folder(folder, seed) as partial:
        model = _model(partial, patches, network, schedule, n_classes)
        model.prepare_for_training()
        history = fit(
            model,
            _batches(patches, model.config, schedule, np.random.default_rng([seed, 1])),
            _validation(patches, model.config, schedule.batch_size),
            schedule,
            progress,
        )
    settings = {"kind": f"stardist{n_dim}d", "seed": seed, "schedule": asdict(schedule)}
    return Trained(Path(folder).expanduser(), history, settings | {"network": asdict(network)})


def _n_classes(patches: Patches, network: StarDistNetwork) -> int | None:
    if patches.classes is None:
        if network.n_classes:
            raise ValueError(f"`n_classes` {network.n_classes} needs patches with classes; these have none")
        network.check_weights(None)
        return None
    most = max(1, int(patches.classes.max()))
    if network.n_classes is not None and most > network.n_classes:
        raise ValueError(f"the patches have a class {most}; `n_classes` {network.n_classes} is too small")
    network.check_weights(network.n_classes or most)
    return network.n_classes or most


def _model(
    folder: Path, patches: Patches, network: StarDistNetwork, schedule: Schedule, n_classes: int | None
) -> Any:
    from stardist.models import Config2D, Config3D, StarDist2D, StarDist3D
    from stardist.rays3d import Rays_GoldenSpiral

    n_dim = patches.y.ndim - 1
    settings: dict[str, Any] = {
        "n_channel_in": patches.n_channels,
        "grid": network.grid_of(n_dim),
        "n_classes": n_classes,
        "unet_n_depth": network.depth,
        "unet_n_filter_base": network.n_first,
        "net_conv_after_unet": network.n_features,
        "train_patch_size": schedule.patch_shape or patches.patch_shape,
        "train_learning_rate": schedule.learning_rate,
        "train_batch_size": schedule.batch_size,
        "train_epochs": 1,
        "train_steps_per_epoch": schedule.steps or 1,
        "train_tensorboard": False,
    }
    if network.class_weights is not None:
        settings["train_class_weights"] = network.class_weights
    if n_dim == 2:
        config: Any = Config2D(n_rays=network.n_rays, **settings)
    else:
        extents = network.anisotropy == "extents"
        anisotropy = measured_anisotropy(patches) if extents else network.anisotropy
        rays = Rays_GoldenSpiral(network.n_rays, anisotropy=anisotropy)
        config = Config3D(rays=rays, anisotropy=anisotropy, **settings)
    with models.quiet():
        return (StarDist2D if n_dim == 2 else StarDist3D)(
            config, name=folder.name, basedir=str(folder.parent)
        )


def _batches(patches: Patches, config: Any, schedule: Schedule, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield augmented batches without end."""
    from chunkrestore.train.augment import augment_stardist

    for chosen in rounds(len(patches.x), schedule.batch_size, rng):
        yield _batch(
            [
                augment_stardist(arrays[0], arrays[1], rng, schedule.patch_shape, *arrays[2:])
                for arrays in (_of(i, patches.x, patches.y, patches.classes) for i in chosen)
            ],
            config,
        )


def _validation(patches: Patches, config: Any, batch_size: int) -> list[Batch]:
    arrays = (patches.x_validation, patches.y_validation, patches.classes_validation)
    n_patches = len(patches.x_validation)
    return [
        _batch([_of(i, *arrays) for i in range(n_patches)[part]], config)
        for part in parts(n_patches, batch_size)
    ]


def _of(i: int, *arrays: npt.NDArray[Any] | None) -> list[npt.NDArray[Any]]:
    """Return one patch: image, labels, and classes if there are any."""
    return [array[i] for array in arrays if array is not None]


def _batch(samples: Sequence[Sequence[npt.NDArray[Any]]], config: Any) -> Batch:
    """Return network input and its targets."""
    images = np.stack([sample[0] for sample in samples])
    outputs = [targets(config, *sample[1:]) for sample in samples]
    return with_channels(images, config.n_dim), tuple(np.stack(kind) for kind in zip(*outputs, strict=True))

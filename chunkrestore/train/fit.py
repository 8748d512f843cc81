"""The training loop: one seed fixes weights, patches and augmentation; the best weights are kept.

The networks, losses and folder layout (``config.json``, ``weights_best.h5``, ``weights_last.h5``) are those of
CSBDeep and StarDist, so every program that reads their models reads these. The loop is ours.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore import models
from chunkrestore.train.schedule import Schedule

if TYPE_CHECKING:
    from chunkrestore.train.patches import Patches

FloatArray: TypeAlias = npt.NDArray[np.float32]
Batch: TypeAlias = tuple[Any, Any]
"""What the network sees, and what its outputs should be (one array, or a tuple of them)."""


@dataclass(frozen=True)
class Moment:
    """Where a training is, after a step."""

    step: int
    """Steps done."""
    done: float
    """Share of the training that is done."""
    seconds: float
    """Since the loop began."""
    loss: float
    """Training loss of the step."""
    validation: float | None
    """Validation loss, if the step was followed by a validation."""


Progress: TypeAlias = Callable[[Moment], None]


@dataclass(frozen=True)
class History:
    """What happened during a training."""

    loss: FloatArray
    """Training loss of every step."""
    validation: tuple[tuple[int, float], ...]
    """Number of steps done and validation loss, of every validation; empty without validation patches."""
    best_step: int
    """Steps after which ``weights_best.h5`` was saved: the least validation loss, or the last step."""
    stopped: Literal["steps", "minutes", "patience"]
    """What ended the training."""
    seconds: float
    """Wall-clock time of the loop."""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    folder: Path
    """The model folder."""
    history: History
    """Losses, and when the training stopped and why."""
    settings: dict[str, Any]
    """What it was asked for (JSON): seed, schedule, network."""

    @property
    def loss(self) -> FloatArray:
        """Training loss of every step."""
        return self.history.loss


def fit(
    model: Any,
    batches: Iterator[Batch],
    validation: Sequence[Batch],
    schedule: Schedule,
    progress: Progress | None = None,
) -> History:
    """Run a schedule on a compiled CSBDeep or StarDist model and save its weights in its folder.

    Parameters
    ----------
    model
        With a compiled ``keras_model`` and a ``logdir``.
    batches
        Training batches, without end.
    validation
        Batches of equal size (the last one may be smaller), the same at every validation. May be empty.
    schedule
        When to stop.
    progress
        Called after every step.

    Raises
    ------
    ValueError
        If a loss is not finite.
    """
    network, started = model.keras_model, time.perf_counter()
    loss: list[float] = []
    scores: list[tuple[int, float]] = []
    best, done, impatient = (0, math.inf), 0.0, False
    while done < 1 and not impatient:
        network.optimizer.learning_rate = schedule.rate(len(loss), time.perf_counter() - started)
        loss.append(_step(network, next(batches), len(loss), schedule.learning_rate))
        step, score = len(loss), None
        done = schedule.done(step, time.perf_counter() - started)
        if validation and (done >= 1 or step % schedule.validate_every == 0):
            score = _mean_loss(network, validation)
            scores.append((step, score))
            if score < best[1]:
                best = (step, score)
                _save(network, model.logdir / "weights_best.h5")
            impatient = step - best[0] >= (schedule.patience or math.inf) * schedule.validate_every
        if progress:
            progress(Moment(step, done, time.perf_counter() - started, loss[-1], score))
    _save(network, model.logdir / "weights_last.h5")
    if not validation:
        best = (len(loss), math.nan)
        _save(network, model.logdir / "weights_best.h5")
    by: Literal["steps", "minutes", "patience"] = "steps" if len(loss) == schedule.steps else "minutes"
    return History(
        loss=np.array(loss, dtype=np.float32),
        validation=tuple(scores),
        best_step=best[0],
        stopped="patience" if impatient and done < 1 else by,
        seconds=time.perf_counter() - started,
    )


def _step(network: Any, batch: Batch, step: int, learning_rate: float) -> float:
    # The loss that Keras returns is a running mean since the last reset.
    network.reset_metrics()
    loss = float(network.train_on_batch(*batch, return_dict=True)["loss"])
    if not math.isfinite(loss):
        raise ValueError(f"training diverged at step {step}; lower `learning_rate` {learning_rate}")
    return loss


def _mean_loss(network: Any, batches: Sequence[Batch]) -> float:
    """Return the mean loss over all patches."""
    total, n_patches = 0.0, 0
    for x, y in batches:
        network.reset_metrics()
        total += len(x) * float(network.test_on_batch(x, y, return_dict=True)["loss"])
        n_patches += len(x)
    if not math.isfinite(total):
        raise ValueError("training diverged: the validation loss is not finite; lower `learning_rate`")
    return total / n_patches


def _save(network: Any, path: Path) -> None:
    """Save weights in the format that CSBDeep reads, replacing earlier ones at once."""
    partial = path.with_name(f"partial-{path.name}")
    with warnings.catch_warnings():
        # Keras 3.15 converts variables without NumPy 2's `copy` keyword.
        warnings.simplefilter("ignore", DeprecationWarning)
        network.save_weights(str(partial))
    partial.replace(path)


def rounds(n_patches: int, batch_size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.intp]]:
    """Yield indices of patches without end, each patch once per round, every round in another order."""
    waiting = np.empty(0, np.intp)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(n_patches)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def parts(n_patches: int, batch_size: int) -> Iterator[slice]:
    """Yield slices that cover all patches once, in order."""
    return (slice(i, min(i + batch_size, n_patches)) for i in range(0, n_patches, batch_size))


def check_patches(patches: Patches, schedule: Schedule, align: Sequence[int]) -> None:
    """Raise `ValueError` if a network with pooling grid `align` cannot be trained on patches as scheduled."""
    whole = patches.patch_shape
    shape = schedule.patch_shape or whole
    if len(patches) == 0:
        raise ValueError("training needs at least one patch; there are none")
    if len(shape) != len(whole) or any(n < p for n, p in zip(whole, shape, strict=True)):
        raise ValueError(f"`patch_shape` {shape} of the schedule does not fit into patches of {whole}")
    for name, lengths in (("patch_shape", shape), ("patch_shape (of validation)", whole)):
        if any(n % a for n, a in zip(lengths, align, strict=True)):
            raise ValueError(
                f"`{name}` {lengths} must be a multiple of {tuple(align)}, the network's pooling grid"
            )
    if schedule.patience is not None and len(patches.x_validation) == 0:
        raise ValueError("`patience` needs validation patches: stopping early is decided on them")


def with_channels(x: npt.NDArray[Any], n_dim: int) -> FloatArray:
    """Return patches ``(n, *spatial[, channels])`` as float32 with a channel axis."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    return x if x.ndim == n_dim + 2 else x[..., np.newaxis]


def check_folder(folder: str | Path) -> Path:
    """Return the path of a model folder that is to be written; raise `ValueError` if it exists."""
    path = Path(folder).expanduser()
    if path.exists():
        raise ValueError(f"`folder` {path} exists; choose another name or remove it")
    return path


@contextmanager
def new_model_folder(folder: str | Path, seed: int) -> Iterator[Path]:
    """Yield a folder beside `folder` to train in, which becomes `folder` at the end and is removed on an error.

    What is in a model folder is therefore always a finished model. Keras keeps random state for the whole
    process, which is reset to `seed`.

    Raises
    ------
    ValueError
        If `folder` exists.
    ImportError
        If TensorFlow, CSBDeep or StarDist is not installed.
    """
    target = check_folder(folder)
    _seed_keras(seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

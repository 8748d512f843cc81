"""How long to train, how fast to learn, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How long to train, how fast to learn, and when to stop.

    With a time limit the learning rate follows the clock, so that it comes to its end when the time does,
    however fast the machine is and whatever else runs on it. Such a training is not repeated bit by bit;
    one with `steps` alone is, on the same machine and libraries.
    """

    steps: int | None = None
    """Optimiser steps; None: as many as fit into `minutes`."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; after the warm-up it falls to 1 % along half a cosine."""
    warm_up: float = 0.1
    """Share of the training during which the learning rate rises to its peak. Steps that are too large early on switch
    units off for good: of a CARE network with a peak of 2e-3 and 0.02 here, 14 of 16 units of a layer were off after
    120 steps, and it never looked further than 4 voxels (`chunkrestore.train.receptive_field`)."""
    batch_size: int = 1
    """Patches per step."""
    minutes: float | None = None
    """Wall-clock limit of the loop, validation included; None: none. Whichever of both ends first counts."""
    patch_shape: tuple[int, ...] | None = None
    """Voxels per axis of a random crop of a patch that a step sees; None: whole patches."""
    patience: int | None = None
    """Stop after so many validations in a row that did not improve; None: never before the end."""
    validate_every: int = 100
    """Steps from one validation to the next. The last step is always followed by one."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("`steps` or `minutes` must say how long to train")
        counts = {"steps": self.steps, "batch_size": self.batch_size}
        counts |= {"patience": self.patience, "validate_every": self.validate_every}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"`{name}` {count} must be at least 1")
        if not 0 < self.warm_up <= 1:
            raise ValueError(f"`warm_up` {self.warm_up} must lie in (0, 1]")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"`minutes` must be positive, got {self.minutes}")

    def done(self, step: int, seconds: float = 0.0) -> float:
        """Return which share of the training is done (1 at its end) after `step` steps and `seconds`."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Return the learning rate of a step, counted from 0, that begins after `seconds`."""
        done = self.done(step, seconds)
        one_step = 1 / self.steps if self.steps else 0.1 * self.warm_up
        rising = min(1.0, (done + one_step) / self.warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * rising * (0.01 + 0.99 * cosine)

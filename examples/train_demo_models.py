"""Train the two models that ship with chunkrestore, score them on volumes they have not seen, write their cards.

    python examples/train_demo_models.py OUT

simulates everything from seeds and writes ``OUT/care3d-demo`` and ``OUT/stardist3d-demo``, each with a
``model_card.json`` that holds data, seeds, versions and scores. About twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from chunkrestore import models, train
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf.model import gaussian
from chunkrestore.simulate import Camera, Nuclei, SimulatedVolume, embryo, forward, light_sheet_psf

SEED = 2026
N_VOLUMES = 32
VOLUME_SHAPE = (48, 96, 96)
CARE_PERCENTILES = (2.0, 99.8)
STARDIST_PERCENTILES = (1.0, 99.8)
RL_ITERATIONS = 20
CARE_SCHEDULE = train.Schedule(steps=3000, learning_rate=3e-3, batch_size=2, patch_shape=(24, 48, 48))
STARDIST_SCHEDULE = train.Schedule(steps=6000, learning_rate=3e-3, batch_size=1, patch_shape=(32, 64, 64))


def training_volume(i: int) -> SimulatedVolume:
    """Simulate training volume `i`: each has its own sizes, crowding, brightness, blur and camera noise."""
    rng = np.random.default_rng([SEED, i])
    smallest = rng.uniform(3.5, 7.0)
    brightness = np.exp(rng.uniform(np.log(0.4), np.log(4.0)))
    flattening = rng.uniform(0.5, 1.0)
    nuclei = Nuclei(
        radius=(smallest, smallest + rng.uniform(1.0, 4.0)),
        flattening=(0.85 * flattening, flattening),
        spacing=rng.uniform(0.84, 1.2),
        photons=(15.0 * brightness, 50.0 * brightness),
        texture=rng.uniform(0.15, 0.4),
        mitotic=rng.choice([0.0, 0.03, 0.06]),
    )
    camera = Camera(background=rng.uniform(1.0, 15.0), read_noise=rng.uniform(1.0, 5.0))
    width = rng.uniform(0.75, 1.25) if i % 2 else 1.0
    core, tail = np.array([2.0, 1.1, 1.1]) * width, np.array([4.0, 2.2, 2.2]) * width
    psf = gaussian(core, tail=0.15, tail_sigma=tail, truncate=3.0) if i % 2 else light_sheet_psf()
    arrangement = "tissue" if i % 4 == 3 else "embryo"
    return embryo(VOLUME_SHAPE, seed=SEED + i, nuclei=nuclei, camera=camera, psf=psf, arrangement=arrangement)

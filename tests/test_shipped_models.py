"""The models inside the package: complete, small, described by their cards, and as good as these say."""

import json
from pathlib import Path

import numpy as np
import pytest

from chunkrestore import metrics, models
from chunkrestore.kernels.network import care_geometry, stardist_geometry
from chunkrestore.simulate import embryo

NAMES = ("care3d-demo", "stardist3d-demo")


def card(name):
    return json.loads((models.folder(name) / "model_card.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_small_and_complete(name):
    folder = models.folder(name)
    names = {path.name for path in Path(folder).iterdir()}
    expected = {"config.json", "weights_best.h5", "model_card.json"}
    assert names == expected | ({"thresholds.json"} if name.startswith("stardist") else set())
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 500_000


@pytest.mark.parametrize("name", NAMES)
def test_the_card_belongs_to_these_weights(name):
    assert card(name)["name"] == name
    assert card(name)["digest"] == models.digest(name)
    for key in ("normalization", "training", "data", "scores", "versions", "licence", "task"):
        assert card(name)[key]


def test_the_cards_state_the_halo_and_the_pooling_grid():
    for name, geometry in zip(NAMES, (care_geometry, stardist_geometry), strict=True):
        found = geometry(models.config(name))
        assert (list(found.depth), list(found.align)) == (
            card(name)["halo_voxels"],
            card(name)["pooling_grid"],
        )


def test_the_thresholds_are_those_of_the_card():
    chosen = card("stardist3d-demo")["thresholds"]
    assert models.thresholds("stardist3d-demo") == (chosen["prob"], chosen["nms"])


@pytest.mark.parametrize("name", NAMES)
def test_no_machine_path_is_shipped(name):
    for path in models.folder(name).glob("*.json"):
        assert "/tmp" not in path.read_text()
        assert "/home" not in path.read_text()


@pytest.fixture(scope="module")
def volume():
    """An embryo that neither model has seen."""
    return embryo((48, 80, 80), seed=900_077)


def test_care_gains_six_decibels_in_counts(volume):
    normalizer = pytest.importorskip("csbdeep.data").PercentileNormalizer(2, 99.8)
    image = volume.image.astype(np.float32)
    restored = models.load("care3d-demo").predict(image, "ZYX", normalizer=normalizer)
    assert metrics.psnr(volume.reference, restored) > metrics.psnr(volume.reference, image) + 6


def test_stardist_finds_the_nuclei_of_a_noisy_embryo(volume):
    pytest.importorskip("stardist")
    low, high = np.percentile(volume.image, (1, 99.8))
    labels, _ = models.load("stardist3d-demo").predict_instances((volume.image - low) / (high - low))
    assert metrics.match_instances(volume.labels, labels, iou=0.5).f1 > 0.9

"""``chunkrestore train`` from stores to models that CSBDeep, StarDist and this package run."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import chunkrestore as cr
from chunkrestore import models
from chunkrestore.cli_train import train
from chunkrestore.simulate import Nuclei, embryo

SMALL = "--patch-shape 16,32,32 --patches 16 --steps 8 --filters 4 --network-depth 1 --validate-every 4 -q"


def command(*arguments):
    result = CliRunner().invoke(train, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def read(store):
    image = cr.open_image(store)
    return image.source(0).read(0, 0, tuple(slice(0, n) for n in image.spatial_shape))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for seed in (1, 2):
        volume = embryo((24, 64, 64), seed=seed, nuclei=Nuclei(radius=(3.5, 5)), arrangement="tissue")
        layout = {"axes": "zyx", "voxel_size": (0.5, 0.25, 0.25), "chunks": (16, 32, 32)}
        cr.write_image(volume.image, folder / f"image{seed}.zarr", **layout)
        cr.write_image(np.float32(volume.reference), folder / f"truth{seed}.zarr", **layout)
        cr.write_labels(volume.labels, folder / f"image{seed}.zarr", name="nuclei")
    np.save(folder / "psf.npy", volume.psf)
    return folder


def test_care_is_trained_from_two_pairs_of_stores(stores, tmp_path):
    pytest.importorskip("csbdeep")
    said = command(
        "care", stores / "image1.zarr", "--target", stores / "truth1.zarr",
        "--pair", stores / "image2.zarr", stores / "truth2.zarr", "--out", tmp_path / "care", *SMALL.split(),
    )  # fmt: skip
    assert "gain_db" in said
    card = json.loads((tmp_path / "care" / "model_card.json").read_text())
    assert (card["kind"], card["training"]["steps_done"], card["training"]["schedule"]["batch_size"]) == (
        "care",
        8,
        4,
    )
    assert (card["data"]["strategy"], len(card["data"]["volumes"])) == ("simulated", 2)
    assert card["normalization"]["percentiles"] == [2.0, 99.8]
    assert [origin["voxel_size_um"] for origin in card["origins"]] == [[0.5, 0.25, 0.25]] * 2
    assert (tmp_path / "care" / "training.html").is_file()

    from csbdeep.data import PercentileNormalizer
    from csbdeep.models import CARE

    image = read(stores / "image1.zarr")
    theirs = CARE(None, "care", str(tmp_path)).predict(image, "ZYX", normalizer=PercentileNormalizer(2, 99.8))
    ours = cr.restore(image, tmp_path / "care")
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2 * np.ptp(theirs))


def test_stardist_is_trained_from_stored_labels(stores, tmp_path):
    pytest.importorskip("stardist")
    command(
        "stardist", stores / "image1.zarr", "--pair", stores / "image2.zarr", "--labels", "nuclei",
        "--rays", 16, "--grid", "1,2,2", "--features", 8, "--out", tmp_path / "star", *SMALL.split(),
    )  # fmt: skip
    card = json.loads((tmp_path / "star" / "model_card.json").read_text())
    assert (card["kind"], card["data"]["strategy"], card["pooling_grid"]) == (
        "stardist3d",
        "labels",
        [2, 4, 4],
    )
    assert card["thresholds"] == json.loads((tmp_path / "star" / "thresholds.json").read_text())
    config = models.config(tmp_path / "star")
    assert (config.n_rays, config.anisotropy is not None) == (16, True)

    image = read(stores / "image1.zarr")
    assert cr.segment(image, tmp_path / "star").shape == image.shape


def test_the_receptive_field_is_told_and_drawn(stores, tmp_path):
    pytest.importorskip("csbdeep")
    said = command(
        "receptive-field",
        "care3d-demo",
        "--image",
        stores / "image1.zarr",
        "--report",
        tmp_path / "field.png",
    )
    assert "theoretical_halo_voxels   [24, 24, 24]" in said
    assert (tmp_path / "field.png").is_file()


@pytest.mark.slow
def test_a_deconvolved_image_is_made_and_learnt(stores, tmp_path):
    pytest.importorskip("csbdeep")
    command(
        "care", stores / "image1.zarr", "--strategy", "deconvolved", "--psf", stores / "psf.npy", "--iterations", 3,
        "--background", 100, "--out", tmp_path / "care", *SMALL.split(),
    )  # fmt: skip
    assert cr.open_image(tmp_path / "care.deconvolved.zarr").spatial_shape == (24, 64, 64)
    card = json.loads((tmp_path / "care" / "model_card.json").read_text())
    assert card["data"]["operators"][0]["iterations"] == 3


WRONG = {
    "exists; choose another name": "care image1.zarr --target truth1.zarr --out .",
    "`--target` is missing": "care image1.zarr --out model",
    "nothing to train on": "care --out model",
    "makes its own targets": "care image1.zarr --target truth1.zarr --strategy noise-only --out model",
    "`--psf` belongs to": "care image1.zarr --target truth1.zarr --psf psf.npy --out model",
    "`learning_rate` must be positive": "care image1.zarr --target truth1.zarr --learning-rate 0 --out model",
    "`grid` 3 must be powers of 2": "stardist image1.zarr --labels nuclei --grid 3 --out model",
    "`--grid` 'a' must be numbers": "stardist image1.zarr --labels nuclei --grid a --out model",
    "does not exist": "care no.zarr --target truth1.zarr --out model",
    "nothing": "stardist image1.zarr --labels nothing --out model",
}


def test_mistakes_are_told_before_tensorflow_is_loaded(stores):
    """In one fresh process for all of them."""
    script = """
import json, sys
from click.testing import CliRunner
from chunkrestore.cli_train import train
said = [str(CliRunner().invoke(train, line.split()).exception) for line in json.load(sys.stdin)]
json.dump({"said": said, "loaded": sorted({"tensorflow", "keras", "matplotlib"} & set(sys.modules))}, sys.stdout)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(list(WRONG.values())),
        capture_output=True,
        text=True,
        cwd=stores,
        check=True,
    )
    found = json.loads(result.stdout)
    for expected, said in zip(WRONG, found["said"], strict=True):
        assert expected in said
    assert found["loaded"] == []
    assert not (stores / "model").exists()

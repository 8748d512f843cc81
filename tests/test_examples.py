"""Every chapter of examples/ runs, draws what the documentation shows, and finds what its page says."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs" / "examples"
CHAPTERS = sorted(path.stem for path in EXAMPLES.glob("[0-9][0-9]_*.py"))


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """Run a chapter's ``main`` in this process; return its figures and the pictures that it has drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["example"])
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, **sizes):
        figures = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](tmp_path, **sizes)
        pictures = sorted(path.name for path in tmp_path.glob("[0-9][0-9]_*.png"))
        assert all((tmp_path / picture).stat().st_size > 5000 for picture in pictures)
        return figures, pictures

    return run


def shown(name):
    """Return the pictures on a chapter's page."""
    lines = (DOCS / f"{name}.md").read_text().splitlines()
    return sorted(line.rsplit("/", 1)[1].rstrip(")") for line in lines if line.startswith("!["))


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_has_a_page_with_its_script_and_is_listed(name):
    page = (DOCS / f"{name}.md").read_text()
    assert f"../../examples/{name}.py" in page
    assert f"\n{name}\n" in (DOCS / "index.md").read_text()
    pictures = EXAMPLES.parent / "docs" / "figures" / "examples"
    assert [picture for picture in [*shown(name), f"{name}.txt"] if not (pictures / picture).exists()] == []


def test_forward_model_is_the_same_in_chunks(chapter):
    figures, pictures = chapter("01_forward_model", shape=(24, 64, 64))
    assert pictures == shown("01_forward_model")
    assert figures["voxels that differ between chunked and whole"] == 0
    brightness = [figures[f"PSNR at {n} photons, dB"] for n in (2, 10, 100)]
    assert brightness == sorted(brightness)


def test_beads_give_a_better_psf_than_a_guess(chapter):
    figures, pictures = chapter("02_psf_from_beads", shape=(32, 64, 64))
    assert pictures == shown("02_psf_from_beads")
    assert figures["error of the PSF, distilled, %"] < figures["error of the PSF, averaged, %"] < 10
    worse = figures["PSNR with the PSF a Gaussian, too wide, dB"]
    assert worse < figures["PSNR with the PSF distilled, dB"] - 0.5


def test_every_deconvolution_is_better_than_the_image(chapter):
    figures, pictures = chapter("03_deconvolution", shape=(32, 64, 64))
    assert pictures == shown("03_deconvolution")
    decibels = {name: value for name, value in figures.items() if name.endswith("PSNR dB")}
    assert len(decibels) == 8
    assert min(decibels, key=lambda name: decibels[name]) == "raw, PSNR dB"


def test_trade_offs_have_a_best_and_halos_remove_seams(chapter):
    figures, pictures = chapter(
        "04_trade_offs", shape=(32, 64, 64), iterations=(2, 8, 20, 60), strengths=(0.0, 0.01)
    )
    assert pictures == shown("04_trade_offs")
    best_fast = figures["best number of heavy-ball iterations"]
    assert best_fast <= figures["best number of plain iterations"]
    assert figures["seam with a halo of 16, %"] < 0.1 * figures["seam without a halo, %"]
    assert figures["gain of total variation, dB"] > 0.5


def test_training_care_improves_a_volume_that_it_has_not_seen(chapter, tmp_path):
    pytest.importorskip("csbdeep")
    figures, pictures = chapter("05_training_care", shape=(40, 96, 96), n_volumes=2, steps=40)
    assert pictures == shown("05_training_care")
    assert figures["last loss"] < figures["first loss"]
    assert figures["PSNR restored, dB"] > figures["PSNR of the camera's image, dB"]
    assert {"model_card.json", "training.html"} <= {path.name for path in (tmp_path / "05_care").iterdir()}


def test_restoring_is_faster_than_iterating_and_the_same_in_chunks(chapter):
    pytest.importorskip("csbdeep")
    figures, pictures = chapter("06_restoring", shape=(32, 64, 64), iterations=30)
    assert pictures == shown("06_restoring")
    assert figures["CARE, PSNR dB"] > figures["raw, PSNR dB"] + 3
    assert figures["largest difference of tiled CARE, counts"] < 0.01


def test_receptive_field_lies_within_what_the_layers_allow(chapter):
    pytest.importorskip("csbdeep")
    figures, pictures = chapter("07_receptive_field", models=("care3d-demo",))
    assert set(pictures) < set(shown("07_receptive_field"))
    within, seen, halo = sorted(figures.values())
    assert within == figures["care3d-demo: radius that holds 99 % of the influence"]
    assert 0 < within < seen <= halo + 3


@pytest.mark.slow
def test_training_stardist_finds_nuclei_that_it_has_not_seen(chapter, tmp_path):
    pytest.importorskip("stardist")
    figures, pictures = chapter("08_training_stardist", shape=(48, 96, 96), n_volumes=3, steps=500)
    assert pictures == shown("08_training_stardist")
    assert figures["F1 at IoU 0.5"] > 0.5
    assert {"model_card.json", "training.html"} <= {
        path.name for path in (tmp_path / "08_stardist").iterdir()
    }


def test_segmenting_in_blocks_finds_the_objects_of_one_call(chapter):
    pytest.importorskip("stardist")
    figures, pictures = chapter("09_segmenting", shape=(48, 64, 64), cluster="serial")
    assert pictures == shown("09_segmenting")
    assert figures["objects identical to one untiled call, voxel by voxel"] == figures["found"]
    assert figures["rows of the table"] == figures["found"]
    assert figures["F1 at IoU 0.5"] > 0.85


def test_a_killed_job_goes_on(chapter):
    figures, _ = chapter("11_cluster_job", shape=(64, 128, 128), block=(32, 64, 64))
    assert 0 < figures["blocks noted before the driver was killed"] < figures["blocks"]
    assert figures["largest difference from one piece, of the dynamic range"] < 0.02
    assert figures["problems found by verify"] == 0


def test_tiff_becomes_a_store_with_nuclei(chapter):
    pytest.importorskip("stardist")
    figures, pictures = chapter("12_tiff_to_viewer", shape=(32, 96, 96), cluster="serial")
    assert pictures == shown("12_tiff_to_viewer")
    assert figures["voxel size in y, um"] == pytest.approx(0.4)
    assert figures["nuclei"] > 10


def test_networks_are_compared_on_spheres_and_nuclei(chapter):
    pytest.importorskip("csbdeep")
    figures, pictures = chapter("13_spheres_and_nuclei", shape=(32, 64, 64), n_volumes=3, steps=25)
    assert pictures == shown("13_spheres_and_nuclei")
    assert len(figures) == 8


def test_errors_of_neighbours_are_measured(chapter):
    pytest.importorskip("csbdeep")
    figures, pictures = chapter("14_bright_neighbours", shape=(40, 144, 144), brightness=(1.0, 30.0))
    assert pictures == shown("14_bright_neighbours")
    alike, bright = (figures[f"care, {n} times as bright: nearest, %"] for n in (1, 30))
    assert bright > 1.2 * alike
    assert figures["care, 30 times as bright, range of the small ones: farthest, %"] < bright


def test_comparison_scores_every_method(chapter, tmp_path):
    small = {"care": None, "stardist": None, "methods": ("raw", "wiener"), "cluster": "serial"}
    figures, pictures = chapter("10_comparison", shape=(32, 64, 64), **small)
    assert pictures == shown("10_comparison")
    raw, wiener = (value for name, value in figures.items() if "PSNR" in name)
    assert wiener > raw + 2
    assert {"comparison.html", "comparison.csv"} <= {p.name for p in (tmp_path / "10_comparison").iterdir()}

"""The benchmark scripts: scene and judgement of the comparison with other packages, and small runs of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import deconvolution_peers

    return deconvolution_peers


def test_scene_is_reproducible_and_lit_from_outside(comparison):
    psf = comparison.skewed_psf(15)
    truth, image = comparison.scene((16, 20, 24), psf)
    again = comparison.scene((16, 20, 24), psf)
    assert truth.shape == image.shape == (16, 20, 24)
    np.testing.assert_array_equal(truth, again[0])
    np.testing.assert_array_equal(image, again[1])
    # Photons: counts, about `peak` of them in the brightest voxel (98, and at most 4 sigma of noise above).
    np.testing.assert_array_equal(image, np.round(image))
    assert 60 < image.max() < 98 + 4 * 98**0.5


def test_psf_is_normalised_and_asymmetric_along_x_alone(comparison):
    psf = comparison.skewed_psf(31)
    assert psf.shape == (31, 31, 31)
    assert psf.dtype == np.float32
    assert psf.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(psf, psf[::-1, ::-1], rtol=1e-6)
    assert np.abs(psf - psf[..., ::-1]).sum() > 0.1


@pytest.mark.parametrize("moved", [(0.0, 0.0, 0.0), (0.4, -0.7, 0.25), (-1.0, 0.5, -0.5)])
def test_displacement_of_a_moved_image_is_found(comparison, moved):
    truth = gaussian_filter(np.random.default_rng(0).random((40, 48, 48), np.float32), 2.0)
    found = comparison.displacement(truth, shift(truth, moved, order=5, mode="nearest"))
    # The window stays where it is while the image moves: up to a tenth too little, and a few hundredths.
    np.testing.assert_allclose(found, moved, rtol=0.1, atol=0.03)


def test_seconds_to_a_quality_are_interpolated_up_to_its_first_crossing(comparison):
    points = [(1.0, 20.0), (2.0, 24.0), (4.0, 23.0), (8.0, 25.0)]
    assert comparison.seconds_to(points, 19.0) == 1.0
    assert comparison.seconds_to(points, 22.0) == pytest.approx(2**0.5)
    assert comparison.seconds_to(points, 24.5) == pytest.approx(4 * 2**0.75)
    assert comparison.seconds_to(points, 25.5) is None


def test_judgement_of_the_truth_itself(comparison):
    truth = np.random.default_rng(1).random((40, 40, 40), np.float32)
    found = comparison.judge(truth, truth * np.float32(1.5))
    assert found["relative_flux"] == pytest.approx(1.5, rel=1e-6)
    assert found["displacement_voxels"] == [0, 0, 0]


def test_script_compares_two_contenders_and_names_a_missing_one(tmp_path):
    pytest.importorskip("skimage")
    output = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / "deconvolution_peers.py", "--shape", "34", "34", "36"]
    command += ["--iterations", "1", "10", "12", "--repeats", "1", "--threads", "1", "--output", output]
    command += ["--contenders", "chunkrestore", "scikit-image", "dexp"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    ours, other = result["contenders"]["chunkrestore"], result["contenders"]["scikit-image"]
    assert set(ours["by_iterations"]) == set(other["by_iterations"]) == {"1", "10", "12"}
    # The same iteration, but zeros are taken to lie outside: worse at the border, as good inside.
    ten, other_ten = ours["by_iterations"]["10"], other["by_iterations"]["10"]
    assert ten["psnr_db"] > other_ten["psnr_db"] + 0.3
    assert ours["by_iterations"]["10"]["psnr_db"] > result["input"]["psnr_db"]
    assert 0 < ours["cpu_s_to_psnr_db"] <= max(one["cpu_s"] for one in ours["by_iterations"].values())
    assert other["cpu_s_to_psnr_db"] is None
    assert "not_installed" in result["contenders"]["dexp"]
    assert done.stdout.count("\n| ") == 3


def test_methods_are_compared_and_drawn(tmp_path):
    script = BENCHMARKS / "deconvolution_methods.py"
    output, figures = tmp_path / "methods.json", tmp_path / "figures"
    command = [sys.executable, script, "--shape", "10", "16", "18", "--counts", "1", "3"]
    subprocess.run([*command, "--output", output, "--figures", figures], check=True, capture_output=True)
    scenes = json.loads(output.read_text())["scenes"]
    assert len(scenes) == 3
    for scene in scenes.values():
        for entry in scene["methods"].values():
            assert 0 < entry["own_choice"]["ssim"] <= 1
    assert len(list(figures.glob("*.png"))) == 4


def test_device_script_runs_on_the_host_and_agrees_with_it(tmp_path):
    script, output = BENCHMARKS / "richardson_lucy_gpu.py", tmp_path / "gpu.json"
    options = [
        "--device",
        "cpu",
        "--lengths",
        "16",
        "--iterations",
        "2",
        "--repeats",
        "1",
        "--output",
        output,
    ]
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True)
    contenders = json.loads(output.read_text())["lengths"]["16"]["contenders"]
    for place in ("inside", "at the border"):
        assert contenders[f"chunkrestore, heavy ball, {place}"]["difference_from_host"] == 0


@pytest.mark.slow
def test_pyramids_are_measured_beside_other_packages():
    for package in ("ome_zarr", "ngff_zarr", "tensorstore", "skimage"):
        pytest.importorskip(package)
    command = [sys.executable, BENCHMARKS / "pyramids.py", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert all(rate > 0 for rate in result["kernels"].values())
    cases = result["peers"] + result["large"]
    assert len(cases) == 6 + 4
    assert not [case["error"] for case in cases if "error" in case]

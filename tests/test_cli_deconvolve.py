"""Point spread functions and deconvolution methods from the command line, from optics to a sharp volume."""

import numpy as np
import pytest
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.operators.methods import METHODS, deconvolution
from chunkrestore.pipeline import read_pipeline
from chunkrestore.psf import gaussian, read_psf, write_psf
from chunkrestore.psf.fields import read_psf_or_field, write_psf_field
from chunkrestore.psf.varying import PsfField

PSF = gaussian((1.4, 1.0, 1.0))
THEORY = "--na 0.8 --emission-um 0.52 --excitation-um 0.488 --immersion water --voxel-size 0.6,0.3,0.3"


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(21)
    truth = np.zeros((28, 60, 64))
    truth[tuple(rng.integers(0, n, 120) for n in truth.shape)] = 2500
    image = rng.poisson(ndimage.gaussian_filter(truth, (2.0, 1.6, 1.6)) + 4).astype(np.uint16)
    return cr.write_image(image, tmp_path / "in.zarr", axes="zyx", voxel_size=(0.6, 0.3, 0.3))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_store_and_gives_what_its_operator_gives(method, store, tmp_path, capsys):
    write_psf(tmp_path / "psf.tif", PSF, (0.6, 0.3, 0.3))
    options = ["--psf", tmp_path / "psf.tif", "--method", method, "--background", 2, "--cluster", "serial"]
    assert run("deconvolve", store.path, tmp_path / "out.zarr", *options) == 0
    assert "wrote" in capsys.readouterr().out
    extra = {"voxel_size": (0.6, 0.3, 0.3)} if method == "regularized-inverse" else {}
    expected = deconvolution(method, read_psf(tmp_path / "psf.tif"), background=2.0, **extra)(
        store.data.compute()
    )
    result = cr.open_image(tmp_path / "out.zarr").data.compute()
    # One block covers the volume: equal but for the start value, whose mean is exact in a job.
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("as_pipeline", [False, True])
def test_a_psf_of_another_voxel_size_is_refused(store, tmp_path, capsys, as_pipeline):
    write_psf(tmp_path / "psf.tif", PSF, (0.6, 0.3, 0.25))
    if as_pipeline:
        steps = "steps:\n  - {operator: wiener, psf: psf.tif}\n"
        (tmp_path / "p.yaml").write_text(f"input: in.zarr\noutput: out.zarr\n{steps}")
        status = run("run", tmp_path / "p.yaml")
    else:
        status = run("deconvolve", store.path, tmp_path / "out.zarr", "--psf", tmp_path / "psf.tif")
    assert status == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "has voxels of 0.6 x 0.3 x 0.25 um but the image has 0.6 x 0.3 x 0.3 um; resample it" in message
    assert not (tmp_path / "out.zarr").exists()


def test_a_pipeline_scales_derivatives_by_the_image_as_the_command_does(store, tmp_path):
    np.save(tmp_path / "psf.npy", PSF)
    steps = "".join(
        f"  - {{psf: psf.npy, operator: {step}}}\n"
        for step in (
            "regularized-inverse",
            "richardson-lucy, total_variation: 0.01",
            "'richardson-lucy', total_variation: 0.01, voxel_size: [1, 2, 3]",
        )
    )
    (tmp_path / "p.yaml").write_text(f"input: in.zarr\noutput: out.zarr\nsteps:\n{steps}")
    operators = read_pipeline(tmp_path / "p.yaml")[0]
    assert [operator.voxel_size for operator in operators] == [(0.6, 0.3, 0.3), (0.6, 0.3, 0.3), (1, 2, 3)]


def test_options_reach_the_operator(store, tmp_path):
    np.save(tmp_path / "psf.npy", PSF)
    options = (
        "--iterations 6 --acceleration none --total-variation 0.01 --saturation 900 --missing 0 --gain 2"
    )
    more = [
        "--stop",
        "split-data",
        "--calibrate",
        "--tolerance",
        "0.01",
        "--cluster",
        "serial",
        "--memory",
        "1GB",
    ]
    source, output = store.path, tmp_path / "out.zarr"
    assert run("deconvolve", source, output, "--psf", tmp_path / "psf.npy", *options.split(), *more) == 0
    import json

    report = json.loads((tmp_path / "out.zarr.chunkrestore" / "image" / "report.json").read_text())
    operator = report["operators"][0]
    assert operator["decision"]["iterations"] <= 6
    assert operator["iterations"] == operator["decision"]["iterations"]
    wanted = {"acceleration": None, "total_variation": 0.01, "saturation": 900, "missing": 0, "gain": 2}
    assert wanted.items() <= operator.items()
    assert operator["voxel_size"] == [0.6, 0.3, 0.3]
    assert report["calibration"]["depth"] == operator["depth"]


def test_from_optics_to_a_deconvolved_volume(store, tmp_path, capsys):
    psf = tmp_path / "psf.tif"
    assert run("psf", "theory", psf, *THEORY.split(), "--shape", "15,15,15") == 0
    assert run("psf", "check", psf, store.path) == 0
    assert "FWHM" in capsys.readouterr().out
    assert run("psf", "prepare", psf, tmp_path / "ready.tif", "--background", "none", "--energy", "0.9") == 0
    options = ["--psf", tmp_path / "ready.tif", "--iterations", 2, "--cluster", "serial", "-q"]
    assert run("deconvolve", store.path, tmp_path / "out.zarr", *options) == 0


def test_a_light_sheet_that_widens_is_one_command_and_one_option(store, tmp_path, capsys):
    field = tmp_path / "sheet.yaml"
    sheet = ["--model", "light-sheet", "--sheet-waist-um", 0.8, "--volume-shape", "28,60,64"]
    assert run("psf", "theory", field, *THEORY.split(), *sheet, "--shape", "9,9,9") == 0
    read = read_psf_or_field(field)
    assert isinstance(read, PsfField)
    assert len(read.psfs) > 1
    assert run("psf", "theory", field, *THEORY.split(), *sheet, "--shape", "9,9,9") == 2
    assert "exists" in capsys.readouterr().err
    options = ["--psf", field, "--iterations", 3, "--cluster", "serial", "-q"]
    assert run("deconvolve", store.path, tmp_path / "out.zarr", *options) == 0
    expected = cr.RichardsonLucy(read, 3)(store.data.compute())
    result = cr.open_image(tmp_path / "out.zarr").data.compute()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "blind"], "`method` must be one of"),
        (["--method", "wiener", "--iterations", 5], "`iterations` is no parameter of the method 'wiener'"),
        (["--regularization", 0.1], "`regularization` is no parameter of the method 'richardson-lucy'"),
        (["--iterations", -3], "`iterations` must be a whole number of at least 1, got -3"),
        (["--total-variation", 3], "`total_variation` must lie between 0 and 0.1"),
        (["--background", 70000], "`background` 70000"),
        (["--saturation", 1, "--background", 5], "`saturation` 1 must lie above `background` 5"),
        (["--method", "wiener", "--regularization", 0], "`regularization` must lie between"),
        (["--calibrate", "--depth", 4], "`depth` and `calibrate` exclude each other"),
        (["--device", "tpu"], "`device` must be"),
        (["--memory", "much"], "`memory` must be"),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_written(store, tmp_path, capsys, arguments, message):
    np.save(tmp_path / "psf.npy", PSF)
    before = sorted(tmp_path.iterdir())
    options = ["--psf", tmp_path / "psf.npy", "--cluster", "serial"]
    assert run("deconvolve", store.path, tmp_path / "out.zarr", *options, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a list"),
        ("- {psf: a.tif}", "must be a list"),
        ("- {psf: a.tif, position: here}", "must be a list"),
        ("- {psf: a.tif, position: [1, 2, 3]}", "a.tif.* does not exist"),
        ("- {psf: psf.npy, position: [1, 2]}", "`positions` must hold 3 finite numbers"),
        (
            "- {psf: psf.npy, position: [1, 2, 3]}\n- {psf: psf.npy, position: [1, 2, 3]}",
            "names one place twice",
        ),
        ("a: [", "is not YAML"),
    ],
)
def test_field_files_that_are_wrong_are_named(tmp_path, content, message):
    np.save(tmp_path / "psf.npy", PSF)
    (tmp_path / "field.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_psf_or_field(tmp_path / "field.yaml")


def test_fields_make_the_round_trip(tmp_path):
    field = PsfField([gaussian((1, 1, 1)), gaussian((2, 1, 1))], [(0, 1.5, 2), (30, 1.5, 2)])
    files = write_psf_field(tmp_path / "f.yaml", field, (0.6, 0.3, 0.3))
    assert [f.name for f in files] == ["f.yaml", "f-0.tif", "f-1.tif"]
    read = read_psf_or_field(files[0])
    assert read.positions == field.positions
    for a, b in zip(read.psfs, field.psfs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)

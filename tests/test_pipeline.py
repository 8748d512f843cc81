"""Pipelines as YAML files."""

import numpy as np
import pytest

from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.operators.threshold import Threshold
from chunkrestore.pipeline import read_pipeline
from chunkrestore.psf import gaussian


def pipeline(folder, text):
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


HEAD = "input: in.zarr\noutput: out/out.zarr\n"


def test_a_file_becomes_operators_and_arguments(tmp_path):
    np.save(tmp_path / "psf.npy", gaussian((1.0, 1.0, 1.0)))
    operators, source, output, options = read_pipeline(
        pipeline(
            tmp_path,
            HEAD
            + """
steps:
  - {operator: richardson-lucy, psf: psf.npy, iterations: 7, background: 100, acceleration: null, depth: [1, 2, 3]}
  - {operator: threshold, value: 12.5, connectivity: 3}
block: [16, 32, 32]
depth: 8
level: 1
timepoint: 2
channel: [DAPI, 1]
region: [[0, 8], [4, 64], [0, 64]]
label_name: nuclei
version: "0.4"
""",
        )
    )
    assert operators == [
        RichardsonLucy(
            gaussian((1.0, 1.0, 1.0)), iterations=7, background=100, acceleration=None, depth=(1, 2, 3)
        ),
        Threshold(12.5, connectivity=3),
    ]
    assert (source, output) == (str(tmp_path / "in.zarr"), str(tmp_path / "out/out.zarr"))
    assert options == {
        "block_shape": (16, 32, 32),
        "depth": 8,
        "calibrate": False,
        "objects": None,
        "memory": None,
        "device": "cpu",
        "level": 1,
        "timepoint": 2,
        "channel": ["DAPI", 1],
        "region": [(0, 8), (4, 64), (0, 64)],
        "shards": None,
        "compression": "zstd",
        "checksums": False,
        "label_name": "nuclei",
        "version": "0.4",
    }


def test_what_is_left_out_takes_the_defaults_of_run(tmp_path):
    import inspect

    from chunkrestore.jobs.run import run

    *_, options = read_pipeline(pipeline(tmp_path, HEAD + "steps: [{operator: threshold}]"))
    parameters = inspect.signature(run).parameters
    assert options == {name: parameters[name].default for name in options}


def test_absolute_paths_stay_as_they_are(tmp_path):
    text = "input: /data/in.zarr\noutput: /data/out.zarr\nsteps: [{operator: threshold}]"
    assert read_pipeline(pipeline(tmp_path, text))[1:3] == ("/data/in.zarr", "/data/out.zarr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "steps: [{operator: threshold}]\nblok: [1, 2, 3]", "blok: Extra inputs are not permitted"),
        (HEAD + "steps: [{operator: threshold, treshold: 3}]", "steps.0.threshold.treshold: Extra inputs"),
        (HEAD + "steps: [{operator: sharpen}]", "steps.0: Input tag 'sharpen'"),
        (HEAD + "steps: [{operator: richardson-lucy}]", "steps.0.richardson-lucy.psf: Field required"),
        (HEAD + "steps: []", "steps: "),
        (HEAD, "steps: Field required"),
        (HEAD + "steps: [{operator: threshold}]\nblock: [8]", "block: "),
        ("", "file: Input should be"),
        ("steps: [", "is not YAML"),
        ("- 1", "file: Input should be"),
    ],
)
def test_every_wrong_key_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"^pipeline .*pipeline.yaml is not ") as caught:
        read_pipeline(pipeline(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{operator: richardson-lucy, psf: none.npy}", r'`psf` file ".*none.npy" does not exist'),
        ("{operator: care, model: none}", "`model` '.*none' does not exist"),
    ],
)
def test_missing_files_are_looked_for_beside_the_pipeline(tmp_path, step, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_pipeline(pipeline(tmp_path, HEAD + f"steps: [{step}]"))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pipeline .*none.yaml does not exist"):
        read_pipeline(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("step", "kind", "parameters"),
    [
        ("wiener, regularization: 0.05, non_negative: true", "Wiener", {"regularization": 0.05}),
        ("regularized-inverse, voxel_size: [2, 1, 1]", "Wiener", {"prior": "laplacian"}),
        ("wiener-butterworth, iterations: 4", "UnmatchedRichardsonLucy", {"iterations": 4}),
        ("masked-wiener", "UnmatchedRichardsonLucy", {"back_projector": "masked-wiener", "iterations": 10}),
        (
            "gradient-consensus, background: 5, gain: 2.5, offset: 3",
            "GradientConsensus",
            {"gain": 2.5, "offset": 3.0},
        ),
        (
            "richardson-lucy, total_variation: 0.01, saturation: 4095, stop: split-data, tolerance: 0.01",
            "RichardsonLucy",
            {"total_variation": 0.01, "saturation": 4095.0, "stop": "split-data", "tolerance": 0.01},
        ),
    ],
)
def test_every_deconvolution_method_is_a_step(tmp_path, step, kind, parameters):
    np.save(tmp_path / "psf.npy", gaussian((1.0, 1.0, 1.0)))
    text = f"{HEAD}steps:\n  - {{psf: psf.npy, operator: {step}}}\n"
    (operator,), *_ = read_pipeline(pipeline(tmp_path, text))
    assert type(operator).__name__ == kind
    assert {name: getattr(operator, name) for name in parameters} == parameters

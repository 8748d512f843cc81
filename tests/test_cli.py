"""The command line: exit statuses, one-line errors, and nothing touched by a command that is refused."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs.places import ClusterLostError
from chunkrestore.jobs.runner import BlockError, Failed
from chunkrestore.psf import gaussian

SHAPE = (16, 24, 20)
CARE = {
    "n_dim": 3, "axes": "ZYXC", "n_channel_in": 1, "n_channel_out": 1, "probabilistic": False, "unet_residual": True,
    "unet_n_depth": 2, "unet_kern_size": 3, "unet_n_first": 8, "unet_last_activation": "linear",
}  # fmt: skip
STARDIST = {
    "n_dim": 3, "axes": "ZYXC", "n_channel_in": 1, "n_rays": 32, "grid": [2, 2, 2], "backbone": "unet",
    "n_classes": None, "unet_n_depth": 2, "unet_kernel_size": [3, 3, 3], "unet_n_filter_base": 4,
    "unet_n_conv_per_depth": 2, "unet_pool": [2, 2, 2], "net_conv_after_unet": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Commands run where their files are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(capsys):
    """Run a command in this process; returns its exit status, output and errors."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def values(shape=SHAPE, dtype=np.uint16):
    return np.random.default_rng(3).integers(1, 200, shape).astype(dtype)


def write(path="in.zarr", data=None, axes="zyx", **options):
    data = values() if data is None else data
    return cr.write_image(
        data, path, axes=axes, voxel_size=(2, 1, 1)[-sum(a in "zyx" for a in axes) :], **options
    )


def tree(path):
    return {p.relative_to(path): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def write_model(name, config):
    """Write a model that can be planned with: its weights are never read."""
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config))
    Path(name, "weights_best.h5").write_bytes(b"none")
    Path(name, "thresholds.json").write_text('{"prob": 0.5, "nms": 0.4}')


def write_foreign(path, dtype="float32", data=None, axes="zyx", chunks=None):
    """Write an OME-Zarr 0.5 that this package would not write."""
    data = values(dtype=dtype) if data is None else data
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0] * data.ndim}]}]
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    attributes = {"ome": {"version": "0.5", "multiscales": [{"axes": named, "datasets": datasets}]}}
    zarr.create_group(path, zarr_format=3, attributes=attributes)
    zarr.create_array(f"{path}/0", data=data, zarr_format=3, chunks=chunks or data.shape)


def with_nan(shape=SHAPE, where=(3, 20, 19)):
    data = values(shape, np.float32)
    data[where] = np.nan
    return data


REFUSED = {}
"""By name: a function that prepares a command and returns its arguments, and what its error must say."""


def refused(message):
    def register(prepare):
        REFUSED[prepare.__name__] = prepare, message
        return prepare

    return register


@refused(r"none\.zarr does not exist")
def missing_store():
    return ["segment", "none.zarr", "out.zarr", "--method", "threshold"]


@refused("in.zarr is a plain zarr group, not an OME-Zarr")
def no_ome_zarr():
    zarr.create_group("in.zarr")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("in.zarr is a folder without zarr metadata, not an OME-Zarr")
def a_plain_folder():
    Path("in.zarr").mkdir()
    return ["info", "in.zarr"]


@refused("cannot be opened; use a path or a URL that begins with")
def a_url_as_input():
    return ["segment", "ftp://host/in.zarr", "out.zarr", "--method", "threshold"]


@refused("web servers are read only; use s3:// or a path")
def a_url_as_output():
    write()
    return ["segment", "in.zarr", "https://host/out.zarr", "--method", "threshold"]


@refused("in.zarr.*ax[ei]s")
def no_spatial_axes():
    write_foreign("in.zarr", axes="tca")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("in.zarr.*ax[ei]s")
def only_one_spatial_axis():
    write_foreign("in.zarr", axes="tcx")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("float64 of .*in.zarr is not supported, only uint8, uint16")
def float64():
    write_foreign("in.zarr", "float64")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("uint32 of .*in.zarr is not supported")
def uint32():
    write_foreign("in.zarr", "uint32")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused(
    r"in.zarr/0, time point 0, channel 0, block \(0, 1, 1\) \(core 0:16, 12:24, 10:20\): image holds 1 voxels"
)
def nan_voxels():
    write(data=with_nan())
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold", "--value", 5, "--block", "16,12,10"]


@refused(r"block \(0, 1, 1\).*NaN")
def nan_voxels_for_richardson_lucy():
    write(data=with_nan())
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy", "--block", "16,12,10"]


@refused(r"block \(0, 1, 1\).*NaN")
def nan_voxels_for_care():
    write(data=with_nan())
    write_model("care", CARE)
    return ["restore", "in.zarr", "out.zarr", "--model", "care", "--block", "16,12,12"]


@refused(r"time point 0, channel 1, block \(0, 0, 0\)")
def nan_voxels_in_the_second_channel_only():
    write(data=with_nan((2, *SHAPE), (1, 2, 3, 4)), axes="czyx")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("time point 0, channel 2, ")
def nan_voxels_in_the_selected_channel():
    write(data=with_nan((3, *SHAPE), (2, 2, 3, 4)), axes="czyx")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold", "--channel", 2]


@refused("NaN")
def nan_input_with_overwrite():
    write("out.zarr")
    write(data=with_nan())
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy", "--overwrite"]


@refused("NaN")
def nan_input_with_overwrite_of_a_finished_job():
    write("first.zarr")
    cr.run(cr.Threshold(3.0), "first.zarr", "out.zarr", cluster="serial", quiet=True)
    write(data=with_nan())
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold", "--overwrite"]


@refused('`psf` file "none.tif" does not exist')
def missing_psf():
    write()
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "none.tif"]


@refused('"psf.png" is not of a supported kind')
def psf_of_an_unknown_kind():
    write()
    Path("psf.png").touch()
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.png"]


@refused("`iterations` must be")
def no_iterations():
    write()
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy", "--iterations", 0]


@refused("`model` 'none' does not exist; give a model folder")
def missing_model():
    write()
    return ["restore", "in.zarr", "out.zarr", "--model", "none"]


@refused("`model` 'none' does not exist")
def missing_stardist_model():
    write()
    return ["segment", "in.zarr", "--model", "none"]


@refused("`--model` is missing")
def no_model_given():
    write()
    return ["segment", "in.zarr"]


@refused("is a CARE model; a StarDist2D or StarDist3D model is needed")
def care_model_for_stardist():
    write()
    write_model("care", CARE)
    return ["segment", "in.zarr", "--model", "care"]


@refused("is a StarDist3D model; a CARE model is needed")
def stardist_model_for_care():
    write()
    write_model("stardist", STARDIST)
    return ["restore", "in.zarr", "out.zarr", "--model", "stardist"]


@refused("works on axes zyx but the image has 2 spatial axes")
def three_dimensional_model_for_a_flat_image():
    write(data=values((24, 20)), axes="yx")
    write_model("care", CARE)
    return ["restore", "in.zarr", "out.zarr", "--model", "care"]


@refused("`block_shape` 2 on axis 1 is smaller than the pooling grid of care; use at least 4")
def block_smaller_than_the_pooling_grid():
    write()
    write_model("care", CARE)
    return ["restore", "in.zarr", "out.zarr", "--model", "care", "--block", "16,2,20"]


@refused("`depth` .* is less than what the network")
def depth_less_than_the_receptive_field():
    write()
    write_model("care", CARE)
    return ["restore", "in.zarr", "out.zarr", "--model", "care", "--depth", "3"]


@refused("`output` .*out.zarr exists; .*--overwrite")
def existing_output():
    write()
    write("out.zarr")
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy"]


@refused("is the input; give another store")
def output_is_the_input():
    write()
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "./in.zarr", "--psf", "psf.npy", "--overwrite"]


@refused("exists and is no OME-Zarr image")
def output_is_something_else():
    write()
    Path("out.zarr").mkdir()
    Path("out.zarr/thesis.txt").write_text("precious")
    np.save("psf.npy", gaussian((1, 1, 1)))
    return ["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy", "--overwrite"]


@refused("out.zarr is a file")
def output_is_a_file():
    write()
    Path("out.zarr").write_text("precious")
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold", "--overwrite"]


@refused("labels 'nuclei' exist in .*in.zarr; .*--overwrite")
def existing_labels():
    image = write()
    cr.write_labels(values().astype(np.int32), image.path, "nuclei")
    return ["segment", "in.zarr", "--method", "threshold", "--name", "nuclei"]


@refused(r"has shape \(8, 8, 8\) but the labels have")
def labels_of_another_shape():
    write()
    write("out.zarr", values((8, 8, 8)))
    return ["segment", "in.zarr", "out.zarr", "--method", "threshold"]


@refused("channel 'RFP' does not exist in .*; it has 0 'DAPI', 1 'GFP'")
def unknown_channel():
    write(data=values((2, *SHAPE)), axes="czyx", channels=["DAPI", "GFP"])
    return ["segment", "in.zarr", "--method", "threshold", "--channel", "RFP"]


@refused("pipeline none.yaml does not exist")
def missing_pipeline():
    return ["run", "none.yaml"]


@refused("No such command 'sharpen'")
def unknown_verb():
    return ["sharpen", "in.zarr"]


@refused("Missing argument 'OUT'")
def missing_argument():
    return ["restore", "in.zarr", "--model", "care"]


@refused("'2,a,1' is not a list of numbers")
def bad_voxel_size():
    Path("a.tif").touch()
    return ["convert", "a.tif", "out.zarr", "--voxel-size", "2,a,1"]


PSFS = {
    "negative": (np.array([[[0.5, -0.1, 0.6]]]), "psf.npy.*holds 1 negative values"),
    "nan": (np.array([[[0.5, np.nan, 0.6]]]), "psf.npy.*holds 1 NaN or infinite values"),
    "empty": (np.zeros((0, 3, 3)), "psf.npy.*`psf` is empty"),
    "zero": (np.zeros((3, 3, 3)), "psf.npy.*zero everywhere"),
    "flat": (np.ones((3, 3)), "`psf` has 2 dimensions .* but the image has 3 spatial axes"),
    "line": (np.ones(3), "`psf` must have 2 or 3 dimensions"),
}

OPTIONS = [
    ("--region", "0-16,0:24,0:20", "is not a list of ranges such as"),
    ("--region", "8:8,0:24,0:20", "has a range that is empty"),
    ("--region", "-3:8,0:24,0:20", "begins below 0"),
    ("--region", "0:16,0:24,0:21", "`region` 0:21 on axis 'x' is empty or leaves 0:20"),
    ("--region", "0:16,0:24", "`region` must have one slice per axis"),
    ("--block", "a,b,c", "is not a list of whole numbers"),
    ("--block", "1,2,3,4", "must have one number for each of z,y,x"),
    ("--block", "8,-8,8", "none negative"),
    ("--block", "8,0,8", "`block_shape` .* must be at least 1"),
    ("--block", "8,8", "`block_shape` .* must have one length per axis"),
    ("--channel", "1", "channel 1 does not exist"),
    ("--timepoint", "3", "time point 3 does not exist"),
    ("--timepoint", "-1", "-1 is not in the range x>=0"),
    ("--level", "7", "level 7 does not exist"),
    ("--name", "../x", "`label_name` '../x' must be made of"),
    ("--workers", "0", "0 is not in the range x>=1"),
    ("--colour", "red", "No such option.*--colour"),
    ("--value", "nan", "`value` must be finite"),
    ("--cluster", "clutser", "`cluster` 'clutser' is no address"),
    ("--cluster", "tcp://127.0.0.1:1", "no Dask scheduler answers at `cluster` 'tcp://127.0.0.1:1'"),
]

PIPELINES = [
    ({"blocks": [1, 2, 3]}, "blocks: Extra inputs are not permitted"),
    ({"steps": [{"operator": "sharpen"}]}, "steps.0: Input tag 'sharpen'"),
    ({"steps": [{"operator": "threshold"}] * 2}, "threshold makes labels and must be the last"),
    ({"steps": []}, "steps: List should have at least 1 item"),
    ({"input": "none.zarr"}, "none.zarr does not exist"),
]


@pytest.fixture
def is_refused(command, tmp_path):
    """Check that a command ends with status 2 and one line, and that not one file differs after it."""

    def check(arguments, message):
        takes_cluster = (
            arguments[0] in ("segment", "restore", "deconvolve", "run") and "--cluster" not in arguments
        )
        before = tree(tmp_path)
        status, out, err = command(*arguments, *(["--cluster", "serial", "-q"] if takes_cluster else []))
        assert err.startswith("chunkrestore: ")
        assert err.count("\n") == 1
        assert re.search(message, err)
        assert (status, out) == (2, "")
        assert tree(tmp_path) == before

    return check


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_and_nothing_is_touched(is_refused, name):
    prepare, message = REFUSED[name]
    is_refused(prepare(), message)


@pytest.mark.parametrize("name", PSFS)
def test_a_bad_psf_is_refused_and_nothing_is_touched(is_refused, name):
    psf, message = PSFS[name]
    write()
    np.save("psf.npy", psf)
    is_refused(["deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy"], message)


@pytest.mark.parametrize(("option", "value", "message"), OPTIONS)
def test_a_bad_option_is_refused_and_nothing_is_touched(is_refused, option, value, message):
    write()
    is_refused(["segment", "in.zarr", "--method", "threshold", option, value], message)


@pytest.mark.parametrize(("content", "message"), PIPELINES)
def test_a_bad_pipeline_is_refused_and_nothing_is_touched(is_refused, content, message):
    write()
    pipeline = {"input": "in.zarr", "output": "out.zarr", "steps": [{"operator": "threshold"}]} | content
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    is_refused(["run", "pipeline.yaml"], message)


def test_a_block_that_fails_is_status_1_and_nothing_is_published(command, tmp_path):
    image = write(chunks=(8, 12, 10))
    Path(image.path, "0/c/1/1/1").write_bytes(b"no chunk")
    options = ["--block", "8,12,10", "--cluster", "serial", "-q"]
    status, out, err = command(
        "segment", "in.zarr", "out.zarr", "--method", "threshold", "--value", 9, *options
    )
    assert (status, out) == (1, "")
    assert err.startswith(
        "chunkrestore: block (1, 1, 1) of time point 0, channel 0 failed: CorruptChunkError: chunk"
    )
    assert err.count("\n") == 1
    assert not Path("out.zarr").exists()


def test_a_failure_is_explained_at_length_when_asked(command):
    image = write(chunks=(8, 12, 10))
    Path(image.path, "0/c/1/1/1").write_bytes(b"no chunk")
    status, _, err = command(
        "segment", "in.zarr", "out.zarr", "--method", "threshold", "--cluster", "serial", "-v"
    )
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("chunkrestore: block ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 75),
        (ClusterLostError("the scheduler is gone"), 75),
        (ConnectionError("no scheduler"), 2),
        (ImportError("run pip"), 2),
        (BlockError([Failed((0, 0, 1), "data", "bad", ValueError())], 4), 1),
        (MemoryError(), 1),
        (PermissionError("out.zarr"), 1),
    ],
)
def test_the_exit_status_tells_what_can_be_done(command, monkeypatch, error, status):
    def fail(*arguments, **options):
        raise error

    write()
    monkeypatch.setattr("chunkrestore.jobs.run.run", fail)
    code, _, err = command("segment", "in.zarr", "--method", "threshold")
    assert code == status
    # After an interrupt the terminal's line shows ^C, so that one begins with a new one.
    assert err.strip().startswith("chunkrestore: ")
    assert len(err.strip().splitlines()) == 1


def test_the_handler_of_termination_is_put_back(command):
    previous = signal.getsignal(signal.SIGTERM)
    command("--version")
    assert signal.getsignal(signal.SIGTERM) is previous


def test_segment_writes_labels_into_the_input_and_prints_a_summary(command):
    image = write()
    options = ["--block", "8,12,20", "--cluster", "serial", "--name", "cells", "--value", 150]
    status, out, err = command("segment", "in.zarr", "--method", "threshold", *options)
    assert status == 0
    assert out.startswith(f"wrote      {image.path}/labels/cells\n")
    assert "paint: 4 of 4 blocks" in err
    np.testing.assert_array_equal(
        cr.open_image(image.path).label("cells").data.compute(), cr.Threshold(150)(values())
    )


def test_quiet_commands_print_nothing(command):
    write()
    assert command("segment", "in.zarr", "--method", "threshold", "--cluster", "serial", "-q") == (0, "", "")


def test_deconvolve_does_what_the_function_does(command):
    write(data=values((2, 2, *SHAPE)), axes="tczyx", channels=["DAPI", "GFP"])
    np.save("psf.npy", gaussian((1, 1, 1)))
    options = [
        "--iterations",
        3,
        "--background",
        5,
        "--acceleration",
        "none",
        "--depth",
        "4,5,6",
        "--cluster",
        "serial",
    ]
    chosen = ["--channel", "GFP", "--timepoint", 1, "--region", "0:16,4:24,0:20", "--block", "8,20,20"]
    status, out, _ = command("deconvolve", "in.zarr", "out.zarr", "--psf", "psf.npy", *options, *chosen)
    assert status == 0
    assert "seams      rms " in out
    operator = cr.RichardsonLucy(
        gaussian((1, 1, 1)), iterations=3, background=5, acceleration=None, depth=(4, 5, 6)
    )
    part = {
        "channel": "GFP",
        "timepoint": 1,
        "region": [(0, 16), (4, 24), (0, 20)],
        "block_shape": (8, 20, 20),
    }
    cr.run(operator, "in.zarr", "expected.zarr", cluster="serial", quiet=True, **part)
    results = [cr.open_image(name).data.compute() for name in ("out.zarr", "expected.zarr")]
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (1, 1, 16, 20, 20)


def test_overwrite_replaces_the_output(command):
    write()
    arguments = ["segment", "in.zarr", "out.zarr", "--method", "threshold", "--cluster", "serial", "-q"]
    for value in (100, 150):
        assert command(*arguments, "--value", value, "--overwrite")[0] == 0
    labels = cr.open_image("out.zarr/labels/labels")
    np.testing.assert_array_equal(labels.data.compute(), cr.Threshold(150)(values()))


@pytest.mark.parametrize("command_line", [["run", "pipeline.yaml", "--dry-run"], ["plan", "pipeline.yaml"]])
def test_a_plan_is_printed_without_reading_a_voxel(command, tmp_path, command_line):
    write()
    shutil.rmtree("in.zarr/0/c")
    np.save("psf.npy", gaussian((1, 1, 1)))
    steps = [{"operator": "richardson-lucy", "psf": "psf.npy", "depth": 4}, {"operator": "threshold"}]
    pipeline = {"input": "in.zarr", "output": "out.zarr", "steps": steps, "block": [8, 12, 20]}
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    before = tree(tmp_path)
    status, out, err = command(*command_line)
    assert (status, err) == (0, "")
    assert "pass 1     richardson-lucy\n" in out
    assert "blocks   2 x 2 x 1 of 8 x 12 x 20" in out
    assert tree(tmp_path) == before


def test_a_plan_can_be_read_by_programs(command):
    write()
    pipeline = {"input": "in.zarr", "output": "out.zarr", "steps": [{"operator": "threshold"}]}
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    status, out, _ = command("plan", "pipeline.yaml", "--json")
    assert status == 0
    assert json.loads(out)["passes"][0]["operators"] == [
        {"operator": "threshold", "value": None, "connectivity": 1}
    ]


def test_a_dry_run_of_a_network_loads_no_network(tmp_path):
    write()
    write_model("care", CARE)
    code = (
        "import sys\nfrom chunkrestore.cli import main\n"
        "try:\n    main(['restore', 'in.zarr', 'out.zarr', '--model', 'care', '--dry-run'])\n"
        "except SystemExit as error:\n    assert error.code == 0\n"
        "assert 'tensorflow' not in sys.modules and 'distributed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pass 1     care" in done.stdout


def test_info_describes_a_store(command):
    write()
    status, out, _ = command("info", "in.zarr")
    assert status == 0
    assert "uint16" in out


def test_no_arguments_give_the_help(command):
    status, out, _ = command()
    assert status == 0
    assert out.startswith("Usage: chunkrestore")
    for verb in ("demo", "info", "plan", "deconvolve", "restore", "segment", "run", "convert", "simulate"):
        assert f"\n  {verb} " in out


def test_help_takes_less_than_half_a_second():
    """Of processor time, the least of three: what else the machine does is not the point."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "chunkrestore", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_names_in_a_store_cannot_command_the_terminal(command):
    evil = "dapi\x1b]0;gone\x07\x9b2J"
    cr.write_image(
        np.zeros((1, 4, 4, 4), np.uint8), "in.zarr", axes="czyx", voxel_size=(1, 1, 1), channels=[evil]
    )
    status, out, _ = command("info", "in.zarr")
    assert status == 0
    status, _, err = command("segment", "in.zarr", "out.zarr", "--method", "threshold", "--channel", "other")
    assert status == 2
    for said in (out, err):
        assert "dapi" in said
        assert not {"\x1b", "\x07", "\x9b"} & set(said)

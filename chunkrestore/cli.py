"""The command line: one verb per step, no logic of its own."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from chunkrestore import __version__
from chunkrestore.cli_classical import (
    CLASSICAL_OPTIONS,
    refuse_classical,
    segmenter_of,
    smoothing_of,
    take_classical,
)
from chunkrestore.cli_compare import COMMANDS as COMPARE_COMMANDS
from chunkrestore.cli_jobs import CLUSTER_OPTIONS
from chunkrestore.cli_jobs import COMMANDS as JOB_COMMANDS
from chunkrestore.cli_options import DTYPE_OPTIONS, JOB_OPTIONS, RUN_OPTIONS, Numbers, with_options
from chunkrestore.cli_psf import psf as psf_commands
from chunkrestore.cli_running import (
    chosen_dtype,
    chosen_factor,
    estimate_of,
    first_image,
    plan_of,
    run_job,
)
from chunkrestore.cli_simulate import COMMANDS as SIMULATE_COMMANDS
from chunkrestore.cli_store import COMMANDS as STORE_COMMANDS
from chunkrestore.cli_text import say
from chunkrestore.cli_train import train as train_commands

INTERRUPTED = 75
"""Exit status of a job that can be resumed (EX_TEMPFAIL)."""


_DECONVOLUTION_OPTIONS = (
    click.option(
        "--method",
        default="richardson-lucy",
        show_default=True,
        help="Or gradient-consensus, wiener-butterworth, masked-wiener, wiener, regularized-inverse.",
    ),
    click.option(
        "--iterations", type=int, help="Default 20 for Richardson-Lucy; the most where it stops by itself."
    ),
    click.option("--background", type=float, help="Camera offset, in input intensities; default 0."),
    click.option("--acceleration", type=click.Choice(["heavy-ball", "none"]), help="Default heavy-ball."),
    click.option("--total-variation", type=float, help="Strength, such as 0.002; default 0."),
    click.option("--regularization", type=float, help="Default from the measured signal-to-noise ratio."),
    click.option("--saturation", type=float, help="Voxels at or above it are not believed."),
    click.option("--missing", type=float, help="Voxels of this value were not observed."),
    click.option(
        "--stop",
        type=click.Choice(["i-divergence", "split-data", "none"]),
        help="Let pilot regions decide when.",
    ),
    click.option("--gain", type=float, help="Intensity per photon, for split data; default 1."),
    click.option(
        "--offset", type=float, help="Intensity without any light, if background holds stray light."
    ),
    click.option("--tolerance", type=float, help="Seam error that is allowed; default 0.001."),
)
_DECONVOLUTION_PARAMETERS = (
    "iterations",
    "background",
    "acceleration",
    "total_variation",
    "regularization",
    "saturation",
    "missing",
    "stop",
    "gain",
    "offset",
    "tolerance",
)


_STARDIST_PARAMETERS = (
    "prob_thresh",
    "nms_thresh",
    "normalization",
    "scale",
    "skip_below",
    "suppression",
    "precision",
)
_NETWORK_OPTIONS = (
    click.option(
        "--precision",
        type=click.Choice(["float32", "mixed_float16", "mixed_bfloat16"]),
        default="float32",
        show_default=True,
        help="Of the network's arithmetic.",
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Deconvolve, restore and segment OME-Zarr volumes far larger than memory."""


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("--psf", required=True, help="Point spread function, .tif or .npy; .yaml for one that varies.")
@with_options(_DECONVOLUTION_OPTIONS)
@click.option("--calibrate", is_flag=True, help="Measure the halo that is needed on a part of the image.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@with_options((*DTYPE_OPTIONS, *JOB_OPTIONS))
def deconvolve(source: str, output: str, psf: str, method: str, **options: Any) -> None:
    """Deconvolve an image with its point spread function."""
    from chunkrestore.pipeline import voxel_size_of
    from chunkrestore.pipeline_steps import deconvolution_of

    given = {key: options.pop(key) for key in _DECONVOLUTION_PARAMETERS}
    parameters = {key: value for key, value in given.items() if value is not None}
    for key in ("acceleration", "stop"):
        if parameters.get(key) == "none":
            parameters[key] = None
    voxel_size = options["voxel_size"] or voxel_size_of(first_image(source), options["level"])
    operator = deconvolution_of(method, psf, voxel_size, parameters)
    run_job([operator, *chosen_dtype(options)], source, output, options)


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("--model", required=True, help="Folder of a CARE model, or care3d-demo.")
@click.option(
    "--normalization", nargs=2, type=float, help="Intensities seen as 0 and 1; default percentiles 2, 99.8."
)
@with_options(_NETWORK_OPTIONS)
@click.option(
    "--isotropic",
    metavar="FACTOR",
    help="Make the volume isotropic with a 2-D network: planes per plane, or auto for the ratio of voxel lengths.",
)
@click.option(
    "--upsample",
    metavar="FACTOR",
    help="Make planes between planes with a 3-D network: planes per plane, or auto.",
)
@click.option(
    "--output",
    "predicted",
    type=click.Choice(["mean", "scale"]),
    default="mean",
    show_default=True,
    help="Of a probabilistic model: the image, or the scale of its error.",
)
@with_options((*DTYPE_OPTIONS, *JOB_OPTIONS))
def restore(source: str, output: str, model: str, predicted: str, **options: Any) -> None:
    """Restore an image with a CARE network."""
    from chunkrestore.operators.axial import care_of

    care = {key: options.pop(key) for key in ("normalization", "precision")} | {"output": predicted}
    factors = {key: chosen_factor(options.pop(key), source, options) for key in ("isotropic", "upsample")}
    run_job([care_of(model, **factors, **care), *chosen_dtype(options)], source, output, options)


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="[OUT]", required=False)
@click.option(
    "--method",
    type=click.Choice(["stardist", "semantic", "threshold", "watershed", "function"]),
    default="stardist",
    show_default=True,
)
@click.option(
    "--model", help="Folder of a StarDist model, or stardist3d-demo; for semantic also a .keras file."
)
@click.option("--name", "label_name", default="labels", show_default=True, help="Name of the labels.")
@click.option("--prob-thresh", type=float, help="Object probability; default the model's own.")
@click.option("--nms-thresh", type=float, help="Allowed overlap; default the model's own.")
@click.option(
    "--normalization", nargs=2, type=float, help="Intensities seen as 0 and 1; default percentiles 1, 99.8."
)
@click.option("--scale", type=Numbers(float), help="Zoom of the image before the network; default none.")
@click.option("--skip-below", type=float, help="No object begins at or below this intensity; default none.")
@click.option(
    "--suppression",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="How overlaps are judged.",
)
@with_options(_NETWORK_OPTIONS)
@click.option(
    "--objects",
    type=click.Choice(["table", "shapes"]),
    help="Write a table of the objects (Parquet), or their shapes as well.",
)
@with_options(CLASSICAL_OPTIONS)
@click.option("--function", help="package.module:name, for --method function: labels what a block reads.")
@click.option(
    "--merge",
    type=click.Choice(["iou", "centroid", "touching"]),
    default="iou",
    show_default=True,
    help="When labels of two blocks are one object, for --method function.",
)
@click.option("--merge-threshold", type=float, default=0.5, show_default=True, help="For --merge iou.")
@click.option("--class-name", "class_names", multiple=True, help="Name of a class, from 1 on. Repeatable.")
@click.option(
    "--classes-of",
    type=click.Choice(["objects", "voxels"]),
    help="What has a class, for --method semantic; default objects with a StarDist model.",
)
@click.option("--class-threshold", type=float, help="Of a network with one channel; default 0.5.")
@with_options(JOB_OPTIONS)
def segment(source: str, output: str | None, method: str, model: str | None, **options: Any) -> None:
    """Segment objects and write labels into OUT, or into IN itself."""
    from chunkrestore.operators.base import Operator

    stardist = {key: options.pop(key) for key in _STARDIST_PARAMETERS}
    stardist["class_names"] = options.pop("class_names") or None
    semantic = {"by": options.pop("classes_of"), "threshold": options.pop("class_threshold")}
    classical, function = take_classical(options), options.pop("function")
    smoothing = smoothing_of(classical, source, options)
    merging = {"by": options.pop("merge"), "threshold": options.pop("merge_threshold")}
    operator: Operator
    if method in ("threshold", "watershed"):
        run_job([*smoothing, segmenter_of(method, classical)], source, output or source, options)
        return
    refuse_classical(method, classical)
    if method == "function":
        if function is None:
            raise ValueError("`--function` is missing; give the name of a function, package.module:name")
        from chunkrestore.operators.labeller import Labeller

        depth, normalization = options.pop("depth") or 0, stardist["normalization"]
        operator = Labeller(function, depth=depth, normalization=normalization, **merging)
    elif model is None:
        raise ValueError("`--model` is missing; give the folder of a StarDist model, or stardist3d-demo")
    elif method == "semantic":
        from chunkrestore.operators.semantic import classifier

        if stardist["suppression"] == "exact":  # the default, which is for objects alone
            del stardist["suppression"]
        operator = classifier(model, **stardist, **semantic)
    else:
        from chunkrestore.operators.stardist import StarDist

        operator = StarDist(model, **stardist)
    run_job([*smoothing, operator], source, output or source, options)


@cli.command()
@click.argument("pipeline")
@with_options(RUN_OPTIONS)
def run(pipeline: str, **options: Any) -> None:
    """Run the pipeline of a YAML file."""
    from chunkrestore.pipeline import read_pipeline

    operators, source, output, from_file = read_pipeline(pipeline)
    run_job(operators, source, output, from_file | options)


@cli.command()
@click.argument("pipeline")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--probe", type=click.IntRange(1), help="Compute so many blocks per worker and estimate the time."
)
@with_options(CLUSTER_OPTIONS)
def plan(pipeline: str, as_json: bool, probe: int | None, **options: Any) -> None:
    """Print what a pipeline would do; nothing is written, and nothing computed without --probe."""
    import json

    from chunkrestore.pipeline import read_pipeline

    operators, source, output, from_file = read_pipeline(pipeline)
    made = plan_of(operators, source, output, from_file)
    text, values = str(made), made.describe()
    if probe is not None:
        where = {"cluster": options["profile"] or options["cluster"], "n_workers": options["n_workers"]}
        found = estimate_of(operators, source, from_file | where | {"n_probes": probe})
        text, values = f"{text}\n{found}", values | {"estimate": found.describe()}
    say(json.dumps(values, indent=1) if as_json else text)


@cli.command()
@click.argument("output", metavar="OUT")
@with_options(CLUSTER_OPTIONS)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def demo(output: str, **options: Any) -> None:
    """Deconvolve, restore and segment a simulated and a real volume, and draw the results."""
    from chunkrestore.demo import run_demo

    run_demo(output, **options)


cli.add_command(psf_commands)
cli.add_command(train_commands)
for command in (*SIMULATE_COMMANDS, *STORE_COMMANDS, *JOB_COMMANDS, *COMPARE_COMMANDS):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit 0 done, 1 failed, 2 bad arguments or input, 75 interrupted and resumable."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # An interrupt may hit Dask between two lines of its own clean-up, which then logs a traceback. (A level
    # would not do: Dask sets levels when it is imported.)
    logging.getLogger("tornado.application").addFilter(_nothing)
    with _interrupted_by_signals():
        status = _status(arguments)
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Run a command and return its exit status; an error is one line, after a traceback with ``--verbose``."""
    try:
        return int(cli(arguments, prog_name="chunkrestore", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted; the same command, without --overwrite, goes on where it stopped")
        return INTERRUPTED
    except click.ClickException as error:
        _complain(error.format_message())
        return 2
    except Exception as error:
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exception(error)
        _complain(str(error) or type(error).__name__)
        return _status_of(error)


def _status_of(error: Exception) -> int:
    from chunkrestore.jobs.places import ClusterLostError

    if isinstance(error, ClusterLostError):
        return INTERRUPTED
    bad_input = (ValueError, FileNotFoundError, FileExistsError, ImportError, ConnectionError)
    return 2 if isinstance(error, bad_input) else 1


def _nothing(_record: logging.LogRecord) -> bool:
    """Let no record pass."""
    return False


def _complain(message: str) -> None:
    say(f"chunkrestore: {' '.join(message.split())}", err=True)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1, which batch systems send before they kill, stop a job in an orderly way.

    The blocks in flight come to their end and no others are started. A second signal does what Ctrl-C does: the
    job stops at once, and the blocks in flight are done again later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from chunkrestore.jobs.runner import draining

    def drain(_number: int, _frame: object) -> None:
        if not draining.request():
            raise KeyboardInterrupt
        # Not through `sys.stderr`, which the signal may have interrupted in the middle of a line.
        os.write(
            2, b"chunkrestore: told to stop; finishing the blocks in flight (a second signal stops at once)\n"
        )

    def interrupt(_number: int, _frame: object) -> None:
        # The exception is lost if it strikes inside a finaliser; the runner sees the request all the same.
        draining.request()
        raise KeyboardInterrupt

    draining.forget()
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: drain, signal.SIGUSR1: drain}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        draining.forget()
        for number, handler in previous.items():
            signal.signal(number, handler)

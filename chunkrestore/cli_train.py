"""The verbs that train networks: ``chunkrestore train ...``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from chunkrestore.cli_options import Numbers, with_options
from chunkrestore.cli_text import say

if TYPE_CHECKING:
    from chunkrestore.train import Moment, Schedule, Trained
    from chunkrestore.train.strategies import Strategy

_PATCH = {2: (128, 128), 3: (32, 64, 64)}
"""Voxels of a patch by default, by the number of spatial axes."""


@click.group()
def train() -> None:
    """Train networks on stored images, and measure how far they look."""


_TRAINING_OPTIONS = (
    click.option("--out", "folder", required=True, help="Model folder to write."),
    click.option("--patch-shape", type=Numbers(), help="Voxels of a patch; default 32,64,64 or 128,128."),
    click.option("--patches", "n_patches", type=click.IntRange(2), default=256, show_default=True),
    click.option("--validation", type=float, default=0.1, show_default=True, help="Share that is held back."),
    click.option("--steps", type=click.IntRange(1), help="Optimiser steps; default 4000 without --minutes."),
    click.option("--minutes", type=float, help="Time limit; the learning rate ends with it."),
    click.option("--patience", type=click.IntRange(1), help="Validations without improvement; default all."),
    click.option("--validate-every", type=click.IntRange(1), default=100, show_default=True, help="Steps."),
    click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="Greatest."),
    click.option("--batch", "batch_size", type=click.IntRange(1), help="Patches per step."),
    click.option("--filters", "n_first", type=click.IntRange(1), default=16, show_default=True),
    click.option("--network-depth", type=click.IntRange(1), default=2, show_default=True, help="Poolings."),
    click.option(
        "--percentiles", nargs=2, type=float, help="Seen as 0 and 1; default as restore and segment."
    ),
    click.option("--content", type=float, help="How much must be in a patch; 0 takes any place."),
    click.option("--channel", help="Name or index; several, as in 0,1, if the network takes them together."),
    click.option("--timepoint", type=click.IntRange(0)),
    click.option("--level", type=click.IntRange(0), default=0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True, help="Of weights, patches, augmentation."),
    click.option("-q", "--quiet", is_flag=True, help="Show no progress."),
    click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error."),
)


@train.command("care")
@click.argument("source", metavar="INPUT", required=False)
@click.option("--target", help="What INPUT should look like; not for noise-only.")
@click.option("--pair", "more", nargs=2, multiple=True, metavar="INPUT TARGET", help="Another pair.")
@click.option(
    "--strategy",
    type=click.Choice(["simulated", "two-exposures", "noise2noise", "deconvolved", "noise-only"]),
    default="simulated",
    show_default=True,
    help="Where targets come from.",
)
@click.option("--psf", help="Point spread function: deconvolve INPUT into FOLDER.deconvolved.zarr first.")
@click.option("--iterations", type=click.IntRange(1), default=20, show_default=True, help="For --psf.")
@click.option("--background", type=float, default=0.0, show_default=True, help="For --psf.")
@click.option("--loss", type=click.Choice(["mse", "mae"]), default="mse", show_default=True)
@click.option("--probabilistic", is_flag=True, help="Predict a scale beside every intensity.")
@with_options(_TRAINING_OPTIONS)
def care(source: str | None, target: str | None, more: tuple[tuple[str, str], ...], **options: Any) -> None:
    """Train a CARE network to make INPUT look like its target."""
    from chunkrestore.train import CareNetwork, train_care
    from chunkrestore.train.fit import check_folder

    schedule = _schedule(options, batch_size=4)
    network = CareNetwork(
        n_first=options["n_first"],
        depth=options["network_depth"],
        loss=options["loss"],
        probabilistic=options["probabilistic"],
    )
    check_folder(options["folder"])
    _train(train_care, _strategy(source, target, more, options), schedule, network, options)


@train.command("stardist")
@click.argument("source", metavar="IMAGE")
@click.option("--labels", default="labels", show_default=True, help="Name of the labels in IMAGE.")
@click.option(
    "--pair", "more", multiple=True, metavar="IMAGE", help="Another image with labels of that name."
)
@click.option("--class-labels", "classes", help="Name of labels that hold the class of every voxel.")
@click.option("--class-weights", metavar="N,N,...", help="Of background and classes in the loss; default 1.")
@click.option("--rays", "n_rays", type=click.IntRange(3), default=32, show_default=True)
@click.option("--grid", default="2", show_default=True, help="Voxels between predictions, or z,y,x.")
@click.option(
    "--anisotropy",
    default="extents",
    show_default=True,
    help="How many times shorter objects are in voxels, z,y,x; extents measures it; none.",
)
@click.option("--features", "n_features", type=click.IntRange(1), default=32, show_default=True)
@with_options(_TRAINING_OPTIONS)
def stardist(source: str, labels: str, more: tuple[str, ...], **options: Any) -> None:
    """Train a StarDist network to find the objects that labels of IMAGE mark."""
    from chunkrestore.train import StarDistNetwork, train_stardist
    from chunkrestore.train.fit import check_folder
    from chunkrestore.train.strategies import simulated

    schedule = _schedule(options, batch_size=1)
    grid = _numbers(options["grid"], int, "--grid")
    network = StarDistNetwork(
        n_rays=options["n_rays"],
        grid=grid[0] if len(grid) == 1 else grid,
        anisotropy=_anisotropy(options["anisotropy"]),
        n_first=options["n_first"],
        n_features=options["n_features"],
        depth=options["network_depth"],
        class_weights=options["class_weights"]
        and _numbers(options["class_weights"], float, "--class-weights"),
    )
    check_folder(options["folder"])
    strategy = simulated([source, *more], labels=labels, classes=options["classes"], **_choice(options))
    strategy = replace(strategy, name="labels")
    _train(train_stardist, strategy, schedule, network, options)


@train.command("receptive-field")
@click.argument("model")
@click.option("--voxel-size", type=Numbers(float), help="Micrometres, to be drawn.")
@click.option("--image", help="Measure it on the middle of this image; default noise.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--report", metavar="PNG", help="Picture to write.")
def receptive_field_of(
    model: str, voxel_size: tuple[float, ...] | None, image: str | None, seed: int, report: str | None
) -> None:
    """Measure how far a trained network looks, and how far its layers allow it to look."""
    from chunkrestore.train.receptive_field import middle_of, receptive_field

    shown = middle_of(image) if image else None
    field = receptive_field(model, voxel_size=voxel_size, seed=seed, image=shown)
    for name, value in field.describe().items():
        say(f"{name:<26}{value}")
    if report:
        field.draw(report)
        say(f"wrote {report}")


def _strategy(
    source: str | None, target: str | None, more: tuple[tuple[str, str], ...], options: dict[str, Any]
) -> Strategy:
    """Return the pairs that CARE is trained on."""
    from chunkrestore.train import strategies

    name, psf = options["strategy"], options["psf"]
    if source is None and not more:
        raise ValueError("there is nothing to train on; give INPUT and `--target`, or `--pair`")
    if psf is not None and name != "deconvolved":
        raise ValueError(f"`--psf` belongs to `--strategy deconvolved`, not to {name}")
    if name == "noise-only" or psf is not None:
        if target or more or source is None:
            raise ValueError(f"`--strategy {name}` makes its own targets; give INPUT alone")
        if psf is None:
            return strategies.noise_only(source, **_choice(options))
        return _deconvolved(source, options)
    if source is not None and target is None:
        raise ValueError(f"`--target` is missing for {source}; `--strategy {name}` learns from pairs")
    pairs = ([(source, target)] if source is not None and target is not None else []) + list(more)
    inputs, targets = [one for one, _ in pairs], [other for _, other in pairs]
    if name == "deconvolved":
        return replace(strategies.simulated(inputs, targets, own_numbers=True, **_choice(options)), name=name)
    makers: dict[str, Callable[..., Strategy]] = {
        "simulated": strategies.simulated,
        "two-exposures": strategies.two_exposures,
        "noise2noise": strategies.two_noisy,
    }
    return makers[name](inputs, targets, **_choice(options))


def _deconvolved(source: str, options: dict[str, Any]) -> Strategy:
    from chunkrestore.ome_zarr import open_source
    from chunkrestore.pipeline_steps import deconvolution_of
    from chunkrestore.train.strategies import deconvolved

    if options["level"]:
        raise ValueError("`--psf` deconvolves level 0; leave `--level` out")
    image = open_source(source)
    parameters = {"iterations": options["iterations"], "background": options["background"]}
    size = image.voxel_size if image.calibrated else None
    return deconvolved(
        source,
        f"{options['folder']}.deconvolved.zarr",
        deconvolution_of("richardson-lucy", options["psf"], size, parameters),
        channel=_channel(options["channel"]),
        timepoint=options["timepoint"],
        quiet=options["quiet"],
    )


def _choice(options: dict[str, Any]) -> dict[str, Any]:
    """Return which part of every image is meant."""
    return {key: options[key] for key in ("timepoint", "level")} | {"channel": _channel(options["channel"])}


def _schedule(options: dict[str, Any], *, batch_size: int) -> Schedule:
    from chunkrestore.train import Schedule

    steps, minutes = options["steps"], options["minutes"]
    return Schedule(
        steps=steps if steps or minutes else 4000,
        minutes=minutes,
        learning_rate=options["learning_rate"],
        batch_size=options["batch_size"] or batch_size,
        patience=options["patience"],
        validate_every=options["validate_every"],
    )


def _train(
    train_network: Callable[..., Trained],
    strategy: Strategy,
    schedule: Schedule,
    network: Any,
    options: dict[str, Any],
) -> None:
    """Draw patches, train on them, and write what belongs to a model."""
    from chunkrestore.ome_zarr import open_source
    from chunkrestore.train.card import origin
    from chunkrestore.train.complete import complete

    image = open_source(strategy.pairs[0].image)
    patches = strategy.draw(
        options["patch_shape"] or _PATCH[len(image.spatial_shape)],
        options["n_patches"],
        seed=options["seed"],
        validation=options["validation"],
        percentiles=options["percentiles"],
        content=options["content"],
    )
    say(f"patches    {patches}")
    narrate = None if options["quiet"] else Narrator()
    trained = train_network(
        patches,
        options["folder"],
        seed=options["seed"],
        schedule=schedule,
        network=network,
        progress=narrate,
    )
    size = image.levels[options["level"]].voxel_size if image.calibrated else None
    origins = [origin(pair.image) for pair in strategy.pairs]
    card = complete(trained, patches, voxel_size=size, entries={"origins": origins})
    for name, value in card["scores"].get("validation", {}).items():
        say(f"{name:<15}{value}")
    say(f"wrote      {options['folder']}")


class Narrator:
    """Says where a training is: every few seconds on a terminal, once a minute elsewhere, and at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._every = 3.0 if sys.stderr.isatty() else 60.0
        self._last = clock()
        self._recent: list[float] = []
        self._validation = ""

    def __call__(self, moment: Moment) -> None:
        """Take a step."""
        self._recent.append(moment.loss)
        if moment.validation is not None:
            self._validation = f", validation {moment.validation:.4g}"
        if self._clock() - self._last < self._every and moment.done < 1:
            return
        mean = sum(self._recent) / len(self._recent)
        left = moment.seconds / max(moment.done, 1e-9) * (1 - moment.done)
        say(
            f"step {moment.step}, {moment.done:.0%}: loss {mean:.4g}{self._validation}, {left / 60:.1f} min left",
            err=True,
        )
        self._last = self._clock()
        self._recent.clear()


def _channel(text: str | None) -> Any:
    """Return a channel by name or index, or several."""
    if text is None:
        return None
    parts = [int(part) if part.strip().isdecimal() else part.strip() for part in text.split(",")]
    return parts if len(parts) > 1 else parts[0]


def _anisotropy(text: str) -> Any:
    if text in ("extents", "none"):
        return "extents" if text == "extents" else None
    return _numbers(text, float, "--anisotropy")


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"`{option}` {text!r} must be numbers, separated by commas") from None

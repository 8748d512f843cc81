"""A training as one HTML file with pictures: losses, validation patches, receptive field, the model card."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkrestore.jobs.report_page.markup import Markup, element, join, section, table
from chunkrestore.train import pictures

if TYPE_CHECKING:
    from chunkrestore.train.fit import Trained
    from chunkrestore.train.receptive_field import ReceptiveField
    from chunkrestore.train.validation import Validation

FILE = "training.html"
_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="chunkrestore">
<link rel="icon" href="data:,">
"""
_STYLE = "figure.wide { max-width: none; margin-bottom: 12px; } figure.wide img { width: 100%; border-radius: 8px; }"
_TILES = {
    "gain_db": ("dB gained over the input", "{:+.2f}"),
    "ssim": ("structural similarity", "{:.3f}"),
    "f1_iou_0.5": ("F1 at IoU 0.5", "{:.3f}"),
    "f1_iou_0.7": ("F1 at IoU 0.7", "{:.3f}"),
    "class_accuracy": ("right classes", "{:.1%}"),
}


def training_report(
    trained: Trained,
    card: dict[str, Any],
    *,
    validation: Validation,
    field: ReceptiveField | None = None,
) -> Path:
    """Write ``training.html`` into a model folder.

    Parameters
    ----------
    trained
        Whose losses are drawn.
    card
        From `model_card`.
    validation
        From `validate`: patches that are shown.
    field
        From `receptive_field`.

    Returns
    -------
    Path
        Of the page, which is whole in itself and asks for nothing from anywhere.

    Raises
    ------
    ImportError
        If Matplotlib is missing.
    """
    parts = [
        _heading(card),
        section(
            "Losses", _hint(_how_it_ended(card)), _figure((10, 3.2), pictures.losses_on, trained.history)
        ),
        _examples(card["kind"], validation),
        _field(field),
        _scores(card),
        section("Model card", element("pre", json.dumps(card, indent=1, default=str))),
        element("footer", "Written by chunkrestore. The scores are those of patches that were held back."),
    ]
    style = files("chunkrestore.jobs.report_page").joinpath("page.css").read_text() + _STYLE
    title = element("title", f"{card['name']}: training – chunkrestore")
    head = element("head", Markup(_HEAD), title, element("style", Markup(style)))
    page = element("html", head, element("body", element("main", *parts)), lang="en")
    path = trained.folder / FILE
    path.write_text(f"<!doctype html>\n{page}\n", encoding="utf-8")
    return path


def _heading(card: dict[str, Any]) -> Markup:
    scores = card["scores"].get("validation", {})
    tiles = [
        (form.format(scores[key]), words)
        for key, (words, form) in _TILES.items()
        if scores.get(key) is not None
    ]
    training = card["training"]
    tiles += [
        (f"{training['best_step']}", f"best step of {training['steps_done']}"),
        (f"{training['seconds'] / 60:.1f} min", "training"),
        (f"{card['parameters']:,}", "parameters"),
    ]
    boxes = (element("div", element("strong", v), element("span", w), class_="tile") for v, w in tiles)
    return join(
        (
            element("p", "chunkrestore", class_="brand"),
            element("h1", f"{card['name']} ({card['kind']})"),
            element("p", f"digest {card['digest'][:12]}", class_="path"),
            element("div", *boxes, class_="tiles"),
        )
    )


def _how_it_ended(card: dict[str, Any]) -> str:
    training = card["training"]
    why = {
        "steps": "all steps were done",
        "minutes": "its time was up",
        "patience": "the validation loss no longer fell",
    }
    return (
        f"Training ended after {training['steps_done']} steps: {why[training['stopped_by']]}. The weights after "
        f"step {training['best_step']} are kept as weights_best.h5, which is what every program loads."
    )


def _examples(kind: str, validation: Validation) -> Markup:
    if not validation.shown:
        return section("Validation patches", _hint("No patches were held back."))
    if kind == "care":
        rows = [
            list(zip(("input", "prediction", "target"), sample, strict=True)) for sample in validation.shown
        ]
        figure = _figure((9, 3.0 * len(rows)), pictures.patches_on, rows)
    else:
        samples = [
            (f"patch {i}", image, truth, found) for i, (image, found, truth) in enumerate(validation.shown)
        ]
        figure = _figure((3.2 * len(samples), 3.6), pictures.outlines_on, samples)
    return section("Validation patches", _hint("The middle plane of patches that were held back."), figure)


def _field(field: ReceptiveField | None) -> Markup | None:
    if field is None:
        return None
    hint = (
        f"Voxels that change an output voxel when they change: up to {_axes(field.measured_halo)} beyond whole "
        f"cells of the pooling grid; the layers allow {_axes(field.theoretical)}, which is what blocks are read "
        f"with. 99 % of the influence lies within {_axes(field.effective)}."
    )
    return section("Receptive field", _hint(hint), _figure((11, 3.6), pictures.receptive_field_on, field))


def _axes(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) + " voxels"


def _scores(card: dict[str, Any]) -> Markup:
    rows = [
        (name, key, value)
        for name, scores in card["scores"].items()
        for key, value in (scores.items() if isinstance(scores, dict) else [("", scores)])
    ]
    if not rows:
        return section("Scores", _hint("None: there was no truth to compare with."))
    return section("Scores", table(("data", "score", "value"), rows))


def _hint(text: str) -> Markup:
    return element("p", text, class_="hint")


def _figure(size: tuple[float, float], draw: Callable[[Any, Any], None], what: Any) -> Markup:
    """Return a picture as part of the page."""
    figure, buffer = pictures.new_figure(size), io.BytesIO()
    draw(figure, what)
    figure.savefig(buffer, format="png", dpi=110)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return element("figure", element("img", src=source, alt="picture"), class_="wide")

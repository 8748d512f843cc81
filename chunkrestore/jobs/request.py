"""What a job was asked for, kept beside its manifest so that it can be resumed without the script that began it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkrestore.jobs.ledger import write_atomically
from chunkrestore.ome_zarr import OmeZarrImage, open_source
from chunkrestore.operators.base import Operator
from chunkrestore.operators.saved import NotSavableError, load_operators, save_operators

_FILE = "options.json"
REPEAT = "repeat the command or script that began the job; it goes on where it stopped"
"""What to do where a job cannot be resumed by itself."""


def save_request(
    folder: Path, operators: Sequence[Operator], image: OmeZarrImage, options: Mapping[str, Any]
) -> None:
    """Keep operators, the selected part of the input and the other arguments of `run` in a job's folder.

    What cannot be kept (an operator of the user's own, say) is said there, and again by who tries to resume.
    """
    content: dict[str, Any]
    try:
        save_operators(operators, folder)
        content = {"source": selection_of(image), "options": dict(options)}
    except NotSavableError as error:
        content = {"unsavable": str(error)}
    write_atomically(folder / _FILE, json.dumps(content, indent=1))


def load_request(folder: Path) -> tuple[list[Operator], OmeZarrImage, dict[str, Any]]:
    """Return operators, input and options of the job in `folder`.

    Raises
    ------
    ValueError
        If they were not, or could not be, kept; or the input is not what it was.
    """
    content = read_kept(folder / _FILE)
    return load_operators(folder), selected(content["source"]), content["options"]


def read_kept(path: Path) -> dict[str, Any]:
    """Return what a job's folder tells of how it was begun, from the file that it is kept in.

    Raises
    ------
    ValueError
        If it was not, or could not be, kept.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} does not tell how its job was begun; {REPEAT}") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; {REPEAT}") from None
    if "unsavable" in content:
        raise ValueError(f"{content['unsavable']}; {REPEAT}")
    return content


def selection_of(image: OmeZarrImage) -> dict[str, Any]:
    """Return what finds the selected part of a stored image again."""
    reader = image.source(0)
    picks = {axis: list(pick) for axis, pick in zip(reader.axes, reader.picks, strict=True) if axis in "tc"}
    region = [[pick[0], pick[-1] + 1] for pick in reader.picks[-len(reader.spatial_axes) :]]
    return {
        "store": image.path,
        "opened_with": image.opened_with,
        "array": reader.array_path,
        "picks": picks,
        "region": region if len(image.levels) == 1 else None,
    }


def selected(selection: Mapping[str, Any]) -> OmeZarrImage:
    """Return the part of a stored image that `selection_of` has described."""
    # Jobs that were begun by an earlier version of this package did not note what was said by hand.
    image = open_source(selection["store"], **selection.get("opened_with", {}))
    paths = [level.reader.array_path for level in image.levels]
    if selection["array"] not in paths:
        raise ValueError(f"{image.path} has no level {selection['array']!r} any more; restore it from a copy")
    whole = {"t": list(range(image.n_t)), "c": list(range(image.n_c))}
    picks = {axis: pick for axis, pick in selection["picks"].items() if pick != whole[axis]}
    region = selection["region"]
    return image.select(
        level=paths.index(selection["array"]),
        t=picks.get("t"),
        c=picks.get("c"),
        region=None if region is None else tuple(slice(*bounds) for bounds in region),
    )

"""A simulation on disk, so that its job can go on without the script that began it; never a pickle.

``simulation.json`` holds class names and fields, ``simulation.npz`` the arrays among them. A value in the JSON is a
number, a string, None, a list of values, or an object with one key that tells what it is: ``tuple``, ``array`` (name
in the npz), ``object`` (a class of `chunkrestore.simulate` with its fields), ``psf_field`` or ``image`` (a stored one).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

import chunkrestore.simulate as classes
from chunkrestore.jobs.ledger import write_atomically
from chunkrestore.jobs.request import REPEAT, read_kept, selected, selection_of
from chunkrestore.jobs.simulation import Simulation
from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.psf.varying import PsfField

_FILE, _ARRAYS = "simulation.json", "simulation.npz"


def save_simulation(folder: Path, simulation: Simulation, request: Mapping[str, Any]) -> None:
    """Keep a simulation and the other arguments of its job in the job's folder, unless they are there.

    What cannot be kept (a phantom of the user's own, say) is said there, and again by who tries to resume.
    """
    if (folder / _FILE).exists():
        return
    arrays: dict[str, np.ndarray] = {}
    try:
        content = {
            "phantom": _encoded(simulation.phantom, arrays),
            "microscope": _encoded(simulation.microscope, arrays),
            "request": dict(request),
        }
    except TypeError as error:
        arrays, content = {}, {"unsavable": str(error)}
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    (folder / _ARRAYS).write_bytes(packed.getvalue())
    write_atomically(folder / _FILE, json.dumps(content, indent=1))


def load_simulation(folder: Path) -> tuple[Simulation, dict[str, Any]]:
    """Return the simulation and the other arguments of the job in `folder`.

    Raises
    ------
    ValueError
        If they were not, or could not be, kept; or labels that are imaged are not what they were.
    """
    content = read_kept(folder / _FILE)
    with np.load(folder / _ARRAYS, allow_pickle=False) as stored:
        arrays = dict(stored)
    phantom, microscope = (_decoded(content[key], arrays) for key in ("phantom", "microscope"))
    return Simulation(phantom, microscope, content["request"]["seed"]), content["request"]


def _encoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return `value` as JSON; arrays are added to `arrays` under names of their own."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return value.item()
        case tuple() | list():
            return {"tuple": [_encoded(v, arrays) for v in value]}
        case np.ndarray() if not value.dtype.hasobject:
            arrays[name := str(len(arrays))] = value
            return {"array": name}
        case PsfField():
            return {"psf_field": [_encoded(v, arrays) for v in (value.psfs, value.positions)]}
        case OmeZarrImage():
            return {"image": selection_of(value)}
    name = type(value).__name__
    if is_dataclass(value) and type(value) is _class(name):
        content = {f.name: _encoded(getattr(value, f.name), arrays) for f in fields(value) if f.init}
        return {"object": [name, content]}
    raise TypeError(f"the simulation holds {value!r}, which cannot be saved with the job")


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return what `_encoded` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(_decoded(v, arrays) for v in content)
        case "array":
            return arrays[content]
        case "psf_field":
            return PsfField(*(_decoded(v, arrays) for v in content))
        case "image":
            return selected(content)
        case "object" if (cls := _class(content[0])) is not None:
            return cls(**{name: _decoded(v, arrays) for name, v in content[1].items()})
    raise ValueError(f"unknown kind of value {kind!r}; {REPEAT}")


def _class(name: str) -> Any:
    """Return the public dataclass of `chunkrestore.simulate` that has a name, or None."""
    found = getattr(classes, name, None) if name in classes.__all__ else None
    return found if isinstance(found, type) and is_dataclass(found) else None

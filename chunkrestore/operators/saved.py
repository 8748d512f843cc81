"""Operators on disk, so that a job can go on without the script and the files that it was started from.

``operators.json`` holds class names and fields, ``operators.npz`` the arrays among them; never a pickle.
A value in the JSON is a number, a string, None, a list of values, or an object with one key that tells what
it is: ``tuple``, ``mapping``, ``array`` (name in the npz), ``bits`` (a packed boolean array), ``stored``
(place of a zarr array), ``psf_field`` or ``local_threshold``. Models stay where they are and are known by
folder and digest.

Only classes of this package are made, from exactly the fields that they have, and what they describe must
be what was described when they were saved: a file that was tampered with is an error.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from chunkrestore import backend, models
from chunkrestore.ome_zarr.stored import open_array, place_of_array
from chunkrestore.operators.base import Operator
from chunkrestore.operators.methods import METHODS
from chunkrestore.operators.threshold import LocalThreshold
from chunkrestore.psf.varying import PsfField

Arrays = dict[str, np.ndarray]

_SCHEMA = 1
_MODULES = {name: module for module, name, _ in METHODS.values()} | {
    "AsType": "storing",
    "Care": "care",
    "ClassProbability": "semantic",
    "Copy": "storing",
    "DifferenceOfGaussians": "smoothing",
    "Gaussian": "smoothing",
    "IsotropicCare": "axial",
    "Labeller": "labeller",
    "Median": "smoothing",
    "Semantic": "semantic",
    "StarDist": "stardist",
    "StarDistClasses": "semantic",
    "Threshold": "threshold",
    "TopHat": "smoothing",
    "Watershed": "watershed",
    "UpsamplingCare": "axial",
}
"""Module of every class that can be saved."""


class NotSavableError(TypeError):
    """An operator holds what cannot be written down; the message names the operator and the field."""


def save_operators(operators: Sequence[Operator], folder: Path) -> None:
    """Write operators to ``operators.json`` and ``operators.npz`` in `folder`, which exists.

    Whatever interrupts this, there are both files of one call, or there is no ``operators.json``.

    Parameters
    ----------
    operators
        Of the classes of this package. Point spread functions and masks in memory are written with them;
        a mask that is a zarr array on the local file system is written as its place, a model as its folder
        (or its name, if it ships with this package) and its digest.
    folder
        Where to write.

    Raises
    ------
    NotSavableError
        If an operator is of another class, or a field holds something else (such as a lazy mask).
        Nothing is written.
    """
    arrays: Arrays = {}
    entries = [_entry(operator, arrays) for operator in operators]
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    (folder / "operators.json").unlink(missing_ok=True)
    _write_atomically(folder / "operators.npz", content.getvalue())
    text = json.dumps({"schema": _SCHEMA, "operators": entries}, indent=1, allow_nan=False)
    _write_atomically(folder / "operators.json", text.encode())


def load_operators(folder: Path) -> list[Operator]:
    """Return the operators that `save_operators` wrote to `folder`.

    Each describes itself exactly as the one that was saved did.

    Raises
    ------
    FileNotFoundError
        If none were saved there.
    ValueError
        If the files are damaged or were changed, a model or a stored mask is gone, or a model has changed.
    """
    path = folder / "operators.json"
    text = path.read_bytes()
    try:
        document = json.loads(text)
        if document["schema"] != _SCHEMA:
            raise ValueError(f"schema {document['schema']!r}; this version reads {_SCHEMA}")
        entries = list(document["operators"])
        arrays = _read_arrays(folder / "operators.npz")
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        OSError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path} cannot be read: {_text(error)}; start the job from its script") from error
    loaded = []
    for position, entry in enumerate(entries):
        try:
            if "function" in entry["fields"]:
                _check_owner(path)
            loaded.append(_operator(entry, arrays))
        # Whatever a constructor makes of values that were tampered with.
        except Exception as error:
            raise ValueError(f"{path}: operator {position} cannot be made: {_text(error)}") from error
    return loaded


def _entry(operator: Operator, arrays: Arrays) -> dict[str, Any]:
    """Return what stands for `operator` in the JSON; its arrays are added to `arrays`."""
    name = type(operator).__name__
    if name not in _MODULES or type(operator) is not _class(name):
        raise NotSavableError(
            f"operator {operator.name!r} is of class {type(operator).__qualname__}, which is not one of "
            f"{', '.join(_MODULES)}; a job with it can only be resumed by the script that started it"
        )
    content = {}
    for field in _fields(type(operator)):
        try:
            content[field] = _encoded(getattr(operator, field), arrays)
        except TypeError as error:
            raise NotSavableError(f"`{field}` of operator {operator.name!r} {error}") from None
    entry = {"class": name, "fields": content, "describe": _described(operator)}
    try:
        _operator(json.loads(json.dumps(entry)), arrays)
    except Exception as error:
        raise NotSavableError(
            f"operator {operator.name!r} does not survive saving: {_text(error)}"
        ) from error
    return entry


def _operator(entry: Any, arrays: Mapping[str, np.ndarray]) -> Operator:
    """Return the operator that an entry of the JSON stands for."""
    name, content = entry["class"], entry["fields"]
    if name not in _MODULES:
        raise ValueError(f"class {name!r} is not one of {', '.join(_MODULES)}")
    cls = _class(name)
    if set(content) != set(_fields(cls)):
        raise ValueError(f"{name} has the fields {_fields(cls)}, not {sorted(content)}")
    parameters = {field: _decoded(value, arrays) for field, value in content.items()}
    if "model" in parameters:
        _check_model(parameters["model"])
    operator = cast(Operator, cls(**parameters))
    if _described(operator) != entry["describe"]:
        raise ValueError(f"{name} is not the operator that was saved: it describes itself differently")
    return operator


def _check_owner(path: Path) -> None:
    """Raise unless this user wrote a file that names a function: to go on means to run what it names."""
    if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
        raise ValueError(
            "it names a function to run, and the file belongs to another user; start the job yourself"
        )


def _class(name: str) -> type[Any]:
    return cast(type[Any], getattr(import_module(f"chunkrestore.operators.{_MODULES[name]}"), name))


def _fields(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls) if field.init]


def _described(operator: Operator) -> Any:
    """Return what an operator says of itself, as JSON gives it back."""
    return json.loads(json.dumps(dict(operator.describe()), default=lambda value: value.item()))


def _check_model(model: Any) -> None:
    """Raise unless `model` is what `chunkrestore.models.reference` returns: no URL, nothing relative."""
    if not isinstance(model, str) or not (model in models.SHIPPED or os.path.isabs(model)):
        raise ValueError(f"`model` {model!r} is neither an absolute folder nor a shipped model")


def _encoded(value: Any, arrays: Arrays) -> Any:
    """Return `value` as JSON; arrays are added to `arrays` under names of their own.

    Raises
    ------
    TypeError
        If it cannot be written down; the message goes on after the field's name.
    """
    match value:
        case np.generic():
            return _encoded(value.item(), arrays)
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case tuple():
            return {"tuple": [_encoded(v, arrays) for v in value]}
        case list():
            return [_encoded(v, arrays) for v in value]
        case Mapping():
            return {"mapping": {str(k): _encoded(v, arrays) for k, v in value.items()}}
        case PsfField():
            return {"psf_field": [_encoded(v, arrays) for v in (value.psfs, value.positions)]}
        case LocalThreshold():
            return {"local_threshold": {k: _encoded(v, arrays) for k, v in vars(value).items()}}
    if hasattr(value, "__dlpack__"):
        return _encoded_array(backend.to_numpy(value), arrays)
    if (place := place_of_array(value)) is not None:
        return {"stored": list(place)}
    if callable(value):
        raise TypeError(
            f"holds {value!r}, which no other process can import; define it in a module of its own, and give the "
            "function or its name, 'package.module:name'"
        )
    raise TypeError(
        f"holds {value!r}, which cannot be saved with the job; give numbers, an array in memory, or a zarr "
        "array on the local file system"
    )


def _encoded_array(array: np.ndarray, arrays: Arrays) -> dict[str, Any]:
    name = str(len(arrays))
    if array.dtype.hasobject:
        raise TypeError(f"holds an array of {array.dtype}, which cannot be saved; give numbers")
    if array.dtype != np.bool_:
        arrays[name] = array
        return {"array": name}
    # A mask has as many voxels as the volume.
    arrays[name] = np.packbits(array)
    return {"bits": [name, *array.shape]}


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return what `_encoded` was given."""
    if isinstance(value, list):
        return [_decoded(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tuple":
            return tuple(_decoded(v, arrays) for v in content)
        case "mapping":
            return {k: _decoded(v, arrays) for k, v in content.items()}
        case "array":
            return arrays[content]
        case "bits":
            name, *shape = content
            if math.prod(shape) > 8 * arrays[name].size:
                raise ValueError(f"array {name} is too short for shape {shape}")
            return np.unpackbits(arrays[name], count=math.prod(shape)).astype(np.bool_).reshape(shape)
        case "stored":
            return open_array(*content)
        case "psf_field":
            psfs, positions = (_decoded(v, arrays) for v in content)
            return PsfField(psfs, positions)
        case "local_threshold":
            return LocalThreshold(**{k: _decoded(v, arrays) for k, v in content.items()})
    raise ValueError(f"unknown kind of value {kind!r}")


def _read_arrays(path: Path) -> Arrays:
    """Read the arrays of an npz that `save_operators` wrote.

    They are stored as they are, so that reading them takes no more memory than the file is long.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError(f"{path.name} is compressed, which this package never does")
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

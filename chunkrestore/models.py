"""Trained models on disk: which kind a folder holds, its parameters and digest, loading it once per process.

A model is a folder as CSBDeep and StarDist save it (``config.json``, weights as ``*.h5``, for StarDist
``thresholds.json``), the name of a model that ships with this package, or a model object. Everything but
`load` reads small files only and needs no TensorFlow, so plans and refusals are quick.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TextIO, TypeAlias, cast

import numpy as np

from chunkrestore import keras_files

Kind: TypeAlias = Literal["care", "stardist2d", "stardist3d", "keras"]
"""What a model does: restore (CARE, 2-D or 3-D), find nuclei (StarDist), or anything (a Keras model in one file)."""

Model: TypeAlias = Any
"""A folder, a Keras file, the name of a shipped model, or a CSBDeep CARE, StarDist2D or StarDist3D object."""

SHIPPED = ("care3d-demo", "stardist3d-demo")
"""Names of the models inside this package."""

_INSTALL = 'run: pip install "chunkrestore[dl]"'

_CLASSES: dict[Kind, str] = {"care": "CARE", "stardist2d": "StarDist2D", "stardist3d": "StarDist3D"}
_SAID = {**_CLASSES, "keras": "Keras"}

_OPERATORS = {"IsotropicCARE": "IsotropicCare", "UpsamplingCARE": "UpsamplingCare"}
"""Operators of CSBDeep's classes whose models are stored like CARE models, and predict in a way of their own."""

_UNET = {"backbone": "unet", "n_classes": None, "unet_n_filter_base": 32, "unet_n_conv_per_depth": 2}
_DEFAULTS: dict[Kind, dict[str, Any]] = {
    "care": {},
    "stardist2d": _UNET
    | {"unet_n_depth": 3, "unet_kernel_size": (3, 3), "unet_pool": (2, 2), "net_conv_after_unet": 128},
    "stardist3d": _UNET
    | {"unet_n_depth": 2, "unet_kernel_size": (3, 3, 3), "unet_pool": (2, 2, 2), "net_conv_after_unet": 128},
}
# What StarDist's Config2D and Config3D assume for a key that an older config.json does not have.


def reference(model: Model) -> str:
    """Return a string that names `model` in every process: the name of a shipped model, or an absolute path.

    A model object stands for the folder that it was saved in, since workers load it from there.

    Raises
    ------
    ValueError
        If the folder does not exist or is incomplete, or if an object is of another class, has no folder,
        or has weights or thresholds other than those in its folder.
    """
    if isinstance(model, str | os.PathLike):
        found = folder(model)
        return str(model) if model in SHIPPED else str(found)
    found = _folder_of_object(model)
    saved = load(found)
    if not _same(model, saved):
        raise ValueError(
            f"`model` object {model.name!r} differs from what is saved in {found}, which workers would load; "
            "save its weights with `model.keras_model.save_weights(...)`, and pass thresholds to the operator"
        )
    return str(found)


def folder(model: Model) -> Path:
    """Return the resolved folder of `model`, or its Keras file; a shipped name means that model (``./name`` a folder).

    Raises
    ------
    ValueError
        If it does not exist, or lacks ``config.json`` or weights.
    """
    if not isinstance(model, str | os.PathLike):
        return _folder_of_object(model)
    if model in SHIPPED:
        path = Path(str(files("chunkrestore").joinpath("shipped_models", str(model))))
    else:
        path = Path(model).expanduser().resolve()
    if keras_files.is_keras_file(path):
        return path
    if not path.is_dir():
        raise ValueError(
            f"`model` {os.fspath(model)!r} does not exist; give a model folder or a shipped model: "
            f"{', '.join(SHIPPED)}"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"`model` {path} has no config.json; give the folder that CSBDeep or StarDist saved")
    weights_file(path)
    return path


def weights_file(path: Path) -> Path:
    """Return the weights that CSBDeep loads from a folder: the newest named ``best``, else the newest.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = sorted((*path.glob("*.h5"), *path.glob("*.hdf5")), key=lambda f: f.stat().st_mtime, reverse=True)
    if not found:
        raise ValueError(f"`model` {path} has no weights (*.h5); train the model or copy its weights there")
    return next((f for f in found if "best" in f.name), found[0])


def kind(model: Model, *accepted: Kind) -> Kind:
    """Return what a model does, from its ``config.json`` alone.

    Parameters
    ----------
    model
        Folder, shipped name or object.
    accepted
        Kinds that the caller can use; any when none is given.

    Raises
    ------
    ValueError
        If it is neither a CARE nor a StarDist model, or not of an accepted kind.
    """
    path = folder(model)
    found = "keras" if path.is_file() else _kind_of(path, _read_json(path / "config.json"))
    if accepted and found not in accepted:
        wanted = " or ".join(_SAID[k] for k in accepted)
        raise ValueError(f"`model` {path} is a {_SAID[found]} model; a {wanted} model is needed here")
    return found


def config(model: Model) -> SimpleNamespace:
    """Return the parameters in ``config.json`` as attributes, as in CSBDeep's and StarDist's ``Config``.

    Keys that an older StarDist did not write have that library's default values. Of a Keras file, what
    `chunkrestore.keras_files.config` returns.

    Raises
    ------
    ValueError
        If it is neither a CARE nor a StarDist model.
    """
    path = folder(model)
    if path.is_file():
        return keras_files.config(path)
    entries = _read_json(path / "config.json")
    return SimpleNamespace(**_DEFAULTS[_kind_of(path, entries)] | entries)


def thresholds(model: Model) -> tuple[float, float]:
    """Return the thresholds (probability, overlap) of a StarDist model, chosen as StarDist does.

    A missing file or a value outside (0, 1) means StarDist's own defaults, 0.5 and 0.4.
    """
    path = folder(model) / "thresholds.json"
    entries = _read_json(path) if path.is_file() else {}
    prob, nms = (entries.get(name) for name in ("prob", "nms"))
    return (
        float(prob) if prob is not None and 0 < prob < 1 else 0.5,
        float(nms) if nms is not None and 0 < nms < 1 else 0.4,
    )


def digest(model: Model) -> str:
    """Return the SHA-256 (hexadecimal) of a model's configuration, thresholds and weights."""
    path = folder(model)
    if path.is_file():
        parts = [path]
    else:
        named = (path / "config.json", path / "thresholds.json", weights_file(path))
        parts = [p for p in named if p.is_file()]
    return _digest_of(tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in parts))


def check_digest(model: Model, expected: str | None) -> str:
    """Return the `digest` of a model; raise `ValueError` if it is not the expected one (None: any)."""
    actual = digest(model)
    if expected is not None and actual != expected:
        raise ValueError(
            f"`model` {folder(model)} is not the expected one: its digest begins with {actual[:12]}, "
            f"not with {expected[:12]}"
        )
    return actual


_loaded: dict[Path, tuple[str, Any]] = {}
_load_lock = threading.RLock()


def load(model: Model, *, expected_digest: str | None = None) -> Any:
    """Return the CSBDeep or StarDist object of a model; a folder or file is loaded once per process.

    What is returned has a ``keras_model``; of a Keras file, nothing else.

    Parameters
    ----------
    model
        Folder, shipped name or object; an object is returned as it is.
    expected_digest
        What `digest` must return: so that a job's workers use the model that the job was planned with.

    Raises
    ------
    ImportError
        If TensorFlow, CSBDeep or StarDist is not installed.
    ValueError
        If the folder is missing, incomplete, of an unknown kind, not the expected one, or its weights are
        corrupt or do not fit its configuration.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    path = folder(model)
    actual = check_digest(path, expected_digest)
    with _load_lock:
        if path not in _loaded or _loaded[path][0] != actual:
            _loaded[path] = (actual, _load(path))
        return _loaded[path][1]


def tensorflow() -> Any:
    """Import TensorFlow, set up for this package, and return it.

    Variables that are set already are kept: ``TF_ENABLE_ONEDNN_OPTS=1`` (not the default on every CPU;
    3-D convolutions are several times faster), ``TF_CPP_MIN_LOG_LEVEL=2``, and
    ``TF_FORCE_GPU_ALLOW_GROWTH=true`` (otherwise TensorFlow takes all device memory from CuPy), and
    ``OMP_WAIT_POLICY=passive`` (StarDist's idle OpenMP threads would spin, and slow its suppression down).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(f"TensorFlow cannot be imported: {error}; {_INSTALL}") from error
    return tf


def _load(path: Path) -> Any:
    tensorflow()
    if path.is_file():
        with quiet():
            return SimpleNamespace(keras_model=keras_files.load(path))
    name = _CLASSES[kind(path)]
    with quiet():
        try:
            if name == "CARE":
                from csbdeep.models import CARE as Class  # noqa: N811
            else:
                import stardist.models

                Class = getattr(stardist.models, name)
        except ImportError as error:
            raise ImportError(f"{name} models cannot be imported: {error}; {_INSTALL}") from error
        try:
            return Class(None, name=path.name, basedir=str(path.parent))
        except Exception as error:
            raise ValueError(
                f"`model` {path} cannot be loaded: {weights_file(path).name} is corrupt or does not fit "
                f"config.json ({type(error).__name__}: {error})"
            ) from error


def check_class(model: Model, *accepted: str) -> None:
    """Raise `ValueError` if a model object is of one of CSBDeep's classes that predict in another way.

    Folders do not tell the class: an isotropic, an upsampling and a plain CARE network are stored alike.

    Parameters
    ----------
    model
        Folder, shipped name or object.
    accepted
        Names of the classes of objects that the caller can use.
    """
    for name in (c.__name__ for c in type(model).__mro__):
        if name in _OPERATORS and name not in accepted:
            raise ValueError(f"`model` is of class {name}; use the operator {_OPERATORS[name]} for it")


def _folder_of_object(model: Any) -> Path:
    classes = [c.__name__ for c in type(model).__mro__]
    if "ProjectionCARE" in classes or not set(_CLASSES.values()).intersection(classes):
        raise ValueError(
            f"`model` is of class {type(model).__name__}; give a folder, a shipped model "
            f"({', '.join(SHIPPED)}) or an object of class {', '.join(_CLASSES.values())}; save other Keras "
            "models as .keras files"
        )
    if model.basedir is None:
        raise ValueError(
            f"`model` object {model.name!r} has no folder (basedir=None) from which workers could load it; "
            "create it with `basedir=` and save its weights there"
        )
    return folder(Path(model.basedir) / model.name)


def _same(a: Any, b: Any) -> bool:
    """Return whether two model objects give the same results."""
    with quiet():
        weights, others = a.keras_model.get_weights(), b.keras_model.get_weights()
    return (
        len(weights) == len(others)
        and all(np.array_equal(w, other) for w, other in zip(weights, others, strict=True))
        and getattr(a, "thresholds", None) == getattr(b, "thresholds", None)
    )


def _kind_of(path: Path, entries: dict[str, Any]) -> Kind:
    n_dim = entries.get("n_dim")
    if {"n_rays", "grid"} <= entries.keys() and n_dim in (2, 3):
        return "stardist2d" if n_dim == 2 else "stardist3d"
    # Networks of other shape or purpose whose configurations extend CARE's.
    derived = any(key.startswith(("n2v_", "denoiseg_", "proj_")) for key in entries)
    if {"probabilistic", "unet_kern_size", "unet_n_first", "unet_n_depth"} <= entries.keys() and not derived:
        return "care"
    if "proj_axis" in entries:
        raise ValueError(
            f"`model` {path} is a ProjectionCARE model, which makes a plane of a volume; blocks of an image of another "
            "dimension are not supported, use csbdeep.models.ProjectionCARE"
        )
    raise ValueError(f"`model` {path} is neither a CARE nor a StarDist model, judging by its config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`model` file {path} is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`model` file {path} must hold one JSON object")
    return entries


@lru_cache(maxsize=256)
def _digest_of(parts: tuple[tuple[str, int, int], ...]) -> str:
    """Hash files; their names, times and sizes are the cache key."""
    total = hashlib.sha256()
    for name, _, _ in parts:
        with open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class _Without(io.TextIOBase):
    """Standard output without what the creating thread prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what CSBDeep and StarDist print while loading, and the warnings of the libraries below them."""
    with contextlib.redirect_stdout(cast(TextIO, _Without(sys.stdout))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

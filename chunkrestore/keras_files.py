"""Keras models in files: what they are, told without Keras, and loading them without running code that they hold.

A file is refused unless everything in it that Keras would make by name is Keras' own: no ``Lambda`` layers and no
serialised functions, which hold Python code, and no classes of other modules, which would have to be imported.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SUFFIXES = (".keras", ".h5", ".hdf5")
"""Of files that are taken for Keras models."""

_LARGEST_DESCRIPTION = 2**26
"""Bytes of JSON. A network of a thousand layers takes two million."""

_CODE = ("Lambda", "__lambda__", "function")
_HOMES = ("layers", "models", "ops", "initializers", "regularizers", "constraints", "dtype_policies")
_OF_KERAS = ("Functional", "Sequential", "Model", "DTypePolicy")
"""What comes from ``keras`` itself and not from one of these parts of it: nothing that reaches files or the network."""

_DAMAGE = (
    *(KeyError, TypeError, IndexError, OSError, RecursionError, zipfile.BadZipFile),
    *(json.JSONDecodeError, UnicodeDecodeError),
)


def is_keras_file(path: Path) -> bool:
    """Return whether `path` is a file with the suffix of a Keras model."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def config(path: Path) -> SimpleNamespace:
    """Return what a model takes: ``axes``, ``n_dim``, ``n_channel_in``, and its ``description`` as Keras stored it.

    Raises
    ------
    ValueError
        If the file is damaged, holds code or classes that are not Keras' own, or its input is no 2-D or 3-D image with
        channels last.
    ImportError
        If the file is in HDF5 and h5py is not installed.
    """
    stat = path.stat()
    return _config(path, stat.st_mtime_ns, stat.st_size)


def load(path: Path) -> Any:
    """Return the model in a file, for images of any size.

    Raises
    ------
    ValueError
        As `config`; also if the weights are damaged or do not fit.
    """
    wanted = config(path)
    import keras

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(
            f"`model` {path} cannot be loaded: it is damaged or Keras {keras.__version__} does not read it "
            f"({type(error).__name__}: {error})"
        ) from error
    # Lists with one input or output become that itself: Keras warns of calls in another structure.
    model = keras.Model(model.inputs[0], model.outputs[0])
    if all(n is None for n in model.inputs[0].shape[1:-1]):
        return model
    # Saved for one size of images; weights do not depend on it.
    anew = keras.Input((None,) * wanted.n_dim + (wanted.n_channel_in,), dtype=model.inputs[0].dtype)
    resized = keras.models.clone_model(model, input_tensors=anew)
    resized.set_weights(model.get_weights())
    return resized


@lru_cache(maxsize=16)
def _config(path: Path, *_: int) -> SimpleNamespace:
    """Read a description; time and size of the file are part of the cache's key."""
    try:
        description = json.loads(_text(path))
        kept = {"class_name": description["class_name"], "config": description["config"]}
        _check_safe(kept, path)
        shape = _input_shape(kept["config"])
    except _DAMAGE as error:
        raise ValueError(
            f"`model` {path} is no model that Keras has saved ({type(error).__name__}: {error}); save it with "
            "`model.save('NAME.keras')`"
        ) from error
    if shape is None or len(shape) not in (4, 5) or not isinstance(shape[-1], int):
        raise ValueError(
            f"`model` {path} takes arrays of shape {shape}; only images (batch, [z,] y, x, channels) can be used"
        )
    n_dim = len(shape) - 2
    axes = "ZYXC"[3 - n_dim :]
    return SimpleNamespace(axes=axes, n_dim=n_dim, n_channel_in=shape[-1], description=kept)


def _text(path: Path) -> str | bytes:
    """Return the description in a file."""
    if path.suffix.lower() == ".keras":
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as member:
            text: str | bytes = member.read(_LARGEST_DESCRIPTION + 1)
    else:
        try:
            import h5py  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                f'`model` {path} is read by h5py: pip install "chunkrestore[dl]" ({error})'
            ) from error
        with h5py.File(path) as file:
            if "model_config" not in file.attrs:
                raise ValueError(
                    f"`model` {path} holds weights alone; save the whole model with `model.save('NAME.keras')`"
                )
            text = file.attrs["model_config"]
    if len(text) > _LARGEST_DESCRIPTION:
        raise ValueError(
            f"`model` {path} is described in more than {_LARGEST_DESCRIPTION} bytes; it is no network"
        )
    return text


def _check_safe(description: Any, path: Path) -> None:
    """Raise `ValueError` if anything in a description is not Keras' own."""
    for entry in _made_by_name(description):
        name, module = entry["class_name"], entry.get("module")
        registered = entry.get("registered_name")
        if name in _CODE or ">" in str(name):
            raise ValueError(
                f"`model` {path} holds {name!r} ({_called(entry)}), which is or names Python code, and code from files "
                "is never run; replace it by layers of Keras (such as Rescaling or Activation) and save the model anew"
            )
        if not _is_own(name, module) or (registered is not None and registered != name):
            raise ValueError(
                f"`model` {path} holds {registered or name!r} of module {module!r} ({_called(entry)}), which is not "
                "Keras' own; use layers of Keras and save the model anew"
            )


def _is_own(name: Any, module: Any) -> bool:
    """Return whether Keras makes a class of this name of its own parts for networks."""
    if module is None:
        return True
    first, *parts = str(module).split(".")
    parts = parts[1:] if parts[:1] == ["src"] else parts
    return first == "keras" and (parts[0] in _HOMES if parts else name in _OF_KERAS)


def _made_by_name(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if "class_name" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _made_by_name(part)


def _called(entry: Mapping[str, Any]) -> str:
    content = entry.get("config")
    name = entry.get("name") or (content.get("name") if isinstance(content, Mapping) else content)
    return f"layer {name!r}"


def _input_shape(config: Mapping[str, Any]) -> list[Any] | None:
    """Return the shape of a model's input with its batch axis, or None if it does not tell."""
    if not config["layers"]:
        return None
    first = config["layers"][0]
    while first["class_name"] in ("Sequential", "Functional", "Model"):
        first = first["config"]["layers"][0]
    content = first["config"]
    shape = content.get("batch_shape") or content.get("batch_input_shape")
    if shape is None:
        shape = (first.get("build_config") or {}).get("input_shape") or config.get("build_input_shape")
    return None if shape is None else list(shape)

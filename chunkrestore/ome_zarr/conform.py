"""Whether the attributes of an image conform to the specification, with the key that does not.

Models of the specification (ome-zarr-models) judge 0.4 and 0.5; what they report in a roundabout way, or not at all, is
checked here. 0.1 to 0.3 and 0.6 are checked by `chunkrestore.ome_zarr.older` and `chunkrestore.ome_zarr.newer`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from chunkrestore.ome_zarr.limits import MAX_LEVELS, short
from chunkrestore.ome_zarr.metadata import as_dicts
from chunkrestore.ome_zarr.store import Json, check_member

# Of scales and translations in any unit: two of them and a unit multiply to a number, never to 0 or infinity.
_LONGEST = 1e100


_warnings = threading.Lock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Let no warning through; in one thread at a time, since Python would leave filters of one to another."""
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_multiscale(ome: Json, where: str) -> Json:
    """Return the first multiscale of `ome`, the default of the specification where there are several.

    Raises
    ------
    ValueError
        If there is none, or its levels are not listed with paths inside the group.
    """
    multiscales = ome.get("multiscales")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], dict):
        raise ValueError(f"{where}: `multiscales` is empty or no list of objects; the store is damaged")
    multiscale: Json = multiscales[0]
    datasets = multiscale.get("datasets")
    if len(as_dicts(datasets)) > MAX_LEVELS:
        raise ValueError(
            f"{where}: `multiscales[0].datasets` lists more than {MAX_LEVELS} levels; no pyramid has"
        )
    if not isinstance(datasets, list) or not datasets or len(as_dicts(datasets)) < len(datasets):
        raise ValueError(
            f"{where}: `multiscales[0].datasets` {short(datasets)} must be a list of at least one object; the store is "
            "damaged"
        )
    for k, entry in enumerate(datasets):
        if not isinstance(entry.get("path"), str):
            raise ValueError(
                f"{where}: `multiscales[0].datasets[{k}].path` {short(entry.get('path'))} must be the path of an array"
            )
        check_member(entry["path"], where)
    return multiscale


def validate(ome: Json, version: str, where: str) -> Json:
    """Return the first multiscale of `ome` if it conforms to the specification of 0.4 or 0.5.

    Raises
    ------
    ValueError
        With the first key that does not conform.
    """
    multiscale = first_multiscale(ome, where)
    check_lengths(multiscale, where)
    _check_model(multiscale, version, where)
    return multiscale


def check_lengths(multiscale: Json, where: str) -> None:
    """Check what models report in a roundabout way or not at all.

    Raises
    ------
    ValueError
        If a scale or translation does not fit the axes, is not finite, a scale is not positive or is listed last.
    """
    axes = multiscale.get("axes")
    if not isinstance(axes, list):
        return  # the model names the key
    owners = [(f"level {d.get('path')!r}", d) for d in as_dicts(multiscale.get("datasets"))]
    for owner, holder in [*owners, ("the multiscale", multiscale)]:
        steps = as_dicts(holder.get("coordinateTransformations"))
        for step in steps:
            if step.get("type") in ("scale", "translation"):
                check_vector(step, len(axes), owner, where)
        if [step.get("type") for step in steps] == ["translation", "scale"]:
            raise ValueError(
                f"{where}: `coordinateTransformations` of {owner} list the translation before the scale, which leaves "
                "open in what unit it is; list the scale first"
            )


def check_vector(step: Json, n_axes: int, owner: str, where: str) -> list[float]:
    """Return the numbers of a scale or translation, one per axis.

    Raises
    ------
    ValueError
        If they are stored in a file, or there are more or fewer, or they are not finite, or a scale is not positive.
    """
    kind = step["type"]
    vector = step.get(kind)
    if vector is None and "path" in step:
        raise ValueError(f"{where}: {owner} stores its {kind} in a file, which is not supported")
    if not isinstance(vector, list) or len(vector) != n_axes:
        n = len(vector) if isinstance(vector, list) else "no"
        raise ValueError(f"{where}: {kind} of {owner} has {n} numbers but there are {n_axes} axes")
    least = 1 / _LONGEST if kind == "scale" else -_LONGEST
    if not all(type(v) in (int, float) and least <= v <= _LONGEST for v in vector):
        raise ValueError(
            f"{where}: {kind} {short(vector)} of {owner} must hold finite numbers, a scale above 0, none "
            f"beyond {_LONGEST:g}"
        )
    return vector


def _check_model(multiscale: Json, version: str, where: str) -> None:
    from pydantic import ValidationError

    if version == "0.4":
        from ome_zarr_models.v04.multiscales import Multiscale
    else:
        from ome_zarr_models.v05.multiscales import Multiscale
    try:
        with without_warnings():
            Multiscale.model_validate(multiscale)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # pydantic names models between the keys; keys of the specification begin in lower case
        steps = [
            p
            for p in first["loc"]
            if isinstance(p, int) or (p[:1].islower() and "[" not in p and p != "transforms")
        ]
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in steps)
        message = " ".join(str(first["msg"]).split()).removeprefix("Value error, ")
        raise ValueError(
            f"{where}: `multiscales[0]{key}` does not conform to OME-Zarr {version}: {message}"
        ) from None

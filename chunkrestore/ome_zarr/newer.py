"""OME-Zarr 0.6 (RFC-5), read as what 0.5 would have in its place.

In 0.6 a multiscale lists coordinate systems. Every level is mapped into one of them, the same for all, which the
specification calls intrinsic and wants "used for viewing and processing". So it is here: its axes are the image's, and
a level may reach it by scale, translation, identity, a permutation of axes, and sequences of these. What leads from
there to further systems (a stage, an atlas) says nothing of the image itself; it is not applied, whatever its
type, but kept under ``rfc5`` of the multiscale, because it goes on to be true of a processed image.

There is one exception. Where the intrinsic system is that of the array, in voxels, the first further system with
axes in space that such a mapping reaches takes its place.

0.9.dev1 differs in that axes may have any order, which nothing here relies on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr.conform import check_lengths, check_vector, first_multiscale
from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.metadata import COORDINATES_KEY, as_dicts
from chunkrestore.ome_zarr.store import Json

_READ_HERE = ("coordinateSystems", "coordinateTransformations")


@dataclass(frozen=True)
class _Mapping:
    """Coordinate ``i`` after it is ``scale[i] * x[source[i]] + offset[i]`` of the coordinates ``x`` before it."""

    source: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def then(self, last: _Mapping) -> _Mapping:
        """Return this mapping followed by `last`."""
        return _Mapping(
            tuple(self.source[j] for j in last.source),
            tuple(s * self.scale[j] for j, s in zip(last.source, last.scale, strict=True)),
            tuple(
                s * self.offset[j] + o for j, s, o in zip(last.source, last.scale, last.offset, strict=True)
            ),
        )


def as_current(ome: Json, version: str, where: str) -> Json:
    """Return the first multiscale with the axes and levels of its intrinsic coordinate system, as 0.5 has them.

    Parameters
    ----------
    ome
        Attributes of a version in `chunkrestore.ome_zarr.metadata.NEWER`.
    version
        That version.
    where
        Path of the group, for messages.

    Raises
    ------
    ValueError
        With the key that does not conform, or the transformation that is not supported.
    """
    multiscale = first_multiscale(ome, where)
    systems = _systems(multiscale, version, where)
    steps = [_only_step(entry, k, version, where) for k, entry in enumerate(multiscale["datasets"])]
    names = {_name(step.get("output")) for step in steps}
    name = names.pop()
    if names or name not in systems:
        raise _refusal(
            where, "datasets", version, "the `output` of all levels must name one of the `coordinateSystems`"
        )
    axes = systems[name]
    mappings = [
        _mapping(step, len(axes), f"level {entry['path']!r}", where)
        for step, entry in zip(steps, multiscale["datasets"], strict=True)
    ]
    if all(axis.get("type") == "array" for axis in axes):
        name, axes, further = _calibrated(multiscale, systems, name, where)
        mappings = [mapping.then(further) for mapping in mappings]
    source = mappings[0].source
    if any(mapping.source != source for mapping in mappings):
        raise _refusal(where, "datasets", version, "levels have their axes in different orders")
    result = _in_order_of_arrays(multiscale, axes, mappings)
    check_lengths(result, where)
    if len(systems) > 1:
        result[COORDINATES_KEY] = {
            "system": name,
            **{k: multiscale[k] for k in _READ_HERE if k in multiscale},
        }
    return result


def _in_order_of_arrays(multiscale: Json, axes: list[Json], mappings: list[_Mapping]) -> Json:
    """Return the multiscale with axes and levels in the order of the stored axes."""
    order = sorted(range(len(axes)), key=mappings[0].source.__getitem__)
    datasets = [
        metadata.dataset(entry["path"], [m.scale[i] for i in order], [m.offset[i] for i in order], entry)
        for entry, m in zip(multiscale["datasets"], mappings, strict=True)
    ]
    kept = {key: value for key, value in multiscale.items() if key not in _READ_HERE}
    return {**kept, "axes": [dict(axes[i]) for i in order], "datasets": datasets}


def _systems(multiscale: Json, version: str, where: str) -> dict[str, list[Json]]:
    """Return the axes of every coordinate system, by its name."""
    systems = multiscale.get("coordinateSystems")
    if not isinstance(systems, list) or not systems:
        raise _refusal(where, "coordinateSystems", version, "must be a list of at least one object")
    found: dict[str, list[Json]] = {}
    for k, system in enumerate(systems):
        name, axes = (system.get("name"), system.get("axes")) if isinstance(system, dict) else (None, None)
        if not isinstance(name, str) or not name or name in found:
            raise _refusal(
                where, f"coordinateSystems[{k}].name", version, f"{short(name)} must be a name of its own"
            )
        if not isinstance(axes, list) or not axes or not all(_is_axis(axis) for axis in axes):
            raise _refusal(
                where, f"coordinateSystems[{k}].axes", version, "must be a list of objects with a `name`"
            )
        if len({axis["name"] for axis in axes}) < len(axes):
            raise _refusal(where, f"coordinateSystems[{k}].axes", version, "names must be unique")
        found[name] = axes
    return found


def _is_axis(axis: Any) -> bool:
    return (
        isinstance(axis, dict)
        and isinstance(axis.get("name"), str)
        and isinstance(axis.get("type"), str | None)
        and isinstance(axis.get("unit"), str | None)
    )


def _only_step(entry: Json, k: int, version: str, where: str) -> Json:
    """Return the transformation of a level."""
    steps = entry.get("coordinateTransformations")
    if not isinstance(steps, list) or len(steps) != 1 or not isinstance(steps[0], dict):
        raise _refusal(
            where, f"datasets[{k}].coordinateTransformations", version, "must be a list of exactly one object"
        )
    step: Json = steps[0]
    return step


def _calibrated(
    multiscale: Json, systems: dict[str, list[Json]], intrinsic: str, where: str
) -> tuple[str, list[Json], _Mapping]:
    """Return name and axes of the first system in space that can be reached from that of the array, and how.

    Where none is linked, the axes of the array remain, in space or not as their names tell.
    """
    n, refused = len(systems[intrinsic]), None
    for step in as_dicts(multiscale.get("coordinateTransformations")):
        name = _name(step.get("output"))
        axes = systems.get(name, [])
        is_linked = _name(step.get("input")) == intrinsic and len(axes) == n
        if is_linked and any(axis.get("type") == "space" for axis in axes):
            try:
                return name, axes, _mapping(step, n, "the multiscale", where)
            except ValueError as error:
                refused = refused or error
    if refused is not None:
        raise refused
    named = [
        {**axis, "type": metadata.AXIS_TYPES.get(axis["name"].lower(), "array")}
        for axis in systems[intrinsic]
    ]
    return intrinsic, named, _identity(n)


def _mapping(step: Json, n_axes: int, owner: str, where: str) -> _Mapping:
    """Return what a transformation does to coordinates.

    Raises
    ------
    ValueError
        If it does more than to scale, to move or to permute axes.
    """
    kind = step.get("type")
    same = _identity(n_axes)
    if kind == "identity":
        return same
    if kind == "scale":
        return _Mapping(same.source, tuple(check_vector(step, n_axes, owner, where)), same.offset)
    if kind == "translation":
        return _Mapping(same.source, same.scale, tuple(check_vector(step, n_axes, owner, where)))
    if kind == "mapAxis":
        order = step.get("mapAxis")
        if (
            not isinstance(order, list)
            or not all(type(i) is int for i in order)
            or sorted(order) != list(same.source)
        ):
            raise ValueError(
                f"{where}: mapAxis {short(order)} of {owner} must hold each of 0 to {n_axes - 1} once"
            )
        return _Mapping(tuple(order), same.scale, same.offset)
    if (
        kind == "sequence"
        and isinstance(parts := step.get("transformations"), list)
        and as_dicts(parts) == parts
    ):
        for part in parts:
            same = same.then(_mapping(part, n_axes, owner, where))
        return same
    raise ValueError(
        f"{where}: {owner} reaches its coordinate system by transformation {short(kind)}, which is not supported, only "
        "scale, translation, identity, mapAxis and a sequence of these; resample the image first, or open the array of "
        "the level itself with `axes`, which reads intensities alone"
    )


def _identity(n_axes: int) -> _Mapping:
    return _Mapping(tuple(range(n_axes)), (1.0,) * n_axes, (0.0,) * n_axes)


def _name(reference: Any) -> str:
    """Return the name of a coordinate system of this group that `reference` gives, empty if it gives none."""
    if isinstance(reference, dict):
        return "" if reference.get("path") else str(reference.get("name") or "")
    return reference if isinstance(reference, str) else ""  # as in drafts of 0.6


def _refusal(where: str, key: str, version: str, reason: str) -> ValueError:
    return ValueError(f"{where}: `multiscales[0].{key}` does not conform to OME-Zarr {version}: {reason}")

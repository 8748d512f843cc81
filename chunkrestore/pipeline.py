"""Pipelines as YAML files: what to read, what to do with it, where to write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from chunkrestore.operators.base import Operator
from chunkrestore.pipeline_steps import Section, Step, Three


class Pipeline(Section):
    """Content of a pipeline file; keys are the arguments of `chunkrestore.run`."""

    input: str
    output: str
    steps: Annotated[list[Step], Field(min_length=1)]
    block: Three | None = None
    depth: int | Three | None = None
    calibrate: bool = False
    memory: int | str | None = None
    device: str = "cpu"
    level: int = 0
    timepoint: int | list[int] | None = None
    channel: str | int | list[str | int] | None = None
    region: list[tuple[int, int]] | None = None
    label_name: str = "labels"
    objects: Literal["table", "shapes"] | None = None
    version: Literal["0.4", "0.5"] = "0.5"
    shards: Three | None = None
    compression: str = "zstd"
    checksums: bool = False


def read_pipeline(path: str | os.PathLike[str]) -> tuple[list[Operator], str, str, dict[str, Any]]:
    """Read a pipeline file.

    Parameters
    ----------
    path
        YAML file; paths in it are relative to its folder.

    Returns
    -------
    operators : list
        The steps.
    source, output : str
        Stores to read and write.
    options : dict
        The other arguments of `chunkrestore.run`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a pipeline; the message names each wrong key.
    """
    import yaml

    folder = Path(path).parent
    if not Path(path).is_file():
        raise FileNotFoundError(f"pipeline {path} does not exist")
    try:
        pipeline = Pipeline.model_validate(yaml.safe_load(Path(path).read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"pipeline {path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"pipeline {path} is not valid: {wrong}") from None
    options = pipeline.model_dump(exclude={"input", "output", "steps"})
    options["block_shape"] = options.pop("block")
    source = _store(folder, pipeline.input)
    voxel_size = voxel_size_of(source, pipeline.level)
    operators = [step.build(folder, voxel_size) for step in pipeline.steps]
    return operators, source, _store(folder, pipeline.output), options


def voxel_size_of(source: str, level: int = 0) -> tuple[float, ...] | None:
    """Return the micrometres per spatial axis of a stored image, or None if they cannot be told."""
    from chunkrestore.ome_zarr import open_source

    try:
        image = open_source(source)
    except (ValueError, FileNotFoundError):
        return None  # whoever reads it says why
    return image.levels[level].voxel_size if image.calibrated and level < len(image.levels) else None


def _store(folder: Path, store: str) -> str:
    """Return a store's path; a URL stays as it is."""
    return store if "://" in store else str(folder / store)

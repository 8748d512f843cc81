"""From the options of a verb to a job, its plan, or one job per field of a collection."""

from __future__ import annotations

from typing import Any

from chunkrestore.cli_text import say

BY_HAND = ("axes", "voxel_size", "series")
"""What is said of a single image."""

_SELECTION = ("level", "timepoint", "channel", "region")
_CUTTING = ("block_shape", "depth", "memory", "shards", "version")


def run_job(operators: list[Any], source: str, output: str, options: dict[str, Any]) -> None:
    """Run or, with ``--dry-run``, print the plan; of a collection one job per field."""
    dry_run, _ = options.pop("dry_run"), options.pop("verbose")
    chosen = {key: list(options.pop(key, ())) or None for key in ("wells", "fields")}
    collection = collection_at(source)
    if collection is not None:
        _run_fields(operators, collection.select(**chosen), output, options, dry_run=dry_run)
        return
    if any(chosen.values()):
        raise ValueError(f"`--well` and `--field` choose images of a collection, and {source} is none")
    if dry_run:
        say(plan_of(operators, source, output, options))
        return
    from chunkrestore.jobs.run import run

    report = run(operators, opened(source, options), output, page=True, **options)
    if not options["quiet"]:
        say(report)


def _run_fields(
    operators: list[Any], collection: Any, output: str, options: dict[str, Any], *, dry_run: bool
) -> None:
    options = single_images_only(options, collection.path)
    if dry_run:
        say(f"fields     {len(collection.fields)}, of which the first one:")
        say(plan_of(operators, collection.first.path, output, options))
        return
    from chunkrestore.jobs.fields import run_fields, summary

    reports = run_fields(operators, collection, output, page=True, **options)
    if not options["quiet"]:
        say(summary(reports))


def plan_of(operators: list[Any], source: str, output: str, options: dict[str, Any]) -> Any:
    """Return the plan of a job."""
    from chunkrestore.jobs.prepare import plan

    return plan(operators, opened(source, options), output, **_chosen(options, *_SELECTION, *_CUTTING))


def estimate_of(operators: list[Any], source: str, options: dict[str, Any]) -> Any:
    """Return how long a job would take."""
    from chunkrestore.jobs.prepare import estimate

    where = ("n_probes", "cluster", "n_workers", "device")
    return estimate(operators, opened(source, options), **_chosen(options, *_SELECTION, *_CUTTING, *where))


def chosen_dtype(options: dict[str, Any]) -> list[Any]:
    """Take ``--dtype`` and ``--intensity-range`` out of `options`; return the operator that they stand for, if any."""
    from chunkrestore.operators.storing import choice_of_dtype

    return list(choice_of_dtype(options.pop("dtype"), options.pop("intensity_range")))


def chosen_factor(told: str | None, source: str, options: dict[str, Any]) -> float | None:
    """Return the planes per plane that an option tells: a number, or ``auto`` for the ratio of voxel lengths."""
    from chunkrestore.operators.sampling import factor_of
    from chunkrestore.pipeline import voxel_size_of

    if told != "auto":
        try:
            return None if told is None else float(told)
        except ValueError:
            raise ValueError(f"`factor` {told!r} must be a number such as 4, or auto") from None
    return factor_of(options["voxel_size"] or voxel_size_of(first_image(source), options["level"]))


def opened(source: str, options: dict[str, Any]) -> Any:
    """Take what was said of an input by hand out of `options`; return the image, or just its path."""
    hand = {key: options.pop(key, None) for key in BY_HAND}
    if not any(value is not None for value in hand.values()):
        return source
    from chunkrestore.ome_zarr import open_source

    return open_source(source, **hand)


def single_images_only(options: dict[str, Any], path: str) -> dict[str, Any]:
    """Return `options` for the collection at `path`, without what is said of single images; raise if it was said."""
    for key in BY_HAND:
        if options.get(key) is not None:
            raise ValueError(f"`{key}` is for single images; the fields of {path} tell it themselves")
    return {key: value for key, value in options.items() if key not in BY_HAND}


def first_image(source: str) -> str:
    """Return `source`, or the path of its first field if it is a collection."""
    collection = collection_at(source)
    return source if collection is None else str(collection.first.path)


def collection_at(source: str) -> Any:
    """Return the collection of images at a path or URL, or None if there is something else or nothing."""
    from chunkrestore.ome_zarr import store as stores
    from chunkrestore.ome_zarr.collection import collection_of

    path = stores.location(source)
    node = stores.read_node(path)
    return None if node is None else collection_of(path, node)


def _chosen(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}

"""A job as one HTML file, for people: what ran, how fast, what went wrong, and what became of the image.

The file is whole in itself. It asks for nothing from anywhere, which its own content security policy enforces,
so it can be opened from a disk, sent by mail, or kept beside the data for good.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from chunkrestore.jobs.events import event_lines, read_events
from chunkrestore.jobs.fields_record import begun_jobs
from chunkrestore.jobs.ledger import work_folder_of
from chunkrestore.jobs.report_page import activity, overview
from chunkrestore.jobs.report_page.markup import Markup, element, join
from chunkrestore.jobs.report_page.material import Material
from chunkrestore.jobs.report_page.slices import View, opened, selected_input, views
from chunkrestore.jobs.report_page.summary import Summary
from chunkrestore.ome_zarr import OmeZarrImage
from chunkrestore.ome_zarr.store import join as join_path
from chunkrestore.ome_zarr.store import location

_PAGE = "report.html"


def write_report(
    output: str | os.PathLike[str],
    *,
    job: str | None = None,
    work_folder: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the page of every job of an output, whatever state they are in, and return the paths.

    Parameters
    ----------
    output
        Store that the jobs write.
    job
        ``"image"`` or ``"labels-NAME"``, of a field of a collection ``"FIELD/image"``; all by default.
    work_folder
        Where jobs keep their files, if not beside the output.

    Raises
    ------
    FileNotFoundError
        If there is no such job.
    OSError
        If a page cannot be written.
    """
    target = location(output)
    work = work_folder_of(target, work_folder)
    jobs = begun_jobs(work, target)
    chosen = {name: begun for name, begun in jobs.items() if job in (None, name)}
    if not chosen:
        known = ", ".join(jobs) or "none"
        which = "job" if job is None else f"`job` {job!r}"
        raise FileNotFoundError(f"there is no {which} in {work} (it holds {known}); give the output of a job")
    return [write_html(folder, store) for store, folder in chosen.values()]


def write_html(job_folder: str | os.PathLike[str], output: str, *, image: OmeZarrImage | None = None) -> Path:
    """Write ``report.html`` into a job's folder, whatever state the job is in.

    Parameters
    ----------
    job_folder
        ``OUT.chunkrestore/JOB``, with at least a manifest. Events are read as a stream: memory and the page stay
        small, however many blocks there were.
    output
        Store that the job writes. What is not published there is not shown.
    image
        Input, cut to what is processed; by default it is opened as the manifest says. If it cannot be, the
        page says so.

    Returns
    -------
    Path
        Of the page, which replaces an earlier one at once.

    Raises
    ------
    FileNotFoundError
        If there is no job in the folder.
    OSError
        If the page cannot be written.
    """
    folder = Path(job_folder)
    job = _material(folder, str(output), image)
    partial = folder / f"{_PAGE}.{os.getpid()}.partial"
    try:
        partial.write_text(_page(job), encoding="utf-8")
        partial.replace(folder / _PAGE)
    finally:
        partial.unlink(missing_ok=True)
    return folder / _PAGE


def _material(folder: Path, output: str, image: OmeZarrImage | None) -> Material:
    manifest = json.loads((folder / "manifest.json").read_text())
    report, decided = _read_json(folder / "report.json"), _decided(folder / "journal.jsonl")
    summary = Summary(read_events(folder / "events.jsonl"))
    last = summary.runs[-1].state if summary.runs else ""
    state = "done" if report else last if last in ("failed", "interrupted", "error") else "unfinished"
    try:
        shown, why = _views(manifest, decided, output, image), ""
    except (OSError, ValueError, KeyError) as error:
        shown, why = [], str(error) or type(error).__name__
    return Material(
        folder=folder,
        output=output,
        state=state,
        summary=summary,
        manifest=manifest,
        options=_read_json(folder / "options.json").get("options", {}),
        report=report,
        decided=decided,
        views=shown,
        no_views=why,
    )


def _views(
    manifest: dict[str, Any], decided: dict[str, Any], output: str, image: OmeZarrImage | None
) -> list[View]:
    """Return slices of the input, and of those outputs that the journal says are published."""
    label_name = (manifest.get("output") or {}).get("labels")
    n_image_passes = len(manifest.get("passes", [])) - (label_name is not None)
    before = selected_input(manifest) if image is None else image
    # Something else may lie there that the job is about to replace.
    image_path = join_path(output, (manifest.get("output") or {}).get("group", ""))
    result = opened(image_path) if decided.get(f"published-image-{n_image_passes - 1}") else None
    labels = opened(f"{output.rstrip('/')}/labels/{label_name}") if decided.get("published-labels") else None
    return views(before, result, labels)


def _page(job: Material) -> str:
    assets = files("chunkrestore.jobs.report_page")
    style, script, page = (assets.joinpath(f"page.{kind}").read_text() for kind in ("css", "js", "html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = (
        overview.heading(job),
        overview.slices(job),
        overview.quality(job),
        overview.what_ran(job),
        overview.planned(job),
        activity.timing(job),
        activity.blocks(job),
        _footer(job.summary),
    )
    title = element("title", f"{job.title}: {job.state} – chunkrestore")
    return Template(page).substitute(
        title=title, style=Markup(style), script=Markup(script), script_sha256=digest, body=join(parts)
    )


def _footer(summary: Summary) -> Markup:
    spoilt = f" {summary.n_spoilt} events could not be understood." if summary.n_spoilt else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return element(
        "footer", f"Written by chunkrestore on {written}. Times are those of this machine.{spoilt}"
    )


def _decided(journal: Path) -> dict[str, Any]:
    """Return what a journal keeps as decided once, without holding its blocks."""
    decided: dict[str, Any] = {}
    for line in event_lines(journal):
        if line.startswith(b'{"value"') and line.endswith(b"\n"):
            entry = json.loads(line)
            decided[entry["value"]] = entry["payload"]
    return decided


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file does not exist."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return content

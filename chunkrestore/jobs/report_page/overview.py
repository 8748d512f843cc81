"""Sections that say what a job is and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chunkrestore.jobs.passes import format_nbytes
from chunkrestore.jobs.progress import format_seconds
from chunkrestore.jobs.report_page.markup import Markup, element, facts, section, shortened, table
from chunkrestore.jobs.report_page.material import Material
from chunkrestore.jobs.report_page.slices import View
from chunkrestore.jobs.report_page.words import clock, shape_text


def heading(job: Material) -> Markup:
    """Return name, state and the figures that matter most."""
    summary, seams = job.summary, job.report.get("seams") or []
    n_done = sum(stage.n_done for stage in summary.stages.values())
    tiles = [
        ("wall time", format_seconds(summary.now) if summary.now else None),
        ("blocks done", f"{n_done:,}"),
        ("megavoxels/s", None if job.voxels_per_second is None else f"{job.voxels_per_second / 1e6:.3g}"),
        ("objects", None if job.n_objects is None else f"{job.n_objects:,}"),
        ("worst seam (rms)", f"{seams[0]['rms']:.1e}" if seams else None),
        ("failed", summary.n_failed),
        ("retries", f"{summary.n_retried:,}"),
    ]
    shown = [
        element(
            "div",
            element("strong", value),
            element("span", name),
            class_="tile bad" if name == "failed" and summary.failed else "tile",
        )
        for name, value in tiles
        if value is not None
    ]
    return element(
        "header",
        element("p", "chunkrestore", class_="brand"),
        element("h1", job.title, " ", element("span", job.state, class_=f"badge {_word(job.state)}")),
        element("p", job.output, class_="path"),
        element("div", *shown, class_="tiles"),
    )


def slices(job: Material) -> Markup:
    """Return the slices with their slider."""
    if not job.views:
        return section("Before and after", element("p", f"No slices: {job.no_views}.", class_="hint"))
    has_after = any(view.after for view in job.views)
    has_labels = any(view.labels for view in job.views)
    after = "the result" if has_after else "its labels"
    hint = (
        f"Move the line: the input is on its left, {after} on its right."
        if has_after or has_labels
        else "Only the input: the result is not published yet."
    )
    switches = [
        element(
            "label",
            "brightness ",
            element("input", type="range", min=1, max=8, step=0.1, value=1, id="brightness"),
        )
    ]
    if has_labels:
        box = element("input", type="checkbox", id="labels", checked=True)
        switches.append(element("label", box, " labels"))
    return section(
        "Before and after",
        element("p", hint, class_="hint"),
        element("div", *switches, class_="switches"),
        element("div", *(_comparison(view) for view in job.views), class_="views"),
    )


def _comparison(view: View) -> Markup:
    height, width = view.shape
    layer = [
        element("img", src=view.after, alt="result") if view.after else None,
        element("img", src=view.labels, alt="labels", class_="overlay") if view.labels else None,
    ]
    parts = [element("img", src=view.before, alt="input", class_="before")]
    if any(layer):
        parts += [
            element("div", *layer, class_="after"),
            element("div", class_="line"),
            element(
                "input", type="range", min=0, max=100, step=0.5, value=50, aria_label="share of the input"
            ),
        ]
    return element(
        "figure",
        element("div", *parts, class_="compare", style=f"aspect-ratio:{width}/{height}"),
        element("figcaption", element("strong", view.title), f": {view.caption}"),
    )


def what_ran(job: Material) -> Markup:
    """Return operators, input, output, versions and machines."""
    passes = job.manifest.get("passes") or job.plan.get("passes", [])
    planned = [operator for work in passes for operator in work.get("operators", [])]
    resolved = _of_first_plane(job.report.get("operators") or [])
    cards = [_operator(operator) for operator in resolved or planned]
    source, versions = job.manifest.get("input", {}), job.manifest.get("versions", {})
    where = " / ".join(str(source[key]) for key in ("store", "array") if source.get(key))
    several = job.plan.get("n_timepoints", 1) * job.plan.get("n_channels", 1)
    note = (
        f"Numbers of the first of {several} time points and channels." if several > 1 and resolved else None
    )
    return section(
        "What ran",
        element("div", *cards, class_="cards"),
        element("p", note, class_="hint") if note else None,
        facts(
            [
                ("input", where),
                ("output", job.output),
                ("labels", (job.manifest.get("output") or {}).get("labels")),
                ("options", ", ".join(f"{k} = {v}" for k, v in job.options.items() if v is not None)),
                ("machines", ", ".join(job.summary.hosts)),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ]
        ),
        table(
            ("began", "machine", "process", "resumed", "blocks", "time", "end"),
            (
                (
                    clock(run.began),
                    run.host,
                    run.pid,
                    "yes" if run.resumed else "no",
                    run.n_blocks,
                    format_seconds(run.last - run.began),
                    shortened(f"{run.state}: {run.message}" if run.message else run.state),
                )
                for run in job.summary.runs
            ),
            id="runs",
        ),
    )


def _of_first_plane(operators: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the operators of the first time point and channel, without saying so on each."""
    planes = [(one.get("timepoint"), one.get("channel")) for one in operators]
    return [
        {key: value for key, value in one.items() if key not in ("timepoint", "channel")}
        for one, plane in zip(operators, planes, strict=True)
        if plane == planes[0]
    ]


def _operator(operator: Mapping[str, Any]) -> Markup:
    parameters = [(k, shortened(v, 120)) for k, v in operator.items() if k != "operator" and v is not None]
    return element(
        "div", element("h3", shortened(operator.get("operator"), 120)), facts(parameters), class_="card"
    )


def planned(job: Material) -> Markup:
    """Return the passes, and what they read, write and take."""
    plan = job.plan
    calibration = job.report.get("calibration") or job.manifest.get("calibration") or {}
    several = f"{plan.get('n_timepoints', 1)} time points, {plan.get('n_channels', 1)} channels"
    return section(
        "Plan",
        facts(
            [
                ("volume", f"{shape_text(plan.get('shape'))} {plan.get('dtype', '')}, {several}"),
                ("read", _nbytes(plan, "read_nbytes")),
                ("written, before compression", _nbytes(plan, "written_nbytes")),
                ("disk, before compression", _nbytes(plan, "disk_nbytes")),
            ]
            if plan.get("shape")
            else []
        ),
        table(_PASS_HEAD, (_pass_row(work) for work in plan.get("passes", [])), id="plan"),
        element("h3", "Calibration") if calibration else None,
        facts((key.replace("_", " "), shortened(value)) for key, value in calibration.items()),
    )


_PASS_HEAD = (
    *("pass", "blocks", "of voxels", "depth of halo", "chunks", "read per voxel"),
    *("memory of a block", "of a worker"),
)


def _pass_row(work: Mapping[str, Any]) -> tuple[Any, ...]:
    stored = shape_text(work.get("chunks"))
    if work.get("shards"):
        stored += f" in shards {shape_text(work['shards'])}"
    return (
        " → ".join(str(operator.get("operator")) for operator in work.get("operators", [])),
        shape_text(work.get("n_blocks")),
        shape_text(work.get("block_shape")),
        "; ".join(shape_text(depth) for depth in work.get("depth", [])),
        stored,
        f"{work['halo_overhead']:.2f}" if "halo_overhead" in work else "",
        _nbytes(work, "memory_nbytes") or "",
        _nbytes(work, "worker_nbytes") or "",
    )


def quality(job: Material) -> Markup:
    """Return seams and objects."""
    seams = job.report.get("seams") or []
    rows = [
        (
            "zyx"[-len(s["position"]) :][s["axis"]],
            shape_text(s["position"]),
            f"{s['rms']:.2e}",
            f"{s['max']:.2e}",
        )
        for s in seams
    ]
    objects = [("objects", f"{job.n_objects:,}" if job.n_objects is not None else None)]
    objects.append(("rounds until settled", str(job.n_rounds) if job.n_rounds is not None else None))
    parts = [
        element("p", "Measured across block borders, relative to the dynamic range.", class_="hint")
        if rows
        else None,
        table(("axis", "at voxel", "rms", "largest"), rows, id="seams") if rows else None,
        facts(objects) if job.n_objects is not None else None,
    ]
    title = "Seams and objects" if rows and job.n_objects is not None else "Seams" if rows else "Objects"
    return section(title, *parts) if any(parts) else Markup()


def _nbytes(plan: Mapping[str, Any], key: str) -> str | None:
    return format_nbytes(plan[key]) if plan.get(key) else None


def _word(state: str) -> str:
    """Return a state as the name of a class: letters only."""
    return "".join(letter for letter in state if letter.isalpha())

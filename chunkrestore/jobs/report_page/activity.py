"""Sections that say how a job went: time, speed, and blocks that stand out."""

from __future__ import annotations

import math
from typing import Any

from chunkrestore.jobs.progress import format_seconds
from chunkrestore.jobs.report_page.drawing import Row, Tick, figure, share_bar, time_ticks
from chunkrestore.jobs.report_page.histograms import edge
from chunkrestore.jobs.report_page.markup import Markup, element, section, shortened, table
from chunkrestore.jobs.report_page.material import Material
from chunkrestore.jobs.report_page.summary import PHASES, StageSummary, Summary
from chunkrestore.jobs.report_page.words import clock, duration, place

_MOST_ROWS = 100
_MOST_WORKERS = 32
_COARSEST = 8
"""Intervals of the summary that one bar unites at most."""


def timing(job: Material) -> Markup:
    """Return time per stage, throughput over time and what blocks spent their time on."""
    summary = job.summary
    longest = max((stage.seconds for stage in summary.stages.values()), default=0.0) or 1.0
    rows: list[tuple[Any, ...]] = [_stage_row(name, stage, longest) for name, stage in summary.stages.items()]
    # Some work is done by the driver alone, or before there is a file of events.
    known = {name.split("-")[0] for name in summary.stages}
    unlogged = {name: seconds for name, seconds in job.report.get("seconds", {}).items() if name not in known}
    rows += [
        (name, "", format_seconds(seconds), _bar(seconds / longest), "", "", "", "")
        for name, seconds in unlogged.items()
    ]
    head = ("stage", "blocks", "time", "", "median", "95 %", "slowest", "read · compute · write")
    return section(
        "Time",
        element("div", *(_key(phase) for phase in PHASES), class_="keys"),
        table(head, rows, id="stages"),
        element(
            "p",
            "Median, 95 % (good to 5 %) and slowest are of whole tasks: besides reading, computing and writing "
            "they wait for other blocks of their worker.",
            class_="hint",
        ),
        *_throughput(summary),
        *_distribution(summary),
        *_workers(summary),
    )


def _stage_row(name: str, stage: StageSummary, longest: float) -> tuple[Any, ...]:
    total = stage.durations["total"]
    spent = {phase: stage.durations[phase].total for phase in PHASES}
    of_all = sum(spent.values())
    n_items = max(stage.n_items, stage.n_done)
    return (
        name,
        f"{stage.n_done:,}" if stage.n_done == n_items else f"{stage.n_done:,} of {n_items:,}",
        format_seconds(stage.seconds),
        _bar(stage.seconds / longest),
        duration(total.quantile(0.5)) if total.n else "",
        duration(total.quantile(0.95)) if total.n else "",
        duration(total.longest) if total.n else "",
        share_bar([(phase, seconds / of_all) for phase, seconds in spent.items()]) if of_all else "",
    )


def _throughput(summary: Summary) -> list[Markup]:
    width = summary.seconds_per_moment
    span = width * _COARSEST * (int(summary.now / width) // _COARSEST + 1)
    rows = []
    for name, stage in summary.stages.items():
        if n_blocks := stage.durations["total"].n:
            counts = _legible(stage.moments.counts[: round(span / width)], n_blocks)
            rates = [count * len(counts) / span for count in counts]
            rows.append(Row(name, rates, f"{max(rates):.3g}/s", "ink"))
    if not rows:
        return []
    marks = [at / span for at in summary.restarts]
    resumed = " Dashed lines: the job was resumed; the time between runs is left out." if marks else ""
    return [
        element("h3", "Blocks per second over time"),
        element("p", f"Each stage to its own scale, its highest rate on the right.{resumed}", class_="hint"),
        figure("Blocks per second over time, by stage", rows, time_ticks(span), marks),
    ]


def _legible(counts: list[int], n_blocks: int) -> list[int]:
    """Unite intervals in pairs while few blocks would leave gaps between bars."""
    used = [i for i, count in enumerate(counts) if count]
    width = 1
    while width < _COARSEST and n_blocks * width < 4 * (used[-1] - used[0] + 1):
        width *= 2
    return [sum(counts[i : i + width]) for i in range(0, len(counts), width)]


def _distribution(summary: Summary) -> list[Markup]:
    """Return how long reading, computing and writing took in the stage that took most."""
    stages = {n: s for n, s in summary.stages.items() if any(s.durations[phase].n for phase in PHASES)}
    if not stages:
        return []
    name = max(stages, key=lambda n: stages[n].durations["total"].total)
    phases = {p: d for p, d in stages[name].durations.items() if p in PHASES and d.n}
    used = [i for d in phases.values() for i, count in enumerate(d.counts) if count]
    first, last = max(0, min(used) - 6), max(used) + 7
    rows = [
        Row(phase, d.counts[first:last], f"median {duration(d.quantile(0.5))}", f"{phase} fill")
        for phase, d in phases.items()
    ]
    return [
        element("h3", f"Seconds of a block in {name}"),
        element("p", "Number of blocks over seconds, on a logarithmic scale.", class_="hint"),
        figure(f"Distribution of seconds of blocks in {name}", rows, _decades(first, last)),
    ]


def _decades(first: int, last: int) -> list[Tick]:
    """Return ticks at 1, 2 and 5 times powers of ten within bins of `Durations`."""
    low, high = edge(first), edge(last)
    values = [m * 10.0**e for e in range(-5, 7) for m in (1, 2, 5)]
    inside = [v for v in values if low <= v <= high]
    if len(inside) > 9:
        inside = [v for v in inside if f"{v:e}"[0] == "1"]
    return [Tick(math.log(v / low) / math.log(high / low), duration(v)) for v in inside]


def _workers(summary: Summary) -> list[Markup]:
    if not summary.workers:
        return []
    busiest = sorted(summary.workers.items(), key=lambda pair: -pair[1][1])
    rows = [(name, f"{n:,.0f}", format_seconds(seconds)) for name, (n, seconds) in busiest[:_MOST_WORKERS]]
    more = len(busiest) - len(rows)
    return [
        element("h3", "Workers"),
        table(("worker", "blocks", "time of their tasks"), rows, id="workers"),
        *([element("p", f"and {more} more", class_="hint")] if more else []),
    ]


def blocks(job: Material) -> Markup:
    """Return failed, repeated and slow blocks."""
    summary = job.summary
    rows: list[tuple[Any, ...]]
    parts: list[Markup] = []
    if summary.failed:
        rows = [
            (stage, place(item), cause, shortened(message, 500))
            for (stage, item), (cause, message) in list(summary.failed.items())[:_MOST_ROWS]
        ]
        parts += [
            element("h3", f"Failed: {summary.n_failed}"),
            table(("stage", "block", "cause", "message"), rows, id="failed"),
        ]
    if summary.retries:
        by_cause = ", ".join(f"{n:,} × {cause}" for cause, n in summary.causes.most_common())
        rows = [
            (
                clock(event["time"]),
                event.get("stage"),
                place(event.get("item", ())),
                event.get("cause"),
                event.get("attempt", ""),
                shortened(event.get("message", ""), 300),
            )
            for event in reversed(summary.retries)
        ]
        parts += [
            element("h3", f"Retries: {summary.n_retried:,}"),
            element(
                "p",
                by_cause + (f"; the last {len(rows)}:" if len(rows) < summary.n_retried else ""),
                class_="hint",
            ),
            table(("time", "stage", "block", "cause", "attempt", "message"), rows, id="retries"),
        ]
    if summary.slowest:
        rows = [
            (
                block.stage,
                place(block.item),
                duration(block.total),
                *(duration(block.seconds[p]) if p in block.seconds else "" for p in PHASES),
                block.worker,
            )
            for block in sorted(summary.slowest, reverse=True)
        ]
        parts += [
            element("h3", "Slowest"),
            table(("stage", "block", "seconds", *PHASES, "worker"), rows, id="slowest"),
        ]
    n_split = sum(stage.n_split for stage in summary.stages.values())
    if n_split:
        parts.append(element("p", f"{n_split:,} blocks did not fit into memory and were done in parts."))
    return section("Blocks", *parts) if parts else Markup()


def _bar(share: float) -> Markup:
    return share_bar([("ink", share)])


def _key(phase: str) -> Markup:
    return element("span", element("span", class_=f"swatch {phase}"), phase)

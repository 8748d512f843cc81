"""Run one stage after the other: what is finished is skipped, what happens is noted, shown and logged."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chunkrestore.jobs.events import Events
from chunkrestore.jobs.ledger import Item, Ledger
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.runner import Arguments, BlockError, Failed, Finished, Happening, Retried, Runner

_MOST_FAILED = 100
"""Given up blocks after which a stage is given up."""
_MOST_FAILED_FIRST = 10
"""The same, while no block has succeeded: then it is not the blocks."""


@dataclass
class Conductor:
    """Runs stages on a cluster, remembers finished blocks in the ledger and times in the report."""

    runner: Runner
    """Where tasks run."""
    ledger: Ledger
    """What is done."""
    progress: Progress
    """What is shown."""
    events: Events
    """What is logged."""
    report: Report
    """What will be told."""

    def run(
        self, name: str, items: Collection[Item], function: Callable[..., Any], arguments: Arguments
    ) -> Mapping[Item, Any]:
        """Run `function` on the items that are not finished yet; return what every item reported.

        Raises
        ------
        BlockError
            If items were given up, after all others are finished: the stage is not done, and no later stage
            may begin.
        """
        record = self.ledger.begin_stage(name, len(items))
        if record.done:
            self.report.n_resumed += len(record.finished)
            return record.finished
        n_before = len(record.finished)
        self.report.n_resumed += n_before
        # Those that failed last come first: whether their cause is mended shows at once.
        again = dict.fromkeys(record.failed)
        todo = itertools.chain(again, (i for i in items if i not in record.finished and i not in again))
        failures: list[Failed] = []
        with self._stage(name, items, n_before) as told:
            for happening in self.runner.map(function, todo, arguments):
                told(happening)
                if isinstance(happening, Finished):
                    self.ledger.record(name, happening.item, happening.outcome.result)
                    self.report.n_done += 1
                elif isinstance(happening, Failed):
                    self.ledger.fail(name, happening.item, happening.cause, happening.message)
                    failures.append(happening)
                    if _hopeless(failures, len(record.finished) - n_before):
                        break
        if failures:
            self.ledger.sync()
            raise BlockError(failures, len(items)) from failures[0].error
        self.ledger.end_stage(name)
        return record.finished

    def each(
        self, name: str, items: Collection[Item], function: Callable[..., Any], arguments: Arguments
    ) -> Iterator[tuple[Item, Any]]:
        """Yield items with their results; nothing is noted in the ledger, and the first failure is the end."""
        with self._stage(name, items) as told:
            for happening in self.runner.map(function, items, arguments):
                told(happening)
                if isinstance(happening, Failed):
                    raise BlockError([happening], len(items)) from happening.error
                if isinstance(happening, Finished):
                    yield happening.item, happening.outcome.result

    @contextmanager
    def _stage(
        self, name: str, items: Collection[Item], n_before: int = 0
    ) -> Iterator[Callable[[Happening], None]]:
        """Show and time a stage; yields a function that is told what happens."""
        self.events.emit("stage", stage=name, n_items=len(items), n_done=n_before)
        started, n_voxels = time.monotonic(), getattr(items, "n_voxels", None)
        shown = self.progress.stage(name, len(items), n_before, n_voxels=n_voxels)
        with self.timed(name), shown as advance:

            def told(happening: Happening) -> None:
                kind, fields = _event_of(happening)
                self.events.emit(kind, stage=name, **fields)
                if isinstance(happening, Finished):
                    advance(happening.outcome.total)
                elif isinstance(happening, Retried):
                    advance.note("retry")
                    self.report.n_retried += 1
                else:
                    advance.note("failed")

            yield told
        self.events.emit("stage_end", stage=name, seconds=round(time.monotonic() - started, 3))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of a stage to the report; numbered stages count as one."""
        stage, started = name.split("-")[0], time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.monotonic() - started


def _hopeless(failures: Sequence[Failed], n_done: int) -> bool:
    """Whether going on would only fill a list: the disk is full, or what fails is not single blocks."""
    return failures[-1].cause == "full" or len(failures) >= (_MOST_FAILED if n_done else _MOST_FAILED_FIRST)


def _event_of(happening: Happening) -> tuple[str, dict[str, Any]]:
    """Return kind and fields of the event that tells what happened."""
    if isinstance(happening, Finished):
        outcome = happening.outcome
        fields: dict[str, Any] = {
            "item": list(happening.item),
            "worker": outcome.worker,
            "seconds": outcome.seconds,
            "total": outcome.total,
        }
        if isinstance(outcome.result, dict) and "n_parts" in outcome.result:
            fields["n_parts"] = outcome.result["n_parts"]
        return "block", fields
    fields = {"item": list(happening.item), "cause": happening.cause, "message": happening.message}
    if isinstance(happening, Failed):
        return "failed", fields
    return "retry", fields | {"attempt": happening.attempt, "delay": happening.delay}

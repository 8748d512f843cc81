"""What a job shows while it runs: a bar on a terminal, one line a minute elsewhere, nothing when quiet."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO, TypeAlias

_LINE_SECONDS = 60.0
"""Interval of progress lines where there is no terminal: a bar would fill a cluster's log files."""

RECENT = 1024
"""Blocks that the remaining time is judged by: more than there are workers, which finish in bursts."""

Kind: TypeAlias = Literal["failed", "retry"]
"""What can happen to an item besides being finished, by the name of its event."""


class Stage:
    """Counts the items of one stage as they end; call it for every item that is finished.

    Items that earlier runs have finished are counted as done, but say nothing about the pace of this run.
    """

    def __init__(
        self,
        name: str,
        n_items: int,
        n_done: int,
        *,
        n_voxels: int | None,
        clock: Callable[[], float],
        show: Callable[[Stage], None],
        unit: str = "blocks",
    ) -> None:
        self.name = name
        self.n_items = n_items
        self.n_done = n_done
        self.unit = unit
        self.notes: Counter[Kind] = Counter()
        self._n_resumed = n_done
        self._voxels_per_item = n_voxels / n_items if n_voxels and n_items else None
        self._clock = clock
        self._show = show
        self._times = deque([clock()], maxlen=RECENT + 1)
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def __call__(self, seconds: float | None = None) -> None:
        """Count one finished item; `seconds` is the wall time of its task, where that is known."""
        self.n_done += 1
        self._times.append(self._clock())
        if seconds is not None:
            self._seconds.append(seconds)
        self._show(self)

    def note(self, kind: Kind) -> None:
        """Count an item that was given up (``"failed"``) or is tried again (``"retry"``)."""
        self.notes[kind] += 1
        self._show(self)

    def tick(self) -> None:
        """Show that the job lives although no item has ended; may be called as often as one likes."""
        self._show(self)

    @property
    def n_left(self) -> int:
        """Items that are neither finished nor given up."""
        return max(0, self.n_items - self.n_done - self.notes["failed"])

    @property
    def n_own(self) -> int:
        """Items that were finished in this run."""
        return self.n_done - self._n_resumed

    @property
    def n_own_voxels(self) -> float:
        """Voxels that were written in this run, as far as blocks are alike."""
        return (self._voxels_per_item or 0.0) * self.n_own

    @property
    def seconds_per_item(self) -> float | None:
        """Pace of this run, as far as it is known."""
        return pace(list(self._times), list(self._seconds))

    @property
    def seconds_left(self) -> float | None:
        """Time that the stage will take from now on, as far as is known."""
        each, since = self.seconds_per_item, self._clock() - self._times[-1]
        return None if each is None else max(0.0, self.n_left * each - since)

    @property
    def figures(self) -> str:
        """Rate, time left, and what went wrong."""
        parts = []
        if (each := self.seconds_per_item) is not None:
            if self._voxels_per_item is None:
                parts.append(f"{1 / each:.3g} {self.unit}/s")
            else:
                parts.append(f"{self._voxels_per_item / each / 1e6:.3g} megavoxels/s")
        if self.n_left and (left := self.seconds_left) is not None:
            parts.append(f"{format_seconds(left)} left")
        parts += [f"{n} {word}" for word, n in self._troubles if n]
        return ", ".join(parts)

    @property
    def _troubles(self) -> tuple[tuple[str, int], ...]:
        return ("failed", self.notes["failed"]), ("retried", self.notes["retry"])


class Progress:
    """Shows the stages of a job, one after the other.

    Parameters
    ----------
    quiet
        Show nothing.
    stream
        Where to; standard error by default. On a terminal there is a bar.
    clock
        Seconds since any moment.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._begun: float | None = None
        self._last_line = 0.0
        self._n_voxels = 0.0

    @contextmanager
    def stage(
        self,
        name: str,
        n_items: int,
        n_done: int = 0,
        *,
        n_voxels: int | None = None,
        unit: str = "blocks",
    ) -> Iterator[Stage]:
        """Show a stage of `n_items`, of which `n_done` were done before.

        Parameters
        ----------
        name
            As in the journal.
        n_items, n_done
            Items of the stage, and those of them that earlier runs have finished.
        n_voxels
            Voxels that all items write together, for stages whose rate is worth telling in voxels.
        unit
            What items are.

        Yields
        ------
        Stage
            To be called for every item that is finished.
        """
        if self._begun is None:
            self._begun = self._last_line = self._clock()

        def begun(show: Callable[[Stage], None]) -> Stage:
            return Stage(name, n_items, n_done, n_voxels=n_voxels, clock=self._clock, show=show, unit=unit)

        if self._quiet or n_items == 0:
            yield begun(lambda _: None)
        elif self._stream.isatty():
            with self._bar(begun) as stage:
                yield stage
        else:
            stage = begun(self._line_if_due)
            try:
                yield stage
            finally:
                if stage.n_own or stage.notes:
                    self._line(stage)
                self._n_voxels += stage.n_own_voxels

    @contextmanager
    def _bar(self, begun: Callable[[Callable[[Stage], None]], Stage]) -> Iterator[Stage]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        stage = begun(lambda stage: bar.update(task, completed=stage.n_done))
        columns = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            # Formatted whenever the bar is drawn, so that the time left runs down between blocks, too.
            TextColumn("{task.fields[stage].figures}", markup=False),
        )
        with Bar(*columns, console=Console(file=self._stream)) as bar:
            task = bar.add_task(stage.name, total=stage.n_items, completed=stage.n_done, stage=stage)
            yield stage

    def _line_if_due(self, stage: Stage) -> None:
        if self._clock() - self._last_line >= _LINE_SECONDS:
            self._line(stage)

    def _line(self, stage: Stage) -> None:
        now = self._last_line = self._clock()
        seconds = now - (self._begun or 0.0)
        parts = [f"{stage.n_done} of {stage.n_items} {stage.unit}", stage.figures]
        parts.append(f"{format_seconds(seconds)} since the job began")
        voxels = self._n_voxels + stage.n_own_voxels
        if voxels and seconds:
            parts.append(f"{voxels / seconds / 1e6:.3g} megavoxels/s since then")
        print(f"{stage.name}: {', '.join(p for p in parts if p)}", file=self._stream, flush=True)


def pace(times: Sequence[float], seconds: Sequence[float] = ()) -> float | None:
    """Return the seconds per item at which recent items have ended; None if that cannot be told.

    The mean interval between ends counts how many workers there are, however they finish in bursts; the ratio of
    median to mean duration takes out the few blocks that hung or were cut into parts.

    Parameters
    ----------
    times
        Moments in seconds: one before the items, then the end of each, in order.
    seconds
        Durations of the items, where they are known.
    """
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    interval = (times[-1] - times[0]) / (len(times) - 1)
    typical = statistics.median(seconds) / statistics.fmean(seconds) if any(seconds) else 1.0
    return interval * (typical or 1.0)


def format_seconds(seconds: float) -> str:
    """Return a length of time for people: ``0:42``, ``3:05:00``, ``2 d 3 h``."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86_400:
        return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"

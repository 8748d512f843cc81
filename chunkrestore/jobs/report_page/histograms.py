"""Counts in a fixed number of bins, so that memory does not grow with what is counted."""

from __future__ import annotations

import math

N_MOMENTS = 160
"""Intervals of `Moments`."""

_BINS_PER_DECADE = 24
_SHORTEST = 1e-4
_N_DURATIONS = 10 * _BINS_PER_DECADE


class Durations:
    """A histogram of seconds on a logarithmic scale, from 0.1 ms on; quantiles are good to 5 %."""

    def __init__(self) -> None:
        self.counts = [0] * _N_DURATIONS
        self.n = 0
        self.total = 0.0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        position = int(math.log10(max(seconds, _SHORTEST) / _SHORTEST) * _BINS_PER_DECADE)
        self.counts[min(position, _N_DURATIONS - 1)] += 1
        self.n += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    def quantile(self, share: float) -> float:
        """Return the duration that a share of all does not exceed; 0 without any."""
        missing = share * self.n
        for position, count in enumerate(self.counts):
            missing -= count
            if count and missing <= 0:
                return min(edge(position + 0.5), self.longest)
        return self.longest


def edge(position: float) -> float:
    """Return the seconds at which a bin of `Durations` begins."""
    return float(_SHORTEST * 10 ** (position / _BINS_PER_DECADE))


class Moments:
    """How many blocks ended in each of a fixed number of equal intervals, which widen as time goes by."""

    def __init__(self) -> None:
        self.counts = [0] * N_MOMENTS

    def add(self, position: int) -> None:
        """Count one block."""
        self.counts[position] += 1

    def widen(self) -> None:
        """Unite intervals in pairs."""
        pairs = zip(self.counts[::2], self.counts[1::2], strict=True)
        self.counts = [a + b for a, b in pairs] + [0] * (N_MOMENTS // 2)

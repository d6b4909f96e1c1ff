"""Progress of long loops: a bar on a terminal, otherwise a plain line now and then, which suits log files."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Any

INTERVAL = 30.0
"""Seconds between two lines."""


def progress_bar(
    total: int, desc: str, unit: str, initial: int = 0, disable: bool = False, leave: bool = True
) -> ProgressLines:
    """Returns a context manager that shows the progress of a loop on stderr.

    On a terminal it is a bar of tqdm, otherwise a `ProgressLines`, which has those methods of the bar that are used.

    Args:
        total: number of items.
        desc: what the loop does.
        unit: what the items are, in the plural.
        initial: number of items that were done before.
        disable: show nothing, for the processes other than the first.
        leave: whether the bar stays on the terminal when it is closed.
    """
    if disable or not sys.stderr.isatty():
        return ProgressLines(total, desc, unit, initial, disable)
    from tqdm import tqdm

    bar: Any = tqdm(
        total=total,
        desc=desc,
        unit=f" {unit}",
        initial=initial,
        leave=leave,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]",
    )
    return bar


class ProgressLines:
    """Prints a line to stderr every `INTERVAL` seconds, and one at the end of a loop that took longer than that.

    Its arguments are those of `progress_bar`; `n` is the number of items so far, as in tqdm.
    """

    def __init__(self, total: int, desc: str, unit: str, initial: int, disable: bool) -> None:
        self._total, self._desc, self._unit, self._initial, self._disable = total, desc, unit, initial, disable
        self.n = initial
        self._postfix = ""
        self._start = self._last_line = monotonic()

    def update(self, n: int = 1) -> None:
        """Adds `n` items."""
        self.n += n
        if monotonic() - self._last_line >= INTERVAL and self.n < self._total:
            self._print(is_last=False)

    def set_postfix_str(self, s: str) -> None:
        """Sets the text at the end of the line."""
        self._postfix = s

    def write(self, s: str) -> None:
        """Prints a line of its own to stdout, as `tqdm.write` does."""
        if not self._disable:
            print(s, flush=True)

    def close(self) -> None:
        """Prints the last line; called when the context is left."""
        if monotonic() - self._start > INTERVAL:
            self._print(is_last=True)
        self._disable = True

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print(self, is_last: bool) -> None:
        if self._disable:
            return
        self._last_line = monotonic()
        seconds = self._last_line - self._start
        rate = (self.n - self._initial) / seconds
        parts = [
            f"{self._desc}: {self.n}/{self._total} {self._unit} ({self.n / max(self._total, 1):.0%})",
            f"{rate:.2f} {self._unit}/s",
        ]
        if is_last:
            parts.append(f"took {format_duration(seconds)}")
        elif rate > 0:
            parts.append(f"{format_duration((self._total - self.n) / rate)} left")
        if self._postfix:
            parts.append(self._postfix)
        print(", ".join(parts), file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Returns a duration in readable units: 90 s, 45 min, 5 h 37 min, 12.0 days."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 2 * 24 * 60 else f"{minutes / 60 / 24:.1f} days"


def format_size(count: float) -> str:
    """Returns a number of bytes as text: "18.06 GB", "7.20 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"

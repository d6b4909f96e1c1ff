"""Progress on a terminal and in a file."""

from __future__ import annotations

import io
import sys

import pytest

from bitdance.runtime import progress
from bitdance.runtime.progress import format_duration, progress_bar


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, for a test to set."""
    time = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: time[0])
    return time


def test_lines_in_a_file(clock, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not needed
    with progress_bar(50000, "sampling", "images", initial=1000) as bar:
        for _ in range(5):
            clock[0] += 20
            bar.update(40)
        bar.set_postfix_str("1.5 GB")
        bar.write("a line of its own")
        clock[0] += 100
        bar.update(20000)
        clock[0] += 20
        bar.update(28800)
    out, err = capsys.readouterr()
    assert out == "a line of its own\n"
    assert err.splitlines() == [
        "sampling: 1080/50000 images (2%), 2.00 images/s, 6 h 48 min left",
        "sampling: 1160/50000 images (2%), 2.00 images/s, 6 h 47 min left",
        "sampling: 21200/50000 images (42%), 101.00 images/s, 5 min left, 1.5 GB",
        "sampling: 50000/50000 images (100%), 222.73 images/s, took 4 min, 1.5 GB",
    ]


def test_nothing_is_printed_of_short_loops_and_disabled_ones(clock, capsys):
    with progress_bar(10, "reading", "files") as bar:
        clock[0] += progress.INTERVAL - 1
        bar.update(10)
    with progress_bar(10, "reading", "files", disable=True) as bar:
        clock[0] += 1000
        bar.update(10)
        bar.write("nor this")
    with progress_bar(0, "reading", "files"):
        clock[0] += 1
    assert capsys.readouterr() == ("", "")


def test_the_last_line_comes_once_and_also_after_an_error(clock, capsys):
    with pytest.raises(KeyError), progress_bar(10, "reading", "files") as bar:
        clock[0] += 31
        raise KeyError
    bar.close()
    assert capsys.readouterr().err == "reading: 0/10 files (0%), 0.00 files/s, took 31 s\n"


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(100, "sampling", "images", initial=20) as bar:
        bar.update(30)
        bar.set_postfix_str("1.5 GB")
        bar.write("a line of its own")
    assert "\rsampling:" in terminal.getvalue()
    assert "50/100" in terminal.getvalue() and "images/s, 1.5 GB" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (45 * 60, "45 min"), (7199, "2 h 0 min"), (20220, "5 h 37 min"),
     (12 * 86400, "12.0 days")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text

"""The page of a run, `report.html` in its folder: one file without scripts, whose pictures lie beside it."""

from __future__ import annotations

import html
import math
import pathlib
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitdance.data.image_dataset import evenly_spaced
from bitdance.runtime.atomic_files import atomic_write, read_json
from bitdance.runtime.run_folder import SETTINGS
from bitdance.training.evaluation import LOGGED
from bitdance.training.logging import read_log
from bitdance.training.status import resume_command, status_rows, use_command

COMPARISON = "samples.png"
"""The picture at the end of a run of a model: training images beside samples."""
PREVIEWS = 12
CLASSES = 1000
POINTS = 300
"""Points of a curve; more lines of the log are averaged."""

CHARTS = {
    "loss": ("loss", "val_loss"),
    "PSNR in dB": ("psnr", "val_psnr"),
    **{title: (name,) for name, title in LOGGED.items() if name not in ("eval_precision", "eval_recall")},
    "precision and recall": ("eval_precision", "eval_recall"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm", "discriminator_grad_norm"),
    "images per second": ("images_per_second",),
}
LOGARITHMIC = ("loss", "gradient norm")
"""Charts whose first values would otherwise set the scale."""

SMALLEST = 1e-99
"""Smaller values in a log are damage; the space between two of them could have no ticks."""
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 34

STYLE = """
:root { color-scheme: light dark;
  --fore: #1c2024; --back: #fff; --soft: #667; --line: #d8dce2; --c0: #1f66d0; --c1: #c2570c; }
@media (prefers-color-scheme: dark) {
  :root { --fore: #e4e7eb; --back: #15181c; --soft: #99a1ad; --line: #363c45; --c0: #6aa8ff; --c1: #ff9d57; } }
@media print { :root { color-scheme: light;
    --fore: #000; --back: #fff; --soft: #444; --line: #bbb; --c0: #1f66d0; --c1: #c2570c; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.2rem 3rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--fore); background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .6rem 0 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } p.soft, figcaption, dt, th { color: var(--soft); }
table { border-collapse: collapse; } td, th { text-align: left; font-weight: normal; vertical-align: top;
  padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0 0 1rem; } figcaption { margin-bottom: .2rem; } figure img { max-width: 100%; height: auto; }
pre { background: color-mix(in srgb, var(--soft) 12%, transparent); padding: .5rem .7rem; border-radius: 4px;
  white-space: pre-wrap; margin: .3rem 0 .8rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); stroke-dasharray: 6 3; } circle { stroke-width: 2.5; }
.key0 { color: var(--c0); } .key1 { color: var(--c1); }
summary { cursor: pointer; }
"""


def write_report(folder: pathlib.Path, facts: Mapping[str, Any]) -> pathlib.Path:
    """Writes the report of a run from the result of `bitdance.training.status.describe_run`, and returns its path.

    Raises:
        UserError: the folder cannot be written.
    """
    path, page = folder / "report.html", format_report(folder, facts)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def format_report(folder: pathlib.Path, facts: Mapping[str, Any]) -> str:
    """Returns the report as HTML; arguments as of `write_report`."""
    settings = read_json(folder / SETTINGS, "restore it")
    run, train, data = (_section(settings, name) for name in ("run", "train", "data"))
    kind = facts["kind"]
    network = _section(settings, kind)
    lines = read_log(folder)
    title = f"{folder.resolve().name}: training of {'an' if kind == 'autoencoder' else 'a'} {kind}"
    classes = network.get("class_names")
    classes = list(map(str, classes)) if isinstance(classes, list) else []
    facts_of_data = {
        "images": train.get("data_path"), "number of images": data.get("images"),
        "classes": len(classes) or None,
        "size in pixels": train.get("image_size"), "held-out images": train.get("val_path"),
    }  # fmt: skip
    facts_of_network = {
        "parameters": _millions(run.get("parameters")), "autoencoder": run.get("autoencoder"),
        "its parameters": _millions(run.get("autoencoder_parameters")), "trained on": run.get("device"),
        "processes": run.get("processes"), "version of bitdance": run.get("version"),
    }  # fmt: skip
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(facts["folder"])}, {_times(lines)}</p>',
        _table(status_rows(facts)),
        *_samples(folder),
        "<h2>Curves</h2>",
        _charts(lines),
        *_previews(folder),
        "<h2>Data</h2>",
        _table(facts_of_data.items()),
        _details(f"{len(classes)} classes", _text(", ".join(classes[:CLASSES]))) if classes else "",
        "<h2>Network</h2>",
        _table(facts_of_network.items()),
        *_notes(lines),
        "<h2>Commands</h2>",
        *_commands(folder, facts, run, train),
        "<h2>Settings</h2>",
        *(
            _details(name, _table(section.items()))
            for name, section in settings.items()
            if isinstance(section, dict) and section
        ),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{STYLE}</style>",
            *filter(None, parts),
            "</html>\n",
        ]
    )


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _millions(count: object) -> str | None:
    return f"{count / 1e6:,.2f} million" if isinstance(count, int) and 0 <= count < 2**63 else None


def _text(value: object) -> str:
    """Returns a value as HTML text, also for attributes in double quotes."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)))


def _table(rows: Iterable[tuple[str, object]]) -> str:
    cells = (f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in rows if value is not None)
    return f"<table>{''.join(cells)}</table>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"


def _times(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns when the log begins and ends."""
    times = []
    for line in (lines[0], lines[-1]) if lines else ():
        try:
            times.append(time.strftime("%Y-%m-%d %H:%M", time.gmtime(line["time"])))
        except (ValueError, OverflowError, OSError):
            times.append("?")
    return f"log from {' to '.join(times)} UTC" if times else "no line of the log yet"


def _samples(folder: pathlib.Path) -> list[str]:
    if not (folder / COMPARISON).is_file():
        return []
    picture = f'<img src="{COMPARISON}" alt="training images beside samples">'
    return ["<h2>Samples</h2>", _figure("training images at the left, samples at the right", picture)]


def _previews(folder: pathlib.Path) -> list[str]:
    found = {
        int(name[1]): name[0] for path in folder.iterdir() if (name := re.fullmatch(r"preview-(\d+)\.png", path.name))
    }
    steps = sorted(found)
    chosen = [steps[i] for i in evenly_spaced(len(steps), PREVIEWS)]
    pictures = [
        _figure(f"step {step:,}", f'<img src="{found[step]}" alt="preview of step {step}" loading="lazy">')
        for step in chosen
    ]
    return ["<h2>Previews</h2>", f'<div class="charts">{"".join(pictures)}</div>'] if pictures else []


def _notes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [(f"step {line['step']}", line["note"]) for line in lines if line.get("note") is not None]
    return ["<h2>Notes</h2>", _table(notes)] if notes else []


def _commands(
    folder: pathlib.Path, facts: Mapping[str, Any], run: Mapping[str, Any], train: Mapping[str, Any]
) -> list[str]:
    """Returns the command of the run, and those that go on from here."""
    # The last command also has those settings that a resumed run does not take from its folder.
    resume = run.get("command") or resume_command(folder, facts["kind"], train)
    commands = {"as it was started last": run.get("command")}
    if facts["state"] == "stopped":
        commands["to resume"] = resume
    elif facts["state"] == "finished" and isinstance(steps := train.get("max_steps"), int) and 0 < steps < 2**62:
        commands["to extend"] = f"{resume} --max-steps {2 * steps}"
    elif facts["state"] == "finished" and isinstance(epochs := train.get("epochs"), int) and 0 < epochs < 2**62:
        commands["to extend"] = f"{resume} --epochs {2 * epochs}"
    data_path = str(train.get("data_path"))
    commands["to use the weights"] = use_command(folder, facts["kind"], train)
    if facts["kind"] == "autoencoder":
        words = ["bitdance", "train", "--data-path", data_path, "--autoencoder", str(folder), "--output", "model"]
        commands["to train a model with it"] = shlex.join(words)
    commands["to update this page"] = shlex.join(["bitdance", "info", str(folder)])
    return [f"<p>{title}:</p><pre>{_text(command)}</pre>" for title, command in commands.items() if command]


# ------------------------------------------------------------ curves


def _charts(lines: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for title, keys in CHARTS.items():
        found = {key: points for key in keys if (points := _points(lines, key))}
        if found:
            last = [
                f'<span class="key{i}">{key.removeprefix("eval_")}</span> {_number(points[-1][1])}'
                for i, (key, points) in enumerate(found.items())
            ]
            svg = _draw(list(map(_thin_out, found.values())), title in LOGARITHMIC, title)
            figures.append(_figure(f"{_text(title)}: at the end {', '.join(last)}", svg))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>nothing is logged yet</p>"


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    found = ((line["step"], line.get(key)) for line in lines)
    points = sorted((float(step), float(value)) for step, value in found if isinstance(value, int | float))
    return [(x, y if abs(y) > SMALLEST else 0.0) for x, y in points]


def _thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages neighbouring points if there are many, except the first and the last."""
    size = -(-len(points) // POINTS)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def _draw(curves: Sequence[list[tuple[float, float]]], logarithmic: bool, title: str) -> str:
    """Returns curves of (step, value) as an SVG, with a logarithmic axis of values if wanted and possible."""
    xs, ys = ([point[i] for points in curves for point in points] for i in (0, 1))
    logarithmic = logarithmic and min(ys) > 0 and max(ys) > 3 * min(ys)
    scale = math.log10 if logarithmic else float
    (x_low, x_high), (low, high) = _range([*xs, 0.0]), _range([scale(y) for y in ys])

    def column(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def row(y: float) -> float:
        return TOP + (high - scale(y)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row(y):.1f}" y2="{row(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{row(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for x in _ticks(x_low, x_high):
        end = ' text-anchor="middle"' if column(x) < WIDTH - 40 else ' text-anchor="end"'
        parts.append(f'<text x="{column(x):.1f}" y="{HEIGHT - BOTTOM + 16}"{end}>{_number(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, points in enumerate(curves):
        places = [f"{column(x):.1f},{row(y):.1f}" for x, y in points]
        parts.append(f'<polyline class="curve c{number}" points="{" ".join(places)}"/>')
        if len(points) < 20:
            dots = (place.split(",") for place in places)
            parts += [f'<circle class="c{number}" cx="{x}" cy="{y}" r="1.5"/>' for x, y in dots]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">{"".join(parts)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Returns an interval around values that is not empty, without a margin at an end of 0."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin * (low != 0), high + margin * (high != 0 or low == 0)


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers within an interval."""
    size = 10 ** math.floor(math.log10((high - low) / 5))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * size) <= 6)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers between 10 ** low and 10 ** high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**power for power in powers for f in factors]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) <= 7:
            return found
    return found[:: -(-len(found) // 7)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.4g}"

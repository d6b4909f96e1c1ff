"""The state of a run, from what lies in its folder: how far it is, how it goes, and whether its files are whole."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import numpy as np
from PIL import Image

from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError
from bitdance.runtime.progress import format_duration
from bitdance.sampling.image_grid import Curve, chart
from bitdance.training import checkpointing, logging
from bitdance.training.evaluation import LOGGED, said
from bitdance.training.trainer import CONFIG
from bitdance.weights import weights_file

PLOT = "loss.png"


def describe(folder: pathlib.Path) -> dict[str, Any]:
    """What is known of a run, ready for JSON; all its checkpoints are read, to see whether they are whole.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text())
        total, batch = int(settings["last_step"]), int(settings["run"]["global_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} holds no run: name a folder that `bitdance train` wrote to, with a {CONFIG}, or a file of "
            "weights."
        ) from None
    lines = logging.read(folder)
    steps = [line for line in lines if "loss" in line]  # others tell of a validation or an evaluation between them
    last = steps[-1] if steps else {}
    step = int(lines[-1]["step"]) if lines else 0
    rate = last.get("images_per_second")
    finished = folder / f"{settings['kind']}.safetensors"
    validated = [line for line in lines if line.get("val_loss") is not None]
    evaluated = [line for line in lines if said(line)]
    return {
        "folder": str(folder),
        "kind": settings["kind"],
        "step": step,
        "last_step": total,
        "epoch": step / int(settings["steps_per_epoch"]),
        "loss": last.get("loss"),
        "loss_10_lines_ago": steps[-11]["loss"] if len(steps) > 10 else None,
        "val_loss": validated[-1]["val_loss"] if validated else None,
        "evaluation": {name: evaluated[-1].get(name) for name in ("step", *LOGGED)} if evaluated else None,
        "skipped": last.get("skipped", 0),
        "images_per_second": rate,
        "waiting": last.get("waiting"),
        "tflops": last.get("tflops"),
        "mfu": last.get("mfu"),
        "seconds_left": (total - step) * batch / rate if rate else None,
        "seconds_since_last_line": time.time() - lines[-1]["time"] if lines else None,
        "checkpoints": [{"file": path.name, **_health(path)} for path in checkpointing.paths(folder)],
        "weights": finished.name if finished.exists() else None,
        "kept": sorted(path.name for path in folder.glob("epoch_*.safetensors")),
    }


def _health(path: pathlib.Path) -> dict[str, Any]:
    size = path.stat().st_size
    try:
        weights_file.read(path)
    except UserError as error:
        return {"bytes": size, "whole": False, "reason": str(error)}
    return {"bytes": size, "whole": True}


def text(facts: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    done = facts["weights"] is not None and facts["step"] >= facts["last_step"]
    rows = [("step", f"{facts['step']} of {facts['last_step']} (epoch {facts['epoch']:.2f})")]
    if facts["loss"] is not None:
        before = facts["loss_10_lines_ago"]
        rows.append(("loss", f"{facts['loss']:.4f}" + (f" (ten lines before {before:.4f})" if before else "")))
    if facts["val_loss"] is not None:
        rows.append(("val_loss", f"{facts['val_loss']:.4f}"))
    if facts["evaluation"] is not None:
        rows.append(("evaluation", f"{said(facts['evaluation'])} at step {facts['evaluation']['step']}"))
    rows.append(("skipped steps", str(facts["skipped"])))
    if facts["images_per_second"]:
        use = f", model-FLOP utilisation {facts['mfu']:.0%}" if facts["mfu"] else ""
        rows.append(("speed", f"{facts['images_per_second']:.1f} images/s, waiting {facts['waiting']:.0%}{use}"))
        left = "none, it is done" if done else f"{format_duration(facts['seconds_left'])} at this speed"
        rows.append(("time left", left))
        rows.append(("last line of the log", f"{format_duration(facts['seconds_since_last_line'])} ago"))
    if not facts["checkpoints"]:
        rows.append(("checkpoint", "none yet"))
    for entry in facts["checkpoints"]:
        state = "whole" if entry["whole"] else "damaged"
        rows.append(("checkpoint", f"{entry['file']}, {entry['bytes'] / 1e6:.1f} MB, {state}"))
    rows.append(("finished weights", facts["weights"] or "not yet"))
    if facts["kept"]:
        rows.append(("weights kept", ", ".join(facts["kept"])))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([f"{facts['folder']} (training of a {facts['kind']})", ""]) + "".join(
        f"\n  {name:<{width}}{value}" for name, value in rows
    )


def plot(folder: pathlib.Path) -> pathlib.Path | None:
    """Draws a run as `loss.png` in its folder and returns the path; None where there is nothing to draw yet.

    Losses, and below them the figures of its evaluations, where there were any.

    Raises:
        UserError: the picture cannot be written.
    """
    lines = logging.read(folder)
    curves = []
    for name, color in (("loss", "#a9c4e4"), ("val_loss", "#d1495b")):
        for curve in _curve(lines, name, name, color):
            curves.append(curve)
            if name == "loss" and len(curve.y) >= 20:
                window = max(2, len(curve.y) // 50)
                mean = np.convolve(curve.y, np.full(window, 1 / window), "valid")
                middle = curve.x[window // 2 :][: len(mean)]
                curves.append(Curve(f"loss, mean of {window} lines", middle, mean, "#1f4e8c"))
    if not curves:
        return None
    sheet = _with_figures(chart(curves, folder.resolve().name, "step"), lines)
    with atomic_write(folder / PLOT) as path:
        sheet.save(path, format="PNG")
    return folder / PLOT


def _with_figures(sheet: Image.Image, lines: list[dict[str, Any]]) -> Image.Image:
    """The picture with the figures of evaluations in a row of small charts below it, where there were any."""
    fid = _curve(lines, "eval_fid", "", "#1f4e8c")
    score = _curve(lines, "eval_inception_score", "", "#1f4e8c")
    shares = _curve(lines, "eval_precision", "precision", "#1f4e8c") + _curve(lines, "eval_recall", "recall", "#d1495b")
    figures = [(fid, "FID"), (score, "Inception Score"), (shares, "precision and recall")]
    figures = [(curves, title) for curves, title in figures if curves]
    if not figures:
        return sheet
    width, height = sheet.width // len(figures), sheet.height // 2
    page = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    page.paste(sheet)
    for number, (curves, title) in enumerate(figures):
        page.paste(chart(curves, title, "step", width, height), (number * width, sheet.height))
    return page


def _curve(lines: list[dict[str, Any]], key: str, name: str, color: str) -> list[Curve]:
    """The numbers of the log by their steps; nothing where there are none."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if not points:
        return []
    x, y = (np.array(values, float) for values in zip(*points, strict=True))
    return [Curve(name, x, y, color)]

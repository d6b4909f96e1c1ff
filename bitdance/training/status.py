"""Status of a run from the files in its folder: progress, metrics, and whether its files are complete."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np

from bitdance.runtime.atomic_files import atomic_write, read_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.progress import format_duration
from bitdance.runtime.run_folder import SETTINGS, is_active
from bitdance.training.evaluation import LOGGED, format_evaluation
from bitdance.training.logging import read_log
from bitdance.weights import weights_file
from bitdance.weights.resolve import list_checkpoints

PLOT = "loss.png"
CHARTS = {
    "loss": ("loss", "val_loss"),
    "PSNR in dB": ("psnr", "val_psnr"),
    "FID": ("eval_fid",),
    "Fréchet distance": ("eval_frechet_distance",),
    "Inception Score": ("eval_inception_score",),
    "precision and recall": ("eval_precision", "eval_recall"),
}


def describe_run(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what is known of a run, for JSON; the newest checkpoint is read to compare its digest.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        settings = read_json(folder / SETTINGS, "")
        kind, batch_size = settings["run"]["kind"], settings["train"]["batch_size"]
        last_step, steps_per_epoch = (settings["run"][name] for name in ("last_step", "steps_per_epoch"))
        numbers = (batch_size, last_step, steps_per_epoch)
        if kind not in ("model", "autoencoder") or not all(type(n) is int and 0 < n < 2**63 for n in numbers):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} holds no training run: name a folder that `bitdance train` wrote to, with a {SETTINGS}, or a "
            "file of weights."
        ) from None
    lines = read_log(folder)
    steps = [line for line in lines if "loss" in line]  # others have validations or evaluations
    last = steps[-1] if steps else {}
    checkpoints = list_checkpoints(folder)
    step = max(lines[-1]["step"] if lines else 0, *checkpoints, 0)
    rate = last.get("images_per_second")
    final = folder / f"{kind}.safetensors"
    state = "running" if is_active(folder) else "stopped"
    state = "finished" if final.exists() and step >= last_step else state
    validated = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    evaluated = [line for line in lines if format_evaluation(line)]
    return {
        "folder": str(folder),
        "kind": kind,
        "state": state,
        "step": step,
        "last_step": last_step,
        "epoch": step / steps_per_epoch,
        "loss": last.get("loss"),
        "loss_10_lines_ago": steps[-11]["loss"] if len(steps) > 10 else None,
        "val_loss": validated[-1] if validated else None,
        "evaluation": {name: evaluated[-1].get(name) for name in ("step", *LOGGED)} if evaluated else None,
        "skipped": last.get("skipped", 0),
        **{name: last.get(name) for name in ("images_per_second", "waiting", "tflops", "mfu")},
        "seconds_left": (last_step - step) * batch_size / rate if rate and state != "stopped" else None,
        "seconds_since_last_line": time.time() - lines[-1]["time"] if lines else None,
        "checkpoints": [_describe_checkpoint(path, step == max(checkpoints)) for step, path in checkpoints.items()],
        "weights": final.name if final.exists() else None,
        "kept": sorted(path.name for path in folder.glob("epoch_*.safetensors")),
    }


def _describe_checkpoint(path: pathlib.Path, verify: bool) -> dict[str, Any]:
    facts = {"file": path.name, "bytes": path.stat().st_size}
    try:
        weights_file.read(path, verify)
    except UserError as error:
        return {**facts, "complete": False, "reason": str(error)}
    return {**facts, "complete": True}


def format_run(facts: dict[str, Any]) -> str:
    """Formats the result of `describe_run` as lines."""
    rows = [("step", f"{facts['step']} of {facts['last_step']} (epoch {facts['epoch']:.2f})")]
    if facts["loss"] is not None:
        before = facts["loss_10_lines_ago"]
        rows.append(("loss", f"{facts['loss']:.4f}" + (f" (ten lines before {before:.4f})" if before else "")))
    if facts["val_loss"] is not None:
        rows.append(("val_loss", f"{facts['val_loss']:.4f}"))
    if facts["evaluation"] is not None:
        rows.append(("evaluation", f"{format_evaluation(facts['evaluation'])} at step {facts['evaluation']['step']}"))
    rows.append(("skipped steps", str(facts["skipped"])))
    if facts["images_per_second"]:
        use = f", model-FLOP utilization {facts['mfu']:.0%}" if facts["mfu"] else ""
        rows.append(("speed", f"{facts['images_per_second']:.1f} images/s, waiting {facts['waiting'] or 0:.0%}{use}"))
    if facts["state"] == "stopped":
        rows.append(("stopped", "run the same command again to resume"))
    elif facts["state"] == "finished":
        rows.append(("time left", "none, finished"))
    elif facts["seconds_left"] is not None:
        rows.append(("time left", f"{format_duration(facts['seconds_left'])} at this speed"))
    if facts["seconds_since_last_line"] is not None:
        rows.append(("last line of the log", f"{format_duration(facts['seconds_since_last_line'])} ago"))
    if not facts["checkpoints"]:
        rows.append(("checkpoint", "none yet"))
    for entry in facts["checkpoints"]:
        state = "complete" if entry["complete"] else "damaged"
        rows.append(("checkpoint", f"{entry['file']}, {entry['bytes'] / 1e6:.1f} MB, {state}"))
    rows.append(("final weights", facts["weights"] or "not yet"))
    if facts["kept"]:
        rows.append(("kept weights", ", ".join(facts["kept"])))
    title = f"{facts['folder']} (training of {'an' if facts['kind'] == 'autoencoder' else 'a'} {facts['kind']})"
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([title, "", *(f"  {name:<{width}}{value}" for name, value in rows)])


def plot_run(folder: pathlib.Path) -> pathlib.Path | None:
    """Plots losses, and metrics of evaluations, to `loss.png` in the folder; None if there is nothing to plot yet.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    lines = read_log(folder)
    charts = {title: {key: points for key in keys if (points := _points(lines, key))} for title, keys in CHARTS.items()}
    charts = {title: curves for title, curves in charts.items() if curves}
    if not charts:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'bitdance[plots]'.") from None
    figure = Figure(figsize=(9.6, 2 + 3 * len(charts)), layout="constrained")
    figure.suptitle(folder.resolve().name, parse_math=False)  # which may contain a "$"
    all_axes = figure.subplots(len(charts), sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(all_axes, charts.items(), strict=True):
        lows, highs = [], []
        for key, points in curves.items():
            x, y = np.array(points, float).T
            window = len(y) // 50 if key == "loss" else 1
            name = key.removeprefix("eval_")
            axes.plot(x, y, label=name, marker="." if len(y) < 20 else None, alpha=0.4 if window >= 4 else 1.0)
            if window >= 4:
                mean = np.convolve(y, np.full(window, 1 / window), "valid")
                axes.plot(x[window // 2 :][: len(mean)], mean, label=f"mean of {window} lines", color="C0")
            lows.append(y.min())
            # The loss of the first lines would set the scale.
            highs.append(np.quantile(y, 0.98) if key == "loss" and len(y) >= 20 else y.max())
        if max(highs) > min(lows):
            margin = 0.05 * (max(highs) - min(lows))
            axes.set_ylim(min(lows) - margin, max(highs) + margin)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if len(CHARTS[title]) > 1:
            axes.legend()
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=True)
    all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    with atomic_write(folder / PLOT) as path:
        figure.savefig(path, format="png", dpi=100)
    return folder / PLOT


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]

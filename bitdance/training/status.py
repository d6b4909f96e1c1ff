"""Status of a run from the files in its folder: progress, metrics, and whether its files are complete."""

from __future__ import annotations

import pathlib
import shlex
import time
from collections.abc import Mapping
from typing import Any

from bitdance.runtime.atomic_files import read_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.progress import format_duration
from bitdance.runtime.run_folder import SETTINGS, is_active
from bitdance.training.evaluation import LOGGED, format_evaluation
from bitdance.training.logging import read_log
from bitdance.weights import weights_file
from bitdance.weights.resolve import list_checkpoints


def describe_run(folder: pathlib.Path, verify: bool = True) -> dict[str, Any]:
    """Returns what is known of a run, for JSON.

    Args:
        folder: of the run.
        verify: whether the newest checkpoint is read to compare its digest.

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
        "processes": settings["run"].get("processes"),
        "state": state,
        "step": step,
        "last_step": last_step,
        "epoch": step / steps_per_epoch,
        "loss": last.get("loss"),
        "loss_10_lines_ago": steps[-11]["loss"] if len(steps) > 10 else None,
        "val_loss": validated[-1] if validated else None,
        "evaluation": {name: evaluated[-1].get(name) for name in ("step", *LOGGED)} if evaluated else None,
        "skipped": last.get("skipped", 0),
        "unreadable_images": max((line.get("bad_images") or 0 for line in lines), default=0),
        **{name: last.get(name) for name in ("images_per_second", "waiting", "tflops", "mfu")},
        "seconds_left": (last_step - step) * batch_size / rate if rate and state != "stopped" else None,
        "seconds_since_last_line": time.time() - lines[-1]["time"] if lines else None,
        "checkpoints": [
            _describe_checkpoint(path, verify and step == max(checkpoints))
            for step, path in checkpoints.items()
            if path.exists()  # a run may remove the oldest one meanwhile
        ],
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


def resume_command(folder: pathlib.Path, kind: str, train: Mapping[str, Any]) -> str:
    """Returns the command that resumes a run, whose settings are those in its folder."""
    name = "train" if kind == "model" else "train-autoencoder"
    return shlex.join(["bitdance", name, "--data-path", str(train.get("data_path")), "--output", str(folder)])


def use_command(folder: pathlib.Path, kind: str, train: Mapping[str, Any]) -> str:
    """Returns the command that shows what the weights of a run do."""
    if kind == "model":
        return shlex.join(["bitdance", "sample", "--model", str(folder)])
    words = ["bitdance", "reconstruct", "--autoencoder", str(folder), "--data-path", str(train.get("data_path"))]
    return shlex.join([*words, "--image-size", str(train.get("image_size"))])


def format_run(facts: Mapping[str, Any]) -> str:
    """Formats the result of `describe_run` as lines."""
    rows = status_rows(facts)
    title = f"{facts['folder']} (training of {'an' if facts['kind'] == 'autoencoder' else 'a'} {facts['kind']})"
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([title, "", *(f"  {name:<{width}}{value}" for name, value in rows)])


def status_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the result of `describe_run` as names and values."""
    rows = [("step", f"{facts['step']} of {facts['last_step']} (epoch {facts['epoch']:.2f})")]
    if facts["loss"] is not None:
        before = facts["loss_10_lines_ago"]
        rows.append(("loss", f"{facts['loss']:.4f}" + (f" (ten lines before {before:.4f})" if before else "")))
    if facts["val_loss"] is not None:
        rows.append(("val_loss", f"{facts['val_loss']:.4f}"))
    if facts["evaluation"] is not None:
        rows.append(("evaluation", f"{format_evaluation(facts['evaluation'])} at step {facts['evaluation']['step']}"))
    rows.append(("skipped steps", str(facts["skipped"])))
    if facts["unreadable_images"]:
        met = "" if facts["processes"] == 1 else ", met by the first process"
        rows.append(("unreadable images", f"{facts['unreadable_images']}{met}"))
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
    return rows

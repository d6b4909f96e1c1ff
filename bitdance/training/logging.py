"""Logging of a run: means and rates over steps; JSON lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.flops import peak_bf16
from bitdance.training.loader import Batch
from bitdance.training.optimizer import NonFiniteGuard

LOG_FILE = "log.jsonl"
MAX_VALUE = 1e100
"""Larger numbers in a log are damage."""

Metrics = dict[str, float | None]
"""Metrics of a line of the log; None where there is no finite value."""


class MetricsMeter:
    """Sums the metrics of steps on the device, where they are read only for a line of the log, and measures rates.

    Args:
        images: per step, over all processes.
        flops: per step and process.
        world: the processes.
        guard: counts skipped steps.
        in_bf16: whether matrix products are computed in bf16, for the model-FLOP utilization.
    """

    def __init__(self, images: int, flops: float, world: World, guard: NonFiniteGuard, in_bf16: bool) -> None:
        self._images, self._flops, self._world, self._guard = images, flops, world, guard
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = peak_bf16(name) if in_bf16 else None
        self._skipped = int(guard.skipped)
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches and measures the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds the metrics of a step, 0 if it was skipped."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time in the context from the rates."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> Metrics:
        """Returns means over the steps that were not skipped and over all processes, counts and rates; restarts.

        Returns:
            The means; `skipped` steps of the whole run and `consecutive` ones up to now; `images_per_second` of all
            processes; `waiting`, the fraction of time spent waiting for images; `tflops` per process, and `mfu`, the
            model-FLOP utilization, if the peak of the GPU is known.
        """
        counts = torch.stack([self._guard.skipped, self._guard.consecutive]).float()
        sums = torch.stack([value.float() for value in self._sums.values()])
        *values, skipped, consecutive = self._world.mean(torch.cat([sums, counts])).tolist()
        seconds = time.perf_counter() - self._start
        counted = self._steps - (skipped - self._skipped)
        metrics: Metrics = {
            name: finite(value / counted) if counted else None for name, value in zip(self._sums, values, strict=True)
        }
        rate = self._steps * self._flops / seconds
        metrics |= {
            "skipped": int(skipped),
            "consecutive": int(consecutive),
            "images_per_second": self._steps * self._images / seconds,
            "waiting": self._waited / seconds,
            "tflops": rate / 1e12,
        }
        metrics |= {"mfu": rate / self._peak} if self._peak else {}
        self._skipped = int(skipped)
        self._restart()
        return metrics


def format_metrics(metrics: Metrics) -> str:
    """Formats loss and rates for a progress bar."""
    loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
    use = f"mfu {metrics['mfu']:.0%}" if "mfu" in metrics else f"{metrics['tflops']:.3g} TFLOP/s"
    text = f"loss {loss}, {metrics['images_per_second']:.0f} images/s, waiting {metrics['waiting']:.0%}, {use}"
    return text + (f", {metrics['skipped']} skipped" if metrics["skipped"] else "")


def finite(value: float) -> float | None:
    """Returns the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The log of a run, written by the first process.

    Args:
        folder: the run folder.
        step: steps that are done; lines that an interrupted run logged after it are removed.
        tensorboard, wandb: as in `TrainConfig`.
        settings: of the run, for Weights & Biases.

    Raises:
        UserError: a file cannot be written.
    """

    def __init__(
        self, folder: pathlib.Path, step: int, tensorboard: bool, wandb: str | None, settings: dict[str, Any]
    ) -> None:
        self.path = folder / LOG_FILE
        self._tensorboard = _open_tensorboard(folder, step) if tensorboard else None
        self._wandb = _open_wandb(folder, wandb, settings) if wandb else None
        if self.path.is_fifo() or self.path.is_dir():
            raise UserError(f"{self.path} is not a file: delete it.")
        if self.path.is_file():
            lines = [line for line in read_log(folder) if line["step"] <= step]
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, step: int, epoch: float, metrics: Mapping[str, float | str | None]) -> None:
        """Adds a line; None stands for a metric without a value, a string is a note.

        Raises:
            UserError: the file cannot be written.
        """
        entry = {"step": step, "epoch": epoch, **metrics, "time": time.time()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            problem = f"cannot write {self.path}: {error.strerror}"
            raise UserError(f"{problem}; free some space, then run the command again.") from error
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **numbers}, step=step)

    def close(self) -> None:
        """Flushes the other writers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of a run's log; lines that are torn or damaged, or have values of other types, are skipped."""
    path = folder / LOG_FILE
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("time"), float):
                lines += [line] if all(map(_is_valid, line, line.values())) else []
    return lines


def _is_valid(key: str, value: object) -> bool:
    is_number = isinstance(value, int | float) and abs(value) < MAX_VALUE  # and not NaN
    return is_number or value is None or key == "note"


def _open_tensorboard(folder: pathlib.Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _open_wandb(folder: pathlib.Path, project: str, settings: dict[str, Any]) -> Any:
    import wandb

    name = folder / "wandb-id.txt"  # a resumed run continues the same run there
    if not name.exists():
        with atomic_write(name) as temporary:
            temporary.write_text(secrets.token_hex(8))
    run_id = name.read_text(errors="replace").strip()
    return wandb.init(project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=settings)

"""What the steps since the last line of the log came to: means, counts and rates."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bitdance.config import TrainConfig
from bitdance.runtime.process_group import World
from bitdance.training.flops import peak_bf16, step_flops
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import NonFiniteGuard

Line = dict[str, float | None]
"""Numbers of a line of the log; None where there is none."""


class Meter:
    """Sums the numbers of steps on the device, where they are only read when a line of the log is due, and times them.

    Args:
        in_bf16: whether matrix products are, so that a GPU's peak is known.
        encodes: whether a step runs the encoder; it does not with stored bits.
    """

    def __init__(
        self,
        objective: AutoencoderLoss | BitDanceLoss,
        config: TrainConfig,
        world: World,
        health: NonFiniteGuard,
        in_bf16: bool,
        encodes: bool,
    ) -> None:
        self._batch, self._world, self._health = config.global_batch_size, world, health
        self._flops = step_flops(objective, self._batch, config.image_size, encodes=encodes) / world.size
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = peak_bf16(name) if in_bf16 else None
        self._skipped = int(health.skipped)
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._mark = 0, 0.0, time.perf_counter()

    def add(self, numbers: dict[str, Tensor], waited: float) -> None:
        """Adds the numbers of a step, 0 where it was skipped, and the seconds spent waiting for its batch."""
        for name, value in numbers.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._waited += waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens between two steps out of their time."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def read(self) -> Line:
        """Means over the steps that were not skipped and over all processes, counts and rates; begins anew.

        Returns:
            The means; `skipped` steps of the whole run, those of them `consecutive` up to now; `images_per_second` of
            all processes; `waiting`, the share of time spent waiting for images; `tflops` of one process, and `mfu`,
            their share of what its GPU can do, where that is known.
        """
        counts = torch.stack([self._health.skipped, self._health.consecutive]).float()
        sums = torch.stack([value.float() for value in self._sums.values()])
        *values, skipped, consecutive = self._world.mean(torch.cat([sums, counts])).tolist()
        seconds = time.perf_counter() - self._mark
        counted = self._steps - (skipped - self._skipped)
        line: Line = {
            name: finite(value / counted) if counted else None for name, value in zip(self._sums, values, strict=True)
        }
        rate = self._steps * self._flops / seconds
        line |= {
            "skipped": int(skipped),
            "consecutive": int(consecutive),
            "images_per_second": self._steps * self._batch / seconds,
            "waiting": self._waited / seconds,
            "tflops": rate / 1e12,
        }
        if self._peak:
            line["mfu"] = rate / self._peak
        self._skipped = int(skipped)
        self._restart()
        return line


def shown(line: Line) -> str:
    """A line of the log as the progress bar shows it."""
    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
    use = f"mfu {line['mfu']:.0%}" if "mfu" in line else f"{line['tflops']:.3g} TFLOP/s"
    text = f"loss {loss}, {line['images_per_second']:.0f} images/s, waiting {line['waiting']:.0%}, {use}"
    return text + (f", {line['skipped']} skipped" if line["skipped"] else "")


def finite(value: float) -> float | None:
    """A number as JSON can have it."""
    return value if math.isfinite(value) else None

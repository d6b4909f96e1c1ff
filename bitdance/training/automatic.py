"""Settings of a training that follow from the images and from the time or the number of steps that it may take."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import statistics
from collections.abc import Collection, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bitdance.runtime.errors import UserError, counted
from bitdance.runtime.progress import format_duration
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import Optimizer
from bitdance.training.train_config import OptimizerName, TrainConfig

DEFAULT_SECONDS = 600.0
MAX_EPOCHS = 400
"""Passes over a few images after which a model mostly repeats them."""
MIN_STEPS = 100
BATCH_SIZE = 64
SMALL_DIM = 256
"""Largest width of models that get the optimizer and learning rates found for the demo models."""
MIN_TRIALS, TRIAL_SECONDS = 3, 3.0
"""Minimum number and total duration of the timed steps, of which the median counts."""


def parse_time(text: str) -> float:
    """Returns the seconds of a duration such as 90s, 20m, 1.5h or 2d.

    Raises:
        UserError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d*)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        given = text if text.strip() else repr(text)
        raise UserError(f"time={given} is invalid: give a number and a unit, such as 90s, 20m, 1.5h or 2d.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def measure_step(
    objective: AutoencoderLoss | BitDanceLoss,
    shape: Sequence[int],
    device: torch.device,
    in_bf16: bool,
    optimizer_name: OptimizerName = "adamw",
) -> float:
    """Returns the seconds of a training step that is not compiled.

    Args:
        objective: the loss with its network, which is changed and moved to the device.
        shape: of a batch of images (B, H, W, 3) or of packed bits (B, N, C / 8).
        device: that trains.
        in_bf16: whether under bf16 autocast.
        optimizer_name: field `optimizer` of the run.
    """
    objective.to(device)
    if isinstance(objective, BitDanceLoss):
        objective.autoencoder.to(device)
    network = objective.network
    optimizer = Optimizer(dict(network.named_parameters()), TrainConfig(pathlib.Path(), optimizer=optimizer_name))
    inputs = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
    indices = torch.arange(len(inputs), device=device)
    seconds: list[float] = []
    begin = perf_counter()
    while len(seconds) <= MIN_TRIALS or perf_counter() - begin < TRIAL_SECONDS:
        start, step = perf_counter(), len(seconds)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            loss, _ = objective(inputs, torch.zeros_like(indices), indices, step)
        loss.backward()
        optimizer.step(0.0, torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        seconds.append(perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one also allocates


def choose_batch_size(count: int) -> int:
    """Returns the batch size for a number of images: at most 64, and at least four batches an epoch if possible."""
    return max(1, min(BATCH_SIZE, 2 ** int(math.log2(max(1, count // 4)))))


def choose_ema(steps: int) -> float:
    """Returns an EMA decay, 0.5 to 0.9999, whose time constant is a tenth of the steps: it forgets the first ones."""
    return min(0.9999, max(0.5, 1 - 10 / steps))


class LearningRate(NamedTuple):
    """A learning rate, the optimizer it is meant for, and the reason that is printed."""

    optimizer: OptimizerName
    lr: float
    reason: str


AUTOENCODER_RATE = LearningRate("adamw", 3e-4, "lower than from scratch, to keep what the weights know")
"""For an autoencoder that starts from trained weights."""


def choose_learning_rate(optimizer: OptimizerName | None, dim: int, fine_tunes: bool) -> LearningRate:
    """Returns the optimizer and the learning rate of a model.

    Args:
        optimizer: the one that is given; None for Muon in small models, if PyTorch has it, and AdamW in others.
        dim: width of the model.
        fine_tunes: whether it starts from trained weights.
    """
    if dim <= SMALL_DIM:
        name = optimizer or ("muon" if hasattr(torch.optim, "Muon") else "adamw")
        return LearningRate(name, 4e-3 if name == "muon" else 2e-3, "high, so that a small model learns in minutes")
    if fine_tunes:
        return LearningRate(optimizer or "adamw", 1e-4, "lower than from scratch, to keep what the weights know")
    return LearningRate(optimizer or "adamw", 3e-4, "the original's default")


class StepTime(NamedTuple):
    """How long a step takes, and how long the run may: seconds."""

    step: float
    run: float


def choose_schedule(
    run: TrainConfig, count: int, given: Collection[str], time: StepTime | None, rate: LearningRate, fine_tunes: bool
) -> tuple[TrainConfig, list[str]]:
    """Completes the settings of a run by a schedule that fits the images and the number of steps.

    Args:
        run: with the batch size.
        count: number of images.
        given: fields of `run` that are kept.
        time: from which the number of steps follows; None if `epochs` or `max_steps` is given.
        rate: optimizer and learning rate, unless they are given.
        fine_tunes: whether it starts from trained weights.

    Returns:
        The settings, and a sentence for each choice.
    """
    per_epoch = max(1, count // run.batch_size)
    if time is not None:
        in_time = int(0.9 * time.run / time.step)  # the rest for start, previews and end
        epochs = max(1, min(MAX_EPOCHS, max(MIN_STEPS, in_time) // per_epoch))
        limit = f"what fits into {format_duration(time.run)}"
        if epochs == MAX_EPOCHS:
            limit = "more would repeat the images"
        if epochs * per_epoch > in_time:
            duration = format_duration(epochs * per_epoch * time.step)
            limit = f"the least that is of use, {duration}; more gives better samples"
        limit = f"{time.step:.2g} s a step: {limit}"
    else:
        epochs = run.epochs if "epochs" in given else math.ceil((run.max_steps or 1) / per_epoch)
        limit = "as given"
    steps = min(epochs * per_epoch, run.max_steps or epochs * per_epoch)
    optimizer = run.optimizer if "optimizer" in given else rate.optimizer
    lr = run.lr if "lr" in given else rate.lr
    warmup = run.warmup_steps if "warmup_steps" in given else max(1, min(200, steps // 20))
    chosen: dict[str, Any] = {
        "epochs": epochs,
        "optimizer": optimizer,
        "lr": lr,
        "min_lr": lr / 100,
        "warmup_steps": warmup,
        "decay_start": max(1, warmup),
        "ema": choose_ema(steps),
        "random_crop": False,
        "save_every": 0,
        "save_minutes": 5.0,
        "preview_every": max(1, steps // 5),
        "log_every": max(1, min(100, steps // 50)),
    }
    chosen = {name: value for name, value in chosen.items() if name not in given}
    scratch = "from scratch, since sizes or an autoencoder were given: needs thousands of images and hours"
    reasons = [
        "starts from trained weights, which learn from few images" if fine_tunes else scratch,
        f"{counted(steps, 'step')} of {counted(run.batch_size, 'image')} ({steps / per_epoch:.3g} epochs), {limit}",
    ]
    name = "Muon" if optimizer == "muon" else "AdamW"
    if "lr" in chosen:
        reasons.append(f"learning rate {lr:g} with {name}: {rate.reason}")
    elif "optimizer" in chosen:
        reasons.append(f"optimizer {name}")
    shape = []
    if "warmup_steps" in chosen:
        shape.append(f"warm-up of {counted(warmup, 'step')}")
    if chosen.keys() >= {"min_lr", "decay_start"}:
        shape.append(f"decay of the learning rate to {chosen['min_lr']:g}")
    if shape:
        reasons.append(", then ".join(shape))
    if "ema" in chosen:
        share = f"at the end the initial weights' share of the average is {chosen['ema'] ** steps:.1g}"
        reasons.append(f"EMA {chosen['ema']:.4g}: {share}")
    if "random_crop" in chosen:
        reasons.append("centre crops, half of them mirrored")
    return dataclasses.replace(run, **chosen), reasons

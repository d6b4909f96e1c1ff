"""Settings of a training that follow from the images and the time that it may take."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import time

import torch

from bitdance.config import AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.runtime.progress import format_duration
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import Optimizer
from bitdance.training.train_config import LossConfig, TrainConfig

DEFAULT_SECONDS = 600.0
MAX_EPOCHS = 400
"""Passes over a few images after which a model mostly repeats them."""
MIN_STEPS = 100
BATCH_SIZE = 64
TRIALS = 3
"""Steps that are timed, of which the fastest counts."""


def parse_time(text: str) -> float:
    """Returns the seconds of a duration such as 90s, 20m, 1.5h or 2d.

    Raises:
        UserError: it is none, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise UserError(f"time={text} is invalid: give a number and a unit, such as 90s, 20m, 1.5h or 2d.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def measure_step(
    model: BitDanceConfig,
    autoencoder: AutoencoderConfig,
    images: bool,
    image_size: int,
    batch_size: int,
    device: torch.device,
    in_bf16: bool,
) -> float:
    """Returns the seconds of a training step with random data.

    Args:
        model, autoencoder: sizes.
        images: whether images are encoded, or bits given.
        image_size: in pixels.
        batch_size: images of a step.
        device: that trains.
        in_bf16: whether under bf16 autocast.
    """
    objective = BitDanceLoss(BitDance(model), Autoencoder(autoencoder), LossConfig(perturb_rate=0.1), 0).to(device)
    objective.autoencoder.to(device)
    optimizer = Optimizer(dict(objective.network.named_parameters()), TrainConfig(pathlib.Path()))
    shape = (image_size, image_size, 3) if images else (model.num_tokens, model.bits // 8)
    inputs = torch.zeros((batch_size, *shape), dtype=torch.uint8, device=device)
    indices = torch.arange(batch_size, device=device)
    seconds = []
    for step in range(TRIALS + 1):  # the first one also allocates
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            loss, _ = objective(inputs, indices % model.num_classes, indices, step)
        loss.backward()
        optimizer.step(0.0, torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def choose_batch_size(count: int) -> int:
    """Returns the batch size for a number of images: at most 64, and at least four batches an epoch if possible."""
    return max(1, min(BATCH_SIZE, 2 ** int(math.log2(max(1, count // 4)))))


def choose_schedule(
    run: TrainConfig, count: int, step_seconds: float, seconds: float, fine_tunes: bool
) -> tuple[TrainConfig, list[str]]:
    """Completes the settings of a run by a schedule that fits the images and the time.

    Args:
        run: with the batch size.
        count: number of images.
        step_seconds: of a step.
        seconds: that the run may take.
        fine_tunes: whether it starts from trained weights.

    Returns:
        The settings, and a sentence for each choice.
    """
    per_epoch = max(1, count // run.batch_size)
    in_time = int(0.9 * seconds / step_seconds)  # the rest for start, previews and end
    epochs = max(1, min(MAX_EPOCHS, max(MIN_STEPS, in_time) // per_epoch))
    steps = epochs * per_epoch
    limit = "more would repeat the images" if epochs == MAX_EPOCHS else f"what fits into {format_duration(seconds)}"
    if steps > in_time:
        limit = f"the least that is of use, {format_duration(steps * step_seconds)}"
    ema = min(0.9999, max(0.5, 1 - 10 / steps))
    warmup = max(1, min(200, steps // 20))
    lr = 5e-4 if fine_tunes else 1e-3
    chosen = dataclasses.replace(
        run,
        epochs=epochs,
        lr=lr,
        min_lr=lr / 100,
        warmup_steps=warmup,
        decay_start=warmup,
        ema=ema,
        random_crop=False,
        save_every=0,
        save_minutes=5.0,
        preview_every=max(1, steps // 5),
        log_every=max(1, min(100, steps // 50)),
    )
    scratch = "from scratch, since sizes or an autoencoder were given: needs thousands of images and hours"
    reasons = [
        "starts from trained weights, which few images suffice to change" if fine_tunes else scratch,
        f"{epochs} epochs of {per_epoch} steps with {run.batch_size} images, {step_seconds:.2g} s a step: {limit}",
        f"learning rate {lr:g}, warm-up of {warmup} steps, then decay: "
        + ("lower than from scratch, to keep what the weights know" if fine_tunes else "usual for a small model"),
        f"EMA {ema:.4g}: averages over the last {round(1 / (1 - ema))} steps, so that nothing of the start is left",
        "centre crops and mirror images; 10 % of the input bits are flipped against overfitting",
    ]
    return chosen, reasons

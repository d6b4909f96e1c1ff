"""Rates as functions of the step: learning rate, and the share of random crops."""

from __future__ import annotations

import math

from bitdance.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of a step: lr * step / warmup, then lr, then a cosine from `decay_start` to `min_lr` at the end."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if 0 < config.decay_start <= step and config.decay_start < total_steps:
        progress = (step - config.decay_start) / (total_steps - config.decay_start)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def random_crop_share(config: TrainConfig, epoch: int) -> float:
    """The share of images that are cropped at random in an epoch; the others get a centre crop.

    It falls linearly from 1 at `aug_decay_start_epoch` to 0 at `aug_decay_end_epoch`; a negative start, or an end that
    is not behind it, keeps it at 1.
    """
    start, end = config.aug_decay_start_epoch, config.aug_decay_end_epoch
    if start < 0 or end <= start:
        return 1.0
    return min(1.0, max(0.0, 1.0 - (epoch - start) / (end - start)))

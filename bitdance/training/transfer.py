"""Batches on their way to the device: whole, or in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bitdance.training.loader import Batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; a GPU fetches it by itself, while the host goes on."""

    def move(value: Tensor) -> Tensor:
        # From memory that is not pinned the host would wait until the GPU has done all that it was told before.
        return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

    return dataclasses.replace(batch, **{name: move(value) for name, value in _tensors(batch).items()})


def parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` equal parts, in order."""
    for chunks in zip(*(value.chunk(count) for value in _tensors(batch).values()), strict=True):
        yield dataclasses.replace(batch, **dict(zip(_tensors(batch), chunks, strict=True)))


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}

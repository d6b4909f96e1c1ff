"""Matrices stored as 8-bit integers with a scale for each row: half the size of float16."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor

from bitdance.weights.layout import State, damaged

SCALE = ".int8_scale"
"""Suffix of the tensor of scales beside a matrix of integers."""


def quantize(state: State) -> State:
    """Rounds matrices to int8; other tensors are stored as float16.

    Args:
        state: floating-point tensors by name.

    Returns:
        For each tensor of two or more dimensions an int8 tensor of its shape, and under its name with `SCALE` float32
        scales, one for each index of its first dimension: value = integer * scale, of which the largest is 127 * scale.
    """
    stored: State = {}
    for name, value in state.items():
        if value.ndim < 2:
            stored[name] = value.half()
            continue
        rows = value.float().flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        stored[name] = torch.where(scale > 0, rows / scale, 0).round().to(torch.int8).view(value.shape)
        stored[name + SCALE] = scale[:, 0]
    return stored


def dequantize(path: pathlib.Path, state: State) -> State:
    """Returns the floating-point tensors of a state of `quantize`; one without integers as it is.

    Raises:
        UserError: integers of the file at `path` have no scales, or not one for each row.
    """
    if not any(value.dtype == torch.int8 for value in state.values()):
        return state
    return {
        name: _scaled(path, name, value, state) if value.dtype == torch.int8 else value
        for name, value in state.items()
        if not name.endswith(SCALE)
    }


def _scaled(path: pathlib.Path, name: str, value: Tensor, state: State) -> Tensor:
    scale = state.get(name + SCALE)
    if scale is None or scale.dtype != torch.float32 or value.ndim < 2 or scale.shape != value.shape[:1]:
        raise damaged(path, f"the scales of {name} are missing or have another shape")
    return value * scale.view(-1, *[1] * (value.ndim - 1))

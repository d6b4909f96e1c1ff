"""Nearest training image of each generated image: a check that a model does not copy its training data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 24
"""Values (bytes of pixels) that are compared at once; converted to numbers they take some 200 MB."""


def find_nearest(
    queries: np.ndarray, references: Iterable[np.ndarray], device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the nearest reference of each query by the RMS difference of the pixels, with and without mirroring.

    Args:
        queries: (Q, H, W, 3) uint8.
        references: blocks of any number of images, (n, H, W, 3) uint8; only one is in memory.
        device: multiplies the pixels.

    Returns:
        Distances (Q,) float64 in grey levels, indices (Q,) int64, and whether the reference is mirrored (Q,) bool.
    """
    count, values = len(queries), queries[0].size
    best = torch.full((count,), float("inf"), dtype=torch.float64)
    index = torch.zeros(count, dtype=torch.int64)
    mirrored = torch.zeros(count, dtype=torch.bool)
    parts = [slice(i, i + max(1, BLOCK // values)) for i in range(0, count, max(1, BLOCK // values))]
    start = 0
    for block in references:
        for flip in (False, True) if len(block) else ():
            r, r_squared = _flatten(block[:, :, ::-1] if flip else block, device)
            for part in parts:
                q, q_squared = _flatten(queries[part], device)
                # Sums of products of bytes stay below 2^28 at 32 px, so the relative error of float32 is below 1e-6.
                squared = q_squared[:, None] + r_squared - 2 * (q @ r.T).cpu().double()  # (Q, n)
                value, column = squared.min(dim=1)
                closer = value < best[part]
                best[part][closer], index[part][closer] = value[closer], start + column[closer]
                mirrored[part][closer] = flip
        start += len(block)
    distance = (best.clamp_min(0) / values).sqrt()
    return distance.numpy(), index.numpy(), mirrored.numpy()


def _flatten(images: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Returns images as rows (n, H W 3) float32, and their squared norms (n,) float64 on the CPU."""
    rows = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    return rows.to(device), rows.double().square_().sum(1)

"""Nearest training image of each generated image: a check that a model does not copy its training data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

BLOCK = 5000


def find_nearest(
    queries: np.ndarray,
    references: np.ndarray,
    progress: Callable[[int], None] = lambda n: None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the nearest reference of each query by the RMS difference of the pixels, with and without mirroring.

    Args:
        queries: (Q, H, W, 3) uint8.
        references: (R, H, W, 3) uint8.
        progress: called with the number of references in each block that has been compared.
        device: multiplies the pixels.

    Returns:
        Distances (Q,) float64 in grey levels, indices (Q,) int64, and whether the reference is mirrored (Q,) bool.
    """
    q = torch.from_numpy(queries.reshape(len(queries), -1).astype(np.float32))
    q_squared, q_on_device = q.double().square().sum(1), q.to(device)
    best = torch.full((len(q),), float("inf"), dtype=torch.float64)
    index = torch.zeros(len(q), dtype=torch.int64)
    mirrored = torch.zeros(len(q), dtype=torch.bool)
    for start in range(0, len(references), BLOCK):
        block = references[start : start + BLOCK]
        for flip in (False, True):
            pixels = np.ascontiguousarray(block[:, :, ::-1] if flip else block)
            r = torch.from_numpy(pixels.reshape(len(block), -1).astype(np.float32))
            # Sums of products of bytes stay below 2^28 here, so the relative error of float32 is below 1e-6.
            products = (q_on_device @ r.to(device).T).cpu().double()
            squared = q_squared[:, None] + r.double().square().sum(1) - 2 * products  # (Q, block)
            value, column = squared.min(dim=1)
            closer = value < best
            best[closer], index[closer], mirrored[closer] = value[closer], start + column[closer], flip
        progress(len(block))
    distance = (best.clamp_min(0) / q.shape[1]).sqrt()
    return distance.numpy(), index.numpy(), mirrored.numpy()

"""Synthetic weights and images for the Inception network, bit-identical on every machine: only uniform numbers of
NumPy's RandomState and single IEEE operations. The golden values in data/evaluator were computed with them."""

from __future__ import annotations

import pathlib
import zlib

import numpy as np
import torch
from torch import Tensor

from bitdance.metrics.inception import Inception

DATA = pathlib.Path(__file__).resolve().parent / "data" / "evaluator"
SEED = 20240607


def weights(measurements: pathlib.Path = DATA / "inception_bn.npz") -> dict[str, Tensor]:
    """A state dict; the statistics of the batch normalizations, which were measured, come from a file."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Inception().state_dict().items()}
    with np.load(measurements, allow_pickle=False) as measured:
        state = {name: torch.from_numpy(measured[name]) for name in measured.files}
    return {
        name: state[name] if name in state else torch.from_numpy(_weight(name, shape))
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked")
    }


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    uniform = np.random.RandomState((zlib.crc32(name.encode()) + SEED) % 2**32).random_sample(shape)
    if name.endswith("conv.weight"):
        values = (uniform * 2.0 - 1.0) * np.sqrt(6.0 / np.prod(shape[1:]))
    elif name.endswith("bn.weight"):
        values = uniform + 0.5
    elif name == "fc.bias":
        values = uniform * 2.0 - 1.0
    else:  # bn.bias, fc.weight
        values = uniform * 0.5 - 0.25
    return values.astype(np.float32)


def images(seed: int, count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8: gradients with six rectangles or discs and noise."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:side, :side] / side
    result = []
    for _ in range(count):
        base, slope_x, slope_y = (random.uniform(low, high, 3) for low, high in ((0, 255), (-200, 200), (-200, 200)))
        image = base + x[..., None] * slope_x + y[..., None] * slope_y
        for _ in range(6):
            left, top = random.uniform(0, 1, 2)
            width, height = random.uniform(0.05, 0.6, 2)
            colour, opacity = random.uniform(0, 255, 3), random.uniform(0.3, 1.0)
            if random.uniform() < 0.5:
                inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
            else:
                inside = (x - left) ** 2 + (y - top) ** 2 < (width / 2) ** 2
            image = np.where(inside[..., None], (1 - opacity) * image + opacity * colour, image)
        image = image + random.uniform(-1, 1, image.shape) * random.uniform(0, 60)
        result.append(np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8))
    return np.stack(result)

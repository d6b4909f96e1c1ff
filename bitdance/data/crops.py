"""ADM's crops: box-halving, bicubic, and a central or a random square.

The image preprocessing of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), on which the
published models were trained. All functions are pure: random numbers are arguments.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

MIN_CROP_FRACTION = 0.8  # of the short side that the smallest random crop covers


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the short side to `size` pixels and cuts out the central square."""
    image = _scale_short_side(image, size)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, draws: tuple[float, float, float]) -> Image.Image:
    """Scales the short side to a random length in [size, ceil(size / 0.8)] and cuts out a random square.

    Args:
        draws: uniform numbers in [0, 1) for the length of the short side, the top and the left edge.

    Raises:
        ValueError: a draw outside [0, 1).
    """
    lengths = math.ceil(size / MIN_CROP_FRACTION) - size + 1
    image = _scale_short_side(image, size + _choose(lengths, draws[0]))
    top, left = _choose(image.height - size + 1, draws[1]), _choose(image.width - size + 1, draws[2])
    return image.crop((left, top, left + size, top + size))


def horizontal_flip(image: Image.Image) -> Image.Image:
    """Mirrors left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def to_array(image: Image.Image) -> np.ndarray:
    """Copies the pixels of an image to an array, (H, W, 3) uint8."""
    return np.array(image.convert("RGB"))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Maps bytes to the range of the autoencoder, x / 127.5 - 1.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], on the same device.

    Raises:
        ValueError: another shape or type.
    """
    dtype, shape = images.dtype, tuple(images.shape)
    if dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape (B, H, W, 3), not {dtype} of shape {shape}.")
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _scale_short_side(image: Image.Image, size: int) -> Image.Image:
    """Halves with a box filter while the short side is at least 2 * size, then scales to `size` with a bicubic one."""
    if size < 1:
        raise ValueError(f"the size of a crop must be at least 1 pixel, not {size}.")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _choose(count: int, draw: float) -> int:
    """Maps a uniform number in [0, 1) to an integer in [0, count)."""
    if not 0 <= draw < 1:
        raise ValueError(f"a draw must lie in [0, 1), not {draw}.")
    return math.floor(draw * count)

"""ADM's crops: box-halving, bicubic, and a central or a random square.

The image preprocessing of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), on which the
published models were trained. All functions are pure: random numbers are arguments.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

MIN_CROP_FRACTION = 0.8  # of the short side that the smallest random crop covers


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the short side to `size` pixels and cuts out the central square.

    Args:
        image: RGB, of any size.
        size: side of the result in pixels.

    Returns:
        RGB, size x size; an image of this size keeps its pixels.
    """
    image = _scale_short_side(image, size)
    width, height = image.size
    return _crop(image, (height - size) // 2, (width - size) // 2, size)


def random_crop(image: Image.Image, size: int, draws: tuple[float, float, float]) -> Image.Image:
    """Scales the short side to a random length in [size, ceil(size / 0.8)] and cuts out a random square.

    Args:
        image: RGB, of any size.
        size: side of the result in pixels.
        draws: uniform numbers in [0, 1) for the length of the short side, the top and the left edge.

    Returns:
        RGB, size x size.

    Raises:
        ValueError: a draw outside [0, 1).
    """
    longest = math.ceil(size / MIN_CROP_FRACTION)
    image = _scale_short_side(image, size + _choose(longest - size + 1, draws[0]))
    width, height = image.size
    return _crop(image, _choose(height - size + 1, draws[1]), _choose(width - size + 1, draws[2]), size)


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
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, H, W, 3), not {images.dtype} of shape {tuple(images.shape)}."
        )
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _scale_short_side(image: Image.Image, size: int) -> Image.Image:
    """Halves with a box filter while the short side is at least 2 * size, then scales to `size` with a bicubic one."""
    if size < 1:
        raise ValueError(f"the size of a crop must be at least 1 pixel, not {size}.")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, top: int, left: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _choose(count: int, draw: float) -> int:
    """Maps a uniform number in [0, 1) to an integer in [0, count)."""
    if not 0 <= draw < 1:
        raise ValueError(f"a draw must lie in [0, 1), not {draw}.")
    return math.floor(draw * count)

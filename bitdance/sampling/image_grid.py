"""Grids of images with labelled rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(
    images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1, gap: int = 2
) -> Image.Image:
    """Arranges images in rows.

    Args:
        images: (B, H, W, 3) uint8.
        columns: images per row.
        labels: one per row, written to its left.
        scale: integer factor by which images are enlarged, without interpolation.
        gap: pixels between images.
    """
    count, height, width, _ = images.shape
    height, width = height * scale, width * scale
    rows = -(-count // columns)
    font = ImageFont.load_default(size=max(11, min(20, height // 3)))
    margin = 0
    if labels:
        margin = int(max(font.getlength(label) for label in labels)) + 12
    size = (margin + columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        row, column = divmod(i, columns)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(image, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, label in enumerate(labels or ()):
        middle = gap + row * (height + gap) + height // 2
        draw.text((margin - 6, middle), label, fill="black", font=font, anchor="rm")
    return sheet

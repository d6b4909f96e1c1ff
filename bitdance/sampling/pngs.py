"""Images as PNG files."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from bitdance.runtime.atomic_files import atomic_write


def save_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 as a PNG, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")

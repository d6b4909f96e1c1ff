"""Grids of images with labelled rows."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2
"""Pixels between images."""

MIN_HEIGHT = 96
"""Height of an image in pixels up to which `scale=None` enlarges it."""

MAX_LABEL = 60
"""Characters of a label."""

FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arialuni.ttf")
"""Fonts of systems, tried in this order for labels that Pillow's own font cannot draw."""


def image_grid(
    images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int | None = 1
) -> Image.Image:
    """Arranges images in rows.

    Args:
        images: (B, H, W, 3) uint8.
        columns: images per row.
        labels: one per row, written to its left.
        scale: integer factor by which images are enlarged, without interpolation; None for about `MIN_HEIGHT`.
    """
    count, height, width, _ = images.shape
    scale = max(1, MIN_HEIGHT // height) if scale is None else scale
    height, width = height * scale, width * scale
    rows = -(-count // columns)
    fonts = list(_load_fonts(max(11, min(20, height // 3)))) if labels else []
    texts = [_fit_label(label, row, fonts) for row, label in enumerate(labels or ())]
    margin = int(max(font.getlength(text) for text, font in texts)) + 12 if texts else 0
    sheet = Image.new("RGB", (margin + columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        row, column = divmod(i, columns)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(image, (margin + GAP + column * (width + GAP), GAP + row * (height + GAP)))
    for row, (text, font) in enumerate(texts):
        middle = GAP + row * (height + GAP) + height // 2
        draw.text((margin - 6, middle), text, fill="black", font=font, anchor="rm")
    return sheet


def rows_without_names(labels: Sequence[str]) -> str:
    """Returns which rows of a grid have a number because no font has their label: "row 3 is ...", or ""."""
    fonts = list(_load_fonts(11))
    texts = [_fit_label(label, row, fonts)[0] for row, label in enumerate(labels)]
    numbered = [f"{text} is {label}" for row, (text, label) in enumerate(zip(texts, labels, strict=True))
                if text == f"row {row + 1}" != label]  # fmt: skip
    return ", ".join(numbered)


def _fit_label(label: str, row: int, fonts: Sequence[ImageFont.FreeTypeFont]) -> tuple[str, ImageFont.FreeTypeFont]:
    """Returns a label and a font that has it; without a font the label has no accents, or is the number of its row."""
    label = label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 3]}..."
    plain = "".join(c for c in unicodedata.normalize("NFKD", label) if c.isprintable() and not unicodedata.combining(c))
    for text in (label, plain):
        for font in fonts:
            if text and _can_draw(font, text):
                return text, font
    return f"row {row + 1}", fonts[0]


def _can_draw(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = bytes(font.getmask("\uffff"))  # the box of a character that a font does not have
    return text.isprintable() and all(c == " " or bytes(font.getmask(c)) not in (missing, b"") for c in text)


def _load_fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)
    yield default
    for name in (*FONTS, *_matplotlib_fonts()):
        with contextlib.suppress(OSError):  # the system does not have it
            yield ImageFont.truetype(name, size)


def _matplotlib_fonts() -> list[str]:
    """Returns the font that matplotlib brings along, if it is installed, without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
    return [str(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")] if folder else []

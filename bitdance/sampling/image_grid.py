"""Grids of pictures, with labels where they have some; and charts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def grid(
    images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1, gap: int = 2
) -> Image.Image:
    """One picture of many, in rows; `labels` name the rows.

    Args:
        images: (B, H, W, 3) uint8.
        columns: pictures of a row.
        labels: one a row, written to its left.
        scale: whole factor by which small pictures are enlarged, pixel by pixel.
        gap: pixels between the pictures.
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
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, label in enumerate(labels or ()):
        middle = gap + row * (height + gap) + height // 2
        draw.text((margin - 6, middle), label, fill="black", font=font, anchor="rm")
    return sheet


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: in the legend; empty for a curve that the title names.
        x, y: of its points, in order.
        color: a name or `#rrggbb`.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    color: str


def chart(curves: Sequence[Curve], title: str, x_name: str, width: int = 960, height: int = 540) -> Image.Image:
    """Curves over common axes, with a legend; the vertical axis leaves out the highest 2 % of the values.

    Args:
        curves: at least one, with at least one point; later ones lie above earlier ones.
        width, height: of the picture in pixels.
    """
    fine = 2  # drawn twice as large, then made smaller, for smooth edges
    font = ImageFont.load_default(size=14 * fine)
    left, top, right, bottom = 70 * fine, 40 * fine, (width - 20) * fine, (height - 50) * fine
    x = np.concatenate([curve.x for curve in curves]).astype(float)
    y = np.concatenate([curve.y for curve in curves]).astype(float)
    x_low, x_high = _span(float(x.min()), float(x.max()))
    y_low, y_high = _span(float(y.min()), float(np.quantile(y, 0.98)))

    def place(px: float, py: float) -> tuple[float, float]:
        return (
            left + (px - x_low) / (x_high - x_low) * (right - left),
            bottom - (py - y_low) / (y_high - y_low) * (bottom - top),
        )

    sheet = Image.new("RGB", (width * fine, height * fine), "white")
    plot = Image.new("RGB", sheet.size, "white")
    draw = ImageDraw.Draw(plot)
    ticks_x, ticks_y = _ticks(x_low, x_high), _ticks(y_low, y_high)
    for tick in ticks_y:
        draw.line([(left, place(x_low, tick)[1]), (right, place(x_low, tick)[1])], fill="#e4e4e4", width=fine)
    for curve in curves:
        points = [place(px, py) for px, py in zip(curve.x, curve.y, strict=True)]
        if len(points) == 1:
            ((px, py),) = points
            draw.ellipse([px - 3 * fine, py - 3 * fine, px + 3 * fine, py + 3 * fine], fill=curve.color)
        draw.line(points, fill=curve.color, width=2 * fine, joint="curve")
    box = (left, top, right, bottom)
    sheet.paste(plot.crop(box), box)  # what lies outside the axes is left out
    draw = ImageDraw.Draw(sheet)
    draw.rectangle(box, outline="black", width=fine)
    for tick in ticks_y:
        draw.text((left - 8 * fine, place(x_low, tick)[1]), f"{tick:g}", fill="black", font=font, anchor="rm")
    for tick in ticks_x:
        draw.text((place(tick, y_low)[0], bottom + 8 * fine), f"{tick:g}", fill="black", font=font, anchor="mt")
    draw.text(((left + right) / 2, (height - 6) * fine), x_name, fill="black", font=font, anchor="mb")
    draw.text((left, top - 10 * fine), title, fill="black", font=font, anchor="ls")
    named = [curve for curve in curves if curve.name]
    # On the right, where the curves do not end.
    end = np.mean([curve.y[-1] for curve in curves])
    first = top + 16 * fine if end <= (y_low + y_high) / 2 else bottom - (20 * len(named) - 4) * fine
    for number, curve in enumerate(named):
        middle = first + 20 * number * fine
        draw.line([(right - 40 * fine, middle), (right - 12 * fine, middle)], fill=curve.color, width=3 * fine)
        draw.text((right - 48 * fine, middle), curve.name, fill="black", font=font, anchor="rm")
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def _span(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis: a little beyond the values, and never the same."""
    margin = 0.03 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Between four and ten round numbers from low to high."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (5, 2, 1) if power * factor <= (high - low) / 4)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]

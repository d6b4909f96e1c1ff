"""What the page does, without a browser: settings -> images, with unfinished images on the way."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import queue
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from bitdance.config import PRESETS, Preset
from bitdance.data.class_folders import GRID, RECORD
from bitdance.data.class_names import ClassNames
from bitdance.data.crops import center_crop, to_array
from bitdance.data.decoding import decode_image
from bitdance.runtime.errors import UserError
from bitdance.sampling.image_grid import image_grid
from bitdance.sampling.pipeline import Pipeline, kept_tokens
from bitdance.sampling.sampler import SamplingConfig, StepCallback
from bitdance.sampling.unfinished import decode_unfinished, hide_tokens
from bitdance.sampling.writers import image_settings, list_entries, save_png

MAX_CLASSES, MAX_EACH, MAX_STEPS, MAX_SCALE = 10, 10, 200, 50
"""Largest number of classes, of images of each, of solver steps, and guidance scale."""

MAX_PIXELS = 64 * 256**2
"""Of all images of a sampling."""

FRAMES = 16
"""Unfinished grids of a sampling, at most."""

MAX_DRAWING = 0.25
"""Share of the time that may be spent on them."""

DRAWING = 320
"""Side of a drawing in pixels, about."""

_turn = threading.Lock()
"""Held while images are sampled: one sampling at a time has all cores or the GPU, and bounds the memory."""


class Frame(NamedTuple):
    """A grid of images.

    Attributes:
        grid: the images, labelled.
        step, steps: autoregressive steps done, and in total.
        archive: None for unfinished images, else a zip of grid.png, the images as PNGs with their settings in the text
            chunk `bitdance`, and these settings as samples.json.
    """

    grid: Image.Image
    step: int
    steps: int
    archive: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; fields as of `Pipeline.__call__`.

    Raises:
        UserError: a value is of another type, or out of range.
    """

    seed: int
    preset: Preset
    cfg_scale: float
    num_steps: int

    def __post_init__(self) -> None:
        _check("the seed", self.seed, 0, 2**32 - 1)
        _check("the number of solver steps", self.num_steps, 1, MAX_STEPS)
        _check("the guidance scale", self.cfg_scale, 0, MAX_SCALE, "a number")
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise UserError(f"the preset must be {' or '.join(PRESETS)}.")

    def config(self, pipeline: Pipeline) -> SamplingConfig:
        """Returns the settings with those of the preset."""
        return pipeline.sampling_config(self.cfg_scale, self.num_steps, preset=self.preset)


def class_choices(classes: ClassNames) -> list[tuple[str, int]]:
    """Returns (names, id) of all classes; names that several classes have are followed by the id."""
    texts = [", ".join(names)[:80] for names in classes.names]
    counts = collections.Counter(texts)
    return [(f"{text} ({i})" if counts[text] > 1 else text, i) for i, text in enumerate(texts)]


def sample(pipeline: Pipeline, classes: Sequence[int], each: int, settings: Settings) -> Generator[Frame, None, None]:
    """Samples images of classes; yields unfinished grids, one row for each class, and at the end the finished one.

    The sampling stops when the iterator is closed.

    Args:
        pipeline: the model.
        classes: ids, at most `MAX_CLASSES`.
        each: images of each class, from 1 to `MAX_EACH`.
        settings: how to sample.

    Raises:
        UserError: a class does not exist, or these are too many images.
    """
    if not isinstance(classes, list | tuple) or not 1 <= len(classes) <= MAX_CLASSES:
        raise UserError(f"choose from 1 to {MAX_CLASSES} classes.")
    _check("images of a class", each, 1, MAX_EACH)
    labels = [_find_class(pipeline, label) for label in classes for _ in range(each)]
    _check_pixels(pipeline, len(labels))
    call = functools.partial(pipeline, labels)
    return _frames(pipeline, call, labels, settings, each, [pipeline.classes.label(label) for label in labels[::each]])


class Picture(NamedTuple):
    """An image as the model sees it: scaled and cropped, decoded from its bits, and these drawn; (H, W, 3) uint8.

    Small images are enlarged.
    """

    original: np.ndarray
    reconstruction: np.ndarray
    bits: np.ndarray


def read_picture(pipeline: Pipeline, data: bytes | None) -> Picture:
    """Decodes the bytes of an image file, scales and crops the image, encodes it and decodes it again.

    Raises:
        UserError: there is no image, or it cannot be decoded.
    """
    original = _decode(pipeline, data)
    bits = pipeline.encode(original)
    side = max(1, DRAWING // pipeline.image_size)
    pair = np.stack([original, pipeline.decode(bits, "np")[0]]).repeat(side, 1).repeat(side, 2)
    return Picture(pair[0], pair[1], draw_bits(bits[0]))


def complete(
    pipeline: Pipeline, data: bytes | None, label: int, keep_rows: int, candidates: int, settings: Settings
) -> Generator[Frame, None, None]:
    """Keeps the first rows of tokens of an image and samples the rest; yields as `sample` does.

    Args:
        pipeline: the model.
        data: bytes of an image file.
        label: class to complete it as.
        keep_rows: rows to keep, see `Pipeline.complete`.
        candidates: completions, from 1 to `MAX_EACH`.
        settings: how to sample.

    Raises:
        UserError: the image cannot be decoded, or a value is out of range.
    """
    config = pipeline.model.config
    _check("the number of completions", candidates, 1, MAX_EACH)
    _check("the number of rows to keep", keep_rows, 0, config.grid - config.patch)
    if keep_rows % config.patch:
        raise UserError(f"the number of rows to keep must be a multiple of {config.patch} for this model.")
    _check_pixels(pipeline, candidates)
    label, original = _find_class(pipeline, label), _decode(pipeline, data)
    bits = pipeline.encode(original)
    kept = kept_tokens(config, keep_rows)
    part = hide_tokens(pipeline.decode(bits, "np"), kept, config.patch)[0]
    call = functools.partial(pipeline.complete, bits, label, keep_rows=keep_rows, candidates=candidates)
    columns = min(5, 2 + candidates)
    before, tokens = (original, part), kept.nonzero().flatten().tolist()
    return _frames(pipeline, call, [label] * candidates, settings, columns, None, before, kept_tokens=tokens)


def draw_bits(bits: Tensor) -> np.ndarray:
    """Draws the bits of an image: each token is a block of black (-1) and white (+1) squares.

    Args:
        bits: (C, h, w), +-1; C is a multiple of 8.

    Returns:
        Pixels (H, W, 3) uint8.
    """
    count, h, w = bits.shape
    rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)  # of a block, as square as can be
    blocks = (bits > 0).cpu().numpy().reshape(rows, count // rows, h, w).transpose(2, 0, 3, 1)  # (h, rows, w, columns)
    side = max(2, DRAWING // max(h * rows, w * count // rows))
    squares = np.where(blocks, 255, 20).astype(np.uint8).repeat(side, 1).repeat(side, 3)
    framed = np.pad(squares, ((0, 0), (1, 1), (0, 0), (1, 1)), constant_values=128)
    height, width = framed.shape[0] * framed.shape[1], framed.shape[2] * framed.shape[3]
    return framed.reshape(height, width, 1).repeat(3, 2)


class _ClosedError(Exception):
    """Ends a sampling that nobody waits for."""


def watch(
    pipeline: Pipeline, count: int, call: Callable[[StepCallback], np.ndarray]
) -> Generator[tuple[int, int, np.ndarray], None, None]:
    """Yields (steps done, steps in total, pixels (B, H, W, 3)) during a sampling, and at its end.

    The sampling runs in a thread of its own, which ends at its next step when the iterator is closed.

    Args:
        pipeline: the model.
        count: B, images of the sampling.
        call: samples with a callback and returns the pixels.
    """
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    closed = threading.Event()
    start = spent = 0.0

    def draw(step: int, steps: int, tokens: Tensor) -> None:
        nonlocal spent
        if closed.is_set():
            raise _ClosedError
        now = time.monotonic()
        is_due = step < steps and step % max(1, steps // FRAMES) == 0 and len(tokens) == count  # not a halved batch
        if is_due and spent <= MAX_DRAWING * (now - start):
            found.put((step, steps, decode_unfinished(pipeline, tokens)))
            spent += time.monotonic() - now

    def work() -> None:
        nonlocal start
        with _turn:
            start = time.monotonic()
            try:
                steps = pipeline.model.config.ar_steps
                found.put((steps, steps, call(draw)))
            except BaseException as error:  # raised where it is waited for
                found.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        step, steps = 0, 1
        while step < steps:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            step, steps, _ = item
            yield item
    finally:
        closed.set()
        thread.join()


def _frames(
    pipeline: Pipeline,
    call: Callable[..., np.ndarray],
    labels: list[int],
    settings: Settings,
    columns: int,
    row_labels: list[str] | None = None,
    before: Sequence[np.ndarray] = (),
    **others: Any,
) -> Generator[Frame, None, None]:
    """Yields grids of a sampling; `before` are images that are shown first, `others` are noted with the settings."""
    config = settings.config(pipeline)
    given = dataclasses.asdict(config) | {"seed": settings.seed, "output": "np", "chunk_size": None}
    scale = max(1, 128 // pipeline.image_size)
    with contextlib.closing(watch(pipeline, len(labels), lambda draw: call(callback=draw, **given))) as parts:
        for step, steps, images in parts:
            grid = image_grid(np.stack([*before, *images]), columns, row_labels, scale)
            archive = None
            if step == steps:
                entries = list_entries(pipeline.classes, labels)
                records = [image_settings(pipeline.name, config, settings.seed, entry, **others) for entry in entries]
                archive = make_archive(images, entries, records, grid)
            yield Frame(grid, step, steps, archive)


def make_archive(
    images: np.ndarray, entries: list[dict[str, Any]], records: list[dict[str, Any]], grid: Image.Image
) -> bytes:
    """Returns a zip as of `Frame.archive`: an entry's file holds its image, with its record as text."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for image, entry, record in zip(images, entries, records, strict=True):
            with archive.open(entry["file"], "w") as file:
                save_png(file, image, record)
        with archive.open(GRID, "w") as file:
            save_png(file, grid)
        archive.writestr(RECORD, json.dumps(records, indent=1))
    return buffer.getvalue()


def _decode(pipeline: Pipeline, data: bytes | None) -> np.ndarray:
    if data is None:
        raise UserError("upload a picture first.")
    return to_array(center_crop(decode_image(data, "that was uploaded", upright=True), pipeline.image_size))


def _find_class(pipeline: Pipeline, label: Any) -> int:
    if not isinstance(label, int):
        raise UserError("choose a class of the list.")
    return pipeline.classes.find(label)


def _check(what: str, value: Any, lowest: int, highest: int, kind: str = "an integer") -> None:
    kinds = int if kind == "an integer" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value <= highest:
        raise UserError(f"{what} must be {kind} from {lowest} to {highest}.")


def _check_pixels(pipeline: Pipeline, count: int) -> None:
    if count > (most := max(1, MAX_PIXELS // pipeline.image_size**2)):
        raise UserError(f"these are {count} images, and at most {most} of this size are sampled at once: choose fewer.")

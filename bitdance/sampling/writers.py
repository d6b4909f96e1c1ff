"""Files of images: `.npz` written as a stream, and PNGs."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from bitdance import __version__
from bitdance.data.class_folders import LABELS_FILE
from bitdance.data.class_names import ClassNames
from bitdance.runtime.atomic_files import atomic_write, make_folder
from bitdance.runtime.errors import UserError
from bitdance.sampling.sampler import SamplingConfig

TEXT_CHUNK = "bitdance"
"""Keyword of the text chunk of a PNG that holds the settings of its image, as JSON."""


def write_npz(
    path: str | os.PathLike[str], batches: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray
) -> None:
    """Writes `arr_0` (images or bits, in the order of the batches) and `arr_1` (labels), atomically.

    Only one batch at a time is in memory.

    Args:
        path: the file.
        batches: uint8 arrays, (B, H, W, 3) for images, N rows in total.
        shape: of `arr_0`, (N, H, W, 3) for images.
        labels: (N,) int64.

    Raises:
        UserError: the file cannot be written.
        ValueError: the batches have another number of rows in total.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for batch in batches:
                assert batch.dtype == np.uint8 and batch.shape[1:] == shape[1:], (batch.dtype, batch.shape)
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"{pathlib.Path(path)}: got {written} images, expected {shape[0]}.")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.astype(np.int64))


def save_png(
    file: pathlib.Path | IO[bytes], image: np.ndarray | Image.Image, settings: Mapping[str, Any] | None = None
) -> None:
    """Saves an image, or pixels (H, W, 3) uint8, as a PNG, with settings, if any, in the text chunk `TEXT_CHUNK`."""
    text = PngImagePlugin.PngInfo()
    if settings:
        text.add_text(TEXT_CHUNK, json.dumps(settings))
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format="PNG", pnginfo=text)


def image_settings(
    model: str, config: SamplingConfig, seed: int, entry: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Returns what an image follows from: version, model, seed, settings, `others` and its entry in `list_entries`."""
    settings = {"version": __version__, "model": model, "seed": seed, **dataclasses.asdict(config), **others}
    return settings | {name: value for name, value in entry.items() if name != "file"}


def list_entries(names: ClassNames, labels: list[int]) -> list[dict[str, Any]]:
    """Returns the entry of each image in a record: its file, class and number, of which its noise is a function."""
    texts = ("".join(c if c.isalnum() else "-" for c in names.label(label).lower()) for label in labels)
    texts = (re.sub("-+", "-", text)[:60] for text in texts)
    words = [text.encode()[:180].decode(errors="ignore") for text in texts]  # names of files have at most 255 bytes
    return [
        {"file": f"{number:04d}-{word}.png", "class": label, "name": names.label(label), "number": number}
        for number, (label, word) in enumerate(zip(labels, words, strict=True))
    ]


def write_png(
    path: str | os.PathLike[str], image: np.ndarray | Image.Image, settings: Mapping[str, Any] | None = None
) -> None:
    """Writes a PNG as `save_png` does, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        save_png(temporary, image, settings)


def write_png_folder(folder: pathlib.Path, batches: Iterable[tuple[range, np.ndarray]], labels: np.ndarray) -> None:
    """Writes a folder of PNGs, `<sample id>.png`, and the labels beside them.

    Args:
        folder: made if it does not exist.
        batches: sample ids and pixels (B, H, W, 3) uint8.
        labels: (N,) int64.

    Raises:
        UserError: a file cannot be written.
    """
    make_folder(folder)
    try:
        for ids, pixels in batches:
            for index, image in zip(ids, pixels, strict=True):
                Image.fromarray(image).save(folder / f"{index:06d}.png")
        (folder / LABELS_FILE).write_text(json.dumps(labels.tolist()) + "\n")
        os.sync()  # once for all files
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; free some space, then run again.") from error

"""A folder of samples: a grid, the images, and a record of them; those of an earlier call are replaced."""

from __future__ import annotations

import contextlib
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image

from bitdance.data.class_folders import GRID, RECORD
from bitdance.runtime.atomic_files import make_folder, new_files, read_json, write_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.run_folder import check_writable
from bitdance.sampling.writers import write_png


def prepare_folder(folder: pathlib.Path, entries: list[dict[str, Any]]) -> set[str]:
    """Makes a folder for images and returns the files of an earlier call in it.

    Raises:
        UserError: the folder cannot be made or written to, or has a file of one of these names that is not of an
            earlier call.
    """
    check_writable(folder)
    make_folder(folder)
    earlier = _list_images(folder)
    for name in (RECORD, GRID, *(entry["file"] for entry in entries)):
        if (folder / name).is_dir() or (name not in earlier and (folder / name).exists()):
            raise UserError(f"{folder / name} is not of an earlier sampling: move it, or choose another `output`.")
    return earlier


def write_folder(
    folder: pathlib.Path,
    images: np.ndarray,
    grid: Image.Image,
    record: dict[str, Any],
    texts: list[dict[str, Any]],
    earlier: set[str],
) -> None:
    """Writes the record, the images that it lists, with their settings as texts, and the grid.

    They are put in place of those of an earlier call.
    """
    entries = record["images"]
    with new_files(folder) as new:
        write_json(new / RECORD, record)
        for entry, image, text in zip(entries, images, texts, strict=True):
            write_png(new / entry["file"], image, text)
        write_png(new / GRID, grid)
        for name in sorted(earlier, key=lambda name: name == RECORD):  # last the record, which lists the others
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        for file in (RECORD, *(entry["file"] for entry in entries), GRID):  # the record first, which lists the others
            (new / file).rename(folder / file)


def _list_images(folder: pathlib.Path) -> set[str]:
    """Returns the files of an earlier call by its record: the images, the grid and the record, or none."""
    try:
        files = [image["file"] for image in read_json(folder / RECORD, "delete it")["images"]]
    except (UserError, KeyError, TypeError):
        return set()
    return {GRID, RECORD, *(str(name) for name in files if re.fullmatch(r"\d{4,}-[^/\\]*\.png", str(name)))}

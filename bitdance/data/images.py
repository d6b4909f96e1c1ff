"""Recognizes the format of labelled images from the contents of a path, not only from its name."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from bitdance.config import Split
from bitdance.data.cifar10 import GZIP, MAX_MEMBERS, METADATA_FILES, SPLITS, CifarImages
from bitdance.data.decoding import is_image
from bitdance.data.folders import FolderImages, ZipImages
from bitdance.data.image_dataset import FORMATS, ImageDataset
from bitdance.data.parquet import ParquetImages, find_parquet
from bitdance.data.tar import TarImages, first_names
from bitdance.runtime.errors import UserError


def open_images(path: str | os.PathLike[str], split: Split = "train") -> ImageDataset:
    """Opens labelled images of any supported format.

    Args:
        path: a folder, zip or tar of class folders, a tar with one tar per class, parquet files as on the Hugging Face
            hub (a folder, one file, or a pattern such as `data/validation-*.parquet`; of a folder the files
            `train*.parquet`, in it or in its `data/`, or else all), CIFAR-10's official archive, or the folder it
            unpacks to. Classes are numbered in the order of their folders' names, images ordered by name within a
            class; folders that are ImageNet's WordNet ids get ImageNet's 1000 classes, even if only some of them are
            present. Parquet files and CIFAR-10 keep their own order of both. See `find_images` for where the class
            folders may be.
        split: which split of CIFAR-10 to read; the other formats have only "train".

    Raises:
        UserError: the path does not exist, has another format, holds no images or is damaged, or pyarrow is needed for
            it and not installed.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if split not in SPLITS:
        raise UserError(f"split must be 'train' or 'test', not {split!r}.")
    try:
        dataset = _recognize(path)
        if dataset is None:
            return CifarImages(path, split)
        if split != "train":
            raise UserError(f"{path} has no split {split!r}, unlike CIFAR-10: give the path of those images.")
        return dataset(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions."
        ) from error


def _recognize(path: pathlib.Path) -> Callable[[pathlib.Path], ImageDataset] | None:
    """Returns the class that reads the path, None for CIFAR-10."""
    if find_parquet(path):
        return ParquetImages
    if path.is_dir():
        return None if any((path / name).is_file() for name in METADATA_FILES) else FolderImages
    if not path.is_file():
        raise UserError(f"no images at {path}: there is no such file or folder; give {FORMATS}.")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ZipImages
    if magic[:2] == GZIP:
        return None
    if magic[:3] == b"BZh" or magic == b"\xfd7zXZ\0":
        raise UserError(f"{path} is compressed by bzip2 or xz: decompress it; a tar is read without unpacking it.")
    names = first_names(path, MAX_MEMBERS)
    if not names:
        is_named_zip = path.suffix.lower() == ".zip"
        fault = "not a zip, despite its name" if is_named_zip else "damaged or not in a format that is read"
        if is_image(path.name):
            fault = "a single file, not a set of images"
        raise UserError(f"{path} is {fault}; give {FORMATS}.")
    return None if any(name.rpartition("/")[2] in METADATA_FILES for name in names) else TarImages

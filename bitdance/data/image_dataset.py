"""The interface of all sources of labelled images, and what those in class folders share."""

from __future__ import annotations

import abc
import functools
import hashlib
import os
import pathlib
import sys

import numpy as np
from PIL import Image

from bitdance.data.class_folders import class_level, is_published, name_of
from bitdance.data.class_names import imagenet
from bitdance.runtime.errors import counted, one_line, printable

FORMATS = (
    "a folder, a zip or an uncompressed tar of class folders (<class>/<image>.jpg), ILSVRC2012_img_train.tar, a folder "
    "of the hub's parquet files, or CIFAR-10's official archives (cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or "
    "the folder that one of them unpacks to)"
)
SHOWN_CLASSES = 8
"""Names of classes in a summary."""


class ImageDataset(abc.ABC):
    """Labelled images in a fixed order. A data set can be pickled, and read from several threads and processes.

    Attributes:
        path: where the images are.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (N,) int64 in [0, len(classes)).
        upright: whether images are decoded as people see them, see `decode_image`; ImageNet's are not, as in ADM.
        notes: what else is at the path, in words.
        held_out: a folder of held-out images beside these.
    """

    path: pathlib.Path
    classes: tuple[str, ...]
    labels: np.ndarray
    upright: bool = False
    notes: str = ""
    held_out: pathlib.Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of the images' names in their order and how they are decoded, which identifies the data set."""
        digest = hashlib.sha256(b"upright\n" if self.upright else b"")
        for index in range(len(self)):
            digest.update(os.fsencode(self.name(index)) + b"\n")
        return digest.hexdigest()

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that hold the images."""
        return [self.path] if self.path.is_file() else sorted(filter(pathlib.Path.is_file, self.path.rglob("*")))

    @property
    def summary(self) -> str:
        """Number of images, classes and notes, in words."""
        return summarize(self.path, self.classes, self.labels, self.notes)

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decodes one image to 8-bit RGB, in its own size.

        Raises:
            UserError: the image cannot be read; the message names it.
            IndexError: `index` is out of range.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns a name of the image that is unique in the data set, such as "dog/0003.jpg"."""


class NamedImages(ImageDataset):
    """Image files in class folders, or all of one class.

    If all classes are WordNet ids of ImageNet, `classes` are the 1000 classes of ImageNet in their order. Otherwise the
    classes are numbered in the order of their names. `names` are those of the images, from `find_images`.

    Attributes:
        is_flat: whether the images are in no class folders.
    """

    def __init__(self, path: pathlib.Path, names: list[str]) -> None:
        level = class_level(path, names)
        self.is_flat = level is None
        folders = [name_of(path)] * len(names) if level is None else [name.split("/")[level] for name in names]
        known = imagenet().wordnet_ids
        self.path = path
        are_known = level is not None and set(folders) <= set(known)
        self.classes = known if are_known else tuple(sorted(set(folders)))
        self.upright = not (is_published(names) if level is None else are_known)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)
        self._names = names

    def name(self, index: int) -> str:
        return self._names[index]


def evenly_spaced(total: int, count: int | None) -> np.ndarray:
    """Returns min(count, total) evenly spaced indices in [0, total), int64; all of them if `count` is None."""
    return np.linspace(0, total - 1, min(total, count or total)).round().astype(np.int64)


def summarize(path: pathlib.Path, classes: tuple[str, ...], labels: np.ndarray, notes: str = "") -> str:
    """Returns "pictures: 128 images of 3 classes (cat, dog, horse)" and notes; without `classes` nothing of them."""
    text = f"{path}: {counted(len(labels), 'image')}"
    if classes:
        present = [printable(classes[label]) for label in np.unique(labels)]
        shown = ", ".join(present[:SHOWN_CLASSES]) + ", ..." * (len(present) > SHOWN_CLASSES)
        text += f" of {counted(len(present), 'class')} ({shown})"
    return f"{text}, {notes}" if notes else text


@functools.cache
def print_summary(text: str) -> None:
    """Prints a `summary` of images to stderr, once for all that open them."""
    if text:
        print(f"bitdance: {one_line(text)}", file=sys.stderr, flush=True)

"""The interface of all sources of labelled images, and the order of images that are kept in class folders."""

from __future__ import annotations

import abc
import hashlib
import os
import pathlib
from collections.abc import Collection

import numpy as np
from PIL import Image

from bitdance.data.class_names import imagenet
from bitdance.data.decoding import is_image
from bitdance.runtime.errors import UserError

FORMATS = (
    "a folder, a zip or an uncompressed tar of class folders (<class>/<image>.jpg), ILSVRC2012_img_train.tar, a folder "
    "of the hub's parquet files, or CIFAR-10's official archives (cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or "
    "the folder that one of them unpacks to)"
)

LABELS_FILE = "labels.json"
"""In a folder of image files: their labels, in the order of the file names."""


class ImageDataset(abc.ABC):
    """Labelled images in a fixed order. A data set can be pickled, and read from several threads and processes.

    Attributes:
        path: where the images are.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (N,) int64 in [0, len(classes)).
    """

    path: pathlib.Path
    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of the images' names in their order, which identifies the data set and its classes."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(os.fsencode(self.name(index)) + b"\n")
        return digest.hexdigest()

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decodes one image to 8-bit RGB, in its stored size and orientation.

        Raises:
            UserError: the image cannot be read; the message names it.
            IndexError: `index` is out of range.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns a name of the image that is unique in the data set, such as "dog/0003.jpg"."""


class NamedImages(ImageDataset):
    """Image files with names of the form `<class>/...`.

    If all classes are WordNet ids of ImageNet, `classes` are the 1000 classes of ImageNet in their order. Otherwise the
    classes are numbered in the order of their names. `names` are those of the images, from `sort_by_class`.
    """

    def __init__(self, path: pathlib.Path, names: list[str]) -> None:
        folders = [name.split("/", 1)[0] for name in names]
        known = imagenet().wordnet_ids
        self.path = path
        self.classes = known if set(folders) <= set(known) else tuple(sorted(set(folders)))
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)
        self._names = names

    def name(self, index: int) -> str:
        return self._names[index]


def evenly_spaced(total: int, count: int | None) -> np.ndarray:
    """Returns min(count, total) evenly spaced indices in [0, total), int64; all of them if `count` is None."""
    return np.linspace(0, total - 1, min(total, count or total)).round().astype(np.int64)


def sort_by_class(path: pathlib.Path, members: Collection[str], is_archive: bool = False) -> tuple[str, list[str]]:
    """Sorts images by class and then by name.

    Args:
        path: for error messages.
        members: names of files of any type, and of folders with a trailing "/"; top-level folders are the classes.
        is_archive: whether the class folders may be inside one common folder.

    Returns:
        The common folder with a trailing "/", or "", and the names of the images relative to it.

    Raises:
        UserError: there are no images, no class folders, or a class folder without images.
    """
    members = [member for member in members if not is_hidden(member)]
    images = [name.split("/") for name in members if is_image(name)]
    expected = f"images are expected in one folder per class, as in {path}/<class>/<image>.jpg"
    if not images:
        raise UserError(f"no images in {path}: {expected}, in a format such as JPEG or PNG.")
    prefix = ""
    if is_archive and len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        prefix = images[0][0] + "/"
    inside = {member[len(prefix) :] for member in members if member.startswith(prefix) and "/" in member[len(prefix) :]}
    # Sorted by parts: as strings "dog-2/a" < "dog/a", although the class "dog" < "dog-2".
    names = sorted(filter(is_image, inside), key=lambda name: name.split("/"))
    if not names:
        raise UserError(f"{path} holds images but no class folders: {expected}; move them into class folders.")
    folders, classes = ({name.split("/", 1)[0] for name in group} for group in (inside, names))
    if empty := sorted(folders - classes):  # skipping it would number the next classes unlike in a complete copy
        raise UserError(f"the class folder {empty[0]!r} in {path} holds no images; fill it or remove it.")
    return prefix, names


def is_hidden(name: str) -> bool:
    """Whether a part of the name starts with a dot or is a folder that macOS adds to zip files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))

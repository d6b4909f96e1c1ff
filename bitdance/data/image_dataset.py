"""What all sources of labelled images share: the interface, decoding, and the order of images in class folders."""

from __future__ import annotations

import abc
import io
import os
import pathlib
from collections.abc import Collection, Iterable

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitdance.data.class_names import imagenet
from bitdance.runtime.errors import UserError

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
MAX_FILE_BYTES = 1 << 28  # no honest photograph or CIFAR-10 batch is larger; a zip bomb is

# Pillow's other decoders (EPS runs Ghostscript, for one) have no business with files from anywhere.
_DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


class ImageDataset(abc.ABC):
    """A fixed order of labelled images.

    Attributes:
        path: where the images are.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (N,) int64, one label an image, in [0, len(classes)).
    """

    path: pathlib.Path
    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decodes one image to 8-bit RGB, in its stored size and orientation.

        Raises:
            UserError: the image cannot be read; the sentence names it and its place.
            IndexError: there is no such index.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns a name of the image that is unique in the set, such as "dog/0003.jpg"."""


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes the bytes of an image file to 8-bit RGB.

    Grey, palette and CMYK images are converted, alpha is dropped, 16-bit grey is scaled to 8 bits. EXIF orientation is
    not applied, as in ADM and torchvision.

    Raises:
        UserError: the bytes are no image, or are damaged, or decode to an absurd size; the sentence names `where`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_DECODERS) as image:
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"the image {where} has too many pixels to be safe to decode; remove it or scale it down."
        ) from error
    except (
        Exception
    ) as error:  # on damaged bytes Pillow's decoders raise nearly anything: SyntaxError, struct.error, KeyError ...
        reason = "it is in no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(
            f"cannot read the image {where}: {reason or type(error).__name__}; repair or remove it."
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith(
        "I"
    ):  # 16-bit grey: "I;16" and its byte orders, "I" before Pillow 11. convert() would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels of more than 16 bits have no defined range")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same pixels as directly, without Pillow's warning
    return image.convert("RGB")


class NamedImages(ImageDataset):
    """Images that are encoded files under `<class>/...` names.

    Where all classes are WordNet ids of ImageNet's, be they ever so few, `classes` are all 1000 of ImageNet and the
    labels ImageNet's; otherwise the classes that are there are numbered in the order of their names.
    """

    def __init__(self, path: pathlib.Path, names: list[str]) -> None:
        """Takes relative names with "/", as `by_class` returns them."""
        folders = [name.split("/", 1)[0] for name in names]
        classes = sorted(set(folders))
        known = imagenet().wordnet_ids
        assert known is not None
        self.path = path
        self.classes = known if set(classes) <= set(known) else tuple(classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label_of[folder] for folder in folders], dtype=np.int64)
        self._names = names

    def name(self, index: int) -> str:
        return self._names[index]


def by_class(path: pathlib.Path, files: Iterable[str], folders: Iterable[str]) -> list[str]:
    """The images among `files` (relative names with "/") in the order of a set, by class and then by name.

    Args:
        path: where they are, for errors.
        files: names of files of any kind.
        folders: those at the top, which are the classes.

    Raises:
        UserError: there are no images, or none in a class folder, or a class folder holds none.
    """
    images = sorted(
        {name for name in files if is_image(name) and not is_hidden(name)},
        key=lambda name: name.split("/"),  # not the string itself: "dog-2/a" < "dog/a", but the class "dog" < "dog-2"
    )
    expected = f"images are expected in one folder a class, as in {path}/<class>/<image>.jpg"
    if not images:
        raise UserError(f"no images in {path}: {expected}, in a format such as JPEG or PNG.")
    names = [name for name in images if "/" in name]
    if not names:
        raise UserError(
            f"{path} holds pictures but no class folders: {expected}; move each into the folder of its class."
        )
    classes = {name.split("/", 1)[0] for name in names}
    empty = sorted({folder for folder in folders if not is_hidden(folder)}.difference(classes))
    if empty:  # to skip it would give the classes after it other numbers than in a complete copy
        raise UserError(f"the class folder {empty[0]!r} in {path} holds no images; fill it or remove it.")
    return names


def by_class_in_archive(path: pathlib.Path, members: Collection[str]) -> tuple[str, list[str]]:
    """As `by_class`, of the members of an archive, whose class folders may lie in one common folder.

    Args:
        path: the archive, for errors.
        members: names of files, and of folders with a "/" at the end.

    Returns:
        The common folder with its "/", or "", and the names inside it.

    Raises:
        UserError: as `by_class`.
    """
    members = [member for member in members if not is_hidden(member)]
    images = [name.split("/") for name in members if is_image(name)]
    prefix = ""
    if len({parts[0] for parts in images}) == 1 and all(len(parts) > 2 for parts in images):
        prefix = images[0][0] + "/"
    inside = [member[len(prefix) :] for member in members if member.startswith(prefix)]
    return prefix, by_class(path, inside, {name.split("/", 1)[0] for name in inside if "/" in name})


def is_image(name: str) -> bool:
    """Whether the name of a file ends like an image's."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a part of the name starts with a dot, or is what macOS adds to its zips."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))

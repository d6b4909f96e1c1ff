"""Images to evaluate, read in blocks from `.npz` files, folders of image files and data sets.

An `.npz` of 50,000 images at 256 px is 9.8 GB, so no more than a block is held in memory.
"""

from __future__ import annotations

import abc
import concurrent.futures
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from bitdance.config import MAX_IMAGE_SIZE, Split
from bitdance.data.bad_images import BadImages
from bitdance.data.class_folders import LABELS_FILE, is_published
from bitdance.data.crops import center_crop, to_array
from bitdance.data.decoding import is_image, one_image, read_image
from bitdance.data.image_dataset import ImageDataset, NamedImages, evenly_spaced, summarize
from bitdance.data.images import open_images
from bitdance.metrics.npz_files import check_labels, open_npz, read_array, read_header
from bitdance.runtime.atomic_files import load_json
from bitdance.runtime.errors import UserError

READERS = 4


class ImageSource(abc.ABC):
    """Images of one size in a fixed order.

    Attributes:
        path: where they are stored.
        shape: (N, H, W, 3).
        dtype: of the pixels; uint8 except for some `.npz` files.
        labels: (N,) int64, None without labels.
        num_classes: number of classes, None if unknown.
        upright: as of `ImageDataset`.
        summary: what was found, in words.
        files: that hold the images.
    """

    path: pathlib.Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    labels: np.ndarray | None = None
    num_classes: int | None = None
    upright: bool = False
    summary: str = ""

    @property
    def files(self) -> list[pathlib.Path]:
        return [self.path]

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        """Reads blocks of `size` images, the last one shorter: blocks `rank`, `rank + ranks`, ...

        Yields:
            The images of a block, (n, H, W, 3).

        Raises:
            UserError: an image cannot be read.
        """


def open_source(
    path: str | os.PathLike[str], image_size: int | None = None, split: Split = "train", limit: int | None = None
) -> ImageSource:
    """Opens images.

    Args:
        path: an `.npz` file (`arr_0`, or its only array of four dimensions; labels in `arr_1`), a folder of image files
            (with the `labels.json` of `bitdance sample`, if any), or any data set that training reads.
        image_size: scale and crop image files to squares of this size, as in ADM; without it all must have one size.
        split: train or test, for CIFAR-10's archives.
        limit: use only this many image files, evenly spaced over the set.

    Raises:
        UserError: nothing is there, or it holds no images.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if path.name.endswith(".job") and path.is_dir():
        raise UserError(f"{path} is an unfinished sampling job: finish it with the command that started it.")
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        if image_size is not None or limit is not None:
            raise UserError(f"{path} is read as it is: leave out `image_size` and `limit`, which apply to image files.")
        return NpzSource(path)
    return ImageFileSource(path, image_size, split, limit)


class NpzSource(ImageSource):
    """Images in an `.npz` file, compressed or not, read as a stream."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with open_npz(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            headers = {name: read_header(archive, name) for name in names}
            images = {"arr_0"} & headers.keys() or {name for name in headers if len(headers[name].shape) == 4}
            if len(images) != 1:
                raise UserError(
                    f"{path} holds no arr_0 ({len(headers)} arrays, {len(images)} of four dimensions): expected images "
                    "of shape (N, H, W, 3) under that name."
                )
            name = images.pop()
            shape, self.dtype, is_fortran, self._start = headers[name]
            if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or self.dtype.kind not in "uif":
                raise UserError(f"{path} holds {self.dtype} of shape {shape}: expected numbers of shape (N, H, W, 3).")
            if is_fortran:
                raise UserError(f"{path} holds an array in Fortran order: save it in C order.")
            self.shape, self._member = shape, f"{name}.npy"
            self._image_bytes = math.prod(shape[1:]) * self.dtype.itemsize
            labels = read_array(archive, "arr_1") if name == "arr_0" else None
            if labels is not None:
                self.labels = check_labels(labels, len(self), f"{path}: arr_1")

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        with open_npz(self.path) as archive, archive.open(self._member) as file:
            file.read(self._start)  # a seek would end the comparison with the checksum
            for first in range(rank * size, len(self), ranks * size):
                count = min(size, len(self) - first)
                file.seek(self._start + first * self._image_bytes)
                pixels = np.frombuffer(file.read(count * self._image_bytes), self.dtype)
                yield pixels.reshape(count, *self.shape[1:])


class ImageFileSource(ImageSource):
    """An image file, a folder of them with or without class folders, or any data set that training reads.

    Args:
        path, image_size, split, limit: as of `open_source`.
        skips: leave images that cannot be read out of the blocks, and collect their positions in `bad_images`;
            otherwise they are an error.
        max_bad_images: how many; None for what suits the images.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        path: pathlib.Path,
        image_size: int | None = None,
        split: Split = "train",
        limit: int | None = None,
        skips: bool = False,
        max_bad_images: int | None = None,
    ) -> None:
        self.path = path
        for name, value in (("image_size", image_size), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is invalid: it must be at least 1.")
        if image_size is not None and image_size > MAX_IMAGE_SIZE:
            raise UserError(f"image_size={image_size} is invalid: it must be at most {MAX_IMAGE_SIZE}.")
        self._images: ImageDataset | None = None
        if is_image(path.name) and path.is_file():
            self.upright, count = not is_published([path.name]), 1
        else:
            self._images = images = open_images(path, split)
            self.upright, self.summary, count = images.upright, images.summary, len(images)
        self.bad_images = BadImages(max_bad_images, self._images)
        self._skips = skips
        self._order = evenly_spaced(count, limit)
        if isinstance(self._images, NamedImages) and self._images.is_flat:
            self.summary = summarize(self._images.path, (), self._images.labels, self._images.notes)
            if (labels := self._images.path / LABELS_FILE).exists():
                self.labels = _read_labels_file(labels, count)[self._order]
        elif self._images is not None:
            self.labels, self.num_classes = self._images.labels[self._order], len(self._images.classes)
        self.crop(image_size)
        if image_size is None:
            found = (self._try_read(position) for position in range(len(self)))
            if (first := next((image for image in found if image is not None), None)) is None:
                raise UserError(f"none of the images of {path} can be read: repair them.")
            self.shape = (len(self), *first.shape)

    @property
    def files(self) -> list[pathlib.Path]:
        return [self.path] if self._images is None else self._images.files

    def crop(self, image_size: int | None) -> None:
        """Scales and crops the images that are read from now on to squares of this size; None for their own size."""
        self._image_size = image_size
        self.shape = (len(self._order), image_size or 0, image_size or 0, 3)

    @one_image()
    def read(self, position: int) -> np.ndarray:
        """Reads an image, (H, W, 3) uint8.

        Raises:
            UserError: it cannot be read, or has another size than the first one.
        """
        index = int(self._order[position])
        if self._images is not None:
            image, name = self._images.read(index), self._images.name(index)
        else:
            image, name = read_image(self.path, self.upright), self.path.name
        if self._image_size is not None:
            image = center_crop(image, self._image_size)
        elif self.shape[1] and image.size != (self.shape[2], self.shape[1]):
            raise UserError(
                f"{name} in {self.path} has {image.size[0]} x {image.size[1]} pixels, the first image "
                f"{self.shape[2]} x {self.shape[1]}: all need one size, as with `image_size`."
            )
        return to_array(image)

    def _try_read(self, position: int) -> np.ndarray | None:
        try:
            return self.read(position)
        except UserError as error:
            if not self._skips:
                raise
            self.bad_images.add(position, error)
            return None

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for first in range(rank * size, len(self), ranks * size):
                positions = range(len(self))[first : first + size]
                found = [image for image in pool.map(self._try_read, positions) if image is not None]
                yield np.stack(found) if found else np.empty((0, *self.shape[1:]), np.uint8)
        if len(self.bad_images) == len(self):
            raise UserError(f"none of the images of {self.path} can be read: repair them.")


def _read_labels_file(path: pathlib.Path, count: int) -> np.ndarray:
    try:
        return check_labels(np.array(load_json(path)), count, str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it to evaluate the images without it.") from None

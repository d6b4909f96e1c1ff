"""Images to evaluate, read in blocks from `.npz` files, folders of image files and data sets.

An `.npz` of 50,000 images at 256 px is 9.8 GB, so no more than a block is held in memory.
"""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from bitdance.data.cifar10 import Split
from bitdance.data.crops import center_crop, to_array
from bitdance.data.decoding import is_image, read_image
from bitdance.data.image_dataset import ImageDataset, evenly_spaced
from bitdance.data.images import open_images
from bitdance.runtime.errors import UserError

LABELS_FILE = "labels.json"
"""In a folder of image files: their labels, in the order of the file names."""
READERS = 4


class ImageSource(abc.ABC):
    """Images of one size in a fixed order.

    Attributes:
        path: where they are stored.
        shape: (N, H, W, 3).
        dtype: of the pixels; uint8 except for some `.npz` files.
        labels: (N,) int64, None without labels.
        num_classes: number of classes, None if unknown.
    """

    path: pathlib.Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    labels: np.ndarray | None = None
    num_classes: int | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Reads blocks of `size` images, the last one shorter: blocks `rank`, `rank + ranks`, ...

        Yields:
            Index of the block, and its images (n, H, W, 3).

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
    path = pathlib.Path(path).expanduser()
    if path.name.endswith(".job") and path.is_dir():
        raise UserError(f"{path} is an unfinished sampling job: finish it with the command that started it.")
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        if image_size is not None or limit is not None:
            raise UserError(f"{path} is read as it is: leave out `image_size` and `limit`, which apply to image files.")
        return NpzSource(path)
    return ImageFileSource(path, image_size, split, limit)


@contextlib.contextmanager
def npz_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns any error from reading an `.npz` file into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise any error of zipfile, zlib and NumPy
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"{path} cannot be read as an .npz file ({reason}): create or download it again.") from error


class NpzSource(ImageSource):
    """Images in an `.npz` file, compressed or not, read as a stream."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        with npz_errors(path), zipfile.ZipFile(path) as archive:
            self._member = self._find(archive)
            with archive.open(self._member) as file:
                shape, self.dtype = _read_header(file)
                start = file.tell()
            if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or self.dtype.kind not in "uif":
                raise UserError(f"{path} holds {self.dtype} of shape {shape}: expected numbers of shape (N, H, W, 3).")
            expected = start + int(np.prod(shape, dtype=object)) * self.dtype.itemsize
            if archive.getinfo(self._member).file_size != expected:
                raise UserError(f"{path}: {self._member} is truncated: create or download it again.")
            self.shape = shape
            self.labels = self._read_labels(archive)

    def _find(self, archive: zipfile.ZipFile) -> str:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if "arr_0.npy" in names:
            return "arr_0.npy"
        images = []
        for name in names:
            with archive.open(name) as file:
                if len(_read_header(file)[0]) == 4:
                    images.append(name)
        if len(images) != 1:
            raise UserError(
                f"{self.path} holds no arr_0 ({len(names)} arrays, {len(images)} of them of four dimensions): expected "
                "images of shape (N, H, W, 3) under that name."
            )
        return images[0]

    def _read_labels(self, archive: zipfile.ZipFile) -> np.ndarray | None:
        if self._member != "arr_0.npy" or "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as file:
            shape, dtype = _read_header(file)
            if shape != (len(self),) or dtype.kind not in "iu":
                raise UserError(f"{self.path}: arr_1 is {dtype} of shape {shape}: expected {len(self)} integer labels.")
            labels = np.frombuffer(_read_bytes(file, len(self) * dtype.itemsize), dtype).astype(np.int64)
        if labels.min() < 0:
            raise UserError(f"{self.path}: arr_1 holds the label {labels.min()}: labels start at 0.")
        return labels

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        image_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with npz_errors(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self._member) as file:
            _read_header(file)
            for block, start in enumerate(range(0, len(self), size)):
                count = min(size, len(self) - start)
                if block % ranks != rank:
                    file.seek(count * image_bytes, os.SEEK_CUR)
                    continue
                pixels = np.frombuffer(_read_bytes(file, count * image_bytes), self.dtype)
                yield block, pixels.reshape(count, *self.shape[1:])


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = formats[np.lib.format.read_magic(file)](file)
    if fortran and len(shape) > 1:
        raise UserError("an array of images is stored in Fortran order: save it in C order.")
    return shape, dtype


def _read_bytes(file: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        if not (more := file.read(count - len(data))):
            raise EOFError
        data += more
    return data


class ImageFileSource(ImageSource):
    """Image files in a folder, with or without class folders, or in any data set that training reads."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: pathlib.Path, image_size: int | None, split: Split, limit: int | None) -> None:
        self.path, self._image_size = path, image_size
        for name, value in (("image_size", image_size), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is invalid: it must be at least 1.")
        flat = sorted(file for file in path.glob("[!.]*") if is_image(file.name) and file.is_file())
        self._images: ImageDataset | list[pathlib.Path] = flat or open_images(path, split)
        self._order = evenly_spaced(len(self._images), limit)
        if isinstance(self._images, ImageDataset):
            self.labels, self.num_classes = self._images.labels[self._order], len(self._images.classes)
        elif (path / LABELS_FILE).exists():
            self.labels = _read_labels_file(path / LABELS_FILE, len(flat))[self._order]
        height, width, _ = self._read(0).shape
        self.shape = (len(self._order), height, width, 3)

    def _read(self, position: int) -> np.ndarray:
        index = int(self._order[position])
        if isinstance(self._images, ImageDataset):
            image, name = self._images.read(index), self._images.name(index)
        else:
            image, name = read_image(self._images[index]), self._images[index].name
        if self._image_size is not None:
            return to_array(center_crop(image, self._image_size))
        if position > 0 and image.size != (self.shape[2], self.shape[1]):
            raise UserError(
                f"{name} in {self.path} has {image.size[0]} x {image.size[1]} pixels, the first image "
                f"{self.shape[2]} x {self.shape[1]}: crop all to one size with `image_size`."
            )
        return to_array(image)

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for block, start in enumerate(range(0, len(self), size)):
                if block % ranks == rank:
                    yield block, np.stack(list(pool.map(self._read, range(start, min(start + size, len(self))))))


def _read_labels_file(path: pathlib.Path, count: int) -> np.ndarray:
    try:
        labels = np.array(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it to evaluate the images without it.") from None
    if labels.shape != (count,) or labels.dtype.kind != "i" or labels.min() < 0:
        raise UserError(f"{path} does not hold a label for each of the {count} images beside it: delete it.")
    return labels.astype(np.int64)

"""Images to evaluate, wherever they lie: `.npz` files, folders of pictures, data sets; a block at a time.

An `.npz` of 50,000 images at 256 px is 9.8 GB, so nothing here ever holds more than a block.
"""

from __future__ import annotations

import abc
import concurrent.futures
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
"""In a folder of pictures: the class of each, in the order of their names."""
READERS = 4


class Source(abc.ABC):
    """Images of one size, in a fixed order.

    Attributes:
        path: where they lie.
        shape: (N, H, W, 3).
        dtype: of the pixels; uint8 but for some `.npz` files.
        labels: (N,) int64, None where there are none.
        num_classes: of the labels, None where nothing says so.
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
        """Blocks of `size` images, the last one shorter: block r, r + ranks, ... for process r of so many.

        Yields:
            Number of the block, and its images (n, H, W, 3).

        Raises:
            UserError: an image cannot be read.
        """


def open_source(
    path: str | os.PathLike[str], image_size: int | None = None, split: Split = "train", limit: int | None = None
) -> Source:
    """Opens images.

    Args:
        path: an `.npz` file (`arr_0`, or its only array of four dimensions; `arr_1` are labels), a folder of pictures
            (with a `labels.json`, if `bitdance sample` made it), or anything that training reads.
        image_size: scale and crop pictures to squares of this side, as ADM does; without it all must have one size.
        split: train or test, for CIFAR-10's archives.
        limit: only so many pictures, spread over the set.

    Raises:
        UserError: nothing is there, or it holds no images.
    """
    path = pathlib.Path(path).expanduser()
    if path.name.endswith(".job") and path.is_dir():
        raise UserError(f"{path} is an unfinished sampling job: finish it with the command that began it.")
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        if image_size is not None or limit is not None:
            raise UserError(f"{path} is taken as it is: leave out --image-size and --limit, which are for pictures.")
        return NpzSource(path)
    return PictureSource(path, image_size, split, limit)


class NpzSource(Source):
    """Images in an `.npz` file, compressed or not, read as a stream."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._member = self._find(archive)
                with archive.open(self._member) as file:
                    self.shape, self.dtype = _images_header(file, path)  # type: ignore[assignment]
                    start = file.tell()
                expected = start + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
                if archive.getinfo(self._member).file_size != expected:
                    raise UserError(f"{path}: {self._member} is truncated: make or fetch it again.")
                self.labels = self._labels(archive)
        except UserError:
            raise
        except Exception as error:  # a damaged archive can fail in every way that zip, zlib and NumPy know
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise UserError(f"{path} cannot be read as an .npz file of images ({reason}): make it again.") from error

    def _find(self, archive: zipfile.ZipFile) -> str:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if "arr_0.npy" in names:
            return "arr_0.npy"
        images = []
        for name in names:
            with archive.open(name) as file:
                if len(_header(file)[0]) == 4:
                    images.append(name)
        if len(images) != 1:
            raise UserError(
                f"{self.path} holds no arr_0 ({len(names)} arrays, {len(images)} of them of four dimensions): expected "
                "images of shape (N, H, W, 3) under that name."
            )
        return images[0]

    def _labels(self, archive: zipfile.ZipFile) -> np.ndarray | None:
        if self._member != "arr_0.npy" or "arr_1.npy" not in archive.namelist():
            return None
        with archive.open("arr_1.npy") as file:
            shape, dtype = _header(file)
            if shape != (len(self),) or dtype.kind not in "iu":
                raise UserError(
                    f"{self.path}: arr_1 holds {dtype} of shape {shape}: expected {len(self)} integer labels."
                )
            labels = np.frombuffer(_read(file, len(self) * dtype.itemsize), dtype).astype(np.int64)
        if labels.min() < 0:
            raise UserError(f"{self.path}: arr_1 holds the label {labels.min()}: labels begin at 0.")
        return labels

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        image = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as file:
                _header(file)
                for number, start in enumerate(range(0, len(self), size)):
                    count = min(size, len(self) - start)
                    if number % ranks != rank:
                        file.seek(count * image, os.SEEK_CUR)
                        continue
                    pixels = np.frombuffer(_read(file, count * image), self.dtype)
                    yield number, pixels.reshape(count, *self.shape[1:])
        except Exception as error:  # as above
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path} is damaged ({type(error).__name__}): make or fetch it again.") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = formats[np.lib.format.read_magic(file)](file)
    if fortran and len(shape) > 1:
        raise UserError("an array of images lies in the file column by column: save it in C order.")
    return shape, dtype


def _images_header(file: IO[bytes], path: pathlib.Path) -> tuple[tuple[int, ...], np.dtype]:
    shape, dtype = _header(file)
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or dtype.kind not in "uif" or dtype.itemsize > 8:
        raise UserError(f"{path} holds {dtype} of shape {shape}: expected numbers of shape (N, H, W, 3).")
    return shape, dtype


def _read(file: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        if not (more := file.read(count - len(data))):
            raise EOFError
        data += more
    return data


class PictureSource(Source):
    """Pictures in a folder, with or without class folders, or in any set that training reads."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: pathlib.Path, image_size: int | None, split: Split, limit: int | None) -> None:
        self.path, self._side = path, image_size
        for name, value in (("--image-size", image_size), ("--limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value} does not fit: it must be at least 1.")
        flat = sorted(_pictures(path)) if path.is_dir() else []
        self._images: ImageDataset | list[pathlib.Path] = flat or open_images(path, split)
        self._order = evenly_spaced(len(self._images), limit)
        if isinstance(self._images, ImageDataset):
            self.labels, self.num_classes = self._images.labels[self._order], len(self._images.classes)
        elif (path / LABELS_FILE).exists():
            self.labels = _read_labels(path / LABELS_FILE, len(flat))[self._order]
        # A first picture tells the size of all, or that they need one.
        height, width, _ = self._read(0).shape
        self.shape = (len(self._order), height, width, 3)

    def _read(self, place: int) -> np.ndarray:
        index = int(self._order[place])
        if isinstance(self._images, ImageDataset):
            image, name = self._images.read(index), self._images.name(index)
        else:
            image, name = read_image(self._images[index]), self._images[index].name
        if self._side is not None:
            return to_array(center_crop(image, self._side))
        if place > 0 and image.size != (self.shape[2], self.shape[1]):
            raise UserError(
                f"{name} in {self.path} has {image.size[0]} x {image.size[1]} pixels, the first picture "
                f"{self.shape[2]} x {self.shape[1]}: give all one size with --image-size."
            )
        return to_array(image)

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for number, start in enumerate(range(0, len(self), size)):
                if number % ranks == rank:
                    yield number, np.stack(list(pool.map(self._read, range(start, min(start + size, len(self))))))


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    return [
        path for path in folder.iterdir() if is_image(path.name) and not path.name.startswith(".") and path.is_file()
    ]


def _read_labels(path: pathlib.Path, count: int) -> np.ndarray:
    try:
        labels = np.array(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it to evaluate the images without it.") from None
    if labels.shape != (count,) or labels.dtype.kind != "i" or labels.min() < 0:
        raise UserError(f"{path} does not hold a label for each of the {count} images beside it: delete it or them.")
    return labels.astype(np.int64)

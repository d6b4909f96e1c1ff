"""Labelled images in the places people keep them: class folders, archives of them, parquet files, CIFAR-10's archives.

`open_images` looks at what a path holds, not only at its name, and returns an `ImageDataset`: a fixed order of images,
each with a label and a name, read one at a time. A set can be pickled, and read from several threads and processes.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import pickletools
import tarfile
import threading
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from bitdance.data.image_dataset import (
    MAX_FILE_BYTES,
    ImageDataset,
    NamedImages,
    by_class,
    by_class_in_archive,
    decode_image,
    is_hidden,
)
from bitdance.data.parquet import ParquetImages, find_parquet
from bitdance.data.tar import TarImages, first_names
from bitdance.runtime.errors import UserError

Split = Literal["train", "test"]

FORMATS = (
    "a folder, a zip or an uncompressed tar of class folders (<class>/<image>.jpg), ILSVRC2012_img_train.tar, a folder "
    "of the hub's parquet files, or CIFAR-10's official archives (cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or "
    "the folder that one of them unpacks to)"
)

_CIFAR_BATCHES: dict[str, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
_CIFAR_META = {"": "batches.meta", ".bin": "batches.meta.txt"}  # by suffix of the batch files: pickles have none
_CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_MEMBERS = 100  # its archives have nine: there is no need to walk through all of a larger tar


def open_images(path: str | os.PathLike[str], split: Split = "train") -> ImageDataset:
    """Opens labelled images, whatever they are kept in.

    Args:
        path: a folder, zip or tar of class folders, a tar of one tar a class, parquet files as the Hugging Face hub
            has them (a folder, one file, or a pattern such as `data/validation-*.parquet`; of a folder the files
            `train*.parquet`, in it or in its `data/`, or else all), CIFAR-10's official archive, or the folder it
            unpacks to. Classes are numbered in the order of their folders' names, images ordered by name within a
            class; folders that are ImageNet's WordNet ids get ImageNet's 1000 classes, however few they are. Parquet
            files and CIFAR-10 keep their own order of both. An archive's class folders may lie in one common folder,
            such as `train/`.
        split: which of CIFAR-10's batches to read; the other formats have nothing but "train".

    Raises:
        UserError: nothing is there, it is not one of these formats, it holds no images, it is damaged, or it is
            parquet and pyarrow is not installed.
    """
    path = pathlib.Path(path).expanduser()
    if split not in _CIFAR_BATCHES:
        raise UserError(f"split must be 'train' or 'test', not {split!r}.")
    try:
        kind = _recognize(path)
        if kind is None:
            return _CifarImages(path, split)
        if split != "train":
            raise UserError(
                f"{path} has no split {split!r}: only CIFAR-10's archives hold two; give the path of those images."
            )
        return kind(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions."
        ) from error


def _recognize(path: pathlib.Path) -> Callable[[pathlib.Path], ImageDataset] | None:
    """What reads the path; None for CIFAR-10, which says best what is wrong with anything else too."""
    if find_parquet(path):
        return ParquetImages
    if path.is_dir():
        return None if any((path / meta).is_file() for meta in _CIFAR_META.values()) else _FolderImages
    if not path.is_file():
        raise UserError(f"no images at {path}: there is no such file or folder; give {FORMATS}.")
    if _looks_like_zip(path):
        return _ZipImages
    members = first_names(path, _CIFAR_MEMBERS)
    if not members or any(name.rsplit("/", 1)[-1] in _CIFAR_META.values() for name in members):
        return None
    return TarImages


def spread(total: int, count: int | None) -> np.ndarray:
    """Indices of `count` of `total` things (None, or more than there are: of all), evenly spread: (count,) int64."""
    return np.linspace(0, total - 1, min(total, count or total)).round().astype(np.int64)


class _FolderImages(NamedImages):
    def __init__(self, path: pathlib.Path) -> None:
        files: list[str] = []
        folders: list[str] = []
        for folder, below, names in os.walk(path, onerror=_raise, followlinks=True):
            below[:] = [name for name in below if not is_hidden(name)]
            relative = pathlib.Path(folder).relative_to(path)
            files.extend((relative / name).as_posix() for name in names)
            if folder == str(path):
                folders = list(below)
        super().__init__(path, by_class(path, files, folders))

    def read(self, index: int) -> Image.Image:
        file = self.path / self._names[index]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the image {file}: {error.strerror or error}; check it and its permissions."
            ) from error
        return decode_image(data, str(file))


class _ZipImages(NamedImages):
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        try:
            members = self._open()[0].namelist()
        except Exception as error:  # besides BadZipFile: struct.error, UnicodeDecodeError, NotImplementedError ...
            raise UserError(f"{path} is a damaged or truncated zip ({error}); copy or download it again.") from error
        self._prefix, names = by_class_in_archive(path, members)
        super().__init__(path, names)

    def read(self, index: int) -> Image.Image:
        where = f"{self._prefix}{self._names[index]} in {self.path}"
        try:
            archive, lock = self._open()
            with lock:
                member = archive.getinfo(self._prefix + self._names[index])
                if member.file_size > MAX_FILE_BYTES:
                    raise ValueError(f"it unpacks to {member.file_size} bytes")
                data = archive.read(member)
        except (
            Exception
        ) as error:  # damaged, encrypted, an unknown compression, gone since: zipfile has an exception for each
            raise UserError(
                f"cannot read the image {where}: {error or type(error).__name__}; make the zip again."
            ) from error
        return decode_image(data, where)

    def _open(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        """Returns this process's own archive and the lock to read it under.

        A forked child must neither share its parent's file position nor inherit a lock that some thread of the parent
        held, so both belong to one process id. Two threads may both get here first: each then has a whole pair.
        """
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
        return opened[1], opened[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class _CifarImages(ImageDataset):
    """CIFAR-10 as its authors publish it (https://www.cs.toronto.edu/~kriz/cifar.html), held in memory.

    Attributes:
        pixels: (N, 32, 32, 3) uint8.
    """

    def __init__(self, path: pathlib.Path, split: Split) -> None:
        self.path = path
        batches = _CIFAR_BATCHES[split]
        wanted = {meta: [batch + suffix for batch in batches] for suffix, meta in _CIFAR_META.items()}
        files = _read_files(path, {name for meta, names in wanted.items() for name in (meta, *names)})
        meta = next((meta for meta in wanted if meta in files), None)
        if meta is None:
            raise UserError(f"{path} is not CIFAR-10 (it holds no batches.meta); the formats that are read: {FORMATS}.")
        missing = [name for name in wanted[meta] if name not in files]
        if missing:
            raise UserError(
                f"{path} lacks {missing[0]}, part of CIFAR-10's {split} split; download or unpack it again."
            )
        is_pickle = meta == _CIFAR_META[""]
        name = meta
        try:
            names = _unpickle(files[meta])["label_names"] if is_pickle else files[meta].split()
            self.classes = tuple(_text(name) for name in names)
            if not self.classes:
                raise ValueError("it names no classes")
            pixels, labels = [], []
            for name in wanted[meta]:
                batch_pixels, batch_labels = (_pickled_batch if is_pickle else _binary_batch)(
                    files.pop(name), len(self.classes)
                )
                pixels.append(batch_pixels)
                labels.append(batch_labels)
        except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
            raise UserError(
                f"cannot read {name} of {path}: {error or type(error).__name__}; download CIFAR-10 again."
            ) from error
        self.pixels = np.ascontiguousarray(np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        self.labels = np.concatenate(labels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{range(len(self))[index]:05d}.png"


def _read_files(path: pathlib.Path, wanted: set[str]) -> dict[str, bytes]:
    """Reads the files of these names from a folder, or from any folder of a tar."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for number, member in enumerate(archive):
                if number == _CIFAR_MEMBERS:
                    break
                name = member.name.rsplit("/", 1)[-1]
                if name in wanted and member.isfile() and member.size <= MAX_FILE_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    files[name] = file.read()
    except Exception as error:  # besides TarError: EOFError, zlib.error, LZMAError, OSError from the decompressors
        if path.suffix.lower() == ".zip":
            raise UserError(
                f"{path} is not a zip, whatever its name says; the formats that are read: {FORMATS}."
            ) from error
        raise UserError(f"{path} is damaged or not in a format that is read ({FORMATS}).") from error
    return files


def _binary_batch(data: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3,072 pixels (red, green, blue planes) -> (n, 3072) uint8, (n,) int64."""
    if not data or len(data) % (1 + _CIFAR_PIXELS):
        raise ValueError(f"{len(data)} bytes are no whole number of {1 + _CIFAR_PIXELS}-byte records")
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _CIFAR_PIXELS)
    return _checked_batch(records[:, 1:], records[:, 0], num_classes)


def _pickled_batch(data: bytes, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with `data` (n, 3072) uint8 and `labels` -> (n, 3072) uint8, (n,) int64."""
    batch = _unpickle(data)
    return _checked_batch(batch["data"].array, batch["labels"], num_classes)


def _checked_batch(pixels: np.ndarray, labels: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    if pixels.shape != (len(labels), _CIFAR_PIXELS) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"pixels of shape {pixels.shape} do not fit {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"a label lies outside 0 to {num_classes - 1}")
    return pixels, labels.astype(np.int64)


class _PickledDtype:
    """Stands in for `numpy.dtype` in a pickle."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        if _text(name) != "u1":
            raise ValueError(f"an array of {_text(name)!r}, where bytes are expected")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment say nothing about bytes


class _PickledArray:
    """Stands in for the array that numpy would rebuild; numpy's own `__setstate__` trusts a pickle too much."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, _, is_fortran, data = state
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _encode_latin1(text: str, _: str) -> bytes:
    return text.encode("latin-1")  # how pickle protocol 2 writes bytes from Python 3


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds containers and arrays of bytes from stand-ins of this module: what a pickle names is never called."""

    _STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _PickledDtype,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it carries code ({module + '.' + name!r}), which is never run") from None


def _unpickle(data: bytes) -> dict[str, Any]:
    # The unpickler makes room for whatever a pickle announces: a damaged place or length would cost gigabytes.
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > number:
            raise pickle.UnpicklingError("it is damaged")
    loaded = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(loaded, dict):
        raise TypeError("it is not a dictionary")
    return {_text(key): value for key, value in loaded.items()}


def _text(value: str | bytes) -> str:
    """Python 2 wrote these files: its strings arrive as bytes."""
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _looks_like_zip(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _raise(error: OSError) -> None:
    raise error

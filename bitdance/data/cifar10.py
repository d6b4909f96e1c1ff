"""CIFAR-10 as its authors publish it (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import gzip
import io
import itertools
import pathlib
import pickle
import re
from typing import Any

import numpy as np
from PIL import Image

from bitdance.config import Split
from bitdance.data.decoding import MAX_FILE_BYTES
from bitdance.data.image_dataset import FORMATS, ImageDataset
from bitdance.data.tar import walk
from bitdance.runtime.errors import UserError, first_line
from bitdance.runtime.pickle_guard import check_pickle

SPLITS: dict[str, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
METADATA_FILES = {"batches.meta": "", "batches.meta.txt": ".bin"}
"""Names of the file with the class names, and the suffix of the batch files beside it: pickles have none."""

GZIP = b"\x1f\x8b"
MAX_MEMBERS = 100  # at the beginning of a tar, of which nine are CIFAR-10's
_PIXELS = 3 * 32 * 32


class CifarImages(ImageDataset):
    """The images of one split, held in memory.

    Args:
        path: an archive of pickles or of binary files, or the folder that it unpacks to.

    Raises:
        UserError: the path is not CIFAR-10, is incomplete, or is damaged.
    """

    def __init__(self, path: pathlib.Path, split: Split) -> None:
        self.path = path
        batches = {name: [batch + suffix for batch in SPLITS[split]] for name, suffix in METADATA_FILES.items()}
        files = _read_files(path, {*batches, *itertools.chain.from_iterable(batches.values())})
        metadata = next((name for name in METADATA_FILES if name in files), None)
        if metadata is None:
            raise UserError(f"{path} is compressed and not CIFAR-10: decompress it first, or give {FORMATS}.")
        if missing := [name for name in batches[metadata] if name not in files]:
            raise UserError(f"{path} lacks {missing[0]}, part of CIFAR-10's {split} split; download it again.")
        is_pickle = metadata == "batches.meta"
        name, pixels, labels = metadata, [], []
        try:
            names = _unpickle(files[name])["label_names"] if is_pickle else files[name].split()
            self.classes = tuple(map(_to_str, names))
            if not self.classes:
                raise ValueError("it names no classes")
            for name in batches[metadata]:
                x, y = (_decode_pickle if is_pickle else _decode_binary)(files.pop(name))
                if x.shape != (len(y), _PIXELS):
                    raise ValueError(f"pixels of shape {x.shape} do not match {len(y)} labels")
                if not 0 <= y.min() <= y.max() < len(self.classes):
                    raise ValueError(f"a label is outside 0 to {len(self.classes) - 1}")
                pixels.append(x)
                labels.append(y)
        except Exception as error:  # a damaged pickle makes the unpickler raise almost any type
            raise UserError(f"cannot read {name} of {path}: {first_line(error)}; download CIFAR-10 again.") from error
        self.pixels = np.ascontiguousarray(np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        self.labels = np.concatenate(labels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{range(len(self))[index]:05d}.png"


def _read_files(path: pathlib.Path, names: set[str]) -> dict[str, bytes]:
    """Reads the files with these names from a folder, or from any folder of a tar; at most 256 MB are decompressed."""
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        return {file.name: file.read_bytes() for file in found if file.stat().st_size <= MAX_FILE_BYTES}
    files: dict[str, bytes] = {}
    try:
        with open(path, "rb") as file:
            stream: Any = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == GZIP else file
            for member in itertools.islice(walk(stream, 0, MAX_FILE_BYTES), MAX_MEMBERS):
                name = member.name.rpartition("/")[2]
                if name in names and member.isreg():
                    stream.seek(member.offset_data)
                    files[name] = stream.read(member.size)
    except Exception as error:  # besides ValueError: EOFError, zlib.error, OSError
        problem = f"{path} is damaged ({first_line(error)}), or not in a format that is read"
        raise UserError(f"{problem} ({FORMATS}).") from error
    return files


def _decode_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decodes records of one label byte and 3,072 pixels (red, green, blue planes): (n, 3072) uint8, (n,) int64."""
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _decode_pickle(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a dictionary with `data` (n, 3072) uint8 and `labels`, a list: (n, 3072) uint8, (n,) int64."""
    batch = _unpickle(data)
    _, shape, dtype, is_fortran, pixels = batch["data"].state
    if _to_str(dtype.arguments[0]) != "u1":
        raise ValueError(f"an array of {_to_str(dtype.arguments[0])!r}, expected bytes")
    labels = batch["labels"]
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ValueError("its labels are not a list of integers")
    array = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if is_fortran else "C")
    return array, np.array(labels, np.int64)


class _Unbuilt:
    """Records how numpy would build an object; its own `__setstate__` is not safe for untrusted pickles."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


_GLOBALS: dict[str, Any] = {
    "numpy dtype": _Unbuilt,
    "numpy ndarray": _Unbuilt,
    "numpy.core.multiarray _reconstruct": _Unbuilt,
    "numpy._core.multiarray _reconstruct": _Unbuilt,
    "_codecs encode": lambda text, _: text.encode("latin-1"),  # how protocol 2 stores the bytes of Python 3
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _GLOBALS[f"{module} {name}"]


def _unpickle(data: bytes) -> dict[str, Any]:
    check_pickle(data, re.compile("|".join(map(re.escape, _GLOBALS))), MAX_FILE_BYTES)
    return {_to_str(key): value for key, value in dict(_Unpickler(io.BytesIO(data), encoding="bytes").load()).items()}


def _to_str(text: Any) -> str:
    """Decodes the strings of Python 2, which wrote the official files and whose strings are loaded as bytes."""
    if not isinstance(text, bytes | str):
        raise ValueError(f"{type(text).__name__}, expected a string")
    return text.decode("ascii") if isinstance(text, bytes) else text

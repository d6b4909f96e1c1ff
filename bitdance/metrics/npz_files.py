"""`.npz` files, which may be damaged or hostile: nothing is expanded before its size has been checked."""

from __future__ import annotations

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from bitdance.data.decoding import check_zip
from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError

MAX_ARRAYS = 1000
MAX_CLASSES = 1 << 20


class ArrayHeader(NamedTuple):
    """Shape and dtype of an array, whether it is in Fortran order, and the offset of its data in its member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    start: int


@contextlib.contextmanager
def open_npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """Opens an `.npz` file; any error of reading it becomes a `UserError`.

    Raises:
        UserError: the file cannot be read, expands to too many bytes, or is compressed in another way than NumPy's.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{path} is not a regular file: delete it, or name another one.")
        with zipfile.ZipFile(path) as archive:
            check_zip(archive)
            if len(archive.namelist()) > MAX_ARRAYS:
                raise UserError(f"{path} holds more than {MAX_ARRAYS} arrays: save only the images.")
            yield archive
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise any error of zipfile, zlib and NumPy
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"{path} cannot be read as an .npz file ({reason}): create or download it again.") from error


def read_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """Reads the header of the array `name`; whether the file holds all of its data is checked."""
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(f"{name}.npy") as file:
        shape, is_fortran, dtype = formats[np.lib.format.read_magic(file)](file)
        start = file.tell()
    if dtype.hasobject:
        raise UserError(f"{archive.filename}: {name}.npy holds Python objects: save numbers.")
    if archive.getinfo(f"{name}.npy").file_size != start + math.prod(shape) * dtype.itemsize:
        raise UserError(f"{archive.filename}: {name}.npy is truncated: create or download it again.")
    return ArrayHeader(shape, dtype, is_fortran and len(shape) > 1, start)


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """Reads the array `name`; returns None if the file has none of this name."""
    if f"{name}.npy" not in archive.namelist():
        return None
    read_header(archive, name)
    with archive.open(f"{name}.npy") as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an `.npz`, atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # (numpy's stubs take them for its flags)


def check_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Returns labels as int64.

    Raises:
        UserError: they are not `count` integers from 0 to `MAX_CLASSES` - 1.
    """
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{where} is {labels.dtype} of shape {labels.shape}: expected {count} integer labels.")
    for label in (labels.min(), labels.max()):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(f"{where} holds the label {label}: labels lie between 0 and {MAX_CLASSES - 1}.")
    return labels.astype(np.int64)

"""Images in an uncompressed tar: class folders, or one tar per class as in ILSVRC2012_img_train.tar.

The headers are read once, without the data between them. The offsets of the images are kept in an index, a safetensors
file beside the tar, or in the user's cache folder if the folder of the tar is read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import pathlib
import sys
import tarfile
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitdance.data.class_folders import find_images, is_hidden
from bitdance.data.decoding import MAX_FILE_BYTES, decode_image, is_image, reads_heif
from bitdance.data.image_dataset import NamedImages, evenly_spaced
from bitdance.runtime.atomic_files import lock_file
from bitdance.runtime.errors import UserError, one_line
from bitdance.runtime.progress import progress_bar
from bitdance.weights import safetensors_files

_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME_BYTES = 1 << 16
_MAX_READS = 12  # of a member's headers; GNU and pax write at most two before its own, with a name in each
_KIND = "index"

Index = dict[str, np.ndarray]
"""`names`: UTF-8 names of the images, separated by zero bytes; `offsets` and `sizes`: (N,) int64, in bytes."""


class TarImages(NamedImages):
    """Images in a tar. Each is read by one `pread`, so threads and processes share the file without a lock.

    Raises:
        UserError: the tar is damaged, or holds no images in class folders.
    """

    def __init__(self, path: pathlib.Path) -> None:
        index = _open_index(path)
        super().__init__(path, _split_names(index))
        self._offsets, self._sizes = index["offsets"], index["sizes"]
        self._open()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, index: int) -> Image.Image:
        where = f"{self._names[index]} in {self.path}"
        size, offset, data = int(self._sizes[index]), int(self._offsets[index]), b""
        try:
            while len(data) < size:  # some network file systems return less at a time
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    raise UserError(f"cannot read the image {where}: the file ends at byte {offset + len(data)}.")
                data += more
        except OSError as error:
            raise UserError(f"cannot read the image {where}: {error}; check the tar and its permissions.") from error
        return decode_image(data, where, self.upright)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class _Headers:
    """The bytes of a file before `stop`, as `tarfile` reads headers; without large reads, which hostile ones cause."""

    def __init__(self, stream: Any, stop: int) -> None:
        self._stream, self._stop, self.reads, self.last = stream, stop, 0, b""
        self.tell = stream.tell

    def seek(self, position: int) -> None:
        self._stream.seek(max(0, position))  # before Python 3.11 `tarfile` seeks -1 after a first block of zeros

    def read(self, size: int) -> bytes:
        self.reads += 1
        if not 0 <= size <= _MAX_NAME_BYTES or self.reads > _MAX_READS:
            raise ValueError(f"too long a name at byte {self.tell()}")
        self.last = self._stream.read(max(0, min(size, self._stop - self.tell())))
        return self.last


def walk(stream: Any, start: int, stop: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar. Their names have no "./"; those of folders end in "/", the root's is empty.

    Args:
        stream: a binary file, only ever read forward.
        start, stop: range of bytes of the tar in the file; `stop` may be an upper bound for a whole file.

    Raises:
        ValueError: the tar is damaged, truncated or sparse.
        Exception: of other types, from decompression.
    """
    headers: Any = _Headers(stream, stop)
    headers.seek(start)
    try:
        archive: Any = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="backslashreplace")
        while (member := archive.next()) is not None:
            if member.size < 0 or archive.offset > stop:
                raise ValueError(f"the member at byte {member.offset} reaches beyond the end")
            if member.issparse():
                raise ValueError(f"the member at byte {member.offset} is sparse: make the tar again without --sparse")
            if "\0" in member.name:
                raise ValueError(f"the name of the member at byte {member.offset} contains a null character")
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            member.name = "/".join([*parts, ""] if member.isdir() and parts else parts)
            yield member
            headers.reads = 0
            archive.members.clear()  # which would hold a million
    except tarfile.TarError as error:
        raise ValueError(f"a header is damaged: {error}") from error
    # `tarfile` ends at any block that is not a header.
    if any(headers.last):
        raise ValueError(f"a header is damaged, at byte {archive.offset}")
    # A block of zeros at the end tells a whole tar from one that was cut between two members. Some programs omit it in
    # a tar inside another one, which is whole if the outer one is.
    if len(headers.last) < _BLOCK and start == 0:
        raise ValueError(f"it ends at byte {archive.offset} without an end mark")


def first_names(path: pathlib.Path, count: int) -> list[str]:
    """Returns the names of the first `count` members of an uncompressed tar, or fewer if it is damaged after them."""
    names: list[str] = []
    with open(path, "rb", buffering=_BLOCK) as stream, contextlib.suppress(ValueError):
        for member in itertools.islice(walk(stream, 0, path.stat().st_size), count):
            names.append(member.name)
    return names


def _open_index(path: pathlib.Path) -> Index:
    """Reads the index of a tar, or makes it, in one process while others wait."""
    files = _index_files(path.resolve())
    for file in files:
        if index := _read_index(file, path):
            return index
    for file in files:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK | os.X_OK):
            continue
        lock = file.with_name(file.name + ".lock")
        with lock_file(lock, math.inf, f"another process is indexing {path}: waiting for it."):
            try:
                index = _read_index(file, path)  # another process may have made it in the meantime
                if index is None:
                    if file.exists():
                        _warn(f"the index {file} is damaged or does not match the tar: it is made again.")
                    index = _make_index(path)
                    _write_index(file, path, index)
                return index
            finally:
                lock.unlink(missing_ok=True)
    _warn(f"the index of {path} cannot be kept in a file: it is made again at every start.")
    return _make_index(path)


def _index_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns where the index may be: beside the tar, or in the user's cache folder if there is a home."""
    name = f"{path.name}.index.safetensors"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    others = [] if cache.startswith("~") else [pathlib.Path(cache, "bitdance", f"{key}-{name}")]
    return [path.with_name(name), *others]


def _warn(message: str) -> None:
    print(f"bitdance: {message}", file=sys.stderr)


def _make_index(path: pathlib.Path) -> Index:
    size = path.stat().st_size
    ranges: dict[str, tuple[int, int]] = {}  # if a name occurs twice, the last member counts, as in unpacking
    names: set[str] = set()
    bar = progress_bar(size, f"indexing {path.name}", "bytes")
    try:
        with bar, open(path, "rb", buffering=_BLOCK) as stream:
            for member in _walk_classes(stream, size):
                bar.update(member.offset - bar.n)
                name = member.name
                names.add(name)
                if not is_image(name) or is_hidden(name):
                    continue
                if not member.isreg():
                    raise ValueError(f"{name} is a link: make the tar with --dereference --hard-dereference")
                if member.size > MAX_FILE_BYTES:
                    raise ValueError(f"{name} has {member.size} bytes, more than any image")
                ranges[name] = member.offset_data, member.size
            bar.update(size - bar.n)
    except ValueError as error:
        raise UserError(f"{path} is a damaged, truncated or unsuitable tar ({error}); copy it again.") from error
    found = find_images(path, names)
    if found.notes:
        _warn(f"{path}: {one_line(found.notes)}")
    offsets, sizes = np.array([ranges[found.prefix + name] for name in found.names], dtype=np.int64).T.copy()
    joined = np.frombuffer(bytearray("\0".join(found.names), "utf-8"), np.uint8)
    return {"names": joined, "offsets": offsets, "sizes": sizes}


def _walk_classes(stream: Any, stop: int) -> Iterator[tarfile.TarInfo]:
    """Walks over a tar; a tar `<class>.tar` in it is walked over as a folder `<class>/`."""
    for member in walk(stream, 0, stop):
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() != ".tar" or not member.isreg() or is_hidden(member.name):
            yield member
            continue
        member.name = f"{stem}/"
        yield member
        try:
            for inner in walk(stream, member.offset_data, member.offset_data + member.size):
                inner.name = f"{stem}/{inner.name}"
                yield inner
        except ValueError as error:
            raise ValueError(f"in {stem}{suffix}: {error}") from error


def _version(path: pathlib.Path) -> dict[str, int]:
    status = path.stat()
    version = {"tar_bytes": status.st_size, "tar_mtime_ns": status.st_mtime_ns}
    return version | ({"heif": 1} if reads_heif() else {})  # without pillow-heif such images are left out


def _write_index(file: pathlib.Path, path: pathlib.Path, index: Index) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in index.items()}
    try:
        safetensors_files.save_tensors(file, tensors, _KIND, _version(path))
    except UserError as error:  # the index is made again at the next start
        _warn(f"warning: {error}")


def _read_index(file: pathlib.Path, path: pathlib.Path) -> Index | None:
    """Reads an index; returns None if it is missing, damaged or forged: 16 headers are compared with it."""
    if not file.is_file():
        return None
    try:
        contents = safetensors_files.read_safetensors(file, verify=True)
        index = {name: contents.states[_KIND][name].numpy().copy() for name in ("names", "offsets", "sizes")}
        offsets, sizes, count = index["offsets"], index["sizes"], len(_split_names(index))
        has_types = all(array.dtype == np.int64 and array.shape == (count,) for array in (offsets, sizes))
        if contents.config != _version(path) or not has_types or (sizes > MAX_FILE_BYTES).any():
            return None
        with open(path, "rb") as stream:
            for i in evenly_spaced(count, 16):
                stream.seek(int(offsets[i]) - _BLOCK)
                member = tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "replace")
                if not member.isreg() or member.size != sizes[i]:
                    return None
    except (ValueError, KeyError, TypeError, OSError, tarfile.TarError):
        return None
    return index


def _split_names(index: Index) -> list[str]:
    return index["names"].tobytes().decode().split("\0")

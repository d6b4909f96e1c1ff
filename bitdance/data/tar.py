"""Images in an uncompressed tar: class folders, or one tar per class as in ILSVRC2012_img_train.tar.

The headers are walked once, without reading the data between them. The offsets of the images are kept in an index, a
safetensors file beside the tar, or in the user's cache folder if the folder of the tar is read-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import os
import pathlib
import sys
import weakref
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from PIL import Image

from bitdance.data.decoding import MAX_FILE_BYTES, decode_image, is_image
from bitdance.data.image_dataset import NamedImages, evenly_spaced, is_hidden, sort_by_class
from bitdance.runtime.atomic_files import lock_file, make_folder
from bitdance.runtime.errors import UserError

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 16
_MAX_EXTENSIONS = 4  # extension headers before a member; GNU and pax write at most two
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
        return decode_image(data, where)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def first_names(path: pathlib.Path, count: int) -> list[str]:
    """Returns the names of the first `count` members of an uncompressed tar, or fewer if it is damaged after them."""
    names: list[str] = []
    with open(path, "rb", buffering=_BLOCK) as stream, contextlib.suppress(ValueError):
        for member in itertools.islice(walk(stream, 0, path.stat().st_size), count):
            names.append(member.name)
    return names


# ------------------------------------------------------------ headers


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of a tar.

    Attributes:
        name: without "./"; a folder's ends in "/", except for the root's, which is empty.
        kind: the type in its header, b"0" for files.
        offset, size: of its data, in bytes.
    """

    name: str
    kind: bytes
    offset: int
    size: int


def read_at(stream: IO[bytes] | io.BufferedIOBase, offset: int, size: int) -> bytes:
    """Reads the bytes [offset, offset + size).

    Raises:
        ValueError: the stream ends before that.
    """
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"it ends at byte {offset + len(data)}, in the middle of a header or a file")
    return data


def walk(stream: IO[bytes] | io.BufferedIOBase, start: int, stop: int) -> Iterator[Member]:
    """Walks over the members of a tar in the ustar, GNU or pax format, reading their headers only.

    Args:
        stream: the tar, only ever read forward, such as a file or the decompressed contents of one.
        start, stop: range of bytes of the tar in the stream; `stop` may be an upper bound for a whole stream.

    Raises:
        ValueError: the tar is damaged, truncated or sparse.
        Exception: of other types, from decompression.
    """
    position, extensions = start, 0
    long_name: bytes | None = None
    while position + _BLOCK <= stop:
        block = read_at(stream, position, _BLOCK)
        if not any(block):
            return
        kind, size = _parse_header(block)
        data, position = position + _BLOCK, position + _BLOCK
        if kind in b"1 2 3 4 5 6".split():  # links, devices and folders have no data, whatever size they give
            size = 0
        position += -(-size // _BLOCK) * _BLOCK
        if data + size > stop:
            raise ValueError(f"a member at byte {data} reaches beyond the end")
        if kind in b"L x K g".split():  # K is the target of a link; g holds for all members, and never names them
            extensions += 1
            if size > _MAX_NAME_BYTES or extensions > _MAX_EXTENSIONS:
                raise ValueError(f"too long a name at byte {data}")
            if kind in b"L x".split():
                found = read_at(stream, data, size)
                long_name = found.rstrip(b"\0") if kind == b"L" else _parse_pax_path(found) or long_name
            continue
        if kind == b"S":
            raise ValueError(f"a sparse member at byte {data}: make the tar again without --sparse")
        name = long_name or _parse_name(block)
        long_name, extensions = None, 0
        yield Member(_clean_name(name, kind == b"5" or name.endswith(b"/")), kind, data, size)
    # A block of zeros at the end tells a whole tar from one that was cut between two members. Some programs omit it in
    # a tar inside another one, which is whole if the outer one is.
    if start == 0 or position != stop:
        raise ValueError(f"it ends at byte {stop} without an end mark")


def _parse_header(block: bytes) -> tuple[bytes, int]:
    """Returns the type of a member and the number of bytes of its data."""
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _parse_number(block[148:156]):
        raise ValueError("a header is damaged")
    kind = block[156:157]
    return (b"0" if kind in (b"\0", b"7") else kind), _parse_number(block[124:136])


def _parse_number(field: bytes) -> int:
    """Parses octal digits, or GNU's big-endian bytes after 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise ValueError("a header is damaged")
    return int(digits or b"0", 8)


def _parse_name(block: bytes) -> bytes:
    name, prefix = (part.split(b"\0", 1)[0] for part in (block[:100], block[345:500]))
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _parse_pax_path(data: bytes) -> bytes | None:
    """Returns the `path` of a pax header, whose records are "<length> <key>=<value>\\n"."""
    path, start = None, 0
    while start < len(data):
        digits = data[start : start + 10].split(b" ", 1)[0]
        stop = start + int(digits) if digits.isdigit() else 0
        if not start + len(digits) < stop <= len(data):
            raise ValueError("a pax header is damaged")
        key, _, value = data[start + len(digits) + 1 : stop - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise ValueError("a sparse member: make the tar again without --sparse")
        path = value if key == b"path" else path
        start = stop
    return path


def _clean_name(name: bytes, is_folder: bool) -> str:
    parts = [part for part in name.decode("utf-8", "backslashreplace").split("/") if part not in ("", ".")]
    return "/".join([*parts, ""] if is_folder and parts else parts)


# ------------------------------------------------------------ the index


def _open_index(path: pathlib.Path) -> Index:
    """Reads the index of a tar, or makes it, in one process while others wait."""
    files = _index_files(path)
    for file in files:
        if index := _read_index(file, path):
            return index
    for file in filter(_is_writable, files):
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
    """Returns where the index may be: beside the tar, or in the user's cache folder."""
    path = path.resolve()
    name = f"{path.name}.index.safetensors"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()) / "bitdance"
    return [path.with_name(name), cache / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}-{name}"]


def _is_writable(file: pathlib.Path) -> bool:
    with contextlib.suppress(UserError):
        make_folder(file.parent)
    return os.access(file.parent, os.W_OK | os.X_OK)


def _warn(message: str) -> None:
    print(f"bitdance: {message}", file=sys.stderr)


def _make_index(path: pathlib.Path) -> Index:
    from tqdm import tqdm

    size = path.stat().st_size
    ranges: dict[str, tuple[int, int]] = {}  # if a name occurs twice, the last member counts, as in unpacking
    names: set[str] = set()
    bar = tqdm(total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, dynamic_ncols=True, delay=2)
    try:
        with bar, open(path, "rb", buffering=_BLOCK) as stream:
            for member in _walk_classes(stream, size):
                bar.update(member.offset - bar.n)
                name = member.name
                names.add(name)
                if not is_image(name) or is_hidden(name):
                    continue
                if member.kind != b"0":
                    raise ValueError(f"{name} is a link: make the tar with --dereference --hard-dereference")
                if member.size > MAX_FILE_BYTES:
                    raise ValueError(f"{name} has {member.size} bytes, more than any image")
                ranges[name] = member.offset, member.size
            bar.update(size - bar.n)
    except ValueError as error:
        raise UserError(f"{path} is a damaged, truncated or unsuitable tar ({error}); copy it again.") from error
    prefix, inside = sort_by_class(path, names, is_archive=True)
    offsets, sizes = np.array([ranges[prefix + name] for name in inside], dtype=np.int64).T.copy()
    return {"names": np.frombuffer(bytearray("\0".join(inside), "utf-8"), np.uint8), "offsets": offsets, "sizes": sizes}


def _walk_classes(stream: IO[bytes] | io.BufferedIOBase, size: int) -> Iterator[Member]:
    """Walks over a tar; the members of a tar `<class>.tar` in it are given as if they were in a folder `<class>/`."""
    for member in walk(stream, 0, size):
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() != ".tar" or member.kind != b"0" or is_hidden(member.name):
            yield member
            continue
        yield Member(f"{stem}/", b"5", member.offset, 0)
        try:
            for inner in walk(stream, member.offset, member.offset + member.size):
                yield dataclasses.replace(inner, name=f"{stem}/{inner.name}")
        except ValueError as error:
            raise ValueError(f"in {member.name}: {error}") from error


def _version(path: pathlib.Path) -> dict[str, int]:
    status = path.stat()
    return {"tar_bytes": status.st_size, "tar_mtime_ns": status.st_mtime_ns}


def _write_index(file: pathlib.Path, path: pathlib.Path, index: Index) -> None:
    import torch

    from bitdance.weights import safetensors_files

    tensors = {name: torch.from_numpy(array) for name, array in index.items()}
    try:
        safetensors_files.save_tensors(file, tensors, _KIND, _version(path))
    except UserError as error:  # the index is made again at the next start
        _warn(f"warning: {error}")


def _read_index(file: pathlib.Path, path: pathlib.Path) -> Index | None:
    """Reads an index, which may be damaged or forged; returns None if it cannot be used."""
    if not file.is_file():
        return None
    from bitdance.weights import weights_file

    try:
        contents = weights_file.read(file)
        index = {name: contents.states[_KIND][name].numpy().copy() for name in ("names", "offsets", "sizes")}
        return index if contents.config == _version(path) and _fits(index, path) else None
    except (ValueError, KeyError, TypeError):
        return None


def _fits(index: Index, path: pathlib.Path) -> bool:
    """Whether all images are inside the tar, and the headers of 16 of them agree with the index.

    Raises:
        ValueError: a header or a name is damaged.
    """
    names, offsets, sizes = _split_names(index), index["offsets"], index["sizes"]
    if not all(array.dtype == np.int64 and array.shape == (len(names),) for array in (offsets, sizes)):
        return False
    inside = (offsets >= _BLOCK) & (sizes >= 0) & (sizes <= MAX_FILE_BYTES) & (offsets <= path.stat().st_size - sizes)
    if not inside.all() or not all("/" in name for name in names):
        return False
    with open(path, "rb", buffering=_BLOCK) as stream:
        headers = ((read_at(stream, int(offsets[i]) - _BLOCK, _BLOCK), sizes[i]) for i in evenly_spaced(len(names), 16))
        return all(_parse_header(block) == (b"0", size) for block, size in headers)


def _split_names(index: Index) -> list[str]:
    return index["names"].tobytes().decode().split("\0")

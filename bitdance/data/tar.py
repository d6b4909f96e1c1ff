"""Images read in place from a tar: class folders in it, or one tar a class in it, as in ILSVRC2012_img_train.tar.

Where each image lies is found once, by walking from header to header without reading what is between, and kept in an
index: a safetensors file beside the tar, or in the user's cache folder where that place cannot be written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pathlib
import sys
import weakref
from collections.abc import Iterator

import numpy as np
from PIL import Image

from bitdance.data.image_dataset import (
    MAX_FILE_BYTES,
    NamedImages,
    by_class_in_archive,
    decode_image,
    is_hidden,
    is_image,
)
from bitdance.runtime.atomic_files import atomic_write, lock_file, make_folder
from bitdance.runtime.errors import UserError

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 16
_CHECKED = 16  # images whose headers are compared with the index when it is opened
_FORMAT = "bitdance tar index 1"


class TarImages(NamedImages):
    """Images in a tar, each read by one `pread` at its place, so threads and processes share nothing but the file."""

    def __init__(self, path: pathlib.Path) -> None:
        index = _open_index(path)
        super().__init__(path, index.names)
        self._offsets, self._sizes = index.offsets, index.sizes
        self._file = _File(path)

    def read(self, index: int) -> Image.Image:
        where = f"{self._names[index]} in {self.path}"
        try:
            data = self._file.read(int(self._offsets[index]), int(self._sizes[index]))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {where}: {error}; check the tar and its permissions.") from error
        return decode_image(data, where)


def first_names(path: pathlib.Path, count: int) -> list[str]:
    """The names of the first members of an uncompressed tar, at most `count` of them; none of any other file."""
    names: list[str] = []
    try:
        for member in _members(_File(path), 0, path.stat().st_size):
            names.append(member.name)
            if len(names) == count:
                break
    except ValueError:  # what there is before the damage shows the format
        pass
    return names


# ------------------------------------------------------------ the file and its headers


class _File:
    """A file that is read at given places, by any number of threads and forked processes at once."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly the bytes [offset, offset + size).

        Raises:
            ValueError: the file ends before that.
        """
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # the system may give less at a time, as it does above 2 GB or on some networks
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"it ends at byte {offset + len(data)}, in the middle of something")
            data += more
        return data

    def __reduce__(self) -> tuple[type[_File], tuple[pathlib.Path]]:
        return _File, (self._path,)


@dataclasses.dataclass(frozen=True)
class _Member:
    """A member of a tar: `kind` is the type in its header, `offset` and `size` say where its data lie in the file."""

    name: str
    kind: bytes
    offset: int
    size: int


def _members(file: _File, start: int, stop: int) -> Iterator[_Member]:
    """Walks the headers of the tar that fills the bytes [start, stop) of a file: ustar, GNU or pax.

    Raises:
        ValueError: it is damaged or truncated, or sparse.
    """
    position = start
    long_name: bytes | None = None
    while position + _BLOCK <= stop:
        block = file.read(position, _BLOCK)
        if not any(block):
            return
        kind, size = _header(block)
        data, position = position + _BLOCK, position + _BLOCK
        if kind in b"1 2 3 4 5 6".split():  # links, devices and folders have no data, whatever size they give
            size = 0
        position += -(-size // _BLOCK) * _BLOCK
        if data + size > stop:
            raise ValueError(f"a member at byte {data} reaches beyond the end")
        if kind in (b"L", b"x"):
            if size > _MAX_NAME_BYTES:
                raise ValueError(f"a name of {size} bytes at byte {data}")
            found = file.read(data, size)
            long_name = found.rstrip(b"\0") if kind == b"L" else _pax_path(found) or long_name
            continue
        if kind in (b"K", b"g"):  # the target of a link; what holds for all members, which is never their names
            continue
        if kind == b"S":
            raise ValueError(f"a sparse member at byte {data}: make the tar again without --sparse")
        name = long_name or _short_name(block)
        long_name = None
        yield _Member(_clean(name, kind == b"5" or name.endswith(b"/")), kind, data, size)
    # The end mark, a block of zeros, tells a whole tar from one cut between two members. A tar inside another is
    # whole where the outer one is, and some programs leave the mark out there.
    if start == 0 or position != stop:
        raise ValueError(f"it ends at byte {stop} without the mark of its end")


def _header(block: bytes) -> tuple[bytes, int]:
    """The type of a member and the bytes of its data, from its header."""
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
        raise ValueError("a header is damaged")
    kind = block[156:157]
    return (b"0" if kind in (b"\0", b"7") else kind), _number(block[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's big-endian bytes behind 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise ValueError("a header is damaged")
    return int(digits or b"0", 8)


def _short_name(block: bytes) -> bytes:
    name, prefix = (part.split(b"\0", 1)[0] for part in (block[:100], block[345:500]))
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax_path(data: bytes) -> bytes | None:
    """The `path` of a pax header, whose records are "<length> <key>=<value>\\n"."""
    path = None
    while data:
        digits = data.split(b" ", 1)[0]
        if not digits.isdigit() or not len(digits) < int(digits[:9]) <= len(data):
            raise ValueError("a pax header is damaged")
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise ValueError("a sparse member: make the tar again without --sparse")
        path = value if key == b"path" else path
        data = data[int(digits) :]
    return path


def _clean(name: bytes, is_folder: bool) -> str:
    """The name without "./"; a folder's ends in "/", but for the root's, which is empty."""
    parts = [part for part in name.decode("utf-8", "backslashreplace").split("/") if part not in ("", ".")]
    return "/".join([*parts, ""] if is_folder and parts else parts)


# ------------------------------------------------------------ the index


@dataclasses.dataclass(frozen=True)
class _Index:
    """Where the images of a tar lie, in the order of a set.

    Attributes:
        names: as `by_class` returns them.
        offsets, sizes: (N,) int64, in bytes.
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def _open_index(path: pathlib.Path) -> _Index:
    """Reads the index of a tar, or makes it, in one process while others wait.

    Raises:
        UserError: the tar is damaged, or holds no images in class folders.
    """
    places = _places(path)
    for place in places:
        if os.path.isfile(place) and not isinstance(found := _read_index(place, path), str):
            return found
    for place in places:
        if not _can_write(place.parent):
            continue
        lock = place.with_name(place.name + ".lock")
        with lock_file(lock, math.inf, f"another process is indexing {path}: waiting for it."):
            try:
                if os.path.isfile(place):
                    found = _read_index(place, path)
                    if not isinstance(found, str):  # the process that was here before made it
                        return found
                    _say(f"the index {place} {found}: it is made again.")
                index = _make_index(path)
                _write_index(place, path, index)
                return index
            finally:
                lock.unlink(missing_ok=True)
    _say(f"there is no place to keep the index of {path}: it is made at every start.")
    return _make_index(path)


def _places(path: pathlib.Path) -> list[pathlib.Path]:
    """Where the index may lie: beside the tar, or in the user's cache folder."""
    path = path.resolve()
    name = f"{path.name}.index.safetensors"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()) / "bitdance"
    return [path.with_name(name), cache / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}-{name}"]


def _can_write(folder: pathlib.Path) -> bool:
    try:
        make_folder(folder)
    except UserError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _say(sentence: str) -> None:
    print(f"bitdance: {sentence}", file=sys.stderr)


def _make_index(path: pathlib.Path) -> _Index:
    from tqdm import tqdm

    file, size = _File(path), path.stat().st_size
    places: dict[str, tuple[int, int]] = {}  # of a name that comes twice the last one counts, as in unpacking
    names: set[str] = set()
    bar = tqdm(total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, dynamic_ncols=True, delay=2)
    try:
        with bar:
            for member in _all_members(file, size):
                bar.update(member.offset - bar.n)
                name = member.name
                names.add(name)
                if not is_image(name) or is_hidden(name):
                    continue
                if member.kind != b"0":
                    raise ValueError(f"{name} is a link: make the tar with --dereference --hard-dereference")
                if member.size > MAX_FILE_BYTES:
                    raise ValueError(f"{name} has {member.size} bytes, more than any image")
                places[name] = member.offset, member.size
            bar.update(size - bar.n)
    except ValueError as error:
        raise UserError(
            f"{path} is a damaged, truncated or unsuitable tar ({error}); copy or download it again."
        ) from error
    prefix, inside = by_class_in_archive(path, names)
    offsets, sizes = np.array([places[prefix + name] for name in inside], dtype=np.int64).T
    return _Index(inside, np.ascontiguousarray(offsets), np.ascontiguousarray(sizes))


def _all_members(file: _File, size: int) -> Iterator[_Member]:
    """The members of a tar; those of a tar `<class>.tar` in it as if they were in a folder `<class>/`."""
    for member in _members(file, 0, size):
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() != ".tar" or member.kind != b"0" or is_hidden(member.name):
            yield member
            continue
        yield _Member(f"{stem}/", b"5", member.offset, 0)
        try:
            for inner in _members(file, member.offset, member.offset + member.size):
                yield dataclasses.replace(inner, name=f"{stem}/{inner.name}")
        except ValueError as error:
            raise ValueError(f"in {member.name}: {error}") from error


def _write_index(place: pathlib.Path, path: pathlib.Path, index: _Index) -> None:
    from safetensors.numpy import save_file

    status = path.stat()
    arrays = {
        "names": np.frombuffer("\0".join(index.names).encode(), np.uint8),
        "offsets": index.offsets,
        "sizes": index.sizes,
    }
    metadata = {"format": _FORMAT, "tar_bytes": str(status.st_size), "tar_mtime_ns": str(status.st_mtime_ns)}
    try:
        with atomic_write(place) as temporary:
            save_file(arrays, temporary, {**metadata, "digest": _digest(arrays)})
    except UserError as error:  # all that is lost is time at the next start
        _say(f"warning: {error}")


def _read_index(place: pathlib.Path, path: pathlib.Path) -> _Index | str:
    """Reads an index, or says what is wrong with it, which may be anything: it can come from anywhere."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                return "is of another version"
            arrays = {name: file.get_tensor(name) for name in ("names", "offsets", "sizes")}
        if metadata.get("digest") != _digest(arrays):
            return "is damaged"
        names = arrays["names"].tobytes().decode().split("\0")
        index = _Index(names, arrays["offsets"], arrays["sizes"])
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        return f"cannot be read ({str(error).splitlines()[0][:100]})"
    status = path.stat()
    if (metadata.get("tar_bytes"), metadata.get("tar_mtime_ns")) != (str(status.st_size), str(status.st_mtime_ns)):
        return "is older than the tar, or of another one"
    return index if _fits(index, path, status.st_size) else "does not fit the tar"


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("names", "offsets", "sizes"):
        digest.update(f"{arrays[name].dtype.str} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _fits(index: _Index, path: pathlib.Path, size: int) -> bool:
    """Whether all images lie inside the tar, and some of them behind headers that agree."""
    count = len(index.names)
    for array in (index.offsets, index.sizes):
        if array.dtype != np.int64 or array.shape != (count,):
            return False
    if not all("/" in name for name in index.names):
        return False
    if index.offsets.min() < _BLOCK or not 0 <= index.sizes.min() <= index.sizes.max() <= MAX_FILE_BYTES:
        return False
    if (index.offsets > size - index.sizes).any():
        return False
    file = _File(path)
    for i in np.linspace(0, count - 1, min(count, _CHECKED)).round().astype(int):
        try:
            if _header(file.read(int(index.offsets[i]) - _BLOCK, _BLOCK)) != (b"0", index.sizes[i]):
                return False
        except ValueError:
            return False
    return True

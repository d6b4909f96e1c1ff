"""Image files in class folders, on disk or in a zip."""

from __future__ import annotations

import os
import pathlib
import threading
import zipfile
from typing import Any

from PIL import Image

from bitdance.data.decoding import MAX_FILE_BYTES, check_zip, decode_image, read_image, reason
from bitdance.data.image_dataset import NamedImages, is_hidden, sort_by_class
from bitdance.runtime.errors import UserError


class FolderImages(NamedImages):
    """Images in a folder of class folders, which may have subfolders; links to a folder above are not followed.

    Raises:
        UserError: as `sort_by_class`.
        OSError: a folder cannot be listed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        members: list[str] = []
        for folder, below, names in os.walk(path, onerror=_raise, followlinks=True):
            below[:] = [name for name in below if not is_hidden(name) and not _is_loop(folder, name)]
            relative = pathlib.Path(folder).relative_to(path)
            members += [(relative / name).as_posix() for name in names]
            members += [f"{(relative / name).as_posix()}/" for name in below]
        super().__init__(path, sort_by_class(path, members)[1])

    def read(self, index: int) -> Image.Image:
        return read_image(self.path / self._names[index])


def _is_loop(folder: str, name: str) -> bool:
    """Returns whether a link in a folder leads to this folder or one above it."""
    target = os.path.join(folder, name)
    return os.path.islink(target) and pathlib.Path(folder).resolve().is_relative_to(os.path.realpath(target))


def _raise(error: OSError) -> None:
    raise error


class ZipImages(NamedImages):
    """Images in a zip of class folders.

    Raises:
        UserError: the zip is damaged, or as `sort_by_class`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        try:
            archive = self._open()[0]
            check_zip(archive)
            members = archive.namelist()
        except UserError:
            raise
        except Exception as error:  # besides BadZipFile: struct.error, UnicodeDecodeError, NotImplementedError ...
            raise UserError(f"{path} is a damaged or truncated zip ({error}); copy or download it again.") from error
        self._prefix, names = sort_by_class(path, members, is_archive=True)
        super().__init__(path, names)

    def read(self, index: int) -> Image.Image:
        member = self._prefix + self._names[index]
        where = f"{member} in {self.path}"
        try:
            archive, lock = self._open()
            with lock, archive.open(member) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # for each kind of damage, for encryption and for a missing file there is another
            raise UserError(f"cannot read the image {where}: {reason(error)}; make the zip again.") from error
        return decode_image(data, where)

    def _open(self) -> tuple[zipfile.ZipFile, threading.Lock]:
        """Returns the archive and the lock for reading it, which are opened once per process.

        A forked child must not share the file position of its parent, nor inherit a lock that another thread of the
        parent holds. If two threads open the archive at the same time, each uses its own pair.
        """
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = (os.getpid(), zipfile.ZipFile(self.path), threading.Lock())
        return opened[1], opened[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

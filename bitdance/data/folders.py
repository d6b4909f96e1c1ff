"""Image files in class folders, on disk or in a zip."""

from __future__ import annotations

import collections
import os
import pathlib
import threading
import zipfile
from typing import Any

from PIL import Image

from bitdance.data.class_folders import MAX_DEPTH, find_images, is_hidden
from bitdance.data.decoding import MAX_FILE_BYTES, check_zip, decode_image, read_image
from bitdance.data.image_dataset import NamedImages
from bitdance.runtime.errors import UserError, first_line, printable

MAX_LINKS = 100
"""Times that links may lead to a folder: a few links to one another make millions of paths."""


class FolderImages(NamedImages):
    """Images in a folder of class folders, see `find_images`; links to a folder above are not followed.

    Raises:
        UserError: as `find_images`; folders are too deep, or too many links lead to one.
        OSError: a folder cannot be listed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        members: list[str] = []
        links: collections.Counter[str] = collections.Counter()
        for folder, below, names in os.walk(path, onerror=_raise, followlinks=True):
            below[:] = [name for name in below if not is_hidden(name) and not _is_loop(path, folder, name)]
            relative = pathlib.Path(folder).relative_to(path)
            if len(relative.parts) > MAX_DEPTH:
                raise UserError(f"{path} is more than {MAX_DEPTH} folders deep: move the images up, or remove folders.")
            for link in filter(os.path.islink, (os.path.join(folder, name) for name in below)):
                links[target := os.path.realpath(link)] += 1
                if links[target] > MAX_LINKS:
                    what = f"links in {path} lead to one folder more than {MAX_LINKS} times"
                    raise UserError(f"{what}, as in {printable(str(relative))}: remove some.")
            members += [(relative / name).as_posix() for name in names]
            members += [f"{(relative / name).as_posix()}/" for name in below]
        found = find_images(path, members)
        super().__init__(path / found.prefix, found.names)
        self.notes = found.notes
        self.held_out = path / found.held_out if found.held_out else None

    @property
    def files(self) -> list[pathlib.Path]:
        return [self.path / name for name in self._names]  # also those that links lead to

    def read(self, index: int) -> Image.Image:
        return read_image(self.path / self._names[index], self.upright)


def _is_loop(path: pathlib.Path, folder: str, name: str) -> bool:
    """Returns whether a link in a folder leads to this folder or one above it, also one that a link led to."""
    link = pathlib.Path(folder, name)
    if not link.is_symlink():
        return False
    target = os.path.realpath(link)
    above = [parent for parent in link.parents if parent.is_relative_to(path)]
    return any(pathlib.Path(os.path.realpath(parent)).is_relative_to(target) for parent in above)


def _raise(error: OSError) -> None:
    raise error


class ZipImages(NamedImages):
    """Images in a zip of class folders.

    Raises:
        UserError: the zip is damaged, or as `find_images`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile, threading.Lock] | None = None
        try:
            archive = self._open()[0]
            check_zip(archive)
            members = archive.namelist()
            if all("/" not in name for name in members) and any("\\" in name for name in members):  # of old Windows
                raise UserError(f"{path} separates folders by \\ and not by /: make it again with another program.")
        except UserError:
            raise
        except Exception as error:  # besides BadZipFile: struct.error, UnicodeDecodeError, NotImplementedError ...
            raise UserError(f"{path} is a damaged or truncated zip ({error}); copy or download it again.") from error
        found = find_images(path, members)
        super().__init__(path, found.names)
        self._prefix, self.notes = found.prefix, found.notes

    def read(self, index: int) -> Image.Image:
        member = self._prefix + self._names[index]
        where = f"{member} in {self.path}"
        try:
            archive, lock = self._open()
            with lock, archive.open(member) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # for each kind of damage, for encryption and for a missing file there is another
            raise UserError(f"cannot read the image {where}: {first_line(error)}; make the zip again.") from error
        return decode_image(data, where, self.upright)

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

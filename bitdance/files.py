"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator

from bitdance.errors import UserError

# What the process may not give to others in files that it makes; it can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; what was written there is synced and renamed to `path` on success.

    On any error the temporary file is removed and `path` stays as it was. Missing parent folders are made.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    make_folder(path.parent)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make their files private
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary), str(path.parent)):
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; free some space or choose another place.") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # an error on the way here says more
            temporary.unlink(missing_ok=True)


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another place.") from error


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a rename in `folder` durable, where the system allows a folder to be opened at all."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

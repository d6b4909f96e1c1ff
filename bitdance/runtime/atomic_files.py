"""Atomic and durable writing of files, JSON settings, digests and file locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from bitdance.runtime.errors import UserError

# The umask of the process; it can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)

MAX_JSON = 2**26
"""Largest size of a file of JSON that is read, in bytes: labels of several million images."""

NEW = ".bitdance-new-"
"""Beginning of the name of a folder of `new_files`."""

_ADVICE = {errno.EROFS: "choose another place", errno.EISDIR: "delete it"}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, which is synced and renamed to `path` when the context ends.

    On an error the temporary file is removed and `path` is unchanged. Missing parent folders are created.

    Raises:
        UserError: `path` is a device, pipe or socket, the folder cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):  # renaming would replace /dev/null
        raise UserError(f"cannot write {path}: it is a device, pipe or socket; choose another place.")
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    make_folder(path.parent)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make their files private
        rename(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), str(path.parent)):
            advice = _ADVICE.get(error.errno or 0, "free some space or choose another place")
            raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}.") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # an error on the way here says more
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes temporary files in `folder` that killed processes have left: of `atomic_write` and of safetensors."""
    for path in folder.glob(".*tmp*"):
        if re.fullmatch(r"\..+\.\d+\.[0-9a-f]{8}\.tmp|\.tmp\w{6}", path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a hidden folder inside `folder` for files that are renamed into it when all of them are written.

    It is removed when the context ends, and those that killed processes have left at its beginning.
    """
    for left in folder.glob(f"{NEW}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=NEW) as name:
        yield pathlib.Path(name)


def make_folder(path: pathlib.Path) -> None:
    """Creates a folder and its parents if they do not exist.

    Raises:
        UserError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise UserError(f"cannot make the folder {path}: {reason}; choose another place.") from error


def rename(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or folder, replacing an existing file, and syncs the parent folder."""
    os.replace(source, target)
    if os.name == "posix":  # Windows cannot open a folder
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes a dictionary as readable JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1, default=str) + "\n")


def load_json(path: pathlib.Path) -> Any:
    """Parses a regular file of JSON, of at most `MAX_JSON` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else, too large, no JSON, or nested too deeply.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and /dev/zero has no end
        raise ValueError("it is not a regular file")
    if status.st_size > MAX_JSON:
        raise ValueError(f"it has {status.st_size} bytes")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: pathlib.Path, advice: str) -> dict[str, Any]:
    """Reads a dictionary from JSON.

    Args:
        path: the file.
        advice: what the user can do if it cannot be read; the end of the error's sentence.

    Raises:
        UserError: the file cannot be read, or holds no dictionary or an empty one.
    """
    try:
        found = load_json(path)
        if not isinstance(found, dict) or not found:
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): {advice}.") from None
    return found


@contextlib.contextmanager
def lock_file(path: pathlib.Path, timeout: float, message: str) -> Iterator[None]:
    """Locks a file against other processes, where the system and the file system have locks.

    Args:
        path: the file; created if it does not exist.
        timeout: seconds to wait for another process, `math.inf` for no limit.
        message: of the error at the end of the timeout; with an infinite one, printed once on stderr while waiting.

    Raises:
        UserError: the file cannot be written, or another process holds the lock.
    """
    deadline, is_printed = time.monotonic() + timeout, timeout < math.inf
    while (file := _open_locked(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(message)
        if not is_printed:
            print(f"bitdance: {message}", file=sys.stderr)
            is_printed = True
        time.sleep(0.1)
    with file:
        yield


def is_locked(path: pathlib.Path) -> bool:
    """Returns whether another process has locked a file with `lock_file`, or may have, if it cannot be opened."""
    try:
        with open(path, "rb+") as file:
            _lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _open_locked(path: pathlib.Path) -> BinaryIO | None:
    """Returns None if another process holds the lock."""
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "choose another folder")
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}.") from error
    # If the other process has renamed or removed the file meanwhile, a lock on it has no effect.
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        _lock(file)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()
    return None


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows and some network file systems have no locks
        pass

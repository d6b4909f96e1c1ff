"""Run folders: work that can be interrupted and resumed, shared by sampling, training and encoding.

A run folder has an exclusive lock, a file of settings that is compared when the work is resumed, and parts of the
result. The settings are sections, each of them a dataclass. ``metadata={"resume": ...}`` of a field says whether its
value may differ on resume:

- (none): it must be equal;
- ``"free"``: it may differ, the new value is used;
- ``"stored"``: the stored value is used, for settings on which the last bit depends, such as the number of threads;
- ``"extend"``: it may be larger once the work is finished.

``metadata={"difference": "it had {old} images, there are {new}"}`` says in other words how the value differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from bitdance.runtime.atomic_files import (
    is_locked,
    load_json,
    lock_file,
    make_folder,
    read_json,
    remove_leftovers,
    write_json,
)
from bitdance.runtime.errors import UserError, printable

if TYPE_CHECKING:
    from bitdance.runtime.process_group import World

SETTINGS = "settings.json"
FORMAT_VERSION = 2
LOCK_TIMEOUT = 5.0
"""Seconds to wait for another process to release the lock."""
MAX_DIFFERENCES = 10
"""Settings that differ in an error message."""

FREE: dict[str, str] = {"resume": "free"}
STORED: dict[str, str] = {"resume": "stored"}
EXTEND: dict[str, str] = {"resume": "extend"}

Sections = Mapping[str, Any]
"""Dataclass instances by section name."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What else changes the last bit of a result.

    Attributes:
        device: type of the device.
        threads: CPU threads of a process.
    """

    device: str
    threads: int = dataclasses.field(metadata=STORED)

    @classmethod
    def of(cls, world: World) -> Machine:
        """Returns that of this process."""
        import torch

        return cls(world.device.type, torch.get_num_threads())

    @staticmethod
    def apply(stored: Mapping[str, Any], world: World) -> None:
        """Computes with the stored number of threads, on a CPU.

        Raises:
            UserError: it is not a number of threads.
        """
        import torch

        from bitdance.runtime.devices import MAX_THREADS

        threads = stored["threads"]
        if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads={threads!r} in the settings is invalid: delete the folder to start over.")
        if world.device.type == "cpu":
            torch.set_num_threads(threads)


class ResumedSettings(NamedTuple):
    """Result of `check_settings`: the settings in force, by section and field, and the allowed changes in words."""

    settings: dict[str, dict[str, Any]]
    changes: list[str]


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, world: World) -> Iterator[None]:
    """Locks a run folder until the context or the first process ends, and removes temporary files of killed processes.

    The lock is a file beside the folder: some network file systems cannot remove a folder with an open file in it. A
    KeyboardInterrupt gets the advice to resume as its argument, which the command line prints.

    Raises:
        UserError: another process works in the folder, or it cannot be written.
    """
    folder = _resolve(folder)
    make_folder(folder.parent)
    if not world.is_main:
        yield
        return
    lock = _lock_of(folder)
    with lock_file(lock, LOCK_TIMEOUT, f"another process works in {folder}: wait for it to finish, or stop it first."):
        try:
            remove_leftovers(folder)
            yield
        except KeyboardInterrupt as interrupt:
            interrupt.args = ("run the same command again to resume",)
            raise
        finally:
            lock.unlink(missing_ok=True)


def _resolve(folder: pathlib.Path) -> pathlib.Path:
    try:
        return folder.resolve()
    except RuntimeError:  # before Python 3.13
        raise UserError(f"{folder} is a link to itself: delete it, or choose another folder.") from None


def existing_parent(folder: pathlib.Path) -> pathlib.Path:
    """Returns a folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *_resolve(folder).parents) if path.exists())


def check_writable(folder: pathlib.Path) -> None:
    """Raises a `UserError` if a folder cannot be made or written, before work that would be lost."""
    parent = existing_parent(folder)
    problem = None if os.access(parent, os.W_OK) else f"{parent} cannot be written"
    if not parent.is_dir():
        problem = "it is a file" if parent == folder else f"{parent} is a file"
    if problem:
        action = "write to" if folder.is_dir() else "make"
        raise UserError(f"cannot {action} the folder {folder}: {problem}; choose another place.")


def check_apart(folder: pathlib.Path, *data: pathlib.Path | None) -> None:
    """Raises a `UserError` if a folder to write is one of data, or in it, where its pictures would become images."""
    inside = _resolve(folder)
    for path in filter(None, data):
        if _resolve(path) in (inside, *inside.parents):
            raise UserError(f"the folder {folder} is, or is in, the folder of the data {path}: choose another place.")


def is_active(folder: pathlib.Path) -> bool:
    """Returns whether a process holds the lock of a run folder; where the file system has no locks, False."""
    return is_locked(_lock_of(folder))


def _lock_of(folder: pathlib.Path) -> pathlib.Path:
    folder = folder.resolve()
    return folder.with_name(folder.name + ".lock")


def _to_json(value: Any) -> Any:
    """Converts a value to what JSON would return for it."""
    return json.loads(json.dumps(value, default=str))


def check_settings(
    folder: pathlib.Path,
    sections: Sections,
    world: World,
    has_parts: bool,
    is_finished: Callable[[Mapping[str, Any]], bool] = lambda stored: False,
) -> ResumedSettings:
    """Writes the settings of new work, or compares them with those the folder was begun with; called by all processes.

    Args:
        folder: the run folder; made if it does not exist.
        sections: the settings.
        world: the processes; the first one reads and writes.
        has_parts: whether there are parts, made with the stored settings; without them the settings may change.
        is_finished: tells from the stored settings whether the work is finished, so that it may be extended.

    Raises:
        UserError: the folder belongs to work with other settings, or cannot be read or written.
    """
    result: ResumedSettings | str = ""
    if world.is_main:
        try:
            if not has_parts:
                _refuse_others(folder, sections)
            stored = read_settings(folder, sections, is_finished) if has_parts else {}
            result = _update(folder, sections, stored)
        except UserError as error:
            result = str(error)
    result = world.broadcast(result)
    if isinstance(result, str):
        raise UserError(result)
    return result


def _update(folder: pathlib.Path, sections: Sections, stored: Mapping[str, Any]) -> ResumedSettings:
    ours: dict[str, dict[str, Any]] = {name: {} for name in sections}
    changes: list[str] = []
    for name, field, old, new in _fields(stored, sections):
        rule = field.metadata.get("resume") if stored else None
        ours[name][field.name] = old if rule == "stored" else new
        if rule == "extend" and old != new:
            changes.append(f"{field.name} extended from {old} to {new}")
    written = {"format_version": FORMAT_VERSION, **ours}
    if written != stored:
        write_json(folder / SETTINGS, written)
    return ResumedSettings(ours, changes)


def read_settings(
    folder: pathlib.Path, sections: Sections, is_finished: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Returns the stored settings after comparing them; arguments as of `check_settings`.

    Raises:
        UserError: the folder belongs to work with other settings, or its settings cannot be read.
    """
    stored = read_json(folder / SETTINGS, f"restore it, or delete {folder} to start over")
    check_kind(folder, stored, sections)
    if differences := format_differences(compare(stored, sections, extensible=is_finished(stored))):
        reason = f"{folder} belongs to a run with other settings ({differences})"
        raise UserError(f"{reason}: use those settings, or another folder.")
    return stored


def check_kind(folder: pathlib.Path, stored: Mapping[str, Any], sections: Iterable[str]) -> None:
    """Raises a `UserError` unless stored settings have these sections."""
    if not all(isinstance(stored.get(name), dict) for name in sections):
        raise UserError(f"{folder} belongs to another kind of run: use another folder, or delete it to start over.")


def _refuse_others(folder: pathlib.Path, sections: Iterable[str]) -> None:
    """Raises a `UserError` if the folder has settings of another kind of run; damaged ones are replaced."""
    try:
        stored = load_json(folder / SETTINGS)
    except (OSError, ValueError):
        return
    if isinstance(stored, dict) and stored:
        check_kind(folder, stored, sections)


def format_differences(differences: list[str]) -> str:
    """Joins the first differences that `compare` returned, and the number of the others."""
    differences = list(dict.fromkeys(differences))  # sections may share a field
    if (others := len(differences) - MAX_DIFFERENCES) > 0:
        differences[MAX_DIFFERENCES:] = [f"and {others} more"]
    return "; ".join(differences)


def compare(stored: Mapping[str, Any], sections: Sections, extensible: bool = False) -> list[str]:
    """Returns the differences that are not allowed, in words, such as "`num_steps` was 50, is 100".

    A field that `stored` does not have, since it was added later, has its default value. Sections may have fields of
    their own in `stored` only if this release knows them.

    Args:
        stored: settings read from a file.
        sections: the settings now.
        extensible: whether fields marked "extend" may be larger.
    """
    differences = []
    for _, field, old, new in _fields(stored, sections):
        rule = field.metadata.get("resume")
        if rule in ("free", "stored") or old == new:
            continue
        if rule == "extend" and extensible and isinstance(old, int) and isinstance(new, int) and new > old:
            continue
        words = field.metadata.get("difference", f"`{field.name}` was {{old}}, is {{new}}")
        if rule == "extend":
            words += " (it can only be raised, and only after the end of the run)"
        differences.append(words.format(old=printable(str(old)), new=new))
    for name, section in sections.items():
        found = stored.get(name, {})
        known = {field.name for field in dataclasses.fields(section)}
        unknown = sorted(set(found) - known) if isinstance(found, dict) else ["?"]
        differences += [f"`{printable(other)}` is unknown to this release" for other in unknown]
    return differences


def _fields(stored: Mapping[str, Any], sections: Sections) -> Iterator[tuple[str, dataclasses.Field[Any], Any, Any]]:
    """Yields (section, field, stored value, new value); the default where nothing is stored."""
    for name, section in sections.items():
        found, ours = stored.get(name), _to_json(dataclasses.asdict(section))
        for field in dataclasses.fields(section):
            if isinstance(found, dict) and field.name in found:
                old = found[field.name]
            elif field.default_factory is not dataclasses.MISSING:
                old = _to_json(field.default_factory())
            else:
                old = None if field.default is dataclasses.MISSING else _to_json(field.default)
            yield name, field, old, ours[field.name]

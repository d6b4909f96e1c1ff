"""Work in a folder that can be interrupted: one run at a time, its settings written down once and compared later."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bitdance.runtime.atomic_files import differences, make_folder, open_alone, read_json, remove_leftovers, write_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World

PATIENCE = 5.0
"""Seconds to wait for another run of the same work to end."""


@contextlib.contextmanager
def alone(folder: pathlib.Path, lock: pathlib.Path, world: World) -> Iterator[None]:
    """Keeps a second run of the work in `folder` out for as long as this one's first process lives.

    Temporary files of processes that were killed while they wrote are cleared away.

    Args:
        lock: a file beside the folder, which could not be removed from some network file systems with an open file
            inside.

    Raises:
        UserError: another process works there.
    """
    make_folder(folder.parent)
    if not world.is_main:
        yield
        return
    waiting = f"another process works on {folder}: wait for it, or stop it first."
    with open_alone(lock, PATIENCE, waiting):
        remove_leftovers(folder)
        yield
        lock.unlink(missing_ok=True)


def with_machine(settings: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Settings with what else of the machine changes the last bit, the way JSON gives them back."""
    machine = {"device": world.device.type, "threads": torch.get_num_threads()}
    read: dict[str, Any] = json.loads(json.dumps({**settings, **machine}))
    return read


def claim(path: pathlib.Path, settings: Mapping[str, Any], world: World) -> None:
    """Writes the settings of new work to `path`, or checks that those that are there say the same; by all processes.

    On a CPU work goes on with the number of threads that it was begun with.

    Args:
        settings: from `with_machine`.

    Raises:
        UserError: the folder holds work of other settings, or cannot be written.
    """
    if world.is_main and not path.exists():
        write_json(path, settings)
    world.barrier()
    found = read_json(path, f"delete {path.parent} to start the job anew")
    threads = found.get("threads")
    if world.device.type == "cpu" and isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    if changes := differences(found, {**settings, "threads": threads}):
        raise UserError(
            f"{path.parent} holds a job of other settings ({changes}): run it with those, or delete the folder to "
            "start anew."
        )

"""The checkpoints of a run: written in the background, the newest few kept, a damaged one passed over."""

from __future__ import annotations

import concurrent.futures
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file

PATTERN = "checkpoint-[0-9]*.safetensors"


class Checkpointer:
    """The files `checkpoint-<step>.safetensors` of a run.

    `save` copies the tensors to the CPU's memory, so that training can go on, and a thread writes them: for as long as
    that takes there is one more copy of weights, moving average and optimizer in memory (16 bytes a parameter).

    Args:
        folder: of the run.
        keep: how many are kept, the newest.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._step = -1

    def save(
        self, step: int, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Takes a copy of everything that the next step depends on and begins to write it; waits for the one before.

        Raises:
            UserError: the one before could not be written.
        """
        self.finish()
        if step == self._step:
            return
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        self._step = step
        self._writing = self._pool.submit(self._write, step, copies, config, metadata)

    def _write(
        self, step: int, tensors: dict[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        path = self.folder / f"checkpoint-{step:07d}.safetensors"
        weights_file.save_tensors(path, tensors, "training", config, **metadata)
        for old in paths(self.folder)[self.keep :]:
            old.unlink(missing_ok=True)

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits for what is being written, whether it succeeds or not."""
        self._pool.shutdown()


def paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob(PATTERN), key=step_of, reverse=True)


def step_of(path: pathlib.Path) -> int:
    """The step after which a checkpoint was taken, by its name."""
    return int(path.name.split("-")[1].split(".")[0])


def newest(folder: pathlib.Path) -> weights_file.Contents | None:
    """Reads the newest checkpoint that is whole, None where there is none; says which ones were damaged.

    Damaged ones are renamed to end in `.damaged`, so that they count no longer.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: dict[pathlib.Path, str] = {}
    for path in paths(folder):
        try:
            contents = weights_file.read(path)
        except UserError as error:
            damaged[path] = str(error)
            continue
        for other, reason in damaged.items():
            other.rename(other.with_name(f"{other.name}.damaged"))
            print(f"bitdance: {reason} The run goes on from {path.name}.", file=sys.stderr)
        return contents
    if damaged:
        first = next(iter(damaged.values()))
        raise UserError(
            f"none of the {len(damaged)} checkpoints in {folder} can be read: {first} Or choose another folder to "
            "start anew."
        )
    return None

"""Checkpoints of a run: written in the background, the newest ones kept, damaged ones skipped."""

from __future__ import annotations

import concurrent.futures
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bitdance.runtime.errors import UserError
from bitdance.weights import safetensors_files, weights_file
from bitdance.weights.layout import WeightsFile
from bitdance.weights.resolve import list_checkpoints


class Checkpointer:
    """Writes the files `checkpoint-<step>.safetensors` of a run.

    `save` copies the tensors to CPU memory, so that training can continue, and a thread writes them. Meanwhile there is
    one more copy of weights, EMA and optimizer state in memory (16 bytes per parameter).

    Args:
        folder: the run folder.
        keep: number of checkpoints to keep, the newest.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._step: int | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Copies the state of a step and starts to write it; waits for the previous checkpoint.

        Raises:
            UserError: the previous one could not be written.
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
        safetensors_files.save_tensors(path, tensors, "training", config, **metadata)
        for old in list(list_checkpoints(self.folder).values())[self.keep :]:
            old.unlink(missing_ok=True)

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            UserError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits for the thread, whether it succeeds or not."""
        self._pool.shutdown()


def read_newest(folder: pathlib.Path, check: Callable[[WeightsFile], None]) -> WeightsFile | None:
    """Reads the newest checkpoint that is not damaged; None if there is no checkpoint.

    Damaged ones are reported and renamed to end in `.damaged`.

    Args:
        folder: the run folder.
        check: raises a `UserError` for a checkpoint that is not one of this run, which counts as damaged.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: dict[pathlib.Path, str] = {}
    for path in list_checkpoints(folder).values():
        try:
            contents = weights_file.read(path)
            check(contents)
        except UserError as error:
            damaged[path] = str(error)
            continue
        for other, reason in damaged.items():
            other.rename(other.with_name(f"{other.name}.damaged"))
            print(f"bitdance: {reason} The run resumes from {path.name}.", file=sys.stderr)
        return contents
    if not damaged:
        return None
    problem = f"none of the {len(damaged)} checkpoints in {folder} can be read: {next(iter(damaged.values()))}"
    raise UserError(f"{problem} Or use another folder to start over.")

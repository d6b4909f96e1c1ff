"""Where a run's numbers go: a line of JSON always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError

FILE = "log.jsonl"


class RunLog:
    """The log of a run, for the one process that writes it.

    Args:
        folder: of the run.
        step: steps that are done already; what an interrupted run logged after them is dropped.
        tensorboard: also write TensorBoard's files, in `tensorboard/`.
        wandb: also log to this project of Weights & Biases.
        settings: of the run, for Weights & Biases.

    Raises:
        UserError: a package is missing, or a file cannot be written.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        step: int,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder / FILE
        self._tensorboard = _open_tensorboard(folder, step) if tensorboard else None
        self._wandb = _open_wandb(folder, wandb, settings or {}) if wandb else None
        if self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def write(self, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Adds the numbers of a step; None stands for a number that there is none of.

        Raises:
            UserError: the file cannot be written.
        """
        entry = {"step": step, "epoch": epoch, **values, "time": time.time()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write {self.path}: {reason}; free some space, then run the command again."
            ) from error
        numbers = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **numbers}, step=step)

    def close(self) -> None:
        """Hands over what the other writers hold back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none where there is no log. A last line that is being written is left out."""
    path = folder / FILE
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _open_tensorboard(folder: pathlib.Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs a package that is not there: pip install 'bitdance[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _open_wandb(folder: pathlib.Path, project: str, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package that is not there: pip install 'bitdance[wandb]'.") from None
    # A run that goes on goes on there as well.
    name = folder / "wandb-id.txt"
    if not name.exists():
        with atomic_write(name) as temporary:
            temporary.write_text(secrets.token_hex(8))
    return wandb.init(
        project=project,
        name=folder.name,
        id=name.read_text().strip(),
        resume="allow",
        dir=str(folder),
        config=dict(settings),
    )

"""Groups of options that commands share."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from bitdance.config import Precision, Split, Weights
from bitdance.runtime.errors import UserError, check_fields

if TYPE_CHECKING:
    from bitdance.runtime.process_group import World

TRAIN_HEADINGS = {
    "data_path": "Data",
    "epochs": "Schedule and optimizer",
    "precision": "Precision, speed and memory",
    "save_every": "Checkpoints, previews and log",
    "val_path": "Validation and evaluation during training",
}
"""Titles within the options of `TrainConfig`, by the first field of each."""


def check_output(folder: pathlib.Path) -> None:
    """Raises a `UserError` if a folder for images is named like a file."""
    if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".npz") and not folder.is_dir():
        raise UserError(f"output={folder} is the name of a file: name a folder for grid.png and the images.")


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where to compute.

    Attributes:
        device: cpu, cuda, cuda:N or mps; by default a GPU if there is one.
        threads: CPU threads of a process; by default its share of the cores.
    """

    device: str | None = None
    threads: int | None = None

    def init_distributed(self, only_one: bool = False) -> contextlib.AbstractContextManager[World]:
        """Joins the processes of the command, see `bitdance.runtime.process_group`."""
        from bitdance.runtime.process_group import init_distributed

        return init_distributed(self.device, self.threads, only_one)


@dataclasses.dataclass(frozen=True)
class PrecisionOptions(DeviceOptions):
    """Where to compute, and in which precision.

    Attributes:
        precision: fp32 or bf16; auto is bf16 on hardware that computes with it.
    """

    precision: Precision = "auto"


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model to sample.

    Attributes:
        model: demo (demo-1x), demo-4x or demo-16x, a released model such as BitDance-B-16X, the folder of a training
            run, or a file of weights.
        autoencoder: likewise; by default the one inside the model's file, beside it, or of its training run.
        weights: ema or model (raw); by default the EMA if there is one.
    """

    model: str = "demo"
    autoencoder: str | None = None
    weights: Weights | None = None

    def load(self, device: Any, precision: Precision) -> Any:
        """Loads the pipeline on a device."""
        from bitdance.sampling.pipeline import load_pipeline

        return load_pipeline(
            self.model, autoencoder=self.autoencoder, weights=self.weights, device=device, dtype=precision
        )


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images.

    Attributes:
        data_path: a folder, zip or tar of class folders, ImageNet's tar or parquet files, or CIFAR-10's archives.
        split: train or test, for CIFAR-10's archives.
        image_size: images are scaled and cropped to squares of this side; by default the shorter side of the first one.
        limit: use only so many images, evenly spaced over the set.
    """

    data_path: pathlib.Path
    split: Split = "train"
    image_size: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, "image_size limit", lambda value: value >= 1, "be at least 1")

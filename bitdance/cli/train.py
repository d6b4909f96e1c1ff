"""`bitdance train`: a BitDance model on the tokens of a set of images."""

from __future__ import annotations

import dataclasses
import pathlib

from bitdance.cli.parsing import parse
from bitdance.config import LossConfig, ModelSizes, RunConfig


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a BitDance model on images, or on bits that `bitdance encode` stored.

    Attributes:
        autoencoder: file of the autoencoder that makes the tokens; it is not trained.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
    """

    autoencoder: pathlib.Path
    run: RunConfig
    sizes: ModelSizes = dataclasses.field(default_factory=ModelSizes)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    device: str | None = None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Train, arguments, "bitdance train")
    from bitdance.training.jobs import train_model

    train_model(command.run, command.sizes, command.loss, command.autoencoder, command.device)

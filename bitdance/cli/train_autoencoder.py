"""`bitdance train-autoencoder`: reconstruction, entropy and straight-through bits on a set of images."""

from __future__ import annotations

import dataclasses

from bitdance.cli.parsing import parse
from bitdance.config import AutoencoderConfig, AutoencoderLossConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class TrainAutoencoder:
    """Train an autoencoder on images.

    Attributes:
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
    """

    run: TrainConfig
    network: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = dataclasses.field(default_factory=AutoencoderLossConfig)
    device: str | None = None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(TrainAutoencoder, arguments, "bitdance train-autoencoder")
    from bitdance.training.setup import train_autoencoder

    train_autoencoder(command.run, command.network, command.loss, command.device)

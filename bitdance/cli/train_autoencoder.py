"""`bitdance train-autoencoder`: an autoencoder on a set of images."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import parse
from bitdance.config import AutoencoderConfig
from bitdance.training.train_config import AutoencoderLossConfig, TrainConfig

EXAMPLES = """
bitdance train-autoencoder --data-path pictures.zip --image-size 32 --widths 32 64 64 64 --blocks 1 --output runs/ae
"""


@dataclasses.dataclass(frozen=True)
class TrainAutoencoder:
    """Train an autoencoder on images.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Attributes:
        init_from: start with the weights of this autoencoder, of the same sizes: demo, autoencoder (the released one),
            the folder of a run, or a file.
        init_part: whether to take all of its weights or only those of the decoder.
    """

    run: TrainConfig
    network: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = dataclasses.field(default_factory=AutoencoderLossConfig)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    init_from: str | None = None
    init_part: Literal["all", "decoder"] = "all"


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(TrainAutoencoder, arguments, "bitdance train-autoencoder", EXAMPLES, headings=TRAIN_HEADINGS)
    from bitdance.training.setup import train_autoencoder

    train_autoencoder(
        command.run,
        command.network,
        command.loss,
        command.where.device,
        command.where.threads,
        init_from=command.init_from,
        init_part=command.init_part,
    )

"""`bitdance train-autoencoder`: an autoencoder on a set of images."""

from __future__ import annotations

import dataclasses
import shlex

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import MISSING, given_values, parse
from bitdance.config import AutoencoderConfig
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.training.train_config import (
    AUTOENCODER_RECIPES,
    AutoencoderLossConfig,
    InitPart,
    TrainConfig,
    autoencoder_recipe,
)

EXAMPLES = """
bitdance train-autoencoder --recipe small --data-path pictures.zip --image-size 32 --output runs/ae
torchrun --nproc_per_node 8 -m bitdance train-autoencoder --recipe d16c32 --data-path imagenet/train --output runs/ae
bitdance train-autoencoder --recipe d16c32 --data-path imagenet/train --dry-run
"""


@dataclasses.dataclass(frozen=True)
class TrainAutoencoder:
    """Train an autoencoder on images.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Attributes:
        recipe: use these settings as defaults: d16c32 (256 px, sizes of the released autoencoder) or small (32 to 64
            px). With --help, show them.
        init_from: start with the weights of this autoencoder, of the same sizes: demo, autoencoder (the released one),
            the folder of a run, or a file.
        init_part: whether to take all of its weights or only those of the decoder.
        dry_run: print what the run needs of memory, disk and time on this machine, and end.
    """

    run: TrainConfig
    network: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = dataclasses.field(default_factory=AutoencoderLossConfig)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    init_from: str | None = None
    init_part: InitPart = "all"
    recipe: str | None = None
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    defaults = _recipe_defaults(arguments)
    command = parse(
        TrainAutoencoder, arguments, "bitdance train-autoencoder", EXAMPLES, defaults, headings=TRAIN_HEADINGS
    )
    from bitdance.training.setup import train_autoencoder

    train_autoencoder(
        command.run,
        command.network,
        command.loss,
        command.where.device,
        command.where.threads,
        init_from=command.init_from,
        init_part=command.init_part,
        dry_run=command.dry_run,
        command=shlex.join(["bitdance", "train-autoencoder", *arguments]),
    )


def _recipe_defaults(arguments: list[str]) -> TrainAutoencoder | None:
    """Returns the defaults of `--recipe`; None if it is not given."""
    if (name := given_values(arguments, ["recipe"])["recipe"]) is None:
        return None
    if name not in AUTOENCODER_RECIPES:
        hint = did_you_mean(name, AUTOENCODER_RECIPES)
        raise UserError(f"there is no recipe {name!r}: {hint}--recipe takes {' or '.join(AUTOENCODER_RECIPES)}.")
    return TrainAutoencoder(*autoencoder_recipe(name, MISSING), recipe=name)

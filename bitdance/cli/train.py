"""`bitdance train`: a BitDance model on the tokens of a set of images."""

from __future__ import annotations

import dataclasses

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import MISSING, parse, recipe_name
from bitdance.config import RELEASED_MODELS, ModelSizes
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.training.train_config import LossConfig, TrainConfig, recipe
from bitdance.weights.hub import released_name

EXAMPLES = """
bitdance train --data-path pictures.zip --autoencoder demo --image-size 32 --output runs/model
bitdance train --data-path runs/tokens --autoencoder runs/ae --image-size 32 --output runs/model
torchrun --nproc_per_node 8 -m bitdance train --recipe B-16X --data-path imagenet/train --autoencoder autoencoder
bitdance train --recipe B-1X --data-path imagenet/train --autoencoder autoencoder --dry-run
"""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a BitDance model on images, or on a token cache that `bitdance encode` wrote.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Without --recipe, the defaults are those of the original.

    Attributes:
        autoencoder: the autoencoder that makes the tokens and is not trained: demo, autoencoder (the released one), the
            folder of its training run, or a file.
        recipe: B-1X, B-4X, B-16X, L-1X or H-1X: use the published settings of this model as defaults. With --help, show
            them.
        dry_run: print what the run needs of memory, disk and time on this machine, and end.
    """

    autoencoder: str
    run: TrainConfig
    sizes: ModelSizes = dataclasses.field(default_factory=ModelSizes)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    recipe: str | None = None
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Train, arguments, "bitdance train", EXAMPLES, _recipe_defaults(arguments), headings=TRAIN_HEADINGS)
    from bitdance.training.setup import train_model

    train_model(
        command.run,
        command.sizes,
        command.loss,
        command.autoencoder,
        command.where.device,
        command.where.threads,
        dry_run=command.dry_run,
    )


def _recipe_defaults(arguments: list[str]) -> Train | None:
    """Returns the defaults of `--recipe`, which is parsed before everything else; None if it is not given."""
    if (name := recipe_name(arguments)) is None:
        return None
    released = released_name(name)
    if released is None:
        hint = did_you_mean(name, RELEASED_MODELS)
        raise UserError(f"there is no recipe {name!r}: {hint}--recipe takes one of {', '.join(RELEASED_MODELS)}.")
    run, sizes, loss = recipe(RELEASED_MODELS[released], MISSING)
    return Train(MISSING, run, sizes, loss, recipe=name)

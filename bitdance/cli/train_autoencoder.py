"""`bitdance train-autoencoder`: an autoencoder on a set of images."""

from __future__ import annotations

import dataclasses
import shlex

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import MISSING, given_fields, given_values, name_flags, parse
from bitdance.cli.run_defaults import NO_TIME, allowed_seconds, complete_schedule, stored_settings
from bitdance.config import AutoencoderConfig
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.training.train_config import (
    AUTOENCODER_RECIPES,
    SCHEDULE_FIELDS,
    AutoencoderLossConfig,
    InitPart,
    TrainConfig,
    autoencoder_recipe,
)
from bitdance.weights.resolve import DEMO, DEMO_MODELS

EXAMPLES = """
bitdance train-autoencoder --data-path pictures --time 20m --output runs/ae
bitdance train-autoencoder --recipe small --data-path pictures.zip --image-size 32 --output runs/ae
torchrun --nproc_per_node 8 -m bitdance train-autoencoder --recipe d16c32 --data-path imagenet/train --output runs/ae
bitdance train-autoencoder --recipe d16c32 --data-path imagenet/train --dry-run
"""


@dataclasses.dataclass(frozen=True)
class TrainAutoencoder:
    """Train an autoencoder on images.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Without --recipe, sizes of a network, and another network to start from, the demo autoencoder is fine-tuned, and
    what is not given follows from the images and from --time, --epochs or --max-steps; the choices are printed.

    Attributes:
        time: how long the training may take, such as 20m or 2h; sets the number of epochs. (default: 10m)
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
    time: str | None = None
    recipe: str | None = None
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    name_flags(TrainAutoencoder)
    command = _parse_with_recipe(arguments) or _parse_without_recipe(arguments)
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


def _parse(arguments: list[str], defaults: TrainAutoencoder | None = None) -> TrainAutoencoder:
    name = "bitdance train-autoencoder"
    return parse(TrainAutoencoder, arguments, name, EXAMPLES, defaults, headings=TRAIN_HEADINGS)


def _parse_with_recipe(arguments: list[str]) -> TrainAutoencoder | None:
    """Parses a command line with `--recipe`, whose settings are the defaults; None without."""
    if (name := given_values(arguments, ["recipe"])["recipe"]) is None:
        return None
    if name not in AUTOENCODER_RECIPES:
        hint = did_you_mean(name, AUTOENCODER_RECIPES)
        raise UserError(f"there is no recipe {name!r}: {hint}--recipe takes {' or '.join(AUTOENCODER_RECIPES)}.")
    command = _parse(arguments, TrainAutoencoder(*autoencoder_recipe(name, MISSING), recipe=name))
    if command.time is not None:
        raise UserError(NO_TIME)
    return command


def _parse_without_recipe(arguments: list[str]) -> TrainAutoencoder:
    """Parses a command line with the defaults of a run that goes on, or those to fine-tune the demo autoencoder."""
    given = given_values(arguments, ("init-from", "time", "data-path", "output"))
    if given["data-path"] is None or not {"-h", "--help"}.isdisjoint(arguments):
        return _parse(arguments)
    classes = {"autoencoder": AutoencoderConfig, "loss": AutoencoderLossConfig}
    if stored := stored_settings(given, "autoencoder", classes):
        run, loss = TrainConfig(MISSING, **stored["train"]), AutoencoderLossConfig(**stored["loss"])
        return _parse(arguments, TrainAutoencoder(run, AutoencoderConfig(**stored["autoencoder"]), loss))
    sizes = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    fields = given_fields(arguments, (*SCHEDULE_FIELDS, "max_steps", *sizes))
    names_other = given["init-from"] is None and given_fields(arguments, ("init_part", "decoder_only"))
    if names_other or (given["init-from"] or DEMO) not in DEMO_MODELS or not fields.isdisjoint(sizes):
        if given["time"] is not None:
            raise UserError("--time goes with the demo autoencoder: set --epochs for other sizes or weights.")
        return _parse(arguments)
    from bitdance.data.images import open_images
    from bitdance.models.autoencoder import Autoencoder
    from bitdance.training.automatic import AUTOENCODER_RATE
    from bitdance.training.losses import AutoencoderLoss
    from bitdance.weights import weights_file
    from bitdance.weights.network_config import describe_autoencoder
    from bitdance.weights.resolve import find_weights

    network = describe_autoencoder(weights_file.read(find_weights(DEMO, "autoencoder"))).config
    run, _, loss = autoencoder_recipe("small", MISSING)
    command = _parse(arguments, TrainAutoencoder(run, network, loss, init_from=DEMO))
    config = command.run
    seconds = allowed_seconds(config, fields, command.time)

    def build() -> tuple[AutoencoderLoss, tuple[int, ...]]:
        loss = dataclasses.replace(command.loss, perceptual_weight=0.0, perceptual_network="efficientnet-lite0")
        return AutoencoderLoss(Autoencoder(command.network), loss), (config.image_size, config.image_size, 3)

    images = open_images(config.data_path)
    run = complete_schedule(config, images, fields, seconds, command.where, build, AUTOENCODER_RATE)
    return dataclasses.replace(command, run=run)

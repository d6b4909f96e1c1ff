"""`bitdance train`: a BitDance model on the tokens of a set of images."""

from __future__ import annotations

import dataclasses
import shlex

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import MISSING, given_fields, given_values, name_flags, parse
from bitdance.cli.run_defaults import NO_TIME, allowed_seconds, complete_schedule, stored_settings
from bitdance.config import RELEASED_MODELS, BitDanceConfig, ModelSizes, SamplingDefaults
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.training.train_config import SCHEDULE_FIELDS, LossConfig, TrainConfig, recipe
from bitdance.weights.hub import released_name
from bitdance.weights.resolve import DEMO, DEMO_MODELS

EXAMPLES = """
bitdance train --data-path pictures --output runs/mine
bitdance train --data-path pictures --output runs/mine --time 2h --val-path held-out
bitdance train --data-path runs/tokens --autoencoder runs/ae --image-size 32 --output runs/model
torchrun --nproc_per_node 8 -m bitdance train --recipe B-16X --data-path imagenet/train --autoencoder autoencoder
bitdance train --recipe B-1X --data-path imagenet/train --autoencoder autoencoder --dry-run
"""


_SIZES = [field.name for field in dataclasses.fields(ModelSizes)]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a BitDance model on images, or on a token cache that `bitdance encode` wrote.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Without --recipe, what is not given follows from the images and from --time, --epochs or --max-steps: the demo model
    is adapted to the images, its autoencoder stays as it is, and the choices are printed; --data-path and --output are
    enough. The other defaults below are those with --recipe, as in the original for ImageNet.

    Attributes:
        autoencoder: the autoencoder that makes the tokens and is not trained: demo, autoencoder (the released one), the
            folder of its training run, or a file. Required with --recipe.
        init_from: start with the weights of this model: demo, a released one, the folder of a run, or a file. Its sizes
            are the defaults; the embeddings of new classes start from that of no class.
        time: how long the training may take, such as 20m or 2h; sets the number of epochs. (default: 10m)
        recipe: B-1X, B-4X, B-16X, L-1X or H-1X: use the published settings of this model as defaults. With --help, show
            them.
        dry_run: print what the run needs of memory, disk and time on this machine, and end.
    """

    autoencoder: str
    run: TrainConfig
    sizes: ModelSizes = dataclasses.field(default_factory=ModelSizes)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    init_from: str | None = None
    time: str | None = None
    recipe: str | None = None
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    name_flags(Train)
    command = _parse_with_recipe(arguments) or _parse_without_recipe(arguments)
    from bitdance.training.setup import train_model

    train_model(
        command.run,
        command.sizes,
        command.loss,
        command.autoencoder,
        command.where.device,
        command.where.threads,
        init_from=command.init_from,
        dry_run=command.dry_run,
        command=shlex.join(["bitdance", "train", *arguments]),
    )


def _parse(arguments: list[str], defaults: Train) -> Train:
    return parse(Train, arguments, "bitdance train", EXAMPLES, defaults, headings=TRAIN_HEADINGS)


def _parse_with_recipe(arguments: list[str]) -> Train | None:
    """Parses a command line with `--recipe`, whose settings are the defaults; None without."""
    if (name := given_values(arguments, ["recipe"])["recipe"]) is None:
        return None
    released = released_name(name)
    if released is None:
        hint = did_you_mean(name, RELEASED_MODELS)
        raise UserError(f"there is no recipe {name!r}: {hint}--recipe takes one of {', '.join(RELEASED_MODELS)}.")
    run, sizes, loss = recipe(RELEASED_MODELS[released], MISSING)
    command = _parse(arguments, Train(MISSING, run, sizes, loss, recipe=name))
    if command.time is not None:
        raise UserError(NO_TIME)
    return command


def _parse_without_recipe(arguments: list[str]) -> Train:
    """Parses a command line whose defaults are those of a run that goes on, or follow from model, images and time."""
    given = given_values(arguments, ("init-from", "autoencoder", "time", "data-path", "output"))
    if given["data-path"] is None or not {"-h", "--help"}.isdisjoint(arguments):
        return _parse(arguments, Train(DEMO, TrainConfig(MISSING)))
    if stored := stored_settings(given, "model", {"model": ModelSizes, "loss": LossConfig}):
        run, sizes = TrainConfig(MISSING, **stored["train"]), ModelSizes(**stored["model"])
        return _parse(arguments, Train(stored["run"]["autoencoder"], run, sizes, LossConfig(**stored["loss"])))
    fields = given_fields(arguments, (*SCHEDULE_FIELDS, "max_steps", "perturb_rate", *_SIZES))
    from bitdance.data.token_cache import is_token_cache
    from bitdance.models.autoencoder import Autoencoder
    from bitdance.models.transformer import BitDance
    from bitdance.sampling.pipeline import sampling_defaults
    from bitdance.training.automatic import choose_learning_rate
    from bitdance.training.loader import open_data
    from bitdance.training.losses import BitDanceLoss
    from bitdance.weights import weights_file
    from bitdance.weights.network_config import describe_autoencoder, describe_model
    from bitdance.weights.resolve import find_autoencoder_of, find_weights

    starts = given["init-from"]
    if starts is None and fields.isdisjoint(_SIZES) and (given["autoencoder"] or DEMO) == DEMO:
        starts = DEMO
    path = find_weights(starts or DEMO)
    contents = weights_file.read(path)
    model, sampling = describe_model(contents).config, sampling_defaults(contents) if starts else SamplingDefaults()
    own = DEMO if starts is None or starts in DEMO_MODELS else str(find_autoencoder_of(path))
    autoencoder = given["autoencoder"] or own
    encoder = weights_file.read(find_weights(autoencoder, "autoencoder"))
    tokenizer = describe_autoencoder(encoder).config
    run = TrainConfig(MISSING, image_size=model.grid * tokenizer.down_size, eval_cfg_scale=sampling.cfg_scale)
    sizes, loss = ModelSizes.of(model, num_classes=None), LossConfig(perturb_rate=0.1)
    command = _parse(arguments, Train(autoencoder, run, sizes, loss, init_from=starts))
    config = command.run
    seconds = allowed_seconds(config, fields, command.time)
    images = open_data(config.data_path, weights_file.tokenizer_digest(encoder), config.image_size)

    def build() -> tuple[BitDanceLoss, tuple[int, ...]]:
        classes = command.sizes.num_classes or len(images.classes)
        grid = tokenizer.grid(config.image_size)
        sizes = {**vars(command.sizes), "num_classes": classes, "grid": grid, "bits": tokenizer.bits}
        network = BitDance(BitDanceConfig(**sizes), command.loss.drop_rate, config.grad_checkpointing)
        objective = BitDanceLoss(network, Autoencoder(tokenizer), command.loss, config.seed)
        is_cached, side = is_token_cache(config.data_path), config.image_size
        return objective, (grid**2, tokenizer.bits // 8) if is_cached else (side, side, 3)

    fine_tunes = command.init_from is not None
    flips = f"up to {command.loss.perturb_rate:.0%} of the input bits are flipped against overfitting"
    others = [flips] if "perturb_rate" not in fields else []
    rate = choose_learning_rate(config.optimizer if "optimizer" in fields else None, command.sizes.dim, fine_tunes)
    config = complete_schedule(config, images, fields, seconds, command.where, build, rate, fine_tunes, others)
    return dataclasses.replace(command, run=config)

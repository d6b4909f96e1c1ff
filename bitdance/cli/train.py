"""`bitdance train`: a BitDance model on the tokens of a set of images."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import sys

from bitdance.cli.options import TRAIN_HEADINGS, DeviceOptions
from bitdance.cli.parsing import MISSING, given_values, parse
from bitdance.config import RELEASED_MODELS, BitDanceConfig, ModelSizes
from bitdance.runtime.errors import UserError, did_you_mean
from bitdance.runtime.run_folder import FREE, SETTINGS, read_json
from bitdance.training.train_config import SCHEDULE_FIELDS as FIELDS
from bitdance.training.train_config import LossConfig, TrainConfig, recipe
from bitdance.weights.hub import released_name

EXAMPLES = """
bitdance train --data-path pictures --output runs/mine
bitdance train --data-path pictures --output runs/mine --time 2h --val-path held-out
bitdance train --data-path runs/tokens --autoencoder runs/ae --image-size 32 --output runs/model
torchrun --nproc_per_node 8 -m bitdance train --recipe B-16X --data-path imagenet/train --autoencoder autoencoder
bitdance train --recipe B-1X --data-path imagenet/train --autoencoder autoencoder --dry-run
"""


_SIZES = [field.name for field in dataclasses.fields(ModelSizes)]


def _flag(field: str) -> str:
    return field.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a BitDance model on images, or on a token cache that `bitdance encode` wrote.

    Any number of processes under torchrun; an interrupted run is resumed by the same command.

    Without --recipe, --epochs and --max-steps, what is not given follows from the images and the time: small pictures
    are learnt by the demo model, which is changed as little as its new classes need, and the choices are printed. With
    --epochs or --max-steps the defaults are those of the original.

    Attributes:
        autoencoder: the autoencoder that makes the tokens and is not trained: demo, autoencoder (the released one), the
            folder of its training run, or a file.
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
    defaults = _recipe_defaults(arguments) or _defaults(arguments)
    command = _parse(arguments, defaults)
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


def _parse(arguments: list[str], defaults: Train | None) -> Train:
    return parse(Train, arguments, "bitdance train", EXAMPLES, defaults, headings=TRAIN_HEADINGS)


def _defaults(arguments: list[str]) -> Train | None:
    """Returns the defaults that follow from `--init-from`, or from images and time if no number of steps is given."""
    names = ("init-from", "autoencoder", "time", "epochs", "max-steps", "data-path", "output", *map(_flag, _SIZES))
    given = given_values(arguments, names)
    automatic = given["epochs"] is None and given["max-steps"] is None
    if given["data-path"] is None or not {"-h", "--help"}.isdisjoint(arguments):
        return None
    output = pathlib.Path(given["output"] or TrainConfig(pathlib.Path()).output).expanduser()
    if (output / SETTINGS).is_file():
        if given["time"] is not None:
            print(
                f"bitdance: {output} goes on as it began: --time does not count, --epochs extends it.", file=sys.stderr
            )
        return _stored_settings(output)
    if given["time"] is not None and not automatic:
        raise UserError("--time sets the number of epochs: leave out either it or --epochs and --max-steps.")
    if not automatic and given["init-from"] is None:
        return None
    from bitdance.weights import weights_file
    from bitdance.weights.resolve import DEMO, find_autoencoder_of, find_weights

    own_sizes = any(given[_flag(name)] is not None for name in _SIZES)
    starts = given["init-from"]
    if starts is None and not own_sizes and given["autoencoder"] in (None, DEMO):
        starts = DEMO
    path = find_weights(starts or DEMO)
    config = weights_file.load_model(path).config
    autoencoder = given["autoencoder"] or (DEMO if starts in (None, DEMO) else str(find_autoencoder_of(path)))
    run = TrainConfig(MISSING, image_size=_image_size(config, autoencoder))
    loss = LossConfig(perturb_rate=0.1)
    defaults = Train(autoencoder, run, ModelSizes.of(config, num_classes=None), loss, init_from=starts)
    return _choose_schedule(_parse(arguments, defaults), arguments, defaults) if automatic else defaults


def _stored_settings(output: pathlib.Path) -> Train | None:
    """Returns the settings of a run as defaults; None if it is not one of a model, which is reported later."""
    stored = read_json(output / SETTINGS, f"restore it, or delete {output} to start over")
    kept = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata != FREE} | set(FIELDS)
    with contextlib.suppress(TypeError, ValueError, KeyError):  # damaged, which is reported later
        train, model = stored["train"], stored["model"]
        return Train(
            stored["run"]["autoencoder"],
            TrainConfig(MISSING, **{name: train[name] for name in kept & set(train)}),
            ModelSizes(**{name: model[name] for name in _SIZES}),
            LossConfig(**stored["loss"]),
        )
    return None


def _image_size(model: BitDanceConfig, autoencoder: str) -> int:
    """Returns the image size of a model with an autoencoder."""
    from bitdance.weights import weights_file
    from bitdance.weights.resolve import find_weights

    return model.grid * weights_file.load_autoencoder(find_weights(autoencoder, "autoencoder")).config.down_size


def _choose_schedule(command: Train, arguments: list[str], defaults: Train) -> Train:
    """Returns defaults with a schedule for the images and the time."""
    import os

    from bitdance.data.token_cache import is_token_cache
    from bitdance.runtime.devices import choose_device, computes_bf16
    from bitdance.training import automatic
    from bitdance.training.loader import open_data
    from bitdance.weights import weights_file
    from bitdance.weights.resolve import find_weights

    config = command.run
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes need `epochs`, `max_steps` or a `recipe`: they may measure different times.")
    seconds = automatic.DEFAULT_SECONDS if command.time is None else automatic.parse_time(command.time)
    contents = weights_file.read(find_weights(command.autoencoder, "autoencoder"))
    tokenizer = weights_file.load_autoencoder(contents).config
    images = open_data(config.data_path, weights_file.tokenizer_digest(contents), config.image_size)
    if given_values(arguments, ["batch-size"])["batch-size"] is None:
        config = dataclasses.replace(config, batch_size=automatic.choose_batch_size(len(images)))
    device = choose_device(command.where.device)
    in_bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_bf16(device))
    sizes = BitDanceConfig(
        **{**vars(command.sizes), "num_classes": command.sizes.num_classes or len(images.classes)},
        grid=tokenizer.grid(config.image_size),
        bits=tokenizer.bits,
    )
    encodes = not is_token_cache(config.data_path)
    step = automatic.measure_step(sizes, tokenizer, encodes, config.image_size, config.batch_size, device, in_bf16)
    run, reasons = automatic.choose_schedule(config, len(images), step, seconds, command.init_from is not None)
    print(f"{len(images)} images of {len(images.classes)} classes; settings that were not given:")
    print("\n".join(f"  {reason}" for reason in reasons), flush=True)
    kept = {name: getattr(run, name) for name in FIELDS}
    return dataclasses.replace(defaults, run=dataclasses.replace(defaults.run, **kept))


def _recipe_defaults(arguments: list[str]) -> Train | None:
    """Returns the defaults of `--recipe`, which is parsed before everything else; None if it is not given."""
    if (name := given_values(arguments, ["recipe"])["recipe"]) is None:
        return None
    released = released_name(name)
    if released is None:
        hint = did_you_mean(name, RELEASED_MODELS)
        raise UserError(f"there is no recipe {name!r}: {hint}--recipe takes one of {', '.join(RELEASED_MODELS)}.")
    run, sizes, loss = recipe(RELEASED_MODELS[released], MISSING)
    return Train(MISSING, run, sizes, loss, recipe=name)

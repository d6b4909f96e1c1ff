"""Defaults of a training that are not fixed: those of the run that goes on, or what follows from images and time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitdance.runtime.errors import UserError
from bitdance.runtime.run_folder import FREE, SETTINGS, check_apart, check_kind, check_writable, read_json
from bitdance.training.train_config import SCHEDULE_FIELDS, TrainConfig
from bitdance.weights.resolve import list_checkpoints

NO_TIME = "--time goes without --recipe: set --epochs or --max-steps."

if TYPE_CHECKING:
    from bitdance.cli.options import DeviceOptions
    from bitdance.data.image_dataset import ImageDataset
    from bitdance.data.token_cache import TokenDataset
    from bitdance.training.automatic import LearningRate
    from bitdance.training.losses import AutoencoderLoss, BitDanceLoss


def stored_settings(
    given: Mapping[str, str | None], kind: str, classes: Mapping[str, type[Any]]
) -> dict[str, dict[str, Any]] | None:
    """Returns the settings with which a run that has checkpoints goes on, by section; None of a new one.

    Args:
        given: values of the options `output` and `time`; a run that goes on ignores `time`.
        kind: model or autoencoder.
        classes: dataclasses of the sections besides `run` and `train`.

    Raises:
        UserError: the folder belongs to another kind of run, or its settings are damaged.
    """
    output = pathlib.Path(os.path.expanduser(given["output"] or TrainConfig(pathlib.Path()).output))
    if not (output / SETTINGS).is_file():
        return None
    stored = read_json(output / SETTINGS, f"restore it, or delete {output} to start over")
    check_kind(output, stored, ("run", "train", "loss", kind))
    if not list_checkpoints(output):
        return None
    try:
        found = {name: _restore(cls, stored[name]) for name, cls in classes.items()}
        found["train"] = _restore(TrainConfig, stored["train"], SCHEDULE_FIELDS)
        if kind == "model" and not isinstance(stored["run"].get("autoencoder"), str):
            raise ValueError("autoencoder")
    except ValueError:
        raise UserError(f"{output / SETTINGS} is damaged: restore it, or delete {output} to start over.") from None
    if given["time"] is not None:
        print(f"bitdance: {output} goes on as it began: --time does not count, --epochs extends it.", file=sys.stderr)
    return {"run": stored["run"], **found}


def _restore(cls: type[Any], section: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Returns the stored values of those fields of a dataclass that must be equal, and `also` others.

    Fields that this release does not know are reported later.

    Raises:
        ValueError: a value is not one of the field's type.
    """
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if field.metadata == FREE and field.name not in also:
            continue
        if field.name in section:
            value = section[field.name]
            if not _has_type(value, hints[field.name]):
                raise ValueError(field.name)
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _has_type(value: object, hint: Any) -> bool:
    """Returns whether a value of JSON can be one of a field with this type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, list) and all(_has_type(item, parts[0]) for item in value)
    if parts:
        return any(_has_type(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)


def allowed_seconds(config: TrainConfig, given: Collection[str], time: str | None) -> float | None:
    """Returns the seconds that a new run may take; None if its number of steps is given.

    Raises:
        UserError: the run folder cannot be written or is in that of the images, the time is none, or there are both or
            neither for several processes.
    """
    from bitdance.runtime.process_group import is_one_of_several
    from bitdance.training import automatic

    check_apart(config.output, config.data_path, config.val_path)
    check_writable(config.output)
    has_length = "epochs" in given or "max_steps" in given
    if time is not None and has_length:
        raise UserError("--time sets the number of epochs: leave out either it or --epochs and --max-steps.")
    if has_length:
        return None
    seconds = automatic.DEFAULT_SECONDS if time is None else automatic.parse_time(time)
    if is_one_of_several():
        raise UserError("several processes need `epochs`, `max_steps` or a `recipe`: they may measure different times.")
    return seconds


def complete_schedule(
    config: TrainConfig,
    images: ImageDataset | TokenDataset,
    given: Collection[str],
    seconds: float | None,
    where: DeviceOptions,
    build: Callable[[], tuple[BitDanceLoss | AutoencoderLoss, tuple[int, ...]]],
    rate: LearningRate,
    fine_tunes: bool = True,
    others: Sequence[str] = (),
) -> TrainConfig:
    """Completes the settings of a run by a schedule for the images and the time, and prints what was chosen.

    Args:
        config: as parsed.
        images: of the training.
        given: fields that are kept.
        seconds: result of `allowed_seconds`.
        where: the device and the threads that train.
        build: makes what is timed if the time counts: the loss with its network, and the shape of an image.
        rate, fine_tunes: as of `bitdance.training.automatic.choose_schedule`.
        others: sentences on other choices.
    """
    from bitdance.data.image_dataset import print_summary
    from bitdance.runtime.devices import choose_device, set_threads, uses_bf16
    from bitdance.training import automatic
    from bitdance.training.loader import check_batch_size

    if "batch_size" not in given:
        config = dataclasses.replace(config, batch_size=automatic.choose_batch_size(len(images)))
    check_batch_size(images, config.batch_size)
    time = None
    if seconds is not None:
        set_threads(where.threads)
        (objective, shape), chosen = build(), choose_device(where.device)
        shape = (max(1, config.batch_size // config.accumulate), *shape)  # a microbatch: more may not fit
        step = automatic.measure_step(objective, shape, chosen, uses_bf16(config.precision, chosen), rate.optimizer)
        time = automatic.StepTime(step * config.accumulate, seconds)
    run, reasons = automatic.choose_schedule(config, len(images), given, time, rate, fine_tunes)
    if os.environ.get("RANK", "0") == "0":
        print_summary(images.summary)
        print("settings that were not given:")
        print("\n".join(f"  {reason}" for reason in [*reasons, *others]), flush=True)
    return run

"""`bitdance train`: a BitDance model on the tokens of a set of images."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import pathlib

from bitdance.cli.parsing import MISSING, parse
from bitdance.config import RELEASED_MODELS, LossConfig, ModelSizes, TrainConfig, recipe
from bitdance.runtime.errors import UserError
from bitdance.weights.hub import released_name


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a BitDance model on images, or on bits that `bitdance encode` stored.

    Attributes:
        autoencoder: file of the autoencoder that makes the tokens; it is not trained.
        model: B-1X, B-4X, B-16X, L-1X or H-1X: take the published recipe of this model in place of the defaults; each
            flag that is given wins over it. Together with --help, show the recipe.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
        dry_run: print what the run will need of memory, disk and time on this machine, and end.
    """

    autoencoder: pathlib.Path
    run: TrainConfig
    sizes: ModelSizes = dataclasses.field(default_factory=ModelSizes)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    model: str | None = None
    device: str | None = None
    dry_run: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Train, arguments, "bitdance train", default=_recipe(arguments))
    from bitdance.training.setup import train_model

    train_model(command.run, command.sizes, command.loss, command.autoencoder, command.device, dry_run=command.dry_run)


def _recipe(arguments: list[str]) -> Train | None:
    """The defaults that `--model` stands for, found before all else is parsed; None where it is not given."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument("--model", nargs="?")
    name = scout.parse_known_args(arguments)[0].model
    if name is None:
        return None
    released = released_name(name)
    if released is None:
        near = difflib.get_close_matches(name.upper().removeprefix("BITDANCE-"), RELEASED_MODELS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no recipe {name!r}: {hint}--model takes one of {', '.join(RELEASED_MODELS)}.")
    run, sizes, loss = recipe(RELEASED_MODELS[released], MISSING)
    return Train(MISSING, run, sizes, loss, name)

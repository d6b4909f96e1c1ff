"""`bitdance publish`: a model with its autoencoder, samples and a model card, as a folder or on the hub."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from bitdance.cli.options import ModelOptions, PrecisionOptions
from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError

EXAMPLES = """
bitdance publish --model runs/mine --output published
bitdance publish user/name --model runs/mine --private
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        name: repository on the hub, user/name, which is made if it does not exist; it needs HF_TOKEN.
        output: instead, a folder.
        private: whether a new repository is visible to its owner alone.
    """

    name: Positional[str | None] = None
    output: pathlib.Path | None = None
    private: bool = False


@dataclasses.dataclass(frozen=True)
class Publish:
    """Write a model with a model card to a folder, or upload it to the hub.

    Its autoencoder and some samples are added. Every --model takes the folder, and the name of the
    repository.
    """

    target: Target = dataclasses.field(default_factory=Target)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Publish, arguments, "bitdance publish", EXAMPLES)
    target = command.target
    if (target.name is None) == (target.output is None):
        raise UserError("say where to publish: either a repository on the hub, user/name, or a folder with `output`.")
    with command.where.init_distributed(only_one=True) as world:
        pipeline = command.model.load(world.device, command.where.precision)
        metrics = _metrics_of_run(pathlib.Path(os.path.expanduser(command.model.model)))
        if target.name is not None:
            print(f"published {pipeline.push_to_hub(target.name, target.private, metrics)}")
        elif target.output is not None:
            pipeline.save_pretrained(target.output, metrics)
            print(f"wrote {target.output}, for every --model and bitdance.load_pipeline")


def _metrics_of_run(folder: pathlib.Path) -> dict[str, float]:
    """Returns the steps and the metrics of a training run; nothing for other names."""
    from bitdance.runtime.run_folder import SETTINGS
    from bitdance.training.evaluation import LOGGED
    from bitdance.training.status import describe_run

    if not (folder / SETTINGS).is_file():
        return {}
    facts: dict[str, Any] = describe_run(folder, verify=False)
    evaluation = facts["evaluation"] or {}
    found = {"training steps": facts["step"], "validation loss": facts["val_loss"]}
    found |= {title: evaluation.get(name) for name, title in LOGGED.items()}
    return {name: value for name, value in found.items() if value is not None}

"""`bitdance evaluate`: FID, sFID, Inception Score, precision and recall of images."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.evaluation_report import compare, report
from bitdance.cli.parsing import Positional, parse
from bitdance.config import EvaluationConfig
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    from bitdance.metrics.feature_set import FeatureSet
    from bitdance.metrics.image_sources import Source
    from bitdance.metrics.references import FeatureExtractors
    from bitdance.runtime.process_group import World


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate images: FID, sFID, Inception Score, precision and recall.

    Attributes:
        samples: .npz files of images, folders or sets of images, or stored features; several are compared side by side.
        output: where everything is written as JSON.
        image_size: scale and crop pictures to squares of this side; by default they must have one size.
        split: train or test, for CIFAR-10's archives.
        limit: only so many pictures of each set, spread over it.
        spread: mean and standard deviation over all samples, such as one set a seed.
        save_features: keep the features of the samples too, in the folder of --cache.
        make_reference: compute a reference of the samples and store it in the folder of --cache, named by its content.
        keep: images whose features a stored reference keeps, for precision and recall; its statistics are of all.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
        threads: CPU threads; by default all cores.
    """

    samples: Positional[tuple[pathlib.Path, ...]]
    flags: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    output: pathlib.Path = pathlib.Path("evaluation.json")
    image_size: int | None = None
    split: Literal["train", "test"] = "train"
    limit: int | None = None
    spread: bool = False
    save_features: bool = False
    make_reference: bool = False
    keep: int = 10_000
    device: str | None = None
    threads: int | None = None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Evaluate, arguments, "bitdance evaluate")
    if not command.samples:
        raise UserError("name what to evaluate: .npz files or folders of images.")
    if command.spread and len(command.samples) < 2:
        raise UserError("--spread needs at least two sets of samples.")
    if command.keep < 4:
        raise UserError(f"--keep {command.keep} does not fit: precision and recall need at least 4 images.")
    from bitdance.metrics.references import FeatureExtractors
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.device, command.threads) as world:
        networks = FeatureExtractors(command.flags, world)
        # All are opened before any is worked on, so that a wrong name is not found out after an hour.
        opened = [_open(path, command) for path in command.samples]
        if command.make_reference:
            _make_references(command, opened, networks, world)
        else:
            _evaluate(command, opened, networks, world)


def _open(path: pathlib.Path, command: Evaluate) -> Source | FeatureSet:
    from bitdance.metrics.feature_set import read_feature_set
    from bitdance.metrics.image_sources import open_source

    if path.is_file() and path.suffix.lower() == ".npz" and (stored := read_feature_set(path)) is not None:
        if stored.pool is None:
            raise UserError(f"{path} holds statistics alone: it serves only as a --reference.")
        return stored
    return open_source(path, command.image_size, command.split, command.limit)


def _evaluate(command: Evaluate, opened: list[Source | FeatureSet], networks: FeatureExtractors, world: World) -> None:
    from bitdance.metrics.feature_set import FeatureSet, write_feature_set
    from bitdance.metrics.references import features_of, find_reference

    sides = {found.about.get("height") if isinstance(found, FeatureSet) else found.shape[1] for found in opened}
    side = max(size or 0 for size in sides)
    reference = find_reference(command.flags, side, networks, world)
    rows: dict[str, dict[str, Any]] = {}
    for path, found in zip(command.samples, opened, strict=True):
        sets = [found] if isinstance(found, FeatureSet) else features_of(found, networks(), world, command.flags)
        if not world.is_main:
            continue
        if command.save_features and not isinstance(found, FeatureSet):
            for one in sets:
                write_feature_set(_stored(command, one, path.stem), one)
        figures, warnings = compare(sets, reference, command.flags)
        title = path.name if path.name not in rows else str(path)
        rows[title] = {"figures": figures, "warnings": warnings, "about": [one.about for one in sets]}
    if world.is_main:
        report(rows, reference, command.flags, command.output, command.spread)


def _make_references(
    command: Evaluate, opened: list[Source | FeatureSet], networks: FeatureExtractors, world: World
) -> None:
    from bitdance.metrics.feature_set import FeatureSet, write_feature_set
    from bitdance.metrics.references import features_of

    for path, found in zip(command.samples, opened, strict=True):
        if isinstance(found, FeatureSet):
            raise UserError(f"{path} holds features already: give it to --reference as it is.")
        for one in features_of(found, networks(), world, command.flags, command.keep):
            target = _stored(command, one, f"reference-{path.stem}")
            write_feature_set(target, one)
            print(f"{target}: {one.about['count']} images of {one.about['height']} px")


def _stored(command: Evaluate, found: FeatureSet, stem: str) -> pathlib.Path:
    about = found.about
    return command.flags.cache / f"{stem}-{about['height']}-{about['content'][:12]}-{about['network']}.npz"

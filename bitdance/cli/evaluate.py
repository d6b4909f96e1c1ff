"""`bitdance evaluate`: FID, sFID, Inception Score, precision and recall of images."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bitdance.cli.options import DeviceOptions
from bitdance.cli.parsing import Positional, parse
from bitdance.config import Split
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    from bitdance.metrics.feature_set import FeatureSet
    from bitdance.metrics.image_sources import ImageSource
    from bitdance.runtime.process_group import World
    from bitdance.sampling.job import SamplingJob

EXAMPLES = """
bitdance evaluate results/BitDance_B_16X-*.npz
bitdance evaluate samples.npz pictures/ --reference data.zip --image-size 32
bitdance evaluate samples.npz --features extractor.py:network --reference data.zip
bitdance evaluate data.zip --image-size 64 --make-reference
"""


@dataclasses.dataclass(frozen=True)
class What:
    """What to evaluate.

    Attributes:
        samples: .npz files of images, folders or sets of images, or stored features; several are compared side by side.
        image_size: scale and crop image files to squares of this size; by default they must have one size.
        split: train or test, for CIFAR-10's archives.
        limit: use only this many image files of each set, evenly spaced over it.
    """

    samples: Positional[tuple[pathlib.Path, ...]]
    image_size: int | None = None
    split: Split = "train"
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """What to write.

    Attributes:
        output: JSON file of the report.
        mean_std: add mean and standard deviation over all samples, such as one set per seed.
        save_features: store the features of the samples in the folder --cache.
        make_reference: store the samples as a reference in the folder --cache instead of evaluating them.
        keep: images whose features a stored reference keeps, for precision and recall; its statistics are of all.
    """

    output: pathlib.Path = pathlib.Path("evaluation.json")
    mean_std: bool = False
    save_features: bool = False
    make_reference: bool = False
    keep: int = 10_000


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate images: FID, sFID, Inception Score, precision and recall."""

    what: What
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    results: Results = dataclasses.field(default_factory=Results)
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Evaluate, arguments, "bitdance evaluate", EXAMPLES)
    if not command.what.samples:
        raise UserError("name the images to evaluate: .npz files or folders of images.")
    if command.results.mean_std and len(command.what.samples) < 2:
        raise UserError("`mean_std` needs at least two sets of samples.")
    if command.results.keep < 4:
        raise UserError(f"keep={command.results.keep} is invalid: precision and recall need at least 4 images.")
    with command.where.init_distributed() as world:
        _evaluate(command, world)


def _evaluate(command: Evaluate, world: World) -> None:
    from bitdance.data.image_dataset import print_summary
    from bitdance.metrics.feature_set import FeatureSet, extract_features, write_feature_set
    from bitdance.metrics.references import FeatureExtractors, find_reference
    from bitdance.metrics.report import evaluate_features

    if command.results.output.is_dir():
        raise UserError(f"output={command.results.output} is a folder: name a file, for the report.")
    # All are opened first, so that a wrong path is reported at once and not after an hour.
    opened = [_open(path, command) for path in command.what.samples]
    for source in opened if world.is_main else ():
        if not isinstance(source, FeatureSet):
            print_summary(source.summary)
    extractors = FeatureExtractors(command.evaluation, world)
    sides = [(found.about.get("height") or 0) if isinstance(found, FeatureSet) else found.shape[1] for found in opened]
    makes_reference = command.results.make_reference
    reference = None if makes_reference else find_reference(extractors, max(sides))
    evaluations: dict[str, dict[str, Any]] = {}
    for path, source in zip(command.what.samples, opened, strict=True):
        if isinstance(source, FeatureSet):
            if makes_reference:
                raise UserError(f"{path} holds features already: use it as `reference` as it is.")
            sets = [source]
        else:
            batch_size, keep = command.evaluation.feature_batch_size, command.results.keep if makes_reference else None
            progress = f"features of {path.name}"
            sets = extract_features(source, extractors.loaded, world, batch_size, keep, progress)
            for features in sets if makes_reference or command.results.save_features else []:
                about, stem = features.about, f"reference-{path.stem}" if makes_reference else path.stem
                name = f"{stem}-{about['height']}-{about['content'][:12]}-{about['extractor']}.npz"
                write_feature_set(command.evaluation.cache / name, features)
                print(f"{command.evaluation.cache / name}: {about['count']} images of {about['height']} px")
        if world.is_main and not makes_reference:
            title = path.name if path.name not in evaluations else str(path)
            evaluations[title] = evaluate_features(sets, reference, command.evaluation)
    if evaluations:
        report(evaluations, reference, command.evaluation, command.results.output, command.results.mean_std)


def _open(path: pathlib.Path, command: Evaluate) -> ImageSource | FeatureSet:
    from bitdance.metrics.feature_set import read_feature_set
    from bitdance.metrics.image_sources import open_source

    if path.is_file() and path.suffix.lower() == ".npz" and (stored := read_feature_set(path)) is not None:
        if stored.pool is None:
            raise UserError(f"{path} holds statistics without features: use it as `reference` only.")
        return stored
    return open_source(path, command.what.image_size, command.what.split, command.what.limit)


def run_jobs(
    jobs: dict[str, SamplingJob], reference: dict[str, FeatureSet] | None, config: EvaluationConfig, world: World
) -> dict[str, dict[str, Any]]:
    """Runs sampling jobs and returns the evaluations of those that store features, in the first process."""
    from bitdance.metrics.feature_set import read_feature_set
    from bitdance.metrics.report import evaluate_features
    from bitdance.sampling.job import print_result

    evaluations = {}
    for title, job in jobs.items():
        result = job.run(world)
        if world.is_main:
            print_result(job, result, world)
            found = [read_feature_set(path) for kind, path in result.results.items() if kind.startswith("features.")]
            if sets := [features for features in found if features is not None]:
                evaluations[title] = evaluate_features(sets, reference, config)
    return evaluations


def report(
    evaluations: dict[str, dict[str, Any]],
    reference: dict[str, FeatureSet] | None,
    config: EvaluationConfig,
    output: pathlib.Path,
    mean_std: bool = False,
) -> None:
    """Prints the table and the warnings of a report and writes it as JSON; see `build_report`."""
    from bitdance.metrics.report import build_report, format_table, format_warnings
    from bitdance.runtime.atomic_files import write_json

    record = build_report(evaluations, reference, config, mean_std)
    print(format_table(record))
    for warning in format_warnings(record):
        print(f"bitdance: {warning}", file=sys.stderr)
    write_json(output, record)
    print(f"written to {output}")

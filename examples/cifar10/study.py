"""Measures the effect and cost of sampling settings: Fréchet distance, accuracy and seconds, as CSV and figures.

    python examples/cifar10/study.py --reference cifar10_test.zip --models demo-1x --cfg-scale 24
    python examples/cifar10/study.py --reference cifar10_test.zip --equivalence --images 5000 --seeds 8
    python examples/cifar10/study.py --compare-bits                         # compares bit probabilities of the solvers
    python examples/cifar10/study.py --figures --cfg-scale 24               # draws what has been measured

A line of study-MODEL.csv, or of equivalence-MODEL.csv, is one combination of settings and seed. A line that exists is
not measured again, so an interrupted study continues. Features and accuracy are those of classifier.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import itertools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from classifier import extractor, set_threads
from torch import Tensor

import bitdance
from bitdance.cli.main import call
from bitdance.config import MAX_SCALE, SamplingDefaults
from bitdance.metrics.feature_set import Collector, FeatureSet, extract_features
from bitdance.metrics.features import FeatureExtractor
from bitdance.metrics.image_sources import open_source
from bitdance.metrics.report import compute_metrics
from bitdance.runtime.atomic_files import atomic_write, file_digest, lock_file, make_folder
from bitdance.runtime.errors import UserError, check_fields, counted
from bitdance.runtime.process_group import World
from bitdance.runtime.progress import progress_bar
from bitdance.sampling.pipeline import Pipeline, split_batches
from bitdance.sampling.sampler import SamplerFunctions, SamplingConfig, complete_config, head_sampler, sample_noise

KEYS = ["model", "seed", "images", *(field.name for field in dataclasses.fields(SamplingConfig))]
"""Columns that identify a line."""
METRICS = ["frechet_distance", "accuracy", "precision", "recall", "seconds_per_image"]
COLUMNS = ["model", "parallel_num", *KEYS[1:], *METRICS, "inputs"]
SCALES = {
    "linear": (1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 12.0, 16.0, 24.0, 32.0),
    "constant": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0),
}
SOLVERS = ("euler-maruyama", "dpmpp-2m-sde", "euler", "heun")
STEPS = (5, 10, 15, 20, 30, 50, 100)
AXES = ("scales", "shared", "steps", "ode", "intervals", "end-times", "changing-steps")
"""What the study varies: the guidance scale, without and with shared first tokens, the number of steps of the SDE and
the ODE solvers, guided times, end time and density of the steps, and a number of steps that changes along the sequence.
"""
BATCH = 250
BIT_SAMPLES = 5_000
"""Samples from which the probabilities of bits are estimated."""
MAX_IMAGES, MAX_SEEDS = 1_000_000, 1000
MARGIN = 0.03
"""Largest relative difference of distances that counts as equivalent."""
T95 = (0.0, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""Quantiles of Student's t at 95 %, by degrees of freedom."""


def fast(scale: float, **changes: Any) -> SamplingConfig:
    """Returns the settings around which one varies: those of the preset `fast`, with the first token as published."""
    return complete_config(SamplingDefaults(cfg_scale=scale, share_first=False), "fast", **changes)


def settings(scale: float, axes: Iterable[str] = AXES) -> Iterator[SamplingConfig]:
    """Yields the settings of the study, which vary one at a time around a guidance scale, for the given `AXES`."""
    for axis in axes:
        if axis == "scales":
            for schedule, scales in SCALES.items():
                yield from (fast(value, cfg_schedule=schedule) for value in scales)
        elif axis == "shared":
            scales = dict.fromkeys((12.0, 16.0, 24.0, 32.0, 48.0, scale))
            yield from (fast(value, share_first=True) for value in scales)
        elif axis == "steps":
            for solver, steps in itertools.product(SOLVERS[:2], STEPS):
                yield fast(scale, solver=solver, num_steps=steps)
        elif axis == "ode":
            for solver, steps in itertools.product(SOLVERS[2:], STEPS):
                yield fast(scale, solver=solver, num_steps=steps)
            # With guidance the ODEs converge to another distribution.
            for value, solver in itertools.product((1.0, 4.0), SOLVERS[2:]):
                yield fast(value, solver=solver, num_steps=50)
        elif axis == "intervals":
            for interval in ((0.0, 0.5), (0.0, 0.8), (0.2, 1.0), (0.2, 0.8), (0.5, 1.0)):
                yield fast(scale, cfg_interval=interval)
        elif axis == "end-times":
            for end, power in itertools.product((0.95, 0.9, 0.8, 0.7), (1.0, 1.5)):
                yield fast(scale, num_steps=10, end_time=end, grid_power=power)
        elif axis == "changing-steps":
            for first, last in ((10, 10), (16, 4), (4, 16)):
                yield fast(scale, num_steps=first, final_num_steps=last)


def step_settings(scale: float) -> Iterator[SamplingConfig]:
    """Yields the settings of the equivalence test: numbers of steps, the published one first."""
    yield SamplingConfig(100, scale)
    for steps, solver in itertools.product((20, 10), ("dpmpp-2m-sde", "euler-maruyama")):
        yield SamplingConfig(steps, scale, solver=solver)


def measure(
    pipeline: Pipeline, config: SamplingConfig, seed: int, images: int, network: FeatureExtractor, reference: FeatureSet
) -> dict[str, Any]:
    """Samples images of all classes in equal numbers and returns the columns of the result."""
    labels = np.arange(images) % len(pipeline.classes)
    collector, seconds = Collector(network, images), 0.0
    for ids in split_batches(images, BATCH):
        start = time.perf_counter()
        pixels = pipeline.generate(ids, labels[ids.start : ids.stop].tolist(), config, seed).pixels
        seconds += time.perf_counter() - start
        collector.add(network(pixels))
    metrics = compute_metrics(collector.finish({"source": "samples"}, labels), reference)
    return {
        "frechet_distance": metrics["fid"],
        **{name: metrics[name] for name in ("accuracy", "precision", "recall")},
        "seconds_per_image": seconds / images,
    }


@torch.no_grad()
def bit_probabilities(pipeline: Pipeline, config: SamplingConfig, seed: int) -> Tensor:
    """Returns the probability that each bit of the first token of the first class is 1, (C,), from BIT_SAMPLES."""
    model = pipeline.model
    cond = model.prefill(torch.tensor([0, model.null_class]), model.new_cache(2))  # (2, P, D)
    sample = head_sampler(model, config, SamplerFunctions(model))
    ones = torch.zeros(model.config.bits)
    for ids in split_batches(BIT_SAMPLES, BATCH):
        noise = sample_noise(model, seed, torch.arange(ids.start, ids.stop), config.num_draws)(0, False)
        guidance = torch.full((), config.cfg_scale)
        x = sample(cond.repeat_interleave(len(ids), dim=0), noise, guidance, config.num_steps)  # (B, P, C)
        ones += (x[:, 0] > 0).sum(0)
    return ones / BIT_SAMPLES


def compare_bits(pipeline: Pipeline, path: pathlib.Path) -> None:
    """Writes the largest difference between the bit probabilities of each solver and the published one, at 100 steps.

    The published solver is compared with itself with other noise, which shows the error of the estimate.
    """
    scales = (1.0, 2.0, 4.0, 8.0, 16.0)
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="") as file,
        progress_bar(len(scales), path.stem, "guidance scales") as bar,
    ):
        writer = csv.writer(file)
        writer.writerow(["cfg_scale", *SOLVERS])
        for scale in scales:
            expected = bit_probabilities(pipeline, SamplingConfig(100, scale), seed=1)
            configs = [SamplingConfig(100, scale, solver=solver) for solver in SOLVERS]
            found = [bit_probabilities(pipeline, config, seed=0) for config in configs]
            writer.writerow([scale, *(f"{float((bits - expected).abs().max()):.4f}" for bits in found)])
            bar.update(1)
    print(f"wrote {path}")


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Reads the lines that are there, leaving out one that was not written to its end.

    Raises:
        UserError: the file is damaged, or of another program.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        if reader.fieldnames not in (COLUMNS, None):  # None: not even the first line was written
            raise UserError(f"{path} has other columns than this program writes: give another folder.")
        rows = list(reader)
        for row in rows:
            if not all(row.get(name) for name in COLUMNS):
                raise ValueError
            counts = [int(row[name]) for name in ("seed", "images", "num_steps")]
            values = [float(row[name]) for name in (*METRICS, "cfg_scale")]
            if None in row or min(counts) < 0 or not all(0 <= value < math.inf for value in values):
                raise ValueError
            if int(row["num_steps"]) == 0 or float(row["cfg_scale"]) < 1 or float(row["frechet_distance"]) == 0:
                raise ValueError
    except (OSError, ValueError, csv.Error):  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged: delete it to measure again, or give another folder.") from None
    return rows


def key_of(name: str, seed: int, images: int, config: SamplingConfig) -> dict[str, str]:
    """Returns the columns of KEYS, as text."""
    return {"model": name, "seed": str(seed), "images": str(images)} | {
        field.name: str(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def digest_of(pipeline: Pipeline, network: FeatureExtractor, reference_digest: str) -> str:
    """Returns a digest of weights, classifier and reference images, not of the precision, which the machine chooses."""
    assert pipeline.files is not None
    parts = [*map(file_digest, pipeline.files), network.digest or "", reference_digest]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def describe(config: SamplingConfig) -> str:
    """Returns the settings that differ from those of `fast`, in words."""
    base = vars(fast(config.cfg_scale))
    changed = [f"{name} {value}" for name, value in vars(config).items() if value != base[name]]
    return ", ".join([f"cfg_scale {config.cfg_scale:g}", *changed])


def run(
    options: argparse.Namespace,
    name: str,
    scale: float,
    path: pathlib.Path,
    network: FeatureExtractor,
    reference: FeatureSet,
    reference_digest: str,
) -> None:
    """Measures what is missing of a model, whose file is locked.

    Raises:
        UserError: the file is damaged, was measured with other inputs, or cannot be written.
    """
    rows = read_rows(path)
    pipeline = bitdance.load_pipeline(name)
    inputs = digest_of(pipeline, network, reference_digest)
    if others := {row["inputs"] for row in rows} - {inputs}:
        changed = f"other weights, images or another classifier ({others.pop()}; now {inputs})"
        raise UserError(f"{path} was measured with {changed}: give another folder.")
    done = [{column: row[column] for column in KEYS} for row in rows]
    configs = dict.fromkeys(step_settings(scale) if options.equivalence else settings(scale, options.axes))
    wanted = itertools.product(range(options.seeds), configs)
    missing = [item for item in wanted if key_of(name, item[0], options.images, item[1]) not in done]
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with progress_bar(len(missing), path.stem, "settings") as bar:
        for seed, config in missing:
            row = measure(pipeline, config, seed, options.images, network, reference)
            row |= {"parallel_num": pipeline.model.config.parallel_num, "inputs": inputs}
            try:
                with open(path, "a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerow(key_of(name, seed, options.images, config) | row)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}; free some space.") from error
            bar.write(f"{describe(config)}: distance {row['frechet_distance']:.2f}, accuracy {row['accuracy']:.1%}")
            bar.update(1)
    print(f"wrote {path}")


def select(rows: list[dict[str, str]], x: str, config: SamplingConfig) -> dict[str, list[dict[str, str]]]:
    """Returns the rows with these settings but for one column, by its value."""
    base = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    base.pop(x)
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if all(row[name] == value for name, value in base.items()):
            found.setdefault(row[x], []).append(row)
    return found


def draw(rows: list[dict[str, str]], path: pathlib.Path, scale: float) -> None:
    """Draws the distance and the accuracy over solver steps and over guidance scales, if there are such rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    lines = [(0, solver, select(rows, "num_steps", fast(scale, solver=solver))) for solver in SOLVERS]
    for schedule in SCALES:
        lines.append((1, f"{schedule} guidance", select(rows, "cfg_scale", fast(scale, cfg_schedule=schedule))))
    if not any(values for _, _, values in lines):
        print(
            f"no figure: {path.with_suffix('.csv')} has no rows of the axis scales, nor of steps at guidance {scale:g}."
        )
        return
    for column, label, values in lines:
        points = sorted((float(x), repetitions) for x, repetitions in values.items())
        for row, name in enumerate(("frechet_distance", "accuracy")):
            means = [statistics.fmean(float(one[name]) for one in repetitions) for _, repetitions in points]
            axes[row, column].plot([x for x, _ in points], means, marker="o", markersize=3, label=label)
    for row, title in enumerate(("Fréchet distance", "accuracy")):
        for column, label in enumerate(("solver steps", "guidance scale")):
            axis = axes[row, column]
            axis.set(xlabel=label, ylabel=title, xscale="log")
            # From 0, since differences within the noise would look large otherwise; with some room at the top.
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
            axis.set_xticks((5, 10, 20, 50, 100) if column == 0 else (1, 2, 4, 8, 16, 32), minor=False)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
    axes[0, 0].legend()
    axes[0, 1].legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"wrote {path}")


def print_equivalence(rows: list[dict[str, str]], scale: float) -> None:
    """Prints whether fewer solver steps are equivalent to 100: the 90 % interval of the ratio lies within 3 % of 1.

    "Not worse" requires only that the upper end is below 1.03. The seeds are paired: one seed has the same labels and
    first noise in all settings.

    Raises:
        UserError: there are not 2 to 10 seeds.
    """
    exact = select(rows, "num_steps", fast(scale, solver=SOLVERS[0])).get("100", [])
    distances = {row["seed"]: float(row["frechet_distance"]) for row in exact}
    if not 2 <= len(distances) <= len(T95):
        raise UserError(f"the test needs 2 to {len(T95)} seeds at 100 steps and guidance {scale:g}: give --seeds.")
    for solver in SOLVERS[:2]:
        values = select(rows, "num_steps", fast(scale, solver=solver))
        for steps, found in sorted(values.items(), key=lambda item: int(item[0])):
            ratios = [
                float(row["frechet_distance"]) / distances[row["seed"]] for row in found if row["seed"] in distances
            ]
            if (solver, steps) == (SOLVERS[0], "100") or len(ratios) < 2:
                continue
            mean = statistics.fmean(ratios)
            half = T95[len(ratios) - 1] * statistics.stdev(ratios) / len(ratios) ** 0.5
            verdict = "not worse" if mean + half < 1 + MARGIN else "not shown"
            if abs(mean - 1) + half < MARGIN:
                verdict = "equivalent"
            print(f"{solver}, {steps} steps: {mean:.3f} +- {half:.3f} of the distance at 100 steps: {verdict}")


def main(arguments: list[str]) -> None:
    """Measures, and draws the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["demo-1x"], help="names, files or folders of runs")
    parser.add_argument("--reference", type=pathlib.Path, help="held-out images")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/study"), help="folder")
    parser.add_argument("--images", type=int, default=1000, help="samples of each setting")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other noise")
    parser.add_argument("--cfg-scale", type=float, help="of the settings that do not vary it; by default the model's")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="what to vary")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--equivalence", action="store_true", help="compare numbers of steps with the published one")
    parser.add_argument("--compare-bits", action="store_true", help="compare the solvers' probabilities of bits")
    parser.add_argument("--figures", action="store_true", help="only draw what is there")
    options = parser.parse_args(arguments)
    set_threads(options)
    # Precision and recall need three neighbours of each sample.
    check_fields(options, "images", lambda value: 4 <= value <= MAX_IMAGES, f"be from 4 to {MAX_IMAGES}")
    check_fields(options, "seeds", lambda value: 1 <= value <= MAX_SEEDS, f"be from 1 to {MAX_SEEDS}")
    check_fields(options, "cfg_scale", lambda value: 1 <= value <= MAX_SCALE, f"be from 1 to {MAX_SCALE}")
    if options.equivalence and not options.figures:
        check_fields(options, "seeds", lambda value: 2 <= value <= len(T95), f"be from 2 to {len(T95)}")
    measures = not (options.figures or options.compare_bits)
    if measures:
        if options.reference is None:
            raise UserError("--reference is missing: give the held-out images.")
        network, world = extractor(), World(0, 1, torch.device("cpu"))
        source = open_source(options.reference, 32)
        if len(source) < 4:
            raise UserError(f"{options.reference} holds {counted(len(source), 'image')}: the metrics need at least 4.")
        digest = hashlib.sha256()
        for block in source.blocks(BATCH):
            digest.update(block.tobytes())
        reference = extract_features(source, [network], world, BATCH, progress="reference")[0]
    for name in options.models:
        if options.compare_bits:
            compare_bits(bitdance.load_pipeline(name), options.output / f"bits-{pathlib.Path(name).stem}.csv")
            continue
        path = options.output / f"{'equivalence' if options.equivalence else 'study'}-{pathlib.Path(name).stem}.csv"
        scale = options.cfg_scale
        if scale is None:
            scale = bitdance.load_pipeline(name).defaults.cfg_scale
        if measures:
            make_folder(path.parent)
            lock = path.with_suffix(".lock")
            with lock_file(lock, 1.0, f"another process writes {path}: wait for it to finish, or give another folder."):
                try:
                    run(options, name, scale, path, network, reference, digest.hexdigest())
                except KeyboardInterrupt as interrupt:
                    interrupt.args = ("run the same command again to resume",)  # which `call` prints
                    raise
                finally:
                    lock.unlink(missing_ok=True)
        # Distances of different numbers of images cannot be compared.
        rows = [row for row in read_rows(path) if (row["model"], row["images"]) == (name, str(options.images))]
        if not rows:
            raise UserError(
                f"{path} has no results of {name} with {options.images} images: run without --figures first."
            )
        if options.equivalence:
            print_equivalence(rows, scale)
        else:
            draw(rows, path.with_suffix(".png"), scale)


if __name__ == "__main__":
    call(main, sys.argv[1:])

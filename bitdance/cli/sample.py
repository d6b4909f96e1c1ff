"""`bitdance sample`: images of classes, as PNGs and one labelled grid."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.evaluate import evaluate_job, report
from bitdance.cli.parsing import Positional, parse
from bitdance.cli.sampling_job import run_job
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.runtime.errors import UserError
from bitdance.weights.resolve import DEMO, Precision, class_names, load_pair

if TYPE_CHECKING:
    from bitdance.data.class_names import ClassNames
    from bitdance.runtime.process_group import World
    from bitdance.sampling.pipeline import Generator

GRID = "grid.png"
RECORD = "samples.json"
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """Generate images of classes: PNGs and one labelled grid.

    Attributes:
        classes: ids or names, such as 207 or "golden retriever"; by default all classes, or the first 20 of many.
        model: `demo`, a released model such as BitDance-B-16X, or a file of weights.
        autoencoder: file of the autoencoder; by default the one inside or beside the model.
        output: folder for grid.png, the images and samples.json; images of an earlier call there are replaced.
        per_class: images of each class, by default 10.
        num_images: instead of a few of each class so many of all, balanced, in a random order: a job that can be
            interrupted, run by many processes under torchrun, and ends with a folder of PNGs or one .npz.
        npz: end such a job with one .npz.
        labels: classes of such a job: balanced, or each drawn at random.
        save_bits: write the packed bits of such a job too, beside the result.
        evaluate: end such a job with figures (FID and more): features are taken as the images are made, and the images
            themselves are only kept with --npz.
        seeds: evaluate so many seeds, from --seed on, and give mean and standard deviation.
        seed: the same seed gives the same images.
        cfg_scale: guidance, 1 for none; by default the published one of a released model, else 3.
        cfg_schedule: linear grows with the steps from 1, constant does not.
        sample_steps: steps of the diffusion head for each token; by default 100 for a released model, else 50.
        solver: euler-maruyama as published; euler and heun (of second order) draw no noise on the way.
        share_first: share the first tokens with the unconditional rows, which the published figures did not.
        weights: ema or model (raw); by default the EMA where there is one.
        batch_size: images at a time.
        chunk_size: images that the decoder takes at once, 0 for a whole batch; by default the published number.
        compile: compile the head network first: no, default, or reduce-overhead (CUDA graphs).
        mixed_precision: bf16 or none (float32); auto is bf16 on a GPU.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
        threads: CPU threads; by default all cores.
    """

    classes: Positional[tuple[str, ...]] = ()
    model: str = DEMO
    autoencoder: str | None = None
    output: pathlib.Path = pathlib.Path("samples")
    per_class: int | None = None
    num_images: int | None = None
    npz: bool = False
    labels: Literal["balanced", "random"] = "balanced"
    save_bits: bool = False
    evaluate: bool = False
    seeds: int = 1
    seed: int = 0
    cfg_scale: float | None = None
    cfg_schedule: Literal["linear", "constant"] = "linear"
    sample_steps: int | None = None
    share_first: bool = False
    solver: Literal["euler-maruyama", "euler", "heun"] = "euler-maruyama"
    weights: Literal["ema", "model"] | None = None
    batch_size: int = 100
    chunk_size: int | None = None
    compile: Literal["no", "default", "reduce-overhead"] = "no"
    mixed_precision: Precision = "auto"
    device: str | None = None
    threads: int | None = None
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Sample, arguments, "bitdance sample")
    if command.num_images is None:
        for flag, given in (
            ("--npz", command.npz),
            ("--save-bits", command.save_bits),
            ("--evaluate", command.evaluate),
            ("--labels random", command.labels == "random"),
        ):
            if given:
                raise UserError(f"{flag} goes with --num-images, which says how many images to make: add it.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("many processes need --num-images, which says how many images to make: add it.")
    if command.num_images is not None and command.classes:
        raise UserError("--num-images makes images of all classes: leave out either it or the names of classes.")
    if command.num_images is not None and command.per_class is not None:
        raise UserError("--num-images says how many images to make: leave out either it or --per-class.")
    if command.seeds < 1 or (command.seeds > 1 and not command.evaluate):
        raise UserError(f"--seeds {command.seeds} does not fit: it goes with --evaluate, and must be at least 1.")
    per_class = 10 if command.per_class is None else command.per_class
    if per_class < 1:
        raise UserError(f"--per-class {per_class} images cannot be made: ask for at least 1.")
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.device, command.threads) as world:
        _sample(command, per_class, world)


def _sample(command: Sample, per_class: int, world: World) -> None:
    import torch

    from bitdance.runtime.atomic_files import make_folder
    from bitdance.sampling.pipeline import Generator, cut
    from bitdance.sampling.sampler import SampleSettings
    from bitdance.weights.weights_file import choose_weights

    model, autoencoder, contents = load_pair(
        command.model, command.autoencoder, command.weights, world.device, command.mixed_precision
    )
    names = class_names(model.config)
    chosen = names.find_all(command.classes) if command.classes else list(range(min(len(names), SHOWN)))
    resolved = _resolved(command, contents.path)
    stem = f"{contents.path.stem}-{choose_weights(contents, command.weights)}"
    del contents  # all that the file holds, which is in memory where it could not be mapped
    settings = SampleSettings(
        resolved["sample_steps"], resolved["cfg_scale"], command.cfg_schedule, command.share_first, command.solver
    )
    denoise = None
    if command.compile != "no":
        denoise = torch.compile(model.head.net.denoise, mode=command.compile)
    generator = Generator(model, autoencoder, settings, command.seed, resolved["chunk_size"], denoise=denoise)
    if command.num_images is not None:
        _run_jobs(command, generator, stem, world)
        return
    labels = [label for label in chosen for _ in range(per_class)]
    batches = list(cut(len(labels), command.batch_size))
    make_folder(command.output)
    pictures = _generate(generator, labels, batches)
    grid = _write(command, per_class, pictures, labels, names, resolved)
    print(f"{len(labels)} images of {len(chosen)} classes: {grid}")


def _run_jobs(command: Sample, generator: Generator, stem: str, world: World) -> None:
    """One job for each seed, and their figures."""
    from bitdance.metrics.references import FeatureExtractors, find_reference

    assert command.num_images is not None
    images = ("npz",) if command.npz else () if command.evaluate else ("pngs",)
    networks = FeatureExtractors(command.evaluation, world)
    side = generator.model.config.grid * generator.autoencoder.config.down_size
    # Before the work is done, since the reference or the networks may be missing.
    reference = find_reference(command.evaluation, side, networks, world) if command.evaluate else None
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(command.seed, command.seed + command.seeds):
        outcome = run_job(
            dataclasses.replace(generator, seed=seed),
            world,
            folder=command.output,
            stem=stem,
            num_images=command.num_images,
            batch_size=command.batch_size,
            kinds=(*images, *(("bits",) if command.save_bits else ())),
            labels=command.labels,
            networks=networks() if command.evaluate else (),
        )
        if command.evaluate and world.is_main:
            rows[f"seed {seed}"] = evaluate_job(outcome, reference, command.evaluation)
    if rows:
        report(rows, reference, command.evaluation, outcome.record.with_suffix(".metrics.json"), mean_std=True)


def _resolved(command: Sample, path: pathlib.Path) -> dict[str, Any]:
    """Guidance, steps and chunk: as given, else as published for this model, else what suits a small one."""
    from bitdance.config import RELEASED_MODELS

    release = {release.file.lower(): release for release in RELEASED_MODELS.values()}.get(path.name.lower())
    published = {"cfg_scale": release.cfg_scale, "sample_steps": 100, "chunk_size": release.chunk} if release else {}
    small = {"cfg_scale": 3.0, "sample_steps": 50, "chunk_size": 0}
    given = {name: getattr(command, name) for name in small}
    return {**small, **published, **{name: value for name, value in given.items() if value is not None}}


def _generate(generator: Any, labels: list[int], batches: list[range]) -> Any:
    import numpy as np
    from tqdm import tqdm

    made = []
    steps = generator.model.config.ar_steps
    with tqdm(total=len(labels) * steps, unit="token step", dynamic_ncols=True, desc="sampling") as bar:
        for numbers in batches:
            progress = functools.partial(bar.update, len(numbers))
            made.append(generator.images(list(numbers), [labels[i] for i in numbers], progress).pixels)
    return np.concatenate(made)


def _clear(folder: pathlib.Path) -> None:
    """Removes the images that an earlier call listed in its record, its grid and the record, and nothing else."""
    record = folder / RECORD
    try:
        files = [image["file"] for image in json.loads(record.read_text())["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in (*files, GRID, RECORD):
        if isinstance(name, str) and pathlib.PurePath(name).name == name:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _write(
    command: Sample, per_class: int, pictures: Any, labels: list[int], names: ClassNames, resolved: dict[str, Any]
) -> pathlib.Path:
    from bitdance.runtime.atomic_files import atomic_write
    from bitdance.sampling.image_grid import grid
    from bitdance.sampling.pngs import save_png

    folder, images = command.output, []
    for number, label in enumerate(labels):
        word = "".join(c if c.isalnum() else "-" for c in names.label(label).lower())[:60]
        file = f"{number:04d}-{word}.png"
        images.append({"file": file, "class": label, "name": names.label(label), "number": number})
    rows = [names.label(label) for label in labels[::per_class]]
    scale = max(1, 96 // pictures.shape[1])
    record = {**dataclasses.asdict(command), **resolved, "per_class": per_class, "images": images}
    _clear(folder)
    try:
        with atomic_write(folder / RECORD) as path:
            path.write_text(json.dumps(record, indent=1, default=str) + "\n")
        for image, picture in zip(images, pictures, strict=True):
            save_png(folder / str(image["file"]), picture)
        with atomic_write(folder / GRID) as path:
            grid(pictures, columns=per_class, labels=rows, scale=scale).save(path, format="PNG")
    except BaseException:
        _clear(folder)  # part of a set would be taken for all of it
        raise
    return folder / GRID

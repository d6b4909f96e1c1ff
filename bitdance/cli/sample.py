"""`bitdance sample`: images of classes, as PNGs and a labelled grid; or a job of many images."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.evaluate import report, run_jobs
from bitdance.cli.options import ModelOptions, PrecisionOptions, check_output
from bitdance.cli.parsing import Positional, parse
from bitdance.config import RELEASED_MODELS, AutoencoderConfig, CfgSchedule, Preset, SolverName
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.runtime.errors import UserError, check_fields, check_seed, counted, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from bitdance.data.class_names import ClassNames
    from bitdance.runtime.process_group import World
    from bitdance.sampling.pipeline import Pipeline
    from bitdance.sampling.sampler import StepCallback

MAX_CLASSES = 20
"""Default number of classes of a model with more."""

PER_CLASS = 10
"""Default number of images of each class."""

MAX_IMAGES = 1_000_000
"""At once, and in a folder."""

MEMORIES = (24, 80, 141)
"""Of common GPUs, in GB, for which a dry run shows the largest batch; 5 % are left free."""

EXAMPLES = """
bitdance sample
bitdance sample "golden retriever" 388 volcano --model BitDance-B-16X --per-class 4 --output pictures
bitdance sample --model runs/model --num-images 50000 --npz --output results
bitdance sample --model BitDance-B-1X --num-images 50000 --batch-size 384 --dry-run
bitdance sample --model runs/model --num-images 10000 --evaluate --reference data.zip --seeds 3
"""


@dataclasses.dataclass(frozen=True)
class What:
    """What to sample.

    Attributes:
        classes: ids or names, such as 207 or "golden retriever"; by default all classes, or the first 20 of many.
        per_class: images of each class, by default 10.
        num_images: instead of a few images per class, so many of all classes in random order: a job that can be
            interrupted and run by several processes under torchrun, and ends with a folder of PNGs or one .npz.
        labels: classes of such a job: balanced, or each drawn at random.
        seed: the same seed gives the same images.
    """

    classes: Positional[tuple[str, ...]] = ()
    per_class: int | None = None
    num_images: int | None = None
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class How:
    """How to sample.

    Attributes:
        preset: exact: as published (solver, number of steps, first tokens not shared), the default of a released model;
            fast: fewer steps of a better solver. Options that are given take precedence.
        cfg_scale: guidance scale, 1 for none; by default the published one of a released model, or that in the file,
            else 3.
        cfg_schedule: linear grows from 1 with the steps; constant.
        num_steps: solver steps of the diffusion head for each token; by default 100 for a released model, else 20.
        final_num_steps: solver steps at the last token, changing linearly from `num_steps` at the first; by default the
            same for all.
        solver: euler-maruyama as published; dpmpp-2m-sde, of the same equation in fewer steps; euler and heun (second
            order) are deterministic after the first noise.
        end_time: time at which the solver's last step ends, at most 0.95.
        grid_power: times of the solver are those of an even grid to this power; above 1 denser near the noise.
        cfg_interval: solver times between which there is guidance, as in: 0.1 0.8.
        share_first: let the unconditional rows take the first tokens of the conditional ones; by default on, except
            with a released model and with --preset exact, as published.
        batch_size: images at once.
        chunk_size: images decoded at once, 0 for a whole batch; by default the published number.
        compile: compile the sampler for each batch size: no, default, or reduce-overhead (with CUDA graphs); auto is
            the latter for a job (--num-images) on a GPU.
    """

    preset: Preset | None = None
    cfg_scale: float | None = None
    cfg_schedule: CfgSchedule = "linear"
    num_steps: int | None = None
    final_num_steps: int | None = None
    solver: SolverName | None = None
    end_time: float = 0.95
    grid_power: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    share_first: bool | None = None
    batch_size: int = 100
    chunk_size: int | None = None
    compile: Literal["auto", "no", "default", "reduce-overhead"] = "auto"

    def sampling(self) -> dict[str, Any]:
        """Arguments of `Pipeline.sampling_config`."""
        others = {"batch_size", "chunk_size", "compile"}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}


@dataclasses.dataclass(frozen=True)
class Results:
    """What to write.

    Attributes:
        output: folder for grid.png, the images and samples.json; images of an earlier call there are replaced.
        npz: of a job, write one .npz instead of PNGs.
        save_bits: of a job, also write the packed bits.
        evaluate: of a job, compute metrics (FID and others): features are extracted from the images as they are
            sampled, and the images themselves are kept only with --npz.
        seeds: evaluate so many seeds, starting at --seed, and report mean and standard deviation.
        dry_run: print the memory that these images need, and the batch sizes that fit into common GPUs, and end.
    """

    output: pathlib.Path = pathlib.Path("samples")
    npz: bool = False
    save_bits: bool = False
    evaluate: bool = False
    seeds: int = 1
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample images of classes: PNGs and a labelled grid."""

    what: What = dataclasses.field(default_factory=What)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    how: How = dataclasses.field(default_factory=How)
    results: Results = dataclasses.field(default_factory=Results)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Sample, arguments, "bitdance sample", EXAMPLES)
    _check(command)
    if command.results.dry_run:
        _print_memory(command)
        return
    with command.where.init_distributed() as world:
        pipeline = command.model.load(world.device, command.where.precision)
        is_job = command.what.num_images is not None
        if command.how.compile != "no" and (is_job or command.how.compile != "auto"):
            pipeline.compile(command.how.compile)
        if is_job:
            _run_jobs(command, pipeline, world)
        else:
            _sample(command, pipeline)


def _print_memory(command: Sample) -> None:
    """Prints the memory of the first batch as a table, and as JSON in the last line; needs no released weights."""
    from bitdance.data.class_names import names_of
    from bitdance.runtime.devices import choose_device
    from bitdance.runtime.progress import format_size
    from bitdance.sampling.memory import estimate_memory, find_batch_size
    from bitdance.sampling.pipeline import check_bits, choose_dtype, limit_chunk, split_batches
    from bitdance.sampling.sampler import complete_config
    from bitdance.weights.hub import released_name
    from bitdance.weights.resolve import find_weights
    from bitdance.weights.weights_file import load_autoencoder

    how, device = command.how, choose_device(command.where.device)
    name = released_name(command.model.model)
    if name in RELEASED_MODELS:
        release, autoencoder = RELEASED_MODELS[name], AutoencoderConfig()
        sizes, defaults = release.config, release.sampling
        if command.model.autoencoder not in (None, "autoencoder"):
            autoencoder = load_autoencoder(find_weights(command.model.autoencoder, "autoencoder")).config
    else:
        pipeline = command.model.load(device, command.where.precision)
        sizes, autoencoder, defaults = pipeline.model.config, pipeline.autoencoder.config, pipeline.defaults
    check_bits(sizes, autoencoder)
    config = complete_config(defaults, **how.sampling())
    chunk_size = defaults.chunk_size if how.chunk_size is None else how.chunk_size
    names = names_of(sizes.class_names, sizes.num_classes)
    count = len(_choose_labels(command.what, names)) if command.what.num_images is None else command.what.num_images
    size = len(next(split_batches(count, how.batch_size)))
    chunk = limit_chunk(chunk_size or size, sizes.grid * autoencoder.down_size, device)
    dtype = choose_dtype(command.where.precision, device)
    memory = estimate_memory(sizes, autoencoder, config, size, chunk, dtype)
    grows = not chunk_size and chunk == size  # the chunk with the batch
    fitting = {gb: find_batch_size(memory, size, 0 if grows else chunk, 0.95e9 * gb) for gb in MEMORIES}
    decoder = f"{format_size(memory.decoder)} for {counted(min(chunk, size), 'image')} at once"
    total = count * command.results.seeds
    print(f"{counted(total, 'image')}, {size} at once, {dtype} on {device}".replace("torch.", ""))
    print(f"  weights     {format_size(memory.weights)}")
    print(f"  cache       {format_size(memory.cache)}")
    print(f"  tokens      {format_size(memory.tokens)}, noise and activations")
    print(f"  decoder     {decoder}, after the cache is freed")
    print(f"  total       {format_size(memory.peak)}, without about 0.5 GB of PyTorch and the driver")
    print("largest batches: " + ", ".join(f"{most} images in {gb} GB" for gb, most in fitting.items()))
    facts = {"images": total, "batch_size": size, **dataclasses.asdict(memory), "peak": memory.peak}
    print(json.dumps({**facts, "largest_batches": fitting}), flush=True)


def _check(command: Sample) -> None:
    what, results = command.what, command.results
    check_fields(what, "per_class", lambda value: value >= 1, "be at least 1")
    check_fields(results, "seeds", lambda value: value >= 1, "be at least 1")
    check_fields(command.how, "batch_size", lambda value: value >= 1, "be at least 1")
    check_fields(command.how, "batch_size", lambda value: value <= MAX_IMAGES, f"be at most {MAX_IMAGES}")
    check_fields(command.how, "chunk_size", lambda value: value >= 0, "be at least 0")
    check_seed(what.seed)
    check_seed(what.seed + results.seeds - 1)
    check_output(results.output)
    if what.num_images is None:
        for name, is_given in (
            ("npz", results.npz),
            ("save_bits", results.save_bits),
            ("evaluate", results.evaluate),
            ("labels", what.labels == "random"),
        ):
            if is_given:
                raise UserError(f"`{name}` goes with `num_images`, the number of images of a job: add it.")
        from bitdance.runtime.process_group import is_one_of_several

        if is_one_of_several():
            raise UserError("several processes need `num_images`, the number of images of a job: add it.")
        if command.evaluation != EvaluationConfig():
            raise UserError(
                "options of the evaluation go with `num_images` and `evaluate`: add both, or leave them out."
            )
    elif what.classes:
        raise UserError("`num_images` samples all classes: leave out either it or the classes.")
    elif what.per_class is not None:
        raise UserError("`num_images` is the number of all images: leave out either it or `per_class`.")
    if command.evaluation != EvaluationConfig() and not results.evaluate:
        raise UserError("options of the evaluation go with `evaluate`: add it, or leave them out.")
    if results.seeds > 1 and not results.evaluate:
        raise UserError(f"seeds={results.seeds} goes with `evaluate`: add it.")


def _choose_labels(what: What, names: ClassNames) -> list[int]:
    """Returns the class of each image of a call without `num_images`."""
    chosen = names.find_all(what.classes) if what.classes else list(range(min(len(names), MAX_CLASSES)))
    per_class = what.per_class or PER_CLASS
    if len(chosen) * per_class > MAX_IMAGES:
        raise UserError(f"per_class={per_class} makes {len(chosen) * per_class} images: use `num_images` for so many.")
    return [label for label in chosen for _ in range(per_class)]


def _sample(command: Sample, pipeline: Pipeline) -> None:
    from bitdance.data.class_folders import GRID
    from bitdance.sampling.image_grid import image_grid, rows_without_names
    from bitdance.sampling.sample_folder import prepare_folder, write_folder
    from bitdance.sampling.writers import image_settings, list_entries

    what, how, names = command.what, command.how, pipeline.classes
    folder, per_class = command.results.output, what.per_class or PER_CLASS
    entries = list_entries(names, _choose_labels(what, names))
    config = pipeline.sampling_config(**how.sampling())
    chunk_size = pipeline.defaults.chunk_size if how.chunk_size is None else how.chunk_size
    earlier = prepare_folder(folder, entries)
    with sampling_progress(len(entries) * pipeline.model.config.ar_steps) as count:
        images = pipeline(
            [entry["class"] for entry in entries],
            seed=what.seed,
            **dataclasses.asdict(config),
            batch_size=how.batch_size,
            chunk_size=chunk_size,
            output="np",
            callback=count,
        )
    settings = all_options(command) | dataclasses.asdict(config) | {"chunk_size": chunk_size, "per_class": per_class}
    labels = [entry["name"] for entry in entries[::per_class]]
    grid = image_grid(images, per_class, labels, scale=None)
    texts = [image_settings(pipeline.name, config, what.seed, entry) for entry in entries]
    write_folder(folder, images, grid, {**settings, "images": entries}, texts, earlier)
    classes = len({entry["class"] for entry in entries})
    print(one_line(f"{counted(len(entries), 'image')} of {counted(classes, 'class')}: {folder / GRID}"))
    if unnamed := rows_without_names(labels):
        print(one_line(f"no font has the names of some rows: {unnamed}"))


def all_options(command: Any) -> dict[str, Any]:
    """Returns the options of all groups of a command by their names."""
    groups = (getattr(command, field.name) for field in dataclasses.fields(command))
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


@contextlib.contextmanager
def sampling_progress(total: int) -> Iterator[StepCallback]:
    """Shows the progress of sampling, in steps of single images, by the callback that it yields."""
    from bitdance.runtime.progress import progress_bar

    finished = 0

    def count(step: int, steps: int, tokens: Tensor) -> None:
        nonlocal finished  # the steps of whole batches; one that is halved begins again
        bar.update(min(finished + step * len(tokens), total) - bar.n)
        finished += steps * len(tokens) * (step == steps)

    with progress_bar(total, "sampling", "token steps") as bar:
        yield count


def _run_jobs(command: Sample, pipeline: Pipeline, world: World) -> None:
    """Runs one job per seed, and evaluates them."""
    from bitdance.metrics.references import FeatureExtractors, find_reference
    from bitdance.sampling.job import JobConfig, SamplingJob

    what, results = command.what, command.results
    assert what.num_images is not None
    kinds = ("npz",) if results.npz else () if results.evaluate else ("pngs",)
    extractors = FeatureExtractors(command.evaluation, world)
    chunk_size = pipeline.defaults.chunk_size if command.how.chunk_size is None else command.how.chunk_size
    jobs = {
        f"seed {seed}": SamplingJob(
            pipeline,
            results.output,
            pipeline.sampling_config(**command.how.sampling()),
            JobConfig(what.num_images, command.how.batch_size, seed, what.labels, chunk_size),
            (*kinds, *(("bits",) if results.save_bits else ())),
            extractors.loaded if results.evaluate else (),
        )
        for seed in range(what.seed, what.seed + results.seeds)
    }
    reference = None
    if results.evaluate:  # before the work is done, since it may be missing
        reference = find_reference(extractors, pipeline.image_size)
    if rows := run_jobs(jobs, reference, command.evaluation, world):
        last = what.seed + results.seeds - 1
        seeds = f"-seeds-{what.seed}-to-{last}-" if results.seeds > 1 else f"-seed-{last}-"
        path = jobs[f"seed {last}"].settings_file.with_suffix(".metrics.json")
        path = path.with_name(path.name.replace(f"-seed-{last}-", seeds))
        report(rows, reference, command.evaluation, path, mean_std=True)

"""The original's four scripts: its flags, word for word, turned into this project's configuration.

Names, defaults and choices of the flags are the original's, so field names follow them too. Where a default says None,
the original's default is ignored because the checkpoint or the autoencoder says what is right.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
import shlex
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from bitdance.cli.parsing import parse
from bitdance.config import MODEL_SIZES, ModelSizes
from bitdance.runtime.errors import UserError
from bitdance.training.train_config import LossConfig, TrainConfig

if TYPE_CHECKING:
    from bitdance.sampling.pipeline import Pipeline

SAMPLE_EXAMPLES = """
torchrun --nproc_per_node=8 {script} --ckpt model.pt --trained-vae ae_d16c32.pt --cfg-scale 4 --to-npz
python {script} --ckpt model.pt --trained-vae ae_d16c32.pt --num-fid-samples 100 --sample-dir samples
"""
TRAIN_EXAMPLES = """
torchrun --nproc_per_node=8 {script} --data-path imagenet/train --trained-vae ae_d16c32.pt --results-dir results
python {script} --data-path pictures --trained-vae ae.safetensors --model BitDance-Tiny --image-size 64
"""

T = TypeVar("T")
Family = Literal["BitDance-B", "BitDance-L", "BitDance-H", "BitDance-Tiny"]
PRECISIONS: dict[str, Literal["fp32", "bf16"]] = {"none": "fp32", "bf16": "bf16"}

SAMPLE_ALIASES = {
    "num_steps": "sample_steps",
    "batch_size": "per_proc_batch_size",
    "num_images": "num_fid_samples",
    "output": "sample_dir",
    "precision": "mixed_precision",
    "autoencoder": "trained_vae",
}
TRAIN_ALIASES = {
    "batch_size": "global_batch_size",
    "seed": "global_seed",
    "output": "results_dir",
    "precision": "mixed_precision",
    "keep_epochs": "keep_freq",
    "autoencoder": "trained_vae",
    "time_mean": "P_mean",
    "time_std": "P_std",
    "token_order": "parallel_mode",
}
"""The original's names of fields of our configurations."""
FIELDS = {flag: name for name, flag in TRAIN_ALIASES.items()}


def _with_fields(config: type, flags: str, first: bool = False, **defaults: Any) -> Callable[[type[T]], type[T]]:
    """Returns a decorator that adds flags for fields of a configuration, with their help, to those of a class.

    Args:
        config: the configuration, a dataclass.
        flags: names of the original, separated by spaces.
        first: whether they come before those of the class.
        defaults: of the original, where they are others than those of the fields.
    """
    help_texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(config.__doc__ or ""), re.M))
    hints, fields = typing.get_type_hints(config), config.__dataclass_fields__  # type: ignore[attr-defined]

    def decorate(cls: type[T]) -> type[T]:
        added = {}
        for flag in flags.split():
            name = FIELDS.get(flag, flag)
            added[flag] = Annotated[hints[name], tyro.conf.arg(help=" ".join(help_texts[name].split()))]
            default = defaults.get(flag, fields[name].default)
            if default is not dataclasses.MISSING:
                setattr(cls, flag, default)
        own = cls.__annotations__
        cls.__annotations__ = {**added, **own} if first else {**own, **added}
        return cls

    return decorate


@dataclasses.dataclass(frozen=True, kw_only=True)
@_with_fields(LossConfig, "diff_batch_mul drop_rate perturb_rate time_schedule P_mean P_std")
@_with_fields(TrainConfig, "grad_checkpointing")
class ModelFlags:
    """Model, and loss in training; when sampling, sizes are only compared with the checkpoint.

    Attributes:
        model: size of the model, by default BitDance-L; when sampling, that of the checkpoint.
        image_size: side of the images in pixels, by default 256; when sampling, that of the checkpoint.
        down_size: side of a token in pixels; must be that of the autoencoder.
        patch_size: only 1; no released model has another.
        num_classes: classes, without the null class; by default 1000.
        cls_token_num: class tokens; by default 64.
        latent_dim: bits of a token; by default those of the autoencoder, since no released model has the original's
            default of 16.
        trained_vae: file of the autoencoder.
        perturb_schedule: only constant.
        perturb_rate_max: has no effect, as in the original.
        time_shift: shift of the head's timesteps; by default 1.
    """

    model: Family | None = None
    image_size: int | None = None
    down_size: int | None = None
    patch_size: int = 1
    num_classes: int | None = None
    cls_token_num: int | None = None
    latent_dim: int | None = None
    trained_vae: str | None = None
    perturb_schedule: Literal["constant"] = "constant"
    perturb_rate_max: float = 0.3
    time_shift: float | None = None

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise UserError(f"patch_size={self.patch_size} is invalid: it must be 1, as in all released models.")


@dataclasses.dataclass(frozen=True)
class ParallelFlags:
    """Tokens of a step.

    Attributes:
        parallel_num: tokens sampled per step; by default 4, and when sampling those of the checkpoint.
        parallel_mode: patch: the tokens of a step are a square patch; standard: they are consecutive in raster order.
    """

    parallel_num: int | None = None
    parallel_mode: Literal["standard", "patch"] | None = None


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """Sampling.

    Attributes:
        ckpt: file of the model's weights.
        sample_dir: folder of the result.
        per_proc_batch_size: images that a process samples at once.
        num_fid_samples: number of images.
        cfg_scale: guidance scale, reached linearly over the steps; 1 for none.
        seed: the same seed gives the same images, with any number of processes.
        sample_steps: solver steps of the diffusion head for each token.
        no_ema: use the raw weights instead of the EMA.
        mixed_precision: bf16, or none for float32.
        to_npz: write one .npz instead of a folder of PNGs.
        chunk_size: images decoded at once; 0 for a whole batch.
        device: cpu, cuda, cuda:N or mps; by default a GPU if there is one. (Not in the original.)
        threads: CPU threads of a process; by default its share of the cores. (Not in the original.)
    """

    ckpt: str
    sample_dir: pathlib.Path = pathlib.Path("samples")
    per_proc_batch_size: int = 32
    num_fid_samples: int = 50_000
    cfg_scale: float = 4.6
    seed: int = 99
    sample_steps: int = 100
    no_ema: bool = False
    mixed_precision: Literal["none", "bf16"] = "bf16"
    to_npz: bool = False
    chunk_size: int = 0
    device: str | None = None
    threads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
@_with_fields(
    TrainConfig,
    "data_path results_dir aug_decay_start_epoch aug_decay_end_epoch ema epochs lr min_lr warmup_steps decay_start "
    "weight_decay beta1 beta2 max_grad_norm global_batch_size global_seed num_workers log_every keep_freq",
    first=True,
    keep_freq=50,
)
class TrainFlags:
    """Training.

    Attributes:
        no_compile: do not compile the network; on a CPU it never is.
        tmp_results_dir: has no effect: checkpoints are written to the results folder and renamed.
        mixed_precision: bf16, or none for float32.
        max_steps: ends the run earlier, for a test. (Not in the original.)
        dry_run: print what the run needs of memory, disk and time on this machine, and end. (Not in the original.)
        device: cpu, cuda, cuda:N or mps; by default a GPU if there is one. (Not in the original.)
        threads: CPU threads of a process; by default its share of the cores. (Not in the original.)
    """

    no_compile: bool = False
    tmp_results_dir: str = "/tmp/"
    mixed_precision: Literal["none", "bf16"] = "bf16"
    max_steps: int | None = None
    dry_run: bool = False
    device: str | None = None
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class SampleCommand:
    """Sample the images of an FID; an interrupted job is resumed by the same command."""

    sample: SampleFlags
    model: ModelFlags = ModelFlags()


@dataclasses.dataclass(frozen=True)
class ParallelSampleCommand(SampleCommand):
    """Sample the images of an FID; an interrupted job is resumed by the same command."""

    parallel: ParallelFlags = ParallelFlags()


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train a BitDance model that samples one token per step; an interrupted run is resumed by the same command."""

    train: TrainFlags
    model: ModelFlags = ModelFlags()


@dataclasses.dataclass(frozen=True)
class ParallelTrainCommand(TrainCommand):
    """Train a BitDance model; an interrupted run is resumed by the same command."""

    parallel: ParallelFlags = ParallelFlags()


def sample(arguments: list[str]) -> None:
    """`sample_ddp.py`."""
    command = _parse(SampleCommand, arguments, "sample_ddp.py", SAMPLE_ALIASES)
    run_sample(command.sample, command.model, ParallelFlags())


def sample_parallel(arguments: list[str]) -> None:
    """`sample_ddp_parallel.py`."""
    command = _parse(ParallelSampleCommand, arguments, "sample_ddp_parallel.py", SAMPLE_ALIASES)
    run_sample(command.sample, command.model, command.parallel)


def train(arguments: list[str]) -> None:
    """`train.py`."""
    command = _parse(TrainCommand, arguments, "train.py", TRAIN_ALIASES)
    run_train(command.train, command.model, ParallelFlags(parallel_num=1), ["train.py", *arguments])


def train_parallel(arguments: list[str]) -> None:
    """`train_parallel.py`."""
    command = _parse(ParallelTrainCommand, arguments, "train_parallel.py", TRAIN_ALIASES)
    run_train(command.train, command.model, command.parallel, ["train_parallel.py", *arguments])


def _parse(cls: type[T], arguments: list[str], script: str, aliases: dict[str, str]) -> T:
    examples = (TRAIN_EXAMPLES if aliases is TRAIN_ALIASES else SAMPLE_EXAMPLES).format(script=script)
    return parse(cls, arguments, script, examples, aliases=aliases, flag_pairs=False)


def run_sample(flags: SampleFlags, model_flags: ModelFlags, parallel: ParallelFlags) -> None:
    """Runs the sampling job; each process of torchrun calls this."""
    from bitdance.runtime.process_group import init_distributed
    from bitdance.sampling.job import JobConfig, SamplingJob, print_result
    from bitdance.sampling.pipeline import load_pipeline
    from bitdance.sampling.sampler import SamplingConfig

    sampling = SamplingConfig(flags.sample_steps, flags.cfg_scale)
    config = JobConfig(flags.num_fid_samples, flags.per_proc_batch_size, flags.seed, chunk_size=flags.chunk_size)
    with init_distributed(flags.device, flags.threads) as world:
        pipeline = load_pipeline(
            flags.ckpt,
            autoencoder=model_flags.trained_vae or None,
            weights="model" if flags.no_ema else None,
            device=world.device,
            dtype=PRECISIONS[flags.mixed_precision],
        )
        _check_against_checkpoint(pipeline, model_flags, parallel)
        pipeline.compile()
        job = SamplingJob(pipeline, flags.sample_dir, sampling, config, ("npz" if flags.to_npz else "pngs",))
        result = job.run(world)
        if world.is_main:
            print_result(job, result, world)


def _check_against_checkpoint(pipeline: Pipeline, flags: ModelFlags, parallel: ParallelFlags) -> None:
    """Checks that the flags that are given do not contradict the files."""
    config, down_size = pipeline.model.config, pipeline.autoencoder.config.down_size
    found: dict[str, object] = {
        "image_size": config.grid * down_size,
        "down_size": down_size,
        "num_classes": config.num_classes,
        "cls_token_num": config.cls_token_num,
        "latent_dim": config.bits,
        "time_shift": config.time_shift,
        "parallel_num": config.parallel_num,
        "parallel_mode": config.token_order,
    }
    size = MODEL_SIZES[flags.model] if flags.model else config
    if (size.dim, size.n_layer) != (config.dim, config.n_layer):
        found["model"] = f"a width of {config.dim} and {config.n_layer} layers"
    given = dataclasses.asdict(flags) | dataclasses.asdict(parallel)
    for name, value in found.items():
        if given[name] not in (None, value):
            raise UserError(
                f"{name}={given[name]} contradicts the checkpoint, which has {value}: leave it out or change it."
            )


def run_train(flags: TrainFlags, model_flags: ModelFlags, parallel: ParallelFlags, words: list[str]) -> None:
    """Runs the training; each process of torchrun calls this.

    Raises:
        UserError: the autoencoder is missing, or a setting is out of range.
    """
    if not model_flags.trained_vae:
        raise UserError(
            "`trained_vae` is missing: training needs the autoencoder that makes the tokens, such as "
            "models/BitDance-ImageNet/ae_d16c32.pt."
        )
    from bitdance.training.setup import train_model

    given = {
        FIELDS.get(flag, flag): value
        for group in (flags, model_flags, parallel)
        for flag, value in vars(group).items()
        if value is not None
    }
    given["precision"] = PRECISIONS[flags.mixed_precision]
    given["compile"] = False if flags.no_compile else None
    sizes, loss, config = (
        {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}
        for cls in (ModelSizes, LossConfig, TrainConfig)
    )
    train_model(
        TrainConfig(**config),
        ModelSizes.of(MODEL_SIZES[model_flags.model or "BitDance-L"], **{"parallel_num": 4, **sizes}),
        LossConfig(**loss),
        model_flags.trained_vae,
        flags.device,
        flags.threads,
        expected_bits=model_flags.latent_dim,
        expected_down_size=model_flags.down_size,
        dry_run=flags.dry_run,
        command=shlex.join(words),
    )

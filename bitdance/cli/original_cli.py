"""The original's four scripts: its flags, word for word, turned into this project's configuration.

Names, defaults and choices of the flags are the original's, so field names follow them too. Where a default says None,
the original's default is ignored because the checkpoint or the autoencoder says what is right.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Literal, TypeVar

from bitdance.cli.parsing import parse
from bitdance.config import MODEL_SIZES
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    from bitdance.sampling.pipeline import Pipeline

T = TypeVar("T")
Family = Literal["BitDance-B", "BitDance-L", "BitDance-H", "BitDance-Tiny"]


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
}
"""Flags of fields of our configurations that the original calls otherwise."""


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Flags that all four scripts share.

    Attributes:
        model: size of the model, by default BitDance-L; when sampling, the checkpoint says so by itself.
        image_size: side of the images in pixels, by default 256; when sampling, the checkpoint says so by itself.
        down_size: pixels of a side that a token covers; only what the autoencoder has.
        patch_size: only 1: released models use no other.
        num_classes: classes, without the null class.
        cls_token_num: class tokens.
        latent_dim: bits of a token; the original's default of 16 fits no released model, so the autoencoder decides.
        diff_batch_mul: draws of time and noise for each token, in training.
        grad_checkpointing: less memory for more time, in training.
        trained_vae: file of the autoencoder.
        drop_rate: dropout, in training.
        perturb_schedule: only constant.
        perturb_rate: highest rate of flipped input bits, in training.
        perturb_rate_max: has no effect, as in the original.
        time_schedule: law of the head's times, in training.
        time_shift: shift of the head's times.
        P_std: of the normal under logit_normal times.
        P_mean: of the normal under logit_normal times.
    """

    model: Family | None = None
    image_size: int | None = None
    down_size: int | None = None
    patch_size: int = 1
    num_classes: int | None = None
    cls_token_num: int | None = None
    latent_dim: int | None = None
    diff_batch_mul: int = 4
    grad_checkpointing: bool = False
    trained_vae: str = ""
    drop_rate: float = 0.0
    perturb_schedule: Literal["constant"] = "constant"
    perturb_rate: float = 0.0
    perturb_rate_max: float = 0.3
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"
    time_shift: float | None = None
    P_std: float = 0.8
    P_mean: float = -0.8

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise UserError(
                f"--patch-size {self.patch_size} does not fit: only 1 is supported, as in all released models."
            )


@dataclasses.dataclass(frozen=True)
class ParallelFlags:
    """Flags of the two parallel scripts.

    Attributes:
        parallel_num: tokens of a step; 4 when training, and what the checkpoint has when sampling.
        parallel_mode: order of the tokens: square patches, or raster.
    """

    parallel_num: int | None = None
    parallel_mode: Literal["standard", "patch"] | None = None


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """Flags of sample_ddp.py and sample_ddp_parallel.py.

    Attributes:
        ckpt: file of the model's weights.
        sample_dir: folder of the result.
        per_proc_batch_size: images that a process makes at a time.
        num_fid_samples: images in all.
        cfg_scale: guidance, growing linearly to this; 1 for none.
        seed: the same seed gives the same images, on any number of processes.
        sample_steps: steps of the diffusion head for each token.
        no_ema: use the raw weights instead of their moving average.
        mixed_precision: bf16, or none for float32.
        to_npz: write one .npz instead of a folder of PNGs.
        chunk_size: images that the decoder takes at once; 0 for all.
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
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    """Flags of train.py and train_parallel.py; those without a text are named after what they are.

    Attributes:
        data_path: images, see the README for what is read, or a folder that `bitdance encode` wrote.
        ema: decay of the moving average of the weights; 0 or less for none.
        no_compile: do not compile the model; a CPU never does.
        tmp_results_dir: has no effect: checkpoints are written beside their place and renamed.
        results_dir: folder of the run.
        global_batch_size: images of a step, over all processes.
        num_workers: threads of a process that read images.
        log_every: steps between lines of the log.
        keep_freq: epochs between checkpoints that are kept.
        dry_run: print what the run will need of memory, disk and time, and end. (Not in the original.)
    """

    data_path: pathlib.Path
    aug_decay_start_epoch: int = 700
    aug_decay_end_epoch: int = 750
    ema: float = -1.0
    no_compile: bool = False
    tmp_results_dir: str = "/tmp/"
    results_dir: pathlib.Path = pathlib.Path("results")
    epochs: int = 400
    lr: float = 3e-4
    min_lr: float = 1e-5
    warmup_steps: int = 20_000
    decay_start: int = 20_000
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    global_batch_size: int = 256
    global_seed: int = 0
    num_workers: int = 16
    log_every: int = 100
    mixed_precision: Literal["none", "bf16"] = "bf16"
    keep_freq: int = 50
    max_steps: int | None = None
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class SampleCommand:
    """Sample images for the FID figures."""

    sample: SampleFlags
    model: ModelFlags = ModelFlags()


@dataclasses.dataclass(frozen=True)
class ParallelSampleCommand(SampleCommand):
    """Sample images for the FID figures."""

    parallel: ParallelFlags = ParallelFlags()


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Train a BitDance model that makes one token a step."""

    train: TrainFlags
    model: ModelFlags = ModelFlags()


@dataclasses.dataclass(frozen=True)
class ParallelTrainCommand(TrainCommand):
    """Train a BitDance model."""

    parallel: ParallelFlags = ParallelFlags()


def sample(arguments: list[str]) -> None:
    """`sample_ddp.py`."""
    command = parse(SampleCommand, arguments, "sample_ddp.py", aliases=SAMPLE_ALIASES)
    run_sample(command.sample, command.model, ParallelFlags())


def sample_parallel(arguments: list[str]) -> None:
    """`sample_ddp_parallel.py`."""
    command = parse(ParallelSampleCommand, arguments, "sample_ddp_parallel.py", aliases=SAMPLE_ALIASES)
    run_sample(command.sample, command.model, command.parallel)


def train(arguments: list[str]) -> None:
    """`train.py`."""
    command = parse(TrainCommand, arguments, "train.py", aliases=TRAIN_ALIASES)
    run_train(command.train, command.model, ParallelFlags(parallel_num=1))


def train_parallel(arguments: list[str]) -> None:
    """`train_parallel.py`."""
    command = parse(ParallelTrainCommand, arguments, "train_parallel.py", aliases=TRAIN_ALIASES)
    run_train(command.train, command.model, command.parallel)


def run_sample(flags: SampleFlags, model_flags: ModelFlags, parallel: ParallelFlags) -> None:
    """Runs the sampling job; each process of torchrun calls this."""
    from bitdance.runtime.process_group import init_distributed
    from bitdance.sampling.job import JobConfig, SamplingJob, print_result
    from bitdance.sampling.pipeline import load_pipeline
    from bitdance.sampling.sampler import SamplingConfig

    sampling = SamplingConfig(flags.sample_steps, flags.cfg_scale)
    config = JobConfig(flags.num_fid_samples, flags.per_proc_batch_size, flags.seed, chunk_size=flags.chunk_size)
    with init_distributed(threads=flags.threads) as world:
        pipeline = load_pipeline(
            flags.ckpt,
            autoencoder=model_flags.trained_vae or None,
            weights="model" if flags.no_ema else None,
            device=world.device,
            dtype="bf16" if flags.mixed_precision == "bf16" else "fp32",
        )
        _check_against_checkpoint(pipeline, model_flags, parallel)
        job = SamplingJob(pipeline, flags.sample_dir, sampling, config, ("npz" if flags.to_npz else "pngs",))
        result = job.run(world)
        if world.is_main:
            print_result(job, result, world)


def _check_against_checkpoint(pipeline: Pipeline, flags: ModelFlags, parallel: ParallelFlags) -> None:
    """Checks that the flags that are given do not contradict the files."""
    config, down_size = pipeline.model.config, pipeline.autoencoder.config.down_size
    there: dict[str, tuple[object, object]] = {
        "--image-size": (flags.image_size, config.grid * down_size),
        "--down-size": (flags.down_size, down_size),
        "--num-classes": (flags.num_classes, config.num_classes),
        "--cls-token-num": (flags.cls_token_num, config.cls_token_num),
        "--latent-dim": (flags.latent_dim, config.bits),
        "--time-shift": (flags.time_shift, config.time_shift),
        "--parallel-num": (parallel.parallel_num, config.parallel_num),
        "--parallel-mode": (parallel.parallel_mode, config.token_order),
    }
    own = {name for name, size in MODEL_SIZES.items() if (size.dim, size.n_layer) == (config.dim, config.n_layer)}
    if flags.model not in own:
        there["--model"] = (flags.model, f"a width of {config.dim} and {config.n_layer} layers")
    for flag, (given, found) in there.items():
        if given is not None and given != found:
            raise UserError(
                f"{flag} {given} contradicts the checkpoint, which has {found}: leave the flag out or change it."
            )


def run_train(flags: TrainFlags, model_flags: ModelFlags, parallel: ParallelFlags) -> None:
    """Runs the training; each process of torchrun calls this.

    Raises:
        UserError: `--trained-vae` is missing, or a setting is out of range.
    """
    from bitdance.training.setup import train_model
    from bitdance.training.train_config import LossConfig, ModelSizes, TrainConfig

    if not model_flags.trained_vae:
        raise UserError(
            "--trained-vae is missing: training needs the autoencoder that makes the tokens, such as "
            "models/BitDance-ImageNet/ae_d16c32.pt."
        )
    sizes = MODEL_SIZES[model_flags.model or "BitDance-L"]
    chosen = ModelSizes(
        dim=sizes.dim,
        n_layer=sizes.n_layer,
        head_dim=sizes.head_dim,
        head_layers=sizes.head_layers,
        head_ada_ln=sizes.head_ada_ln,
        parallel_num=_given(parallel.parallel_num, 4),
        cls_token_num=_given(model_flags.cls_token_num, 64),
        num_classes=_given(model_flags.num_classes, 1000),
        token_order=_given(parallel.parallel_mode, "patch"),
        time_shift=_given(model_flags.time_shift, 1.0),
        drop_rate=model_flags.drop_rate,
    )
    loss = LossConfig(
        diff_batch_mul=model_flags.diff_batch_mul,
        time_mean=model_flags.P_mean,
        time_std=model_flags.P_std,
        time_schedule=model_flags.time_schedule,
        perturb_rate=model_flags.perturb_rate,
    )
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    shared &= {field.name for field in dataclasses.fields(TrainFlags)}
    config = TrainConfig(
        **{name: getattr(flags, name) for name in shared},
        output=flags.results_dir,
        batch_size=flags.global_batch_size,
        seed=flags.global_seed,
        precision="bf16" if flags.mixed_precision == "bf16" else "fp32",
        image_size=_given(model_flags.image_size, 256),
        keep_epochs=flags.keep_freq,
        compile=not flags.no_compile,
        grad_checkpointing=model_flags.grad_checkpointing,
    )
    train_model(
        config,
        chosen,
        loss,
        model_flags.trained_vae,
        expected_bits=model_flags.latent_dim,
        expected_down_size=model_flags.down_size,
        dry_run=flags.dry_run,
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value

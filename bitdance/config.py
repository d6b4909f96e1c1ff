"""What a model is: frozen dataclasses that size the networks, and the zoo of released models, one row each."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from bitdance.runtime.errors import UserError

HEAD_DIM = 64
"""Channels of an attention head, in every released model."""

TokenOrder = Literal["patch", "standard"]
TOKEN_ORDERS: tuple[TokenOrder, ...] = ("patch", "standard")


def _check(settings: object, names: str, fits: Callable[[Any], bool], rule: str) -> None:
    """Raises a `UserError` for the first field (of the words in `names`) whose value does not fit; None always does."""
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not fits(value):
            raise UserError(f"--{name.replace('_', '-')} {value} does not fit: it must {rule}.")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are d16c32.

    Attributes:
        widths: channels of the levels, the finest first; each a multiple of 32 (GroupNorm has 32 groups).
        blocks: residual blocks of a level.
        bits: bits of a token, a multiple of 8.
    """

    widths: tuple[int, ...] = (256, 256, 512, 512, 1024)
    blocks: int = 4
    bits: int = 32

    def __post_init__(self) -> None:
        if not self.widths or any(width <= 0 or width % 32 for width in self.widths):
            raise UserError(f"autoencoder widths {self.widths} do not fit: each must be a positive multiple of 32.")
        if self.blocks < 1:
            raise UserError(f"an autoencoder with {self.blocks} blocks a level does not exist: use at least 1.")
        if self.bits < 8 or self.bits % 8:
            raise UserError(f"{self.bits} bits a token do not fit: use a positive multiple of 8.")

    @property
    def down_size(self) -> int:
        """Pixels of an image's side that one token's side covers."""
        return 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class BitDanceConfig:
    """Sizes of a BitDance model; the defaults are B-1X at 256 px.

    Attributes:
        dim: D, width of the transformer, a multiple of 64 (heads have 64 channels).
        n_layer: transformer blocks.
        head_dim: width of the diffusion head, a multiple of 64.
        head_layers: blocks of the head.
        head_ada_ln: adaLN projections of the head; each serves head_layers / head_ada_ln blocks.
        parallel_num: P, tokens of a step.
        grid: side of the token grid.
        bits: C, bits of a token.
        cls_token_num: K, class tokens.
        num_classes: classes, without the null class, whose index this is.
        token_order: `patch`: a step makes a sqrt(P) x sqrt(P) patch of tokens; `standard`: P tokens in raster order.
        time_shift: shift of the head's times, in training and in sampling.
        class_names: one a class, where the model was trained on named classes; may be empty.
    """

    dim: int = 768
    n_layer: int = 24
    head_dim: int = 768
    head_layers: int = 6
    head_ada_ln: int = 2
    parallel_num: int = 1
    grid: int = 16
    bits: int = 32
    cls_token_num: int = 64
    num_classes: int = 1000
    token_order: TokenOrder = "patch"
    time_shift: float = 1.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = "dim n_layer head_dim head_layers head_ada_ln grid cls_token_num num_classes"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} does not fit: it must be at least 1.")
        for name in ("dim", "head_dim"):
            if getattr(self, name) % HEAD_DIM:
                raise UserError(f"{name} {getattr(self, name)} does not fit: it must be a multiple of {HEAD_DIM}.")
        if self.head_layers % self.head_ada_ln:
            raise UserError(
                f"{self.head_layers} head blocks cannot share {self.head_ada_ln} adaLN projections evenly: "
                "make the first a multiple of the second."
            )
        if self.bits < 8 or self.bits % 8:
            raise UserError(f"{self.bits} bits a token do not fit: use a positive multiple of 8.")
        if self.token_order not in TOKEN_ORDERS:
            raise UserError(f"token order {self.token_order!r} does not exist: use patch or standard.")
        if not (math.isfinite(self.time_shift) and self.time_shift > 0):
            raise UserError(f"time shift {self.time_shift} does not fit: it must be a positive number.")
        if self.class_names and len(self.class_names) != self.num_classes:
            given = len(self.class_names)
            raise UserError(f"{given} class names for {self.num_classes} classes: give one each or none.")
        self._check_parallel_num()

    def _check_parallel_num(self) -> None:
        p, grid = self.parallel_num, self.grid
        if p < 1:
            raise UserError(f"{p} tokens a step do not exist: --parallel-num must be at least 1.")
        side = math.isqrt(p)
        if self.token_order == "patch" and side * side != p:
            raise UserError(f"--parallel-num {p} is not a square: tokens are made in square patches (1, 4, 16, ...).")
        if self.token_order == "patch" and grid % side:
            raise UserError(
                f"--parallel-num {p} does not fit: "
                f"patches of {side}x{side} tokens do not divide the {grid}x{grid} grid."
            )
        if grid * grid % p:
            raise UserError(f"--parallel-num {p} does not divide the {grid * grid} tokens of the {grid}x{grid} grid.")

    @property
    def n_head(self) -> int:
        """Attention heads of the transformer, 64 channels each."""
        return self.dim // HEAD_DIM

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid * self.grid

    @property
    def patch(self) -> int:
        """Side of the square of tokens that are neighbours in the sequence: sqrt(P), or 1 in raster order."""
        return math.isqrt(self.parallel_num) if self.token_order == "patch" else 1

    @property
    def ar_steps(self) -> int:
        """Autoregressive steps of an image, N / P."""
        return self.num_tokens // self.parallel_num


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The part of a model's configuration that is chosen; the rest follows from the autoencoder and the images.

    Attributes:
        num_classes: by default as many as the images have; more leaves room for classes to come.
        drop_rate: dropout of the input projection, of the attention's output and of the feed-forward layers.
        (the others): as in `BitDanceConfig`.
    """

    dim: int = 768
    n_layer: int = 24
    head_dim: int = 768
    head_layers: int = 6
    head_ada_ln: int = 2
    parallel_num: int = 1
    cls_token_num: int = 64
    num_classes: int | None = None
    token_order: TokenOrder = "patch"
    time_shift: float = 1.0
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "num_classes", lambda value: value >= 1, "be at least 1")
        _check(self, "drop_rate", lambda value: 0 <= value < 1, "lie between 0 and 1, 1 excluded")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the head's loss draws its times and noise.

    Attributes:
        diff_batch_mul: copies of each group with fresh time and noise.
        time_mean, time_std: of the normal under the sigmoid (`logit_normal`).
        time_schedule: `logit_normal` or `uniform`.
        class_dropout: share of images trained without their class, for guidance.
        perturb_rate: highest rate of flipped input bits; half of it on average.
    """

    diff_batch_mul: int = 4
    time_mean: float = -0.8
    time_std: float = 0.8
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"
    class_dropout: float = 0.1
    perturb_rate: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "diff_batch_mul", lambda value: value >= 1, "be at least 1")
        _check(self, "class_dropout perturb_rate", lambda value: 0 <= value <= 1, "lie between 0 and 1")
        _check(self, "time_mean", math.isfinite, "be a number")
        _check(self, "time_std", lambda value: 0 <= value < math.inf, "be a number from 0 on")


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """A released model: its sizes, how it is sampled, and what was published of it (ImageNet 256 px, 50,000 images).

    Attributes:
        file: its name in the hub repository and under `models/BitDance-ImageNet`.
        family: the original's name of its size.
        config: its sizes.
        cfg_scale: guidance (linear) of the published figures.
        batch: images that a GPU samples at once in the published command.
        chunk: images that the decoder takes at once there.
        perturb_rate: of its training.
        parameters: in millions, without the autoencoder.
        fid, inception_score, precision, recall: published.
    """

    file: str
    family: Literal["BitDance-B", "BitDance-L", "BitDance-H"]
    config: BitDanceConfig
    cfg_scale: float
    batch: int
    chunk: int
    perturb_rate: float
    parameters: float
    fid: float
    inception_score: float
    precision: float
    recall: float


_B = BitDanceConfig()
_L = BitDanceConfig(dim=1024, n_layer=32, head_dim=1024, head_layers=8)
_H = BitDanceConfig(dim=1280, n_layer=40, head_dim=1280, head_layers=12, head_ada_ln=3)
_B4, _B16 = dataclasses.replace(_B, parallel_num=4), dataclasses.replace(_B, parallel_num=16)

_TINY = BitDanceConfig(dim=128, n_layer=3, head_dim=128, head_layers=4)

SIZES: dict[str, BitDanceConfig] = {"BitDance-B": _B, "BitDance-L": _L, "BitDance-H": _H, "BitDance-Tiny": _TINY}
"""The sizes of the original's `--model`, and a tiny one to try a command with."""

RELEASED_MODELS: dict[str, ReleasedModel] = {
    "B-1X": ReleasedModel("BitDance_B_1X.pt", "BitDance-B", _B, 3.2, 384, 64, 0.1, 242.37, 1.68, 297.1, 0.80, 0.62),
    "B-4X": ReleasedModel("BitDance_B_4X.pt", "BitDance-B", _B4, 3.9, 384, 64, 0.1, 260.10, 1.69, 291.2, 0.79, 0.63),
    "B-16X": ReleasedModel("BitDance_B_16X.pt", "BitDance-B", _B16, 6.1, 384, 64, 0.1, 260.11, 1.91, 283.8, 0.78, 0.62),
    "L-1X": ReleasedModel("BitDance_L_1X.pt", "BitDance-L", _L, 4.0, 352, 48, 0.05, 527.27, 1.31, 300.2, 0.80, 0.64),
    "H-1X": ReleasedModel("BitDance_H_1X.pt", "BitDance-H", _H, 4.55, 224, 32, 0.05, 1007.96, 1.24, 304.4, 0.81, 0.64),
}
"""The released models, by their names in the paper."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What every training run has, of an autoencoder as of a model; defaults are the original's.

    Attributes:
        data_path: images: a folder, zip or tar of class folders, ImageNet's tar or parquet, CIFAR-10's archives; of a
            model also a folder that `bitdance encode` wrote.
        results_dir: folder of the run: checkpoints, log, previews.
        image_size: side of the training images in pixels.
        epochs: passes over the data; total steps = epochs x floor(images / global batch).
        max_steps: ends the run earlier, for a try; the schedule still spans all epochs.
        global_batch_size: images of a step, over all processes.
        global_seed: of everything random; each draw is a function of it, the step and the place in the global batch.
        lr, min_lr: highest and last learning rate.
        warmup_steps: the rate grows linearly from 0.
        decay_start: step from which the rate falls as a cosine to `min_lr`; 0 keeps it.
        weight_decay: of tensors with two or more dimensions, a few names excepted.
        beta1, beta2: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 switches clipping off.
        ema: decay of the exponential moving average; 0 or less switches it off.
        mixed_precision: bf16 autocast or none; `auto` is bf16 where the hardware computes with it.
        num_workers: threads that read images.
        max_broken: images that may be unreadable; others take their places.
        random_crop: random crops as in ADM, which enlarge images that are no larger than `image_size`; without it
            centre crops. Either way half of the images are mirrored.
        aug_decay_start_epoch, aug_decay_end_epoch: between these epochs the share of random crops falls to 0.
        log_every: steps between lines of the log.
        save_every: steps between checkpoints, 0 for only the last one; they are written in the background.
        save_minutes: minutes between checkpoints, beside those of `save_every`; 0 for none by the clock.
        keep_checkpoints: how many checkpoints are kept, the newest.
        keep_epochs: epochs between weights that are kept as `epoch_<n>.safetensors`; 0 for none.
        preview_every: steps between preview pictures; 0 for only the last one.
        val_path: held-out images whose loss is logged as `val_loss`; the training path itself names the test images
            of a CIFAR-10 archive.
        val_every: steps between validations; 0 for only one at the end.
        val_images: how many held-out images are looked at, fewer where there are not so many.
        eval_every: steps between evaluations (FID and others, logged as `eval_fid` and so on) of images that the
            averaged weights make, always of the same classes and noise, and one at the end; 0 for none.
        eval_images: how many images are made for it. Figures of few images compare with nothing but each other.
        eval_reference: what to compare with, as `bitdance evaluate --reference` has it; of a large set of images best
            a stored reference.
        eval_inception: file of the Inception network; by default the downloaded one.
        eval_cfg_scale, eval_steps: guidance, and steps of the diffusion head.
        max_skipped: steps in a row with gradients that are not finite after which the run stops; each of them is
            skipped. 0 for no limit.
        tensorboard: write TensorBoard's files too, in `results_dir/tensorboard`.
        wandb: project of Weights & Biases to log to as well.
        compile: compile the network, on a GPU.
        grad_checkpointing: compute activations twice to keep fewer of them.
        accumulate: parts in which a process goes through its share of a batch, to save memory; for a model the results
            agree to rounding, of an autoencoder each part has an entropy of its own.
    """

    data_path: pathlib.Path
    results_dir: pathlib.Path = pathlib.Path("results")
    image_size: int = 256
    epochs: int = 400
    max_steps: int | None = None
    global_batch_size: int = 256
    global_seed: int = 0
    lr: float = 3e-4
    min_lr: float = 1e-5
    warmup_steps: int = 20_000
    decay_start: int = 20_000
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    ema: float = -1.0
    mixed_precision: Literal["auto", "none", "bf16"] = "auto"
    num_workers: int = 16
    max_broken: int = 100
    random_crop: bool = True
    log_every: int = 100
    save_every: int = 1000
    keep_epochs: int = 0
    preview_every: int = 1000
    save_minutes: float = 0.0
    keep_checkpoints: int = 2
    val_path: pathlib.Path | None = None
    val_every: int = 1000
    val_images: int = 1024
    eval_every: int = 0
    eval_images: int = 1000
    eval_reference: str | None = None
    eval_inception: pathlib.Path | None = None
    eval_cfg_scale: float = 3.0
    eval_steps: int = 50
    max_skipped: int = 20
    tensorboard: bool = False
    wandb: str | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    accumulate: int = 1
    aug_decay_start_epoch: int = 700
    aug_decay_end_epoch: int = 750

    def __post_init__(self) -> None:
        counts = (
            "image_size epochs max_steps global_batch_size num_workers log_every keep_checkpoints val_images accumulate"
            " eval_steps"
        )
        _check(self, counts, lambda value: value >= 1, "be at least 1")
        others = (
            "lr min_lr warmup_steps decay_start weight_decay max_grad_norm save_every save_minutes keep_epochs "
            "preview_every val_every max_skipped max_broken eval_every eval_cfg_scale"
        )
        _check(self, others, lambda value: 0 <= value < math.inf, "be a number from 0 on")
        _check(self, "beta1 beta2", lambda value: 0 <= value < 1, "lie between 0 and 1, 1 excluded")
        _check(self, "ema", lambda value: value < 1, "be below 1, such as 0.9999")
        _check(self, "global_seed", lambda value: 0 <= value < 2**32, f"lie between 0 and {2**32 - 1}")
        _check(self, "eval_images", lambda value: value >= 4, "be at least 4")  # precision looks at third neighbours
        if self.eval_every and self.eval_reference is None:
            raise UserError(
                "--eval-every needs images to compare with: name them with --eval-reference (a data set, ADM's "
                "reference batch or a stored reference; none for the Inception Score alone)."
            )


def recipe(release: ReleasedModel, data_path: pathlib.Path) -> tuple[TrainConfig, ModelSizes, LossConfig]:
    """How a released model was trained: what its command in the original's README says, and that script's defaults."""
    run = TrainConfig(
        data_path,
        epochs=800,
        global_batch_size=1024,
        lr=6e-4,
        ema=0.9999,
        mixed_precision="bf16",
        keep_epochs=50,
        compile=True,
    )
    sizes = {field.name for field in dataclasses.fields(ModelSizes)} - {"drop_rate"}
    chosen = ModelSizes(**{name: getattr(release.config, name) for name in sizes})
    return run, chosen, LossConfig(perturb_rate=release.perturb_rate)


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the autoencoder's loss beside the reconstruction (mean squared error of images in [-1, 1]).

    Attributes:
        l1_weight: of the mean absolute error.
        entropy_weight: of the entropy loss.
        commitment_weight: of the distance between the encoder's output and its sign.
    """

    l1_weight: float = 0.0
    entropy_weight: float = 0.1
    commitment_weight: float = 0.25

    def __post_init__(self) -> None:
        weights = "l1_weight entropy_weight commitment_weight"
        _check(self, weights, lambda value: 0 <= value < math.inf, "be a number from 0 on")

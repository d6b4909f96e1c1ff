"""Settings of training: losses, the run, and the published recipes.

Field metadata says which settings may change when a run is resumed, see `bitdance.runtime.run_folder`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
from typing import Any, Literal

from bitdance.config import (
    MAX_SCALE,
    MAX_SOLVER_STEPS,
    AutoencoderConfig,
    ModelSizes,
    Precision,
    ReleasedModel,
    SamplingDefaults,
)
from bitdance.runtime.errors import UserError, check_fields, check_seed
from bitdance.runtime.run_folder import EXTEND, FREE
from bitdance.weights.hub import EVALUATION_FOLDER

MAX_STEPS = 10**12
"""Largest number of steps or epochs; Python cannot compute with much larger ones as floating-point numbers."""

OptimizerName = Literal["adamw", "muon"]

PerceptualNetwork = Literal["efficientnet-lite0", "lpips"]
"""The classifier behind a perceptual loss."""


def _free(default: Any) -> Any:
    return dataclasses.field(default=default, metadata=FREE)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Loss of the model.

    Attributes:
        diff_batch_mul: copies of each group of tokens with different timesteps and noise.
        time_mean: mean of the normal distribution under the sigmoid, for logit_normal timesteps.
        time_std: standard deviation of the same.
        time_schedule: distribution of the timesteps.
        class_dropout: fraction of images trained without their class, for guidance.
        perturb_rate: maximum rate of flipped input bits; the mean rate is half of it.
        drop_rate: dropout of the input projection, of the attention output and of the feed-forward layers.
    """

    diff_batch_mul: int = 4
    time_mean: float = -0.8
    time_std: float = 0.8
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"
    class_dropout: float = 0.1
    perturb_rate: float = 0.0
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "diff_batch_mul", lambda value: 1 <= value <= 1024, "be from 1 to 1024")
        check_fields(self, "class_dropout perturb_rate", lambda value: 0 <= value <= 1, "be between 0 and 1")
        check_fields(self, "drop_rate", lambda value: 0 <= value < 1, "be at least 0 and below 1")
        check_fields(self, "time_mean", math.isfinite, "be a finite number")
        check_fields(self, "time_std", lambda value: 0 <= value < math.inf, "be a finite number of at least 0")


@dataclasses.dataclass(frozen=True)
class AutoencoderLossConfig:
    """Loss of the autoencoder: weights of its terms, for images in [-1, 1].

    Attributes:
        l2_weight: of the mean squared error.
        l1_weight: of the mean absolute error.
        perceptual_weight: of the distance in the activations of a classifier.
        perceptual_network: efficientnet-lite0, with equal weights of its channels, or lpips, VGG-16 with those of LPIPS
            0.1.
        lpips_folder: of the files that `bitdance download lpips` writes.
        adversarial_weight: of the generator's hinge loss; constant after the ramp. 0 for no discriminator.
        adversarial_ramp: steps over which that weight rises from 0, or 0 for all of it at once; the discriminator is
            trained from the first step.
        discriminator_width: channels of the discriminator's first layer, a multiple of 8.
        discriminator_layers: stride-2 convolutions of the discriminator; 3 for patches of 70 x 70 pixels.
        entropy_weight: of the entropy loss.
        commitment_weight: of the squared distance between the encoder's output and its sign.
        decoder_only: do not train the encoder, so that tokens, and models that were trained on them, remain valid.
    """

    l2_weight: float = 1.0
    l1_weight: float = 0.0
    perceptual_weight: float = 0.0
    perceptual_network: PerceptualNetwork = "efficientnet-lite0"
    lpips_folder: pathlib.Path = _free(EVALUATION_FOLDER)
    adversarial_weight: float = 0.0
    adversarial_ramp: int = 2000
    discriminator_width: int = 64
    discriminator_layers: int = 3
    entropy_weight: float = 0.1
    commitment_weight: float = 0.25
    decoder_only: bool = False

    def __post_init__(self) -> None:
        weights = " ".join(field.name for field in dataclasses.fields(self) if field.type == "float")
        check_fields(self, weights, lambda value: 0 <= value < math.inf, "be a finite number of at least 0")
        check_fields(self, "adversarial_ramp", lambda value: value >= 0, "be at least 0")
        if self.perceptual_network == "lpips" and not self.perceptual_weight:
            raise UserError(
                "perceptual_network=lpips goes with `perceptual_weight`: set it above 0, or choose efficientnet-lite0."
            )
        check_fields(self, "discriminator_layers", lambda value: 1 <= value <= 6, "be between 1 and 6")
        check_fields(self, "discriminator_width", lambda value: value > 0 and value % 8 == 0, "be a multiple of 8")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run, of a model or an autoencoder. Defaults are those of the original.

    Attributes:
        data_path: images: a folder, zip or tar of class folders, ImageNet's tar or parquet files, CIFAR-10's archives;
            for a model also a token cache that `bitdance encode` wrote.
        output: the run folder, for checkpoints, log and previews.
        image_size: side of the training images in pixels.
        random_crop: random crops as in ADM, which enlarge images that are not larger than `image_size`; otherwise
            centre crops. Half of the images are flipped either way.
        aug_decay_start_epoch: from this epoch on, the fraction of random crops decreases.
        aug_decay_end_epoch: from this epoch on, there are no random crops.
        num_workers: threads that read images.
        max_bad_images: unreadable images that are tolerated, and whose places others take; by default a tenth of your
            own pictures, at least 10, and 100 of ImageNet.
        epochs: passes over the data; the number of steps is epochs x floor(images / batch size). More epochs extend a
            run that has reached its last step.
        max_steps: ends the run earlier; the schedule still spans all epochs. A larger number continues it.
        batch_size: images per step, over all processes.
        seed: of all random numbers; each is a function of the seed, the step and the index in the global batch.
        optimizer: adamw as published; muon for matrices of hidden layers and AdamW for the rest, for models.
        lr: peak learning rate.
        min_lr: final learning rate.
        warmup_steps: steps of linear warm-up from 0.
        decay_start: step at which the cosine decay to `min_lr` begins; 0 for a constant rate.
        weight_decay: of tensors with two or more dimensions, except a few names.
        beta1: of AdamW.
        beta2: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 disables clipping.
        ema: decay of the exponential moving average of the weights; 0 or less disables it.
        max_skipped: consecutive steps with non-finite gradients after which the run stops; such steps are skipped. 0
            for no limit.
        precision: bf16 for autocast with float32 weights, or fp32; auto is bf16 where the hardware supports it.
        compile: compile the loss at the first step, which takes minutes; by default on CUDA GPUs only.
        grad_checkpointing: recompute activations in the backward pass to save memory.
        accumulate: microbatches per step and process, to save memory; a model's results agree to rounding, while for an
            autoencoder each microbatch has its own entropy.
        save_every: steps between checkpoints, 0 for only the last one; they are written in the background.
        save_minutes: minutes between checkpoints, in addition to `save_every`; 0 for none.
        keep_checkpoints: number of checkpoints to keep, the newest.
        keep_epochs: epochs between weights that are kept as epoch_N.safetensors; 0 for none.
        preview_every: steps between previews; 0 for only the last one.
        log_every: steps between lines of the log.
        tensorboard: also log to TensorBoard, in tensorboard/ of the run folder.
        wandb: project of Weights & Biases to log to.
        val_path: held-out images whose loss is logged as val_loss, by default those in val/ beside train/ in
            `data_path`; `data_path` itself means the test images of a CIFAR-10 archive.
        val_every: steps between validations; 0 for only one at the end.
        val_images: maximum number of held-out images.
        eval_every: steps between evaluations (FID and others, logged as eval_fid etc.) of the EMA weights, and one at
            the end; 0 for none. Of a model, samples of fixed classes and noise are evaluated; of an autoencoder,
            reconstructions of the images of `val_path`.
        eval_images: images per evaluation. Metrics of few images compare only with one another.
        eval_reference: what to compare with, as --reference of `bitdance evaluate`; for a large set of images best a
            stored reference. By default the images of `val_path`.
        eval_inception: file of the Inception network; by default the downloaded one.
        eval_features: another feature extractor in its place, as --features of `bitdance evaluate`, such as
            efficientnet-lite0; the distance is logged as eval_frechet_distance then.
        eval_cfg_scale: guidance scale of the samples, and of previews; stored with the weights as their default.
        eval_num_steps: solver steps of the samples.
    """

    data_path: pathlib.Path = dataclasses.field(metadata=FREE)
    output: pathlib.Path = _free(pathlib.Path("results"))
    image_size: int = 256
    random_crop: bool = True
    aug_decay_start_epoch: int = 700
    aug_decay_end_epoch: int = 750
    num_workers: int = _free(16)
    max_bad_images: int | None = _free(None)

    epochs: int = dataclasses.field(default=400, metadata=EXTEND)
    max_steps: int | None = _free(None)
    batch_size: int = 256
    seed: int = 0
    optimizer: OptimizerName = "adamw"
    lr: float = 3e-4
    min_lr: float = 1e-5
    warmup_steps: int = 20_000
    decay_start: int = 20_000
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    ema: float = -1.0
    max_skipped: int = _free(20)

    precision: Precision = "auto"
    compile: bool | None = _free(None)
    grad_checkpointing: bool = _free(False)
    accumulate: int = _free(1)

    save_every: int = _free(1000)
    save_minutes: float = _free(0.0)
    keep_checkpoints: int = _free(2)
    keep_epochs: int = _free(0)
    preview_every: int = _free(1000)
    log_every: int = _free(100)
    tensorboard: bool = _free(False)
    wandb: str | None = _free(None)

    val_path: pathlib.Path | None = _free(None)
    val_every: int = _free(1000)
    val_images: int = _free(1024)
    eval_every: int = _free(0)
    eval_images: int = _free(1000)
    eval_reference: str | None = _free(None)
    eval_inception: pathlib.Path | None = _free(None)
    eval_features: str | None = _free(None)
    eval_cfg_scale: float = _free(SamplingDefaults().cfg_scale)
    eval_num_steps: int = _free(SamplingDefaults().num_steps)

    def __post_init__(self) -> None:
        counts = (
            "image_size epochs max_steps batch_size num_workers log_every keep_checkpoints val_images accumulate"
            " eval_num_steps"
        )
        check_fields(self, counts, lambda value: value >= 1, "be at least 1")
        others = (
            "lr min_lr warmup_steps decay_start weight_decay max_grad_norm save_every save_minutes keep_epochs "
            "preview_every val_every max_skipped max_bad_images eval_every"
        )
        check_fields(self, others, lambda value: 0 <= value < math.inf, "be a finite number of at least 0")
        check_fields(
            self, "eval_cfg_scale", lambda value: 0 <= value <= MAX_SCALE, f"be a number from 0 to {MAX_SCALE}"
        )
        check_fields(self, "eval_num_steps", lambda value: value <= MAX_SOLVER_STEPS, f"be at most {MAX_SOLVER_STEPS}")
        lengths = "epochs max_steps warmup_steps decay_start"
        check_fields(self, lengths, lambda value: value <= MAX_STEPS, f"be at most {MAX_STEPS}")
        check_fields(self, "beta1 beta2", lambda value: 0 <= value < 1, "be at least 0 and below 1")
        check_fields(self, "ema", lambda value: value < 1, "be below 1, such as 0.9999")
        check_seed(self.seed)
        check_fields(self, "eval_images", lambda value: value >= 4, "be at least 4")  # precision uses 3 neighbours
        if self.eval_every and self.eval_reference is None and self.val_path is None:
            raise UserError(
                "`eval_every` needs images to compare with: name them with `eval_reference` (a data set, ADM's "
                "reference batch or a stored reference; none for the Inception Score alone) or `val_path`."
            )
        for name, package in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
            if getattr(self, name):
                try:
                    importlib.import_module(package)
                except ImportError:
                    raise UserError(f"`{name}` needs a package: pip install 'bitdance[{name}]'.") from None


SCHEDULE_FIELDS = (
    *("batch_size", "epochs", "optimizer", "lr", "min_lr", "warmup_steps", "decay_start", "ema", "random_crop"),
    *("save_every", "save_minutes", "preview_every", "log_every", "eval_cfg_scale"),
)
"""Fields of `TrainConfig` that can follow from images and time, see `bitdance.training.automatic`, or from the model to
start from."""

InitPart = Literal["all", "decoder"]
"""The part of another autoencoder that a training starts from."""

AUTOENCODER_RECIPES = ("d16c32", "small")


def autoencoder_recipe(
    name: str, data_path: pathlib.Path
) -> tuple[TrainConfig, AutoencoderConfig, AutoencoderLossConfig]:
    """Returns settings for an autoencoder, one of `AUTOENCODER_RECIPES`.

    `d16c32` is the usual recipe of this family (WeTok, arXiv 2508.05599) for the released sizes and 256 px; this
    project has not trained with it. `small` is for images of 32 to 64 px, see docs/tokenizer.md.
    """
    if name == "d16c32":
        run = TrainConfig(data_path, epochs=100, lr=1e-4, ema=0.999, warmup_steps=5000, precision="bf16")
        loss = AutoencoderLossConfig(perceptual_weight=1.0, perceptual_network="lpips", adversarial_weight=0.1)
        return run, AutoencoderConfig(), loss
    run = TrainConfig(
        data_path, image_size=32, random_crop=False, epochs=80, batch_size=128, lr=1e-3, min_lr=1e-5, warmup_steps=200,
        decay_start=200, weight_decay=0.0, ema=0.999, save_every=0, save_minutes=5.0, preview_every=2000,
    )  # fmt: skip
    depths = (6, *[4] * 3, *[3] * 6, *[2] * 8, *[1] * 12)
    network = AutoencoderConfig(
        (96, 64), 2, 16, space_to_depth=4, split=2, bit_depths=depths, gray_code=True, linear=True
    )
    return run, network, AutoencoderLossConfig(entropy_weight=0.0, commitment_weight=0.0)


def recipe(release: ReleasedModel, data_path: pathlib.Path) -> tuple[TrainConfig, ModelSizes, LossConfig]:
    """Returns the settings that a released model was trained with, those of its command in the original's README."""
    run = TrainConfig(data_path, epochs=800, batch_size=1024, lr=6e-4, ema=0.9999, precision="bf16", keep_epochs=50)
    return run, ModelSizes.of(release.config), LossConfig(perturb_rate=release.perturb_rate)

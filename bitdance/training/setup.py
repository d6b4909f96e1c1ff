"""Whole training jobs, from a configuration to finished weights."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
import torch

from bitdance.config import (
    AutoencoderConfig,
    AutoencoderLossConfig,
    BitDanceConfig,
    LossConfig,
    ModelSizes,
    TrainConfig,
)
from bitdance.data.class_names import imagenet, numbered
from bitdance.data.images import ImageDataset, open_images
from bitdance.data.token_cache import TokenDataset, is_token_cache, names_digest
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World, init_distributed
from bitdance.training.estimate import print_estimate
from bitdance.training.loader import Loader
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.trainer import Run
from bitdance.weights import weights_file

# What may differ between the two halves of an interrupted run without changing its weights.
_FREE = (
    "data_path",
    "results_dir",
    "max_steps",
    "num_workers",
    "max_bad_images",
    "log_every",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "keep_epochs",
    "preview_every",
    "val_path",
    "val_every",
    "val_images",
    "eval_every",
    "eval_images",
    "eval_reference",
    "eval_inception",
    "eval_cfg_scale",
    "eval_steps",
    "max_skipped",
    "tensorboard",
    "wandb",
    "compile",
    "grad_checkpointing",
    "accumulate",
)


def train_autoencoder(
    run: TrainConfig, network: AutoencoderConfig, loss: AutoencoderLossConfig, device: str | None = None
) -> pathlib.Path:
    """Trains an autoencoder and returns the path of its weights.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        UserError: a setting does not fit, or a file cannot be read or written.
    """
    _check_image_size(run.image_size, network.down_size)
    if run.grad_checkpointing:
        raise UserError("--grad-checkpointing is not there for autoencoders: leave it out.")
    if run.eval_every:
        raise UserError(
            "--eval-every is not there for autoencoders: leave it out, and let `bitdance reconstruct` take the rFID of "
            "the weights."
        )
    if is_token_cache(run.data_path):
        raise UserError(f"{run.data_path} holds bits: an autoencoder is trained on the images themselves.")
    with init_distributed(device) as world:
        images = open_images(run.data_path)
        torch.manual_seed(run.global_seed)
        objective = AutoencoderLoss(Autoencoder(network), loss)
        return _prepare(objective, run, images, world, {"network": network, "loss": loss}).train()


def train_model(
    run: TrainConfig,
    sizes: ModelSizes,
    loss: LossConfig,
    autoencoder_path: pathlib.Path,
    device: str | None = None,
    expect_bits: int | None = None,
    expect_down_size: int | None = None,
    dry_run: bool = False,
) -> pathlib.Path | None:
    """Trains a BitDance model on the tokens of an autoencoder and returns the path of its weights.

    Args:
        expect_bits, expect_down_size: what the caller believes of the autoencoder, where it has a belief.
        dry_run: only print what the run will need (`bitdance.training.estimate`), and return None.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        UserError: a setting does not fit, or a file cannot be read or written.
    """
    contents = weights_file.read(autoencoder_path)
    autoencoder = weights_file.load_autoencoder(contents)
    for flag, expected, found in (
        ("--latent-dim", expect_bits, autoencoder.config.bits),
        ("--down-size", expect_down_size, autoencoder.config.down_size),
    ):
        if expected not in (None, found):
            raise UserError(f"{flag} {expected} contradicts {autoencoder_path}, which has {found}: leave the flag out.")
    _check_image_size(run.image_size, autoencoder.config.down_size)
    digest = weights_file.digest(contents.states["autoencoder"])
    del contents  # what the file holds, which is in memory a second time
    with init_distributed(device) as world:
        images = TokenDataset(run.data_path) if is_token_cache(run.data_path) else open_images(run.data_path)
        if isinstance(images, TokenDataset):
            images.check(digest, run.image_size)
        config = _model_config(sizes, autoencoder.config, run.image_size, images)
        present = len(np.unique(images.labels))
        if present < config.num_classes and world.is_main:
            print(
                f"bitdance: warning: {images.path} has images of {present} classes only, and the model "
                f"{config.num_classes}: it learns nothing about the others.",
                file=sys.stderr,
            )
        torch.manual_seed(run.global_seed)
        network = BitDance(config, sizes.drop_rate, run.grad_checkpointing)
        objective = BitDanceLoss(network, autoencoder, loss, run.global_seed)
        job = _prepare(objective, run, images, world, {"model": config, "loss": loss, "autoencoder": digest})
        if dry_run:
            print_estimate(job)
            return None
        return job.train()


def _model_config(
    sizes: ModelSizes, autoencoder: AutoencoderConfig, image_size: int, images: ImageDataset | TokenDataset
) -> BitDanceConfig:
    """The model's configuration: its sizes, and what follows from the autoencoder and the images."""
    num_classes = sizes.num_classes or len(images.classes)
    if len(images.classes) > num_classes:
        reason = ", ImageNet's, whose ids its folders have" if images.classes == imagenet().wordnet_ids else ""
        raise UserError(
            f"{images.path} has {len(images.classes)} classes{reason}, more than --num-classes {num_classes}: raise it "
            "to that."
        )
    own = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    own = {name: value for name, value in own.items() if name not in ("num_classes", "drop_rate")}
    return BitDanceConfig(
        **own,
        grid=image_size // autoencoder.down_size,
        bits=autoencoder.bits,
        num_classes=num_classes,
        class_names=(*images.classes, *map(numbered(num_classes).label, range(len(images.classes), num_classes))),
    )


def _check_image_size(image_size: int, down_size: int) -> None:
    if image_size % down_size:
        raise UserError(
            f"--image-size {image_size} does not fit the autoencoder: it must be a multiple of {down_size}."
        )


def _prepare(
    objective: AutoencoderLoss | BitDanceLoss,
    run: TrainConfig,
    images: ImageDataset | TokenDataset,
    world: World,
    parts: dict[str, Any],
) -> Run:
    identity = {
        f"{name}.{key}": value
        for name, part in {"run": run, **parts}.items()
        for key, value in ({"digest": part} if isinstance(part, str) else dataclasses.asdict(part)).items()
        if not (name == "run" and key in _FREE)
    }
    identity["images"] = (
        f"{len(images)} stored as {images.digest[:16]}"
        if isinstance(images, TokenDataset)
        else f"{len(images)} named {names_digest(images)[:16]}"
    )
    return Run(objective, run, Loader(images, run, world), world, identity)

"""Training runs from their settings to finished weights."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys

import numpy as np
import torch
from torch import Tensor

from bitdance.config import AutoencoderConfig, BitDanceConfig, ModelSizes
from bitdance.data.class_names import imagenet, numbered
from bitdance.data.crops import center_crop, normalize, to_array
from bitdance.data.image_dataset import ImageDataset, print_summary
from bitdance.data.images import open_images
from bitdance.data.token_cache import TokenDataset, is_token_cache
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError, counted, one_line
from bitdance.runtime.process_group import World, init_distributed
from bitdance.runtime.run_folder import check_apart
from bitdance.training.estimate import print_estimate
from bitdance.training.evaluation import map_labels
from bitdance.training.initialization import initialize_autoencoder, initialize_model
from bitdance.training.loader import Loader, open_data
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.perceptual import load_perceptual_loss
from bitdance.training.principal_components import initialize_linear
from bitdance.training.train_config import AutoencoderLossConfig, InitPart, LossConfig, TrainConfig
from bitdance.training.trainer import DataInfo, Trainer
from bitdance.weights import weights_file
from bitdance.weights.resolve import DEMO_MODELS, find_weights, list_checkpoints

LINEAR_PIXELS = 2**23
"""Pixels from which the linear transform of an autoencoder is initialized, those of 8,192 images of 32 px."""


def train_autoencoder(
    config: TrainConfig,
    network: AutoencoderConfig,
    loss: AutoencoderLossConfig,
    device: str | None = None,
    threads: int | None = None,
    *,
    init_from: str | None = None,
    init_part: InitPart = "all",
    dry_run: bool = False,
    command: str | None = None,
) -> pathlib.Path | None:
    """Trains an autoencoder and returns the path of its weights.

    Args:
        config, network, loss: settings.
        device, threads: by default a GPU if there is one, and all cores.
        init_from: name or file of an autoencoder whose weights a new run starts with.
        init_part: whether these are the weights of `all` or only of the `decoder`.
        dry_run: only print what the run will need, and return None.
        command: recorded in the settings of the run.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        UserError: a setting is out of range, or a file cannot be read or written.
    """
    check_apart(config.output, config.data_path, config.val_path)
    if init_part != "all" and init_from is None:
        raise UserError("`init_part` goes with `init_from`, the autoencoder to start from: add it.")
    if loss.decoder_only and init_from is None and not list_checkpoints(config.output):
        raise UserError("`decoder_only` needs `init_from`, the autoencoder whose encoder is kept: add it.")
    if loss.decoder_only and init_part != "all":
        raise UserError("`decoder_only` keeps the encoder of `init_from`: leave `init_part` out.")
    network.grid(config.image_size)
    if config.grad_checkpointing:
        raise UserError("`grad_checkpointing` is not available for autoencoders: leave it out.")
    if loss.adversarial_weight and config.image_size < 3 * 2**loss.discriminator_layers:
        least = f"with discriminator_layers={loss.discriminator_layers} at least {3 * 2**loss.discriminator_layers}"
        raise UserError(f"image_size={config.image_size} is invalid: {least}; lower `discriminator_layers`.")
    if network.bit_depths and (loss.commitment_weight or loss.entropy_weight):
        raise UserError(
            "`bit_depths` needs commitment_weight=0 and entropy_weight=0: these terms would enlarge the small numbers "
            "whose signs are the lower bits."
        )
    if config.eval_every and config.val_path is None:
        raise UserError("`eval_every` of an autoencoder needs held-out images: name them with `val_path`.")
    if is_token_cache(config.data_path):
        raise UserError(f"{config.data_path} is a token cache: an autoencoder is trained on images.")
    with init_distributed(device, threads) as world:
        images = open_images(config.data_path)
        config = _with_held_out(config, images, world)
        perceptual = None
        if loss.perceptual_weight:
            perceptual = load_perceptual_loss(loss.perceptual_network, loss.lpips_folder, world.device)
        torch.manual_seed(config.seed)
        objective = AutoencoderLoss(Autoencoder(network), loss, perceptual)
        if list_checkpoints(config.output):
            if init_from is not None and world.is_main:
                print(
                    f"bitdance: {config.output} is continued from its checkpoint, not from {init_from}.",
                    file=sys.stderr,
                )
        else:
            if network.linear and (init_from is None or init_part == "decoder") and not dry_run:
                limit = max(2, LINEAR_PIXELS // config.image_size**2)
                initialize_linear(objective.network, _read_views(images, config.image_size, limit))
            if init_from is not None:
                initialize_autoencoder(objective.network, init_from, init_part, loss.decoder_only)
        objective.network.encoder.requires_grad_(not loss.decoder_only)
        data = DataInfo(len(images), images.digest)
        trainer = Trainer(objective, config, Loader(images, config, world), world, data, command=command)
        if dry_run:
            print_estimate(trainer)
            return None
        return trainer.train()


def train_model(
    config: TrainConfig,
    sizes: ModelSizes,
    loss: LossConfig,
    autoencoder: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    init_from: str | None = None,
    expected_bits: int | None = None,
    expected_down_size: int | None = None,
    dry_run: bool = False,
    command: str | None = None,
) -> pathlib.Path | None:
    """Trains a BitDance model on the tokens of an autoencoder and returns the path of its weights.

    Args:
        config, sizes, loss: settings.
        autoencoder: name or file of the autoencoder, see `bitdance.weights.resolve.find_weights`.
        device, threads: by default a GPU if there is one, and all cores.
        init_from: name or file of a model whose weights a new run starts with, see `initialize_model`.
        expected_bits, expected_down_size: of the autoencoder, checked if given.
        dry_run: only print what the run will need, and return None.
        command: recorded in the settings of the run.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        UserError: a setting is out of range, or a file cannot be read or written.
    """
    contents = weights_file.read(find_weights(autoencoder, "autoencoder"))
    tokenizer = weights_file.load_autoencoder(contents)
    for name, expected, found in (
        ("latent_dim", expected_bits, tokenizer.config.bits),
        ("down_size", expected_down_size, tokenizer.config.down_size),
    ):
        if expected not in (None, found):
            raise UserError(f"{name}={expected} contradicts {contents.path}, which has {found}: leave it out.")
    tokenizer.config.grid(config.image_size)
    digest = weights_file.tokenizer_digest(contents)
    del contents  # holds the tensors a second time
    check_apart(config.output, config.data_path, config.val_path)
    with init_distributed(device, threads) as world:
        images = open_data(config.data_path, digest, config.image_size)
        config = _with_held_out(config, images, world)
        loader = Loader(images, config, world)  # checks the batch size before a large network is made
        model_config = _complete_sizes(sizes, tokenizer.config, config.image_size, images)
        present = len(np.unique(images.labels))
        if present < model_config.num_classes and world.is_main:
            seen = f"{images.path} has images of {counted(present, 'class')}, and the model {model_config.num_classes}"
            print(f"bitdance: warning: {seen}: the other classes are not trained.", file=sys.stderr)
        torch.manual_seed(config.seed)
        network = BitDance(model_config, loss.drop_rate, config.grad_checkpointing)
        if init_from is not None and not list_checkpoints(config.output):
            start = initialize_model(network, init_from)
            if world.is_main:
                print(f"bitdance: {config.output} {start}.", file=sys.stderr)
        objective = BitDanceLoss(network, tokenizer, loss, config.seed)
        data = DataInfo(len(images), images.digest, digest)
        name = _recorded_name(autoencoder)
        trainer = Trainer(objective, config, loader, world, data, name, command)
        if dry_run:
            print_estimate(trainer)
            return None
        return trainer.train()


def _with_held_out(config: TrainConfig, images: ImageDataset | TokenDataset, world: World) -> TrainConfig:
    """Says what was found, and returns the settings with the held-out images beside the training images, if any.

    They are left out if they do not fit, since nobody has named them.
    """
    held_out = None
    if world.is_main:
        print_summary(images.summary)
    if config.val_path is None and isinstance(images, ImageDataset) and images.held_out is not None:
        held_out = images.held_out
        try:
            found = open_images(held_out)
            map_labels(found, images.classes)
            if len(found) < world.size:
                raise UserError(f"{held_out} holds fewer images than there are processes.")
            message = found.summary
        except UserError as error:
            held_out, message = None, f"warning: no held-out images are used: {error}"
        if world.is_main:
            print(f"bitdance: {one_line(message)}", file=sys.stderr)
    return dataclasses.replace(config, val_path=held_out) if held_out else config


def _read_views(images: ImageDataset, size: int, limit: int) -> Tensor:
    """Returns at most `limit` images, evenly spaced: (N, 3, size, size) in [-1, 1]. Training names unreadable ones."""
    views: list[np.ndarray] = []
    for index in np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int):
        with contextlib.suppress(UserError):
            views.append(to_array(center_crop(images.read(int(index)), size)))
    if len(views) < 2:
        raise UserError(f"{images.path} has fewer than two images that can be read: add some.")
    return normalize(torch.from_numpy(np.stack(views)))


def _recorded_name(autoencoder: str | os.PathLike[str]) -> str:
    """Returns what the settings record: a path as an absolute one, so that the model can be sampled from anywhere."""
    text = os.fspath(autoencoder)
    path = pathlib.Path(os.path.expanduser(text))
    return os.path.abspath(path) if text not in DEMO_MODELS and path.exists() else text


def _complete_sizes(
    sizes: ModelSizes, autoencoder: AutoencoderConfig, image_size: int, images: ImageDataset | TokenDataset
) -> BitDanceConfig:
    num_classes = sizes.num_classes or len(images.classes)
    count = len(images.classes)
    if count > num_classes:
        reason = ", ImageNet's, whose ids its folders have" if images.classes == imagenet().wordnet_ids else ""
        raise UserError(f"{images.path} has {count} classes{reason}, more than num_classes={num_classes}: raise it.")
    names = (*images.classes, *map(numbered(num_classes).label, range(count, num_classes)))
    others = {"grid": autoencoder.grid(image_size), "bits": autoencoder.bits}
    return BitDanceConfig(**{**vars(sizes), **others, "num_classes": num_classes, "class_names": names})

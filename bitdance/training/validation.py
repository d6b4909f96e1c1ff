"""The loss on held-out data: always the same images, views, times and noise, so that its curve shows the network."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from bitdance.config import TrainConfig
from bitdance.data.images import ImageDataset, open_images
from bitdance.data.token_cache import TokenDataset, is_token_cache
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.loader import Loader
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.transfer import to_device

_LAST_STEP = 2**32 - 1
"""Draws are those of steps that no training reaches, counted down from here."""


class Validation:
    """Held-out batches and how to look at them; made by all processes together.

    Each batch is shared out like a batch of training, so the loss does not depend on the number of processes. Crops are
    from the centre, no class is dropped and no bit flipped.

    Args:
        objective: of the run.
        classes: of the training images, by which labels are numbered.
        autoencoder: digest of the autoencoder under the model, by which a store of bits is recognised.

    Raises:
        UserError: the images cannot be read, are too few for the processes, or of a class that is not trained on.
    """

    def __init__(
        self,
        objective: AutoencoderLoss | BitDanceLoss,
        config: TrainConfig,
        classes: tuple[str, ...],
        world: World,
        autoencoder: str | None = None,
    ) -> None:
        assert config.val_path is not None
        same = config.val_path.resolve() == config.data_path.resolve()
        images: ImageDataset | TokenDataset
        if is_token_cache(config.val_path):
            if autoencoder is None:
                raise UserError(f"--val-path {config.val_path} holds bits: an autoencoder is validated on images.")
            images = TokenDataset(config.val_path)
            images.check(autoencoder, config.image_size)
        else:
            images = open_images(config.val_path, "test" if same else "train")
        if isinstance(objective, BitDanceLoss):
            _renumber(images, classes)
        size = min(config.global_batch_size, len(images) // world.size * world.size)
        if size == 0:
            raise UserError(
                f"{images.path} holds {len(images)} images, fewer than the {world.size} processes: add some."
            )
        settings = dataclasses.replace(config, global_batch_size=size, random_crop=False)
        self.batches = Loader(images, settings, world)
        self.count = min(self.batches.steps_per_epoch, -(-config.val_images // size))
        self.world = world
        self._objective = copy.copy(objective)
        if isinstance(self._objective, BitDanceLoss):
            self._objective.config = dataclasses.replace(self._objective.config, class_dropout=0.0, perturb_rate=0.0)

    @torch.no_grad()
    def loss(self) -> Tensor:
        """The mean loss of the network as it is, a scalar on the device, the same in all processes."""
        losses = []
        for number, batch in enumerate(self.batches.stream(0, self.count)):
            moved = to_device(batch, self.world.device)
            loss, _ = self._objective.forward(moved.inputs, moved.labels, moved.rows, _LAST_STEP - number)
            losses.append(loss)
        return self.world.mean(torch.stack(losses).float().mean())


def _renumber(images: ImageDataset | TokenDataset, classes: tuple[str, ...]) -> None:
    """Gives the labels of a set the numbers that its classes have in training."""
    if unknown := [name for name in images.classes if name not in classes]:
        raise UserError(
            f"--val-path {images.path} has the class {unknown[0]!r}, which the training images do not have: the class "
            "folders must have the names of those."
        )
    images.labels = np.array([classes.index(name) for name in images.classes], np.int64)[images.labels]

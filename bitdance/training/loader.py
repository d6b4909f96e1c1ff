"""Batches of images or cached tokens: image, crop and index are functions of (seed, epoch, image).

The same step therefore sees the same images on any number of processes, and a resumed run continues identically.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import pathlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.config import Split
from bitdance.data.bad_images import BadImages
from bitdance.data.crops import center_crop, horizontal_flip, random_crop, to_array
from bitdance.data.decoding import one_image
from bitdance.data.image_dataset import ImageDataset
from bitdance.data.images import open_images
from bitdance.data.prefetch import read_ahead
from bitdance.data.token_cache import TokenDataset, is_token_cache
from bitdance.models import philox
from bitdance.runtime.errors import UserError, counted
from bitdance.runtime.process_group import World
from bitdance.training.train_config import TrainConfig

CACHE_BYTES = 1 << 30
"""Memory for decoded small images."""


class Batch(NamedTuple):
    """One process's part of a global batch.

    Attributes:
        inputs: images (B, H, W, 3) uint8, or packed bits (B, N, C / 8) uint8 with the tokens in raster order.
        labels: (B,) int64.
        indices: (B,) int64, indices in the global batch.
    """

    inputs: Tensor
    labels: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Batch:
        """Moves the batch to a device, on a GPU without waiting for it."""

        def move(value: Tensor) -> Tensor:
            # From memory that is not pinned, the copy would wait for all work submitted to the GPU.
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(*map(move, self))

    def split_microbatches(self, count: int) -> Iterator[Batch]:
        """Yields `count` equal parts of the batch, in order."""
        for chunks in zip(*(value.chunk(count) for value in self), strict=True):
            yield Batch(*chunks)


def open_data(
    path: pathlib.Path, autoencoder: str | None, image_size: int, split: Split = "train"
) -> ImageDataset | TokenDataset:
    """Opens images, or for a model a token cache, which must be of its autoencoder (a digest) and image size.

    Raises:
        UserError: there are no images, or the token cache does not fit.
    """
    if autoencoder is None or not is_token_cache(path):
        return open_images(path, split)
    tokens = TokenDataset(path)
    tokens.check(autoencoder, image_size)
    return tokens


def check_batch_size(images: ImageDataset | TokenDataset, batch_size: int) -> None:
    """Raises a `UserError` if there are fewer images than one batch."""
    if len(images) < batch_size:
        held = f"{images.path} holds {counted(len(images), 'image')}"
        raise UserError(f"{held}, fewer than one batch of batch_size={batch_size}: lower it or add images.")


class Loader:
    """The global batches of a run, split evenly over the processes.

    An unreadable image is replaced by the next readable one in the epoch's order, so which images a step sees depends
    on nothing but the images, the seed and the step.

    Raises:
        UserError: the global batch cannot be split, or there are fewer images than one batch.
    """

    def __init__(self, images: ImageDataset | TokenDataset, config: TrainConfig, world: World) -> None:
        size = f"batch_size={config.batch_size}"
        if config.batch_size % world.size:
            raise UserError(f"{size} cannot be split over {world.size} processes: make it a multiple of their number.")
        check_batch_size(images, config.batch_size)
        self.images, self.config = images, config
        self.steps_per_epoch = len(images) // config.batch_size
        local = config.batch_size // world.size
        self.indices = torch.arange(world.rank * local, (world.rank + 1) * local)
        # Batches are read ahead across the end of an epoch.
        self._cached_draws = functools.lru_cache(2)(self._compute_draws)
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self.bad_images = BadImages(config.max_bad_images, images if isinstance(images, ImageDataset) else None)

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the images in an epoch, (N,), and five uniform numbers per image, (N, 5)."""
        with self._lock:  # or all threads would compute them
            return self._cached_draws(epoch)

    def _compute_draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        ids, seed = torch.arange(len(self.images)), self.config.seed
        keys = philox.words(seed, ids, 4, stream=philox.TRAIN_ORDER, step=epoch)[0].numpy()
        crops = philox.uniform(seed, ids, 5, stream=philox.TRAIN_CROP, step=epoch)[0].numpy()
        # Two words per key, since among a million images single words collide.
        return np.lexsort((keys[:, 1], keys[:, 0])), crops

    def load(self, step: int) -> Batch:
        """Reads this process's part of a step's batch."""
        return self._collate(self._read(step, slice(None)))

    def _collate(self, items: list[tuple[np.ndarray, int]]) -> Batch:
        inputs, labels = zip(*items, strict=True)
        return Batch(torch.from_numpy(np.stack(inputs)), torch.tensor(labels), self.indices)

    def _read(self, step: int, part: slice) -> list[tuple[np.ndarray, int]]:
        """Reads inputs and labels of a part of this process's indices."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order, draws = self._draws(epoch)
        crop_probability = random_crop_probability(self.config, epoch)
        items = []
        for position in (batch * self.config.batch_size + self.indices[part]).tolist():
            # The image at this position, or the next readable one.
            for index in itertools.chain(order[position:], order[:position]):
                view = self._view(int(index), draws[index], crop_probability)
                if view is not None:
                    items.append((view, int(self.images.labels[index])))
                    break
            else:
                raise UserError(f"no image of {self.images.path} can be read: repair them.")
        return items

    @one_image()
    def _view(self, index: int, draws: np.ndarray, crop_probability: float) -> np.ndarray | None:
        """Returns a view of an image, None if it is unreadable."""
        is_random = draws[0] < crop_probability
        if isinstance(self.images, TokenDataset):
            crops, flips = self.images.info.crops, self.images.info.flips
            crop = 1 + int(float(draws[1]) * (crops - 1)) if crops > 1 and is_random else 0
            return self.images.read(index, crop, int(flips and draws[4] < 0.5))
        if index in self.bad_images:
            return None
        try:
            image = Image.fromarray(self._pixels(self.images, index))
        except UserError as error:
            self.bad_images.add(index, error)
            return None
        size = self.config.image_size
        x, y, z = map(float, draws[1:4])
        image = random_crop(image, size, (x, y, z)) if is_random else center_crop(image, size)
        return to_array(horizontal_flip(image) if draws[4] < 0.5 else image)

    def _pixels(self, images: ImageDataset, index: int) -> np.ndarray:
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = to_array(images.read(index))
            with self._lock:
                # Small images are decoded once: decoding would take longer than training on them.
                if max(pixels.shape) <= 64 and self._cached_bytes + pixels.nbytes <= CACHE_BYTES:
                    self._cache[index] = pixels
                    self._cached_bytes += pixels.nbytes
        return pixels

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps start..stop-1, each read by `num_workers` threads, some steps ahead."""
        local = len(self.indices)
        size = -(-local // self.config.num_workers)
        parts = [slice(first, first + size) for first in range(0, local, size)]
        with concurrent.futures.ThreadPoolExecutor(self.config.num_workers) as pool:

            def submit(step: int) -> list[concurrent.futures.Future[list[tuple[np.ndarray, int]]]]:
                return [pool.submit(self._read, step, part) for part in parts]

            for _, items in read_ahead(range(start, stop), submit):
                yield self._collate(list(itertools.chain.from_iterable(items)))


def random_crop_probability(config: TrainConfig, epoch: int) -> float:
    """Returns the fraction of random crops in an epoch; the other images get a centre crop.

    It decreases linearly from 1 at `aug_decay_start_epoch` to 0 at `aug_decay_end_epoch`. With a negative start, or an
    end that is not after it, it stays 1.
    """
    start, end = config.aug_decay_start_epoch, config.aug_decay_end_epoch
    if not config.random_crop:
        return 0.0
    if start < 0 or end <= start:
        return 1.0
    return min(1.0, max(0.0, 1.0 - (epoch - start) / (end - start)))

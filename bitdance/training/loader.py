"""Batches of images or of stored bits: which image, which crop, in which place, functions of (seed, epoch, image).

So the same step sees the same images on any number of processes, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance.config import TrainConfig
from bitdance.data.bad_images import BadImages
from bitdance.data.crops import center_crop, horizontal_flip, random_crop, to_array
from bitdance.data.images import ImageDataset
from bitdance.data.prefetch import PREFETCH, read_ahead
from bitdance.data.token_cache import TokenDataset
from bitdance.models import philox
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.training.schedule import random_crop_share

CACHE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    Attributes:
        inputs: images (B, H, W, 3) uint8, or packed bits (B, N, C / 8) uint8 with the tokens in raster order.
        labels: (B,) int64.
        rows: (B,) int64, places in the global batch.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor


class Loader:
    """The global batches of a run, cut into equal parts for its processes.

    An image that cannot be read gives its place to the next one in the epoch's order that can, so which images a step
    sees still depends on nothing but the images, the seed and the step.

    Raises:
        UserError: the global batch cannot be shared out, or there are fewer images than one batch.
    """

    def __init__(self, images: ImageDataset | TokenDataset, config: TrainConfig, world: World) -> None:
        if config.global_batch_size % world.size:
            raise UserError(
                f"--global-batch-size {config.global_batch_size} cannot be shared out among {world.size} processes: "
                "make it a multiple of their number."
            )
        if len(images) < config.global_batch_size:
            raise UserError(
                f"{images.path} holds {len(images)} images, fewer than one batch of {config.global_batch_size}: "
                "lower --global-batch-size or add images."
            )
        self.images, self.config = images, config
        self.steps_per_epoch = len(images) // config.global_batch_size
        local = config.global_batch_size // world.size
        self.places = torch.arange(world.rank * local, (world.rank + 1) * local)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self.bad_images = BadImages(config.max_bad_images)

    def indices(self, step: int) -> Tensor:
        """Which images this process sees in a step, if none of them is bad: (B,) int64."""
        order, _ = self._draws(step // self.steps_per_epoch)
        start = (step % self.steps_per_epoch) * self.config.global_batch_size
        return torch.from_numpy(order[start + self.places.numpy()])

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the images in an epoch, (N,), and the five crop numbers of each image, (N, 5)."""
        with self._lock:
            if epoch not in self._epochs:
                rows, seed = torch.arange(len(self.images)), self.config.global_seed
                keys = philox.words(seed, rows, 4, stream=philox.TRAIN_ORDER, step=epoch)[0].numpy()
                crops = philox.uniform(seed, rows, 5, stream=philox.TRAIN_CROP, step=epoch)[0].numpy()
                # Two words a key, since among a million images single words collide; the sort is by the first word.
                self._epochs[epoch] = np.lexsort((keys[:, 1], keys[:, 0])), crops
                if len(self._epochs) > 2:  # batches are read ahead across the border of two epochs
                    # The one made first, not the smallest number: of a tiny set three epochs are read at a time, and
                    # the smallest may be the one that was just asked for.
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[epoch]

    def load(self, step: int) -> Batch:
        """Reads and crops this process's part of a step's batch."""
        return self._batch([self._read(step, slice(None))])

    def _read(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Inputs of the batch and their labels, for a part of this process's places."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order, draws = self._draws(epoch)
        share = random_crop_share(self.config, epoch) if self.config.random_crop else 0.0
        first = place * self.config.global_batch_size
        inputs, labels = [], []
        for position in (first + self.places[part]).tolist():
            index, view = self._first_whole(position, order, draws, share)
            inputs.append(view)
            labels.append(self.images.labels[index])
        return np.stack(inputs), np.array(labels)

    def _first_whole(self, position: int, order: np.ndarray, draws: np.ndarray, share: float) -> tuple[int, np.ndarray]:
        """The image at a position of an epoch's order, or else the next that is readable, and its view."""
        for offset in range(len(order)):
            index = int(order[(position + offset) % len(order)])
            if isinstance(self.images, TokenDataset):
                return index, self._stored(self.images, index, draws[index], share)
            if index in self.bad_images:
                continue
            try:
                return index, self._crop(self.images, index, draws[index], share)
            except UserError as error:
                self.bad_images.add(index, error)
        raise UserError(f"not one image of {self.images.path} can be read: repair them.")

    def _batch(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        inputs, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        return Batch(inputs, labels, self.places)

    def _stored(self, bits: TokenDataset, index: int, draws: np.ndarray, share: float) -> np.ndarray:
        """A view of the store: a random crop where training on images would make one, as far as there are any."""
        others = bits.info.crops - 1
        crop = 1 + int(float(draws[1]) * others) if others and draws[0] < share else 0
        return bits.read(index, crop, int(bits.info.flips and draws[4] < 0.5))

    def _crop(self, images: ImageDataset, index: int, draws: np.ndarray, share: float) -> np.ndarray:
        size = self.config.image_size
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = to_array(images.read(index))
            with self._lock:
                # Small images are decoded once: decoding would cost more than training on them.
                if max(pixels.shape) <= 64 and self._cached_bytes + pixels.nbytes <= CACHE_BYTES:
                    self._cache[index] = pixels
                    self._cached_bytes += pixels.nbytes
        image = Image.fromarray(pixels)
        if draws[0] < share:
            image = random_crop(image, size, (float(draws[1]), float(draws[2]), float(draws[3])))
        else:
            image = center_crop(image, size)
        return to_array(horizontal_flip(image) if draws[4] < 0.5 else image)

    def stream(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start..stop-1, each read by `num_workers` threads, some steps ahead."""
        local = len(self.places)
        size = -(-local // self.config.num_workers)
        parts = [slice(first, first + size) for first in range(0, local, size)]
        with concurrent.futures.ThreadPoolExecutor(self.config.num_workers) as pool:

            def submit(step: int) -> list[concurrent.futures.Future[tuple[np.ndarray, np.ndarray]]]:
                return [pool.submit(self._read, step, part) for part in parts]

            for _, read in read_ahead(range(start, stop), submit, PREFETCH):
                yield self._batch(read)

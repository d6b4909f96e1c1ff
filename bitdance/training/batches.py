"""Batches of images: which image, which crop, in which place, each a function of (seed, epoch, image) or of the step.

So the same step sees the same images on any number of processes, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bitdance import noise
from bitdance.config import RunConfig
from bitdance.data.crops import center_crop, horizontal_flip, random_crop, to_array
from bitdance.data.images import ImageSet
from bitdance.distributed import World
from bitdance.errors import UserError
from bitdance.training.schedule import random_crop_share

CACHE_BYTES = 1 << 30
PREFETCH = 4


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's part of a global batch.

    Attributes:
        images: (B, H, W, 3) uint8.
        labels: (B,) int64.
        rows: (B,) int64, places in the global batch.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor


class Batches:
    """The global batches of a run, cut into equal parts for its processes.

    Raises:
        UserError: the global batch cannot be shared out, or there are fewer images than one batch.
    """

    def __init__(self, images: ImageSet, config: RunConfig, world: World) -> None:
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

    def indices(self, step: int) -> Tensor:
        """Which images this process sees in a step: (B,) int64."""
        order, _ = self._draws(step // self.steps_per_epoch)
        start = (step % self.steps_per_epoch) * self.config.global_batch_size
        return torch.from_numpy(order[start + self.places.numpy()])

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the images in an epoch, (N,), and the five crop numbers of each image, (N, 5)."""
        with self._lock:
            if epoch not in self._epochs:
                rows, seed = torch.arange(len(self.images)), self.config.global_seed
                keys = noise.words(seed, rows, 4, stream=noise.TRAIN_ORDER, step=epoch)[0].numpy()
                crops = noise.uniform(seed, rows, 5, stream=noise.TRAIN_CROP, step=epoch)[0].numpy()
                # Two words a key, since among a million images single words collide; the sort is by the first word.
                self._epochs[epoch] = np.lexsort((keys[:, 1], keys[:, 0])), crops
                if len(self._epochs) > 2:  # batches are read ahead across the border of two epochs
                    # The one made first, not the smallest number: of a tiny set three epochs are read at a time, and
                    # the smallest may be the one that was just asked for.
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[epoch]

    def load(self, step: int) -> Batch:
        """Reads and crops this process's part of a step's batch."""
        return self._batch(step, [self._pictures(step, slice(None))])

    def _pictures(self, step: int, part: slice) -> np.ndarray:
        epoch = step // self.steps_per_epoch
        _, crops = self._draws(epoch)
        share = random_crop_share(self.config, epoch) if self.config.random_crop else 0.0
        return np.stack([self._crop(i, crops[i], share) for i in self.indices(step)[part].tolist()])

    def _batch(self, step: int, pictures: list[np.ndarray]) -> Batch:
        labels = torch.from_numpy(self.images.labels[self.indices(step).numpy()])
        return Batch(torch.from_numpy(np.concatenate(pictures)), labels, self.places)

    def _crop(self, index: int, draws: np.ndarray, share: float) -> np.ndarray:
        size = self.config.image_size
        pixels = self._cache.get(index)
        if pixels is None:
            image = self.images.read(index)
            pixels = to_array(image)
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
            ahead: collections.deque[list[concurrent.futures.Future[np.ndarray]]] = collections.deque()
            try:
                for step in range(start, stop + PREFETCH):
                    if step < stop:
                        ahead.append([pool.submit(self._pictures, step, part) for part in parts])
                    if step >= start + PREFETCH:
                        yield self._batch(step - PREFETCH, [future.result() for future in ahead.popleft()])
            finally:
                for future in (future for futures in ahead for future in futures):
                    future.cancel()

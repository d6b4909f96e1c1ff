"""Images in batches: numbers and labels in, bytes out. What all kinds of sampling are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from bitdance.models import philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import pack
from bitdance.models.transformer import BitDance
from bitdance.runtime.errors import UserError
from bitdance.sampling.sampler import Denoise, SampleSettings, check_fit, decode_tokens, image_noise, sample_tokens


class SampleBatch(NamedTuple):
    """A batch of images.

    Attributes:
        pixels: (B, H, W, 3) uint8.
        bits: (B, N, C / 8) uint8, the tokens in their order, packed as by `bitdance.models.quantizer.pack`.
    """

    pixels: np.ndarray
    bits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model and its autoencoder on a device, ready to make images.

    Attributes:
        model, autoencoder: on the device, in the dtype to compute in.
        settings: of the sampler.
        seed: 0 <= seed < 2**32; with an image's number it determines the image's noise.
        chunk: images that the decoder takes at once; 0 for a whole batch.
        denoise: a compiled or captured form of the head network's `denoise`.
        report: told when a batch is too large for the memory of a GPU and is made in halves.
    """

    model: BitDance
    autoencoder: Autoencoder
    settings: SampleSettings
    seed: int
    chunk: int = 0
    report: Callable[[str], None] = print
    denoise: Denoise | None = None

    def __post_init__(self) -> None:
        check_fit(self.model, self.autoencoder)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is out of range: it must lie between 0 and {2**32 - 1}.")
        if self.chunk < 0:
            raise UserError(f"--chunk-size {self.chunk} does not fit: it must be at least 0 (a whole batch at once).")

    def images(
        self, numbers: Sequence[int], labels: Sequence[int], progress: Callable[[], None] = lambda: None
    ) -> SampleBatch:
        """One batch of images.

        Args:
            numbers: the images' numbers in the job, from which their noise follows.
            labels: their classes.
            progress: called after each AR step.
        """
        try:
            return self._images(numbers, labels, progress)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise
        # Out here the error is gone, and with it its frames, which hold all tensors of the failed try.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(numbers) // 2
        self.report(
            f"not enough memory for {len(numbers)} images at a time: {numbers[0]} to {numbers[-1]} are made in two "
            "halves, whose images can differ by rounding from those of a whole batch."
        )
        halves = [self.images(numbers[part], labels[part], progress) for part in (slice(half), slice(half, None))]
        return SampleBatch(*(np.concatenate(arrays) for arrays in zip(*halves, strict=True)))

    def _images(self, numbers: Sequence[int], labels: Sequence[int], progress: Callable[[], None]) -> SampleBatch:
        device = self.model.norm.weight.device
        rows = torch.tensor(numbers, dtype=torch.int64, device=device)
        classes = torch.tensor(labels, dtype=torch.int64, device=device)
        draw = image_noise(self.model, self.seed, rows, self.settings.num_draws)
        tokens = sample_tokens(self.model, classes, draw, self.settings, progress, self.denoise)
        pixels = decode_tokens(self.model, self.autoencoder, tokens, self.chunk)
        return SampleBatch(pixels.cpu().numpy(), pack(tokens).cpu().numpy())


LABELS = ("balanced", "random")
"""How a job chooses its classes."""


def make_labels(kind: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """The class of each image of a job, a function of the seed: (N,) int64.

    Args:
        kind: one of `LABELS`: `balanced_labels`, or each class drawn on its own.
    """
    if kind == "balanced":
        return balanced_labels(num_images, num_classes, seed)
    if kind != "random":
        raise UserError(f"labels cannot be {kind!r}: use {' or '.join(LABELS)}.")
    rows = torch.arange(num_images)
    drawn = philox.words(seed, rows, 1, stream=philox.SAMPLE_LABEL, step=0)[0, :, 0].numpy()
    return drawn * num_classes >> 32  # the words are uniform on [0, 2^32)


def balanced_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Labels with equal counts, a remainder spread over distinct classes, in a random order fixed by the seed.

    The Inception Score takes splits of consecutive images, so class order would give each split a few classes only.

    Returns:
        (N,) int64.
    """
    rows = torch.arange(num_images)
    keys = philox.words(seed, rows, 4, stream=philox.SAMPLE_ORDER, step=0)[0].numpy()
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    # A remainder takes classes a whole stride apart rather than the first few.
    whole, rest = divmod(num_images, num_classes)
    labels = np.repeat(np.arange(num_classes), whole)
    extra = np.arange(rest) * num_classes // max(rest, 1)
    return np.concatenate([labels, extra]).astype(np.int64)[order]


def cut(num_images: int, batch_size: int) -> Iterator[range]:
    """The fixed batches of a job, as ranges of image numbers; the last one may be shorter.

    Raises:
        UserError: a count is not positive.
    """
    if num_images < 1:
        raise UserError(f"{num_images} images cannot be made: ask for at least 1.")
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images does not exist: use at least 1.")
    for start in range(0, num_images, batch_size):
        yield range(start, min(start + batch_size, num_images))

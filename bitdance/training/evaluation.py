"""Figures of what a model makes while it is trained: always of the same classes and noise, so they show its weights."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from bitdance.config import TrainConfig
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.feature_set import extract_features
from bitdance.metrics.image_sources import ImageSource
from bitdance.metrics.references import FeatureExtractors, find_reference
from bitdance.metrics.report import HEADINGS, check_extractor, compute_metrics
from bitdance.runtime.process_group import World
from bitdance.sampling.pipeline import Generator, cut, make_labels
from bitdance.sampling.sampler import SampleSettings
from bitdance.training.losses import BitDanceLoss
from bitdance.training.throughput import Line, finite

LOGGED = {f"eval_{name}": HEADINGS[name] for name in ("fid", "inception_score", "precision", "recall")}
"""The figures in a line of the log, and what people call them."""
LARGEST_BATCH = 32
"""Images at a time: few enough to fit beside a training; of any number of processes the same, since shapes decide the
last digits."""
SEED = 0


class Samples(ImageSource):
    """Images that a model makes when they are asked for.

    Args:
        labels: (N,) int64, the class of each.
        in_bf16: whether matrix products are.
    """

    def __init__(self, generator: Generator, labels: np.ndarray, image_size: int, in_bf16: bool) -> None:
        self.path, self.labels = pathlib.Path("samples"), labels
        self.shape, self.dtype = (len(labels), image_size, image_size, 3), np.dtype(np.uint8)
        self._generator, self._in_bf16 = generator, in_bf16

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        assert self.labels is not None
        device = self._generator.model.norm.weight.device.type
        for number, images in enumerate(cut(len(self), size)):
            if number % ranks == rank:
                # Here and not around it all: blocks are asked for in a thread, and autocast is a thread's own.
                with torch.autocast(device, torch.bfloat16, enabled=self._in_bf16):
                    made = self._generator.images(images, self.labels[images.start : images.stop].tolist())
                yield number, made.pixels


class Evaluation:
    """A reference and how to compare with it; made by all processes together.

    Args:
        objective: of the run, on its device.
        labels: of the training images: images are made of the classes that occur, in equal numbers.
        in_bf16: whether the run computes matrix products in bf16.

    Raises:
        UserError: the reference or the Inception network is not there, or they do not belong together.
    """

    def __init__(
        self, objective: BitDanceLoss, config: TrainConfig, labels: np.ndarray, world: World, in_bf16: bool
    ) -> None:
        settings = SampleSettings(config.eval_steps, config.eval_cfg_scale)
        generator = Generator(objective.network, objective.autoencoder, settings, SEED)
        classes = np.unique(labels)
        chosen = classes[make_labels("balanced", config.eval_images, len(classes), SEED)]
        self._samples = Samples(generator, chosen, config.image_size, in_bf16)
        self._batch_size = min(config.global_batch_size, LARGEST_BATCH)
        self._world = world
        wanted = EvaluationConfig(reference=config.eval_reference, inception_weights=config.eval_inception)
        networks = FeatureExtractors(wanted, world)
        self._network = networks()[0]
        found = find_reference(wanted, config.image_size, networks, world)
        self._reference = next(iter(found.values())) if found else None
        if self._reference is not None:
            check_extractor(self._network.name, self._network.digest, self._reference)

    def figures(self) -> Line:
        """Of the network as it is: those that are `LOGGED` and that the reference allows, in the first process."""
        sets = extract_features(self._samples, [self._network], self._world, self._batch_size, progress="evaluating")
        if not sets:
            return {}
        found = {f"eval_{name}": value for name, value in compute_metrics(sets[0], self._reference).items()}
        return {name: finite(found[name]) for name in LOGGED if name in found}


def said(line: Mapping[str, float | None]) -> str:
    """The figures of a line of the log, for people; empty where it has none."""
    found = {heading: line.get(name) for name, heading in LOGGED.items()}
    return ", ".join(f"{heading} {value:.4g}" for heading, value in found.items() if value is not None)

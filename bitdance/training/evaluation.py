"""Evaluation during training: the loss on held-out images, and metrics (FID and others) of samples.

Images, crops, timesteps and noise are always the same, so that the curves show the network.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from bitdance.config import SamplingDefaults, Split
from bitdance.data.crops import normalize
from bitdance.data.image_dataset import ImageDataset, NamedImages
from bitdance.data.token_cache import TokenDataset, is_token_cache
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.feature_set import extract_features
from bitdance.metrics.image_sources import ImageSource, open_source
from bitdance.metrics.inception import NAME as INCEPTION
from bitdance.metrics.psnr_ssim import psnr, ssim
from bitdance.metrics.references import FeatureExtractors, find_reference
from bitdance.metrics.report import HEADINGS, check_extractor, compute_metrics
from bitdance.models.autoencoder import Autoencoder, to_uint8
from bitdance.runtime.errors import UserError, counted
from bitdance.runtime.process_group import World
from bitdance.sampling.labels import make_labels
from bitdance.sampling.pipeline import Pipeline, split_batches
from bitdance.sampling.sampler import SamplingConfig, complete_config
from bitdance.training.loader import Loader, open_data
from bitdance.training.logging import Metrics, finite
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.train_config import TrainConfig

VALIDATION_STEP = 2**32 - 1
"""Random numbers of validation are those of steps that no training reaches, counted down from here."""

LOGGED = {f"eval_{name}": HEADINGS[name] for name in ("fid", "inception_score", "precision", "recall", "accuracy")}
LOGGED["eval_frechet_distance"] = "Fréchet distance"
"""Metrics in a line of the log, and their titles; the Fréchet distance is that of another extractor than Inception."""

GPU_BATCH_SIZE, CPU_BATCH_SIZE = 128, 32
"""Samples at once: few enough to fit beside most trainings, and fixed, since shapes change the last digits."""
CHUNK_SIZE = 32
"""Images decoded at once."""


class Validation:
    """The loss on held-out images; constructed by all processes together.

    Each batch is split over the processes as in training. Images are cropped at the centre, no class is dropped and no
    bit flipped.

    Args:
        objective: the loss of the run.
        config: of the run, with `val_path`.
        classes: of the training images, which define the labels.
        world: the processes.
        autoencoder: of a model, its autoencoder's `weights_file.tokenizer_digest`, to check a token cache.

    Raises:
        UserError: the images cannot be read, are fewer than the processes, or have a class that is not trained on.
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
        if autoencoder is None and is_token_cache(config.val_path):
            raise UserError(f"val_path={config.val_path} is a token cache: an autoencoder is validated on images.")
        images = open_data(config.val_path, autoencoder, config.image_size, held_out_split(config))
        self._objective = copy.copy(objective)
        if isinstance(objective, AutoencoderLoss):  # without the discriminator, whose loss is no measure of the network
            config_without = dataclasses.replace(objective.config, adversarial_weight=0.0)
            self._objective = AutoencoderLoss(objective.network, config_without, objective.perceptual)
        if isinstance(self._objective, BitDanceLoss):
            map_labels(images, classes)
            self._objective.config = dataclasses.replace(self._objective.config, class_dropout=0.0, perturb_rate=0.0)
        size = min(config.batch_size, len(images) // world.size * world.size)
        if size == 0:
            raise UserError(
                f"{images.path} holds {counted(len(images), 'image')}, fewer than the {world.size} processes."
            )
        self.loader = Loader(images, dataclasses.replace(config, batch_size=size, random_crop=False), world)
        self.steps = min(self.loader.steps_per_epoch, -(-config.val_images // size))
        self.world = world

    @torch.no_grad()
    def metrics(self) -> Metrics:
        """Returns means with the network's current weights, the same in all processes.

        They are `val_loss`, and of an autoencoder also `val_psnr` in dB, `val_ssim`, and with a perceptual term
        `val_perceptual`.
        """
        rows = []
        for number, batch in enumerate(self.loader.stream(0, self.steps)):
            batch = batch.to(self.world.device)
            loss, metrics = self._objective.forward(*batch, VALIDATION_STEP - number)
            row = {"val_loss": loss}
            if isinstance(self._objective, AutoencoderLoss):
                decoded = reconstruct(self._objective.network, batch.inputs)
                row |= {"val_psnr": psnr(batch.inputs, decoded).mean(), "val_ssim": ssim(batch.inputs, decoded).mean()}
                row |= {"val_perceptual": metrics["perceptual"]} if "perceptual" in metrics else {}
            rows.append(row)
        means = torch.stack([torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]])
        return dict(zip(rows[0], map(finite, self.world.mean(means).tolist()), strict=True))


def held_out_split(config: TrainConfig) -> Split:
    """Returns which part of `val_path` is held out: of an archive that is also trained on, its test images."""
    same = config.val_path is not None and config.val_path.resolve() == config.data_path.resolve()
    return "test" if same else "train"


def reconstruct(network: Autoencoder, images: Tensor) -> Tensor:
    """Encodes and decodes images (B, H, W, 3) uint8."""
    return to_uint8(network.decode(network.encode(normalize(images))))


def map_labels(images: ImageDataset | TokenDataset, classes: tuple[str, ...]) -> None:
    """Replaces labels by those that the same classes have in training.

    Raises:
        UserError: a class is not there.
    """
    if len(classes) == 1 and isinstance(images, NamedImages) and images.is_flat:
        return  # the class is called by the folder
    if unknown := [name for name in images.classes if name not in classes]:
        problem = f"val_path={images.path} has the class {unknown[0]!r}, which the training images do not have"
        raise UserError(f"{problem}: name the class folders as there.")
    images.labels = np.array([classes.index(name) for name in images.classes], np.int64)[images.labels]


class PipelineSource(ImageSource):
    """Images that a pipeline samples on demand.

    Args:
        pipeline: samples with its current weights.
        config: sampling settings.
        labels: (N,) int64, the class of each image.
        in_bf16: whether to sample under bf16 autocast.
    """

    def __init__(self, pipeline: Pipeline, config: SamplingConfig, labels: np.ndarray, in_bf16: bool) -> None:
        self.path, self.labels = pathlib.Path("samples"), labels
        self.shape, self.dtype = (len(labels), pipeline.image_size, pipeline.image_size, 3), np.dtype(np.uint8)
        self._pipeline, self._config, self._in_bf16 = pipeline, config, in_bf16

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        assert self.labels is not None
        for ids in itertools.islice(split_batches(len(self), size), rank, None, ranks):
            # Here, since blocks are requested from another thread and autocast is per thread.
            with torch.autocast(self._pipeline.device.type, torch.bfloat16, enabled=self._in_bf16):
                labels = self.labels[ids.start : ids.stop].tolist()
                yield self._pipeline.generate(ids, labels, self._config, chunk_size=CHUNK_SIZE).pixels


class ReconstructionSource(ImageSource):
    """Reconstructions of images by an autoencoder, with its current weights.

    Args:
        network: the autoencoder.
        originals: the images, of a size that it encodes.
        world: the processes.
        in_bf16: whether to compute under bf16 autocast.
    """

    def __init__(self, network: Autoencoder, originals: ImageSource, world: World, in_bf16: bool) -> None:
        self.path, self.labels, self.shape = pathlib.Path("reconstructions"), originals.labels, originals.shape
        self.dtype, self.num_classes = np.dtype(np.uint8), originals.num_classes
        self._network, self._originals, self._device, self._in_bf16 = network, originals, world.device, in_bf16

    def blocks(self, size: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        for block in self._originals.blocks(size, rank, ranks):
            with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._in_bf16):
                yield reconstruct(self._network, torch.from_numpy(block).to(self._device)).cpu().numpy()


class Evaluation:
    """Metrics of the network in training; constructed by all processes together.

    Args:
        network: the pipeline of a model, which samples the classes of its training images in equal numbers, or an
            autoencoder, which reconstructs held-out images.
        config: of the run.
        labels: of the training images.
        world: the processes.
        in_bf16: whether the run uses bf16 autocast.

    Raises:
        UserError: the reference or the weights of the extractor are not there, or do not belong together.
    """

    def __init__(
        self, network: Pipeline | Autoencoder, config: TrainConfig, labels: np.ndarray, world: World, in_bf16: bool
    ) -> None:
        self._world = world
        on_gpu = world.device.type == "cuda" and not isinstance(network, Autoencoder)
        self._batch_size = GPU_BATCH_SIZE if on_gpu else min(config.batch_size, CPU_BATCH_SIZE)
        held_out, side, number = config.val_path, config.image_size, config.eval_images
        split = held_out_split(config)
        if isinstance(network, Autoencoder):
            assert held_out is not None
            self._source: ImageSource = ReconstructionSource(
                network, open_source(held_out, side, split, number), world, in_bf16
            )
        else:
            classes = np.unique(labels)
            chosen = classes[make_labels("balanced", number, len(classes), seed=0)]
            defaults = SamplingDefaults(config.eval_cfg_scale, config.eval_num_steps)
            self._source = PipelineSource(network, complete_config(defaults), chosen, in_bf16)
        features = () if config.eval_features is None else (config.eval_features,)
        wanted = EvaluationConfig(config.eval_reference, inception_weights=config.eval_inception, features=features)
        if config.eval_reference is None:
            limit = number if isinstance(network, Autoencoder) else None
            wanted = dataclasses.replace(wanted, reference=str(held_out), reference_split=split, reference_limit=limit)
        extractors = FeatureExtractors(wanted, world)
        self._extractor = extractors.loaded[-1]
        found = find_reference(extractors, side)
        self._reference = found.get(self._extractor.name) or next(iter(found.values())) if found else None
        if self._reference is not None:
            check_extractor(self._extractor.name, self._extractor.digest, self._reference)

    def metrics(self) -> Metrics:
        """Returns those of `LOGGED` that the reference allows, in the first process; nothing in the others."""
        sets = extract_features(self._source, [self._extractor], self._world, self._batch_size, progress="evaluating")
        if not sets:
            return {}
        found = {f"eval_{name}": value for name, value in compute_metrics(sets[0], self._reference).items()}
        if self._extractor.name != INCEPTION and "eval_fid" in found:
            found["eval_frechet_distance"] = found.pop("eval_fid")
        return {name: finite(found[name]) for name in LOGGED if name in found}


def format_evaluation(metrics: Mapping[str, float | None]) -> str:
    """Formats the metrics of an evaluation in a line of the log; empty if it has none."""
    return ", ".join(f"{title} {metrics[name]:.4g}" for name, title in LOGGED.items() if metrics.get(name) is not None)

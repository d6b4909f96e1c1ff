"""Feature extractors and references of an evaluation, found by name; features of references are cached."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import sys

from bitdance.data.image_dataset import print_summary
from bitdance.metrics.efficientnet_lite import NAME as EFFICIENTNET_LITE
from bitdance.metrics.efficientnet_lite import load_efficientnet_lite
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.metrics.feature_set import (
    FeatureSet,
    extract_features,
    read_feature_set,
    read_statistics,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, load_feature_extractor
from bitdance.metrics.image_sources import ImageSource, open_source
from bitdance.metrics.inception import NAME as INCEPTION
from bitdance.metrics.inception import find_inception_weights, load_inception
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.weights.hub import EVALUATION_FOLDER, PLAIN_FILES


@dataclasses.dataclass
class FeatureExtractors:
    """The Inception network and the extractors in `EvaluationConfig.features`, loaded on first use."""

    config: EvaluationConfig
    world: World

    @functools.cached_property
    def loaded(self) -> tuple[FeatureExtractor, ...]:
        """The extractors, the Inception network first.

        It is left out if other extractors are given and its weights are neither given nor downloaded.

        Raises:
            UserError: a file is missing, damaged, or something else.
        """
        loaded = [find_extractor(name, self.world) for name in self.config.features]
        try:
            weights = find_inception_weights(self.config.inception_weights)
        except UserError:
            if self.config.inception_weights is not None or not loaded:
                raise
            if self.world.is_main:
                note = "Inception is left out: run `bitdance download inception` to add it."
                print(f"bitdance: {note}", file=sys.stderr)
        else:
            loaded.insert(0, load_inception(weights, self.world.device))
        if len({extractor.name for extractor in loaded}) < len(loaded):
            raise UserError("two feature extractors have the same name: rename one.")
        return tuple(loaded)


def find_extractor(name: str, world: World) -> FeatureExtractor:
    """Loads EfficientNet-Lite0 by its name, or a feature extractor of the user.

    Raises:
        UserError: there is no such extractor, or it cannot be loaded.
    """
    if name == EFFICIENTNET_LITE:
        return load_efficientnet_lite(world.device)
    return load_feature_extractor(name)


def find_reference(extractors: FeatureExtractors, side: int) -> dict[str, FeatureSet] | None:
    """Finds the reference and its features.

    Args:
        extractors: with the settings that name the reference.
        side: height and width of the images to evaluate; image files of the reference are cropped to it.

    Returns:
        Features by the name of their extractor in the first process (statistics without a name are Inception's), an
        empty dictionary in the others; None without a reference.

    Raises:
        UserError: there is no reference, or it cannot be read.
    """
    config = extractors.config
    if config.reference == "none":
        return None
    path = pathlib.Path(os.path.expanduser(config.reference)) if config.reference else _published_reference(side)
    is_npz = path.is_file() and path.suffix.lower() == ".npz"
    if is_npz and (stored := read_feature_set(path)) is not None:
        return {stored.about.get("extractor", INCEPTION): stored}
    options = () if is_npz else (side, config.reference_split, config.reference_limit)
    source = open_source(path, *options)
    if extractors.world.is_main:
        print_summary(source.summary)
    found = _extract_cached(source, extractors)
    if is_npz and INCEPTION in found:
        statistics, spatial = read_statistics(path)
        if statistics is not None:  # ADM's reference batch holds statistics of more images than it contains
            found[INCEPTION] = dataclasses.replace(found[INCEPTION], statistics=statistics, spatial=spatial)
    return found


def _published_reference(side: int) -> pathlib.Path:
    name = f"reference-{side}"
    if name not in PLAIN_FILES:
        raise UserError(
            f"there is no published reference for images of {side} x {side} pixels: set `reference` (a data set will "
            "do), or reference=none for the Inception Score only."
        )
    path = EVALUATION_FOLDER / PLAIN_FILES[name].file
    if not path.exists():
        raise UserError(f"there is no file {path}: run `bitdance download {name}`, or set `reference`.")
    return path


def _extract_cached(source: ImageSource, extractors: FeatureExtractors) -> dict[str, FeatureSet]:
    """Reads the features of a reference from the cache; those that are missing are extracted and cached."""
    config, world, loaded = extractors.config, extractors.world, extractors.loaded
    key = world.broadcast(_cache_key(source, config) if world.is_main else "")
    files = {extractor.name: config.cache / f"{key[:16]}-{extractor.key}.npz" for extractor in loaded}
    stored = world.broadcast([name for name, file in files.items() if file.exists()])
    missing, extracted = [extractor for extractor in loaded if extractor.name not in stored], []
    if missing:
        progress = f"features of {source.path.name}"
        extracted = extract_features(source, missing, world, config.feature_batch_size, progress=progress)
    for features in extracted:
        try:
            write_feature_set(files[features.about["extractor"]], features)
        except UserError as error:
            print(f"bitdance: features of {source.path} are not cached: {error}", file=sys.stderr)
    found = {features.about["extractor"]: features for features in extracted}
    for name in stored if world.is_main else ():
        if (cached := read_feature_set(files[name])) is not None:
            found[name] = cached
    return {name: found[name] for name in files if name in found}


def _cache_key(source: ImageSource, config: EvaluationConfig) -> str:
    """Files are identified by their paths, sizes and times of modification."""
    key: tuple[object, ...] = (source.shape, config.reference_split, config.reference_limit)
    if source.upright:
        key += ("upright",)
    digest = hashlib.sha256(repr(key).encode())
    for file in source.files:
        stat = file.stat()
        digest.update(repr((os.fsencode(file.absolute()), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()

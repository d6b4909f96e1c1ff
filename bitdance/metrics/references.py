"""Feature extractors and references of an evaluation, found by name; features of references are cached."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys

from bitdance.metrics.evaluation_config import NO_REFERENCE, EvaluationConfig
from bitdance.metrics.feature_set import (
    FeatureSet,
    content_digest,
    extract_features,
    read_feature_set,
    read_statistics,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, load_feature_extractor
from bitdance.metrics.image_sources import ImageSource, NpzSource, open_source
from bitdance.metrics.inception import NAME as INCEPTION
from bitdance.metrics.inception import find_weights, load_inception
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.weights.hub import EVALUATION_FOLDER, PLAIN_FILES


class FeatureExtractors:
    """The Inception network and the extractors in `EvaluationConfig.features`, loaded on first use."""

    def __init__(self, config: EvaluationConfig, world: World) -> None:
        self._config, self._world = config, world
        self._loaded: tuple[FeatureExtractor, ...] = ()

    def __call__(self) -> tuple[FeatureExtractor, ...]:
        """Returns the extractors, the Inception network first.

        The Inception network is left out if other extractors are given and its weights are neither given nor
        downloaded.

        Raises:
            UserError: a file is missing, damaged, or something else.
        """
        if not self._loaded:
            loaded = [load_feature_extractor(name) for name in self._config.features]
            given = self._config.inception_weights
            try:
                weights = find_weights(given)
            except UserError:
                if given is not None or not loaded:
                    raise
                if self._world.is_main:
                    note = "Inception is left out: run `bitdance download inception` to add it."
                    print(f"bitdance: {note}", file=sys.stderr)
            else:
                loaded.insert(0, load_inception(weights, self._world.device))
            if len({extractor.name for extractor in loaded}) < len(loaded):
                raise UserError("two feature extractors have the same name: rename one.")
            self._loaded = tuple(loaded)
        return self._loaded


def find_reference(
    config: EvaluationConfig, side: int, extractors: FeatureExtractors, world: World
) -> dict[str, FeatureSet] | None:
    """Finds the reference and its features.

    Args:
        side: height and width of the images to evaluate; image files of the reference are cropped to it.

    Returns:
        Features by the name of their extractor in the first process (statistics without a name are Inception's), an
        empty dictionary in the others; None without a reference.

    Raises:
        UserError: there is no reference, or it cannot be read.
    """
    if config.reference == NO_REFERENCE:
        return None
    path = pathlib.Path(config.reference).expanduser() if config.reference else _published_reference(side)
    if path.is_file() and path.suffix.lower() == ".npz":
        if (stored := read_feature_set(path)) is not None:
            return {stored.about.get("extractor", INCEPTION): stored}
        source: ImageSource = open_source(path)
    else:
        source = open_source(path, side, config.reference_split, config.reference_limit)
    found = _extract_cached(source, extractors(), world, config)
    if isinstance(source, NpzSource) and INCEPTION in found:
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
    path = EVALUATION_FOLDER / PLAIN_FILES[name].rpartition("/")[2]
    if not path.exists():
        raise UserError(f"there is no file {path}: run `bitdance download {name}`, or set `reference`.")
    return path


def _extract_cached(
    source: ImageSource, extractors: tuple[FeatureExtractor, ...], world: World, config: EvaluationConfig
) -> dict[str, FeatureSet]:
    """Reads the features of a reference from the cache; those that are missing are extracted and cached."""
    key = world.broadcast(_cache_key(source, config) if world.is_main else "")
    files = {extractor.name: config.cache / f"{key[:16]}-{extractor.key}.npz" for extractor in extractors}
    missing = world.broadcast([name for name, file in files.items() if not file.exists()])
    wanted = [extractor for extractor in extractors if extractor.name in missing]
    progress, extracted = f"features of {source.path.name}", []
    if wanted:
        extracted = extract_features(source, wanted, world, config.feature_batch_size, progress=progress)
    if not world.is_main:
        return {}
    found = {features.about["extractor"]: features for features in extracted}
    for name, features in found.items():
        try:
            write_feature_set(files[name], features)
        except UserError as error:
            print(f"bitdance: features of {source.path} are not cached: {error}", file=sys.stderr)
    for name in files.keys() - found.keys():
        stored = read_feature_set(files[name])
        assert stored is not None
        found[name] = stored
    return {name: found[name] for name in files}


def _cache_key(source: ImageSource, config: EvaluationConfig) -> str:
    """A file is identified by its path, size and time of modification, a folder by its pixels."""
    if not source.path.is_file():
        return content_digest(source)
    stat = source.path.stat()
    selection = (source.shape, config.reference_split, config.reference_limit)
    identity = (str(source.path.resolve()), stat.st_size, stat.st_mtime_ns, *selection)
    return hashlib.sha256(repr(identity).encode()).hexdigest()

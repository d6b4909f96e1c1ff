"""What images are compared with, and by which networks: found by name, features of a reference kept."""

from __future__ import annotations

import pathlib
import sys

from tqdm import tqdm

from bitdance.config import NO_REFERENCE, EvaluationConfig
from bitdance.data.cifar10 import Split
from bitdance.metrics.feature_set import (
    FeatureSet,
    content_digest,
    read_feature_set,
    take_features,
    with_published_statistics,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, load_feature_extractor
from bitdance.metrics.image_sources import NpzSource, Source, open_source
from bitdance.metrics.inception import find_weights, load_inception
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.weights.hub import EVALUATION_FOLDER, PLAIN_FILES


class FeatureExtractors:
    """The Inception network and those of `--features`, read when they are first needed."""

    def __init__(self, config: EvaluationConfig, world: World) -> None:
        self._config, self._world = config, world
        self._loaded: tuple[FeatureExtractor, ...] | None = None

    def __call__(self) -> tuple[FeatureExtractor, ...]:
        """The Inception network first.

        Raises:
            UserError: a file is missing, damaged, or something else.
        """
        if self._loaded is None:
            own = tuple(load_feature_extractor(name) for name in self._config.features)
            inception = load_inception(find_weights(self._config.inception_weights), self._world.device)
            self._loaded = (inception.feature_extractor(), *own)
            if len({network.key for network in self._loaded}) < len(self._loaded):
                raise UserError("two feature networks have one name: give each its own.")
        return self._loaded


def features_of(source: Source, networks: tuple[FeatureExtractor, ...], world: World, config: EvaluationConfig,
                keep: int | None = None) -> list[FeatureSet]:  # fmt: skip
    """Features of a source by each network, with a bar; in the first process."""
    with tqdm(total=len(source), unit="image", desc=f"features of {source.path.name}", dynamic_ncols=True,
              disable=not world.is_main) as bar:  # fmt: skip
        return take_features(source, networks, world, config.feature_batch_size, keep, bar.update)


def find_reference(
    config: EvaluationConfig, side: int, networks: FeatureExtractors, world: World
) -> dict[str, FeatureSet] | None:
    """The reference by the name of each network, in the first process (empty in the others); None for none.

    Args:
        side: height and width of the images to evaluate; pictures are cropped to it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if config.reference == NO_REFERENCE:
        return None
    path = pathlib.Path(config.reference).expanduser() if config.reference else _published(side)
    if path.is_file() and path.suffix.lower() == ".npz":
        if (stored := read_feature_set(path)) is not None:
            return {str(stored.about.get("network", networks()[0].name)): stored}
        source: Source = open_source(path)
    else:
        source = open_source(path, side, _split(config.reference_split), config.reference_limit)
    found = _cached(source, networks(), world, config)
    if isinstance(source, NpzSource) and found:
        first = networks()[0].name
        found[first] = with_published_statistics(found[first], path)
    return found


def _split(name: str) -> Split:
    return "test" if name == "test" else "train"


def _published(side: int) -> pathlib.Path:
    name = f"reference-{side}"
    if name not in PLAIN_FILES:
        raise UserError(
            f"there is no published reference for images of {side} x {side} pixels: name one with --reference (a data "
            "set will do), or --reference none for the Inception Score alone."
        )
    path = EVALUATION_FOLDER / PLAIN_FILES[name].rpartition("/")[2]
    if not path.exists():
        raise UserError(
            f"ADM's reference batch is not there ({path}): run `bitdance download {name}`, or name another with "
            "--reference."
        )
    return path


def _cached(
    source: Source, networks: tuple[FeatureExtractor, ...], world: World, config: EvaluationConfig
) -> dict[str, FeatureSet]:
    """Features of a reference, from the cache where they are there; what is missing is taken and kept there."""
    content = world.broadcast(content_digest(source) if world.is_main else "")
    files = {network.name: config.cache / f"{content[:16]}-{network.key}.npz" for network in networks}
    missing = world.broadcast([name for name, file in files.items() if not file.exists()])
    wanted = tuple(network for network in networks if network.name in missing)
    taken = features_of(source, wanted, world, config) if wanted else []
    if not world.is_main:
        return {}
    for found in taken:
        try:
            write_feature_set(files[found.about["network"]], found)
        except UserError as error:
            print(f"bitdance: features of {source.path} are not kept: {error}", file=sys.stderr)
    result = {found.about["network"]: found for found in taken}
    for name, file in files.items():
        if name not in result:
            stored = read_feature_set(file)
            assert stored is not None
            result[name] = stored
    return result

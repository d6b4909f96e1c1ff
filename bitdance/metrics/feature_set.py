"""Features of a set of images: extracted, summed up in statistics, and stored."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitdance.config import MAX_IMAGE_SIZE
from bitdance.data.image_dataset import evenly_spaced
from bitdance.metrics.features import FeatureExtractor
from bitdance.metrics.image_sources import ImageSource
from bitdance.metrics.npz_files import MAX_CLASSES, check_labels, open_npz, read_array, write_arrays
from bitdance.metrics.statistics import Statistics, StatisticsAccumulator, validate_features, validate_statistics
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.progress import progress_bar

FORMAT, FORMAT_VERSION = "bitdance-features", 2
ARRAYS = ("pool", "logits", "labels")


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100 and value.isprintable()


def _is_count(value: Any, limit: int = 1 << 40) -> bool:
    return type(value) is int and 0 <= value <= limit  # a bool is none


_VALID: dict[str, Callable[[Any], bool]] = {
    "source": lambda value: isinstance(value, str),
    **dict.fromkeys(("extractor", "extractor_digest", "type", "content"), _is_short),
    **dict.fromkeys(("count", "duplicates"), _is_count),
    **dict.fromkeys(("height", "width"), lambda value: _is_count(value, MAX_IMAGE_SIZE)),
    **dict.fromkeys(("minimum", "maximum"), lambda value: isinstance(value, int | float)),
    "classifies": lambda value: isinstance(value, bool),
    "num_classes": lambda value: value is None or _is_count(value, MAX_CLASSES),
}
"""What the values of `FeatureSet.about` in a file must be."""


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images by one extractor.

    Attributes:
        about: description of the set for reports: `source`, `count`, `height`, `width`, `num_classes`, `extractor`,
            `extractor_digest`, `classifies`, and the fields of `describe_pixels`.
        pool: (n, D) float32 features of all images, or of a subset in stored references; None in files that hold only
            statistics.
        statistics: of the pool features of all images; None for a single image.
        spatial: statistics of the spatial features, for sFID.
        logits: (N, classes) float32.
        labels: (N,) int64.
    """

    about: dict[str, Any]
    pool: np.ndarray | None
    statistics: Statistics | None
    spatial: Statistics | None = None
    logits: np.ndarray | None = None
    labels: np.ndarray | None = None


class Collector:
    """Collects the features of images block by block into a `FeatureSet`.

    Args:
        extractor: the extractor of the features.
        total: number of images that will be added.
        keep: keep the pool features of only this many images, evenly spaced, and no logits.
    """

    def __init__(self, extractor: FeatureExtractor, total: int, keep: int | None = None) -> None:
        self._extractor, self._count = extractor, 0
        self._kept = np.zeros(total, bool)
        self._kept[evenly_spaced(total, keep)] = True
        self._accumulators: dict[str, StatisticsAccumulator] = {}
        self._pool: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Adds the features of the next images, as returned by a `FeatureExtractor`."""
        pool = features["pool"]
        self._pool.append(pool[self._kept[self._count : self._count + len(pool)]])
        self._count += len(pool)
        for name in ("pool", "spatial"):
            if (rows := features.get(name)) is not None:
                self._accumulators.setdefault(name, StatisticsAccumulator(rows.shape[1])).add(rows)
        if "logits" in features and self._kept.all():
            self._logits.append(features["logits"])

    def finish(self, about: dict[str, Any], labels: np.ndarray | None) -> FeatureSet:
        """Returns the set of all images added."""
        extractor = self._extractor
        about = {"count": self._count, **about, "extractor": extractor.name, "extractor_digest": extractor.digest}
        about["classifies"] = extractor.classifies
        accumulators = self._accumulators if self._count >= 2 else {}
        statistics = {name: accumulator.statistics() for name, accumulator in accumulators.items()}
        logits = np.concatenate(self._logits) if self._logits else None
        pool = np.concatenate(self._pool)
        return FeatureSet(about, pool, statistics.get("pool"), statistics.get("spatial"), logits, labels)


def extract_features(
    source: ImageSource,
    extractors: Sequence[FeatureExtractor],
    world: World,
    batch_size: int = 32,
    keep: int | None = None,
    progress: str | None = None,
) -> list[FeatureSet]:
    """Extracts the features of all images of a source; batches are distributed over the processes.

    Args:
        keep: see `Collector`.
        progress: title of a progress bar; None for no bar.

    Returns:
        A set for each extractor in the first process, an empty list in the others.

    Raises:
        UserError: an image cannot be read, or an extractor returns invalid features.
    """
    collectors = [Collector(extractor, len(source), keep) for extractor in extractors]
    summaries: list[PixelSummary] = []
    blocks = _prefetch(source.blocks(batch_size, world.rank, world.size))
    disable = progress is None or not world.is_main
    with progress_bar(len(source), progress or "", "images", disable=disable, leave=False) as bar:
        for _ in range(0, len(source), batch_size * world.size):
            images, own = next(blocks, None), None  # some processes have none in the last round
            if images is not None:
                own = summarize_pixels(images), [extractor(images) for extractor in extractors]
            for summary, features in filter(None, world.gather(own)):
                summaries.append(summary)
                for collector, arrays in zip(collectors, features, strict=True):
                    collector.add(arrays)
                bar.update(len(summary.digests))
    if not world.is_main:
        return []
    _, height, width, _ = source.shape
    about = {"source": str(source.path), "height": height, "width": width, "num_classes": source.num_classes}
    about |= describe_pixels(summaries, str(source.dtype), source.labels)
    return [collector.finish(about, source.labels) for collector in collectors]


def _prefetch(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields each block, and reads the next one meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, blocks, None)
        while (block := future.result()) is not None:
            future = pool.submit(next, blocks, None)
            yield block


class PixelSummary(NamedTuple):
    """Range of the pixels of some images, and the SHA-256 of each image."""

    minimum: float
    maximum: float
    digests: list[bytes]


def summarize_pixels(images: np.ndarray) -> PixelSummary:
    """Summarizes (n, H, W, 3) images.

    Raises:
        UserError: values that are not finite.
    """
    minimum, maximum = float(images.min()), float(images.max())
    if not np.isfinite(minimum + maximum):
        raise UserError("the images hold values that are not finite: create them again.")
    digests = [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images]
    return PixelSummary(minimum, maximum, digests)


def describe_pixels(summaries: Iterable[PixelSummary], dtype: str, labels: np.ndarray | None) -> dict[str, Any]:
    """Describes a set of images by the summaries of its blocks, in their order.

    Returns:
        `type`, `minimum` and `maximum` of the pixels, the number of `duplicates`, and `content`, a SHA-256 of pixels
        and labels; ready for JSON.
    """
    minima, maxima, blocks = zip(*summaries, strict=True)
    digests = [digest for block in blocks for digest in block]
    content = hashlib.sha256(dtype.encode() + b"".join(digests))
    content.update(b"" if labels is None else labels.astype("<i8").tobytes())
    return {
        "type": dtype,
        "minimum": min(minima),
        "maximum": max(maxima),
        "duplicates": len(digests) - len(set(digests)),
        "content": content.hexdigest(),
    }


def write_feature_set(path: pathlib.Path, features: FeatureSet) -> None:
    """Writes a set as an `.npz` atomically; its statistics have the names of ADM's files.

    Raises:
        UserError: the file cannot be written.
    """
    about = {**features.about, "format": FORMAT, "format_version": FORMAT_VERSION}
    arrays: dict[str, np.ndarray] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    arrays |= {name: array for name in ARRAYS if (array := getattr(features, name)) is not None}
    for suffix, statistics in (("", features.statistics), ("_s", features.spatial)):
        if statistics is not None:
            arrays |= {f"mu{suffix}": statistics.mean, f"sigma{suffix}": statistics.covariance}
    write_arrays(path, arrays)


def read_feature_set(path: pathlib.Path) -> FeatureSet | None:
    """Reads a stored set; None if the file holds something else, which may be images.

    A file that holds only statistics (`mu`, `sigma`, and optionally `mu_s`, `sigma_s`) is a set without features.

    Raises:
        UserError: the file is damaged, or holds invalid features.
    """
    about: dict[str, Any] = {"source": str(path)}
    again = "extract the features again"
    with open_npz(path) as archive:
        names = archive.namelist()
        if "about.npy" not in names and ("arr_0.npy" in names or "mu.npy" not in names):
            return None
        if (text := read_array(archive, "about")) is not None:
            about = json.loads(text.tobytes())
            if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
                raise UserError(f"{path} is not of format {FORMAT} {FORMAT_VERSION}: {again}.")
            if wrong := [name for name, is_valid in _VALID.items() if not is_valid(about.get(name, ...))]:
                raise UserError(f"{path} is damaged ({wrong[0]} has no valid value): {again}.")
        pool, logits, labels = (read_array(archive, name) if text is not None else None for name in ARRAYS)
    count = about.get("count")
    if pool is not None:
        pool = validate_features(pool, f"{path}: pool")
    if logits is not None:
        logits = validate_features(logits, f"{path}: logits")
        if len(logits) != count:
            raise UserError(f"{path} holds {len(logits)} logits for {count} images: {again}.")
    if labels is not None:
        labels = check_labels(labels, count or 0, f"{path}: labels")
    return FeatureSet(about, pool, *read_statistics(path), logits, labels)


def read_statistics(path: pathlib.Path) -> tuple[Statistics | None, Statistics | None]:
    """Reads the statistics for FID (`mu`, `sigma`) and sFID (`mu_s`, `sigma_s`) in an `.npz` file, if any.

    Raises:
        UserError: the file is damaged, or holds invalid statistics.
    """
    found: list[Statistics | None] = []
    with open_npz(path) as archive:
        for names in (("mu", "sigma"), ("mu_s", "sigma_s")):
            arrays = [array for name in names if (array := read_array(archive, name)) is not None]
            if len(arrays) == 1:
                raise UserError(f"{path} holds only one of {' and '.join(names)}: create or download it again.")
            found.append(validate_statistics(Statistics(*arrays), f"{path}: {', '.join(names)}") if arrays else None)
    return found[0], found[1]

"""What the figures need of a set of images: features, statistics and checks; taken, stored, read, merged."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitdance.metrics.features import FeatureExtractor
from bitdance.metrics.image_sources import Source
from bitdance.metrics.statistics import (
    BLOCK,
    Accumulator,
    Statistics,
    checked_features,
    checked_statistics,
    read_adm_statistics,
)
from bitdance.runtime.atomic_files import atomic_write
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World

FORMAT = "bitdance-features"


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images by one network.

    Attributes:
        about: what the report says of it: `source`, `count`, `height`, `width`, `content` (digest of pixels and
            labels), `network`, `network_digest`, and what the checks found (`minimum`, `maximum`, `type`,
            `duplicates`).
        pool: (n, D) float32; all, or of a reference some that are spread over it. None where a file has only
            statistics.
        statistics: of the pool features of all images.
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
    """Takes in the features of images block by block, in their order, and gives a `FeatureSet`.

    Args:
        network: whose features they are.
        keep: keep the pool features and logits of only so many of the images, spread over all.
        total: number of images to come.
    """

    def __init__(self, network: FeatureExtractor, total: int, keep: int | None = None) -> None:
        self._network = network
        kept = (
            np.arange(total) if keep is None or keep >= total else np.linspace(0, total - 1, keep).round().astype(int)
        )
        self._kept = np.zeros(total, bool)
        self._kept[kept] = True
        self._keeps_all = bool(self._kept.all())
        self._seen = 0
        self._statistics: dict[str, _WholeBlocks] = {}
        self._pool: list[np.ndarray] = []
        self._logits: list[np.ndarray] = []

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes in the features of the next images, as `arrays_of` gives them."""
        pool, spatial, logits = arrays["pool"], arrays.get("spatial"), arrays.get("logits")
        kept = self._kept[self._seen : self._seen + len(pool)]
        self._seen += len(pool)
        self._pool.append(pool[kept])
        for name, rows in (("pool", pool), ("spatial", spatial)):
            if rows is not None:
                self._statistics.setdefault(name, _WholeBlocks(rows.shape[1])).add(rows)
        if logits is not None and self._keeps_all:  # a score of some of the images would be of no use
            self._logits.append(logits)

    def finish(self, about: dict[str, Any], labels: np.ndarray | None) -> FeatureSet:
        """The set of all that came."""
        about = {
            "count": self._seen,
            **about,
            "network": self._network.name,
            "network_digest": self._network.digest,
            "classifies": self._network.classifies,
        }
        statistics = {name: sums.statistics() for name, sums in self._statistics.items()} if self._seen >= 2 else {}
        return FeatureSet(
            about,
            np.concatenate(self._pool),
            statistics.get("pool"),
            statistics.get("spatial"),
            np.concatenate(self._logits) if self._logits else None,
            labels,
        )


class _WholeBlocks:
    """Hands rows on in blocks of one size, so that the size of a batch changes no bit.

    It also saves time: joining a block to the sums costs as much as a thousand rows.
    """

    def __init__(self, dim: int) -> None:
        self._sums = Accumulator(dim)
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= BLOCK:
            together = np.concatenate(self._waiting)
            whole = len(together) // BLOCK * BLOCK
            self._sums.add(together[:whole])
            self._waiting = [together[whole:]]

    def statistics(self) -> Statistics:
        self._sums.add(np.concatenate(self._waiting))
        self._waiting = [self._waiting[-1][:0]]
        return self._sums.statistics()


def take_features(
    source: Source,
    networks: Sequence[FeatureExtractor],
    world: World,
    batch_size: int = 32,
    keep: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[FeatureSet]:
    """The features of all images of a source, by all processes; blocks of `batch_size` images are shared out.

    Args:
        keep: as in `Collector`.
        progress: called with the number of images of each finished block.

    Returns:
        A set for each network in the first process; nothing in the others.

    Raises:
        UserError: an image cannot be read, or a network gives something else than features.
    """
    collectors = [Collector(network, len(source), keep) for network in networks]
    checks = Checks()
    last = -(-len(source) // batch_size)
    mine = _ahead(source.blocks(batch_size, world.rank, world.size))
    for first in range(0, last, world.size):
        found = None
        if first + world.rank < last:
            number, images = next(mine)
            assert number == first + world.rank
            looked_at = Checks.of(images)
            found = [arrays_of(network, images) for network in networks], looked_at
        for part in world.gather(found):
            if part is not None:
                for collector, arrays in zip(collectors, part[0], strict=True):
                    collector.add(arrays)
                checks.merge(part[1])
                progress(len(part[1].digests))
    if not world.is_main:
        return []
    about = {"source": str(source.path), "height": source.shape[1], "width": source.shape[2],
             "num_classes": source.num_classes, **checks.report(str(source.dtype), source.labels)}  # fmt: skip
    return [collector.finish(about, source.labels) for collector in collectors]


def arrays_of(network: FeatureExtractor, images: np.ndarray) -> dict[str, np.ndarray]:
    """The features of a block that the network has, by the names in `bitdance.metrics.features.Features`."""
    # Any type but bytes is taken as float32, as ADM does.
    features = network(images if images.dtype == np.uint8 else images.astype(np.float32))
    return {name: part.cpu().numpy() for name, part in features._asdict().items() if part is not None}


def _ahead(blocks: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """The same blocks, each read while the one before it is being worked on."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


class Checks:
    """What is looked at in the pixels while they pass: their range, and a digest of each image."""

    def __init__(self, minimum: float = np.inf, maximum: float = -np.inf, digests: Iterable[bytes] = ()) -> None:
        self.minimum, self.maximum, self.digests = minimum, maximum, list(digests)

    @classmethod
    def of(cls, images: np.ndarray) -> Checks:
        """Of one block, (n, H, W, 3).

        Raises:
            UserError: values that are not finite.
        """
        minimum, maximum = float(images.min()), float(images.max())
        if not np.isfinite(minimum + maximum):
            raise UserError("the images hold values that are not finite: make them again.")
        return cls(minimum, maximum, [hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in images])

    def merge(self, other: Checks) -> None:
        """Takes in what comes after."""
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.digests += other.digests

    def report(self, dtype: str, labels: np.ndarray | None) -> dict[str, Any]:
        """Ready for JSON; `content` is SHA-256 over the digests of the images and the labels."""
        content = hashlib.sha256(dtype.encode() + b"".join(self.digests))
        content.update(b"" if labels is None else labels.astype("<i8").tobytes())
        counts = collections.Counter(self.digests)
        return {
            "type": dtype,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "duplicates": len(self.digests) - len(counts),
            "content": content.hexdigest(),
        }


def content_digest(source: Source, batch_size: int = 256) -> str:
    """The `content` that `take_features` will report, without a network."""
    checks = Checks()
    for _, images in _ahead(source.blocks(batch_size)):
        checks.merge(Checks.of(images))
    return str(checks.report(str(source.dtype), source.labels)["content"])


# ---------------------------------------------------------------- files


def write_feature_set(path: pathlib.Path, features: FeatureSet) -> None:
    """Writes a set as an `.npz`, atomically; its statistics are named as in ADM's files.

    Raises:
        UserError: the file cannot be written.
    """
    about = {"format": FORMAT, "format_version": 1, **features.about}
    arrays: dict[str, np.ndarray] = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for name in ("pool", "logits", "labels"):
        if (array := getattr(features, name)) is not None:
            arrays[name] = array
    for end, statistics in (("", features.statistics), ("_s", features.spatial)):
        if statistics is not None:
            arrays |= {f"mu{end}": statistics.mean, f"sigma{end}": statistics.covariance}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # (numpy's stubs take them for its flags)


def read_feature_set(path: str | os.PathLike[str]) -> FeatureSet | None:
    """A stored set, or None where the file is no such set, so that it may be images.

    A file with nothing but statistics (`mu`, `sigma` and perhaps `mu_s`, `sigma_s`) is one without features.

    Raises:
        UserError: the file is damaged, or holds what no features are.
    """
    path = pathlib.Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if "about" not in file and ("arr_0" in file or "mu" not in file):
                return None
            names = ("about", "pool", "logits", "labels", "mu", "sigma", "mu_s", "sigma_s")
            arrays = {name: np.asarray(file[name]) for name in names if name in file}
        about = json.loads(arrays.pop("about").tobytes()) if "about" in arrays else {"source": str(path)}
        if not isinstance(about, dict) or ("format" in about and about["format"] != FORMAT):
            raise ValueError("another format")
    except Exception as error:  # a broken archive can fail in every way that zip, zlib and NumPy know
        raise UserError(
            f"{path} cannot be read as an .npz file ({type(error).__name__}): make or fetch it again."
        ) from error
    for name in ("pool", "logits"):
        if name in arrays:
            arrays[name] = checked_features(arrays[name], f"{path}: {name}")
    count = about.get("count")
    if "logits" in arrays and len(arrays["logits"]) != count:
        raise UserError(f"{path}: it says that it has {count} images but holds {len(arrays['logits'])} logits.")
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise UserError(f"{path}: labels of shape {labels.shape} and type {labels.dtype} fit no {count} images.")
    both = []
    for end in ("", "_s"):
        mean, covariance = arrays.get(f"mu{end}"), arrays.get(f"sigma{end}")
        if (mean is None) != (covariance is None):
            raise UserError(f"{path} has only one of mu{end} and sigma{end}: make or fetch it again.")
        both.append(
            None
            if mean is None or covariance is None
            else checked_statistics(Statistics(mean, covariance, count), f"{path}: mu{end}, sigma{end}")
        )
    return FeatureSet(about, arrays.get("pool"), both[0], both[1], arrays.get("logits"), labels)


def with_published_statistics(features: FeatureSet, path: pathlib.Path) -> FeatureSet:
    """The set with the statistics that a reference file of ADM holds, of more images than it has, in place of its own.

    Raises:
        UserError: the statistics are damaged.
    """
    if (stored := read_adm_statistics(path)) is None:
        return features
    return dataclasses.replace(features, statistics=stored[0], spatial=stored[1])

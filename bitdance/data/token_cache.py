"""Stored bits: what an autoencoder makes of a set of images, packed, in shards that training reads by memory map.

A store is a folder of `<number>.safetensors` and a manifest, `bits.json`, which is written when all shards are there.
A shard covers a range of the images and has the tensors

- `bits` (n, crops, flips, N, C / 8) uint8, as from `pack`, tokens in raster order: 1,024 bytes a
  view of a 256 px image with 32 bits a token;
- `checksums` (n, crops, flips) int32, the CRC-32 of each view, begun at the image's label, compared at every reading;
- `labels` and `indices` (n,) int64: classes, and places in the set of images.

The metadata of each shard say how the whole cache was made (`TokenCacheInfo`), which images it covers and which
were bad.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdance.data.images import ImageDataset
from bitdance.runtime.atomic_files import read_json, write_json
from bitdance.runtime.errors import UserError
from bitdance.weights import weights_file

MANIFEST = "bits.json"
"""In a finished store: how it was made, and its shards with their digests."""

JOB = "job.json"
"""In a store from its beginning: every setting of the job that makes it."""

KIND = "bits"
AGAIN = "run the `bitdance encode` that made it again, it makes only what is missing or damaged"


@dataclasses.dataclass(frozen=True)
class TokenCacheInfo:
    """How a store was made: everything that decides its bits.

    Attributes:
        autoencoder: SHA-256 of the autoencoder's tensors, as from `weights_file.digest`.
        precision: dtype of the encoder.
        image_size: side of a view in pixels.
        grid: side of a view in tokens, h = w.
        bits: C.
        crops: views of an image without the mirrored ones: crop 0 is the centre crop, the others are ADM's random
            crops by `noise.ENCODE_CROP`, functions of (seed, image, crop).
        flips: whether each crop is there mirrored too.
        seed: of the random crops.
        images: how many images the set has, broken ones included.
        names: SHA-256 of their names in their order.
        classes: class names in the order of the labels.
    """

    autoencoder: str
    precision: str
    image_size: int
    grid: int
    bits: int
    crops: int
    flips: bool
    seed: int
    images: int
    names: str
    classes: tuple[str, ...]

    @property
    def view_shape(self) -> tuple[int, int, int, int]:
        """(crops, flips, N, C / 8)."""
        return self.crops, 1 + self.flips, self.grid**2, self.bits // 8


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard in words: its file's name, how many images it holds, their digest, the names of the broken ones."""

    file: str
    images: int
    digest: str
    broken: tuple[str, ...]


class TokenDataset:
    """A store that is open for reading, from any number of threads.

    Attributes:
        path: the folder.
        encoding: how it was made.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (n,) int64, of the images that are there.
        digest: SHA-256 over those of the shards.
    """

    def __init__(self, path: pathlib.Path) -> None:
        manifest = read_json(path / MANIFEST, AGAIN)
        try:
            found = dict(manifest["encoding"])
            self.encoding = TokenCacheInfo(**{**found, "classes": tuple(found["classes"])})
            shards = [(str(shard["file"]), str(shard["digest"])) for shard in manifest["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is damaged or of another release ({error!r}): {AGAIN}.") from None
        self.path, self.classes = path, self.encoding.classes
        self._files = [path / pathlib.PurePath(file).name for file, _ in shards]
        opened, stop = [], 0
        for file, (_, digest) in zip(self._files, shards, strict=True):
            tensors, (start, end) = _map_shard(file, self.encoding, digest)
            if start != stop:
                break
            opened.append(tensors)
            stop = end
        if stop != self.encoding.images or len(opened) != len(shards):
            raise UserError(f"{path / MANIFEST} does not name all shards in their order: {AGAIN}.")
        self._bits, self._checksums = ([shard[name].numpy() for shard in opened] for name in ("bits", "checksums"))
        self._starts = np.cumsum([0, *map(len, self._bits)])
        self.labels = np.concatenate([shard["labels"].numpy() for shard in opened])
        self.digest = hashlib.sha256("".join(digest for _, digest in shards).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, crop: int, flip: int) -> np.ndarray:
        """A view of an image, packed: (N, C / 8) uint8, a part of the memory map.

        Raises:
            UserError: its bytes are not those that were written.
        """
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = (index - self._starts[shard], crop, flip)
        view: np.ndarray = self._bits[shard][place]
        if zlib.crc32(view.data, int(self.labels[index])) != self._checksums[shard][place].view(np.uint32):
            raise UserError(f"{self._files[shard]} is damaged (image {place[0]}, crop {crop}): {AGAIN}.")
        return view

    def check(self, autoencoder: str, image_size: int) -> None:
        """Checks that a model for these images can be trained from this store.

        Args:
            autoencoder: digest of the autoencoder that will decode.

        Raises:
            UserError: it was made by another autoencoder, or from images of another size.
        """
        own = self.encoding
        if own.autoencoder != autoencoder:
            raise UserError(
                f"{self.path} was made by another autoencoder (digest {own.autoencoder[:16]}, not {autoencoder[:16]}): "
                "name the one that it was made by, or encode the images anew."
            )
        if own.image_size != image_size:
            raise UserError(
                f"{self.path} was made from images of {own.image_size} px: use --image-size {own.image_size}, or "
                f"encode the images anew at {image_size} px."
            )


def is_token_cache(path: pathlib.Path) -> bool:
    """Whether a folder is a store, finished or not."""
    return (path / MANIFEST).is_file() or (path / JOB).is_file()


def open_token_cache(path: str | os.PathLike[str]) -> TokenDataset:
    """Opens a finished store; its tensors are mapped, not read.

    Raises:
        UserError: it is not there, not finished, or damaged; shards that are not of this store.
    """
    path = pathlib.Path(path).expanduser()
    if not (path / MANIFEST).is_file():
        why = "is not finished" if is_token_cache(path) else f"holds no stored bits (no {MANIFEST})"
        raise UserError(f"{path} {why}: {AGAIN}.")
    return TokenDataset(path)


def names_digest(images: ImageDataset) -> str:
    """SHA-256 of the images' names in their order: another set, or one of other classes, has another."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(images.name(index).encode() + b"\n")
    return digest.hexdigest()


def shard_file(number: int) -> str:
    """The name of a shard's file."""
    return f"{number:06d}.safetensors"


def write_shard(
    path: pathlib.Path,
    encoding: TokenCacheInfo,
    covered: range,
    bits: Tensor,
    labels: Tensor,
    indices: Tensor,
    broken: list[str],
) -> None:
    """Writes a shard, atomically.

    Args:
        covered: places of its images in the set, broken ones included.
        bits: (n, crops, flips, N, C / 8) uint8.
        labels, indices: (n,) int64.
        broken: names of the images that could not be read.

    Raises:
        UserError: it cannot be written.
    """
    checksums = np.empty(bits.shape[:3], np.uint32)
    for place in np.ndindex(checksums.shape):
        checksums[place] = zlib.crc32(bits[place].numpy().data, int(labels[place[0]]))
    tensors = {
        "bits": bits,
        "checksums": torch.from_numpy(checksums.view(np.int32)),
        "labels": labels,
        "indices": indices,
    }
    config = {"encoding": dataclasses.asdict(encoding), "covered": [covered.start, covered.stop], "broken": broken}
    weights_file.save_tensors(path, tensors, KIND, config)


def read_shard(path: pathlib.Path, encoding: TokenCacheInfo, covered: range) -> Shard | None:
    """What a whole shard holds; nothing if it is missing, damaged, or another one: all of its bytes are read."""
    try:
        contents = weights_file.read(path)
        _check_shard(contents, encoding)
    except UserError:
        return None
    config = contents.config or {}
    if config.get("covered") != [covered.start, covered.stop]:
        return None
    images = len(contents.states[KIND]["labels"])
    return Shard(path.name, images, contents.metadata["digest"], tuple(config["broken"]))


def write_manifest(path: pathlib.Path, encoding: TokenCacheInfo, shards: list[Shard]) -> None:
    """Finishes a store."""
    entries = [dataclasses.asdict(shard) for shard in shards]
    write_json(path / MANIFEST, {"encoding": dataclasses.asdict(encoding), "shards": entries})


def _map_shard(path: pathlib.Path, encoding: TokenCacheInfo, digest: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """The tensors of a shard, mapped, and the range of images that it covers."""
    try:
        contents = weights_file.read(path, verify=False)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(': ')[0]}: {AGAIN}.") from error
    if contents.metadata.get("digest") != digest:
        raise UserError(f"{path} is not the shard that {MANIFEST} beside it speaks of: {AGAIN}.")
    _check_shard(contents, encoding)
    start, stop = (contents.config or {})["covered"]
    return contents.states[KIND], (start, stop)


def _check_shard(contents: weights_file.Contents, encoding: TokenCacheInfo) -> None:
    found: Any = (contents.config or {}).get("encoding")
    if KIND not in contents.states or found != json.loads(json.dumps(dataclasses.asdict(encoding))):
        raise UserError(f"{contents.path} belongs to another store: {AGAIN}.")
    state = contents.states[KIND]
    count = len(state["labels"]) if "labels" in state else -1
    shapes = {
        "bits": (torch.uint8, (count, *encoding.view_shape)),
        "checksums": (torch.int32, (count, *encoding.view_shape[:2])),
        "labels": (torch.int64, (count,)),
        "indices": (torch.int64, (count,)),
    }
    whole = state.keys() == shapes.keys() and all(
        (state[name].dtype, tuple(state[name].shape)) == expected for name, expected in shapes.items()
    )
    if not whole or (count and not 0 <= state["labels"].min() <= state["labels"].max() < len(encoding.classes)):
        raise UserError(f"{contents.path} does not hold the bits that its metadata speak of: {AGAIN}.")

"""The token cache: packed bits of the views of a data set, in shards that training reads through memory maps.

A token cache is a folder of `<number>.safetensors` and a manifest, `token_cache.json`, which is written when all shards
are complete. A shard covers a range of the images and has the tensors

- `bits` (n, crops, flips, N, C / 8) uint8, as returned by `pack`, tokens in raster order: 1,024 bytes for a view of a
  256 px image with 32 bits a token;
- `checksums` (n, crops, flips) int32, the CRC-32 of each view, which starts from the label and is compared when the
  view is read;
- `labels` and `indices` (n,) int64: classes, and indices in the data set.

The metadata of a shard hold the `TokenCacheInfo`, the range of images and the names of the bad images in it.
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

from bitdance.data.image_dataset import ImageDataset
from bitdance.runtime.atomic_files import read_json, write_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.run_folder import FREE, SETTINGS
from bitdance.weights import weights_file

MANIFEST = "token_cache.json"
"""Written last: the `TokenCacheInfo`, and the shards with their digests."""

SECTION = "token_cache"
"""Of the settings of the encoding job, which are written first."""

KIND = "tokens"
AGAIN = "run its `bitdance encode` command again, which encodes only what is missing or damaged"


@dataclasses.dataclass(frozen=True)
class TokenCacheInfo:
    """How a token cache was made: everything that its bits depend on.

    Attributes:
        autoencoder: SHA-256 of the autoencoder's tensors, from `weights_file.digest`.
        precision: dtype of the encoder.
        image_size: side of a view in pixels.
        grid: side of a view in tokens, h = w.
        bits: C.
        crops: views of an image, not counting mirrored ones: crop 0 is the centre crop, the others are ADM's random
            crops with numbers from `philox.ENCODE_CROP`, functions of (seed, image, crop).
        flips: whether each crop is stored mirrored too.
        seed: of the random crops.
        images: number of images in the data set, including bad ones.
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
    classes: tuple[str, ...] = dataclasses.field(metadata=FREE)  # the names of the images begin with them

    @property
    def view_shape(self) -> tuple[int, int, int, int]:
        """(crops, flips, N, C / 8)."""
        return self.crops, 1 + self.flips, self.grid**2, self.bits // 8


@dataclasses.dataclass(frozen=True)
class Shard:
    """The entry of a shard in the manifest: file name, number of images, digest, names of its bad images."""

    file: str
    images: int
    digest: str
    bad_images: tuple[str, ...]


class TokenDataset:
    """A complete token cache, opened for reading by any number of threads. Its tensors are mapped, not loaded.

    Args:
        path: the folder.

    Attributes:
        info: how it was made.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (n,) int64, of the images in it.
        digest: SHA-256 over the digests of the shards.

    Raises:
        UserError: the token cache does not exist, is incomplete or damaged, or has shards of another one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = pathlib.Path(path).expanduser()
        if not (path / MANIFEST).is_file():
            fault = "is not finished" if is_token_cache(path) else f"holds no token cache (no {MANIFEST})"
            raise UserError(f"{path} {fault}: {AGAIN}.")
        manifest = read_json(path / MANIFEST, AGAIN)
        try:
            self.info = TokenCacheInfo(**{**manifest["info"], "classes": tuple(manifest["info"]["classes"])})
            shards = {path / pathlib.PurePath(shard["file"]).name: str(shard["digest"]) for shard in manifest["shards"]}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path / MANIFEST} is damaged or of another release ({error!r}): {AGAIN}.") from None
        self.classes, self._files = self.info.classes, list(shards)
        opened, stop = [], 0
        for file, digest in shards.items():
            tensors, covered = _map_shard(file, self.info, digest)
            if covered[0] != stop:
                break
            opened.append(tensors)
            stop = covered[1]
        if stop != self.info.images or len(opened) != len(shards):
            raise UserError(f"{path / MANIFEST} does not list all shards in their order: {AGAIN}.")
        self._bits, self._checksums = ([shard[name].numpy() for shard in opened] for name in ("bits", "checksums"))
        self._starts = np.cumsum([0, *map(len, self._bits)])
        self.labels = np.concatenate([shard["labels"].numpy() for shard in opened])
        self.digest = hashlib.sha256("".join(shards.values()).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, crop: int, flip: int) -> np.ndarray:
        """Returns the packed bits of a view, (N, C / 8) uint8, a part of the memory map.

        Raises:
            UserError: the bytes do not match their checksum.
        """
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = (index - self._starts[shard], crop, flip)
        view: np.ndarray = self._bits[shard][position]
        if zlib.crc32(view.data, int(self.labels[index])) != self._checksums[shard][position].view(np.uint32):
            raise UserError(f"{self._files[shard]} is damaged (image {position[0]}, crop {crop}): {AGAIN}.")
        return view

    def check(self, autoencoder: str, image_size: int) -> None:
        """Checks that a model with this image size can be trained on the token cache.

        Args:
            autoencoder: digest of the autoencoder that will decode.
            image_size: side of the images in pixels.

        Raises:
            UserError: it was made by another autoencoder, or from images of another size.
        """
        own = self.info
        if own.autoencoder != autoencoder:
            raise UserError(
                f"{self.path} was made by another autoencoder (digest {own.autoencoder[:16]}, not {autoencoder[:16]}): "
                "give the one that it was made by, or encode the images again."
            )
        if own.image_size != image_size:
            raise UserError(
                f"{self.path} was made from images of {own.image_size} px: set image_size={own.image_size}, or "
                f"encode the images again at {image_size} px."
            )


def is_token_cache(path: pathlib.Path) -> bool:
    """Returns whether a folder is a token cache, complete or not."""
    try:
        return (path / MANIFEST).is_file() or SECTION in json.loads((path / SETTINGS).read_text())
    except (OSError, ValueError, TypeError):
        return False


def names_digest(images: ImageDataset) -> str:
    """Returns the SHA-256 of the images' names in their order, which identifies a data set and its classes."""
    digest = hashlib.sha256()
    for index in range(len(images)):
        digest.update(images.name(index).encode() + b"\n")
    return digest.hexdigest()


def shard_file(number: int) -> str:
    """Returns the file name of a shard."""
    return f"{number:06d}.safetensors"


def write_shard(
    path: pathlib.Path,
    info: TokenCacheInfo,
    covered: range,
    bits: Tensor,
    labels: Tensor,
    indices: Tensor,
    bad_images: list[str],
) -> None:
    """Writes a shard atomically.

    Args:
        path: the file.
        info: of the token cache.
        covered: indices of its images in the data set, including bad ones.
        bits: (n, crops, flips, N, C / 8) uint8.
        labels, indices: (n,) int64.
        bad_images: names of the images that could not be read.

    Raises:
        UserError: the file cannot be written.
    """
    checksums = np.empty(bits.shape[:3], np.uint32)
    for view in np.ndindex(checksums.shape):
        checksums[view] = zlib.crc32(bits[view].numpy().data, int(labels[view[0]]))
    checksum = torch.from_numpy(checksums.view(np.int32))
    tensors = {"bits": bits, "checksums": checksum, "labels": labels, "indices": indices}
    config = {"info": dataclasses.asdict(info), "covered": [covered.start, covered.stop], "bad_images": bad_images}
    weights_file.save_tensors(path, tensors, KIND, config)


def read_shard(path: pathlib.Path, info: TokenCacheInfo, covered: range) -> Shard | None:
    """Verifies all bytes of a shard and returns its entry for the manifest.

    Returns None if the shard is missing, damaged or a different one.
    """
    try:
        contents = weights_file.read(path)
        config = _check_shard(contents, info)
    except UserError:
        return None
    if config.get("covered") != [covered.start, covered.stop]:
        return None
    images = len(contents.states[KIND]["labels"])
    return Shard(path.name, images, contents.metadata["digest"], tuple(config["bad_images"]))


def write_manifest(path: pathlib.Path, info: TokenCacheInfo, shards: list[Shard]) -> None:
    """Writes the manifest, which completes a token cache."""
    write_json(path / MANIFEST, {"info": dataclasses.asdict(info), "shards": list(map(dataclasses.asdict, shards))})


def _map_shard(path: pathlib.Path, info: TokenCacheInfo, digest: str) -> tuple[dict[str, Tensor], list[int]]:
    """Maps the tensors of a shard, without verifying them, and returns the range of images that it covers."""
    try:
        contents = weights_file.read(path, verify=False)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(': ')[0]}: {AGAIN}.") from error
    if contents.metadata.get("digest") != digest:
        raise UserError(f"{path} is not the shard that {MANIFEST} lists: {AGAIN}.")
    config = _check_shard(contents, info)
    return contents.states[KIND], config["covered"]


def _check_shard(contents: weights_file.Contents, info: TokenCacheInfo) -> dict[str, Any]:
    """Returns the configuration of a shard after checking that its tensors belong to the token cache."""
    config = contents.config or {}
    if KIND not in contents.states or config.get("info") != json.loads(json.dumps(dataclasses.asdict(info))):
        raise UserError(f"{contents.path} belongs to another token cache: {AGAIN}.")
    state = contents.states[KIND]
    count = len(state.get("labels", ()))
    expected = {
        "bits": (torch.uint8, (count, *info.view_shape)),
        "checksums": (torch.int32, (count, *info.view_shape[:2])),
        "labels": (torch.int64, (count,)),
        "indices": (torch.int64, (count,)),
    }
    is_whole = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == expected
    if not is_whole or (count and not 0 <= state["labels"].min() <= state["labels"].max() < len(info.classes)):
        raise UserError(f"{contents.path} holds other tensors than its metadata describe: {AGAIN}.")
    return config

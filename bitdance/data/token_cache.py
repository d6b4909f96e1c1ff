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

import numpy as np
import torch
from torch import Tensor

from bitdance.data.image_dataset import ImageDataset, summarize
from bitdance.runtime.atomic_files import load_json, read_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.run_folder import FREE, SETTINGS
from bitdance.weights import safetensors_files

MANIFEST = "token_cache.json"
"""Written last: the `TokenCacheInfo`, and the shards with their digests."""

SECTION = "token_cache"
"""Of the settings of the encoding job, which are written first."""

KIND = "tokens"
AGAIN = "run the same `bitdance encode` command again, which encodes only what is missing or damaged"


@dataclasses.dataclass(frozen=True)
class TokenCacheInfo:
    """How a token cache was made: everything that its bits depend on.

    Attributes:
        autoencoder: the autoencoder's `weights_file.tokenizer_digest`.
        precision: dtype of the encoder.
        image_size: side of a view in pixels.
        grid: side of a view in tokens, h = w.
        bits: C.
        crops: views of an image, not counting mirrored ones: crop 0 is the centre crop, the others are ADM's random
            crops with numbers from `philox.ENCODE_CROP`, functions of (seed, image, crop).
        flips: whether each crop is stored mirrored too.
        seed: of the random crops.
        images: number of images in the data set, including bad ones.
        names: their `ImageDataset.digest`.
        classes: class names in the order of the labels.
    """

    autoencoder: str = dataclasses.field(metadata={"difference": "the weights of the `autoencoder` differ"})
    precision: str
    image_size: int
    grid: int
    bits: int
    crops: int
    flips: bool
    seed: int
    images: int = dataclasses.field(metadata={"difference": "it had {old} images, now there are {new}"})
    names: str = dataclasses.field(metadata={"difference": "the names of the images, or how they are decoded, differ"})
    classes: tuple[str, ...] = dataclasses.field(metadata=FREE)  # the names of the images begin with them

    def __post_init__(self) -> None:
        numbers = (self.image_size, self.grid, self.bits, self.crops, self.images, self.seed + 1)
        names = (self.autoencoder, self.precision, self.names, *self.classes)
        are_numbers = all(type(number) is int and 0 < number < 1 << 40 for number in numbers)
        if not are_numbers or type(self.flips) is not bool or not all(isinstance(name, str) for name in names):
            raise ValueError("a value of another type or size than expected")

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

    Attributes:
        path: the folder.
        info: how it was made.
        classes: class names; `classes[label]` is the name of `label`.
        labels: (n,) int64, of the images in it; they may be replaced.
        digest: SHA-256 over the digests of the shards.

    Raises:
        UserError: the token cache does not exist, is incomplete or damaged, or has shards of another one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path = pathlib.Path(os.path.expanduser(path))
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
            shard, entry, covered = read_shard(file, self.info)
            if entry.digest != digest or covered.start != stop:
                raise UserError(f"{file} is not the shard that {MANIFEST} lists: {AGAIN}.")
            opened.append(shard)
            stop = covered.stop
        if stop != self.info.images:
            raise UserError(f"{path / MANIFEST} does not list all shards: {AGAIN}.")
        self._bits, self._checksums = ([shard[name].numpy() for shard in opened] for name in ("bits", "checksums"))
        self._starts = np.cumsum([0, *map(len, self._bits)])
        self._stored_labels = self.labels = np.concatenate([shard["labels"].numpy() for shard in opened])
        self.digest = hashlib.sha256("".join(shards.values()).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def summary(self) -> str:
        """Number of images and classes, in words."""
        return summarize(self.path, self.classes, self.labels, "encoded")

    def read(self, index: int, crop: int, flip: int) -> np.ndarray:
        """Returns the packed bits of a view, (N, C / 8) uint8, a part of the memory map.

        Raises:
            UserError: the bytes do not match their checksum.
        """
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = (index - self._starts[shard], crop, flip)
        view: np.ndarray = self._bits[shard][position]
        if zlib.crc32(view.data, int(self._stored_labels[index])) != self._checksums[shard][position].view(np.uint32):
            raise UserError(f"{self._files[shard]} is damaged (image {position[0]}, crop {crop}): {AGAIN}.")
        return view

    def check(self, autoencoder: str, image_size: int) -> None:
        """Checks that a model of this image size, with the autoencoder of this digest, can be trained on the cache.

        Raises:
            UserError: it was made by another autoencoder, or from images of another size.
        """
        own, size = self.info.autoencoder, self.info.image_size
        if own != autoencoder:
            digests = f"digest {own[:16]}, not {autoencoder[:16]}"
            raise UserError(f"{self.path} was made by another autoencoder ({digests}): use it or encode again.")
        if size != image_size:
            raise UserError(f"{self.path} was made from images of {size} px: set image_size={size} or encode again.")


def is_token_cache(path: pathlib.Path) -> bool:
    """Whether a folder is a token cache, complete or not."""
    try:
        return (path / MANIFEST).is_file() or SECTION in load_json(path / SETTINGS)
    except (OSError, ValueError, TypeError):
        return False


def write_shard(
    path: pathlib.Path, info: TokenCacheInfo, images: ImageDataset, covered: range, kept: list[int], bits: Tensor
) -> Shard:
    """Writes a shard atomically: the bits of the images `kept`, (n, crops, flips, N, C / 8) uint8, of those `covered`.

    Raises:
        UserError: the file cannot be written.
    """
    labels, checksums = images.labels[kept], np.empty(bits.shape[:3], np.uint32)
    for view in np.ndindex(checksums.shape):
        checksums[view] = zlib.crc32(bits[view].numpy().data, int(labels[view[0]]))
    arrays = {"checksums": checksums.view(np.int32), "labels": labels, "indices": np.array(kept, np.int64)}
    bad_images = [images.name(index) for index in sorted(set(covered).difference(kept))]
    config = {"info": dataclasses.asdict(info), "covered": [covered.start, covered.stop], "bad_images": bad_images}
    tensors = {"bits": bits, **{name: torch.from_numpy(array) for name, array in arrays.items()}}
    return Shard(path.name, len(kept), safetensors_files.save_tensors(path, tensors, KIND, config), tuple(bad_images))


def read_shard(
    path: pathlib.Path, info: TokenCacheInfo, verify: bool = False
) -> tuple[dict[str, Tensor], Shard, range]:
    """Maps the tensors of a shard, and checks their shapes and that they belong to the token cache.

    Args:
        verify: read all bytes, and compare them with their digest.

    Returns:
        The tensors, the entry in the manifest, and the indices of the images that the shard covers.

    Raises:
        UserError: the shard is missing, damaged, or of another token cache.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: {AGAIN}.")
    try:
        contents = safetensors_files.read_safetensors(path, verify)
    except UserError as error:
        raise UserError(f"{str(error).rpartition(': ')[0]}: {AGAIN}.") from error
    state, config = contents.states.get(KIND, {}), contents.config or {}
    if config.get("info") != json.loads(json.dumps(dataclasses.asdict(info))):
        raise UserError(f"{path} belongs to another token cache: {AGAIN}.")
    count = state["labels"].numel() if "labels" in state else 0
    expected = {
        "bits": (torch.uint8, (count, *info.view_shape)),
        "checksums": (torch.int32, (count, *info.view_shape[:2])),
        "labels": (torch.int64, (count,)),
        "indices": (torch.int64, (count,)),
    }
    is_whole = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == expected
    match config:
        case {"covered": [int(start), int(stop)], "bad_images": [*bad_images]}:
            is_whole &= 0 <= start <= stop <= info.images and all(isinstance(name, str) for name in bad_images)
        case _:
            is_whole = False
    if not is_whole or (count and not 0 <= state["labels"].min() <= state["labels"].max() < len(info.classes)):
        raise UserError(f"{path} holds other contents than the metadata of a shard describe: {AGAIN}.")
    return state, Shard(path.name, count, contents.metadata["digest"], tuple(bad_images)), range(start, stop)

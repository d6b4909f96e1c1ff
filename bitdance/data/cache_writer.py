"""The job behind `bitdance encode`: a set of images into a store of bits, by any number of processes.

The images are cut into fixed shards before it starts, and each process takes whole shards. Whatever is killed at
whatever moment, the same command goes on where the job stopped, and ends with the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitdance.data.bad_images import BadImages
from bitdance.data.crops import center_crop, horizontal_flip, normalize, random_crop, to_array
from bitdance.data.images import ImageDataset
from bitdance.data.prefetch import PREFETCH, read_ahead
from bitdance.data.token_cache import (
    JOB,
    MANIFEST,
    Shard,
    TokenCacheInfo,
    names_digest,
    read_shard,
    shard_file,
    write_manifest,
    write_shard,
)
from bitdance.models import philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import pack
from bitdance.models.tokens import tokens_from_grid
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.run_folder import alone, claim, with_machine


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An autoencoder on its device, in the dtype to compute in, and what it is to make of images.

    Attributes:
        digest: of the autoencoder's tensors as they lie in their file.
        crops, flips, seed, image_size: see `bitdance.data.token_cache.TokenCacheInfo`.
        batch_size: views that the encoder takes at once.
        shard_size: images of a shard.
        num_workers: threads that read images.
        max_broken: images that may be broken in all.
    """

    autoencoder: Autoencoder
    digest: str
    image_size: int = 256
    crops: int = 1
    flips: bool = True
    seed: int = 0
    batch_size: int = 32
    shard_size: int = 512
    num_workers: int = 16
    max_broken: int = 100

    def __post_init__(self) -> None:
        for name in ("crops", "batch_size", "shard_size", "num_workers", "image_size"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)} does not fit: it must be at least 1.")
        if self.max_broken < 0:
            raise UserError(f"--max-broken {self.max_broken} does not fit: it must be at least 0.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is out of range: it must lie between 0 and {2**32 - 1}.")
        if self.image_size % self.autoencoder.config.down_size:
            raise UserError(
                f"--image-size {self.image_size} does not fit the autoencoder: it must be a multiple of "
                f"{self.autoencoder.config.down_size}."
            )

    def describe(self, images: ImageDataset) -> TokenCacheInfo:
        """How a store of these images is made."""
        config = self.autoencoder.config
        return TokenCacheInfo(
            autoencoder=self.digest,
            precision=str(next(self.autoencoder.parameters()).dtype).removeprefix("torch."),
            image_size=self.image_size,
            grid=self.image_size // config.down_size,
            bits=config.bits,
            crops=self.crops,
            flips=self.flips,
            seed=self.seed,
            images=len(images),
            names=names_digest(images),
            classes=tuple(images.classes),
        )

    def views(self, images: ImageDataset, index: int) -> np.ndarray:
        """The crops of an image, each followed by its mirror image where wanted: (crops * flips, H, W, 3) uint8.

        Raises:
            UserError: the image cannot be read.
        """
        image, size = images.read(index), self.image_size
        crops = [center_crop(image, size)]
        if self.crops > 1:
            rows = torch.tensor([index])
            draws = philox.uniform(self.seed, rows, 3, stream=philox.ENCODE_CROP, step=0, draws=self.crops)[:, 0]
            for scale, top, left in draws[1:].tolist():
                crops.append(random_crop(image, size, (scale, top, left)))
        views = [view for crop in crops for view in ((crop, horizontal_flip(crop)) if self.flips else (crop,))]
        return np.stack([to_array(view) for view in views])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(V, H, W, 3) uint8 -> (V, N, C / 8) uint8 on the CPU, tokens in raster order."""
        parameter = next(self.autoencoder.parameters())
        packed = []
        for part in pixels.split(self.batch_size):
            x = normalize(part.to(parameter.device)).to(parameter.dtype)
            packed.append(pack(tokens_from_grid(self.autoencoder.encode(x))))  # (V, C, h, w) -> (V, N, C / 8)
        return torch.cat(packed).cpu()


@dataclasses.dataclass(frozen=True)
class EncodeResult:
    """What came of a run of the job.

    Attributes:
        result: the folder.
        images: in the store.
        broken: images that were skipped.
        shards: files.
        bytes: of the shards.
        made: images that this process encoded in this run; the rest was there or is the others'.
        seconds: that this process took for them.
        peak_memory: bytes, on the GPU or else of the whole process.
    """

    result: pathlib.Path
    images: int
    broken: int
    shards: int
    bytes: int
    made: int
    seconds: float
    peak_memory: int


def write_token_cache(images: ImageDataset, encoder: Encoder, folder: pathlib.Path, world: World) -> EncodeResult:
    """Makes what is missing of a store; shards that are there are checked to the last byte.

    Raises:
        UserError: a setting does not fit, the folder holds a store of other settings, too many images are broken, or a
            file cannot be written.
    """
    encoding = encoder.describe(images)
    cuts = [
        range(start, min(start + encoder.shard_size, len(images)))
        for start in range(0, len(images), encoder.shard_size)
    ]
    settings = {**dataclasses.asdict(encoding), "shard_size": encoder.shard_size, "batch_size": encoder.batch_size}
    del settings["classes"]  # the images' names begin with theirs, and a difference is told in one line
    place = folder.resolve()
    with alone(place, place.with_name(place.name + ".lock"), world):
        claim(folder / JOB, with_machine(settings, world), world)
        found = world.broadcast(_find(folder, encoding, cuts) if world.is_main else [])
        missing = [number for number, shard in enumerate(found) if shard is None]
        broken = BadImages(encoder.max_broken, sum(len(shard.broken) for shard in found if shard))
        start = time.perf_counter()
        mine = [(number, cuts[number]) for number in missing[world.rank :: world.size]]
        made = _make_shards(images, encoder, encoding, folder, world, mine, broken)
        seconds = time.perf_counter() - start
        world.barrier()
        shards = world.broadcast(_finish(folder, encoding, cuts, found, broken) if world.is_main else [])
        world.barrier()
    return EncodeResult(
        result=folder,
        images=sum(shard.images for shard in shards),
        broken=sum(len(shard.broken) for shard in shards),
        shards=len(shards),
        bytes=sum((folder / shard.file).stat().st_size for shard in shards),
        made=made,
        seconds=seconds,
        peak_memory=world.peak_memory(),
    )


def _find(folder: pathlib.Path, encoding: TokenCacheInfo, cuts: list[range]) -> list[Shard | None]:
    from tqdm import tqdm

    bar = tqdm(cuts, desc="checking", unit="shard", dynamic_ncols=True, delay=2)
    return [read_shard(folder / shard_file(number), encoding, covered) for number, covered in enumerate(bar)]


def _make_shards(
    images: ImageDataset,
    encoder: Encoder,
    encoding: TokenCacheInfo,
    folder: pathlib.Path,
    world: World,
    shards: list[tuple[int, range]],
    broken: BadImages,
) -> int:
    """Makes this process's shards and returns how many images that were; the bar shows the first process's."""
    from tqdm import tqdm

    made = 0
    with (
        tqdm(
            total=sum(len(covered) for _, covered in shards),
            desc="encoding" if world.size == 1 else f"encoding, process 1 of {world.size}",
            unit="image",
            disable=not (world.is_main and shards),
            dynamic_ncols=True,
        ) as bar,
        concurrent.futures.ThreadPoolExecutor(encoder.num_workers) as pool,
    ):
        for number, covered in shards:
            bits, kept = _encode(images, encoder, encoding, pool, covered, broken, bar.update)
            names = [images.name(index) for index in covered if index not in set(kept)]
            indices = torch.tensor(kept, dtype=torch.int64)
            labels = torch.from_numpy(images.labels[indices.numpy()])
            write_shard(folder / shard_file(number), encoding, covered, bits, labels, indices, names)
            made += len(kept)
    return made


def _encode(
    images: ImageDataset,
    encoder: Encoder,
    encoding: TokenCacheInfo,
    pool: concurrent.futures.Executor,
    covered: range,
    broken: BadImages,
    progress: Callable[[int], object],
) -> tuple[Tensor, list[int]]:
    """The bits of a shard's images, (n, crops, flips, N, C / 8), and which images these are."""

    def read(index: int) -> np.ndarray | None:
        try:
            return encoder.views(images, index)
        except UserError as error:
            broken.add(index, error)
            return None

    # Batches are cut inside a shard alone, so that its bits depend on no other: shapes decide the last digits.
    count = max(1, encoder.batch_size // (encoding.crops * (1 + encoding.flips)))
    groups = [covered[start : start + count] for start in range(0, len(covered), count)]
    packed, kept = [torch.empty((0, *encoding.view_shape), dtype=torch.uint8)], []
    for group, read_images in read_ahead(groups, lambda group: [pool.submit(read, i) for i in group], PREFETCH):
        whole = [views for views in read_images if views is not None]
        kept += [index for index, views in zip(group, read_images, strict=True) if views is not None]
        if whole:
            made = encoder.encode(torch.from_numpy(np.concatenate(whole)))
            packed.append(made.view(len(whole), *encoding.view_shape))
        progress(len(group))
    return torch.cat(packed), kept


def _finish(
    folder: pathlib.Path, encoding: TokenCacheInfo, cuts: list[range], found: list[Shard | None], broken: BadImages
) -> list[Shard]:
    """Writes the manifest, once all shards are there."""
    shards = []
    for number, (covered, shard) in enumerate(zip(cuts, found, strict=True)):
        shard = shard or read_shard(folder / shard_file(number), encoding, covered)
        if shard is None:
            raise UserError(
                f"{folder / shard_file(number)} was damaged or lost: run the command again, it is made anew."
            )
        shards.append(shard)
    names = [name for shard in shards for name in shard.broken]
    if len(names) > broken.limit:
        raise UserError(
            f"{len(names)} images are broken, more than --max-broken {broken.limit} allows, the last one {names[-1]}: "
            "repair or remove them."
        )
    if not any(shard.images for shard in shards):
        raise UserError(f"not one image could be read: {folder} holds no bits.")
    if not (folder / MANIFEST).exists() or None in found:
        write_manifest(folder, encoding, shards)
    return shards

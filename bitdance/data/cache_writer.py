"""Encodes a data set into a token cache with any number of processes (`bitdance encode`).

The images are divided into fixed shards, and each process encodes whole shards. If the job is killed, the same command
continues it, and the finished token cache has the same bytes as that of an undisturbed job.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bitdance.data.bad_images import BadImages
from bitdance.data.crops import center_crop, horizontal_flip, normalize, random_crop, to_array
from bitdance.data.decoding import one_image
from bitdance.data.encode_config import EncodeConfig
from bitdance.data.image_dataset import ImageDataset
from bitdance.data.prefetch import read_ahead
from bitdance.data.token_cache import MANIFEST, SECTION, Shard, TokenCacheInfo, read_shard, write_shard
from bitdance.models import philox
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import pack
from bitdance.models.tokens import tokens_from_grid
from bitdance.runtime.atomic_files import load_json, write_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.progress import progress_bar
from bitdance.runtime.run_folder import Machine, check_settings, exclusive


@dataclasses.dataclass(frozen=True)
class EncodeResult:
    """Result of an encoding job.

    Attributes:
        result: the folder.
        images, bad_images: number of images in the token cache, and of those that were skipped.
        shards, bytes: number of shards, and their total size.
        encoded, seconds: images that this process encoded in this run, and the time that it took.
        peak_memory: bytes, on the GPU or else of the whole process.
    """

    result: pathlib.Path
    images: int
    bad_images: int
    shards: int
    bytes: int
    encoded: int
    seconds: float
    peak_memory: int


@dataclasses.dataclass
class CacheWriter:
    """Encodes a data set into a token cache.

    Args:
        images: the data set.
        autoencoder: on its device, in the dtype to compute in.
        digest: the autoencoder's `weights_file.tokenizer_digest`.
        folder: of the token cache.

    Raises:
        UserError: the size of the images does not match the autoencoder.
    """

    images: ImageDataset
    autoencoder: Autoencoder
    digest: str
    folder: pathlib.Path
    config: EncodeConfig

    def __post_init__(self) -> None:
        config, network, count = self.config, self.autoencoder.config, len(self.images)
        self._info = TokenCacheInfo(
            autoencoder=self.digest,
            precision=str(next(self.autoencoder.parameters()).dtype).removeprefix("torch."),
            image_size=config.image_size,
            grid=network.grid(config.image_size),
            bits=network.bits,
            crops=config.crops,
            flips=config.flips,
            seed=config.seed,
            images=count,
            names=self.images.digest,
            classes=tuple(self.images.classes),
        )
        step = config.shard_size
        self._ranges = [range(count)[start : start + step] for start in range(0, count, step)]
        self._bad_images = BadImages(config.max_bad_images, self.images)

    def run(self, world: World) -> EncodeResult:
        """Encodes the missing and damaged shards, shared among the processes; existing shards are verified.

        Raises:
            UserError: the folder holds a token cache with other settings, too many images are unreadable, or a file
                cannot be written.
        """
        folder, config = self.folder, self.config
        sections = {SECTION: self._info, "encode": config, "machine": Machine.of(world)}
        if any(info != self._info for info in world.gather(self._info)):
            raise UserError("the processes see different images or autoencoders: give all machines the same files.")
        with exclusive(folder, world):
            has_shards = any(folder.glob("*.safetensors"))
            Machine.apply(check_settings(folder, sections, world, has_shards).settings["machine"], world)
            found = world.broadcast(self._find_shards() if world.is_main else [])
            self._bad_images.before = sum(len(shard.bad_images) for shard in found if shard)
            start = time.perf_counter()
            mine = [number for number, shard in enumerate(found) if shard is None][world.rank :: world.size]
            with (
                progress_bar(
                    sum(len(self._ranges[number]) for number in mine),
                    "encoding" if world.size == 1 else f"encoding, process 1 of {world.size}",
                    "images",
                    disable=not (world.is_main and mine),
                ) as bar,
                concurrent.futures.ThreadPoolExecutor(config.num_workers) as pool,
            ):
                written = {number: self._write_shard(number, pool, bar.update) for number in mine}
            seconds = time.perf_counter() - start
            world.barrier()  # others may need longer than a collective waits
            parts = world.gather(written)
            shards = world.broadcast(self._finish(found, parts) if world.is_main else [])
            world.barrier()
        return EncodeResult(
            result=folder,
            images=sum(shard.images for shard in shards),
            bad_images=sum(len(shard.bad_images) for shard in shards),
            shards=len(shards),
            bytes=sum((folder / shard.file).stat().st_size for shard in shards),
            encoded=sum(shard.images for shard in written.values()),
            seconds=seconds,
            peak_memory=world.peak_memory(),
        )

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:06d}.safetensors"

    def _find_shards(self) -> list[Shard | None]:
        """Verifies all shards; None for those that are missing, damaged or different ones."""
        shards: list[Shard | None] = [None] * len(self._ranges)
        with progress_bar(len(shards), "checking", "shards", leave=False) as bar:
            for number, covered in enumerate(self._ranges):
                with contextlib.suppress(UserError):
                    _, shard, found = read_shard(self._path(number), self._info, verify=True)
                    shards[number] = shard if found == covered else None
                bar.update()
        return shards

    def _write_shard(self, number: int, pool: concurrent.futures.Executor, progress: Callable[[int], object]) -> Shard:
        """Encodes and writes a shard."""
        covered, info = self._ranges[number], self._info
        # Batches do not cross shards: the shapes decide the last digits, and a shard must not depend on the others.
        count = max(1, self.config.batch_size // (info.crops * (1 + info.flips)))
        groups = [covered[start : start + count] for start in range(0, len(covered), count)]
        packed, kept = [torch.empty((0, *info.view_shape), dtype=torch.uint8)], []
        for group, views in read_ahead(groups, lambda group: [pool.submit(self._read, i) for i in group]):
            readable = {index: view for index, view in zip(group, views, strict=True) if view is not None}
            kept += list(readable)
            if readable:
                bits = self._encode(torch.from_numpy(np.concatenate(list(readable.values()))))
                packed.append(bits.view(len(readable), *info.view_shape))
            progress(len(group))
        return write_shard(self._path(number), info, self.images, covered, kept, torch.cat(packed))

    @one_image()
    def _read(self, index: int) -> np.ndarray | None:
        """Reads the views of an image, (crops * flips, H, W, 3) uint8; None if the image is unreadable."""
        try:
            image = self.images.read(index)
        except UserError as error:
            self._bad_images.add(index, error)
            return None
        config = self.config
        views = [center_crop(image, config.image_size)]
        if config.crops > 1:
            ids = torch.tensor([index])
            draws = philox.uniform(config.seed, ids, 3, stream=philox.ENCODE_CROP, step=0, draws=config.crops)[:, 0]
            views += [random_crop(image, config.image_size, (a, b, c)) for a, b, c in draws[1:].tolist()]
        if config.flips:
            views = [view for crop in views for view in (crop, horizontal_flip(crop))]
        return np.stack([to_array(view) for view in views])

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Encodes views, (V, H, W, 3) uint8, to packed bits on the CPU, (V, N, C / 8) uint8, tokens in raster order."""
        parameter = next(self.autoencoder.parameters())
        packed = []
        for part in pixels.split(self.config.batch_size):
            x = normalize(part.to(parameter.device)).to(parameter.dtype)
            packed.append(pack(tokens_from_grid(self.autoencoder.encode(x))))  # (V, C, h, w) -> (V, N, C / 8)
        return torch.cat(packed).cpu()

    def _finish(self, found: list[Shard | None], written: list[dict[int, Shard]]) -> list[Shard]:
        """Writes the manifest of the shards that were found and those that each process has written."""
        new = {number: shard for part in written for number, shard in part.items()}
        shards = [shard or new[number] for number, shard in enumerate(found)]
        names, limit = [name for shard in shards for name in shard.bad_images], self._bad_images.limit
        if len(names) > limit:  # of all processes, each of which has compared only its own
            raise UserError(
                f"{len(names)} images are unreadable, more than max_bad_images={limit} allows, the last: {names[-1]}; "
                "repair or remove them."
            )
        if not any(shard.images for shard in shards):
            raise UserError(f"none of the images of {self.images.path} can be read: repair them.")
        path = self.folder / MANIFEST
        manifest = {"info": dataclasses.asdict(self._info), "shards": [dataclasses.asdict(shard) for shard in shards]}
        try:
            is_written = load_json(path) == json.loads(json.dumps(manifest))  # which has lists in place of tuples
        except (OSError, ValueError):
            is_written = False
        if not is_written:  # a complete token cache may be in a folder that cannot be written
            write_json(path, manifest)
        return shards

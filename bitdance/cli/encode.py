"""`bitdance encode`: encodes a data set into a token cache to train from."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from bitdance.cli.parsing import Positional, parse
from bitdance.weights.resolve import Precision, choose_dtype, find_autoencoder_alone


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode a data set into a token cache: `bitdance train --data-path OUTPUT` trains from it without the encoder.

    Any number of processes under torchrun; an interrupted job goes on with the same command.

    Attributes:
        data: images: a folder or zip of class folders, or CIFAR-10's archives.
        autoencoder: `demo`, or a file of weights.
        output: folder of the token cache.
        image_size: side of the crops in pixels.
        crops: views of each image: the centre crop, and random crops as in ADM from the second one on.
        flips: store each view mirrored too.
        seed: of the random crops.
        batch_size: views that the encoder takes at once.
        shard_size: images per file; after an interruption incomplete files are encoded again.
        max_bad_images: images that may be unreadable; they are named and skipped.
        num_workers: threads that read images.
        mixed_precision: bf16 or none (float32); auto is bf16 on a GPU.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
        threads: CPU threads; by default all cores.
    """

    data: Positional[pathlib.Path]
    autoencoder: str
    output: pathlib.Path
    image_size: int = 256
    crops: int = 1
    flips: bool = True
    seed: int = 0
    batch_size: int = 32
    shard_size: int = 512
    max_bad_images: int = 100
    num_workers: int = 16
    mixed_precision: Precision = "auto"
    device: str | None = None
    threads: int | None = None


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Encode, arguments, "bitdance encode")
    from bitdance.data.cache_writer import CacheWriter
    from bitdance.data.images import open_images
    from bitdance.runtime.process_group import init_distributed
    from bitdance.weights import weights_file

    with init_distributed(command.device, command.threads) as world:
        contents = weights_file.read(find_autoencoder_alone(command.autoencoder))
        autoencoder = weights_file.load_autoencoder(contents, choose_dtype(command.mixed_precision, world.device))
        digest = weights_file.digest(contents.states["autoencoder"])
        own = ("image_size", "crops", "flips", "seed", "batch_size", "shard_size", "num_workers", "max_bad_images")
        settings = {name: getattr(command, name) for name in own}
        images = open_images(command.data)
        result = CacheWriter(images, autoencoder.to(world.device), digest, command.output, **settings).run(world)
        if world.is_main:
            print(json.dumps({**dataclasses.asdict(result), "processes": world.size}, default=str))

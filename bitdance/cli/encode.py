"""`bitdance encode`: a set of images as a token cache to train from."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from bitdance.cli.options import PrecisionOptions
from bitdance.cli.parsing import parse
from bitdance.data.encode_config import EncodeConfig

EXAMPLES = """
bitdance encode --data-path pictures.zip --autoencoder runs/ae --image-size 32 --output runs/tokens
torchrun --nproc_per_node 8 -m bitdance encode --data-path imagenet/train --autoencoder autoencoder --output tokens
"""


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode a set of images to a token cache: `bitdance train --data-path OUTPUT` trains without the encoder.

    Any number of processes under torchrun; an interrupted job is resumed by the same command.

    Attributes:
        data_path: a folder, zip or tar of class folders, ImageNet's tar or parquet files, or CIFAR-10's archives.
        autoencoder: demo, autoencoder (the released one), the folder of a training run, or a file of weights.
        output: folder of the token cache.
    """

    data_path: pathlib.Path
    autoencoder: str
    output: pathlib.Path
    how: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Encode, arguments, "bitdance encode", EXAMPLES)
    from bitdance.data.cache_writer import CacheWriter
    from bitdance.data.image_dataset import print_summary
    from bitdance.data.images import open_images
    from bitdance.runtime.run_folder import check_apart
    from bitdance.sampling.pipeline import choose_dtype
    from bitdance.weights import weights_file
    from bitdance.weights.resolve import find_weights

    check_apart(command.output, command.data_path)
    with command.where.init_distributed() as world:
        contents = weights_file.read(find_weights(command.autoencoder, "autoencoder"))
        dtype = choose_dtype(command.where.precision, world.device)
        autoencoder = weights_file.load_autoencoder(contents, dtype).to(world.device)
        digest = weights_file.tokenizer_digest(contents)
        images = open_images(command.data_path)
        if world.is_main:
            print_summary(images.summary)
        writer = CacheWriter(images, autoencoder, digest, command.output, command.how)
        result = writer.run(world)
        if world.is_main:
            skipped = f", {result.bad_images} unreadable ones skipped" if result.bad_images else ""
            print(f"{result.images} images encoded{skipped}: {result.result}")
            if not sys.stdout.isatty():  # for programs
                print(json.dumps({**dataclasses.asdict(result), "processes": world.size}, default=str))

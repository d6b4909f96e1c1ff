"""`bitdance nearest`: a check that a model does not copy its training data."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bitdance.cli.options import DeviceOptions
from bitdance.cli.parsing import Positional, parse
from bitdance.config import Split
from bitdance.runtime.errors import UserError, check_fields

if TYPE_CHECKING:
    import numpy as np
    import torch

EXAMPLES = """
bitdance nearest samples --data-path pictures.zip
bitdance nearest samples --data-path cifar-10-python.tar.gz --held-out cifar-10-python.tar.gz --held-out-split test
"""


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Find the nearest training image of each sample.

    Attributes:
        samples: folder of samples, or an .npz file of them.
        data_path: the training images: a folder, zip or tar of class folders, ImageNet's tar or parquet files, or
            CIFAR-10's archives.
        held_out: real images that were not trained on; their distances to the training images show how similar
            unrelated images are.
        held_out_split: train or test, for CIFAR-10's archives.
        output: folder for nearest.png and nearest.json.
        shown: pairs in the picture, the nearest first.
        max_bad_images: unreadable images that are tolerated, named and skipped; by default a tenth of your own
            pictures, at least 10, and 100 of ImageNet.
    """

    samples: Positional[pathlib.Path]
    data_path: pathlib.Path
    held_out: pathlib.Path | None = None
    held_out_split: Split = "train"
    output: pathlib.Path = pathlib.Path("nearest")
    shown: int = 16
    max_bad_images: int | None = None
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        check_fields(self, "shown", lambda value: value >= 1, "be at least 1")
        check_fields(self, "max_bad_images", lambda value: value >= 0, "be at least 0")


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Nearest, arguments, "bitdance nearest", EXAMPLES)
    with command.where.init_distributed(only_one=True) as world:
        _compare(command, world.device)


def _compare(command: Nearest, device: torch.device) -> None:
    import numpy as np

    from bitdance.data.image_dataset import print_summary
    from bitdance.metrics.image_sources import ImageFileSource, open_source
    from bitdance.metrics.nearest_neighbours import BLOCK, find_nearest
    from bitdance.runtime.atomic_files import write_json
    from bitdance.runtime.progress import progress_bar
    from bitdance.sampling.image_grid import image_grid
    from bitdance.sampling.writers import write_png

    held_out = command.held_out
    if held_out and command.held_out_split == "train" and held_out.resolve() == command.data_path.resolve():
        raise UserError(
            f"held_out={held_out} are the training images: name others, or set held_out_split=test for a CIFAR-10 "
            "archive."
        )
    samples = open_source(command.samples)
    _, side, width, _ = samples.shape
    if side != width or samples.dtype != np.uint8:
        held = f"{samples.dtype} images of {width} x {side} pixels"
        raise UserError(f"{command.samples} holds {held}: give square ones of 8 bits (uint8).")
    queries = np.concatenate(list(samples.blocks(256)))
    references = ImageFileSource(command.data_path, side, skips=True, max_bad_images=command.max_bad_images)
    print_summary(references.summary)
    size = max(1, BLOCK // queries[0].size)

    def read(source: ImageFileSource) -> Iterator[np.ndarray]:
        with progress_bar(len(source), f"comparing with {source.path.name}", "images") as bar:
            for number, block in enumerate(source.blocks(size)):
                yield block
                bar.update(min(size, len(source) - number * size))

    distance, index, mirrored = find_nearest(queries, read(references), device)
    positions = [position for position in range(len(references)) if position not in references.bad_images]
    metrics: dict[str, Any] = {"images": len(queries), "training_images": len(positions), **_summarize(distance)}
    if held_out is not None:
        options = (side, command.held_out_split, len(queries))
        real = ImageFileSource(held_out, *options, skips=True, max_bad_images=command.max_bad_images)
        print_summary(real.summary)
        unseen = np.concatenate(list(real.blocks(256)))
        metrics["held_out"] = _summarize(find_nearest(unseen, read(references), device)[0])
    order = np.argsort(distance)[: command.shown]
    found = np.stack([references.read(positions[index[i]])[:, :: -1 if mirrored[i] else 1] for i in order])
    write_json(command.output / "nearest.json", metrics)
    picture = command.output / "nearest.png"
    pairs = np.concatenate([queries[order], found])
    write_png(picture, image_grid(pairs, len(order), ("generated", "nearest"), scale=None))
    text = "minimum {minimum:.1f}, median {median:.1f}"
    line = f"distance to the nearest training image in grey levels: generated images {text.format(**metrics)}"
    if held_out is not None:
        line += f"; held-out images {text.format(**metrics['held_out'])}"
    print(f"{line}: {picture}")


def _summarize(distance: np.ndarray) -> dict[str, float]:
    import numpy as np

    return {"minimum": float(distance.min()), "median": float(np.median(distance)), "mean": float(distance.mean())}

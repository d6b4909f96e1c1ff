"""`bitdance nearest`: a check that a model does not copy its training data."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.options import DeviceOptions
from bitdance.cli.parsing import Positional, parse
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
        samples: folder written by `bitdance sample`.
        data_path: the training images: a folder, zip or tar of class folders, ImageNet's tar or parquet files, or
            CIFAR-10's archives.
        held_out: real images that were not trained on; their distances to the training images show how similar
            unrelated images are.
        held_out_split: train or test, for CIFAR-10's archives.
        output: folder for nearest.png and nearest.json.
        shown: pairs in the picture, the nearest first.
    """

    samples: Positional[pathlib.Path]
    data_path: pathlib.Path
    held_out: pathlib.Path | None = None
    held_out_split: Literal["train", "test"] = "train"
    output: pathlib.Path = pathlib.Path("nearest")
    shown: int = 16
    where: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        check_fields(self, "shown", lambda value: value >= 1, "be at least 1")


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Nearest, arguments, "bitdance nearest", EXAMPLES)
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.where.device, command.where.threads) as world:
        _compare(command, world.device)


def _compare(command: Nearest, device: torch.device) -> None:
    import numpy as np

    from bitdance.metrics.nearest_neighbours import find_nearest
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
    queries = _read_samples(command.samples)
    side = queries.shape[1]
    references = _read_images(command.data_path, side)
    with progress_bar(len(references), "comparing", "images") as bar:
        distance, index, mirrored = find_nearest(queries, references, bar.update, device)
    metrics: dict[str, Any] = {"images": len(queries), "training_images": len(references), **_summarize(distance)}
    if held_out is not None:
        real = _read_images(held_out, side, len(queries), command.held_out_split)
        metrics["held_out"] = _summarize(find_nearest(real, references, device=device)[0])
    order = np.argsort(distance)[: command.shown]
    found = np.stack([references[index[i]][:, :: -1 if mirrored[i] else 1] for i in order])
    write_json(command.output / "nearest.json", metrics)
    picture = command.output / "nearest.png"
    pairs = np.concatenate([queries[order], found])
    write_png(picture, image_grid(pairs, len(order), ("generated", "nearest"), scale=max(1, 96 // side)))
    text = "minimum {minimum:.1f}, median {median:.1f}"
    line = f"distance to the nearest training image in grey levels: generated images {text.format(**metrics)}"
    if held_out is not None:
        line += f"; held-out images {text.format(**metrics['held_out'])}"
    print(f"{line}: {picture}")


def _summarize(distance: np.ndarray) -> dict[str, float]:
    import numpy as np

    return {"minimum": float(distance.min()), "median": float(np.median(distance)), "mean": float(distance.mean())}


def _read_samples(folder: pathlib.Path) -> np.ndarray:
    """Reads the images in a record of `bitdance sample`: (B, H, W, 3) uint8."""
    import numpy as np

    from bitdance.data.crops import to_array
    from bitdance.data.decoding import read_image

    try:
        files = [entry["file"] for entry in json.loads((folder / "samples.json").read_text())["images"]]
        return np.stack([to_array(read_image(folder / file)) for file in files])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} holds no samples.json with its images: name a folder that `bitdance "
            "sample` wrote for classes, not as a job."
        ) from None


def _read_images(
    data: pathlib.Path, side: int, limit: int | None = None, split: Literal["train", "test"] = "train"
) -> np.ndarray:
    """Reads all images of a set, or `limit` evenly spaced ones, cropped to squares: (R, side, side, 3) uint8."""
    import numpy as np

    from bitdance.data.crops import center_crop, to_array
    from bitdance.data.image_dataset import evenly_spaced
    from bitdance.data.images import open_images
    from bitdance.runtime.progress import progress_bar

    images = open_images(data, split)
    chosen = evenly_spaced(len(images), limit)
    pixels = []
    with progress_bar(len(chosen), f"reading {data.name}", "images") as bar:
        for i in chosen:
            pixels.append(to_array(center_crop(images.read(int(i)), side)))
            bar.update()
    return np.stack(pixels)

"""`bitdance nearest`: a check that a model does not copy its training data."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.parsing import Positional, parse
from bitdance.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Find the training image that is nearest to each generated one.

    Attributes:
        samples: folder written by `bitdance sample`.
        data: the training images: a folder, zip or tar of class folders, ImageNet's tar or parquet, or CIFAR-10's.
        held_out: real images that were not trained on; their distances to the training images show how similar
            unrelated images are.
        held_out_split: train or test, for CIFAR-10's archives.
        output: folder for nearest.png and nearest.json.
        shown: pairs in the picture, the nearest first.
    """

    samples: Positional[pathlib.Path]
    data: Positional[pathlib.Path]
    held_out: pathlib.Path | None = None
    held_out_split: Literal["train", "test"] = "train"
    output: pathlib.Path = pathlib.Path("nearest")
    shown: int = 16


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Nearest, arguments, "bitdance nearest")
    if command.shown < 1:
        raise UserError(f"shown={command.shown} is invalid: it must be at least 1.")
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from bitdance.metrics.nearest_neighbours import find_nearest
    from bitdance.runtime.atomic_files import atomic_write
    from bitdance.sampling.image_grid import grid

    held_out = command.held_out
    if held_out and command.held_out_split == "train" and held_out.resolve() == command.data.resolve():
        raise UserError(
            f"held_out={held_out} are the training images: name others, or set held_out_split=test for a CIFAR-10 "
            "archive."
        )
    queries = _read_samples(command.samples)
    side = queries.shape[1]
    references = _read_images(command.data, side)
    with tqdm(total=len(references), unit="image", dynamic_ncols=True, desc="comparing") as bar:
        distance, index, mirrored = find_nearest(queries, references, bar.update)
    metrics: dict[str, Any] = {"images": len(queries), "training_images": len(references), **_summarize(distance)}
    if command.held_out is not None:
        real = _read_images(command.held_out, side, len(queries), command.held_out_split)
        metrics["held_out"] = _summarize(find_nearest(real, references)[0])
    order = np.argsort(distance)[: command.shown]
    found = np.stack([references[index[i]][:, :: -1 if mirrored[i] else 1] for i in order])
    picture = command.output / "nearest.png"
    with atomic_write(command.output / "nearest.json") as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n")
    with atomic_write(picture) as path:
        pairs = np.concatenate([queries[order], found])
        sheet: Image.Image = grid(pairs, len(order), ("generated", "nearest"), scale=max(1, 96 // side))
        sheet.save(path, format="PNG")
    text = "minimum {minimum:.1f}, median {median:.1f}"
    line = f"distance to the nearest training image in grey levels: generated images {text.format(**metrics)}"
    if command.held_out is not None:
        line += f"; held-out images {text.format(**metrics['held_out'])}"
    print(f"{line}: {picture}")


def _summarize(distance: np.ndarray) -> dict[str, float]:
    import numpy as np

    return {"minimum": float(distance.min()), "median": float(np.median(distance)), "mean": float(distance.mean())}


def _read_samples(folder: pathlib.Path) -> np.ndarray:
    """Reads the images in a record of `bitdance sample`: (B, H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    try:
        files = [entry["file"] for entry in json.loads((folder / "samples.json").read_text())["images"]]
        return np.stack([np.asarray(Image.open(folder / file).convert("RGB")) for file in files])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no samples.json with its images ({type(error).__name__}): name a folder that `bitdance "
            "sample` wrote without `num_images`."
        ) from None


def _read_images(
    data: pathlib.Path, side: int, limit: int | None = None, split: Literal["train", "test"] = "train"
) -> np.ndarray:
    """Reads all images of a set, or `limit` evenly spaced ones, cropped to squares: (R, side, side, 3) uint8."""
    import numpy as np
    from tqdm import tqdm

    from bitdance.data.crops import center_crop, to_array
    from bitdance.data.images import open_images, spread

    images = open_images(data, split)
    chosen = spread(len(images), limit)
    with tqdm(chosen, unit="image", dynamic_ncols=True, desc=f"reading {data.name}") as bar:
        return np.stack([to_array(center_crop(images.read(int(i)), side)) for i in bar])

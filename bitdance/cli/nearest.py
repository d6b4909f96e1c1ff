"""`bitdance nearest`: a check that a model does not copy what it was trained on."""

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
        samples: folder that `bitdance sample` wrote.
        data: the training images: a folder, zip or tar of class folders, ImageNet's tar or parquet, or CIFAR-10's.
        held_out: real images that were not trained on; their own distances to the training images tell how near two
            unrelated pictures are.
        held_out_split: test, where the held-out images are those of a CIFAR-10 archive.
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
        raise UserError(f"--shown {command.shown} does not fit: it must be at least 1.")
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from bitdance.metrics.nearest_neighbours import nearest
    from bitdance.runtime.atomic_files import atomic_write
    from bitdance.sampling.image_grid import image_grid

    held_out = command.held_out
    if held_out and command.held_out_split == "train" and held_out.resolve() == command.data.resolve():
        raise UserError(
            f"--held-out {held_out} are the training images themselves: name others, or add --held-out-split test "
            "for a CIFAR-10 archive."
        )
    queries = _samples(command.samples)
    side = queries.shape[1]
    references = _pixels(command.data, side)
    with tqdm(total=len(references), unit="image", dynamic_ncols=True, desc="comparing") as bar:
        distance, index, mirrored = nearest(queries, references, bar.update)
    figures: dict[str, Any] = {"images": len(queries), "training_images": len(references), **_summary(distance)}
    if command.held_out is not None:
        real = _pixels(command.held_out, side, len(queries), command.held_out_split)
        figures["held_out"] = _summary(nearest(real, references)[0])
    order = np.argsort(distance)[: command.shown]
    found = np.stack([references[index[i]][:, :: -1 if mirrored[i] else 1] for i in order])
    picture = command.output / "nearest.png"
    with atomic_write(command.output / "nearest.json") as path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    with atomic_write(picture) as path:
        pairs = np.concatenate([queries[order], found])
        sheet: Image.Image = image_grid(pairs, len(order), ("generated", "nearest"), scale=max(1, 96 // side))
        sheet.save(path, format="PNG")
    text = "{minimum:.1f} at least, {median:.1f} in the median"
    line = f"distance to the nearest training image, in grey levels: generated {text.format(**figures)}"
    if command.held_out is not None:
        line += f"; real held-out images {text.format(**figures['held_out'])}"
    print(f"{line}: {picture}")


def _summary(distance: np.ndarray) -> dict[str, float]:
    import numpy as np

    return {"minimum": float(distance.min()), "median": float(np.median(distance)), "mean": float(distance.mean())}


def _samples(folder: pathlib.Path) -> np.ndarray:
    """The images that a record of `bitdance sample` lists: (B, H, W, 3) uint8."""
    import numpy as np

    from bitdance.data.crops import to_array
    from bitdance.data.decoding import read_image

    try:
        files = [entry["file"] for entry in json.loads((folder / "samples.json").read_text())["images"]]
        return np.stack([to_array(read_image(folder / file)) for file in files])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no images with a samples.json beside them ({type(error).__name__}): name a folder that "
            "`bitdance sample` wrote without --num-images."
        ) from None


def _pixels(
    data: pathlib.Path, side: int, limit: int | None = None, split: Literal["train", "test"] = "train"
) -> np.ndarray:
    """All images of a set, or so many spread over it, cropped to side x side: (R, side, side, 3) uint8."""
    import numpy as np
    from tqdm import tqdm

    from bitdance.data.crops import center_crop, to_array
    from bitdance.data.image_dataset import evenly_spaced
    from bitdance.data.images import open_images

    images = open_images(data, split)
    chosen = evenly_spaced(len(images), limit)
    with tqdm(chosen, unit="image", dynamic_ncols=True, desc=f"reading {data.name}") as bar:
        return np.stack([to_array(center_crop(images.read(int(i)), side)) for i in bar])

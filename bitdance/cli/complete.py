"""`bitdance complete`: keeps the first rows of an image, or what a mask leaves, and samples the rest."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated

import tyro

from bitdance.cli.options import ModelOptions, PrecisionOptions, check_output
from bitdance.cli.parsing import Positional, parse
from bitdance.cli.sample import MAX_IMAGES, all_options, sampling_progress
from bitdance.config import Preset
from bitdance.runtime.errors import UserError, check_fields, check_seed, counted, one_line

if TYPE_CHECKING:
    import numpy as np

    from bitdance.sampling.pipeline import Pipeline

EXAMPLES = """
bitdance complete horse.png --class horse --keep-rows 4
bitdance complete photo.jpg --class "golden retriever" --keep-rows 8 --candidates 4 --model BitDance-B-1X
bitdance complete photo.jpg --class 207 --mask mask.png --model BitDance-B-1X --seed 1
"""


@dataclasses.dataclass(frozen=True)
class What:
    """What to complete.

    Attributes:
        image: an image file; it is scaled and cropped to the model's size.
        name: class to complete it as, an id or a name.
        keep_rows: rows of tokens to keep, from the top; by default half of them. A model that samples P tokens at once
            keeps rows of patches of P.
        mask: instead, an image of which white parts are sampled anew and black parts kept. The order of the tokens is
            that of the model, from the top: what is below a white part does not influence it.
        candidates: completions to sample.
        seed: the same seed gives the same images.
    """

    image: Positional[pathlib.Path]
    name: Annotated[str, tyro.conf.arg(name="class")]
    keep_rows: int | None = None
    mask: pathlib.Path | None = None
    candidates: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class How:
    """How to sample.

    Attributes:
        preset: exact or fast, as of `bitdance sample`.
        cfg_scale: guidance scale; by default that of the model.
        num_steps: solver steps of the diffusion head for each token.
        batch_size: images at once.
    """

    preset: Preset | None = None
    cfg_scale: float | None = None
    num_steps: int | None = None
    batch_size: int = 100


@dataclasses.dataclass(frozen=True)
class Results:
    """What to write.

    Attributes:
        output: folder for grid.png (the image, what is kept of it, and the completions), the completions and
            samples.json; images of an earlier call there are replaced.
    """

    output: pathlib.Path = pathlib.Path("completed")


@dataclasses.dataclass(frozen=True)
class Complete:
    """Keep a part of an image and sample the rest, several times."""

    what: What
    how: How = dataclasses.field(default_factory=How)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    results: Results = dataclasses.field(default_factory=Results)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Complete, arguments, "bitdance complete", EXAMPLES)
    check_fields(command.what, "candidates", lambda value: 1 <= value <= MAX_IMAGES, f"be from 1 to {MAX_IMAGES}")
    check_fields(command.how, "batch_size", lambda value: 1 <= value <= MAX_IMAGES, f"be from 1 to {MAX_IMAGES}")
    check_seed(command.what.seed)
    check_output(command.results.output)
    with command.where.init_distributed(only_one=True) as world:
        _complete(command, command.model.load(world.device, command.where.precision))


def _complete(command: Complete, pipeline: Pipeline) -> None:
    import numpy as np

    from bitdance.data.class_folders import GRID, is_published
    from bitdance.data.crops import center_crop, to_array
    from bitdance.data.decoding import read_image
    from bitdance.sampling.image_grid import image_grid
    from bitdance.sampling.pipeline import kept_tokens
    from bitdance.sampling.sample_folder import prepare_folder, write_folder
    from bitdance.sampling.unfinished import hide_tokens
    from bitdance.sampling.writers import image_settings, list_entries

    what, config, folder = command.what, pipeline.model.config, command.results.output
    if what.mask is not None and what.keep_rows is not None:
        raise UserError("`mask` says what to keep, as `keep_rows` does: leave one of them out.")
    label = pipeline.classes.find(what.name)
    original = to_array(center_crop(read_image(what.image, not is_published([what.image.name])), pipeline.image_size))
    mask = None if what.mask is None else _read_mask(what.mask, pipeline.image_size, config.grid)
    keep_rows = what.keep_rows
    if mask is None and keep_rows is None:
        keep_rows = config.grid // config.patch // 2 * config.patch
    kept = kept_tokens(config, keep_rows, mask=mask)
    if not kept.any() or kept.all():
        raise UserError(f"nothing is to be {'sampled' if kept.any() else 'kept'}: change `keep_rows` or `mask`.")
    how = pipeline.sampling_config(command.how.cfg_scale, command.how.num_steps, preset=command.how.preset)
    entries = list_entries(pipeline.classes, [label] * what.candidates)
    earlier = prepare_folder(folder, entries)
    settings = dataclasses.asdict(command.how) | {"seed": what.seed, "output": "np"}
    bits = pipeline.encode(original)
    with sampling_progress(what.candidates * config.ar_steps) as count:
        images = pipeline.complete(
            bits, label, keep_rows=keep_rows, mask=mask, candidates=what.candidates, callback=count, **settings
        )
    part = hide_tokens(pipeline.decode(bits, "np"), kept, config.patch)
    sheet = np.stack([original, *part, *images])
    grid = image_grid(sheet, min(len(sheet), 10), scale=None)
    tokens = kept.nonzero().flatten().tolist()
    texts = [image_settings(pipeline.name, how, what.seed, entry, kept_tokens=tokens) for entry in entries]
    write_folder(folder, images, grid, {**all_options(command), "images": entries}, texts, earlier)
    done = f"{counted(what.candidates, 'completion')} of {what.image} as {pipeline.classes.label(label)}"
    print(one_line(f"{done}: {folder / GRID}"))


def _read_mask(path: pathlib.Path, image_size: int, grid: int) -> np.ndarray:
    """Returns which tokens a mask keeps, (h, w) bool: those without any white."""
    import numpy as np

    from bitdance.data.crops import center_crop
    from bitdance.data.decoding import read_image

    pixels = np.asarray(center_crop(read_image(path), image_size).convert("L"))
    side = image_size // grid
    return pixels.reshape(grid, side, grid, side).max((1, 3)) < 128

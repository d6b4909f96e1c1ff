"""Pictures of how a model samples: guidance scales, tokens that appear one after the other, and bits of one token.

    python examples/cifar10/pictures.py --models demo --output pictures

Writes guidance.png, tokens.webp (an animation) and bits.png for each model, with the name of the model before them.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
from classifier import set_threads
from PIL import Image
from torch import Tensor

import bitdance
from bitdance.cli.main import call
from bitdance.models import flow
from bitdance.runtime.atomic_files import atomic_write, make_folder
from bitdance.sampling.image_grid import image_grid
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import SamplerFunctions, sample_noise, sample_tokens
from bitdance.sampling.unfinished import decode_unfinished
from bitdance.sampling.writers import write_png

SCALES = (1.0, 3.0, 6.0, 12.0, 24.0)
FRAMES_PER_SECOND = 6


def draw_guidance(pipeline: Pipeline, seed: int) -> Image.Image:
    """Returns a grid: one row for each guidance scale, with the same noise, and one column for each class."""
    classes = list(range(len(pipeline.classes)))[:10]
    rows = [pipeline(classes, seed=seed, cfg_scale=scale, output="np") for scale in SCALES]
    labels = [f"guidance {scale:g}" for scale in SCALES]
    return image_grid(np.concatenate(rows), columns=len(classes), labels=labels, scale=2)


def draw_tokens(pipeline: Pipeline, seed: int) -> list[Image.Image]:
    """Returns a grid of images, one of each class, after each autoregressive step; what is not sampled yet is grey."""
    classes, frames = list(range(len(pipeline.classes)))[:10], []

    def add(step: int, steps: int, tokens: Tensor) -> None:
        frames.append(decode_unfinished(pipeline, tokens))

    pipeline(classes, seed=seed, callback=add)
    return [image_grid(frame, columns=5, scale=3) for frame in frames]


def draw_bits(pipeline: Pipeline, seed: int) -> np.ndarray:
    """Returns the bits of the first tokens of an image: one row for each solver step, from noise to the sign."""
    model, config = pipeline.model, pipeline.sampling_config()
    functions, seen = SamplerFunctions(model), []

    def solver_step(x: Tensor, *arguments: Tensor) -> Tensor:
        seen.append(x[0].flatten().clone())
        return flow.solver_step(x, *arguments)

    functions.solver_step = solver_step
    noise = sample_noise(model, seed, torch.zeros(1, dtype=torch.int64), config.num_draws)
    tokens = sample_tokens(model, torch.zeros(1, dtype=torch.int64), noise, config, functions=functions)
    per_token = len(seen) // model.config.ar_steps
    first = torch.stack([*seen[:per_token], tokens[0, : model.config.parallel_num].flatten()])
    # -1 and 1 are two greys, so that noise beyond them is seen, too.
    levels = (127.5 + 63.75 * first.clamp(-2, 2)).to(torch.uint8).numpy()
    return np.repeat(np.repeat(levels[:, :128, None], 8, 0), 8, 1).repeat(3, 2)


def write_animation(path: pathlib.Path, frames: list[Image.Image]) -> None:
    """Writes a WebP whose last frame stays for two seconds."""
    durations = [1000 // FRAMES_PER_SECOND] * (len(frames) - 1) + [2000]
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary, format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80
        )


def main(arguments: list[str]) -> None:
    """Writes the pictures of each model."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["demo"], help="names, files or folders of runs")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("pictures"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(arguments)
    set_threads(options)
    pipelines = {name: bitdance.load_pipeline(name) for name in options.models}
    make_folder(options.output)
    for name, pipeline in pipelines.items():
        start = options.output / pathlib.Path(name).stem
        write_png(pathlib.Path(f"{start}-guidance.png"), draw_guidance(pipeline, options.seed))
        write_animation(pathlib.Path(f"{start}-tokens.webp"), draw_tokens(pipeline, options.seed))
        write_png(pathlib.Path(f"{start}-bits.png"), draw_bits(pipeline, options.seed))
        print(f"wrote {start}-guidance.png, -tokens.webp and -bits.png")


if __name__ == "__main__":
    call(main, sys.argv[1:])

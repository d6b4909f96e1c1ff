"""A table and a picture of held-out images and their reconstructions by several tokenizers.

    python examples/cifar10/compare_tokenizers.py --val-path cifar10_test.zip demo runs/tokenizer
    python examples/cifar10/compare_tokenizers.py --val-path cifar10_test.zip --data-path cifar10_train.zip demo

With --data-path, the table begins with transform coding, which is fitted to these images.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
from classifier import ReconstructionMetrics, check_output, load_images, set_threads
from torch import Tensor
from transform_coding import check_bits, transform_code

from bitdance.cli.main import call
from bitdance.sampling.image_grid import image_grid
from bitdance.sampling.writers import write_png
from bitdance.training.evaluation import reconstruct
from bitdance.weights.resolve import find_weights
from bitdance.weights.weights_file import load_autoencoder

SHOWN = 14
"""Images in the picture."""


@torch.no_grad()
def reconstruct_by_name(name: str, images: Tensor) -> tuple[int, Tensor]:
    """Returns the bits per image of an autoencoder, and the reconstructions of images (N, 32, 32, 3) uint8."""
    network = load_autoencoder(find_weights(name, "autoencoder"))
    decoded = torch.cat([reconstruct(network, part) for part in images.split(250)])
    return network.config.grid(32) ** 2 * network.config.bits, decoded


def main(arguments: list[str]) -> None:
    """Prints a row for each tokenizer and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("autoencoders", nargs="+", help="names, files or folders of runs")
    parser.add_argument("--val-path", type=pathlib.Path, required=True, help="held-out images")
    parser.add_argument("--data-path", type=pathlib.Path, help="training images, for transform coding")
    parser.add_argument("--bits", type=int, nargs="+", default=[512, 1024, 2048], help="of transform coding, per image")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tokenizers.png"), help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(arguments)
    set_threads(options)
    if options.data_path:
        check_bits(options.bits)
    check_output(options.output)
    original, labels = load_images(options.val_path)
    shown = np.linspace(0, len(original) - 1, SHOWN).astype(int)
    rows, names = [original[shown]], ["original"]
    measure = ReconstructionMetrics(original, labels)

    def add(name: str, bits: int, decoded: Tensor) -> None:
        metrics = measure(decoded)
        quality = f"{metrics['psnr']:.2f} | {metrics['ssim']:.3f}"
        print(
            f"| {name} | {bits:,} | {quality} | {metrics['accuracy']:.1%} | {metrics['frechet_distance']:.2f} |",
            flush=True,
        )
        rows.append(decoded[shown])
        names.append(f"{name}, {bits:,} bits")

    print("| tokenizer | bits | PSNR, dB | SSIM | accuracy | Fréchet distance |\n|---|---|---|---|---|---|")
    if options.data_path:
        for bits, decoded, _ in transform_code(load_images(options.data_path)[0], original, sorted(options.bits)):
            add("transform coding", bits, decoded)
    for name in options.autoencoders:
        add(name, *reconstruct_by_name(name, original))
    write_png(options.output, image_grid(torch.cat(rows).numpy(), columns=SHOWN, labels=names, scale=2))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    call(main, sys.argv[1:])

"""The linear baseline of the tokenizers: transform coding of whole images, at the same number of bits.

    python examples/cifar10/transform_coding.py --data-path cifar10_train.zip --val-path cifar10_test.zip

Principal components of whole images (or of blocks, --block), each quantized by a Lloyd-Max quantizer of fixed length;
the bits are given one by one to the component whose error they reduce most. All is fitted to the training images. With
--block 8, the last line of a row is what `bitdance train-autoencoder --bit-depths` takes for cells of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import torch
from classifier import ReconstructionMetrics, load_images, set_threads

from bitdance.cli.main import call
from bitdance.runtime.errors import UserError

MAX_BITS = 8


def lloyd_max(x: np.ndarray, bits: int, iterations: int = 30) -> np.ndarray:
    """Returns the 2^bits values of the quantizer with the least squared error on x (N,), in ascending order."""
    values = np.quantile(x, (np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(iterations):
        index = np.searchsorted((values[1:] + values[:-1]) / 2, x)
        count = np.bincount(index, minlength=1 << bits)
        values = np.where(count > 0, np.bincount(index, x, 1 << bits) / np.maximum(count, 1), values)
    return values


def quantize(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Replaces numbers x (...) by the nearest of the values, which are in ascending order."""
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]


def allocate(x: np.ndarray, bits: int) -> Iterator[list[np.ndarray]]:
    """Yields the quantizers of the components x (N, D) with 1, 2, ..., `bits` bits in all.

    It is the same list each time, changed in place.
    """
    quantizers = [np.zeros(1) for _ in range(x.shape[1])]
    counts = np.zeros(x.shape[1], int)
    errors = [float(column.var()) for column in x.T]
    following = [lloyd_max(column, 1) for column in x.T]
    gains = [error - float(np.mean((column - quantize(column, values)) ** 2))
             for error, column, values in zip(errors, x.T, following, strict=True)]  # fmt: skip
    for _ in range(bits):
        best = int(np.argmax(gains))
        column = x[:, best]
        counts[best] += 1
        quantizers[best] = following[best]
        errors[best] -= gains[best]
        gains[best] = 0.0
        if counts[best] < MAX_BITS:
            following[best] = lloyd_max(column, counts[best] + 1)
            gains[best] = errors[best] - float(np.mean((column - quantize(column, following[best])) ** 2))
        yield quantizers


def to_blocks(images: torch.Tensor, side: int) -> np.ndarray:
    """Splits images (N, 32, 32, 3) into blocks (N (32 / side)^2, 3 side^2), as float32."""
    n, count = len(images), 32 // side
    blocks = images.reshape(n, count, side, count, side, 3).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n * count**2, -1).numpy().astype(np.float32)


def from_blocks(blocks: np.ndarray, side: int) -> torch.Tensor:
    """Inverts `to_blocks`, rounded to uint8."""
    count = 32 // side
    pixels = torch.from_numpy(blocks.round().clip(0, 255).astype(np.uint8))
    return pixels.reshape(-1, count, count, side, side, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 32, 32, 3)


def check_bits(all_bits: list[int], side: int = 32) -> None:
    """Checks the numbers of bits per image for blocks of `side` pixels.

    Raises:
        UserError: a number is not a multiple of the number of blocks, or too large.
    """
    blocks, most = 32**2 // side**2, MAX_BITS * 3 * 32**2
    if any(not 1 <= bits <= most or bits % blocks for bits in all_bits):
        raise UserError(f"--bits must be multiples of {blocks}, the number of blocks, from {blocks} to {most}.")


def transform_code(
    train: torch.Tensor, images: torch.Tensor, all_bits: list[int], side: int = 32
) -> Iterator[tuple[int, torch.Tensor, list[int]]]:
    """Encodes and decodes images with components and quantizers that are fitted to others.

    Args:
        train, images: (N, 32, 32, 3) uint8.
        all_bits: numbers of bits per image, in ascending order, see `check_bits`.
        side: of the blocks in pixels.

    Yields:
        For each number of bits: it, the decoded images, and the bits of the components that have any, descending.
    """
    per_block = [bits * side**2 // 32**2 for bits in all_bits]
    x = to_blocks(train, side)
    mean = x.mean(0)
    vectors = np.linalg.eigh(np.cov((x - mean).T))[1][:, ::-1][:, : max(per_block)].astype(np.float32)
    chosen = np.random.default_rng(0).permutation(len(x))[:10_000]
    coefficients = (x[chosen] - mean) @ vectors
    given = (to_blocks(images, side) - mean) @ vectors
    for bits, quantizers in enumerate(allocate(coefficients, max(per_block)), start=1):
        if bits in per_block:
            rounded = np.stack([quantize(given[:, i], values) for i, values in enumerate(quantizers)], axis=1)
            depths = sorted((len(values).bit_length() - 1 for values in quantizers), reverse=True)
            decoded = from_blocks(rounded @ vectors.T + mean, side)
            yield all_bits[per_block.index(bits)], decoded, [depth for depth in depths if depth]


def main(arguments: list[str]) -> None:
    """Prints a row for each number of bits."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data-path", type=pathlib.Path, required=True, help="training images")
    parser.add_argument("--val-path", type=pathlib.Path, required=True, help="held-out images")
    parser.add_argument("--bits", type=int, nargs="+", default=[512, 1024, 2048], help="per image")
    parser.add_argument("--block", type=int, choices=(4, 8, 16, 32), default=32, help="side of the blocks in pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args(arguments)
    set_threads(options)
    check_bits(options.bits, options.block)
    train, (original, labels) = load_images(options.data_path)[0], load_images(options.val_path)
    measure = ReconstructionMetrics(original, labels)
    for bits, decoded, depths in transform_code(train, original, sorted(options.bits), options.block):
        row = ", ".join(f"{name} {value:.4f}" for name, value in measure(decoded).items())
        print(f"{bits} bits: {row}", flush=True)
        if options.block < 32:
            print(*depths, flush=True)


if __name__ == "__main__":
    call(main, sys.argv[1:])

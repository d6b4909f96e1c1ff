"""Compares the throughput of the Inception network with a straightforward implementation; the last line is JSON.

    python benchmarks/inception.py --threads 2

The straightforward implementation gathers four neighbours for each pixel of the resize, keeps images and weights
channels-first, and runs batch normalization as a layer. Both run alternately, with the same random weights and images.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitdance.metrics.inception import SIDE, Features, Inception, resize


def resize_straightforward(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, 299, 299) float32: each pixel from its four neighbours."""
    x = images.permute(0, 3, 1, 2).float().contiguous()
    height, width = x.shape[2:]
    rows, columns = (torch.arange(SIDE, device=x.device) * (torch.tensor(float(n)) / SIDE) for n in (height, width))
    top, left = rows.floor().long(), columns.floor().long()
    bottom, right = (top + 1).clamp_max(height - 1), (left + 1).clamp_max(width - 1)
    down, across = (rows - top)[:, None], columns - left
    above = x[:, :, top[:, None], left] * (1 - across) + x[:, :, top[:, None], right] * across
    below = x[:, :, bottom[:, None], left] * (1 - across) + x[:, :, bottom[:, None], right] * across
    return above * (1 - down) + below * down


def timed(function: Callable[[Tensor], Any], images: Tensor) -> tuple[float, Any]:
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    plain = Inception()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    plain = plain.to(options.device)
    fast = copy.deepcopy(plain).fold()
    images = torch.randint(
        0, 256, (options.batch_size, options.image_size, options.image_size, 3), dtype=torch.uint8
    ).to(options.device)

    def straightforward(images: Tensor) -> Features:
        return plain.features((resize_straightforward(images) - 128) / 128)

    methods: dict[str, Callable[[Tensor], Any]] = {
        "straightforward": straightforward,
        "bitdance": fast,
        "resize_straightforward": resize_straightforward,
        "resize_bitdance": resize,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results = {}
    with torch.inference_mode():
        for round_ in range(options.rounds + 1):
            for name, function in methods.items():
                taken, results[name] = timed(function, images)
                if round_:  # the first one is a warm-up
                    seconds[name].append(taken)
    one, other = results["bitdance"].pool, results["straightforward"].pool
    rates = {name: options.batch_size / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:24} {rate:9.2f} images/s")
    report = {
        "settings": vars(options),
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "speedup": round(rates["bitdance"] / rates["straightforward"], 3),
        "resize_fraction": round(rates["bitdance"] / rates["resize_bitdance"], 4),
        "relative_difference": float((one - other).norm() / other.norm()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

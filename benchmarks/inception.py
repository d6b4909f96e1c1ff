"""Throughput of the Inception network as in evaluation, compared with a straightforward implementation.

    python benchmarks/inception.py --threads 2

The straightforward implementation gathers four neighbours for each pixel of the resize, keeps images and weights
channels-first, and runs batch normalization as a layer. Both run in turns with the same random weights and images, so
that other load slows both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

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


def timed(function, images: Tensor) -> tuple[float, object]:
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
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    plain = Inception()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    plain = plain.to(args.device)
    fast = copy.deepcopy(plain).fold()
    images = torch.randint(0, 256, (args.batch, args.size, args.size, 3), dtype=torch.uint8).to(args.device)

    def straightforward(images: Tensor) -> Features:
        return plain.features((resize_straightforward(images) - 128) / 128)

    ways = {
        "straightforward": straightforward,
        "ours": fast,
        "resize_straightforward": resize_straightforward,
        "resize_ours": resize,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    with torch.inference_mode():
        for turn in range(args.rounds + 1):
            for name, function in ways.items():
                taken, results[name] = timed(function, images)
                if turn:  # the first one warms up
                    seconds[name].append(taken)
    one, other = results["ours"].pool, results["straightforward"].pool
    rates = {name: args.batch / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:24} {rate:9.2f} images/s")
    report = {
        "device": args.device,
        "threads": args.threads,
        "batch": args.batch,
        "size": args.size,
        "images_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "speedup": round(rates["ours"] / rates["straightforward"], 3),
        "resize_share": round(rates["ours"] / rates["resize_ours"], 4),
        "relative_difference": float((one - other).norm() / other.norm()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

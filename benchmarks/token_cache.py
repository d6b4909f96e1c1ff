"""Compares training steps from images with training steps from a token cache; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/token_cache.py --device cpu

Networks of the sizes of a released model or the demo model, on synthetic JPEGs. The encoder computes in the faster of
float32 and bf16 autocast, and so does training. Steps of both kinds alternate, with one trainer. The predicted
speedup is the ratio of FLOPs, which are counted in the encoder and in a first step from tokens that is not timed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.data.cache_writer import CacheWriter
from bitdance.data.crops import normalize
from bitdance.data.encode_config import EncodeConfig
from bitdance.data.images import open_images
from bitdance.data.token_cache import TokenDataset
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import choose_device, computes_bf16
from bitdance.runtime.process_group import World
from bitdance.training.loader import Loader
from bitdance.training.losses import BitDanceLoss
from bitdance.training.train_config import LossConfig, TrainConfig
from bitdance.training.trainer import DataInfo, Trainer
from bitdance.weights import weights_file


def write_images(folder: pathlib.Path, count: int, side: int) -> None:
    """Writes JPEGs with structure at several scales, of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.new("RGB", (side, side))
        for size in (4, 16, 64):
            layer = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
            image = Image.blend(image, layer.resize((side, side), Image.Resampling.BICUBIC), 0.5)
        path = folder / f"class-{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)


def measure_seconds(device: torch.device, function: Callable[[str], object], argument: str) -> float:
    start = time.perf_counter()
    function(argument)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def count_flops(function: Callable[[str], object], argument: str) -> int:
    with FlopCounterMode(display=False) as counter:
        function(argument)
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", *RELEASED_MODELS), default="B-16X")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = choose_device(options.device)
    world = World(0, 1, device)
    torch.manual_seed(0)
    if options.model == "demo":
        sizes, autoencoder = weights_file.load_model("demo").config, weights_file.load_autoencoder("demo")
    else:
        sizes, autoencoder = RELEASED_MODELS[options.model].config, Autoencoder(AutoencoderConfig())
    network, autoencoder = BitDance(sizes), autoencoder.eval().to(device)
    side = network.config.grid * autoencoder.config.down_size
    pixels = normalize(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device))

    def encode(precision: str) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            autoencoder.encode(pixels)

    precisions = ["fp32", "bf16"] if computes_bf16(device) else ["fp32"]
    encoder_flops = count_flops(encode, "fp32")
    encoder_seconds = {name: min(measure_seconds(device, encode, name) for _ in range(2)) for name in precisions}
    precision = min(precisions, key=lambda name: encoder_seconds[name])
    print(f"encoder, one image: {', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in encoder_seconds.items())}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_images(folder / "images", options.batch_size, side)
        images = open_images(folder / "images")
        encode_config = EncodeConfig(image_size=side, flips=False, batch_size=options.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            cache = CacheWriter(images, autoencoder, "", folder / "tokens", encode_config).run(world)
        print(f"{cache.images} images encoded in {cache.seconds:.1f} s, {cache.bytes} bytes")
        config = TrainConfig(
            folder / "images",
            folder / "run",
            image_size=side,
            batch_size=options.batch_size,
            ema=0.9999,
            precision=precision,
            num_workers=2,
        )
        loaders = {
            kind: Loader(data, config, world)
            for kind, data in (("images", images), ("tokens", TokenDataset(folder / "tokens")))
        }
        streams = {kind: loader.stream(0, options.rounds + 1) for kind, loader in loaders.items()}
        objective = BitDanceLoss(network, autoencoder, LossConfig(), config.seed)
        trainer = Trainer(objective, config, loaders["images"], world, DataInfo(len(images), ""))

        def step(kind: str) -> None:
            trainer.train_step(next(streams[kind]), config.lr)

        flops = {"tokens": count_flops(step, "tokens")}
        flops["images"] = flops["tokens"] + options.batch_size * encoder_flops
        seconds: dict[str, list[float]] = {kind: [] for kind in streams}
        for _ in range(options.rounds):
            for kind in streams:
                seconds[kind].append(measure_seconds(device, step, kind))
                print(f"{kind}: {1e3 * seconds[kind][-1]:.0f} ms", flush=True)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    result = {
        "model": options.model,
        "batch_size": options.batch_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "encoder_ms_per_image": {name: round(1e3 * s, 1) for name, s in encoder_seconds.items()},
        "cache_seconds_per_image": round(cache.seconds / cache.images, 3),
        "step_ms": {kind: round(1e3 * s, 1) for kind, s in median.items()},
        "step_tflops": {kind: round(count / 1e12, 3) for kind, count in flops.items()},
        "speedup": round(median["images"] / median["tokens"], 3),
        "predicted_speedup": round(flops["images"] / flops["tokens"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Times a training step from images beside one from stored bits, in turns; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/stored_bits.py --device cpu

By default a B-16X and an autoencoder of the released sizes with random weights, batches of 8 made-up JPEGs of 256 px.
The encoder runs in whichever precision is the fastest on this device: float32, or bf16 autocast as in training. A step
is everything from the batch to the moving average: both kinds share network, optimizer and precision. Operations are
counted while the encoder, and a first, untimed step from bits, run; a ratio follows from them if both ran equally fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.data.cache_writer import CacheWriter
from bitdance.data.crops import normalize
from bitdance.data.images import open_images
from bitdance.data.token_cache import TokenDataset
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import choose_device, computes_bf16
from bitdance.runtime.process_group import World
from bitdance.training.loader import Batch, Loader
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard, build_optimizer
from bitdance.training.train_config import LossConfig, TrainConfig
from bitdance.weights import safetensors_files


def make_pictures(folder: pathlib.Path, count: int, side: int) -> None:
    """JPEGs with structure at many scales, of two classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        image = Image.new("RGB", (side, side))
        for size in (4, 16, 64):
            layer = Image.fromarray(draw.integers(0, 256, (size, size, 3), np.uint8))
            image = Image.blend(image, layer.resize((side, side), Image.Resampling.BICUBIC), 0.5)
        path = folder / f"class-{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trainer:
    """Steps of one network from batches of either kind."""

    def __init__(self, objective: BitDanceLoss, run: TrainConfig, device: torch.device, bf16: bool) -> None:
        self.objective, self.run, self.device, self.bf16 = objective, run, device, bf16
        self.optimizer = build_optimizer(objective.network, run)
        self.ema = EMA(objective.network, 0.9999)
        self.health = NonFiniteGuard(device)
        self.step = 0

    def __call__(self, batches: Iterator[Batch]) -> float:
        """Takes a step and returns its seconds, the waiting for its batch included."""
        synchronize(self.device)
        start = time.perf_counter()
        batch = next(batches)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            inputs, labels, rows = (x.to(self.device) for x in (batch.inputs, batch.labels, batch.rows))
            loss, _ = self.objective(inputs, labels, rows, self.step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.objective.network.parameters(), self.run.max_grad_norm)
        skipped = self.health.judge(norm)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update(self.objective.network, skipped)
        synchronize(self.device)
        self.step += 1
        return time.perf_counter() - start


def encode(autoencoder: Autoencoder, side: int, device: torch.device, bf16: bool) -> float:
    """Encodes one image and returns the seconds."""
    images = normalize(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device))
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        autoencoder.encode(images)
    synchronize(device)
    return time.perf_counter() - start


def count(function: Callable[..., object], *arguments: object) -> int:
    """Calls a function and returns its operations, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RELEASED_MODELS), default="B-16X")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3, help="timed steps of each kind, in turns")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = choose_device(options.device)
    world = World(0, 1, device)
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig()).eval().to(device)
    config = dataclasses.replace(RELEASED_MODELS[options.model].config, num_classes=1000)
    side = config.grid * autoencoder.config.down_size
    encoder_operations = count(encode, autoencoder, side, device, False)
    encoder_times = {"float32": encode(autoencoder, side, device, False)}
    if computes_bf16(device):
        encoder_times["bf16"] = min(encode(autoencoder, side, device, True) for _ in range(2))
    fastest = min(encoder_times, key=lambda name: encoder_times[name])
    print(f"encoder, one image: {', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in encoder_times.items())}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_pictures(folder / "pictures", options.batch_size, side)
        images = open_images(folder / "pictures")
        digest = safetensors_files.digest(autoencoder.state_dict())
        with torch.autocast(device.type, torch.bfloat16, enabled=fastest == "bf16"):
            writer = CacheWriter(
                images, autoencoder, digest, folder / "bits", side, flips=False, batch_size=options.batch_size
            )
            stored = writer.run(world)
        print(f"{stored.images} images stored in {stored.seconds:.1f} s, {stored.bytes} bytes")
        run = TrainConfig(folder, image_size=side, global_batch_size=options.batch_size, num_workers=2)
        steps = 1 + options.pairs
        streams = {
            kind: Loader(data, run, world).stream(0, steps)
            for kind, data in (("images", images), ("bits", TokenDataset(folder / "bits")))
        }
        objective = BitDanceLoss(BitDance(config).to(device), autoencoder, LossConfig(), 0)
        trainer = Trainer(objective, run, device, fastest == "bf16")
        operations = {"bits": count(trainer, streams["bits"])}
        operations["images"] = operations["bits"] + options.batch_size * encoder_operations
        times: dict[str, list[float]] = {kind: [] for kind in streams}
        for _ in range(options.pairs):
            for kind, stream in streams.items():
                times[kind].append(trainer(stream))
                print(f"{kind}: {1e3 * times[kind][-1]:.0f} ms", flush=True)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    ratio, predicted = median["images"] / median["bits"], operations["images"] / operations["bits"]
    for kind in streams:
        print(f"from {kind}: {1e3 * median[kind]:.0f} ms a step, {operations[kind] / 1e12:.2f} TFLOP")
    print(f"{ratio:.2f} times as fast from bits, the operations predict {predicted:.2f}")
    result = {
        "model": options.model,
        "batch_size": options.batch_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": fastest,
        "encoder_ms_per_image": {name: round(1e3 * s, 1) for name, s in encoder_times.items()},
        "store_seconds_per_image": round(stored.seconds / stored.images, 3),
        "step_ms": {kind: round(1e3 * s, 1) for kind, s in median.items()},
        "step_tflop": {kind: round(count / 1e12, 3) for kind, count in operations.items()},
        "ratio": round(ratio, 3),
        "predicted_ratio": round(predicted, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

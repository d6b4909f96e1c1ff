"""Compares the memory and time that `bitdance train --dry-run` estimates with those of training; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/dry_run.py

Each configuration is estimated and then trained for some steps, in separate processes. Measured are the peak memory in
addition to that after the imports, and the median time of a step. A checkpoint is written during the last step; there
are no previews, which would take longer than the steps.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitdance.cli import main as cli
from bitdance.config import AutoencoderConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.training.loader import Batch
from bitdance.training.trainer import Trainer
from bitdance.weights import weights_file

STEPS = 6
SMALL = AutoencoderConfig(widths=(32,) * 5, blocks=1)
DEMO = AutoencoderConfig(widths=(32, 64, 64, 64), blocks=1, bits=64)
B16 = "--recipe B-16X --batch-size 2 --num-workers 2 --no-compile --precision auto --num-classes 1000"

# name: autoencoder, side of the images, flags
CONFIGURATIONS: dict[str, tuple[AutoencoderConfig, int, str]] = {
    "BitDance-Tiny, 64 px, batch 16": (
        SMALL, 64, "--dim 128 --n-layer 3 --head-dim 128 --head-layers 4 --batch-size 16",
    ),
    "demo model, 32 px, batch 64": (
        DEMO, 32, "--dim 192 --n-layer 6 --head-dim 192 --head-layers 3 --head-ada-ln 1 --cls-token-num 4 "
        "--batch-size 64 --ema 0.999 --perturb-rate 0.1 --no-random-crop",
    ),
    "width 256, 8 layers, P = 16, 256 px, batch 8": (
        SMALL, 256, "--dim 256 --n-layer 8 --head-dim 256 --parallel-num 16 --batch-size 8 --ema 0.999",
    ),
    "the same, 2 microbatches, float32": (
        SMALL, 256, "--dim 256 --n-layer 8 --head-dim 256 --parallel-num 16 --batch-size 8 --ema 0.999 "
        "--accumulate 2 --precision fp32",
    ),
    "B-16X, 256 px, batch 2": (AutoencoderConfig(), 256, B16),
    "B-16X, 256 px, batch 2, --grad-checkpointing": (AutoencoderConfig(), 256, B16 + " --grad-checkpointing"),
}  # fmt: skip


def train(arguments: list[str]) -> None:
    """Trains, and prints the memory after the imports and at its peak, and the seconds of a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_step, seconds = Trainer.train_step, []

    def timed(trainer: Trainer, batch: Batch, lr: float) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        metrics = train_step(trainer, batch, lr)
        seconds.append(time.perf_counter() - start)
        return metrics

    Trainer.train_step = timed  # type: ignore[method-assign]
    Trainer._write_preview = lambda trainer: None  # type: ignore[method-assign]
    cli.main(["train", *arguments, "--max-steps", str(STEPS), "--save-every", str(STEPS - 1)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"before": before * 1024, "peak": peak * 1024, "seconds": statistics.median(seconds[1 : STEPS - 1])}
    print(json.dumps(facts))


def call(*command: str) -> dict[str, Any]:
    """Runs Python and returns the JSON in the last line of its output."""
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder: pathlib.Path, autoencoder: AutoencoderConfig, side: int) -> list[str]:
    """Writes images and an autoencoder with random weights, and returns their flags."""
    rng = np.random.default_rng(0)
    for number in range(128):
        path = folder / "images" / f"class-{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=92)
    torch.manual_seed(0)
    weights_file.save(folder / "autoencoder.safetensors", Autoencoder(autoencoder))
    return [
        *("--data-path", str(folder / "images"), "--autoencoder", str(folder / "autoencoder.safetensors")),
        *("--output", str(folder / "run"), "--image-size", str(side), "--device", "cpu"),
    ]


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    options = parser.parse_args()
    print(
        "| configuration | memory estimated, GB | measured | ratio | step estimated, s | measured | ratio |\n"
        "|---|---|---|---|---|---|---|"
    )
    results = {}
    for name, (autoencoder, side, flags) in CONFIGURATIONS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments = [*prepare(pathlib.Path(folder), autoencoder, side), *flags.split()]
            estimate = call("-m", "bitdance", "train", *arguments, "--dry-run")
            measured = call(__file__, "train", *arguments)
        parts = ("step", "checkpoint", "prefetch", "process")  # all but the preview
        memory = sum(estimate["memory"][part] for part in parts) - measured["before"]
        peak = measured["peak"] - measured["before"]
        step, seconds = estimate["seconds_per_step"], measured["seconds"]
        ratios = {"memory_ratio": round(memory / peak, 3), "seconds_ratio": round(step / seconds, 3)}
        results[name] = {
            "memory_estimated": memory,
            "memory_measured": peak,
            "seconds_estimated": round(step, 4),
            "seconds_measured": round(seconds, 4),
            **ratios,
        }
        print(
            f"| {name} | {memory / 1e9:.3f} | {peak / 1e9:.3f} | {memory / peak:.2f} "
            f"| {step:.3f} | {seconds:.3f} | {step / seconds:.2f} |",
            flush=True,
        )
    errors = [abs(result[key] - 1) for result in results.values() for key in ("memory_ratio", "seconds_ratio")]
    print(
        json.dumps({"threads": torch.get_num_threads(), "largest_error": max(errors, default=None), "results": results})
    )


if __name__ == "__main__":
    main()

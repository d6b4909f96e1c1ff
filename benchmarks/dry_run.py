"""Compares what `bitdance train --dry-run` says of memory and time with training itself; the last line is JSON.

    OMP_NUM_THREADS=2 python benchmarks/dry_run.py --write benchmarks/results/dry_run.md

Each configuration is described and then trained for some steps, both in processes of their own. Measured are the most
memory that the process held beyond what it held after its imports, and the median time of a step. A checkpoint is being
written during the last step; previews are left out, since they take longer than all the steps.
"""

from __future__ import annotations

import argparse
import json
import os
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

from bitdance.cli.main import main as bitdance
from bitdance.config import AutoencoderConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.training.loader import Batch
from bitdance.training.trainer import Run
from bitdance.weights import weights_file

STEPS = 6
SMALL = AutoencoderConfig(widths=(32,) * 5, blocks=1)
DEMO = AutoencoderConfig(widths=(32, 64, 64, 64), blocks=1, bits=64)
B16 = "--model B-16X --global-batch-size 2 --num-workers 2 --no-compile --mixed-precision auto --num-classes 1000"

# name: autoencoder, side of the images, flags
CONFIGURATIONS: dict[str, tuple[AutoencoderConfig, int, str]] = {
    "BitDance-Tiny, 64 px, batch 16": (
        SMALL, 64, "--dim 128 --n-layer 3 --head-dim 128 --head-layers 4 --global-batch-size 16",
    ),
    "demo model, 32 px, batch 64": (
        DEMO, 32, "--dim 192 --n-layer 6 --head-dim 192 --head-layers 3 --head-ada-ln 1 --cls-token-num 4 "
        "--global-batch-size 64 --ema 0.999 --perturb-rate 0.1 --no-random-crop",
    ),
    "width 256, 8 layers, P = 16, 256 px, batch 8": (
        SMALL, 256, "--dim 256 --n-layer 8 --head-dim 256 --parallel-num 16 --global-batch-size 8 --ema 0.999",
    ),
    "the same, 2 parts, in float32": (
        SMALL, 256, "--dim 256 --n-layer 8 --head-dim 256 --parallel-num 16 --global-batch-size 8 --ema 0.999 "
        "--accumulate 2 --mixed-precision none",
    ),
    "B-16X, 256 px, batch 2": (AutoencoderConfig(), 256, B16),
    "B-16X, 256 px, batch 2, --grad-checkpointing": (AutoencoderConfig(), 256, B16 + " --grad-checkpointing"),
}  # fmt: skip


def train(arguments: list[str]) -> None:
    """Trains, and prints the memory after the imports and at its peak, and the seconds of a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_step, seconds = Run.one_step, []

    def timed(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
        start = time.perf_counter()
        numbers = one_step(run, batch)
        seconds.append(time.perf_counter() - start)
        return numbers

    Run.one_step, Run._preview = timed, lambda run: None  # type: ignore[method-assign,assignment]
    bitdance(["train", *arguments, "--max-steps", str(STEPS), "--save-every", str(STEPS - 1)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"before": before * 1024, "peak": peak * 1024, "seconds": statistics.median(seconds[1 : STEPS - 1])})
    )


def call(*command: str) -> dict[str, Any]:
    """Runs Python and returns what its last line says."""
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, env=dict(os.environ))
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder: pathlib.Path, autoencoder: AutoencoderConfig, side: int) -> list[str]:
    """Makes pictures and an autoencoder with random weights, and returns the flags that name them."""
    draw = np.random.default_rng(0)
    for number in range(128):
        path = folder / "pictures" / f"class-{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=92)
    torch.manual_seed(0)
    weights_file.save(folder / "autoencoder.safetensors", Autoencoder(autoencoder))
    return [
        *("--data-path", str(folder / "pictures"), "--autoencoder", str(folder / "autoencoder.safetensors")),
        *("--results-dir", str(folder / "run"), "--image-size", str(side), "--device", "cpu"),
    ]


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--write", type=pathlib.Path, help="file for the table")
    options = parser.parse_args()
    lines = [
        "| configuration | memory said, GB | measured | ratio | s a step said | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    facts = {}
    for name, (autoencoder, side, flags) in CONFIGURATIONS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments = [*prepare(pathlib.Path(folder), autoencoder, side), *flags.split()]
            said = call("-m", "bitdance.cli.main", "train", *arguments, "--dry-run")
            found = call(__file__, "train", *arguments)
        memory = said["memory"]
        # All that the run needs but for the preview, which is left out.
        expected = sum(memory[part] for part in ("step", "snapshot", "ahead", "process")) - found["before"]
        peak = found["peak"] - found["before"]
        seconds = said["seconds_per_step"]
        facts[name] = {
            "memory_said": expected,
            "memory_measured": peak,
            "memory_ratio": round(expected / peak, 3),
            "seconds_said": round(seconds, 4),
            "seconds_measured": round(found["seconds"], 4),
            "seconds_ratio": round(seconds / found["seconds"], 3),
        }
        lines.append(
            f"| {name} | {expected / 1e9:.3f} | {peak / 1e9:.3f} | {expected / peak:.2f} "
            f"| {seconds:.3f} | {found['seconds']:.3f} | {seconds / found['seconds']:.2f} |"
        )
        print(lines[-1], flush=True)
    if options.write:
        options.write.write_text("\n".join(lines) + "\n")
    worst = max(abs(fact[key] - 1) for fact in facts.values() for key in ("memory_ratio", "seconds_ratio"))
    print(json.dumps({"threads": torch.get_num_threads(), "worst": round(worst, 3), "configurations": facts}))


if __name__ == "__main__":
    main()

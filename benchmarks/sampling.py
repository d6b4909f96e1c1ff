"""Compares the speed of variants of the sampler; the last line is JSON.

    python benchmarks/sampling.py --model B-16X --batch-size 4 --num-steps 10 --device cpu
    python benchmarks/sampling.py --model B-16X --batch-size 384 --precision bf16 --compile --device cuda

Networks of the sizes of a released model with random weights, or the demo model. Variants: the sampler, the same with a
compiled head and with CUDA graphs (--compile), and the reference sampler of the tests (--reference), which recomputes
the whole sequence and all embeddings at each step. They run alternately; the decoder is timed separately.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import choose_device, peak_memory
from bitdance.sampling.pipeline import Pipeline, load_pipeline
from bitdance.sampling.sampler import sample_noise, sample_tokens


def timed(function: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", *RELEASED_MODELS), default="B-16X")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=100, help="steps of the solver of the diffusion head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--chunk-size", type=int, default=0, help="images decoded at once, 0 for all")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = choose_device(options.device)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    if options.model == "demo":
        pipeline = load_pipeline("demo", device=device, dtype=dtype)
    else:
        release = RELEASED_MODELS[options.model]
        networks = BitDance(release.config), Autoencoder(AutoencoderConfig())
        pipeline = Pipeline(*(network.eval().to(device, dtype) for network in networks), defaults=release.sampling)
    model, config = pipeline.model, pipeline.sampling_config(num_steps=options.num_steps)
    labels = torch.arange(options.batch_size, device=device) % model.config.num_classes
    noise_fn = sample_noise(model, 0, torch.arange(options.batch_size, device=device), config.num_draws)
    variants: dict[str, Callable[[], Tensor]] = {"sampler": lambda: sample_tokens(model, labels, noise_fn, config)}
    if options.compile:
        for mode in ("default", "reduce-overhead"):
            head = torch.compile(model.head.net.denoise, mode=mode)
            variants[f"compiled, {mode}"] = lambda head=head: sample_tokens(  # type: ignore[misc]
                model, labels, noise_fn, config, denoise=head
            )
    if options.reference:
        sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
        from reference_sampler import sample_reference

        variants["reference"] = lambda: sample_reference(model, labels, noise_fn, config.cfg_scale)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    tokens = torch.empty(0)
    for round_ in range(options.rounds + 1):  # the first one, which compiles, is not counted
        for name, variant in variants.items():
            taken, tokens = timed(variant, device)
            print(f"{name}: {taken:.2f} s{'' if round_ else ' (not counted)'}", flush=True)
            if round_:
                seconds[name].append(taken)
    decoding, _ = timed(lambda: pipeline.decode_tokens(tokens, options.chunk_size), device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    facts = {
        "settings": vars(options),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "speedup_over_sampler": {name: median["sampler"] / value for name, value in median.items()},
        "decoding_seconds": decoding,
        "images_per_second": {name: options.batch_size / (value + decoding) for name, value in median.items()},
        "peak_memory_gb": peak_memory(device) / 1e9,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

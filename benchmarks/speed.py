"""Measures the parts of sampling and of a training step beside the limits of the machine; the last line is JSON.

    python benchmarks/speed.py --model B-16X --batch-size 2 --num-steps 10
    python benchmarks/speed.py --model B-16X --batch-size 4 --parts train-tokens train-images
    python benchmarks/speed.py --model B-16X --batch-size 384 --precision bf16 --compile reduce-overhead

Networks of the sizes of a released model with random weights, or the demo model. The limit of a part is the larger of
its FLOPs divided by a measured rate of matrix products and its bytes (weights once for each evaluation, the cache, the
optimizer's state) divided by a measured bandwidth of copies. All variants of a part run alternately:

- ours, in the precision of --precision;
- with --compile, the same compiled;
- with --reference, the reference sampler of the tests, which recomputes the whole sequence at each step;
- with --compare FILE, another implementation: a Python file with a function
  `make(model, batch_size, num_steps, cfg_scale)` that returns functions without arguments by the names of the parts.

--check FILE compares the ratios to the limits with those of an earlier JSON line, and fails if one is 15 % worse.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bitdance import load_autoencoder, load_model
from bitdance.config import RELEASED_MODELS, AutoencoderConfig, SamplingDefaults
from bitdance.models import flow
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.layers import KVCache
from bitdance.models.packed_linear import packed_linears
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import choose_device, computes_bf16
from bitdance.runtime.errors import UserError
from bitdance.sampling.pipeline import Pipeline, choose_dtype
from bitdance.sampling.sampler import SamplerFunctions, SamplingConfig, head_sampler, sample_noise, sample_tokens
from bitdance.training.flops import step_flops
from bitdance.training.losses import BitDanceLoss
from bitdance.training.optimizer import EMA, Optimizer
from bitdance.training.train_config import LossConfig, TrainConfig

PARTS = ("prefill", "step", "head", "decoder", "tokens", "images", "train-tokens", "train-images")
OURS = ("ours", "compiled")
TOLERANCE = 1.15


class Limits:
    """The measured ceilings of a device: FLOP/s of matrix products and bytes/s of copies."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.flops = self.bandwidth = 0.0
        self.measure()

    def measure(self) -> None:
        """Measures both; the highest rates count."""
        device, dtype = self.device, self.dtype
        side = 8192 if device.type == "cuda" else 2048
        linear: nn.Module = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, dtype)
        x = torch.randn(side, side, device=device).to(dtype)
        # Written once: pages that never were are all the same page of zeros, in the cache of the CPU.
        block = torch.ones(1 << (32 if device.type == "cuda" else 30), dtype=torch.uint8, device=device)
        target = torch.empty_like(block)
        with torch.no_grad(), packed_linears(linear):
            flops = 2 * side**3 / min(seconds_of(lambda: linear(x), device) for _ in range(5))
        bandwidth = 2 * len(block) / min(seconds_of(lambda: target.copy_(block), device) for _ in range(5))
        self.flops, self.bandwidth = max(self.flops, flops), max(self.bandwidth, bandwidth)

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for this work."""
        return max(flops / self.flops, nbytes / self.bandwidth)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Runs a function and returns its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def parameters_of(*modules: nn.Module) -> int:
    """Counts the parameters of linear layers."""
    linears = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() for part in linears)


def autoencoder_flops(config: AutoencoderConfig, grid: int, part: str) -> int:
    """Counts the FLOPs of one image in the encoder or the decoder."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network, side = Autoencoder(config), grid * config.down_size
        if part == "encoder":
            network.encoder(torch.empty(1, 3, side, side))
        else:
            network.decoder(torch.empty(1, config.bits, grid, grid))
    return int(counter.get_total_flops())


@functools.lru_cache(1)
def cache_of(model: BitDance, rows: int) -> KVCache:
    """The cache of the part `step`, one for all variants, since it can take half of a GPU."""
    return model.new_cache(rows)


def sampling_parts(
    pipeline: Pipeline, batch_size: int, config: SamplingConfig, chunk_size: int
) -> dict[str, Callable[[], object]]:
    """Returns the parts of sampling a batch, as functions."""
    model, sizes = pipeline.model, pipeline.model.config
    functions = pipeline.functions or SamplerFunctions(model)
    labels = torch.arange(batch_size, device=pipeline.device) % sizes.num_classes
    rows, p = 2 * batch_size, sizes.parallel_num
    noise_fn = sample_noise(model, 0, torch.arange(batch_size, device=pipeline.device), config.num_draws)
    head = head_sampler(model, config, functions)
    cond, new = (torch.randn(rows, p, size, device=pipeline.device) for size in (sizes.dim, sizes.bits))
    scale = torch.full((), 2.0, device=pipeline.device)
    random = torch.randn(batch_size, sizes.num_tokens, sizes.bits, device=pipeline.device).sign()

    def step() -> Tensor:
        """A step of the transformer in the middle of an image."""
        cache = cache_of(model, rows)
        cache.length = sizes.cls_token_num - 1 + max(1, sizes.ar_steps // 2) * p
        return functions.transformer_step(new, cache)

    def tokens() -> Tensor:
        return sample_tokens(model, labels, noise_fn, config, functions=pipeline.functions)

    return {
        "prefill": lambda: model.prefill(labels.repeat(2), model.new_cache(rows)),
        "step": step,
        "head": lambda: head(cond, noise_fn(1, False), scale, config.num_steps),
        "decoder": lambda: pipeline.decode_tokens(random, chunk_size),
        "tokens": tokens,
        "images": lambda: pipeline.decode_tokens(tokens(), chunk_size),
    }


def sampling_limits(pipeline: Pipeline, batch_size: int, config: SamplingConfig, limits: Limits) -> dict[str, float]:
    """Returns the least seconds of each part of sampling, with guidance; attention is left out."""
    model, sizes = pipeline.model, pipeline.model.config
    rows, width = 2 * batch_size, model.dtype.itemsize
    transformer = parameters_of(model.layers, model.proj_in)
    net = model.head.net
    head = parameters_of(net.res_blocks, net.ada_ln_blocks, net.final_layer, net.input_proj)
    evaluations, p = len(flow.make_solver(config.solver, config.num_steps).timesteps), sizes.parallel_num
    cache = rows * sizes.n_layer * 2 * (sizes.cls_token_num + sizes.num_tokens / 2) * sizes.dim * width
    prefix = sizes.cls_token_num + p - 1
    seconds = {
        "prefill": limits.seconds(2 * rows * prefix * parameters_of(model.layers), transformer * width),
        "step": limits.seconds(2 * rows * p * transformer, transformer * width + cache),
        "head": limits.seconds(evaluations * 2 * rows * p * head, evaluations * head * width),
        "decoder": limits.seconds(
            batch_size * autoencoder_flops(pipeline.autoencoder.config, sizes.grid, "decoder"), 0
        ),
    }
    seconds["tokens"] = seconds["prefill"] + (sizes.ar_steps - 1) * seconds["step"] + sizes.ar_steps * seconds["head"]
    seconds["images"] = seconds["tokens"] + seconds["decoder"]
    return seconds


def training_parts(
    objective: BitDanceLoss, batch_size: int, side: int, in_bf16: bool
) -> dict[str, Callable[[], object]]:
    """Returns training steps as functions, from bits and from images: loss, gradients, clipping, AdamW and EMA."""
    network, sizes = objective.network.train().requires_grad_(), objective.network.config
    device = network.norm.weight.device
    optimizer = Optimizer(dict(network.named_parameters()), TrainConfig(pathlib.Path(), pathlib.Path(), lr=1e-5))
    ema, index, zero = EMA(network, 0.9999), torch.arange(batch_size, device=device), torch.zeros((), device=device)
    number = torch.zeros((), dtype=torch.int64, device=device)
    shapes = {"train-tokens": (sizes.num_tokens, sizes.bits // 8), "train-images": (side, side, 3)}

    def step(part: str) -> None:
        inputs = torch.randint(0, 256, (batch_size, *shapes[part]), dtype=torch.uint8, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            loss, _ = objective(inputs, index % sizes.num_classes, index, number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(1e-5, zero)
        optimizer.zero_grad()
        ema.update(network, zero)

    return {part: lambda part=part: step(part) for part in shapes}  # type: ignore[misc]


def training_limits(objective: BitDanceLoss, batch_size: int, side: int, limits: Limits) -> dict[str, float]:
    """Returns the least seconds of a training step: its FLOPs, then the optimizer's passes over its state."""
    parameters = sum(parameter.numel() for parameter in objective.network.parameters())
    # Clipping reads and writes the gradients; AdamW reads them and reads and writes three states, the EMA one.
    update = limits.seconds(0, 4 * parameters * (2 + 1 + 6 + 3))
    parts = {"train-tokens": False, "train-images": True}
    return {
        part: update + limits.seconds(step_flops(objective, batch_size, side, encodes), 0)
        for part, encodes in parts.items()
    }


def load_other(path: pathlib.Path, options: argparse.Namespace, cfg_scale: float) -> dict[str, Callable[[], object]]:
    """Returns the parts of another implementation."""
    spec = importlib.util.spec_from_file_location("compared", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "make"):
        raise SystemExit(f"{path} has no function make(model, batch_size, num_steps, cfg_scale): see --help.")
    parts: dict[str, Callable[[], object]] = module.make(
        options.model, options.batch_size, options.num_steps, cfg_scale
    )
    return parts


def read_earlier(path: pathlib.Path, settings: dict[str, object]) -> dict[str, dict[str, Any]]:
    """Returns the parts of an earlier result, which must have been measured with the same settings."""
    try:
        stored = json.loads(path.read_text().splitlines()[-1])
        if missing := {*settings, "parts"} - set(stored):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        different = [f"{name}={stored[name]}, not {value}" for name, value in settings.items() if stored[name] != value]
        parts: dict[str, dict[str, Any]] = stored["parts"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = "it is empty" if isinstance(error, IndexError) else error
        raise SystemExit(f"{path} cannot be read as a result of this program: {reason}") from None
    if different:
        raise SystemExit(f"{path} has {', '.join(different)}: compare runs with the same settings.")
    return parts


def find_slower(before: dict[str, dict[str, Any]], results: dict[str, dict[str, Any]]) -> list[str]:
    """Returns what is more than 15 % farther from its limit than in an earlier result, of each variant of ours."""
    found = []
    for part, values in results.items():
        for name in OURS:
            if part in before and name in values["seconds"] and name in before[part]["seconds"]:
                now, then = (part_["limit_seconds"] / part_["seconds"][name] for part_ in (values, before[part]))
                if now * TOLERANCE < then:
                    found.append(f"{part}, {name}: {now:.2f} of its limit, before {then:.2f}")
    return found


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", *RELEASED_MODELS), default="B-16X")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:6])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=100, help="steps of the solver of the diffusion head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--chunk-size", type=int, default=0, help="images decoded at once, 0 for all")
    parser.add_argument("--compile", choices=("default", "reduce-overhead"))
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--compare", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    options = parser.parse_args()
    if min(options.rounds, options.batch_size, options.num_steps, options.threads or 1) < 1 or options.threads == 0:
        parser.error("--rounds, --batch-size, --num-steps and --threads must be at least 1")
    for path in (options.compare, options.check):
        if path and not path.is_file():
            parser.error(f"{path} is not a file")
    return options


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device)
    except UserError as error:
        raise SystemExit(str(error)) from None
    dtype = choose_dtype(options.precision, device)
    settings = {name: getattr(options, name) for name in ("model", "batch_size", "num_steps", "compile")}
    settings |= {"precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    earlier = read_earlier(options.check, settings) if options.check else {}
    if missing := [part for part in options.parts if options.check and part not in earlier]:
        raise SystemExit(f"{options.check} has no {', '.join(missing)}: leave out --check or these parts.")
    torch.manual_seed(0)
    if options.model == "demo":
        model, autoencoder, defaults = load_model("demo"), load_autoencoder("demo"), SamplingDefaults()
    else:
        release = RELEASED_MODELS[options.model]
        model, autoencoder, defaults = BitDance(release.config), Autoencoder(AutoencoderConfig()), release.sampling
    variants: dict[str, dict[str, Callable[[], object]]] = {}
    if options.compare:
        variants["other"] = load_other(options.compare, options, defaults.cfg_scale)
    limits = Limits(device, dtype)
    objective: BitDanceLoss | None = None
    pipeline: Pipeline | None = None
    parts = set(options.parts)
    if any(part.startswith("train") for part in parts):
        side = model.config.grid * autoencoder.config.down_size
        objective = BitDanceLoss(copy.deepcopy(model), copy.deepcopy(autoencoder), LossConfig(), 0).to(device)
        objective.autoencoder.to(device)
        if device.type == "cpu":
            objective.autoencoder.prepare_for_cpu()
        in_bf16 = dtype == torch.bfloat16
        if options.compile:
            objective.compile()  # as `Trainer` does
        name = "compiled" if options.compile else "ours"
        variants[name] = training_parts(objective, options.batch_size, side, in_bf16)
    if any(not part.startswith("train") for part in parts):
        networks = [network.eval().to(device, dtype) for network in (model, autoencoder)]
        pipeline = Pipeline(*networks, defaults=defaults)  # type: ignore[arg-type]
        config = pipeline.sampling_config(num_steps=options.num_steps)
        arguments = (options.batch_size, config, options.chunk_size)
        if options.compile:
            compiled = Pipeline(*networks, defaults=defaults)  # type: ignore[arg-type]
            compiled.compile(options.compile)
            variants["compiled"] = variants.get("compiled", {}) | sampling_parts(compiled, *arguments)
        if options.reference:
            sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
            from reference_sampler import sample_reference

            labels = torch.arange(options.batch_size, device=device) % model.config.num_classes
            noise_fn = sample_noise(model, 0, torch.arange(options.batch_size, device=device), config.num_draws)
            variants["reference"] = {"tokens": lambda: sample_reference(model, labels, noise_fn, config.cfg_scale)}
        if device.type == "cpu":
            pipeline.autoencoder.prepare_for_cpu()
        variants["ours"] = variants.get("ours", {}) | sampling_parts(pipeline, *arguments)
    measured: dict[str, dict[str, list[float]]] = {part: {} for part in options.parts}
    peaks: dict[str, float] = {}
    for round_ in range(options.rounds + 1):  # the first one, which compiles, is not counted
        for part in options.parts:
            for name, functions in variants.items():
                if part != "step":
                    cache_of.cache_clear()
                if part in functions:
                    packed = name == "ours" and not part.startswith("train")
                    with (
                        torch.set_grad_enabled(part.startswith("train")),
                        packed_linears(model) if packed else contextlib.nullcontext(),
                    ):
                        if device.type == "cuda":
                            torch.cuda.reset_peak_memory_stats(device)
                        taken = seconds_of(functions[part], device)
                    if device.type == "cuda" and name in OURS:
                        peaks[part] = max(peaks.get(part, 0.0), torch.cuda.max_memory_allocated(device) / 1e9)
                    print(f"{part}, {name}: {taken:.3f} s{'' if round_ else ' (not counted)'}", flush=True)
                    if round_:
                        measured[part].setdefault(name, []).append(taken)
    limits.measure()  # again, since other work on the machine could have slowed the first time
    least = sampling_limits(pipeline, options.batch_size, config, limits) if pipeline else {}
    if objective:
        least |= training_limits(objective, options.batch_size, side, limits)
    results = {}
    for part, values in measured.items():
        seconds = {name: statistics.median(times) for name, times in values.items()}
        fastest = min(value for name, value in seconds.items() if name in OURS)
        results[part] = {
            "seconds": seconds,
            "limit_seconds": least[part],
            "limit_ratio": least[part] / fastest,
            **{f"{name}_over_ours": value / fastest for name, value in seconds.items() if name not in OURS},
        }
        others = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        print(f"{part}: {others}; limit {least[part]:.3f} s, {100 * results[part]['limit_ratio']:.0f} % of it reached")
    facts = {
        **settings,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "computes_bf16": computes_bf16(device),
        "load": os.getloadavg(),
        "tflops": limits.flops / 1e12,
        "gb_per_second": limits.bandwidth / 1e9,
        "parts": results,
        "peak_memory_gb": peaks,
    }
    print(json.dumps(facts, default=str))
    if slower := find_slower(earlier, results):
        raise SystemExit("slower than before:\n" + "\n".join(slower))


if __name__ == "__main__":
    main()

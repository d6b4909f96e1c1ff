"""Estimates what a run needs before it starts: memory, disk, FLOPs and time on this machine.

Memory is estimated from one step with fake tensors, which have shapes but no data, so it is also known of runs that do
not fit. Time is measured in real steps, whose results are discarded.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance.data.prefetch import PREFETCH
from bitdance.data.token_cache import TokenDataset
from bitdance.runtime.errors import counted
from bitdance.runtime.memory_tracker import MemoryTracker
from bitdance.runtime.progress import format_duration, format_size
from bitdance.runtime.run_folder import check_writable, existing_parent
from bitdance.training.evaluation import reconstruct
from bitdance.training.flops import step_flops
from bitdance.training.loader import Batch
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.trainer import PREVIEW_IMAGES, Trainer
from bitdance.weights.network_config import count_parameters

MAX_SECONDS = 20.0
"""Maximum duration of a timed step; of longer steps a part is timed."""
REPEAT_SECONDS = 4.0
"""Duration of all repetitions of a short step, whose time varies more."""


def print_estimate(trainer: Trainer) -> None:
    """Prints what a run needs, as a table and as JSON in the last line.

    Called by all processes. Of a run that is resumed, only the steps that are left count.

    Raises:
        UserError: the run folder cannot be written, or belongs to another run.
    """
    config, world = trainer.config, trainer.world
    check_writable(config.output)
    steps = trainer.steps_left()
    images = len(trainer.loader.indices) // config.accumulate
    memory = estimate_memory(trainer, images)
    networks = memory["weights"] + memory["ema"] + memory["frozen"]  # are in memory already
    constant = networks + memory["gradients"] + memory["optimizer"]
    free = _free_memory(world.device) + networks
    before = _resident_bytes()
    available = free - constant  # for activations
    fits = memory["activations"] <= available
    timed = measure_time(trainer, images if fits else int(images * available / memory["activations"]))
    on_gpu = world.device.type == "cuda"
    if timed is not None:
        peak, ratio = world.peak_memory(), images / timed[1]
        if on_gpu:
            memory["activations"] = max(0, int((peak - constant) * ratio))
        else:
            # Libraries load code when they are first called, kernels have workspaces, and freed memory is not always
            # returned to the system: the peak minus the tensors and what the estimate itself has used.
            estimate = before - memory["process"] - networks
            tensors = constant + int(memory["activations"] / ratio) + memory["prefetch"]
            memory["process"] = max(memory["process"], peak - estimate - tensors)
    on_device = constant + max(memory["activations"], memory["preview"])
    on_host = memory["checkpoint"] + memory["prefetch"] + memory["process"]
    memory |= {
        "step": constant + memory["activations"],
        "needed": on_device if on_gpu else on_device + on_host,
        "free": free,
    }
    if world.is_main:
        _print(trainer, memory, steps, timed[0] if timed else None)


def _print(trainer: Trainer, memory: dict[str, int], steps: int, seconds: float | None) -> None:
    config, world = trainer.config, trainer.world
    encodes = not isinstance(trainer.loader.images, TokenDataset)
    flops = step_flops(trainer.objective, config.batch_size, config.image_size, encodes)
    parameters = {name: count_parameters(part) for name, part in _networks(trainer).items()}
    counts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items())
    checkpoint = memory["weights"] + memory["optimizer"] + memory["ema"]
    kept = trainer.last_step // (config.keep_epochs * trainer.loader.steps_per_epoch) if config.keep_epochs else 0
    # A checkpoint is written before the oldest one is removed; files of weights hold those of the EMA or the raw ones.
    disk = (config.keep_checkpoints + 1) * checkpoint + (kept + 1) * _parameter_bytes(trainer.network)
    space = shutil.disk_usage(existing_parent(config.output)).free
    rate = config.batch_size / seconds if seconds else None
    total = steps * seconds if seconds else None
    sizes = {"file": checkpoint, "disk": disk, "space": space, "host": memory["process"] + memory["prefetch"]}
    size = {name: format_size(value) for name, value in (memory | sizes).items()}
    rows = [
        ("parameters", counts),
        ("device", f"{world.device}, {counted(world.size, 'process')}"),
        ("precision", "bf16 autocast, float32 weights" if trainer.in_bf16 else "float32"),
        ("", ""),
        *((name, size[name]) for name in ("weights", "gradients", "optimizer", "ema", "frozen")),
        ("activations", f"{size['activations']} (peak)"),
        ("step", f"{size['step']}, the sum of these"),
        ("preview", f"{size['preview']} instead of the activations"),
        ("checkpoint", f"{size['checkpoint']} of CPU memory while it is written"),
        ("process", f"{size['host']} of CPU memory, with prefetched images"),
        ("total", f"{size['needed']} per process, {size['free']} available"),
        ("", ""),
        ("disk", f"{size['file']} per checkpoint, {size['disk']} in all, with a checkpoint that is being written"),
        ("FLOPs", f"{flops / 1e12:.3g} TFLOPs per step, {flops / config.batch_size / 1e9:.4g} GFLOPs per image"),
        ("steps", f"{steps} with {config.batch_size} images each"),
    ]
    if seconds and total is not None:
        rows.append(("time", f"{seconds:.3g} s per step, {rate:.4g} images/s, {format_duration(total)} for all steps"))
    print("\n".join(f"  {name:<13}{value}".rstrip() for name, value in rows))
    fits = memory["needed"] <= memory["free"]
    if not fits:
        remedies = {
            "a larger `accumulate`": len(trainer.loader.indices) > config.accumulate,
            "`grad_checkpointing`": trainer.kind == "model" and not config.grad_checkpointing,
            "a token cache (`bitdance encode`)": trainer.kind == "model" and encodes,
            "more processes or memory": True,
        }
        helpful = ", ".join(remedy for remedy, helps in remedies.items() if helps)
        print(f"The run does not fit into memory. What helps: {helpful}.")
    if disk > space:
        print(f"The disk of {config.output} is too small ({size['space']} free): lower `keep_checkpoints`.")
    facts = {
        "parameters": parameters[trainer.kind],
        "memory": memory,
        "fits": fits,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": disk,
        "step_flops": flops,
        "steps": steps,
        "images": steps * config.batch_size,
        "seconds_per_step": seconds,
        "images_per_second": rate,
        "seconds": total,
        "processes": world.size,
        "device": str(world.device),
    }
    print(json.dumps(facts), flush=True)


def _networks(trainer: Trainer) -> dict[str, nn.Module]:
    """Returns the networks of a run by their names; the first is trained, the others may be frozen."""
    objective = trainer.objective
    networks: dict[str, nn.Module] = {trainer.kind: objective.network}
    if isinstance(objective, BitDanceLoss):
        return networks | {"autoencoder": objective.autoencoder}
    if objective.discriminator is not None:
        networks["discriminator"] = objective.discriminator
    return networks | ({"perceptual": objective.perceptual.network} if objective.perceptual is not None else {})


# ------------------------------------------------------------ memory


def estimate_memory(trainer: Trainer, images: int) -> dict[str, int]:
    """Estimates the memory of this process for microbatches of `images` images.

    Returns:
        Bytes on the device: of `weights`, `gradients`, `optimizer` and `ema`; of `frozen` networks, the autoencoder of
        a model or the network of a perceptual loss; peak of the `activations` of a step, or of the `preview` that may
        follow it. Bytes of CPU memory: `checkpoint`, the copy that is written in the background; `prefetch`, the
        batches read ahead; `process`, Python and its libraries.
    """
    config, world = trainer.config, trainer.world
    networks = {name: _parameter_bytes(network) for name, network in _networks(trainer).items()}
    trained = sum(value.nbytes for value in trainer.parameters.values())
    templates = trainer.optimizer.state_templates().values()
    optimizer = sum(value.nbytes for value in templates if value.ndim)  # not counters
    weights = networks[trainer.kind] + networks.get("discriminator", 0)
    frozen = sum(networks.values()) - weights
    ema = networks[trainer.kind] if trainer.ema is not None else 0
    process = _resident_bytes() - (weights + ema + frozen if world.device.type == "cpu" else 0)
    sample = trainer.loader.load(0).inputs[:1]
    # Gradients exist before the backward pass if microbatches add to them, or if they lie in buckets of DDP.
    passes = 2 if config.accumulate > 1 or world.size > 1 else 1
    with FakeTensorMode():
        fake = _copy_on_cpu(trainer)
        peak = _step_bytes(fake, images, sample, passes, trainer.in_bf16)
        preview = _preview_bytes(fake, sample)
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": optimizer,
        "ema": ema,
        "frozen": frozen,
        "activations": max(0, peak - trained),
        "preview": preview,
        "checkpoint": weights + optimizer + ema if world.is_main else 0,
        "prefetch": (PREFETCH + 2) * len(trainer.loader.indices) * sample.nbytes,
        "process": process,
    }


def _copy_on_cpu(trainer: Trainer) -> AutoencoderLoss | BitDanceLoss:
    """Returns a copy of the loss and its networks, with new tensors; fake ones if a mode for them is active."""
    objective = trainer.objective
    perceptual = objective.perceptual if isinstance(objective, AutoencoderLoss) else None
    tensors = list(perceptual.weights or []) if perceptual is not None else []
    for network in _networks(trainer).values():
        tensors += [*network.parameters(), *network.buffers()]
    copies: dict[int, Tensor] = {}
    for value in tensors:
        new = torch.empty(value.shape, dtype=value.dtype)
        copies[id(value)] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
    return copy.deepcopy(objective, copies)


def _step_bytes(
    objective: AutoencoderLoss | BitDanceLoss, images: int, sample: Tensor, passes: int, in_bf16: bool
) -> int:
    """Returns the peak memory, gradients included, of the last of some forward and backward passes.

    Each pass has `images` images like `sample`, an input (1, ...), and adds to the gradients.
    """
    inputs = torch.empty((images, *sample.shape[1:]), dtype=torch.uint8)
    labels = indices = torch.zeros(images, dtype=torch.int64)
    with MemoryTracker() as tracker:
        for _ in range(passes):
            tracker.peak = tracker.current
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                loss, _ = objective(inputs, labels, indices, 0)
            loss.backward()
            del loss
    return tracker.peak


@torch.no_grad()
def _preview_bytes(objective: AutoencoderLoss | BitDanceLoss, sample: Tensor) -> int:
    """Returns the peak memory of a preview.

    Of a model, that is the cache of the transformer, then the decoder with one image; of an autoencoder, encoder and
    decoder with images like `sample` (1, H, W, 3).
    """
    with MemoryTracker() as tracker:
        if isinstance(objective, AutoencoderLoss):
            reconstruct(objective.network, torch.empty((PREVIEW_IMAGES, *sample.shape[1:]), dtype=torch.uint8))
            return tracker.peak
        network, config = objective.network, objective.network.config
        cache = network.new_cache(2 * PREVIEW_IMAGES)  # with and without classes, for guidance
        network.prefill(torch.zeros(2 * PREVIEW_IMAGES, dtype=torch.int64), cache)
        del cache
        objective.autoencoder.decode(torch.zeros(1, config.bits, config.grid, config.grid))
    return tracker.peak


def _parameter_bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def _resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _free_memory(device: torch.device) -> int:
    """Returns the bytes that are available to each process of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kib * 1024 // processes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


# ------------------------------------------------------------ time


def measure_time(trainer: Trainer, fitting: int) -> tuple[float, int] | None:
    """Measures the duration of a step.

    A step that would take long, or that has more than one microbatch, is timed with fewer images, at two sizes, and
    extrapolated.

    Args:
        trainer: takes the steps; its state is useless afterwards.
        fitting: number of images of a microbatch that fit into memory.

    Returns:
        Seconds per step of the run, and images of the measured steps; None if not even one image fits into memory.
    """
    world = trainer.world
    if world.broadcast(fitting) < 1:
        return None
    trainer.network.train()
    stream = trainer.loader.stream(0, 64)
    config, trainer.config = trainer.config, dataclasses.replace(trainer.config, accumulate=1)

    def timed(count: int, repeats: int) -> float:
        seconds = [_timed_step(trainer, stream, count) for _ in range(1 + repeats)]
        return world.broadcast(statistics.median(seconds[1:]))

    size = world.broadcast(min(fitting, 2))
    seconds = timed(size, repeats=1)
    is_slow = seconds > MAX_SECONDS  # one step is enough
    if not is_slow:
        size = world.broadcast(min(fitting, max(size, int(size * MAX_SECONDS / seconds))))
        seconds = timed(size, repeats=max(3, min(20, int(REPEAT_SECONDS / seconds))))
    if others := len(trainer.loader.indices) - size:
        half = size // 2
        per_image = (seconds - timed(half, repeats=1 if is_slow else 2)) / (size - half) if half else seconds
        seconds += per_image * others
    trainer.config = config
    return seconds, size


def _timed_step(trainer: Trainer, stream: Iterator[Batch], images: int) -> float:
    """Takes a step with the first images of a batch and returns its duration in seconds, without reading the others."""
    start = time.perf_counter()
    batch = next(stream)
    if images < len(batch.labels):
        batch = Batch(*(value[:images] for value in batch))
        start = time.perf_counter()
    trainer.train_step(batch, lr=0.0)
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize(trainer.world.device)
    return time.perf_counter() - start

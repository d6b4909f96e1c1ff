"""What a run will need, before it starts: memory, disk, operations and time of one configuration on this machine.

Memory is found by taking a step with tensors that have shapes but no contents, and adding up what is alive; so it is
known of runs that do not fit too. Time is measured: a few real steps are taken, and what they change is thrown away.
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
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitdance.data.prefetch import PREFETCH
from bitdance.data.token_cache import TokenDataset
from bitdance.runtime.errors import UserError
from bitdance.runtime.progress import format_duration
from bitdance.training.flops import step_flops
from bitdance.training.loader import Batch
from bitdance.training.losses import BitDanceLoss
from bitdance.training.trainer import PREVIEW_IMAGES, Trainer

LONGEST = 20.0
"""Seconds that a timed step may take; of longer ones a part is timed."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one process needs.

    Attributes:
        weights, gradients, moments, average: of the trained network; moments are those of Adam.
        autoencoder: that makes the tokens.
        activations: what a step needs beside all these when it needs most.
        preview: what the pictures of a preview need, in place of the activations.
        snapshot: the copy that a checkpoint is written from, in the CPU's memory.
        ahead: batches that have been read but not used, in the CPU's memory.
        process: Python and libraries, in the CPU's memory.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    autoencoder: int
    activations: int
    preview: int
    snapshot: int
    ahead: int
    process: int

    @property
    def resident(self) -> int:
        """What is there all the time, on the device."""
        return self.weights + self.moments + self.average + self.autoencoder

    @property
    def step(self) -> int:
        """The most that a step needs, on the device."""
        return self.resident + self.gradients + self.activations

    @property
    def device(self) -> int:
        """The most that the run needs, on the device."""
        return self.resident + self.gradients + max(self.activations, self.preview)

    @property
    def host(self) -> int:
        """What the run needs in the CPU's memory, whatever the device."""
        return self.process + self.ahead + self.snapshot


def print_estimate(trainer: Trainer) -> None:
    """Prints what the run of a BitDance model will need, the last line as JSON; writes nothing.

    Raises:
        UserError: the folder of the run cannot be written to.
    """
    _check_writable(trainer.config.output)
    config, world = trainer.config, trainer.world
    images = len(trainer.loader.indices) // config.accumulate
    memory = measure_memory(trainer, images)
    # What this process has already taken is no longer free, but will not be needed again.
    free = _free_memory(world.device) + memory.weights + memory.average + memory.autoencoder
    before = _process_bytes()
    seconds = None
    if timed := measure_time(trainer, memory, images, free):
        seconds, count = timed
        memory = _corrected(memory, trainer, before, images, count)
    if world.is_main:
        _print(trainer, memory, free, seconds)


def _corrected(memory: Memory, trainer: Trainer, before: int, images: int, count: int) -> Memory:
    """The memory with what could be measured in real steps of `count` images.

    Args:
        before: what the process held before them, when the simulation had already taken what it takes.
    """
    peak, share = trainer.world.peak_memory(), images / count
    if trainer.world.device.type == "cuda":
        activations = int((peak - memory.resident - memory.gradients) * share)
        return dataclasses.replace(memory, activations=max(0, activations))
    # Libraries load their code when they are first called, kernels have memory of their own, and what is freed is not
    # always given back: all that is neither in the list nor the simulation's.
    simulation = before - memory.process - memory.weights - memory.average - memory.autoencoder
    tensors = memory.resident + memory.gradients + int(memory.activations / share)
    process = peak - simulation - tensors - memory.ahead
    return dataclasses.replace(memory, process=max(memory.process, process))


def _check_writable(folder: pathlib.Path) -> None:
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot make the folder {folder}: {there} cannot be written to; choose another place.")


def _print(trainer: Trainer, memory: Memory, free: int, seconds: float | None) -> None:
    config, network, world = trainer.config, trainer.network, trainer.world
    needed = memory.device if world.device.type == "cuda" else memory.device + memory.host
    encodes = not isinstance(trainer.loader.images, TokenDataset)
    flops = step_flops(trainer.objective, config.batch_size, config.image_size, encodes)
    parameters = sum(value.numel() for value in network.parameters())
    steps = trainer.last_step - trainer.step
    kept = memory.weights + memory.average
    checkpoint = 3 * memory.weights + memory.average
    epochs = trainer.last_step // (config.keep_epochs * trainer.loader.steps_per_epoch) if config.keep_epochs else 0
    disk = config.keep_checkpoints * checkpoint + (epochs + 1) * kept
    total = None if seconds is None else steps * seconds
    where = str(world.device) + (f", one of {world.size} processes" if world.size > 1 else "")
    rows = [
        (
            "model",
            f"{parameters / 1e6:.2f} M parameters; {memory.autoencoder / 4e6:.2f} M of the autoencoder",
        ),
        ("computes", f"on {where}, {'bf16 with float32 weights' if trainer.in_bf16 else 'float32'}"),
        ("", ""),
        *((name, _gigabytes(getattr(memory, name))) for name in ("weights", "gradients", "moments", "average")),
        ("autoencoder", _gigabytes(memory.autoencoder)),
        ("activations", f"{_gigabytes(memory.activations)} at most, beside all these"),
        ("a step", f"{_gigabytes(memory.step)} at most, the sum"),
        ("previews", f"{_gigabytes(memory.preview)}, in place of the activations"),
        ("checkpoints", f"{_gigabytes(memory.snapshot)} of the CPU's memory, while one is written"),
        ("beside", f"{_gigabytes(memory.process + memory.ahead)} of the CPU's memory: the program, images read ahead"),
        ("in all", f"{_gigabytes(needed)} of {_gigabytes(free)} that are free"),
        ("", ""),
        ("disk", f"{_gigabytes(checkpoint)} a checkpoint, {_gigabytes(disk)} at the end"),
        ("operations", f"{flops / 1e12:.3g} TFLOP a step, {flops / config.batch_size / 1e9:.4g} GFLOP an image"),
        ("steps", f"{steps} of {config.batch_size} images"),
    ]
    if seconds is not None and total is not None:
        rate = config.batch_size / seconds
        rows.append(("time", f"{seconds:.3g} s a step, {rate:.4g} images/s, {format_duration(total)} in all"))
    print("\n".join(f"  {name:<13}{value}".rstrip() for name, value in rows))
    facts = {
        "parameters": parameters,
        "memory": {**dataclasses.asdict(memory), "step": memory.step, "needed": needed, "free": free},
        "fits": needed <= free,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": disk,
        "step_flops": flops,
        "steps": steps,
        "images": steps * config.batch_size,
        "seconds_per_step": seconds,
        "images_per_second": None if seconds is None else config.batch_size / seconds,
        "seconds": total,
        "processes": world.size,
        "device": str(world.device),
    }
    if needed > free:
        helps = ["a larger `accumulate`"] if len(trainer.loader.indices) > config.accumulate else []
        helps += [] if config.grad_checkpointing else ["`grad_checkpointing`"]
        helps += ["a token cache (`bitdance encode`)"] if encodes else []
        helps += ["more processes or a larger machine"]
        print(
            f"This does not fit: {_gigabytes(needed)} are needed, {_gigabytes(free)} are free. What helps: "
            f"{', '.join(helps)}."
        )
    space = _free_disk(config.output)
    if disk > space:
        print(f"The disk is too small: {_gigabytes(space)} are free in {config.output}; lower `keep_checkpoints`.")
    print(json.dumps(facts), flush=True)


def _free_disk(folder: pathlib.Path) -> int:
    return shutil.disk_usage(next(place for place in (folder, *folder.resolve().parents) if place.exists())).free


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# ------------------------------------------------------------ memory


class _Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, as operations make them and they are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def drop(_: object) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, drop)
        self.now += size
        self.peak = max(self.peak, self.now)


def measure_memory(trainer: Trainer, images: int) -> Memory:
    """The memory of one process whose steps take so many images at a time."""
    network, config = trainer.network, trainer.config
    weights = _bytes(network)
    assert isinstance(trainer.objective, BitDanceLoss)
    autoencoder = _bytes(trainer.objective.autoencoder)
    average = weights if trainer.ema is not None else 0
    process = _process_bytes() - (weights + average + autoencoder if trainer.world.device.type == "cpu" else 0)
    sample = trainer.loader.load(0).inputs[:1]
    # Gradients of before stay where they are, if there are parts to be added up, or buckets to be sent.
    parts = 2 if config.accumulate > 1 or trainer.world.size > 1 else 1
    with FakeTensorMode():
        objective = _hollow(trainer.objective)
        extra = _step_bytes(objective, images, sample, parts, trainer.in_bf16)
        preview = _preview_bytes(objective)
    return Memory(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        average=average,
        autoencoder=autoencoder,
        activations=max(0, extra - weights),
        preview=preview,
        snapshot=3 * weights + average if trainer.world.is_main else 0,
        ahead=(PREFETCH + 2) * len(trainer.loader.indices) * sample.nbytes,
        process=process,
    )


def _hollow(objective: BitDanceLoss) -> BitDanceLoss:
    """A copy whose tensors have no contents, on the CPU."""
    memo: dict[int, Any] = {}
    for network in (objective, objective.autoencoder):
        for tensor in (*network.parameters(), *network.buffers()):
            hollow = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    return copy.deepcopy(objective, memo)


def _step_bytes(objective: BitDanceLoss, images: int, sample: Tensor, parts: int, bf16: bool) -> int:
    """The most that the forward and backward passes need beside the weights, gradients included."""
    inputs = torch.empty((images, *sample.shape[1:]), dtype=torch.uint8)
    labels, rows = (torch.zeros(images, dtype=torch.int64) for _ in range(2))
    with _Alive() as alive:
        for _ in range(parts):
            alive.peak = alive.now
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = objective(inputs, labels, rows, 0)
            loss.backward()
            del loss
    return alive.peak


@torch.no_grad()
def _preview_bytes(objective: BitDanceLoss) -> int:
    """The most that the pictures of a preview need: the cache of the transformer, then the decoder's for one image."""
    network, config = objective.network, objective.network.config
    with _Alive() as alive:
        cache = network.new_cache(2 * PREVIEW_IMAGES)  # with guidance
        network.prefill(torch.zeros(2 * PREVIEW_IMAGES, dtype=torch.int64), cache)
        del cache
        objective.autoencoder.decode(torch.zeros(1, config.bits, config.grid, config.grid))
    return alive.peak


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def _process_bytes() -> int:
    """What this process holds now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _free_memory(device: torch.device) -> int:
    """Bytes that a process of this machine can still have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kib * 1024 // processes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


# ------------------------------------------------------------ time


def measure_time(trainer: Trainer, memory: Memory, images: int, free: int) -> tuple[float, int] | None:
    """Seconds of a step, and of how many images real ones were; None where not even one image fits into the memory.

    A step that would take long is timed with fewer images, or in fewer parts, at two sizes, from which a straight line
    leads to the whole.
    """
    world, local = trainer.world, len(trainer.loader.indices)
    room = free - memory.resident - memory.gradients  # for activations
    fitting = images if memory.activations <= room else int(images * room / memory.activations)
    if world.broadcast(fitting) < 1:
        return None
    trainer.network.train()
    stream = trainer.loader.stream(trainer.step, trainer.step + 64)

    def timed(count: int, parts: int = 1, repeats: int = 3) -> float:
        seconds = [_one_step(trainer, stream, count, parts) for _ in range(1 + repeats)]
        return world.broadcast(statistics.median(seconds[1:]))

    size = world.broadcast(min(fitting, 2))
    seconds = timed(size, repeats=1)
    size = world.broadcast(min(fitting, max(size, int(size * LONGEST / seconds))))
    # Of short steps more are taken: one of a tenth of a second can be a quarter off.
    seconds = timed(size, repeats=max(3, min(20, int(4 / seconds))))
    if size == local:
        return seconds, size
    if size == images:
        return seconds + (timed(2 * size, parts=2, repeats=2) - seconds) / size * (local - size), size
    if size == 1:
        return seconds * local, size
    half = size // 2
    return seconds + (seconds - timed(half, repeats=2)) / (size - half) * (local - size), size


def _one_step(trainer: Trainer, stream: Any, images: int, parts: int) -> float:
    """Takes a step with the first images of a batch and returns its seconds."""
    start = time.perf_counter()
    batch: Batch = next(stream)
    if images < len(batch.labels):
        batch = Batch(batch.inputs[:images], batch.labels[:images], batch.indices[:images])
        start = time.perf_counter()
    config, trainer.config = trainer.config, dataclasses.replace(trainer.config, accumulate=parts)
    trainer.train_step(batch, lr=0.0)
    trainer.config = config
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize(trainer.world.device)
    return time.perf_counter() - start

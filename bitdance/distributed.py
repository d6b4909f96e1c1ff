"""One process or many: the process group of torchrun, or none, behind one small object."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from torch import Tensor

from bitdance.errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs and files of which there is one."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a float tensor over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises:
        UserError: the device is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"device {name!r} cannot be used ({reason}): choose cpu, cuda, cuda:N or mps.") from None
    return device


def connect(device: str | None = None, threads: int | None = None) -> World:
    """Joins the processes that torchrun started, or stands alone.

    NCCL on GPUs, gloo elsewhere. On a CPU the threads of the machine are shared out evenly among its processes, since
    torchrun would leave one thread to each.

    Raises:
        UserError: the device is not there, or the number of threads is not positive.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} does not fit: it must be at least 1.")
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = choose_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif threads or size > 1:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return World(int(os.environ.get("RANK", "0")), size, place)


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there: on GPUs, and on CPUs that have instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""One process or many: the process group of torchrun, or none, behind one small object."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitdance.errors import UserError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(hours=2)
"""How long processes wait for each other: all wait while the first one writes a file of 10 GB."""


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
            try:
                dist.barrier()
            except RuntimeError as error:
                raise UserError(
                    f"process {self.rank}: another process has ended or cannot be reached: see its log, then run the "
                    "same command again."
                ) from error

    def from_main(self, value: T) -> T:
        """What the first process says, in each of them; plain Python data."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

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
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("of another kind")
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
        UserError: the device is not there, the number of threads is not positive, or the others cannot be joined.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} does not fit: it must be at least 1.")
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set but RANK is not: start the processes with torchrun, or unset WORLD_SIZE.")
    place = choose_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does in matrix products
    elif threads or size > 1:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        torch.set_num_threads(threads or max(1, _num_cores() // local_size))
    if size > 1 and not dist.is_initialized():
        cuda = place.type == "cuda"
        try:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=place if cuda else None)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"process {os.environ['RANK']} of {size} cannot join the others ({reason}): check the address, the "
                "port and the number of processes that torchrun was given."
            ) from error
    return World(int(os.environ.get("RANK", "0")), size, place)


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disconnect() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there: on GPUs, and on CPUs that have instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

"""One process or many: the process group of torchrun, or none, behind one small object."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitdance.runtime.errors import Interrupted, UserError
from bitdance.runtime.peer_monitor import Lifeline

T = TypeVar("T")

TIMEOUT = datetime.timedelta(hours=2)
"""How long processes wait for each other: all wait while the first one writes a file of 10 GB."""

JOIN_TIMEOUT = datetime.timedelta(minutes=10)
"""How long the processes that are there wait at the start for those that are not."""


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

    def broadcast(self, value: T) -> T:
        """What the first process says, in each of them; plain Python data."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            value = box[0]
        return value

    def gather(self, value: T) -> list[T]:
        """What each process says, in the order of their ranks, in the first one; plain data. Nothing in the others."""
        if self.size == 1:
            return [value]
        said: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, said, dst=0)
        return said or []

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a float tensor over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def peak_memory(self) -> int:
        """Bytes: the most that PyTorch held on the GPU, or else the most that the process held."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # not on Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class NonBlockingMax:
    """A number that the processes tell each other without waiting: what one says, all learn at the next call.

    It travels over connections of its own, on the CPU, so a GPU's queue is left alone. Made by all processes together.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[dist.Work, Tensor] | None = None

    def highest(self, value: int) -> int:
        """The highest number that any process said at the call before this one; of one process, `value` itself.

        Raises:
            UserError: another process has ended.
        """
        if self._group is None:
            return value
        highest = self._received()
        box = torch.tensor([value])
        work = dist.all_reduce(box, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = (work, box)
        return highest

    def _received(self) -> int:
        if self._pending is None:
            return 0
        (work, box), self._pending = self._pending, None
        try:
            work.wait()
        except RuntimeError as error:
            raise UserError("another process has ended: see its log, then run the same command again.") from error
        return int(box)

    def close(self) -> None:
        """Waits for what the last call began."""
        self._received()


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


@contextlib.contextmanager
def init_distributed(device: str | None = None, threads: int | None = None) -> Iterator[World]:
    """Joins the processes that torchrun started, or stands alone, for as long as the context lasts.

    NCCL on GPUs, gloo elsewhere. On a CPU the threads of the machine are shared out evenly among its processes, since
    torchrun would leave one thread to each. When a process dies, or leaves the context by an error, the others end.

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
    world = World(int(os.environ.get("RANK", "0")), size, place)
    if size == 1:
        yield world
        return
    lifeline = _join(world)
    try:
        yield world
        lifeline.leave()  # an error closes the connection instead, without a goodbye
    except Interrupted:  # all processes are, at the same step
        lifeline.leave()
        raise
    finally:
        dist.destroy_process_group()


def _join(world: World) -> Lifeline:
    cuda = world.device.type == "cuda"
    try:
        store = _open_store(world.rank)
        store.set(f"joined/{world.rank}", "")
        _await_all(store, world.rank, world.size)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=TIMEOUT,
            device_id=world.device if cuda else None,
        )
        return Lifeline(store, os.environ["MASTER_ADDR"], world.rank, world.size)
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"process {world.rank} of {world.size} cannot join the others ({reason}): check the address, the port and "
            "the number of processes that torchrun was given."
        ) from error


def _open_store(rank: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which torchrun keeps, or else the first process.

    PyTorch's own rendezvous would do the same, but where the first process keeps it, it waits there for all others
    and then cannot say which are missing.
    """
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not torchruns,
        timeout=JOIN_TIMEOUT,
        wait_for_workers=False,
    )
    # After a restart by torchrun the store still holds what the earlier processes said.
    return dist.PrefixStore(f"bitdance/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _await_all(store: dist.Store, rank: int, size: int) -> None:
    """Waits until all processes have said that they are there.

    Raises:
        UserError: some did not come in time; it names them and their machines.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    absent = list(range(size))
    while absent := [other for other in absent if not store.check([f"joined/{other}"])]:
        if time.monotonic() > deadline:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
            nodes = sorted({other // per_node for other in absent})
            raise UserError(
                f"process {rank} waited {JOIN_TIMEOUT.total_seconds():.0f} s for {len(absent)} of {size} processes: "
                f"node {', '.join(map(str, nodes))} did not join (ranks {', '.join(map(str, absent[:8]))}"
                f"{', ...' if len(absent) > 8 else ''}): start it, or check that it reaches "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}."
            )
        time.sleep(0.2)


def _num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there: on GPUs, and on CPUs that have instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

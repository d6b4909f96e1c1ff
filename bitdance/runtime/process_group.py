"""The processes of a job, started by torchrun, or a single process, and the collectives that the package needs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitdance.runtime import devices
from bitdance.runtime.errors import Interrupted, UserError, first_line
from bitdance.runtime.peer_monitor import PeerMonitor, state_key

T = TypeVar("T")

TIMEOUT = datetime.timedelta(hours=2)
"""Time-out of collectives. All processes wait in one while rank 0 writes a file of 10 GB."""

JOIN_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others at the start."""

NOTE_AFTER = 10.0
"""Seconds until it prints that it waits."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process and the number of all processes.

    The collectives have to be called by all processes. They raise a `UserError` if another process has ended.

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
        """Waits until all processes have called this."""
        if self.size > 1:
            with _peer_errors(self.rank):
                dist.barrier()

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0, which has to be picklable."""
        box = [value]
        if self.size > 1:
            with _peer_errors(self.rank):
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns the picklable values of all processes, ordered by rank, on rank 0 and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        with _peer_errors(self.rank):
            dist.gather_object(value, values, dst=0)
        return values or []

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean of a float tensor over all processes; computed in place."""
        if self.size > 1:
            with _peer_errors(self.rank):
                dist.all_reduce(values)
            values /= self.size
        return values

    def peak_memory(self) -> int:
        """Returns the peak memory of this process in bytes, see `devices.peak_memory`."""
        return devices.peak_memory(self.device)


class NonBlockingMax:
    """Maximum of an integer over all processes without waiting for them: each call returns the result of the last one.

    A gloo group of its own on the CPU carries it, so that no GPU has to synchronize. All processes create it together.

    Raises:
        UserError: the processes cannot connect to each other.
    """

    def __init__(self, world: World) -> None:
        self._rank = world.rank
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            with _user_errors(
                f"process {world.rank} cannot connect to the others over gloo",
                "let the host name of each machine resolve to an address that the others reach, or set "
                "GLOO_SOCKET_IFNAME to its network interface",
            ):
                self._group = dist.new_group(backend="gloo")

    def all_reduce_max(self, value: int) -> int:
        """Returns the maximum of the values of the previous call, 0 at first; of a single process, `value` itself.

        Raises:
            UserError: another process has ended.
        """
        if self._group is None:
            return value
        maximum = self.close()
        tensor = torch.tensor([value])
        with _peer_errors(self._rank):
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = (work, tensor)
        return maximum

    def close(self) -> int:
        """Waits for the last reduction and returns its result, 0 if there is none; called by all processes."""
        if self._pending is None:
            return 0
        (work, tensor), self._pending = self._pending, None
        with _peer_errors(self._rank):
            work.wait()
        return int(tensor)


@contextlib.contextmanager
def init_distributed(device: str | None = None, threads: int | None = None, only_one: bool = False) -> Iterator[World]:
    """Joins the processes that torchrun started, if it did, for the duration of the context.

    NCCL on GPUs, gloo elsewhere. On a CPU the cores of the machine are divided evenly among its processes, for which
    torchrun would set one thread each. If a process dies, or leaves the context by an error, the others end too.

    Args:
        device: see `devices.choose_device`.
        threads: number of CPU threads of this process; None chooses it.
        only_one: refuse several processes, which would do the same work and write the same files.

    Raises:
        UserError: the device cannot be used, `threads` is out of range, the variables of the environment that torchrun
            sets are incomplete or inconsistent, or the other processes cannot be reached.
    """
    if threads is not None and not 1 <= threads <= devices.MAX_THREADS:
        rule = "at least 1" if threads < 1 else f"at most {devices.MAX_THREADS}"
        raise UserError(f"threads={threads} is invalid: it must be {rule}.")
    rank, size, local_rank, local_size = _read_environment()
    if only_one and size > 1:
        raise UserError(f"this command runs in one process, not in {size}: start it without torchrun.")
    world = World(rank, size, devices.choose_device(device, local_rank))
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does in matrix products
    elif threads or size > 1:
        torch.set_num_threads(threads or max(1, devices.num_cores() // local_size))
    if size == 1:
        yield world
        return
    cannot_join = (
        f"process {rank} of {size} cannot join the others",
        "check the address, the port and the number of processes that torchrun was given",
    )
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    minutes = f"for up to {JOIN_TIMEOUT.total_seconds() / 60:.0f} minutes"
    waits = f"bitdance: process {rank} waits for the other processes at {address}, {minutes}."
    note = threading.Timer(NOTE_AFTER, print, [waits], {"file": sys.stderr, "flush": True})
    note.start()
    try:
        with _user_errors(*cannot_join):
            store = _open_store(hosts_store)
            monitor = PeerMonitor(_open_store(False), rank, size, hosts_store)
            _await_all(store, rank, size, local_size)
    finally:
        note.cancel()
    monitor.start()
    failure = ""
    try:
        with _user_errors(*cannot_join):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=world.device if on_gpu else None,
            )
        yield world
    except BaseException as error:
        if not isinstance(error, Interrupted):  # which all processes raise after the same step
            failure = first_line(error)
        raise
    finally:
        monitor.leave(failure)
        if not failure:  # with NCCL it could wait for processes that have ended
            dist.destroy_process_group()


def _read_environment() -> tuple[int, int, int, int]:
    """Returns rank, number of processes, rank on this machine and number of processes on it, as torchrun sets them."""
    size = _read_integer("WORLD_SIZE", 1, 1)
    present = "WORLD_SIZE" if size > 1 else "RANK"
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ("WORLD_SIZE",) if "RANK" in os.environ else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        problem = f"the environment sets {present} but not {', '.join(missing)}"
        raise UserError(f"{problem}: start the processes with torchrun, or unset {present}.")
    rank = _read_integer("RANK", 0, 0, size - 1)
    local_rank, local_size = _read_integer("LOCAL_RANK", 0, 0), _read_integer("LOCAL_WORLD_SIZE", size, 1)
    if size > 1:
        address, port = os.environ["MASTER_ADDR"], _read_integer("MASTER_PORT", 0, 1, 65535)
        try:
            socket.getaddrinfo(address, port)  # TCPStore would retry silently for minutes
        except OSError as error:
            problem = f"MASTER_ADDR={address} in the environment cannot be resolved ({error.strerror})"
            raise UserError(f"{problem}: set it to the host name or the address of the machine of process 0.") from None
    return rank, size, local_rank, local_size


def _read_integer(name: str, default: int, lowest: int, highest: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        value = int(text)
        if lowest <= value and (highest is None or value <= highest):
            return value
    limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    problem = f"{name}={text} in the environment must be an integer {limits}"
    raise UserError(f"{problem}: start the processes with torchrun, or unset it.")


def _open_store(hosts_store: bool) -> dist.Store:
    """Opens the store at MASTER_ADDR:MASTER_PORT, which torchrun or process 0 hosts.

    PyTorch's own rendezvous waits there for all others if process 0 hosts it, and cannot tell which are missing.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=hosts_store, timeout=JOIN_TIMEOUT, wait_for_workers=False)
    # After a restart by torchrun the store still holds the keys of the earlier processes.
    return dist.PrefixStore(f"bitdance/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _await_all(store: dist.Store, rank: int, size: int, local_size: int) -> None:
    """Waits until all processes have written their keys; the error names those that did not in time."""
    timeout = JOIN_TIMEOUT.total_seconds()
    deadline, absent = time.monotonic() + timeout, list(range(size))
    while absent := [other for other in absent if not store.check([state_key(other)])]:
        if time.monotonic() > deadline:
            nodes = ", ".join(map(str, sorted({other // local_size for other in absent})))
            ranks = ", ".join(map(str, absent[:8])) + ", ..." * (len(absent) > 8)
            raise UserError(
                f"process {rank} waited {timeout:.0f} s for {len(absent)} of {size} processes: node {nodes} did not "
                f"join (ranks {ranks}): start it, or check that it reaches "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}."
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _user_errors(problem: str, advice: str) -> Iterator[None]:
    """Raises errors of torch.distributed as a `UserError` with this problem and advice."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(f"{problem} ({first_line(error)}): {advice}.") from error


def _peer_errors(rank: int) -> contextlib.AbstractContextManager[None]:
    return _user_errors(
        f"process {rank} lost the connection to another process",
        "see the messages of the others, then run the same command again",
    )

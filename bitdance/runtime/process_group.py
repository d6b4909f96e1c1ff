"""The processes of a job, started by torchrun, or a single process, and the collectives that the package needs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import os
import pickle
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
"""Time-out of collectives."""

JOIN_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others at the start."""

NOTE_AFTER = 10.0
"""Seconds until it prints that it waits."""

_destroyed: list[dist.ProcessGroup | None] = []
"""The process group, so that it outlives `DistributedDataParallel`, which would free it while holding the GIL: the
destructor waits for a thread of gloo that may need the GIL."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process and the number of all processes.

    The collectives have to be called by all processes. They raise a `UserError` if another process has ended.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes.
        device: where this process computes.
        store: that the processes share, None for a single one. What they wait for while one of them works, which can
            take hours, goes over it: the collectives of NCCL and gloo have time-outs and occupy the GPU.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    _calls: Iterator[int] = dataclasses.field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs and files of which there is one."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes have called this."""
        if self.store is None:
            return
        key = f"barrier/{next(self._calls)}"
        with _peer_errors(self.rank):
            if self.store.add(f"{key}/arrived", 1) == self.size:
                self.store.set(key, "all")
            self.await_key(key)

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0, which has to be picklable and of at most some MB."""
        if self.store is None:
            return value
        key = f"broadcast/{next(self._calls)}"
        with _peer_errors(self.rank):
            if self.is_main:
                self.store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # (bytes are right)
                return value
            received: T = pickle.loads(self.await_key(key))
            return received

    def await_key(self, key: str) -> bytes:
        """Waits until a key is in the store, for as long as the other processes are alive, and returns its value."""
        assert self.store is not None
        delay = 0.001
        while not self.store.check([key]):  # a blocking call would not let Python handle signals
            time.sleep(delay)
            delay = min(2 * delay, 0.1)
        return self.store.get(key)

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
        """Returns the peak memory in bytes: that of PyTorch on a GPU, otherwise that of the process (0 on Windows)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class StopSignal:
    """A number that any process sets and all read in the same call, without waiting for each other.

    It goes over the store: the first process publishes in each call what it has read there, and the others take what it
    published in the call before. So no GPU has to synchronize, and a process only waits if it is a whole call ahead of
    the first one. All processes make the same calls, and none may be `KEPT` calls behind the first one: in training
    they wait for each other's gradients in each step.

    Raises:
        UserError: the connection to the other processes is lost.
    """

    KEPT = 1000

    def __init__(self, world: World) -> None:
        self._world, self._calls, self._key = world, 0, f"signal/{next(world._calls)}"
        if world.store is not None:
            with _peer_errors(world.rank):
                world.store.compare_set(self._key, "", "0")  # before any process reads it, which would wait

    def exchange(self, value: int) -> int:
        """Gives the value of this process, 0 for none, and returns one that a process has given, or 0.

        Raises:
            UserError: the connection to the other processes is lost.
        """
        world, call = self._world, self._calls
        self._calls += 1
        if world.store is None:
            return value
        with _peer_errors(world.rank):
            if value:
                world.store.compare_set(self._key, "0", str(value))
            if world.is_main:
                world.store.set(f"{self._key}/{call}", world.store.get(self._key).decode())
                if call >= self.KEPT:
                    world.store.delete_key(f"{self._key}/{call - self.KEPT}")
            return int(world.await_key(f"{self._key}/{call - 1}")) if call else 0


@contextlib.contextmanager
def init_distributed(device: str | None = None, threads: int | None = None, only_one: bool = False) -> Iterator[World]:
    """Joins the processes that torchrun started, if it did, for the duration of the context.

    NCCL on GPUs, gloo elsewhere. The CPU cores of the machine are divided evenly among its processes, for which
    torchrun would set one thread each. If a process dies, or leaves the context by an error, the others end too.

    Args:
        device: see `devices.choose_device`.
        threads: number of CPU threads of this process; None chooses it.
        only_one: refuse several processes, which would do the same work and write the same files.

    Raises:
        UserError: the device cannot be used, `threads` is out of range, the variables of the environment that torchrun
            sets are incomplete or inconsistent, or the other processes cannot be reached.
    """
    devices.set_threads(threads)
    rank, size, local_rank, local_size = _read_environment()
    if only_one and size > 1:
        raise UserError(f"this command runs in one process, not in {size}: start it without torchrun.")
    world = World(rank, size, devices.choose_device(device, local_rank))
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as it does in matrix products
    if not threads and size > 1:
        torch.set_num_threads(max(1, devices.num_cores() // local_size))
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
        with _distributed_errors(*cannot_join):
            store = _open_store(hosts_store)
            monitor = PeerMonitor(_open_store(False), rank, size, hosts_store)
            _await_all(store, rank, size, local_size, address)
    finally:
        note.cancel()
    monitor.start()
    failure = ""
    try:
        with _distributed_errors(*cannot_join):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=world.device if on_gpu else None,
            )
        yield dataclasses.replace(world, store=store)
    except BaseException as error:
        if not isinstance(error, Interrupted):  # which all processes raise after the same step
            failure = first_line(error)
        raise
    finally:
        monitor.leave(failure)
        if not failure:  # with NCCL it could wait for processes that have ended
            _destroyed.append(dist.group.WORLD)
            dist.destroy_process_group()


def is_one_of_several() -> bool:
    """Returns whether this is one of several processes, by WORLD_SIZE in the environment.

    Raises:
        UserError: it is not a positive integer.
    """
    return _read_integer("WORLD_SIZE", 1, 1) > 1


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


def _await_all(store: dist.Store, rank: int, size: int, local_size: int, address: str) -> None:
    """Waits until all processes have written their keys; the error names those that did not in time."""
    timeout = JOIN_TIMEOUT.total_seconds()
    deadline, absent = time.monotonic() + timeout, list(range(size))
    while absent := [other for other in absent if not store.check([state_key(other)])]:
        if time.monotonic() > deadline:
            nodes = ", ".join(map(str, sorted({other // local_size for other in absent})))
            ranks = ", ".join(map(str, absent[:8])) + ", ..." * (len(absent) > 8)
            raise UserError(
                f"process {rank} waited {timeout:.0f} s for {len(absent)} of {size} processes: node {nodes} did not "
                f"join (ranks {ranks}): start it, or check that it reaches {address}."
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _distributed_errors(problem: str, advice: str) -> Iterator[None]:
    """Raises errors of torch.distributed as a `UserError` with this problem and advice."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(f"{problem} ({first_line(error)}): {advice}.") from error


def _peer_errors(rank: int) -> contextlib.AbstractContextManager[None]:
    return _distributed_errors(
        f"process {rank} lost the connection to another process",
        "see the messages of the others, then run the same command again",
    )

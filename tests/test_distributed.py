"""Processes that join each other or name those that are missing, and that end together wherever they run."""

from __future__ import annotations

import atexit
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist

from bitdance.cli.main import call
from bitdance.runtime import peer_monitor, process_group
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import StopSignal, World, init_distributed


def environment(rank: int, size: int, port: int, agent: bool) -> dict[str, str]:
    """The variables of a process on a machine of its own, where no torchrun stops it when others end."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": agent}  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def run(
    variables: dict[str, str],
    folder: pathlib.Path,
    body: Callable[[World], None],
    timeout: float = 60,
    join_timeout: float = 10,
    grace: float = 0.2,
    device: str = "cpu",
) -> None:
    """What a process does: `body`, as a command of the package, with its output in files and with shorter intervals."""
    os.environ.update(variables)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{variables['RANK']}", os.O_CREAT | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    peer_monitor.HEARTBEAT_INTERVAL, peer_monitor.HEARTBEAT_TIMEOUT, peer_monitor.GRACE = 0.1, timeout, grace
    process_group.JOIN_TIMEOUT = datetime.timedelta(seconds=join_timeout)

    def command(_: list[str]) -> None:
        with init_distributed(device.format(variables["RANK"]), 1) as world:
            assert world.broadcast(world.rank) == 0
            print("joined")
            body(world)

    call(command, [])


class Job:
    """Processes on machines of their own, whose store is kept by the first process or by torchrun."""

    def __init__(self, folder: pathlib.Path, size: int, agent: bool = False) -> None:
        self.folder, self.size = folder, size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
        self.port = self.store.port if self.store else small.free_port()
        self.processes: dict[int, multiprocessing.process.BaseProcess] = {}

    def start(self, body: Callable[[World], None], *ranks: int, **settings: Any) -> Job:
        for rank in ranks or range(self.size):
            variables = environment(rank, self.size, self.port, self.store is not None)
            process = small.SERVER.Process(target=run, args=(variables, self.folder, body), kwargs=settings)
            process.start()
            self.processes[rank] = process
        return self

    def send_signal(self, name: str, *ranks: int) -> None:
        for rank in ranks or self.processes:
            os.kill(self.processes[rank].pid or 0, getattr(signal, name))

    def wait_until_joined(self) -> None:
        deadline = time.monotonic() + 60
        while not all(self.output(rank, "out") == "joined\n" for rank in self.processes):
            assert time.monotonic() < deadline and all(process.exitcode is None for process in self.processes.values())
            time.sleep(0.02)

    def output(self, rank: int, stream: str = "err") -> str:
        path = self.folder / f"{stream}{rank}"
        return path.read_text() if path.exists() else ""

    def end(self, rank: int) -> tuple[int | None, str]:
        """Waits for a process and returns its exit status and the last line of its messages."""
        self.processes[rank].join(60)
        return self.processes[rank].exitcode, (self.output(rank).splitlines() or [""])[-1]


@pytest.fixture
def job(tmp_path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(size: int, agent: bool = False) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, size, agent))
        return jobs[-1]

    yield make
    for process in (process for made in jobs for process in made.processes.values()):
        process.kill()
        process.join()


def ends(rank: int, reason: str) -> tuple[int, str]:
    sentence = f"process {rank} ends because {reason}: see its messages, then run the same command again."
    return 1, f"bitdance: {sentence}"


# ------------------------------------------------------------ processes that end


def sleep(world: World) -> None:
    time.sleep(100)


def test_when_a_process_dies_the_others_end_and_name_it(job):
    # SIGSTOP is like a machine that is gone: no connection is closed. All cases run at once, since they mostly wait.
    cases = [(job(3), lost, name) for lost in range(3) for name in ("SIGKILL", "SIGSTOP")]
    for running, _, _ in cases:
        running.start(sleep, timeout=2)
    for running, lost, name in cases:
        running.wait_until_joined()
        running.send_signal(name, lost)
    for running, lost, name in cases:
        address = f"127.0.0.1:{running.port}"
        reason = f"process {lost} has not responded for 2 s"
        if lost == 0 and name == "SIGKILL":
            reason = f"the connection to the store at {address} was lost (process 0 or its torchrun has ended)"
        elif lost == 0:
            reason = f"the store at {address} has not responded for 2 s"
        for rank in {0, 1, 2} - {lost}:
            assert running.end(rank) == ends(rank, reason), (lost, name)


def test_processes_end_with_the_store_of_torchrun(job):
    running = job(2, agent=True).start(sleep)
    running.wait_until_joined()
    running.store = None
    for rank in range(2):
        status, line = running.end(rank)
        assert status == 1 and "was lost (process 0 or its torchrun has ended)" in line


def fail(failed: int, world: World) -> None:
    if world.rank == failed:
        raise UserError("an image cannot be read: remove it.")
    time.sleep(100)


def test_an_error_of_one_process_ends_the_others(job):
    cases = [
        (job(3, agent).start(functools.partial(fail, failed)), failed) for agent in (False, True) for failed in (0, 1)
    ]
    for running, failed in cases:
        assert running.end(failed) == (2, "bitdance: an image cannot be read: remove it.")
        for rank in {0, 1, 2} - {failed}:
            assert running.end(rank) == ends(rank, f"process {failed} failed (an image cannot be read: remove it)")


def fail_later(world: World) -> None:
    time.sleep(0 if world.rank == 0 else 1)
    raise UserError(f"process {world.rank} has its own message.")


def test_a_process_may_end_with_its_own_message(job):
    running = job(2).start(fail_later, grace=5)
    for rank in range(2):
        assert running.end(rank) == (2, f"bitdance: process {rank} has its own message.")


def leave_in_order(world: World) -> None:
    time.sleep(world.rank)


def leave_in_reverse(world: World) -> None:
    time.sleep(2 - world.rank)


def test_a_process_may_leave_before_the_others(job):
    bodies = (leave_in_order, leave_in_reverse)
    for running in [job(3, agent).start(body, timeout=1.5) for agent in (False, True) for body in bodies]:
        for rank in range(3):
            assert running.end(rank) == (0, "") and running.output(rank) == ""


def receive_late(world: World) -> None:
    time.sleep(world.rank)
    assert world.broadcast(world.rank + 5) == 5


def test_the_store_stays_until_the_slowest_process_has_left(job):
    running = job(3).start(receive_late)
    for rank in range(3):
        assert running.end(rank) == (0, "")


def report_a_freed_group(world: World) -> None:
    weakref.finalize(dist.group.WORLD, print, "freed").atexit = False


def test_the_process_group_outlives_the_job(job):
    """Freed by DistributedDataParallel, it would now and then wait forever for a thread that waits for the GIL."""
    running = job(2).start(report_a_freed_group)
    for rank in range(2):
        assert running.end(rank) == (0, "") and running.output(rank, "out") == "joined\n"


def work(world: World) -> None:
    time.sleep(2)


def test_a_job_that_is_suspended_continues(job):
    running = job(3).start(work, timeout=1)
    running.wait_until_joined()
    running.send_signal("SIGSTOP")
    time.sleep(1.2)
    running.send_signal("SIGCONT", 0)
    time.sleep(0.3)
    running.send_signal("SIGCONT", 1, 2)
    for rank in range(3):
        assert running.end(rank) == (0, "")


def fail_with_hanging_clean_up(error: BaseException) -> None:
    """As with NCCL, whose clean-up waits for the processes that are gone."""
    dist.destroy_process_group = atexit.register(lambda *_: time.sleep(1000))
    raise error


def fail_by_the_user(world: World) -> None:
    fail_with_hanging_clean_up(UserError("the disk is full: free some space."))


def fail_by_an_interrupt(world: World) -> None:
    fail_with_hanging_clean_up(KeyboardInterrupt())


def fail_by_the_program(world: World) -> None:
    fail_with_hanging_clean_up(RuntimeError("CUDA error: an illegal memory access"))


# Forks pairs of processes, which end as an interpreter does: those of the other tests skip that.
REAL_ENDS = """
import json, os, pathlib, sys
import test_distributed as tests
folder, statuses, children = pathlib.Path(sys.argv[1]), {}, {}
for port, body in zip(sys.argv[2::2], sys.argv[3::2]):
    for rank in (0, 1):
        if not (child := os.fork()):
            tests.run(tests.environment(rank, 2, port, False), folder / body, getattr(tests, body))
            sys.exit()
        children[child] = body
for child, body in children.items():
    statuses.setdefault(body, []).append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def test_interpreters_end_without_a_word_and_never_wait_for_the_clean_up(tmp_path):
    """Neither the threads of the monitor nor the clean-up of a process that failed disturb the end."""
    cases = {
        leave_in_order: (0, []),
        fail_by_the_user: (2, ["bitdance: the disk is full: free some space."]),
        fail_by_an_interrupt: (130, ["bitdance: interrupted."]),
        fail_by_the_program: (1, ["RuntimeError: CUDA error: an illegal memory access"]),
    }
    for body in cases:
        (tmp_path / body.__name__).mkdir()
    arguments = [word for body in cases for word in (str(small.free_port()), body.__name__)]
    environment = small.environment() | {"PYTHONPATH": f"{small.ROOT}:{small.ROOT / 'tests'}"}
    command = [sys.executable, "-c", REAL_ENDS, str(tmp_path), *arguments]
    statuses = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=100).stdout)
    for body, (status, last) in cases.items():
        assert statuses[body.__name__] == [status, status], body.__name__
        for rank in range(2):
            out, err = ((tmp_path / body.__name__ / f"{name}{rank}").read_text() for name in ("out", "err"))
            assert out == "joined\n" and err.splitlines()[-1:] == last
    assert (tmp_path / "leave_in_order" / "err0").read_text() == ""


def fail_before_a_collective(world: World) -> None:
    total = world.mean(torch.ones(1, device=world.device))
    if world.rank == 1:
        raise UserError("the disk is full: free some space.")
    world.mean(total)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_an_error_of_one_gpu_ends_the_other(job):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    running, start = job(2).start(fail_before_a_collective, device="cuda:{}"), time.monotonic()
    assert running.end(1) == (2, "bitdance: the disk is full: free some space.")
    assert running.end(0) == ends(1, "process 1 failed (the disk is full: free some space)")
    assert time.monotonic() - start < 60


def collectives_after_a_death(world: World) -> None:
    assert world.gather(world.rank) == ([0, 1] if world.rank == 0 else [])
    assert world.mean(torch.tensor([float(world.rank)])).item() == 0.5
    if world.rank == 1:
        os._exit(0)
    messages = []
    for collective in (lambda: world.gather(1), lambda: world.mean(torch.ones(1))):
        with pytest.raises(UserError) as caught:
            collective()
        messages.append(str(caught.value))
    print(json.dumps(messages), flush=True)
    os._exit(0)


def test_collectives_say_that_a_process_has_ended(job):
    running = job(2).start(collectives_after_a_death)
    assert running.end(0) == (0, "")
    messages = json.loads(running.output(0, "out").splitlines()[1])
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("process 0 lost the connection to another process (")
        assert message.endswith("): see the messages of the others, then run the same command again.")


def wait_for_the_dead(world: World) -> None:
    if world.rank == 1:
        os._exit(0)
    world.barrier()


def test_a_wait_ends_when_a_process_has_died(job):
    running = job(2).start(wait_for_the_dead, timeout=3)
    assert running.end(0)[0] == 1
    assert "process 1 has not responded for 3 s" in running.output(0, "err")


def agree(world: World) -> None:
    stop = StopSignal(world)
    world.barrier()
    received = []
    for step in range(StopSignal.KEPT + 100):
        received.append(stop.exchange(15 if world.rank == 1 and step >= 3 else 0))
        world.mean(torch.ones(1))  # as the gradients of a step
    every = world.gather(received)
    if world.is_main:
        print(json.dumps(every))


def test_all_processes_see_a_signal_in_the_same_call(job):
    running = job(3).start(agree)
    assert all(running.end(rank)[0] == 0 for rank in range(3))
    first, *others = json.loads(running.output(0, "out").splitlines()[1])
    assert all(received == first for received in others)
    assert first[:4] == [0, 0, 0, 0] and first[-1] == 15 and first == sorted(first)


# ------------------------------------------------------------ the start


def test_a_process_that_does_not_join_is_named(job):
    running = job(2).start(sleep, 0, join_timeout=1)
    status, line = running.end(0)
    assert status == 2
    assert line == (
        "bitdance: process 0 waited 1 s for 1 of 2 processes: node 1 did not join (ranks 1): start it, or check that "
        f"it reaches 127.0.0.1:{running.port}."
    )


def test_a_first_process_that_does_not_join(job):
    status, line = job(2).start(sleep, 1, join_timeout=1).end(1)
    assert status == 2 and line.startswith("bitdance: process 1 of 2 cannot join the others (")
    assert line.endswith("check the address, the port and the number of processes that torchrun was given.")


def test_a_port_that_is_in_use(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        started = job(2)
        started.port = taken.getsockname()[1]
        status, line = started.start(sleep, 0, join_timeout=1).end(0)
    assert status == 2 and "process 0 of 2 cannot join the others (" in line


TWO = environment(0, 2, 12345, False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment must be an integer of at least 1: start the"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment must be an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment must be an integer of at least 1"),
        ({**TWO, "RANK": "2"}, "RANK=2 in the environment must be an integer from 0 to 1"),
        ({**TWO, "RANK": "-1"}, "RANK=-1 in the environment must be an integer from 0 to 1"),
        ({**TWO, "LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0 in the environment must be an integer of at least 0"),
        ({**TWO, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment must be an integer of at least 1"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT=http in the environment must be an integer from 1 to 65535"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 in the environment must be an integer from 1 to 65535"),
        ({"RANK": "1"}, "the environment sets RANK but not WORLD_SIZE: start the processes with torchrun"),
        ({"WORLD_SIZE": "2"}, "sets WORLD_SIZE but not RANK, MASTER_ADDR, MASTER_PORT: start the processes with"),
        ({**TWO, "MASTER_PORT": ""}, "sets WORLD_SIZE but not MASTER_PORT: start the processes with torchrun"),
        ({**TWO, "MASTER_ADDR": "node"}, "MASTER_ADDR=node in the environment cannot be resolved (Name or service not"),
    ],
)
def test_environments_that_do_not_fit(monkeypatch, variables, message):
    def fails(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    for name in TWO:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, init_distributed("cpu"):
        pass
    assert message in str(caught.value) and str(caught.value).endswith(".")


def test_one_process_needs_no_environment(monkeypatch):
    for name in TWO:
        monkeypatch.delenv(name, raising=False)
    for variables in ({}, {"WORLD_SIZE": "1"}, {"RANK": "0"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with init_distributed("cpu") as world:
            assert (world.rank, world.size) == (0, 1)
            assert world.broadcast(5) == 5 and world.gather(5) == [5]


def test_a_number_of_threads_that_does_not_fit():
    with pytest.raises(UserError, match=r"threads=0 is invalid: it must be at least 1\."), init_distributed("cpu", 0):
        pass

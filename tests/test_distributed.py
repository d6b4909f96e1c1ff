"""Processes that find each other, or say who is missing, and end together wherever they run."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import small

ROOT = pathlib.Path(__file__).resolve().parent.parent

SCRIPT = """
import sys, time, datetime
from bitdance.runtime import process_group
process_group.JOIN_TIMEOUT = datetime.timedelta(seconds=float(sys.argv[1]))
from bitdance.cli.main import call

def body(arguments):
    with process_group.init_distributed("cpu", 1) as world:
        print("joined", flush=True)
        assert world.broadcast(world.rank) == 0
        if sys.argv[2] == "error" and world.rank == 1:
            raise process_group.UserError("one went wrong.")
        time.sleep(100 if sys.argv[2] != "leave" else world.rank)

call(body, [])
"""


def start(rank: int, size: int, port: int, *arguments: object) -> subprocess.Popen[str]:
    """A process as on a machine of its own: no torchrun stops it when others die."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in place.items()}, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_line(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=100)[1].splitlines()[-1]


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_when_one_dies_the_others_end_and_say_why(killed):
    port = small.free_port()
    processes = [start(rank, 3, port, 60, "sleep") for rank in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "joined\n"
        time.sleep(0.5)  # all are through the broadcast
        processes[killed].send_signal(signal.SIGKILL)
        for rank, process in enumerate(processes):
            if rank == killed:
                assert process.wait() == -signal.SIGKILL
                continue
            said = last_line(process)
            assert process.returncode == 1
            assert said.startswith(f"bitdance: process {rank} stops, since ") and said.endswith(
                "run the same command again."
            )
            if rank == 0:
                assert f"process {killed} has ended" in said
    finally:
        for process in processes:
            process.kill()


def test_an_error_of_one_ends_the_others_too():
    port = small.free_port()
    processes = [start(rank, 2, port, 60, "error") for rank in range(2)]
    assert last_line(processes[1]) == "bitdance: one went wrong." and processes[1].returncode == 2
    assert "process 1 has ended" in last_line(processes[0]) and processes[0].returncode == 1


def test_who_is_done_may_leave_before_the_others():
    port = small.free_port()
    processes = [start(rank, 2, port, 60, "leave") for rank in range(2)]
    for process in processes:
        assert process.communicate(timeout=100) == ("joined\n", "") and process.returncode == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_join_is_named(rank):
    process = start(rank, 2, small.free_port(), 3, "sleep")
    said = last_line(process)
    assert process.returncode == 2
    if rank == 0:
        assert said.startswith(
            "bitdance: process 0 waited 3 s for 1 of 2 processes: node 1 did not join (ranks 1): start it"
        )
    else:
        assert said.startswith("bitdance: process 1 of 2 cannot join the others (")
        assert said.endswith("check the address, the port and the number of processes that torchrun was given.")


def test_a_port_that_is_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(0, 2, taken.getsockname()[1], 3, "sleep")
        said = last_line(process)
    assert process.returncode == 2 and "process 0 of 2 cannot join the others (" in said

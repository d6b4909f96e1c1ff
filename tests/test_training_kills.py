"""Runs that are interrupted: signals end them with a checkpoint; after kills they resume bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest
import small
import torch
from torch._subclasses.fake_tensor import FakeTensor

from bitdance.cli.main import main
from bitdance.models.transformer import BitDance
from bitdance.runtime import run_folder
from bitdance.runtime.process_group import World
from bitdance.training.preemption import PreemptionHandler
from bitdance.weights import weights_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

KILLS = 20
STEPS = 60


def arguments(place: pathlib.Path, output: pathlib.Path, **settings: object) -> list[str]:
    defaults = {
        "autoencoder": place / "autoencoder.safetensors", "data_path": place / "pictures", "output": output,
        "image_size": 16, **small.SIZES, "batch_size": 4, "epochs": STEPS // 3, "lr": 3e-3, "warmup_steps": 0,
        "precision": "fp32", "ema": 0.9, "drop_rate": 0.1, "perturb_rate": 0.3, "num_workers": 1,
        "log_every": 1, "save_every": 0, "preview_every": 0, "device": "cpu",
    }  # fmt: skip
    return ["train", *small.flags(defaults | settings)]


def command(words: list[str], processes: int = 1) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    return [sys.executable, "-m", *torchrun, "bitdance", *words]


def start(words: list[str], **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=small.ROOT, env=small.environment() | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def steps_done(output: pathlib.Path) -> int:
    """The step of the newest line of the log."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(json.loads((output / "log.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def wait_for(is_running: Callable[[], bool], output: pathlib.Path, step: int) -> None:
    while is_running() and steps_done(output) < step:
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX"
    except OSError:
        return True


def newest_step(output: pathlib.Path) -> int:
    return max(int(path.stem.split("-")[1]) for path in output.glob("checkpoint-*.safetensors"))


def interrupted(name: str, step: int) -> str:
    return f"bitdance: interrupted by {name} at step {step} of 3000: run the same command again to resume."


# ------------------------------------------------------------ signals


def end(processes: list[BaseProcess], folder: pathlib.Path) -> list[str]:
    """Waits for the processes and returns what each wrote to stderr."""
    for process in processes:
        process.join(60)
    return [without_summary((folder / f"err{rank}").read_text()) for rank in range(len(processes))]


def without_summary(text: str) -> str:
    """Without the line that says which images were found."""
    return re.sub(r"^bitdance: .* images of \d+ classes .*\n", "", text, flags=re.M)


def test_a_second_ctrl_c_ends_at_once(capfd):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with PreemptionHandler(World(0, 1, torch.device("cpu"))).installed() as preemption:
            signal.raise_signal(number)
            assert preemption.received() == number
    with PreemptionHandler(World(0, 1, torch.device("cpu"))).installed() as preemption:
        assert preemption.received() == 0
        signal.raise_signal(signal.SIGINT)
        assert preemption.received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_checkpoint(place, tmp_path, capsys, monkeypatch, name):
    """And a second training in the same folder is refused while the first one goes on."""
    words = arguments(place, tmp_path / "run", epochs=1000)
    (process,) = small.start(tmp_path, words)
    wait_for(process.is_alive, tmp_path / "run", 3)
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.0)
    with pytest.raises(SystemExit) as stop:
        main(words)
    refused = steps_done(tmp_path / "run")
    message = f"another process works in {tmp_path / 'run'}: wait for it to finish, or stop it first."
    assert stop.value.code == 2 and without_summary(capsys.readouterr().err) == f"bitdance: {message}\n"
    wait_for(process.is_alive, tmp_path / "run", refused + 3)
    os.kill(process.pid, getattr(signal, name))
    (err,) = end([process], tmp_path)
    step = newest_step(tmp_path / "run")
    note = "\nbitdance: saving a checkpoint after this step; Ctrl-C again stops at once.\n" * (name == "SIGINT")
    assert err == note + interrupted(name, step) + "\n"  # and no progress bar, since this is not a terminal
    assert process.exitcode == 128 + getattr(signal, name)
    lines = small.read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, step + 1)) and step >= refused + 3
    weights_file.read(tmp_path / "run" / f"checkpoint-{step:07d}.safetensors")


def test_a_signal_to_one_process_ends_all_after_the_same_step(place, tmp_path):
    processes = small.start(tmp_path, arguments(place, tmp_path / "run", epochs=1000), size=2)
    wait_for(processes[0].is_alive, tmp_path / "run", 3)
    os.kill(processes[1].pid, signal.SIGTERM)
    errors = end(processes, tmp_path)
    step = newest_step(tmp_path / "run")
    assert errors == [interrupted("SIGTERM", step) + "\n", ""]
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    assert steps_done(tmp_path / "run") == step >= 3


def make_steps_of_process_1_non_finite() -> None:
    loss, steps = BitDance.loss, []

    def bad(self, *arguments):
        if isinstance(arguments[0], FakeTensor):  # FLOPs are counted before the first step
            return loss(self, *arguments)
        steps.append(None)
        is_bad = os.environ["RANK"] == "1" and (len(steps) == 2 or len(steps) > 4)
        return loss(self, *arguments) * (float("nan") if is_bad else 1)

    BitDance.loss = bad


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(place, tmp_path):
    """After too many of them, each process leaves its part of the batch."""
    words = arguments(place, tmp_path / "run", max_skipped=3, save_every=4)
    processes = small.start(tmp_path, words, 2, make_steps_of_process_1_non_finite)
    errors = end(processes, tmp_path)
    assert all(process.exitcode == 2 for process in processes)
    assert all("gradients were not finite in 3 consecutive steps, up to step 7" in err for err in errors)
    lines = small.read_log(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 3]  # the last step has no line
    assert [line["loss"] is None for line in lines] == [False, True, False, False, True, True]
    batches = [weights_file.read(tmp_path / "run" / f"bad-batch-7-{rank}.safetensors") for rank in (0, 1)]
    assert [batch.states["batch"]["indices"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert newest_step(tmp_path / "run") == 4


# ------------------------------------------------------------ Slurm


SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> asked; fi
"""
SRUN = """#!/bin/bash
# Two machines on one, and SIGTERM handed on to both.
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
trap 'kill -TERM $tasks' TERM
for task in $tasks; do
  wait $task; status=$?
  while kill -0 $task 2>/dev/null; do wait $task; status=$?; done
done
exit $status
"""


def start_on_slurm(script: str, folder: pathlib.Path) -> subprocess.Popen[str]:
    """Runs a batch script beside stand-ins for Slurm's commands; what it asks of scontrol is in the file `asked`."""
    assert "#SBATCH --signal=B:USR1@120 --requeue --open-mode=append\n" in script
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return start(
        ["bash", "-c", f"cd {folder}\n{script}"],
        PATH=path,
        SLURM_JOB_ID="77",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="a,b",
    )


@pytest.mark.slow
def test_slurm_script_for_one_machine(place, tmp_path):
    """The batch script of the documentation, through torchrun: SIGUSR1 ends all processes, and the job is requeued."""
    script, _ = small.slurm_scripts()
    published = script[script.index("torchrun --standalone") : script.index("&\nrun=$!")]
    output, words = tmp_path / "run", arguments(place, tmp_path / "run", epochs=1000)
    process = start_on_slurm(script.replace(published, shlex.join(command(words, 2))), tmp_path)
    wait_for(lambda: process.poll() is None, output, 3)
    launchers = children(process.pid)
    workers = [child for launcher in launchers for child in children(launcher)]
    assert len(launchers) == 1 and len(workers) == 2
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    step = newest_step(output)
    assert process.returncode != 0 and all(map(gone, workers))
    assert err.count(interrupted("SIGTERM", step)) == 1
    assert "ends because" not in err and "Traceback" not in err.split("torch/distributed")[0] and "\r" not in err
    assert steps_done(output) == step >= 3
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    # A job that ends by itself is not requeued, and its status is that of the command.
    assert start_on_slurm(script.replace(published, "true"), tmp_path).wait(60) == 0
    assert start_on_slurm(script.replace(published, "sh -c 'exit 3'"), tmp_path).wait(60) == 3
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    main([*words, "--max-steps", str(step + 3)])
    assert newest_step(output) == step + 3


@pytest.mark.slow
def test_slurm_script_for_several_machines(place, tmp_path):
    _, script = small.slurm_scripts()
    published = script[script.index("train_parallel.py") : script.index("' &\nrun=$!")]
    words = ["-m", "bitdance", *arguments(place, tmp_path / "run", epochs=1000)]
    script = script.replace(published, shlex.join(words)).replace("--nproc_per_node=8", "--nproc_per_node=1")
    process = start_on_slurm(script.replace("12345", str(small.free_port())), tmp_path)
    wait_for(lambda: process.poll() is None, tmp_path / "run", 3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    step = newest_step(tmp_path / "run")
    assert process.returncode != 0
    assert err.count(interrupted("SIGTERM", step)) == 1
    assert "ends because" not in err and (tmp_path / "asked").read_text() == "requeue 77\n"
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["run"]["processes"] == 2


# ------------------------------------------------------------ kills


def kill(process: subprocess.Popen[str], workers: list[int], number: int) -> None:
    """Kills all processes, the launcher, or one worker, in turn, and waits until all of them are gone."""
    kind = ("all", "launcher", "one")[number % 3] if workers else "all"
    for pid in {"all": [process.pid, *workers], "launcher": [process.pid], "one": workers[-1:]}[kind]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=100)
    deadline = time.monotonic() + 100
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline, f"a process outlived the others ({kind})"
        time.sleep(0.01)


def kill_repeatedly(
    command: Callable[[int], list[str]], kills: int, is_due: Callable[[int], bool], is_finished: Callable[[], bool]
) -> int:
    """Starts commands and kills each when it is due; returns how many were running then."""
    hits = 0
    for number in range(kills):
        process = start(words := command(number))
        while process.poll() is None and not is_due(number):
            time.sleep(0.002)
        is_running = process.poll() is None
        workers = children(process.pid) if "torch.distributed.run" in words and is_running else []
        hits += is_running and not is_finished()
        kill(process, workers, number)
    return hits


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS), (2, KILLS // 2)])
def test_a_run_killed_many_times_ends_like_an_undisturbed_one(place, tmp_path, processes, kills):
    undisturbed, killed = (
        command(arguments(place, tmp_path / name, save_every=4, keep_epochs=10), processes)
        for name in ("undisturbed", "killed")
    )
    assert start(undisturbed).wait(timeout=100) == 0
    expected, output = tmp_path / "undisturbed", tmp_path / "killed"
    resumed = []

    def is_due(number: int) -> bool:
        """From before the first step to the writing of the final weights."""
        if not (output / "settings.json").exists() or steps_done(output) < round(number * STEPS / (kills - 1)):
            return False
        resumed.append(bool(list(output.glob("checkpoint-*.safetensors"))))
        return True

    hits = kill_repeatedly(lambda number: killed, kills, is_due, (output / "model.safetensors").exists)
    assert hits >= 0.75 * kills, "too few of the kills hit a run"
    assert sum(resumed) >= kills // 2
    assert start(killed).wait(timeout=100) == 0
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names  # no temporary file is left
    for name in names:
        if name.endswith(".safetensors"):
            a, b = (weights_file.read(folder / name) for folder in (output, expected))
            # With the digest of the tensors; the order of a file's metadata is not fixed.
            assert (a.metadata, a.config) == (b.metadata, b.config), name
        elif name.endswith(".png"):
            assert (output / name).read_bytes() == (expected / name).read_bytes()
    lines = [
        [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in small.read_log(folder)]
        for folder in (expected, output)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS


SHARDS = 32


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_killed_six_times_ends_with_the_same_bytes(place, tmp_path, processes):
    small.pictures(tmp_path / "pictures", classes=4, each=SHARDS // 4)
    kills = 6

    def encode(output: pathlib.Path, number: int) -> list[str]:
        settings = {
            "autoencoder": place / "autoencoder.safetensors", "data_path": tmp_path / "pictures", "output": output,
            "image_size": 16, "crops": 16, "batch_size": 4, "shard_size": 1, "num_workers": 1, "device": "cpu",
            "threads": 1,
        }  # fmt: skip
        return command(["encode", *small.flags(settings)], number)

    def shards(output: pathlib.Path) -> int:
        return len(list(output.glob("[0-9]*.safetensors")))

    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(encode(undisturbed, 1)).wait(timeout=100) == 0 and shards(undisturbed) == SHARDS

    def is_due(number: int) -> bool:
        """From the start of the job to the last shards."""
        wanted = round(number * (SHARDS - 2) / (kills - 1))
        return shards(output) >= wanted and (output / "settings.json").exists()

    hits = kill_repeatedly(
        lambda number: encode(output, processes), kills, is_due, (output / "token_cache.json").exists
    )
    assert hits >= kills - 1, "too few of the kills hit a running job"
    assert start(encode(output, processes)).wait(timeout=100) == 0
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (undisturbed, output)]
    assert files[0] == files[1] and len(files[0]) == SHARDS + 2  # no temporary file is left

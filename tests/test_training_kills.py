"""Runs that are interrupted: by signals, which they end well by, and by kills, after which they go on bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
import small

from bitdance.weights import weights_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

KILLS = 20
STEPS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with autoencoder.safetensors, pictures/, and train.py that is `bitdance train`."""
    folder = tmp_path_factory.mktemp("place")
    weights_file.save(folder / "autoencoder.safetensors", small.autoencoder())
    small.pictures(folder / "pictures")
    (folder / "train.py").write_text("from bitdance.cli.main import main\nmain()\n")
    return folder


def command(place: pathlib.Path, results: pathlib.Path, processes: int = 1, **settings: object) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    flags = {
        "autoencoder": place / "autoencoder.safetensors", "data_path": place / "pictures", "output": results,
        "image_size": 16, **small.SIZES, "batch_size": 4, "epochs": STEPS // 3, "lr": 3e-3, "warmup_steps": 0,
        "precision": "fp32", "ema": 0.9, "drop_rate": 0.1, "perturb_rate": 0.3, "num_workers": 1,
        "log_every": 5, "save_every": 4, "preview_every": 0, "device": "cpu", **settings,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, *torchrun, str(place / "train.py"), "train", *words]


def start(words: list[str], **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=small.ROOT,
        env=small.environment() | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps_done(results: pathlib.Path) -> int:
    """The step of the newest line of the log."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(json.loads((results / "log.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def wait_for(process: subprocess.Popen[str], results: pathlib.Path, step: int) -> None:
    while process.poll() is None and steps_done(results) < step:
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX"
    except OSError:
        return True


def newest_step(results: pathlib.Path) -> int:
    return max(int(path.stem.split("-")[1]) for path in results.glob("checkpoint-*.safetensors"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_a_run(place, tmp_path, name):
    words = command(place, tmp_path / "run", save_every=0, log_every=1, epochs=1000)
    process = start(words)
    wait_for(process, tmp_path / "run", 3)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), err
    step = newest_step(tmp_path / "run")
    sentence = f"bitdance: interrupted by {name} at step {step} of 3000: run the same command again to go on."
    assert err.splitlines()[-1] == sentence and "Traceback" not in err
    assert steps_done(tmp_path / "run") == step >= 3
    weights_file.read(tmp_path / "run" / f"checkpoint-{step:07d}.safetensors")


@pytest.mark.parametrize("target", ["launcher", "one process"])
def test_a_signal_through_torchrun_ends_all_processes_at_one_step(place, tmp_path, target):
    words = command(place, tmp_path / "run", 2, save_every=0, log_every=1, epochs=1000)
    process = start(words)
    wait_for(process, tmp_path / "run", 3)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid if target == "launcher" else workers[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and all(map(gone, workers))
    step = newest_step(tmp_path / "run")
    assert err.count(f"bitdance: interrupted by SIGTERM at step {step} of 3000: run the same command again") == 1
    assert "ends because" not in err  # nobody was torn away
    assert steps_done(tmp_path / "run") == step >= 3


def strike(process: subprocess.Popen[str], workers: list[int], number: int) -> None:
    """Kills all processes, the launcher, or one worker, in turns, and waits until all of them are gone."""
    kind = ("all", "launcher", "one")[number % 3] if workers else "all"
    for pid in {"all": [process.pid, *workers], "launcher": [process.pid], "one": workers[-1:]}[kind]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=100)
    before = time.perf_counter()
    while not all(map(gone, workers)):
        assert time.perf_counter() - before < 100, f"a process outlived the others ({kind})"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS), (2, KILLS // 2)])
def test_a_run_killed_many_times_ends_like_an_undisturbed_one(place, tmp_path, processes, kills):
    settings = {"log_every": 1, "save_every": 4, "keep_epochs": 10}
    undisturbed, results = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(command(place, undisturbed, processes, **settings)).wait(timeout=100) == 0
    words = command(place, results, processes, **settings)
    hits, resumed = 0, 0
    for kill in range(kills):
        process = start(words)
        # From before the first step to the writing of the finished weights.
        while process.poll() is None and not (results / "settings.json").exists():
            time.sleep(0.002)
        wait_for(process, results, round(kill * STEPS / (kills - 1)))
        workers = children(process.pid) if processes > 1 and process.poll() is None else []
        hits += process.poll() is None and not (results / "model.safetensors").exists()
        strike(process, workers, kill)
        resumed += bool(list(results.glob("checkpoint-*.safetensors")))
    assert hits >= 0.75 * kills, "too few of the kills hit a run"
    assert resumed >= kills // 2
    assert start(words).wait(timeout=100) == 0
    names = sorted(path.name for path in undisturbed.iterdir())
    assert sorted(path.name for path in results.iterdir()) == names  # nothing half-written is left either
    for name in names:
        if name.endswith(".safetensors"):
            found, expected = (weights_file.read(folder / name) for folder in (results, undisturbed))
            # All with the digest of the tensors; the order of a file's metadata is left to chance.
            assert (found.metadata, found.config) == (expected.metadata, expected.config), name
        elif name.endswith(".png"):
            assert (results / name).read_bytes() == (undisturbed / name).read_bytes()
    lines = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (undisturbed, results)
    ]
    said = [[(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in log] for log in lines]
    assert said[0] == said[1] and len(said[0]) == STEPS


SHARDS = 32


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_encoding_killed_six_times_ends_with_the_same_bytes(place, tmp_path, processes):
    small.pictures(tmp_path / "pictures", classes=4, each=SHARDS // 4)
    kills = 6

    def encode(store: pathlib.Path, number: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] if number > 1 else []
        flags = {
            "autoencoder": place / "autoencoder.safetensors", "output": store, "image_size": 16, "crops": 16,
            "batch_size": 4, "shard_size": 1, "num_workers": 1, "device": "cpu", "threads": 1,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return [sys.executable, *torchrun, str(place / "train.py"), "encode", str(tmp_path / "pictures"), *words]

    def made(store: pathlib.Path) -> int:
        return len(list(store.glob("[0-9]*.safetensors")))

    undisturbed, results = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(encode(undisturbed, 1)).wait(timeout=100) == 0 and made(undisturbed) == SHARDS
    hits = 0
    for kill in range(kills):
        process = start(encode(results, processes))
        # From the first lines of the job to the last shards.
        wanted = round(kill * (SHARDS - 2) / (kills - 1))
        while process.poll() is None and not (made(results) >= wanted and (results / "job.json").exists()):
            time.sleep(0.002)
        workers = children(process.pid) if processes > 1 and process.poll() is None else []
        hits += process.poll() is None and not (results / "token_cache.json").exists()
        strike(process, workers, kill)
    assert hits >= kills - 1, "too few of the kills hit a running job"
    assert start(encode(results, processes)).wait(timeout=100) == 0
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (undisturbed, results)]
    assert files[0] == files[1] and len(files[0]) == SHARDS + 2  # nothing half-written is left either


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


def test_the_recipe_for_slurm_on_one_machine(place, tmp_path):
    """The batch script of the documentation gets SIGUSR1 and asks for the job to be run again."""
    script, _ = small.slurm_scripts()
    published = script[script.index("torchrun --standalone") : script.index("&\nrun=$!")]
    settings = {"save_every": 0, "log_every": 1, "epochs": 1000}
    results = tmp_path / "run"
    process = start_on_slurm(script.replace(published, shlex.join(command(place, results, 2, **settings))), tmp_path)
    wait_for(process, results, 3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    step = newest_step(results)
    assert process.returncode != 0 and f"interrupted by SIGTERM at step {step} of 3000" in err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    # What Slurm runs again ends by itself, and asks for nothing.
    words = command(place, results, 2, **settings, max_steps=step + 3)
    process = start_on_slurm(script.replace(published, shlex.join(words)), tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert newest_step(results) == step + 3


def test_the_recipe_for_slurm_on_several_machines(place, tmp_path):
    _, script = small.slurm_scripts()
    published = script[script.index("train_parallel.py") : script.index("' &\nrun=$!")]
    words = command(place, tmp_path / "run", save_every=0, log_every=1, epochs=1000)
    script = script.replace(published, shlex.join(words[1:])).replace("--nproc_per_node=8", "--nproc_per_node=1")
    process = start_on_slurm(script.replace("12345", str(small.free_port())), tmp_path)
    wait_for(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    step = newest_step(tmp_path / "run")
    assert process.returncode != 0
    assert err.count(f"bitdance: interrupted by SIGTERM at step {step} of 3000: run the same command again") == 1
    assert "ends because" not in err and (tmp_path / "asked").read_text() == "requeue 77\n"
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["processes"] == 2


def test_a_part_that_is_not_finite_is_skipped_by_all_processes(place, tmp_path):
    """And where it goes on for too long, each leaves its part of the batch."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os\n"
        "from bitdance.cli.main import main\n"
        "from bitdance.models.transformer import BitDance\n"
        "right, steps = BitDance.loss, []\n"
        "def wrong(self, *arguments):\n"
        "    steps.append(None)\n"
        "    bad = os.environ['RANK'] == '1' and (len(steps) == 2 or len(steps) > 4)\n"
        "    return right(self, *arguments) * (float('nan') if bad else 1)\n"
        "BitDance.loss = wrong\n"
        "main()\n"
    )
    words = command(place, tmp_path / "run", 2, log_every=1, max_skipped=3, save_every=4)
    words[words.index(str(place / "train.py"))] = str(script)
    process = start(words)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "the gradients were not finite in 3 steps in a row, up to step 7" in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 3]  # the line that is not good is not written
    assert [line["loss"] is None for line in lines] == [False, True, False, False, True, True]
    batches = [weights_file.read(tmp_path / "run" / f"bad-batch-7-{rank}.safetensors") for rank in (0, 1)]
    assert [batch.states["batch"]["rows"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert newest_step(tmp_path / "run") == 4

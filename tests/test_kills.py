"""Jobs that are killed: nothing is lost, nothing made twice, and the result is the same to the last byte."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import pytest
import small
import torch
from test_training_kills import kill_repeatedly, start

from bitdance.runtime.process_group import World
from bitdance.sampling import job
from bitdance.sampling.job import JobConfig, SamplingJob
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import SamplingConfig

KILLS = 20
IMAGES = 40


def command(folder: pathlib.Path, results: pathlib.Path, processes: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        sys.executable, *torchrun, "sample_ddp.py", "--ckpt", str(folder / "model.safetensors"),
        "--sample-dir", str(results), "--num-fid-samples", str(IMAGES), "--per-proc-batch-size", "1",
        "--sample-steps", "60", "--cfg-scale", "2", "--to-npz", "--mixed-precision", "none", "--threads", "1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_job_killed_twenty_times_ends_like_an_undisturbed_one(place, tmp_path):
    undisturbed, results = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(command(place, undisturbed, 1)).wait() == 0

    def is_due(number: int) -> bool:
        """From before the first batch, but after the imports, to the assembly of the result."""
        wanted = round(number * IMAGES / (KILLS - 2))
        return bool(list(results.glob("*.log"))) and len(list(results.glob("*.job/[0-9]*.npz"))) >= wanted

    hits = kill_repeatedly(
        lambda number: command(place, results, 1 + (number // 3) % 3),
        KILLS,
        is_due,
        lambda: bool(list(results.glob("*.npz"))),
    )
    assert hits >= 15, "too few of the kills hit a running job"
    assert start(command(place, results, 2)).wait() == 0
    # The launcher of a job that is done ends well too.
    assert start(command(place, results, 1)).wait() == 0
    (expected,), (result,) = (list(folder.glob("*.npz")) for folder in (undisturbed, results))
    assert result.name == expected.name and result.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in results.iterdir() if path.suffix != ".log") == [
        result.stem + ".json",
        result.name,
    ]


@contextlib.contextmanager
def dying(before: dict[str, int], after: dict[str, int]) -> Iterator[None]:
    """Kills this process just before or just after the call of that number of some functions."""
    calls: dict[str, int] = {}

    def deadly(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments, **keywords):
            calls[name] = calls.get(name, 0) + 1
            if before.get(name) == calls[name]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **keywords)
            if after.get(name) == calls[name]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)

    deadly(os, "replace")  # every file and folder that appears
    deadly(job, "_read_arrays")  # also while a result is being written
    deadly(os, "unlink")  # also while the job's folder is being removed
    deadly(os, "sync")
    yield


def make_job(folder: pathlib.Path, kinds: tuple[str, ...]) -> SamplingJob:
    pipeline = Pipeline(small.model(), small.autoencoder(), "made")
    return SamplingJob(pipeline, folder, SamplingConfig(1, 2.0), JobConfig(4, 2, seed=1), kinds)


def work(folder: pathlib.Path, kinds: tuple[str, ...], before: dict[str, int], after: dict[str, int]) -> None:
    """What a process of its own does: the whole job, if it lives."""
    torch.set_num_threads(1)
    made = make_job(folder, kinds)
    with dying(before, after):
        made.run(World(0, 1, torch.device("cpu")))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts processes by forking")
@pytest.mark.parametrize("to_npz", [True, False], ids=["npz", "pngs"])
def test_a_job_may_die_at_any_of_its_files(tmp_path, to_npz):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["small", "bitdance.sampling.job", "tqdm"])

    kinds = ("npz", "bits") if to_npz else ("pngs",)

    def ends(name: str, before: dict[str, int], after: dict[str, int]) -> bool:
        process = server.Process(target=work, args=(tmp_path / name, kinds, before, after))
        process.start()
        process.join(100)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode == 0

    assert ends("undisturbed", {}, {})
    expected, deaths = files(tmp_path / "undisturbed"), 0
    name = make_job(tmp_path, kinds).path.name
    assert set(expected) >= ({f"{name}.npz", f"{name}-bits.npz"} if to_npz else {f"{name}/000003.png"}) | {
        f"{name}.json"
    }
    for function, calls in (
        ("replace", range(1, 10)),
        ("_read_arrays", range(2, 8)),
        ("unlink", range(1, 4)),
        ("sync", [1]),
    ):
        for number in calls:
            for place in ("before", "after"):
                folder, once = f"{function}-{number}-{place}", {function: number}
                if ends(folder, once if place == "before" else {}, once if place == "after" else {}):
                    continue  # there are not so many calls
                deaths += 1
                assert ends(folder, {}, {})
                assert files(tmp_path / folder) == expected, f"killed {place} {function} number {number}"
    assert deaths >= 20

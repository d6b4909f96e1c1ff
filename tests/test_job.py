"""The sampling job: results, resuming, damaged parts, other settings, several processes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.runtime import run_folder
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.sampling.job import JobConfig, SamplingJob
from bitdance.sampling.labels import make_labels
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import SamplingConfig

CPU = torch.device("cpu")
SINGLE = World(0, 1, CPU)


class Independent(World):
    """One of several processes that run one after the other here, so none waits for another."""

    def barrier(self) -> None:
        pass

    def broadcast(self, value):
        return value


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(small.model(parallel_num=4), small.autoencoder(), "made")


def make(pipeline: Pipeline, folder: pathlib.Path, num_images=7, batch_size=3, kinds=("npz",), **config) -> SamplingJob:
    settings = JobConfig(num_images, batch_size, **{"seed": 1, **config})
    return SamplingJob(pipeline, folder, SamplingConfig(3, 2.0), settings, kinds)


def run(job: SamplingJob) -> pathlib.Path:
    """The first result of a job that is run by one process."""
    return next(iter(job.run(SINGLE).results.values()))


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".log")


def run_share(job: SamplingJob, rank: int, size: int) -> None:
    """What one of several processes does up to the point where all wait for each other."""
    world = Independent(rank, size, CPU)
    sections = {"sampling": job.sampling, "job": job.config, "networks": job.networks,
                "machine": run_folder.Machine.of(world)}  # fmt: skip
    run_folder.check_settings(job.run_folder, sections, Independent(0, size, CPU), has_parts=False)
    job._sample_batches(job._missing_results(), world, list(range(len(job.batches))), print)


def test_a_job_writes_an_npz_and_does_not_repeat_itself(pipeline, tmp_path, monkeypatch, capsys):
    job = make(pipeline, tmp_path)
    path = run(job)
    assert path.name.startswith("made-4x-size-16-steps-3-cfg-2-seed-1-fp32-n-7-")
    assert names(tmp_path) == [f"{path.stem}.json", f"{path.stem}.npz"]
    with np.load(path) as file:
        assert file["arr_0"].shape == (7, 16, 16, 3)
        assert np.array_equal(file["arr_1"], make_labels("balanced", 7, 3, 1))
        expected = pipeline.generate([3, 4, 5], file["arr_1"][3:6].tolist(), job.sampling, seed=1).pixels
        assert np.array_equal(file["arr_0"][3:6], expected)
    settings = json.loads(job.settings_file.read_text())
    assert settings["sampling"]["num_steps"] == 3 and settings["job"]["num_images"] == 7
    assert settings["format_version"] == 2 and settings["halved_batches"] == []
    before = path.read_bytes()
    monkeypatch.setattr(Pipeline, "generate", None)  # would fail if it were called
    monkeypatch.setattr("bitdance.sampling.job.exclusive", None)  # nor is anything written: the folder may be read-only
    log = job.path.with_name(f"{job.path.name}.rank0.log")
    log.unlink()
    assert run(job) == path and path.read_bytes() == before and not log.exists()
    assert f"{path}: complete, nothing to do." in capsys.readouterr().err


def test_an_interrupted_job_resumes_where_it_stopped(pipeline, tmp_path, monkeypatch):
    expected = run(make(pipeline, tmp_path / "other"))
    job, real, calls = make(pipeline, tmp_path / "made"), Pipeline.generate, []

    def stop(self, ids, *arguments, **keywords):
        calls.append(list(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, ids, *arguments, **keywords)

    monkeypatch.setattr(Pipeline, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        job.run(SINGLE)
    assert not job.results["npz"].exists()
    path = run(job)
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8]]  # finished batches are not sampled again
    assert path.read_bytes() == expected.read_bytes()
    assert names(tmp_path / "made") == names(tmp_path / "other")
    assert job.settings_file.read_text() == expected.with_suffix(".json").read_text()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_writes_the_same_npz(pipeline, tmp_path, size):
    expected = run(make(pipeline, tmp_path / "one", 8))
    job = make(pipeline, tmp_path / "many", 8)
    for rank in range(size):
        run_share(job, rank, size)
        assert (
            job._missing_results() and len(list(job.run_folder.glob("*.npz"))) == {2: [2, 3], 3: [1, 2, 3]}[size][rank]
        )
    assert run(job).read_bytes() == expected.read_bytes()
    assert not job.run_folder.exists()


def test_an_unfinished_job_with_other_settings_is_refused(pipeline, tmp_path):
    job = make(pipeline, tmp_path, 4, 2)
    run_share(job, 1, 2)
    other = make(pipeline, tmp_path, 4, 4)
    assert other.run_folder == job.run_folder  # the name does not tell the batch size
    with pytest.raises(UserError, match=r"`batch_size` was 2, is 4"):
        other.run(SINGLE)
    settings = job.run_folder / "settings.json"
    stored = json.loads(settings.read_text())
    del stored["job"]["chunk_size"]  # as if a later release had added it: it has its default
    stored["machine"]["threads"] = 2
    settings.write_text(json.dumps(stored))
    before = torch.get_num_threads()
    run(job)
    assert torch.get_num_threads() == 2 != before  # goes on as it began, since the last bit depends on it


@pytest.mark.parametrize(
    "damage", ["{", "[1]", "{}", '{"machine": 3}', '{"machine": {"device": "cpu", "threads": 100000}}']
)
def test_damaged_settings_are_named(pipeline, tmp_path, damage):
    job = make(pipeline, tmp_path, 4, 2)
    run_share(job, 1, 2)
    settings = job.run_folder / "settings.json"
    stored = json.loads(settings.read_text())
    settings.write_text(json.dumps({**stored, **json.loads(damage)}) if damage.startswith('{"') else damage)
    with pytest.raises(UserError, match=r"delete|belongs to a run with other settings"):
        job.run(SINGLE)
    assert job._missing_results()


def test_a_finished_job_with_other_settings_is_refused(pipeline, tmp_path):
    job = make(pipeline, tmp_path, 4, 2, ("npz", "bits"))
    job.run(SINGLE)
    before = job.results["npz"].read_bytes()
    with pytest.raises(UserError, match=r"\.npz, .*-bits\.npz: sampled with other settings \(`batch_size` was 2, is 4"):
        make(pipeline, tmp_path, 4, 4, ("npz", "bits")).run(SINGLE)
    assert dataclasses.replace(job, kinds=("npz",)).run(SINGLE).sampled == 0
    for damaged in ("{", "[1]"):
        job.settings_file.write_text(damaged)
        with pytest.raises(UserError, match=r"\.json cannot be read"):
            job.run(SINGLE)
    job.settings_file.unlink()
    assert job.run(SINGLE).sampled == 0
    assert job.results["npz"].read_bytes() == before


def test_a_result_that_is_requested_later_is_of_the_same_images(pipeline, tmp_path, capsys):
    job = make(pipeline, tmp_path / "made", 4, 2)
    before = run(job).read_bytes()
    both = dataclasses.replace(job, kinds=("npz", "bits"))
    assert both.run(SINGLE).sampled == 4
    assert ".npz: exists, all images are sampled again for other results." in capsys.readouterr().err
    whole = make(pipeline, tmp_path / "whole", 4, 2, ("npz", "bits"))
    run(whole)
    assert both.results["bits"].read_bytes() == whole.results["bits"].read_bytes()
    assert both.results["npz"].read_bytes() == before


def test_halved_batches_are_recorded(pipeline, tmp_path, monkeypatch):
    small.limit_memory(monkeypatch, lambda ids: len(ids) > 2 and ids[0] == 3)
    job = make(pipeline, tmp_path, 8)
    job.run(SINGLE)
    assert json.loads(job.settings_file.read_text())["halved_batches"] == [1, 2]  # the size is not tried again
    assert "images 3 to 5 are sampled in two halves" in job.path.with_name(f"{job.path.name}.rank0.log").read_text()


def test_a_second_run_of_a_job_is_locked_out(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.2)
    job = make(pipeline, tmp_path, 4, 2)
    with run_folder.exclusive(job.run_folder, SINGLE), pytest.raises(UserError, match="another process works in"):
        job.run(SINGLE)
    assert run(job).exists()


def test_a_missing_file_inside_of_a_job_is_not_taken_for_a_lock(pipeline, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise FileNotFoundError("something else")

    monkeypatch.setattr(Pipeline, "generate", fail)
    with pytest.raises(FileNotFoundError, match="something else"):
        make(pipeline, tmp_path).run(SINGLE)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "another", "other shape", "not a zip"])
def test_a_damaged_part_is_sampled_again(pipeline, tmp_path, damage):
    expected = run(make(pipeline, tmp_path / "expected", 4, 2))
    job = make(pipeline, tmp_path / "made", 4, 2)
    run_share(job, 1, 2)
    data = job.part(1).read_bytes()
    middle = len(data) // 2
    with np.load(job.part(1)) as file:
        arrays = dict(file)
    if damage == "another":
        np.savez(job.part(1), images=np.zeros((1, 16, 16, 3), np.uint8))
    elif damage == "other shape":
        np.savez(job.part(1), **{**arrays, "images": arrays["images"][:, :8]})
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        contents = {"torn": data[:-100], "flipped": flipped, "empty": b"", "not a zip": b"\x93NUMPY" * 100}
        job.part(1).write_bytes(contents[damage])
    assert run(job).read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": "x"}, "loaded different weights"), ({"precision": "bfloat16"}, "in different precisions"),
     ({"compiled": True}, "in some of the processes only")],
)  # fmt: skip
def test_processes_with_other_networks_are_refused(pipeline, tmp_path, monkeypatch, changes, words):
    """As when a run writes a checkpoint between the starts of two processes that sample its newest one."""
    monkeypatch.setattr(World, "gather", lambda self, value: [value, dataclasses.replace(value, **changes)])
    with pytest.raises(UserError, match=words):
        make(pipeline, tmp_path, 4, 2).run(SINGLE)
    assert not list(tmp_path.iterdir())


def test_a_pipe_in_place_of_a_part_is_neither_read_nor_replaced(pipeline, tmp_path):
    job = make(pipeline, tmp_path, 4, 2)
    run_share(job, 1, 2)
    job.part(1).unlink()
    os.mkfifo(job.part(1))
    with pytest.raises(UserError, match=r"cannot write .*000001\.npz: it is a device, pipe or socket"):
        run(job)
    assert job.part(1).is_fifo()
    job.part(1).unlink()
    assert run(job).read_bytes() == run(make(pipeline, tmp_path / "expected", 4, 2)).read_bytes()


def test_a_part_that_is_damaged_at_the_last_moment_is_removed_and_named(pipeline, tmp_path, monkeypatch):
    job, real = make(pipeline, tmp_path, 4, 2), SamplingJob._sample_batches

    def then_damage(self, *arguments):
        count = real(self, *arguments)
        job.part(1).write_bytes(b"")
        return count

    monkeypatch.setattr(SamplingJob, "_sample_batches", then_damage)
    with pytest.raises(UserError, match=r"000001\.npz was damaged: run the command again"):
        job.run(SINGLE)
    assert job._missing_results() and job.part(0).exists() and not job.part(1).exists()


def test_a_job_writes_a_folder_of_pngs(pipeline, tmp_path, monkeypatch):
    job = make(pipeline, tmp_path, 4, 3, ("pngs",))
    path = run(job)
    assert sorted(p.name for p in path.iterdir()) == [*(f"{i:06d}.png" for i in range(4)), "labels.json"]
    with np.load(run(make(pipeline, tmp_path, 4, 3))) as file:
        assert json.loads((path / "labels.json").read_text()) == file["arr_1"].tolist()
        for i, pixels in enumerate(file["arr_0"]):
            assert np.array_equal(np.asarray(Image.open(path / f"{i:06d}.png")), pixels)
    assert names(tmp_path) == [path.name, f"{path.name}.json", f"{path.name}.npz"]
    monkeypatch.setattr(Pipeline, "generate", lambda *_: pytest.fail("images were sampled again"))
    assert run(job) == path  # a finished folder is not written again


def test_a_disk_that_fills_up_while_pngs_are_written_is_named(pipeline, tmp_path, monkeypatch):
    real = Image.Image.save

    def fail(image, path, *arguments, **keywords):
        if str(path).endswith("000002.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(image, path, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "save", fail)
    job = make(pipeline, tmp_path, 4, 2, ("pngs",))
    with pytest.raises(UserError, match=r"cannot write .*images: No space left on device; free some space"):
        job.run(SINGLE)
    assert not job.results["pngs"].exists()
    monkeypatch.undo()
    assert len(list(run(job).glob("*.png"))) == 4


def test_folders_in_place_of_files_of_a_job_are_to_be_deleted(pipeline, tmp_path):
    job = make(pipeline, tmp_path, 4, 2)
    run_share(job, 1, 2)
    for path in (job.run_folder.with_name(f"{job.run_folder.name}.lock"), job.part(0)):
        path.mkdir()
        with pytest.raises(UserError, match=f"cannot write {path}: Is a directory; delete it."):
            job.run(SINGLE)
        path.rmdir()
    run(job)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_damaged_result_is_not_taken_for_a_finished_one(pipeline, tmp_path, content):
    """Nor is half of one, or a folder of its name."""
    job = make(pipeline, tmp_path, 4, 2)
    result = run(job)
    if content is None:
        content = result.read_bytes()[:-30]
    result.write_bytes(content)
    with pytest.raises(UserError, match=f"{result} is damaged or not a result: delete it"):
        job.run(SINGLE)
    result.unlink()
    result.mkdir()
    with pytest.raises(UserError, match=f"{result} is damaged or not a result: delete it"):
        job.run(SINGLE)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_part_is_sampled_again_and_not_expanded(pipeline, tmp_path, compression):
    job = make(pipeline, tmp_path, 4, 2)
    job.run_folder.mkdir(parents=True)
    with zipfile.ZipFile(job.part(0), "w", compression) as file:
        file.writestr("images.npy", bytes(10**8))
        file.writestr("halved.npy", bytes(10))
    with zipfile.ZipFile(job.part(1), "w") as file:
        file.writestr("images.npy", b"no array")
        file.writestr("halved.npy", b"no array")
    assert job._missing_batches(["npz"]) == [0, 1]

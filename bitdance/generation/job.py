"""The job behind the FID figures: N images of balanced classes, by any number of processes, into one result.

The job is cut into fixed batches before it starts, and each process takes whole batches; a finished batch is a file of
its own until all are there. Whatever is killed at whatever moment, the same command goes on where the job stopped, and
ends with the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from bitdance.claims import alone, claim, with_machine
from bitdance.distributed import World
from bitdance.errors import UserError
from bitdance.files import atomic_write, differences, make_folder, read_json, rename, write_json
from bitdance.generation.batches import Generator, cut, make_labels
from bitdance.generation.npz import write_npz

LABELS_FILE = "labels.json"
"""In a folder of PNGs: the class of each image, in their order."""

MANIFEST = "manifest.json"
"""In the folder of an unfinished job: every setting that changes an image."""

HALVES = "made in halves"
"""In the record of a finished job: the numbers of the batches that did not fit a GPU's memory as a whole."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make.

    Attributes:
        path: of the result without its ending: `<path>.npz`, or the folder `<path>` of PNGs; until it is done, the
            folder `<path>.job` holds what is finished.
        num_images: N.
        batch_size: images of a batch.
        to_npz: one `.npz` instead of a folder.
        labels: how the classes are chosen, one of `bitdance.generation.batches.LABELS`.
        save_bits: write the packed bits too, as `<path>-bits.npz`.
        settings: everything else that changes an image, ready for JSON, for the record and to tell a job from another.
    """

    path: pathlib.Path
    num_images: int
    batch_size: int
    to_npz: bool
    settings: dict[str, Any]
    labels: str = "balanced"
    save_bits: bool = False

    @property
    def result(self) -> pathlib.Path:
        """The file or the folder that the job ends with."""
        return self.path.with_name(self.path.name + ".npz") if self.to_npz else self.path

    @property
    def folder(self) -> pathlib.Path:
        """Where the unfinished job lies."""
        return self.path.with_name(self.path.name + ".job")

    @property
    def lock(self) -> pathlib.Path:
        """The file that keeps a second run out."""
        return self.path.with_name(self.path.name + ".lock")

    @property
    def is_done(self) -> bool:
        """Whether the images are there; each file or folder appears only when it is whole."""
        return (self.result if self.to_npz else self.result / LABELS_FILE).exists()

    @property
    def record(self) -> pathlib.Path:
        """Beside the result: the manifest that it was made by, and which batches were made in halves."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def bits_result(self) -> pathlib.Path:
        """The file of the packed bits, where they were asked for."""
        return self.path.with_name(self.path.name + "-bits.npz")

    def part(self, batch: int) -> pathlib.Path:
        """The file of a finished batch."""
        return self.folder / f"{batch:06d}.npz"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run of a job.

    Attributes:
        result: the `.npz`, or the folder of PNGs.
        made: images that this process made in this run; the rest was there or is the others'.
        seconds: that this process took to make them.
        peak_memory: bytes, on the GPU or else of the whole process.
    """

    result: pathlib.Path
    made: int
    seconds: float
    peak_memory: int


def run(job: Job, generator: Generator, world: World) -> Outcome:
    """Makes what is missing of a job. Each process keeps a log beside the result, `<path>.rank<r>.log`.

    Raises:
        UserError: a setting does not fit, the folder holds a job of other settings, or a file cannot be written.
    """
    batches = list(cut(job.num_images, job.batch_size))
    labels = make_labels(job.labels, job.num_images, generator.model.config.num_classes, generator.seed)
    with alone(job.folder, job.lock, world), _log(job, world) as log:
        # The first process decides for all, who may look at a shared folder a little earlier or later.
        if world.from_main(job.is_done):
            if world.is_main:
                _check_finished(job, world)
                print(f"{job.result} exists, nothing to do.")
                shutil.rmtree(job.folder, ignore_errors=True)  # of a job that was killed in its last moment
            return Outcome(job.result, 0, 0.0, world.peak_memory())
        claim(job.folder / MANIFEST, _manifest(job, world), world)
        missing = world.from_main(_missing(job, batches) if world.is_main else [])
        start = time.perf_counter()
        made = _make_batches(job, generator, world, batches, missing, labels, log)
        seconds = time.perf_counter() - start
        log(f"{made} images made in {seconds:.1f} s, peak memory {world.peak_memory() / 1e9:.2f} GB; waiting for all")
        world.barrier()
        if world.is_main:
            log("writing the result")
            _assemble(job, batches, labels)
            shutil.rmtree(job.folder, ignore_errors=True)
        world.barrier()
        log(f"done: {job.result}")
    return Outcome(job.result, made, seconds, world.peak_memory())


@contextlib.contextmanager
def _log(job: Job, world: World) -> Iterator[Callable[[str], None]]:
    """A function that writes a line with the time to this process's log."""
    path = job.path.with_name(f"{job.path.name}.rank{world.rank}.log")
    make_folder(path.parent)
    with open(path, "a", buffering=1) as file:

        def write(line: str) -> None:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

        write(f"process {world.rank} of {world.size} on {world.device}: {job.num_images} images in {job.folder}")
        try:
            yield write
        except BaseException as error:
            write(f"stopped: {type(error).__name__}: {error}")
            raise


def _manifest(job: Job, world: World) -> dict[str, Any]:
    """Every setting that changes an image, as JSON gives it back."""
    own = {
        "num_images": job.num_images,
        "batch_size": job.batch_size,
        "labels": job.labels,
        "save_bits": job.save_bits,
    }
    return with_machine({**job.settings, **own}, world)


def _check_finished(job: Job, world: World) -> None:
    """Checks that what is there was made by these settings; a result without its record is taken as it is."""
    if not job.record.exists():
        return
    found = read_json(job.record, f"delete it to take {job.result} as it is")
    found.pop(HALVES, None)
    ours = {**_manifest(job, world), "threads": found.get("threads")}
    if found.get("save_bits"):
        ours["save_bits"] = True  # more is there than was asked for
    if changes := differences(found, ours):
        raise UserError(
            f"{job.result} was made with other settings ({changes}): run it with those, or choose another folder."
        )
    if job.save_bits and not job.bits_result.exists():
        raise UserError(f"{job.bits_result} is gone: delete {job.result} too to make both again.")


def _make_batches(
    job: Job,
    generator: Generator,
    world: World,
    batches: list[range],
    missing: list[int],
    labels: np.ndarray,
    log: Callable[[str], None],
) -> int:
    """Makes this process's share of the missing batches, and returns how many images that were.

    A batch is written while the next one is made.
    """
    from tqdm import tqdm

    start, made = time.perf_counter(), 0
    halved: list[str] = []

    def report(line: str) -> None:
        halved.append(line)
        log(line)

    generator = dataclasses.replace(generator, report=report)
    there = job.num_images - sum(len(batches[number]) for number in missing)
    with (
        tqdm(total=job.num_images, initial=there, unit="image", disable=not world.is_main, dynamic_ncols=True) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        writing: concurrent.futures.Future[None] | None = None
        for first in range(0, len(missing), world.size):
            everybodys = missing[first : first + world.size]
            if world.rank < len(everybodys):
                number = everybodys[world.rank]
                images = batches[number]
                # The last batch is filled up, so that every batch is computed in the same shapes.
                padded = [*images, *range(job.num_images, job.num_images + job.batch_size - len(images))]
                classes = [int(labels[min(i, job.num_images - 1)]) for i in padded]
                new = generator.images(padded, classes)
                arrays = {"images": new.pixels[: len(images)], "halved": np.array(bool(halved), np.uint8)}
                halved.clear()
                if job.save_bits:
                    arrays["bits"] = new.bits[: len(images)]
                if writing is not None:
                    writing.result()  # an error in writing is raised here
                writing = writer.submit(_write_part, job.part(number), arrays)
                made += len(images)
                rate = made / (time.perf_counter() - start)
                log(f"batch {number}: images {images.start} to {images.stop - 1}, {rate:.2f} images/s so far")
                bar.set_postfix_str(f"{rate * world.size:.2f} images/s, {world.peak_memory() / 1e9:.1f} GB")
            bar.update(sum(len(batches[number]) for number in everybodys))
        if writing is not None:
            writing.result()
    return made


def _write_part(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # (numpy's stubs take them for its flags)


def _read_part(path: pathlib.Path, name: str) -> np.ndarray | None:
    """An array of a part, or nothing if the part is missing, torn or changed: its zip holds checksums."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array: np.ndarray = file[name]
    except Exception:  # a damaged zip ends in almost any error; whatever it is, the part is not whole
        return None
    return array if array.dtype == np.uint8 else None


def _is_whole(job: Job, number: int, count: int) -> bool:
    path = job.part(number)
    if not path.exists() or (halved := _read_part(path, "halved")) is None or halved.shape != ():
        return False
    arrays = (_read_part(path, name) for name in (("images", "bits") if job.save_bits else ("images",)))
    return all(array is not None and array.ndim and len(array) == count for array in arrays)


def _missing(job: Job, batches: list[range]) -> list[int]:
    return [number for number, images in enumerate(batches) if not _is_whole(job, number, len(images))]


def _assemble(job: Job, batches: list[range], labels: np.ndarray) -> None:
    """Writes the result from the parts, one after the other."""
    from tqdm import tqdm

    def part(number: int, name: str) -> np.ndarray:
        array = _read_part(job.part(number), name)
        if array is None or (array.ndim and len(array) != len(batches[number])):
            job.part(number).unlink(missing_ok=True)
            raise UserError(f"{job.part(number)} was damaged or lost: run the command again, it is made anew.")
        return array

    def write(path: pathlib.Path, name: str) -> None:
        numbers = tqdm(range(len(batches)), desc=f"writing {name}", unit="batch", dynamic_ncols=True, delay=2)
        arrays = (part(number, name) for number in numbers)
        write_npz(path, arrays, (job.num_images, *part(0, name).shape[1:]), labels)

    # All is written inside the job's folder first, where whatever a killed process leaves behind is cleared away.
    record = json.loads((job.folder / MANIFEST).read_text())
    record[HALVES] = [number for number in range(len(batches)) if part(number, "halved")]
    write_json(job.folder / "record.json", record)
    rename(job.folder / "record.json", job.record)
    if job.save_bits:
        write(job.folder / "bits-result.npz", "bits")
        rename(job.folder / "bits-result.npz", job.bits_result)
    if job.to_npz:
        write(job.folder / "result.npz", "images")
        rename(job.folder / "result.npz", job.result)
        return
    folder = job.folder / "images"
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    for number, images in enumerate(batches):
        for image, picture in zip(images, part(number, "images"), strict=True):
            Image.fromarray(picture).save(folder / f"{image:06d}.png")
    (folder / LABELS_FILE).write_text(json.dumps(labels.tolist()) + "\n")
    os.sync()  # once for all of them
    try:
        rename(folder, job.result)
    except OSError as error:
        raise UserError(
            f"{job.result} is in the way ({error.strerror}): move it, then run the same command again."
        ) from error

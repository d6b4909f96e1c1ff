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
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from bitdance.metrics.feature_set import (
    Collector,
    FeatureSet,
    PixelSummary,
    describe_pixels,
    summarize_pixels,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.metrics.image_sources import LABELS_FILE
from bitdance.runtime.atomic_files import atomic_write, differences, make_folder, read_json, rename, write_json
from bitdance.runtime.errors import UserError
from bitdance.runtime.process_group import World
from bitdance.runtime.run_folder import alone, claim, with_machine
from bitdance.sampling.pipeline import Generator, cut, make_labels
from bitdance.sampling.writers import write_npz

MANIFEST = "manifest.json"
"""In the folder of an unfinished job: every setting that changes an image."""

HALVES = "made in halves"
"""In the record of a finished job: the numbers of the batches that did not fit a GPU's memory as a whole."""


NPZ, PNGS, BITS, FEATURES = "npz", "pngs", "bits", "features"
"""What a job can end with: one `.npz` of images, a folder of PNGs, the packed bits, the features of a network."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make.

    Attributes:
        path: of the results without their endings; until they are done, the folder `<path>.job` holds what is finished.
        num_images: N.
        batch_size: images of a batch.
        kinds: what to write, some of `NPZ`, `PNGS` and `BITS`.
        settings: everything else that changes an image, ready for JSON, for the record and to tell a job from another.
        labels: how the classes are chosen, one of `bitdance.sampling.pipeline.LABELS`.
        networks: whose features to take of the images, a file each.
    """

    path: pathlib.Path
    num_images: int
    batch_size: int
    kinds: tuple[str, ...]
    settings: dict[str, Any]
    labels: str = "balanced"
    networks: tuple[FeatureExtractor, ...] = ()

    @property
    def results(self) -> dict[str, pathlib.Path]:
        """The files and folders that the job ends with, by kind; of features also by network, `features.<key>`."""
        names = {NPZ: ".npz", PNGS: "", BITS: "-bits.npz"}
        names = {kind: names[kind] for kind in self.kinds}
        names |= {f"{FEATURES}.{network.key}": f"-features-{network.key}.npz" for network in self.networks}
        return {kind: self.path.with_name(self.path.name + end) for kind, end in names.items()}

    @property
    def folder(self) -> pathlib.Path:
        """Where the unfinished job lies."""
        return self.path.with_name(self.path.name + ".job")

    @property
    def missing(self) -> list[str]:
        """The kinds of results that are not there yet; each file or folder appears only when it is whole."""
        return [
            kind for kind, path in self.results.items() if not (path / LABELS_FILE if kind == PNGS else path).exists()
        ]

    @property
    def lock(self) -> pathlib.Path:
        """The file that keeps a second run out."""
        return self.path.with_name(self.path.name + ".lock")

    @property
    def record(self) -> pathlib.Path:
        """Beside the results: the manifest that they were made by, and which batches were made in halves."""
        return self.path.with_name(self.path.name + ".json")

    def part(self, batch: int) -> pathlib.Path:
        """The file of a finished batch."""
        return self.folder / f"{batch:06d}.npz"


@dataclasses.dataclass(frozen=True)
class JobResult:
    """What came of a run of a job.

    Attributes:
        results: the files and folders, by kind.
        record: of the settings that they were made with.
        made: images that this process made in this run; the rest was there or is the others'.
        seconds: that this process took to make them.
        peak_memory: bytes, on the GPU or else of the whole process.
    """

    results: dict[str, pathlib.Path]
    record: pathlib.Path
    made: int
    seconds: float
    peak_memory: int


def run(job: Job, generator: Generator, world: World) -> JobResult:
    """Makes what is missing of a job. Each process keeps a log beside the results, `<path>.rank<r>.log`.

    Raises:
        UserError: a setting does not fit, what is there is of other settings, or a file cannot be written.
    """
    assert job.results, "a job that writes nothing"
    batches = list(cut(job.num_images, job.batch_size))
    labels = make_labels(job.labels, job.num_images, generator.model.config.num_classes, generator.seed)
    with alone(job.folder, job.lock, world), _log(job, world) as log:
        # The first process decides for all, who may look at a shared folder a little earlier or later.
        kinds = world.broadcast(job.missing)
        there = [str(path) for kind, path in job.results.items() if kind not in kinds]
        if world.is_main and there:
            _check_finished(job, world)
            what = "nothing to do" if not kinds else "all images are made again for the rest"
            print(f"{', '.join(there)}: there already, {what}.", file=sys.stderr)
        if not kinds:
            if world.is_main:
                shutil.rmtree(job.folder, ignore_errors=True)  # of a job that was killed in its last moment
            return JobResult(job.results, job.record, 0, 0.0, world.peak_memory())
        claim(job.folder / MANIFEST, _manifest(job, world), world)
        missing = world.broadcast(_missing_batches(job, kinds, batches) if world.is_main else [])
        start = time.perf_counter()
        made = _make_batches(job, kinds, generator, world, batches, missing, labels, log)
        seconds = time.perf_counter() - start
        log(f"{made} images made in {seconds:.1f} s, peak memory {world.peak_memory() / 1e9:.2f} GB; waiting for all")
        world.barrier()
        if world.is_main:
            log("writing the results")
            _assemble(job, kinds, batches, labels, generator)
            shutil.rmtree(job.folder, ignore_errors=True)
        world.barrier()
        log(f"done: {', '.join(map(str, job.results.values()))}")
    return JobResult(job.results, job.record, made, seconds, world.peak_memory())


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
    }
    return with_machine({**job.settings, **own}, world)


def _check_finished(job: Job, world: World) -> None:
    """Checks that what is there was made with these settings; a result without its record is taken as it is."""
    if not job.record.exists():
        return
    there = ", ".join(str(path) for path in job.results.values() if path.exists())
    found = read_json(job.record, f"delete it to take {there} as it is")
    found.pop(HALVES, None)
    if changes := differences(found, {**_manifest(job, world), "threads": found.get("threads")}):
        raise UserError(f"{there}: made with other settings ({changes}): run it with those, or choose another folder.")


def _make_batches(
    job: Job,
    kinds: list[str],
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
                arrays = _arrays(job, kinds, new.pixels[: len(images)], new.bits[: len(images)])
                arrays["halved"] = np.array(bool(halved), np.uint8)
                halved.clear()
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


def _arrays(job: Job, kinds: list[str], pixels: np.ndarray, bits: np.ndarray) -> dict[str, np.ndarray]:
    """What a part holds of some images: only what the results that are missing are made of."""
    arrays: dict[str, np.ndarray] = {}
    if NPZ in kinds or PNGS in kinds:
        arrays["images"] = pixels
    if BITS in kinds:
        arrays["bits"] = bits
    for network in job.networks:
        if f"{FEATURES}.{network.key}" in kinds:
            arrays |= {f"{network.key}.{name}": array for name, array in network(pixels).items()}
    if job.networks:
        summary = summarize_pixels(pixels)
        arrays["extremes"] = np.array([summary.minimum, summary.maximum], np.uint8)
        arrays["digests"] = np.frombuffer(b"".join(summary.digests), np.uint8).reshape(len(pixels), -1)
    return arrays


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
    return array if array.dtype in (np.uint8, np.float32) else None


def _is_whole(job: Job, kinds: list[str], number: int, count: int) -> bool:
    path = job.part(number)
    if not path.exists() or (halved := _read_part(path, "halved")) is None or halved.shape != ():
        return False
    needed = {NPZ: "images", PNGS: "images", BITS: "bits"}
    names = {needed.get(kind, f"{kind.removeprefix(f'{FEATURES}.')}.pool") for kind in kinds}
    arrays = (_read_part(path, name) for name in names | ({"digests"} if job.networks else set()))
    return all(array is not None and array.ndim and len(array) == count for array in arrays)


def _missing_batches(job: Job, kinds: list[str], batches: list[range]) -> list[int]:
    return [number for number, images in enumerate(batches) if not _is_whole(job, kinds, number, len(images))]


def _assemble(job: Job, kinds: list[str], batches: list[range], labels: np.ndarray, generator: Generator) -> None:
    """Writes the missing results from the parts, one after the other.

    All is written inside the job's folder first, where whatever a killed process leaves behind is cleared away.
    """
    from tqdm import tqdm

    def part(number: int, name: str) -> np.ndarray:
        array = _read_part(job.part(number), name)
        if array is None or (array.ndim and name != "extremes" and len(array) != len(batches[number])):
            job.part(number).unlink(missing_ok=True)
            raise UserError(f"{job.part(number)} was damaged or lost: run the command again, it is made anew.")
        return array

    def parts(what: str) -> Iterator[int]:
        yield from tqdm(range(len(batches)), desc=f"writing {what}", unit="batch", dynamic_ncols=True, delay=2)

    record = json.loads((job.folder / MANIFEST).read_text())
    record[HALVES] = [number for number in range(len(batches)) if part(number, "halved")]
    write_json(job.folder / "record.json", record)
    rename(job.folder / "record.json", job.record)
    unnamed = job.folder / "result.npz"
    for kind in kinds:
        result = job.results[kind]
        if kind in (NPZ, BITS):
            name = "images" if kind == NPZ else "bits"
            arrays = (part(number, name) for number in parts(name))
            write_npz(unnamed, arrays, (job.num_images, *part(0, name).shape[1:]), labels)
            rename(unnamed, result)
        elif kind == PNGS:
            folder = _write_pngs(
                job, ((batches[number], part(number, "images")) for number in parts("pictures")), labels
            )
            try:
                rename(folder, result)
            except OSError as error:
                raise UserError(
                    f"{result} is in the way ({error.strerror}): move it, then run the same command again."
                ) from error
    for network in job.networks:
        if (kind := f"{FEATURES}.{network.key}") in kinds:
            write_feature_set(unnamed, _collect(job, network, parts("features"), part, labels, generator))
            rename(unnamed, job.results[kind])


def _write_pngs(job: Job, pictures: Iterator[tuple[range, np.ndarray]], labels: np.ndarray) -> pathlib.Path:
    folder = job.folder / "images"
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    for images, pixels in pictures:
        for image, picture in zip(images, pixels, strict=True):
            Image.fromarray(picture).save(folder / f"{image:06d}.png")
    (folder / LABELS_FILE).write_text(json.dumps(labels.tolist()) + "\n")
    os.sync()  # once for all of them
    return folder


def _collect(
    job: Job,
    network: FeatureExtractor,
    parts: Iterator[int],
    part: Callable[[int, str], np.ndarray],
    labels: np.ndarray,
    generator: Generator,
) -> FeatureSet:
    """The features of all parts, as if they had been taken of the file of the images."""
    collector, summaries = Collector(network, job.num_images), []
    config = generator.model.config
    size = config.grid * generator.autoencoder.config.down_size
    for number in parts:
        names = [name for name in Features._fields if _read_part(job.part(number), f"{network.key}.{name}") is not None]
        collector.add({name: part(number, f"{network.key}.{name}") for name in names})
        low, high = part(number, "extremes").tolist()
        summaries.append(PixelSummary(low, high, [row.tobytes() for row in part(number, "digests")]))
    about = {"source": str(job.path), "height": size, "width": size, "num_classes": config.num_classes}
    return collector.finish({**about, **describe_pixels(summaries, "uint8", labels)}, labels)

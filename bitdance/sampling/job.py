"""The sampling job: N images by any number of processes, resumable, into one result.

The job is split into fixed batches before it starts, and each process samples whole batches. A finished batch is a
file of its own (a part) until all are there. After a kill at any moment the same command resumes the job and ends with
the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitdance.data.class_folders import LABELS_FILE
from bitdance.metrics.feature_set import (
    Collector,
    FeatureSet,
    PixelSummary,
    describe_pixels,
    read_feature_set,
    summarize_pixels,
    write_feature_set,
)
from bitdance.metrics.features import FeatureExtractor, Features
from bitdance.metrics.npz_files import write_arrays
from bitdance.runtime.atomic_files import make_folder, read_json, rename, write_json
from bitdance.runtime.errors import UserError, check_fields, check_seed
from bitdance.runtime.process_group import World
from bitdance.runtime.progress import progress_bar
from bitdance.runtime.run_folder import FORMAT_VERSION, Machine, check_settings, compare, exclusive, format_differences
from bitdance.sampling.labels import make_labels
from bitdance.sampling.pipeline import Pipeline, split_batches
from bitdance.sampling.sampler import SamplingConfig
from bitdance.sampling.writers import write_npz, write_png_folder
from bitdance.weights.safetensors_files import digest

NPZ, PNGS, BITS, FEATURES = "npz", "pngs", "bits", "features"
"""Kinds of results: one `.npz` of images, a folder of PNGs, an `.npz` of packed bits, features of an extractor."""

MAX_IMAGES = 100_000_000
"""Images of a job; the labels of more would take gigabytes."""

VISIBLE_AFTER = 60.0
"""Seconds in which a file that another machine has written has to appear."""


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Settings of a job that change its images, besides `SamplingConfig`.

    Attributes:
        num_images: N.
        batch_size: images per batch.
        seed: 0 <= seed < 2**32.
        labels: how the classes are chosen, see `bitdance.sampling.labels.make_labels`.
        chunk_size: images decoded at once, 0 for a whole batch.
    """

    num_images: int = 50_000
    batch_size: int = 100
    seed: int = 0
    labels: str = "balanced"
    chunk_size: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_fields(
            self, "num_images batch_size", lambda value: 1 <= value <= MAX_IMAGES, f"be from 1 to {MAX_IMAGES}"
        )
        check_fields(self, "chunk_size", lambda value: value >= 0, "be at least 0")


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a job: digests of their tensors, precision, and whether the sampler was to be compiled."""

    model: str
    autoencoder: str
    precision: str
    compiled: bool


@dataclasses.dataclass(frozen=True)
class JobResult:
    """Result of a job.

    Attributes:
        results: the files and folders, by kind.
        settings_file: the settings that they were sampled with.
        sampled: images that this process sampled in this run.
        seconds: that this process took for them.
        peak_memory: bytes, on the GPU or else of the whole process.
    """

    results: dict[str, pathlib.Path]
    settings_file: pathlib.Path
    sampled: int
    seconds: float
    peak_memory: int


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """N images of a pipeline.

    Attributes:
        pipeline: model and autoencoder.
        folder: folder of the results; the names of the results tell the settings.
        sampling: settings of the sampler.
        config: settings of the job.
        kinds: results to write, of `NPZ`, `PNGS` and `BITS`.
        extractors: feature extractors whose features to write, one file each.
    """

    pipeline: Pipeline
    folder: pathlib.Path
    sampling: SamplingConfig
    config: JobConfig
    kinds: tuple[str, ...] = (NPZ,)
    extractors: tuple[FeatureExtractor, ...] = ()

    @functools.cached_property
    def networks(self) -> Networks:
        """The networks of the pipeline; computed once, since the digests read all tensors."""
        model, autoencoder = (digest(part.state_dict()) for part in (self.pipeline.model, self.pipeline.autoencoder))
        precision = str(self.pipeline.dtype).removeprefix("torch.")
        return Networks(model, autoencoder, precision, compiled=self.pipeline.functions is not None)

    @functools.cached_property
    def batches(self) -> list[range]:
        """The sample ids of each batch."""
        return list(split_batches(self.config.num_images, self.config.batch_size))

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The class of each image, (N,) int64."""
        num_classes = self.pipeline.model.config.num_classes
        return make_labels(self.config.labels, self.config.num_images, num_classes, self.config.seed)

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """Path of the results without their endings; its name tells the settings."""
        sampling, config, networks = self.sampling, self.config, self.networks
        plain = SamplingConfig(1, 1.0)
        others = {
            sampling.solver: sampling.solver != "euler-maruyama",
            sampling.cfg_schedule: sampling.cfg_schedule != "linear",
            "shared-first": sampling.share_first,
            f"to-{sampling.final_num_steps}-steps": sampling.final_num_steps is not None,
            f"end-{sampling.end_time:g}": sampling.end_time != plain.end_time,
            f"power-{sampling.grid_power:g}": sampling.grid_power != plain.grid_power,
            "interval-{:g}-{:g}".format(*sampling.cfg_interval): sampling.cfg_interval != plain.cfg_interval,
            f"{config.labels}-labels": config.labels != "balanced",
        }
        parts = [
            self.pipeline.name,
            f"{self.pipeline.model.config.parallel_num}x",
            f"size-{self.pipeline.image_size}",
            f"steps-{sampling.num_steps}",
            f"cfg-{sampling.cfg_scale:g}",
            *(name for name, is_unusual in others.items() if is_unusual),
            f"seed-{config.seed}",
            {"float32": "fp32", "bfloat16": "bf16"}.get(networks.precision, networks.precision),
            f"n-{config.num_images}",
            hashlib.sha256(f"{networks.model}{networks.autoencoder}".encode()).hexdigest()[:8],
        ]
        return self.folder / "-".join(parts)

    @property
    def results(self) -> dict[str, pathlib.Path]:
        """The files and folders that the job writes, by kind; of features `features.<key of the extractor>`."""
        ends = {kind: {NPZ: ".npz", PNGS: "", BITS: "-bits.npz"}[kind] for kind in self.kinds}
        ends |= {f"{FEATURES}.{extractor.key}": f"-features-{extractor.key}.npz" for extractor in self.extractors}
        return {kind: self._beside(end) for kind, end in ends.items()}

    @property
    def run_folder(self) -> pathlib.Path:
        """The folder of the unfinished job."""
        return self._beside(".job")

    @property
    def settings_file(self) -> pathlib.Path:
        """The settings beside the results of a finished job."""
        return self._beside(".json")

    def _beside(self, end: str) -> pathlib.Path:
        return self.path.with_name(self.path.name + end)

    def part(self, batch: int) -> pathlib.Path:
        """The file of a finished batch."""
        return self.run_folder / f"{batch:06d}.npz"

    def run(self, world: World) -> JobResult:
        """Samples what is missing. Each process keeps a log beside the results, `<path>.rank<r>.log`.

        Raises:
            UserError: a setting is out of range, the results or parts there have other settings, or a file cannot be
                written.
        """
        _ = self.batches, self.labels  # raises what is out of range before anything is written
        networks = set(world.gather(self.networks))
        if len({each.compiled for each in networks}) > 1:
            advice = "install a compiler for all, or sample with `bitdance sample --compile no`"
            raise UserError(f"the sampler can be compiled in some of the processes only: {advice}.")
        if len(networks) > 1:  # a run wrote another checkpoint meanwhile, or some machines have no bf16
            problem = "the processes have loaded different weights, or in different precisions"
            raise UserError(f"{problem}: name a file of weights, and give `precision`.")
        machine = Machine.of(world)
        sections = {"sampling": self.sampling, "job": self.config, "networks": self.networks, "machine": machine}
        nothing = JobResult(self.results, self.settings_file, 0, 0.0, world.peak_memory())
        # The first process decides for all, since they may see a shared folder at different times.
        if world.broadcast(not self._missing_results() and not self.run_folder.exists()):
            if world.is_main:
                self._check_finished([], sections)
            return nothing  # without a lock, since the folder may be read-only
        with exclusive(self.run_folder, world), self._open_log(world) as log:
            kinds = world.broadcast(self._missing_results())
            if world.is_main and len(kinds) < len(self.results):
                self._check_finished(kinds, sections)
            if not kinds:
                if world.is_main:
                    shutil.rmtree(self.run_folder, ignore_errors=True)  # left by a job killed in its last moment
                return nothing
            settings = check_settings(self.run_folder, sections, world, any(self.run_folder.glob("*.npz"))).settings
            Machine.apply(settings["machine"], world)
            missing = world.broadcast(self._missing_batches(kinds) if world.is_main else [])
            start = time.perf_counter()
            sampled = self._sample_batches(kinds, world, missing, log)
            seconds = time.perf_counter() - start
            log(f"{sampled} images in {seconds:.1f} s, peak memory {world.peak_memory() / 1e9:.2f} GB; waiting for all")
            world.barrier()
            if world.is_main:
                log("writing the results")
                self._write_results(kinds, settings)
                shutil.rmtree(self.run_folder, ignore_errors=True)
            world.barrier()
            log(f"finished: {', '.join(map(str, self.results.values()))}")
        return JobResult(self.results, self.settings_file, sampled, seconds, world.peak_memory())

    def _missing_results(self) -> list[str]:
        """Kinds of results that are not there; each file or folder appears only when it is complete."""
        return [
            kind for kind, path in self.results.items() if not (path / LABELS_FILE if kind == PNGS else path).exists()
        ]

    def _check_finished(self, missing: list[str], sections: dict[str, Any]) -> None:
        """Checks that the results there have these settings; results without their settings are taken as they are."""
        for kind, path in self.results.items():
            if kind not in missing and kind != PNGS and not (path.is_file() and zipfile.is_zipfile(path)):
                raise UserError(f"{path} is damaged or not a result: delete it, then run the same command again.")
            if kind not in missing and kind.startswith(FEATURES):
                read_feature_set(path)
        there = ", ".join(str(path) for kind, path in self.results.items() if kind not in missing)
        if self.settings_file.exists():
            stored = read_json(self.settings_file, f"delete it to take {there} as it is")
            if differences := format_differences(compare(stored, sections)):
                raise UserError(f"{there}: sampled with other settings ({differences}): use those, or another folder.")
        what = "complete, nothing to do" if not missing else "exists, all images are sampled again for other results"
        print(f"{there}: {what}.", file=sys.stderr)

    def _missing_batches(self, kinds: list[str]) -> list[int]:
        """Returns the batches whose part lacks an array that the results need, undamaged and of the right shape."""
        return [index for index in range(len(self.batches)) if self._read(index, kinds) is None]

    def _needed_extractors(self, kinds: list[str]) -> list[FeatureExtractor]:
        return [extractor for extractor in self.extractors if f"{FEATURES}.{extractor.key}" in kinds]

    def _read(self, batch: int, kinds: list[str]) -> dict[str, np.ndarray] | None:
        """Returns the arrays of a part that these results need, or None if it is missing, damaged or incomplete."""
        size, config, count = self.pipeline.image_size, self.pipeline.model.config, len(self.batches[batch])
        shapes: dict[str, tuple[int, ...] | None] = {"halved": ()}
        if NPZ in kinds or PNGS in kinds:
            shapes["images"] = (count, size, size, 3)
        if BITS in kinds:
            shapes["bits"] = (count, config.num_tokens, config.bits // 8)
        for extractor in self._needed_extractors(kinds):
            shapes |= {f"{extractor.key}.{name}": None for name in Features._fields[1:]}  # optional
            shapes |= {f"{extractor.key}.pool": (count, extractor.size), "extremes": (2,), "digests": (count, 32)}
        return _read_arrays(self.part(batch), shapes)

    def _sample_batches(self, kinds: list[str], world: World, missing: list[int], log: Callable[[str], None]) -> int:
        """Samples this process's share of the missing batches and returns the number of images.

        A part is written while the next batch is sampled.
        """
        config, start, sampled = self.config, time.perf_counter(), 0
        there = config.num_images - sum(len(self.batches[index]) for index in missing)
        with (
            progress_bar(config.num_images, "sampling", "images", there, disable=not world.is_main) as bar,
            concurrent.futures.ThreadPoolExecutor(1) as writer,
        ):  # fmt: skip
            writing: concurrent.futures.Future[None] | None = None
            for first in range(0, len(missing), world.size):
                round_ = missing[first : first + world.size]
                if world.rank < len(round_):
                    batch = round_[world.rank]
                    ids = self.batches[batch]
                    # The last batch is padded, so that all batches are computed in the same shapes.
                    size = min(config.batch_size, config.num_images)
                    padded = [*ids, *range(config.num_images, config.num_images + size - len(ids))]
                    classes = [int(self.labels[min(i, config.num_images - 1)]) for i in padded]
                    pixels, bits, halved = self.pipeline.generate(
                        padded, classes, self.sampling, config.seed, config.chunk_size, report=log
                    )
                    if self.networks.compiled and self.pipeline.functions is None:
                        problem = "compiling failed in a job that is sampled by compiled functions"
                        advice = "sample with `bitdance sample --compile no`"
                        raise UserError(f"{problem}: remove {self.run_folder} and {advice}.")
                    arrays = self._part_arrays(kinds, pixels[: len(ids)], bits[: len(ids)])
                    arrays["halved"] = np.array(halved, np.uint8)
                    if writing is not None:
                        writing.result()  # raises what went wrong
                    writing = writer.submit(write_arrays, self.part(batch), arrays)
                    sampled += len(ids)
                    rate = sampled / (time.perf_counter() - start)
                    log(f"batch {batch}: images {ids.start} to {ids.stop - 1}, {rate:.2f} images/s so far")
                    bar.set_postfix_str(f"{rate * world.size:.2f} images/s, {world.peak_memory() / 1e9:.1f} GB")
                bar.update(sum(len(self.batches[index]) for index in round_))
            if writing is not None:
                writing.result()
        return sampled

    def _part_arrays(self, kinds: list[str], pixels: np.ndarray, bits: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of a part, which has only what the missing results need."""
        arrays = {"images": pixels} if NPZ in kinds or PNGS in kinds else {}
        if BITS in kinds:
            arrays["bits"] = bits
        for extractor in self._needed_extractors(kinds):
            arrays |= {f"{extractor.key}.{name}": array for name, array in extractor(pixels).items()}
            summary = summarize_pixels(pixels)
            arrays["extremes"] = np.array([summary.minimum, summary.maximum], np.uint8)
            arrays["digests"] = np.frombuffer(b"".join(summary.digests), np.uint8).reshape(len(pixels), -1)
        return arrays

    def _read_part(self, batch: int, *kinds: str) -> dict[str, np.ndarray]:
        """Reads the arrays of a part that these results need; a damaged part is removed.

        A part that another machine has written can take some time to appear on a network file system.
        """
        path, deadline = self.part(batch), time.monotonic() + VISIBLE_AFTER
        while True:
            is_there = path.exists()  # before it is read
            if (arrays := self._read(batch, list(kinds))) is not None:
                return arrays
            if is_there:
                path.unlink()
                raise UserError(f"{path} was damaged: run the command again to sample it again.")
            if time.monotonic() > deadline:
                raise UserError(f"{path} was lost: run the command again, which samples it again if it is missing.")
            time.sleep(0.2)

    def _write_results(self, kinds: list[str], settings: dict[str, Any]) -> None:
        """Writes the missing results from the parts.

        Everything is written in the run folder first, where leftovers of killed processes are removed.
        """

        def read_all(kind: str, name: str) -> Iterator[tuple[range, np.ndarray]]:
            with progress_bar(len(self.batches), f"writing {name}", "batches") as bar:
                for index, ids in enumerate(self.batches):
                    yield ids, self._read_part(index, kind)[name]
                    bar.update()

        # The batches that did not fit into the memory of a GPU as a whole.
        halved = [index for index in range(len(self.batches)) if self._read_part(index)["halved"]]
        settings = {"format_version": FORMAT_VERSION, **settings, "halved_batches": halved}
        write_json(self.run_folder / "result.json", settings)
        _move(self.run_folder / "result.json", self.settings_file)
        extractors = {f"{FEATURES}.{extractor.key}": extractor for extractor in self.extractors}
        for kind in kinds:
            result, temporary = self.results[kind], self.run_folder / ("images" if kind == PNGS else "result.npz")
            if kind == PNGS:
                shutil.rmtree(temporary, ignore_errors=True)
                write_png_folder(temporary, read_all(kind, "images"), self.labels)
            elif kind in extractors:
                write_feature_set(temporary, self._collect_features(kind, extractors[kind]))
            else:
                name = "images" if kind == NPZ else "bits"
                shape = (self.config.num_images, *self._read_part(0, kind)[name].shape[1:])
                write_npz(temporary, (array for _, array in read_all(kind, name)), shape, self.labels)
            _move(temporary, result)

    def _collect_features(self, kind: str, extractor: FeatureExtractor) -> FeatureSet:
        """Returns the features of all parts, as if they had been extracted from the file of the images."""
        collector, summaries = Collector(extractor, self.config.num_images), []
        for index, ids in enumerate(self.batches):
            arrays = self._read_part(index, kind)
            named = {name: arrays.get(f"{extractor.key}.{name}", np.array(0)) for name in Features._fields}
            collector.add({name: array for name, array in named.items() if array.shape[:1] == (len(ids),)})
            low, high = arrays["extremes"].tolist()
            summaries.append(PixelSummary(low, high, [row.tobytes() for row in arrays["digests"]]))
        size, num_classes = self.pipeline.image_size, self.pipeline.model.config.num_classes
        about = {"source": str(self.path), "height": size, "width": size, "num_classes": num_classes}
        return collector.finish({**about, **describe_pixels(summaries, "uint8", self.labels)}, self.labels)

    @contextlib.contextmanager
    def _open_log(self, world: World) -> Iterator[Callable[[str], None]]:
        """Yields a function that writes a line with the time to this process's log."""
        path = self._beside(f".rank{world.rank}.log")
        make_folder(path.parent)
        with open(path, "ab", buffering=0) as file:

            def write(line: str) -> None:
                try:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode(errors="surrogateescape"))
                except OSError as error:
                    raise UserError(f"cannot write {path}: {error.strerror}; free some space.") from error

            write(f"process {world.rank} of {world.size} on {world.device}: {self.config.num_images} images")
            try:
                yield write
            except BaseException as error:
                write(f"stopped: {type(error).__name__}: {error}")
                raise


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        rename(source, target)
    except OSError as error:
        reason = f"{target} already exists and cannot be replaced ({error.strerror})"
        raise UserError(f"{reason}: move it, then run the same command again.") from error


def _read_arrays(path: pathlib.Path, shapes: dict[str, tuple[int, ...] | None]) -> dict[str, np.ndarray] | None:
    """Reads arrays of a part, those of shape None if they are there; None if one is missing, damaged or of other shape.

    The checksums of the zip tell whether it is damaged.
    """
    arrays = {}
    if not path.is_file():  # opening a pipe would wait for ever
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.zip.infolist()):
                return None  # not written by this project, and could expand to any size
            for name, shape in shapes.items():
                if shape is None and name not in file:
                    continue
                array = file[name]  # bytes if it is no .npy
                if array.dtype not in (np.uint8, np.float32) or shape not in (None, array.shape):
                    return None
                arrays[name] = array
    except Exception:  # a damaged zip raises almost anything
        return None
    return arrays


def print_result(job: SamplingJob, result: JobResult, world: World) -> None:
    """Prints a result as a sentence and, except on a terminal, as one line of JSON for programs."""
    files, rate = ", ".join(map(str, result.results.values())), result.sampled / max(result.seconds, 1e-9)
    done = f"{result.sampled} images sampled in {result.seconds:.1f} s ({rate:.2f} images/s)"
    print(f"{done if result.sampled else f'all {job.config.num_images} images were there already'}: {files}")
    if not sys.stdout.isatty():
        facts = {"result": next(iter(result.results.values())), **dataclasses.asdict(result)}
        facts |= {"images": job.config.num_images, "processes": world.size}
        print(json.dumps(facts, default=str), flush=True)

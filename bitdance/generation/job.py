"""The job behind the FID figures: N images of balanced classes, by any number of processes, into one `.npz`.

The job is cut into fixed batches before it starts, and each process takes whole batches; a finished batch is a file of
its own until all are there. So a batch that is there already is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from bitdance.distributed import World
from bitdance.errors import UserError
from bitdance.files import atomic_write, make_folder
from bitdance.generation.batches import Generator, balanced_labels, cut
from bitdance.generation.npz import write_npz
from bitdance.generation.pngs import save_png

LABELS = "labels.json"
"""In a folder of PNGs: the class of each image, in their order."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make.

    Attributes:
        path: of the result without its ending: `<path>.npz`, or the folder `<path>` of PNGs.
        num_images: N.
        batch_size: images of a batch.
        to_npz: one `.npz` instead of a folder.
        settings: everything else that changes an image, for the record and to tell a job from another.
    """

    path: pathlib.Path
    num_images: int
    batch_size: int
    to_npz: bool
    settings: dict[str, object]


def run(job: Job, generator: Generator, world: World) -> pathlib.Path:
    """Makes what is missing of a job and returns the path of the result.

    Raises:
        UserError: a setting does not fit, or a file cannot be written.
    """
    from tqdm import tqdm

    batches = list(cut(job.num_images, job.batch_size))
    labels = balanced_labels(job.num_images, generator.model.config.num_classes, generator.seed)
    result = job.path.with_name(job.path.name + ".npz") if job.to_npz else job.path
    record = json.dumps({**job.settings, "num_images": job.num_images, "batch_size": job.batch_size}, sort_keys=True)
    # Parts of a job of other settings have another name, so nothing stale is ever taken.
    parts = job.path.with_name(f".{job.path.name}.parts-{hashlib.sha256(record.encode()).hexdigest()[:16]}")
    done = result if job.to_npz else result / LABELS
    if done.exists():
        if world.is_main:
            print(f"{result} exists, nothing to do.")
        return result
    make_folder(parts)
    with tqdm(total=job.num_images, unit="image", disable=not world.is_main, dynamic_ncols=True) as bar:
        for number, images in enumerate(batches):
            path = parts / f"{number:06d}.npy"
            if number % world.size == world.rank and not path.exists():
                # The last batch is filled up, so that every batch is computed in the same shapes.
                padded = [*images, *range(job.num_images, job.num_images + job.batch_size - len(images))]
                classes = [int(labels[min(i, job.num_images - 1)]) for i in padded]
                pixels = generator.images(padded, classes)[: len(images)]
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    np.lib.format.write_array(file, pixels)
            bar.update(len(images))
    world.barrier()
    if world.is_main:
        _assemble(result, job, parts, batches, labels)
        shutil.rmtree(parts)
    world.barrier()
    return result


def _assemble(result: pathlib.Path, job: Job, parts: pathlib.Path, batches: list[range], labels: np.ndarray) -> None:
    def pixels() -> Iterator[np.ndarray]:
        for number, images in enumerate(batches):
            try:
                batch = np.load(parts / f"{number:06d}.npy", allow_pickle=False)
                if len(batch) != len(images):
                    raise ValueError
            except (OSError, ValueError, EOFError):
                raise UserError(
                    f"{parts} holds no part {number} or a damaged one: delete the folder and run the command again."
                ) from None
            yield batch

    stream = pixels()
    if job.to_npz:
        first = next(stream)
        shape = (job.num_images, *first.shape[1:])
        write_npz(result, _chain(first, stream), shape, labels)
        return
    number = 0
    for batch in stream:
        for picture in batch:
            save_png(result / f"{number:06d}.png", picture)
            number += 1
    with atomic_write(result / LABELS) as path:  # last: it says that all images are there
        path.write_text(json.dumps(labels.tolist()) + "\n")


def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest

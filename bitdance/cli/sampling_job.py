"""The sampling job as commands run it: its name, its record, and the line that it ends with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitdance.metrics.features import FeatureExtractor
    from bitdance.runtime.process_group import World
    from bitdance.sampling.job import JobResult
    from bitdance.sampling.pipeline import Generator


def run_job(
    generator: Generator,
    world: World,
    *,
    folder: pathlib.Path,
    stem: str,
    num_images: int,
    batch_size: int,
    kinds: tuple[str, ...],
    labels: str = "balanced",
    networks: tuple[FeatureExtractor, ...] = (),
) -> JobResult:
    """Makes `num_images` images in `folder`, and prints what came of it as a line of JSON.

    Args:
        stem: how the names of the results begin; all that changes an image follows, the weights by their digests.
        kinds, labels, networks: as in `bitdance.sampling.job.Job`.

    Raises:
        UserError: as for `bitdance.sampling.job.run`.
    """
    from bitdance.sampling.job import Job, run
    from bitdance.weights.weights_file import digest

    model, settings = generator.model, generator.settings
    precision = str(model.norm.weight.dtype).removeprefix("torch.")
    facts = {
        **dataclasses.asdict(settings),
        "seed": generator.seed,
        "precision": precision,
        "chunk_size": generator.chunk,
        "compiled": generator.denoise is not None,
        "model": digest(model.state_dict()),
        "autoencoder": digest(generator.autoencoder.state_dict()),
    }
    weights = hashlib.sha256(f"{facts['model']}{facts['autoencoder']}".encode()).hexdigest()[:8]
    others = [] if settings.solver == "euler-maruyama" else [settings.solver]
    others += [] if settings.cfg_schedule == "linear" else [settings.cfg_schedule]
    others += ["shared-first"] if settings.share_first else []
    others += [] if labels == "balanced" else [f"{labels}-labels"]
    parts = [
        stem,
        f"{model.config.parallel_num}x",
        f"size-{model.config.grid * generator.autoencoder.config.down_size}",
        f"steps-{settings.num_steps}",
        f"cfg-{settings.cfg_scale:g}",
        *others,
        f"seed-{generator.seed}",
        {"float32": "fp32", "bfloat16": "bf16"}.get(precision, precision),
        f"n-{num_images}",
        weights,
    ]
    job = Job(folder / "-".join(parts), num_images, batch_size, kinds, facts, labels, networks)
    outcome = run(job, generator, world)
    if world.is_main:
        said = {
            "result": next(iter(outcome.results.values())),
            **dataclasses.asdict(outcome),
            "images": num_images,
            "processes": world.size,
        }
        print(json.dumps(said, default=str), flush=True)
    return outcome

"""`bitdance sweep`: metrics of a model over guidance scales, steps and solvers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from typing import TYPE_CHECKING

from bitdance.cli.evaluate import report, run_jobs
from bitdance.cli.options import ModelOptions, PrecisionOptions
from bitdance.cli.parsing import parse
from bitdance.config import CfgSchedule, SolverName
from bitdance.metrics.evaluation_config import EvaluationConfig

if TYPE_CHECKING:
    from bitdance.runtime.process_group import World

EXAMPLES = """
bitdance sweep --model runs/model --cfg-scale 1 2 3 4 --num-images 5000 --reference data.zip
bitdance sweep --model BitDance-B-16X --num-steps 25 50 100 --solver euler-maruyama heun --cfg-scale 6.1
"""

SCALE_FACTORS = (0.5, 0.75, 1.0, 1.5)
"""Guidance scales where none are given, relative to the default of the model."""


@dataclasses.dataclass(frozen=True)
class How:
    """How to sample: each combination of the first three, with the same labels and noise.

    Attributes:
        cfg_scale: guidance scales; by default 0.5, 0.75, 1 and 1.5 times that of `bitdance sample`.
        num_steps: solver steps of the diffusion head; by default those of `bitdance sample`.
        solver: any of euler-maruyama, dpmpp-2m-sde, euler and heun; by default that of `bitdance sample`.
        cfg_schedule: linear or constant.
        num_images: samples per combination. Metrics of few images only compare combinations of equal counts.
        seed: the same for all.
        batch_size: images at once.
        chunk_size: images decoded at once, 0 for a whole batch; by default the published number.
    """

    cfg_scale: tuple[float, ...] = ()
    num_steps: tuple[int, ...] = ()
    solver: tuple[SolverName, ...] = ()
    cfg_schedule: CfgSchedule = "linear"
    num_images: int = 1000
    seed: int = 0
    batch_size: int = 100
    chunk_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """What to write.

    Attributes:
        output: folder for the features of each combination, and sweep.json.
    """

    output: pathlib.Path = pathlib.Path("sweep")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Evaluate a model over guidance scales, steps and solvers.

    Each combination is a sampling job of its own: an interrupted sweep resumes, finished jobs are not repeated.
    """

    how: How = dataclasses.field(default_factory=How)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    results: Results = dataclasses.field(default_factory=Results)
    where: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Sweep, arguments, "bitdance sweep", EXAMPLES)
    with command.where.init_distributed() as world:
        _sweep(command, world)


def _sweep(command: Sweep, world: World) -> None:
    from bitdance.metrics.references import FeatureExtractors, find_reference
    from bitdance.sampling.job import JobConfig, SamplingJob

    how = command.how
    pipeline = command.model.load(world.device, command.where.precision)
    pipeline.compile()
    defaults = pipeline.defaults
    solvers, steps = how.solver or (defaults.solver,), how.num_steps or (defaults.num_steps,)
    scales = how.cfg_scale or [factor * defaults.cfg_scale for factor in SCALE_FACTORS]
    combinations = [
        pipeline.sampling_config(scale, count, cfg_schedule=how.cfg_schedule, solver=solver)
        for solver, count, scale in itertools.product(solvers, steps, scales)
    ]
    chunk_size = defaults.chunk_size if how.chunk_size is None else how.chunk_size
    job_config = JobConfig(how.num_images, how.batch_size, how.seed, chunk_size=chunk_size)
    extractors = FeatureExtractors(command.evaluation, world)
    jobs = {
        f"cfg {sampling.cfg_scale:g}, {sampling.num_steps} steps, {sampling.solver}": SamplingJob(
            pipeline, command.results.output, sampling, job_config, (), extractors.loaded
        )
        for sampling in combinations
    }
    reference = find_reference(extractors, pipeline.image_size)
    rows = run_jobs(jobs, reference, command.evaluation, world)
    if not rows:
        return
    report(rows, reference, command.evaluation, command.results.output / "sweep.json")
    metrics = {title: row["metrics"] for title, row in rows.items()}
    names = dict.fromkeys(name for row in metrics.values() for name in row)
    for name in [name for name in names if name == "fid" or name.endswith(":fid")]:
        best = min(metrics, key=lambda title: metrics[title].get(name, math.inf))
        print(f"lowest {'FID' if name == 'fid' else name}: {best}")

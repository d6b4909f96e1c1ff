"""`bitdance sweep`: figures of a model over guidance scales, steps and solvers."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import TYPE_CHECKING, Any, Literal

from bitdance.cli.evaluate import evaluate_job, report
from bitdance.cli.parsing import parse
from bitdance.cli.sampling_job import run_job
from bitdance.metrics.evaluation_config import EvaluationConfig
from bitdance.runtime.errors import UserError
from bitdance.weights.resolve import DEMO, Precision, load_pair

if TYPE_CHECKING:
    from bitdance.runtime.process_group import World


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Evaluate a model over guidance scales, steps and solvers, each with the same labels and noise.

    Each combination is a sampling job of its own: what was interrupted goes on, what is there is not made again.

    Attributes:
        model: `demo`, a released model such as BitDance-B-16X, or a file of weights.
        autoencoder: file of the autoencoder; by default the one inside or beside the model.
        output: folder for the features of each combination, and sweep.json.
        num_images: of each combination. Figures of few images only tell combinations of equal counts apart.
        cfg_scales: guidance scales.
        sample_steps: steps of the diffusion head.
        solvers: any of euler-maruyama, euler and heun.
        cfg_schedule: linear or constant.
        seed: the same for all.
        weights: ema or model (raw); by default the EMA where there is one.
        batch_size: images at a time.
        chunk_size: images that the decoder takes at once, 0 for a whole batch.
        mixed_precision: bf16 or none (float32); auto is bf16 on a GPU.
        device: cpu, cuda, cuda:N or mps; by default a GPU where there is one.
        threads: CPU threads; by default all cores.
    """

    model: str = DEMO
    autoencoder: str | None = None
    output: pathlib.Path = pathlib.Path("sweep")
    num_images: int = 1000
    cfg_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    sample_steps: tuple[int, ...] = (50,)
    solvers: tuple[Literal["euler-maruyama", "euler", "heun"], ...] = ("euler-maruyama",)
    cfg_schedule: Literal["linear", "constant"] = "linear"
    seed: int = 0
    weights: Literal["ema", "model"] | None = None
    batch_size: int = 100
    chunk_size: int = 0
    mixed_precision: Precision = "auto"
    device: str | None = None
    threads: int | None = None
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    command = parse(Sweep, arguments, "bitdance sweep")
    for flag in ("cfg_scales", "sample_steps", "solvers"):
        if not getattr(command, flag):
            raise UserError(f"--{flag.replace('_', '-')} names nothing: give at least one.")
    from bitdance.runtime.process_group import init_distributed

    with init_distributed(command.device, command.threads) as world:
        _sweep(command, world)


def _sweep(command: Sweep, world: World) -> None:
    from bitdance.metrics.references import FeatureExtractors, find_reference
    from bitdance.sampling.pipeline import Generator
    from bitdance.sampling.sampler import SampleSettings
    from bitdance.weights.weights_file import choose_weights

    model, autoencoder, contents = load_pair(
        command.model, command.autoencoder, command.weights, world.device, command.mixed_precision
    )
    stem = f"{contents.path.stem}-{choose_weights(contents, command.weights)}"
    del contents  # all that the file holds, which is in memory where it could not be mapped
    combinations = [
        SampleSettings(steps, scale, command.cfg_schedule, solver=solver)
        for solver, steps, scale in itertools.product(command.solvers, command.sample_steps, command.cfg_scales)
    ]
    networks = FeatureExtractors(command.evaluation, world)
    side = model.config.grid * autoencoder.config.down_size
    reference = find_reference(command.evaluation, side, networks, world)
    rows: dict[str, dict[str, Any]] = {}
    for settings in combinations:
        outcome = run_job(
            Generator(model, autoencoder, settings, command.seed, command.chunk_size),
            world,
            folder=command.output,
            stem=stem,
            num_images=command.num_images,
            batch_size=command.batch_size,
            kinds=(),
            networks=networks(),
        )
        if world.is_main:
            title = f"cfg {settings.cfg_scale:g}, {settings.num_steps} steps, {settings.solver}"
            rows[title] = evaluate_job(outcome, reference, command.evaluation)
    if not rows:
        return
    report(rows, reference, command.evaluation, command.output / "sweep.json")
    if all("fid" in row["metrics"] for row in rows.values()):
        best = min(rows, key=lambda title: rows[title]["metrics"]["fid"])
        print(f"lowest FID: {best}")

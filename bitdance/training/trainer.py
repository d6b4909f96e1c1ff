"""The trainer: steps, evaluation, previews and checkpoints, for an autoencoder as for a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitdance import __version__
from bitdance.config import SamplingDefaults
from bitdance.data.crops import center_crop, to_array
from bitdance.data.image_dataset import evenly_spaced
from bitdance.data.token_cache import TokenDataset
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.quantizer import unpack
from bitdance.models.tokens import grid_from_tokens
from bitdance.models.transformer import BitDance
from bitdance.runtime.devices import uses_bf16
from bitdance.runtime.errors import Interrupted, UserError, counted, one_line
from bitdance.runtime.process_group import World
from bitdance.runtime.progress import format_duration, progress_bar
from bitdance.runtime.run_folder import FREE, SETTINGS, check_settings, exclusive, read_settings
from bitdance.sampling.image_grid import image_grid, rows_without_names
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import describe_compiler_error, find_compiler_problem, is_compiler_error
from bitdance.sampling.writers import write_png
from bitdance.training.automatic import choose_ema
from bitdance.training.checkpointing import Checkpointer, read_newest
from bitdance.training.evaluation import Evaluation, Validation, format_evaluation, reconstruct
from bitdance.training.flops import step_flops
from bitdance.training.loader import Batch, Loader
from bitdance.training.logging import Metrics, MetricsMeter, RunLog, format_metrics
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard, Optimizer, learning_rate
from bitdance.training.preemption import PreemptionHandler
from bitdance.training.run_report import COMPARISON, write_report
from bitdance.training.status import describe_run, use_command
from bitdance.training.train_config import TrainConfig
from bitdance.weights import safetensors_files, weights_file
from bitdance.weights.layout import CFG_SCALE, TOKENIZER_DIGEST, WeightsFile
from bitdance.weights.network_config import count_parameters
from bitdance.weights.resolve import list_checkpoints

PREVIEW_IMAGES = 16
MAX_KEPT = 0.05
"""Share of the initial weights in the EMA that is reported when a run starts."""
COMPARED_CLASSES, COMPARED_IMAGES = 10, 6

PREVIEW_SAMPLING = SamplingDefaults(chunk_size=1)
"""Images are decoded one by one: a preview should need less memory than a step."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What else the settings of a run record, for `bitdance info`; all of it may change on resume but `kind`.

    Attributes:
        kind: the network that is trained, `model` or `autoencoder`.
        version: of this package.
        steps_per_epoch, total_steps, last_step: of the run; `max_steps` may end it before `total_steps`.
        processes, device: that train.
        autoencoder: of a model, the name or file of its autoencoder.
        parameters, autoencoder_parameters: of the network that is trained, and of a model's autoencoder.
        command: that started it last, without what started the processes.
    """

    kind: str
    version: str = dataclasses.field(metadata=FREE)
    steps_per_epoch: int = dataclasses.field(metadata=FREE)
    total_steps: int = dataclasses.field(metadata=FREE)
    last_step: int = dataclasses.field(metadata=FREE)
    processes: int = dataclasses.field(metadata=FREE)
    device: str = dataclasses.field(metadata=FREE)
    autoencoder: str | None = dataclasses.field(default=None, metadata=FREE)
    parameters: int | None = dataclasses.field(default=None, metadata=FREE)
    autoencoder_parameters: int | None = dataclasses.field(default=None, metadata=FREE)
    command: str | None = dataclasses.field(default=None, metadata=FREE)


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """The data of a run, which must be the same on resume.

    Attributes:
        images: number of images.
        digest: `ImageDataset.digest`, or that of a token cache.
        autoencoder: of a model, the autoencoder's `weights_file.tokenizer_digest`.
    """

    images: int = dataclasses.field(metadata={"difference": "it had {old} images, now there are {new}"})
    digest: str = dataclasses.field(metadata={"difference": "the names of the images, or how they are decoded, differ"})
    autoencoder: str | None = dataclasses.field(
        default=None, metadata={"difference": "the weights of the `autoencoder` differ"}
    )


class Trainer:
    """A training run.

    It leaves in the run folder: `settings.json`, `log.jsonl` (a line every `log_every` steps),
    `checkpoint-<step>.safetensors` (the whole state), `preview-<step>.png`, `epoch_<n>.safetensors` (weights that are
    kept), and at the end `model.safetensors` or `autoencoder.safetensors`, the weights alone, and `report.html`.

    Args:
        objective: the loss with its network, on the CPU.
        config: settings of the run.
        loader: batches of this process.
        world: the processes.
        data: the data of the run.
        autoencoder_name: of a model, the name or file of its autoencoder.
        command: that started the run, for its settings.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        objective: AutoencoderLoss | BitDanceLoss,
        config: TrainConfig,
        loader: Loader,
        world: World,
        data: DataInfo,
        autoencoder_name: str | None = None,
        command: str | None = None,
    ) -> None:
        self.config, self.loader, self.world, self.data = config, loader, world, data
        self.objective = objective.to(world.device)
        self.network: BitDance | Autoencoder = objective.network
        self.kind = "model" if isinstance(self.network, BitDance) else "autoencoder"
        self.pipeline: Pipeline | None = None
        if isinstance(objective, BitDanceLoss):
            objective.autoencoder.to(world.device)
            if world.device.type == "cpu":
                objective.autoencoder.prepare_for_cpu()
            defaults = dataclasses.replace(PREVIEW_SAMPLING, cfg_scale=config.eval_cfg_scale)
            self.pipeline = Pipeline(objective.network, objective.autoencoder, defaults=defaults)
        self.total_steps = config.epochs * loader.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.info = RunInfo(
            self.kind,
            __version__,
            steps_per_epoch=loader.steps_per_epoch,
            total_steps=self.total_steps,
            last_step=self.last_step,
            processes=world.size,
            device=world.device.type,
            autoencoder=autoencoder_name,
            parameters=count_parameters(self.network),
            autoencoder_parameters=count_parameters(self.pipeline.autoencoder) if self.pipeline else None,
            command=command,
        )
        self.discriminator = objective.discriminator if isinstance(objective, AutoencoderLoss) else None
        named = self.network.named_parameters()
        self.parameters: dict[str, Tensor] = {name: value for name, value in named if value.requires_grad}
        if self.discriminator is not None:
            named = self.discriminator.named_parameters()
            self.parameters |= {f"discriminator.{name}": parameter for name, parameter in named}
        self.optimizer = Optimizer(self.parameters, config)
        self.guard = NonFiniteGuard(world.device)
        self.step = 0
        if len(loader.indices) % config.accumulate:
            problem = f"accumulate={config.accumulate} does not divide the {len(loader.indices)} images of a process"
            rule = "a multiple of the number of microbatches times the number of processes"
            raise UserError(f"{problem}: make `batch_size` {rule}.")
        self.validation: Validation | None = None
        if config.val_path:
            self.validation = Validation(objective, config, loader.images.classes, world, data.autoencoder)
        self.evaluation: Evaluation | None = None
        self.checkpointer = Checkpointer(config.output, config.keep_checkpoints)
        self.log: RunLog | None = None
        self.module: nn.Module = self.objective
        compiles = world.device.type == "cuda" if config.compile is None else config.compile
        if compiles and self._find_compiler():
            if world.size > 1:
                # DDP would split the graph at its buckets, which activation checkpointing does not allow. The gradients
                # are reduced after the backward pass of the whole graph then.
                torch._dynamo.config.optimize_ddp = False
            self.objective.compile()
        if world.size > 1:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is not in 2.7
                self.module = nn.parallel.DistributedDataParallel(
                    self.objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        # After DDP has given all processes the weights of the first.
        self.ema = EMA(self.network, config.ema) if config.ema > 0 else None

    def _find_compiler(self) -> bool:
        """Returns whether the compiler works in all processes; if not, the first one says why."""
        problems = self.world.gather(find_compiler_problem(self.world.device))
        problem = self.world.broadcast(next(filter(None, problems), None))
        if problem and self.world.is_main:
            print(f"bitdance: training runs uncompiled ({problem}).", file=sys.stderr)
        return not problem

    # ------------------------------------------------------------ steps

    def train(self) -> pathlib.Path:
        """Trains to the last step and returns the path of the weights.

        Raises:
            Interrupted: SIGTERM or SIGUSR1 arrived; a checkpoint was written.
            UserError: the folder belongs to another run, another process trains in it, too many consecutive steps were
                skipped, an image cannot be read, or a file cannot be written.
        """
        if path := self.world.broadcast(self._find_complete() if self.world.is_main else None):
            return path
        if self.config.eval_every:  # not of a dry run, since features may be written
            network = self.network if isinstance(self.network, Autoencoder) else self.pipeline
            assert network is not None
            self.evaluation = Evaluation(network, self.config, self.loader.images.labels, self.world, self.in_bf16)
        with exclusive(self.config.output, self.world), contextlib.ExitStack() as opened:
            opened.callback(self.checkpointer.close)
            self._open_run(opened)
            first, start = self.step, time.monotonic()
            with PreemptionHandler(self.world).installed() as preemption:
                self._train_steps(preemption)
                path = self._save_weights(f"{self.kind}.safetensors")
                self.checkpointer.finish()
                self.world.barrier()
            seconds = time.monotonic() - start
            unreadable = set().union(*self.world.gather(self.loader.bad_images.indices()))
            self._write_comparison(self.step > first)
            if self.world.is_main:
                self._summarize(path, self.step - first, seconds, len(unreadable))
            return path

    def _train_steps(self, preemption: PreemptionHandler) -> None:
        config = self.config
        if self.world.is_main and self.step == 0:
            for problem in self._find_problems():
                print(f"bitdance: warning: {problem}", file=sys.stderr)
        self.network.train()
        encodes = not isinstance(self.loader.images, TokenDataset)
        flops = step_flops(self.objective, config.batch_size, config.image_size, encodes) / self.world.size
        meter = MetricsMeter(config.batch_size, flops, self.world, self.guard, self.in_bf16)
        saved = time.monotonic()
        warned: set[str] = set()
        with progress_bar(self.last_step, "training", "steps", self.step, disable=not self.world.is_main) as bar:
            for batch in meter.timed(self.loader.stream(self.step, self.last_step)):
                lr = learning_rate(config, self.step, self.total_steps)
                meter.add(self.train_step(batch, lr))
                self.step += 1
                bar.update()
                metrics: Metrics = {}
                if self._is_due(config.log_every):
                    metrics = meter.read() | {"lr": lr, "bad_images": len(self.loader.bad_images)}
                    bar.set_postfix_str(format_metrics(metrics))
                    self._check_skipped(batch, int(metrics.pop("consecutive") or 0))
                    if self.world.is_main and isinstance(self.objective, AutoencoderLoss):
                        for problem in self.objective.find_problems(metrics) - warned:
                            bar.write(f"step {self.step}: warning: {problem}")
                            warned.add(problem)
                with meter.paused():
                    if self.validation is not None and self._is_due(config.val_every):
                        with self._ema_weights(), self.autocast():
                            metrics |= self.validation.metrics()
                    if self.evaluation is not None and self._is_due(config.eval_every):
                        with self._ema_weights():
                            metrics |= self.evaluation.metrics()
                        if self.world.is_main:
                            bar.write(f"step {self.step}: {format_evaluation(metrics)} of {config.eval_images} images")
                    if metrics:
                        self._log(metrics)
                    if config.keep_epochs and self.step % (config.keep_epochs * self.loader.steps_per_epoch) == 0:
                        self._save_weights(f"epoch_{self.step // self.loader.steps_per_epoch}.safetensors")
                    if self._is_due(config.preview_every):
                        self._write_preview()
                    # Last, so that what a resumed run does not repeat is written by then.
                    minutes = (time.monotonic() - saved) / 60
                    if self._is_due(config.save_every) or 0 < config.save_minutes <= minutes:
                        self.save()
                        saved = time.monotonic()
                    if (number := preemption.received()) and self.step < self.last_step:
                        self._stop(number)

    def _find_problems(self) -> list[str]:
        """Returns what is wrong with the schedule of a run that starts."""
        config, steps = self.config, self.total_steps
        problems = []
        if config.warmup_steps > steps:
            problems.append(
                f"warmup_steps={config.warmup_steps} is more than the {steps} steps of the run: the learning rate "
                f"stays below its peak. Set it to {max(1, steps // 20)}, or let the run be longer."
            )
        kept = config.ema**self.last_step if config.ema > 0 else 0.0
        better = choose_ema(self.last_step)
        if kept > MAX_KEPT and config.ema > better:
            problems.append(
                f"ema={config.ema} keeps {kept:.0%} of the initial weights after {counted(self.last_step, 'step')}, so "
                f"those that are written, and their previews, are worse than the raw ones. Set it to {better:.3g}, or "
                "train longer."
            )
        return problems

    def train_step(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        """Takes a step and returns its metrics, scalars on the device.

        The host does not wait for them, except with Muon.

        Raises:
            UserError: the loss cannot be compiled.
        """
        # Dropout is the only use of torch's generator; the seed is a function of the step, so a resumed run repeats it.
        torch.manual_seed((self.config.seed << 31) + self.step * self.world.size + self.world.rank)
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        # A tensor, so that the loss is compiled only once: a number would be a constant of the graph.
        step = torch.full((), self.step, device=self.world.device)
        count = self.config.accumulate
        no_sync = getattr(self.module, "no_sync", contextlib.nullcontext)
        for number, part in enumerate(batch.to(self.world.device).split_microbatches(count)):
            # DDP averages the gradients over the processes in the last microbatch.
            with no_sync() if number < count - 1 else contextlib.nullcontext():
                try:
                    with self.autocast():
                        loss, metrics = self.module(*part, step)
                    (loss / count).backward()
                except Exception as error:
                    if not is_compiler_error(error):
                        raise
                    problem = f"compiling the loss failed ({describe_compiler_error(error)})"
                    raise UserError(f"{problem}: turn `compile` off (--no-compile).") from error
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0) + value
        max_norm = self.config.max_grad_norm or float("inf")
        norms = {"grad_norm": nn.utils.clip_grad_norm_(self.network.parameters(), max_norm)}
        if self.discriminator is not None:
            norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), max_norm)
            norms["discriminator_grad_norm"] = norm
        skipped = self.guard.check(torch.stack(list(norms.values())).sum())
        self.optimizer.step(lr, skipped)
        if self.ema is not None:
            self.ema.update(self.network, skipped)
        means = {name: value / count for name, value in sums.items()} | norms
        return {name: torch.where(skipped > 0, 0.0, value) for name, value in means.items()}

    @property
    def in_bf16(self) -> bool:
        """Whether matrix products are computed in bf16."""
        return uses_bf16(self.config.precision, self.world.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the autocast context of a forward pass."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.in_bf16)

    def _check_skipped(self, batch: Batch, consecutive: int) -> None:
        """Writes the batch to a file and ends the run if too many consecutive steps were skipped."""
        if not 0 < self.config.max_skipped <= consecutive:
            return
        rank = f"-{self.world.rank}" if self.world.size > 1 else ""
        path = self.config.output / f"bad-batch-{self.step}{rank}.safetensors"
        safetensors_files.save_tensors(path, batch._asdict(), "batch", {}, step=str(self.step))
        self.checkpointer.finish()
        self.world.barrier()  # otherwise the first process to end would end the others before they have written theirs
        problem = f"gradients were not finite in {consecutive} consecutive steps, up to step {self.step}"
        raise UserError(f"{problem}: the batch is in {path}; lower `lr`, or train in float32 (`precision`).")

    def _is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: only at the end) happens after this step."""
        return self.step == self.last_step or (interval > 0 and self.step % interval == 0)

    @contextlib.contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Puts the network into evaluation mode, with the EMA weights if there are any."""
        self.network.eval()
        try:
            with self.ema.swapped_in(self.network) if self.ema is not None else contextlib.nullcontext():
                yield
        finally:
            self.network.train()

    # ------------------------------------------------------------ files

    def _find_complete(self) -> pathlib.Path | None:
        """Returns the final weights of a complete run whose folder cannot be written, where nothing is left to do."""
        folder = self.config.output
        path = folder / f"{self.kind}.safetensors"
        if all(os.access(place, os.W_OK) for place in (folder, folder.resolve().parent)) or not path.is_file():
            return None
        read_settings(folder, self._sections(), lambda stored: False)
        if weights_file.read(path).metadata.get("step") != str(self.last_step):
            return None
        print(f"{path}: the run is complete.")
        return path

    def _open_run(self, opened: contextlib.ExitStack) -> None:
        """Resumes from the newest checkpoint, compares or writes the settings, and opens the log."""
        folder = self.config.output
        if len(set(self.world.gather((self.data, self.in_bf16)))) > 1:
            problem = "the processes see different images or autoencoders, or compute in different precisions"
            raise UserError(f"{problem}: give all machines the same files, and `precision`.")
        done = next(iter(list_checkpoints(folder)), 0) if self.world.is_main else 0
        if done and not (folder / SETTINGS).is_file():
            advice = "restore it, or delete the folder to start over"
            raise UserError(f"{folder} has checkpoints but no {SETTINGS}: {advice}.")
        is_finished = functools.partial(_is_finished, done)
        settings, changes = check_settings(folder, self._sections(), self.world, bool(done), is_finished)
        contents = read_newest(folder, self._check_checkpoint) if self.world.is_main else None
        path = self.world.broadcast(contents.path if contents else None)
        if path is not None:
            self.load(contents or weights_file.read(path, verify=False))  # the first process has verified it
        if self.world.is_main:
            self.log = RunLog(folder, self.step, self.config.tensorboard, self.config.wandb, settings)
            opened.callback(self.log.close)
            if self.step:
                left = f"{self.last_step - self.step} are left"
                if self.step >= self.last_step:
                    more = "more `epochs`" if self.step >= self.total_steps else "a larger `max_steps` or more `epochs`"
                    left = f"nothing is left to do; {more} would continue it"
                print(f"bitdance: {folder} continues after step {self.step}; {left}.", file=sys.stderr)
            for change in changes:
                print(f"bitdance: {change}", file=sys.stderr)
                self._log({"note": change})

    def _log(self, entry: Mapping[str, float | str | None]) -> None:
        if self.log is not None:
            self.log.write(self.step, self.step / self.loader.steps_per_epoch, entry)

    def steps_left(self) -> int:
        """Returns the number of steps that `train` would take, by the names of the checkpoints in the run folder.

        Raises:
            UserError: the folder belongs to another run.
        """
        if done := next(iter(list_checkpoints(self.config.output)), 0):
            read_settings(self.config.output, self._sections(), functools.partial(_is_finished, done))
        return max(0, self.last_step - done)

    def _sections(self) -> dict[str, Any]:
        """Returns the sections of `settings.json`."""
        sections = {"run": self.info, "train": self.config, "loss": self.objective.config, "data": self.data}
        return {**sections, self.kind: self.network.config}

    def _check_checkpoint(self, contents: WeightsFile) -> None:
        """Raises a UserError unless a checkpoint has the tensors of this network and the counts of this run.

        Tensors of other shapes or types would make the fused optimizer write beyond its memory.
        """
        network: dict[str, Tensor] = dict(self.network.named_parameters())
        parts = {"model": network, "ema": network if self.ema is not None else {}}
        parts["optimizer"] = self.optimizer.state_templates()
        parts["discriminator"] = dict(self.discriminator.named_parameters()) if self.discriminator is not None else {}
        for part, expected in parts.items():
            found = contents.states.get(part, {})
            if _shapes_and_types(found) != _shapes_and_types(expected):
                raise UserError(f"{contents.path} is damaged (the tensors of its {part} are not those of the network).")
        for name in ("step", "skipped", "consecutive"):
            value = contents.metadata.get(name, "")
            if not re.fullmatch("[0-9]{1,18}", value) or int(value) > self.total_steps:
                raise UserError(f"{contents.path} is damaged (it has no valid {name}).")
        if contents.path.stem != f"checkpoint-{int(contents.metadata['step']):07d}":
            raise UserError(f"{contents.path} is a checkpoint of step {contents.metadata['step']} under another name.")

    def load(self, contents: WeightsFile) -> None:
        """Loads the state of a checkpoint."""
        metadata = contents.metadata
        self.network.load_state_dict(contents.states["model"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(contents.states["discriminator"])
        # Copies, since the file, whose memory is mapped, may soon be removed.
        ema, moments = (
            {name: value.to(self.world.device, copy=True) for name, value in contents.states.get(part, {}).items()}
            for part in ("ema", "optimizer")
        )
        if self.ema is not None:
            self.ema.state = ema
        self.optimizer.load_state(moments)
        self.guard = NonFiniteGuard(self.world.device, int(metadata["skipped"]), int(metadata["consecutive"]))
        self.step = int(metadata["step"])

    def save(self) -> None:
        """Starts to write a checkpoint, in the first process."""
        if not self.world.is_main:
            return
        tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in self.network.named_parameters()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.state.items()}
        if self.discriminator is not None:
            tensors |= {f"discriminator/{name}": value for name, value in self.discriminator.named_parameters()}
        tensors |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        counts = {"skipped": str(int(self.guard.skipped)), "consecutive": str(int(self.guard.consecutive))}
        metadata = {**self._provenance(), "network": self.kind, **counts}
        self.checkpointer.save(self.step, tensors, {self.kind: dataclasses.asdict(self.network.config)}, metadata)

    def _stop(self, number: int) -> None:
        """Saves and ends the run after a signal, in all processes after the same step."""
        self.save()
        self.checkpointer.finish()
        self.world.barrier()
        at = f"at step {self.step} of {self.last_step}"
        name = signal.Signals(number).name
        raise Interrupted(f"interrupted by {name} {at}: run the same command again to resume.", number)

    def _save_weights(self, name: str) -> pathlib.Path:
        path = self.config.output / name
        if self.world.is_main:
            state = None if self.ema is None else self.ema.state
            weights_file.save(path, self.network, state, metadata=self._provenance())
        return path

    def _provenance(self) -> dict[str, str]:
        """Returns metadata of a file of weights: the step, and of a model its autoencoder and guidance scale."""
        found = {"step": str(self.step)}
        if self.data.autoencoder:
            found |= {TOKENIZER_DIGEST: self.data.autoencoder, CFG_SCALE: f"{self.config.eval_cfg_scale:g}"}
        return found

    def _summarize(self, weights: pathlib.Path, steps: int, seconds: float, unreadable: int) -> None:
        """Writes the report and says what was trained, for how long, and where everything is."""
        folder, skipped = self.config.output, int(self.guard.skipped)
        facts = describe_run(folder, verify=False)
        unreadable = max(unreadable, facts["unreadable_images"])  # those met before a resume are in the log
        images = counted(self.data.images - unreadable, "image")
        if unreadable:
            images += f" ({unreadable} unreadable)"
        what = f"an autoencoder of {images}"
        if isinstance(self.network, BitDance):
            what = f"a model of {counted(self.network.config.num_classes, 'class')} from {images}"
        took = f", the last {steps}" if steps < self.step else ""
        loss = "" if facts["loss"] is None else f", loss {facts['loss']:.4f}"
        print(
            f"trained {what}: {counted(self.step, 'step')}{f' ({skipped} of them skipped)' if skipped else ''}"
            + (f"{took} in {format_duration(seconds)}" if steps else "")
            + loss
        )
        rows = {"weights": weights}
        if (folder / COMPARISON).exists():
            rows["training images beside samples"] = folder / COMPARISON
        try:
            rows["report"] = write_report(folder, facts)
        except UserError as error:  # the weights are written
            print(f"bitdance: {error}", file=sys.stderr)
        for name, path in rows.items():
            print(f"  {name}: {path}")
        print(f"  {use_command(folder, self.kind, vars(self.config))}", flush=True)

    def _write_comparison(self, is_new: bool) -> None:
        """Writes a grid with a row for each of some classes: training images at the left, samples at the right.

        Args:
            is_new: whether this call has trained; if not, a grid that exists is kept.
        """
        path, pipeline, images = self.config.output / COMPARISON, self.pipeline, self.loader.images
        if not self.world.is_main or pipeline is None or (path.exists() and not is_new):
            return
        present = np.unique(images.labels)[:COMPARED_CLASSES]
        names = [pipeline.classes.label(label) for label in present.tolist()]
        if unnamed := rows_without_names(names):
            print(one_line(f"no font has the names of some rows of {path.name}: {unnamed}"))
        with self._ema_weights(), self.autocast():
            samples = pipeline(present.repeat(COMPARED_IMAGES).tolist(), output="np")
        rows: list[np.ndarray] = []
        for label, sampled in zip(present, np.split(samples, len(present)), strict=True):
            members = np.flatnonzero(images.labels == label)
            readable = np.setdiff1d(members, self.loader.bad_images.indices())
            members = readable if len(readable) else members
            chosen = members[evenly_spaced(len(members), COMPARED_IMAGES)]
            views = [self._view(pipeline, int(index)) for index in chosen]
            views += [np.full_like(views[0], 255)] * (COMPARED_IMAGES + 1 - len(views))  # and a gap
            rows += [*views, *sampled]
        write_png(path, image_grid(np.stack(rows), columns=2 * COMPARED_IMAGES + 1, labels=names, scale=2))

    def _view(self, pipeline: Pipeline, index: int) -> np.ndarray:
        """Returns an image as the network sees it, of a token cache as it is decoded, white if it cannot be read."""
        images, size = self.loader.images, self.config.image_size
        try:
            if isinstance(images, TokenDataset):
                bits = unpack(torch.from_numpy(images.read(index, 0, 0).copy()))
                decoded: np.ndarray = pipeline.decode(grid_from_tokens(bits[None]), output="np")
                return decoded[0]
            return to_array(center_crop(images.read(index), size))
        except UserError:
            return np.full((size, size, 3), 255, np.uint8)

    def _write_preview(self) -> None:
        """Writes samples of fixed classes and noise, or the first images above their reconstructions."""
        if not self.world.is_main:
            return
        labels = None
        with self._ema_weights(), self.autocast(), torch.no_grad():
            if isinstance(self.network, Autoencoder):
                originals = self.loader.load(0).inputs[:PREVIEW_IMAGES]
                decoded = reconstruct(self.network, originals.to(self.world.device)).cpu()
                images, columns = torch.cat([originals, decoded]).numpy(), len(originals)
            else:
                assert self.pipeline is not None
                classes = evenly_spaced(len(self.loader.images.classes), PREVIEW_IMAGES // 2)
                columns = PREVIEW_IMAGES // len(classes)
                images = self.pipeline(classes.repeat(columns).tolist(), output="np")
                labels = [self.pipeline.classes.label(label) for label in classes.tolist()]
        sheet = image_grid(images, columns=columns, labels=labels, scale=2)
        write_png(self.config.output / f"preview-{self.step:07d}.png", sheet)


def _shapes_and_types(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _is_finished(step: int, stored: Mapping[str, Any]) -> bool:
    """Returns whether a run with these stored settings has reached its last step, of all epochs or of `max_steps`."""
    run = stored.get("run")
    last = run.get("last_step") if isinstance(run, dict) else None
    return isinstance(last, int) and step >= last

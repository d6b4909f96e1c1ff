"""The training loop: steps, what is looked at between them, and checkpoints; for an autoencoder as for BitDance."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitdance import __version__
from bitdance.config import TrainConfig
from bitdance.data.token_cache import TokenDataset
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.runtime.atomic_files import atomic_write, make_folder, remove_leftovers
from bitdance.runtime.errors import Interrupted, UserError
from bitdance.runtime.process_group import World, computes_bf16
from bitdance.sampling.image_grid import grid
from bitdance.training import checkpointing
from bitdance.training.checkpointing import Checkpointer
from bitdance.training.evaluation import Evaluation, said
from bitdance.training.loader import Batch, Loader
from bitdance.training.logging import RunLog
from bitdance.training.losses import AutoencoderLoss, BitDanceLoss
from bitdance.training.optimizer import EMA, NonFiniteGuard, build_optimizer
from bitdance.training.preemption import PreemptionHandler
from bitdance.training.schedule import learning_rate
from bitdance.training.throughput import Line, Meter, finite, shown
from bitdance.training.transfer import parts, to_device
from bitdance.training.validation import Validation
from bitdance.weights import weights_file

CONFIG = "config.json"
PREVIEWED = 16
"""Pictures of a preview."""


class Run:
    """One training run: the state that a step changes, and the files that it leaves in `results_dir`.

    Files: `config.json` (all settings), `log.jsonl` (a line every `log_every` steps), `checkpoint-<step>.safetensors`
    (everything that the next step depends on), `preview-<step>.png`, `epoch_<n>.safetensors` (weights that are kept),
    and at the end `model.safetensors` or `autoencoder.safetensors`, the weights alone.

    Args:
        objective: an objective with its network, on the CPU.
        batches: the batches of this process.
        identity: the settings that make this run what it is; a checkpoint of other settings is refused.

    Raises:
        UserError: the folder belongs to another run, or a setting does not fit.
    """

    def __init__(
        self,
        objective: AutoencoderLoss | BitDanceLoss,
        config: TrainConfig,
        batches: Loader,
        world: World,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.batches, self.world, self.identity = config, batches, world, identity
        self.objective = objective.to(world.device)
        if isinstance(objective, BitDanceLoss):
            objective.autoencoder.to(world.device)
        self.network: BitDance | Autoencoder = objective.network
        self.total_steps = config.epochs * batches.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.optimizer = build_optimizer(self.network, config)
        self.ema = EMA(self.network, config.ema) if config.ema > 0 else None
        self.health = NonFiniteGuard(world.device)
        self.step = 0
        self.kind = "model" if isinstance(self.network, BitDance) else "autoencoder"
        local = len(batches.places)
        if local % config.accumulate:
            raise UserError(
                f"--accumulate {config.accumulate} does not divide the {local} images of a process: make "
                "--global-batch-size a multiple of their number times that of the processes."
            )
        autoencoder = identity.get("autoencoder.digest")
        classes = batches.images.classes
        self.validation = Validation(objective, config, classes, world, autoencoder) if config.val_path else None
        self.evaluation = (
            Evaluation(objective, config, batches.images.labels, world, self.in_bf16)
            if config.eval_every and isinstance(objective, BitDanceLoss)
            else None
        )
        self.checkpoints = Checkpointer(config.results_dir, config.keep_checkpoints)
        self._resume()
        self.log: RunLog | None = None
        self.trained: nn.Module = self.objective
        if config.compile and world.device.type == "cuda":
            self.objective.compile()
        if world.size > 1:
            self.trained = nn.parallel.DistributedDataParallel(self.objective, gradient_as_bucket_view=True)

    # ------------------------------------------------------------ steps

    def train(self) -> pathlib.Path:
        """Runs to the last step and returns the path of the finished weights.

        Raises:
            Interrupted: SIGTERM or SIGUSR1 arrived; a checkpoint was written.
            UserError: too many steps in a row were skipped, an image cannot be read, or a file cannot be written.
        """
        self._open_log()
        try:
            with PreemptionHandler(self.world).watched() as interrupts:
                self._steps(interrupts)
                interrupts.close()
                return self._finish()
        finally:
            self.checkpoints.close()
            if self.log is not None:
                self.log.close()

    def _steps(self, interrupts: PreemptionHandler) -> None:
        from tqdm import tqdm

        config = self.config
        if self.world.is_main and self.step == 0 and config.warmup_steps > self.last_step:
            print(
                f"the warm-up (--warmup-steps {config.warmup_steps}) is longer than the run ({self.last_step} steps): "
                "the learning rate stays below --lr."
            )
        self.network.train()
        encodes = not isinstance(self.batches.images, TokenDataset)
        meter = Meter(self.objective, config, self.world, self.health, self.in_bf16, encodes)
        saved = time.monotonic()
        stream = self.batches.stream(self.step, self.last_step)
        with tqdm(
            total=self.last_step, initial=self.step, disable=not self.world.is_main, unit="step", dynamic_ncols=True
        ) as bar:
            for batch, seconds in _timed(stream):
                rate = learning_rate(config, self.step, self.total_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                meter.add(self.one_step(batch), seconds)
                self.step += 1
                bar.update()
                line: Line = {}
                if self._due(config.log_every):
                    line = meter.read() | {"lr": rate, "bad_images": len(self.batches.bad_images)}
                    bar.set_postfix_str(shown(line))
                    self._check_health(batch, int(line.pop("consecutive") or 0))
                with meter.paused():
                    if self.validation is not None and self._due(config.val_every):
                        line["val_loss"] = self._validate(self.validation)
                    if self.evaluation is not None and self._due(config.eval_every):
                        line |= self._evaluate(self.evaluation)
                        if self.world.is_main:
                            bar.write(f"step {self.step}: {said(line)} of {config.eval_images} images")
                    if line and self.log is not None:
                        self.log.write(self.step, self.step / self.batches.steps_per_epoch, line)
                    if self._kept_every and self.step % self._kept_every == 0:
                        epoch = self.step // self.batches.steps_per_epoch
                        self._save_weights(config.results_dir / f"epoch_{epoch}.safetensors")
                    if self._due(config.preview_every):
                        self._preview()
                    # Last: what a resumed run would not make again is there by now.
                    minutes = (time.monotonic() - saved) / 60
                    if self._due(config.save_every) or 0 < config.save_minutes <= minutes:
                        self.save()
                        saved = time.monotonic()
                    if (number := interrupts.agreed()) and self.step < self.last_step:
                        interrupts.close()
                        self._stop(number)

    def one_step(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step and returns its numbers, which the device may not have computed yet: the host never waits."""
        # Dropout is the one thing that torch draws: a function of (seed, step, process), so a resumed run repeats it.
        torch.manual_seed((self.config.global_seed << 31) + self.step * self.world.size + self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        count = self.config.accumulate
        for number, part in enumerate(parts(to_device(batch, self.world.device), count)):
            with self._synced(number == count - 1):
                with self.autocast():
                    loss, metrics = self.trained(part.inputs, part.labels, part.rows, self.step)
                (loss / count).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm or float("inf"))
        skipped = self.health.judge(norm)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network, skipped)
        numbers = {name: value / count for name, value in sums.items()} | {"grad_norm": norm}
        return {name: torch.where(skipped > 0, 0.0, value) for name, value in numbers.items()}

    def _synced(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Has processes exchange gradients only after the last part of a batch."""
        if last or not isinstance(self.trained, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.trained.no_sync()

    @property
    def in_bf16(self) -> bool:
        """Whether matrix products are computed in bf16."""
        precision = self.config.mixed_precision
        return precision == "bf16" or (precision == "auto" and computes_bf16(self.world.device))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of a step's forward pass."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.in_bf16)

    def _check_health(self, batch: Batch, consecutive: int) -> None:
        """Stops the run, with the batch in a file, where too many steps in a row were skipped."""
        if not 0 < self.config.max_skipped <= consecutive:
            return
        part = f"-{self.world.rank}" if self.world.size > 1 else ""
        path = self.config.results_dir / f"bad-batch-{self.step}{part}.safetensors"
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        weights_file.save_tensors(path, tensors, "batch", {}, step=str(self.step))
        self.checkpoints.finish()
        self.world.barrier()  # or the first process that ends would end the others before they have written theirs
        raise UserError(
            f"the gradients were not finite in {consecutive} steps in a row, up to step {self.step}: its batch is in "
            f"{path}; lower --lr, or train with --mixed-precision none."
        )

    def _due(self, *intervals: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) happens after this one."""
        return self.step == self.last_step or any(every and self.step % every == 0 for every in intervals)

    @property
    def _kept_every(self) -> int:
        return self.config.keep_epochs * self.batches.steps_per_epoch

    def _validate(self, validation: Validation) -> float | None:
        with self._averaged(), self.autocast():
            return finite(validation.loss().item())

    def _evaluate(self, evaluation: Evaluation) -> Line:
        with self._averaged():
            return evaluation.figures()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network as it is looked at: with the EMA's weights, where there is one, in evaluation mode."""
        self.network.eval()
        try:
            with self.ema.swapped_in(self.network) if self.ema is not None else contextlib.nullcontext():
                yield
        finally:
            self.network.train()

    # ------------------------------------------------------------ files

    def _open_log(self) -> None:
        """Makes the folder, with all settings in it; nothing is written before."""
        config = self.config
        make_folder(config.results_dir)
        if self.world.is_main:
            remove_leftovers(config.results_dir)
            settings = self._write_settings()
            self.log = RunLog(config.results_dir, self.step, config.tensorboard, config.wandb, settings)

    def _write_settings(self) -> dict[str, Any]:
        """Writes all settings, those of the run and what follows from them."""
        settings = {
            "version": __version__,
            "kind": self.kind,
            "steps_per_epoch": self.batches.steps_per_epoch,
            "total_steps": self.total_steps,
            "last_step": self.last_step,
            "processes": self.world.size,
            "device": self.world.device.type,
            "run": dataclasses.asdict(self.config),
            self.kind: dataclasses.asdict(self.network.config),
            **{name: value for name, value in self.identity.items() if not name.startswith(("run.", f"{self.kind}."))},
        }
        text = json.dumps(settings, indent=1, default=str)
        with atomic_write(self.config.results_dir / CONFIG) as path:
            path.write_text(text + "\n")
        return json.loads(text)

    def _preview(self) -> None:
        """Pictures of fixed classes with fixed noise, or the first images beside their reconstructions."""
        if not self.world.is_main:
            return
        device = self.world.device
        if self.kind == "autoencoder":
            batch = self.batches.load(0)
            images, labels = batch.inputs[:PREVIEWED].to(device), batch.labels[:PREVIEWED].to(device)
            columns = len(labels)
        else:
            classes = len(self.batches.images.classes)
            labels = torch.arange(PREVIEWED, device=device) * classes // PREVIEWED
            images, columns = torch.empty(0), PREVIEWED // 2
        with self._averaged(), self.autocast(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype")  # norms of bf16 with float32 weights are slow, no more
            pictures = self.objective.preview(images, labels, self.network)  # type: ignore[arg-type]
        with atomic_write(self.config.results_dir / f"preview-{self.step:07d}.png") as path:
            grid(pictures.cpu().numpy(), columns=columns, scale=2).save(path, format="PNG")

    def save(self) -> None:
        """Begins to write everything that the next step depends on; one process does."""
        if not self.world.is_main:
            return
        tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in self.network.named_parameters()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.state.items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        config = {self.kind: dataclasses.asdict(self.network.config), "run": self.identity}
        metadata = self._provenance() | {
            "trains": self.kind,
            "skipped": str(int(self.health.skipped)),
            "consecutive": str(int(self.health.consecutive)),
        }
        self.checkpoints.save(self.step, tensors, config, metadata)

    def _stop(self, number: int) -> None:
        """Ends the run for now, in all processes after the same step."""
        self.save()
        self.checkpoints.finish()
        self.world.barrier()
        raise Interrupted(
            f"interrupted by {signal.Signals(number).name} at step {self.step} of {self.last_step}: run the same "
            "command again to go on.",
            number,
        )

    def _resume(self) -> None:
        """Goes on from the newest checkpoint that is whole; which one that is, the first process says."""
        contents = checkpointing.newest(self.config.results_dir) if self.world.is_main else None
        path = self.world.broadcast(contents.path if contents else None)
        if path is None:
            return
        if contents is None:
            contents = weights_file.read(path)
        stored = (contents.config or {}).get("run", {})
        ours = json.loads(json.dumps(self.identity))
        if stored != ours:
            keys = sorted(key for key in stored.keys() | ours.keys() if stored.get(key) != ours.get(key))
            changes = "; ".join(f"{key} was {stored.get(key)}, is {ours.get(key)}" for key in keys)
            raise UserError(
                f"{path} belongs to another run ({changes}): continue with its settings or choose another folder."
            )

        def own(value: Tensor) -> Tensor:
            return value.to(self.world.device, copy=True)  # the file that it maps may soon be removed

        self.network.load_state_dict(contents.states["model"])
        if self.ema is not None:
            self.ema.state = {name: own(value) for name, value in contents.states["ema"].items()}
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter] = {
                key: own(contents.states["optimizer"][f"{key}/{name}"]) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        metadata = contents.metadata
        self.health = NonFiniteGuard(self.world.device, int(metadata["skipped"]), int(metadata["consecutive"]))
        self.step = int(metadata["step"])

    def _finish(self) -> pathlib.Path:
        path = self.config.results_dir / f"{self.kind}.safetensors"
        self._save_weights(path)
        self.checkpoints.finish()
        if self.world.is_main:
            skipped = int(self.health.skipped)
            print(f"{self.step} steps{f', {skipped} of them skipped' if skipped else ''}: {path}")
        self.world.barrier()
        return path

    def _save_weights(self, path: pathlib.Path) -> None:
        if self.world.is_main:
            state = None if self.ema is None else self.ema.state
            weights_file.save(path, self.network, state, metadata=self._provenance())

    def _provenance(self) -> dict[str, str]:
        """What the file of a model says of its making: the step, and which autoencoder made its tokens."""
        autoencoder = self.identity.get("autoencoder.digest")
        return {"step": str(self.step)} | ({"autoencoder_digest": autoencoder} if autoencoder else {})


def _timed(stream: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """The batches, each with the seconds that were spent waiting for it."""
    while True:
        start = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start

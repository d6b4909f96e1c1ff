"""The training loop: steps, logs, previews and checkpoints; the same for an autoencoder and for BitDance."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitdance import checkpoint
from bitdance.autoencoder import Autoencoder
from bitdance.config import RunConfig
from bitdance.distributed import World, computes_bf16
from bitdance.errors import UserError
from bitdance.files import atomic_write
from bitdance.model import BitDance
from bitdance.pictures import grid
from bitdance.training.batches import Batch, Batches
from bitdance.training.objectives import AutoencoderObjective, BitDanceObjective
from bitdance.training.optimizer import EMA, build_optimizer
from bitdance.training.schedule import learning_rate

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


class Run:
    """One training run: the state that a step changes, and the files that it leaves in `results_dir`.

    Files: `log.jsonl` (a line every `log_every` steps), `checkpoint.safetensors` (everything that the next step depends
    on), `preview-<step>.png`, and at the end `model.safetensors` or `autoencoder.safetensors`, the weights alone.

    Args:
        objective: an objective with its network, on the CPU.
        batches: the batches of this process.
        identity: the settings that make this run what it is; a checkpoint of other settings is refused.
    """

    def __init__(
        self,
        objective: AutoencoderObjective | BitDanceObjective,
        config: RunConfig,
        batches: Batches,
        world: World,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.batches, self.world, self.identity = config, batches, world, identity
        self.objective = objective.to(world.device)
        if isinstance(objective, BitDanceObjective):
            objective.autoencoder.to(world.device)
        self.network: BitDance | Autoencoder = objective.network
        self.total_steps = config.epochs * batches.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.optimizer = build_optimizer(self.network, config)
        self.ema = EMA(self.network, config.ema) if config.ema > 0 else None
        self.step = 0
        self.kind = "model" if isinstance(self.network, BitDance) else "autoencoder"
        self._resume()
        self.trained: nn.Module = self.objective
        if config.compile and world.device.type == "cuda":
            self.objective.compile()
        if world.size > 1:
            self.trained = nn.parallel.DistributedDataParallel(self.objective, gradient_as_bucket_view=True)

    # ------------------------------------------------------------ steps

    def train(self) -> pathlib.Path:
        """Runs to the last step and returns the path of the finished weights.

        Raises:
            UserError: the loss is not finite, an image cannot be read, or a file cannot be written.
        """
        from tqdm import tqdm

        config = self.config
        self.network.train()
        sums: dict[str, Tensor] = {}
        since, waited, mark = self.step, 0.0, time.perf_counter()
        stream = self.batches.stream(self.step, self.last_step)
        with tqdm(
            total=self.last_step, initial=self.step, disable=not self.world.is_main, unit="step", dynamic_ncols=True
        ) as bar:
            for batch, seconds in _timed(stream):
                waited += seconds
                rate = learning_rate(config, self.step, self.total_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                for name, value in self._one_step(batch).items():
                    sums[name] = sums[name] + value if name in sums else value
                self.step += 1
                bar.update()
                if not self._due(config.log_every, config.save_every, self._kept_every, config.preview_every):
                    continue
                # In all processes, and before anything is written that a number which is not finite would spoil.
                line = self._mean(sums, self.step - since)
                if self._due(config.log_every):
                    now = time.perf_counter()
                    line |= {
                        "lr": rate,
                        "images_per_second": (self.step - since) * config.global_batch_size / (now - mark),
                        "waiting": waited / (now - mark),
                        "broken_images": len(self.batches.broken),
                    }
                    self._log(line)
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
                    sums, since, waited, mark = {}, self.step, 0.0, now
                self._save_sometimes(batch)
        return self._finish()

    def _one_step(self, batch: Batch) -> dict[str, Tensor]:
        device = self.world.device
        # Dropout is the one thing that torch draws: a function of (seed, step, process), so a resumed run repeats it.
        torch.manual_seed((self.config.global_seed << 31) + self.step * self.world.size + self.world.rank)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss, metrics = self.trained(
                batch.inputs.to(device), batch.labels.to(device), batch.rows.to(device), self.step
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm or float("inf"))
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network)
        return {"loss": loss.detach(), "grad_norm": norm, **metrics}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        precision = self.config.mixed_precision
        enabled = precision == "bf16" or (precision == "auto" and computes_bf16(self.world.device))
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _mean(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        values = self.world.mean(torch.stack([value.float() for value in sums.values()]) / steps)
        means = dict(zip(sums, values.tolist(), strict=True))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                raise UserError(
                    f"{name} is not finite by step {self.step}: lower --lr, or train with --mixed-precision none."
                )
        return means

    def _due(self, *intervals: int) -> bool:
        """Whether something that happens every so many steps (0: only at the end) happens after this one."""
        return self.step == self.last_step or any(every and self.step % every == 0 for every in intervals)

    @property
    def _kept_every(self) -> int:
        return self.config.keep_epochs * self.batches.steps_per_epoch

    # ------------------------------------------------------------ files

    def _log(self, line: dict[str, float]) -> None:
        if not self.world.is_main:
            return
        entry = {"step": self.step, "epoch": self.step / self.batches.steps_per_epoch, **line, "time": time.time()}
        path = self.config.results_dir / LOG
        try:
            with open(path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; free some space, then run the command again.") from error

    def _save_sometimes(self, batch: Batch) -> None:
        config = self.config
        if not self.world.is_main:
            return
        if self._kept_every and self.step % self._kept_every == 0:
            epoch = self.step // self.batches.steps_per_epoch
            self._save_weights(config.results_dir / f"epoch_{epoch}.safetensors")
        if self._due(config.preview_every):
            self._preview(batch)
        if self._due(config.save_every):
            self.save()  # last: what a resumed run would not make again is there by now

    def _preview(self, batch: Batch) -> None:
        device, count = self.world.device, min(16, len(batch.labels))
        inputs, labels = batch.inputs[:count].to(device), batch.labels[:count].to(device)
        pictures = self.objective.preview(inputs, labels, self._averaged())  # type: ignore[arg-type]
        columns = count if self.kind == "autoencoder" else max(1, count // 2)
        with atomic_write(self.config.results_dir / f"preview-{self.step:07d}.png") as path:
            grid(pictures.cpu().numpy(), columns=columns, scale=2).save(path, format="PNG")

    def _averaged(self) -> BitDance | Autoencoder:
        """The network to look at: with the EMA's weights, where there is one; in evaluation mode."""
        network = copy.deepcopy(self.network).eval()
        if self.ema is not None:
            network.load_state_dict(self.ema.state)
        return network

    def save(self) -> None:
        """Writes everything that the next step depends on, atomically."""
        tensors = {f"model/{name}": value.detach() for name, value in self.network.named_parameters()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.ema.state.items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        config = {self.kind: dataclasses.asdict(self.network.config), "run": self.identity}
        checkpoint.save_tensors(
            self.config.results_dir / CHECKPOINT, tensors, "training", config, trains=self.kind, **self._provenance()
        )

    def _resume(self) -> None:
        path = self.config.results_dir / CHECKPOINT
        if not path.exists():
            return
        contents = checkpoint.read(path)
        stored = (contents.config or {}).get("run", {})
        ours = json.loads(json.dumps(self.identity))
        if stored != ours:
            keys = sorted(key for key in stored.keys() | ours.keys() if stored.get(key) != ours.get(key))
            changes = "; ".join(f"{key} was {stored.get(key)}, is {ours.get(key)}" for key in keys)
            raise UserError(
                f"{path} belongs to another run ({changes}): continue with its settings or choose another folder."
            )
        device = self.world.device
        self.network.load_state_dict(contents.states["model"])
        if self.ema is not None:
            self.ema.state = {name: value.to(device) for name, value in contents.states["ema"].items()}
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter] = {
                key: contents.states["optimizer"][f"{key}/{name}"].to(device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step = int(contents.metadata["step"])
        if self.world.is_main:
            self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Drops the lines of the log that the resumed run is about to write again."""
        path = self.config.results_dir / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def _finish(self) -> pathlib.Path:
        path = self.config.results_dir / f"{self.kind}.safetensors"
        if self.world.is_main:
            self._save_weights(path)
            print(f"{self.step} steps: {path}")
        self.world.barrier()
        return path

    def _save_weights(self, path: pathlib.Path) -> None:
        state = None if self.ema is None else self.ema.state
        checkpoint.save(path, self.network, state, metadata=self._provenance())

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

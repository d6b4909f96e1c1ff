"""Networks, pictures and command lines that are small enough for tests of whole commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bitdance.cli import original_cli
from bitdance.cli.main import main
from bitdance.config import AutoencoderConfig, BitDanceConfig, SamplingDefaults
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.sampling import pipeline, sampler
from bitdance.training import trainer
from bitdance.training.loader import Loader
from bitdance.training.train_config import TrainConfig
from bitdance.weights import weights_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHERS = {
    "sample_ddp.py": original_cli.sample,
    "sample_ddp_parallel.py": original_cli.sample_parallel,
    "train.py": original_cli.train,
    "train_parallel.py": original_cli.train_parallel,
}
NETWORK = AutoencoderConfig(widths=(32, 32, 32), blocks=1, bits=8)  # 4 x 4 pixels per token
SIZES = {"dim": 64, "n_layer": 2, "head_dim": 64, "head_layers": 2, "head_ada_ln": 1, "cls_token_num": 2}
PREVIEWS = SamplingDefaults(cfg_scale=2.0, num_steps=1)  # since every training run writes one
SERVER = multiprocessing.get_context("forkserver")
"""Forks processes that have imported torch already; there is only one such server."""
SERVER.set_forkserver_preload(["pytest", "bitdance.training.setup", "bitdance.sampling.job", "torch._dynamo", "tqdm"])


def randomize(network: nn.Module, seed: int) -> None:
    """Weights of a size that makes every input matter: fresh networks start with zeros in the wrong places for that."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.dim() == 1:
                parameter.add_(1.0)


def autoencoder(seed: int = 0, config: AutoencoderConfig = NETWORK) -> Autoencoder:
    network = Autoencoder(config)
    randomize(network, seed)
    return network.eval()


def model(seed: int = 1, **changes: object) -> BitDance:
    network = BitDance(BitDanceConfig(**{**SIZES, "grid": 4, "bits": 8, "num_classes": 3, **changes}))  # type: ignore[arg-type]
    randomize(network, seed)
    return network.eval()


def save_pair(folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """Writes model.safetensors and autoencoder.safetensors and returns the model's path."""
    weights_file.save(folder / "model.safetensors", model(**changes))
    weights_file.save(folder / "autoencoder.safetensors", autoencoder())
    return folder / "model.safetensors"


def pictures(folder: pathlib.Path, classes: int = 3, each: int = 4, side: int = 16) -> pathlib.Path:
    """A folder of class folders: a colour a class, with a bright square at a place of each picture's own."""
    for label in range(classes):
        (folder / f"class-{label}").mkdir(parents=True)
        for number in range(each):
            pixels = np.full((side, side, 3), 60, np.uint8)
            pixels[..., label % 3] = 180
            pixels[number : number + side // 3, 2 * number : 2 * number + side // 3] = 250
            Image.fromarray(pixels).save(folder / f"class-{label}" / f"{number}.png")
    return folder


def train_config(data_path: pathlib.Path, output: pathlib.Path, **changes: Any) -> TrainConfig:
    """Settings of a training run on `pictures`, with 3 steps per epoch."""
    settings: dict[str, Any] = {
        "image_size": 16, "epochs": 4, "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "decay_start": 0, "ema": 0.9,
        "precision": "fp32", "num_workers": 2, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(data_path, output, **{**settings, **changes})


def image_indices(batches: Loader, step: int) -> list[int]:
    """The images of a process in a step if none is unreadable."""
    epoch, batch = divmod(step, batches.steps_per_epoch)
    positions = batch * batches.config.batch_size + batches.indices.numpy()
    return batches._draws(epoch)[0][positions].tolist()


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def start(
    folder: pathlib.Path, arguments: Sequence[str], size: int = 1, prepare: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """Starts `bitdance` in processes without a launcher; their output is in the files out<rank> and err<rank>."""
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(size):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = zip(names, map(str, (rank, size, rank, size, "127.0.0.1", port)), strict=True)
        variables = dict(values) if size > 1 else {}
        processes.append(SERVER.Process(target=_run, args=(folder, arguments, rank, variables, prepare), daemon=True))
        processes[-1].start()
    return processes


def _run(folder: pathlib.Path, arguments: Sequence[str], rank: int, variables: dict[str, str], prepare: Any) -> None:
    os.environ.update(variables)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    trainer.PREVIEW_SAMPLING = PREVIEWS
    if prepare is not None:
        prepare()
    main([*arguments, "--threads", "1"])


def published_commands(document: str) -> dict[str, str]:
    """The five commands of docs/sampling.md or docs/training.md, by the names of their models."""
    text = (ROOT / "docs" / f"{document}.md").read_text()
    return dict(re.findall(r"^BitDance-(\S+):\n```shell\n(.*?)```$", text, re.DOTALL | re.MULTILINE))


def slurm_scripts() -> list[str]:
    """The batch scripts of docs/training.md: for one machine, and for several."""
    return re.findall(
        r"^```shell\n(#!/bin/bash\n.*?)```$", (ROOT / "docs" / "training.md").read_text(), re.DOTALL | re.M
    )


def script_and_arguments(text: str) -> tuple[str, list[str]]:
    """The script of a command under torchrun and its arguments, the way a shell would hand them over."""
    settings, command = text.strip().split("\n\n")
    for line in settings.splitlines():
        name, value = line.split("=")
        command = command.replace(f"${name}", value)
    words = shlex.split(command.replace("\\\n", ""))
    script = next(word for word in words if word.endswith(".py"))
    return script, words[words.index(script) + 1 :]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """The variables of a command that a test runs: one thread, no GPU, no process group, this checkout's package."""
    others = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**others, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(*command: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a Python script of the checkout as users do, on one thread a process; more processes under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    result = subprocess.run(
        [sys.executable, *torchrun, *map(str, command)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def run_forked(function: Callable[[], object], size: int) -> None:
    """Calls a function in `size` forked processes with the environment of torchrun, which takes longer to start."""
    port = str(free_port())

    def call(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=port)
        function()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size


def limit_memory(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Sequence[int]], bool]) -> None:
    """Has sampling run out of memory for batches of certain sample ids."""

    def sample_noise(model: BitDance, seed: int, ids: torch.Tensor, draws: int) -> sampler.NoiseFn:
        if fails(ids.tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sampler.sample_noise(model, seed, ids, draws)

    monkeypatch.setattr(pipeline, "sample_noise", sample_noise)

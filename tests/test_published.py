"""The published commands, as docs/sampling.md shows them, on files in the released layout under the released names."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator

import numpy as np
import pytest
import small
import torch

from bitdance import checkpoint
from bitdance.autoencoder import Autoencoder
from bitdance.cli import original
from bitdance.config import ZOO, AutoencoderConfig
from bitdance.model import BitDance

NAMES = ("B-1X", "B-4X", "B-16X", "L-1X", "H-1X")
MODELS = pathlib.Path("models/BitDance-ImageNet")
LESS = ["--num-fid-samples", "2", "--per-proc-batch-size", "1", "--sample-steps", "2"]


def check_result(folder: pathlib.Path, name: str, side: int) -> None:
    """One .npz and the logs, of two images that are pictures, under the name of what they were made with."""
    (path,) = (path for path in folder.iterdir() if path.suffix not in (".log", ".json"))
    release = ZOO[name]
    stem = pathlib.Path(release.file).stem
    begin = f"{stem}-ema-{release.config.parallel_num}x-size-{side}-steps-2-cfg-{release.cfg_scale:g}-seed-99-bf16-n-2-"
    assert path.name.startswith(begin) and path.suffix == ".npz"
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (2, side, side, 3) and images.dtype == np.uint8
    assert labels.shape == (2,) and labels.dtype == np.int64 and labels[0] != labels[1]
    assert all(len(np.unique(image)) > 20 for image in images) and not np.array_equal(*images)


def test_docs_show_the_command_of_each_released_model():
    assert tuple(small.published_commands()) == tuple(ZOO) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_commands_run_on_stand_ins(tmp_path, monkeypatch, capsys, name):
    """The whole job in this process, on small networks that pass for the released ones."""
    release = ZOO[name]
    network = small.model(bits=32, num_classes=1000, parallel_num=release.config.parallel_num)
    autoencoder = small.autoencoder(config=AutoencoderConfig(widths=(32, 32, 32), blocks=1))
    (tmp_path / MODELS).mkdir(parents=True)
    checkpoint.save_released(tmp_path / MODELS / release.file, network)
    checkpoint.save_released(tmp_path / MODELS / "ae_d16c32.pt", autoencoder)
    monkeypatch.setitem(original.SIZES, release.family, network.config)
    monkeypatch.chdir(tmp_path)
    script, arguments = small.script_and_arguments(small.published_commands()[name])
    small.LAUNCHERS[script]([*arguments, *LESS])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["images"] == facts["made"] == 2 and pathlib.Path(facts["result"]).parent == pathlib.Path("results")
    check_result(tmp_path / "results", name, side=16)


@contextlib.contextmanager
def released(path: pathlib.Path, network: BitDance | Autoencoder) -> Iterator[None]:
    """A file of the released layout, for as long as it is used: random weights for a network on the meta device."""
    small.randomize(network.to_empty(device="cpu"), seed=1)
    checkpoint.save_released(path, network)
    network.to("meta")
    try:
        yield
    finally:
        path.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_commands_run_word_for_word_on_networks_of_the_released_sizes(tmp_path):
    """Under torchrun and bash, with two processes instead of eight, a free port, and smaller counts at the end.

    One test, so that the five need the memory and the disk of one at a time, whatever runs in parallel.
    """
    for script in ("sample_ddp.py", "sample_ddp_parallel.py"):
        shutil.copy(small.ROOT / script, tmp_path)
    (tmp_path / MODELS).mkdir(parents=True)
    environment = small.environment()
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    with torch.device("meta"):
        networks: dict[str, BitDance | Autoencoder] = {name: BitDance(release.config) for name, release in ZOO.items()}
        autoencoder = Autoencoder(AutoencoderConfig())
    with released(tmp_path / MODELS / "ae_d16c32.pt", autoencoder):
        for name, command in small.published_commands().items():
            assert command.count("--nproc_per_node=8") == command.count("--master_port=12345") == 1
            command = command.replace("--nproc_per_node=8", "--nproc_per_node=2").replace("12345", str(free_port()))
            with released(tmp_path / MODELS / ZOO[name].file, networks.pop(name)):
                done = subprocess.run(
                    ["bash", "-c", " ".join([command.rstrip(), *LESS])],
                    cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000,
                )  # fmt: skip
            assert done.returncode == 0, f"{name}: {done.stderr}"
            facts = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {facts['seconds']:.0f} s, {facts['peak_memory'] / 1e9:.2f} GB")
            assert (facts["images"], facts["made"], facts["processes"]) == (2, 1, 2)
            check_result(tmp_path / "results", name, side=256)
            shutil.rmtree(tmp_path / "results")

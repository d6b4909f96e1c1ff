"""The published commands, as docs/sampling.md and docs/training.md show them, with files in the released layout."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator

import numpy as np
import pytest
import small
import torch
from PIL import Image

from bitdance.cli import original_cli
from bitdance.config import MODEL_SIZES, RELEASED_MODELS, AutoencoderConfig, BitDanceConfig
from bitdance.models.autoencoder import Autoencoder
from bitdance.models.transformer import BitDance
from bitdance.weights import network_config, torch_files, weights_file

NAMES = ("B-1X", "B-4X", "B-16X", "L-1X", "H-1X")
MODELS = pathlib.Path("models/BitDance-ImageNet")
LESS = ["--num-fid-samples", "2", "--per-proc-batch-size", "1", "--sample-steps", "2"]
SHORTER = [
    "--global-batch-size", "2", "--max-steps", "2", "--warmup-steps", "1", "--num-workers", "1", "--log-every", "1",
]  # fmt: skip
SMALLER = ["--model", "BitDance-Tiny", "--image-size", "64", "--cls-token-num", "2"]
TINY = AutoencoderConfig(widths=(32,) * 5, blocks=1)  # 32 bits for 16 x 16 pixels, as the released one


def check_result(folder: pathlib.Path, name: str, side: int) -> None:
    """Checks for one .npz of two different images, named after its settings, and logs."""
    (path,) = (path for path in folder.iterdir() if path.suffix not in (".log", ".json"))
    release = RELEASED_MODELS[name]
    stem, p, scale = pathlib.Path(release.file).stem, release.config.parallel_num, release.sampling.cfg_scale
    begin = f"{stem}-ema-{p}x-size-{side}-steps-2-cfg-{scale:g}-seed-99-bf16-n-2-"
    assert path.name.startswith(begin) and path.suffix == ".npz"
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (2, side, side, 3) and images.dtype == np.uint8
    assert labels.shape == (2,) and labels.dtype == np.int64 and labels[0] != labels[1]
    assert all(len(np.unique(image)) > 20 for image in images) and not np.array_equal(*images)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_commands_run_on_small_networks(tmp_path, monkeypatch, capsys, name):
    """In this process, with small networks in files of the released names."""
    release = RELEASED_MODELS[name]
    network = small.model(bits=32, num_classes=1000, parallel_num=release.config.parallel_num)
    autoencoder = small.autoencoder(config=AutoencoderConfig(widths=(32, 32, 32), blocks=1))
    (tmp_path / MODELS).mkdir(parents=True)
    torch_files.save_released(tmp_path / MODELS / release.file, network)
    torch_files.save_released(tmp_path / MODELS / "ae_d16c32.pt", autoencoder)
    monkeypatch.setitem(original_cli.MODEL_SIZES, release.family, network.config)
    monkeypatch.chdir(tmp_path)
    script, arguments = small.script_and_arguments(small.published_commands("sampling")[name])
    small.LAUNCHERS[script]([*arguments, *LESS])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["images"] == facts["sampled"] == 2 and pathlib.Path(facts["result"]).parent == pathlib.Path("results")
    check_result(tmp_path / "results", name, side=16)


@contextlib.contextmanager
def released(path: pathlib.Path, network: BitDance | Autoencoder) -> Iterator[None]:
    """Writes a file of the released layout, with random weights for a network on the meta device, and removes it."""
    small.randomize(network.to_empty(device="cpu"), seed=1)
    torch_files.save_released(path, network)
    network.to("meta")
    try:
        yield
    finally:
        path.unlink()


def run_in_bash(command: str, more: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs a published command, with more arguments at its end, in a folder that holds the scripts."""
    for script in small.LAUNCHERS:
        shutil.copy(small.ROOT / script, folder)
    environment = small.environment()
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", " ".join([command.rstrip(), *more])],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip


@pytest.fixture
def much_memory(tmp_path_factory) -> Iterator[None]:
    """Lets one test run at a time, among all workers."""
    with open(tmp_path_factory.getbasetemp().parent / "much-memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
def test_sampling_commands_run_word_for_word_on_networks_of_the_released_sizes(tmp_path):
    """Under torchrun and bash, with two processes instead of eight, a free port, and smaller counts at the end.

    One test for all models, so that the autoencoder is written once.
    """
    (tmp_path / MODELS).mkdir(parents=True)
    with torch.device("meta"):
        networks: dict[str, BitDance | Autoencoder] = {
            name: BitDance(release.config) for name, release in RELEASED_MODELS.items()
        }
        autoencoder = Autoencoder(AutoencoderConfig())
    with released(tmp_path / MODELS / "ae_d16c32.pt", autoencoder):
        for name, command in small.published_commands("sampling").items():
            assert command.count("--nproc_per_node=8") == command.count("--master_port=12345") == 1
            command = command.replace("--nproc_per_node=8", "--nproc_per_node=2").replace(
                "12345", str(small.free_port())
            )
            with released(tmp_path / MODELS / RELEASED_MODELS[name].file, networks.pop(name)):
                done = run_in_bash(command, LESS, tmp_path)
            assert done.returncode == 0, f"{name}: {done.stderr}"
            facts = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {facts['seconds']:.0f} s, {facts['peak_memory'] / 1e9:.2f} GB")
            assert (facts["images"], facts["sampled"], facts["processes"]) == (2, 1, 2)
            check_result(tmp_path / "results", name, side=256)
            shutil.rmtree(tmp_path / "results")


# ------------------------------------------------------------ training


def make_photographs(folder: pathlib.Path) -> None:
    """Writes 12 JPEGs of 300 x 280 px in three of ImageNet's class folders."""
    draw = np.random.default_rng(0)
    for wordnet_id in ("n01440764", "n02099601", "n04612504"):
        (folder / wordnet_id).mkdir(parents=True)
        for number in range(4):
            blotches = Image.fromarray(draw.integers(0, 256, (7, 8, 3), np.uint8))
            image = blotches.resize((300, 280), Image.Resampling.BICUBIC)
            image.save(folder / wordnet_id / f"{wordnet_id}_{number}.JPEG")


def filled_in(command: str, images: pathlib.Path, processes: int) -> str:
    """Returns a published training command for one machine, with these images and a free port."""
    for published, ours in {
        "/path/to/imagenet/train/": f"{images}/",
        "--nproc_per_node=8": f"--nproc_per_node={processes}",
        "--master_addr=...": "--master_addr=127.0.0.1",
        "--node_rank=...": "--node_rank=0",
        "--master_port=12345": f"--master_port={small.free_port()}",
        "--nnodes=...": "--nnodes=1",
    }.items():
        assert command.count(published) == 1
        command = command.replace(published, ours)
    return command


def check_run(folder: pathlib.Path, name: str, config: BitDanceConfig, processes: int) -> None:
    """Checks the files of a finished run of two steps, its settings, and the configuration of its model."""
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-0000002.safetensors", "log.jsonl", "model.safetensors", "preview-0000002.png", "report.html",
        "samples.png", "settings.json",
    ]  # fmt: skip
    settings = json.loads((folder / "settings.json").read_text())
    train, run = settings["train"], settings["run"]
    assert (train["epochs"], train["lr"], train["ema"], train["batch_size"]) == (800, 6e-4, 0.9999, 2)
    assert settings["loss"]["perturb_rate"] == RELEASED_MODELS[name].perturb_rate
    assert (run["steps_per_epoch"], run["total_steps"], run["last_step"]) == (6, 4800, 2)
    assert run["processes"] == processes
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["lr"], line["skipped"]) for line in lines] == [(1, 0.0, 0), (2, 6e-4, 0)]
    assert all(0 < line["loss"] < 10 and line["grad_norm"] > 0 for line in lines)
    state = weights_file.read(folder / "checkpoint-0000002.safetensors")
    assert set(state.states) == {"model", "ema", "optimizer"} and state.metadata["step"] == "2"
    found = network_config.describe_model(weights_file.read(folder / "model.safetensors")).config
    assert len(found.class_names) == 1000 and found.class_names[1] == "n01443537"
    assert dataclasses.replace(found, class_names=()) == config


def smaller(name: str) -> BitDanceConfig:
    """Returns the configuration of a released model after SMALLER."""
    parallel_num = RELEASED_MODELS[name].config.parallel_num
    return dataclasses.replace(MODEL_SIZES["BitDance-Tiny"], parallel_num=parallel_num, grid=4, cls_token_num=2)


def results(name: str) -> str:
    return f"results_bitdance_{name.lower().replace('-', '_')}"


@pytest.mark.usefixtures("quick_previews")
@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])])
def test_training_commands_run_with_a_small_model(tmp_path, monkeypatch, name):
    """In this process, with a tiny model and small images, where L-1X and H-1X are B-1X with another `perturb_rate`."""
    make_photographs(tmp_path / "train")
    (tmp_path / MODELS).mkdir(parents=True)
    torch_files.save_released(tmp_path / MODELS / "ae_d16c32.pt", small.autoencoder(config=TINY))
    monkeypatch.chdir(tmp_path)
    command = filled_in(small.published_commands("training")[name], pathlib.Path("train"), 1)
    script, arguments = small.script_and_arguments(command)
    small.LAUNCHERS[script]([*arguments, *SHORTER, *SMALLER])
    check_run(tmp_path / results(name), name, smaller(name), 1)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_command_runs_word_for_word(tmp_path, processes):
    """Under bash and torchrun; the other commands reach their scripts in the same way."""
    make_photographs(tmp_path / "train")
    (tmp_path / MODELS).mkdir(parents=True)
    torch_files.save_released(tmp_path / MODELS / "ae_d16c32.pt", small.autoencoder(config=TINY))
    command = filled_in(small.published_commands("training")["B-4X"], tmp_path / "train", processes)
    done = run_in_bash(command, [*SHORTER, *SMALLER], tmp_path)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path / results("B-4X"), "B-4X", smaller("B-4X"), processes)


def free_memory() -> float:
    """Returns the GB of memory that are available without swapping, 0 if unknown."""
    path = pathlib.Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable")), 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("name", "gigabytes"), [("B-1X", 16), ("B-16X", 16), ("L-1X", 28), ("H-1X", 50)])
def test_training_commands_run_word_for_word_on_networks_of_the_released_sizes(tmp_path, name, gigabytes):
    """Two steps of two images from random weights, with an autoencoder of the released size.

    One process, to save memory; the test above has two.
    """
    if free_memory() < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory")
    make_photographs(tmp_path / "train")
    (tmp_path / MODELS).mkdir(parents=True)
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig())
    command = filled_in(small.published_commands("training")[name], tmp_path / "train", 1)
    with released(tmp_path / MODELS / "ae_d16c32.pt", autoencoder):
        done = run_in_bash(command, SHORTER, tmp_path)
    assert done.returncode == 0, done.stderr
    check_run(tmp_path / results(name), name, RELEASED_MODELS[name].config, 1)
    shutil.rmtree(tmp_path / results(name))

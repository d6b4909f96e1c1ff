"""The command line: help, errors in words of the command, and `bitdance info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
import small
import torch

from bitdance.cli.info import _released_as
from bitdance.cli.main import main
from bitdance.config import RELEASED_MODELS, AutoencoderConfig
from bitdance.weights import safetensors_files, weights_file

# ---------------------------------------------------------------- bitdance info

ARGS = argparse.Namespace(parallel_mode="patch", time_shift=2.0, lr=6e-4, betas=(0.9, 0.95), trained_vae=None)


@pytest.fixture
def info(capsys):
    """Runs `bitdance info` and returns its output."""

    def run(path: object, *flags: str) -> str:
        main(["info", str(path), *flags])
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return run


@pytest.fixture
def released(tmp_path):
    """Writes a model with its autoencoder in the released layout."""

    def write(args: object) -> object:
        inside = {f"vae.{name}": value for name, value in small.autoencoder().state_dict().items()}
        state = small.model().state_dict() | inside
        torch.save({"model": state, "ema": state, "epochs": 3, "args": args}, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return write


def test_info_of_a_released_file(released, info):
    path = released(ARGS)
    words = {" ".join(line.split()) for line in info(path).splitlines()}
    assert {"weights ema; model is there too", "dim 64 from shapes", "token_order patch from args"} <= words
    assert "lr 0.0006" in words and "class_names none published default" in words
    facts = json.loads(info(path, "--json"))
    assert facts["model"]["config"]["time_shift"] == {"value": 2.0, "source": "args"}
    assert facts["model"]["weights"] == "ema" and facts["model"]["weights_in_file"] == ["ema", "model"]
    assert facts["model"]["parameters"] == sum(value.numel() for value in small.model().state_dict().values())
    assert facts["autoencoder"]["config"]["widths"]["value"] == [32, 32, 32]
    assert facts["model"]["released_as"] is None and facts["args"]["betas"] == [0.9, 0.95]


def test_info_of_our_files(tmp_path, info):
    network = small.model(num_classes=2, class_names=("cat", "dog"))
    digest = weights_file.save(tmp_path / "model.safetensors", network)
    facts = json.loads(info(tmp_path / "model.safetensors", "--json"))
    assert facts["model"]["config"]["class_names"] == {"value": ["cat", "dog"], "source": "file"}
    assert facts["metadata"]["digest"] == digest and "cat, dog" in info(tmp_path / "model.safetensors")
    tensors = {f"{part}/{n}": v for part in ("ema", "model") for n, v in small.autoencoder().state_dict().items()}
    config = {"autoencoder": dataclasses.asdict(small.NETWORK)}
    safetensors_files.save_tensors(tmp_path / "run", tensors, "training", config, step="5", network="autoencoder")
    facts = json.loads(info(tmp_path / "run", "--json"))
    assert facts["metadata"]["step"] == "5" and facts["args"] == {}
    assert facts["autoencoder"]["weights"] == "ema" and "model" not in facts


def test_info_names_the_released_model():
    for name, release in RELEASED_MODELS.items():
        assert _released_as(release.config) == f"BitDance-{name}"
    assert _released_as(AutoencoderConfig()) == "ae_d16c32" and _released_as(small.NETWORK) is None
    named = dataclasses.replace(RELEASED_MODELS["B-1X"].config, class_names=("x",) * 1000)
    assert _released_as(named) == "BitDance-B-1X"


def test_info_prints_odd_args(released, info):
    bomb: Any = ["lol"]
    for _ in range(60):
        bomb = [bomb, bomb]  # its text would have 2^60 words
    args = {"bomb": bomb, "escape": "\x1b[2J\nnew", "nan": float("nan"), 3: torch.ones(1), "long": list(range(1000))}
    path = released(args)
    assert len(info(path)) < 10_000 and "\x1b" not in info(path)
    facts = json.loads(info(path, "--json"), parse_constant=pytest.fail)
    assert facts["args"]["bomb"] == "<list>" and facts["args"]["3"] == "<Tensor>" and facts["args"]["nan"] == "nan"

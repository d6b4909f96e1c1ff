"""`bitdance doctor`: its lines, and what it makes of broken machines."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import constants

from bitdance.cli.main import main
from bitdance.sampling import pipeline


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """The current folder, without a compiler, which takes long to try."""
    monkeypatch.setattr("bitdance.sampling.sampler.find_compiler_problem", lambda device: "no compiler")
    monkeypatch.chdir(tmp_path)


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, str]]:
    main(["doctor", "--json", *arguments])
    return {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_working_machine(capsys, tmp_path):
    found = findings(capsys, "--offline")
    subjects = {"bitdance", "Python", "PyTorch", "cpu", "disk", "sampling", "pyarrow", "pillow-heif"}
    assert subjects <= found.keys() and "hub" not in found
    assert all(found[name]["state"] == "ok" for name in ("PyTorch", "cpu", "sampling", "pyarrow"))
    assert found["released models"]["state"] == "note" and "bitdance download" in found["released models"]["text"]
    assert found["torch.compile"]["state"] == "note" and "no compiler" in found["torch.compile"]["text"]
    assert not list(tmp_path.iterdir()), "it writes nothing"


def test_what_is_there_is_named(capsys, tmp_path):
    for name in ("models/BitDance-ImageNet/BitDance_B_16x.pt", "models/evaluation/VIRTUAL_imagenet256_labeled.npz"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = findings(capsys, "--offline")
    assert found["released models"] == {
        "state": "ok",
        "what": "released models",
        "text": "B-16X in models/BitDance-ImageNet",
    }
    assert found["for evaluation"]["state"] == "note" and "inception" in found["for evaluation"]["text"]


def test_problems_end_with_status_1(capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.1.0+cpu")
    monkeypatch.setattr(pipeline, "load_pipeline", lambda name: (_ for _ in ()).throw(ImportError("no\nsafetensors")))
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--offline"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and all(line.startswith(("  ok", "  note", "  problem")) for line in lines)
    problems = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  problem")]
    assert len(problems) == 2 and "2.1.0+cpu is too old" in problems[0] and "ImportError: no" in problems[1]


@pytest.mark.parametrize(
    ("variables", "endpoint", "words"),
    [
        ({}, "http://localhost:1", "localhost cannot be reached (Connection refused)"),
        ({"HTTPS_PROXY": "http://user:secret@proxy:80"}, "https://huggingface.co", "by the proxy proxy, not tried"),
    ],
)
def test_the_hub(capsys, monkeypatch, variables, endpoint, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hub = findings(capsys)["hub"]
    assert hub["state"] == "note" and words in hub["text"] and "secret" not in hub["text"]

"""What the programs of examples/cifar10 refuse."""

from __future__ import annotations

import importlib
import shutil

import numpy as np
import pytest
import small
import torch
from safetensors.torch import save_file

import bitdance
from bitdance.cli.main import call
from bitdance.runtime.atomic_files import lock_file
from bitdance.sampling.sampler import SamplingConfig, sample_noise, sample_tokens


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("classifier", "--data-path {few} --val-path {few} --epochs 0", "0 is invalid: it must be from 1 to 10000"),
        ("classifier", "--data-path {few} --val-path {few} --threads -1", "-1 is invalid: it must be from 1 to"),
        ("classifier", "--data-path {many} --val-path {few}", "many has more than 10 classes"),
        ("classifier", "--data-path {few} --val-path {few} --output {few}", "few is a folder: give the file to write"),
        ("compare_tokenizers", "--val-path {few} demo --threads 0", "0 is invalid: it must be from 1 to"),
        ("compare_tokenizers", "--val-path {few} --data-path {few} demo --bits 0", "--bits must be multiples of 1"),
        (
            "compare_tokenizers",
            "--val-path {few} demo",
            "classifier.safetensors is missing, damaged or of another network",
        ),
        (
            "transform_coding",
            "--val-path {few} --data-path {few} --bits 24577",
            "the number of blocks, from 1 to 24576",
        ),
        ("study", "--reference {few} --images 0", "0 is invalid: it must be from 4 to 1000000"),
        ("study", "--reference {few} --cfg-scale 0", "0.0 is invalid: it must be from 1 to 1000"),
        ("study", "--figures --output {damaged} --models demo-1x --cfg-scale 24", "demo-1x.csv is damaged: delete it"),
        ("study", "--reference {few} --equivalence", "1 is invalid: it must be from 2 to 10"),
        (
            "study",
            "--figures --output {study} --models demo-16x --images 7",
            "has no results of demo-16x with 7 images",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(tmp_path, monkeypatch, capsys, program, arguments, words):
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    monkeypatch.chdir(tmp_path)
    folders = {
        "few": small.pictures(tmp_path / "few", each=4, side=32),
        "many": small.pictures(tmp_path / "many", classes=11, each=1, side=32),
        "study": tmp_path / "study",
        "damaged": tmp_path,
    }
    shutil.copytree(small.ROOT / "docs" / "data", folders["study"])
    stored = (folders["study"] / "study-demo-1x.csv").read_text()
    (tmp_path / "study-demo-1x.csv").write_text(stored.rstrip().rsplit(",", 2)[0] + ",abc,earlier\n")
    weights = tmp_path / "classifier.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    monkeypatch.setattr(importlib.import_module("classifier"), "WEIGHTS", weights)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        call(importlib.import_module(program).main, arguments.format(**folders).split())
    torch.set_num_threads(threads)
    assert end.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_the_stored_study(monkeypatch, tmp_path, capsys):
    """Its figure is drawn; its test of equivalence pairs seeds by number and leaves out other numbers of images."""
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    study = importlib.import_module("study")
    data = small.ROOT / "docs" / "data"
    (tmp_path / "study-demo-1x.csv").write_text((data / "study-demo-1x.csv").read_text())
    header, *rows = (data / "equivalence-demo-1x.csv").read_text().splitlines()
    # The rows of 100 steps in another order than those which they are compared with, and rows of other images.
    exact = [row for row in rows if ",5000,100," in row]
    assert len(exact) == 8 and len(rows) == 40
    others = [row.replace(",5000,", ",50,") for row in rows if row not in exact]
    rows = [header, *reversed(exact), *(row for row in rows if row not in exact), *others]
    (tmp_path / "equivalence-demo-1x.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--figures", "--output", str(tmp_path), "--models", "demo-1x"]
    call(study.main, arguments)
    assert (tmp_path / "study-demo-1x.png").read_bytes().startswith(b"\x89PNG")
    call(study.main, [*arguments, "--equivalence", "--images", "5000"])
    verdicts = capsys.readouterr().out.splitlines()[-4:]
    assert [verdict.rsplit(": ", 1)[1] for verdict in verdicts] == ["equivalent"] * 2 + ["not shown", "equivalent"]
    assert verdicts[-1].startswith("dpmpp-2m-sde, 20 steps: 1.011 +- 0.015")


def test_a_study_continues_with_what_it_began_with(monkeypatch, tmp_path, capsys, refused):
    """A line that was not written to its end is measured again; other reference images are refused."""
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    study = importlib.import_module("study")
    monkeypatch.setattr(study, "settings", lambda scale, axes: [study.fast(4.0, num_steps=steps) for steps in (1, 2)])
    arguments = f"--output {tmp_path} --models demo-16x --threads 1 --images 4 --cfg-scale 4 --reference".split()
    pictures = [str(small.pictures(tmp_path / name, each=each, side=32)) for name, each in (("a", 2), ("b", 3))]
    call(study.main, [*arguments, pictures[0]])
    path = tmp_path / "study-demo-16x.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines)[:-3])
    capsys.readouterr()
    call(study.main, [*arguments, pictures[0]])
    assert capsys.readouterr().out.count("distance") == 1, "one setting is measured again"
    rows = [[line.split(",") for line in text] for text in (lines, path.read_text().splitlines())]
    assert [[*row[:-2], row[-1]] for row in rows[0]] == [[*row[:-2], row[-1]] for row in rows[1]], "but for the seconds"
    assert "other weights, images or another classifier" in refused(call, study.main, [*arguments, pictures[1]])


def test_bit_probabilities_are_those_of_whole_samples(monkeypatch):
    """The first token of samples with a constant guidance scale has the same bits, also in a group of four."""
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    study = importlib.import_module("study")
    monkeypatch.setattr(study, "BIT_SAMPLES", 6)
    pipeline, config = bitdance.load_pipeline("demo-4x", dtype="fp32"), SamplingConfig(3, 4.0, "constant")
    noise = sample_noise(pipeline.model, 5, torch.arange(6), config.num_draws)
    tokens = sample_tokens(pipeline.model, torch.zeros(6, dtype=torch.int64), noise, config)
    expected = (tokens[:, 0] > 0).float().mean(0)
    assert 0 < expected.mean() < 1 and torch.equal(study.bit_probabilities(pipeline, config, 5), expected)


def test_a_study_that_another_process_writes_is_refused(monkeypatch, tmp_path, refused):
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    study = importlib.import_module("study")
    pictures = small.pictures(tmp_path / "few", each=4, side=32)
    arguments = f"--reference {pictures} --output {tmp_path} --models demo-16x --threads 1".split()
    with lock_file(tmp_path / "study-demo-16x.lock", 1, ""):
        assert "another process writes" in refused(call, study.main, arguments)
    assert not (tmp_path / "study-demo-16x.csv").exists()


def test_there_is_no_figure_without_its_axes(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    header, *rows = (small.ROOT / "docs" / "data" / "study-demo-16x.csv").read_text().splitlines()
    (tmp_path / "study-demo-16x.csv").write_text("\n".join([header, *(row for row in rows if ",True," in row)]) + "\n")
    arguments = ["--figures", "--output", str(tmp_path), "--models", "demo-16x", "--cfg-scale", "24"]
    call(importlib.import_module("study").main, arguments)
    assert "no figure: " in capsys.readouterr().out and not (tmp_path / "study-demo-16x.png").exists()


def test_the_stored_classifier(monkeypatch):
    """It recognizes most samples that the embedded model draws of one class."""
    monkeypatch.syspath_prepend(small.ROOT / "examples" / "cifar10")
    network = importlib.import_module("classifier").extractor()
    images = bitdance.load_pipeline("demo")([7] * 8, seed=0, output="np")
    features = network(np.asarray(images))
    assert features["pool"].shape == (8, 256) and features["logits"].shape == (8, 10)
    assert (features["logits"].argmax(1) == 7).sum() >= 6

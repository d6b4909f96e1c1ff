"""Figures while a model is trained: the right ones, of any number of processes, and without a trace in the weights."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import small
from PIL import Image
from test_evaluation import ALONE, SMALL, pixels, save

from bitdance.cli.main import main
from bitdance.metrics import references
from bitdance.metrics.feature_set import extract_features, read_feature_set, write_feature_set
from bitdance.metrics.features import FeatureExtractor
from bitdance.metrics.image_sources import open_source
from bitdance.metrics.report import compute_metrics
from bitdance.runtime.errors import UserError
from bitdance.sampling.pipeline import Generator, make_labels
from bitdance.sampling.sampler import SamplingConfig
from bitdance.training import status
from bitdance.training.evaluation import LOGGED, Evaluation
from bitdance.training.losses import BitDanceLoss
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, ModelSizes, TrainConfig
from bitdance.weights import weights_file

SIZES = ModelSizes(dim=64, n_layer=2, head_dim=64, head_layers=2, head_ada_ln=1, cls_token_num=2, drop_rate=0.1)
IMAGES = 10


@pytest.fixture(autouse=True)
def plugged(monkeypatch, tmp_path):
    """The small network of tests/test_evaluation.py in place of the Inception network; a cache of the test's own."""
    monkeypatch.setattr(references.FeatureExtractors, "__call__", lambda self: (SMALL,))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with autoencoder.safetensors, pictures/ and references.npz, stored features."""
    folder = tmp_path_factory.mktemp("place")
    weights_file.save(folder / "autoencoder.safetensors", small.autoencoder())
    small.pictures(folder / "pictures")
    source = open_source(save(folder / "real.npz", pixels(20, 16, seed=5)))
    write_feature_set(folder / "reference.npz", extract_features(source, [SMALL], ALONE)[0])
    return folder


def settings(place: pathlib.Path, results: pathlib.Path, **changes: object) -> TrainConfig:
    fixed: dict[str, object] = {
        "image_size": 16, "epochs": 4, "batch_size": 4, "lr": 3e-3, "warmup_steps": 0, "decay_start": 0,
        "ema": 0.9, "precision": "fp32", "num_workers": 2, "log_every": 1, "preview_every": 0,
        "eval_every": 5, "eval_images": IMAGES, "eval_reference": str(place / "reference.npz"), "eval_num_steps": 3,
        "eval_cfg_scale": 2.0,
    }  # fmt: skip
    return TrainConfig(data_path=place / "pictures", output=results, **{**fixed, **changes})  # type: ignore[arg-type]


def train(place: pathlib.Path, results: pathlib.Path, **changes: object) -> None:
    run = settings(place, results, **changes)
    train_model(run, SIZES, LossConfig(perturb_rate=0.2), place / "autoencoder.safetensors", "cpu")


def log(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: pathlib.Path) -> str:
    return weights_file.read(folder / "model.safetensors").metadata["digest"]


def test_the_figures_are_those_of_the_averaged_weights(place, tmp_path, capsys):
    train(place, tmp_path / "run")
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_fid" in line] == [5, 10, 12]
    assert set(LOGGED) < set(lines[-1]) and not set(LOGGED) & set(lines[0])
    assert len({line["eval_fid"] for line in lines if "eval_fid" in line}) == 3  # the weights move
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 5: ")]
    assert f"FID {lines[4]['eval_fid']:.4g}, IS " in said and said.endswith(f" of {IMAGES} images")
    # The same images, made of the file that the run ends with.
    model = weights_file.load_model(tmp_path / "run" / "model.safetensors")
    network = weights_file.load_autoencoder(place / "autoencoder.safetensors")
    generator = Generator(model, network, SamplingConfig(3, 2.0), seed=0)
    labels = make_labels("balanced", IMAGES, 3, seed=0)
    made = [generator.images(range(i, min(i + 4, IMAGES)), labels[i : i + 4].tolist()).pixels for i in (0, 4, 8)]
    source = open_source(save(tmp_path / "made.npz", np.concatenate(made), labels))
    stored = read_feature_set(place / "reference.npz")
    expected = compute_metrics(extract_features(source, [SMALL], ALONE)[0], stored)
    for name in LOGGED:
        assert lines[-1][name] == pytest.approx(expected[name.removeprefix("eval_")], rel=1e-6), name


def test_evaluation_changes_nothing_of_the_training(place, tmp_path):
    train(place, tmp_path / "plain", eval_every=0)
    train(place, tmp_path / "evaluated", eval_every=2)
    plain, evaluated = log(tmp_path / "plain"), log(tmp_path / "evaluated")
    assert sum("eval_fid" in line for line in evaluated) == 6 and not any("eval_fid" in line for line in plain)
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in plain] == [line[name] for line in evaluated]
    assert weights(tmp_path / "plain") == weights(tmp_path / "evaluated")
    # Begun with it and gone on without, and in other steps: no other run.
    train(place, tmp_path / "both", eval_every=2, max_steps=5)
    train(place, tmp_path / "both", eval_every=0, eval_images=4, max_steps=8)
    train(place, tmp_path / "both", eval_every=3, eval_num_steps=2, eval_cfg_scale=1.0)
    assert weights(tmp_path / "both") == weights(tmp_path / "plain")


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import test_evaluation
from bitdance.cli.main import main
from bitdance.metrics import references

references.FeatureExtractors.__call__ = lambda self: (test_evaluation.SMALL,)
main()
"""


def test_two_processes_give_the_same_figures(place, tmp_path):
    """Of weights that stay, since those of two processes differ by rounding."""
    (tmp_path / "train.py").write_text(SCRIPT)
    for processes in (1, 2):
        flags = {
            "autoencoder": place / "autoencoder.safetensors", "data_path": place / "pictures",
            "output": tmp_path / str(processes), "image_size": 16, **small.SIZES, "batch_size": 4,
            "max_steps": 2, "lr": 0, "precision": "fp32", "num_workers": 1, "eval_every": 1,
            "eval_images": IMAGES, "eval_reference": place / "reference.npz", "eval_num_steps": 3, "log_every": 1,
            "preview_every": 0, "device": "cpu",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        run = small.run(tmp_path / "train.py", small.ROOT / "tests", "train", *words, processes=processes)
        assert run.stdout.count("step 1: FID ") == 1  # one process says it
    one, two = (log(tmp_path / str(processes)) for processes in (1, 2))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a["eval_fid"] > 0
        for name in LOGGED:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6), name


def test_in_bf16(place, tmp_path):
    train(place, tmp_path / "run", precision="bf16", max_steps=2)
    train(place, tmp_path / "plain", max_steps=2)
    a, b = (log(tmp_path / name)[-1]["eval_fid"] for name in ("run", "plain"))
    assert a > 0 and a != b


def test_images_are_of_the_classes_that_occur(place, tmp_path):
    objective = BitDanceLoss(small.model(), small.autoencoder(), LossConfig(), seed=3)
    run = settings(place, tmp_path, eval_reference="none", eval_images=7, batch_size=400)
    evaluation = Evaluation(objective, run, np.array([2, 2, 0, 2]), ALONE, in_bf16=False)
    labels = evaluation._samples.labels
    assert labels is not None and sorted(np.bincount(labels).tolist()) == [0, 3, 4]
    found = evaluation.figures()
    assert set(found) == {"eval_inception_score"} and found == evaluation.figures()  # the same each time
    assert evaluation._batch_size == 32


def test_a_reference_of_pictures_is_looked_at_once(place, tmp_path, monkeypatch):
    pictures = {"eval_reference": str(place / "pictures"), "max_steps": 1}
    train(place, tmp_path / "a", **pictures)
    assert len(list((tmp_path / "models" / "evaluation" / "features").iterdir())) == 1
    monkeypatch.setattr(references, "extract_features", None)
    train(place, tmp_path / "b", **pictures)
    assert log(tmp_path / "a")[0]["eval_fid"] == log(tmp_path / "b")[0]["eval_fid"]


def test_what_is_wrong_is_said_before_the_first_step(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--eval-every needs images to compare with: name them with --eval-reference"):
        settings(place, tmp_path, eval_reference=None)
    for name, value, words in (
        ("eval_images", 3, "--eval-images 3 .* at least 4"),
        ("eval_num_steps", 0, "--eval-steps 0"),
        ("eval_cfg_scale", -1.0, "--eval-cfg-scale -1.0"),
        ("eval_every", -1, "--eval-every -1"),
    ):
        with pytest.raises(UserError, match=words):
            settings(place, tmp_path, **{name: value})
    with pytest.raises(UserError, match="--eval-every is not there for autoencoders"):
        train_autoencoder(settings(place, tmp_path), small.NETWORK, AutoencoderLossConfig(), "cpu")
    with pytest.raises(UserError, match="no images at"):
        train(place, tmp_path / "run", eval_reference=str(tmp_path / "nothing.npz"))
    other = FeatureExtractor("another", SMALL.size, SMALL.function, digest="1" * 64)
    monkeypatch.setattr(references.FeatureExtractors, "__call__", lambda self: (other,))
    with pytest.raises(UserError, match=r"reference .* has features of another extractor"):
        train(place, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "missing.pth"
    with pytest.raises(UserError, match=r"no Inception weights in \S*missing.pth: .*`eval_inception`"):
        train(place, tmp_path / "run", eval_inception=missing)
    assert not list(tmp_path.glob("**/log.jsonl"))


def test_info_shows_the_figures(place, tmp_path, capsys):
    train(place, tmp_path / "run", log_every=4)  # so that some lines tell of an evaluation alone
    last = log(tmp_path / "run")[-1]
    facts = status.describe(tmp_path / "run")
    assert facts["evaluation"] == {name: last[name] for name in ("step", *LOGGED)}
    assert facts["step"] == 12 and facts["loss"] == last["loss"] and facts["seconds_since_last_line"] < 100
    capsys.readouterr()
    main(["info", str(tmp_path / "run")])
    assert f"evaluation            FID {last['eval_fid']:.4g}, IS " in (out := capsys.readouterr().out), out
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.size == (960, 810)
        below = np.asarray(picture.convert("RGB"))[540:].astype(int)
    blue = (below[..., 2] > below[..., 0] + 60).reshape(270, 3, 320).sum((0, 2))
    assert (blue > 50).all()  # a curve in each of the three

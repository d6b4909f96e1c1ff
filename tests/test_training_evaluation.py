"""Metrics of samples during training: correct, equal for any number of processes, and without effect on the weights."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import small
import torch
from test_evaluation import SINGLE, SMALL, pixels, save

from bitdance.cli.main import main
from bitdance.config import ModelSizes
from bitdance.data.images import open_images
from bitdance.metrics import references
from bitdance.metrics.feature_set import extract_features, read_feature_set, write_feature_set
from bitdance.metrics.features import FeatureExtractor
from bitdance.metrics.image_sources import open_source
from bitdance.metrics.psnr_ssim import psnr
from bitdance.metrics.report import compute_metrics
from bitdance.runtime.errors import UserError
from bitdance.sampling.labels import make_labels
from bitdance.sampling.pipeline import Pipeline
from bitdance.sampling.sampler import SamplingConfig
from bitdance.training import evaluation, status
from bitdance.training.evaluation import LOGGED, Evaluation, format_evaluation
from bitdance.training.loader import Loader
from bitdance.training.setup import train_autoencoder, train_model
from bitdance.training.train_config import AutoencoderLossConfig, LossConfig, TrainConfig
from bitdance.weights import weights_file

pytestmark = pytest.mark.usefixtures("quick_previews")

NAMED = dataclasses.replace(SMALL, name="another")
SIZES = ModelSizes(**small.SIZES, parallel_num=4)  # with short samplings
IMAGES = 10
METRICS = LOGGED.keys() - {"eval_accuracy", "eval_frechet_distance"}


def use_small_extractor() -> None:
    """Replaces the Inception network by the small one of tests/test_evaluation.py, in another process."""
    references.FeatureExtractors.loaded = (SMALL,)


@pytest.fixture(autouse=True)
def small_extractor(monkeypatch, tmp_path):
    """The same in this process, with a cache of its own in the working directory."""
    monkeypatch.setattr(references.FeatureExtractors, "loaded", (SMALL,))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def place(place) -> pathlib.Path:
    """With reference.npz, stored features."""
    source = open_source(save(place / "real.npz", pixels(20, 16, seed=5)))
    write_feature_set(place / "reference.npz", extract_features(source, [SMALL], SINGLE)[0])
    return place


def settings(place: pathlib.Path, output: pathlib.Path, **changes: Any) -> TrainConfig:
    evaluation = {
        "eval_every": 5, "eval_images": IMAGES, "eval_reference": str(place / "reference.npz"), "eval_num_steps": 3,
        "eval_cfg_scale": 2.0,
    }  # fmt: skip
    return small.train_config(place / "pictures", output, **{**evaluation, **changes})


def train(place: pathlib.Path, output: pathlib.Path, **changes: Any) -> None:
    run = settings(place, output, **changes)
    train_model(run, SIZES, LossConfig(perturb_rate=0.2, drop_rate=0.1), place / "autoencoder.safetensors", "cpu")


def weights(folder: pathlib.Path) -> str:
    return weights_file.read(folder / "model.safetensors").metadata["digest"]


def test_metrics_are_those_of_the_ema_weights_and_info_shows_them(place, tmp_path, capsys):
    run = tmp_path / "run"
    train(place, run, epochs=2, eval_every=2, log_every=3)  # so that some lines are of an evaluation only
    lines = [line for line in small.read_log(run) if "eval_fid" in line]
    assert [line["step"] for line in lines] == [2, 4, 6] and set(lines[-1]) > METRICS
    assert ["loss" in line for line in lines] == [False, False, True]
    assert not any(METRICS & set(line) for line in small.read_log(run) if line not in lines)
    assert len({line["eval_fid"] for line in lines}) == 3  # the weights change
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2: ")]
    assert f"FID {lines[0]['eval_fid']:.4g}, IS " in printed and printed.endswith(f" of {IMAGES} images")
    # Of the same images, sampled from the file that the run ends with.
    model = weights_file.load_model(run / "model.safetensors")
    pipeline = Pipeline(model, weights_file.load_autoencoder(place / "autoencoder.safetensors"))
    labels = make_labels("balanced", IMAGES, 3, seed=0)
    images = [
        pipeline.generate(
            range(i, min(i + 4, IMAGES)), labels[i : i + 4].tolist(), SamplingConfig(3, 2.0, solver="dpmpp-2m-sde")
        ).pixels
        for i in (0, 4, 8)
    ]
    source = open_source(save(tmp_path / "samples.npz", np.concatenate(images), labels))
    expected = compute_metrics(extract_features(source, [SMALL], SINGLE)[0], read_feature_set(place / "reference.npz"))
    for name in METRICS:
        assert lines[-1][name] == pytest.approx(expected[name.removeprefix("eval_")], rel=1e-6), name

    facts = status.describe_run(run)
    assert facts["evaluation"] == {name: lines[-1][name] for name in ("step", *METRICS)} | dict.fromkeys(
        LOGGED.keys() - METRICS
    )
    assert facts["step"] == 6 and facts["loss"] == lines[-1]["loss"] and facts["seconds_since_last_line"] < 100
    main(["info", str(run)])
    assert f"evaluation            FID {lines[-1]['eval_fid']:.4g}, IS " in (out := capsys.readouterr().out), out
    page = (run / "report.html").read_text()
    assert page.count("<svg ") == 7, "loss, FID, IS, precision and recall, learning rate, gradient norm, images/s"
    assert f"<td>{format_evaluation(facts['evaluation'])} at step 6" in page


def test_evaluation_does_not_change_the_training(place, tmp_path):
    train(place, tmp_path / "plain", epochs=2, eval_every=0)
    train(place, tmp_path / "evaluated", epochs=2, eval_every=2)
    plain, evaluated = small.read_log(tmp_path / "plain"), small.read_log(tmp_path / "evaluated")
    assert sum("eval_fid" in line for line in evaluated) == 3 and not any("eval_fid" in line for line in plain)
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in plain] == [line[name] for line in evaluated]
    assert weights(tmp_path / "plain") == weights(tmp_path / "evaluated")
    # A run may be resumed without it, and with other settings of it.
    train(place, tmp_path / "both", epochs=2, eval_every=2, max_steps=2)
    train(place, tmp_path / "both", epochs=2, eval_every=0, eval_images=4, max_steps=4)
    train(place, tmp_path / "both", epochs=2, eval_every=3, eval_num_steps=2, eval_cfg_scale=1.0)
    assert weights(tmp_path / "both") == weights(tmp_path / "plain")


def test_two_processes_give_the_same_metrics(place, tmp_path, capsys):
    """With a learning rate of 0, since the weights of two processes differ by rounding."""
    flags = {
        "autoencoder": place / "autoencoder.safetensors", "data_path": place / "pictures", "image_size": 16,
        **small.SIZES, "parallel_num": 4, "batch_size": 4, "max_steps": 2, "lr": 0, "precision": "fp32",
        "num_workers": 1, "eval_every": 1, "eval_images": IMAGES, "eval_reference": place / "reference.npz",
        "eval_num_steps": 3, "log_every": 1, "preview_every": 0, "device": "cpu",
    }  # fmt: skip
    words = ["train", *small.flags(flags)]
    processes = small.start(tmp_path, [*words, "--output", str(tmp_path / "2")], 2, use_small_extractor)
    main([*words, "--output", str(tmp_path / "1")])
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "err0").read_text()
    printed = [capsys.readouterr().out, *((tmp_path / f"out{rank}").read_text() for rank in (0, 1))]
    assert [text.count("step 1: FID ") for text in printed] == [1, 1, 0]  # only the first process prints
    one, two = (small.read_log(tmp_path / name) for name in ("1", "2"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a["eval_fid"] > 0
        for name in METRICS:
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6), name


def test_in_bf16(place, tmp_path):
    train(place, tmp_path / "bf16", precision="bf16", max_steps=2)
    train(place, tmp_path / "fp32", max_steps=2)
    a, b = (small.read_log(tmp_path / name)[-1]["eval_fid"] for name in ("bf16", "fp32"))
    assert a > 0 and a != b


def test_samples_are_of_the_classes_that_occur(place, tmp_path):
    pipeline = Pipeline(small.model(), small.autoencoder())
    run = settings(place, tmp_path, eval_reference="none", eval_images=7, batch_size=400)
    evaluation = Evaluation(pipeline, run, np.array([2, 2, 0, 2]), SINGLE, in_bf16=False)
    labels = evaluation._source.labels
    assert labels is not None and sorted(np.bincount(labels).tolist()) == [0, 3, 4]
    found = evaluation.metrics()
    assert set(found) == {"eval_inception_score"} and found == evaluation.metrics()  # the same each time
    assert evaluation._batch_size == 32


def test_features_of_a_reference_of_images_are_extracted_once(place, tmp_path, monkeypatch):
    images = {"eval_reference": str(place / "pictures"), "max_steps": 1}
    train(place, tmp_path / "a", **images)
    assert len(list((tmp_path / "models" / "evaluation" / "features").iterdir())) == 1
    monkeypatch.setattr(references, "extract_features", None)
    monkeypatch.setattr(type(open_source(place / "pictures", 16)), "blocks", None)  # nor is their identity of pixels
    train(place, tmp_path / "b", **images)
    a, b = (small.read_log(tmp_path / name)[0]["eval_fid"] for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval_reference": None}, "`eval_every` needs images to compare with: name them with `eval_reference`"),
        ({"eval_images": 3}, "eval_images=3 .* at least 4"),
        ({"eval_num_steps": 0}, "eval_num_steps=0"),
        ({"eval_cfg_scale": -1.0}, "eval_cfg_scale=-1.0"),
        ({"eval_every": -1}, "eval_every=-1"),
    ],
)
def test_invalid_settings(place, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        settings(place, tmp_path, **changes)


def test_invalid_input_is_found_before_the_first_step(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="`eval_every` of an autoencoder needs held-out images"):
        train_autoencoder(settings(place, tmp_path), small.NETWORK, AutoencoderLossConfig(), "cpu")
    with pytest.raises(UserError, match="no images at"):
        train(place, tmp_path / "run", eval_reference=str(tmp_path / "nothing.npz"))
    other = FeatureExtractor("another", SMALL.size, SMALL.function, digest="1" * 64)
    monkeypatch.setattr(references.FeatureExtractors, "loaded", (other,))
    with pytest.raises(UserError, match=r"reference .* has features of another extractor"):
        train(place, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    missing = tmp_path / "missing.pth"
    with pytest.raises(UserError, match=r"no Inception weights in \S*missing.pth: .*`eval_inception`"):
        train(place, tmp_path / "run", eval_inception=missing)
    assert not list(tmp_path.glob("**/log.jsonl"))


def test_an_autoencoder_is_evaluated_on_held_out_images(place, tmp_path, monkeypatch):
    """Its metrics are those of the reconstructions of its EMA weights, which are those that the run ends with."""
    monkeypatch.setattr(references.FeatureExtractors, "loaded", (NAMED,))
    held_out = small.pictures(tmp_path / "held out")
    run = settings(place, tmp_path / "run", eval_reference=None, val_path=held_out, eval_every=2, epochs=1)
    path = train_autoencoder(run, small.NETWORK, AutoencoderLossConfig(), "cpu")
    line = [line for line in small.read_log(tmp_path / "run") if "eval_frechet_distance" in line][-1]
    network = weights_file.load_autoencoder(path)
    originals = open_source(held_out, 16, limit=IMAGES)
    images = next(originals.blocks(IMAGES))
    decoded = evaluation.reconstruct(network, torch.from_numpy(images)).numpy()
    reference, samples = (
        extract_features(open_source(save(tmp_path / f"{name}.npz", value)), [NAMED], SINGLE)[0]
        for name, value in (("real", images), ("decoded", decoded))
    )
    assert line["eval_frechet_distance"] == pytest.approx(compute_metrics(samples, reference)["fid"], rel=1e-4)
    assert "eval_fid" not in line
    loader = Loader(open_images(held_out), dataclasses.replace(run, random_crop=False), SINGLE)
    batches = [loader.load(step).inputs for step in range(loader.steps_per_epoch)]
    ratios = torch.cat([psnr(batch, evaluation.reconstruct(network, batch)) for batch in batches])
    assert line["val_psnr"] == pytest.approx(ratios.mean().item(), abs=1e-3) and 0 < line["val_ssim"] < 1
